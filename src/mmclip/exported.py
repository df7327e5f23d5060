"""What `mmclip export` says of the folder that it wrote, by which the folder is found whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmclip.files import OWN_PREFIX, file_sha256, sealed, unsealed, verified_sha256

FACTS_FILE = "mmclip.json"
FORMAT = 2
"""1 had no checksums."""

FREE_TO_CHANGE = (".md", ".gitattributes", ".gitignore")
"""Endings of files that anybody may write: the model card is for its reader to fill in."""

READ_BY_LOADERS = (
    ".json",
    ".safetensors",
    ".bin",
    ".pt",
    ".txt",
    ".model",
    ".onnx",
    ".data",
    ".py",
)
"""Endings of what a library would read, too, if it were put there."""


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes what is known of an export, with the checksum of each of its files, after them.

    Args:
        folder: Whole otherwise.
        facts: Plain values.
    """
    files = {name: file_sha256(folder / name) for name in _files(folder)}
    whole = sealed({"format": FORMAT, **facts, "files": files})
    text = json.dumps(whole, indent=2, sort_keys=True)
    (folder / FACTS_FILE).write_text(text + "\n", "utf-8")


def why_not_whole(folder: Path) -> str | None:
    """Why a folder is not as `mmclip export` left it, with the next step.

    Returns:
        None where it is, and where the folder is no export, or of a version without checksums.
    """
    again = "export the run again"
    path = folder / FACTS_FILE
    if not path.is_file():
        return None
    try:
        facts = dict(json.loads(path.read_text("utf-8")))
        if facts.get("format") == 1:
            return None
        listed = unsealed(facts)["files"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{path} is damaged ({error}); {again}"
    for name, sha256 in listed.items():
        if not (folder / name).is_file() or verified_sha256(folder / name) != sha256:
            return (
                f"{folder / name} is missing or was changed since it was exported (its checksum "
                f"differs from {FACTS_FILE}); {again}"
            )
    for name in _files(folder):
        if name not in listed and name.endswith(READ_BY_LOADERS):
            return f"{folder / name} is no file of this export ({FACTS_FILE} lists them); remove it"
    return None


def _files(folder: Path) -> list[str]:
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return sorted(
        name
        for name in names
        if name != FACTS_FILE
        and not name.endswith(FREE_TO_CHANGE)
        and not name.startswith((OWN_PREFIX, ".git/", ".cache/"))
    )
