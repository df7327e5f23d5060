"""Pre-training: data folders and a configuration in, a run folder with checkpoints out.

run/config.json, trained_on.npy, seen.json, metrics.jsonl, tensorboard/, checkpoints/step_000500/
"""

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerFast

from mmclip.checkpoint import (
    CHECKPOINTS,
    RUN_FILES_KEY,
    checkpoint_meta,
    load_checkpoint,
    newest_checkpoint,
    put_weights,
    read_weights,
    run_file,
    run_files,
    save_checkpoint,
)
from mmclip.config import Config
from mmclip.data.batches import TrainingBatches
from mmclip.data.collector import collector_paused
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.leakage.check import patient_key, refuse_leaks
from mmclip.data.leakage.trained import (
    KEY_FILE,
    LOOKS_FILE,
    TRAINED_FILE,
    collections_of,
    write_trained,
)
from mmclip.data.streams import (
    SEEN_FILE,
    label_names,
    reserved_for_evaluation,
    rows_by_stream,
    seen_in_training,
    training_dataset,
)
from mmclip.data.synthetic import read_masks
from mmclip.data.text import train_tokenizer, words_of_several
from mmclip.data.tokenizer import frame_of, load_tokenizer
from mmclip.files import file_sha256, locked, write_text_atomic
from mmclip.models.build import build_mmclip, compile_layers
from mmclip.models.encoders import (
    build_image_encoder,
    build_text_encoder,
    check_hides_pixels,
    check_named_encoders,
    patch_grid,
)
from mmclip.models.joint_space import read_joint_space, start_from
from mmclip.models.mmclip import MMCLIP
from mmclip.models.trainable import lr_ratios, set_trainable
from mmclip.progress import console
from mmclip.training.announce import say_what_runs
from mmclip.training.ema import WeightAverage
from mmclip.training.log import METRICS_FILE
from mmclip.training.loop import fit
from mmclip.training.objective import Objective
from mmclip.training.optimizer import make_optimizer
from mmclip.training.processes import (
    installed_trackers,
    let_threads_end,
    start_accelerator,
)
from mmclip.training.resume import flat, resumable
from mmclip.training.state import TrainState, restore_trainer_state, trainer_state
from mmclip.training.validation import Histories, Validation, validation_data

logger = logging.getLogger(__name__)


CONFIG_FILE = "config.json"

AVERAGE_FOLDER = "ema"
"""A run's folder with the average of its weights, a run like any other to what scores it."""

DESCRIPTION = (CONFIG_FILE, TRAINED_FILE, LOOKS_FILE, KEY_FILE, SEEN_FILE)
"""What says of a run what it is, trained on and saw."""

RUN_FILES = (*DESCRIPTION, METRICS_FILE, "tensorboard", CHECKPOINTS, AVERAGE_FOLDER)
"""What a run leaves in its folder."""


@dataclass(frozen=True)
class PretrainRequest:
    """What to train, on what, and where to."""

    folders: tuple[Path, ...]
    run: Path
    config: Config
    command: str
    resume: bool = False
    shuffle_pairs: bool = False  # the control that must learn nothing
    lesions: Path | None = None  # folder of a synthetic data set, for policy "oracle"
    wandb: bool = False
    tensorboard: bool = False
    cpu: bool = False


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerFast, n_label_findings: int = 0
) -> MMCLIP:
    """A model as configured, with pretrained encoders and projections where they are named.

    Raises:
        EncoderError: When an encoder cannot be had, or cannot do what the configuration asks for.
    """
    frame = frame_of(tokenizer)
    image = build_image_encoder(config.model.image, config.data.image_size)
    if config.loss.image and config.image_mask.mask_stage == "pixels":
        check_hides_pixels(image)
    text = build_text_encoder(
        config.model.text,
        len(tokenizer),
        config.data.max_tokens,
        frame.pad,
        has_class_token=bool(frame.begin) and tokenizer.cls_token is not None,
        end_token_id=frame.end[-1] if frame.end else None,
        mask_token_id=frame.mask,
    )
    model = build_mmclip(config, image, text, n_label_findings)
    if (name := config.model.projections) is not None:
        start_from(model, read_joint_space(name), name)
    return model


def make_tokenizer(config: Config, dataset: ImageTextDataset) -> PreTrainedTokenizerFast:
    """The text encoder's own tokenizer, or a WordPiece vocabulary of the training reports."""
    if config.model.text.pretrained is not None:
        return load_tokenizer(config.model.text.pretrained)
    least = config.model.text.vocab_min_patients
    texts, n_left_out = words_of_several(
        ((f.report, patient_key(f)) for f in dataset.samples if f.report and f.split == "train"),
        least,
    )
    if not any(texts):
        raise ManifestError(
            f"no word is in reports of {least} training patients, so the vocabulary is empty; give "
            f"more reports, name a pretrained text encoder by model.text.pretrained, or set "
            f"model.text.vocab_min_patients=1: the checkpoint then shows words of single patients"
        )
    logger.debug("%d words of fewer than %d patients are no tokens", n_left_out, least)
    return train_tokenizer(texts, vocab_size=config.model.text.vocab_size)


def pretrain(request: PretrainRequest) -> Path:
    """Trains, or goes on training, and returns the newest checkpoint's folder.

    Raises:
        ManifestError: When the data folders hold no pairs to train on, or images of another size,
            or a patient or image is in train and in val or test.
        EncoderError: When a named encoder cannot be had or used.
        CheckpointError: When the run exists and `resume` is False, or differs from what resumes.
        LockedError: When another command writes into the run's folder.
    """
    trackers = installed_trackers(request.tensorboard, request.wandb)
    accelerator = start_accelerator(request.config.train, request.cpu, trackers, request.run)
    set_seed(request.config.train.seed)
    with collector_paused():
        dataset = _prepare(request)
        chosen = training_dataset(dataset, request.config)
        facts = _facts(request, dataset, chosen)
    train = request.config.train.in_steps(facts["n_pairs"])
    request = replace(request, config=request.config.model_copy(update={"train": train}))
    with locked(request.run) if accelerator.is_main_process else nullcontext():
        found = resumable(request.run, request.config, facts, request.resume)
        if found is None:
            start = _begin(request, dataset, chosen, facts)
        else:
            start = _resume(request, found, facts)
        _train(request, accelerator, dataset, chosen, start)
    return newest_checkpoint(request.run)


@dataclass(frozen=True)
class _Start:
    """What training begins with, or goes on with."""

    model: MMCLIP
    tokenizer: PreTrainedTokenizerFast
    facts: dict[str, Any]  # of the data and the commands, for checkpoints
    found: Path | None  # the checkpoint that it goes on from


def _prepare(request: PretrainRequest) -> ImageTextDataset:
    """The images of the data folders, found fit to train on."""
    dataset = open_dataset(
        request.folders,
        request.config.data.image_size,
        "data.image_size",
        resize=request.config.data.resize,
    )
    refuse_leaks(dataset.samples)
    if n_kept := sum(
        is_reserved and sample.split == "train"
        for sample, is_reserved in zip(
            dataset.samples, reserved_for_evaluation(dataset), strict=True
        )
    ):
        logger.warning(
            "%d images of split train are of patients that a physician labelled, on whom others "
            "test; they do not train (`mmclip data split --name physician` makes them test)",
            n_kept,
        )
    return dataset


def _facts(
    request: PretrainRequest, dataset: ImageTextDataset, chosen: ImageTextDataset
) -> dict[str, Any]:
    """What checkpoints of a new run say of its data, and of what of it trains, and its command."""
    counts = rows_by_stream(chosen)
    _check_enough(request, dataset, counts)
    return {
        "data_hash": dataset.data_hash,
        **counts,
        "command": request.command,
        "resumed_by": [],
        "shuffle_pairs": request.shuffle_pairs,
    }


def _begin(
    request: PretrainRequest,
    dataset: ImageTextDataset,
    chosen: ImageTextDataset,
    facts: dict[str, Any],
) -> _Start:
    """A new model for the images of the data folders, and for those of them that train."""
    check_named_encoders(request.config.model)
    tokenizer = make_tokenizer(request.config, dataset)
    model = build_model(request.config, tokenizer, len(label_names(chosen)))
    return _Start(model, tokenizer, facts, None)


def _resume(request: PretrainRequest, found: Path, facts: dict[str, Any]) -> _Start:
    """Model and facts of a checkpoint; its optimiser follows once there is one to put back."""
    checkpoint = load_checkpoint(found)
    meta = checkpoint.meta
    for name in run_files(found):
        run_file(found, name)
    kept = {key: meta[key] for key in ("command", "collections", RUN_FILES_KEY)}
    facts = facts | {**kept, "resumed_by": [*meta.get("resumed_by", []), request.command]}
    return _Start(checkpoint.model, checkpoint.tokenizer, facts, found)


def _train(
    request: PretrainRequest,
    accelerator: Accelerator,
    dataset: ImageTextDataset,
    chosen: ImageTextDataset,
    start: _Start,
) -> None:
    """Trains a model to its last step, and leaves a run in the request's folder."""
    config, model = request.config, start.model
    # transformers loads weights in evaluation mode, in which batch norm learns nothing.
    set_trainable(model.train(), config.model)
    objective = Objective(config, patch_grid(model.vision_model))
    lesions = None if request.lesions is None else read_lesions(request.lesions)
    batches = TrainingBatches(
        chosen, start.tokenizer, config, objective.grid, request.shuffle_pairs, lesions
    )
    optimizer = make_optimizer(
        model, model.no_decay_names(), config.train, lr_ratios(model, config)
    )
    average = None
    if config.train.ema_decay:
        average = WeightAverage(model, config.train.ema_decay, accelerator.device)
    if config.train.compile:
        compile_layers(model)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state = TrainState(wrapped, optimizer, average=average)
    histories: Histories = {}
    if start.found is not None:
        histories = _restore(request, accelerator, state, start.found)
    validate = None
    if config.validation.every_steps:
        data = validation_data(dataset, config)
        validate = Validation(accelerator, config, data, start.tokenizer, objective.grid, histories)
    facts = start.facts
    if accelerator.is_main_process:
        facts = _describe_run(request, chosen, start)
        say_what_runs(config, accelerator, chosen, state)
        if request.shuffle_pairs:
            console.print("control: every image has the report of another image")
        if state.step:
            console.print(f"resumed at step {state.step} of {config.train.steps}")
    accelerator.init_trackers(
        "mmclip" if request.wandb else "tensorboard",
        config=flat(config.model_dump(mode="json")),
    )

    def save(state: TrainState) -> None:
        trainer = trainer_state(accelerator, state) | {"validations": histories}
        parts = {"model": (request.run, accelerator.unwrap_model(state.model), trainer)}
        if state.average is not None:  # first: the run itself is never ahead of its average
            average = request.run / AVERAGE_FOLDER, state.average.module, {"step": state.step}
            parts = {"average": average, **parts}
        for which, (run, weights, own) in parts.items():
            best = None if validate is None else validate.best_step(which)
            of_best = {} if best is None else {"best_step": best}
            save_checkpoint(
                run, state.step, weights, start.tokenizer, config, own, facts | of_best,
                config.train.keep_checkpoints,
            )  # fmt: skip

    try:
        if validate is None or not validate.has_ended:
            run = request.run
            fit(accelerator, state, batches.read, objective, config.train, run, save, validate)
    finally:
        let_threads_end(accelerator)
    accelerator.end_training()


def _restore(
    request: PretrainRequest, accelerator: Accelerator, state: TrainState, found: Path
) -> Histories:
    """Puts a state back as a checkpoint holds it; returns what its validations said."""
    saved = restore_trainer_state(accelerator, state, found)
    if state.average is not None:
        averaged = request.run / AVERAGE_FOLDER / CHECKPOINTS / found.name
        put_weights(
            state.average.module, read_weights(averaged, checkpoint_meta(averaged)), averaged
        )
    return {
        which: [(int(step), float(score)) for step, score in history]
        for which, history in saved.get("validations", {}).items()
    }


def _describe_run(
    request: PretrainRequest, dataset: ImageTextDataset, start: _Start
) -> dict[str, Any]:
    """Writes what the run is, trained on and saw, before its first step.

    The average of its weights is a run of its own to whatever scores it, so its folder has that
    too.

    Returns:
        The facts for its checkpoints, with checksums of what was written.
    """
    request.run.mkdir(parents=True, exist_ok=True)
    resolved = {"config": request.config.model_dump(mode="json"), **start.facts}
    write_text_atomic(request.run / CONFIG_FILE, json.dumps(resolved, indent=2) + "\n")
    facts = start.facts
    if start.found is None:
        sha256 = write_trained(request.run, dataset)
        seen = seen_in_training(dataset, request.config)
        write_text_atomic(request.run / SEEN_FILE, json.dumps(seen, indent=2) + "\n")
        sha256[SEEN_FILE] = file_sha256(request.run / SEEN_FILE)
        collections = collections_of(dataset.samples)
        facts = {**facts, "collections": collections, RUN_FILES_KEY: sha256}
    if request.config.train.ema_decay:
        (request.run / AVERAGE_FOLDER).mkdir(exist_ok=True)
        for name in DESCRIPTION:
            shutil.copy(request.run / name, request.run / AVERAGE_FOLDER / name)
    return facts


def _check_enough(
    request: PretrainRequest, dataset: ImageTextDataset, counts: Mapping[str, int]
) -> None:
    folders, unpaired = ", ".join(map(str, request.folders)), request.config.unpaired
    if counts["n_pairs"] < 2:
        raise ManifestError(
            f"{folders}: {counts['n_pairs']} of {len(dataset)} rows have an image, a report, split "
            f"'train' and a view in {request.config.data.views}; contrastive training needs at "
            f"least two"
        )
    if request.config.loss.label and not counts["n_unpaired"]:
        raise ManifestError(
            f"{folders}: no training image has labels and no report, of which "
            f"loss.label={request.config.loss.label:g} learns; add a data folder with labelled "
            f"images"
        )
    for key, ratio, name, missing, remedy in (
        ("reports_per_pair", unpaired.reports_per_pair, "n_lone_reports",
         "report has no image", "reports alone"),
        ("bare_per_pair", unpaired.bare_per_pair, "n_bare",
         "image has neither report nor labels", "such images"),
    ):  # fmt: skip
        if ratio and not counts[name]:
            raise ManifestError(
                f"{folders}: no training {missing}, as unpaired.{key}={ratio} asks for; set it to "
                f"0, or add a data folder with {remedy}"
            )
    if (
        request.config.image_mask.policy == "oracle"
        and request.config.loss.image
        and request.lesions is None
    ):
        raise ManifestError(
            "image_mask.policy='oracle' needs the lesion masks of synthetic images; give their "
            "folder by --lesion-masks, or choose another policy"
        )


def read_lesions(folder: Path) -> dict[str, np.ndarray]:
    """The pixels of all lesions of each synthetic image; see `batches.LesionMasks`."""
    joined: dict[str, np.ndarray] = {}
    for (image_id, _), mask in read_masks(folder).items():
        joined[image_id] = joined.get(image_id, False) | mask
    return joined
