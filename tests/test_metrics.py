"""The metrics: by hand, against scikit-learn, against a slow loop over resampled rows, faults."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    roc_auc_score,
)

from mmclip.evaluation.bootstrap import (
    auprc_bias,
    bootstrap_difference,
    bootstrap_metrics,
    macro_of_resamples,
    patient_halves,
)
from mmclip.evaluation.compute_metrics import metrics_by_finding
from mmclip.evaluation.intervals import (
    interval_over_seeds,
    mean_interval,
    newcombe_interval,
    percentile_interval,
    share_interval,
    share_over_seeds,
    wilson_interval,
)
from mmclip.evaluation.metrics import (
    Counts,
    auprc,
    auroc,
    count_labels,
    median_rank,
    recall_at_k,
    retrieved,
    retrieved_by_chance,
)
from mmclip.evaluation.thresholds import (
    Threshold,
    at_threshold,
    choose_threshold,
    choose_thresholds,
)

NAN = float("nan")


def made(n=300, k=4, n_patients=90, levels=0, seed=0):
    """Labels with unknowns, scores (tied when `levels`), patients with several images each."""
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, n_patients, n)
    labels = (rng.random((n, k)) < np.linspace(0.08, 0.6, k)).astype(float)
    scores = labels * 0.8 + rng.normal(size=(n, k))
    if levels:
        scores = np.round(scores * levels) / levels
    labels[rng.random((n, k)) < 0.15] = np.nan
    return labels, scores, patients


def test_auroc_by_hand_counts_a_tie_as_half():
    labels, scores = np.array([1.0, 1.0, 0.0]), np.array([0.9, 0.5, 0.5])
    assert auroc(labels, scores) == pytest.approx((1 + 0.5) / 2)


def test_unknown_labels_are_left_out_even_with_absurd_scores():
    labels, scores = np.array([1.0, 0.0, NAN, NAN]), np.array([0.9, 0.1, 5.0, NAN])
    assert auroc(labels, scores) == 1.0
    assert auprc(labels, scores) == 1.0
    assert count_labels(labels) == Counts(1, 1, 2)


@pytest.mark.parametrize("labels", [[1.0, 1.0, NAN], [0.0, 0.0, 0.0], [NAN, NAN, NAN]])
def test_a_missing_class_is_none_for_every_metric(labels):
    labels, scores = np.array(labels), np.array([0.1, 0.2, 0.3])
    assert auroc(labels, scores) is None
    assert auprc(labels, scores) is None
    assert choose_threshold(labels, scores) is None
    assert at_threshold(labels, scores, 0.2) is None


def test_an_uncertain_label_is_refused_by_value():
    with pytest.raises(ValueError, match=r"labels \[-1\.0\] are none of 1 .* uncertain"):
        auroc(np.array([1.0, 0.0, -1.0]), np.array([0.1, 0.2, 0.3]))


def test_a_score_that_is_not_finite_is_refused_by_row():
    with pytest.raises(ValueError, match="score of row 1 is nan"):
        auroc(np.array([1.0, 0.0]), np.array([0.1, NAN]))


@pytest.mark.parametrize("rule", ["f1", "mcc", "youden"])
@pytest.mark.parametrize("levels", [0, 3])
def test_the_chosen_threshold_is_the_best_of_all_scores(rule, levels):
    labels, scores, _ = made(n=25, k=1, levels=levels, seed=3)
    labels, scores = np.nan_to_num(labels[:, 0]), scores[:, 0]

    def value(threshold):
        at = at_threshold(labels, scores, threshold)
        by_rule = {"f1": at.f1, "mcc": at.mcc, "youden": at.sensitivity + at.specificity - 1}
        return by_rule[rule]

    best = max(value(threshold) for threshold in scores)
    chosen = choose_threshold(labels, scores, rule)
    assert value(chosen) == pytest.approx(best, abs=1e-12)
    assert chosen == max(threshold for threshold in scores if value(threshold) > best - 1e-12)


def test_at_threshold_by_hand():
    at = at_threshold(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.9, 0.2, 0.7, 0.1]), 0.7)
    assert (at.f1, at.accuracy, at.sensitivity, at.specificity, at.mcc) == (0.5, 0.5, 0.5, 0.5, 0)


@pytest.mark.parametrize("levels", [0, 2])
def test_point_metrics_equal_scikit_learns_and_the_slow_loop(levels):
    labels, scores, patients = made(levels=levels, seed=5)
    assert levels == 0 or len(np.unique(scores)) < 20  # nearly all tied
    thresholds = {name: Threshold(0.5, "f1", "val") for name in "abcd"}
    rows = metrics_by_finding(
        labels, scores, patients, list("abcd"), thresholds=thresholds, n_resamples=2
    )
    for k, row in enumerate(rows.findings):
        is_known = ~np.isnan(labels[:, k])
        y, s = labels[is_known, k] == 1, scores[is_known, k]
        called = s >= 0.5
        expected = {
            "auroc": roc_auc_score(y, s),
            "auprc": average_precision_score(y, s),
            "f1": f1_score(y, called),
            "mcc": matthews_corrcoef(y, called),
            "accuracy": accuracy_score(y, called),
        }
        assert {name: getattr(row, name) for name in expected} == pytest.approx(expected, abs=1e-12)
        wins = [(p > q) + 0.5 * (p == q) for p in s[y] for q in s[~y]]
        assert row.auroc == pytest.approx(np.mean(wins), abs=1e-12)
        precision = [y[s >= threshold].mean() for threshold in s[y]]
        assert row.auprc == pytest.approx(np.mean(precision), abs=1e-12)
        tp, fp = (y & called).sum(), (~y & called).sum()
        fn, tn = (y & ~called).sum(), (~y & ~called).sum()
        assert row.f1 == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-12)
        product = float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        assert row.mcc == pytest.approx((tp * tn - fp * fn) / math.sqrt(product), abs=1e-12)
        assert row.accuracy == pytest.approx((tp + tn) / len(y), abs=1e-12)


def test_a_cut_that_calls_nothing_has_f1_and_mcc_zero():
    at = at_threshold(np.array([1.0, 0.0]), np.array([0.9, 0.2]), 5.0)
    assert (at.f1, at.mcc, at.sensitivity, at.specificity) == (0, 0, 0, 1)


@pytest.mark.ledger("intervals")
@pytest.mark.parametrize("levels", [0, 2])
def test_bootstrap_equals_sklearn_on_resampled_rows_in_each_draw(levels):
    labels, scores, patients = made(levels=levels)
    thresholds = [0.5, None, 0.3, 9.0]
    fast = bootstrap_metrics(
        labels, scores, patients, n_resamples=15, seed=7, thresholds=thresholds
    )
    codes = {p: i for i, p in enumerate(dict.fromkeys(patients.tolist()))}
    rows_of = [np.flatnonzero(patients == p) for p in codes]
    rng = np.random.default_rng(7)
    for b in range(15):
        drawn = rng.integers(0, len(codes), len(codes))
        rows = np.concatenate([rows_of[i] for i in drawn])
        for j in range(labels.shape[1]):
            is_known = ~np.isnan(labels[rows, j])
            y, s = labels[rows, j][is_known], scores[rows, j][is_known]
            assert fast.auroc[b, j] == pytest.approx(roc_auc_score(y, s), abs=1e-12)
            assert fast.auprc[b, j] == pytest.approx(average_precision_score(y, s), abs=1e-12)
            if thresholds[j] is None:
                assert np.isnan(fast.f1[b, j]) and np.isnan(fast.mcc[b, j])
            else:
                called = s >= thresholds[j]
                assert fast.f1[b, j] == pytest.approx(f1_score(y, called), abs=1e-12)
                assert fast.mcc[b, j] == pytest.approx(matthews_corrcoef(y, called), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, NAN]), st.integers(0, 3), st.integers(0, 4)),
        min_size=1,
        max_size=25,
    ),
    seed=st.integers(0, 100),
)
def test_bootstrap_equals_weighted_sklearn_on_any_small_tied_input(rows, seed):
    labels = np.array([[r[0]] for r in rows])
    scores = np.array([[float(r[1])] for r in rows])
    patients = [f"p{r[2]}" for r in rows]
    fast = bootstrap_metrics(labels, scores, patients, n_resamples=5, seed=seed)
    order = list(dict.fromkeys(patients))
    rng = np.random.default_rng(seed)
    has_both = set(labels[~np.isnan(labels)]) == {0.0, 1.0}
    for b in range(5):
        drawn = np.bincount(rng.integers(0, len(order), len(order)), minlength=len(order))
        weight = np.array([drawn[order.index(p)] for p in patients], dtype=float)
        use = ~np.isnan(labels[:, 0]) & (weight > 0)
        if has_both and set(labels[use, 0]) == {0.0, 1.0}:
            arguments = labels[use, 0], scores[use, 0]
            expected = roc_auc_score(*arguments, sample_weight=weight[use])
            assert fast.auroc[b, 0] == pytest.approx(expected, abs=1e-12)
            expected = average_precision_score(*arguments, sample_weight=weight[use])
            assert fast.auprc[b, 0] == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(fast.auroc[b, 0])


def test_bootstrap_does_not_depend_on_the_chunk_size(monkeypatch):
    labels, scores, patients = made()
    whole = bootstrap_metrics(labels, scores, patients, n_resamples=30, seed=1)
    monkeypatch.setattr("mmclip.evaluation.bootstrap._CHUNK_ELEMENTS", 7 * len(labels))
    again = bootstrap_metrics(labels, scores, patients, n_resamples=30, seed=1)
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_resampling_patients_widens_the_interval_of_repeated_images():
    labels, scores, _ = made(n=80, k=1, seed=2)
    labels = np.nan_to_num(labels)
    tripled = np.repeat(labels, 3, axis=0), np.repeat(scores, 3, axis=0)

    def width(patients):
        low, high = percentile_interval(
            bootstrap_metrics(*tripled, patients, n_resamples=400).auroc[:, 0]
        )
        return high - low

    assert width(np.repeat(np.arange(80), 3)) > 1.4 * width(np.arange(240))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = 0.5 * (1 + math.erf(1.0 / 2))  # two unit normals whose means are 1 apart
    n, trials, hits = 120, 150, 0
    rng = np.random.default_rng(0)
    for trial in range(trials):
        labels = (np.arange(n) % 3 == 0).astype(float)[:, None]
        scores = labels + rng.normal(size=(n, 1))
        drawn = bootstrap_metrics(labels, scores, np.arange(n), n_resamples=200, seed=trial)
        low, high = percentile_interval(drawn.auroc[:, 0])
        hits += low <= truth <= high
    assert 0.88 <= hits / trials <= 0.99


def test_the_interval_of_a_share_by_hand():
    # Draws whose logits are 1 +- 0.4 times the quantiles of a normal distribution; 11 patients.
    resampled = 1 / (1 + np.exp(-(1 + 0.4 * norm.ppf(np.linspace(0.001, 0.999, 999)))))
    reach = 2.228139 * 0.4 * math.sqrt(11 / 10)  # Student's t with 10 degrees
    expected = [1 / (1 + math.exp(-(0.8 + sign * reach))) for sign in (-1, 1)]
    value = 1 / (1 + math.exp(-0.8))
    assert share_interval(value, resampled, 11) == pytest.approx(expected, abs=1e-3)
    assert share_interval(value, np.append(resampled, [NAN] * 999), 11) == pytest.approx(
        expected, abs=1e-3
    )
    assert share_interval(value, np.append(resampled, [NAN] * 1000), 11) is None
    assert share_interval(value, resampled, 1) is None
    assert share_interval(0.7, np.full(10, 0.7), 5) is None
    low, high = share_interval(0.98, np.append(resampled, np.ones(300)), 3)
    assert 0 < low < 0.98 < high <= 1


def test_intervals_of_results_know_how_few_patients_have_the_finding():
    labels, scores, patients = made()
    labels[:, 0] = 0.0
    labels[np.isin(patients, range(3, 11)), 0] = 1.0
    results = metrics_by_finding(labels, scores, patients, list("abcd"), n_resamples=50)
    drawn = bootstrap_metrics(labels, scores, patients, n_resamples=50)
    row = results.findings[0]
    images = np.bincount(patients, weights=labels[:, 0])
    effective = images.sum() ** 2 / (images**2).sum()  # of images that patients share unequally
    assert 5 <= effective <= 8
    for metric in ("auroc", "auprc"):
        values = getattr(drawn, metric)[:, 0]
        assert getattr(row, f"{metric}_ci") == share_interval(
            getattr(row, metric), values, effective
        )
    alone = metrics_by_finding(
        labels[:, :1], scores[:, :1], patients, ["a"], n_resamples=50, min_count=3
    )
    assert alone.macro_auroc_ci == pytest.approx(alone.findings[0].auroc_ci)


@pytest.mark.slow
@pytest.mark.ledger("intervals")
def test_intervals_hold_the_truth_where_few_patients_have_several_images_each():
    truth = 0.5 * (1 + math.erf(1.0 / 2))
    trials, hits, by_percentile = 400, 0, 0
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(30), 4)
    labels = (patients % 3 == 0).astype(float)[:, None]  # ten patients, forty images
    for trial in range(trials):
        shared = rng.normal(size=30)[patients, None]
        scores = labels + math.sqrt(0.5) * (shared + rng.normal(size=(120, 1)))
        drawn = bootstrap_metrics(labels, scores, patients, n_resamples=200, seed=trial).auroc[:, 0]
        low, high = share_interval(auroc(labels[:, 0], scores[:, 0]), drawn, 10)
        hits += low <= truth <= high
        low, high = percentile_interval(drawn)
        by_percentile += low <= truth <= high
    assert 0.93 <= hits / trials <= 0.99
    assert by_percentile < hits


def test_the_interval_of_separated_images_says_what_few_patients_can():
    # Hanley-McNeil's variance at t, 1.96 deviations from 1, solved by hand for 2 and 2 patients.
    low, high = newcombe_interval(1.0, 2, 2)
    variance = low * (1 - low) * (1 + (1 - low) / (2 - low) + low / (1 + low)) / 4
    assert (1 - low) ** 2 == pytest.approx(norm.ppf(0.975) ** 2 * variance, rel=1e-2)
    assert high == 1.0
    mirrored = newcombe_interval(0.0, 2, 2)
    assert mirrored == pytest.approx((0.0, 1 - low), abs=1e-9)
    assert newcombe_interval(1.0, 50, 500)[0] > 0.9 > newcombe_interval(1.0, 2, 20)[0]
    assert wilson_interval(1.0, 4) == pytest.approx((4 / (4 + norm.ppf(0.975) ** 2), 1.0))
    labels = np.array([1.0, 1, 0, 0])[:, None]
    row = metrics_by_finding(labels, labels, list("pqrs"), ["a"], n_resamples=50).findings[0]
    assert row.auroc_ci == pytest.approx((low, 1.0)) and row.auprc_ci[0] < 0.5


@pytest.mark.parametrize("n_positive", [2, 3, 4, 5])
def test_the_formula_for_few_patients_holds_the_truth(n_positive: int):
    truth, n_negative, trials = 0.5 * (1 + math.erf(1.2 / 2)), 9 * n_positive, 400
    rng = np.random.default_rng(n_positive)
    with_it = 1.2 + rng.normal(size=(trials, n_positive, 1))
    without = rng.normal(size=(trials, 1, n_negative))
    values = (with_it > without).mean((1, 2))
    intervals = [newcombe_interval(float(v), n_positive, n_negative) for v in values]
    held = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.92 <= held <= 0.99


def test_the_macro_interval_adds_reaches_as_their_draws_correlate():
    rng = np.random.default_rng(0)
    values, intervals = np.array([0.8, 0.7]), [(0.6, 0.9), (0.6, 0.8)]
    one = rng.normal(size=4000)
    same = mean_interval(values, intervals, np.stack([one, 2 * one], 1))
    assert same == pytest.approx((0.75 - 0.15, 0.75 + 0.1))  # the means of either edge
    apart = mean_interval(values, intervals, rng.normal(size=(4000, 2)))
    reach = math.hypot(0.2, 0.1) / 2, math.hypot(0.1, 0.1) / 2
    assert apart == pytest.approx((0.75 - reach[0], 0.75 + reach[1]), abs=5e-3)
    fixed = mean_interval(values, intervals, np.full((10, 2), 0.7))  # draws that say nothing
    assert fixed == pytest.approx((0.75 - reach[0], 0.75 + reach[1]))


@pytest.mark.slow
def test_halves_of_the_patients_tell_how_far_few_images_raise_average_precision():
    rng = np.random.default_rng(3)
    n, k, trials = 150, 10, 60
    many = rng.random(200_000) < 0.1
    truth = average_precision_score(many, rng.standard_normal(len(many)) + 1.2 * many)
    plain, corrected = [], []
    for trial in range(trials):
        labels = (rng.random((n, k)) < 0.1).astype(float)
        scores = rng.standard_normal((n, k)) + 1.2 * labels
        values = np.array([auprc(labels[:, i], scores[:, i]) for i in range(k)], float)
        bias = auprc_bias(labels, scores, np.arange(n), values, n_resamples=50, seed=trial)
        plain.append(values.mean())
        corrected.append((values - bias).mean())
    excess = np.mean(plain) - truth
    assert excess > 0.015  # of 15 positives
    assert abs(np.mean(corrected) - truth) < excess / 2


def test_halves_take_each_patient_once_and_the_mean_over_them_is_scikit_learns():
    labels = np.array([[1], [1], [0], [0], [1], [0], [0], [0]], float)
    scores = np.array([[9], [3], [5], [1], [7], [6], [2], [4]], float)
    patients = [0, 0, 1, 1, 2, 2, 3, 3]
    value = average_precision_score(labels[:, 0], scores[:, 0])
    weights = np.concatenate(list(patient_halves(4, 40, 5, 7)), axis=1)
    assert ((weights == 0) | (weights == 1)).all() and (weights.sum(0) == 2).all()
    halves = []
    for weight in weights.T:
        rows = weight[patients] > 0
        if labels[rows].any():
            halves.append(average_precision_score(labels[rows, 0], scores[rows, 0]))
    bias = auprc_bias(labels, scores, patients, np.array([value]), n_resamples=40, seed=5)
    assert len(halves) < 40 and bias == pytest.approx(np.mean(halves) - value, abs=1e-12)


def test_bootstrap_difference_uses_the_same_draws_for_both_models():
    labels, scores, patients = made()
    assert not bootstrap_difference(
        labels, scores, scores * 2, patients, n_resamples=20
    ).auroc.any()
    worse = scores + np.random.default_rng(5).normal(size=scores.shape)
    paired = bootstrap_difference(labels, scores, worse, patients, n_resamples=300, seed=0).auroc[
        :, 3
    ]
    a = bootstrap_metrics(labels, scores, patients, n_resamples=300, seed=0).auroc[:, 3]
    b = bootstrap_metrics(labels, worse, patients, n_resamples=300, seed=1).auroc[:, 3]
    assert paired.std() < 0.9 * (a - b).std()


def test_the_interval_over_seeds_by_hand():
    # Seeds 0.1, 0.2, 0.6 whoever the patients: variance 0.07 over 3, Student's t of 2 degrees.
    values = np.array([0.1, 0.2, 0.6])
    found = interval_over_seeds(values, np.tile(values[:, None], 50))
    assert found == pytest.approx((0.3 - 4.3027 * 0.152753, 0.3 + 4.3027 * 0.152753), abs=1e-4)
    # Patients move both seeds by one number a draw: its variance, 0.04 * 10 / 9, and nothing else.
    moved = np.array([-0.2, 0.2] * 5)
    found = interval_over_seeds(np.array([0.5, 0.5]), np.stack([0.5 + moved, 0.5 + moved]))
    assert found == pytest.approx((0.5 - 1.96 * 0.210819, 0.5 + 1.96 * 0.210819), abs=1e-4)
    # What they do to each seed apart, here the contrary, is in the spread of the seeds alone.
    assert interval_over_seeds(
        np.array([0.4, 0.6]), np.stack([0.4 + moved, 0.6 - moved])
    ) == pytest.approx((0.5 - 12.7062 * 0.1, 0.5 + 12.7062 * 0.1), abs=1e-3)


def test_the_interval_of_one_seed_is_over_its_patients():
    drawn = np.random.default_rng(0).normal(0.7, 0.02, (1, 1000))
    found = interval_over_seeds(np.array([0.7]), drawn)
    assert found == percentile_interval(drawn[0]) == tuple(np.quantile(drawn, [0.025, 0.975]))


def test_no_interval_over_seeds_where_half_of_the_draws_or_a_value_is_undefined():
    drawn = np.random.default_rng(0).random((2, 10))
    values = drawn.mean(1)
    drawn[0, :3], drawn[1, 2:5] = np.nan, np.nan
    assert interval_over_seeds(values, drawn) is not None  # 5 of 10 draws are left
    drawn[1, 5] = np.nan
    assert interval_over_seeds(values, drawn) is None
    assert interval_over_seeds(np.array([np.nan, 0.5]), np.ones((2, 10))) is None
    assert interval_over_seeds(np.empty(0), np.empty((0, 10))) is None


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize(
    ("of_seeds", "of_both", "of_patients"),
    [(1, 0, 0), (1, 0, 0.5), (1, 0.5, 0.5), (0.3, 0.3, 1), (0, 0, 1)],
)
def test_the_interval_over_seeds_holds_the_truth(
    n_seeds: int, of_seeds: float, of_both: float, of_patients: float
):
    rng = np.random.default_rng(n_seeds)
    held = []
    for _ in range(800):
        values = (
            of_seeds * rng.standard_normal(n_seeds)
            + of_both * rng.standard_normal(n_seeds)
            + of_patients * rng.standard_normal()
        )
        other_patients = of_both * rng.standard_normal((n_seeds, 200))
        other_patients += of_patients * rng.standard_normal(200)
        low, high = interval_over_seeds(values, values[:, None] + other_patients)
        held.append(low <= 0 <= high)
    assert np.mean(held) >= (0.88 if n_seeds == 2 else 0.92)
    assert np.mean(held) <= 0.98


def test_the_interval_of_a_share_over_seeds_stays_within_0_and_1():
    values = np.array([0.95, 0.99, 0.97])
    drawn = values[:, None] + np.random.default_rng(0).normal(0, 0.01, 500)
    low, high = interval_over_seeds(values, drawn)
    assert high > 1
    low_share, high_share = share_over_seeds(values, drawn)
    assert low_share < low < 0.97 < high_share < 1
    assert share_over_seeds(np.ones(2), np.ones((2, 9))) == (1.0, 1.0)


def test_macro_draws_leave_out_findings_that_a_draw_does_not_define():
    values = np.array([[0.6, 0.8, 0.1], [0.6, NAN, 0.1], [NAN, NAN, 0.1]])
    np.testing.assert_allclose(macro_of_resamples(values, [0, 1]), [0.7, 0.6, NAN])


def test_percentile_interval_needs_half_of_the_draws():
    assert percentile_interval(np.array([0.5, NAN, NAN])) is None
    assert percentile_interval(np.array([])) is None
    low, high = percentile_interval(np.linspace(0, 1, 1001))
    assert (low, high) == pytest.approx((0.025, 0.975))


def test_collapsed_scores_are_at_chance_with_no_width():
    labels, scores, patients = made()
    results = metrics_by_finding(
        labels, np.zeros_like(scores), patients, list("abcd"), n_resamples=20
    )
    for row in results.findings:
        assert row.auroc == 0.5 and row.auroc_ci == (0.5, 0.5)
        share = row.n_positive / (row.n_positive + row.n_negative)
        assert row.auprc == pytest.approx(share)
    assert results.macro_auroc == 0.5


def test_no_interval_of_scores_that_vary_is_without_width():
    # Five images of one patient: every resample is the same five.
    labels = np.array([1.0, 1.0, 0.0, 0.0, 0.0])[:, None]
    scores = np.array([0.9, 0.2, 0.1, 0.3, 0.1])[:, None]
    found = metrics_by_finding(labels, scores, ["p"] * 5, ["a"], n_resamples=50, min_count=1)
    (row,) = found.findings
    assert row.auroc == pytest.approx(5 / 6)
    for metric in ("auroc", "auprc"):
        value, (low, high) = getattr(row, metric), getattr(row, f"{metric}_ci")
        assert 0 <= low < value - 0.1 and value <= high <= 1 and high - low > 0.3
        low, high = getattr(found, f"macro_{metric}_ci")
        assert low < value - 0.1 and high - low > 0.3
    # Six patients, each with both classes and AUROC 0.5: all resamples are equal.
    labels = np.tile([1.0, 0.0, 0.0], 6)[:, None]
    scores = np.tile([0.5, 0.2, 0.8], 6)[:, None]
    found = metrics_by_finding(
        labels, scores, np.repeat(np.arange(6), 3), ["a"], n_resamples=50, min_count=1
    )
    low, high = found.findings[0].auroc_ci
    assert low < 0.4 and high > 0.6
    # Three patients: A with the finding, B and C without.
    labels, scores = np.array([[1.0], [0.0], [0.0]]), np.array([[0.5], [0.2], [0.8]])
    found = metrics_by_finding(labels, scores, list("ABC"), ["a"], n_resamples=50, min_count=1)
    low, high = found.findings[0].auroc_ci
    assert low < 0.3 and high > 0.7


def test_one_patient_gives_no_percentile_interval():
    assert percentile_interval(np.full(9, 0.5), n_patients=1) is None
    assert percentile_interval(np.full(9, 0.5), n_patients=2) == (0.5, 0.5)
    threshold = {"a": Threshold(0.5, "f1", "")}
    labels, scores = np.array([[1.0], [0.0], [0.0]]), np.array([[0.6], [0.2], [0.8]])
    found = metrics_by_finding(
        labels, scores, ["p"] * 3, ["a"], thresholds=threshold, n_resamples=9, min_count=1
    )
    assert found.findings[0].f1 > 0 and found.findings[0].f1_ci is None
    assert found.macro_f1 > 0 and found.macro_f1_ci is None


@pytest.mark.ledger("intervals")
def test_one_class_findings_are_listed_with_reason_and_counts():
    labels, scores, patients = made()
    labels[:, 1] = np.where(np.isnan(labels[:, 1]), np.nan, 0.0)
    labels[:, 2] = np.nan
    results = metrics_by_finding(labels, scores, patients, list("abcd"), n_resamples=20)
    assert [row.finding for row in results.findings] == ["a", "d"]
    assert [(u.finding, u.reason) for u in results.undefined] == [
        ("b", "no positive image"),
        ("c", "no positive and no negative image"),
    ]
    assert results.undefined[1].n_unknown == len(labels)
    assert results.macro_findings == ["a", "d"]


def test_permuted_findings_permute_the_results():
    labels, scores, patients = made()
    names, order = list("abcd"), [2, 0, 3, 1]
    thresholds = choose_thresholds(labels, scores, names)
    arguments = {"thresholds": thresholds, "n_resamples": 30}
    plain = metrics_by_finding(labels, scores, patients, names, **arguments)
    moved = metrics_by_finding(
        labels[:, order], scores[:, order], patients, [names[i] for i in order], **arguments
    )
    assert moved.findings == [plain.findings[i] for i in order]
    assert moved.macro_auroc == pytest.approx(plain.macro_auroc, abs=1e-12)
    assert moved.macro_auroc_ci == pytest.approx(plain.macro_auroc_ci, abs=1e-12)


def test_a_rare_finding_is_scored_but_left_out_of_the_macro():
    labels, scores, patients = made()
    labels[:, 0] = 0.0
    labels[:3, 0] = 1.0
    results = metrics_by_finding(labels, scores, patients, list("abcd"), n_resamples=20)
    rare = results.findings[0]
    assert rare.auroc is not None and not rare.in_macro
    assert results.macro_findings == ["b", "c", "d"]
    mean = np.mean([row.auroc for row in results.findings[1:]])
    assert results.macro_auroc == pytest.approx(mean)
    every = metrics_by_finding(labels, scores, patients, list("abcd"), n_resamples=20, min_count=3)
    assert every.macro_findings == ["a", "b", "c", "d"]


def test_threshold_metrics_say_where_the_cut_was_chosen_and_are_none_without_one():
    labels, scores, patients = made()
    threshold = {"a": Threshold(0.4, "youden", "val")}
    results = metrics_by_finding(
        labels, scores, patients, list("abcd"), thresholds=threshold, n_resamples=20
    )
    first, second = results.findings[:2]
    assert first.threshold is not None
    assert first.threshold.model_dump() == {"value": 0.4, "rule": "youden", "chosen_on": "val"}
    assert first.f1_ci[0] <= first.f1 <= first.f1_ci[1]
    assert second.threshold is second.f1 is second.f1_ci is None
    assert results.macro_f1 is None
    assert results.macro_auroc is not None


def test_no_finding_counts_makes_the_macro_none():
    labels, scores = np.full((4, 1), np.nan), np.zeros((4, 1))
    results = metrics_by_finding(labels, scores, list("pqrs"), ["a"], n_resamples=5)
    assert results.macro_auroc is None and results.macro_auroc_ci is None


def test_repeated_names_and_missing_patients_are_refused():
    labels, scores, patients = made()
    with pytest.raises(ValueError, match="name each column once"):
        metrics_by_finding(labels, scores, patients, ["a", "a", "b", "c"], n_resamples=5)
    with pytest.raises(ValueError, match="299 patients for 300 rows"):
        bootstrap_metrics(labels, scores, list(patients[:-1]), n_resamples=5)


def test_recall_by_hand():
    similarity = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    is_positive = np.array([[True, False, False], [False, True, True]])
    at = recall_at_k(similarity, is_positive, ks=(1, 2, 3))
    assert [at[k].hit for k in (1, 2, 3)] == [0.5, 1.0, 1.0]
    assert [at[k].recall for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
    assert retrieved(similarity, is_positive, ks=(1,)).rank.tolist() == [1.0, 2.0]
    assert median_rank(similarity, is_positive) == 1.5


def test_collapsed_embeddings_recall_k_of_n_exactly():
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 8, 30)
    is_positive = texts[:, None] == texts[None, :]
    for k, at in recall_at_k(np.ones((30, 30)), is_positive, ks=(1, 5, 30)).items():
        assert at.recall == pytest.approx(k / 30, abs=1e-12)
    single = np.eye(30, dtype=bool)
    assert recall_at_k(np.ones((30, 30)), single, ks=(5,))[5].hit == pytest.approx(5 / 30)


def test_collapsed_embeddings_have_the_median_rank_of_chance():
    assert median_rank(np.ones((30, 30)), np.eye(30, dtype=bool)) == 31 / 2
    assert median_rank(np.ones((1, 7)), np.eye(1, 7, dtype=bool)) == 4


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_chance_is_what_collapsed_embeddings_get_whatever_is_right(share: float):
    is_positive = np.random.default_rng(0).random((20, 30)) < share
    is_positive[:, 7] = True
    got = retrieved(np.full((20, 30), 0.3), is_positive, ks=(1, 5, 30))
    chance = retrieved_by_chance(is_positive.sum(axis=1), 30, ks=(1, 5, 30))
    for name, value, expected in zip(got._fields, got, chance, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-9, err_msg=name)


def test_recall_equals_the_mean_over_random_orders_of_ties():
    rng = np.random.default_rng(1)
    similarity = rng.integers(0, 3, (6, 9)).astype(float)
    is_positive = rng.random((6, 9)) < 0.3
    is_positive[:, 0] = True
    exact = recall_at_k(similarity, is_positive, ks=(4,))[4]
    rank = retrieved(similarity, is_positive, ks=(4,)).rank
    recall, hit, ranks = [], [], []
    for _ in range(4000):
        order = np.argsort(-(similarity + rng.random((6, 9)) * 0.5), axis=1)
        in_order = np.take_along_axis(is_positive, order, axis=1)
        ranks.append(1 + in_order.argmax(axis=1))
        found = in_order[:, :4].sum(axis=1)
        recall.append((found / is_positive.sum(axis=1)).mean())
        hit.append((found > 0).mean())
    assert exact.recall == pytest.approx(np.mean(recall), abs=0.01)
    assert exact.hit == pytest.approx(np.mean(hit), abs=0.01)
    np.testing.assert_allclose(rank, np.mean(ranks, axis=0), atol=0.1)


def test_recall_refuses_a_k_beyond_the_candidates_and_a_query_without_answer():
    with pytest.raises(ValueError, match=r"k=5 is not within 1\.\.3"):
        recall_at_k(np.ones((3, 3)), np.eye(3, dtype=bool), ks=(1, 5))
    with pytest.raises(ValueError, match="query 2 has no positive"):
        recall_at_k(np.ones((3, 3)), np.diag([True, True, False]), ks=(1,))
    broken = np.ones((3, 3))
    broken[1, 2] = np.nan
    with pytest.raises(ValueError, match="query 1 has a similarity that is not finite"):
        median_rank(broken, np.eye(3, dtype=bool))
