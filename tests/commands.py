"""Runs `mmclip ...` in processes of its own that start at once.

A process that has imported torch waits and forks for each command. What it forks is a real process:
its own memory, its own exit code, and SIGKILL ends it wherever it is.
"""

import multiprocessing
import os
import sys
import time
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


def start(log: Path, *arguments: str | Path, cwd: Path | None = None) -> Running:
    """Starts a command.

    Args:
        log: Its stdout and stderr go to this path with the endings .out and .err.
        arguments: As typed after `mmclip`.
        cwd: Where it is typed; None where the tests run.
    """
    process = _forks.Process(target=_run, args=(log, [str(a) for a in arguments], cwd))
    process.start()
    return Running(process, log)


def mmclip(folder: Path, *arguments: str | Path, cwd: Path | None = None) -> Ended:
    """Runs a command to its end; the folder takes its output."""
    folder.mkdir(parents=True, exist_ok=True)
    return start(folder / f"command-{time.monotonic_ns()}", *arguments, cwd=cwd).wait()


def _run(log: Path, arguments: list[str], cwd: Path | None) -> None:
    if cwd is not None:
        os.chdir(cwd)
    for stream, ending in ((1, ".out"), (2, ".err")):
        handle = os.open(log.with_suffix(ending), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, stream)
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)  # 80 columns, whatever the terminal of the tests
    sys.argv = ["mmclip", *arguments]
    from mmclip.cli import main

    main()
