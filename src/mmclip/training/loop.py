"""One training loop on Accelerate: micro-batches, precision, processes, logs, exact resume."""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from mmclip.batch import BatchSlice
from mmclip.checkpoint import load_trainer_state
from mmclip.config import TrainConfig
from mmclip.progress import console, progress


class NonFiniteLoss(RuntimeError):
    """A loss term or the gradient became infinite or not a number; the message names it and the
    saved batch."""


@runtime_checkable
class AnyBatch(Protocol):
    """What the loop needs of a batch."""

    @property
    def image_ids(self) -> tuple[str, ...]:
        """The image of each row."""
        ...

    def to(self, device: torch.device) -> Any:
        """The same batch on a device."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        ...


B = TypeVar("B", bound=AnyBatch)

ReadBatch = Callable[[int, BatchSlice], B]
"""What the loop reads from: (step, slice) -> that slice of the batch of a step.

The same step and slice give the same batch, whenever they are asked for."""

LossSums = Callable[[nn.Module, B], dict[str, Tensor]]
"""Sums of each loss term over the elements of this process's rows."""

LossCounts = Callable[[B], dict[str, int]]
"""Elements of each loss term in these rows; known before the model has run."""


@dataclass
class TrainState:
    """All that changes while training runs."""

    model: nn.Module  # wrapped by Accelerate
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimiser steps done
    log: dict[str, float] = field(default_factory=dict)  # of the last step


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine to final_lr_ratio of it.

    The peak is base_lr * batch_size / 256. The first step is not at 0.

    Source: linear scaling [Goyal et al., arXiv:1706.02677]; cosine [arXiv:1608.03983].
    """
    peak = config.base_lr * config.batch_size / 256
    warmup = round(config.warmup_ratio * config.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(config.steps - warmup, 1)
    return peak * (
        config.final_lr_ratio + (1 - config.final_lr_ratio) * (1 + math.cos(math.pi * done)) / 2
    )


def make_optimizer(
    model: nn.Module,
    no_decay: set[str],
    config: TrainConfig,
    lr_scale: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW in groups, with weight decay and without, two for each learning rate.

    Args:
        model: Parameters that take no gradient are left out.
        no_decay: Names of parameters without weight decay.
        config: The optimisation.
        lr_scale: Of each parameter's learning rate, by name; 1 where it is None.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    scale = dict.fromkeys((n for n, _ in named), 1.0) if lr_scale is None else lr_scale
    groups = [
        {
            "params": [p for n, p in named if scale[n] == of and (n in no_decay) == spared],
            "weight_decay": 0.0 if spared else config.weight_decay,
            "lr_scale": of,
        }
        for of in sorted({scale[n] for n, _ in named}, reverse=True)
        for spared in (False, True)
    ]
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=(0.9, config.beta2), eps=1e-6)


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        padded = local.new_zeros((max(sizes), *local.shape[1:]))
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Each process holds a part of the loss: a row's gradient is the sum over all of them.
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        start = sum(ctx.sizes[: ctx.rank])
        return grad[start : start + ctx.sizes[ctx.rank]], None, None


def all_gather_rows(local: Tensor) -> Tensor:
    """The rows [b, ...] of all processes, in the order of their ranks, with gradients to each.

    Processes may hold different numbers of rows. With one process, the input itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    size = torch.tensor([len(local)], device=local.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    numbers = [int(s) for s in sizes]
    gathered = _AllGatherRows.apply(local.contiguous(), numbers, dist.get_rank())
    assert isinstance(gathered, Tensor)
    return gathered


def batch_slices(n_micro: int, accelerator: Accelerator) -> list[BatchSlice]:
    """What this process reads of a step, a micro-batch each."""
    world, rank = accelerator.num_processes, accelerator.process_index
    return [BatchSlice(m * world + rank, n_micro * world) for m in range(n_micro)]


def train_step(
    accelerator: Accelerator,
    state: TrainState,
    read_batch: ReadBatch[B],
    loss_sums: LossSums[B],
    loss_counts: LossCounts[B],
    weights: Mapping[str, float],
    config: TrainConfig,
) -> dict[str, Tensor]:
    """One optimiser step.

    Each term is the sum over the elements it applies to, in all processes and micro-batches,
    divided by their number: the gradient does not depend on how the rows are dealt out, but for
    the contrastive negatives, which are the micro-batch's.

    Returns:
        The terms (means over the global batch), the gradient's norm, the learning rate, and the
        number of images that the step read.

    Raises:
        NonFiniteLoss: Before the optimiser has moved, on every process alike.
    """
    micro = [
        read_batch(state.step, batch_slice).to(accelerator.device)
        for batch_slice in batch_slices(config.n_micro_batches, accelerator)
    ]
    local = [float(sum(loss_counts(b)[k] for b in micro)) for k in weights]
    local.append(float(sum(len(b.image_ids) for b in micro)))
    counts = accelerator.reduce(torch.tensor(local, device=accelerator.device), reduction="sum")
    assert isinstance(counts, Tensor)
    *of_terms, n_images = counts
    count = {k: n.clamp(min=1) for k, n in zip(weights, of_terms, strict=True)}
    sums = {k: torch.zeros((), device=accelerator.device) for k in weights}
    for m, batch in enumerate(micro):
        last = m == len(micro) - 1
        with torch.enable_grad() if last else accelerator.no_sync(state.model):
            terms = loss_sums(state.model, batch)
            loss = torch.stack([weights[k] * terms[k] / count[k] for k in weights]).sum()
            # DistributedDataParallel averages over processes; the loss is a sum over them.
            accelerator.backward(loss * accelerator.num_processes)
        sums = {k: sums[k] + terms[k].detach() for k in weights}
    stacked = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
    assert isinstance(stacked, Tensor)
    means = {k: s / count[k] for k, s in zip(weights, stacked, strict=True)}
    grad_norm = accelerator.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    grad_norm = torch.as_tensor(grad_norm, device=accelerator.device)
    # fp16 scales gradients until they fit: the scaler leaves out a step in which they do not.
    is_finite = torch.isfinite(stacked).all()
    if accelerator.scaler is None:
        is_finite &= torch.isfinite(grad_norm)
    if not bool(is_finite):
        bad = [k for k, v in means.items() if not torch.isfinite(v)]
        what = f"the loss term {', '.join(bad)}" if bad else "the gradient, of a finite loss,"
        raise NonFiniteLoss(f"step {state.step}: {what} is not finite")
    lr = learning_rate(state.step, config)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # older checkpoints have no scale
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    return {**means, "grad_norm": grad_norm, "lr": torch.tensor(lr), "n_images": n_images}


@contextmanager
def read_ahead(
    read_batch: ReadBatch[B], steps: int, device: torch.device
) -> Iterator[ReadBatch[B]]:
    """Makes the batch of the next step in a thread while a GPU is at this one.

    It changes when a batch is made and nothing of what is in it. One thread will do where worker
    processes are usual, as torch and NumPy leave the interpreter to others while they work on
    images. On a CPU the same cores do both, so there batches are made when they are asked for.

    Source: ours; what it saves is in docs/log.md, "The reference sizes on a GPU".

    Args:
        read_batch: What it raises is raised where its batch is asked for.
        steps: No step from this one on is read ahead.
        device: Of the training.
    """
    if device.type == "cpu":
        yield read_batch
        return
    ahead: dict[tuple[int, BatchSlice], Future[B]] = {}
    pool = ThreadPoolExecutor(1, "batches")

    def read(step: int, batch_slice: BatchSlice) -> B:
        made = ahead.pop((step, batch_slice), None)
        batch = read_batch(step, batch_slice) if made is None else made.result()
        if step + 1 < steps:
            ahead[step + 1, batch_slice] = pool.submit(read_batch, step + 1, batch_slice)
        return batch

    try:
        yield read
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def interrupt_between_steps(n_processes: int) -> Iterator[Callable[[], bool]]:
    """Puts Ctrl-C off to the end of a step, where all is whole; a second one acts at once.

    Source: ours. Python raises KeyboardInterrupt wherever it is, and where that is a callback of C
    code or a finaliser, the interrupt is printed or lost and training goes on.

    Args:
        n_processes: With several, each would stop at a step of its own and wait for the others for
            ever, so Ctrl-C ends them at once, as it does outside of the main thread.

    Returns:
        By `with`, a function that says whether Ctrl-C was pressed.
    """
    pressed = threading.Event()
    if n_processes > 1 or threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def defer(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, defer)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def fit(
    accelerator: Accelerator,
    state: TrainState,
    read_batch: ReadBatch[B],
    loss_sums: LossSums[B],
    loss_counts: LossCounts[B],
    weights: Mapping[str, float],
    config: TrainConfig,
    run: Path,
    save: Callable[[TrainState], None],
    is_over: Callable[[TrainState], bool] | None = None,
) -> TrainState:
    """Trains from state.step to config.steps; logs, saves, and stops on a non-finite loss.

    Ctrl-C ends the step in progress, saves a checkpoint, and says how to go on.

    Args:
        accelerator: Prepared; it decides device, precision and processes.
        state: New or resumed; changed in place.
        read_batch: Where rows come from.
        loss_sums: The model's loss terms on a batch.
        loss_counts: The number of elements of each term in a batch.
        weights: Of each term; the terms not named are not trained.
        config: The optimisation.
        run: Folder of metrics.jsonl and of what a failure leaves.
        save: Writes a checkpoint; called on the main process.
        is_over: Asked on every process before each checkpoint, with the same answer on all: True
            ends training there.

    Raises:
        NonFiniteLoss: The batch is saved as safetensors beside the names of its images.
        KeyboardInterrupt: After the checkpoint; at once if Ctrl-C is pressed again.
    """
    main = accelerator.is_main_process
    log_path = run / "metrics.jsonl"
    if main:
        _cut_log(log_path, state.step)
    began, n_images = time.monotonic(), 0
    with (
        progress("training", config.steps, state.step, show=main) as advance,
        interrupt_between_steps(accelerator.num_processes) as is_interrupted,
        read_ahead(read_batch, config.steps, accelerator.device) as read,
    ):
        while state.step < config.steps:
            try:
                values = train_step(
                    accelerator, state, read, loss_sums, loss_counts, weights, config
                )
            except NonFiniteLoss as error:
                where = _save_failed(accelerator, state, read_batch, config, run)
                raise NonFiniteLoss(
                    f"{error}; this process's rows are in {where}; a lower train.base_lr or "
                    f"train.precision=fp32 is the usual remedy"
                ) from None
            n_images += int(values.pop("n_images"))
            note = None
            if state.step % config.log_every_steps == 0 or state.step == config.steps:
                seconds = time.monotonic() - began
                images_per_s = n_images / seconds
                began, n_images = time.monotonic(), 0
                state.log = {k: float(v) for k, v in values.items()}
                loss = sum(weights[k] * state.log[k] for k in weights)
                line = {"step": state.step, "loss": loss, **state.log, "images_per_s": images_per_s}
                accelerator.log(line, step=state.step)
                note = f"loss {loss:.3f}  {images_per_s:.0f} images/s"
                if main:
                    with log_path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
            advance(1, note)
            due = state.step % config.save_every_steps == 0 or state.step == config.steps
            ends_here = due and is_over is not None and is_over(state)
            stops_here = is_interrupted()
            if due or stops_here:
                if main:
                    save(state)
                accelerator.wait_for_everyone()
            if stops_here:
                said = f"stopped after step {state.step:,} of {config.steps:,}, which {run} holds"
                console.print(said, markup=False, soft_wrap=True)
                raise KeyboardInterrupt
            if ends_here:
                break
    return state


def _cut_log(path: Path, step: int) -> None:
    # A run killed after its last checkpoint logged steps that will be logged again.
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip("\n") + "\n")
        except json.JSONDecodeError:
            break  # half a line, written as the process was killed
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(kept), "utf-8")
    aside.replace(path)


def _save_failed(
    accelerator: Accelerator,
    state: TrainState,
    read_batch: ReadBatch[B],
    config: TrainConfig,
    run: Path,
) -> Path:
    rank = accelerator.process_index
    folder = run / f"nonfinite_step_{state.step:06d}_process_{rank}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for m, batch_slice in enumerate(batch_slices(config.n_micro_batches, accelerator)):
        batch = read_batch(state.step, batch_slice)
        tensors = {k: v.contiguous() for k, v in batch.tensors().items()}
        save_file(tensors, folder / f"batch_{m}.safetensors")
        (folder / f"batch_{m}_images.txt").write_text("\n".join(batch.image_ids) + "\n", "utf-8")
    return folder


def trainer_state(accelerator: Accelerator, state: TrainState) -> dict[str, Any]:
    """What a checkpoint must hold beside the weights, as tensors and plain values."""
    return {
        "step": state.step,
        "optimizer": state.optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "torch_rng": torch.get_rng_state(),
    }


def restore_trainer_state(accelerator: Accelerator, state: TrainState, folder: Path) -> None:
    """Puts optimiser, scaler, random state and step back as `trainer_state` gave them."""
    saved = load_trainer_state(folder)
    state.step = saved["step"]
    state.optimizer.load_state_dict(saved["optimizer"])
    if accelerator.scaler is not None and saved["scaler"] is not None:
        accelerator.scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["torch_rng"])
