"""The scores of validation images by the very same model: what a probability is held against."""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mmclip.checkpoint import run_folder
from mmclip.evaluation.results import (
    RESULTS_FILE,
    ResultsError,
    RunResults,
    read_results,
    read_scores,
)
from mmclip.evaluation.scores import ScoresError
from mmclip.finetuning.saved import FineTuned
from mmclip.models.dual_encoder import DualEncoder
from mmclip.prediction.decisions import folder_of, refuse_other
from mmclip.prompts import PromptSet, plain_name
from mmclip.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """The probabilities that a model gives validation images for one finding.

    Attributes:
        scores: Ascending; of all images, whether or not they are labelled.
        present: Ascending; of images labelled with the finding.
        absent: Ascending; of images labelled without it.
        threshold: That these images chose; None where they chose none.
    """

    scores: Float[np.ndarray, " n"]
    present: Float[np.ndarray, " p"]
    absent: Float[np.ndarray, " a"]
    threshold: float | None = None

    def below(self, probability: float) -> dict[str, float | None]:
        """The share of images whose probability is lower; None of a kind without an image."""
        kinds = {"all": self.scores, "present": self.present, "absent": self.absent}
        return {
            kind: float(np.searchsorted(scores, probability) / len(scores)) if len(scores) else None
            for kind, scores in kinds.items()
        }


def read_reference(
    path: Path, model: DualEncoder | FineTuned, prompts: PromptSet
) -> dict[str, Reference]:
    """The reference of each finding that results have validation scores of, by its plain name.

    Args:
        path: results.json of `mmclip zeroshot` or `mmclip finetune`, or its folder.
        model: That is to score images.
        prompts: As for scoring.

    Raises:
        ResultsError: When the results are missing, damaged, or of another model or other prompts.
        ScoresError: When the scores beside them are, or have no validation image.
    """
    folder = folder_of(path)
    return _references_of(read_results(folder), folder, path, model, prompts)


def _references_of(
    results: RunResults,
    folder: Path,
    named: Path,
    model: DualEncoder | FineTuned,
    prompts: PromptSet,
) -> dict[str, Reference]:
    """As `read_reference`, of results that are read; `named` is what the user calls them."""
    refuse_other(results, named, model, prompts, "reference scores")
    thresholds = {row.finding: row.threshold for row in results.findings}
    val = read_scores(folder, results, "val")
    found = {}
    for k, name in enumerate(val.names()):
        scores, labels = val.scores[:, k], val.labels[:, k]
        chosen = thresholds.get(name)
        is_chosen = chosen is not None and chosen.rule != "equal_prompts"
        found[plain_name(name)] = Reference(
            np.sort(scores),
            np.sort(scores[labels == 1]),
            np.sort(scores[labels == 0]),
            chosen.value if is_chosen and chosen is not None else None,
        )
    return found


@cache  # each prompt set asks again
def _tell_of(unreadable: str) -> None:
    logger.warning("these results give no reference scores: %s", unreadable)


def find_reference(model: DualEncoder | FineTuned, prompts: PromptSet) -> Path | None:
    """Results of the model with these prompts in or around its run, if there are any.

    `mmclip zeroshot` is often told to write into the run, and `mmclip demo` and `mmclip finetune`
    write around it. Results that cannot be read, as those of an older version, are told in a
    warning; those of another model or other prompts are passed over.
    """
    if not isinstance(model, Run | FineTuned):
        return None  # the folder of a model of others is not looked into
    run = run_folder(model.folder)
    for folder in (run, run.parent, *sorted(path.parent for path in run.glob(f"*/{RESULTS_FILE}"))):
        if not (folder / RESULTS_FILE).is_file():
            continue
        try:
            results = read_results(folder)
        except ResultsError as error:
            _tell_of(str(error))
            continue
        try:
            _references_of(results, folder, folder, model, prompts)
        except (ResultsError, ScoresError):
            continue
        return folder
    return None
