"""The manifest of a data folder: its film records as Parquet, hashed, in the split that is set."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from sys import intern

import pyarrow as pa
import pyarrow.parquet as pq

from mmclip.data.folder import (
    EXCLUDED_FILE,
    FORMAT,
    MANIFEST_FILE,
    META_FILE,
    ManifestError,
    read_built_meta,
    read_split,
    with_split,
    write_text_atomic,
)
from mmclip.data.records import (
    Entity,
    Excluded,
    Film,
    Split,
)
from mmclip.data.versions import made_with

BATCH_RECORDS = 4096
"""Records that are on their way to or from the disk at a time. [chosen: 30 MB, with entities]"""

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
        pa.field("label_origin", pa.string()),
        pa.field("age_years", pa.float64()),
        pa.field("sex", pa.string()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("image_sha256", pa.string()),
    ]
)


def data_hash(films: Iterable[Film], film_px: int | None) -> str:
    """SHA-256 over all records, in order, and the film size: equal data, equal hash.

    A film of unknown `label_origin` hashes as before that field was there, in format 1 of the
    folder, so that the same data keeps its hash.

    Source: ours; a number without the hash of its data cannot be compared with another.
    """
    digest = hashlib.sha256(f"mmclip-manifest-1 film_px={film_px}\n".encode())
    encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
    names = [f.name for f in fields(Film)]
    for film in films:
        known = {name: getattr(film, name) for name in names}  # asdict: 4 times as long
        known["entities"] = [_entity_values(entity) for entity in film.entities]
        known["labels"] = dict(film.labels)
        if film.label_origin is None:
            del known["label_origin"]
        digest.update(encode(known).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _entity_values(entity: Entity) -> dict[str, object]:
    return {
        "start": entity.start,
        "end": entity.end,
        "kind": entity.kind,
        "concept": entity.concept,
        "status": entity.status,
        "cue": entity.cue,
    }


def to_table(films: Sequence[Film]) -> pa.Table:
    """The records as an Arrow table of SCHEMA."""
    columns = {name: [getattr(film, name) for film in films] for name in SCHEMA.names}
    columns["labels"] = [list(film.labels.items()) for film in films]
    columns["entities"] = [[_entity_values(e) for e in film.entities] for film in films]
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
    for batch in table.to_batches(max_chunksize=BATCH_RECORDS):
        for row in batch.to_pylist():
            # Interned: the same few words, millions of times, would fill the memory.
            row["labels"] = {intern(finding): value for finding, value in row["labels"]}
            for e in row["entities"]:
                e["cue"] = None if e["cue"] is None else tuple(e["cue"])
                for name in ("kind", "concept", "status"):
                    e[name] = intern(e[name])
            row["entities"] = tuple(Entity(**e) for e in row["entities"])
            row["source_labels"] = tuple(row["source_labels"])
            yield Film(**{name: row[name] for name in names})


def write_manifest(
    folder: Path,
    films: Sequence[Film],
    excluded: Sequence[Excluded],
    film_px: int | None,
    about: Mapping,
    n_split_by_source: int = 0,
    entities: Iterable[tuple[Entity, ...]] | None = None,
) -> dict:
    """Writes films.parquet, excluded.jsonl and meta.json, each aside and then renamed, meta last.

    Args:
        folder: The data folder; made when absent.
        films: Sound records, every one with a split.
        excluded: The rows that were left out.
        film_px: Side of the films in films.npy, or None for a text-only folder.
        about: Further facts for meta.json (reader, command, what found the entities, checksum of
            films.npy).
        n_split_by_source: Films that have their split from the source, and not from our draw.
        entities: Of each film, in place of its own; so many that they are not held in memory.

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
    folder.mkdir(parents=True, exist_ok=True)
    parquet = folder / (MANIFEST_FILE + ".tmp")
    n_with_report = sum(film.report is not None for film in films)
    meta = {
        "format": FORMAT,
        **about,
        "made_with": made_with(
            about.get("reader"), about.get("entities") if n_with_report else None
        ),
        "film_px": film_px,
        "data_hash": data_hash(_written(parquet, films, entities), film_px),
        "n_rows": len(films) + len(excluded),
        "n_films": len(films),
        "n_excluded": len(excluded),
        "n_with_image": sum(film.image is not None for film in films),
        "n_with_report": n_with_report,
        "n_paired": sum(film.image is not None and film.report is not None for film in films),
        "n_studies": len({film.study_id for film in films}),
        "n_patients": len(split_of),
        "splits": dict(sorted(Counter(film.split for film in films).items(), key=str)),
        "n_split_by_source": n_split_by_source,
        "excluded": {str(r): n for r, n in Counter(e.reason for e in excluded).most_common()},
    }
    parquet.replace(folder / MANIFEST_FILE)
    lines = "".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in excluded)
    write_text_atomic(folder / EXCLUDED_FILE, lines)
    write_text_atomic(folder / META_FILE, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    return meta


def _written(
    path: Path, films: Iterable[Film], entities: Iterable[tuple[Entity, ...]] | None
) -> Iterator[Film]:
    """Writes the records, some at a time, and gives them as they will be read: 54 as 54.0."""
    if entities is not None:
        films = (replace(film, entities=e) for film, e in zip(films, entities, strict=True))
    rest = iter(films)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        while some := list(islice(rest, BATCH_RECORDS)):
            table = to_table(some)
            writer.write_table(table)
            yield from from_table(table)


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
