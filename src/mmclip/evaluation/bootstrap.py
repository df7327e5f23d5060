"""Metrics of resampled patients, all resamples at once.

The bootstrap is ours, as resampling by a loop over scikit-learn takes hours where this takes
seconds; tests hold it to scikit-learn's values in each resample.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from mmclip.evaluation.metrics import f1_of_counts, known, mcc_of_counts

_CHUNK_ELEMENTS = 2**22
"""Weights held at once, images x resamples: 32 MiB an array. [chosen: bounds memory at any size]"""


class Resampled(NamedTuple):
    """Metrics of each bootstrap resample and finding, [resamples, k]; NaN where a resample lacks
    one class."""

    auroc: Float[np.ndarray, "resamples k"]
    auprc: Float[np.ndarray, "resamples k"]
    f1: Float[np.ndarray, "resamples k"]
    mcc: Float[np.ndarray, "resamples k"]


def bootstrap_metrics(
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
    patients: Sequence[Hashable] | Int[np.ndarray, " n"],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    thresholds: Sequence[float | None] | None = None,
    halves: bool = False,
) -> Resampled:
    """AUROC, AUPRC, F1 and MCC of `n_resamples` resamples of whole patients with replacement.

    Images of one patient are alike, so resampling images would make intervals too narrow. A
    resample gives each patient a weight, how often it was drawn, and one draw serves all findings:
    columns of a row belong together, so that a macro average per row is valid. Every metric is
    computed for all resamples at once from images sorted once: with weighted counts p_g, q_g of
    positives and negatives in tie group g, highest scores first,

        AUROC = sum_g p_g (Q - sum_{h<=g} q_h + q_g / 2) / (P Q)
        AUPRC = sum_g (p_g / P) (sum_{h<=g} p_h / sum_{h<=g} (p_h + q_h))

    Args:
        labels: 1, 0 or NaN.
        scores: Finite wherever the label is known.
        patients: The patient of each row.
        n_resamples: Number of resamples.
        seed: Of the resamples; the same patients and seed give the same resamples for any model.
        thresholds: The threshold of each finding, for F1 and MCC; None for a finding without one.
        halves: Draw half of the patients, each once, in the place of as many with replacement.

    Returns:
        Arrays [resamples, k]. NaN where the resample holds no positive or no negative image of a
        finding; F1 and MCC also where the finding has no threshold.

    Source: Mann-Whitney with case weights; equals scikit-learn's metrics with sample_weight.
    """
    n, k = labels.shape
    code, n_patients = patient_codes(patients)
    if len(code) != n:
        raise ValueError(f"{len(code)} patients for {n} rows of labels; give one for each row")
    threshold_of_finding = [None] * k if thresholds is None else list(thresholds)
    counted = [
        _count(labels[:, i], scores[:, i], code, n_patients, threshold_of_finding[i])
        for i in range(k)
    ]
    out = Resampled(*(np.full((n_resamples, k), np.nan) for _ in Resampled._fields))
    done = 0
    draw = patient_halves if halves else patient_weights
    for weight in draw(n_patients, n_resamples, seed, max(1, _CHUNK_ELEMENTS // max(n, 1))):
        rows = slice(done, done + weight.shape[1])
        done = rows.stop
        for i, finding in enumerate(counted):
            for column, values in zip(out, _weighted_metrics(finding, weight), strict=True):
                column[rows, i] = values
    return out


def patient_codes(
    patients: Sequence[Hashable] | Int[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " n"], int]:
    """Patients as numbers from 0, in the order of their first rows, and how many there are."""
    listed = _hashable(patients)
    code_of = {patient: i for i, patient in enumerate(dict.fromkeys(listed))}
    return np.array([code_of[patient] for patient in listed], dtype=np.int64), len(code_of)


def patient_weights(
    n_patients: int, n_resamples: int, seed: int, step: int
) -> Iterator[Float[np.ndarray, "patients some"]]:
    """How often each resample, with replacement, takes each patient; `step` resamples at a time.

    Drawn one by one, so that `step` changes nothing.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples, step):
        yield np.stack(
            [
                np.bincount(rng.integers(0, n_patients, n_patients), minlength=n_patients)
                for _ in range(start, min(start + step, n_resamples))
            ],
            axis=1,
        ).astype(np.float64)


def patient_halves(
    n_patients: int, n_resamples: int, seed: int, step: int
) -> Iterator[Float[np.ndarray, "patients some"]]:
    """As `patient_weights`, with 1 for a random half of the patients and 0 for the others."""
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples, step):
        weight = np.zeros((n_patients, min(step, n_resamples - start)))
        for column in range(weight.shape[1]):
            weight[rng.permutation(n_patients)[: n_patients // 2], column] = 1
        yield weight


def auprc_bias(
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
    patients: Sequence[Hashable] | Int[np.ndarray, " n"],
    values: Float[np.ndarray, " k"],
    *,
    n_resamples: int = 200,
    seed: int = 0,
) -> Float[np.ndarray, " k"]:
    """How far AUPRC is above that of many images, for being of few.

    Average precision counts each positive among those above it, itself included, so few positives
    raise it. The excess falls as one over their number, so half of the patients have twice as much:
    the mean over halves less the value itself is the excess of the value. Resamples with
    replacement do not show it, as an image that is drawn twice is tied with itself.

    Args:
        labels: 1, 0 or NaN.
        scores: Finite wherever the label is known.
        patients: The patient of each row.
        values: The AUPRC of each finding.
        n_resamples: Of halves.
        seed: Of the resamples.

    Returns:
        To be taken away; 0 where no half has both classes.

    Source: the jackknife's argument (Quenouille 1956) on random halves; bench/bootstrap.py
        measures it.
    """
    drawn = bootstrap_metrics(
        labels, scores, patients, n_resamples=n_resamples, seed=seed, halves=True
    ).auprc
    is_defined = ~np.isnan(drawn)
    n = is_defined.sum(0)
    mean = np.where(is_defined, drawn, 0.0).sum(0) / np.maximum(n, 1)
    return np.where(n > 0, mean - values, 0.0)


def bootstrap_difference(
    labels: Float[np.ndarray, "n k"],
    scores_a: Float[np.ndarray, "n k"],
    scores_b: Float[np.ndarray, "n k"],
    patients: Sequence[Hashable] | Int[np.ndarray, " n"],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Resampled:
    """Metrics of model a minus those of model b, draw by draw on the same resampled patients.

    F1 and MCC are NaN: thresholds belong to one model and do not pair.
    """
    a = bootstrap_metrics(labels, scores_a, patients, n_resamples=n_resamples, seed=seed)
    b = bootstrap_metrics(labels, scores_b, patients, n_resamples=n_resamples, seed=seed)
    return Resampled(*(x - y for x, y in zip(a, b, strict=True)))


def macro_of_resamples(
    values: Float[np.ndarray, "resamples k"], counted: Sequence[int]
) -> Float[np.ndarray, " resamples"]:
    """The mean over the counted findings in each resample, left to those that the resample defines.

    A resample that defines none of them is NaN. With ten images of each class, the rule of
    `metrics_by_finding`, a finding is undefined in a resample only where few patients hold them
    all.
    """
    chosen = values[:, list(counted)]
    is_defined = ~np.isnan(chosen)
    total = np.where(is_defined, chosen, 0.0).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return total / is_defined.sum(axis=1)


def _hashable(patients: Sequence[Hashable] | np.ndarray) -> list[Hashable]:
    return patients.tolist() if isinstance(patients, np.ndarray) else list(patients)


class _Counted(NamedTuple):
    """Images of one finding counted by patient (columns), ready for any patient weights."""

    positive: csr_array  # [tie groups, patients], highest scores first
    negative: csr_array
    called: csr_array | None  # [2, patients]: true and false positives of the threshold


def _count(
    labels: np.ndarray,
    scores: np.ndarray,
    code: np.ndarray,
    n_patients: int,
    threshold: float | None,
) -> _Counted | None:
    """Counts by tie group and patient; None when the finding lacks a class."""
    if known(labels, scores) is None:
        return None
    is_known = ~np.isnan(labels)
    is_positive, scores, code = labels[is_known] == 1, scores[is_known], code[is_known]
    distinct, group = np.unique(-scores, return_inverse=True)
    has_positive = np.bincount(group, weights=is_positive, minlength=len(distinct)) > 0
    # Neighbouring groups without positives act as one in both sums: for a rare finding this
    # leaves a few hundred groups of many thousand images.
    is_first = np.append(True, has_positive[1:] | has_positive[:-1])
    group = (np.cumsum(is_first) - 1)[group]

    def table(row: np.ndarray, column: np.ndarray, n_rows: int) -> csr_array:
        shape = (n_rows, n_patients)
        return csr_array((np.ones(len(row)), (row, column)), shape=shape)

    n_groups = int(is_first.sum())
    positive = table(group[is_positive], code[is_positive], n_groups)
    negative = table(group[~is_positive], code[~is_positive], n_groups)
    if threshold is None:
        return _Counted(positive, negative, None)
    is_called = scores >= threshold
    called = table((~is_positive[is_called]).astype(np.int64), code[is_called], 2)
    return _Counted(positive, negative, called)


def _weighted_metrics(
    counted: _Counted | None, weight: np.ndarray
) -> tuple[np.ndarray | float, np.ndarray | float, np.ndarray | float, np.ndarray | float]:
    """AUROC, AUPRC, F1 and MCC under the patient weights of each resample, [patients,
    resamples]."""
    if counted is None:
        return np.nan, np.nan, np.nan, np.nan
    p, q = counted.positive @ weight, counted.negative @ weight
    tp, fp = np.cumsum(p, axis=0), np.cumsum(q, axis=0)
    n_positive, n_negative = tp[-1], fp[-1]
    both = np.where((n_positive > 0) & (n_negative > 0), 1.0, np.nan)
    n_positive, n_negative = n_positive * both, n_negative * both
    lost = np.einsum("gb,gb->b", p, fp - 0.5 * q)
    auroc_b = 1.0 - lost / (n_positive * n_negative)
    tp /= np.maximum(tp + fp, 1.0)  # now the precision at each group
    auprc_b = np.einsum("gb,gb->b", p, tp) / n_positive
    if counted.called is None:
        return auroc_b, auprc_b, np.nan, np.nan
    tp, fp = counted.called @ weight
    return (
        auroc_b,
        auprc_b,
        f1_of_counts(tp, fp, n_positive),
        mcc_of_counts(tp, fp, n_positive, n_negative),
    )
