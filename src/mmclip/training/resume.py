"""Whether a run can go on, and what keeps it from that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmclip.checkpoint import CheckpointError, checkpoint_meta, newest_checkpoint
from mmclip.config import Config


def resumable(
    run: Path, config: Config, facts: Mapping[str, Any], wants_to_resume: bool
) -> Path | None:
    """The checkpoint to go on from; None where there is none yet.

    Args:
        run: The run's folder.
        config: With its length in steps.
        facts: Of the data and the command.
        wants_to_resume: A run is never trained over.

    Raises:
        CheckpointError: When there is one and it is not wanted, or its run differs; says in what.
    """
    try:
        found = newest_checkpoint(run)
    except CheckpointError:
        return None  # killed before the first checkpoint, or new: either way from the start
    if not wants_to_resume:
        raise CheckpointError(
            f"{run} already holds a run ({found.name}); add --resume to go on with it, or "
            f"choose another --out"
        )
    theirs = checkpoint_meta(found)
    # A key that an earlier version did not know means its default.
    was = flat(Config().model_dump(mode="json")) | flat(theirs["config"])
    now = flat(config.model_dump(mode="json"))
    changed = [
        f"{key} was {was.get(key, 'not there')}, is {now.get(key, 'not there')}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{run} was trained with another config: {'; '.join(changed)}; resume with the "
            f"same one, or choose another --out"
        )
    if theirs["data_hash"] != facts["data_hash"]:
        raise CheckpointError(
            f"{run} was trained with other data ({theirs['data_hash'][:12]}, now "
            f"{facts['data_hash'][:12]}); resume with the same folders, or choose another --out"
        )
    if theirs["shuffle_pairs"] != facts["shuffle_pairs"]:
        how = "with" if theirs["shuffle_pairs"] else "without"
        raise CheckpointError(
            f"{run} was trained {how} --shuffle-pairs; resume {how} it, or choose another --out"
        )
    return found


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration by their full keys, such as "train.steps"."""
    out: dict[str, Any] = {}

    def walk(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                out[prefix + key] = value if isinstance(value, int | float | str) else str(value)

    walk("", config)
    return out
