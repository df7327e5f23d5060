"""One training loop on Accelerate: micro-batches, precision, processes, logs, exact resume."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from mmclip.batch import BatchSlice
from mmclip.config import TrainConfig
from mmclip.progress import console, progress
from mmclip.training.finite import NonFiniteLoss, save_failed_batch
from mmclip.training.interrupt import Stopped, stop_between_steps
from mmclip.training.log import TrainingLog
from mmclip.training.state import TrainState
from mmclip.training.step import train_step
from mmclip.training.step_loader import batch_slices, step_loader
from mmclip.training.terms import B, ReadBatch, Terms, Validate, Verdict


def fit(
    accelerator: Accelerator,
    state: TrainState,
    read_batch: ReadBatch[B],
    objective: Terms,
    config: TrainConfig,
    run: Path,
    save: Callable[[TrainState], None],
    validate: Validate | None = None,
) -> None:
    """Trains from state.step to config.steps; logs, saves, and stops on a non-finite loss.

    Ctrl-C, SIGTERM and SIGUSR1 end the step in progress in all processes, and save a checkpoint.

    Args:
        accelerator: Prepared; it decides device, precision and processes.
        state: New or resumed; changed in place.
        read_batch: Where rows come from.
        objective: The terms that are trained.
        config: The optimisation.
        run: Folder of metrics.jsonl and of what a failure leaves.
        save: Writes a checkpoint; called on the main process.
        validate: May save, and end training early.

    Raises:
        NonFiniteLoss: The batch is saved as safetensors beside the names of its images.
        KeyboardInterrupt: After Ctrl-C and the checkpoint.
        Stopped: After another signal and the checkpoint.
    """
    log = TrainingLog(run, state.step, objective.weights, accelerator)
    mine = batch_slices(config.n_micro_batches, accelerator)
    steps = iter(step_loader(read_batch, mine, state.step, config.steps, accelerator.device))
    with (
        progress("training", config.steps, state.step, show=accelerator.is_main_process) as advance,
        stop_between_steps(accelerator.num_processes) as asked_to_stop,
    ):
        while state.step < config.steps:
            now = _due(state.step + 1, config, validate)
            with _failures_saved(state, read_batch, mine, accelerator.process_index, run):
                values = train_step(accelerator, state, next(steps), objective, config)
                stops_here = asked_to_stop()
                if any(now) or stops_here:
                    state.settle()
            log.count(values.pop("n_images"))
            advance(1, log.write(state, values) if now.log else None)
            verdict = Verdict({}, saves=False, ends=False)
            if validate is not None and now.validate:
                verdict = validate(state)
                log.add_validation(state.step, verdict.metrics)
            if now.save or verdict.saves or stops_here:
                if accelerator.is_main_process:
                    save(state)
                accelerator.wait_for_everyone()
            if stops_here:
                said = f"stopped after step {state.step:,} of {config.steps:,}, which {run} holds"
                if accelerator.is_main_process:
                    console.print(said, markup=False, soft_wrap=True)
                raise KeyboardInterrupt if stops_here == signal.SIGINT else Stopped(stops_here)
            if verdict.ends:
                break


class _Due(NamedTuple):
    """What follows a step."""

    save: bool
    log: bool
    validate: bool


def _due(step: int, config: TrainConfig, validate: Validate | None) -> _Due:
    every = (
        config.save_every_steps,
        config.log_every_steps,
        0 if validate is None else validate.every_steps,
    )
    return _Due(*(n > 0 and (step == config.steps or step % n == 0) for n in every))


@contextmanager
def _failures_saved(
    state: TrainState, read_batch: ReadBatch[B], slices: Sequence[BatchSlice], rank: int, run: Path
) -> Iterator[None]:
    """Saves the batch of a step that is not finite, and says where and what helps."""
    try:
        yield
    except NonFiniteLoss as error:
        where = save_failed_batch(read_batch, state.step, slices, rank, run)
        raise NonFiniteLoss(
            f"{error}; this process's rows are in {where}; a lower train.base_lr or "
            f"train.precision=fp32 is the usual remedy"
        ) from None
