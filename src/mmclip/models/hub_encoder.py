"""Dual encoders of transformers: CLIP, SigLIP, SigLIP 2 and VisionTextDualEncoder models.

A folder or a model of the hub is read with its own image processor and tokenizer, which decide
size, channels, normalisation, crop, text length and padding: pixel values and embeddings are those
of transformers called by hand. The image processor is always that of Pillow, as that of
torchvision, which transformers takes where it is installed, resizes otherwise.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BaseImageProcessor

from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.inputs import read_rgb
from mmclip.data.leakage.trained_on import TrainedOn
from mmclip.data.original_images import open_originals
from mmclip.data.sample import Split
from mmclip.models.dual_encoder import (
    Scoring,
    Seen,
    Weights,
    ZeroshotRule,
    store_of_others,
)


class Family(NamedTuple):
    """What the dual encoders of one configuration have in common.

    Attributes:
        rule: By which zero-shot scores are usual.
        pads_to_end: Whether every text is padded to the full length, as in training.
    """

    rule: ZeroshotRule
    pads_to_end: bool = False


FAMILIES = {
    "clip": Family("prompt_pair"),
    "siglip": Family("sigmoid", pads_to_end=True),
    "siglip2": Family("sigmoid", pads_to_end=True),
    "vision-text-dual-encoder": Family("prompt_pair"),
}
"""By `model_type`. Source: model cards and documents of transformers for SigLIP, whose texts are
padded to `max_length`."""

DEFAULT_TOKENS = 77
"""Of a text, where neither tokenizer nor model says. [chosen: CLIP's]"""


@dataclass(frozen=True)
class Processed:
    """What a model's own image processor makes of an image: its arrays by name."""

    processor: BaseImageProcessor

    def __call__(self, image: object) -> dict[str, np.ndarray]:
        """Of any `inputs.ImageInput`."""
        found = self.processor(images=read_rgb(image), return_tensors="np")
        return {name: np.asarray(values[0]) for name, values in found.items()}


@dataclass(frozen=True)
class HubEncoder:
    """A dual encoder of transformers, see `dual_encoder.DualEncoder`.

    Attributes:
        source: Folder or hub id.
        model: In evaluation mode, in float32.
        text_reader: Its tokenizer.
        prepare: Its image processor.
        image_size: Side of the images that the processor gives, px.
        embed_dim: Width of the joint space.
        scoring: By the rule of its family, or another that was asked for.
        known: What it is said to be trained on.
        batch_size: Images at once.
    """

    source: str
    model: PreTrainedModel
    text_reader: PreTrainedTokenizerBase
    prepare: Processed
    image_size: int
    embed_dim: int
    scoring: Scoring
    known: TrainedOn
    batch_size: int

    @property
    def name(self) -> str:
        """Class, and the last part of the folder or id."""
        return f"{type(self.model).__name__} {Path(self.source).name}"

    @property
    def family(self) -> Family:
        """By its configuration."""
        return FAMILIES[self.model.config.model_type]

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.model.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """None of a tokenizer without offsets, such as that of SigLIP over sentencepiece."""
        reader = self.text_reader
        return reader if isinstance(reader, PreTrainedTokenizerFast) else None

    @property
    def max_tokens(self) -> int:
        """The lower of what tokenizer and text encoder say."""
        config = vars(self.model.config)["text_config"]
        positions = vars(config).get("max_position_embeddings", DEFAULT_TOKENS)
        if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
            positions -= 2  # their positions count from behind the padding's
        return min(positions, self.text_reader.model_max_length)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Mapping[str, np.ndarray]]) -> Float[Tensor, "n e"]:
        """See `DualEncoder.encode_images`; the batch is filled up with its first image."""
        filled = [*images, *[images[0]] * (self.batch_size - len(images))]
        return self.encode_as_given(filled)[: len(images)]

    def encode_as_given(self, images: Sequence[Mapping[str, np.ndarray]]) -> Float[Tensor, "n e"]:
        """As `encode_images`, in a batch as it comes."""
        arrays = {name: np.stack([image[name] for image in images]) for name in images[0]}
        inputs = {name: torch.from_numpy(a).to(self.device) for name, a in arrays.items()}
        found: Any = self.model
        return _embedding(found.get_image_features(**inputs))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """See `DualEncoder.encode_texts`; in lower case where the tokenizer says so."""
        distinct = list(dict.fromkeys(texts))
        out = []
        found: Any = self.model
        for start in range(0, len(distinct), 256):
            some = distinct[start : start + 256]
            out.append(_embedding(found.get_text_features(**self.read_texts(some))))
        number = {text: i for i, text in enumerate(distinct)}
        return torch.cat(out)[[number[text] for text in texts]]

    def read_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoder reads."""
        # The tokenizer of SigLIP 2 lowers by itself only in some versions; to lower twice is once.
        is_lower = self.text_reader.init_kwargs.get("do_lower_case", False)
        found = self.text_reader(
            [text.lower() if is_lower else text for text in texts],
            padding="max_length" if self.family.pads_to_end else "longest",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        return {name: values.to(self.device) for name, values in found.items()}

    def open_data(
        self, folders: Sequence[Path], roots: Sequence[Path] | None = None
    ) -> ImageTextDataset:
        """See `DualEncoder.open_data`: files where they are there, else the folder's copies."""
        return open_originals(folders, roots, self.image_size, self.name)

    @property
    def weights(self) -> Weights:
        """The hash of weights, processor, tokenizer and rule."""
        return Weights(recipe_hash=self.recipe_hash)

    @cached_property
    def recipe_hash(self) -> str:
        """SHA-256 over weights, image processor, reading of texts, and rule."""
        digest = hashlib.sha256(weights_hash(self.model).encode())
        said = (
            self.processor_said, self.text_reader.__class__.__name__, self.max_tokens,
            len(self.text_reader), self.family.pads_to_end, self.scoring.rule,
        )  # fmt: skip
        digest.update(repr(said).encode())
        return digest.hexdigest()

    @cached_property
    def processor_said(self) -> str:
        """Class and settings of the image processor, in a line."""
        of, config = self.prepare.processor, self.prepare.processor.to_dict()
        kept = ("size", "crop_size", "resample", "image_mean", "image_std", "do_center_crop")
        said = ", ".join(f"{k}={_plain(config[k])}" for k in kept if config.get(k) is not None)
        return f"{type(of).__name__} ({said})"

    @property
    def weights_hash(self) -> str:
        """The same."""
        return str(self.weights.recipe_hash)

    @property
    def store(self) -> Path:
        """In the user's cache, as the folder of a model of others is not ours to write into."""
        return store_of_others(self.recipe_hash)

    def check_unseen(self, dataset: ImageTextDataset, split: Split) -> str:
        """By the names of data sets that it is said to be trained on."""
        return self.known.check_unseen(self.name, dataset.samples, split)

    def seen(self, findings: Sequence[str]) -> dict[str, Seen]:
        """Not known."""
        return {}

    def facts(self) -> dict[str, str | int | float]:
        """Model, image processor, text length, and what it is said to be trained on."""
        length = "padded to" if self.family.pads_to_end else "at most"
        return {
            "model": self.source,
            "class": type(self.model).__name__,
            "image processor": self.processor_said,
            "texts": f"{type(self.text_reader).__name__}, {length} {self.max_tokens} tokens",
            "trained on": str(self.known),
        }


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _embedding(output: Any) -> Float[Tensor, "n e"]:
    """The normalised embeddings of what transformers returns, on the CPU."""
    pooled = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(pooled.float(), dim=-1).cpu()


def _plain(value: Any) -> Any:
    """A setting without the keys that are not set."""
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if v is not None}
    return value
