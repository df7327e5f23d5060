"""How well maps of phrases point at what readers of images marked, beside maps that cannot know.

Those read no image (location prior, centre, chance), no phrase (brightest patch), the wrong phrase,
or come from a model that has learnt nothing: what a map is worth is what it has beyond them.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmclip.checkpoint import code_version
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.explanation.grounding import (
    FIXED_THRESHOLDS,
    best_threshold,
    contrast_to_noise,
    expected_hits,
    mean_annotations,
    nearness_to_centre,
    overlaps,
)
from mmclip.explanation.maps import brightness, map_grid, maps_of, prepared_rows, untrained
from mmclip.explanation.marked import (
    CHOSEN_ON,
    Marked,
    PointingRequest,
    Targets,
    find_marked,
)
from mmclip.explanation.mechanism import PatientMean, patient_means
from mmclip.files import check_free, write_text_atomic
from mmclip.model_loading import ModelRequest, open_dual_encoder
from mmclip.models.dual_encoder import DualEncoder
from mmclip.patches import Grid
from mmclip.progress import progress
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


def other_phrases(findings: Sequence[str], phrases: Sequence[str]) -> list[str] | None:
    """For each annotation the phrase of the next finding by name; None of one finding.

    A map that points as well by the wrong phrase does not answer to the phrase.
    """
    names = sorted(set(findings))
    if len(names) < 2:
        return None
    first = {name: phrases[list(findings).index(name)] for name in names}
    following = {name: first[names[(i + 1) % len(names)]] for i, name in enumerate(names)}
    return [following[finding] for finding in findings]


def point_metrics(
    score: Float[Tensor, "m n"], targets: Targets, thresholds: Mapping[str, float]
) -> dict[str, Float[np.ndarray, " m"]]:
    """What each map reaches for its place, by metric; NaN where it is not defined.

    Args:
        score: A map an annotation.
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


def _maps(
    encoder: DualEncoder,
    targets: Targets,
    phrases: Sequence[str],
    request: PointingRequest,
    what: str,
    size: int = 128,
) -> Float[Tensor, "m n"]:
    """The map of each annotation's image for its phrase."""
    score, prompts = request.score, request.prompts
    found = []
    with progress(what, len(phrases)) as advance:
        for start in range(0, len(phrases), size):
            some = slice(start, start + size)
            distinct, row = np.unique(targets.image_rows[some], return_inverse=True)
            images = prepared_rows(encoder, targets.dataset, distinct)
            found.append(maps_of(encoder, images, phrases[some], row.tolist(), score, prompts))
            advance(len(row))
    return torch.cat(found) if found else torch.zeros(targets.total.shape)


def _brightness(encoder: DualEncoder, targets: Targets, grid: Grid) -> Float[Tensor, "m n"]:
    """The mean grey of each patch of each annotation's image."""
    distinct, row = np.unique(targets.image_rows, return_inverse=True)
    found = [
        brightness(encoder, prepared_rows(encoder, targets.dataset, part), grid)
        for part in np.array_split(distinct, -(-len(distinct) // 256))
    ]
    return torch.cat(found)[torch.from_numpy(row)]


Maps = dict[str, Float[Tensor, "_ n"]]
"""By the name of what made them, a map an annotation."""


def _all_maps(encoder: DualEncoder, marked: Marked, request: PointingRequest) -> tuple[Maps, Maps]:
    """The maps of the model and of the controls: for the scored annotations, and for those that
    choose thresholds. Random weights come apart from them."""
    grid = map_grid(encoder)
    scored, others, known, split = marked.scored, marked.others, marked.known, request.split
    phrases = request.asked(scored)
    shown = {"model": _maps(encoder, scored, phrases, request, "maps")}
    said = f"maps of split {CHOSEN_ON[split]}"
    chooses = {"model": _maps(encoder, others, request.asked(others), request, said)}
    beside = [(shown, scored), (chooses, others)] if others.image_rows else [(shown, scored)]
    if known.image_rows:
        prior = mean_annotations(known.inside / known.total.clamp(min=1), known.findings)
        nowhere = torch.zeros(grid.side**2)
        for found, targets in beside:
            found["location prior"] = torch.stack(
                [prior.get(finding, nowhere) for finding in targets.findings]
            )
    for found, targets in beside:
        found["centre"] = nearness_to_centre(grid.side).expand(targets.total.shape)
        found["brightest patch"] = _brightness(encoder, targets, grid)
        found["best on this grid"] = targets.inside / targets.total.clamp(min=1)
    shown["chance"] = torch.zeros(scored.total.shape)
    wrong = other_phrases(scored.findings, phrases)
    if wrong is not None:
        shown["another finding's phrase"] = _maps(
            encoder, scored, wrong, request, "maps by other phrases"
        )
    return shown, chooses


Values = dict[str, dict[str, Float[np.ndarray, " m"]]]
"""What each map reaches for its place, by what made it and by metric."""


def _random_values(
    encoder: DualEncoder, scored: Targets, request: PointingRequest
) -> dict[str, Float[np.ndarray, " m"]]:
    """What maps of random weights reach, the mean of some models, by metric."""
    each = []
    for i in range(RANDOM_SEEDS):
        fresh = untrained(encoder, request.seed + i)
        said = f"maps of random weights {i + 1} of {RANDOM_SEEDS}"
        found = _maps(fresh, scored, request.asked(scored), request, said)
        each.append(point_metrics(found, scored, {}))
    return {metric: np.mean([one[metric] for one in each], 0) for metric in each[0]}


def evaluate_explanations(
    encoder: DualEncoder, dataset: ImageTextDataset, request: PointingRequest
) -> dict[str, Any]:
    """Pointing game, IoU and CNR of a model's maps, beside maps that read no image or no phrase.

    Args:
        encoder: It is asked.
        dataset: Of data folders.
        request: What is asked, and by which boxes.

    Returns:
        Plain values, ready for JSON; docs/explanation.md says what they mean.

    Raises:
        ManifestError: When no annotation lies on an image of the split.
        ValueError: When the encoder gives no maps.
        SourceError: See `annotations.read_annotations`.
    """
    marked = find_marked(encoder, dataset, request)
    scored, others = marked.scored, marked.others
    shown, chooses = _all_maps(encoder, marked, request)
    thresholds = {
        name: choose_thresholds(found, others)
        for name, found in chooses.items()
        if others.image_rows
    }
    values = {
        name: point_metrics(found, scored, thresholds.get(name, {}))
        for name, found in shown.items()
    }
    values["random weights"] = _random_values(encoder, scored, request)
    return {
        **_of_what(encoder, marked, request),
        "thresholds_chosen_on": CHOSEN_ON[request.split] if others.image_rows else None,
        "thresholds": thresholds.get("model", {}),
        **_summarised(values, scored, request),
        "commit": code_version()["commit"],
    }


@dataclass(frozen=True)
class MapsRequest:
    """Maps to measure on data folders, by which model, and where to.

    Attributes:
        model: A run, or a model of others.
        folders: Data folders.
        roots: Of their image files, for a model of others; empty asks the folders.
        out: The file to write, .json.
        command: For results.
        pointing: What is asked of the maps.
        overwrite: Whether the file may be replaced.
        device: Where the model runs; None for the CPU.
    """

    model: ModelRequest
    folders: tuple[Path, ...]
    out: Path
    command: str
    pointing: PointingRequest
    roots: tuple[Path, ...] = ()
    overwrite: bool = False
    device: torch.device | None = None


def evaluate_maps(request: MapsRequest) -> dict[str, Any]:
    """What `mmclip explain --evaluate` does: opens, measures, writes; returns what it wrote.

    Raises:
        ValueError: When the model gives no maps, or the file would be replaced.
        ManifestError: See `evaluate_explanations`.
    """
    encoder = open_dual_encoder(request.model, request.device)
    dataset = encoder.open_data(request.folders, request.roots or None)
    check_free([request.out], request.overwrite)
    measured = evaluate_explanations(encoder, dataset, request.pointing)
    results = {"command": request.command, **measured}
    request.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    write_text_atomic(request.out, text + "\n")
    return results


def _of_what(encoder: DualEncoder, marked: Marked, request: PointingRequest) -> dict[str, Any]:
    """Which model, images, boxes and words the numbers are of."""
    scored, side = marked.scored, map_grid(encoder).side
    return {
        **_whose(encoder),
        "data_hash": marked.dataset.data_hash,
        "boxes": request.boxes,
        "split": request.split,
        "score": request.score,
        "prompts": f"{request.prompts.id} version {request.prompts.version}",
        "prompt_hash": request.prompts.hash,
        "example_phrase": request.asked(scored)[0],
        "patches": [side, side],
        "n_annotations": len(scored.image_rows),
        "n_images": len(set(scored.image_rows)),
        "n_patients": len(set(scored.patients())),
        "n_annotations_of_prior": len(marked.known.image_rows),
        "left_out": marked.left_out,
        "leak_check": marked.leak_check,
        "min_count": request.min_count,
        "n_resamples": request.n_resamples,
        "seed": request.seed,
    }


def _whose(encoder: DualEncoder) -> dict[str, Any]:
    """Which weights, by what is known of them."""
    if isinstance(encoder, Run):
        folder = str(encoder.checkpoint.folder)
        return {"run": folder, "step": encoder.step, "config_hash": encoder.config_hash}
    return {**encoder.facts(), "recipe_hash": encoder.weights.recipe_hash}


def _summarised(values: Values, scored: Targets, request: PointingRequest) -> dict[str, Any]:
    """Means over patients with intervals, what the model has beyond each control, sanity checks."""
    patients = scored.patients()

    def summary(of_each: Float[np.ndarray, " m"]) -> dict[str, Any]:
        found, macro = patient_means(
            of_each, scored.findings, patients, request.min_count,
            n_resamples=request.n_resamples, seed=request.seed,
        )  # fmt: skip
        return {"macro": _plain(macro), "findings": {f: _plain(v) for f, v in found.items()}}

    hits = {name: each["hit"] for name, each in values.items()}
    compared = [name for name in hits if name not in ("model", "best on this grid")]
    differences = {name: summary(hits["model"] - hits[name]) for name in compared}
    return {
        "saliency_maps": {
            name: {metric: summary(of_each) for metric, of_each in each.items()}
            for name, each in values.items()
        },
        "hit_less": differences,
        "sanity": {
            name: _sanity(name, differences[name], hits, request.min_count)
            for name in SANITY
            if name in differences
        },
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
