"""Image files of any kind a chest X-ray comes in, to one uint8 grey image, air dark.

An image that cannot be read whole is an error with a reason, never an image with a hole in it; but
a JPEG that is damaged in its middle decodes, as the format has no checksum. No message holds
anything of a DICOM header but technical facts: names and dates stay where they are.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, TiffImagePlugin

from mmclip.config import ResizeMode
from mmclip.data.decode_worker import decode_apart
from mmclip.data.dicom import decode_dicom, is_dicom, is_native
from mmclip.data.file_kinds import but_it_is
from mmclip.data.pixels import FAULTS, MAX_PX, ImageError, check_file, check_size, stretch
from mmclip.data.sample import Reason
from mmclip.squares import square_spans

BLANK_RANGE = 3
"""An image whose 1 % and 99 % quantiles differ by less is blank, in grey levels of 255. [chosen:
the darkest of 3,620 real images has 40]"""

_RASTER_FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "PPM", "TGA", "WEBP")
"""Pillow's names. No other: EPS, for one, would hand the file to an interpreter."""

_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""Pillow's modes of grey with more than 8 bits."""


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
    check_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(Reason.IMAGE_UNREADABLE, error.strerror or "") from None
    if not content:
        raise ImageError(Reason.IMAGE_EMPTY)
    return content


def decode_image(content: bytes, max_px: int = MAX_PX) -> UInt8[np.ndarray, "h w"]:
    """As `read_image`, from the bytes of a file."""
    if not is_dicom(content):
        image = decode_raster(content, max_px)
    elif is_native(content):
        image = decode_dicom(content, max_px)
    else:
        image = decode_apart(content, max_px)
    return refuse_blank(image)


def refuse_blank(image: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """The image itself.

    Raises:
        ImageError: When its pixels are (nearly) equal; see BLANK_RANGE.
    """
    darker = np.cumsum(Image.fromarray(image).histogram())  # 50 times as fast as np.quantile
    low, high = np.searchsorted(darker, [0.01 * image.size, 0.99 * image.size])
    if high - low < BLANK_RANGE:
        raise ImageError(Reason.IMAGE_BLANK, f"grey levels {low} to {high} of 255")
    return image


def decode_rgb(content: bytes, max_px: int = MAX_PX) -> Image.Image:
    """An image in colour, as `rgb_of`, from the bytes of a file; DICOM as `read_image` reads it."""
    if is_dicom(content):
        return Image.fromarray(decode_image(content, max_px)).convert("RGB")
    with _opened(content, max_px) as image:
        return rgb_of(image, max_px)


def decode_raster(content: bytes, max_px: int) -> UInt8[np.ndarray, "h w"]:
    """As `read_image`, from the bytes of a file that is no DICOM; a blank image is one, too."""
    with _opened(content, max_px) as image:
        return grey_of(image, max_px)


@contextmanager
def _opened(content: bytes, max_px: int) -> Iterator[Image.Image]:
    """The bytes of a raster file as Pillow opens it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on sizes (our limit stands) and on metadata
        try:
            image = Image.open(io.BytesIO(content), formats=_RASTER_FORMATS)
        except Image.DecompressionBombError:
            raise ImageError(Reason.IMAGE_TOO_LARGE, f"at most {max_px:,} pixels") from None
        except FAULTS:
            detail = f"not PNG, JPEG, DICOM or the like{but_it_is(content)}"
            raise ImageError(Reason.IMAGE_UNREADABLE, detail) from None
        with image:
            yield image


def grey_of(image: Image.Image, max_px: int = MAX_PX) -> UInt8[np.ndarray, "h w"]:
    """The grey pixels of an image that Pillow has opened or made, upright, air dark.

    Args:
        image: Of any mode: 8 bits as they are, more bits by their own range, colour by luminance.
        max_px: A larger one is refused before its pixels are decoded.

    Raises:
        ImageError: When it is truncated, too large, an animation, or of a mode without grey.
    """
    pixels = _to_grey(_upright(image, max_px))
    return 255 - pixels if _is_white_at_zero(image) else pixels


def rgb_of(image: Image.Image, max_px: int = MAX_PX) -> Image.Image:
    """The image in colour, upright: what transformers' `load_image` makes of it.

    Pillow would clip grey of more than 8 bits, so that is scaled by its own range as in `grey_of`.

    Raises:
        ImageError: As `grey_of`, and when the image is blank.
    """
    upright = _upright(image, max_px)
    if image.mode in _DEEP_MODES:
        grey = _to_grey(upright)
        upright = Image.fromarray(255 - grey if _is_white_at_zero(image) else grey)
    try:
        colour = upright.convert("RGB")
    except FAULTS:
        raise ImageError(Reason.IMAGE_UNREADABLE, f"pixel mode {image.mode}") from None
    refuse_blank(np.asarray(colour.convert("L")))
    return colour


def _upright(image: Image.Image, max_px: int) -> Image.Image:
    """The image with its pixels decoded, turned as its metadata says."""
    check_size(*image.size, max_px)
    try:
        frames = getattr(image, "n_frames", 1)
        image.load()
        upright = ImageOps.exif_transpose(image)
        # Pillow converts grey with its alpha multiplied in to nothing else.
        upright = upright.convert("LA") if upright.mode == "La" else upright
    except FAULTS as error:
        detail = str(error).split("(")[0].strip()
        is_cut = isinstance(error, EOFError) or "truncated" in detail
        reason = Reason.IMAGE_TRUNCATED if is_cut else Reason.IMAGE_UNREADABLE
        raise ImageError(reason, detail) from None
    if frames > 1:
        raise ImageError(Reason.IMAGE_UNREADABLE, "several frames: an animation, not an image")
    return upright


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


def resize_image(
    pixels: UInt8[np.ndarray, "h w"], size_px: int, how: ResizeMode = "squash"
) -> UInt8[np.ndarray, "s s"]:
    """The image in a square of size_px, bilinear with antialias.

    Args:
        pixels: 0..255, air dark.
        size_px: Side of the square.
        how: "squash" scales both sides on their own; "pad" scales the longer one to size_px and
            centres the image on background (0); "crop" takes the middle square.

    Source: "squash" is what ViTImageProcessor does, so that an exported folder needs no other
    preprocessing; "pad" and "crop" are usual in other code.
    """
    if pixels.shape == (size_px, size_px):
        return pixels
    height, width = pixels.shape
    rows, columns = square_spans(height, width, size_px, how)
    pixels = pixels[
        rows.start : rows.start + rows.length, columns.start : columns.start + columns.length
    ]
    image = scaled(pixels, rows.size, columns.size)
    if image.shape == (size_px, size_px):
        return image
    square = np.zeros((size_px, size_px), np.uint8)
    square[rows.first : rows.first + rows.size, columns.first : columns.first + columns.size] = (
        image
    )
    return square


def unsquared(
    square: UInt8[np.ndarray, "s s"], height: int, width: int, how: ResizeMode = "squash"
) -> UInt8[np.ndarray, "height width"]:
    """What `resize_image` made, in the shape of the image that it was made of.

    The image's shape, not its detail; what was cropped is background (0).

    Args:
        square: As `resize_image` gives it.
        height: Of the image, px; so is the width.
        how: As the square was made.
    """
    if square.shape == (height, width):
        return square
    rows, columns = square_spans(height, width, len(square), how)
    part = square[rows.first : rows.first + rows.size, columns.first : columns.first + columns.size]
    image = np.zeros((height, width), np.uint8)
    image[rows.start : rows.start + rows.length, columns.start : columns.start + columns.length] = (
        scaled(part, rows.length, columns.length)
    )
    return image


def scaled(
    pixels: UInt8[np.ndarray, "_ _"], height: int, width: int
) -> UInt8[np.ndarray, "height width"]:
    """An image of another size, bilinear with antialias."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
