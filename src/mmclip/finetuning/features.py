"""Image encoders to start from, and what they make of films: a vector each, kept on disk."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from jaxtyping import Float32
from torch import Tensor, nn

from mmclip.checkpoint import Checkpoint, load_checkpoint
from mmclip.config import ImageEncoderConfig
from mmclip.data.dataset import Rows, normalise
from mmclip.data.folder import read_meta
from mmclip.embedding_store import stored
from mmclip.models.classifier import Features, FilmEncoder
from mmclip.models.encoders import build_image_encoder, rebuild_encoder
from mmclip.progress import progress

BATCH_FILMS = 256
"""Films encoded at once. [chosen: as `embed.embed_films`]"""


@dataclass(frozen=True)
class Start:
    """Where the weights of an image encoder come from."""

    said: str  # "run first, step 600"
    checkpoint: Checkpoint | None  # of the run, where one is given
    init: str
    features: Features
    film_px: int

    @property
    def is_random(self) -> bool:
        """Whether nothing was learnt."""
        return self.init == "random"

    def encoder(self, seed: int) -> FilmEncoder:
        """New, with the weights to start from; of random ones, those of a seed."""
        if self.init.startswith("hf:"):
            name = self.init.removeprefix("hf:")
            encoder = build_image_encoder(ImageEncoderConfig(pretrained=name), self.film_px)
            if hasattr(encoder.config, "mask_ratio"):  # MAE's model hides patches as it reads
                encoder.config.mask_ratio = 0.0
            return FilmEncoder(encoder, self.features)
        assert self.checkpoint is not None
        if self.is_random:
            set_seed(seed)
            encoder = rebuild_encoder(self.checkpoint.meta["vision_config"])
            return FilmEncoder(encoder, self.features)
        model = load_checkpoint(self.checkpoint.folder).model
        projection = model.visual_projection if self.features == "embedding" else None
        return FilmEncoder(model.vision_model, self.features, projection)


def start_of(init: str, run: Path | None, folder: Path, features: Features | None = None) -> Start:
    """Reads where weights come from.

    Args:
        init: "run", "random" (weights of the run's architecture), or "hf:" and a folder or hub id.
        run: Of pre-training, or a checkpoint of it; None where `init` needs none.
        folder: Data folder, whose films a model of the hub reads at their size.
        features: The vector of a film; None takes "pooled", and "class" of a model of the hub.

    Raises:
        ValueError: When `init` names nothing, lacks a run, or has no such vector.
    """
    is_hub = init.startswith("hf:") and init != "hf:"
    if not is_hub and init not in ("run", "random"):
        raise ValueError(f"--init {init!r} is none of run, random, hf:FOLDER_OR_NAME")
    if features == "embedding" and init != "run":
        raise ValueError(
            f"features=embedding needs --init run, whose projection is learnt, and this is "
            f"--init {init}; take pooled or class"
        )
    if is_hub:
        return Start(init, None, init, features or "class", read_meta(folder)["film_px"])
    if run is None:
        raise ValueError(
            f"--init {init} needs --run, the run of pre-training "
            + ("whose architecture is taken" if init == "random" else "to start from")
        )
    checkpoint = load_checkpoint(run)
    said = f"run {run.name}, step {checkpoint.meta['step']}"
    if init == "random":
        said = f"random weights, architecture of {said}"
    return Start(said, checkpoint, init, features or "pooled", checkpoint.config.data.film_px)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored_features(
    encoder: FilmEncoder, rows: Rows, data: Path, folder: Path, device: torch.device
) -> Float32[np.ndarray, "n d"]:
    """A vector a film, in the order of the rows; read from a file where there is one.

    Args:
        encoder: On the device; it is put into evaluation mode.
        rows: Each with an image.
        data: The data folder that they are of.
        folder: Where vectors are stored.
        device: Where the encoder is.

    Raises:
        ValueError: When a vector is not finite.
    """
    encoder.eval()

    @torch.inference_mode()
    def encoded(part: np.ndarray) -> Tensor:
        return encoder(normalise(rows.pixels(part)).to(device)).float().cpu()

    def parts() -> Iterator[Tensor]:
        with progress("encoding films", len(rows)) as advance:
            for start in range(0, len(rows), BATCH_FILMS):
                part = np.arange(start, min(start + BATCH_FILMS, len(rows)))
                yield encoded(part)
                advance(len(part))

    weights = weights_hash(encoder)
    of = [weights, rows.data_hash, str(read_meta(data).get("films_sha256"))]
    of += [film.film_id for film in rows.films]
    return stored(folder, weights, encoder.features, of, (len(rows), encoder.width), parts())
