"""One training loop on Accelerate: micro-batches, precision, processes, logs, exact resume."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from mmclip.batch import BatchSlice
from mmclip.config import TrainConfig
from mmclip.progress import console, progress
from mmclip.training.finite import NonFiniteLoss, save_failed_batch
from mmclip.training.interrupt import interrupt_between_steps
from mmclip.training.log import TrainingLog
from mmclip.training.state import TrainState
from mmclip.training.step import train_step
from mmclip.training.step_loader import batch_slices, step_loader
from mmclip.training.terms import B, ReadBatch, Terms


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
    log = TrainingLog(run, state.step, objective.weights, accelerator)
    mine = batch_slices(config.n_micro_batches, accelerator)
    steps = iter(step_loader(read_batch, mine, state.step, config.steps, accelerator.device))
    with (
        progress("training", config.steps, state.step, show=accelerator.is_main_process) as advance,
        interrupt_between_steps(accelerator.num_processes) as is_interrupted,
    ):
        while state.step < config.steps:
            is_last = state.step + 1 == config.steps
            due = is_last or (state.step + 1) % config.save_every_steps == 0
            logs = is_last or (state.step + 1) % config.log_every_steps == 0
            with _failures_saved(state, read_batch, mine, accelerator.process_index, run):
                values = train_step(accelerator, state, next(steps), objective, config)
                stops_here = is_interrupted()
                if due or logs or stops_here:
                    state.settle()
            log.count(values.pop("n_images"))
            advance(1, log.write(state, values) if logs else None)
            ends_here = due and is_over is not None and is_over(state)
            if due or stops_here:
                if accelerator.is_main_process:
                    save(state)
                accelerator.wait_for_everyone()
            if stops_here:
                said = f"stopped after step {state.step:,} of {config.steps:,}, which {run} holds"
                console.print(said, markup=False, soft_wrap=True)
                raise KeyboardInterrupt
            if ends_here:
                break
    return state


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
