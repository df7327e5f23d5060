"""Any number of models scored alike, each once, so that they stand in one table."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mmclip.evaluation.results import RESULTS_FILE, ResultsError
from mmclip.evaluation.zeroshot import score_task
from mmclip.evaluation.zeroshot_task import ZeroshotRequest, open_task
from mmclip.model_loading import ModelRequest


class ScoredModel(NamedTuple):
    """A model whose results lie in a folder."""

    source: str
    folder: Path
    was_done: bool  # before this command
    is_unchecked: bool  # whether it is not known what it was trained on


def folder_names(sources: Sequence[str]) -> list[str]:
    """A name of a folder for each model: its last part where that tells it apart, else all of it.

    Raises:
        ValueError: When a model is named twice.
    """
    if len(set(sources)) < len(sources):
        twice = next(source for source in sources if sources.count(source) > 1)
        raise ValueError(f"model {twice} is named twice; name each once")
    last = [_plain(Path(source).name or source) for source in sources]
    return [
        name if last.count(name) == 1 else _plain(source)
        for name, source in zip(last, sources, strict=True)
    ]


def score_models(
    models: Sequence[ModelRequest], request: ZeroshotRequest, overwrite: bool = False
) -> Iterator[ScoredModel]:
    """Scores models one after another, and skips those whose results are there.

    Args:
        models: To be compared.
        request: What to score and how; its `out` gets a folder for each model.
        overwrite: Replace other results that are in such a folder.

    Raises:
        ResultsError: When a folder holds other results.
        ValueError: See `zeroshot.open_task`.
    """
    names = folder_names([model.source for model in models])
    for model, name in zip(models, names, strict=True):
        task = open_task(replace(request, model=model, out=request.out / name))
        folder = task.request.out
        is_done = task.is_done()
        if not is_done:
            if (folder / RESULTS_FILE).is_file() and not overwrite:
                raise ResultsError(
                    f"{folder} holds results of another model, data, protocol or prompts than is "
                    f"asked for; add --overwrite to replace them, or choose another --out"
                )
            score_task(task)
        yield ScoredModel(model.source, folder, is_done, task.leak_check.startswith("not made"))


def _plain(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"
