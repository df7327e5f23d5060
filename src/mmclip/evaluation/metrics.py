"""How well scores tell images with a finding from images without it, and how sure that is.

Labels are float arrays with 1 (present), 0 (absent) and NaN (unknown); scores are finite, higher
for "present". Unknown labels are left out, never counted as absent. A metric of a finding that
lacks one class is undefined: None here and listed with its counts in results, never NaN or 0.

Point values come from scikit-learn; their intervals are in `mmclip.evaluation.bootstrap`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln
from sklearn.metrics import (
    average_precision_score,
    roc_auc_score,
)


class Counts(NamedTuple):
    """Images of one finding by what is known of them."""

    n_positive: int
    n_negative: int
    n_unknown: int


class Retrieval(NamedTuple):
    """Share of a query's positives among its first k, and share of queries with at least one."""

    recall: float
    hit: float


class Retrieved(NamedTuple):
    """What each query finds; see `retrieved`."""

    recall: Float[np.ndarray, "q k"]  # share of its positives among the first k
    hit: Float[np.ndarray, "q k"]  # probability that one or more are among the first k
    rank: Float[np.ndarray, " q"]  # of its first positive, from 1


def count_labels(labels: Float[np.ndarray, " n"]) -> Counts:
    """Positive, negative and unknown labels.

    Raises:
        ValueError: When a label is none of 1, 0 and NaN.
    """
    n_positive, n_negative = int((labels == 1).sum()), int((labels == 0).sum())
    n_unknown = int(np.isnan(labels).sum())
    if n_positive + n_negative + n_unknown != labels.size:
        other = sorted({float(v) for v in labels if not np.isnan(v)} - {0.0, 1.0})
        raise ValueError(
            f"labels {other[:3]} are none of 1 (present), 0 (absent) and NaN (unknown); decide "
            f"first what an uncertain label counts as"
        )
    return Counts(n_positive, n_negative, n_unknown)


def known(
    labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]] | None:
    """Labels and scores of the images whose label is known, or None when a class is missing.

    Raises:
        ValueError: When a label is none of 1, 0 and NaN, or the score of a labelled image is not
            finite.
    """
    counts = count_labels(labels)
    is_known = ~np.isnan(labels)
    if not np.isfinite(scores[is_known]).all():
        row = int(np.flatnonzero(is_known & ~np.isfinite(scores))[0])
        raise ValueError(f"the score of row {row} is {scores[row]}; scores must be finite")
    if counts.n_positive == 0 or counts.n_negative == 0:
        return None
    return labels[is_known], scores[is_known]


def auroc(labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float | None:
    """Area under the ROC curve over known labels; None when a class is missing."""
    pair = known(labels, scores)
    return None if pair is None else float(roc_auc_score(*pair))


def macro_auroc(labels: Float[np.ndarray, "n k"], scores: Float[np.ndarray, "n k"]) -> float | None:
    """The mean AUROC over the findings that have both classes; None where none has."""
    values = [auroc(labels[:, k], scores[:, k]) for k in range(labels.shape[1])]
    some = [value for value in values if value is not None]
    return float(np.mean(some)) if some else None


def auprc(labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float | None:
    """Average precision over known labels; None when a class is missing.

    Its chance level is the share of positives, so compare it within one data set only.
    """
    pair = known(labels, scores)
    return None if pair is None else float(average_precision_score(*pair))


def f1_of_counts(tp: np.ndarray, fp: np.ndarray, n_positive: np.ndarray | int) -> np.ndarray:
    """F1 from true and false positives."""
    return 2 * tp / (tp + fp + n_positive)


def mcc_of_counts(
    tp: np.ndarray, fp: np.ndarray, n_positive: np.ndarray | int, n_negative: np.ndarray | int
) -> np.ndarray:
    """Matthews correlation; 0 where all images are called the same (scikit-learn's convention)."""
    called, left = tp + fp, n_positive + n_negative - tp - fp
    scale = np.sqrt(called * left * n_positive * n_negative)
    return (tp * n_negative - fp * n_positive) / np.where(scale == 0, np.inf, scale)


CALIBRATION_BINS = 15
"""Source: Guo et al. 2017 (arXiv:1706.04599), section 4."""


def calibration_error(
    labels: Float[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"]
) -> float | None:
    """Expected calibration error: the mean distance of what is said from what is found.

    Images are put into 15 bins of equal width by their probability; a bin's distance is that of its
    mean probability from its share of positives, and it counts by its images.

    Returns:
        Between 0 and 1; None when a class is missing, or a score is no probability.

    Source: Guo et al. 2017 (arXiv:1706.04599), equation 3, of the positive class.
    """
    pair = known(labels, probabilities)
    if pair is None or pair[1].min() < 0 or pair[1].max() > 1:
        return None
    truth, said = pair
    bins = np.minimum((said * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=said - truth, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(truth))


def retrieved(
    similarity: Float[np.ndarray, "q c"],
    is_positive: Bool[np.ndarray, "q c"],
    ks: Sequence[int] = (1, 5, 10),
) -> Retrieved:
    """What each query finds when it may have several right answers, as equal reports are all right.

    Candidates of equal similarity stand in random order, and every value is the exact expectation
    over that order: no accident of sorting lifts embeddings that collapsed to one point.

    Args:
        similarity: Of each query (row) with each candidate.
        is_positive: The right answers of each query, by the rule that the training used
            (`losses.positive_pairs`).
        ks: How many candidates are looked at.

    Raises:
        ValueError: When a k is outside 1..c, a similarity is not finite, or a query has no
            positive.
    """
    n = similarity.shape[1]
    _check_ks(ks, n)
    if not np.isfinite(similarity).all():
        row = int(np.flatnonzero(~np.isfinite(similarity).all(axis=1))[0])
        raise ValueError(f"query {row} has a similarity that is not finite; embeddings must be")
    n_positive = is_positive.sum(axis=1)
    if not n_positive.all():
        row = int(np.flatnonzero(n_positive == 0)[0])
        raise ValueError(f"query {row} has no positive among the candidates; leave it out")
    edges = -np.partition(-similarity, [k - 1 for k in ks], axis=1)
    recall = np.empty((len(similarity), len(ks)))
    for i, k in enumerate(ks):
        edge = edges[:, k - 1 : k]
        above, tied = similarity > edge, similarity == edge
        places = k - above.sum(axis=1)  # left for the tied ones
        found = (above & is_positive).sum(axis=1)
        tied_positive = (tied & is_positive).sum(axis=1)
        recall[:, i] = (found + places * tied_positive / tied.sum(axis=1)) / n_positive
    # Nothing above the best positive is one: it and its equals decide over hit and rank.
    best = np.where(is_positive, similarity, -np.inf).max(axis=1, keepdims=True)
    n_above, tied = (similarity > best).sum(axis=1), similarity == best
    n_tied, n_right = tied.sum(axis=1), (tied & is_positive).sum(axis=1)
    hit = np.stack([_hit_prob(n_tied, n_right, k - n_above) for k in ks], axis=1)
    return Retrieved(recall, hit, n_above + (n_tied + 1) / (n_right + 1))


def retrieved_by_chance(
    n_positive: Int[np.ndarray, " q"], n_candidates: int, ks: Sequence[int] = (1, 5, 10)
) -> Retrieved:
    """What `retrieved` gives where all candidates are alike, from the number of positives alone.

    With p positives of c candidates: recall k / c, hit 1 - C(c - p, k) / C(c, k), and rank
    (c + 1) / (p + 1), which for a single positive are k / c, k / c and (c + 1) / 2.

    Source: the smallest of p numbers drawn from 1..c without replacement is (c + 1) / (p + 1) on
        average.
    """
    _check_ks(ks, n_candidates)
    n_all = np.full_like(n_positive, n_candidates)
    places = [np.full_like(n_positive, k) for k in ks]
    return Retrieved(
        recall=np.tile(np.array(ks, float) / n_candidates, (len(n_positive), 1)),
        hit=np.stack([_hit_prob(n_all, n_positive, k) for k in places], axis=1),
        rank=(n_candidates + 1) / (n_positive + 1),
    )


def recall_at_k(
    similarity: Float[np.ndarray, "q c"],
    is_positive: Bool[np.ndarray, "q c"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, Retrieval]:
    """Means of `retrieved` over the queries, for each k.

    `recall` cannot reach 1 where a query has more than k positives, and is k / c at chance; `hit`
    is what most papers call R@k, and at chance it exceeds k / c where a query has several
    positives.

    Args:
        similarity: Of each query (row) with each candidate.
        is_positive: The right answers of each query.
        ks: How many candidates are looked at.
    """
    each = retrieved(similarity, is_positive, ks)
    means = zip(ks, each.recall.mean(axis=0), each.hit.mean(axis=0), strict=True)
    return {k: Retrieval(float(recall), float(hit)) for k, recall, hit in means}


def median_rank(
    similarity: Float[np.ndarray, "q c"], is_positive: Bool[np.ndarray, "q c"]
) -> float:
    """The median over the queries of the rank, from 1, at which the first positive stands.

    Where candidates tie, a query's rank is its mean over their orders: with one positive a query,
    collapsed embeddings get (c + 1) / 2.
    """
    return float(np.median(retrieved(similarity, is_positive, ks=(1,)).rank))


def _check_ks(ks: Sequence[int], n: int) -> None:
    if bad := [k for k in ks if not 1 <= k <= n]:
        raise ValueError(f"k={bad[0]} is not within 1..{n}, the number of candidates")


def _hit_prob(n: np.ndarray, n_right: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Probability that `places` of n in random order hold a right one: 1 - C(n - p, r) / C(n, r).

    0 without places, 1 where there are more places than wrong ones.
    """
    n_wrong = n - n_right
    r = np.clip(places, 0, n_wrong)
    miss = np.exp(_log_choose(n_wrong, r) - _log_choose(n, r))
    return np.where(places <= 0, 0.0, np.where(places > n_wrong, 1.0, 1.0 - miss))


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
