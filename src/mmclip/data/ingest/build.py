"""From the records of a reader to a data folder: check, decode once, search, split, write."""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    RandomSplit,
    Reason,
    Record,
    Sample,
    assign_splits,
    validate,
)
from mmclip.data.versions import made_with
from mmclip.files import clear_left_asides, locked, move_in

ENTITY_SHARDS_FOLDER = "entities.shards"

REBUILD_FOLDER = "rebuild"
"""In a data folder: the build that will replace it."""

CHUNK_REPORTS = 1024
"""Records a chunk whose reports are searched. [chosen: a second of work for the lexicon, a minute
for a large model]"""

logger = logging.getLogger(__name__)

FEW_REPORTS_RATIO = 0.5
"""Fewer reports than this with a finding or a place make a build warn. [chosen]"""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a build may be asked for beside the size of its images.

    Attributes:
        resize: How images become squares.
        entities: What finds the entities of the reports; see `entities.EntityFinder`.
        split: Of the patients whose source names no split.
        hides_paths: Write each image's id in place of its path, which may name a patient.
        metadata: Further facts for meta.json (reader, command).
    """

    resize: ResizeMode = "squash"
    entities: str = "lexicon"
    split: RandomSplit = field(default_factory=RandomSplit)
    hides_paths: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


def build_data(
    records: Iterable[Record],
    root: Path,
    out: Path,
    *,
    image_size: int,
    workers: Workers = 1,
    overwrite: bool = False,
    options: BuildOptions | None = None,
) -> dict:
    """Builds a data folder; what was left out stands in excluded.jsonl, and the counts add up.

    The same source gives the same bytes and hash, whoever works. A build goes on where a killed one
    was, or `build_shard`. A finished build that is replaced stays whole until the new one is: that
    is made in out/rebuild, and its files are moved at the end.

    Args:
        records: Of a reader, one a row.
        root: The folder that `Sample.image` is relative to.
        out: The data folder.
        image_size: Side of the cached images.
        workers: Processes that decode and search, or the address of a Dask scheduler.
        overwrite: Replace a finished build.
        options: What else is asked for; None for the defaults.

    Returns:
        The contents of meta.json.

    Raises:
        ManifestError: When no row is sound, or `out` holds other things or a finished build.
        ValueError: When the ratios of the split are impossible.
        LockedError: When another command writes into `out`.
        WorkersError: When the workers cannot be had, or died.
    """
    options = options or BuildOptions()
    options.split.check()
    _check_is_ours(out, None)
    with locked(out):
        _check_is_ours(out, None if overwrite else "; add --overwrite to build it again")
        replaces = (out / META_FILE).is_file() or (out / REBUILD_FOLDER).is_dir()
        readable = _readable(records, root, options.hides_paths)
        place = out / REBUILD_FOLDER if replaces else out
        place.mkdir(exist_ok=True)
        clear_left_asides(place)
        meta = _build(readable, root, place, image_size, workers, options)
        if replaces:
            _replace(place, out)
        shutil.rmtree(out / SHARDS_FOLDER, ignore_errors=True)  # what is left does no harm
        shutil.rmtree(out / ENTITY_SHARDS_FOLDER, ignore_errors=True)
    return meta


def _replace(made: Path, out: Path) -> None:
    """Puts a new build in the place of the one in `out`."""
    (out / SPLIT_FILE).unlink(missing_ok=True)
    if not (made / IMAGES_FILE).is_file():
        (out / IMAGES_FILE).unlink(missing_ok=True)
    move_in(made, out, META_FILE)


def _build(
    readable: tuple[list[tuple[int, Sample]], list[Excluded]],
    root: Path,
    out: Path,
    image_size: int,
    workers: Workers,
    options: BuildOptions,
) -> dict:
    """Leaves a data folder in `out`, which holds none; returns its meta.json."""
    samples, excluded = readable
    _do_all([sample for _, sample in samples], root, out, image_size, workers, options)
    facts, checksum = _joined([sample for _, sample in samples], out, image_size)
    kept, is_kept, undecoded = _with_facts(samples, facts, options.hides_paths)
    excluded = sorted([*excluded, *undecoded], key=lambda e: e.row)
    if not kept:
        raise _nothing_left(root, out, excluded)
    found = _entities_of([sample.report for _, sample in samples], out)
    counts: Counter[str] = Counter()
    made = {
        "root": None if options.hides_paths else str(root.resolve()),
        "resize": options.resize,
        "entities": options.entities,
    }
    meta = write_manifest(
        out,
        assign_splits(kept, options.split),
        excluded,
        None if checksum is None else image_size,
        {**options.metadata, **made, "images_sha256": checksum},
        n_split_by_source=sum(sample.split is not None for sample in kept),
        entities=_counted(kept, compress(found, is_kept), counts),
    )
    _warn_if_not_english(counts, options.entities)
    return meta


def _joined(
    samples: Iterable[Sample], out: Path, image_size: int
) -> tuple[Sequence[ImageFacts], str | None]:
    """Makes one file of all decoded images; gives what is known of each, and its checksum."""
    n_images = sum(sample.image is not None for sample in samples)
    if n_images:
        return join_images(n_images, out, image_size)
    return (), None


def _with_facts(
    samples: Iterable[tuple[int, Sample]], facts: Iterable[ImageFacts], hides_paths: bool
) -> tuple[list[Sample], list[bool], list[Excluded]]:
    """The samples with what their files say, whether each is kept, and those that are not.

    Args:
        samples: Each with its row.
        facts: Of those with an image, in order.
        hides_paths: As in `BuildOptions`.
    """
    known = iter(facts)
    kept: list[Sample] = []
    is_kept: list[bool] = []
    excluded: list[Excluded] = []
    for row, sample in samples:
        fact = ImageFacts() if sample.image is None else next(known)
        is_kept.append(fact.reason is None)
        if fact.reason is not None:
            path = "" if hides_paths else sample.image or ""
            excluded.append(_left_out(row, sample, fact.reason, fact.detail or path))
        elif sample.image is None:
            kept.append(sample)
        else:
            size = {"width_px": fact.width_px, "height_px": fact.height_px}
            image = f"{sample.image_id}.dcm" if hides_paths else sample.image
            kept.append(replace(sample, **size, image=image, image_sha256=fact.sha256))
    return kept, is_kept, excluded


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


def _nothing_left(root: Path, out: Path, excluded: Sequence[Excluded]) -> ManifestError:
    """Writes which rows were left out, and says why."""
    write_excluded(out, excluded)
    if not excluded:
        return ManifestError(f"nothing is left of {root}: the source has no rows")
    reason, n = Counter(e.reason for e in excluded).most_common(1)[0]
    detail = next((e.detail for e in excluded if e.reason == reason and e.detail), "")
    example = f" (such as: {detail})" if detail else ""
    return ManifestError(
        f"nothing is left of {root}; {n} of {len(excluded)} rows: {reason}{example}; all are in "
        f"{out / EXCLUDED_FILE}"
    )


def build_shard(
    records: Iterable[Record],
    root: Path,
    out: Path,
    shard: Shard,
    *,
    image_size: int,
    workers: Workers = 1,
    options: BuildOptions | None = None,
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
    _check_is_ours(out, None)
    with locked(out, shared=True):
        _check_is_ours(out, ", which a shard never replaces; remove it")
        samples, _ = _readable(records, root)
        _do_all(
            [sample for _, sample in samples],
            root, out, image_size, workers, options or BuildOptions(), shard,
        )  # fmt: skip


def _check_is_ours(out: Path, instead: str | None) -> None:
    """Refuses a folder of other things, as a build may remove files, and a finished build.

    Args:
        out: The data folder.
        instead: Said of a finished build, with what to do; None lets it be replaced.
    """
    check_place(
        out,
        (
            MANIFEST_FILE,
            IMAGES_FILE,
            EXCLUDED_FILE,
            SHARDS_FOLDER,
            ENTITY_SHARDS_FOLDER,
            REBUILD_FOLDER,
        ),
        what="other things than a data folder",
        remedy="name a new or empty folder by --out (--root is where the images are)",
    )
    if instead is not None and (out / META_FILE).is_file():
        n_rows = read_meta(out)["n_samples"]
        raise ManifestError(
            f"{out} already holds a finished build of {n_rows} rows{instead}, or choose another "
            f"--out"
        )


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
    workers: Workers,
    options: BuildOptions,
    shard: Shard | None = None,
) -> None:
    """Leaves the shards of all images and reports, or some of them."""
    images = [sample.image for sample in samples if sample.image is not None]
    if images:
        decode_images(root, images, out, image_size, workers, shard, options.resize)
    reports = [sample.report for sample in samples]
    search_reports(reports, out, options.entities, workers, shard)


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


FINDER_MODULES = ("entities", "lexicon", "negation", "spelling", "words")
"""Of mmclip.data: the code that finds entities, which is part of what a shard is made with."""


@cache
def _finder_version(backend: str) -> str:
    words = json.dumps(made_with(None, backend)["words"])
    folder = resources.files("mmclip") / "data"
    code = "\n".join((folder / f"{name}.py").read_text("utf-8") for name in FINDER_MODULES)
    return hashlib.sha256(f"{words}\n{code}".encode()).hexdigest()


def _find(reports: Sequence[str | None], backend: str) -> ShardContent:
    found = find_entities(_distinct(reports), backend)
    return ShardContent([[list(entity) for entity in entities] for entities in found])


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
