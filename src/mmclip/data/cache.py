"""The film cache: every film decoded and resized once, then read from a memory map.

While it is built, finished chunks lie in films.parts/; a build that was killed goes on from them.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from mmclip.data.images import FilmError, decode_film, read_bytes, resize_film
from mmclip.data.manifest import Reason, write_text_atomic

FILMS_FILE, PARTS_FOLDER = "films.npy", "films.parts"

CHUNK_FILMS = 256
"""Films a chunk: what a kill can lose, a process. [chosen: seconds of work, 13 MB at 224 px]"""

DECODER_VERSION = 2
"""Raised with every change of what a file becomes, so that old chunks are not taken up."""


class CacheError(ValueError):
    """The film cache is missing, damaged or cannot be built; the message names the next step."""


@dataclass(frozen=True)
class FilmFacts:
    """What decoding found of one file: its size and checksum, or why it gives no film."""

    width_px: int = 0
    height_px: int = 0
    sha256: str = ""  # of the file's bytes
    reason: Reason | None = None
    detail: str = ""


def build_cache(
    images: Sequence[Path],
    folder: Path,
    film_px: int,
    workers: int = 1,
    on_progress: Callable[[int], None] = lambda n: None,
) -> tuple[list[FilmFacts], str]:
    """Decodes and resizes films into folder/films.npy; damaged ones are left out and explained.

    The result does not depend on `workers`, nor on how often the build was killed and resumed.
    Memory is flat: a chunk a process.

    Args:
        images: Files, in the order of the rows.
        folder: The data folder.
        film_px: Side of the cached films.
        workers: Processes; 1 works in this one.
        on_progress: Called with the number of files done since the last call.

    Returns:
        One FilmFacts a file, and the SHA-256 of films.npy. Row i of films.npy is the i-th file
        without a reason.

    Raises:
        CacheError: When a worker was killed from outside, usually for want of memory.
    """
    parts = folder / PARTS_FOLDER
    parts.mkdir(parents=True, exist_ok=True)
    chunks = [images[i : i + CHUNK_FILMS] for i in range(0, len(images), CHUNK_FILMS)]
    todo = []
    for number, chunk in enumerate(chunks):
        if _is_finished(parts, number, chunk, film_px):
            on_progress(len(chunk))
        else:
            todo.append((number, chunk))
    if workers <= 1 or len(todo) <= 1:
        for number, chunk in todo:
            on_progress(_build_chunk(parts, number, chunk, film_px))
    else:
        _build_in_processes(parts, todo, film_px, workers, on_progress)
    facts = [fact for number in range(len(chunks)) for fact in _read_facts(parts, number)]
    checksum = _join(folder, parts, len(chunks), sum(f.reason is None for f in facts), film_px)
    shutil.rmtree(parts)
    return facts, checksum


def _build_in_processes(
    parts: Path,
    todo: Sequence[tuple[int, Sequence[Path]]],
    film_px: int,
    workers: int,
    on_progress: Callable[[int], None],
) -> None:
    # Not fork: the caller may already run threads, which a forked child would lack.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_end_with_parent
    )
    try:
        jobs = [pool.submit(_build_chunk, parts, n, chunk, film_px) for n, chunk in todo]
        for job in as_completed(jobs):
            on_progress(job.result())
    except BrokenProcessPool:
        raise CacheError(
            f"a process that decodes films was killed, usually for want of memory; run the same "
            f"command again with fewer --workers (now {workers}): finished films are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed: else it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None  # true of a worker

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def _fingerprint(chunk: Sequence[Path], film_px: int) -> str:
    """Changes when a file of the chunk is replaced, or would be decoded or resized otherwise."""
    digest = hashlib.sha256(f"{DECODER_VERSION} {film_px}".encode())
    for path in chunk:
        try:
            facts = path.stat()
            digest.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path}\0missing\n".encode())
    return digest.hexdigest()


def _part_files(parts: Path, number: int) -> tuple[Path, Path]:
    return parts / f"{number:06d}.npy", parts / f"{number:06d}.json"


def _is_finished(parts: Path, number: int, chunk: Sequence[Path], film_px: int) -> bool:
    films, facts = _part_files(parts, number)
    try:
        known = json.loads(facts.read_text("utf-8"))
        return known["fingerprint"] == _fingerprint(chunk, film_px) and known[
            "sha256"
        ] == _part_checksum(films, known["facts"])
    except (OSError, ValueError, LookupError, TypeError):  # missing, or damaged
        return False


def _part_checksum(films: Path, facts: list[dict]) -> str:
    return hashlib.sha256(films.read_bytes() + json.dumps(facts).encode()).hexdigest()


def _build_chunk(parts: Path, number: int, chunk: Sequence[Path], film_px: int) -> int:
    """Writes one chunk: its films, then its facts, each aside and renamed. Facts mean finished."""
    fingerprint = _fingerprint(chunk, film_px)
    films, facts = [], []
    for path in chunk:
        try:
            content = read_bytes(path)
            film = decode_film(content)
        except FilmError as error:
            facts.append(FilmFacts(reason=error.reason, detail=error.detail))
            continue
        films.append(resize_film(film, film_px))
        height, width = film.shape
        facts.append(FilmFacts(width, height, hashlib.sha256(content).hexdigest()))
    films_file, facts_file = _part_files(parts, number)
    facts_file.unlink(missing_ok=True)
    aside = films_file.with_suffix(".tmp")
    array = np.stack(films) if films else np.zeros((0, film_px, film_px), np.uint8)
    with aside.open("wb") as file:
        np.save(file, array)
    aside.replace(films_file)
    listed = [asdict(fact) for fact in facts]
    known = {
        "fingerprint": fingerprint,
        "sha256": _part_checksum(films_file, listed),
        "facts": listed,
    }
    write_text_atomic(facts_file, json.dumps(known))
    return len(chunk)


def _read_facts(parts: Path, number: int) -> Iterator[FilmFacts]:
    known = json.loads(_part_files(parts, number)[1].read_text("utf-8"))
    for fact in known["facts"]:
        reason = fact["reason"]
        yield FilmFacts(**{**fact, "reason": None if reason is None else Reason(reason)})


def _join(folder: Path, parts: Path, n_chunks: int, n_films: int, film_px: int) -> str:
    """Copies the chunks into films.npy, in order, aside and renamed; returns its SHA-256."""
    aside = folder / (FILMS_FILE + ".tmp")
    shape = (n_films, film_px, film_px)
    if n_films == 0:
        with aside.open("wb") as file:
            np.save(file, np.zeros(shape, np.uint8))
    else:
        joined = open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
        row = 0
        for number in range(n_chunks):
            films = np.load(_part_files(parts, number)[0], mmap_mode="r")
            joined[row : row + len(films)] = films
            row += len(films)
        joined.flush()
        del joined
    with aside.open("rb") as file:
        os.fsync(file.fileno())
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    aside.replace(folder / FILMS_FILE)
    return checksum


@dataclass(frozen=True)
class FilmCache:
    """The films of a data folder, in memory only where they are read."""

    films: np.ndarray  # uint8 [n, px, px], memory-mapped, read-only

    @classmethod
    def open(cls, folder: Path) -> "FilmCache":
        """Maps films.npy.

        Raises:
            CacheError: When it is missing or no array of square uint8 films.
        """
        path = folder / FILMS_FILE
        try:
            films = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise CacheError(
                f"{path} cannot be opened ({error}); build it again with `mmclip data build`"
            ) from None
        if films.dtype != np.uint8 or films.ndim != 3 or films.shape[1] != films.shape[2]:
            raise CacheError(f"{path} holds {films.dtype} {films.shape}, not square uint8 films")
        return cls(films)


def verify_cache(folder: Path, sha256: str) -> None:
    """Compares films.npy with the checksum of its build.

    Raises:
        CacheError: When it is missing or differs.
    """
    path = folder / FILMS_FILE
    if not path.is_file():
        raise CacheError(f"{path} is missing; build the folder again with `mmclip data build`")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CacheError(
            f"{path} was changed since it was built (SHA-256 {found[:12]}, built as "
            f"{sha256[:12]}); build the folder again with `mmclip data build`"
        )
