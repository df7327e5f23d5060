"""What a model makes of films, one vector each, computed once and kept on disk.

A vector depends on the weights and the film alone, so a file of vectors is named by a hash of both.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmclip.data.dataset import Rows, normalise
from mmclip.progress import progress

logger = logging.getLogger(__name__)

EMBEDDINGS = "embeddings"
"""In the folder of a run: what `stored_embeddings` keeps."""

Encode = Callable[[Float[Tensor, "b 1 h w"]], Float[Tensor, "b d"]]
"""From films in model space to a vector each."""


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.inference_mode()
def embed(
    encode: Encode, rows: Rows, device: torch.device, *, batch_size: int = 256, show: bool = True
) -> Float[np.ndarray, "n d"]:
    """A float32 vector a film, in the order of the rows.

    Args:
        encode: In evaluation mode, on the device.
        rows: At least one; each with a film.
        device: Where the model is.
        batch_size: Films at once.
        show: Whether to show progress.
    """
    out = []
    with progress("encoding films", len(rows), show=show) as advance:
        for start in range(0, len(rows), batch_size):
            part = np.arange(start, min(start + batch_size, len(rows)))
            out.append(encode(normalise(rows.pixels(part)).to(device)).float().cpu().numpy())
            advance(len(part))
    return np.concatenate(out)


def stored_embeddings(
    folder: Path, weights: str, what: str, rows: Rows, encode: Encode, device: torch.device
) -> Float[np.ndarray, "n d"]:
    """As `embed`, from a file where these films were encoded before with these weights.

    The file is written aside and renamed, so a process killed meanwhile leaves none; one that
    cannot be read is written again.

    Args:
        folder: Of the files, one for each set of weights, kind of vector, and rows.
        weights: See `weights_hash`.
        what: The kind of vector, such as "pooled".
        rows: Each with a film.
        encode: In evaluation mode, on the device.
        device: Where the model is.
    """
    ids = "\n".join(film.film_id for film in rows.films)
    key = f"{weights} {what} {rows.data_hash} {ids}"
    path = folder / f"{what}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    if path.is_file():
        try:
            found = np.load(path, allow_pickle=False)
            if found.ndim == 2 and len(found) == len(rows):
                return found
        except (OSError, ValueError):
            pass
        logger.warning("%s is damaged; the films are encoded again", path)
    found = embed(encode, rows, device)
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        np.save(file, found)
    aside.replace(path)
    return found
