"""A run: what a training leaves, and what follows from it for whatever uses its weights.

run/config.json, trained_on.npy, trained_looks.npy, private.key, seen.json, metrics.jsonl,
checkpoints/step_000500/
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from mmclip.checkpoint import Checkpoint, load_checkpoint, run_file, run_folder
from mmclip.config import Config, recipe_hash
from mmclip.data.batches import SEEN_FILE
from mmclip.data.entities import find_entities
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.leakage.trained import (
    KEY_FILE,
    LOOKS_FILE,
    TRAINED_FILE,
    UNDECIDED,
    read_trained,
    refuse_trained,
)
from mmclip.data.sample import Split
from mmclip.models.mmclip import MMCLIP

logger = logging.getLogger(__name__)

Seen = Literal["report", "prompt", "label", "none"]
"""How a finding was named in training: in reports, in prompts made of labels, as a label of its
own, or not at all. Only the first and the last make a score zero-shot."""


class Weights(NamedTuple):
    """What weights follow from, for results; None where it is not known."""

    config_hash: str | None = None
    train_seed: int | None = None
    recipe_hash: str | None = None  # of all that they follow from but that seed


UNKNOWN_WEIGHTS = Weights()
"""Those of a model that is not ours."""


@dataclass(frozen=True)
class Run:
    """A run with one of its checkpoints: its weights, and where they come from.

    Attributes:
        name: For people: the last part of the path that it was opened by.
        checkpoint: Model, tokenizer, configuration and meta.json of the step that is used.
    """

    name: str
    checkpoint: Checkpoint

    @property
    def model(self) -> MMCLIP:
        """The model, on its device."""
        return self.checkpoint.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Of the text encoder."""
        return self.checkpoint.tokenizer

    @property
    def config(self) -> Config:
        """The configuration that it was trained by."""
        return self.checkpoint.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.logit_scale.device

    @property
    def folder(self) -> Path:
        """The run's folder; of a checkpoint that lies in none, the checkpoint's own."""
        return run_folder(self.checkpoint.folder)

    @property
    def step(self) -> int:
        """Optimiser steps that the weights have seen."""
        return self.checkpoint.meta["step"]

    @property
    def config_hash(self) -> str:
        """SHA-256 of the configuration, the seed with it."""
        return self.checkpoint.meta["config_hash"]

    @property
    def recipe_hash(self) -> str:
        """SHA-256 of all that the weights follow from but the seed."""
        given = {k: self.checkpoint.meta[k] for k in ("data_hash", "shuffle_pairs", "step")}
        return recipe_hash(self.config, given)

    @property
    def weights(self) -> Weights:
        """What the weights follow from."""
        return Weights(self.config_hash, self.config.train.seed, self.recipe_hash)

    def open_data(self, folders: Sequence[Path]) -> ImageTextDataset:
        """Data folders, with images at the size and by the resizing that the model reads.

        Raises:
            ManifestError: When a folder is unfinished, or holds images of another size.
        """
        return open_dataset(folders, self.config.data.image_size, resize=self.config.data.resize)

    def check_unseen(self, dataset: ImageTextDataset, split: Split) -> str:
        """Stops before images are scored that trained; of split train it says so alone.

        Args:
            dataset: To be scored.
            split: That it is of.

        Returns:
            What was found, for results.

        Raises:
            CheckpointError: When what the run keeps of its training was changed or is missing.
            ManifestError: When an image of val or test has trained, or looks as one that did, or
                its patient has trained.
        """
        if self._own_file(TRAINED_FILE) is None or self._own_file(LOOKS_FILE) is None:
            return self._undecided(f"{self.folder} is a checkpoint without the folder of its run")
        trained = read_trained(self.folder, self.checkpoint.meta["collections"])
        if trained is None:
            return self._undecided(f"the run came without its {KEY_FILE}")
        try:
            return refuse_trained(dataset, trained)
        except ManifestError as error:
            if split != "train":
                raise
            logger.warning("split train: %s", error)
            return f"split train: {error}"

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
            findings: That are scored.

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
    """Each name, with the concepts that the lexicon finds in it."""
    return [
        [name, *(entity.concept for entity in entities)]
        for name, entities in zip(names, find_entities(names), strict=True)
    ]


def open_run(path: Path, device: torch.device | None = None) -> Run:
    """Opens a run at its newest checkpoint, or at the one that is named.

    Args:
        path: The run's folder, or one of its checkpoints/step_... folders.
        device: Where the model goes; None leaves it on the CPU.

    Raises:
        CheckpointError: When there is none, its files were changed, or the weights do not fit.
    """
    checkpoint = load_checkpoint(path)
    if device is not None:
        checkpoint.model.to(device)
    return Run(path.name, checkpoint)
