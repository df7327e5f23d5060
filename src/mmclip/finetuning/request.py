"""What is fine-tuned on what, and the hashes by which runs are told apart."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmclip.config_io import config_hash, recipe_hash
from mmclip.data.leakage.splits import ids_hash
from mmclip.finetuning.features import Start
from mmclip.finetuning.supervised import (
    FineTuneConfig,
)
from mmclip.finetuning.task import Task, training_ids
from mmclip.model_loading import ModelRequest
from mmclip.models.dual_encoder import Seen

Method = Literal["probe", "full"]


@dataclass(frozen=True)
class FinetuneRequest:
    """What to fine-tune, on what, and where to.

    Attributes:
        folder: Data folder.
        out: Folder of the results.
        protocol: Name or path; None takes `findings` and `sources` with the folder's own split.
        findings: Without a protocol.
        sources: Without a protocol; empty takes all.
        run: Of pre-training; None where `init` needs none.
        others: A model of others, in place of a run: a probe reads its embeddings.
        init: "run", "random" (weights of the run's architecture), or "hf:" and a folder or hub id.
        method: A linear probe, or encoder and head together.
        fractions: In place of the protocol's.
        seeds: In place of the protocol's.
        config: See FineTuneConfig.
        n_resamples: Of the bootstrap.
        command: For results.
        cpu: Do not use a GPU.
    """

    folder: Path
    out: Path
    config: FineTuneConfig
    command: str
    protocol: str | None = None
    findings: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    run: Path | None = None
    others: ModelRequest | None = None
    init: str = "run"
    method: Method = "probe"
    fractions: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    n_resamples: int = 1000
    cpu: bool = False


@dataclass(frozen=True)
class Part:
    """One fraction of the training patients under one seed."""

    task: Task  # with their images to learn from
    fraction: float
    seed: int
    folder: Path  # of its results


@dataclass(frozen=True)
class Common:
    """What all runs of a request have in common.

    Attributes:
        request: As asked for.
        start: Where the weights come from.
        task: With all of its training images.
        leak_check: For results.
        seen: How pre-training named each finding, where that is known.
    """

    request: FinetuneRequest
    start: Start
    task: Task
    leak_check: str
    seen: Mapping[str, Seen]

    def part(self, fraction: float, seed: int) -> Part:
        """A fraction under a seed.

        Raises:
            ManifestError: When no such subset is saved.
        """
        ids = training_ids(self.request.folder, fraction, seed)
        folder = self.request.out / f"{self.request.method}-{100 * fraction:g}-{seed}"
        return Part(self.task.with_train(ids), fraction, seed, folder)


def run_hash(request: FinetuneRequest, start: Start, task: Task, weights: str, seed: int) -> str:
    """SHA-256 over all that a run's scores follow from: images, labels, weights, settings."""
    parts = {
        "method": request.method,
        "weights": weights,
        "features": start.features,
        "is_random": start.is_random,
        "config": config_hash(request.config),
        "protocol": task.protocol.hash,
        "data": task.dataset.data_hash,
        "images": [
            ids_hash([sample.image_id for sample in part.dataset.samples])
            for part in (task.train, task.val, task.test)
        ],
        "seed": seed,
        "n_resamples": request.n_resamples,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def recipe_of(
    request: FinetuneRequest, start: Start, task: Task, weights: str, fraction: float
) -> str:
    """The hash of what fine-tuned weights follow from, all but the seed of fine-tuning.

    That seed, `train_seed` in results, draws the subset of the patients, new weights and the order.
    A pre-training that fine-tuning starts from is part of the recipe by its weights: those of
    another seed are another recipe, as seeds of fine-tuning say nothing of how they differ. Random
    weights are drawn by the seed, so that of them the architecture alone is part of it.
    """
    random_of = start.run.checkpoint.meta["vision_config"] if start.run else None
    given = {
        "method": request.method,
        "start": {"random": random_of} if start.is_random else weights,
        "features": start.features,
        "fraction": fraction,
        "protocol": task.protocol.hash,
        "data": task.dataset.data_hash,
        "split": task.split,
    }
    return recipe_hash(request.config.model_dump(mode="json"), given)
