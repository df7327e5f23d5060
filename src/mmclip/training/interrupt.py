"""A signal ends training between two steps, where all is whole, in all processes at the same."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, what ends a job, and what SLURM sends some time before it does (--signal=USR1@120)."""

AskedToStop = Callable[[], signal.Signals | None]
"""Says after a step which signal asks to stop; the same on every process, each of which must ask
after each step."""


class Stopped(SystemExit):
    """A signal other than Ctrl-C ended training after a checkpoint; the code is the shell's."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(128 + by)


@contextmanager
def stop_between_steps(n_processes: int) -> Iterator[AskedToStop]:
    """Puts signals off to the end of a step.

    With one process, the second signal acts at once. With several, further ones change nothing:
    torchrun passes on what it gets to processes that have it from the terminal already, and kills
    them after 30 s.

    Source: ours. Python raises KeyboardInterrupt wherever it is, and where that is a callback of C
    code or a finaliser, the interrupt is printed or lost and training goes on.

    Args:
        n_processes: Of the training; those of `torch.distributed`, if more than one.

    Returns:
        By `with`, what asks. Outside of the main thread no signal arrives, so none is put off.
    """
    received: list[signal.Signals] = []
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS} if is_main_thread else {}

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    def defer(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        if n_processes == 1:
            restore()

    for each in before:
        signal.signal(each, defer)
    try:
        yield _agreement(received, n_processes)
    finally:
        restore()


def _agreement(received: list[signal.Signals], n_processes: int) -> AskedToStop:
    if n_processes == 1:
        return lambda: received[0] if received else None
    # By gloo, on the host: to ask a GPU would be to wait for it in every step.
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def asked() -> signal.Signals | None:
        highest = torch.tensor([int(received[0]) if received else 0])
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        return signal.Signals(int(highest)) if highest else None

    return asked
