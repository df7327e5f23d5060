"""The process that `decode_worker` starts: it decodes file after file until there are no more."""

import json
import os
from typing import IO, Any

import numpy as np

from mmclip.data.decode_worker import MEMORY_BYTES, READY, REPLY, REQUEST, read_exactly
from mmclip.data.dicom import decode_dicom, decode_values, is_dicom
from mmclip.data.images import decode_raster
from mmclip.data.pixels import ImageError
from mmclip.data.sample import Reason


def serve(requests: IO[Any]) -> None:
    """Answers until there are no more requests; what codecs print goes nowhere."""
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    _limit_memory()
    replies.write(READY)
    replies.flush()
    while header := requests.read(REQUEST.size):
        n_bytes, max_px, cpu_s, stored = REQUEST.unpack(header)
        content = read_exactly(requests, n_bytes)
        _limit_cpu(cpu_s)
        pixels = b""
        try:
            image, said = _answer(content, max_px, stored)
            if image is not None:
                said |= {"shape": image.shape, "dtype": image.dtype.str}
                pixels = np.ascontiguousarray(image).tobytes()
        except ImageError as error:
            said = {"reason": error.reason, "detail": error.detail}
        except MemoryError:
            detail = f"decoding takes more than {MEMORY_BYTES >> 30} GiB of memory"
            said = {"reason": Reason.IMAGE_UNREADABLE, "detail": detail}
        text = json.dumps(said).encode()
        replies.write(REPLY.pack(len(text), len(pixels)) + text)
        replies.write(pixels)
        replies.flush()


def _answer(content: bytes, max_px: int, stored: bool) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Pixels of a file, and what is said beside them."""
    if not stored:
        decode = decode_dicom if is_dicom(content) else decode_raster
        return decode(content, max_px), {}
    found = decode_values(content, max_px) if is_dicom(content) else None
    if found is None:
        return None, {}
    said = {"low": found.low, "step": found.step, "window": found.window}
    return found.steps, {**said, "is_inverted": found.is_inverted}


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
