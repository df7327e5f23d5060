"""What an image encoder makes of films: a vector each, computed once and kept on disk.

A vector depends on weights and film alone, so a file of vectors is named by a hash of both.
"""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from mmclip.data.dataset import Rows, normalise
from mmclip.models.classifier import FilmEncoder
from mmclip.progress import progress

logger = logging.getLogger(__name__)

BATCH_FILMS = 256
"""Films encoded at once. [chosen: as `embed.embed_films`]"""


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def film_features(
    encoder: FilmEncoder, rows: Rows, device: torch.device
) -> Float32[np.ndarray, "n d"]:
    """A vector a film, in the order of the rows.

    Args:
        encoder: On the device; it is put into evaluation mode.
        rows: At least one, each with an image.
        device: Where the encoder is.

    Raises:
        ValueError: When a vector is not finite.
    """
    encoder.eval()
    out = []
    with progress("encoding films", len(rows)) as advance:
        for start in range(0, len(rows), BATCH_FILMS):
            part = np.arange(start, min(start + BATCH_FILMS, len(rows)))
            vectors = encoder(normalise(rows.pixels(part)).to(device)).float().cpu()
            if not vectors.isfinite().all():
                raise ValueError(
                    "the encoder gives features that are not finite; its training has diverged: "
                    "take an older checkpoint by --run"
                )
            out.append(vectors.numpy())
            advance(len(part))
    return np.concatenate(out)


def stored_features(
    encoder: FilmEncoder, rows: Rows, folder: Path, device: torch.device
) -> Float32[np.ndarray, "n d"]:
    """As `film_features`, read from a file where equal weights have encoded these films before.

    The file is written aside and renamed, so a process that is killed leaves none; one that cannot
    be read is written again.

    Args:
        encoder: On the device.
        rows: Each with an image.
        folder: Of the files.
        device: Where the encoder is.
    """
    ids = "\n".join(film.film_id for film in rows.films)
    key = f"{weights_hash(encoder)} {encoder.features} {rows.data_hash} {ids}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    path = folder / f"{encoder.features}-{digest[:16]}.npy"
    if path.is_file():
        try:
            found = np.load(path, allow_pickle=False)
            if found.dtype == np.float32 and found.ndim == 2 and len(found) == len(rows):
                return found
        except (OSError, ValueError, EOFError):
            pass
        logger.warning("%s is damaged; the films are encoded again", path)
    found = film_features(encoder, rows, device)
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another command may write it, too
    with aside.open("wb") as file:
        np.save(file, found)
    aside.replace(path)
    return found
