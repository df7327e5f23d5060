"""Python's garbage collector, which looks in vain through millions of objects that stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Leaves garbage in circles where it is while much is made that stays, such as records.

    The collector looks at all new objects again and again; for a data set that is an eighth of the
    time. Whatever is in no circle is freed all the same.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
