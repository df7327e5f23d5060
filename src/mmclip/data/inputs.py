"""Images in whatever form people have them, to one uint8 grey image, air dark.

A file, a Pillow image and an array of the same pixels give the same image: each takes the way that
`mmclip data build` takes a file, so what is scored here equals what is scored in a data folder.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeGuard, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydicom import Dataset
from torch import Tensor

from mmclip.data.dicom import written
from mmclip.data.images import (
    decode_image,
    decode_rgb,
    grey_of,
    read_bytes,
    refuse_blank,
    rgb_of,
)
from mmclip.data.pixels import MAX_PX, ImageError, check_size, stretch
from mmclip.data.sample import Reason


@runtime_checkable
class Readable(Protocol):
    """A file opened by mode "rb", or what is read as one."""

    def read(self) -> bytes:
        """All that is left of it."""
        ...


Content = bytes | bytearray | memoryview
"""What a file holds."""

ImageInput = (
    str | os.PathLike[str] | Content | Readable | Image.Image | Dataset | np.ndarray | Tensor
)
"""One image: the path of a PNG, JPEG, TIFF, DICOM or the like, the bytes of such a file, or the
file opened by mode "rb"; a Pillow image; a data set of pydicom; or pixels.

Pixels are [h, w], [h, w, c] or [c, h, w] with c 1, 3 or 4, air dark:

    uint8                   0..255, taken as they are
    bool                    False is 0, True is 255
    other whole numbers     their own darkest and brightest value become 0 and 255, as in a file of
                            more than 8 bits, which does not say how many of them are used
    float                   0..1; other values are refused
"""

ImageInputs = ImageInput | Iterable[object]
"""One image, or several: a list or generator of `ImageInput`, or an array [n, c, h, w] or
[n, h, w, c]. What is none of these is told of by name as it is read."""

KINDS = (
    "the path of a file, its bytes, a Pillow image, a data set of pydicom, a numpy array or a "
    "torch tensor"
)

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

FLOAT_SLACK = 1e-6
"""How far a float may lie outside 0..1. [chosen: the rounding of float32]"""


def each_input(images: object) -> Iterator[object]:
    """The images of what was given, one at a time; a generator is read as it goes.

    Raises:
        TypeError: When it is neither an image nor several.
    """
    if isinstance(images, str | os.PathLike | Content | Image.Image | Dataset) or _is_file(images):
        yield images
    elif isinstance(images, Tensor):
        yield from ([images] if images.ndim < 4 else images)
    elif isinstance(images, np.ndarray):
        is_pixels = images.dtype.kind not in "OSUT" and images.ndim < 4
        yield from ([images] if is_pixels else images)
    elif isinstance(images, Iterable) and not isinstance(images, Mapping):
        yield from images
    else:
        raise TypeError(
            f"{type(images).__name__} is neither an image nor several; give {KINDS}, or a list or "
            f"generator of them"
        )


def name_of(image: object, number: int) -> str:
    """What an image is called in results and errors: its path, else its number, from 0."""
    if isinstance(image, str | os.PathLike) and str(image).strip():
        return str(image)
    return f"image {number}"


def read_input(image: object, max_px: int = MAX_PX) -> UInt8[np.ndarray, "h w"]:
    """One grey image.

    Args:
        image: An `ImageInput`.
        max_px: A larger image is refused.

    Returns:
        0..255, air dark.

    Raises:
        ImageError: When it is missing, no image, of a range or shape that is not told, or blank.
    """
    if (content := _content_of(image)) is not None:
        return decode_image(content, max_px)
    return refuse_blank(grey_of(_pillow_of(image, max_px), max_px))


def read_rgb(image: object, max_px: int = MAX_PX) -> Image.Image:
    """One image in colour, for models of others; see `images.rgb_of`.

    Args:
        image: An `ImageInput`.
        max_px: A larger image is refused.

    Raises:
        ImageError: As `read_input`.
    """
    if (content := _content_of(image)) is not None:
        return decode_rgb(content, max_px)
    return rgb_of(_pillow_of(image, max_px), max_px)


def _content_of(image: object) -> bytes | None:
    """The bytes of a file, by its path or as they are; None of what is no file."""
    if isinstance(image, str | os.PathLike):
        if isinstance(image, str) and not image.strip():
            raise ImageError(Reason.IMAGE_MISSING, "its path is empty")
        if isinstance(image, str) and _URL.match(image):
            raise ImageError(Reason.IMAGE_MISSING, "an address; nothing is fetched: download it")
        try:
            return read_bytes(Path(image))
        except ImageError:
            raise
        except ValueError as error:  # such as a null byte in a path
            raise ImageError(Reason.IMAGE_MISSING, str(error)) from None
    if isinstance(image, Dataset):
        return written(image)
    if _is_file(image):
        try:
            content: object = image.read()
        except UnicodeDecodeError:
            content = ""
        except (OSError, ValueError) as error:  # such as a closed file
            raise ImageError(Reason.IMAGE_UNREADABLE, f"reading failed: {error}") from None
    else:
        content = image
    if not isinstance(content, Content):
        if content is image:
            return None
        detail = f"a file that gives {type(content).__name__}; open it by mode 'rb'"
        raise ImageError(Reason.IMAGE_UNREADABLE, detail)
    if not content:
        rest = "nothing is left to read: rewind the file by .seek(0)"
        raise ImageError(Reason.IMAGE_EMPTY, "" if content is image else rest)
    return bytes(content)


def _is_file(image: object) -> TypeGuard[Readable]:
    """Whether it is read as a file, temporary ones among them, which hand `read` on."""
    return callable(getattr(image, "read", None))


def _pillow_of(image: object, max_px: int) -> Image.Image:
    """An input that is no file, as Pillow has it."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ImageError(Reason.IMAGE_EMPTY, f"{image.width} x {image.height} pixels")
        return image
    if isinstance(image, Tensor):
        return _of_array(_numpy_of(image), max_px, False)
    if isinstance(image, np.ma.MaskedArray) and np.ma.is_masked(image):
        detail = "an array with masked pixels; say what they are by .filled()"
        raise ImageError(Reason.IMAGE_UNREADABLE, detail)
    if isinstance(image, np.ndarray):
        return _of_array(image, max_px, True)
    raise ImageError(Reason.IMAGE_UNREADABLE, f"a {type(image).__name__}; give {KINDS}")


def _numpy_of(pixels: Tensor) -> np.ndarray:
    """A tensor as numpy has it, floats of fewer than 32 bits as float32."""
    try:
        plain = pixels.detach().cpu().resolve_conj().resolve_neg()
        is_short = plain.is_floating_point() and plain.element_size() < 4
        return (plain.float() if is_short else plain).numpy()
    except (TypeError, RuntimeError):  # no plain numbers: sparse, quantized, without data
        detail = (
            f"a tensor of {pixels.dtype}, {pixels.layout}, on {pixels.device}, which numpy cannot "
            f"hold; make it a dense one of uint8 or float32"
        )
        raise ImageError(Reason.IMAGE_UNREADABLE, detail) from None


def _of_array(pixels: np.ndarray, max_px: int, channels_last: bool) -> Image.Image:
    pixels = _with_channels_last(np.asarray(pixels), channels_last)
    if pixels.size == 0:
        raise ImageError(Reason.IMAGE_EMPTY, f"an array of shape {_shape(pixels)}")
    check_size(pixels.shape[1], pixels.shape[0], max_px)
    return Image.fromarray(np.ascontiguousarray(_to_8_bits(pixels)))


def _with_channels_last(pixels: np.ndarray, channels_last: bool) -> np.ndarray:
    """[h, w] or [h, w, c]; where both ends may be channels, numpy has them last, torch first."""
    if pixels.ndim == 2:
        return pixels
    if pixels.ndim == 3:
        ends = (-1, 0) if channels_last else (0, -1)
        for end in ends:
            if pixels.shape[end] in (1, 3, 4):
                moved = np.moveaxis(pixels, end, -1)
                return moved[..., 0] if moved.shape[-1] == 1 else moved
    raise ImageError(
        Reason.IMAGE_UNREADABLE,
        f"an array of shape {_shape(pixels)}; one image is [h, w], [h, w, c] or [c, h, w] with c "
        f"1, 3 or 4, and several are a list, or an array of four dimensions",
    )


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if kind in "ui":
        return stretch(pixels)
    if kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if np.isfinite(high - low) and not (low >= -FLOAT_SLACK and high <= 1 + FLOAT_SLACK):
            raise ImageError(
                Reason.IMAGE_UNREADABLE,
                f"float pixels from {low:g} to {high:g}; floats must lie in 0..1: scale them, or "
                f"give whole numbers",
            )
        return stretch(pixels, 0.0, 1.0)
    raise ImageError(
        Reason.IMAGE_UNREADABLE,
        f"pixels of type {pixels.dtype}; give uint8, uint16 or another whole number, or floats in "
        f"0..1",
    )


def _shape(pixels: np.ndarray) -> str:
    return f"[{', '.join(map(str, pixels.shape))}]"
