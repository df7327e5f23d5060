"""Which score counts as present: thresholds, chosen on some images and applied to others."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    matthews_corrcoef,
    recall_score,
    roc_curve,
)

from mmclip.evaluation.metrics import count_labels, f1_of_counts, known, mcc_of_counts

ThresholdRule = Literal["f1", "mcc", "youden"]
ThresholdOrigin = ThresholdRule | Literal["equal_prompts"]
"""How a threshold came about: best by a rule on some images, or where both prompts fit equally
well."""


class Threshold(NamedTuple):
    """A threshold (score >= value means present), how it came about, and on which images.

    A threshold that was chosen on the images that it is evaluated on flatters the model, so results
    always say which split chose it.
    """

    value: float
    rule: ThresholdOrigin
    chosen_on: str


class Operating(NamedTuple):
    """What one threshold does to one finding."""

    f1: float
    mcc: float
    accuracy: float
    sensitivity: float
    specificity: float


class Tuned(NamedTuple):
    """What papers report whose thresholds were chosen on the test images: higher than any honest
    threshold's."""

    f1: float
    accuracy: float
    mcc: float


def choose_threshold(
    labels: Float[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    rule: ThresholdRule = "f1",
) -> float | None:
    """The score that, used as a threshold (score >= threshold is present), does best by a rule.

    Args:
        labels: Of validation images; the threshold is then applied to other images.
        scores: Of the same images.
        rule: The value to maximise: F1, Matthews correlation, or sensitivity + specificity - 1.

    Returns:
        The highest of the best thresholds; None when a class is missing.
    """
    pair = known(labels, scores)
    if pair is None:
        return None
    fpr, tpr, thresholds = roc_curve(*pair, drop_intermediate=False)
    n_positive, n_negative, _ = count_labels(pair[0])
    # The first threshold is infinite: nothing is called present. It never beats calling all
    # present.
    tp, fp = tpr[1:] * n_positive, fpr[1:] * n_negative
    if rule == "youden":
        value = tpr[1:] - fpr[1:]
    elif rule == "f1":
        value = f1_of_counts(tp, fp, n_positive)
    else:
        value = mcc_of_counts(tp, fp, n_positive, n_negative)
    # Equal counts can differ in the last bit, which must not decide between thresholds.
    return float(thresholds[1:][np.argmax(np.round(value, 12))])


def choose_thresholds(
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
    findings: Sequence[str],
    *,
    rule: ThresholdRule = "f1",
    chosen_on: str = "val",
) -> dict[str, Threshold]:
    """A threshold for each finding that has both classes; findings without are not in the
    mapping."""
    chosen = {
        name: choose_threshold(labels[:, i], scores[:, i], rule) for i, name in enumerate(findings)
    }
    return {
        n: Threshold(threshold, rule, chosen_on)
        for n, threshold in chosen.items()
        if threshold is not None
    }


def at_threshold(
    labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"], threshold: float
) -> Operating | None:
    """F1, MCC, accuracy, sensitivity and specificity of a threshold; None when a class is missing.

    A threshold that calls no image present has F1 0 and MCC 0 (scikit-learn's convention).
    """
    pair = known(labels, scores)
    if pair is None:
        return None
    truth, called = pair[0] == 1, pair[1] >= threshold
    return Operating(
        f1=float(f1_score(truth, called)),
        mcc=float(matthews_corrcoef(truth, called)),
        accuracy=float(accuracy_score(truth, called)),
        sensitivity=float(recall_score(truth, called)),
        specificity=float(recall_score(truth, called, pos_label=0)),
    )


def best_on_these(labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> Tuned | None:
    """Best F1 and best MCC over all thresholds of these very images; None when a class is missing.

    For comparison with published numbers alone. Accuracy is that of the threshold of the best F1,
    above which (and not at which) an image is present.

    Source: F1 and accuracy as in MedKLIP's and MAVL's test.py, MCC as in KAD's.
    """
    by_f1, by_mcc = (choose_threshold(labels, scores, rule) for rule in ("f1", "mcc"))
    pair = known(labels, scores)
    if pair is None or by_f1 is None or by_mcc is None:
        return None
    best_f1, best_mcc = (at_threshold(labels, scores, threshold) for threshold in (by_f1, by_mcc))
    assert best_f1 is not None and best_mcc is not None  # both classes are there
    accuracy = float(accuracy_score(pair[0] == 1, pair[1] > by_f1))
    return Tuned(best_f1.f1, accuracy, best_mcc.mcc)
