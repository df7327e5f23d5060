"""Zero-shot classification: an image is compared with what a report would say of it."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.embed import embed_images, embed_prompts
from mmclip.evaluation.compute_metrics import (
    compute_metrics,
    control_of,
    shortcut_baseline,
)
from mmclip.evaluation.metrics import auroc
from mmclip.evaluation.pages import gallery_of, write_evaluation
from mmclip.evaluation.results import (
    About,
    Combination,
    Control,
    Evaluation,
    OtherPromptSet,
    Provenance,
    RunResults,
    ScoredImages,
    provenance,
    run_results,
)
from mmclip.evaluation.scores import Predictions, make_predictions
from mmclip.evaluation.selection import Selection, images_hash
from mmclip.evaluation.zeroshot_task import ZeroshotRequest, ZeroshotTask, open_task
from mmclip.models.dual_encoder import DualEncoder, PromptEmbeddings
from mmclip.prompt_check import PromptError, check_prompts
from mmclip.prompts import PromptSet
from mmclip.run import Run

logger = logging.getLogger(__name__)

GALLERY_SIZE = 12
"""Images on the page, evenly spaced over the rows: not chosen by how well they came out."""


@dataclass(frozen=True)
class PromptScores:
    """Images, and what the prompts say of them: raw scores, without metrics yet."""

    encoder: DualEncoder
    prompts: PromptSet
    selection: Selection
    dataset: ImageTextDataset  # the images that are scored, of whatever split
    embeddings: Float[Tensor, "n e"]  # of the images
    pair: PromptEmbeddings
    test: Predictions

    def scores(self, prompts: PromptSet, names: Sequence[str]) -> Float[np.ndarray, "n k"]:
        """What other prompts say of the same images."""
        pair = embed(self.encoder, prompts, names)
        return self.encoder.scoring.scores(self.embeddings, pair)


@dataclass(frozen=True)
class ZeroShot:
    """Raw scores of images, and what they are worth."""

    scored: PromptScores
    val: Predictions | None  # those that chose the thresholds
    evaluation: Evaluation
    other_prompt_sets: tuple[OtherPromptSet, ...] = ()

    @property
    def dataset(self) -> ImageTextDataset:
        """The images that are scored."""
        return self.scored.dataset

    @property
    def test(self) -> Predictions:
        """Their raw scores."""
        return self.scored.test


def embed(encoder: DualEncoder, prompts: PromptSet, names: Sequence[str]) -> PromptEmbeddings:
    """The prompts of some findings, as the text encoder reads them.

    Raises:
        PromptError: When the prompts of a finding cannot stand for it.
    """
    check_prompts(encoder.tokenizer, [prompts], names, encoder.max_tokens)
    return embed_prompts(encoder, prompts, names)


def score_images(
    encoder: DualEncoder,
    dataset: ImageTextDataset,
    prompts: PromptSet,
    selection: Selection = Selection(),
) -> PromptScores:
    """Raw scores of the selected images: how far the positive prompt of a finding fits.

    Args:
        encoder: It scores.
        dataset: Of the data folders.
        prompts: What stands for a finding.
        selection: Which images and findings.

    Raises:
        ManifestError: When there is nothing to score, or a finding is labelled in no image.
    """
    images = selection.select(dataset)
    pair = embed(encoder, prompts, images.findings)
    embeddings = embed_images(encoder, images.dataset)
    test = make_predictions(images, encoder.scoring.scores(embeddings, pair))
    return PromptScores(encoder, prompts, selection, images.dataset, embeddings, pair, test)


def score_val(scored: PromptScores, dataset: ImageTextDataset) -> Predictions | None:
    """Scores of the validation images of the same sources; None where there are no others."""
    images = scored.selection.select_val(dataset, scored.test.names())
    if images is None:
        return None
    embeddings = embed_images(scored.encoder, images.dataset, show=False)
    return make_predictions(images, scored.encoder.scoring.scores(embeddings, scored.pair))


def zeroshot(
    encoder: DualEncoder,
    dataset: ImageTextDataset,
    prompts: PromptSet,
    selection: Selection = Selection(),
    *,
    other_prompt_sets: Sequence[PromptSet] = (),
    n_resamples: int = 1000,
    seed: int = 0,
) -> ZeroShot:
    """Scores the images of a split for each finding, with intervals over patients.

    Args:
        encoder: It scores.
        dataset: Of the data folders.
        prompts: What stands for a finding.
        selection: Which images and findings, by which rules.
        other_prompt_sets: Other prompt sets, scored beside it to show how much hangs on the words.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Raises:
        ManifestError: When there is nothing to score, or a finding is labelled in no image.
    """
    scored = score_images(encoder, dataset, prompts, selection)
    val = score_val(scored, dataset)
    evaluation = compute_metrics(
        scored.test,
        val,
        rule=selection.rule,
        equal_prompts=encoder.scoring.equal_prompts,
        min_count=selection.min_count,
        n_resamples=n_resamples,
        seed=seed,
    )
    counted = evaluation.macro_findings
    return ZeroShot(
        scored,
        val,
        evaluation.with_findings(one_sided(scored)).with_findings(uncalibrated(scored)),
        tuple(other_prompt_set(scored, other, counted) for other in other_prompt_sets),
    )


def uncalibrated(scored: PromptScores) -> dict[str, dict[str, None]]:
    """No calibration error where scores are cosines, which may look like probabilities."""
    if scored.encoder.scoring.rule != "similarity":
        return {}
    return {name: {"calibration_error": None} for name in scored.test.names()}


def one_sided(scored: PromptScores) -> dict[str, dict[str, float | None]]:
    """What either prompt of its pair reaches alone, by finding and field of `FindingScores`.

    The negative one is to find the images without the finding; models that ignore "no" fall below
    one half there, which the softmax over the pair hides.

    Source: NEG and POS of Bi-MCQ (https://github.com/Castella99/Bi-MCQ).
    """

    def alone(truth: np.ndarray, side: Tensor) -> float | None:
        return auroc(truth, (scored.embeddings.double() @ side.double()).numpy())

    labels, pair = scored.test.labels, scored.pair
    return {
        name: {
            "auroc_by_positive": alone(labels[:, k], pair.positive[k]),
            "auroc_by_negative": alone(1 - labels[:, k], pair.negative[k]),
        }
        for k, name in enumerate(scored.test.names())
    }


def other_prompt_set(
    scored: PromptScores, prompts: PromptSet, counted: Sequence[str]
) -> OtherPromptSet:
    """What another prompt set reaches on images that are embedded.

    Args:
        scored: The images.
        prompts: Of the other set.
        counted: The findings of the macro average.
    """
    test = scored.test
    scores = scored.scores(prompts, test.names())
    values = {name: auroc(test.labels[:, k], scores[:, k]) for k, name in enumerate(test.names())}
    known = {name: value for name, value in values.items() if value is not None}
    return OtherPromptSet(
        prompt_set=f"{prompts.id} version {prompts.version}",
        prompt_hash=prompts.hash,
        macro_auroc=float(np.mean([known[name] for name in counted])) if counted else None,
        auroc=known,
    )


def abnormality_score(result: ZeroShot) -> Control | None:
    """One score for every finding: how little the model thinks the image normal.

    None, and a warning, where the model cannot read the prompts of a normal image.
    """
    test = result.test
    try:
        normal = result.scored.scores(result.scored.prompts, ["no finding"])
    except PromptError as error:
        logger.warning("the control 'abnormality score' is left out: %s", error)
        return None
    sick = np.repeat(1 - normal, len(test.findings), axis=1)
    is_normal = np.array([name == "no finding" for name in test.names()])
    return control_of(
        test,
        np.where(is_normal, 1 - sick, sick),
        "the model's score for an image that is not normal, taken for every finding: what it knows "
        "of a finding is what it has beyond this",
        result.evaluation.min_count,
    )


def made_now(result: ZeroShot, command: str, seed: int, *, split: str, wall_s: float) -> Provenance:
    """Where the numbers of a result come from.

    Args:
        result: That is written.
        command: As typed.
        seed: Of the bootstrap.
        split: Of the data folders, by name and hash.
        wall_s: How long it took.
    """
    scored = result.scored
    return provenance(
        command,
        seed,
        ScoredImages(scored.dataset.data_hash, split, images_hash(scored.dataset.samples)),
        device=scored.encoder.device,
        wall_s=wall_s,
        weights=scored.encoder.weights,
        prompts=scored.prompts,
        zeroshot_rule=scored.encoder.scoring.rule,
    )


def write_zeroshot(
    out: Path,
    result: ZeroShot,
    about: About,
    made: Provenance,
    *,
    gallery: Sequence[int],
    controls: Mapping[str, Control] | None = None,
    combinations: Sequence[Combination] = (),
) -> RunResults:
    """Writes all that an evaluation leaves, and returns the results.

    Args:
        out: The folder.
        result: To be written.
        about: What is said of it.
        made: Where it comes from.
        gallery: The numbers of the rows that the page shows.
        controls: See `results.run_results`.
        combinations: See `results.run_results`.
    """
    scored, names = result.scored, result.test.names()
    seen, encoder = scored.encoder.seen(names), scored.encoder
    results = run_results(
        result.evaluation.with_findings({name: {"seen": how} for name, how in seen.items()}),
        about,
        made,
        protocol=scored.selection.protocol,
        other_prompt_sets=result.other_prompt_sets,
        controls=controls,
        combinations=combinations,
    )
    return write_evaluation(
        out,
        results,
        result.test,
        val=result.val,
        protocol=scored.selection.protocol,
        gallery=gallery_of(
            encoder.checkpoint if isinstance(encoder, Run) else None,
            result.dataset,
            result.test,
            gallery,
        ),
        prompts={finding: scored.prompts.texts(finding) for finding in names},
    )


def evaluate(request: ZeroshotRequest) -> RunResults:
    """What `mmclip zeroshot` does: open, score, write results, plots and page."""
    return score_task(open_task(request))


def score_task(task: ZeroshotTask) -> RunResults:
    """Scores what is opened, and writes results, plots and page."""
    began, request = time.monotonic(), task.request
    result = zeroshot(
        task.encoder,
        task.dataset,
        task.prompts,
        task.selection,
        other_prompt_sets=task.other_prompts,
        n_resamples=request.n_resamples,
        seed=request.seed,
    )
    n, where, rules = len(result.dataset), task.selection.said(), task.selection.protocol
    about = About(
        title=f"Scored by prompts: {where if rules is None else rules.title}",
        kind="zeroshot",
        summary=f"{n:,} images, {where}, scored by {task.encoder.name}",
        leak_check=task.leak_check,
        facts=task.facts(),
    )
    controls = {
        "shortcut baseline": shortcut_baseline(
            result.dataset, result.test, result.evaluation.min_count
        )
    }
    if (abnormality := abnormality_score(result)) is not None:
        controls["abnormality score"] = abnormality
    wall_s = time.monotonic() - began
    return write_zeroshot(
        request.out,
        result,
        about,
        made_now(result, request.command, request.seed, split=task.split, wall_s=wall_s),
        gallery=np.linspace(0, n - 1, min(GALLERY_SIZE, n)).astype(int).tolist(),
        controls=controls,
    )
