"""Concurrent requests that ask the same thing of the model are answered by one call."""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


class BusyError(RuntimeError):
    """Too many requests wait already."""


@dataclass(frozen=True)
class _Job:
    key: Hashable
    items: Sequence[Any]
    answer: Callable[[list[Any]], Iterable[Any]]
    result: asyncio.Future[list[Any]]


class Batcher:
    """Gathers what is asked while the model is busy, and asks for all of it at once.

    One thread alone uses the model. No request waits for others to come: one that finds the model
    idle is answered at once, and those that come meanwhile form the next batch.

    Args:
        max_items: Of a batch.
        max_waiting: Requests that may wait; a further one is refused.
    """

    def __init__(self, max_items: int = 32, max_waiting: int = 64) -> None:
        self._max_items, self._max_waiting = max_items, max_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._waiting: deque[_Job] = deque()
        self._worker: asyncio.Task[None] | None = None
        self.n_calls = 0

    async def ask(
        self,
        key: Hashable,
        items: Sequence[Any],
        answer: Callable[[list[Any]], Iterable[Any]],
    ) -> list[Any]:
        """What `answer` gives for some items, perhaps called with the items of others behind them.

        Args:
            key: Calls of equal keys may be made as one.
            items: Any number.
            answer: Gives one result an item, in order, whatever stands beside it.

        Raises:
            BusyError: When too many requests wait.
            Exception: What `answer` raises.
        """
        if len(self._waiting) >= self._max_waiting:
            raise BusyError(f"{self._max_waiting} requests wait already; try again later")
        result = asyncio.get_running_loop().create_future()
        self._waiting.append(_Job(key, items, answer, result))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await result

    def close(self) -> None:
        """Ends the thread; what waits is not answered."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Answers batch after batch until nothing waits."""
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            items = [item for job in batch for item in job.items]
            call = loop.run_in_executor(self._thread, batch[0].answer, items)
            await asyncio.wait([call])
            self.n_calls += 1
            error = call.exception()
            results = [] if error is not None else list(call.result())
            at = 0
            for job in batch:
                end = at + len(job.items)
                if job.result.done():  # its request has ended
                    pass
                elif error is not None:
                    job.result.set_exception(error)
                else:
                    job.result.set_result(results[at:end])
                at = end

    def _next_batch(self) -> list[_Job]:
        """The first request that waits, and others of its key as far as they fit."""
        waiting = [job for job in self._waiting if not job.result.done()]
        batch: list[_Job] = []
        n_items = 0
        rest: deque[_Job] = deque()
        for job in waiting:
            fits = not batch or (
                job.key == batch[0].key and n_items + len(job.items) <= self._max_items
            )
            if fits:
                batch.append(job)
                n_items += len(job.items)
            else:
                rest.append(job)
        self._waiting = rest
        return batch
