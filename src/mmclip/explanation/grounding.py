"""How well a map finds what a reader of the image marked.

Pure functions. A map has one value a patch, and no finer detail: each pixel of the image has the
value of the patch that its centre lies in. So everything that is asked of pixels is computed from
the number of pixels that each patch has, and has of the annotation; no map of an image's size is
made.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

FIXED_THRESHOLDS = (0.25, 0.5, 0.75)
"""Of the map scaled to 0..1, for IoU. [chosen: a map's unit depends on the model, so no cut of the
raw score means the same in two]"""

CANDIDATES = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""The thresholds among which one is chosen on other images. [chosen: steps that IoU can tell]"""


def expected_hits(
    score: Float[Tensor, "m n"],
    inside: Shaped[Tensor, "m n"],
    total: Float[Tensor, "m n"] | None = None,
) -> Float[Tensor, " m"]:
    """The pointing game: 1 where the pixel of the highest score is one of the target's.

    Where several pixels share the highest score, as those of one patch do, the share of them that
    are the target's: what breaking the tie at random gives on average. A constant score gives the
    target's share of the image.

    Args:
        score: Of each patch.
        inside: The pixels of each patch that are the target's; a bool asks of whole patches.
        total: All pixels of each patch; 1 each if it is not given. A patch without a pixel of the
            image is pointed at by nothing.

    Source: Zhang et al., Top-down neural attention by excitation backprop (arXiv:1608.00507).
    """
    total = torch.ones_like(score) if total is None else total
    score = score.masked_fill(total == 0, -torch.inf)
    weight = (score == score.amax(1, keepdim=True)) * total
    return (weight * (inside / total.clamp(min=1))).sum(1) / weight.sum(1)


def scaled(score: Float[Tensor, "m n"], total: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Each map from 0 to 1 over the patches that have pixels; 0 throughout where it is constant."""
    is_there = total > 0
    low = score.masked_fill(~is_there, torch.inf).amin(1, keepdim=True)
    high = score.masked_fill(~is_there, -torch.inf).amax(1, keepdim=True)
    return ((score - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def overlaps(
    score: Float[Tensor, "m n"],
    inside: Float[Tensor, "m n"],
    total: Float[Tensor, "m n"],
    thresholds: Sequence[float],
) -> Float[Tensor, "m c"]:
    """Intersection over union of an annotation and the pixels at or above each threshold.

    Args:
        score: Of each patch; thresholds are of the map as `scaled` gives it.
        inside: The pixels of each patch that lie in the annotation.
        total: All pixels of each patch.
        thresholds: Above 0, so that a constant map marks nothing and overlaps with nothing.
    """
    is_marked = scaled(score, total)[..., None] >= torch.tensor(thresholds)  # [m, n, c]
    both = (is_marked * inside[..., None]).sum(1)
    marked = (is_marked * total[..., None]).sum(1)
    return both / (marked + inside.sum(1, keepdim=True) - both)


def contrast_to_noise(
    score: Float[Tensor, "m n"], inside: Float[Tensor, "m n"], total: Float[Tensor, "m n"]
) -> Float[Tensor, " m"]:
    """(mean_in - mean_out) / sqrt(var_in + var_out) of the pixels in an annotation and out of it.

    Negative where the map is lower in it than around it; 0 for a constant map. NaN where the
    annotation is empty or everything, and where the map has one value within and another without,
    so that there is no noise to measure by.

    Source: CNR of Boecking et al. 2022 (arXiv:2204.09817), with its sign.
    """
    score = score.double()
    moments = []
    for weight in (inside.double(), (total - inside).double()):
        share = weight / weight.sum(1, keepdim=True)  # NaN without a pixel
        mean = (share * score).sum(1)
        moments.append((mean, (share * (score - mean[:, None]).square()).sum(1)))
    (mean_in, var_in), (mean_out, var_out) = moments
    # Rounding must make no contrast of one constant, and no noise of two.
    there = score.masked_fill(total == 0, torch.nan)
    spread = there.nan_to_num(-torch.inf).amax(1) - there.nan_to_num(torch.inf).amin(1)
    noise = (var_in + var_out).sqrt()
    ratio = torch.where(noise > 1e-9 * spread, (mean_in - mean_out) / noise, torch.nan)
    return torch.where((spread == 0) & ~mean_in.isnan() & ~mean_out.isnan(), 0.0, ratio)


def best_threshold(
    score: Float[Tensor, "m n"], inside: Float[Tensor, "m n"], total: Float[Tensor, "m n"]
) -> float:
    """The candidate of the highest mean overlap; of equals the lowest.

    Never to be asked of the images that it is then used on.
    """
    return CANDIDATES[int(overlaps(score, inside, total, CANDIDATES).mean(0).argmax())]


# -- maps that read no image, or no phrase --


def mean_annotations(
    share: Float[Tensor, "m n"], findings: Sequence[str]
) -> dict[str, Float[Tensor, " n"]]:
    """The location prior: by finding, the mean share of each patch that its places cover."""
    names = np.array(findings)
    return {name: share[torch.from_numpy(names == name)].mean(0) for name in sorted(set(findings))}


def nearness_to_centre(side: int) -> Float[Tensor, " n"]:
    """A map that falls with the distance from the image's centre, equal at equal distances."""
    offset = 2 * torch.arange(side) + 1 - side  # twice the distance in patches, in whole numbers
    return -(offset[:, None].square() + offset.square()).flatten().float()


# -- what a map says of an image --


def mass_above_median(
    score: Float[Tensor, " n"], total: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """What each patch has of a map's mass; the sum is 1, or 0 where nothing stands out.

    The mass of a pixel is what its score has above the median pixel's. Scores have no zero that
    means the same in each of them, and an image's usual tissue shall not count.
    """
    order = score.argsort()
    ordered, reached = score[order], total[order].cumsum(0)
    half = reached[-1] / 2
    at = int((reached >= half).int().argmax())
    beyond = ordered[int((reached > half).int().argmax())]  # an even number: between the middle two
    mass = total * (score - (ordered[at] + beyond) / 2).clamp(min=0)
    return mass / mass.sum().clamp(min=1e-30)
