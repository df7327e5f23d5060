"""One optimiser step over micro-batches and processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from mmclip.config import TrainConfig
from mmclip.training.finite import let_finite_pass
from mmclip.training.optimizer import learning_rate
from mmclip.training.state import TrainState
from mmclip.training.terms import AnyBatch, ContrastiveTerms, Embeddings, Terms


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
            later, see `finite.Unsettled`.
    """
    count, n_images = _counts(accelerator, objective, micro_batches)
    sums = _backward(accelerator, state, micro_batches, objective, count, config.gradient_cache)
    stacked = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
    assert isinstance(stacked, Tensor)
    means = {k: s / count[k] for k, s in zip(sums, stacked, strict=True)}
    grad_norm = accelerator.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    grad_norm = torch.as_tensor(grad_norm, device=accelerator.device)
    # fp16 scales gradients until they fit: the scaler leaves out a step in which they do not.
    checked = grad_norm if accelerator.scaler is None else None
    now = let_finite_pass(state.optimizer, state.step, means, checked, state.unsettled)
    state.settle()  # the step before: long done
    state.unsettled = now
    lr = learning_rate(state.step, config)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # older checkpoints have no scale
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.average is not None:
        state.average.update()
    state.step += 1
    return {**means, "grad_norm": grad_norm, "lr": torch.tensor(lr), "n_images": n_images}


def _backward(
    accelerator: Accelerator,
    state: TrainState,
    micro_batches: Sequence[AnyBatch],
    objective: Terms,
    count: Mapping[str, Tensor],
    gradient_cache: bool,
) -> dict[str, Tensor]:
    """Adds the gradient of all micro-batches to the parameters; the sum of each term here."""
    weights = objective.weights
    sums = {k: torch.zeros((), device=accelerator.device) for k in weights}
    contrasted = None
    if gradient_cache:
        assert isinstance(objective, ContrastiveTerms)
        contrasted = _contrast_all(accelerator, state, micro_batches, objective, count)
    for m, batch in enumerate(micro_batches):
        last = m == len(micro_batches) - 1
        with torch.enable_grad() if last else accelerator.no_sync(state.model):
            here = batch.to(accelerator.device)
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
    return sums


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
