"""Decodes compressed DICOM pixels in a process of its own, which is killed when it takes too much.

Codecs read bytes that anybody may have written: some files keep one in a loop for ever, make it ask
for all the memory of the machine, or end its process. Such a file costs its own image and a new
process, and never the build. The process is started at the first file that needs it and kept.
"""

import atexit
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import IO, Any

import numpy as np

from mmclip.data.dicom import decode_dicom
from mmclip.data.pixels import ImageError
from mmclip.data.sample import Reason

DECODE_CPU_S = 30.0
"""CPU time that one image may take. [chosen: 20 million pixels of JPEG 2000 take about 5 s] Not
wall time, as a busy machine must not lose sound images."""

DECODE_WALL_S = 300.0
"""Wall time that one image may take: for a decoder that waits, or a system without CPU limits."""

MEMORY_BYTES = 4 << 30
"""Memory that decoding may take beyond what its process holds at the start, where the system limits
it (Linux). [chosen: 100 million pixels of 16 bits, and the copies that scaling makes of them]"""

WATCH_S = 0.2
"""How often the wall time is looked at. [chosen: far below what a file may take]"""

_REQUEST = struct.Struct("<QQd")  # bytes of the file, largest image in pixels, CPU seconds
_REPLY = struct.Struct("<II")  # bytes of the JSON that follows, and of the pixels behind it
_READY = b"ready"
_START = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from mmclip.data.decode_worker import serve; serve(sys.stdin.buffer)"
)


class DecodeWorker:
    """A process that decodes one file at a time; a new one follows when it had to be killed.

    Args:
        cpu_s: CPU time a file.
        wall_s: Wall time a file.
    """

    def __init__(self, cpu_s: float = DECODE_CPU_S, wall_s: float = DECODE_WALL_S) -> None:
        self.cpu_s, self.wall_s = cpu_s, wall_s
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork of that may not use it
        self._lock = threading.Lock()
        self._deadline = math.inf
        self._was_late = False

    def decode(self, content: bytes, max_px: int) -> np.ndarray:
        """As `dicom.decode_dicom`.

        Raises:
            ImageError: As there, and when the file takes too much time or memory, or ends the
                process.
            RuntimeError: When no process can be started.
        """
        with self._lock:
            process = self._started()
            self._deadline = time.monotonic() + self.wall_s
            try:
                return _ask(process, content, max_px, self.cpu_s)
            except (EOFError, BrokenPipeError):
                raise ImageError(Reason.IMAGE_UNREADABLE, self._why()) from None
            except ImageError:
                raise
            except BaseException:  # such as Ctrl-C in the middle of a reply
                self.close()
                raise
            finally:
                self._deadline = math.inf

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            _close_pipes(process)

    def _started(self) -> "subprocess.Popen[bytes]":
        """The process that waits for a file: no dead one, and none that a fork took along."""
        process = self._process
        if process is not None and self._owner == os.getpid():
            if process.poll() is None:
                return process
            _close_pipes(process)
        # One thread: what more of them spend would count as the file's CPU time.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env,
        )  # fmt: skip
        assert process.stdout is not None
        if process.stdout.read(len(_READY)) != _READY:
            process.kill()
            process.wait()
            raise RuntimeError(
                f"the process that decodes compressed images cannot be started: "
                f"{sys.executable} ended with {process.returncode}; see `mmclip doctor`"
            )
        self._process, self._owner, self._was_late = process, os.getpid(), False
        threading.Thread(target=self._watch, args=(process,), daemon=True).start()
        return process

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Kills a process that is past its deadline. A timer a file would cost a thread a file."""
        while process.returncode is None and self._process is process:
            if time.monotonic() > self._deadline:
                self._was_late = True
                process.kill()
                return
            time.sleep(WATCH_S)

    def _why(self) -> str:
        """Why the process has ended in the middle of a file."""
        process, self._process = self._process, None
        assert process is not None
        code = process.wait()
        _close_pipes(process)
        if self._was_late:
            return f"decoding takes more than {self.wall_s:g} s"
        if code in (-signal.SIGXCPU, -signal.SIGKILL) if hasattr(signal, "SIGXCPU") else False:
            return f"decoding takes more than {self.cpu_s:g} s of CPU time"
        return "the file ends the process that decodes it"


def _close_pipes(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # of what the dead process had not read
                pipe.close()


def _ask(
    process: "subprocess.Popen[bytes]", content: bytes, max_px: int, cpu_s: float
) -> np.ndarray:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(_REQUEST.pack(len(content), max_px, cpu_s))
    process.stdin.write(content)
    process.stdin.flush()
    n_json, n_pixels = _REPLY.unpack(_read(process.stdout, _REPLY.size))
    said = json.loads(_read(process.stdout, n_json))
    pixels = _read(process.stdout, n_pixels)
    if "reason" in said:
        raise ImageError(Reason(said["reason"]), said["detail"])
    return np.frombuffer(pixels, np.uint8).reshape(said["shape"])


def _read(pipe: IO[Any], n: int) -> bytes:
    found = pipe.read(n)
    if len(found) < n:
        raise EOFError
    return found


# -- the process itself --


def serve(requests: IO[Any]) -> None:
    """Answers until there are no more requests; what codecs print goes nowhere."""
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    _limit_memory()
    replies.write(_READY)
    replies.flush()
    while header := requests.read(_REQUEST.size):
        n_bytes, max_px, cpu_s = _REQUEST.unpack(header)
        content = _read(requests, n_bytes)
        _limit_cpu(cpu_s)
        pixels = b""
        try:
            image = np.ascontiguousarray(decode_dicom(content, max_px))
            said = {"shape": image.shape}
            pixels = image.tobytes()
        except ImageError as error:
            said = {"reason": error.reason, "detail": error.detail}
        except MemoryError:
            detail = f"decoding takes more than {MEMORY_BYTES >> 30} GiB of memory"
            said = {"reason": Reason.IMAGE_UNREADABLE, "detail": detail}
        text = json.dumps(said).encode()
        replies.write(_REPLY.pack(len(text), len(pixels)) + text)
        replies.write(pixels)
        replies.flush()


def _limit_memory() -> None:
    try:
        import resource
        from pathlib import Path

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # no Linux
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = held + MEMORY_BYTES
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most)
    )


def _limit_cpu(cpu_s: float) -> None:
    """Ends this process after so much more CPU time; rounded up, as limits are whole seconds."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(used.ru_utime + used.ru_stime + cpu_s) + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most)
    )


_WORKER = DecodeWorker()
atexit.register(_WORKER.close)


def decode_apart(content: bytes, max_px: int) -> np.ndarray:
    """As `dicom.decode_dicom`, in the process that this one keeps for it."""
    return _WORKER.decode(content, max_px)
