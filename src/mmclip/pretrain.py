"""Pre-training: data folders and a configuration in, a run folder with checkpoints out.

run/config.json, metrics.jsonl, tensorboard/, tokenizer/, checkpoints/step_000500/
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType, set_seed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mmclip.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from mmclip.config import Config, config_hash
from mmclip.data.dataset import Batch, PairedBatches, Rows, open_rows, paired_rows
from mmclip.data.manifest import ManifestError, write_text_atomic
from mmclip.data.text import load_tokenizer, train_tokenizer
from mmclip.losses import contrastive_sum, positive_pairs
from mmclip.models.encoders import build_image_encoder, build_text_encoder
from mmclip.models.mmclip import MMCLIP
from mmclip.progress import console
from mmclip.train import (
    TrainState,
    fit,
    gather_rows,
    make_optimizer,
    restore_trainer_state,
    trainer_state,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where to."""

    folders: tuple[Path, ...]
    run: Path
    config: Config
    command: str
    resume: bool = False
    shuffle_pairs: bool = False  # the control that must learn nothing
    wandb: bool = False
    cpu: bool = False


def contrastive_sums(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Runs the model on a batch and sums each loss term over this process's rows.

    The contrastive term is the mean of the two directions; each row of this process is compared
    with the rows of all processes.

    Source: paper, figure 1B; docs/method.md, row "contrastive term".
    """
    image, text, scale = model(batch.image, batch.ids, batch.is_valid)
    all_image, all_text = gather_rows(image.embedding), gather_rows(text.embedding)
    all_keys, all_has_text = gather_rows(batch.keys), gather_rows(batch.has_text)
    rows = batch.has_text
    is_positive = positive_pairs(batch.keys[rows], all_keys)
    to_text = contrastive_sum(image.embedding[rows], all_text, is_positive, all_has_text, scale)
    to_image = contrastive_sum(text.embedding[rows], all_image, is_positive, all_has_text, scale)
    return {"contrastive": (to_text + to_image) / 2}


def contrastive_counts(batch: Batch) -> dict[str, int]:
    """The number of rows that have a film and a text."""
    return {"contrastive": int(batch.has_text.sum())}


def build_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> MMCLIP:
    """A model as configured, with pretrained encoders where they are named."""
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    return MMCLIP(
        build_image_encoder(config.model.image, config.data.film_px),
        build_text_encoder(config.model.text, len(tokenizer), config.data.max_tokens, pad),
        config.model.embed_dim,
        config.model.temperature,
        config.model.max_logit_scale,
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
        ManifestError: When the data folders hold no pairs to train on, or films of another size.
        CheckpointError: When the run exists and `resume` is False, or differs from what resumes.
    """
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[job.config.train.precision]
    trackers: list[str | LoggerType | GeneralTracker] = ["tensorboard"]
    if job.wandb:
        trackers.append("wandb")
    accelerator = Accelerator(
        mixed_precision=precision, cpu=job.cpu, log_with=trackers, project_dir=job.run
    )
    seed = job.config.train.seed
    set_seed(seed)
    rows = open_rows(job.folders, job.config.data.film_px)
    pairs = paired_rows(rows, "train", job.config.data)
    if len(pairs) < 2:
        raise ManifestError(
            f"{', '.join(map(str, job.folders))}: {len(pairs)} of {len(rows)} rows have a film, a "
            f"report, split 'train' and a view in {job.config.data.views}; contrastive training "
            f"needs at least two"
        )
    facts = {
        "data_hash": rows.data_hash,
        "n_pairs": len(pairs),
        "command": job.command,
        "shuffle_pairs": job.shuffle_pairs,
    }
    found = _resumable(job, facts)
    if found is None:
        tokenizer = make_tokenizer(job.config, rows)
        model = build_model(job.config, tokenizer)
    else:
        checkpoint = load_checkpoint(found)
        tokenizer, model = checkpoint.tokenizer, checkpoint.model.train()
    batches = PairedBatches(
        pairs,
        tokenizer,
        job.config.data,
        job.config.augment,
        job.config.train.batch_size,
        seed,
        job.shuffle_pairs,
    )
    optimizer = make_optimizer(model, model.no_decay_names(), job.config.train)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state = TrainState(wrapped, optimizer)
    if found is not None:
        restore_trainer_state(accelerator, state, found)
    if accelerator.is_main_process:
        job.run.mkdir(parents=True, exist_ok=True)
        resolved = {"config": job.config.model_dump(mode="json"), **facts}
        write_text_atomic(job.run / "config.json", json.dumps(resolved, indent=2) + "\n")
        _say_what_runs(job, accelerator, model, pairs, state)
    accelerator.init_trackers("mmclip" if job.wandb else "tensorboard", config=_flat(job.config))

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
        contrastive_sums,
        contrastive_counts,
        {"contrastive": 1.0},
        job.config.train,
        job.run,
        save,
    )
    accelerator.end_training()
    return find_checkpoint(job.run)


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
    meta = json.loads((found / "meta.json").read_text("utf-8"))
    theirs = {**facts, "config_hash": meta["config_hash"], "data_hash": meta["data_hash"]}
    ours = {**facts, "config_hash": config_hash(job.config)}
    for key in ("config_hash", "data_hash"):
        if theirs[key] != ours[key]:
            what = key.removesuffix("_hash")
            raise CheckpointError(
                f"{job.run} was trained with another {what} ({theirs[key][:12]}, now "
                f"{ours[key][:12]}); resume with the same one, or choose another --out"
            )
    return found


def _say_what_runs(
    job: Job, accelerator: Accelerator, model: MMCLIP, pairs: Rows, state: TrainState
) -> None:
    train = job.config.train
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    per_micro = train.batch_size // train.micro_batches
    console.print(
        f"{len(pairs)} pairs of {len({f.patient_id for f in pairs.films})} patients, "
        f"{millions:.1f} million parameters, {accelerator.device.type} x "
        f"{accelerator.num_processes}, {train.precision}, {torch.get_num_threads()} threads"
    )
    if train.micro_batches > 1:
        console.print(
            f"gradient accumulation: the contrastive negatives are the {per_micro} rows of a "
            f"micro-batch, not the {train.batch_size} of the batch"
        )
    if job.shuffle_pairs:
        console.print("control: every film has the report of another film")
    if state.step:
        console.print(f"resumed at step {state.step} of {train.steps}")


def _flat(config: Config) -> dict[str, Any]:
    out: dict[str, Any] = {}

    def walk(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                out[prefix + key] = value if isinstance(value, int | float | str) else str(value)

    walk("", config.model_dump(mode="json"))
    return out


def launched_command(arguments: Sequence[str]) -> str:
    """The command line as a user would type it again."""
    return " ".join(["mmclip", *(os.path.relpath(a) if os.path.isabs(a) else a for a in arguments)])
