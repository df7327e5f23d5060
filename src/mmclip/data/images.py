"""Image files of any kind a chest X-ray comes in, to one uint8 grey image, air dark.

An image that cannot be read whole is an error with a reason, never an image with a hole in it; but
a JPEG that is damaged in its middle decodes, as the format has no checksum. No message holds
anything of a DICOM header but technical facts: names and dates stay where they are.
"""

import io
import logging
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import UInt8
from PIL import Image, ImageOps, TiffImagePlugin
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.pixels.utils import get_expected_length

from mmclip.data.sample import Reason

MAX_PX = 100_000_000
"""Pixels of the largest image that is read. [chosen: detectors have up to 20 million]"""

BLANK_RANGE = 3
"""An image whose 1 % and 99 % quantiles differ by less is blank, in grey levels of 255. [chosen:
the darkest of 3,620 real images has 40]"""

_DICOM_MAGIC = b"DICM"

_RASTER_FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "PPM", "TGA", "WEBP")
"""Pillow's names. No other: EPS, for one, would hand the file to an interpreter."""

_FAULTS = (
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


_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""Pillow's modes of grey with more than 8 bits."""


class ImageError(ValueError):
    """A file gives no image; `reason` says why in a word of the manifest."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail = reason, detail


def read_image(path: Path, max_px: int = MAX_PX) -> UInt8[np.ndarray, "h w"]:
    """One grey image from a PNG, JPEG, other raster or DICOM file; the kind is told by content.

    Args:
        path: The file.
        max_px: A larger image is refused from its header, before any pixel is decoded.

    Returns:
        0..255, air dark.

    Raises:
        ImageError: When the file is missing, empty, no image, truncated, too large or blank.
    """
    return decode_image(read_bytes(path), max_px)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ImageError: When there is no such file, it cannot be read, or it is empty.
    """
    try:
        # Asked first: reading a pipe would wait for ever.
        is_file = stat.S_ISREG(path.stat().st_mode)
        content = path.read_bytes() if is_file else b""
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(Reason.IMAGE_MISSING) from None
    except OSError as error:
        raise ImageError(Reason.IMAGE_UNREADABLE, error.strerror or "") from None
    if not is_file:
        raise ImageError(Reason.IMAGE_UNREADABLE, "a folder or device, not a file")
    if not content:
        raise ImageError(Reason.IMAGE_EMPTY)
    return content


def decode_image(content: bytes, max_px: int = MAX_PX) -> UInt8[np.ndarray, "h w"]:
    """As `read_image`, from the bytes of a file."""
    is_dicom = content[128:132] == _DICOM_MAGIC
    image = _decode_dicom(content, max_px) if is_dicom else _decode_raster(content, max_px)
    darker = np.cumsum(Image.fromarray(image).histogram())  # 50 times as fast as np.quantile
    low, high = np.searchsorted(darker, [0.01 * image.size, 0.99 * image.size])
    if high - low < BLANK_RANGE:
        raise ImageError(Reason.IMAGE_BLANK, f"grey levels {low} to {high} of 255")
    return image


def _check_size(width: int, height: int, max_px: int) -> None:
    if width * height > max_px:
        raise ImageError(Reason.IMAGE_TOO_LARGE, f"{width} x {height}, at most {max_px:,} pixels")


def _decode_raster(content: bytes, max_px: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on sizes (our limit stands) and on metadata
        try:
            image = Image.open(io.BytesIO(content), formats=_RASTER_FORMATS)
        except Image.DecompressionBombError:
            raise ImageError(Reason.IMAGE_TOO_LARGE, f"at most {max_px:,} pixels") from None
        except _FAULTS:
            raise ImageError(Reason.IMAGE_UNREADABLE, "not PNG, JPEG, DICOM or the like") from None
        with image:
            _check_size(*image.size, max_px)
            try:
                frames = getattr(image, "n_frames", 1)
                image.load()
                upright = ImageOps.exif_transpose(image)
            except _FAULTS as error:
                detail = str(error).split("(")[0].strip()
                is_cut = isinstance(error, EOFError) or "truncated" in detail
                reason = Reason.IMAGE_TRUNCATED if is_cut else Reason.IMAGE_UNREADABLE
                raise ImageError(reason, detail) from None
            if frames > 1:
                raise ImageError(
                    Reason.IMAGE_UNREADABLE, "several frames: an animation, not an image"
                )
            pixels = _to_grey(upright)
            return 255 - pixels if _is_white_at_zero(image) else pixels


def _is_white_at_zero(image: Image.Image) -> bool:
    """True for TIFF's MINISWHITE where Pillow leaves the values as they are: above 8 bits."""
    return (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.mode in _DEEP_MODES
        and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    )


def _to_grey(image: Image.Image) -> np.ndarray:
    """Any mode to uint8: 8 bits as they are, more bits by their own range, colour by luminance."""
    if image.mode in ("L", "RGB", "CMYK", "YCbCr"):
        return np.asarray(image.convert("L"))
    if image.mode in _DEEP_MODES:
        # PadChest keeps 12 to 16 bits in 16-bit files without saying which: the image's own
        # darkest and brightest pixels are the only range that is sure.
        return stretch(np.asarray(image))
    if image.mode in ("1", "P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "HSV", "LAB"):
        has_alpha = image.mode in ("PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info
        if not has_alpha:
            return np.asarray(image.convert("RGB").convert("L"))
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return np.asarray(Image.alpha_composite(black, image.convert("RGBA")).convert("L"))
    raise ImageError(Reason.IMAGE_UNREADABLE, f"pixel mode {image.mode}")


def stretch(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Maps low..high (by default the extremes) to 0..255 uint8; what lies outside is clipped.

    Raises:
        ImageError: When a value or a limit is not finite.
    """
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    if not (np.isfinite(high - low) and np.isfinite(values).all()):
        raise ImageError(Reason.IMAGE_UNREADABLE, "pixel values that are not finite")
    scaled = (values.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


@contextmanager
def silent_pydicom() -> Iterator[None]:
    """Keeps pydicom from warning and logging: both quote values of the header."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _decode_dicom(content: bytes, max_px: int) -> np.ndarray:
    step = "header"
    with silent_pydicom():
        try:
            data = pydicom.dcmread(io.BytesIO(content))
            rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
            frames = int(data.get("NumberOfFrames") or 1)
            _check_size(columns, rows, max_px)
            if "PixelData" not in data or not rows or not columns:
                detail = "a DICOM file without pixels, or cut off before their end"
                raise ImageError(Reason.IMAGE_UNREADABLE, detail)
            if frames > 1:
                raise ImageError(Reason.IMAGE_UNREADABLE, f"{frames} frames: a loop, not an image")
            syntax = data.file_meta.get("TransferSyntaxUID")
            n_bytes, n_found = get_expected_length(data), len(data.PixelData)
            if not (syntax and syntax.is_compressed) and n_found < n_bytes:
                detail = f"{n_found:,} of {n_bytes:,} pixel bytes"
                raise ImageError(Reason.IMAGE_TRUNCATED, detail)
            step = f"pixels in transfer syntax {syntax.name if syntax else 'unknown'!r}"
            return _dicom_to_grey(data)
        except ImageError:
            raise
        except _FAULTS as error:  # whose text may quote the header: only its kind is told
            detail = f"{step}: {type(error).__name__}"
            raise ImageError(Reason.IMAGE_UNREADABLE, detail) from None


def _dicom_to_grey(data: pydicom.Dataset) -> np.ndarray:
    """Modality LUT, then VOI LUT or the first window, then the photometric interpretation.

    Without either, the image's own extremes are the range: the bits say nothing of a detector's.

    Source: DICOM PS3.3 C.11.2.1.2 (window functions) and PS3.4 N.2 (order of the steps).
    """
    pixels, full = data.pixel_array, 2.0 ** int(data.BitsStored) - 1
    if data.get("PhotometricInterpretation") == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, data)
        full = float(np.iinfo(pixels.dtype).max)
    if pixels.ndim == 3:  # RGB-stored grey, or colour
        return np.asarray(Image.fromarray(stretch(pixels, 0.0, full)).convert("L"))
    values = np.asarray(apply_modality_lut(pixels, data))
    center, width = _first(data.get("WindowCenter")), _first(data.get("WindowWidth"))
    if data.get("VOILUTSequence"):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        image = stretch(apply_voi_lut(values, data, index=0), 0.0, 2.0**bits - 1)
    elif center is None or width is None or width < 1:
        image = stretch(values)
    elif data.get("VOILUTFunction", "LINEAR") == "SIGMOID":
        image = stretch(1 / (1 + np.exp(-4 * (values - center) / width)), 0.0, 1.0)
    elif data.get("VOILUTFunction") == "LINEAR_EXACT":
        image = stretch(values, center - width / 2, center + width / 2)
    else:
        image = stretch(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)
    return 255 - image if data.get("PhotometricInterpretation") == "MONOCHROME1" else image


def _first(value: object) -> float | None:
    """The first of one or several windows, or None where the tag is absent or empty."""
    if value is None or value == "":
        return None
    # pyright: ignore[reportArgumentType]
    return float(value[0] if isinstance(value, MultiValue) else value)


def resize_image(pixels: UInt8[np.ndarray, "h w"], size_px: int) -> UInt8[np.ndarray, "s s"]:
    """The image in a square of size_px, both sides scaled on their own, bilinear with antialias.

    Source: what ViTImageProcessor does, so that an exported folder needs no other preprocessing.
    """
    if pixels.shape == (size_px, size_px):
        return pixels
    image = Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BILINEAR)
    return np.asarray(image)
