"""Ctrl-C ends training between two steps, where all is whole."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
