"""Embeddings of images and texts, and other vectors, made once and stored in the folder of the run.

    embeddings/images-<hash>.npy     float32 [n, e], in the order of the rows
    embeddings/images-<hash>.json    the weights that made them, and a checksum; written last
    embeddings/texts-<hash>.npy     the same of distinct texts, and its .json
    embeddings/pooled-<hash>.npy    what a linear probe reads, see `features.stored_features`
    embeddings/squares-<hash>.npy   uint8 [n, s, s], see `features.with_squares`

The hash in a name is of what was embedded, so a changed data folder has files of its own. No id and
no text is in them.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from mmclip.checkpoint import Checkpoint, run_folder
from mmclip.data.folder import read_meta
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.embed import embed_images
from mmclip.files import file_sha256, locked, write_atomic, write_text_atomic
from mmclip.models.dual_encoder import DualEncoder
from mmclip.progress import console, progress

logger = logging.getLogger(__name__)

STORE_FOLDER = "embeddings"

_CHUNK = 1024
"""Images or texts whose embeddings are held at once. [chosen: 2 MB at 512 wide]"""


def image_embeddings(
    encoder: DualEncoder, dataset: ImageTextDataset, folders: Sequence[Path]
) -> Float32[np.ndarray, "n e"]:
    """The embeddings of some images, from the encoder's store where they are, else made.

    Args:
        encoder: Whose weights they must be of.
        dataset: All with an image.
        folders: That the rows are of: the checksums of their images are part of the key, too.

    Returns:
        Mapped from the file: in memory only where it is read.

    Raises:
        ValueError: When the model gives embeddings that are not finite.
    """
    of = [dataset.data_hash, *(str(read_meta(folder).get("images_sha256")) for folder in folders)]
    of += [sample.image_id for sample in dataset.samples]
    of += ["a copy" if root is None else "files" for root in dataset.roots]

    def parts() -> Iterator[Tensor]:
        with progress("embedding images", len(dataset)) as advance:
            for start in range(0, len(dataset), _CHUNK):
                cut = slice(start, start + _CHUNK)
                part = replace(dataset, samples=dataset.samples[cut], where=dataset.where[cut])
                yield embed_images(encoder, part, show=False)
                advance(len(part))

    return _of_encoder(encoder, "images", of, len(dataset), parts())


def text_embeddings(encoder: DualEncoder, texts: Sequence[str]) -> Float32[np.ndarray, "n e"]:
    """The embeddings of some texts, as `image_embeddings`; only distinct ones are made and stored.

    Args:
        encoder: Whose weights they must be of.
        texts: In any order, some of them equal.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    distinct = list(number)

    def parts() -> Iterator[Tensor]:
        with progress("embedding reports", len(distinct)) as advance:
            for start in range(0, len(distinct), _CHUNK):
                part = distinct[start : start + _CHUNK]
                yield encoder.encode_texts(part)
                advance(len(part))

    found = _of_encoder(encoder, "texts", distinct, len(distinct), parts())
    return found[[number[text] for text in texts]]


def store_folder(checkpoint: Checkpoint) -> Path:
    """Where embeddings of a checkpoint lie: in its run, or in itself where it has none."""
    return run_folder(checkpoint.folder) / STORE_FOLDER


def _of_encoder(
    encoder: DualEncoder, kind: str, of: Sequence[str], n: int, parts: Iterable[Tensor]
) -> Float32[np.ndarray, "n e"]:
    return stored(encoder.store, encoder.weights_hash, kind, of, (n, encoder.embed_dim), parts)


def stored(
    folder: Path,
    weights: str,
    kind: str,
    of: Sequence[str],
    shape: tuple[int, ...],
    parts: Iterable[Tensor],
) -> np.ndarray:
    """Reads stored vectors; where there are none that fit, makes and stores them.

    Args:
        folder: Of the files.
        weights: Hash of the weights that made them.
        kind: How their file's name starts.
        of: What they are of, for the name of the file.
        shape: How many there are, and how wide; of three numbers for uint8 images, n x h x w.
        parts: Makes them when it is read, some at a time.

    Returns:
        float32 [n, e], or uint8 [n, h, w], mapped from the file.

    Raises:
        ValueError: When one is not finite.
    """
    digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()
    name = f"{kind}-{digest[:16]}"
    path, note = folder / f"{name}.npy", folder / f"{name}.json"
    metadata = {"of": digest, "weights": weights}
    if path.exists() or note.exists():
        if (fault := _fault(path, note, metadata)) is None:
            return np.load(path, mmap_mode="r")
        console.print(f"{path} {fault}; it is made anew", markup=False, soft_wrap=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        logger.warning(
            "%s cannot be written: embeddings are not stored, but made each time", folder
        )
        return np.concatenate([finite(part) for part in parts])
    with locked(folder, shared=True):  # another command may make them, too
        sha256 = _write(path, parts, shape)
        write_text_atomic(note, json.dumps({**metadata, "sha256": sha256}) + "\n")
    return np.load(path, mmap_mode="r")


def _fault(path: Path, note: Path, metadata: dict[str, str]) -> str | None:
    """Why stored embeddings cannot be used, or None where they can."""
    try:
        known = json.loads(note.read_text("utf-8"))
        if known["weights"] != metadata["weights"]:
            return "is of other weights"
        is_whole = known["of"] == metadata["of"] and known["sha256"] == file_sha256(path)
    except (OSError, ValueError, LookupError, TypeError):
        is_whole = False
    return None if is_whole else "is unfinished or damaged"


def _write(path: Path, parts: Iterable[Tensor], shape: tuple[int, ...]) -> str:
    """Writes parts as one array; returns the SHA-256 of the file.

    Not through a memory map: on a full disk that ends in a signal, and this in an error.
    """
    header = io.BytesIO()
    kind = "<f4" if len(shape) == 2 else "|u1"
    facts = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    digest = hashlib.sha256(header.getvalue())
    with write_atomic(path) as file:
        file.write(header.getvalue())
        for part in parts:
            content = finite(part).astype(kind).tobytes()
            file.write(content)
            digest.update(content)
    return digest.hexdigest()


def finite(part: Tensor) -> Float32[np.ndarray, "..."]:
    """Embeddings as an array.

    Raises:
        ValueError: When one is not finite.
    """
    if not part.isfinite().all():
        raise ValueError(
            "the model gives embeddings that are not finite; its training has diverged: take an "
            "older checkpoint by --model"
        )
    return part.numpy()
