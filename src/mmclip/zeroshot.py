"""Zero-shot classification: a film is compared with what a report would say of it."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.baselines import nuisance_scores
from mmclip.bootstrap import score_findings
from mmclip.checkpoint import Checkpoint, code_version, load_checkpoint
from mmclip.data.check import TRAINED_FILE, refuse_trained
from mmclip.data.dataset import Rows, normalise, open_rows
from mmclip.data.manifest import ManifestError, Split
from mmclip.data.text import tokenise
from mmclip.metrics import Threshold, choose_thresholds, known
from mmclip.models.mmclip import MMCLIP
from mmclip.pictures import make_pictures
from mmclip.progress import progress
from mmclip.prompts import PromptSet, load_prompts
from mmclip.results import (
    GalleryItem,
    RunResults,
    checked,
    write_page,
    write_plots,
    write_results,
)

logger = logging.getLogger(__name__)

FRONTAL = ("PA", "AP", "unknown")
"""The views that are scored; a lateral film shows other things under the same name."""

GALLERY_FILMS = 12
"""Films on the page, evenly spaced over the rows: not chosen by how well they came out."""


@dataclass(frozen=True)
class PromptEmbeddings:
    """One embedding a finding and side: the normalised mean over the wordings."""

    positive: Float[Tensor, "k e"]
    negative: Float[Tensor, "k e"]


@torch.inference_mode()
def embed_films(
    model: MMCLIP, rows: Rows, batch_size: int = 256, show: bool = True
) -> Float[Tensor, "n e"]:
    """The embeddings of all films, on the CPU, in the order of the rows."""
    device = model.logit_scale.device
    out = []
    with progress("embedding films", len(rows), show=show) as advance:
        for start in range(0, len(rows), batch_size):
            part = np.arange(start, min(start + batch_size, len(rows)))
            image = normalise(rows.pixels(part)).to(device)
            out.append(model.encode_image(image).embedding.cpu())
            advance(len(part))
    return torch.cat(out)


@torch.inference_mode()
def embed_texts(
    model: MMCLIP,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    max_tokens: int,
    batch_size: int = 256,
) -> Float[Tensor, "n e"]:
    """The embeddings of some texts, on the CPU; a text that occurs twice is encoded once."""
    device = model.logit_scale.device
    distinct = list(dict.fromkeys(texts))
    out = []
    for start in range(0, len(distinct), batch_size):
        tokens = tokenise(tokenizer, distinct[start : start + batch_size], max_tokens=max_tokens)
        ids = torch.from_numpy(tokens.ids).long().to(device)
        is_valid = torch.from_numpy(tokens.is_valid).to(device)
        out.append(model.encode_text(ids, is_valid).embedding.cpu())
    number = {text: i for i, text in enumerate(distinct)}
    return torch.cat(out)[[number[text] for text in texts]]


def embed_prompts(
    model: MMCLIP,
    tokenizer: PreTrainedTokenizerFast,
    prompts: PromptSet,
    findings: Sequence[str],
    max_tokens: int,
) -> PromptEmbeddings:
    """Embeds the prompts of each finding and averages the wordings of a side.

    Source: prompt ensembling in embedding space, CLIP section 3.1.4 (arXiv:2103.00020).
    """

    def averaged(texts: Sequence[str]) -> Tensor:
        return F.normalize(embed_texts(model, tokenizer, texts, max_tokens).mean(0), dim=-1)

    sides = [prompts.texts(finding) for finding in findings]
    return PromptEmbeddings(
        positive=torch.stack([averaged(side.positives) for side in sides]),
        negative=torch.stack([averaged(side.negatives) for side in sides]),
    )


def probabilities(
    films: Float[Tensor, "n e"], prompts: PromptEmbeddings, scale: float
) -> Float[np.ndarray, "n k"]:
    """Softmax over the pair of prompts: the probability that the positive one fits the film.

    Source: CheXzero (Tiu et al. 2022), methods, "softmax evaluation".
    """
    difference = films.double() @ (prompts.positive - prompts.negative).double().T
    return torch.sigmoid(scale * difference).numpy()


def rows_to_score(rows: Rows, split: Split, sources: Sequence[str] = ()) -> Rows:
    """The labelled frontal films of a split, and of some sources if they are named.

    Raises:
        ManifestError: When none is left; it says what the folder holds.
    """
    known_sources = sorted({film.source for film in rows.films})
    if unknown := sorted(set(sources) - set(known_sources)):
        raise ManifestError(
            f"there is no source {', '.join(unknown)} in this data; there are "
            f"{', '.join(known_sources)}"
        )
    kept = rows.select(
        [
            film.split == split
            and film.image is not None
            and bool(film.labels)
            and film.view in FRONTAL
            and (not sources or film.source in sources)
            for film in rows.films
        ]
    )
    if not len(kept):
        splits = sorted({str(f.split) for f in rows.films})
        raise ManifestError(
            f"no labelled frontal film in split {split!r} of source "
            f"{', '.join(sources) or 'any'}; the data has the splits {', '.join(splits)} and the "
            f"sources {', '.join(known_sources)}"
        )
    return kept


def findings_of(rows: Rows) -> list[str]:
    """All findings that some row is labelled with, in alphabetical order."""
    return sorted({finding for film in rows.films for finding in film.labels})


def threshold_of(
    checkpoint: Checkpoint,
    val: Rows | None,
    prompts: PromptEmbeddings,
    findings: Sequence[str],
    scale: float,
) -> dict[str, Threshold]:
    """A threshold a finding: best F1 on the validation films, or the tie of the prompt pair.

    Never chosen on the films that are scored. Without validation films that hold both classes,
    the threshold is 0.5, where both prompts fit equally well: no data is needed for it.
    """
    even = {
        f: Threshold(0.5, "even", "no data: where both prompts fit equally well") for f in findings
    }
    if val is None:
        return even
    labels = val.labels(findings)
    scores = probabilities(embed_films(checkpoint.model, val, show=False), prompts, scale)
    usable = [i for i in range(len(findings)) if known(labels[:, i], scores[:, i]) is not None]
    chosen = choose_thresholds(labels[:, usable], scores[:, usable], [findings[i] for i in usable])
    return {**even, **chosen}


@dataclass(frozen=True)
class ZeroShot:
    """Raw scores, and what `score_findings` says of them."""

    rows: Rows
    findings: list[str]
    labels: Float[np.ndarray, "n k"]
    embeddings: Float[Tensor, "n e"]  # of the films
    scores: Float[np.ndarray, "n k"]
    summary: dict

    def patients(self) -> list[str]:
        """The patient of each row."""
        return [film.patient_id for film in self.rows.films]

    def gallery(self, checkpoint: Checkpoint, rows: Sequence[int]) -> list[GalleryItem]:
        """Some rows as the page shows them, with pictures where the checkpoint has decoders."""
        pixels = self.rows.pixels(np.array(rows, np.int64)).numpy()
        films = [self.rows.films[row] for row in rows]
        shown = self.rows.select(np.isin(np.arange(len(self.rows)), rows))
        pictures = make_pictures(checkpoint, shown)
        return [
            GalleryItem(row, film.film_id, image, film.report, pictures.get(film.film_id))
            for row, film, image in zip(rows, films, pixels, strict=True)
        ]


def zeroshot(
    checkpoint: Checkpoint,
    rows: Rows,
    prompts: PromptSet,
    *,
    split: Split = "test",
    sources: Sequence[str] = (),
    findings: Sequence[str] = (),
    draws: int = 1000,
    seed: int = 0,
    thresholds: bool = True,
) -> ZeroShot:
    """Scores the films of a split for each finding, with intervals over patients.

    Args:
        checkpoint: The model.
        rows: Of the data folders.
        prompts: What stands for a finding.
        split: Which films; thresholds come from "val" of the same sources unless that is it.
        sources: Only these, when named.
        findings: In this order; by default all that the films are labelled with.
        draws: Bootstrap draws.
        seed: Of the bootstrap.
        thresholds: Whether to choose thresholds and score F1 and the like.

    Raises:
        ManifestError: When there is nothing to score, or a finding is labelled in no film.
    """
    scored = rows_to_score(rows, split, sources)
    there = findings_of(scored)
    if missing := [f for f in findings if f not in there]:
        raise ManifestError(
            f"no film is labelled with {', '.join(missing)}; these films are labelled with "
            f"{', '.join(there)}"
        )
    names = list(findings) or there
    model, max_tokens = checkpoint.model, checkpoint.config.data.max_tokens
    scale = float(model.scale().detach())
    pair = embed_prompts(model, checkpoint.tokenizer, prompts, names, max_tokens)
    embeddings = embed_films(model, scored)
    scores = probabilities(embeddings, pair, scale)
    labels = scored.labels(names)
    val = None
    if split != "val":
        try:
            val = rows_to_score(rows, "val", sources)
        except ManifestError:
            val = None  # this source has no validation films
    summary = score_findings(
        labels,
        scores,
        [film.patient_id for film in scored.films],
        names,
        thresholds=threshold_of(checkpoint, val, pair, names, scale) if thresholds else None,
        draws=draws,
        seed=seed,
    )
    return ZeroShot(scored, names, labels, embeddings, scores, summary)


def save_scores(path: Path, result: ZeroShot, **further: Any) -> None:
    """Raw scores and labels as scores.npz, so that any metric can be computed again.

    Args:
        path: The file.
        result: What was scored.
        further: More arrays of the file, by name.
    """
    np.savez_compressed(
        path,
        film_id=np.array([film.film_id for film in result.rows.films]),
        patient_id=np.array([film.patient_id for film in result.rows.films]),
        findings=np.array(result.findings),
        labels=result.labels,
        scores=result.scores,
        **further,
    )


def write_zeroshot(
    out: Path,
    result: ZeroShot,
    checkpoint: Checkpoint,
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
    facts: Mapping[str, str | int | float] | None = None,
) -> RunResults:
    """Writes results.json, scores.npz, plots/ and page.html, and returns the results.

    `gallery` has the numbers of the rows that the page shows; the other arguments are parts of
    `RunResults`.
    """
    device = checkpoint.model.logit_scale.device
    results = checked(
        {
            **result.summary,
            "title": title,
            "kind": kind,
            "summary": summary,
            "controls": dict(controls or {}),
            "combinations": list(combinations),
            "facts": dict(facts or {}),
            "provenance": {
                "command": command,
                "seed": seed,
                "config_hash": checkpoint.meta["config_hash"],
                "data_hash": result.rows.data_hash,
                "prompt_set": f"{prompts.id} version {prompts.version}",
                "prompt_hash": prompts.hash,
                "commit": code_version()["commit"],
                "versions": {k: v for k, v in code_version().items() if k != "commit"},
                "device": f"{device.type}, {torch.get_num_threads()} threads",
                "wall_s": wall_s,
                "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    save_scores(out / "scores.npz", result)
    columns = {"findings": result.findings, "labels": result.labels, "scores": result.scores}
    items = result.gallery(checkpoint, gallery)
    write_plots(out, results, items, **columns)
    texts = {finding: prompts.texts(finding) for finding in result.findings}
    write_page(out, results, items, **columns, prompts=texts)
    write_results(out, results)
    return results


def evaluate(
    run: Path,
    folders: Sequence[Path],
    out: Path,
    *,
    split: Split,
    sources: Sequence[str],
    findings: Sequence[str],
    prompt_set: str,
    draws: int,
    seed: int,
    command: str,
    device: torch.device,
) -> RunResults:
    """What `mmclip zeroshot` does: load, score, write results, plots and page."""
    began = time.monotonic()
    checkpoint = load_checkpoint(run)
    checkpoint.model.to(device)
    prompts = load_prompts(prompt_set)
    rows = open_rows(folders, checkpoint.config.data.film_px)
    check_trained(checkpoint, rows_to_score(rows, split, sources), split)
    result = zeroshot(
        checkpoint,
        rows,
        prompts,
        split=split,
        sources=sources,
        findings=findings,
        draws=draws,
        seed=seed,
    )
    controls = {
        "nuisance": nuisance(result),
        "any finding": any_finding(checkpoint, result, prompts),
    }
    where = f"split {split}" + (f" of {', '.join(sources)}" if sources else "")
    shown = np.linspace(0, len(result.rows) - 1, min(GALLERY_FILMS, len(result.rows))).astype(int)
    return write_zeroshot(
        out,
        result,
        checkpoint,
        prompts,
        title=f"Zero-shot: {where}",
        kind="zeroshot",
        summary=f"{len(result.rows)} films, {where}, scored by {run.name}"
        f" at step {checkpoint.meta['step']}",
        command=command,
        seed=seed,
        wall_s=time.monotonic() - began,
        gallery=shown.tolist(),
        controls=controls,
        facts={
            "training pairs": checkpoint.meta["n_pairs"],
            "training data": checkpoint.meta["data_hash"][:12],
            "step": checkpoint.meta["step"],
        },
    )


def check_trained(checkpoint: Checkpoint, scored: Rows, split: Split) -> None:
    """Stops before films are scored that the run was trained on; of split train it says so alone.

    Raises:
        ManifestError: When the content of a film of val or test, or its patient, has trained.
    """
    path = checkpoint.folder.resolve().parent.parent / TRAINED_FILE
    if not path.is_file():
        logger.warning("%s is missing: whether the run saw these films is not checked", path)
        return
    try:
        refuse_trained(scored.films, np.load(path))
    except ManifestError as error:
        if split != "train":
            raise
        logger.warning("split train: %s", error)


def nuisance(result: ZeroShot) -> dict:
    """The control that reads facts of the file and no lung; see `baselines.nuisance_scores`."""
    return control_of(
        result,
        nuisance_scores(result.rows, result.findings),
        "logistic regression on the film's size, brightness, gradients, border and view, told the "
        "labels of other patients of these very films: a model that does not exceed it may have "
        "read no lung",
    )


def any_finding(checkpoint: Checkpoint, result: ZeroShot, prompts: PromptSet) -> dict:
    """One score for every finding: how little the model thinks the film normal."""
    model, max_tokens = checkpoint.model, checkpoint.config.data.max_tokens
    pair = embed_prompts(model, checkpoint.tokenizer, prompts, ["no finding"], max_tokens)
    normal = probabilities(result.embeddings, pair, float(model.scale().detach()))
    sick = np.repeat(1 - normal, len(result.findings), axis=1)
    is_normal = np.array([name == "no finding" for name in result.findings])
    return control_of(
        result,
        np.where(is_normal, 1 - sick, sick),
        "the model's score for a film that is not normal, taken for every finding: what it knows "
        "of a finding is what it has beyond this",
    )


def control_of(result: ZeroShot, scores: Float[np.ndarray, "n k"], note: str) -> dict:
    """A control of a result: what other scores of the same films reach, as `results.Control`."""
    found = score_findings(result.labels, scores, result.patients(), result.findings, draws=200)
    return {
        "macro_auroc": found["macro_auroc"],
        "macro_auroc_ci": found["macro_auroc_ci"],
        "auroc": {row["finding"]: row["auroc"] for row in found["findings"]},
        "note": note,
    }
