"""The film cache: every film decoded and resized once, then read from a memory map.

While it is built, finished chunks lie in films.parts/; a build that was killed goes on from them.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import write_array_header_1_0

from mmclip.data.images import FilmError, decode_film, read_bytes, resize_film
from mmclip.data.parts import Part, Shard, Work, Workers, do_chunks, read_array, read_facts
from mmclip.data.records import Reason

FILMS_FILE, PARTS_FOLDER = "films.npy", "films.parts"

CHUNK_FILMS = 256
"""Films a chunk: what a kill can lose, a process. [chosen: seconds of work, 13 MB at 224 px]"""

DECODER_VERSION = 2
"""Raised with every change of what a file becomes, so that old chunks are not taken up."""


class CacheError(ValueError):
    """The film cache is missing or damaged; the message names the next step."""


@dataclass(frozen=True, slots=True)
class FilmFacts:
    """What decoding found of one file: its size and checksum, or why it gives no film."""

    width_px: int = 0
    height_px: int = 0
    sha256: str = ""  # of the file's bytes
    reason: Reason | None = None
    detail: str = ""


def decode_films(
    root: Path,
    images: Sequence[str],
    folder: Path,
    film_px: int,
    workers: Workers = 1,
    shard: Shard | None = None,
) -> None:
    """Decodes and resizes films in chunks, into folder/films.parts; `join_films` makes them one.

    What comes of it does not depend on who works, nor on how often it was killed and resumed.
    Memory is flat: a chunk a process.

    Args:
        root: The folder of the images.
        images: Paths relative to it, in the order of the rows.
        folder: The data folder.
        film_px: Side of the cached films.
        workers: Processes, or the address of a Dask scheduler.
        shard: Decode only this share of the chunks.

    Raises:
        WorkersError: When the workers cannot be had, or died.
    """
    root = root.absolute()  # those who work may stand in another folder
    work = Work(
        partial(_fingerprint, root=root, film_px=film_px),
        partial(_decode, root=root, film_px=film_px),
    )
    parts = folder / PARTS_FOLDER
    do_chunks(parts, images, CHUNK_FILMS, work, "reading films", workers, shard)


def _fingerprint(images: Sequence[str], root: Path, film_px: int) -> str:
    """Changes when a file of the chunk is replaced, or would be decoded or resized otherwise."""
    digest = hashlib.sha256(f"{DECODER_VERSION} {film_px}".encode())
    for image in images:
        path = os.path.join(root, image)
        try:
            facts = os.stat(path)
            digest.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path}\0missing\n".encode())
    return digest.hexdigest()


def _decode(images: Sequence[str], root: Path, film_px: int) -> Part:
    films, facts = [], []
    for image in images:
        try:
            content = read_bytes(root / image)
            film = decode_film(content)
        except FilmError as error:
            facts.append(FilmFacts(reason=error.reason, detail=error.detail))
            continue
        films.append(resize_film(film, film_px))
        height, width = film.shape
        facts.append(FilmFacts(width, height, hashlib.sha256(content).hexdigest()))
    array = np.stack(films) if films else np.zeros((0, film_px, film_px), np.uint8)
    return Part([asdict(fact) for fact in facts], array)


def join_films(n_images: int, folder: Path, film_px: int) -> tuple[list[FilmFacts], str]:
    """Copies the chunks into folder/films.npy, in order, aside and renamed.

    Args:
        n_images: How many were decoded, all shards together.
        folder: The data folder.
        film_px: Side of the films.

    Returns:
        One FilmFacts an image, and the SHA-256 of films.npy. Row i of films.npy is the i-th image
        without a reason; the others are left out and explained.
    """
    parts = folder / PARTS_FOLDER
    numbers = range(-(-n_images // CHUNK_FILMS))
    facts = [fact for number in numbers for fact in _read_facts(parts, number)]
    n_films = sum(fact.reason is None for fact in facts)
    header = {"descr": "|u1", "fortran_order": False, "shape": (n_films, film_px, film_px)}
    start = io.BytesIO()
    write_array_header_1_0(start, header)
    digest = hashlib.sha256(start.getvalue())
    aside = folder / (FILMS_FILE + ".tmp")
    with aside.open("wb") as file:  # no memory map: what is written to it would count as memory
        file.write(start.getvalue())
        for number in numbers:
            films = read_array(parts, number).tobytes()
            digest.update(films)
            file.write(films)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / FILMS_FILE)
    return facts, digest.hexdigest()


def _read_facts(parts: Path, number: int) -> Iterator[FilmFacts]:
    for fact in read_facts(parts, number):
        reason = fact["reason"]
        yield FilmFacts(**{**fact, "reason": None if reason is None else Reason(reason)})


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
