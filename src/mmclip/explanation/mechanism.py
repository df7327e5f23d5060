"""Does a model use the other modality, and does it mask the lesion: the numbers behind both.

Pure functions. `bench/mechanism.py` runs a checkpoint on synthetic images and hands them what it
gave.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmclip.evaluation.bootstrap import macro_of_resamples
from mmclip.evaluation.intervals import Interval, percentile_interval
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
            f"one of another patient; take more images"
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
    n_resamples: int = 1000,
    seed: int = 0,
) -> PatientMean:
    """sum(total) / sum(count), and its 95 % interval over resampled patients.

    Args:
        total: Of each row, the sum over its elements (masked words, masked patches, or itself).
        count: Of each row, the number of elements.
        patients: The patient of each row.
        n_resamples: Resamples, each of as many patients as there are.
        seed: The same rows and seed give the same resamples, so that differences pair.
    """
    if not count.sum():
        return PatientMean(None, None, 0)
    values = _resampled(total[:, None], count[:, None], patients, n_resamples, seed)[:, 0]
    mean = float(total.sum() / count.sum())
    return PatientMean(
        mean, percentile_interval(values, n_patients=len(set(patients))), int((count > 0).sum())
    )


def patient_means(
    values: Float[np.ndarray, " n"],
    groups: Sequence[str],
    patients: Sequence[Hashable],
    min_count: int = 10,
    n_resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, PatientMean], PatientMean]:
    """The mean of each group, and the mean of those means, with 95 % intervals over patients.

    One draw of patients serves all groups, so the interval of the mean of means is valid.

    Args:
        values: Of each row; NaN where it has none, which is left out.
        groups: The group of each row, such as its finding.
        patients: The patient of each row.
        min_count: A group counts in the mean of means from this many values on.
        n_resamples: As for `patient_mean`.
        seed: As for `patient_mean`.

    Returns:
        By group in order of names, and over the groups that count; its n is their number.
    """
    names = sorted(set(groups))
    is_of = np.array(groups)[:, None] == np.array(names)
    count = (is_of & ~np.isnan(values)[:, None]).astype(float)
    total = np.where(count > 0, values[:, None], 0.0)
    resampled = _resampled(total, count, patients, n_resamples, seed)
    n, sums = count.sum(0), total.sum(0)
    n_patients = len(set(patients))
    found = {
        name: PatientMean(
            float(sums[i] / n[i]),
            percentile_interval(resampled[:, i], n_patients=n_patients),
            int(n[i]),
        )
        if n[i]
        else PatientMean(None, None, 0)
        for i, name in enumerate(names)
    }
    counted = np.flatnonzero(n >= max(min_count, 1))
    if not len(counted):
        return found, PatientMean(None, None, 0)
    macro = float((sums[counted] / n[counted]).mean())
    interval = percentile_interval(
        macro_of_resamples(resampled, counted.tolist()), n_patients=n_patients
    )
    return found, PatientMean(macro, interval, len(counted))


def _resampled(
    total: Float[np.ndarray, "n g"],
    count: Float[np.ndarray, "n g"] | Int[np.ndarray, "n g"],
    patients: Sequence[Hashable],
    n_resamples: int,
    seed: int,
) -> Float[np.ndarray, "resamples g"]:
    """sum(total) / sum(count) of each resample of patients and column; NaN where the resample has
    none."""
    _, code = np.unique([str(patient) for patient in patients], return_inverse=True)
    n_patients = int(code.max()) + 1
    by_patient = np.zeros((2, n_patients, total.shape[1]))
    for summed, of_rows in zip(by_patient, (total, count), strict=True):
        np.add.at(summed, code, of_rows)
    rng = np.random.default_rng(seed)
    values = np.full((n_resamples, total.shape[1]), np.nan)
    for i in range(n_resamples):
        drawn = by_patient[:, rng.integers(0, n_patients, n_patients)].sum(1)
        np.divide(drawn[0], drawn[1], out=values[i], where=drawn[1] > 0)
    return values


def own_patches(touched: Bool[Tensor, "k n"]) -> Bool[Tensor, "k n"]:
    """The patches that one finding of an image touches and no other finding does."""
    return touched & (touched.sum(0) == 1)


def expected_masked_share(
    score: Float[Tensor, "m n"], is_target: Bool[Tensor, "m n"], mask_ratio: float
) -> Float[Tensor, " m"]:
    """Share of a target's patches that are masked when the highest scores go first.

    Where the last places fall among equal scores, each of those patches counts for its chance of
    one. A constant score gives the mask ratio. NaN where there is no target.
    """
    k = masked_patch_count(score.shape[1], mask_ratio)
    if k == 0:
        return torch.zeros(len(score)) / is_target.sum(1)
    last = score.topk(k, dim=1).values[:, -1:]
    above, level = score > last, score == last
    chance = (k - above.sum(1, keepdim=True)) / level.sum(1, keepdim=True)
    is_masked = above.float() + level.float() * chance
    return (is_masked * is_target).sum(1) / is_target.sum(1)
