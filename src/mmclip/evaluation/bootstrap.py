"""Intervals of metrics by resampling patients.

The bootstrap is ours, as resampling by a loop over scikit-learn takes hours where this takes
seconds; tests hold it to scikit-learn's values in each draw.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.special import expit, logit
from scipy.stats import norm
from scipy.stats import t as student

from mmclip.evaluation.metrics import f1_of_counts, known, mcc_of_counts

Interval = tuple[float, float]

_CHUNK_ELEMENTS = 2**22
"""Weights held at once, films x draws: 32 MiB an array. [chosen: bounds memory at any size]"""


class Draws(NamedTuple):
    """Metrics of each bootstrap draw and finding, [draws, k]; NaN where a draw lacks one class."""

    auroc: Float[np.ndarray, "draws k"]
    auprc: Float[np.ndarray, "draws k"]
    f1: Float[np.ndarray, "draws k"]
    mcc: Float[np.ndarray, "draws k"]


def bootstrap_metrics(
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
    patients: Sequence[Hashable] | Int[np.ndarray, " n"],
    *,
    draws: int = 1000,
    seed: int = 0,
    thresholds: Sequence[float | None] | None = None,
    halves: bool = False,
) -> Draws:
    """AUROC, AUPRC, F1 and MCC of `draws` resamples of whole patients with replacement.

    Films of one patient are alike, so resampling films would make intervals too narrow. A draw
    gives each patient a weight, how often it was drawn, and one draw serves all findings: columns
    of a row belong together, so that a macro average per row is valid. Every metric is computed
    for all draws at once from films sorted once: with weighted counts p_g, q_g of positives and
    negatives in tie group g, highest scores first,

        AUROC = sum_g p_g (Q - sum_{h<=g} q_h + q_g / 2) / (P Q)
        AUPRC = sum_g (p_g / P) (sum_{h<=g} p_h / sum_{h<=g} (p_h + q_h))

    Args:
        labels: 1, 0 or NaN.
        scores: Finite wherever the label is known.
        patients: The patient of each row.
        draws: Number of resamples.
        seed: Of the draws; the same patients and seed give the same draws for any model.
        thresholds: The cut of each finding, for F1 and MCC; None for a finding without one.
        halves: Draw half of the patients, each once, in the place of as many with replacement.

    Returns:
        Arrays [draws, k]. NaN where the draw holds no positive or no negative film of a finding;
        F1 and MCC also where the finding has no cut.

    Source: Mann-Whitney with case weights; equals scikit-learn's metrics with sample_weight.
    """
    n, k = labels.shape
    code, n_patients = patient_codes(patients)
    if len(code) != n:
        raise ValueError(f"{len(code)} patients for {n} rows of labels; give one for each row")
    cuts = [None] * k if thresholds is None else list(thresholds)
    counted = [_count(labels[:, i], scores[:, i], code, n_patients, cuts[i]) for i in range(k)]
    out = Draws(*(np.full((draws, k), np.nan) for _ in Draws._fields))
    done = 0
    draw = patient_halves if halves else patient_weights
    for weight in draw(n_patients, draws, seed, max(1, _CHUNK_ELEMENTS // max(n, 1))):
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
    n_patients: int, draws: int, seed: int, step: int
) -> Iterator[Float[np.ndarray, "patients some"]]:
    """How often each draw, with replacement, takes each patient; `step` draws at a time.

    Drawn one by one, so that `step` changes nothing.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, draws, step):
        yield np.stack(
            [
                np.bincount(rng.integers(0, n_patients, n_patients), minlength=n_patients)
                for _ in range(start, min(start + step, draws))
            ],
            axis=1,
        ).astype(np.float64)


def patient_halves(
    n_patients: int, draws: int, seed: int, step: int
) -> Iterator[Float[np.ndarray, "patients some"]]:
    """As `patient_weights`, with 1 for a random half of the patients and 0 for the others."""
    rng = np.random.default_rng(seed)
    for start in range(0, draws, step):
        weight = np.zeros((n_patients, min(step, draws - start)))
        for column in range(weight.shape[1]):
            weight[rng.permutation(n_patients)[: n_patients // 2], column] = 1
        yield weight


def auprc_bias(
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
    patients: Sequence[Hashable] | Int[np.ndarray, " n"],
    values: Float[np.ndarray, " k"],
    *,
    draws: int = 200,
    seed: int = 0,
) -> Float[np.ndarray, " k"]:
    """How far AUPRC is above that of many films, for being of few.

    Average precision counts each positive among those above it, itself included, so few positives
    raise it. The excess falls as one over their number, so half of the patients have twice as much:
    the mean over halves less the value itself is the excess of the value. Resamples with
    replacement do not show it, as a film that is drawn twice is tied with itself.

    Args:
        labels: 1, 0 or NaN.
        scores: Finite wherever the label is known.
        patients: The patient of each row.
        values: The AUPRC of each finding.
        draws: Of halves.
        seed: Of the draws.

    Returns:
        To be taken away; 0 where no half has both classes.

    Source: the jackknife's argument (Quenouille 1956) on random halves; bench/bootstrap.py
        measures it.
    """
    drawn = bootstrap_metrics(labels, scores, patients, draws=draws, seed=seed, halves=True).auprc
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
    draws: int = 1000,
    seed: int = 0,
) -> Draws:
    """Metrics of model a minus those of model b, draw by draw on the same resampled patients.

    F1 and MCC are NaN: cuts belong to one model and do not pair.
    """
    a = bootstrap_metrics(labels, scores_a, patients, draws=draws, seed=seed)
    b = bootstrap_metrics(labels, scores_b, patients, draws=draws, seed=seed)
    return Draws(*(x - y for x, y in zip(a, b, strict=True)))


def macro_draws(
    values: Float[np.ndarray, "draws k"], counted: Sequence[int]
) -> Float[np.ndarray, " draws"]:
    """The mean over the counted findings in each draw, left to those that the draw defines.

    A draw that defines none of them is NaN. With ten films of each class, the rule of
    `score_findings`, a finding is undefined in a draw only where few patients hold them all.
    """
    chosen = values[:, list(counted)]
    is_defined = ~np.isnan(chosen)
    total = np.where(is_defined, chosen, 0.0).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return total / is_defined.sum(axis=1)


def interval_over_seeds(
    values: Float[np.ndarray, " seeds"],
    drawn: Float[np.ndarray, "seeds draws"],
    level: float = 0.95,
) -> Interval | None:
    """The interval of a metric's mean over seeds, for other seeds and other patients.

    mean -+ t sqrt(s^2 / n + c), with s^2 the variance of the values over n seeds, and c the mean
    covariance of two seeds' draws: what the patients do to all seeds alike. What they do to each
    seed apart is in s^2 already. t is Student's quantile with (s^2 / n + c)^2 / ((s^2 / n)^2 /
    (n - 1)) degrees, so that few seeds are paid for where they are what is uncertain. Of one seed
    it is the `percentile_interval` of its draws, over patients alone.

    Resampling the seeds themselves is far too sure of few: where seeds alone differ, normally, 74 %
    of such 95 % intervals over 3 seeds hold the truth, 84 % over 5. Of these 94 to 96 % do from 3
    seeds on, 90 to 96 % with 2, however much of the variance is the patients'
    (tests/test_metrics.py).

    Args:
        values: Of each seed, on all films; a metric, or a difference paired by seed.
        drawn: The same in each draw of patients, the same draws for all seeds; NaN where undefined.
        level: Share of such intervals that should hold the truth.

    Returns:
        None where fewer than half of the draws are defined for all seeds.

    Source: variance components of two crossed factors (Owen 2007, "The pigeonhole bootstrap");
        degrees of freedom of their sum by Satterthwaite 1946.
    """
    n_seeds, n_draws = drawn.shape
    if not n_seeds or np.isnan(values).any():
        return None
    if n_seeds == 1:
        return percentile_interval(drawn[0], level)
    drawn = drawn[:, ~np.isnan(drawn).any(0)]
    if 2 * drawn.shape[1] < n_draws or drawn.shape[1] < 2:
        return None
    covariance = np.cov(drawn)
    apart = covariance.sum() - covariance.trace()
    of_patients = max(apart / (n_seeds * (n_seeds - 1)), 0.0)
    of_seeds = values.var(ddof=1) / n_seeds
    total = of_seeds + of_patients
    degrees = np.inf if of_seeds == 0 else total**2 / (of_seeds**2 / (n_seeds - 1))
    reach = student.ppf((1 + level) / 2, degrees) * np.sqrt(total)
    return float(values.mean() - reach), float(values.mean() + reach)


def share_over_seeds(
    values: Float[np.ndarray, " seeds"], drawn: Float[np.ndarray, "seeds draws"]
) -> Interval | None:
    """`interval_over_seeds` of a share such as AUROC, within 0 to 1: the same reach on the logit.

    Source: as `share_interval`.
    """
    found, middle = interval_over_seeds(values, drawn), float(values.mean())
    if found is None or not 0 < middle < 1:
        return found
    reach = (found[1] - middle) / (middle * (1 - middle))  # the slope of the logit
    return float(expit(logit(middle) - reach)), float(expit(logit(middle) + reach))


def percentile_interval(
    values: Float[np.ndarray, " draws"], level: float = 0.95
) -> Interval | None:
    """The central share of the defined draws; None when fewer than half of them are defined.

    Source: percentile bootstrap. [chosen: what a minority of the draws says is no interval]
    """
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < len(values) or not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def effective_number(weights: Float[np.ndarray, " m"]) -> float:
    """How many equal parts vary as much as some unequal ones: (sum w)^2 / sum w^2.

    Source: Kish 1965, Survey Sampling, the effective sample size of weights.
    """
    return float(weights.sum() ** 2 / (weights**2).sum())


def films_of_patients(
    labels: Float[np.ndarray, " n"], patients: Sequence[Hashable] | Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """The films with and those without a finding that each patient has."""
    code, n_patients = patient_codes(patients)
    with_it, without = (
        np.bincount(code, weights=labels == known, minlength=n_patients) for known in (1, 0)
    )
    return with_it, without


def rarer_class(
    films: tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]],
) -> Float[np.ndarray, " m"]:
    """Of `films_of_patients`, those of the class that fewer patients have, by their films."""
    return min(films, key=effective_number)


def share_interval(
    value: float,
    values: Float[np.ndarray, " draws"],
    n_patients: int | float,
    level: float = 0.95,
) -> Interval | None:
    """The interval of a share such as AUROC or AUPRC, for findings that few patients have.

    On the scale of the logit, value -+ t s sqrt(m / (m - 1)): s is half the distance between the
    draws' quantiles that stand a deviation from the middle of a normal distribution, t Student's
    quantile with m - 1 degrees. The percentile interval errs with few patients: m resampled ones
    vary by (m - 1) / m of what m new ones do, and near 1 a high share has a narrow interval, so
    that it misses the truth below it far more often than above it.

    Args:
        value: Of the films themselves, 0 to 1.
        values: Of the draws; NaN where one is undefined.
        n_patients: m, the effective number of patients with films of the rarer class.
        level: Share of such intervals that should hold the truth.

    Returns:
        Within 0 to 1; None when fewer than half of the draws are defined, all of them are equal,
        or a single patient has all films of a class.

    Source: the logit for AUROC as Pepe 2003, The Statistical Evaluation of Medical Tests, 5.2;
        t and m / (m - 1) as Hesterberg 2015 (arXiv:1411.5279). bench/bootstrap.py measures it.
    """
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < len(values) or not len(defined) or n_patients <= 1:
        return None
    low, high = logit(np.clip(np.quantile(defined, norm.cdf([-1, 1])), _EDGE, 1 - _EDGE))
    if low == high:
        return None
    middle = logit(np.clip(value, _EDGE, 1 - _EDGE))
    t = student.ppf((1 + level) / 2, n_patients - 1) * np.sqrt(n_patients / (n_patients - 1))
    reach = t * (high - low) / 2
    return float(expit(middle - reach)), float(expit(middle + reach))


FEW_PATIENTS = 5
"""Patients of the rarer class below which resamples say too little of them, and a formula speaks.
[chosen: bench/bootstrap.py measures both; 4 patients have 35 different resamples]"""


def finding_interval(
    metric: Literal["auroc", "auprc"],
    value: float,
    values: Float[np.ndarray, " draws"],
    films: tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]],
) -> Interval:
    """The 95 % interval of one finding: `share_interval`, or a formula where draws cannot say.

    They cannot where fewer than five patients, by their films, have the rarer class, where half of
    the draws are undefined, and at 0 and 1, where all draws may be equal and the truth is not.

    Args:
        metric: What is given.
        value: Of the films themselves.
        values: Of the draws.
        films: See `films_of_patients`; both classes are there.
    """
    defined = values[~np.isnan(values)]
    if 0 < value < 1 and len(defined) and np.ptp(defined) < 1e-12:
        return value, value  # scores that all are alike: no other films would change that
    n = effective_number(rarer_class(films))
    if n >= FEW_PATIENTS and 0 < value < 1:
        found = share_interval(value, values, n)
        if found is not None:
            return found
    if metric == "auprc":
        return wilson_interval(value, effective_number(films[0]))
    return newcombe_interval(value, *map(effective_number, films))


def mean_interval(
    values: Float[np.ndarray, " k"],
    intervals: Sequence[Interval],
    drawn: Float[np.ndarray, "draws k"],
    bias: Float[np.ndarray, " k"] | None = None,
) -> Interval:
    """The interval of a macro average, made of those of its findings.

    Their reaches below and above add up as deviations do, with the correlations of the draws. The
    draws of the mean alone would vary too little, as those of each finding do, and without the
    corrections that each finding's interval has; where they all are equal, nothing at all.

    Args:
        values: Of the findings.
        intervals: Of each.
        drawn: Of each, in the same draws; NaN where one is undefined.
        bias: Of the values, see `auprc_bias`: small for each finding, but the mean keeps it while
            its interval shrinks.

    Source: MOVER, for correlated estimates: Zou 2008, Statistics in Medicine 27:1693 (with Donner),
        and Zou 2007, Psychological Methods 12:399.
    """
    centred = np.nan_to_num(drawn - np.nanmean(drawn, axis=0))
    deviation = np.sqrt((centred**2).sum(0))
    deviation[deviation < 1e-9] = 0.0  # all draws are equal, but for the last bit
    together = np.outer(deviation, deviation)
    correlation = np.divide(
        centred.T @ centred, together, out=np.zeros_like(together), where=together > 0
    )
    np.fill_diagonal(correlation, 1.0)
    edges = np.array(intervals, float)
    below, above = values - edges[:, 0], edges[:, 1] - values
    mean = float((values if bias is None else values - bias).mean())
    low, high = (
        float(np.sqrt(max(reach @ correlation @ reach, 0.0))) / len(values)
        for reach in (below, above)
    )
    return min(max(0.0, mean - low), 1.0), max(min(1.0, mean + high), 0.0)


def newcombe_interval(value: float, n_positive: int | float, n_negative: int | float) -> Interval:
    """The 95 % interval of an AUROC without resampling: all truths that do not contradict it.

    A truth t contradicts an AUROC that is more than 1.96 deviations away, by the variance that an
    AUROC of t has where scores are exponentially distributed. Held by 89 to 100 % of made data
    sets with 2 to 5 patients a class, 95 to 99 % where the other class has nine times as many.

    Args:
        value: The AUROC.
        n_positive: Patients with the finding.
        n_negative: Patients without.

    Source: Newcombe 2006, Statistics in Medicine 25:559, method 5; the variance is that of Hanley
        and McNeil 1982 with (m + n) / 2 in the place of either number.
    """
    t = np.linspace(0, 1, 10_001)
    half = (n_positive + n_negative) / 2 - 1
    variance = t * (1 - t) * (1 + half * (1 - t) / (2 - t) + half * t / (1 + t))
    deviation = np.sqrt(np.maximum(variance, 0) / (n_positive * n_negative))
    held = t[np.abs(t - value) <= norm.ppf(0.975) * deviation]
    # The value itself always fits; it may lie between two points of the grid.
    return float(min([value, *held[:1]])), float(max([value, *held[-1:]]))


def wilson_interval(value: float, n: int | float) -> Interval:
    """The 95 % interval of a share of n, which is none of the resamples: Wilson's, for an AUPRC.

    Held by 89 to 100 % of made data sets with 2 to 5 patients, where AUPRC is 0.1 to 1.

    Source: Wilson 1927; of an AUPRC, with n positives, as the binomial interval of Boyd et al.
        2013 (ECML PKDD), "Area under the precision-recall curve", section 3.
    """
    z2 = norm.ppf(0.975) ** 2
    middle = (value + z2 / (2 * n)) / (1 + z2 / n)
    reach = np.sqrt(z2 * (value * (1 - value) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


_EDGE = 1e-4
"""As near to 0 and 1 as a logit is taken. [chosen: a pair of films in 10,000]"""


def _hashable(patients: Sequence[Hashable] | np.ndarray) -> list[Hashable]:
    return patients.tolist() if isinstance(patients, np.ndarray) else list(patients)


class _Counted(NamedTuple):
    """Films of one finding counted by patient (columns), ready for any patient weights."""

    positive: csr_array  # [tie groups, patients], highest scores first
    negative: csr_array
    called: csr_array | None  # [2, patients]: true and false positives of the cut


def _count(
    labels: np.ndarray, scores: np.ndarray, code: np.ndarray, n_patients: int, cut: float | None
) -> _Counted | None:
    """Counts by tie group and patient; None when the finding lacks a class."""
    if known(labels, scores) is None:
        return None
    is_known = ~np.isnan(labels)
    is_positive, scores, code = labels[is_known] == 1, scores[is_known], code[is_known]
    distinct, group = np.unique(-scores, return_inverse=True)
    has_positive = np.bincount(group, weights=is_positive, minlength=len(distinct)) > 0
    # Neighbouring groups without positives act as one in both sums: for a rare finding this
    # leaves a few hundred groups of many thousand films.
    is_first = np.append(True, has_positive[1:] | has_positive[:-1])
    group = (np.cumsum(is_first) - 1)[group]

    def table(row: np.ndarray, column: np.ndarray, n_rows: int) -> csr_array:
        shape = (n_rows, n_patients)
        return csr_array((np.ones(len(row)), (row, column)), shape=shape)

    n_groups = int(is_first.sum())
    positive = table(group[is_positive], code[is_positive], n_groups)
    negative = table(group[~is_positive], code[~is_positive], n_groups)
    if cut is None:
        return _Counted(positive, negative, None)
    is_called = scores >= cut
    called = table((~is_positive[is_called]).astype(np.int64), code[is_called], 2)
    return _Counted(positive, negative, called)


def _weighted_metrics(
    counted: _Counted | None, weight: np.ndarray
) -> tuple[np.ndarray | float, np.ndarray | float, np.ndarray | float, np.ndarray | float]:
    """AUROC, AUPRC, F1 and MCC under the patient weights of each draw, [patients, draws]."""
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
