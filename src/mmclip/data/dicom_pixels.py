"""The stored values of a DICOM image: what its header leaves out, and a decoder that can.

Errors hold technical facts of the header alone.
"""

import struct

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.pixels.utils import get_expected_length
from pydicom.tag import Tag

from mmclip.data.pixels import FAULTS, ImageError
from mmclip.data.sample import Reason

NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
"""Transfer syntaxes whose pixels lie in the file as they are."""

DECODERS: dict[uid.UID, tuple[str, ...]] = {
    uid.JPEGBaseline8Bit: ("pillow",),
    uid.JPEGExtended12Bit: ("pillow",),  # of 8 bits; 12 bits are `_extended_12_bit`
    uid.JPEGLossless: ("gdcm", "pylibjpeg"),
    uid.JPEGLosslessSV1: ("gdcm", "pylibjpeg"),
    uid.JPEGLSLossless: ("pyjpegls", "gdcm"),
    uid.JPEGLSNearLossless: ("pyjpegls", "gdcm"),
    uid.JPEG2000Lossless: ("pillow", "pylibjpeg", "gdcm"),
    uid.JPEG2000: ("pillow", "pylibjpeg", "gdcm"),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
    uid.RLELossless: ("pydicom",),
}
"""The plug-ins of pydicom for each compressed transfer syntax, the strictest first: one that fills
what a cut frame lacks would mask the cut."""

_END_MARKER = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000 alike
_LENIENT = {"gdcm", "pylibjpeg", "pyjpegls"}
"""Plug-ins that return an image for a frame that is cut off, or look for its end for seconds."""


class NoDecoder(RuntimeError):
    """None of the decoders of a transfer syntax reads a frame: it is damaged, or another's."""


def complete_header(data: Dataset) -> None:
    """Adds to a header what it leaves out of its pixels and can only be one thing.

    One sample is grey, all allocated bits are stored, and values have no sign.

    Raises:
        ImageError: When it lacks what nothing else tells.
    """
    for keyword in ("Rows", "Columns", "BitsAllocated"):
        if not int(data.get(keyword) or 0):
            raise ImageError(Reason.IMAGE_UNREADABLE, f"the header has no {keyword}, or 0")
        data.add_new(Tag(keyword), "US", int(data[keyword].value))  # a decimal string in some files
    kind = str(data.get("PhotometricInterpretation") or "").strip().upper()
    is_colour = kind.startswith(("RGB", "YBR"))
    data.SamplesPerPixel = int(data.get("SamplesPerPixel") or (3 if is_colour else 1))
    if kind in ("", "MONOCHROME"):
        kind = "MONOCHROME2" if data.SamplesPerPixel == 1 else "RGB"
    data.PhotometricInterpretation = kind
    allocated, stored = data.BitsAllocated, int(data.get("BitsStored") or 0)
    if allocated > 1 and allocated % 8:
        detail = f"BitsAllocated is {allocated}, and no multiple of 8"
        raise ImageError(Reason.IMAGE_UNREADABLE, detail)
    data.BitsStored = stored if 0 < stored <= allocated else allocated
    data.PixelRepresentation = int(data.get("PixelRepresentation") or 0)


def stored_pixels(data: Dataset) -> np.ndarray:
    """The stored values of an image whose header is complete.

    Values that stand in the upper bits of their words (HighBit), as DICOM allowed before 2014, are
    moved down; where none uses the bits above BitsStored, HighBit is wrong. Bits above those that
    are stored belong to the values where the image is smoother with them: then BitsStored is wrong,
    and is put right. Else they are an overlay or the like, and left out.

    Raises:
        ImageError: When the frame is cut off, or no decoder of its transfer syntax is installed.
        NoDecoder: When none can decode it.
    """
    syntax = data.file_meta.TransferSyntaxUID
    if syntax in NATIVE:
        _check_native(data)
    allocated, stored = int(data.BitsAllocated), int(data.BitsStored)
    if syntax not in (*NATIVE, uid.RLELossless) or stored == allocated or data.SamplesPerPixel != 1:
        return _decoded(data)
    data.BitsStored = allocated
    words = _decoded(data)
    data.BitsStored = stored
    values = _lower_bits(words, stored)
    n_below = int(data.get("HighBit") or 0) + 1 - stored
    if 0 < n_below <= allocated - stored:
        high = _lower_bits(words, stored + n_below)
        if not np.array_equal(high, values):
            return high >> n_below
    if not np.array_equal(words, values) and _variation(words) < _variation(values):
        data.BitsStored = allocated
        return words
    return values


def _lower_bits(words: np.ndarray, n_bits: int) -> np.ndarray:
    """The values of the lowest bits, with their sign where the type has one."""
    n_above = words.dtype.itemsize * 8 - n_bits
    return words << n_above >> n_above


def _variation(values: np.ndarray) -> float:
    """How much neighbours in a row and in a column differ: more, where values wrap around."""
    wide = values.astype(np.float32)
    return float(np.abs(np.diff(wide, axis=0)).sum() + np.abs(np.diff(wide, axis=1)).sum())


def _check_native(data: Dataset) -> None:
    """Refuses pixels of another length than they should have, and cuts off what pads them.

    Twice as many are two frames, or have more bits than the header says: nothing tells which.
    """
    n_bytes, n_found = get_expected_length(data), len(data.PixelData)
    if data["PixelData"].is_undefined_length:
        detail = "the pixels are compressed, and the header says that they are not"
        raise ImageError(Reason.IMAGE_UNREADABLE, detail)
    if n_found < n_bytes:
        raise ImageError(Reason.IMAGE_TRUNCATED, f"{n_found:,} of {n_bytes:,} pixel bytes")
    if n_found >= 2 * n_bytes > 2:
        detail = f"{n_found:,} pixel bytes, and the header says {n_bytes:,}"
        raise ImageError(Reason.IMAGE_UNREADABLE, detail)
    data.PixelData = data.PixelData[: n_bytes + n_bytes % 2]  # an even number: words are swapped


def _decoded(data: Dataset) -> np.ndarray:
    """The pixels as the first plug-in gives them that can.

    Frames of another codec than the header says are decoded by their own, as they tell it.
    """
    syntax = data.file_meta.TransferSyntaxUID
    if syntax in NATIVE:
        return data.pixel_array
    frame = next(generate_frames(data.PixelData, number_of_frames=1))
    is_whole = _END_MARKER in frame[-16:]
    try:
        return _by_plugins(data, is_whole)
    except NoDecoder:
        other = syntax_of_frame(frame)
        if other is None or DECODERS[other] == DECODERS.get(syntax):
            raise
        data.file_meta.TransferSyntaxUID = other
        return _by_plugins(data, is_whole)


def _by_plugins(data: Dataset, is_whole: bool) -> np.ndarray:
    syntax = data.file_meta.TransferSyntaxUID
    plugins = [name for name in DECODERS.get(syntax, ()) if name in _installed(syntax)]
    if syntax == uid.JPEGExtended12Bit and int(data.BitsStored) > 8:
        plugins = ["gdcm"] if "gdcm" in _installed(syntax) else []
    if not plugins:
        said = (
            f"no installed decoder reads transfer syntax {name_of(syntax)!r}; see `mmclip doctor`"
        )
        raise ImageError(Reason.IMAGE_UNREADABLE, said)
    if not is_whole and _LENIENT.issuperset(plugins):
        said = f"pixels in transfer syntax {name_of(syntax)!r} without an end marker"
        raise ImageError(Reason.IMAGE_UNREADABLE, said)
    for name in plugins:
        if name in _LENIENT and not is_whole:
            continue
        try:
            if syntax == uid.JPEGExtended12Bit and name == "gdcm":
                return _extended_12_bit(data)
            data.pixel_array_options(decoding_plugin=name)
            return data.pixel_array
        except FAULTS:
            continue
    raise NoDecoder


def syntax_of_frame(frame: bytes) -> uid.UID | None:
    """The transfer syntax of a compressed frame by its first marker segments, where they tell."""
    if frame[:4] == b"\xff\x4f\xff\x51" or frame[4:8] == b"jP  ":
        return uid.JPEG2000
    kinds = {
        0xC0: uid.JPEGBaseline8Bit, 0xC1: uid.JPEGExtended12Bit, 0xC3: uid.JPEGLossless,
        0xF7: uid.JPEGLSNearLossless,
    }  # fmt: skip
    at = 2 if frame[:2] == b"\xff\xd8" else len(frame)
    while at + 4 <= len(frame) and frame[at] == 0xFF:
        if frame[at + 1] in kinds:
            return kinds[frame[at + 1]]
        at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None


def name_of(syntax: uid.UID) -> str:
    """Of the standard alone: a file may put anything in the place of its transfer syntax."""
    return syntax.name if syntax in uid.UID_dictionary else "unknown"


def decoders_installed() -> dict[str, tuple[str, ...]]:
    """The plug-ins that would decode each compressed transfer syntax; () where there is none."""
    return {
        syntax.name: tuple(name for name in names if name in _installed(syntax))
        for syntax, names in DECODERS.items()
    }


def _installed(syntax: uid.UID) -> tuple[str, ...]:
    return get_decoder(syntax).available_plugins if syntax in DECODERS else ()


def _extended_12_bit(data: Dataset) -> np.ndarray:
    """JPEG Extended of 12 bits, which GDCM decodes but pydicom does not ask it for.

    Equal to libjpeg-turbo's pixels in the files that there are to compare.
    """
    import gdcm

    rows, columns = int(data.Rows), int(data.Columns)
    if int(data.SamplesPerPixel) != 1 or int(data.BitsAllocated) != 16:
        raise NotImplementedError("JPEG Extended of 12 bits in colour")
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(next(generate_frames(data.PixelData, number_of_frames=1)))
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")  # of values, not of their sense
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    syntax = gdcm.TransferSyntax.GetTSType(str(uid.JPEGExtended12Bit))
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    bits = int(data.BitsStored)
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, 0))
    buffer = image.GetBuffer()
    if buffer is None:
        raise RuntimeError("GDCM cannot decode the frame")
    raw = buffer.encode("utf-8", "surrogateescape")  # its own way to hand bytes to Python
    pixels = np.frombuffer(raw, "<u2").reshape(rows, columns)
    if int(data.PixelRepresentation):
        return (pixels << (16 - bits)).view(np.int16) >> (16 - bits)
    return pixels
