"""The film record and the manifest: what is known of each film, on disk as Parquet.

A data folder, as `mmclip data build` leaves it and every other command reads it:

    films.parquet    one row a film (or a text-only study), in the reader's order
    films.npy        uint8 [n, px, px]: row i is the i-th record that has an image (data/cache.py)
    excluded.jsonl   one line a row that was left out, with the reason
    meta.json        counts, film size, checksums and the data hash that travels with every result
    split.json       after `mmclip data split` only: a named split, read in place of the built one
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

Split = Literal["train", "val", "test"]
View = Literal["PA", "AP", "L", "unknown"]
Sex = Literal["F", "M"]

PRESENT, ABSENT, UNCERTAIN = 1, 0, -1
"""Values of a label. A finding that nobody looked for is unknown: it is not in the mapping."""

MANIFEST_FILE, EXCLUDED_FILE, META_FILE = "films.parquet", "excluded.jsonl", "meta.json"
SPLIT_FILE = "split.json"
SPLITS: tuple[Split, ...] = ("train", "val", "test")
"""In order: a film or patient that a list puts into several is read as in the last of them."""


class Reason(StrEnum):
    """Why a row was left out. The text is what a user reads in excluded.jsonl."""

    NO_ID = "the row has no film id"
    NO_PATIENT = "the row has no patient id"
    DUPLICATE_ID = "an earlier row has the same film id"
    BAD_VALUE = "a value of the row cannot be read"
    NOTHING_TO_LEARN = "the row has neither an image nor a report"
    NOT_FOR_USE = "the source itself says that the film is not for use"
    PATIENT_IN_TWO_SPLITS = "the patient is also in a split that is kept for evaluation"
    IMAGE_OUTSIDE_ROOT = "the image lies outside the root folder"
    IMAGE_MISSING = "the image file does not exist"
    IMAGE_EMPTY = "the image file has 0 bytes"
    IMAGE_UNREADABLE = "the file is no image that can be read"
    IMAGE_TRUNCATED = "the image ends before its last row"
    IMAGE_TOO_LARGE = "the image has more pixels than allowed"
    IMAGE_BLANK = "all pixels of the image are (nearly) equal"


EntityKind = Literal["finding", "anatomy", "modifier"]
EntityStatus = Literal["present", "negated", "uncertain"]


@dataclass(frozen=True, slots=True)
class Entity:
    """A mention of a concept: text[start:end] of the report.

    `status` says what the report claims of a finding; anatomy and modifiers are always "present".
    `cue` is the span of the words that deny or doubt it, None for "present". The cue may lie inside
    the entity ("heart is not enlarged").
    """

    start: int
    end: int
    kind: EntityKind
    concept: str
    status: EntityStatus = "present"
    cue: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """One film and all that is known of it; a study without a film has `image=None`.

    Films of one study share `study_id` and the report. `labels` maps a finding to PRESENT, ABSENT
    or UNCERTAIN; a finding that is not in it is unknown. `report` is what the text encoder reads:
    cleaned, and None, never "", when there is nothing to read; `entities` are spans of it.
    """

    film_id: str
    study_id: str
    patient_id: str
    source: str
    split: Split | None = None  # None until `assign_splits`
    image: str | None = None  # relative to the root folder, with "/" between parts
    view: View = "unknown"
    findings: str | None = None
    impression: str | None = None
    report: str | None = None
    entities: tuple[Entity, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    source_labels: tuple[str, ...] = ()  # in the source's own words
    age_years: float | None = None
    sex: Sex | None = None
    width_px: int | None = None  # of the file, before any resizing
    height_px: int | None = None
    image_sha256: str | None = None  # of the file's bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """A row that was left out: which, why, and the detail that helps to mend it."""

    row: int  # 0 is the first record of the source
    film_id: str
    reason: Reason
    detail: str = ""


Record = Film | Excluded
"""What a reader yields, one for each row of its source: nothing is dropped in silence."""

_ENTITY = pa.struct(
    [
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("concept", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("cue", pa.list_(pa.int32())),
    ]
)

SCHEMA = pa.schema(
    [
        pa.field("film_id", pa.string(), nullable=False),
        pa.field("study_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("image", pa.string()),
        pa.field("view", pa.string(), nullable=False),
        pa.field("findings", pa.string()),
        pa.field("impression", pa.string()),
        pa.field("report", pa.string()),
        pa.field("entities", pa.list_(_ENTITY), nullable=False),
        pa.field("labels", pa.map_(pa.string(), pa.int8()), nullable=False),
        pa.field("source_labels", pa.list_(pa.string()), nullable=False),
        pa.field("age_years", pa.float64()),
        pa.field("sex", pa.string()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("image_sha256", pa.string()),
    ]
)


class ManifestError(ValueError):
    """A data folder or a record breaks a rule; the message names the rule and the next step."""


def problem_of(film: Film) -> tuple[Reason, str] | None:
    """The first rule that a record breaks, with a detail, or None for a sound record."""
    if not film.film_id.strip():
        return Reason.NO_ID, ""
    if not film.patient_id.strip():
        return Reason.NO_PATIENT, ""
    if film.image is None and film.report is None:
        return Reason.NOTHING_TO_LEARN, ""
    if film.image is not None and "\0" in film.image:
        return Reason.BAD_VALUE, f"the image path {film.image!r} holds a NUL byte"
    if film.split is not None and film.split not in get_args(Split):
        return Reason.BAD_VALUE, f"split {film.split!r} is none of {', '.join(get_args(Split))}"
    if film.view not in get_args(View):
        return Reason.BAD_VALUE, f"view {film.view!r} is none of {', '.join(get_args(View))}"
    if film.report is not None and not film.report.strip():
        return Reason.BAD_VALUE, "the report is empty; a film without a report has report=None"
    bad = {k: v for k, v in film.labels.items() if v not in (PRESENT, ABSENT, UNCERTAIN)}
    if bad:
        return Reason.BAD_VALUE, f"labels {bad} are not 1 (present), 0 (absent) or -1 (uncertain)"
    return None


def validate(records: Iterable[Record]) -> tuple[list[tuple[int, Film]], list[Excluded]]:
    """Separates sound records from those that break a rule.

    The rules: an id of its own, a patient, an image or a report, known values, and no patient in
    two splits. Where a source names splits and one patient is in several, the films in the split
    used last (test, then val) stay and the others are excluded, so that nothing leaks.

    Returns:
        The sound films in order, each with its row, and the excluded rows in order. Their
        numbers add up to the number of records.
    """
    films: list[tuple[int, Film]] = []
    excluded: list[Excluded] = []
    seen: set[str] = set()
    split_of_patient: dict[str, Split] = {}
    for row, record in enumerate(records):
        if isinstance(record, Excluded):
            excluded.append(record)
            continue
        problem = problem_of(record)
        if problem is None and record.film_id in seen:
            problem = Reason.DUPLICATE_ID, ""
        if problem is not None:
            excluded.append(
                Excluded(row=row, film_id=record.film_id, reason=problem[0], detail=problem[1])
            )
            continue
        seen.add(record.film_id)
        films.append((row, record))
        if record.split is not None:
            known = split_of_patient.get(record.patient_id, record.split)
            split_of_patient[record.patient_id] = SPLITS[
                max(map(SPLITS.index, (known, record.split)))
            ]
    kept: list[tuple[int, Film]] = []
    for row, film in films:
        split = split_of_patient.get(film.patient_id)
        if film.split is not None and film.split != split:
            detail = f"split {film.split}, but the patient is also in {split}"
            excluded.append(
                Excluded(
                    row=row,
                    film_id=film.film_id,
                    reason=Reason.PATIENT_IN_TWO_SPLITS,
                    detail=detail,
                )
            )
        else:
            kept.append((row, film))
    return kept, sorted(excluded, key=lambda e: e.row)


def draw_split(key: str, seed: int, val_ratio: float, test_ratio: float) -> Split:
    """The split of a patient (or group of patients), by a hash of key and seed and nothing else.

    Raises:
        ValueError: When the ratios are negative or leave nothing to train on.
    """
    if val_ratio < 0 or test_ratio < 0 or val_ratio + test_ratio >= 1:
        raise ValueError(
            f"val_ratio={val_ratio} and test_ratio={test_ratio} must not be negative and must add "
            f"up to less than 1"
        )
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if u < test_ratio else "val" if u < test_ratio + val_ratio else "train"


def assign_splits(
    films: Sequence[Film], seed: int = 0, val_ratio: float = 0.1, test_ratio: float = 0.1
) -> list[Film]:
    """Gives every film without a split the split of its patient, drawn by a hash of the patient id.

    A patient who has a split already (given by the source for another film) keeps it. The draw
    depends on the patient id and the seed alone, so adding patients moves no other patient.

    Raises:
        ValueError: When the ratios are negative or leave nothing to train on.
    """
    given = {film.patient_id: film.split for film in films if film.split is not None}

    def draw(patient_id: str) -> Split:
        return draw_split(patient_id, seed, val_ratio, test_ratio)

    return [
        film
        if film.split is not None
        else replace(film, split=given.get(film.patient_id) or draw(film.patient_id))
        for film in films
    ]


def data_hash(films: Iterable[Film], film_px: int | None) -> str:
    """SHA-256 over all records, in order, and the film size: equal data, equal hash.

    Source: ours; a number without the hash of its data cannot be compared with another.
    """
    digest = hashlib.sha256(f"mmclip-manifest-1 film_px={film_px}\n".encode())
    for film in films:
        digest.update(json.dumps(asdict(film), sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def to_table(films: Sequence[Film]) -> pa.Table:
    """The records as an Arrow table of SCHEMA."""
    columns = {name: [getattr(film, name) for film in films] for name in SCHEMA.names}
    columns["labels"] = [list(film.labels.items()) for film in films]
    columns["entities"] = [[asdict(entity) for entity in film.entities] for film in films]
    columns["source_labels"] = [list(film.source_labels) for film in films]
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> Iterator[Film]:
    """The records of an Arrow table of SCHEMA.

    Raises:
        ManifestError: When the columns are not those of SCHEMA.
    """
    if table.schema.names != SCHEMA.names:
        missing = sorted(set(SCHEMA.names) - set(table.schema.names))
        unknown = sorted(set(table.schema.names) - set(SCHEMA.names))
        raise ManifestError(
            f"the manifest has other columns than this version writes (missing {missing}, "
            f"unknown {unknown}); build the data folder again with `mmclip data build`"
        )
    names = [f.name for f in fields(Film)]
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            row["labels"] = dict(row["labels"])
            row["entities"] = tuple(
                Entity(**{**e, "cue": None if e["cue"] is None else tuple(e["cue"])})
                for e in row["entities"]
            )
            row["source_labels"] = tuple(row["source_labels"])
            yield Film(**{name: row[name] for name in names})


def write_manifest(
    folder: Path,
    films: Sequence[Film],
    excluded: Sequence[Excluded],
    film_px: int | None,
    about: Mapping,
    n_split_by_source: int = 0,
) -> dict:
    """Writes films.parquet, excluded.jsonl and meta.json, each aside and then renamed, meta last.

    Args:
        folder: The data folder; made when absent.
        films: Sound records, every one with a split.
        excluded: The rows that were left out.
        film_px: Side of the films in films.npy, or None for a text-only folder.
        about: Further facts for meta.json (source, command, checksum of films.npy).
        n_split_by_source: Films that have their split from the source, and not from our draw.

    Returns:
        The contents of meta.json.

    Raises:
        ManifestError: When a film has no split, or a patient is in two.
    """
    split_of: dict[str, Split | None] = {}
    for film in films:
        if film.split is None:
            raise ManifestError(f"film {film.film_id} has no split; call assign_splits first")
        if split_of.setdefault(film.patient_id, film.split) != film.split:
            raise ManifestError(
                f"patient {film.patient_id} is in the splits {split_of[film.patient_id]} and "
                f"{film.split}; call validate first"
            )
    table = to_table(films)
    meta = {
        "format": 1,
        **about,
        "film_px": film_px,
        # Over the records as they will be read: an age of 54 comes back as 54.0.
        "data_hash": data_hash(from_table(table), film_px),
        "n_rows": len(films) + len(excluded),
        "n_films": len(films),
        "n_excluded": len(excluded),
        "n_with_image": sum(film.image is not None for film in films),
        "n_with_report": sum(film.report is not None for film in films),
        "n_paired": sum(film.image is not None and film.report is not None for film in films),
        "n_studies": len({film.study_id for film in films}),
        "n_patients": len(split_of),
        "splits": dict(sorted(Counter(film.split for film in films).items(), key=str)),
        "n_split_by_source": n_split_by_source,
        "excluded": {str(r): n for r, n in Counter(e.reason for e in excluded).most_common()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    parquet = folder / (MANIFEST_FILE + ".tmp")
    pq.write_table(table, parquet, compression="zstd")
    parquet.replace(folder / MANIFEST_FILE)
    lines = "".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in excluded)
    write_text_atomic(folder / EXCLUDED_FILE, lines)
    write_text_atomic(folder / META_FILE, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    return meta


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
    about = {key: split[key] for key in known}
    taken = {key: split[key] for key in ("data_hash", "n_patients", "splits")}
    return {**meta, **taken, "split": about}


def read_built_meta(folder: Path) -> dict:
    """meta.json as the build left it."""
    path = folder / META_FILE
    if not path.is_file():
        raise ManifestError(
            f"{folder} is no finished data folder ({META_FILE} is missing); "
            f"make one with `mmclip data build`"
        )
    try:
        meta = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ManifestError(
            f"{path} is damaged ({error}); build the folder again with `mmclip data build`"
        ) from None
    if "film_px" not in meta:  # a checkpoint has a file of this name, too
        raise ManifestError(
            f"{folder} is no finished data folder ({path} describes something else); make one "
            f"with `mmclip data build`"
        )
    return meta


def split_checksum(split: Mapping) -> str:
    """Over all that split.json holds but the checksum itself."""
    rest = {key: value for key, value in split.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_split(folder: Path) -> dict | None:
    """split.json of a data folder as `splits.set_split` leaves it, or None where none is set.

    Raises:
        ManifestError: When it is damaged, or of another build of the folder.
    """
    path = folder / SPLIT_FILE
    again = "set it again with `mmclip data split`, or remove the file to have the built one"
    try:
        split = json.loads(path.read_text("utf-8"))
        is_whole = split["sha256"] == split_checksum(split)
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


def last_split(films: Mapping[str, Iterable[str]]) -> dict[str, Split]:
    """The one split of each film; the last one where a list names it in several.

    Args:
        films: Film ids of each split.
    """
    return {film_id: split for split in SPLITS for film_id in films.get(split, ())}


def with_split(films: Iterable[Film], split: Mapping) -> list[Film]:
    """The films as a named split sees them: a film that it does not name is in no split.

    Args:
        films: As built.
        split: Its `films`, and `patients`: other patient ids by film id.
    """
    known, patients = last_split(split["films"]), split["patients"]
    return [
        replace(
            film,
            split=known.get(film.film_id),
            patient_id=patients.get(film.film_id, film.patient_id),
        )
        for film in films
    ]


def read_manifest(folder: Path) -> list[Film]:
    """All records of a data folder, in the split that is set.

    Raises:
        ManifestError: When the folder is unfinished, or manifest or split were changed afterwards.
    """
    films = read_built(folder)
    split = read_split(folder)
    return films if split is None else with_split(films, split)


def read_built(folder: Path) -> list[Film]:
    """All records of a data folder as they were built, checked against the data hash in meta.json.

    Raises:
        ManifestError: When the folder is unfinished or its manifest was changed after the build.
    """
    meta = read_built_meta(folder)
    try:
        films = list(from_table(pq.read_table(folder / MANIFEST_FILE)))
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(
            f"{folder / MANIFEST_FILE} is missing or damaged ({error}); build the folder again "
            f"with `mmclip data build`"
        ) from None
    if data_hash(films, meta["film_px"]) != meta["data_hash"]:
        raise ManifestError(
            f"{folder / MANIFEST_FILE} is not the manifest that {META_FILE} describes (the data "
            f"hash differs); build the data folder again with `mmclip data build`"
        )
    return films


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a text file aside and renames it, so that a reader never sees half of it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, "utf-8")
    aside.replace(path)
