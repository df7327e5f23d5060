"""From the records of a reader to a data folder: check, decode once, split, write."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmclip.data.cache import FILMS_FILE, FilmFacts, build_cache
from mmclip.data.entities import find_entities
from mmclip.data.manifest import (
    META_FILE,
    SPLIT_FILE,
    Entity,
    Excluded,
    Film,
    ManifestError,
    Reason,
    Record,
    assign_splits,
    read_meta,
    validate,
    write_manifest,
)
from mmclip.progress import progress


def build_data(
    records: Iterable[Record],
    root: Path,
    out: Path,
    *,
    film_px: int,
    seed: int = 0,
    val_ratio: float = 0.1,
    test_ratio: float = 0.1,
    workers: int = 1,
    entities: str = "lexicon",
    about: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict:
    """Builds a data folder; what was left out stands in excluded.jsonl, and the counts add up.

    A build that was killed goes on where it was. The same source gives the same bytes and hash,
    whatever `workers` is.

    Args:
        records: Of a reader, one a row.
        root: The folder that `Film.image` is relative to.
        out: The data folder.
        film_px: Side of the cached films.
        seed: Of the splits, where the source has none.
        val_ratio: Of the patients without a split.
        test_ratio: Of the patients without a split.
        workers: Processes that decode.
        entities: What finds the entities of the reports; see `entities.EntityFinder`.
        about: Further facts for meta.json (reader, command).
        overwrite: Replace a finished build.

    Returns:
        The contents of meta.json.

    Raises:
        ManifestError: When no row is sound, or `out` holds a finished build and `overwrite` is
            False.
    """
    if (out / META_FILE).is_file():
        if not overwrite:
            raise ManifestError(
                f"{out} already holds a finished build of {read_meta(out)['n_films']} rows; add "
                f"--overwrite to build it again, or choose another --out"
            )
        (out / META_FILE).unlink()  # from here on the folder is unfinished
    (out / SPLIT_FILE).unlink(missing_ok=True)  # of the build that is replaced
    sound, excluded = validate(records)
    films: list[tuple[int, Film]] = []
    for row, film in sound:
        if _is_inside(film, root):
            films.append((row, film))
        else:
            excluded.append(_left_out(row, film, Reason.IMAGE_OUTSIDE_ROOT, str(film.image)))
    with_image = [(row, film) for row, film in films if film.image is not None]
    facts: Sequence[FilmFacts] = ()
    checksum = None
    if with_image:
        paths = [root / str(film.image) for _, film in with_image]
        with progress("reading films", len(paths)) as advance:
            facts, checksum = build_cache(paths, out, film_px, workers, advance)
    else:
        (out / FILMS_FILE).unlink(missing_ok=True)  # of the build that is replaced
    known = iter(facts)
    kept: list[Film] = []
    for row, film in films:
        if film.image is None:
            kept.append(film)
            continue
        fact = next(known)
        if fact.reason is None:
            size = {"width_px": fact.width_px, "height_px": fact.height_px}
            kept.append(replace(film, **size, image_sha256=fact.sha256))
        else:
            excluded.append(_left_out(row, film, fact.reason, fact.detail))
    excluded.sort(key=lambda e: e.row)
    if not kept:
        reason, n = Counter(e.reason for e in excluded).most_common(1)[0] if excluded else ("", 0)
        why = f"; {n} of {len(excluded)} rows: {reason}" if n else ": the source has no rows"
        raise ManifestError(f"nothing is left of {root}{why}")
    return write_manifest(
        out,
        assign_splits(_with_entities(kept, entities), seed, val_ratio, test_ratio),
        excluded,
        film_px if with_image else None,
        {**(about or {}), "entities": entities, "films_sha256": checksum},
        n_split_by_source=sum(film.split is not None for film in kept),
    )


def _with_entities(films: Sequence[Film], backend: str) -> list[Film]:
    """The films with the entities of their reports; equal reports are searched once."""
    reports = list(dict.fromkeys(film.report for film in films if film.report is not None))
    if not reports:
        return list(films)
    found: dict[str | None, tuple[Entity, ...]] = {None: ()}
    with progress("finding entities", len(reports)) as advance:
        for report, entities in zip(reports, find_entities(reports, backend), strict=True):
            found[report] = tuple(entities)
            advance(1)
    return [replace(film, entities=found[film.report]) for film in films]


def _is_inside(film: Film, root: Path) -> bool:
    """Whether the image, with links and ".." followed, lies under the root."""
    if film.image is None:
        return True
    # Not Path.resolve: Python before 3.13 raises in it when a link leads to itself.
    return Path(os.path.realpath(root / film.image)).is_relative_to(os.path.realpath(root))


def _left_out(row: int, film: Film, reason: Reason, detail: str) -> Excluded:
    return Excluded(row=row, film_id=film.film_id, reason=reason, detail=detail)
