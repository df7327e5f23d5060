"""The optimiser and its learning rate."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from mmclip.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to `config.peak_lr`, then a cosine to final_lr_ratio of it.

    The first step is not at 0.

    Source: cosine [arXiv:1608.03983].
    """
    peak = config.peak_lr
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
    # The fused kernel can leave out a step on the device, see `finite.Unsettled`; the one for CPUs
    # rounds otherwise than the loop over tensors, with which the numbers of docs/ were made.
    fused = all(p.is_cuda for _, p in named)
    return torch.optim.AdamW(
        groups, lr=config.base_lr, betas=(0.9, config.beta2), eps=1e-6, fused=fused
    )
