"""Patches: from pixels and back, their grid on an image, the image decoder's target, the
visible."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mmclip.config import ResizeMode
from mmclip.squares import Span, square_spans


def patchify(image: Float[Tensor, "b 1 h w"], patch_size: int) -> Float[Tensor, "b n p"]:
    """The pixels of each patch, patches and pixels in reading order.

    Raises:
        ValueError: When patches do not fill the image.
    """
    b, _, h, w = image.shape
    if h % patch_size or w % patch_size:
        raise ValueError(f"an image of {h}x{w} px cannot be cut into patches of {patch_size} px")
    grid = image.reshape(b, h // patch_size, patch_size, w // patch_size, patch_size)
    patches = (h // patch_size) * (w // patch_size)
    return grid.transpose(2, 3).reshape(b, patches, patch_size * patch_size)


def unpatchify(patches: Float[Tensor, "b n p"], width_px: int) -> Float[Tensor, "b 1 h w"]:
    """The image that `patchify` cut, given its width."""
    b, n, p = patches.shape
    side, columns = math.isqrt(p), width_px // math.isqrt(p)
    grid = patches.reshape(b, n // columns, columns, side, side).transpose(2, 3)
    return grid.reshape(b, 1, n // columns * side, width_px)


def normalise_patches(patches: Float[Tensor, "b n p"], eps: float = 1e-6) -> Float[Tensor, "b n p"]:
    """Each patch scaled to mean 0, std 1: what the image decoder has to predict.

    Args:
        patches: Pixels.
        eps: Added to the variance; a patch of one grey gives 0.

    Source: MAE section 3 and its released code (unbiased variance, eps 1e-6).
    """
    var, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True)
    return (patches.float() - mean) / (var + eps).sqrt()


def rescale_patches(
    normalised: Float[Tensor, "b n p"], like: Float[Tensor, "b n p"], eps: float = 1e-6
) -> Float[Tensor, "b n p"]:
    """Undoes `normalise_patches`: each patch with the mean and deviation of another.

    Args:
        normalised: Patches of mean 0 and deviation 1, such as the image decoder predicts.
        like: Pixels; these patches lend their mean and deviation.
        eps: As in `normalise_patches`.
    """
    var, mean = torch.var_mean(like.float(), dim=-1, keepdim=True)
    return normalised.float() * (var + eps).sqrt() + mean


def lesion_ratio_of_patches(
    lesion: Float[Tensor, "b 1 h w"], patch_size: int
) -> Float[Tensor, "b n"]:
    """Share of each patch that a lesion covers; `lesion` is 1 inside and 0 outside."""
    return patchify(lesion, patch_size).mean(-1)


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """The patches that an encoder's features lie on: squares of an image, shifted up and left.

    A ViT's features lie on the patches that `patchify` cuts, a shift of 0. Each strided convolution
    of a ResNet takes its first place on the first pixel, so that feature k looks at pixel k *
    patch_size: its patch is the square around that pixel, a shift of half a patch. What is masked,
    predicted and counted as lesion must lie where the features lie. Patches of the first row and
    column reach over the edge, where the border's pixels are repeated; the last half patch belongs
    to none.

    Source: ours; docs/method.md, row "where features lie".
    """

    patch_size: int
    shift_px: int = 0

    def shifted(self, image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        """The image moved down and right, so that `patchify` cuts it along the features."""
        if not self.shift_px:
            return image
        moved = image[..., : -self.shift_px, : -self.shift_px]
        return F.pad(moved, (self.shift_px, 0, self.shift_px, 0), mode="replicate")

    def cut(self, image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b n p"]:
        """The pixels under each feature, see `patchify`."""
        return patchify(self.shifted(image), self.patch_size)

    def lesion_ratio(self, lesion: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b n"]:
        """See `lesion_ratio_of_patches`."""
        return lesion_ratio_of_patches(self.shifted(lesion), self.patch_size)

    def blanked(
        self, image: Float[Tensor, "b 1 h w"], is_masked: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b 1 h w"]:
        """The image with mid-grey, 0, in place of the masked patches."""
        under = torch.zeros_like(patchify(image, self.patch_size)) + is_masked[..., None]
        is_under = unpatchify(under, image.shape[-1]) > 0
        s = self.shift_px
        is_under = F.pad(is_under[..., s:, s:], (0, s, 0, s))
        return image.masked_fill(is_under, 0.0)

    def on_image(self, values: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Values of features for the patches of `patchify`: a mean of four where they are shifted.

        For maps that are shown on the image or scored there. The last row and column keep their
        place: there is nothing beyond.
        """
        if not self.shift_px:
            return values
        side = math.isqrt(values.shape[1])
        grid = values.unflatten(1, (side, side))
        for dim in (1, 2):
            last = side - 1
            following = torch.cat([grid.narrow(dim, 1, last), grid.narrow(dim, last, 1)], dim)
            grid = torch.lerp(grid, following, 0.5)
        return grid.flatten(1)


def gather_visible(
    features: Float[Tensor, "b n d"], is_masked: Bool[Tensor, "b n"], n_masked: int
) -> Float[Tensor, "b v d"]:
    """The features that are not masked, in their order: what an encoder of visible patches reads.

    Args:
        features: One a patch.
        is_masked: Masks `n_masked` in every row.
        n_masked: See `masked_patch_count`; an argument, so that the device need not be asked.
    """
    return gather_tokens(features, first_positions(~is_masked, is_masked.shape[1] - n_masked))


def scatter_visible(
    visible: Float[Tensor, "b v d"], is_masked: Bool[Tensor, "b n"]
) -> Float[Tensor, "b n d"]:
    """Puts what `gather_visible` kept back to its places, with 0 at the masked ones."""
    return scatter_tokens(visible, first_positions(~is_masked, visible.shape[1]), ~is_masked)


def first_positions(is_wanted: Bool[Tensor, "b s"], n: int) -> Int[Tensor, "b n"]:
    """The places wanted in each row, in order; a row that wants fewer than n is filled up."""
    return (~is_wanted).byte().argsort(dim=1, stable=True)[:, :n]


def gather_tokens(
    x: Float[Tensor, "b s d"], positions: Int[Tensor, "b n"]
) -> Float[Tensor, "b n d"]:
    """What stands at some places of each row."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[2]))


def scatter_tokens(
    x: Float[Tensor, "b n d"], positions: Int[Tensor, "b n"], is_wanted: Bool[Tensor, "b s"]
) -> Float[Tensor, "b s d"]:
    """Puts what `gather_tokens` took back to its places, with 0 where nothing was wanted."""
    out = x.new_zeros(*is_wanted.shape, x.shape[2])
    out = out.scatter(1, positions[..., None].expand_as(x), x)
    return out.masked_fill(~is_wanted[..., None], 0.0)


@dataclass(frozen=True, slots=True)
class Grid:
    """How a square of image_size x image_size is cut into side x side patches, from the upper left.

    An image lies in the square as `square_spans` says; what a whole number of patches does not
    fill, and what is cropped, is not seen.
    """

    side: int
    patch_size: int
    image_size: int
    resize: ResizeMode = "squash"

    def numbers(
        self, height: int, width: int
    ) -> tuple[Int[np.ndarray, " height"], Int[np.ndarray, " width"]]:
        """The row and the column of patches that the centre of each pixel of an image lies in.

        Args:
            height: Of the image as it was published, px; so is the width.

        Returns:
            0 to side - 1; `side` for a pixel that no patch sees.
        """
        spans = square_spans(height, width, self.image_size, self.resize)
        rows, columns = (
            self._along(n_px, span) for n_px, span in zip((height, width), spans, strict=True)
        )
        return rows, columns

    def _along(self, n_px: int, span: Span) -> Int[np.ndarray, " n_px"]:
        # (i + 1/2 - start) / length of the part that is seen, times its size on the square: in
        # whole numbers, so that a centre on the edge of a patch falls to the same one everywhere.
        centres = (2 * np.arange(n_px, dtype=np.int64) + 1 - 2 * span.start) * span.size
        number = (centres + 2 * span.length * span.first) // (2 * span.length * self.patch_size)
        is_seen = (centres > 0) & (centres < 2 * span.length * span.size)
        return np.where(is_seen, np.minimum(number, self.side), self.side)

    def centre_px(self, row: int, column: int, height: int, width: int) -> tuple[float, float]:
        """x and y of the centre of what a patch has of an image, in pixels of the image.

        Args:
            row: Of a patch that has a pixel of the image.
            column: Of the patch.
            height: Of the image, px; so is the width.
        """
        spans = square_spans(height, width, self.image_size, self.resize)
        y, x = (
            sum(
                span.start + min(max(edge - span.first, 0), span.size) * span.length / span.size
                for edge in (number * self.patch_size, (number + 1) * self.patch_size)
            )
            / 2
            for number, span in zip((row, column), spans, strict=True)
        )
        return x, y

    def on_image(
        self, values: Float[np.ndarray, "side side"], height: int, width: int
    ) -> Float[np.ndarray, "side side"]:
        """The values of the patches that have a pixel of an image; NaN for those without."""
        rows, columns = self.numbers(height, width)
        has_rows, has_columns = (np.isin(np.arange(self.side), some) for some in (rows, columns))
        return np.where(np.outer(has_rows, has_columns), values, np.nan).astype(values.dtype)

    def over_image(
        self, values: Shaped[np.ndarray, "side side"], height: int, width: int
    ) -> Shaped[np.ndarray, "height width"]:
        """The value of its patch for each pixel of an image; NaN where the model did not look.

        Raises:
            ValueError: When there are pixels that no patch sees and the values know no NaN.
        """
        rows, columns = self.numbers(height, width)
        if max(rows.max(), columns.max()) == self.side:
            if not np.issubdtype(values.dtype, np.floating):
                raise ValueError(
                    f"{self.side} patches of {self.patch_size} px do not fill {self.image_size} "
                    f"px, and values of type {values.dtype} have no NaN for the rest; give floats"
                )
            values = np.pad(values, ((0, 1), (0, 1)), constant_values=np.nan)
        return values[np.ix_(rows, columns)]

    def count_pixels(
        self, is_inside: Bool[np.ndarray, "h w"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The pixels of each patch that lie in a place of the image, and all of its pixels."""
        rows, columns = (
            np.eye(self.side + 1, dtype=np.float32)[numbers][:, : self.side]
            for numbers in self.numbers(*is_inside.shape)
        )
        inside = rows.T @ is_inside.astype(np.float32) @ columns
        total = np.outer(rows.sum(0), columns.sum(0))
        return torch.from_numpy(inside).flatten(), torch.from_numpy(total).flatten()
