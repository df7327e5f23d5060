"""One process or several: what starts them, and that each knows of the others."""

import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedDataParallelKwargs, LoggerType

from mmclip.config import TrainConfig


def installed_trackers(tensorboard: bool, wandb: bool) -> list[str | LoggerType | GeneralTracker]:
    """What a run logs to beside metrics.jsonl.

    Raises:
        ValueError: When the package of one is not installed.
    """
    trackers: list[str | LoggerType | GeneralTracker] = []
    for name, is_wanted in (("tensorboard", tensorboard), ("wandb", wandb)):
        if is_wanted and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--{name} needs the package {name}, which is not installed; "
                f"pip install 'mmclip[{name}]', or leave it out: metrics.jsonl has the same numbers"
            )
        if is_wanted:
            trackers.append(name)
    return trackers


def start_accelerator(
    train: TrainConfig,
    cpu: bool,
    trackers: Sequence[str | LoggerType | GeneralTracker] = (),
    folder: Path | None = None,
) -> Accelerator:
    """What knows device, precision and processes of a training.

    Several processes talk by NCCL where there are GPUs, else by gloo.

    Args:
        train: Says the precision.
        cpu: Leave GPUs alone.
        trackers: Log to these, too.
        folder: Where trackers write.

    Raises:
        RuntimeError: When `torchrun` or `accelerate` started several processes and this one does
            not find the others: each would train the whole, and all write to one folder.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[train.precision]
    accelerator = Accelerator(
        mixed_precision=precision,
        # Accelerate looks for other processes on CPUs only where it is told that there is no GPU.
        cpu=cpu or (started > 1 and not torch.cuda.is_available()),
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != started:
        raise RuntimeError(
            f"WORLD_SIZE={started} processes were started, and this one knows of "
            f"{accelerator.num_processes}; start them by `torchrun --nproc-per-node N -m mmclip "
            f"...`, or unset WORLD_SIZE to train in one"
        )
    return accelerator


THREADS_END_S = 0.5
"""[chosen: a thread needs microseconds, and gets them on a machine with many more processes than
cores, too]"""


def let_threads_end(accelerator: Accelerator) -> None:
    """Waits, where there are several processes, until the threads that talked to others are idle.

    To be called before the model that was trained is given up. A thread of gloo needs Python to
    free the tensor that it talked of last, and the end of the model waits for the thread without
    letting go of Python (torch 2.13): the process would hang, or die with Python.
    """
    if accelerator.num_processes > 1:
        time.sleep(THREADS_END_S)
