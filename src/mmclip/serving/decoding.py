"""Uploaded files to images, each in a process that is killed when it takes too much."""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from mmclip.data.decode_worker import DecodeWorker
from mmclip.data.dicom import is_dicom
from mmclip.data.dicom_grey import StoredValues
from mmclip.data.images import refuse_blank
from mmclip.data.pixels import MAX_PX, ImageError
from mmclip.data.sample import Reason

DECODE_CPU_S, DECODE_WALL_S = 20.0, 45.0
"""Of one image. [chosen: 20 million pixels of JPEG 2000 take 5 s; less than a request may take]"""

WORKERS = 3
"""Processes. [chosen: two sound images are still read beside a file that keeps a codec busy]"""

_T = TypeVar("_T")


class UploadError(ValueError):
    """An uploaded file gives no image; the message names it, and says why."""


@dataclass(frozen=True)
class Upload:
    """A file as it came, by the name that the browser gave it."""

    name: str
    content: bytes

    @property
    def is_dicom(self) -> bool:
        """By its content, whatever its name ends in."""
        return is_dicom(self.content)


class DecodePool:
    """Decodes uploads. A process is started when a file first needs it, and kept."""

    def __init__(self, workers: int = WORKERS) -> None:
        self._all = [DecodeWorker(DECODE_CPU_S, DECODE_WALL_S) for _ in range(workers)]
        self._free: queue.LifoQueue[DecodeWorker] = queue.LifoQueue()
        for worker in self._all:
            self._free.put(worker)

    def image(self, upload: Upload) -> UInt8[np.ndarray, "h w"]:
        """The grey image in a file, 0..255, air dark: the one that the commands read from it.

        Raises:
            UploadError: When there is none.
        """
        return self._with_worker(
            upload, lambda worker: refuse_blank(worker.decode(upload.content, MAX_PX))
        )

    def values(self, upload: Upload) -> StoredValues | None:
        """The values of a DICOM file before any window; None where there are no more than 8 bits.

        Raises:
            UploadError: When there is no image.
        """
        return self._with_worker(upload, lambda worker: worker.values(upload.content, MAX_PX))

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._all:
            worker.close()

    def _with_worker(self, upload: Upload, use: Callable[[DecodeWorker], _T]) -> _T:
        worker = self._free.get()
        try:
            if not upload.content:
                raise ImageError(Reason.IMAGE_EMPTY)
            return use(worker)
        except ImageError as error:
            raise UploadError(f"{upload.name}: {error}; give another image") from None
        finally:
            self._free.put(worker)
