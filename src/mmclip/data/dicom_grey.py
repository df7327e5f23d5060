"""From the stored values of a DICOM image to grey levels, by what its header says of them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt16
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut

from mmclip.data.pixels import ImageError, own_range, stretch
from mmclip.data.sample import Reason

MAX_STEPS = 65_535
"""The highest value of 16 bits."""


def to_grey(data: Dataset, pixels: np.ndarray) -> np.ndarray:
    """Modality LUT, then VOI LUT or window, then the photometric interpretation.

    The first window holds of those that show any value of the image. Without either, the image's
    own extremes are the range: the bits say nothing of a detector's. Padding takes no part in that,
    and is background. Numbers of a header that cannot be read count as not there.

    Source: DICOM PS3.3 C.11.2.1.2 (window functions), C.7.5.1.1.2 (padding) and PS3.4 N.2 (order of
    the steps).
    """
    kind = data.get("PhotometricInterpretation")
    full = 2.0 ** int(data.BitsStored) - 1
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, data)
        full = float(np.iinfo(pixels.dtype).max)
    if pixels.ndim == 3:  # RGB-stored grey, or colour
        return np.asarray(Image.fromarray(stretch(pixels, 0.0, full)).convert("L"))
    is_padding = None if kind == "PALETTE COLOR" else _padding(data, pixels)
    values = _modality_values(data, pixels)
    image = _windowed(data, values, is_padding)
    image = 255 - image if _is_inverted(data) else image
    if is_padding is not None:
        image = np.where(is_padding, np.uint8(0), image)
    return image


@dataclass(frozen=True)
class StoredValues:
    """The values of a grey image before any window, as a viewer needs them.

    Attributes:
        steps: The value of a pixel is `low + step * steps`; of padding the darkest.
        low: The lowest value, in the unit that the modality LUT gives.
        step: Between two values; 1 where they are whole numbers of 16 bits.
        window: Centre and width that the header names first of those that show any value; None
            without one, as then `own_range` is the window and values stop at its ends, and beside a
            VOI LUT, which is no window.
        is_inverted: Whether low values are bright.
    """

    steps: UInt16[np.ndarray, "h w"]
    low: float
    step: float
    window: tuple[float, float] | None
    is_inverted: bool


def stored_values(data: Dataset, pixels: np.ndarray) -> StoredValues | None:
    """The values of an image after the modality LUT; None in colour, and of 8 bits or fewer."""
    kind = data.get("PhotometricInterpretation")
    if pixels.ndim == 3 or kind == "PALETTE COLOR" or int(data.BitsStored) <= 8:
        return None
    is_inverted = _is_inverted(data)
    is_padding = _padding(data, pixels)
    values = _modality_values(data, pixels)
    shown = values if is_padding is None else values[~is_padding]
    if not shown.size or not np.isfinite(values).all():
        return None
    low, high = float(shown.min()), float(shown.max())
    has_lut = _lut_item(data, "VOILUTSequence") is not None
    window = None if has_lut else _window(data, low, high)
    if window is None and not has_lut:
        low, high = own_range(shown)
        values, shown = np.clip(values, low, high), np.clip(shown, low, high)
    is_whole = values.dtype.kind in "ui" or bool((shown == np.rint(shown)).all())
    step = 1.0 if is_whole and high - low <= MAX_STEPS else max(high - low, 1e-6) / MAX_STEPS
    steps = np.clip(np.rint((values - low) / step), 0, MAX_STEPS).astype(np.uint16)
    if is_padding is not None:
        steps[is_padding] = steps.max() if is_inverted else 0
    return StoredValues(steps, low, step, window, is_inverted)


def _is_inverted(data: Dataset) -> bool:
    """Whether low values are bright. One image may say it twice: it is inverted once.

    Source: DICOM PS3.3 C.8.11.3.1.2 (INVERSE is for MONOCHROME1); a few files say INVERSE beside
    MONOCHROME2, and mean it.
    """
    return data.get("PhotometricInterpretation") == "MONOCHROME1" or (
        str(data.get("PresentationLUTShape") or "").strip() == "INVERSE"
    )


def _windowed(data: Dataset, values: np.ndarray, is_padding: np.ndarray | None) -> np.ndarray:
    """Values after the modality LUT, by VOI LUT, window or their own range, to 0..255."""
    if (item := _lut_item(data, "VOILUTSequence")) is not None:
        table, first, bits = _lut(data, item, values)
        index = np.clip(values.astype(np.int64) - first, 0, len(table) - 1)
        return stretch(table[index], *_range_of(table, bits))
    shown = values if is_padding is None else values[~is_padding]
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
    window = _window(data, low, high)
    if window is None:
        return stretch(values, *(own_range(shown) if shown.size else (low, high)))
    center, width = window
    function = data.get("VOILUTFunction")
    if function == "SIGMOID":
        return stretch(1 / (1 + np.exp(-4 * (values - center) / width)), 0.0, 1.0)
    if function == "LINEAR_EXACT":
        return stretch(values, center - width / 2, center + width / 2)
    return stretch(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


def _window(data: Dataset, low: float, high: float) -> tuple[float, float] | None:
    """Centre and width of the first window that shows any of the values from low to high.

    None without one, or with one that has no width. A width below 1 is one of the functions
    LINEAR_EXACT and SIGMOID, for values with decimals.
    """
    is_linear = data.get("VOILUTFunction") not in ("LINEAR_EXACT", "SIGMOID")
    centers, widths = _numbers(data, "WindowCenter"), _numbers(data, "WindowWidth")
    for center, width in zip(centers, widths, strict=False):
        if center is None or width is None or width <= 0 or (is_linear and width < 1):
            continue
        if center - width / 2 < high and center + width / 2 > low:
            return center, width
    return None


def _modality_values(data: Dataset, pixels: np.ndarray) -> np.ndarray:
    """Values after the modality LUT, or after slope and intercept: empty ones are 1 and 0.

    A slope of 0, which would make all values one, is taken for 1.
    """
    if (item := _lut_item(data, "ModalityLUTSequence")) is not None:
        table, first, _ = _lut(data, item, pixels)
        return table[np.clip(pixels.astype(np.int64) - first, 0, len(table) - 1)]
    slope, intercept = _first(data, "RescaleSlope"), _first(data, "RescaleIntercept")
    if slope is None and intercept is None:
        return pixels
    return pixels * np.float64(slope or 1) + (intercept or 0.0)


def _padding(data: Dataset, pixels: np.ndarray) -> np.ndarray | None:
    """Where stored values are padding; None where the header names none, or there is none.

    A value is read in the type of the pixels, as signed ones are often written as unsigned.
    """
    value = _first(data, "PixelPaddingValue")
    if value is None:
        return None
    limit = _first(data, "PixelPaddingRangeLimit")
    ends = [_as_stored(int(v), pixels.dtype) for v in (value, value if limit is None else limit)]
    is_padding = (pixels >= min(ends)) & (pixels <= max(ends))
    return is_padding if is_padding.any() else None


def _as_stored(value: int, dtype: np.dtype) -> int:
    """A value modulo the range of an integer type: 63536 is -2000 of int16."""
    limits = np.iinfo(dtype)
    span = int(limits.max) - int(limits.min) + 1
    return (value - int(limits.min)) % span + int(limits.min)


def _lut_item(data: Dataset, keyword: str) -> Dataset | None:
    """The first LUT of a sequence; None where there is none, or one without a table."""
    items = data.get(keyword)
    item = items[0] if items else None
    has_table = item is not None and bool(item.get("LUTDescriptor")) and bool(item.get("LUTData"))
    return item if has_table else None


def _lut(data: Dataset, item: Dataset, values: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Of a LUT for these values: entries, the value that the first one stands for, and its bits."""
    n, first, bits = (int(v) for v in item.LUTDescriptor)
    n = n or 1 << 16  # the standard's way to say 65,536
    entries = item.LUTData
    if isinstance(entries, bytes):
        order = "<" if data.original_encoding[1] is not False else ">"
        is_packed = bits <= 8 and len(entries) < 2 * n
        kind = np.dtype(np.uint8 if is_packed else f"{order}u2")
        entries = np.frombuffer(entries, kind, len(entries) // kind.itemsize)
    table = np.atleast_1d(np.asarray(entries)).astype(np.int64)[:n]
    is_signed = int(data.get("PixelRepresentation") or 0) or values.min() < 0
    first = first - (1 << 16) if is_signed and first > 0x7FFF else first
    if len(table) < n and values.max() >= first + len(table):
        detail = f"a LUT with {len(table):,} of {n:,} entries, and values beyond them"
        raise ImageError(Reason.IMAGE_UNREADABLE, detail)
    return table, first, bits


def _range_of(table: np.ndarray, bits: int) -> tuple[float, float]:
    """The output range of a VOI LUT: of its bits, or its own where it never uses the highest.

    Headers that say 16 bits above entries of 12 are common.
    """
    if int(table.max()) >= 1 << max(0, bits - 1):
        return 0.0, 2.0**bits - 1
    return float(table.min()), float(table.max())


def _first(data: Dataset, keyword: str) -> float | None:
    """The first number of an attribute; None where it is not there, or empty."""
    return next(iter(_numbers(data, keyword)), None)


def _numbers(data: Dataset, keyword: str) -> list[float | None]:
    """The numbers of an attribute, also with a decimal comma; None for what is none."""
    try:
        value = data.get(keyword)
    except ValueError:  # no number, as its VR says that it is: as it stands in the file
        raw = data.get_item(keyword)
        value = raw.value if raw is not None else None
        value = value.decode("ascii", "replace").split("\\") if isinstance(value, bytes) else None
    if value is None:
        return []
    several = value if isinstance(value, MultiValue | list) else [value]
    return [_number(str(one)) for one in several]


def _number(text: str) -> float | None:
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    return number if np.isfinite(number) else None
