"""What made a data folder, as far as it decides labels and entities, and whether it still is so.

A folder keeps its labels and entities while the lists of words in the package go on: a name of a
finding changes, or a word of the lexicon comes in. So it notes what it was made with.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache

import mmclip
from mmclip.config_io import packaged_names, read_toml

WORDS_OF = {
    "chexpert-plus": "chexpert",
    "mimic-cxr": "chexpert",
    "mimic-cxr-jpg": "chexpert",
    "montgomery": "nlm_tb",
    "shenzhen": "nlm_tb",
}
"""Readers whose label words stand in the file of another name, in findings/."""


def made_with(reader: str | None, finder: str | None) -> dict:
    """What labels and entities of a build depend on, for meta.json.

    Args:
        reader: Of the build; "csv" and None have no label words in the package.
        finder: Of the entities, see `entities.EntityFinder`; None where there was no report.

    Returns:
        The version of mmclip, that of the vocabulary of findings, and the SHA-256 of each list of
        words that was used: of what it says, so that a comment changes nothing.
    """
    words = WORDS_OF.get(reader or "", reader)
    used = [f"findings/{words}"] if words in packaged_names("findings") else []
    if finder == "lexicon":
        used += [f"lexicon/{name}" for name in packaged_names("lexicon")]
    elif finder is not None:
        used.append("lexicon/cues")
    return {
        "mmclip": mmclip.__version__,
        "vocabulary": _read("findings/vocabulary")["version"],
        "words": {name: _sha256(name) for name in used},
    }


def changed_since(meta: Mapping) -> list[str]:
    """What of the package has changed since a data folder was made, so that it reads otherwise.

    Args:
        meta: The folder's meta.json.
    """
    then = meta["made_with"]
    now = made_with(meta.get("reader"), meta.get("entities") if meta["n_with_report"] else None)
    names = {**then["words"], **now["words"]}
    changed = [f"{n}.toml" for n in names if then["words"].get(n) != now["words"].get(n)]
    if then["vocabulary"] != now["vocabulary"]:
        changed.append(
            f"findings/vocabulary.toml (version {then['vocabulary']}, now {now['vocabulary']})"
        )
    return sorted(changed)


def _read(name: str) -> dict:
    folder, _, file = name.partition("/")
    return read_toml("list of words", folder, file)


@cache
def _sha256(name: str) -> str:
    return hashlib.sha256(json.dumps(_read(name), sort_keys=True).encode()).hexdigest()
