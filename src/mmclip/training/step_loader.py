"""What each process reads of each step, made ahead by a worker where a GPU trains."""

import os
import signal
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from mmclip.batch import BatchSlice
from mmclip.training.interrupt import STOP_SIGNALS
from mmclip.training.terms import B, ReadBatch


def batch_slices(n_micro: int, accelerator: Accelerator) -> list[BatchSlice]:
    """What this process reads of a step, a micro-batch each."""
    world, rank = accelerator.num_processes, accelerator.process_index
    return [BatchSlice(m * world + rank, n_micro * world) for m in range(n_micro)]


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
    # Signals are for the training process, which ends its step first and then this worker.
    for each in STOP_SIGNALS:
        signal.signal(each, _ignore_once)
    # Tokenizers warn of forks.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _ignore_once(number: int, _: object) -> None:
    # The training process ends a worker that does not end by itself with a SIGTERM of its own.
    signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
