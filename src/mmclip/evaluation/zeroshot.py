"""Zero-shot classification: an image is compared with what a report would say of it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.sample import Split
from mmclip.embed import PromptEmbeddings, embed_images, embed_prompts, probabilities
from mmclip.evaluation.compute_metrics import (
    compute_metrics,
    control_of,
    metrics_by_finding,
    shortcut_baseline,
)
from mmclip.evaluation.metrics import auroc
from mmclip.evaluation.pages import GalleryItem, extreme_cases, write_evaluation
from mmclip.evaluation.pictures import make_pictures
from mmclip.evaluation.protocols import BUILT, Protocol, load_protocol
from mmclip.evaluation.results import RunResults
from mmclip.evaluation.scores import (
    Predictions,
    findings_of,
    images_hash,
    make_predictions,
    protocol_labels,
    select_samples,
    split_of,
    unknown_views,
)
from mmclip.prompts import PromptSet, load_prompts
from mmclip.run import Run, open_run

GALLERY_SIZE = 12
"""Images on the page, evenly spaced over the rows: not chosen by how well they came out."""


DEFAULT_PROMPT_SETS = ("default", "pair", "sentence")
"""Where no protocol names others."""


@dataclass(frozen=True)
class ZeroShot:
    """Raw scores of images, and what `compute_metrics` says of them."""

    dataset: ImageTextDataset
    embeddings: Float[Tensor, "n e"]  # of the images
    test: Predictions  # the images that are judged, of whatever split
    val: Predictions | None  # those that chose the thresholds
    summary: dict

    def gallery(self, run: Run, rows: Sequence[int]) -> list[GalleryItem]:
        """Some rows as the page shows them, with pictures where the run has decoders.

        Behind them stand the images that the model is most right and most wrong about.
        """
        cases = {row: why for row, why in extreme_cases(self.test).items() if row not in rows}
        rows = [*rows, *cases]
        pixels = self.dataset.pixels(np.array(rows, np.int64)).numpy()
        samples = [self.dataset.samples[row] for row in rows]
        shown = self.dataset.select(np.isin(np.arange(len(self.dataset)), rows))
        pictures = make_pictures(run.checkpoint, shown)
        return [
            GalleryItem(
                row,
                sample.image_id,
                image,
                sample.report,
                pictures.get(sample.image_id),
                cases.get(row),
            )
            for row, sample, image in zip(rows, samples, pixels, strict=True)
        ]


def zeroshot(
    run: Run,
    dataset: ImageTextDataset,
    prompts: PromptSet,
    *,
    other_prompt_sets: Sequence[PromptSet] = (),
    protocol: Protocol | None = None,
    split: Split = "test",
    sources: Sequence[str] = (),
    findings: Sequence[str] = (),
    n_resamples: int = 1000,
    seed: int = 0,
    thresholds: bool = True,
) -> ZeroShot:
    """Scores the images of a split for each finding, with intervals over patients.

    Args:
        run: Its model scores.
        dataset: Of the data folders.
        prompts: What stands for a finding.
        other_prompt_sets: Other prompt sets, scored beside it to show how much hangs on the words.
        protocol: Images, findings and rules; then `sources` and `findings` are its own.
        split: Which images; thresholds come from "val" of the same sources unless that is it.
        sources: Only these, when named.
        findings: In this order; by default all that the images are labelled with.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.
        thresholds: Whether to choose thresholds, and score F1, subgroups and wordings.

    Raises:
        ManifestError: When there is nothing to score, or a finding is labelled in no image.
    """
    selected = select_samples(dataset, split, sources, protocol)
    if protocol is not None:
        names = list(protocol.findings)
    else:
        there = findings_of(selected)
        if missing := [f for f in findings if f not in there]:
            raise ManifestError(
                f"no image is labelled with {', '.join(missing)}; these images are labelled with "
                f"{', '.join(there)}"
            )
        names = list(findings) or there

    def labels_of(some: ImageTextDataset) -> np.ndarray:
        return some.labels(names) if protocol is None else protocol_labels(protocol, some.samples)

    model, max_tokens = run.model, run.config.data.max_tokens
    scale = float(model.scale().detach())
    pair = embed_prompts(model, run.tokenizer, prompts, names, max_tokens)
    embeddings = embed_images(model, selected)
    test = make_predictions(
        selected, names, labels_of(selected), probabilities(embeddings, pair, scale)
    )
    min_count = 10 if protocol is None else protocol.min_count
    if not thresholds:
        plain = metrics_by_finding(
            test.labels, test.scores, test.patients(), names,
            n_resamples=n_resamples, seed=seed, min_count=min_count,
        )  # fmt: skip
        return ZeroShot(selected, embeddings, test, None, plain)
    val = None
    if split != "val":
        try:
            val_images = select_samples(dataset, "val", sources, protocol)
        except ManifestError:
            pass  # this source has no validation images
        else:
            val_scores = probabilities(embed_images(model, val_images, show=False), pair, scale)
            val = make_predictions(val_images, names, labels_of(val_images), val_scores)
    rule = "f1" if protocol is None else protocol.threshold
    summary = compute_metrics(
        test,
        val,
        rule=rule,
        equal_prompts=0.5,
        min_count=min_count,
        n_resamples=n_resamples,
        seed=seed,
    )
    one_sided(summary, test, embeddings, pair)
    summary["other_prompt_sets"] = [
        _other_prompt_set(run, prompt_set, test, embeddings, summary["macro_findings"])
        for prompt_set in other_prompt_sets
    ]
    return ZeroShot(selected, embeddings, test, val, summary)


def one_sided(
    summary: dict, test: Predictions, embeddings: Float[Tensor, "n e"], pair: PromptEmbeddings
) -> None:
    """Puts into each finding of a summary what either prompt of its pair reaches alone.

    The negative one is to find the images without the finding; models that ignore "no" fall below
    one half there, which the softmax over the pair hides.

    Source: NEG and POS of Bi-MCQ (https://github.com/Castella99/Bi-MCQ).
    """
    column = {name: k for k, name in enumerate(test.names())}
    for row in summary["findings"]:
        k = column[row["finding"]]
        for key, side, truth in (
            ("auroc_by_positive", pair.positive, test.labels[:, k]),
            ("auroc_by_negative", pair.negative, 1 - test.labels[:, k]),
        ):
            row[key] = auroc(truth, (embeddings.double() @ side[k].double()).numpy())


def _other_prompt_set(
    run: Run,
    prompts: PromptSet,
    test: Predictions,
    embeddings: Float[Tensor, "n e"],
    counted: Sequence[str],
) -> dict:
    """What another prompt set reaches on images that are embedded; see `results.Wording`."""
    model, max_tokens = run.model, run.config.data.max_tokens
    pair = embed_prompts(model, run.tokenizer, prompts, test.names(), max_tokens)
    scores = probabilities(embeddings, pair, float(model.scale().detach()))
    values = {name: auroc(test.labels[:, k], scores[:, k]) for k, name in enumerate(test.names())}
    known = {name: value for name, value in values.items() if value is not None}
    return {
        "prompt_set": f"{prompts.id} version {prompts.version}",
        "prompt_hash": prompts.hash,
        "macro_auroc": float(np.mean([known[name] for name in counted])) if counted else None,
        "auroc": known,
    }


def write_zeroshot(
    out: Path,
    result: ZeroShot,
    run: Run,
    prompts: PromptSet,
    *,
    title: str,
    kind: Literal["demo", "zeroshot"],
    summary: str,
    command: str,
    seed: int,
    wall_s: float,
    gallery: Sequence[int],
    controls: Mapping[str, dict] | None = None,
    combinations: Sequence[dict] = (),
    protocol: Protocol | None = None,
    split: str = BUILT,
    leak_check: str = "not made",
    facts: Mapping[str, str | int | float] | None = None,
) -> RunResults:
    """Writes all that an evaluation leaves, and returns the results.

    `gallery` has the numbers of the rows that the page shows; the other arguments are parts of
    `RunResults`.
    """
    seen = run.seen(result.test.names())
    found = {
        **result.summary,
        "findings": [
            {**row, "seen": seen.get(row["finding"])} for row in result.summary["findings"]
        ],
        "title": title,
        "kind": kind,
        "summary": summary,
        "controls": dict(controls or {}),
        "combinations": list(combinations),
        "leak_check": leak_check,
        "facts": dict(facts or {}),
    }
    made = {
        "command": command,
        "seed": seed,
        "config_hash": run.config_hash,
        "train_seed": run.config.train.seed,
        "recipe_hash": run.recipe_hash,
        "data_hash": result.dataset.data_hash,
        "images_hash": images_hash(result.dataset.samples),
        "split": split,
        "prompt_set": f"{prompts.id} version {prompts.version}",
        "prompt_hash": prompts.hash,
        "device": run.device,
        "wall_s": wall_s,
    }
    return write_evaluation(
        out,
        found,
        made,
        result.test,
        val=result.val,
        protocol=protocol,
        gallery=result.gallery(run, gallery),
        prompts={finding: prompts.texts(finding) for finding in result.test.names()},
    )


def evaluate(
    path: Path,
    folders: Sequence[Path],
    out: Path,
    *,
    protocol: str | None,
    split: Split,
    sources: Sequence[str],
    findings: Sequence[str],
    prompt_sets: Sequence[str],
    n_resamples: int,
    seed: int,
    command: str,
    device: torch.device,
) -> RunResults:
    """What `mmclip zeroshot` does: load, score, write results, plots and page.

    `prompt_sets` are the protocol's unless some are named; the first gives the result, the others
    its spread over wordings.
    """
    began = time.monotonic()
    rules = None if protocol is None else load_protocol(protocol)
    named = split_of(folders, rules)
    run = open_run(path, device)
    asked = prompt_sets or (DEFAULT_PROMPT_SETS if rules is None else rules.prompt_sets)
    prompts, *other_prompt_sets = [load_prompts(name) for name in asked]
    dataset = run.open_data(folders)
    selected = select_samples(dataset, split, sources, rules)
    leak_check = run.check_unseen(selected.samples, split)
    result = zeroshot(
        run,
        dataset,
        prompts,
        other_prompt_sets=other_prompt_sets,
        protocol=rules,
        split=split,
        sources=sources,
        findings=findings,
        n_resamples=n_resamples,
        seed=seed,
    )
    where = f"split {split}" + (f" of {', '.join(sources)}" if sources else "")
    shown = np.linspace(0, len(result.dataset) - 1, min(GALLERY_SIZE, len(result.dataset))).astype(
        int
    )
    return write_zeroshot(
        out,
        result,
        run,
        prompts,
        title=f"Scored by prompts: {where if rules is None else rules.title}",
        kind="zeroshot",
        summary=f"{len(result.dataset):,} images, {where}, scored by {run.name} at step {run.step}",
        command=command,
        seed=seed,
        wall_s=time.monotonic() - began,
        gallery=shown.tolist(),
        controls={
            "shortcut baseline": shortcut_baseline(
                result.dataset, result.test, result.summary["min_count"]
            ),
            "abnormality score": abnormality_score(run, result, prompts),
        },
        protocol=rules,
        split=named,
        leak_check=leak_check,
        facts={
            "images of unknown view": unknown_views(result.dataset),
            **run.facts(),
        },
    )


def abnormality_score(run: Run, result: ZeroShot, prompts: PromptSet) -> dict:
    """One score for every finding: how little the model thinks the image normal."""
    model, max_tokens = run.model, run.config.data.max_tokens
    pair = embed_prompts(model, run.tokenizer, prompts, ["no finding"], max_tokens)
    normal = probabilities(result.embeddings, pair, float(model.scale().detach()))
    sick = np.repeat(1 - normal, len(result.test.findings), axis=1)
    is_normal = np.array([name == "no finding" for name in result.test.names()])
    return control_of(
        result.test,
        np.where(is_normal, 1 - sick, sick),
        "the model's score for an image that is not normal, taken for every finding: what it knows "
        "of a finding is what it has beyond this",
        result.summary["min_count"],
    )
