"""Image encoders to start from, and what they make of images: a vector each, kept on disk."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from jaxtyping import Float32
from torch import Tensor

from mmclip.checkpoint import load_checkpoint
from mmclip.config import ImageEncoderConfig, ResizeMode
from mmclip.data.cache import ImageCache
from mmclip.data.folder import read_meta
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.embed import batch_size_of, encode_batch, prepared_images
from mmclip.embedding_store import stored
from mmclip.evaluation.selection import LabelledImages
from mmclip.files import json_sha256
from mmclip.model_loading import ModelRequest, open_dual_encoder
from mmclip.models.classifier import Features, ImageEncoder
from mmclip.models.dual_encoder import DualEncoder
from mmclip.models.encoders import build_image_encoder, rebuild_encoder
from mmclip.models.hub_encoder import HubEncoder, weights_hash
from mmclip.models.hub_tower import ProcessedSquare, build_tower_of, square_of_tower
from mmclip.progress import progress
from mmclip.run import Run, open_run


@dataclass(frozen=True)
class Start:
    """Where the weights of an image encoder come from."""

    said: str  # "run first, step 600"
    run: Run | None  # of pre-training, where one is given
    init: str
    features: Features
    image_size: int | None
    resize: ResizeMode = "squash"
    others: DualEncoder | None = None  # a model of others
    square: ProcessedSquare | None = None  # what its image encoder is trained on, for full

    def open_data(self, folder: Path) -> ImageTextDataset:
        """A data folder, with images as the encoder reads them."""
        if self.others is not None:
            return self.others.open_data([folder])
        return open_dataset([folder], self.image_size, resize=self.resize)

    @property
    def is_random(self) -> bool:
        """Whether nothing was learnt."""
        return self.init == "random"

    def encoder(self, seed: int) -> ImageEncoder:
        """New, with the weights to start from; of random ones, those of a seed."""
        if self.others is not None:
            assert isinstance(self.others, HubEncoder), "square_of_tower refuses others"
            return ImageEncoder(build_tower_of(self.others), self.features)
        if self.init.startswith("hf:"):
            assert self.image_size is not None, "a data folder says it"
            name = self.init.removeprefix("hf:")
            encoder = build_image_encoder(ImageEncoderConfig(pretrained=name), self.image_size)
            return ImageEncoder(encoder, self.features)
        assert self.run is not None
        if self.is_random:
            set_seed(seed)
            encoder = rebuild_encoder(self.run.checkpoint.meta["vision_config"])
            return ImageEncoder(encoder, self.features)
        model = load_checkpoint(self.run.checkpoint.folder).model
        projection = model.visual_projection if self.features == "embedding" else None
        return ImageEncoder(model.vision_model, self.features, projection)


def start_of(init: str, run: Path | None, folder: Path, features: Features | None = None) -> Start:
    """Reads where weights come from.

    Args:
        init: "run", "random" (weights of the run's architecture), or "hf:" and a folder or hub id.
        run: Of pre-training, or a checkpoint of it; None where `init` needs none.
        folder: Data folder, whose images a model of the hub reads at their size.
        features: The vector of an image; None takes "pooled", and "class" of a model of the hub.

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
        meta = read_meta(folder)
        return Start(
            init, None, init, features or "class", meta["image_size"], meta.get("resize", "squash")
        )
    if run is None:
        raise ValueError(
            f"--init {init} needs --model, the run of pre-training "
            + ("whose architecture is taken" if init == "random" else "to start from")
        )
    opened = open_run(run)
    said = f"run {opened.folder_name}, step {opened.step}"
    if init == "random":
        said = f"random weights, architecture of {said}"
    data = opened.config.data
    return Start(said, opened, init, features or "pooled", data.image_size, data.resize)


def start_of_others(
    model: ModelRequest,
    init: str,
    features: Features | None,
    device: torch.device,
    is_full: bool = False,
) -> Start:
    """A model of others: a probe reads its embeddings, full fine-tuning trains its image encoder.

    Args:
        model: Which.
        init: Must be "run", as its own weights are taken.
        features: Of a probe "embedding", of full fine-tuning another; None takes what fits.
        device: Where the model goes.
        is_full: Whether its image encoder is to be trained.

    Raises:
        ValueError: When something else is asked of it.
    """
    if init != "run":
        raise ValueError(
            f"--init {init} is for a run, and {model.source} is a model of others; leave --model "
            f"out to start from an image encoder by --init hf:NAME"
        )
    if not is_full and features not in (None, "embedding"):
        raise ValueError(
            f"features={features} is not to be had of {model.source}, whose embeddings are read; "
            f"take features=embedding, or start from its image encoder by --init hf:NAME"
        )
    others = open_dual_encoder(model, device)
    square = square_of_tower(others) if is_full else None
    chosen = (features or "pooled") if is_full else "embedding"
    return Start(others.name, None, init, chosen, others.image_size, others=others, square=square)


def with_squares(
    labelled: LabelledImages, square: ProcessedSquare, image_size: int, folder: Path
) -> LabelledImages:
    """The same images as squares that an image processor makes of them, each made once and stored.

    Args:
        labelled: Read from files, or from copies in a data folder.
        square: What makes them.
        image_size: Of the squares.
        folder: Where they are stored.

    Raises:
        ManifestError: When an image cannot be read.
    """
    dataset = labelled.dataset
    shape = (len(dataset), image_size, image_size)

    def parts() -> Iterator[Tensor]:
        with progress("reading images", len(dataset)) as advance:
            for squares in prepared_images(square, dataset, _SQUARES_AT_ONCE):
                yield torch.from_numpy(np.stack(squares))
                advance(len(squares))

    of = [dataset.data_hash, *(sample.image_id for sample in dataset.samples)]
    of += ["a copy" if root is None else "files" for root in dataset.roots]
    images = stored(folder, json_sha256(square.config()), "squares", of, shape, parts())
    where = np.stack([np.zeros(len(dataset), np.int64), np.arange(len(dataset))], 1)
    made = replace(
        dataset, caches=(ImageCache(images),), where=where, image_size=image_size, roots=()
    )
    return replace(labelled, dataset=made)


_SQUARES_AT_ONCE = 64
"""Images that are prepared together. [chosen: 10 MB at 384 px]"""


def stored_features(
    encoder: ImageEncoder, dataset: ImageTextDataset, data: Path, folder: Path, device: torch.device
) -> Float32[np.ndarray, "n d"]:
    """One vector per image, in the order of the rows; read from a file where there is one.

    Args:
        encoder: On the device; it is put into evaluation mode.
        dataset: Each with an image.
        data: The data folder that they are of.
        folder: Where vectors are stored.
        device: Where the encoder is.

    Raises:
        ValueError: When a vector is not finite.
    """
    encoder.eval()

    def parts() -> Iterator[Tensor]:
        size = batch_size_of(dataset, device)
        with progress("encoding images", len(dataset)) as advance:
            for start in range(0, len(dataset), size):
                part = np.arange(start, min(start + size, len(dataset)))
                yield encode_batch(encoder, dataset.pixels(part), device, size)
                advance(len(part))

    weights = weights_hash(encoder)
    of = [weights, dataset.data_hash, str(read_meta(data).get("images_sha256"))]
    of += [sample.image_id for sample in dataset.samples]
    return stored(folder, weights, encoder.features, of, (len(dataset), encoder.width), parts())
