"""How fast the bootstrap is, and how often its 95 % intervals hold the true value.

    python bench/bootstrap.py

Speed: AUROC, AUPRC, F1 and MCC of made scores in all draws, against the plain loop that resamples
rows and calls scikit-learn, on fewer draws, its time scaled up to as many.

Coverage: data sets are made again and again, of patients with 1 to 5 images that are alike, with a
given number of positive images in the mean, which half as many patients have; the share of them
whose interval holds the true value. That of AUROC follows from the two normal distributions, that
of AUPRC from the same and the share of positives. Beside the intervals of results stand percentiles
of the draws; macro is over 20 findings of the same patients. The
last line is one JSON object.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np
from scipy.stats import norm
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    roc_auc_score,
)

from mmclip.evaluation.bootstrap import (
    auprc_bias,
    bootstrap_metrics,
    macro_of_resamples,
)
from mmclip.evaluation.intervals import (
    effective_number,
    finding_interval,
    images_of_patients,
    mean_interval,
    percentile_interval,
    rarer_class,
)
from mmclip.evaluation.metrics import auprc, auroc

POSITIVES = (10, 20, 50, 100, 200)
RATE = 0.1  # of images with the finding
GAP = 1.2  # between the means of images with and without it, in deviations: an AUROC of 0.80
FINDINGS = 20  # of a data set, for the macro average
ALIKE = 0.5  # share of a score's variance that images of one patient have in common


def made_patients(n: int, rng: np.random.Generator) -> np.ndarray:
    """The patient of each of about n images; a patient has 1 to 5."""
    images = rng.integers(1, 6, n // 3 + 1)
    return np.repeat(np.arange(len(images)), images)


def made(n: int, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [n, k], scores [n, k] and patients [n].

    Images of a patient mostly share a finding, and share a part of their scores. Each image by
    itself has the finding with probability RATE, and then a score of mean GAP and deviation 1.
    """
    patients = made_patients(n, rng)
    n_patients = patients[-1] + 1
    has = rng.random((n_patients, k)) < RATE
    again = rng.random((len(patients), k)) < RATE
    is_own = rng.random((len(patients), k)) < 0.2
    labels = np.where(is_own, again, has[patients]).astype(float)
    shared = rng.normal(size=(n_patients, k))[patients]
    noise = math.sqrt(ALIKE) * shared + math.sqrt(1 - ALIKE) * rng.normal(size=labels.shape)
    return labels, GAP * labels + noise, patients


def true_values() -> tuple[float, float]:
    """AUROC and AUPRC of images of two normal distributions, at the share RATE of positives."""
    cut = np.linspace(-9, 9 + GAP, 200_001)
    recall, called = norm.sf(cut - GAP), norm.sf(cut)
    precision = RATE * recall / (RATE * recall + (1 - RATE) * called)
    return float(norm.cdf(GAP / math.sqrt(2))), float(-np.trapezoid(precision, recall))


def plain_loop(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, n_resamples: int
) -> None:
    """What evaluations in this field do: resampled rows, one call of scikit-learn each."""
    rng = np.random.default_rng(0)
    order = np.argsort(patients, kind="stable")
    starts = np.searchsorted(patients[order], np.arange(patients.max() + 2))
    for _ in range(n_resamples):
        drawn = rng.integers(0, len(starts) - 1, len(starts) - 1)
        rows = np.concatenate([order[starts[i] : starts[i + 1]] for i in drawn])
        for k in range(labels.shape[1]):
            y, s = labels[rows, k], scores[rows, k]
            for metric in (roc_auc_score, average_precision_score):
                metric(y, s)
            for metric in (f1_score, matthews_corrcoef):
                metric(y, s >= GAP)


def speed(n: int, k: int, n_resamples: int, loop_resamples: int) -> dict[str, object]:
    """Seconds of both, and their ratio."""
    labels, scores, patients = made(n, k, np.random.default_rng(0))
    began, cpu = time.monotonic(), time.process_time()
    bootstrap_metrics(labels, scores, patients, n_resamples=n_resamples, thresholds=[GAP] * k)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    began = time.process_time()
    plain_loop(labels, scores, patients, loop_resamples)
    loop = (time.process_time() - began) * n_resamples / loop_resamples
    return {
        "images": len(labels), "findings": k, "n_resamples": n_resamples, "seconds": round(wall, 2),
        "cpu_s": round(cpu, 2), "loop_resamples": loop_resamples, "loop_cpu_s_scaled": round(loop),
        "times_faster": round(loop / cpu, 1),
    }  # fmt: skip


def coverage(n_positive: int, repeats: int, n_resamples: int, seed: int) -> dict[str, object]:
    """Of many synthetic data sets, the share whose intervals hold the true values, and their width.

    A data set has FINDINGS findings of the same patients; each has its own labels and scores.
    """
    of_auroc, of_auprc = true_values()
    truth: tuple[tuple[Literal["auroc", "auprc"], Callable[..., float | None], float], ...] = (
        ("auroc", auroc, of_auroc),
        ("auprc", auprc, of_auprc),
    )
    rng = np.random.default_rng([seed, n_positive])
    held: Counter[str] = Counter()
    width: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    n_patients, done = 0.0, 0
    while done < repeats:
        labels, scores, patients = made(round(n_positive / RATE), FINDINGS, rng)
        drawn = bootstrap_metrics(labels, scores, patients, n_resamples=n_resamples, seed=done)
        images = [images_of_patients(column, patients) for column in labels.T]
        if min(min(map(np.count_nonzero, each)) for each in images) < 1:
            continue  # a finding that lacks a class has no value
        done += 1
        n_patients += float(np.mean([effective_number(rarer_class(each)) for each in images]))
        for name, metric, true in truth:
            of = getattr(drawn, name)
            found_all = [metric(labels[:, k], scores[:, k]) for k in range(FINDINGS)]
            values = [v for v in found_all if v is not None]  # all: both classes are there
            single = [finding_interval(name, v, of[:, k], images[k]) for k, v in enumerate(values)]
            found = {name: single, f"{name} percentile": [percentile_interval(v) for v in of.T]}
            of_all = np.array(values)
            bias = auprc_bias(labels, scores, patients, of_all) if name == "auprc" else None
            found[f"macro {name}"] = [mean_interval(of_all, single, of, bias)]
            every = list(range(FINDINGS))
            found[f"macro {name} percentile"] = [percentile_interval(macro_of_resamples(of, every))]
            for kind, intervals in found.items():
                for low, high in filter(None, intervals):
                    tried[kind] += 1
                    held[kind] += low <= true <= high
                    width[kind] += high - low
    return {
        "positives": n_positive, "patients": round(n_patients / done, 1), "data_sets": done,
        **{name: {"held": round(held[name] / n, 4), "width": round(width[name] / n, 3)}
           for name, n in tried.items()},
    }  # fmt: skip


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--findings", type=int, default=14)
    parser.add_argument("--n-resamples", type=int, default=1000)
    parser.add_argument("--loop-resamples", type=int, default=2, help="of the plain loop")
    parser.add_argument(
        "--repeats", type=int, default=1000, help="synthetic data sets; 0 for speed alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    fast = speed(args.images, args.findings, args.n_resamples, args.loop_resamples)
    print(
        f"{fast['images']:,} images x {args.findings} findings x {args.n_resamples} draws: "
        f"{fast['seconds']} s (CPU {fast['cpu_s']} s); plain loop {fast['loop_cpu_s_scaled']} s "
        f"(scaled from {args.loop_resamples} draws): {fast['times_faster']} times faster"
    )
    covered = []
    for n_positive in POSITIVES if args.repeats else ():
        covered.append(coverage(n_positive, args.repeats, args.n_resamples, args.seed))
        said = (f"{k} {v}" for k, v in covered[-1].items() if not isinstance(v, dict))
        print("  ".join(said))
        for name, found in covered[-1].items():
            if isinstance(found, dict):
                print(f"  {name:23} held {found['held']:.1%}, width {found['width']}", flush=True)
    print(json.dumps({"speed": fast, "coverage": covered}))


if __name__ == "__main__":
    main()
