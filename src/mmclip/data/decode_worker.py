"""Decodes image files in a process of its own, which is killed when it takes too much.

Codecs read bytes that anybody may have written: some files keep one in a loop for ever, make it ask
for all the memory of the machine, or end its process. Such a file costs its own image and a new
process, and never the build. The process is started at the first file that needs it and kept.
A build sends it compressed DICOM alone; `mmclip serve` sends it whatever is uploaded.
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

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

from mmclip.data.dicom_grey import StoredValues
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

PIPE_BYTES = 1 << 20
"""Of the pipes to and from the process, on Linux, which lets any program have as much: an image of
512 px then passes in one piece. With the usual 64 kB each side waits for the other 5 times."""

_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""For glibc: memory of an image is kept for the next. By default each is asked for and given back
anew, and the page faults take a quarter of the time of a small image."""

WATCH_S = 0.2
"""How often the wall time is looked at. [chosen: far below what a file may take]"""

# How the two processes speak; see `decode_process`.
REQUEST = struct.Struct("<QQd?")  # bytes of the file, most pixels, CPU seconds, stored values
REPLY = struct.Struct("<II")  # bytes of the JSON that follows, and of the pixels behind it
READY = b"ready"
_START = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from mmclip.data.decode_process import serve; serve(sys.stdin.buffer)"
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
        """As `dicom.decode_dicom`, or `images.decode_raster` of what is no DICOM.

        Raises:
            ImageError: As there, and when the file takes too much time or memory, or ends the
                process.
            RuntimeError: When no process can be started.
        """
        pixels, _ = self._decode(content, max_px, False)
        assert pixels is not None, "every image has grey levels"
        return pixels

    def values(self, content: bytes, max_px: int) -> StoredValues | None:
        """As `dicom.decode_values`; None of what is no DICOM.

        Raises:
            ImageError: As `decode`.
            RuntimeError: As there.
        """
        steps, said = self._decode(content, max_px, True)
        if steps is None:
            return None
        window = said["window"] and tuple(said["window"])
        return StoredValues(steps, said["low"], said["step"], window, said["is_inverted"])

    def _decode(
        self, content: bytes, max_px: int, stored: bool
    ) -> tuple[np.ndarray | None, dict[str, Any]]:
        """Pixels and what is said of them."""
        with self._lock:
            process = self._started()
            self._deadline = time.monotonic() + self.wall_s
            try:
                return _ask(process, content, (max_px, self.cpu_s, stored))
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
        env = {**os.environ, **_KEPT_MEMORY, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env,
        )  # fmt: skip
        assert process.stdout is not None
        if process.stdout.read(len(READY)) != READY:
            process.kill()
            process.wait()
            raise RuntimeError(
                f"the process that decodes compressed images cannot be started: "
                f"{sys.executable} ended with {process.returncode}; see `mmclip doctor`"
            )
        for pipe in (process.stdin, process.stdout):
            _widen(pipe)
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


def _widen(pipe: IO[bytes] | None) -> None:
    if pipe is not None and fcntl is not None and sys.platform == "linux":
        with suppress(OSError):  # where this user has too many such pipes: it is only slower
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _close_pipes(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # of what the dead process had not read
                pipe.close()


def _ask(
    process: "subprocess.Popen[bytes]", content: bytes, request: tuple[int, float, bool]
) -> tuple[np.ndarray | None, dict[str, Any]]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(REQUEST.pack(len(content), *request))
    process.stdin.write(content)
    process.stdin.flush()
    n_json, n_pixels = REPLY.unpack(read_exactly(process.stdout, REPLY.size))
    said = json.loads(read_exactly(process.stdout, n_json))
    pixels = read_exactly(process.stdout, n_pixels)
    if "reason" in said:
        raise ImageError(Reason(said["reason"]), said["detail"])
    if "shape" not in said:
        return None, said
    return np.frombuffer(pixels, said["dtype"]).reshape(said["shape"]), said


def read_exactly(pipe: IO[Any], n: int) -> bytes:
    """The next bytes of a pipe.

    Raises:
        EOFError: When it ends before.
    """
    found = pipe.read(n)
    if len(found) < n:
        raise EOFError
    return found


_WORKER = DecodeWorker()
atexit.register(_WORKER.close)


def decode_apart(content: bytes, max_px: int) -> np.ndarray:
    """As `dicom.decode_dicom`, in the process that this one keeps for it."""
    return _WORKER.decode(content, max_px)
