"""A run: the folder that a training leaves, opened for every command that uses its weights.

Its files: config.json, trained_on.npy, trained_looks.npy, private.key, seen.json, metrics.jsonl,
checkpoints/step_000500/
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_meta,
    find_checkpoint,
    load_checkpoint,
    run_file,
    run_files,
    run_folder,
)
from mmclip.config import Config, ResizeMode
from mmclip.config_io import recipe_hash
from mmclip.data.entities import find_entities
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.images import resize_image
from mmclip.data.inputs import read_input
from mmclip.data.leakage.trained import (
    KEY_FILE,
    LOOKS_FILE,
    TRAINED_FILE,
    UNDECIDED,
    TrainedError,
    read_trained,
    refuse_trained,
)
from mmclip.data.sample import Split
from mmclip.data.streams import SEEN_FILE
from mmclip.embed import embed_texts, encode_squares
from mmclip.embedding_store import store_folder
from mmclip.models.dual_encoder import (
    Scoring,
    Seen,
    Weights,
    ZeroshotRule,
    images_at_once,
)
from mmclip.models.mmclip import MMCLIP

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run with one of its checkpoints: its weights, and where they come from.

    Attributes:
        folder_name: The last part of the path that it was opened by.
        checkpoint: Model, tokenizer, configuration and meta.json of the step that is used.
        rule: Rule of zero-shot scores, see `dual_encoder.Scoring`. The prompt pair serves either
            loss: the sigmoid loss gives the odds that a text is the image's own, and the softmax
            over two is the probability of the positive prompt, given that one of both is.
            [docs/log.md]
        most_images: Images that are encoded together; None takes what fits.
    """

    folder_name: str
    checkpoint: Checkpoint
    rule: ZeroshotRule = "prompt_pair"
    most_images: int | None = None

    @property
    def name(self) -> str:
        """Folder and step."""
        return f"{self.folder_name} at step {self.step}"

    @property
    def model(self) -> MMCLIP:
        """The model, on its device."""
        return self.checkpoint.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the text encoder."""
        return self.checkpoint.tokenizer

    @property
    def config(self) -> Config:
        """The configuration of its training."""
        return self.checkpoint.config

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.logit_scale.device

    @property
    def folder(self) -> Path:
        """The run's folder; for a checkpoint outside any run, the checkpoint's own folder."""
        return run_folder(self.checkpoint.folder)

    @property
    def step(self) -> int:
        """Optimiser steps that the weights have seen."""
        return self.checkpoint.meta["step"]

    @property
    def config_hash(self) -> str:
        """SHA-256 of the configuration, including the seed."""
        return self.checkpoint.meta["config_hash"]

    @property
    def recipe_hash(self) -> str:
        """SHA-256 of all that determines the weights but the seed."""
        given = {k: self.checkpoint.meta[k] for k in ("data_hash", "shuffle_pairs", "step")}
        return recipe_hash(self.checkpoint.meta["config"], given)

    @property
    def weights(self) -> Weights:
        """What determines the weights: configuration hash, seed, recipe hash."""
        return Weights(self.config_hash, self.config.train.seed, self.recipe_hash)

    @property
    def scoring(self) -> Scoring:
        """How prompts score: its rule, and the learnt scale and bias."""
        bias = self.model.logit_bias
        return Scoring(
            self.rule,
            float(self.model.scale().detach()),
            0.0 if bias is None else float(bias.detach()),
        )

    @property
    def image_size(self) -> int:
        """Side of the squares that it reads, px."""
        return self.config.data.image_size

    @property
    def embed_dim(self) -> int:
        """Width of the joint space."""
        return self.config.model.embed_dim

    @property
    def batch_size(self) -> int:
        """Number of images that are encoded together."""
        return self.most_images or images_at_once(self.device, self.image_size)

    @property
    def max_tokens(self) -> int:
        """Number of tokens of a text that are read."""
        return self.config.data.max_tokens

    @property
    def prepare(self) -> Callable[[object], UInt8[np.ndarray, "s s"]]:
        """Makes the grey square of an image that the model reads."""
        return partial(square_of, image_size=self.image_size, resize=self.config.data.resize)

    def encode_images(self, images: Sequence[UInt8[np.ndarray, "s s"]]) -> Float[Tensor, "n e"]:
        """See `DualEncoder.encode_images`."""
        return encode_squares(self.model, torch.from_numpy(np.stack(images)), self.batch_size)

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """See `DualEncoder.encode_texts`."""
        return embed_texts(self.model, self.tokenizer, texts, self.max_tokens)

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the file of the weights."""
        return self.checkpoint.meta["sha256"]["model.safetensors"]

    @property
    def store(self) -> Path:
        """Folder of stored embeddings, in the run's folder."""
        return store_folder(self.checkpoint)

    def open_data(
        self, folders: Sequence[Path], roots: Sequence[Path] | None = None
    ) -> ImageTextDataset:
        """Opens data folders, with images at the size and resizing that the model reads.

        Raises:
            ManifestError: When a folder is unfinished, or holds images of another size.
            ValueError: When roots are given: a run reads what its training read.
        """
        if roots is not None:
            raise ValueError(
                f"--root is for models of others, which read files, and {self.folder_name} is a "
                f"run, which reads the data folder; leave --root out"
            )
        return open_dataset(folders, self.config.data.image_size, resize=self.config.data.resize)

    def used(self, rule: ZeroshotRule | None, most_images: int | None) -> "Run":
        """The same run with another rule of zero-shot scores or another batch size, where given.

        Raises:
            ValueError: When the rule is that of another loss.
        """
        if rule == "sigmoid" and self.model.logit_bias is None:
            raise ValueError(
                f"rule sigmoid is for models that a sigmoid loss trained, and {self.folder_name} "
                f"learnt by softmax; take prompt_pair or similarity"
            )
        return replace(self, rule=rule or self.rule, most_images=most_images)

    def check_unseen(self, dataset: ImageTextDataset, split: Split) -> str:
        """Refuses to score images that the run trained on; for split train it only warns.

        Args:
            dataset: The images to score.
            split: Their split.

        Returns:
            What was found, for results.

        Raises:
            CheckpointError: When what the run keeps of its training was changed or is missing.
            TrainedError: When an image of val or test has trained, or looks as one that did, or
                its patient has trained.
        """
        if self._own_file(TRAINED_FILE) is None or self._own_file(LOOKS_FILE) is None:
            return self._undecided(f"{self.name} is a checkpoint without the folder of its run")
        if KEY_FILE in run_files(self.checkpoint.folder):
            self._own_file(KEY_FILE)  # another key would find that nothing trained
        trained = read_trained(self.folder, self.checkpoint.meta["collections"])
        if trained is None:
            return self._undecided(f"the run came without its {KEY_FILE}")
        try:
            return refuse_trained(dataset, trained)
        except TrainedError as error:
            if split != "train":
                raise
            logger.warning("split train: %s", error)
            return f"split train: {error.counts}"

    def _undecided(self, why: str) -> str:
        logger.warning("whether the run saw these images cannot be checked: %s", why)
        return f"{UNDECIDED}: {why}"

    def _own_file(self, name: str) -> Path | None:
        return run_file(self.checkpoint.folder, name)

    def seen(self, findings: Sequence[str]) -> dict[str, Seen]:
        """How each finding was named while the run trained; see `Seen`.

        A finding was seen in reports when they name it, or a concept that the lexicon finds in its
        name. What prompts or labels named outweighs reports. Empty where the run does not say.

        Args:
            findings: The findings to score.

        Raises:
            CheckpointError: When the run's file of it was changed or is missing.
        """
        path = self._own_file(SEEN_FILE)
        if path is None:
            logger.warning(
                "%s is a checkpoint without the folder of its run: how findings were named in "
                "training is not known",
                self.folder,
            )
            return {}
        stored = json.loads(path.read_text("utf-8"))
        names = [name.lower() for name in findings]
        found: dict[str, Seen] = {}
        for finding, concepts in zip(findings, _concepts(names), strict=True):
            found[finding] = _way(concepts, stored)
        return found

    def facts(self) -> dict[str, str | int | float]:
        """Pairs, data and step of the training, for results."""
        meta = self.checkpoint.meta
        return {
            "training pairs": meta["n_pairs"],
            "training data": meta["data_hash"][:12],
            "step": self.step,
        }


def _way(concepts: Sequence[str], stored: Mapping[str, Sequence[str]]) -> Seen:
    """The strongest way in which training named one of some concepts."""
    ways: tuple[Seen, ...] = ("label", "prompt", "report")
    for how in ways:
        if {*concepts} & {*stored[how]}:
            return how
    return "none"


def _concepts(names: Sequence[str]) -> list[list[str]]:
    """Each name with the concepts that the lexicon finds in it."""
    return [
        [name, *(entity.concept for entity in entities)]
        for name, entities in zip(names, find_entities(names), strict=True)
    ]


def square_of(image: object, image_size: int, resize: ResizeMode) -> UInt8[np.ndarray, "s s"]:
    """An image in the square that a model of ours reads; see `inputs.read_input`.

    A square of that size, as a data folder holds it, is taken as it is.
    """
    side = (image_size, image_size)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == side:
        return image
    return resize_image(read_input(image), image_size, resize)


def open_run(path: Path, device: torch.device | None = None) -> Run:
    """Opens a run at its best checkpoint by validation (else the newest), or at the one named.

    Args:
        path: The run's folder, or one of its checkpoints/step_... folders.
        device: Where the model goes; None leaves it on the CPU.

    Raises:
        CheckpointError: When there is none, its files were changed, the weights do not fit, or they
            are fine-tuned ones, without a text encoder.
    """
    folder = find_checkpoint(path)
    if "text_config" not in checkpoint_meta(folder):
        raise CheckpointError(
            f"{path} is a fine-tuned result, which has no text encoder; score images by `mmclip "
            f"predict`, or give the run that it was made of"
        )
    checkpoint = load_checkpoint(folder)
    if device is not None:
        checkpoint.model.to(device)
    return Run(path.name, checkpoint)
