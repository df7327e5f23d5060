"""Image files that stand in no data folder: found below folders, and decoded some at a time."""

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmclip.data.dicom import is_dicom, read_header
from mmclip.data.ingest.shards import process_pool
from mmclip.data.pixels import ImageError
from mmclip.data.radiograph import VIEW_KEYWORDS, text_of, view_of
from mmclip.data.sample import View
from mmclip.data.walk import walk

IMAGE_SUFFIXES = (
    ".bmp", ".dcm", ".dic", ".dicom", ".gif", ".ima", ".j2k", ".jp2", ".jpeg", ".jpg", ".pgm",
    ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""A file of such a name counts as an image, whatever it holds: one that is damaged is told of."""

_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")  # PNG, JPEG, TIFF of either byte order
_START_BYTES = 144  # the preamble of DICOM and what follows it

_NO_IMAGES = ("DICOMDIR",)
"""Names of DICOM files that hold no pixels: the index of a disc."""


@dataclass(frozen=True)
class FoundFiles:
    """What a search found.

    Attributes:
        images: In the order given, those of a folder in the order of their paths; each once.
        n_others: Files in the folders that are no images.
        n_again: Images that were named more than once.
    """

    images: tuple[Path, ...]
    n_others: int
    n_again: int


def find_image_files(paths: Sequence[Path]) -> FoundFiles:
    """Files as they are named, and all images in and below folders.

    A file without an image's ending counts where it begins as DICOM, PNG, JPEG or TIFF. Names that
    begin with a dot are passed over.

    Raises:
        ValueError: When a path is not there, or a folder cannot be read.
    """
    images: dict[str, None] = {}  # no Path before the end: making and hashing it costs the most
    n_others = n_again = 0
    for path in paths:
        if not path.exists():
            raise ValueError(f"there is no file or folder {path}; check the path")
        if not path.is_dir():
            n_again += str(path) in images
            images[str(path)] = None
            continue
        for folder, _, names in walk(path):
            for name in names:
                file = os.path.join(folder, name)
                is_image = _is_image(file, name)
                n_others += not is_image
                n_again += is_image and file in images
                if is_image:
                    images[file] = None
    return FoundFiles(tuple(map(Path, images)), n_others, n_again)


def _is_image(path: str, name: str) -> bool:
    if name.startswith(".") or name.upper() in _NO_IMAGES:
        return False
    if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
        return True
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # asked first: a pipe would wait for ever
            return False
        with open(path, "rb") as file:
            start = file.read(_START_BYTES)
    except OSError:
        return False
    return is_dicom(start) or start.startswith(_STARTS)


# -- decoding --

CHUNKS_AHEAD = 2
"""Chunks that each process may have decoded before they are taken: memory stays flat. [chosen]"""


@dataclass(frozen=True, slots=True)
class DecodedFile:
    """One file that was decoded, or why it was not.

    Attributes:
        path: Of the file.
        fault: Reason and detail; None of a sound image.
        study: Its StudyInstanceUID; None unless asked for, and where the file has none.
        view: As the header of DICOM tells it, where asked for.
    """

    path: Path
    fault: tuple[str, str] | None = None
    study: str | None = None
    view: View = "unknown"


@dataclass(frozen=True)
class DecodedChunk:
    """Some files in order, and what was prepared of those without a fault."""

    files: tuple[DecodedFile, ...]
    images: tuple[Any, ...]


def decode_files(
    chunks: Sequence[Sequence[Path]],
    prepare: Callable[[Path], Any],
    *,
    with_study: bool = False,
    workers: int = 1,
) -> Iterator[DecodedChunk]:
    """Decodes files and prepares them for a model, chunk after chunk.

    Args:
        chunks: Paths.
        prepare: Makes of a file what a model takes, or raises ImageError; it goes to the processes.
        with_study: Also read study and view, of DICOM.
        workers: Processes; 1 is this one.

    Raises:
        WorkersError: When a process was killed.
    """
    decode = partial(decode_chunk, prepare=prepare, with_study=with_study)
    workers = min(workers, len(chunks))
    if workers <= 1:
        yield from map(decode, chunks)
        return
    waiting: deque[Future[DecodedChunk]] = deque()
    how = f"run the command again with fewer --workers (now {workers})"
    with process_pool(workers, how) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(decode, chunk))
            if len(waiting) > CHUNKS_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def decode_chunk(
    paths: Sequence[Path], prepare: Callable[[Path], Any], with_study: bool
) -> DecodedChunk:
    """One chunk of `decode_files`, in this process."""
    files: list[DecodedFile] = []
    images: list[Any] = []
    for path in paths:
        try:
            image = prepare(path)
        except ImageError as error:
            files.append(DecodedFile(path, (str(error.reason), error.detail)))
            continue
        images.append(image)
        study, view = _study_of(path) if with_study else (None, "unknown")
        files.append(DecodedFile(path, None, study, view))
    return DecodedChunk(tuple(files), tuple(images))


def _study_of(path: Path) -> tuple[str | None, View]:
    """Study and view of a DICOM file; a raster file tells neither."""
    try:
        header = read_header(path, ("StudyInstanceUID", *VIEW_KEYWORDS))
    except ImageError:
        return None, "unknown"
    return text_of(header, "StudyInstanceUID") or None, view_of(header, {})
