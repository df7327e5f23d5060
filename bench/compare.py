"""Finished runs of several arms and seeds side by side, with intervals; read by ablation.py.

Nothing is trained or scored here: lines and scores in, a table out.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mmclip.data.synthetic import FINDINGS
from mmclip.evaluation.bootstrap import bootstrap_metrics, macro_of_resamples
from mmclip.evaluation.intervals import Interval, interval_over_seeds

SMALL_FINDINGS = ("nodule", "rib fracture", "atelectasis", "support devices")
"""Where contrastive training alone leaves room; thumbnails show them not at all [docs/log.md]."""

N_RESAMPLES = 1000
"""Bootstrap resamples of patients. Source: as in `mmclip zeroshot`."""


class Scores(NamedTuple):
    """The scores of one run, one row per image and a column a finding."""

    image_id: np.ndarray
    patient_id: np.ndarray
    findings: np.ndarray
    labels: Float[np.ndarray, "n k"]
    scores: Float[np.ndarray, "n k"]
    shifted: Float[np.ndarray, "n k"]  # of the same images under the domain shift


Runs = dict[str, dict[int, tuple[dict, Scores]]]
"""Finished runs by arm and seed: the line of each, and its scores."""


class Compared(NamedTuple):
    """An arm's mean AUROC over its seeds, and how far it is above the base on the seeds of both."""

    auroc: float
    difference: float | None  # None for the base, and without a seed in common
    interval: Interval | None

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.auroc:.3f}"
        ci = "" if self.interval is None else f" [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"
        return f"{self.auroc:.3f} ({self.difference:+.3f}{ci})"


class Comparison:
    """Finished runs side by side; the draws of a run are computed once."""

    def __init__(self, runs: Runs, base: str, n_resamples: int = N_RESAMPLES) -> None:
        """Checks that all runs scored the same images.

        Args:
            runs: By arm and seed.
            base: The arm that every other one is compared with.
            n_resamples: Of the bootstrap.

        Raises:
            ValueError: When two runs scored other images.
        """
        self.runs, self.base, self.n_resamples = runs, base, n_resamples
        every = [scores for by_seed in runs.values() for _, scores in by_seed.values()]
        for scores in every[1:]:
            if not np.array_equal(scores.image_id, every[0].image_id):
                raise ValueError("these runs scored different images; compare runs of one data set")
        self._resampled_of = cache(self._resample)

    def _resample(self, arm: str, seed: int, which: str) -> Float[np.ndarray, "draws k"]:
        _, found = self.runs[arm][seed]
        values = found.shifted if which == "shift_auroc" else found.scores
        patients = found.patient_id.tolist()
        return bootstrap_metrics(found.labels, values, patients, n_resamples=self.n_resamples).auroc

    def compare(self, arm: str, findings: Sequence[str], which: str = "auroc") -> Compared:
        """The mean AUROC over some findings, images as they are or "shift_auroc"."""

        def reached(name: str, seed: int) -> float:
            line, _ = self.runs[name][seed]
            return float(np.mean([line[which][finding] for finding in findings]))

        auroc = float(np.mean([reached(arm, seed) for seed in self.runs[arm]]))
        shared = [seed for seed in self.runs[arm] if seed in self.runs.get(self.base, {})]
        if arm == self.base or not shared:
            return Compared(auroc, None, None)
        names = [str(name) for name in self.runs[arm][shared[0]][1].findings]
        columns = [names.index(finding) for finding in findings]

        def drawn(name: str, seed: int) -> Float[np.ndarray, " draws"]:
            return macro_of_resamples(self._resampled_of(name, seed, which), columns)

        gains = np.array([reached(arm, seed) - reached(self.base, seed) for seed in shared])
        resampled = np.stack([drawn(arm, seed) - drawn(self.base, seed) for seed in shared])
        return Compared(auroc, float(gains.mean()), interval_over_seeds(gains, resampled))


def table(runs: Runs, base: str) -> tuple[str, dict[str, dict]]:
    """Markdown for people, and the same numbers by arm."""
    comparison = Comparison(runs, base)
    some = [line for by_seed in runs.values() for line, _ in by_seed.values()]
    counted = [f for f in FINDINGS if all(f in line["macro_findings"] for line in some)]
    small = [f for f in SMALL_FINDINGS if f in counted]
    columns: dict[str, tuple[list[str], str]] = {
        "macro AUROC": (counted, "auroc"),
        "under domain shift": (counted, "shift_auroc"),
        "small findings": (small, "auroc"),
    }
    apart: dict[str, tuple[list[str], str]] = {name: ([name], "auroc") for name in small}
    numbers: dict[str, dict] = {}
    main, by_finding = [], []
    for arm, by_seed in runs.items():
        cpu_s = float(np.mean([line["cpu_s"] for line, _ in by_seed.values()]))
        said = {
            name: comparison.compare(arm, findings, which)
            for name, (findings, which) in (columns | apart).items()
            if findings
        }
        cells = [str(said[name]) if name in said else "–" for name in columns]
        main.append([arm, str(len(by_seed)), *cells, f"{cpu_s:.0f}"])
        by_finding.append([arm, *(str(said[name]) for name in apart)])
        numbers[arm] = {"seeds": sorted(by_seed), "cpu_s": round(cpu_s, 1)}
        numbers[arm] |= {name: compared._asdict() for name, compared in said.items()}
    commits = sorted({line["commit"][:12] for line in some})
    note = (
        f"In brackets: difference to `{base}`, paired by seed, with a 95 % interval over seeds and "
        f"patients together. Macro over {len(counted)} findings; small findings are "
        f"{', '.join(small) or 'none that counts'}. Trained at {', '.join(commits)}."
    )
    head = ["arm", "seeds", *columns, "CPU s"]
    return f"{markdown(head, main)}\n{markdown(['arm', *apart], by_finding)}\n{note}", numbers


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
