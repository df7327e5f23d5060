"""95 % intervals: of a finding, of a macro average, of a mean over seeds.

They are made of the resamples of `bootstrap` where resamples can say, else of a formula.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, logit
from scipy.stats import norm
from scipy.stats import t as student

from mmclip.evaluation.bootstrap import patient_codes

Interval = tuple[float, float]


FEW_PATIENTS = 5
"""Patients of the rarer class below which resamples say too little of them, and a formula speaks.
[chosen: bench/bootstrap.py measures both; 4 patients have 35 different resamples]"""


_EDGE = 1e-4
"""As near to 0 and 1 as a logit is taken. [chosen: a pair of images in 10,000]"""


_EQUAL = 1e-12
"""Draws that differ by less are equal, but for the last bits."""


def finding_interval(
    metric: Literal["auroc", "auprc"],
    value: float,
    values: Float[np.ndarray, " resamples"],
    images: tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]],
    *,
    is_constant: bool = False,
) -> Interval:
    """The 95 % interval of one finding: `share_interval`, or a formula where resamples cannot say.

    They cannot where fewer than five patients, by their images, have the rarer class, where half of
    the resamples are undefined, and where all resamples are equal, as at 0 and 1: the truth need
    not be.

    Args:
        metric: What is given.
        value: Of the images themselves.
        values: Of the resamples.
        images: See `images_of_patients`; both classes are there.
        is_constant: Whether all scores are one number: the AUROC of such scores is 0.5 on any
            images, so its interval has no width. Equal draws of other scores prove nothing.
    """
    if is_constant and metric == "auroc":
        return value, value
    n = effective_number(rarer_class(images))
    if n >= FEW_PATIENTS and 0 < value < 1:
        found = share_interval(value, values, n)
        if found is not None:
            return found
    if metric == "auprc":
        return wilson_interval(value, effective_number(images[0]))
    return newcombe_interval(value, *map(effective_number, images))


def mean_interval(
    values: Float[np.ndarray, " k"],
    intervals: Sequence[Interval],
    drawn: Float[np.ndarray, "resamples k"],
    bias: Float[np.ndarray, " k"] | None = None,
) -> Interval:
    """The interval of a macro average, made of those of its findings.

    Their reaches below and above add up as deviations do, with the correlations of the resamples.
    The resamples of the mean alone would vary too little, as those of each finding do, and without
    the corrections that each finding's interval has; where they all are equal, nothing at all.

    Args:
        values: Of the findings.
        intervals: Of each.
        drawn: Of each, in the same resamples; NaN where one is undefined.
        bias: Of the values, see `auprc_bias`: small for each finding, but the mean keeps it while
            its interval shrinks.

    Source: MOVER, for correlated estimates: Zou 2008, Statistics in Medicine 27:1693 (with Donner),
        and Zou 2007, Psychological Methods 12:399.
    """
    centred = np.nan_to_num(drawn - np.nanmean(drawn, axis=0))
    deviation = np.sqrt((centred**2).sum(0))
    deviation[deviation < 1e-9] = 0.0  # all resamples are equal, but for the last bit
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


def share_interval(
    value: float,
    values: Float[np.ndarray, " resamples"],
    n_patients: int | float,
    level: float = 0.95,
) -> Interval | None:
    """The interval of a share such as AUROC or AUPRC, for findings that few patients have.

    On the scale of the logit, value -+ t s sqrt(m / (m - 1)): s is half the distance between the
    resamples' quantiles that stand a deviation from the middle of a normal distribution, t
    Student's quantile with m - 1 degrees. The percentile interval errs with few patients: m
    resampled ones vary by (m - 1) / m of what m new ones do, and near 1 a high share has a narrow
    interval, so that it misses the truth below it far more often than above it.

    Args:
        value: Of the images themselves, 0 to 1.
        values: Of the resamples; NaN where one is undefined.
        n_patients: m, the effective number of patients with images of the rarer class.
        level: Share of such intervals that should hold the truth.

    Returns:
        Within 0 to 1; None when fewer than half of the resamples are defined, all of them are
        equal, or a single patient has all images of a class.

    Source: the logit for AUROC as Pepe 2003, The Statistical Evaluation of Medical Tests, 5.2;
        t and m / (m - 1) as Hesterberg 2015 (arXiv:1411.5279). bench/bootstrap.py measures it.
    """
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < len(values) or not len(defined) or n_patients <= 1:
        return None
    low, high = logit(np.clip(np.quantile(defined, norm.cdf([-1, 1])), _EDGE, 1 - _EDGE))
    if high - low < _EQUAL:
        return None
    middle = logit(np.clip(value, _EDGE, 1 - _EDGE))
    t = student.ppf((1 + level) / 2, n_patients - 1) * np.sqrt(n_patients / (n_patients - 1))
    reach = t * (high - low) / 2
    return float(expit(middle - reach)), float(expit(middle + reach))


def percentile_interval(
    values: Float[np.ndarray, " resamples"],
    level: float = 0.95,
    *,
    n_patients: int | None = None,
) -> Interval | None:
    """The central share of the defined resamples.

    Args:
        values: Of the resamples; NaN where one is undefined.
        level: The share.
        n_patients: How many were resampled, where that is known: all resamples of a single one are
            equal, and say nothing of others.

    Returns:
        None when fewer than half of the resamples are defined, or one patient was resampled.

    Source: percentile bootstrap. [chosen: what a minority of the resamples says is no interval]
    """
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < len(values) or not len(defined) or n_patients == 1:
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def newcombe_interval(value: float, n_positive: int | float, n_negative: int | float) -> Interval:
    """The 95 % interval of an AUROC without resampling: all truths that do not contradict it.

    A truth t contradicts an AUROC that is more than 1.96 deviations away, by the variance that an
    AUROC of t has where scores are exponentially distributed. Held by 89 to 100 % of synthetic data
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

    Held by 89 to 100 % of synthetic data sets with 2 to 5 patients, where AUPRC is 0.1 to 1.

    Source: Wilson 1927; of an AUPRC, with n positives, as the binomial interval of Boyd et al.
        2013 (ECML PKDD), "Area under the precision-recall curve", section 3.
    """
    z2 = norm.ppf(0.975) ** 2
    middle = (value + z2 / (2 * n)) / (1 + z2 / n)
    reach = np.sqrt(z2 * (value * (1 - value) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


def interval_over_seeds(
    values: Float[np.ndarray, " seeds"],
    drawn: Float[np.ndarray, "seeds resamples"],
    level: float = 0.95,
) -> Interval | None:
    """The interval of a metric's mean over seeds, for other seeds and other patients.

    mean -+ t sqrt(s^2 / n + c), with s^2 the variance of the values over n seeds, and c the mean
    covariance of two seeds' resamples: what the patients do to all seeds alike. What they do to
    each seed apart is in s^2 already. t is Student's quantile with (s^2 / n + c)^2 / ((s^2 / n)^2 /
    (n - 1)) degrees, so that few seeds are paid for where they are what is uncertain. Of one seed
    it is the `percentile_interval` of its resamples, over patients alone.

    Resampling the seeds themselves is far too sure of few: where seeds alone differ, normally, 74 %
    of such 95 % intervals over 3 seeds hold the truth, 84 % over 5. Of these 94 to 96 % do from 3
    seeds on, 90 to 96 % with 2, however much of the variance is the patients'
    (tests/test_metrics.py).

    Args:
        values: Of each seed, on all images; a metric, or a difference paired by seed.
        drawn: The same in each resample of patients, the same resamples for all seeds; NaN where
            undefined.
        level: Share of such intervals that should hold the truth.

    Returns:
        None where fewer than half of the resamples are defined for all seeds.

    Source: variance components of two crossed factors (Owen 2007, "The pigeonhole bootstrap");
        degrees of freedom of their sum by Satterthwaite 1946.
    """
    n_seeds, n_resamples = drawn.shape
    if not n_seeds or np.isnan(values).any():
        return None
    if n_seeds == 1:
        return percentile_interval(drawn[0], level)
    drawn = drawn[:, ~np.isnan(drawn).any(0)]
    if 2 * drawn.shape[1] < n_resamples or drawn.shape[1] < 2:
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
    values: Float[np.ndarray, " seeds"], drawn: Float[np.ndarray, "seeds resamples"]
) -> Interval | None:
    """`interval_over_seeds` of a share such as AUROC, within 0 to 1: the same reach on the logit.

    Source: as `share_interval`.
    """
    found, middle = interval_over_seeds(values, drawn), float(values.mean())
    if found is None or not 0 < middle < 1:
        return found
    reach = (found[1] - middle) / (middle * (1 - middle))  # the slope of the logit
    return float(expit(logit(middle) - reach)), float(expit(logit(middle) + reach))


def effective_number(weights: Float[np.ndarray, " m"]) -> float:
    """How many equal parts vary as much as some unequal ones: (sum w)^2 / sum w^2.

    Source: Kish 1965, Survey Sampling, the effective sample size of weights.
    """
    return float(weights.sum() ** 2 / (weights**2).sum())


def images_of_patients(
    labels: Float[np.ndarray, " n"], patients: Sequence[Hashable] | Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """The images with and those without a finding that each patient has."""
    code, n_patients = patient_codes(patients)
    with_it, without = (
        np.bincount(code, weights=labels == known, minlength=n_patients) for known in (1, 0)
    )
    return with_it, without


def rarer_class(
    images: tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]],
) -> Float[np.ndarray, " m"]:
    """Of `images_of_patients`, those of the class that fewer patients have, by their images."""
    return min(images, key=effective_number)
