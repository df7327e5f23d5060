"""Any model by its name: a run, a model of transformers in a folder or on the hub, or your own."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from mmclip.checkpoint import find_checkpoint
from mmclip.data.leakage.trained_on import trained_on
from mmclip.models.dual_encoder import DualEncoder, ZeroshotRule
from mmclip.models.hub_loading import check_hub_encoder, open_hub_encoder
from mmclip.models.own_encoder import open_own_encoder
from mmclip.own_code import is_own_code, load_own
from mmclip.run import open_run

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ModelRequest:
    """Which model, and how it is to be used.

    Attributes:
        source: Folder of a run, of one of its checkpoints, or of a model of transformers; the id of
            one on the hub; or module:function.
        rule: Of zero-shot scores, in place of the model's own; see `dual_encoder.Scoring`.
        trained_on: Names of data sets that a model of others was trained on.
        batch_size: Images that are encoded together; None takes what fits.
    """

    source: str
    rule: ZeroshotRule | None = None
    trained_on: tuple[str, ...] = ()
    batch_size: int | None = None


def is_function(source: str) -> bool:
    """Whether a name is module:function."""
    return is_own_code(source) and not Path(source).exists()


def is_of_transformers(source: str) -> bool:
    """Whether a name is a folder of a model of transformers, or can be an id of the hub."""
    folder = Path(source)
    if folder.is_dir():
        return _model_type(folder) is not None
    # Of runs/frist, where there is a folder runs, the path is mistyped, and no id is meant.
    is_path = folder.is_absolute() or Path(folder.parts[0] if folder.parts else "").is_dir()
    return not folder.exists() and not is_path and _HUB_ID.fullmatch(source) is not None


def _model_type(folder: Path) -> str | None:
    """As config.json says; None of a run's, which has no such key."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("model_type") if isinstance(found, dict) else None


def check_model(source: str) -> None:
    """Refuses a model that is not there, before anything is read.

    Raises:
        CheckpointError: When a folder holds no finished checkpoint.
        EncoderError: When a model of others cannot be had.
    """
    if is_function(source):
        load_own(source, "model")
    elif is_of_transformers(source):
        check_hub_encoder(source)
    else:
        find_checkpoint(Path(source))


def open_dual_encoder(request: ModelRequest, device: torch.device | None = None) -> DualEncoder:
    """Opens a model.

    Args:
        request: Which, and how it is to be used.
        device: Where it goes; None for the CPU. Your own object knows itself.

    Raises:
        CheckpointError: When a folder holds no finished checkpoint, or a damaged one.
        EncoderError: When a model of others cannot be had, or is no pair of encoders.
        ValueError: When a run is said to be trained on something.
    """
    source, known = request.source, trained_on(request.trained_on)
    if is_function(source):
        return open_own_encoder(source, request.rule, known)
    if is_of_transformers(source):
        where = device or torch.device("cpu")
        return open_hub_encoder(source, where, request.rule, known, request.batch_size)
    if known.names:
        raise ValueError(
            f"--trained-on is for models of others, and {source} is a run, which knows its images; "
            f"leave it out"
        )
    run = open_run(Path(source), device)
    return run.used(request.rule, request.batch_size)
