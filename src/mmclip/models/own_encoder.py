"""A dual encoder of your own: an object with encode_images and encode_texts, by module:function."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.inputs import read_rgb
from mmclip.data.leakage.trained_on import TrainedOn
from mmclip.data.original_images import open_originals
from mmclip.data.sample import Split
from mmclip.models.dual_encoder import (
    PROBE_TEXT,
    Scoring,
    Seen,
    Weights,
    ZeroshotRule,
    probe_image,
    rule_named,
    store_of_others,
)
from mmclip.models.layout import EncoderError
from mmclip.models.pretrained import first_line
from mmclip.own_code import load_own

BATCH_SIZE = 16
"""Whole images that are held at once. [chosen: 16 radiographs of 3,000 x 2,500 px take 360 MB]"""


@runtime_checkable
class OwnModel(Protocol):
    """What the function of module:function returns.

    It may have further attributes: `logit_scale` (float, 1 without it), `zeroshot_rule` (see
    `dual_encoder.Scoring`, "prompt_pair" without it) and `image_size` (px; then enlarged images
    are warned of).
    """

    def encode_images(self, images: list[Image.Image]) -> Any:
        """Embeddings [n, e] of upright images in RGB, as large as their files: an array or tensor.

        They need not be normalised.
        """
        ...

    def encode_texts(self, texts: list[str]) -> Any:
        """Embeddings [n, e] of texts."""
        ...


@dataclass(frozen=True)
class OwnEncoder:
    """Your object as a `dual_encoder.DualEncoder`.

    Attributes:
        source: module:function.
        model: What the function returned.
        image_size: As it says.
        embed_dim: As it is found.
        scoring: By its own rule, or another that was asked for.
        known: What it is said to be trained on.
        fingerprint: SHA-256 of what it makes of one image and one text, to 3 digits.
        batch_size: Images at once.
    """

    source: str
    model: OwnModel
    image_size: int | None
    embed_dim: int
    scoring: Scoring
    known: TrainedOn
    fingerprint: str
    batch_size: int = BATCH_SIZE

    @property
    def name(self) -> str:
        """As it was named."""
        return self.source

    @property
    def device(self) -> torch.device:
        """Its own affair: embeddings come to the CPU."""
        return torch.device("cpu")

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Not known."""
        return None

    @property
    def max_tokens(self) -> int:
        """Not known: 0."""
        return 0

    @property
    def prepare(self) -> Callable[[object], Image.Image]:
        """The image in RGB, whole."""
        return read_rgb

    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "n e"]:
        """See `DualEncoder.encode_images`; batches are as full as they come."""
        return _embeddings(self.model.encode_images(list(images)), len(images), self, "images")

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """See `DualEncoder.encode_texts`."""
        return _embeddings(self.model.encode_texts(list(texts)), len(texts), self, "texts")

    def open_data(
        self, folders: Sequence[Path], roots: Sequence[Path] | None = None
    ) -> ImageTextDataset:
        """See `DualEncoder.open_data`: files where they are there, else the folder's copies."""
        return open_originals(folders, roots, self.image_size, self.name)

    @property
    def weights(self) -> Weights:
        """Name, fingerprint and rule."""
        said = f"{self.source} {self.fingerprint} {self.scoring.rule}"
        return Weights(recipe_hash=hashlib.sha256(said.encode()).hexdigest())

    @property
    def weights_hash(self) -> str:
        """The same."""
        return str(self.weights.recipe_hash)

    @property
    def store(self) -> Path:
        """In the user's cache."""
        return store_of_others(str(self.weights.recipe_hash))

    def check_unseen(self, dataset: ImageTextDataset, split: Split) -> str:
        """By the names of data sets that it is said to be trained on."""
        return self.known.check_unseen(self.name, dataset.samples, split)

    def seen(self, findings: Sequence[str]) -> dict[str, Seen]:
        """Not known."""
        return {}

    def facts(self) -> dict[str, str | int | float]:
        """Model, and what it is said to be trained on."""
        return {
            "model": self.source,
            "class": type(self.model).__name__,
            "embeddings of a test image and text": self.fingerprint[:16],
            "trained on": str(self.known),
        }


def open_own_encoder(
    source: str, rule: ZeroshotRule | None = None, known: TrainedOn = TrainedOn()
) -> OwnEncoder:
    """Calls the function of module:function, and tries its object on one image and one text.

    Args:
        source: module:function.
        rule: In place of its own.
        known: What it is said to be trained on.

    Raises:
        EncoderError: When it cannot be imported, or gives no pair of encoders of one space.
    """
    function = load_own(source, "model")
    made = _called(f"{source}()", function)
    for method in ("encode_images", "encode_texts"):
        if not callable(getattr(made, method, None)):
            raise EncoderError(
                f"{source} returned a {type(made).__name__} without {method}; return an object "
                f"with encode_images(images) and encode_texts(texts)"
            )
    scale = getattr(made, "logit_scale", 1.0)
    scoring = Scoring(
        rule or rule_named(getattr(made, "zeroshot_rule", "prompt_pair")), float(scale)
    )
    opened = OwnEncoder(
        source, made, getattr(made, "image_size", None), 0, scoring, known, fingerprint=""
    )
    image = opened.prepare(probe_image())
    of_image = _called(f"encode_images of {source}", lambda: opened.encode_images([image]))
    of_text = _called(f"encode_texts of {source}", lambda: opened.encode_texts([PROBE_TEXT]))
    if of_image.shape != of_text.shape:
        raise EncoderError(
            f"{source} gives images of {of_image.shape[1]} numbers and texts of "
            f"{of_text.shape[1]}, which do not compare; both must lie in one space"
        )
    digest = hashlib.sha256((np.round(torch.cat([of_image, of_text]).numpy(), 3) + 0.0).tobytes())
    return replace(opened, embed_dim=of_image.shape[1], fingerprint=digest.hexdigest())


def _called(what: str, function: Callable[[], Any]) -> Any:
    """What a function of the user returns.

    Raises:
        EncoderError: In place of whatever it raises.
    """
    try:
        return function()
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(
            f"{what} failed with {type(error).__name__}: {first_line(error)} (`mmclip --debug` "
            f"shows where)"
        ) from error


def _embeddings(given: Any, n: int, of: OwnEncoder, what: str) -> Float[Tensor, "n e"]:
    """What the user's object returned, normalised, in float32 on the CPU.

    Raises:
        EncoderError: When it is no array [n, e] of finite numbers, or a row of it is 0.
    """
    try:
        found = given.detach() if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given))
        found = found.cpu().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise EncoderError(
            f"encode_{what} of {of.source} returned a {type(given).__name__} ({error}); return an "
            f"array or tensor [n, e] of numbers"
        ) from None
    if found.ndim != 2 or len(found) != n:
        raise EncoderError(
            f"encode_{what} of {of.source} returned shape {list(found.shape)} for {n} {what}; "
            f"return one row for each, [{n}, e]"
        )
    if of.embed_dim and found.shape[1] != of.embed_dim:
        raise EncoderError(
            f"encode_{what} of {of.source} returned rows of {found.shape[1]} numbers, and "
            f"{of.embed_dim} before; images and texts must lie in one space"
        )
    if not found.isfinite().all() or (found.norm(dim=-1) == 0).any():
        raise EncoderError(
            f"encode_{what} of {of.source} returned a row that is 0 or not finite; every image and "
            f"text needs a direction"
        )
    return F.normalize(found, dim=-1)
