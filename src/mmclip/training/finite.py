"""Losses and gradients that are not finite stop training before the weights move."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmclip.batch import BatchSlice
from mmclip.training.terms import B, ReadBatch


class NonFiniteLoss(RuntimeError):
    """A loss term or the gradient became infinite or not a number; the message names it and the
    saved batch."""


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


def let_finite_pass(
    optimizer: torch.optim.Optimizer,
    step: int,
    means: Mapping[str, Tensor],
    grad_norm: Tensor | None,
    before: Unsettled | None,
) -> Unsettled | None:
    """Lets the optimiser's next step happen only where all is finite.

    Args:
        optimizer: Perhaps wrapped by Accelerate.
        step: For messages.
        means: Of the terms.
        grad_norm: Of the gradient; None where it need not be finite.
        before: The step before, where it is not settled.

    Returns:
        The step, where it is the device that decides.

    Raises:
        NonFiniteLoss: At once on a CPU; on a GPU it is settled later.
    """
    names, terms = tuple(means), list(means.values())
    if grad_norm is None:
        check_finite(step, names, torch.stack(terms))
        return None
    values = torch.stack([*terms, grad_norm]).detach()
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    if values.device.type != "cuda" or not is_fused:
        check_finite(step, names, values)
        return None
    has_failed = ~torch.isfinite(values).all()
    if before is not None:
        has_failed = has_failed | before.has_failed
    setattr(optimizer, "found_inf", has_failed.float())  # noqa: B010 (torch declares it nowhere)
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    here.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Unsettled(step, names, here, has_failed, arrived)


def save_failed_batch(
    read_batch: ReadBatch[B], step: int, slices: Sequence[BatchSlice], rank: int, run: Path
) -> Path:
    """Writes what a process read of a step as safetensors, beside the names of its images.

    Args:
        read_batch: Gives the same batch again.
        step: That failed.
        slices: Of this process.
        rank: Of this process.
        run: Where the folder goes.

    Returns:
        The folder.
    """
    folder = run / f"nonfinite_step_{step:06d}_process_{rank}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for m, batch_slice in enumerate(slices):
        batch = read_batch(step, batch_slice)
        whole = batch.to(torch.device("cpu")).tensors()
        tensors = {k: v.contiguous() for k, v in whole.items()}
        save_file(tensors, folder / f"batch_{m}.safetensors")
        (folder / f"batch_{m}_images.txt").write_text("\n".join(batch.image_ids) + "\n", "utf-8")
    return folder
