"""Full fine-tuning: encoder and head learn labels; validation images choose the step, and end
it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmclip.batch import BatchSlice, on_each_tensor
from mmclip.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    checkpoint_meta,
    find_checkpoint,
    load_trainer_state,
    put_weights,
    read_weights,
    write_checkpoint,
)
from mmclip.config import AugmentConfig, TrainConfig
from mmclip.config_io import Frozen
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import AUGMENT_UNIFORMS, ImageTextDataset, augmented
from mmclip.data.sampling import Purpose, Schedule, image_key, keyed_uniform
from mmclip.embed import batch_size_of, encode_batch
from mmclip.evaluation.baselines import fit_logistic
from mmclip.evaluation.metrics import macro_auroc
from mmclip.evaluation.selection import LabelledImages
from mmclip.losses import label_class_sum, label_sum
from mmclip.models.classifier import Classifier, Features, freeze_unused, image_of, lr_scales
from mmclip.models.dual_encoder import sigmoid
from mmclip.models.encoders import no_decay_names
from mmclip.training.early_stop import best_of, has_ended
from mmclip.training.gather import all_gather_rows
from mmclip.training.loop import fit
from mmclip.training.optimizer import make_optimizer
from mmclip.training.state import TrainState, restore_trainer_state, trainer_state
from mmclip.training.terms import Verdict


class FineTuneConfig(Frozen):
    """How fine-tuning learns; docs/finetuning.md explains each key.

    Attributes:
        features: The vector that probe or head read; None takes "pooled", and "class" of an encoder
            from the hub, whose pooler may never have been trained.
        head: What the head starts from: the linear probe of the same images, so that the encoder
            learns from a head that already reads it, or zeros. Source: Kumar et al. 2022
            (arXiv:2202.10054), linear probing, then fine-tuning.
        lr_decay: Of the learning rate, a layer down. Source: MAE, appendix A.1.
        patience: Validations without a better one, after which training ends.
        max_positive_weight: Limit of absent / present images, the weight of a present label.
            [chosen: a finding of 1 in 1,000 must not rule the gradient]
        augment: As in pre-training.
        train: The optimisation; validation follows every `save_every_steps`.
    """

    features: Features | None = None
    head: Literal["probe", "zeros"] = "probe"
    lr_decay: float = Field(default=0.75, gt=0, le=1)
    patience: int = Field(default=5, gt=0)
    max_positive_weight: float = Field(default=10.0, ge=1)
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()

    def of_random_weights(self) -> "FineTuneConfig":
        """The same for an encoder that has learnt nothing yet: there is nothing to read from it,
        and nothing that a lower rate protects."""
        return self.model_copy(update={"head": "zeros", "lr_decay": 1.0})

    @model_validator(mode="after")
    def _seed_is_of_the_run(self) -> "FineTuneConfig":
        if self.train.seed:
            raise ValueError(
                f"train.seed={self.train.seed}; a run's seed is that of its subset: --seed"
            )
        if self.train.gradient_cache:
            raise ValueError(
                "train.gradient_cache=true is for the contrastive term, which fine-tuning does not "
                "have; leave it out"
            )
        if self.train.epochs is not None or self.train.ema_decay:
            raise ValueError(
                f"train.epochs={self.train.epochs} and train.ema_decay={self.train.ema_decay:g} "
                f"are for pre-training; set train.steps, and leave them out"
            )
        return self

    @model_validator(mode="after")
    def _rate_falls_by_layer(self) -> "FineTuneConfig":
        if self.train.pretrained_lr_ratio != 1:
            raise ValueError(
                f"train.pretrained_lr_ratio={self.train.pretrained_lr_ratio} is for pre-training; "
                f"here the rate falls by layer: set lr_decay"
            )
        return self


@dataclass(frozen=True)
class LabelledBatch:
    """Some images with their labels."""

    image: Float[Tensor, "b 1 h w"]
    labels: Float[Tensor, "b k"]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {"image": self.image, "labels": self.labels}


@dataclass(frozen=True)
class RawLabelledBatch:
    """The same with images that are bytes yet: they are augmented on the device that they go to."""

    pixels: UInt8[Tensor, "b h w"]
    uniforms: Float[Tensor, "b u"]
    labels: Float[Tensor, "b k"]
    image_ids: tuple[str, ...]
    augment: AugmentConfig
    image_size: int  # side of the augmented images

    def pin_memory(self) -> "RawLabelledBatch":
        """The same batch in memory that a GPU reads from while the CPU works."""
        return on_each_tensor(self, Tensor.pin_memory)

    def to(self, device: torch.device) -> LabelledBatch:
        """The finished batch on a device."""
        there = on_each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))
        image = augmented(there.pixels, there.uniforms, self.augment, self.image_size)
        return LabelledBatch(image, there.labels)


@dataclass(frozen=True)
class LabelTerm:
    """The one term of fine-tuning: the cross-entropy of known labels; see `Classifier`."""

    positive_weight: Float[Tensor, " k"]
    multiclass: tuple[int, ...] = ()
    weights: Mapping[str, float] = field(default_factory=lambda: {"label": 1.0})

    def sums(self, model: nn.Module, batch: LabelledBatch) -> dict[str, Tensor]:
        """The term, summed over the known labels."""
        labels, weight = batch.labels, self.positive_weight
        logits, uncertain = model(batch.image).split((labels.shape[1], len(self.multiclass)), 1)
        if not self.multiclass:
            return {"label": label_sum(logits, labels, weight)}
        return {"label": label_class_sum(logits, uncertain, self.multiclass, labels, weight)}

    def counts(self, batch: "LabelledBatch | RawLabelledBatch") -> dict[str, int]:
        """Known labels."""
        return {"label": int((~batch.labels.isnan()).sum())}


@dataclass(frozen=True)
class LabelledBatches:
    """One endless stream of augmented images, by counter-based random numbers."""

    labelled: LabelledImages
    config: FineTuneConfig
    seed: int

    @cached_property
    def schedule(self) -> Schedule:
        """Which images a step reads."""
        keys = [image_key(sample.image_id) for sample in self.labelled.dataset.samples]
        return Schedule(np.array(keys, np.uint64), self.config.train.batch_size, self.seed)

    def read(self, step: int, batch_slice: BatchSlice) -> RawLabelledBatch:
        """A share of the batch of a step; the shares of all processes and micro-batches are it."""
        rows, epochs = self.schedule.rows(step)
        cut = batch_slice.of_rows(len(rows))
        rows, epochs = rows[cut], epochs[cut]
        uniforms = keyed_uniform(
            self.seed, Purpose.AUGMENT, epochs, self.schedule.image_keys[rows], AUGMENT_UNIFORMS
        )
        whole = self.labelled.dataset
        pixels = whole.to_crop(self.config.augment).pixels(rows)
        return RawLabelledBatch(
            pixels,
            torch.from_numpy(uniforms).float(),
            torch.from_numpy(self.labelled.labels[rows]).float(),
            tuple(whole.samples[row].image_id for row in rows),
            self.config.augment,
            whole.image_size or pixels.shape[-1],
        )


def positive_weights(labels: Float[np.ndarray, "n k"], most: float) -> Float[np.ndarray, " k"]:
    """Absent / present images of each finding, within 1 / most and most; 1 where a class is
    missing.

    So both classes of a finding weigh alike in the loss, up to the limit.
    """
    n_positive, n_negative = (labels == 1).sum(0), (labels == 0).sum(0)
    ratio = np.clip(n_negative / np.maximum(n_positive, 1), 1 / most, most)
    return np.where((n_positive > 0) & (n_negative > 0), ratio, 1.0)


def predict(
    model: Classifier,
    dataset: ImageTextDataset,
    device: torch.device,
    batch_slice: BatchSlice | None = None,
) -> Float[np.ndarray, "n k"]:
    """The probability of each finding, in the order of the rows.

    Args:
        model: On the device and not wrapped; left in the mode that it is in.
        dataset: Each with an image.
        device: Where the model is.
        batch_slice: What this process scores, where all processes score together.
    """
    logits = encoded(model, model.head.out_features, dataset, device, batch_slice)
    return sigmoid(logits[:, : model.n_findings])


@torch.no_grad()
def encoded(
    model: nn.Module,
    width: int,
    dataset: ImageTextDataset,
    device: torch.device,
    batch_slice: BatchSlice | None = None,
) -> Float[Tensor, "n d"]:
    """A row of a model's output for each image, in evaluation mode.

    Args:
        model: Such as a classifier or its image encoder; see `predict`.
        width: Of a row.
        dataset: As of `predict`.
        device: As of `predict`.
        batch_slice: As of `predict`.
    """
    was_training = model.training
    model.eval()
    cut = (batch_slice or BatchSlice()).of_rows(len(dataset))
    parts = [torch.zeros(0, width)]
    size = batch_size_of(dataset, device) if len(dataset) else 1
    for start in range(cut.start, cut.stop, size):
        part = np.arange(start, min(start + size, cut.stop))
        parts.append(encode_batch(model, dataset.pixels(part), device, size))
    model.train(was_training)
    rows = torch.cat(parts).to(device)
    return rows if batch_slice is None else all_gather_rows(rows)


@dataclass(frozen=True)
class Trained:
    """A classifier with the weights of its best step, and how it came to them."""

    model: Classifier
    step: int
    history: list[tuple[int, float]]  # step, validation macro AUROC

    @property
    def val_auroc(self) -> float:
        """That chose the step."""
        return dict(self.history)[self.step]


def train_classifier(
    accelerator: Accelerator,
    model: Classifier,
    train: LabelledImages,
    val: LabelledImages,
    config: FineTuneConfig,
    seed: int,
    run: Path,
    metadata: Mapping[str, Any],
) -> Trained:
    """Trains, or goes on training where a checkpoint is, to the end or the end of patience.

    Args:
        accelerator: New; it decides device, precision and processes.
        model: With the weights to start from.
        train: The images that are learnt.
        val: The images that choose the step, all of them at each validation.
        config: See FineTuneConfig.
        seed: Of order and augmentation.
        run: The run's folder.
        metadata: Entries of the checkpoints' meta.json; "run" identifies the run, and a checkpoint
            of another is refused.

    Raises:
        CheckpointError: When the folder holds another run.
        ManifestError: When no validation image can choose.
        NonFiniteLoss: See `train.fit`.
    """
    _check_can_choose(val)
    freeze_unused(model, image_of(train.dataset.pixels(np.zeros(1, np.int64)).shape[-1]))
    found = _checkpoint_of(run, metadata)
    weight = torch.from_numpy(positive_weights(train.labels, config.max_positive_weight)).float()
    if found is None and config.head == "probe":
        _start_from_probe(accelerator, model, train, val, weight)
    history = [] if found is None else _restored(model, found)
    state = _state_of(accelerator, model, config, found)
    validations = _Validations(
        accelerator, val, history, config.patience, config.train.save_every_steps
    )
    term = LabelTerm(weight.to(accelerator.device), model.multiclass)
    batches = LabelledBatches(train, config, seed)

    def save(state: TrainState) -> None:
        trainer = trainer_state(accelerator, state)
        write_checkpoint(
            run, state.step, accelerator.unwrap_model(state.model),
            {**trainer, "history": [list(entry) for entry in history]}, metadata, keep=1,
            spare={best_of(history)} if history else set(),
        )  # fmt: skip

    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
    if not history and config.head == "probe":  # what is no better than the probe is not taken
        validations(state)
        if accelerator.is_main_process:
            save(state)
        accelerator.wait_for_everyone()
    if not has_ended(history, config.patience):
        fit(accelerator, state, batches.read, term, config.train, run, save, validations)
    best, chosen = checkpoint_at(run, best_of(history)), accelerator.unwrap_model(state.model)
    put_weights(chosen, read_weights(best, checkpoint_meta(best)), best)
    return Trained(chosen, best_of(history), history)


@torch.no_grad()
def _start_from_probe(
    accelerator: Accelerator,
    model: Classifier,
    train: LabelledImages,
    val: LabelledImages,
    positive_weight: Float[Tensor, " k"],
) -> None:
    """Gives the head the linear probe of the training images, which all processes encode together.

    The probe learns without the weights of the loss, so its logits move by their logarithm. Logits
    of "uncertain" stay at 0.
    """
    device = accelerator.device
    encoder = model.image_encoder.to(device)
    batch_slice = BatchSlice(accelerator.process_index, accelerator.num_processes)
    vectors = [
        encoded(encoder, encoder.width, part.dataset, device, batch_slice).cpu().double().numpy()
        for part in (train, val)
    ]
    fit = fit_logistic(vectors[0], train.labels, vectors[1], val.labels)
    weight = fit.weight / fit.std
    bias = fit.bias - (fit.mean * weight).sum(1)
    n = model.n_findings
    model.head.weight[:n] = torch.from_numpy(weight)
    model.head.bias[:n] = torch.from_numpy(bias) + positive_weight.log()


def _restored(model: Classifier, found: Path) -> list[tuple[int, float]]:
    """Gives a model the weights of a checkpoint; returns its validations: step and macro AUROC."""
    put_weights(model, read_weights(found, checkpoint_meta(found)), found)
    return [(int(step), float(value)) for step, value in load_trainer_state(found)["history"]]


def _check_can_choose(val: LabelledImages) -> None:
    """Refuses validation images of which no finding has both classes."""
    if macro_auroc(val.labels, np.zeros(val.labels.shape)) is None:
        raise ManifestError(
            f"none of the findings is both present and absent in the {len(val)} validation images, "
            f"so nothing can choose the step; set a split with more by `mmclip data split`"
        )


def _state_of(
    accelerator: Accelerator, model: Classifier, config: FineTuneConfig, found: Path | None
) -> TrainState:
    """Model and optimiser as training begins, or goes on from a checkpoint that is found."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    optimizer = make_optimizer(
        model.train(), no_decay_names(model), config.train, lr_scales(names, config.lr_decay)
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state = TrainState(wrapped, optimizer)
    if found is not None:
        restore_trainer_state(accelerator, state, found)
    return state


@dataclass(frozen=True)
class _Validations:
    """Scores the validation images as training goes, and says when it is over."""

    accelerator: Accelerator
    val: LabelledImages
    history: list[tuple[int, float]]  # grows: step, validation macro AUROC
    patience: int

    every_steps: int

    def __call__(self, state: TrainState) -> Verdict:
        """Scores them now; it is over when that is no better than `patience` times before."""
        accelerator, val = self.accelerator, self.val
        batch_slice = BatchSlice(accelerator.process_index, accelerator.num_processes)
        own = accelerator.unwrap_model(state.model)
        reached = macro_auroc(
            val.labels, predict(own, val.dataset, accelerator.device, batch_slice)
        )
        assert reached is not None
        self.history.append((state.step, reached))
        return Verdict({}, saves=True, ends=has_ended(self.history, self.patience))


def _checkpoint_of(run: Path, metadata: Mapping[str, Any]) -> Path | None:
    """The newest checkpoint of an unfinished run; None where there is none."""
    try:
        found = find_checkpoint(run)
    except CheckpointError:
        return None
    if checkpoint_meta(found).get("run") != metadata["run"]:
        raise CheckpointError(
            f"{run} holds an unfinished run of other weights, images or configuration; choose "
            f"another --out, or remove that folder"
        )
    return found


def checkpoint_at(run: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return run / CHECKPOINTS / f"step_{step:06d}"


def keep_only(run: Path, step: int) -> None:
    """Removes all checkpoints of a finished run but that of a step, and its trainer's state."""
    best = checkpoint_at(run, step)
    for folder in best.parent.iterdir():
        if folder != best:
            shutil.rmtree(folder)
    (best / "trainer.pt").unlink(missing_ok=True)
