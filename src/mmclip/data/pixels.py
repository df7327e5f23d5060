"""What every decoder of images shares: its errors, the limit of size, and the step to 8 bits."""

import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.errors import BytesLengthException, InvalidDicomError

from mmclip.data.sample import Reason

MAX_PX = 100_000_000
"""Pixels of the largest image that is read. [chosen: detectors have up to 20 million]"""

FAULTS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    OSError,
    EOFError,
    SyntaxError,
    RuntimeError,  # with NotImplementedError and RecursionError
    struct.error,
    zlib.error,
    InvalidDicomError,
    BytesLengthException,
    Image.DecompressionBombError,
)
"""What pydicom and Pillow raise on files that break their standards."""


class ImageError(ValueError):
    """A file gives no image; `reason` says why in a word of the manifest."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail = reason, detail


def check_file(path: Path) -> None:
    """Refuses what cannot be opened, or must not be: reading a pipe would wait for ever.

    Raises:
        ImageError: When there is no such file, or it is a folder or a device.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(Reason.IMAGE_MISSING) from None
    except OSError as error:
        raise ImageError(Reason.IMAGE_UNREADABLE, error.strerror or "") from None
    if not stat.S_ISREG(mode):
        what = (
            "a folder; give the files in it"
            if stat.S_ISDIR(mode)
            else "a pipe or device, not a file"
        )
        raise ImageError(Reason.IMAGE_UNREADABLE, what)


def check_size(width: int, height: int, max_px: int) -> None:
    """Refuses an image of more than max_px pixels.

    Raises:
        ImageError: When it is larger.
    """
    if width * height > max_px:
        raise ImageError(Reason.IMAGE_TOO_LARGE, f"{width} x {height}, at most {max_px:,} pixels")


OUTLIER_SHARE, OUTLIER_GAP = 0.01, 1 / 3
"""What is no part of an image's own range: up to this share of its pixels, above or below all
others by this part of the whole range or more. [chosen: the share as of `images.refuse_blank`; with
such a gap, all others have two thirds of the grey levels or fewer]"""


def own_range(values: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest value of an image, without a few that are far from all others.

    A dead pixel, or a marker burnt in with the highest value of 16 bits, would leave few grey
    levels for the patient. Where there is no such gap, the range is that of all values.

    Source: ours; quantiles, as others use, clip every image, and lose what is brightest in it.
    """
    low, high = float(values.min()), float(values.max())
    n_few = int(OUTLIER_SHARE * values.size)
    while True:
        gap = OUTLIER_GAP * (high - low)
        above, below = values > high - gap, values < low + gap
        if 0 < np.count_nonzero(above) <= n_few:
            last = float(values[~above].max())
            if float(values[above].min()) - last >= gap:
                high = last
                continue
        if 0 < np.count_nonzero(below) <= n_few:
            first = float(values[~below].min())
            if first - float(values[below].max()) >= gap:
                low = first
                continue
        return low, high


def stretch(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Maps low..high (by default `own_range`) to 0..255 uint8; what lies outside is clipped.

    Raises:
        ImageError: When a value or a limit is not finite.
    """
    if low is None or high is None:
        low, high = own_range(values)
    if not (np.isfinite(high - low) and np.isfinite(values).all()):
        raise ImageError(Reason.IMAGE_UNREADABLE, "pixel values that are not finite")
    scaled = (values.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
