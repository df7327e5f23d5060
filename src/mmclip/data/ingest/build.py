"""From the records of a reader to a data folder: check, decode once, search, split, write."""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cache, partial
from importlib import resources
from itertools import compress
from pathlib import Path

from mmclip.config import ResizeMode
from mmclip.data.cache import IMAGES_FILE, SHARDS_FOLDER, ImageFacts, decode_images, join_images
from mmclip.data.entities import find_entities
from mmclip.data.folder import (
    EXCLUDED_FILE,
    MANIFEST_FILE,
    META_FILE,
    SPLIT_FILE,
    ManifestError,
    check_place,
    read_meta,
)
from mmclip.data.ingest.shards import Shard, ShardContent, Work, Workers, do_chunks, read_facts
from mmclip.data.manifest import write_excluded, write_manifest
from mmclip.data.sample import (
    Entity,
    Excluded,
    Reason,
    Record,
    Sample,
    assign_splits,
    validate,
)
from mmclip.data.versions import made_with

ENTITY_SHARDS_FOLDER = "entities.shards"

CHUNK_REPORTS = 1024
"""Records a chunk whose reports are searched. [chosen: a second of work for the lexicon, a minute
for a large model]"""

logger = logging.getLogger(__name__)

FEW_REPORTS_RATIO = 0.5
"""Fewer reports than this with a finding or a place make a build warn. [chosen]"""


def build_data(
    records: Iterable[Record],
    root: Path,
    out: Path,
    *,
    image_size: int,
    seed: int = 0,
    val_ratio: float = 0.1,
    test_ratio: float = 0.1,
    workers: Workers = 1,
    entities: str = "lexicon",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    hides_paths: bool = False,
    resize: ResizeMode = "squash",
) -> dict:
    """Builds a data folder; what was left out stands in excluded.jsonl, and the counts add up.

    A build that was killed goes on where it was, and so does one of which `build_shard` did a part.
    The same source gives the same bytes and hash, whoever works.

    Args:
        records: Of a reader, one a row.
        root: The folder that `Sample.image` is relative to.
        out: The data folder.
        image_size: Side of the cached images.
        seed: Of the splits, where the source has none.
        val_ratio: Of the patients without a split.
        test_ratio: Of the patients without a split.
        workers: Processes that decode and search, or the address of a Dask scheduler.
        entities: What finds the entities of the reports; see `entities.EntityFinder`.
        metadata: Further facts for meta.json (reader, command).
        overwrite: Replace a finished build.
        hides_paths: Write each image's id in place of its path, which may name a patient.
        resize: How images become squares.

    Returns:
        The contents of meta.json.

    Raises:
        ManifestError: When no row is sound, `out` holds a finished build and `overwrite` is
            False, or it holds other things than a build.
        WorkersError: When the workers cannot be had, or died.
    """
    _check_is_ours(out)
    if (out / META_FILE).is_file() and not overwrite:
        raise ManifestError(
            f"{_finished(out)}; add --overwrite to build it again, or choose another --out"
        )
    samples, excluded = _readable(
        records, root, hides_paths
    )  # first: a source that fails replaces no build
    (out / META_FILE).unlink(missing_ok=True)  # from here on the folder is unfinished
    (out / SPLIT_FILE).unlink(missing_ok=True)  # of the build that is replaced
    _do_all(
        [sample for _, sample in samples], root, out, image_size, entities, workers, None, resize
    )
    n_images = sum(sample.image is not None for _, sample in samples)
    facts: Sequence[ImageFacts] = ()
    checksum = None
    if n_images:
        facts, checksum = join_images(n_images, out, image_size)
    else:
        (out / IMAGES_FILE).unlink(missing_ok=True)  # of the build that is replaced
    known = iter(facts)
    kept: list[Sample] = []
    is_kept: list[bool] = []
    for row, sample in samples:
        fact = ImageFacts() if sample.image is None else next(known)
        is_kept.append(fact.reason is None)
        if fact.reason is not None:
            excluded.append(_left_out(row, sample, fact.reason, fact.detail))
        elif sample.image is None:
            kept.append(sample)
        else:
            size = {"width_px": fact.width_px, "height_px": fact.height_px}
            image = f"{sample.image_id}.dcm" if hides_paths else sample.image
            kept.append(replace(sample, **size, image=image, image_sha256=fact.sha256))
    excluded.sort(key=lambda e: e.row)
    if not kept:
        write_excluded(out, excluded)
        raise ManifestError(f"nothing is left of {root}{_why_nothing(excluded, out)}")
    found = _entities_of([sample.report for _, sample in samples], out)
    counts = Counter[str]()
    meta = write_manifest(
        out,
        assign_splits(kept, seed, val_ratio, test_ratio),
        excluded,
        image_size if n_images else None,
        {**(metadata or {}), "resize": resize, "entities": entities, "images_sha256": checksum},
        n_split_by_source=sum(sample.split is not None for sample in kept),
        entities=_counted(kept, compress(found, is_kept), counts),
    )
    _warn_if_not_english(counts, entities)
    for shards in (SHARDS_FOLDER, ENTITY_SHARDS_FOLDER):
        shutil.rmtree(out / shards, ignore_errors=True)  # what is left of them does no harm
    return meta


def _counted(
    samples: Iterable[Sample], found: Iterable[tuple[Entity, ...]], counts: Counter[str]
) -> Iterator[tuple[Entity, ...]]:
    """The entities of each image, while reports and those with a finding or a place are counted."""
    for sample, entities in zip(samples, found, strict=True):
        counts["reports"] += sample.report is not None
        counts["known"] += any(e.kind != "modifier" for e in entities)
        yield entities


def _warn_if_not_english(counts: Counter[str], backend: str) -> None:
    """Warns where few reports have an entity, as reports in another language than English do."""
    if counts["known"] < FEW_REPORTS_RATIO * counts["reports"]:
        logger.warning(
            "only %d of %d reports have a finding or a place that %r knows (%.0f %%); it reads "
            "English radiology reports: for another language name a model by --entities hf:NAME, "
            "and do not rely on what these reports deny or on labels derived from them",
            counts["known"], counts["reports"], backend,
            100 * counts["known"] / counts["reports"],
        )  # fmt: skip


def _why_nothing(excluded: Sequence[Excluded], out: Path) -> str:
    if not excluded:
        return ": the source has no rows"
    reason, n = Counter(e.reason for e in excluded).most_common(1)[0]
    detail = next((e.detail for e in excluded if e.reason == reason and e.detail), "")
    example = f" (such as: {detail})" if detail else ""
    return f"; {n} of {len(excluded)} rows: {reason}{example}; all are in {out / EXCLUDED_FILE}"


def build_shard(
    records: Iterable[Record],
    root: Path,
    out: Path,
    shard: Shard,
    *,
    image_size: int,
    workers: Workers = 1,
    entities: str = "lexicon",
    resize: ResizeMode = "squash",
) -> None:
    """Does a share of the decoding and searching of `build_data`, which then takes it up.

    All shards may run at once, on machines that see `root` and `out` at the same path.

    Args:
        records: All of them, as for `build_data`.
        root: As there; so are the others.
        shard: Which share.

    Raises:
        ManifestError: When `out` holds a finished build, which a shard never replaces, or other
            things.
        WorkersError: When the workers cannot be had, or died.
    """
    _check_is_ours(out)
    if (out / META_FILE).is_file():
        raise ManifestError(
            f"{_finished(out)}, which a shard never replaces; remove it, or choose another --out"
        )
    samples, _ = _readable(records, root)
    _do_all(
        [sample for _, sample in samples], root, out, image_size, entities, workers, shard, resize
    )


def _check_is_ours(out: Path) -> None:
    """A build leaves its files in a folder, and may remove some."""
    check_place(
        out,
        (MANIFEST_FILE, IMAGES_FILE, EXCLUDED_FILE, SHARDS_FOLDER, ENTITY_SHARDS_FOLDER),
        what="other things than a data folder",
        remedy="name a new or empty folder by --out (--root is where the images are)",
    )


def _finished(out: Path) -> str:
    return f"{out} already holds a finished build of {read_meta(out)['n_samples']} rows"


def _readable(
    records: Iterable[Record], root: Path, hides_paths: bool = False
) -> tuple[list[tuple[int, Sample]], list[Excluded]]:
    """The sound records with an image inside the root or with none, and the others."""
    sound, excluded = validate(records)
    samples: list[tuple[int, Sample]] = []
    is_inside = _inside(root)
    for row, sample in sound:
        if sample.image is None or is_inside(sample.image):
            samples.append((row, sample))
        else:
            where = "" if hides_paths else sample.image
            excluded.append(_left_out(row, sample, Reason.IMAGE_OUTSIDE_ROOT, where))
    return samples, excluded


def _do_all(
    samples: Sequence[Sample],
    root: Path,
    out: Path,
    image_size: int,
    entities: str,
    workers: Workers,
    shard: Shard | None = None,
    resize: ResizeMode = "squash",
) -> None:
    """Leaves the shards of all images and reports, or some of them."""
    images = [sample.image for sample in samples if sample.image is not None]
    if images:
        decode_images(root, images, out, image_size, workers, shard, resize)
    search_reports([sample.report for sample in samples], out, entities, workers, shard)


# -- entities, in chunks --


def search_reports(
    reports: Sequence[str | None],
    out: Path,
    backend: str = "lexicon",
    workers: Workers = 1,
    shard: Shard | None = None,
) -> None:
    """Finds the entities of all reports in chunks, into out/entities.shards, for `build_data`.

    Args:
        reports: Of the sound records, in their order.
        out: The data folder.
        backend: As for `entities.EntityFinder`. A spaCy or Hugging Face model that is replaced
            under its name while a build is unfinished is not noticed.
        workers: Processes, or the address of a Dask scheduler.
        shard: Search only this share of the chunks.

    Raises:
        WorkersError: When the workers cannot be had, or died.
    """
    if all(report is None for report in reports):
        return
    if backend.startswith("hf:") and isinstance(workers, int):
        workers = 1  # such a model takes all cores by itself
    work = Work(partial(_fingerprint, backend=backend), partial(_find, backend=backend))
    shards = out / ENTITY_SHARDS_FOLDER
    do_chunks(shards, reports, CHUNK_REPORTS, work, "finding entities", workers, shard)


def _distinct(reports: Iterable[str | None]) -> list[str]:
    """Equal reports of a chunk, such as of one study, are searched once."""
    return list(dict.fromkeys(report for report in reports if report is not None))


def _fingerprint(reports: Sequence[str | None], backend: str) -> str:
    """Changes with the reports, the backend's name, the lexicon and the code that searches."""
    digest = hashlib.sha256(f"{backend} {_finder_version(backend)}".encode())
    for report in _distinct(reports):
        digest.update(f"{report}\0".encode())
    return digest.hexdigest()


@cache
def _finder_version(backend: str) -> str:
    words = json.dumps(made_with(None, backend)["words"])
    folder = resources.files("mmclip") / "data"
    modules = ("entities.py", "lexicon.py", "negation.py")
    code = "\n".join((folder / name).read_text("utf-8") for name in modules)
    return hashlib.sha256(f"{words}\n{code}".encode()).hexdigest()


def _find(reports: Sequence[str | None], backend: str) -> ShardContent:
    found = find_entities(_distinct(reports), backend)
    return ShardContent([[astuple(entity) for entity in entities] for entities in found])


def _entities_of(reports: Sequence[str | None], out: Path) -> Iterator[tuple[Entity, ...]]:
    """The entities of each report, a chunk in memory at a time; none of a report that is None."""
    for number, first in enumerate(range(0, len(reports), CHUNK_REPORTS)):
        chunk = reports[first : first + CHUNK_REPORTS]
        texts = _distinct(chunk)
        listed = read_facts(out / ENTITY_SHARDS_FOLDER, number) if texts else []
        known: dict[str | None, tuple[Entity, ...]] = {None: ()}
        for text, entities in zip(texts, listed, strict=True):
            known[text] = tuple(_entity(*values) for values in entities)
        yield from (known[report] for report in chunk)


def _entity(start, end, kind, concept, status, cue) -> Entity:
    return Entity(start, end, kind, concept, status, None if cue is None else tuple(cue))


# -- where images lie --


def _inside(root: Path) -> Callable[[str], bool]:
    """Says whether an image, with links and ".." followed, lies under the root.

    A folder is followed once, whatever the number of its images.
    """
    # Not Path.resolve: Python before 3.13 raises in it when a link leads to itself.
    real_root = os.path.join(os.path.realpath(root), "")
    real_folder = cache(os.path.realpath)

    def is_inside(image: str) -> bool:
        path = os.path.join(root, image)
        folder, name = os.path.split(path)
        is_plain = name not in ("", ".", "..") and not os.path.islink(path)
        real = os.path.join(real_folder(folder), name) if is_plain else os.path.realpath(path)
        return os.path.join(real, "").startswith(real_root)

    return is_inside


def _left_out(row: int, sample: Sample, reason: Reason, detail: str) -> Excluded:
    return Excluded(row=row, image_id=sample.image_id, reason=reason, detail=detail)
