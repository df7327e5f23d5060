"""One training loop on Accelerate: micro-batches, precision, processes, logs, exact resume."""

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

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
        """The batch that the objective reads, on a device; images are augmented there."""
        ...

    def pin_memory(self) -> Any:
        """The same batch in memory that a GPU reads from while the CPU works."""
        ...


B = TypeVar("B", bound=AnyBatch)

ReadBatch = Callable[[int, BatchSlice], B]
"""What the loop reads from: (step, slice) -> that slice of the batch of a step.

The same step and slice give the same batch, whenever they are asked for."""


@runtime_checkable
class Terms(Protocol):
    """What the loop trains: weighted terms, each a sum over the elements that it applies to."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each term that is trained."""
        ...

    def sums(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Each term, summed over the elements of this process's rows."""
        ...

    def counts(self, batch: Any) -> dict[str, int]:
        """Elements of each term in a batch as it is read; known before the model has run."""
        ...


class Embeddings(NamedTuple):
    """What a contrastive term reads of the model."""

    image: Float[Tensor, "b e"]
    text: Float[Tensor, "b e"]  # 0 in rows without a text
    scale: Float[Tensor, ""]


@runtime_checkable
class ContrastiveTerms(Terms, Protocol):
    """Terms of which one, "contrastive", compares all rows of a step; for `_contrast_all`."""

    def embed(self, model: nn.Module, batch: Any) -> Embeddings:
        """The embeddings of a batch, without what a gradient needs."""
        ...

    def contrast(
        self, embeddings: Embeddings, batches: Sequence[Any], weight: Tensor
    ) -> tuple[Tensor, Embeddings]:
        """The term over some batches as one, and the gradient of weight times it."""
        ...

    def sums_given(self, model: nn.Module, batch: Any, gradient: Embeddings) -> dict[str, Tensor]:
        """As `sums`, but that the contrastive term is any that has this gradient."""
        ...


@dataclass
class TrainState:
    """All that changes while training runs."""

    model: nn.Module  # wrapped by Accelerate
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimiser steps done
    log: dict[str, float] = field(default_factory=dict)  # of the last step
    unsettled: "Unsettled | None" = None  # the last step on a GPU, until it is known to be finite


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
    # The fused kernel can leave out a step on the device, see `Unsettled`; the one for CPUs rounds
    # otherwise than the loop over tensors, with which the numbers of docs/ were made.
    fused = all(p.is_cuda for _, p in named)
    return torch.optim.AdamW(
        groups, lr=config.base_lr, betas=(0.9, config.beta2), eps=1e-6, fused=fused
    )


@dataclass
class Unsettled:
    """A step on a GPU of which the host does not know yet whether all was finite.

    To ask the device after each step is to wait for it. So it decides alone: the optimiser leaves
    out a step that is not finite, and each step after it, until the host has read the flag, a step
    later, and stops. The weights are then those before the step, as on a CPU.

    Source: ours; the fused AdamW reads `found_inf`, made for torch's gradient scaler.
    """

    step: int
    names: tuple[str, ...]  # of the terms
    values: Tensor  # [terms + 1]: means of the terms, norm of the gradient; pinned, on its way
    has_failed: Tensor  # on the device: not finite now or in an earlier step
    arrived: torch.cuda.Event

    def settle(self) -> None:
        """Waits until the step's numbers are here.

        Raises:
            NonFiniteLoss: When one of them is not finite.
        """
        self.arrived.synchronize()
        check_finite(self.step, self.names, self.values)


def check_finite(step: int, names: Sequence[str], values: Tensor) -> None:
    """Stops where a term or, last in `values`, the norm of the gradient is not finite.

    Raises:
        NonFiniteLoss: Names the terms.
    """
    if bool(torch.isfinite(values).all()):
        return
    bad = [name for name, value in zip(names, values, strict=False) if not torch.isfinite(value)]
    what = f"the loss term {', '.join(bad)}" if bad else "the gradient, of a finite loss,"
    raise NonFiniteLoss(f"step {step}: {what} is not finite")


def settle(state: TrainState) -> None:
    """Waits for the last step on a GPU; elsewhere each step is settled at once.

    Raises:
        NonFiniteLoss: When it was not finite; the state is then as before that step.
    """
    last, state.unsettled = state.unsettled, None
    if last is None:
        return
    try:
        last.settle()
    except NonFiniteLoss:
        state.step = last.step
        raise


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
    micro_batches: Sequence[AnyBatch],
    objective: Terms,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """One optimiser step.

    Each term is the sum over the elements it applies to, in all processes and micro-batches,
    divided by their number: the gradient does not depend on how the rows are dealt out, but for
    the contrastive negatives, which are the micro-batch's.

    Args:
        accelerator: Prepared.
        state: Moves on by a step.
        micro_batches: What this process reads of the step.
        objective: The terms.
        config: The optimisation.

    Returns:
        The terms (means over the global batch), the gradient's norm, the learning rate, and the
        number of images that the step read.

    Raises:
        NonFiniteLoss: Before the optimiser has moved, on every process alike; on a GPU one step
            later, see `Unsettled`.
    """
    weights, device = objective.weights, accelerator.device
    count, n_images = _counts(accelerator, objective, micro_batches)
    sums = {k: torch.zeros((), device=device) for k in weights}
    contrasted = None
    if config.gradient_cache:
        assert isinstance(objective, ContrastiveTerms)
        contrasted = _contrast_all(accelerator, state, micro_batches, objective, count)
    for m, batch in enumerate(micro_batches):
        last = m == len(micro_batches) - 1
        with torch.enable_grad() if last else accelerator.no_sync(state.model):
            here = batch.to(device)
            if contrasted is None:
                terms = objective.sums(state.model, here)
                scaled = [weights[k] * terms[k] / count[k] for k in weights]
            else:
                terms = contrasted.objective.sums_given(state.model, here, contrasted.gradients[m])
                others = [k for k in weights if k != "contrastive"]
                scaled = [weights[k] * terms[k] / count[k] for k in others]
                scaled.append(terms["contrastive"])  # weight and count are in the gradient
            # DistributedDataParallel averages over processes; the loss is a sum over them.
            accelerator.backward(torch.stack(scaled).sum() * accelerator.num_processes)
        sums = {k: sums[k] + terms[k].detach() for k in weights}
    if contrasted is not None:
        sums["contrastive"] = contrasted.term
    stacked = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
    assert isinstance(stacked, Tensor)
    means = {k: s / count[k] for k, s in zip(weights, stacked, strict=True)}
    grad_norm = accelerator.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    grad_norm = torch.as_tensor(grad_norm, device=device)
    _let_finite_pass(accelerator, state, means, grad_norm)
    lr = learning_rate(state.step, config)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # older checkpoints have no scale
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    return {**means, "grad_norm": grad_norm, "lr": torch.tensor(lr), "n_images": n_images}


@dataclass(frozen=True)
class _Contrasted:
    """A contrastive term over all micro-batches as one, and its gradient for each of them."""

    objective: ContrastiveTerms
    term: Tensor
    gradients: list[Embeddings]


def _contrast_all(
    accelerator: Accelerator,
    state: TrainState,
    micro_batches: Sequence[AnyBatch],
    objective: ContrastiveTerms,
    count: Mapping[str, Tensor],
) -> _Contrasted:
    """Embeds all micro-batches without a gradient, one at a time, and compares them as one batch.

    The second pass then needs the memory of one micro-batch, whatever the number of negatives.

    Source: gradient caching, GradCache (arXiv:2101.06983).
    """
    parts = [objective.embed(state.model, batch.to(accelerator.device)) for batch in micro_batches]
    scale = parts[0].scale
    whole = Embeddings(
        torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts]), scale
    )
    weight = objective.weights["contrastive"] / count["contrastive"]
    term, gradient = objective.contrast(whole, micro_batches, weight)
    sizes = [len(part.image) for part in parts]
    # The scale is one for all rows: its gradient is given once, by the last micro-batch.
    scales = [*[torch.zeros_like(scale)] * (len(parts) - 1), gradient.scale]
    pieces = zip(gradient.image.split(sizes), gradient.text.split(sizes), scales, strict=True)
    return _Contrasted(objective, term, [Embeddings(*piece) for piece in pieces])


def _counts(
    accelerator: Accelerator, objective: Terms, micro_batches: Sequence[AnyBatch]
) -> tuple[dict[str, Tensor], Tensor]:
    """Elements of each term over all processes and micro-batches, at least 1; and the images."""
    local = dict.fromkeys(objective.weights, 0.0)
    for batch in micro_batches:
        own = objective.counts(batch)
        local = {k: local[k] + own[k] for k in local}
    n_images = float(sum(len(batch.image_ids) for batch in micro_batches))
    counts = torch.tensor([*local.values(), n_images])
    if accelerator.device.type == "cuda":  # from pinned memory: no wait for the device
        counts = counts.pin_memory().to(accelerator.device, non_blocking=True)
    counts = accelerator.reduce(counts.to(accelerator.device), reduction="sum")
    assert isinstance(counts, Tensor)
    *of_terms, images = counts
    return {k: n.clamp(min=1) for k, n in zip(local, of_terms, strict=True)}, images


def _let_finite_pass(
    accelerator: Accelerator, state: TrainState, means: Mapping[str, Tensor], grad_norm: Tensor
) -> None:
    """Lets the optimiser's step happen only where all is finite; see `Unsettled`."""
    names, terms = tuple(means), list(means.values())
    if accelerator.scaler is not None:
        # fp16 scales gradients until they fit: the scaler leaves out a step in which they do not.
        check_finite(state.step, names, torch.stack(terms))
        return
    values = torch.stack([*terms, grad_norm]).detach()
    optimizer = getattr(state.optimizer, "optimizer", state.optimizer)  # Accelerate's wrapper
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    if values.device.type != "cuda" or not is_fused:
        check_finite(state.step, names, values)
        return
    has_failed = ~torch.isfinite(values).all()
    if state.unsettled is not None:
        has_failed = has_failed | state.unsettled.has_failed
    setattr(optimizer, "found_inf", has_failed.float())  # noqa: B010 (torch declares it nowhere)
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    here.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    settle(state)  # the step before: long done
    state.unsettled = Unsettled(state.step, names, here, has_failed, arrived)


class StepData(Dataset[list[B]]):
    """The steps of a training as a data set: item i is what a process reads of step start + i."""

    def __init__(
        self, read_batch: ReadBatch[B], batch_slices: Sequence[BatchSlice], start: int, end: int
    ) -> None:
        self.read_batch, self.slices, self.start, self.end = read_batch, batch_slices, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int) -> list[B]:
        return [self.read_batch(self.start + index, batch_slice) for batch_slice in self.slices]


STEPS_AHEAD = 3
"""Steps whose batches a worker has ready. [chosen: hides a batch that takes three times as long]"""


def step_loader(
    read_batch: ReadBatch[B],
    batch_slices: Sequence[BatchSlice],
    start: int,
    end: int,
    device: torch.device,
) -> DataLoader[list[B]]:
    """The batches of the steps from `start` to `end`, in order, a list of micro-batches each.

    A worker process makes them ahead while a GPU trains. On a CPU the same cores do both, so there
    a batch is made when it is asked for. Either way the same step gives the same batch.

    Args:
        read_batch: What it raises in a worker is raised where its step is asked for.
        batch_slices: Of this process.
        start: The first step.
        end: The step after the last.
        device: Of the training.
    """
    is_gpu = device.type == "cuda"
    return DataLoader(
        StepData(read_batch, batch_slices, start, end),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=int(is_gpu),
        prefetch_factor=STEPS_AHEAD if is_gpu else None,
        pin_memory=is_gpu,
        worker_init_fn=_start_worker,
    )


def _as_it_is(batches: list[B]) -> list[B]:
    return batches


def _start_worker(worker: int) -> None:
    # Ctrl-C is for the training process, which ends its step first; tokenizers warn of forks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


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
    objective: Terms,
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
        objective: The terms that are trained.
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
    began, n_images = time.monotonic(), torch.zeros((), device=accelerator.device)
    weights = objective.weights
    mine = batch_slices(config.n_micro_batches, accelerator)
    steps = iter(step_loader(read_batch, mine, state.step, config.steps, accelerator.device))
    with (
        progress("training", config.steps, state.step, show=main) as advance,
        interrupt_between_steps(accelerator.num_processes) as is_interrupted,
    ):
        while state.step < config.steps:
            due = (state.step + 1) % config.save_every_steps == 0 or state.step + 1 == config.steps
            logs = (state.step + 1) % config.log_every_steps == 0 or state.step + 1 == config.steps
            try:
                values = train_step(accelerator, state, next(steps), objective, config)
                stops_here = is_interrupted()
                if due or logs or stops_here:
                    settle(state)
            except NonFiniteLoss as error:
                where = _save_failed(accelerator, state, read_batch, config, run)
                raise NonFiniteLoss(
                    f"{error}; this process's rows are in {where}; a lower train.base_lr or "
                    f"train.precision=fp32 is the usual remedy"
                ) from None
            n_images = n_images + values.pop("n_images")
            note = None
            if logs:
                seconds = time.monotonic() - began
                images_per_s = float(n_images) / seconds
                began, n_images = time.monotonic(), torch.zeros_like(n_images)
                state.log = {k: float(v) for k, v in values.items()}
                loss = sum(weights[k] * state.log[k] for k in weights)
                line = {"step": state.step, "loss": loss, **state.log, "images_per_s": images_per_s}
                accelerator.log(line, step=state.step)
                note = f"loss {loss:.3f}  {images_per_s:.0f} images/s"
                if main:
                    with log_path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
            advance(1, note)
            ends_here = due and is_over is not None and is_over(state)
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
        whole = batch.to(torch.device("cpu")).tensors()
        tensors = {k: v.contiguous() for k, v in whole.items()}
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
