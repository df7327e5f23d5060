"""The image cache: every image decoded and resized once, then read from a memory map.

While it is built, finished chunks lie in images.shards/; a build that was killed goes on from them.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.lib.format import write_array_header_1_0

from mmclip.config import ResizeMode
from mmclip.data.dicom_pixels import decoders_installed
from mmclip.data.folder import META_FILE, read_built_meta
from mmclip.data.images import ImageError, decode_image, read_bytes, resize_image
from mmclip.data.ingest.shards import (
    Shard,
    ShardContent,
    Work,
    Workers,
    do_chunks,
    read_array,
    read_facts,
)
from mmclip.data.sample import Reason
from mmclip.files import file_sha256, verified_sha256, write_atomic

IMAGES_FILE, SHARDS_FOLDER = "images.npy", "images.shards"

CHUNK_IMAGES = 256
"""Images a chunk: what a kill can lose, a process. [chosen: seconds of work, 13 MB at 224 px]"""

DECODER_VERSION = 6
"""Raised with every change of what a file becomes, so that old chunks are not taken up."""


class CacheError(ValueError):
    """The image cache is missing or damaged; the message names the next step."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What decoding found of one file: its size and checksum, or why it gives no image."""

    width_px: int = 0
    height_px: int = 0
    sha256: str = ""  # of the file's bytes
    reason: Reason | None = None
    detail: str = ""


def decode_images(
    root: Path,
    images: Sequence[str],
    folder: Path,
    image_size: int,
    workers: Workers = 1,
    shard: Shard | None = None,
    resize: ResizeMode = "squash",
) -> None:
    """Decodes and resizes images in chunks, into folder/images.shards; `join_images` makes them
    one.

    What comes of it does not depend on who works, nor on how often it was killed and resumed.
    Memory is flat: a chunk a process.

    Args:
        root: The folder of the images.
        images: Paths relative to it, in the order of the rows.
        folder: The data folder.
        image_size: Side of the cached images.
        workers: Processes, or the address of a Dask scheduler.
        shard: Decode only this share of the chunks.
        resize: How they become squares.

    Raises:
        WorkersError: When the workers cannot be had, or died.
    """
    root = root.absolute()  # those who work may stand in another folder
    work = Work(
        partial(_fingerprint, root=root, image_size=image_size, resize=resize),
        partial(_decode, root=root, image_size=image_size, resize=resize),
    )
    shards = folder / SHARDS_FOLDER
    do_chunks(shards, images, CHUNK_IMAGES, work, "reading images", workers, shard)


def _fingerprint(images: Sequence[str], root: Path, image_size: int, resize: ResizeMode) -> str:
    """Changes when a file of the chunk is replaced, or would be decoded or resized otherwise."""
    digest = hashlib.sha256(f"{DECODER_VERSION} {image_size} {resize} {_decoders()}".encode())
    for image in images:
        path = os.path.join(root, image)
        try:
            facts = os.stat(path)
            digest.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path}\0missing\n".encode())
    return digest.hexdigest()


@cache
def _decoders() -> str:
    """Of this installation: what a missing one refused is decoded once it is there."""
    return json.dumps(decoders_installed())


def _decode(images: Sequence[str], root: Path, image_size: int, resize: ResizeMode) -> ShardContent:
    arrays, facts = [], []
    for image in images:
        try:
            content = read_bytes(root / image)
            pixels = decode_image(content)
        except ImageError as error:
            facts.append(ImageFacts(reason=error.reason, detail=error.detail))
            continue
        arrays.append(resize_image(pixels, image_size, resize))
        height, width = pixels.shape
        facts.append(ImageFacts(width, height, hashlib.sha256(content).hexdigest()))
    array = np.stack(arrays) if arrays else np.zeros((0, image_size, image_size), np.uint8)
    return ShardContent([asdict(fact) for fact in facts], array)


def join_images(n_images: int, folder: Path, image_size: int) -> tuple[list[ImageFacts], str]:
    """Copies the chunks into folder/images.npy, in order, aside and renamed.

    Args:
        n_images: How many were decoded, all shards together.
        folder: The data folder.
        image_size: Side of the images.

    Returns:
        One ImageFacts an image, and the SHA-256 of images.npy. Row i of images.npy is the i-th
        image without a reason; the others are left out and explained.
    """
    shards = folder / SHARDS_FOLDER
    numbers = range(-(-n_images // CHUNK_IMAGES))
    facts = [fact for number in numbers for fact in _read_facts(shards, number)]
    n_sound = sum(fact.reason is None for fact in facts)
    header = {"descr": "|u1", "fortran_order": False, "shape": (n_sound, image_size, image_size)}
    start = io.BytesIO()
    write_array_header_1_0(start, header)
    digest = hashlib.sha256(start.getvalue())
    # No memory map: what is written to it would count as memory.
    with write_atomic(folder / IMAGES_FILE) as file:
        file.write(start.getvalue())
        for number in numbers:
            images = read_array(shards, number).tobytes()
            digest.update(images)
            file.write(images)
    return facts, digest.hexdigest()


def _read_facts(shards: Path, number: int) -> Iterator[ImageFacts]:
    for fact in read_facts(shards, number):
        reason = fact["reason"]
        yield ImageFacts(**{**fact, "reason": None if reason is None else Reason(reason)})


@dataclass(frozen=True)
class ImageCache:
    """The images of a data folder, in memory only where they are read."""

    images: np.ndarray  # uint8 [n, px, px], memory-mapped, read-only
    folder: Path | None = None  # of the data folder; None of images that lie in none

    @classmethod
    def open(cls, folder: Path) -> "ImageCache":
        """Maps images.npy, once it is found as it was built; see `files.verified_sha256`.

        Raises:
            CacheError: When it is missing, no array of square uint8 images, or not those of
                meta.json.
            ManifestError: When the folder is unfinished.
        """
        meta = read_built_meta(folder)
        path = folder / IMAGES_FILE
        try:
            images = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise CacheError(
                f"{path} cannot be opened ({error}); build it again with `mmclip data build`"
            ) from None
        if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1] != images.shape[2]:
            raise CacheError(
                f"{path} holds {images.dtype} {images.shape}, not square uint8 images; build the "
                f"folder again with `mmclip data build`"
            )
        if images.shape[:2] != (meta["n_with_image"], meta["image_size"]):
            n, px = images.shape[:2]
            raise CacheError(
                f"{path} holds {n:,} images of {px} px, and {META_FILE} tells of "
                f"{meta['n_with_image']:,} of {meta['image_size']} px; build the folder again with "
                f"`mmclip data build`"
            )
        _check(path, verified_sha256(path), meta["images_sha256"])
        return cls(images, folder)


def verify_cache(folder: Path, sha256: str) -> None:
    """Compares every byte of images.npy with the checksum of its build.

    Raises:
        CacheError: When it is missing or differs.
    """
    path = folder / IMAGES_FILE
    if not path.is_file():
        raise CacheError(f"{path} is missing; build the folder again with `mmclip data build`")
    _check(path, file_sha256(path), sha256)


def _check(path: Path, found: str, sha256: str) -> None:
    if found != sha256:
        raise CacheError(
            f"{path} was changed since it was built (SHA-256 {found[:12]}, built as "
            f"{sha256[:12]}); build the folder again with `mmclip data build`"
        )
