"""What raw scores are worth: each finding with intervals, subgroups, thresholds from validation
images."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.evaluation.baselines import shortcut_scores
from mmclip.evaluation.bootstrap import (
    Resampled,
    auprc_bias,
    bootstrap_metrics,
    macro_of_resamples,
)
from mmclip.evaluation.intervals import (
    Interval,
    finding_interval,
    images_of_patients,
    mean_interval,
    percentile_interval,
)
from mmclip.evaluation.metrics import Counts, auprc, auroc, calibration_error, count_labels
from mmclip.evaluation.protocols import MIN_COUNT
from mmclip.evaluation.results import (
    Control,
    Evaluation,
    FindingScores,
    GroupKind,
    Subgroup,
    Undefined,
)
from mmclip.evaluation.scores import Predictions
from mmclip.evaluation.thresholds import (
    Operating,
    Threshold,
    ThresholdRule,
    at_threshold,
    best_on_these,
    choose_thresholds,
)

AGE_BANDS: tuple[tuple[str, float, float], ...] = (
    ("under 40", -np.inf, 40), ("40 to 59", 40, 60), ("60 to 79", 60, 80),
    ("80 and over", 80, np.inf),
)  # fmt: skip
"""Years, the lower end within. [chosen: bands that hold many images of a hospital's]"""

VIEWS = ("PA", "AP")
"""That stand as subgroups: an image whose view is unknown is of neither."""


def compute_metrics(
    test: Predictions,
    val: Predictions | None,
    *,
    rule: ThresholdRule = "f1",
    equal_prompts: float | None = None,
    min_count: int = MIN_COUNT,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """All figures of results.json that follow from raw scores.

    Args:
        test: The images that are scored.
        val: Validation images of the same findings: they alone choose thresholds. None where there
            are none.
        rule: What a threshold does best on them.
        equal_prompts: The threshold of a finding that the validation images cannot choose, if some
            threshold needs no data, such as 0.5 where both prompts of a pair fit equally well.
        min_count: See `metrics_by_finding`.
        n_resamples: Bootstrap resamples of patients.
        seed: Of the resamples.

    Raises:
        ValueError: When the validation scores are of other findings.
    """
    names = test.names()
    if val is not None and val.names() != names:
        raise ValueError(
            f"validation scores are of {', '.join(val.names())}, test scores of {', '.join(names)}"
        )
    chosen_thresholds: dict[str, Threshold] = {}
    if equal_prompts is not None:
        note = "where both prompts fit equally well, as no validation images can choose"
        chosen_thresholds = {
            name: Threshold(equal_prompts, "equal_prompts", note) for name in names
        }
    if val is not None:
        chosen_thresholds |= choose_thresholds(val.labels, val.scores, names, rule=rule)
    found = metrics_by_finding(
        test.labels, test.scores, test.patients(), names, thresholds=chosen_thresholds,
        n_resamples=n_resamples, seed=seed, min_count=min_count,
    )  # fmt: skip
    groups = subgroups(test, min_count=min_count, n_resamples=n_resamples, seed=seed)
    return found.model_copy(update={"subgroups": groups})


def subgroups(
    scored: Predictions, *, min_count: int = MIN_COUNT, n_resamples: int = 1000, seed: int = 0
) -> list[Subgroup]:
    """Macro AUROC by sex, band of age and view, for what the images say of them.

    Groups of one kind are held against one another, so their macro is over the same findings: those
    with `min_count` images of either kind in each of the groups. A group in which no finding has so
    many is left out; a kind of which fewer than two groups are left says nothing, and is left out.
    """
    ages = scored.age_years
    kinds: dict[GroupKind, dict[str, Bool[np.ndarray, " n"]]] = {
        "sex": {"F": scored.sex == "F", "M": scored.sex == "M"},
        "age": {name: (ages >= low) & (ages < high) for name, low, high in AGE_BANDS},
        "view": {view: scored.view == view for view in VIEWS},
    }
    out = []
    for kind, groups in kinds.items():
        counting = {
            name: {
                finding
                for k, finding in enumerate(scored.names())
                if min(count_labels(scored.labels[keep, k])[:2]) >= min_count
            }
            for name, keep in groups.items()
        }
        counting = {name: findings for name, findings in counting.items() if findings}
        shared = set.intersection(*counting.values()) if len(counting) > 1 else set()
        if not shared:
            continue
        columns = [k for k, finding in enumerate(scored.names()) if finding in shared]
        for name in counting:
            part = scored.where(groups[name])
            labels, scores = part.labels[:, columns], part.scores[:, columns]
            macro, interval = _macro_auroc(
                labels, scores, part.patients(), n_resamples=n_resamples, seed=seed
            )
            out.append(
                Subgroup(
                    kind=kind,
                    group=name,
                    n_images=len(part),
                    n_patients=len(set(part.patients())),
                    findings=[scored.names()[k] for k in columns],
                    macro_auroc=macro,
                    macro_auroc_ci=interval,
                )
            )
    return out


SHARES: tuple[Literal["auroc", "auprc"], ...] = ("auroc", "auprc")
"""Metrics whose intervals are `finding_interval`; those of the others are percentiles."""


def is_constant(labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> bool:
    """Whether all images whose label is known have one score."""
    known = scores[~np.isnan(labels)]
    return len(known) > 0 and bool((known == known[0]).all())


def _macro_auroc(
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
    patients: Sequence[Hashable] | Int[np.ndarray, " n"],
    *,
    n_resamples: int,
    seed: int,
) -> tuple[float, Interval]:
    """The mean AUROC of findings that have both classes each, and its interval."""
    drawn = bootstrap_metrics(labels, scores, patients, n_resamples=n_resamples, seed=seed).auroc
    found = [auroc(labels[:, k], scores[:, k]) for k in range(labels.shape[1])]
    values = np.array(found, float)
    intervals = [
        finding_interval(
            "auroc",
            value,
            drawn[:, k],
            images_of_patients(labels[:, k], patients),
            is_constant=is_constant(labels[:, k], scores[:, k]),
        )
        for k, value in enumerate(values.tolist())
    ]
    return float(values.mean()), mean_interval(values, intervals, drawn)


class _Column(NamedTuple):
    """One finding of some images."""

    labels: Float[np.ndarray, " n"]  # 1, 0 or NaN
    scores: Float[np.ndarray, " n"]
    patients: Sequence[Hashable] | Int[np.ndarray, " n"]


def metrics_by_finding(
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
    patients: Sequence[Hashable] | Int[np.ndarray, " n"],
    findings: Sequence[str],
    *,
    thresholds: Mapping[str, Threshold] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    min_count: int = MIN_COUNT,
) -> Evaluation:
    """Every metric of every finding with its interval.

    Args:
        labels: 1, 0 or NaN; a column a finding.
        scores: Same shape.
        patients: The patient of each row.
        findings: The names of the columns, in order.
        thresholds: Thresholds by finding, chosen elsewhere; without one, F1 and the like are None.
        n_resamples: Bootstrap resamples of patients.
        seed: Of the resamples.
        min_count: A finding counts towards the macro average when it has at least this many
            positive and as many negative images.

    Returns:
        `findings` in the given order, without those that lack a class, which are in `undefined`
        with the reason and counts; no subgroups.
    """
    _check_columns(findings, labels.shape[1])
    of = dict(thresholds or {})
    drawn = bootstrap_metrics(
        labels, scores, patients, n_resamples=n_resamples, seed=seed,
        thresholds=[of[name].value if name in of else None for name in findings],
    )  # fmt: skip
    scored: list[FindingScores] = []
    undefined: list[Undefined] = []
    for k, name in enumerate(findings):
        column = _Column(labels[:, k], scores[:, k], patients)
        counts = count_labels(column.labels)
        if counts.n_positive and counts.n_negative:
            points = _points(column, of.get(name))
            scored.append(_finding(name, counts, points, column, _column_of(drawn, k), min_count))
        else:
            undefined.append(_undefined(name, counts))
    counted = [row for row in scored if row.in_macro]
    columns = [list(findings).index(row.finding) for row in counted]
    images = labels[:, columns], scores[:, columns], patients
    macros = _macro_averages(counted, images, _column_of(drawn, columns), seed)
    return Evaluation.model_validate(
        {
            **macros,
            "macro_findings": [row.finding for row in counted],
            "min_count": min_count,
            "n_images": len(labels),
            "n_patients": len(set(patients)),
            "n_resamples": n_resamples,
            "findings": scored,
            "undefined": undefined,
        }
    )


def _check_columns(findings: Sequence[str], n_columns: int) -> None:
    """Refuses findings that do not name each column once, by a ValueError."""
    if len(set(findings)) != len(findings) or len(findings) != n_columns:
        raise ValueError(
            f"{len(findings)} findings ({len(set(findings))} distinct) for {n_columns} "
            f"columns of labels; name each column once"
        )


def _column_of(drawn: Resampled, columns: int | Sequence[int]) -> dict[str, np.ndarray]:
    """The resamples of one finding or of some, by metric."""
    return {metric: values[:, columns] for metric, values in drawn._asdict().items()}


def _undefined(finding: str, counts: Counts) -> Undefined:
    """A finding that lacks a class, with the reason."""
    n_of = {"positive": counts.n_positive, "negative": counts.n_negative}
    missing = [kind for kind, n in n_of.items() if not n]
    return Undefined(
        finding=finding,
        reason=f"no {' and no '.join(missing)} image",
        n_positive=counts.n_positive,
        n_negative=counts.n_negative,
        n_unknown=counts.n_unknown,
    )


def _points(column: _Column, threshold: Threshold | None) -> dict[str, Any]:
    """What a finding with both classes reaches, by field of `FindingScores`."""
    labels, scores, _ = column
    called = None if threshold is None else at_threshold(labels, scores, threshold.value)
    tuned = best_on_these(labels, scores)
    return {
        "auroc": auroc(labels, scores),
        "auprc": auprc(labels, scores),
        **(called._asdict() if called else dict.fromkeys(Operating._fields)),
        "threshold": None if threshold is None else threshold._asdict(),
        "calibration_error": calibration_error(labels, scores),
        "test_tuned": None if tuned is None else tuned._asdict(),
    }


def _finding(
    name: str,
    counts: Counts,
    points: Mapping[str, Any],
    column: _Column,
    drawn: Mapping[str, Float[np.ndarray, " resamples"]],
    min_count: int,
) -> FindingScores:
    """A finding with both classes: what it reaches, with the interval of each metric."""
    images = images_of_patients(column.labels, column.patients)
    is_flat = is_constant(column.labels, column.scores)
    n_patients = len(set(column.patients))
    intervals = {
        f"{metric}_ci": (
            finding_interval(metric, points[metric], values, images, is_constant=is_flat)
            if metric in SHARES
            else percentile_interval(values, n_patients=n_patients)
        )
        for metric, values in drawn.items()
    }
    in_macro = min(counts.n_positive, counts.n_negative) >= min_count
    named = {"finding": name, **counts._asdict(), "in_macro": in_macro}
    return FindingScores.model_validate({**named, **points, **intervals})


def _macro_averages(
    counted: Sequence[FindingScores],
    images: tuple[
        Float[np.ndarray, "n c"],
        Float[np.ndarray, "n c"],
        Sequence[Hashable] | Int[np.ndarray, " n"],
    ],
    drawn: Mapping[str, Float[np.ndarray, "resamples c"]],
    seed: int,
) -> dict[str, float | Interval | None]:
    """The mean of each metric over findings, with its interval, by field of `Evaluation`.

    Args:
        counted: The findings that count.
        images: Their labels and scores, and the patients.
        drawn: Their resamples by metric.
        seed: Of the resamples.
    """
    macro: dict[str, float | Interval | None] = {}
    for metric, values in drawn.items():
        points = [getattr(row, metric) for row in counted]
        # A macro over fewer findings than `macro_findings` names would mislead: all or none.
        complete = bool(points) and None not in points
        macro[f"macro_{metric}"] = float(np.mean(points)) if complete else None
        interval = None
        if complete and metric in SHARES:
            intervals = [getattr(row, f"{metric}_ci") for row in counted]
            known = np.array(points)
            bias = auprc_bias(*images, known, seed=seed) if metric == "auprc" else None
            interval = mean_interval(known, intervals, values, bias)
        elif complete:
            every = list(range(len(counted)))
            n_patients = len(set(images[2]))
            interval = percentile_interval(macro_of_resamples(values, every), n_patients=n_patients)
        macro[f"macro_{metric}_ci"] = interval
    return macro


def control_of(
    test: Predictions, scores: Float[np.ndarray, "n k"], note: str, min_count: int = MIN_COUNT
) -> Control:
    """A control of a result: what other scores of the same images reach.

    Its macro average is over the findings that `metrics_by_finding` counts by the same `min_count`.
    """
    values = {name: auroc(test.labels[:, k], scores[:, k]) for k, name in enumerate(test.names())}
    known = {name: value for name, value in values.items() if value is not None}
    counted = [
        k for k in range(len(test.names())) if min(count_labels(test.labels[:, k])[:2]) >= min_count
    ]
    macro, interval = None, None
    if counted:
        macro, interval = _macro_auroc(
            test.labels[:, counted], scores[:, counted], test.patients(), n_resamples=200, seed=0
        )
    return Control(macro_auroc=macro, macro_auroc_ci=interval, auroc=dict(known), note=note)


def shortcut_baseline(
    dataset: ImageTextDataset, test: Predictions, min_count: int = MIN_COUNT
) -> Control:
    """The control that reads facts of the file and no lung; see `baselines.shortcut_scores`."""
    return control_of(
        test,
        shortcut_scores(dataset, test.labels),
        "logistic regression on the image's size, brightness, gradients, border and view, told the "
        "labels of other patients of these very images: a model that does not exceed it may have "
        "read no lung",
        min_count,
    )
