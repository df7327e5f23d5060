"""All that changes while training runs, in memory and in a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mmclip.checkpoint import load_trainer_state
from mmclip.training.ema import WeightAverage
from mmclip.training.finite import NonFiniteLoss, Unsettled


@dataclass
class TrainState:
    """All that changes while training runs."""

    model: nn.Module  # wrapped by Accelerate
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimiser steps done
    log: dict[str, float] = field(default_factory=dict)  # of the last step
    average: WeightAverage | None = None
    unsettled: Unsettled | None = None  # the last step on a GPU, until it is known to be finite

    def settle(self) -> None:
        """Waits for the last step on a GPU; elsewhere each step is settled at once.

        Raises:
            NonFiniteLoss: When it was not finite; the state is then as before that step.
        """
        last, self.unsettled = self.unsettled, None
        if last is None:
            return
        try:
            last.settle()
        except NonFiniteLoss:
            self.step = last.step
            raise


def trainer_state(accelerator: Accelerator, state: TrainState) -> dict[str, Any]:
    """What a checkpoint must hold beside the weights, as tensors and plain values."""
    return {
        "step": state.step,
        "optimizer": state.optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "torch_rng": torch.get_rng_state(),
    }


def restore_trainer_state(
    accelerator: Accelerator, state: TrainState, folder: Path
) -> dict[str, Any]:
    """Puts optimiser, scaler, random state and step back as `trainer_state` gave them.

    Returns:
        All that the checkpoint holds beside the weights.
    """
    saved = load_trainer_state(folder)
    state.step = saved["step"]
    state.optimizer.load_state_dict(saved["optimizer"])
    if accelerator.scaler is not None and saved["scaler"] is not None:
        accelerator.scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["torch_rng"])
    return saved
