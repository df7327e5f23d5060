"""The manifest of a data folder: its image records as Parquet, hashed, in the split that is set."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from mmclip.data.collector import collector_paused
from mmclip.data.folder import (
    EXCLUDED_FILE,
    FORMAT,
    MANIFEST_FILE,
    META_FILE,
    ManifestError,
    read_built_meta,
    read_split,
    with_split,
    write_meta,
)
from mmclip.data.sample import (
    Entity,
    Excluded,
    Sample,
    Split,
)
from mmclip.data.versions import made_with
from mmclip.files import file_sha256, write_text_atomic

T = TypeVar("T")

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
        pa.field("image_id", pa.string(), nullable=False),
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


def data_hash(samples: Iterable[Sample], image_size: int | None, resize: str = "squash") -> str:
    """SHA-256 over all records, in order, image size and resizing: equal data, equal hash.

    Source: ours; a number without the hash of its data cannot be compared with another.
    """
    how = "" if resize == "squash" else f" resize={resize}"  # as before there was a choice
    digest = hashlib.sha256(f"mmclip-manifest-2 image_size={image_size}{how}\n".encode())
    encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
    names = [f.name for f in fields(Sample)]
    for sample in samples:
        known = {name: getattr(sample, name) for name in names}  # asdict: 4 times as long
        known["entities"] = [_entity_values(entity) for entity in sample.entities]
        known["labels"] = dict(sample.labels)
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


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """The records as an Arrow table of SCHEMA."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in SCHEMA.names}
    columns["labels"] = [list(sample.labels.items()) for sample in samples]
    columns["entities"] = [[_entity_values(e) for e in sample.entities] for sample in samples]
    columns["source_labels"] = [list(sample.source_labels) for sample in samples]
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> Iterator[Sample]:
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
    entity_of, text_of = _Entities(), _Once()
    for batch in table.to_batches(max_chunksize=BATCH_RECORDS):
        columns: dict[str, Iterable[object]] = {
            name: (map(text_of.__getitem__, values) if name in _REPEATED else values)
            for name in SCHEMA.names
            if name not in _NESTED
            for values in [batch.column(name).to_pylist()]
        }
        known, ends = _inner(batch.column("labels"))
        findings = map(text_of.__getitem__, known.field("key").to_pylist())
        labels = zip(findings, known.field("value").to_pylist(), strict=True)
        columns["labels"] = map(dict, _runs(labels, ends))
        said, ends = _inner(batch.column("source_labels"))
        columns["source_labels"] = map(tuple, _runs(said.to_pylist(), ends))
        found, ends = _inner(batch.column("entities"))
        columns["entities"] = map(tuple, _runs(_entities_of(found, text_of, entity_of), ends))
        for row in zip(*columns.values(), strict=True):
            yield Sample(**dict(zip(columns, row, strict=True)))


_NESTED = ("labels", "source_labels", "entities")

_REPEATED = ("source", "split", "view", "label_origin", "sex")
"""Columns of few different words."""


class _Once(dict[str | None, str | None]):
    """One object for each text: the same few words, millions of times, would fill the memory."""

    def __missing__(self, text: str | None) -> str | None:
        self[text] = text
        return text


MAX_ENTITIES = 1 << 18
"""Different entities that are kept at hand. [chosen: some 50 MB]"""


class _Entities(dict[tuple, Entity]):
    """One object for each different entity, which takes longer to make than to look up."""

    def __missing__(self, values: tuple) -> Entity:
        if len(self) >= MAX_ENTITIES:
            self.clear()
        entity = self[values] = Entity(*values)
        return entity


def _entities_of(found: pa.StructArray, text_of: _Once, entity_of: _Entities) -> Iterator[Entity]:
    """The entities of an Arrow array."""
    columns = [
        map(text_of.__getitem__, values) if pa.types.is_string(field.type) else values
        for field in _ENTITY
        if field.name != "cue"
        for values in [found.field(field.name).to_pylist()]
    ]
    cues, ends = _inner(found.field("cue"))
    spans = (tuple(span) or None for span in _runs(cues.to_pylist(), ends))
    return map(entity_of.__getitem__, zip(*columns, spans, strict=True))


def _inner(lists: pa.ListArray) -> tuple[pa.Array, list[int]]:
    """What lies in the lists of an Arrow array, one list after the other, and where each ends."""
    offsets = lists.offsets.to_numpy()
    first = int(offsets[0])
    return lists.values.slice(first, int(offsets[-1]) - first), (offsets[1:] - first).tolist()


def _runs(values: Iterable[T], ends: Sequence[int]) -> Iterator[list[T]]:
    """Some values in runs, by the ends of these."""
    whole, start = list(values), 0
    for end in ends:
        yield whole[start:end]
        start = end


def write_manifest(
    folder: Path,
    samples: Sequence[Sample],
    excluded: Sequence[Excluded],
    image_size: int | None,
    metadata: Mapping,
    n_split_by_source: int = 0,
    entities: Iterable[tuple[Entity, ...]] | None = None,
) -> dict:
    """Writes samples.parquet, excluded.jsonl and meta.json, each aside and then renamed, meta last.

    Args:
        folder: The data folder; made when absent.
        samples: Sound records, every one with a split.
        excluded: The rows that were left out.
        image_size: Side of the images in images.npy, or None for a text-only folder.
        metadata: Further facts for meta.json (reader, command, what found the entities, checksum of
            images.npy).
        n_split_by_source: Images that have their split from the source, and not from our draw.
        entities: Of each image, in place of its own; so many that they are not held in memory.

    Returns:
        The contents of meta.json.

    Raises:
        ManifestError: When an image has no split, or a patient is in two.
    """
    split_of = _split_of_patients(samples)
    folder.mkdir(parents=True, exist_ok=True)
    parquet = folder / (MANIFEST_FILE + ".tmp")
    n_with_report = sum(sample.report is not None for sample in samples)
    meta = {
        "format": FORMAT,
        **metadata,
        "made_with": made_with(
            metadata.get("reader"), metadata.get("entities") if n_with_report else None
        ),
        "image_size": image_size,
        "data_hash": data_hash(
            _written(parquet, samples, entities), image_size, metadata.get("resize", "squash")
        ),
        "manifest_sha256": file_sha256(parquet),
        "n_rows": len(samples) + len(excluded),
        "n_samples": len(samples),
        "n_excluded": len(excluded),
        "n_with_image": sum(sample.image is not None for sample in samples),
        "n_with_report": n_with_report,
        "n_paired": sum(
            sample.image is not None and sample.report is not None for sample in samples
        ),
        "n_studies": len({sample.study_id for sample in samples}),
        "n_patients": len(split_of),
        "splits": dict(sorted(Counter(sample.split for sample in samples).items(), key=str)),
        "n_split_by_source": n_split_by_source,
        "excluded": {str(r): n for r, n in Counter(e.reason for e in excluded).most_common()},
    }
    parquet.replace(folder / MANIFEST_FILE)
    write_excluded(folder, excluded)
    return write_meta(folder, meta)


def _split_of_patients(samples: Iterable[Sample]) -> dict[str, Split]:
    """The one split of each patient.

    Raises:
        ManifestError: When an image has no split, or a patient is in two.
    """
    split_of: dict[str, Split] = {}
    for sample in samples:
        if sample.split is None:
            raise ManifestError(f"image {sample.image_id} has no split; call assign_splits first")
        if split_of.setdefault(sample.patient_id, sample.split) != sample.split:
            raise ManifestError(
                f"patient {sample.patient_id} is in the splits {split_of[sample.patient_id]} and "
                f"{sample.split}; call validate first"
            )
    return split_of


def replace_images(folder: Path, samples: Sequence[Sample], metadata: Mapping) -> dict:
    """Writes other records of a finished folder's images, and says so in meta.json.

    Args:
        folder: The data folder.
        samples: As many as before and in the same order; their images, reports and splits stay.
        metadata: Further facts for meta.json.

    Returns:
        The contents of meta.json, with the new data hash.

    Raises:
        ManifestError: When the folder is unfinished.
    """
    meta = read_built_meta(folder)
    parquet = folder / (MANIFEST_FILE + ".tmp")
    digest = data_hash(
        _written(parquet, samples, None), meta["image_size"], meta.get("resize", "squash")
    )
    meta = {**meta, **metadata, "data_hash": digest, "manifest_sha256": file_sha256(parquet)}
    parquet.replace(folder / MANIFEST_FILE)
    return write_meta(folder, meta)


def write_excluded(folder: Path, excluded: Iterable[Excluded]) -> None:
    """Writes excluded.jsonl alone: what a build without a sound row leaves."""
    lines = "".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in excluded)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / EXCLUDED_FILE, lines)


def _written(
    path: Path, samples: Iterable[Sample], entities: Iterable[tuple[Entity, ...]] | None
) -> Iterator[Sample]:
    """Writes the records, some at a time, and gives them as they will be read: 54 as 54.0."""
    if entities is not None:
        samples = (replace(sample, entities=e) for sample, e in zip(samples, entities, strict=True))
    rest = iter(samples)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        while some := list(islice(rest, BATCH_RECORDS)):
            table = to_table(some)
            writer.write_table(table)
            yield from from_table(table)


def read_manifest(folder: Path) -> list[Sample]:
    """All records of a data folder, in the split that is set.

    Raises:
        ManifestError: When the folder is unfinished, or manifest or split were changed afterwards.
    """
    samples = read_built(folder)
    split = read_split(folder)
    return samples if split is None else with_split(samples, split)


@collector_paused()
def read_built(folder: Path) -> list[Sample]:
    """All records of a data folder as they were built, checked against the data hash in meta.json.

    Raises:
        ManifestError: When the folder is unfinished or its manifest was changed after the build.
    """
    meta = read_built_meta(folder)
    try:
        content = (folder / MANIFEST_FILE).read_bytes()
        samples = list(from_table(pq.read_table(pa.BufferReader(content))))
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(
            f"{folder / MANIFEST_FILE} is missing or damaged ({error}); build the folder again "
            f"with `mmclip data build`"
        ) from None
    # Equal bytes hold equal records. Others may do so too: of an older build, or compressed anew.
    is_same = hashlib.sha256(content).hexdigest() == meta.get("manifest_sha256")
    how = meta["image_size"], meta.get("resize", "squash")
    if not is_same and data_hash(samples, *how) != meta["data_hash"]:
        raise ManifestError(
            f"{folder / MANIFEST_FILE} is not the manifest that {META_FILE} describes (the data "
            f"hash differs); build the data folder again with `mmclip data build`"
        )
    return samples
