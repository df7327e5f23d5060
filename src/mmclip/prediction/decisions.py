"""Thresholds, and only those that validation images chose for the very same model."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mmclip.evaluation.results import RESULTS_FILE, ResultsError, RunResults, read_results
from mmclip.finetuning.saved import FineTuned
from mmclip.models.dual_encoder import DualEncoder
from mmclip.prompts import PromptSet, plain_name

logger = logging.getLogger(__name__)


def read_thresholds(
    path: Path, model: DualEncoder | FineTuned, prompts: PromptSet, findings: Sequence[str]
) -> dict[str, float | None]:
    """The threshold of each finding: a probability of this or more is a decision for it.

    Args:
        path: results.json of `mmclip zeroshot` or `mmclip finetune`, or its folder.
        model: That is to decide.
        prompts: As for scoring.
        findings: As for scoring.

    Returns:
        By finding; None where validation images chose none, which gives a warning.

    Raises:
        ResultsError: When the results are of another model or other prompts, or hold no threshold
            of these findings.
    """
    results = read_results(folder_of(path))
    refuse_other(results, path, model, prompts, "thresholds")
    known = {
        plain_name(row.finding): row.threshold.value
        for row in results.findings
        if row.threshold is not None and row.threshold.rule != "equal_prompts"
    }
    chosen = {finding: known.get(plain_name(finding)) for finding in findings}
    missing = [finding for finding, value in chosen.items() if value is None]
    if len(missing) == len(chosen):
        raise ResultsError(
            f"{path} holds no threshold that validation images chose of {', '.join(missing)}; "
            f"score a data folder that has a val split with labels of them, or leave thresholds out"
        )
    if missing:
        logger.warning("%s holds no threshold of %s: no decision for it", path, ", ".join(missing))
    return chosen


def folder_of(path: Path) -> Path:
    """The folder of results, which may be named by their file.

    Raises:
        ResultsError: When it is another file.
    """
    if path.is_file() and path.name != RESULTS_FILE:
        raise ResultsError(f"{path} is no {RESULTS_FILE}; give the file that an evaluation wrote")
    return path.parent if path.name == RESULTS_FILE else path


def refuse_other(
    results: RunResults,
    path: Path,
    model: DualEncoder | FineTuned,
    prompts: PromptSet,
    what: str,
) -> None:
    """Stops before results of one model are used for another.

    Raises:
        ResultsError: When they are of another model or other prompts; it says `what` they give.
    """
    if why := _why_other(results, model, prompts):
        raise ResultsError(
            f"{what} of {path} do not hold here: {why}. Score validation images by the same "
            f"model and prompts, and give those results"
        )


def _why_other(
    results: RunResults, model: DualEncoder | FineTuned, prompts: PromptSet
) -> str | None:
    """Why results are not of a model, or None where they are."""
    made = results.provenance
    if isinstance(model, FineTuned):
        is_same = results.facts.get("run") == model.meta["run"]
        return None if is_same else "they are of other weights"
    weights, rule = model.weights, model.scoring.rule
    if (made.recipe_hash, made.train_seed) != (weights.recipe_hash, weights.train_seed):
        return "they are of another model, run or step"
    if made.zeroshot_rule != rule:
        return f"they are by the rule {made.zeroshot_rule}, and these scores by {rule}"
    if made.prompt_hash != prompts.hash:
        here = f"{prompts.id} version {prompts.version}"
        return f"they are of the prompts {made.prompt_set}, and these are {here}"
    return None


def decide(
    probabilities: Float[np.ndarray, "n k"], thresholds: Sequence[float | None]
) -> list[list[bool | None]]:
    """Whether each probability reaches its finding's threshold; None without one."""
    return [
        [None if t is None else bool(p >= t) for p, t in zip(row, thresholds, strict=True)]
        for row in probabilities
    ]
