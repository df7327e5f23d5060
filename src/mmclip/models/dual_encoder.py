"""The one face of every pair of encoders: a run of ours, a model of transformers, or your own.

    run.Run                          a run of `mmclip pretrain`
    hub_encoder.HubEncoder           CLIP, SigLIP and VisionTextDualEncoder models of transformers
    own_encoder.OwnEncoder           whatever a function of yours returns

`mmclip.model_loading` opens all three.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from scipy.special import expit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.sample import Split

Seen = Literal["report", "prompt", "label", "none"]
"""How a finding was named in training: in reports, in prompts made of labels, as a label of its
own, or not at all. Only the first and the last make a score zero-shot."""

ZeroshotRule = Literal["prompt_pair", "similarity", "sigmoid"]
"""What an image's score for a finding is, see `Scoring`."""


class Weights(NamedTuple):
    """What weights follow from, for results; None where it is not known."""

    config_hash: str | None = None
    train_seed: int | None = None
    recipe_hash: str | None = None  # of all that they follow from but that seed


UNKNOWN_WEIGHTS = Weights()
"""Those of scores that come from a file."""


class PromptEmbeddings(NamedTuple):
    """One embedding a finding and side: the normalised mean over the wordings."""

    positive: Float[Tensor, "k e"]
    negative: Float[Tensor, "k e"]


@dataclass(frozen=True)
class Scoring:
    """How the score of an image for a finding follows from embeddings.

    prompt_pair: softmax over the scaled cosines with the positive and the negative prompt: the
        probability that the positive one fits. Source: CheXzero (Tiu et al. 2022), methods,
        "softmax evaluation".
    similarity: the cosine with the positive prompt. Source: CLIP section 3.1 (arXiv:2103.00020).
    sigmoid: sigmoid of scale x cosine + bias, of the positive prompt. Source: SigLIP
        (arXiv:2303.15343), whose training makes it the probability that text and image are a pair.

    Attributes:
        rule: One of these.
        scale: The inverse temperature.
        bias: Of the sigmoid.
    """

    rule: ZeroshotRule
    scale: float
    bias: float = 0.0

    @property
    def equal_prompts(self) -> float | None:
        """The score where the positive and the negative prompt fit equally well, if it is known."""
        return 0.5 if self.rule == "prompt_pair" else None

    def scores(
        self, images: Float[Tensor, "n e"], prompts: PromptEmbeddings
    ) -> Float[np.ndarray, "n k"]:
        """The score of each image for each finding; those of an image hang on no other image."""
        asked = prompts.positive.double()
        if self.rule == "prompt_pair":
            asked = (prompts.positive - prompts.negative).double()
        cosines = torch.stack([row_products(images, each) for each in asked], 1)
        if self.rule == "similarity":
            return cosines.cpu().numpy()
        return sigmoid(self.scale * cosines + (self.bias if self.rule == "sigmoid" else 0.0))


def rule_named(name: str) -> ZeroshotRule:
    """A rule by its name.

    Raises:
        ValueError: When there is none of that name.
    """
    for rule in get_args(ZeroshotRule):
        if name == rule:
            return rule
    raise ValueError(f"zero-shot rule {name!r} is none of {', '.join(get_args(ZeroshotRule))}")


def sigmoid(logits: Float[Tensor, "n k"]) -> Float[np.ndarray, "n k"]:
    """Probabilities in float64. torch's own differ in the last digit with an element's place."""
    return expit(logits.double().cpu().numpy())


def row_products(rows: Float[Tensor, "n d"], vector: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
    """The product of each row with a vector, in float64: the same whatever stands in other rows.

    A matrix product would add in an order that depends on the number of rows.
    """
    return (rows.double() * vector.double()).sum(1)


PIXELS_AT_ONCE = {"cuda": 256 * 224**2, "cpu": 8 * 224**2}
"""Pixels of a batch by device. [chosen: a ViT-B fits any GPU so; on a CPU one image alone takes
the time of a batch, and more at once are no faster]"""

MOST_IMAGES = {"cuda": 256, "cpu": 32}
"""Images of a batch by device, however small they are."""


def images_at_once(device: torch.device, image_size: int) -> int:
    """How many images are encoded together, a power of two; it follows from these two alone."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    fits = max(1, PIXELS_AT_ONCE[kind] // image_size**2)
    return min(MOST_IMAGES[kind], 1 << (fits.bit_length() - 1))


PROBE_TEXT = "Small left pleural effusion."
"""What a model of others is tried on before its work begins, with `probe_image`."""


def probe_image() -> UInt8[np.ndarray, "h w"]:
    """All greys from left to right, larger than what models read."""
    return np.tile(np.linspace(0, 255, 640).astype(np.uint8), (512, 1))


def store_of_others(recipe_hash: str) -> Path:
    """Where embeddings of a model of others are kept: the user's cache, as its folder is not ours.

    Args:
        recipe_hash: Of the model.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mmclip" / "embeddings" / recipe_hash[:16]


@runtime_checkable
class DualEncoder(Protocol):
    """An image and a text encoder with one joint space, and what is known of their training."""

    @property
    def name(self) -> str:
        """For people, such as "run first at step 600"."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def scoring(self) -> Scoring:
        """How a zero-shot score follows from embeddings."""
        ...

    @property
    def image_size(self) -> int | None:
        """Side of what the image encoder reads, px; None where it is not known."""
        ...

    @property
    def embed_dim(self) -> int:
        """Width of the joint space."""
        ...

    @property
    def batch_size(self) -> int:
        """Images that are encoded together."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """What reads texts, where it tells which part of a text each token is; else None."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens that are read of a text, those of the frame included."""
        ...

    @property
    def prepare(self) -> Callable[[object], Any]:
        """Makes of an image (`inputs.ImageInput`) what `encode_images` takes.

        It can be sent to another process, and raises ImageError of what is no image.
        """
        ...

    def encode_images(self, images: Sequence[Any]) -> Float[Tensor, "n e"]:
        """L2-normalised embeddings of up to `batch_size` prepared images, on the CPU.

        Those of an image are the same to the last digit whatever images stand beside it, but for
        an object of your own, which is given batches as they come.
        """
        ...

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """L2-normalised embeddings of texts, on the CPU."""
        ...

    def open_data(
        self, folders: Sequence[Path], roots: Sequence[Path] | None = None
    ) -> ImageTextDataset:
        """Data folders, with images as the model reads them.

        Args:
            folders: Of `mmclip data build`.
            roots: Where the files of each folder's images lie; None asks the folders.

        Raises:
            ManifestError: When a folder cannot be read, or its images do not fit the model.
        """
        ...

    @property
    def weights(self) -> Weights:
        """What the weights follow from."""
        ...

    @property
    def weights_hash(self) -> str:
        """SHA-256 by which stored embeddings are told to be of these very weights."""
        ...

    @property
    def store(self) -> Path:
        """The folder in which its embeddings are kept."""
        ...

    def check_unseen(self, dataset: ImageTextDataset, split: Split) -> str:
        """Stops before images are scored that trained; of split train it says so alone.

        Args:
            dataset: To be scored.
            split: That the images are of.

        Returns:
            What was found, for results.

        Raises:
            ManifestError: When images of val or test, or their patients, have trained.
        """
        ...

    def seen(self, findings: Sequence[str]) -> dict[str, Seen]:
        """How training named each finding; empty where that is not known."""
        ...

    def facts(self) -> dict[str, str | int | float]:
        """What results say of the model."""
        ...
