"""Zero-shot classification: a film is compared with what a report would say of it."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmclip.checkpoint import Checkpoint, load_checkpoint
from mmclip.config import recipe_hash
from mmclip.data.batches import SEEN_FILE
from mmclip.data.check import TRAINED_FILE, refuse_trained
from mmclip.data.dataset import Rows, open_rows
from mmclip.data.entities import find_entities
from mmclip.data.folder import ManifestError
from mmclip.data.records import Split
from mmclip.embed import PromptEmbeddings, embed_films, embed_prompts, probabilities
from mmclip.evaluation.judge import control_of, judge, nuisance, score_findings
from mmclip.evaluation.metrics import auroc
from mmclip.evaluation.pages import GalleryItem, extreme_cases, write_evaluation
from mmclip.evaluation.pictures import make_pictures
from mmclip.evaluation.protocols import BUILT, Protocol, load_protocol
from mmclip.evaluation.results import RunResults
from mmclip.evaluation.scores import (
    Scored,
    findings_of,
    protocol_labels,
    rows_to_score,
    scored,
    split_of,
)
from mmclip.prompts import PromptSet, load_prompts

logger = logging.getLogger(__name__)

GALLERY_FILMS = 12
"""Films on the page, evenly spaced over the rows: not chosen by how well they came out."""


DEFAULT_PROMPT_SETS = ("default", "pair", "sentence")
"""Where no protocol names others."""


@dataclass(frozen=True)
class ZeroShot:
    """Raw scores of films, and what `judge` says of them."""

    rows: Rows
    embeddings: Float[Tensor, "n e"]  # of the films
    test: Scored  # the films that are judged, of whatever split
    val: Scored | None  # those that chose the cuts
    summary: dict

    def gallery(self, checkpoint: Checkpoint, rows: Sequence[int]) -> list[GalleryItem]:
        """Some rows as the page shows them, with pictures where the checkpoint has decoders.

        Behind them stand the films that the model is most right and most wrong about.
        """
        cases = {row: why for row, why in extreme_cases(self.test).items() if row not in rows}
        rows = [*rows, *cases]
        pixels = self.rows.pixels(np.array(rows, np.int64)).numpy()
        films = [self.rows.films[row] for row in rows]
        shown = self.rows.select(np.isin(np.arange(len(self.rows)), rows))
        pictures = make_pictures(checkpoint, shown)
        return [
            GalleryItem(
                row, film.film_id, image, film.report, pictures.get(film.film_id), cases.get(row)
            )
            for row, film, image in zip(rows, films, pixels, strict=True)
        ]


def zeroshot(
    checkpoint: Checkpoint,
    rows: Rows,
    prompts: PromptSet,
    *,
    wordings: Sequence[PromptSet] = (),
    protocol: Protocol | None = None,
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
        wordings: Other prompt sets, scored beside it to show how much hangs on the words.
        protocol: Films, findings and rules; then `sources` and `findings` are its own.
        split: Which films; thresholds come from "val" of the same sources unless that is it.
        sources: Only these, when named.
        findings: In this order; by default all that the films are labelled with.
        draws: Bootstrap draws.
        seed: Of the bootstrap.
        thresholds: Whether to choose cuts, and score F1, subgroups and wordings.

    Raises:
        ManifestError: When there is nothing to score, or a finding is labelled in no film.
    """
    films = rows_to_score(rows, split, sources, protocol)
    if protocol is not None:
        names = list(protocol.findings)
    else:
        there = findings_of(films)
        if missing := [f for f in findings if f not in there]:
            raise ManifestError(
                f"no film is labelled with {', '.join(missing)}; these films are labelled with "
                f"{', '.join(there)}"
            )
        names = list(findings) or there

    def labels_of(some: Rows) -> np.ndarray:
        return some.labels(names) if protocol is None else protocol_labels(protocol, some.films)

    model, max_tokens = checkpoint.model, checkpoint.config.data.max_tokens
    scale = float(model.scale().detach())
    pair = embed_prompts(model, checkpoint.tokenizer, prompts, names, max_tokens)
    embeddings = embed_films(model, films)
    test = scored(films, names, labels_of(films), probabilities(embeddings, pair, scale))
    min_count = 10 if protocol is None else protocol.min_count
    if not thresholds:
        plain = score_findings(
            test.labels, test.scores, test.patients(), names,
            draws=draws, seed=seed, min_count=min_count,
        )  # fmt: skip
        return ZeroShot(films, embeddings, test, None, plain)
    val = None
    if split != "val":
        try:
            val_films = rows_to_score(rows, "val", sources, protocol)
        except ManifestError:
            pass  # this source has no validation films
        else:
            val_scores = probabilities(embed_films(model, val_films, show=False), pair, scale)
            val = scored(val_films, names, labels_of(val_films), val_scores)
    rule = "f1" if protocol is None else protocol.threshold
    summary = judge(test, val, rule=rule, even=0.5, min_count=min_count, draws=draws, seed=seed)
    one_sided(summary, test, embeddings, pair)
    summary["wordings"] = [
        _wording(checkpoint, prompt_set, test, embeddings, summary["macro_findings"])
        for prompt_set in wordings
    ]
    return ZeroShot(films, embeddings, test, val, summary)


def one_sided(
    summary: dict, test: Scored, embeddings: Float[Tensor, "n e"], pair: PromptEmbeddings
) -> None:
    """Puts into each finding of a summary what either prompt of its pair reaches alone.

    The negative one is to find the films without the finding; models that ignore "no" fall below
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


def _wording(
    checkpoint: Checkpoint,
    prompts: PromptSet,
    test: Scored,
    embeddings: Float[Tensor, "n e"],
    counted: Sequence[str],
) -> dict:
    """What another prompt set reaches on films that are embedded; see `results.Wording`."""
    model, max_tokens = checkpoint.model, checkpoint.config.data.max_tokens
    pair = embed_prompts(model, checkpoint.tokenizer, prompts, test.names(), max_tokens)
    scores = probabilities(embeddings, pair, float(model.scale().detach()))
    values = {name: auroc(test.labels[:, k], scores[:, k]) for k, name in enumerate(test.names())}
    known = {name: value for name, value in values.items() if value is not None}
    return {
        "prompt_set": f"{prompts.id} version {prompts.version}",
        "prompt_hash": prompts.hash,
        "macro_auroc": float(np.mean([known[name] for name in counted])) if counted else None,
        "auroc": known,
    }


def findings_seen(run: Path, findings: Sequence[str]) -> dict[str, str]:
    """How each finding was named while a run trained; see `results.Seen`.

    A finding was seen in reports when they name it, or a concept that the lexicon finds in its
    name. What prompts or labels named outweighs reports. Empty where the run does not say.

    Args:
        run: The run's folder.
        findings: That are scored.
    """
    path = run / SEEN_FILE
    if not path.is_file():
        logger.warning("%s is missing: how findings were named in training is not known", path)
        return {}
    seen = json.loads(path.read_text("utf-8"))
    names = [name.lower() for name in findings]
    concepts = [
        {name, *(entity.concept for entity in entities)}
        for name, entities in zip(names, find_entities(names), strict=True)
    ]
    return {
        finding: next(
            (how for how in ("label", "prompt", "report") if of_finding & set(seen[how])), "none"
        )
        for finding, of_finding in zip(findings, concepts, strict=True)
    }


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
    protocol: Protocol | None = None,
    split: str = BUILT,
    leak_check: str = "not made",
    facts: Mapping[str, str | int | float] | None = None,
) -> RunResults:
    """Writes all that an evaluation leaves, and returns the results.

    `gallery` has the numbers of the rows that the page shows; the other arguments are parts of
    `RunResults`.
    """
    seen = findings_seen(run_folder(checkpoint), result.test.names())
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
        "config_hash": checkpoint.meta["config_hash"],
        "train_seed": checkpoint.config.train.seed,
        "recipe_hash": recipe_of(checkpoint),
        "data_hash": result.rows.data_hash,
        "split": split,
        "prompt_set": f"{prompts.id} version {prompts.version}",
        "prompt_hash": prompts.hash,
        "device": checkpoint.model.logit_scale.device,
        "wall_s": wall_s,
    }
    return write_evaluation(
        out,
        found,
        made,
        result.test,
        val=result.val,
        protocol=protocol,
        gallery=result.gallery(checkpoint, gallery),
        prompts={finding: prompts.texts(finding) for finding in result.test.names()},
    )


def recipe_of(checkpoint: Checkpoint) -> str:
    """The hash of what the weights of a checkpoint follow from, all but the seed."""
    given = {key: checkpoint.meta[key] for key in ("data_hash", "shuffle_pairs", "step")}
    return recipe_hash(checkpoint.config, given)


def run_folder(checkpoint: Checkpoint) -> Path:
    """The folder of the run that a checkpoint is of."""
    return checkpoint.folder.resolve().parent.parent


def evaluate(
    run: Path,
    folders: Sequence[Path],
    out: Path,
    *,
    protocol: str | None,
    split: Split,
    sources: Sequence[str],
    findings: Sequence[str],
    prompt_sets: Sequence[str],
    draws: int,
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
    checkpoint = load_checkpoint(run)
    checkpoint.model.to(device)
    asked = prompt_sets or (DEFAULT_PROMPT_SETS if rules is None else rules.prompt_sets)
    prompts, *wordings = [load_prompts(name) for name in asked]
    rows = open_rows(folders, checkpoint.config.data.film_px)
    leak_check = check_trained(checkpoint, rows_to_score(rows, split, sources, rules), split)
    result = zeroshot(
        checkpoint,
        rows,
        prompts,
        wordings=wordings,
        protocol=rules,
        split=split,
        sources=sources,
        findings=findings,
        draws=draws,
        seed=seed,
    )
    where = f"split {split}" + (f" of {', '.join(sources)}" if sources else "")
    shown = np.linspace(0, len(result.rows) - 1, min(GALLERY_FILMS, len(result.rows))).astype(int)
    return write_zeroshot(
        out,
        result,
        checkpoint,
        prompts,
        title=f"Scored by prompts: {where if rules is None else rules.title}",
        kind="zeroshot",
        summary=f"{len(result.rows):,} films, {where}, scored by {run.name}"
        f" at step {checkpoint.meta['step']}",
        command=command,
        seed=seed,
        wall_s=time.monotonic() - began,
        gallery=shown.tolist(),
        controls={
            "nuisance": nuisance(result.rows, result.test, result.summary["min_count"]),
            "any finding": any_finding(checkpoint, result, prompts),
        },
        protocol=rules,
        split=named,
        leak_check=leak_check,
        facts={
            "training pairs": checkpoint.meta["n_pairs"],
            "training data": checkpoint.meta["data_hash"][:12],
            "step": checkpoint.meta["step"],
        },
    )


def check_trained(checkpoint: Checkpoint, films: Rows, split: Split) -> str:
    """Stops before films are scored that the run was trained on; of split train it says so alone.

    Returns:
        What was found, for results.

    Raises:
        ManifestError: When the content of a film of val or test, or its patient, has trained.
    """
    path = run_folder(checkpoint) / TRAINED_FILE
    if not path.is_file():
        logger.warning("%s is missing: whether the run saw these films is not checked", path)
        return f"not made: the run has no {TRAINED_FILE}"
    try:
        refuse_trained(films.films, np.load(path))
    except ManifestError as error:
        if split != "train":
            raise
        logger.warning("split train: %s", error)
        return f"split train: {error}"
    return "no film and no patient of these was trained on (by patient id and content of the file)"


def any_finding(checkpoint: Checkpoint, result: ZeroShot, prompts: PromptSet) -> dict:
    """One score for every finding: how little the model thinks the film normal."""
    model, max_tokens = checkpoint.model, checkpoint.config.data.max_tokens
    pair = embed_prompts(model, checkpoint.tokenizer, prompts, ["no finding"], max_tokens)
    normal = probabilities(result.embeddings, pair, float(model.scale().detach()))
    sick = np.repeat(1 - normal, len(result.test.findings), axis=1)
    is_normal = np.array([name == "no finding" for name in result.test.names()])
    return control_of(
        result.test,
        np.where(is_normal, 1 - sick, sick),
        "the model's score for a film that is not normal, taken for every finding: what it knows "
        "of a finding is what it has beyond this",
        result.summary["min_count"],
    )
