"""Does a model use the other modality, and does a score find the lesion: the numbers behind both.

Pure functions. `bench/mechanism.py` runs a checkpoint on made films and hands them what it gave.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmclip.bootstrap import Interval, percentile_interval
from mmclip.masking import masked_patch_count


class PatientMean(NamedTuple):
    """A mean over elements, with the interval that resampling patients gives it."""

    mean: float | None  # None without elements
    interval: Interval | None  # 95 %
    n: int  # rows that have elements


def deal_to_other_patients(patients: Sequence[Hashable], seed: int) -> Int[np.ndarray, " n"]:
    """For each row the number of a row of another patient; every row is dealt once.

    Rows are put in a circle, patient by patient in random order, and each takes the row that lies
    as far ahead as the most rows that one patient has.

    Raises:
        ValueError: When one patient has more than half of the rows.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, patient in enumerate(patients):
        groups.setdefault(patient, []).append(row)
    most = max(map(len, groups.values()), default=0)
    if 2 * most > len(patients):
        raise ValueError(
            f"one patient has {most} of {len(patients)} rows, so that not every row can be dealt "
            f"one of another patient; take more films"
        )
    shuffled = np.random.default_rng(seed).permutation(np.array(list(groups.values()), object))
    circle = np.array([row for rows in shuffled for row in rows], np.int64)
    dealt = np.empty_like(circle)
    dealt[circle] = np.roll(circle, -most)
    return dealt


def patient_mean(
    total: Float[np.ndarray, " n"],
    count: Float[np.ndarray, " n"] | Int[np.ndarray, " n"],
    patients: Sequence[Hashable],
    draws: int = 1000,
    seed: int = 0,
) -> PatientMean:
    """sum(total) / sum(count), and its 95 % interval over resampled patients.

    Args:
        total: Of each row, the sum over its elements (hidden words, hidden patches, or itself).
        count: Of each row, the number of elements.
        patients: The patient of each row.
        draws: Resamples, each of as many patients as there are.
        seed: The same rows and seed give the same draws, so that differences pair.
    """
    if not count.sum():
        return PatientMean(None, None, 0)
    _, code = np.unique([str(patient) for patient in patients], return_inverse=True)
    n_patients = int(code.max()) + 1
    by_patient = np.stack([np.bincount(code, x, n_patients) for x in (total, count)])
    rng = np.random.default_rng(seed)
    values = np.empty(draws)
    for i in range(draws):
        drawn = by_patient[:, rng.integers(0, n_patients, n_patients)].sum(1)
        values[i] = drawn[0] / drawn[1] if drawn[1] else np.nan
    mean = float(total.sum() / count.sum())
    return PatientMean(mean, percentile_interval(values), int((count > 0).sum()))


def own_patches(touched: Bool[Tensor, "k n"]) -> Bool[Tensor, "k n"]:
    """The patches that one finding of a film touches and no other finding does."""
    return touched & (touched.sum(0) == 1)


def expected_hits(
    score: Float[Tensor, "m n"], is_target: Bool[Tensor, "m n"]
) -> Float[Tensor, " m"]:
    """The pointing game: 1 where the patch of the highest score is one of the target's.

    Where several patches share the highest score, the share of them that are the target's: what
    breaking the tie at random gives on average. A constant score gives the target's share of the
    patches.

    Source: Zhang et al., Top-down neural attention by excitation backprop (arXiv:1608.00507).
    """
    is_top = score == score.amax(1, keepdim=True)
    return (is_top & is_target).sum(1) / is_top.sum(1)


def expected_hidden_share(
    score: Float[Tensor, "m n"], is_target: Bool[Tensor, "m n"], mask_ratio: float
) -> Float[Tensor, " m"]:
    """Share of a target's patches that are hidden when the highest scores go first.

    Where the last places fall among equal scores, each of those patches counts for its chance of
    one. A constant score gives the mask ratio. NaN where there is no target.
    """
    k = masked_patch_count(score.shape[1], mask_ratio)
    if k == 0:
        return torch.zeros(len(score)) / is_target.sum(1)
    last = score.topk(k, dim=1).values[:, -1:]
    above, level = score > last, score == last
    chance = (k - above.sum(1, keepdim=True)) / level.sum(1, keepdim=True)
    is_hidden = above.float() + level.float() * chance
    return (is_hidden * is_target).sum(1) / is_target.sum(1)
