"""The work of a build in chunks: who does them, and how a build that was killed goes on.

Each chunk that is done leaves a shard in a folder: NUMBER.json with what was found, and NUMBER.npy
where it makes an array. A shard carries a fingerprint of what it was made of and a checksum of
itself, so that nothing is done twice, and nothing old or damaged is taken up. As shards are all
that passes between those who work, they may be processes, machines of a Dask cluster, or commands
that each make every n-th shard.
"""

import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmclip.files import write_atomic
from mmclip.progress import console, progress

if TYPE_CHECKING:
    import distributed

Workers = int | str
"""Who works: a number of processes (1 is this one), or the address of a Dask scheduler."""

CONNECT_S, FIRST_WORKER_S = 10.0, 60.0
"""How long a scheduler may take to answer, and the first worker to join it. [chosen: a job of a
queue that shall hold workers starts before the command that uses them]"""

JOBS_PER_WORKER = 2
"""Sent to a Dask worker ahead, so that it never waits and the scheduler's memory stays flat.
[chosen]"""


def n_cores() -> int:
    """The cores that this process may use: a job of a cluster is given some of a machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkersError(ValueError):
    """Those who shall work cannot be had, or died; the message names the next step."""


@dataclass(frozen=True)
class Shard:
    """Every `count`-th shard of a build from `number` on, counted from 1: the share of a
    command."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From "3/8".

        Raises:
            ValueError: When it is no such pair, or the number is not 1 to the count.
        """
        found = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
        if found is None:
            raise ValueError(f"shard {text!r} is not of the form NUMBER/COUNT, such as 1/8")
        shard = cls(int(found[1]), int(found[2]))
        if not 1 <= shard.number <= shard.count:
            raise ValueError(
                f"shard {text!r}: the number must be 1 to {shard.count}; for a SLURM array of "
                f"{shard.count} say --array=1-{shard.count}"
            )
        return shard


class ShardContent(NamedTuple):
    """What one chunk gives."""

    facts: list[Any]  # as JSON can hold them
    array: np.ndarray | None = None


@dataclass(frozen=True)
class Work:
    """What is done to each chunk. Both functions must be found by name in another process.

    Attributes:
        fingerprint: Of a chunk's items: changes when `do` would give something else.
        do: Makes the shard of a chunk's items.
    """

    fingerprint: Callable[[Sequence[Any]], str]
    do: Callable[[Sequence[Any]], ShardContent]


def do_chunks(
    folder: Path,
    items: Sequence[Any],
    per_chunk: int,
    work: Work,
    what: str,
    workers: Workers = 1,
    shard: Shard | None = None,
) -> None:
    """Does all chunks of which the folder holds no sound shard, and shows how far it is.

    The shards do not depend on who works, nor on how often the work was killed and taken up.
    Several commands may do shards in one folder at a time.

    Args:
        folder: For the shards; made when absent. Dask workers must find it under the same path.
        items: The work; chunk i holds the items from i * per_chunk on.
        per_chunk: Items a chunk.
        work: What to do.
        what: The task in a few words, for the progress display.
        workers: Who works.
        shard: Do only this share of the chunks.

    Raises:
        WorkersError: When Dask or its scheduler is not there, or a worker died.
    """
    folder = folder.absolute()  # those who work may stand in another folder
    folder.mkdir(parents=True, exist_ok=True)
    n_chunks = -(-len(items) // per_chunk)
    numbers = range(n_chunks) if shard is None else range(shard.number - 1, n_chunks, shard.count)

    def chunk(number: int) -> Sequence[Any]:
        return items[number * per_chunk : (number + 1) * per_chunk]

    # Listed once, and not asked for one by one: a network file system remembers what was not there.
    there = {path.name for path in folder.iterdir()}
    to_check = [number for number in numbers if _facts_file(folder, number).name in there]
    sound = set()
    if to_check:
        with progress(f"{what}: what is done", len(to_check)) as advance:
            for number in to_check:
                if _is_sound(folder, number, work.fingerprint(chunk(number))):
                    sound.add(number)
                advance(1)
    todo = [number for number in numbers if number not in sound]
    n_done, n_all = (sum(len(chunk(number)) for number in some) for some in (sound, numbers))
    jobs = ((folder, number, chunk(number), work) for number in todo)
    with progress(what, n_all, n_done) as advance:
        for number, fingerprint in _run(jobs, len(todo), workers):
            if isinstance(workers, str) and fingerprint != work.fingerprint(chunk(number)):
                raise WorkersError(
                    f"a worker of {workers} sees other files than this machine, or has another "
                    f"mmclip (chunk {number} of {what!r}); mount the data at the same path and "
                    f"install the same version on all machines"
                )
            advance(len(chunk(number)))
    list(folder.iterdir())  # a network file system may show only now what others wrote


def read_facts(folder: Path, number: int) -> list[Any]:
    """What a chunk that is done has found."""
    return json.loads(_facts_file(folder, number).read_text("utf-8"))["facts"]


def read_array(folder: Path, number: int) -> np.ndarray:
    """The array of a chunk that is done, memory-mapped."""
    return np.load(_array_file(folder, number), mmap_mode="r")


def _facts_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def _array_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npy"


def _is_sound(folder: Path, number: int, fingerprint: str) -> bool:
    try:
        known = json.loads(_facts_file(folder, number).read_text("utf-8"))
        return known["fingerprint"] == fingerprint and known["sha256"] == _checksum(
            known["facts"], _array_file(folder, number) if known["has_array"] else None
        )
    except (OSError, ValueError, LookupError, TypeError):  # missing, or damaged
        return False


def _checksum(facts: list[Any], array: Path | None) -> str:
    content = b"" if array is None else array.read_bytes()
    return hashlib.sha256(content + json.dumps(facts).encode()).hexdigest()


_ONE_AT_A_TIME = threading.Lock()
"""Of a process: decoders and entity finders are not made for several threads, as Dask's may be."""


def _do_chunk(folder: Path, number: int, chunk: Sequence[Any], work: Work) -> tuple[int, str]:
    """Writes the shard of a chunk, the array first.

    Two who do the same chunk do no harm: they write the same bytes aside and rename them. Nothing
    is synced, as a checksum tells half a shard: for 256 images of 224 px that takes 44 ms, where
    decoding files of 320 px takes 1 s, and the disk is one for all workers.
    """
    with _ONE_AT_A_TIME:
        fingerprint = work.fingerprint(chunk)  # before, so that a change while it runs is noticed
        content = work.do(chunk)
    array_file = None
    if content.array is not None:
        array_file = _array_file(folder, number)
        with write_atomic(array_file, sync=False) as file:
            np.save(file, content.array)
    known = {
        "fingerprint": fingerprint,
        "sha256": _checksum(content.facts, array_file),
        "has_array": array_file is not None,
        "facts": content.facts,
    }
    with write_atomic(_facts_file(folder, number), sync=False) as file:
        file.write(json.dumps(known).encode())
    return number, fingerprint


# -- who works --

_Job = tuple[Path, int, Sequence[Any], Work]


def _run(jobs: Iterator[_Job], n_jobs: int, workers: Workers) -> Iterator[tuple[int, str]]:
    """Does all jobs; yields number and fingerprint of each as it ends."""
    if isinstance(workers, str):
        return _on_dask(jobs, workers) if n_jobs else iter(())
    if workers <= 1 or n_jobs <= 1:
        return (_do_chunk(*job) for job in jobs)
    return _in_processes(jobs, workers)


def _in_processes(jobs: Iterator[_Job], workers: int) -> Iterator[tuple[int, str]]:
    how = f"run the same command again with fewer --workers (now {workers})"
    with process_pool(workers, f"{how}: finished chunks are kept") as pool:
        for done in as_completed([pool.submit(_do_chunk, *job) for job in jobs]):
            yield done.result()


@contextmanager
def process_pool(workers: int, next_step: str) -> Iterator[ProcessPoolExecutor]:
    """New processes, which end with this one; what was not begun is dropped at the end.

    Ctrl-C reaches this process alone. Where it or another signal ends the work, the processes are
    ended, too: none is waited for.

    Args:
        workers: How many.
        next_step: What helps when one is killed, for the message.

    Raises:
        WorkersError: When a process was killed.
    """
    others = set(active_children())
    # Not fork: the caller may already run threads, which a forked child would lack.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_end_with_parent
    )
    try:
        # A worker starts with the first task that finds none idle, and keeps what is blocked here.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(workers):
                pool.submit(int)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        yield pool
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        for worker in set(active_children()) - others:
            worker.terminate()
        raise
    except BrokenProcessPool:
        raise WorkersError(
            f"a worker process was killed, usually for want of memory; {next_step}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed: else it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None  # true of a worker

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def _on_dask(jobs: Iterator[_Job], address: str) -> Iterator[tuple[int, str]]:
    with _dask_client(address) as client:
        import distributed

        def threads() -> dict[str, int]:  # of each worker; they come and go
            return client.nthreads()  # pyright: ignore[reportReturnType]

        if max(threads().values(), default=1) > 1:
            console.print(
                "a Dask worker with several threads does one chunk at a time; start workers with "
                "--nthreads 1",
                style="yellow",
            )
        running = distributed.as_completed(loop=client.loop)

        def send_more() -> None:
            n_ahead = JOBS_PER_WORKER * max(1, len(threads()))
            for job in islice(jobs, max(0, n_ahead - running.count())):
                running.add(client.submit(_do_chunk, *job, pure=False))

        send_more()
        try:
            for done in running:
                yield done.result()
                send_more()
        except (
            distributed.KilledWorker, ModuleNotFoundError, OSError, distributed.CancelledError
        ) as error:  # fmt: skip
            raise _dask_failure(error, address, client.status == "running") from None


@contextmanager
def _dask_client(address: str) -> "Iterator[distributed.Client]":
    """A client of a scheduler that has a worker.

    Raises:
        WorkersError: When Dask is not installed, or the scheduler or a worker is not there.
    """
    if not re.fullmatch(r"[a-z]+://.+:\d+", address):
        raise WorkersError(f"scheduler {address!r} is no address; say it as tcp://host:port")
    try:
        import distributed
    except ModuleNotFoundError:
        raise WorkersError(
            "a scheduler needs Dask, which is not installed: pip install 'mmclip[dask]'"
        ) from None
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except OSError:
        raise WorkersError(
            f"no Dask scheduler answers at {address} within {CONNECT_S:.0f} s; start one with "
            f"`dask scheduler --port {address.rpartition(':')[2]}`, or give its address"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=FIRST_WORKER_S)
        except TimeoutError:
            raise WorkersError(
                f"no worker has joined the scheduler {address} within {FIRST_WORKER_S:.0f} s; "
                f"start some with `dask worker {address} --nworkers -1 --nthreads 1`"
            ) from None
        yield client


def _dask_failure(error: BaseException, address: str, is_running: bool) -> WorkersError:
    """What went wrong on the workers, and what to do."""
    import distributed

    again = "run the same command again: finished chunks are kept"
    if isinstance(error, distributed.KilledWorker):
        return WorkersError(
            f"workers of {address} died again and again at one chunk, usually for want of memory; "
            f"start them with more, and {again}"
        )
    if isinstance(error, ModuleNotFoundError):
        return WorkersError(
            f"a worker of {address} has no {error.name}; install the same mmclip there"
        )
    if isinstance(error, OSError) and is_running:
        return WorkersError(
            f"a worker of {address} cannot read the data or write its shard ({error}); all "
            f"machines must see --root and --out at the same path, on a file system they share"
        )
    return WorkersError(
        f"the scheduler {address} ended, or cannot be reached any more; start it and its workers "
        f"again, and {again}"
    )
