"""Runs `mmclip ...` in processes of its own that start at once.

A process that has imported torch waits and forks for each command. What it forks is a real process:
its own memory, its own exit code, and SIGKILL ends it wherever it is.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from tests.network import block_network

block_network()

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "tests.commands",
        "typer.rich_utils",
        "mmclip.cli",
        "mmclip.data.ingest.sources",
        "mmclip.doctor",
        "mmclip.training.pretrain",
        "mmclip.evaluation.zeroshot",
        "mmclip.retrieval.ranking",
        "mmclip.explanation.pointing_game",
    ]
)


class Ended(NamedTuple):
    """What a finished command left."""

    code: int  # -9 after SIGKILL
    out: str
    err: str

    def error(self) -> str:
        """The one line that a failed command says, without the progress lines before it."""
        assert self.code == 1, self
        assert "Traceback" not in self.err
        assert self.out == ""
        lines = self.err.splitlines()
        assert lines[-1].startswith("error: "), lines
        assert not any(line.startswith("error: ") for line in lines[:-1])
        return lines[-1]


@dataclass(frozen=True)
class Running:
    """A command under way."""

    process: BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout_s: float = 600) -> Ended:
        """Waits for the end."""
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout_s} s: {self.log}")
        out, err = (self.log.with_suffix(end).read_text("utf-8") for end in (".out", ".err"))
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, out, err)

    def kill(self) -> Ended:
        """Ends it by SIGKILL, which no process can catch."""
        self.process.kill()
        return self.wait()


def fork(
    log: Path,
    work: Callable[..., None],
    *arguments: object,
    environment: Mapping[str, str] | None = None,
) -> Running:
    """Starts a function of a module.

    Args:
        log: As of `start`.
        work: The function.
        arguments: Its arguments.
        environment: Variables that the process has beside ours.
    """
    for ending in (".out", ".err"):  # there is something to read, however early it is killed
        log.with_suffix(ending).touch()
    process = _forks.Process(target=_run, args=(log, environment or {}, work, arguments))
    process.start()
    return Running(process, log)


def start(log: Path, *arguments: str | Path, cwd: Path | None = None) -> Running:
    """Starts a command.

    Args:
        log: Its stdout and stderr go to this path with the endings .out and .err.
        arguments: As typed after `mmclip`.
        cwd: Where it is typed; None where the tests run.
    """
    return fork(log, run_command, [str(a) for a in arguments], cwd)


def mmclip(folder: Path, *arguments: str | Path, cwd: Path | None = None) -> Ended:
    """Runs a command to its end; the folder takes its output."""
    return start(_new_log(folder), *arguments, cwd=cwd).wait()


def mmclip_in_two_processes(folder: Path, *arguments: str | Path) -> tuple[Ended, Ended]:
    """Runs a command as `torchrun --nproc-per-node=2 -m mmclip` does, without its launcher."""
    return in_two_processes(folder, run_command, [str(a) for a in arguments])


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_two_processes(
    folder: Path, work: Callable[..., None], *arguments: object
) -> tuple[Ended, Ended]:
    """Calls a function of a module in two processes that find each other as those of torch do."""
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    first, second = (
        fork(_new_log(folder), work, *arguments, environment={**shared, **ranks})
        for ranks in ({"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(2))
    )
    ended = first.wait()
    # Without the first, the second would wait for it.
    return ended, second.wait() if ended.code == 0 else second.kill()


def _new_log(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"command-{time.monotonic_ns()}"


def _run(
    log: Path,
    environment: Mapping[str, str],
    work: Callable[..., None],
    arguments: tuple[object, ...],
) -> None:
    for stream, ending in ((1, ".out"), (2, ".err")):
        handle = os.open(log.with_suffix(ending), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, stream)
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)  # 80 columns, whatever the terminal of the tests
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it behind "&"
    work(*arguments)


def run_command(arguments: list[str], cwd: Path | None = None) -> None:
    """Runs a command in this process, and ends it."""
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["mmclip", *arguments]
    from mmclip.cli import main

    main()
