"""Pre-training: data folders and a configuration in, a run folder with checkpoints out.

run/config.json, trained_on.npy, seen.json, metrics.jsonl, tensorboard/, checkpoints/step_000500/
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType, set_seed
from transformers import PreTrainedTokenizerFast

from mmclip.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    checkpoint_meta,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from mmclip.config import Config, config_hash
from mmclip.data.batches import (
    SEEN_FILE,
    TrainingBatches,
    is_pair,
    kept_for_tests,
    label_names,
    seen_in_training,
    training_rows,
)
from mmclip.data.check import TRAINED_FILE, refuse_leaks, trained_keys
from mmclip.data.dataset import Rows, open_rows
from mmclip.data.folder import ManifestError, write_text_atomic
from mmclip.data.synthetic import read_masks
from mmclip.data.text import load_tokenizer, train_tokenizer
from mmclip.models.encoders import build_image_encoder, build_text_encoder, check_patches
from mmclip.models.mmclip import MMCLIP, build_mmclip
from mmclip.progress import console
from mmclip.training.loop import (
    TrainState,
    fit,
    make_optimizer,
    restore_trainer_state,
    trainer_state,
)
from mmclip.training.objective import Objective

logger = logging.getLogger(__name__)


CONFIG_FILE = "config.json"

RUN_FILES = (CONFIG_FILE, TRAINED_FILE, SEEN_FILE, "metrics.jsonl", "tensorboard", CHECKPOINTS)
"""What a run leaves in its folder."""


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where to."""

    folders: tuple[Path, ...]
    run: Path
    config: Config
    command: str
    resume: bool = False
    shuffle_pairs: bool = False  # the control that must learn nothing
    lesions: Path | None = None  # folder of a made data set, for policy "oracle"
    wandb: bool = False
    cpu: bool = False


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerFast, n_label_findings: int = 0
) -> MMCLIP:
    """A model as configured, with pretrained encoders where they are named.

    Raises:
        EncoderError: When an encoder cannot be had, or a pretrained image encoder gives other
            features than the decoders read.
    """
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    image = build_image_encoder(config.model.image, config.data.film_px)
    if config.model.image.pretrained is not None and (config.loss.image or config.loss.text):
        check_patches(image)
    return build_mmclip(
        config,
        image,
        build_text_encoder(config.model.text, len(tokenizer), config.data.max_tokens, pad),
        n_label_findings,
    )


def make_tokenizer(config: Config, rows: Rows) -> PreTrainedTokenizerFast:
    """The text encoder's own tokenizer, or a WordPiece vocabulary of the training reports."""
    if config.model.text.pretrained is not None:
        return load_tokenizer(config.model.text.pretrained)
    reports = sorted({f.report for f in rows.films if f.report and f.split == "train"})
    return train_tokenizer(reports, vocab_size=config.model.text.vocab_size)


def pretrain(job: Job) -> Path:
    """Trains, or goes on training, and returns the newest checkpoint's folder.

    Raises:
        ManifestError: When the data folders hold no pairs to train on, or films of another size,
            or a patient or film is in train and in val or test.
        CheckpointError: When the run exists and `resume` is False, or differs from what resumes.
    """
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[job.config.train.precision]
    trackers: list[str | LoggerType | GeneralTracker] = ["tensorboard"]
    if job.wandb:
        trackers.append("wandb")
    accelerator = Accelerator(
        mixed_precision=precision, cpu=job.cpu, log_with=trackers, project_dir=job.run
    )
    set_seed(job.config.train.seed)
    rows = open_rows(job.folders, job.config.data.film_px, px_key="data.film_px")
    refuse_leaks(rows.films)
    chosen = training_rows(rows, job.config)
    if n_kept := sum(
        is_kept and film.split == "train"
        for film, is_kept in zip(rows.films, kept_for_tests(rows), strict=True)
    ):
        logger.warning(
            "%d films of split train are of patients that a physician labelled, on whom others "
            "test; they do not train (`mmclip data split --name physician` makes them test)",
            n_kept,
        )
    n_pairs = sum(map(is_pair, chosen.films))
    _check_enough(job, rows, n_pairs, len(chosen) - n_pairs)
    facts = {
        "data_hash": rows.data_hash,
        "n_pairs": n_pairs,
        "n_unpaired": len(chosen) - n_pairs,
        "command": job.command,
        "resumed_by": [],
        "shuffle_pairs": job.shuffle_pairs,
    }
    found = _resumable(job, facts)
    if found is None:
        tokenizer = make_tokenizer(job.config, rows)
        model = build_model(job.config, tokenizer, len(label_names(chosen)))
    else:
        checkpoint = load_checkpoint(found)
        began, since = checkpoint.meta["command"], checkpoint.meta.get("resumed_by", [])
        facts |= {"command": began, "resumed_by": [*since, job.command]}
        tokenizer, model = checkpoint.tokenizer, checkpoint.model.train()
    objective = Objective(job.config, model.vision_model.config.patch_size)
    batches = TrainingBatches(
        chosen,
        tokenizer,
        job.config,
        objective.patch_px,
        job.shuffle_pairs,
        None if job.lesions is None else read_lesions(job.lesions),
        accelerator.device,
    )
    optimizer = make_optimizer(model, model.no_decay_names(), job.config.train)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state = TrainState(wrapped, optimizer)
    if found is not None:
        restore_trainer_state(accelerator, state, found)
    if accelerator.is_main_process:
        job.run.mkdir(parents=True, exist_ok=True)
        resolved = {"config": job.config.model_dump(mode="json"), **facts}
        write_text_atomic(job.run / CONFIG_FILE, json.dumps(resolved, indent=2) + "\n")
        np.save(job.run / TRAINED_FILE, trained_keys(chosen.films))
        seen = seen_in_training(chosen, job.config)
        write_text_atomic(job.run / SEEN_FILE, json.dumps(seen, indent=2) + "\n")
        _say_what_runs(job, accelerator, model, chosen, state)
    accelerator.init_trackers(
        "mmclip" if job.wandb else "tensorboard", config=_flat(job.config.model_dump(mode="json"))
    )

    def save(state: TrainState) -> None:
        save_checkpoint(
            job.run,
            state.step,
            accelerator.unwrap_model(state.model),
            tokenizer,
            job.config,
            trainer_state(accelerator, state),
            facts,
            job.config.train.keep_checkpoints,
        )

    fit(
        accelerator,
        state,
        batches.batch,
        objective.sums,
        objective.counts,
        objective.weights,
        job.config.train,
        job.run,
        save,
    )
    accelerator.end_training()
    return find_checkpoint(job.run)


def _check_enough(job: Job, rows: Rows, n_pairs: int, n_unpaired: int) -> None:
    folders = ", ".join(map(str, job.folders))
    if n_pairs < 2:
        raise ManifestError(
            f"{folders}: {n_pairs} of {len(rows)} rows have a film, a report, split 'train' and a "
            f"view in {job.config.data.views}; contrastive training needs at least two"
        )
    if job.config.unpaired.rows_per_pair and not n_unpaired:
        raise ManifestError(
            f"{folders}: no training film has labels and no report, as "
            f"unpaired.rows_per_pair={job.config.unpaired.rows_per_pair} asks for; set it to 0, or "
            f"add a data folder with labelled films"
        )
    if job.config.image_mask.policy == "oracle" and job.config.loss.image and job.lesions is None:
        raise ManifestError(
            "image_mask.policy='oracle' needs the lesion masks of made films; give their folder "
            "by --lesion-masks, or choose another policy"
        )


def read_lesions(folder: Path) -> dict[str, np.ndarray]:
    """The pixels of all lesions of each made film; see `batches.LesionMasks`."""
    joined: dict[str, np.ndarray] = {}
    for (film_id, _), mask in read_masks(folder).items():
        joined[film_id] = joined.get(film_id, False) | mask
    return joined


def _resumable(job: Job, facts: dict[str, Any]) -> Path | None:
    try:
        found = find_checkpoint(job.run)
    except CheckpointError:
        return None  # killed before the first checkpoint, or new: either way from the start
    if not job.resume:
        raise CheckpointError(
            f"{job.run} already holds a run ({found.name}); add --resume to go on with it, or "
            f"choose another --out"
        )
    theirs = checkpoint_meta(found)
    ours = {**facts, "config_hash": config_hash(job.config)}
    if theirs["config_hash"] != ours["config_hash"]:
        was, now = _flat(theirs["config"]), _flat(job.config.model_dump(mode="json"))
        changed = [
            f"{key} was {was.get(key, 'not there')}, is {now.get(key, 'not there')}"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key)
        ]
        raise CheckpointError(
            f"{job.run} was trained with another config: {'; '.join(changed)}; resume with the "
            f"same one, or choose another --out"
        )
    if theirs["data_hash"] != ours["data_hash"]:
        raise CheckpointError(
            f"{job.run} was trained with other data ({theirs['data_hash'][:12]}, now "
            f"{ours['data_hash'][:12]}); resume with the same folders, or choose another --out"
        )
    if theirs["shuffle_pairs"] != ours["shuffle_pairs"]:
        how = "with" if theirs["shuffle_pairs"] else "without"
        raise CheckpointError(
            f"{job.run} was trained {how} --shuffle-pairs; resume {how} it, or choose another --out"
        )
    return found


def _say_what_runs(
    job: Job, accelerator: Accelerator, model: MMCLIP, rows: Rows, state: TrainState
) -> None:
    train = job.config.train
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    per_micro = train.batch_size // train.micro_batches
    n_pairs = sum(map(is_pair, rows.films))
    unpaired = f" and {len(rows) - n_pairs:,} unpaired films" if len(rows) > n_pairs else ""
    n_threads = torch.get_num_threads()
    console.print(
        f"{n_pairs:,} pairs{unpaired} of {len({f.patient_id for f in rows.films}):,} patients, "
        f"{millions:.1f} million parameters, {accelerator.device.type} x "
        f"{accelerator.num_processes}, {train.precision}, "
        f"{n_threads} thread{'s' * (n_threads != 1)}"
    )
    if train.micro_batches > 1:
        console.print(
            f"gradient accumulation: the contrastive negatives (and a ResNet's batch statistics) "
            f"are the {per_micro} rows of a micro-batch, not the {train.batch_size} of the batch"
        )
    for line in repeats(job.config, n_pairs, len(rows) - n_pairs):
        console.print(line, style="yellow", soft_wrap=True)
    if job.shuffle_pairs:
        console.print("control: every film has the report of another film")
    if state.step:
        console.print(f"resumed at step {state.step} of {train.steps}")


def repeats(config: Config, n_pairs: int, n_unpaired: int) -> list[str]:
    """Says, in a line for either stream, that every step reads a film more than once.

    Such a batch trains, but its repeats are positives of one another: fewer negatives than set.
    (Two epochs may meet within a step, so now and then any batch repeats some.)
    """
    size, ratio = config.train.batch_size, config.unpaired.rows_per_pair
    fits, lines = min(size, n_pairs), []
    if size > n_pairs:
        lines.append(
            f"films repeat within every step: train.batch_size={size} and there are {n_pairs} "
            f"pairs; set it to at most {n_pairs}"
        )
    if (asked := round(ratio * size)) > n_unpaired:
        if round(ratio * fits) <= n_unpaired:
            remedy = f"with train.batch_size={fits} it reads {round(ratio * fits)}"
        else:
            remedy = f"set it to at most {n_unpaired / fits:.3g}"
        lines.append(
            f"films repeat within every step: unpaired.rows_per_pair={ratio:g} reads {asked} "
            f"unpaired films and there are {n_unpaired}; {remedy}"
        )
    return lines


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration by their full keys, such as "train.steps"."""
    out: dict[str, Any] = {}

    def walk(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                out[prefix + key] = value if isinstance(value, int | float | str) else str(value)

    walk("", config)
    return out
