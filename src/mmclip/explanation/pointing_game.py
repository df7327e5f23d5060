"""How well maps of phrases point at what readers of images marked, beside maps that cannot know.

Those read no image (location prior, centre, chance), no phrase (brightest patch), the wrong phrase,
or come from a model that has learnt nothing: what a map is worth is what it has beyond them.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmclip.checkpoint import code_version
from mmclip.data.annotations import EMPTY, Annotation, read_annotations
from mmclip.data.check import patient_key
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, normalise
from mmclip.data.sample import SPLITS, Split
from mmclip.evaluation.scores import FRONTAL
from mmclip.explanation.grounding import (
    FIXED_THRESHOLDS,
    best_threshold,
    contrast_to_noise,
    expected_hits,
    mean_annotations,
    nearness_to_centre,
    overlaps,
)
from mmclip.explanation.mechanism import PatientMean, patient_means
from mmclip.explanation.saliency import ExplainScore, grid_of, random_weights, saliency_maps
from mmclip.models.mmclip import MMCLIP
from mmclip.patches import Grid, patchify
from mmclip.progress import progress
from mmclip.prompts import PromptSet
from mmclip.run import Run

logger = logging.getLogger(__name__)

RANDOM_SEEDS = 3
"""Models of random weights in the sanity check. [chosen: one may point somewhere by luck]"""

SANITY = {
    "random weights": "they point as well as the trained ones, so that these maps show the image "
    "or the network's shape, and nothing that was learnt",
    "another finding's phrase": "it points as well as the right one, so that these maps do not "
    "answer to the phrase",
}
"""Maps that must lose the hit rate, and what it means where they do not."""

CHOSEN_ON: dict[Split, Split] = {"test": "val", "val": "train", "train": "val"}
"""The split on which thresholds are chosen for the images of another. Never test."""


class Targets(NamedTuple):
    """Annotations of some images, one per image, finding and phrase: m of them, n patches."""

    dataset: ImageTextDataset
    image_rows: list[int]  # the row of each
    findings: list[str]
    phrases: list[str]  # of the reader of the image; "" where there are none
    inside: Float[Tensor, "m n"]  # pixels of each patch in the place
    total: Float[Tensor, "m n"]

    def patients(self) -> list[str]:
        """The patient of each."""
        return [patient_key(self.dataset.samples[i]) for i in self.image_rows]

    def of(self, splits: Collection[Split]) -> "Targets":
        """Those on images of some splits."""
        return self.take([self.dataset.samples[i].split in splits for i in self.image_rows])

    def take(self, keep: Sequence[bool]) -> "Targets":
        """Those where `keep` is True."""
        index = torch.tensor(keep, dtype=torch.bool)
        return Targets(
            self.dataset,
            [sample for sample, k in zip(self.image_rows, keep, strict=True) if k],
            [finding for finding, k in zip(self.findings, keep, strict=True) if k],
            [phrase for phrase, k in zip(self.phrases, keep, strict=True) if k],
            self.inside[index],
            self.total[index],
        )


def find_targets(
    dataset: ImageTextDataset, annotations: Iterable[Annotation], grid: Grid, left_out: Counter[str]
) -> Targets:
    """The annotations of the frontal images, counted in patches.

    Args:
        dataset: Each with an image.
        annotations: On these images.
        grid: The patches.
        left_out: The number of annotations that are left out is added here, by reason.
    """
    row_of = {sample.image_id: i for i, sample in enumerate(dataset.samples)}
    samples, findings, phrases, counted = [], [], [], []
    for annotation in annotations:
        row = row_of[annotation.image_id]
        inside, total = grid.count_pixels(annotation.is_inside)
        if dataset.samples[row].view not in FRONTAL:
            left_out["the image is a lateral"] += 1
        elif not inside.any():
            left_out[EMPTY] += 1
        else:
            samples.append(row)
            findings.append(annotation.finding)
            phrases.append(annotation.phrase)
            counted.append(torch.stack([inside, total]))
    n = grid.side**2
    both = torch.stack(counted, 1) if counted else torch.zeros(2, 0, n)
    return Targets(dataset, samples, findings, phrases, both[0], both[1])


def asked_phrases(
    findings: Sequence[str], phrases: Sequence[str], score: ExplainScore, prompts: PromptSet
) -> list[str]:
    """What the model is asked about each place: the reader's phrase, else one for the finding.

    That is the first positive prompt of the finding; for "prompt_pair", which makes prompts
    itself, the finding's name.
    """
    return [
        phrase or (finding if score == "prompt_pair" else prompts.texts(finding).positives[0])
        for finding, phrase in zip(findings, phrases, strict=True)
    ]


def other_phrases(findings: Sequence[str], phrases: Sequence[str]) -> list[str] | None:
    """For each place the phrase of the next finding in alphabetical order; None of one finding.

    A map that points as well by the wrong phrase does not answer to the phrase.
    """
    names = sorted(set(findings))
    if len(names) < 2:
        return None
    first = {name: phrases[list(findings).index(name)] for name in names}
    following = {name: first[names[(i + 1) % len(names)]] for i, name in enumerate(names)}
    return [following[finding] for finding in findings]


def _maps(
    model: MMCLIP,
    run: Run,
    targets: Targets,
    phrases: Sequence[str],
    score: ExplainScore,
    prompts: PromptSet,
    what: str,
    size: int = 128,
) -> Float[Tensor, "m n"]:
    """The map of each place's image for its phrase."""
    found = []
    with progress(what, len(phrases)) as advance:
        for start in range(0, len(phrases), size):
            some = slice(start, start + size)
            distinct, row = np.unique(targets.image_rows[some], return_inverse=True)
            images = normalise(targets.dataset.pixels(distinct))
            found.append(
                saliency_maps(
                    model, run.checkpoint, images, phrases[some], row.tolist(), score, prompts, size
                )
            )
            advance(len(row))
    return torch.cat(found) if found else torch.zeros(targets.total.shape)


def _brightness(targets: Targets, grid: Grid) -> Float[Tensor, "m n"]:
    """The mean grey of each patch of each place's image."""
    distinct, row = np.unique(targets.image_rows, return_inverse=True)
    seen = slice(grid.side * grid.patch_size)
    found = [
        patchify(
            normalise(targets.dataset.pixels(distinct[part]))[..., seen, seen], grid.patch_size
        ).mean(-1)
        for part in np.array_split(np.arange(len(distinct)), -(-len(distinct) // 256))
    ]
    return torch.cat(found)[torch.from_numpy(row)]


def point_metrics(
    score: Float[Tensor, "m n"], targets: Targets, thresholds: Mapping[str, float]
) -> dict[str, Float[np.ndarray, " m"]]:
    """What each map reaches for its place, by metric; NaN where it is not defined.

    Args:
        score: A map a place.
        targets: The annotations.
        thresholds: For `iou_chosen`, by finding, as other images chose them.
    """
    inside, total = targets.inside, targets.total
    found = {
        "hit": expected_hits(score, inside, total),
        "touch": expected_hits(score, (inside > 0).float() * total, total),
    }
    fixed = overlaps(score, inside, total, FIXED_THRESHOLDS)
    found |= {f"iou_{t:g}": fixed[:, i] for i, t in enumerate(FIXED_THRESHOLDS)}
    chosen = torch.full_like(found["hit"], torch.nan)
    names = np.array(targets.findings)
    for finding, threshold in thresholds.items():
        here = torch.from_numpy(names == finding)
        chosen[here] = overlaps(score[here], inside[here], total[here], [threshold])[:, 0]
    found["iou_chosen"] = chosen
    found["cnr"] = contrast_to_noise(score, inside, total)
    return {name: values.double().numpy() for name, values in found.items()}


def choose_thresholds(score: Float[Tensor, "m n"], targets: Targets) -> dict[str, float]:
    """The threshold of each finding by the overlaps on these images, which are not to be scored."""
    names = np.array(targets.findings)
    return {
        finding: best_threshold(score[here], targets.inside[here], targets.total[here])
        for finding in sorted(set(targets.findings))
        if len(here := torch.from_numpy(np.flatnonzero(names == finding)))
    }


def evaluate_explanations(
    run: Run,
    dataset: ImageTextDataset,
    name: str,
    root: Path,
    score: ExplainScore,
    prompts: PromptSet,
    *,
    split: Split = "test",
    n_resamples: int = 1000,
    seed: int = 0,
    min_count: int = 10,
) -> dict[str, Any]:
    """Pointing game, IoU and CNR of a model's maps, beside maps that read no image or no phrase.

    Args:
        run: Its model is asked.
        dataset: Of data folders.
        name: Of the data set of boxes or masks, one of `annotations.PLACES`.
        root: Its folder.
        score: What the maps show.
        prompts: What a finding is asked by, where the data set has no phrases of its own.
        split: Of the images that are scored. Thresholds and the location prior are of train and
            val, without this split.
        n_resamples: Bootstrap resamples of patients.
        seed: Of the bootstrap, and the first of the models of random weights.
        min_count: Places from which on a finding counts in a macro mean. [chosen: as AUROC's]

    Returns:
        Plain values, ready for JSON; docs/explanation.md says what they mean.

    Raises:
        ManifestError: When no place lies on an image of the split.
        SourceError: See `annotations.read_annotations`.
    """
    dataset = dataset.select([sample.image is not None for sample in dataset.samples])
    samples = {sample.image_id: sample for sample in dataset.samples}
    left_out: Counter[str] = Counter()
    grid = grid_of(run.checkpoint)
    every = find_targets(dataset, read_annotations(name, root, samples, left_out), grid, left_out)
    scored = every.of([split])
    if not scored.image_rows:
        counts = Counter(str(dataset.samples[i].split) for i in every.image_rows)
        said = ", ".join(f"{n} of {part}" for part, n in sorted(counts.items())) or "none"
        raise ManifestError(
            f"{name} marks no image of split {split!r} of this data ({said}; left out: "
            f"{dict(left_out) or 'none'}); choose another --split, or the folder whose images it is"
        )
    run.check_unseen([dataset.samples[row] for row in sorted(set(scored.image_rows))], split)
    others = every.of([CHOSEN_ON[split]])
    known = every.of([part for part in SPLITS if part not in ("test", split)])

    phrases = asked_phrases(scored.findings, scored.phrases, score, prompts)
    model = run.model

    def maps(model: MMCLIP, targets: Targets, phrases: Sequence[str], what: str) -> Tensor:
        return _maps(model, run, targets, phrases, score, prompts, what)

    own = maps(model, scored, phrases, "maps")
    there = asked_phrases(others.findings, others.phrases, score, prompts)
    chooses = {"model": maps(model, others, there, f"maps of split {CHOSEN_ON[split]}")}
    shown = {"model": own}
    if known.image_rows:
        prior = mean_annotations(known.inside / known.total.clamp(min=1), known.findings)
        nowhere = torch.zeros(grid.side**2)
        for found, targets in ((shown, scored), (chooses, others)):
            if targets.image_rows:
                found["location prior"] = torch.stack(
                    [prior.get(finding, nowhere) for finding in targets.findings]
                )
    for found, targets in ((shown, scored), (chooses, others)):
        if targets.image_rows:
            found["centre"] = nearness_to_centre(grid.side).expand(targets.total.shape)
            found["brightest patch"] = _brightness(targets, grid)
            found["best on this grid"] = targets.inside / targets.total.clamp(min=1)
    shown["chance"] = torch.zeros(scored.total.shape)
    wrong = other_phrases(scored.findings, phrases)
    if wrong is not None:
        shown["another finding's phrase"] = maps(model, scored, wrong, "maps by other phrases")

    thresholds = {
        name: choose_thresholds(found, others)
        for name, found in chooses.items()
        if others.image_rows
    }
    values = {
        name: point_metrics(found, scored, thresholds.get(name, {}))
        for name, found in shown.items()
    }
    random = [
        point_metrics(
            maps(
                random_weights(run.checkpoint, seed + i).to(run.device),
                scored,
                phrases,
                f"maps of random weights {i + 1} of {RANDOM_SEEDS}",
            ),
            scored,
            {},
        )
        for i in range(RANDOM_SEEDS)
    ]
    values["random weights"] = {
        metric: np.mean([each[metric] for each in random], 0) for metric in random[0]
    }

    patients = scored.patients()

    def summary(of_each: Float[np.ndarray, " m"]) -> dict[str, Any]:
        found, macro = patient_means(
            of_each, scored.findings, patients, min_count, n_resamples=n_resamples, seed=seed
        )
        return {"macro": _plain(macro), "findings": {f: _plain(v) for f, v in found.items()}}

    hits = {name: each["hit"] for name, each in values.items()}
    compared = [name for name in hits if name not in ("model", "best on this grid")]
    differences = {name: summary(hits["model"] - hits[name]) for name in compared}
    return {
        "run": str(run.checkpoint.folder),
        "step": run.step,
        "config_hash": run.config_hash,
        "data_hash": dataset.data_hash,
        "boxes": name,
        "split": split,
        "score": score,
        "prompts": f"{prompts.id} version {prompts.version}",
        "prompt_hash": prompts.hash,
        "example_phrase": phrases[0],
        "patches": [grid.side, grid.side],
        "n_annotations": len(scored.image_rows),
        "n_images": len(set(scored.image_rows)),
        "n_patients": len(set(patients)),
        "n_annotations_of_prior": len(known.image_rows),
        "left_out": dict(sorted(left_out.items())),
        "min_count": min_count,
        "n_resamples": n_resamples,
        "seed": seed,
        "thresholds_chosen_on": CHOSEN_ON[split] if others.image_rows else None,
        "thresholds": thresholds.get("model", {}),
        "saliency_maps": {
            name: {metric: summary(of_each) for metric, of_each in each.items()}
            for name, each in values.items()
        },
        "hit_less": differences,
        "sanity": {
            name: _sanity(name, differences[name], hits, min_count)
            for name in SANITY
            if name in differences
        },
        "commit": code_version()["commit"],
    }


def _sanity(
    control: str, difference: Mapping[str, Any], hits: Mapping[str, np.ndarray], min_count: int
) -> dict[str, Any]:
    """Whether the hit rate is lost in a map that must lose it, and a warning if it is not.

    Source: Adebayo et al., Sanity checks for saliency maps (arXiv:1810.03292), for random weights.
    """
    lost = difference["macro"]
    interval = lost["ci"]
    is_lost = None if interval is None else interval[0] > 0
    if interval is None:
        logger.warning(
            "the sanity check by %s says nothing: no finding has %d annotations; hits %.3f against "
            "%.3f",
            control,
            min_count,
            hits["model"].mean(),
            hits[control].mean(),
        )
    elif not is_lost:
        logger.warning(
            "the sanity check by %s fails: %s (hit rate of the model less theirs %.3f, 95 %% "
            "interval %.3f to %.3f)",
            control,
            SANITY[control],
            lost["mean"],
            *interval,
        )
    return {"hit_lost": lost, "is_lost": is_lost}


def _plain(value: PatientMean) -> dict[str, Any]:
    return {
        "mean": None if value.mean is None else round(value.mean, 5),
        "ci": None if value.interval is None else [round(edge, 5) for edge in value.interval],
        "n": value.n,
    }
