"""The rows that a task reads from data folders, their images as tensors, and augmentation."""

import hashlib
import logging
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mmclip.config import GREY_MEAN, GREY_STD, AugmentConfig, ResizeMode
from mmclip.data.cache import ImageCache
from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.images import resize_image
from mmclip.data.manifest import read_manifest
from mmclip.data.sample import Sample
from mmclip.data.versions import changed_since

logger = logging.getLogger(__name__)


def normalise(images: UInt8[Tensor, "b h w"]) -> Float[Tensor, "b 1 h w"]:
    """uint8 images in model space: (x / 255 - GREY_MEAN) / GREY_STD.

    Source: what ViTImageProcessor computes from rescale_factor, image_mean and image_std.
    """
    return ((images.float() / 255 - GREY_MEAN) / GREY_STD).unsqueeze(1)


AUGMENT_UNIFORMS = 9
"""Uniform random numbers of an image's augmentation; the last three place its crop."""


def augment(
    image: Float[Tensor, "b 1 h w"],
    uniforms: Float[Tensor, "b u"],
    config: AugmentConfig,
    size: int | None = None,
) -> Float[Tensor, "b 1 s s"]:
    """Crops, rotates, shifts, scales and re-exposes images by uniform random numbers.

    Without a crop, 0.5 everywhere is no change.

    Never mirrored: a report says left and right. What comes from outside the image is black.

    Args:
        image: In model space.
        uniforms: AUGMENT_UNIFORMS of them; six do without a crop.
        config: Ranges.
        size: Side of the result, in px; None leaves it as it is.

    Source: ours; small ranges, as a patient can turn and an exposure can differ. Crops without a
        change of the aspect: MGCA (arXiv:2210.06044), which cuts 224 of 256 px.
    """
    return _augment_light(image, lambda some: some - BLACK, uniforms, config, size)


BLACK = -GREY_MEAN / GREY_STD
"""What has no light, in model space."""

IMAGES_AT_ONCE = 2
"""Images that a CPU augments at a time. [chosen: two of 224 px, their grid and result fit into
the cache of a core; 32 at once take nearly twice as long]"""


def _augment_light(
    images: Tensor,
    light_of: Callable[[Tensor], Tensor],
    uniforms: Float[Tensor, "b u"],
    config: AugmentConfig,
    size: int | None,
) -> Float[Tensor, "b 1 s s"]:
    """As `augment`, given what takes BLACK from images: what comes from outside is then 0."""
    device = images.device
    u = 2 * uniforms.float() - 1  # -1..1
    contrast = 1 + u[:, 4] * config.contrast
    brightness = u[:, 5] * config.brightness / GREY_STD
    of_image = torch.stack([contrast, BLACK * contrast + brightness]).view(2, -1, 1, 1, 1)
    factor, offset = of_image.to(device)
    theta = affine_of(uniforms, config).to(device)
    side = images.shape[-1] if size is None else size
    out = torch.empty(len(images), 1, side, side, device=device)
    n = IMAGES_AT_ONCE if device.type == "cpu" else max(len(images), 1)
    parts = zip(*(tensor.split(n) for tensor in (images, theta, factor, offset, out)), strict=True)
    for image, where, times, plus, made in parts:
        torch.addcmul(plus, warp(light_of(image), where, side), times, out=made)
    return out


def augmented(
    pixels: UInt8[Tensor, "b h w"],
    uniforms: Float[Tensor, "b u"],
    config: AugmentConfig,
    size: int | None = None,
) -> Float[Tensor, "b 1 s s"]:
    """Images in model space, augmented by uniform random numbers, where their bytes are.

    A GPU gets a quarter of what the finished images would be, and does the work in no time.
    """

    def light_of(some: Tensor) -> Tensor:
        return some.float().mul_(1 / (255 * GREY_STD)).unsqueeze(1)

    return _augment_light(pixels, light_of, uniforms, config, size)


def affine_of(uniforms: Float[Tensor, "b u"], config: AugmentConfig) -> Float[Tensor, "b 2 3"]:
    """Where each point of the augmented image comes from, in grid units (the side is 2 long)."""
    u = 2 * uniforms.float() - 1  # -1..1
    angle = torch.deg2rad(u[:, 0] * config.rotation_deg)
    scale = 1 / (1 + u[:, 1] * config.scale_ratio)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = 2 * config.translate_ratio * u[:, 2:4]  # grid units: the side is 2 long
    theta = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )
    if config.crop_scale == 1:
        return theta
    area = 1 - (1 - config.crop_scale) * uniforms[:, 6].float()  # uniform between scale and 1
    side = area.sqrt().view(-1, 1, 1)
    corner = torch.cat([torch.zeros_like(theta[..., :2]), u[:, 7:9].unsqueeze(-1)], -1)
    return side * theta + (1 - side) * corner


def warp(
    image: Float[Tensor, "b 1 h w"], theta: Float[Tensor, "b 2 3"], size: int | None = None
) -> Float[Tensor, "b 1 s s"]:
    """Moves images as `affine_of` says, bilinear; what comes from outside is 0."""
    grid = grid_of(theta, image.shape[-1] if size is None else size)
    return F.grid_sample(image, grid, padding_mode="zeros", align_corners=False)


def grid_of(theta: Float[Tensor, "b 2 3"], size: int) -> Float[Tensor, "b s s 2"]:
    """Where each point of a square comes from, as torch's `affine_grid`, many times as fast.

    A point is the sum of a part that its column has and one that its row has, so there are two
    short products for each side of the square in place of one for each point. In memory all x
    come before all y, so that sums and sampling go along rows of numbers.
    """
    centre = torch.linspace(-1, 1, size, device=theta.device) * ((size - 1) / size)
    of_column = theta[:, :, 0, None] * centre  # b 2 s
    of_row = theta[:, :, 1, None] * centre + theta[:, :, 2, None]
    return (of_column[:, :, None] + of_row[..., None]).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class ImageTextDataset:
    """The rows of one or more data folders that a task reads, with their images at hand."""

    samples: tuple[Sample, ...] = field(repr=False)  # reports of patients
    caches: tuple[ImageCache | None, ...]  # one a folder
    where: np.ndarray  # int64 [n, 2]: folder, and row of its image cache (-1 without an image)
    data_hash: str  # over the hashes of the folders
    image_size: int | None = None  # side of what is read of an image; None as it is cached
    roots: tuple[Path | None, ...] = ()  # one a folder, where the files of the images are read

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, keep: Sequence[bool] | np.ndarray) -> "ImageTextDataset":
        """The rows where `keep` is True."""
        keep = np.asarray(keep, bool)
        samples = tuple(sample for sample, k in zip(self.samples, keep, strict=True) if k)
        return replace(self, samples=samples, where=self.where[keep])

    def to_crop(self, config: AugmentConfig) -> "ImageTextDataset":
        """The same rows, with images as large as crops are cut from.

        The smallest crop has then the pixels that the model reads, or fewer where a data folder
        holds no more.
        """
        if config.crop_scale == 1 or self.image_size is None:
            return self
        cached = [cache.images.shape[-1] for cache in self.caches if cache is not None]
        wanted = round(self.image_size / math.sqrt(config.crop_scale))
        return replace(self, image_size=min(wanted, *cached))

    def pixels(self, rows: np.ndarray) -> UInt8[Tensor, "b h w"]:
        """uint8 images, copied out of the memory map; larger ones are made smaller on the way.

        Resized as `images.resize_image` does, so nearly as a folder of that size holds them: what
        is resized twice is a little softer.
        """
        out = []
        for folder, row in self.where[rows]:
            cache = self.caches[folder]
            assert cache is not None and row >= 0, "a row without an image was asked for its image"
            sample = cache.images[row]
            out.append(sample if self.image_size is None else resize_image(sample, self.image_size))
        return torch.from_numpy(np.stack(out))

    def image(self, row: int) -> Path | UInt8[np.ndarray, "s s"]:
        """One image: its file where files are read, else the folder's square copy of it.

        Raises:
            ManifestError: When the file is missing, or is not the one that the folder was built of.
        """
        sample, root = self.samples[row], self.root(row)
        if root is None:
            return self.pixels(np.array([row]))[0].numpy()
        assert sample.image is not None
        path = root / sample.image
        try:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ManifestError(
                f"{path} cannot be read ({error.strerror}); give the folder that holds the images "
                f"by --root"
            ) from None
        if sample.image_sha256 is not None and sha256 != sample.image_sha256:
            raise ManifestError(
                f"{path} was changed since the data folder was built (its checksum differs); build "
                f"the folder again, or give the folder that holds the images by --root"
            )
        return path

    def root(self, row: int) -> Path | None:
        """The folder of an image's file; None where the data folder's copy is read."""
        return self.roots[self.where[row, 0]] if self.roots else None

    def labels(self, findings: Sequence[str]) -> np.ndarray:
        """float64 [n, k]: 1 present, 0 absent, NaN unknown or uncertain."""
        known = {1: 1.0, 0: 0.0}
        return np.array(
            [
                [known.get(sample.labels.get(f, -1), np.nan) for f in findings]
                for sample in self.samples
            ]
        ).reshape(len(self), len(findings))


def open_dataset(
    folders: Sequence[Path],
    image_size: int | None = None,
    px_key: str | None = None,
    resize: ResizeMode | None = None,
) -> ImageTextDataset:
    """All rows of some data folders.

    Args:
        folders: As `mmclip data build` leaves them.
        image_size: The image size that is needed. A folder's images may be larger, and are made
            smaller as they are read.
        px_key: The key of the configuration that says `image_size`, where the user may change it.
        resize: How the images must have become squares, checked likewise.

    Raises:
        ManifestError: When a folder is unfinished, its images are smaller, or an image id occurs in
            two folders.
    """
    samples: list[Sample] = []
    caches: list[ImageCache | None] = []
    where: list[tuple[int, int]] = []
    hashes = []
    for number, folder in enumerate(folders):
        meta = read_meta(folder)
        if meta["image_size"] is not None:
            _check_size(meta, folder, image_size, px_key)
            _check_resize(meta, folder, resize, px_key is not None)
        if changed := changed_since(meta):
            logger.warning(
                "%s was made with other words than are installed (%s changed); its labels and "
                "entities are those of then, until it is built again",
                folder,
                ", ".join(changed),
            )
        caches.append(ImageCache.open(folder) if meta["image_size"] is not None else None)
        hashes.append(meta["data_hash"])
        row = 0
        for sample in read_manifest(folder):
            samples.append(sample)
            where.append((number, row if sample.image is not None else -1))
            row += sample.image is not None
    ids = {sample.image_id for sample in samples}
    if len(ids) < len(samples):
        raise ManifestError(
            f"{len(samples) - len(ids)} image ids occur in more than one of the data folders "
            f"{', '.join(map(str, folders))}; give each folder once"
        )
    joined = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    table = np.array(where, np.int64).reshape(-1, 2)
    return ImageTextDataset(tuple(samples), tuple(caches), table, joined, image_size)


def _check_size(
    meta: Mapping[str, Any], folder: Path, image_size: int | None, px_key: str | None
) -> None:
    """Refuses images that are smaller than needed, and tells of larger ones."""
    cached: int = meta["image_size"]
    if image_size is None or cached == image_size:
        return
    if cached > image_size:
        logger.info("the images of %s, %d px, are read at %d px", folder, cached, image_size)
        return
    instead = f", or take them as they are by --set {px_key}={cached}"
    raise ManifestError(
        f"the images of {folder} have {cached} px, {image_size} px are needed; build them anew by "
        f"`{_build_command(meta, folder, image_size)}` and give that folder"
        + (instead if px_key else "")
    )


def _check_resize(
    meta: Mapping[str, Any], folder: Path, resize: ResizeMode | None, has_key: bool
) -> None:
    """Refuses images that became squares in another way than needed."""
    made = meta.get("resize", "squash")  # folders of older builds have no other
    if resize is not None and made != resize:
        raise ManifestError(
            f"the images of {folder} became squares by {made}, {resize} is needed; build them "
            f"anew with --resize {resize} and give that folder"
            + (f", or take them as they are by --set data.resize={made}" if has_key else "")
        )


def _build_command(meta: Mapping[str, Any], folder: Path, image_size: int) -> str:
    """The command that made a data folder, for images of another size in a folder beside it."""
    made_by = str(meta.get("command", ""))
    if not made_by.startswith("mmclip data build"):
        made_by = "mmclip data build ..."
    same = re.sub(r" --(?:overwrite|(?:image-size|out)[ =](?:'[^']*'|\S)+)", "", made_by)
    return f"{same} --image-size {image_size} --out {shlex.quote(f'{folder}-{image_size}px')}"
