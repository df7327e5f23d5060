"""The files of a data folder, and the two of them that are JSON.

A data folder, as `mmclip data build` leaves it and every other command reads it:

    samples.parquet    one row per image (or a text-only study), in the reader's order
    images.npy        uint8 [n, px, px]: row i is the i-th record that has an image (data/cache.py)
    excluded.jsonl   one line a row that was left out, with the reason
    meta.json        counts, image size, checksums, and the data hash that travels with every result
    split.json       after `mmclip data split` only: a named split, read in place of the built one
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from mmclip.data.sample import SPLITS, Sample, Split
from mmclip.files import OWN_PREFIX, is_sealed, other_format, sealed, write_text_atomic

MANIFEST_FILE, EXCLUDED_FILE, META_FILE = "samples.parquet", "excluded.jsonl", "meta.json"
SPLIT_FILE = "split.json"

FORMAT = 4
"""Of a data folder, in meta.json: 4 has a checksum of meta.json itself."""


class ManifestError(ValueError):
    """A data folder or a record breaks a rule; the message names the rule and the next step."""


def read_meta(folder: Path) -> dict:
    """meta.json of a data folder; where a named split is set, with its counts and data hash.

    Raises:
        ManifestError: When the folder is no finished data folder, or its split is not of it.
    """
    meta = read_built_meta(folder)
    split = read_split(folder)
    if split is None:
        return meta
    known = ("name", "seed", "split_hash", "warnings")
    metadata = {key: split[key] for key in known}
    taken = {key: split[key] for key in ("data_hash", "n_patients", "splits")}
    return {**meta, **taken, "split": metadata}


def read_built_meta(folder: Path) -> dict:
    """meta.json as the build left it.

    Raises:
        ManifestError: When the folder is no finished data folder, or of another format.
    """
    path = folder / META_FILE
    if not path.is_file():
        why = f"{META_FILE} is missing" if folder.is_dir() else "there is no such folder"
        raise ManifestError(f"{folder} is no finished data folder ({why}); {_next_step(folder)}")
    try:
        meta = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ManifestError(
            f"{path} is damaged ({error}); build the folder again with `mmclip data build`"
        ) from None
    if (
        not isinstance(meta, dict) or "step" in meta or "data_hash" not in meta
    ):  # a checkpoint has a file of this name, too
        raise ManifestError(
            f"{folder} is no finished data folder ({path} describes something else); "
            f"{_next_step(folder)}"
        )
    if meta.get("format") != FORMAT:
        again = "build the folder again with `mmclip data build ... --overwrite`"
        raise ManifestError(f"{folder} {other_format(meta.get('format'), FORMAT, again)}")
    if not is_sealed(meta):
        raise ManifestError(
            f"{path} was changed since it was written (its checksum differs); build the folder "
            f"again with `mmclip data build ... --overwrite`"
        )
    return meta


def write_meta(folder: Path, meta: Mapping) -> dict:
    """Writes meta.json with a checksum of itself, and returns what it holds."""
    whole = sealed(meta)
    text = json.dumps(whole, indent=2, ensure_ascii=False)
    write_text_atomic(folder / META_FILE, text + "\n")
    return whole


def _next_step(folder: Path) -> str:
    """What to give in place of a folder that is no data folder: one inside it, such as a demo's."""
    inside = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST_FILE}"))]
    finished = [path for path in inside if (path / META_FILE).is_file()]
    if not finished:
        return "make one with `mmclip data build`"
    return f"did you mean {finished[0]}, which is one?"


def check_place(
    out: Path,
    ours: Collection[str],
    what: str = "other things",
    remedy: str = "name a new or empty folder by --out",
) -> None:
    """Refuses to write into a folder of other things, such as images, with nothing of ours in it.

    Args:
        out: The folder; it may be missing or empty.
        ours: Names of files and folders that are left there.
        what: It holds, for the error.
        remedy: The next step.

    Raises:
        ManifestError: When it holds other things alone, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise ManifestError(f"{out} is a file; name the folder to make by --out")
    there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    there = [name for name in there if not name.startswith(OWN_PREFIX)]
    if there and not set(ours) & set(there):
        raise ManifestError(f"{out} holds {what}, such as {there[0]}; {remedy}")


def is_built(folder: Path) -> bool:
    """Whether a folder holds a finished build that this version reads."""
    try:
        read_built_meta(folder)
    except ManifestError:
        return False
    return True


def read_split(folder: Path) -> dict | None:
    """split.json of a data folder as `splits.set_split` leaves it, or None where none is set.

    Raises:
        ManifestError: When it is damaged, or of another build of the folder.
    """
    path = folder / SPLIT_FILE
    again = "set it again with `mmclip data split`, or remove the file to have the built one"
    try:
        split = json.loads(path.read_text("utf-8"))
        is_whole = is_sealed(split)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise ManifestError(f"{path} is damaged ({error!r}); {again}") from None
    if not is_whole:
        raise ManifestError(f"{path} was changed by hand (its checksum differs); {again}")
    built = read_built_meta(folder)["data_hash"]
    if split["built_hash"] != built:
        raise ManifestError(
            f"{path} is of another build of the folder (data hash {split['built_hash'][:12]}, now "
            f"{built[:12]}); {again}"
        )
    return split


def write_split(folder: Path, split: dict) -> dict:
    """Writes split.json with a checksum, and returns what it holds."""
    whole = sealed(split)
    write_text_atomic(folder / SPLIT_FILE, json.dumps(whole, ensure_ascii=False) + "\n")
    return whole


def last_split(samples: Mapping[str, Iterable[str]]) -> dict[str, Split]:
    """The one split of each image; the last one where a list names it in several.

    Args:
        samples: Image ids of each split.
    """
    return {image_id: split for split in SPLITS for image_id in samples.get(split, ())}


def with_split(samples: Iterable[Sample], split: Mapping) -> list[Sample]:
    """The images as a named split sees them: an image that it does not name is in no split.

    Args:
        samples: As built.
        split: Its `samples`, and `patients`: other patient ids by image id.
    """
    known, patients = last_split(split["images"]), split["patients"]
    return [
        replace(
            sample,
            split=known.get(sample.image_id),
            patient_id=patients.get(sample.image_id, sample.patient_id),
        )
        for sample in samples
    ]
