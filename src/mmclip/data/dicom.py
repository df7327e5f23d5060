"""One grey image from the bytes of a DICOM file, whatever its transfer syntax.

Files of native pixels are decoded where they are asked for; all others in the process of
`decode_worker`, which can be killed. No message holds anything of a header but technical facts.
"""

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydicom import config, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.filereader import read_dataset, read_partial
from pydicom.pixels import get_decoder
from pydicom.pixels.utils import get_expected_length
from pydicom.tag import BaseTag, Tag

from mmclip.data.dicom_grey import StoredValues, stored_values, to_grey
from mmclip.data.pixels import FAULTS, ImageError, check_size
from mmclip.data.sample import Reason

MAX_ELEMENTS = 20_000
"""Elements of the largest header that is read. [chosen: those of 176 test files of pydicom have up
to 400; a header of nothing but zeros has one every 8 bytes, and each takes 100 bytes of memory]"""

HEADER_BYTES, TRAILER_BYTES = 4 << 20, 16 << 20
"""What a deflated file may hold before and behind its pixels. [chosen: headers take 10 kB inflated,
with overlays and icons up to a megabyte]"""

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

_Stop = Callable[[Any, Any, int], bool]
"""Of pydicom: whether to stop reading before the element of this tag, VR and length."""

_PIXEL_DATA = 0x7FE00010
_START_BYTES = 16 << 10  # hold the meta header

_END_MARKER = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000 alike
_LENIENT = {"gdcm", "pylibjpeg", "pyjpegls"}
"""Plug-ins that return an image for a frame that is cut off, or look for its end for seconds."""

_MAGIC = b"DICM"
_LONG_VRS = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT")
_SHORT_VRS = (b"UL", b"UI", b"CS", b"SH", b"DA", b"TM", b"LO", b"IS", b"PN", b"US", b"DT", b"AE")


def is_dicom(content: bytes) -> bool:
    """Whether a file is DICOM, by its preamble, or by its first element where it has none."""
    return content[128:132] == _MAGIC or _is_bare(content)


def _is_bare(content: bytes) -> bool:
    """Whether a file begins with an element of group 2 or 8: a data set without its preamble."""
    if content[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08") or len(content) < 12:
        return False
    is_little = content[:2] != b"\x00\x08"
    element, length = struct.unpack("<HI" if is_little else ">HI", content[2:8])
    has_vr = content[4:6] in _SHORT_VRS + _LONG_VRS
    return element < 0x2000 and (has_vr or (is_little and length <= 256))


def transfer_syntax_of(content: bytes) -> tuple[uid.UID | None, int]:
    """The transfer syntax that a meta header names, if any, and where the data set starts."""
    at = 132 if content[128:132] == _MAGIC else 0
    found = None
    while content[at : at + 2] == b"\x02\x00" and len(content) >= at + 12:
        element, vr, short = struct.unpack_from("<H2sH", content, at + 2)
        is_long = vr in _LONG_VRS
        length = struct.unpack_from("<I", content, at + 8)[0] if is_long else short
        start = at + (12 if is_long else 8)
        if element == 0x10:
            said = content[start : start + length].rstrip(b"\0 ").decode("ascii", "replace")
            found = uid.UID(said, validation_mode=config.IGNORE)  # which would warn, and quote it
        at = start + length
    return found, at


def is_native(content: bytes) -> bool:
    """Whether a file says that its pixels are not compressed: then no codec is run on them.

    One that begins with elements of group 0, as messages of a network do and files do not, counts
    as none: pydicom reads them without a bound.
    """
    syntax, start = transfer_syntax_of(content)
    return syntax in NATIVE and content[start : start + 2] != b"\0\0"


@contextmanager
def silent_pydicom() -> Iterator[None]:
    """Keeps pydicom from warning and logging: both quote values of the header."""
    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def decode_dicom(content: bytes, max_px: int) -> np.ndarray:
    """One grey image from a DICOM file, decoded in this process.

    Args:
        content: The file.
        max_px: A larger image is refused from its header.

    Returns:
        uint8 [h, w], 0..255, air dark.

    Raises:
        ImageError: When it holds no image, or one that cannot be read.
    """
    return _read_pixels(content, max_px, to_grey)


def decode_values(content: bytes, max_px: int) -> StoredValues | None:
    """The values of a grey DICOM image before any window, decoded in this process.

    Args:
        content: The file.
        max_px: A larger image is refused from its header.

    Returns:
        None of an image in colour, and of one that has no more than 8 bits.

    Raises:
        ImageError: As `decode_dicom`.
    """
    return _read_pixels(content, max_px, stored_values)


_T = TypeVar("_T")


def _read_pixels(content: bytes, max_px: int, make: Callable[[Dataset, np.ndarray], _T]) -> _T:
    """What is made of the header and the stored values of a file; see `decode_dicom`."""
    step = "header"
    with silent_pydicom():
        try:
            data = _parsed(content, max_px)
            rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
            frames = int(data.get("NumberOfFrames") or 1)
            check_size(columns, rows, max_px)
            if "PixelData" not in data or not rows or not columns:
                detail = "a DICOM file without pixels, or cut off before their end"
                raise ImageError(Reason.IMAGE_UNREADABLE, detail)
            if frames > 1:
                raise ImageError(Reason.IMAGE_UNREADABLE, f"{frames} frames: a loop, not an image")
            syntax = data.file_meta.TransferSyntaxUID
            n_bytes, n_found = get_expected_length(data), len(data.PixelData)
            if syntax in NATIVE and n_found < n_bytes:
                detail = f"{n_found:,} of {n_bytes:,} pixel bytes"
                raise ImageError(Reason.IMAGE_TRUNCATED, detail)
            step = f"pixels in transfer syntax {_name_of(syntax)!r}"
            return make(data, _pixels(data))
        except ImageError:
            raise
        except FAULTS as error:  # whose text may quote the header: only its kind is told
            detail = f"{step}: {type(error).__name__}"
            raise ImageError(Reason.IMAGE_UNREADABLE, detail) from None


def read_header(path: Path, keywords: Sequence[str]) -> Dataset:
    """Some attributes of a DICOM file, without its pixels.

    Args:
        path: The file.
        keywords: Of the attributes; no other is looked at.

    Raises:
        ImageError: When it is no DICOM file, or its header cannot be read.
    """
    tags: list[BaseTag | int] = [Tag(keyword) for keyword in keywords]
    stop = _until_pixels(_bounded())
    with silent_pydicom():
        try:
            with path.open("rb") as file:
                start = file.read(_START_BYTES)
                if not is_dicom(start):
                    raise ImageError(Reason.IMAGE_UNREADABLE, "no DICOM file")
                syntax, at = transfer_syntax_of(start)
                if start[at : at + 2] == b"\0\0":
                    raise ImageError(Reason.IMAGE_UNREADABLE, "header: elements of group 0")
                if syntax == uid.DeflatedExplicitVRLittleEndian:
                    packed = start[at:] + file.read(HEADER_BYTES)
                    head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, HEADER_BYTES)
                    return read_dataset(
                        io.BytesIO(head), False, True, stop_when=stop, specific_tags=tags
                    )
                file.seek(0)
                return read_partial(file, stop_when=stop, force=True, specific_tags=tags)
        except ImageError:
            raise
        except FAULTS as error:  # whose text may quote the header: only its kind is told
            detail = f"header: {type(error).__name__}"
            raise ImageError(Reason.IMAGE_UNREADABLE, detail) from None


# -- from bytes to a data set --


def _until_pixels(look: _Stop) -> _Stop:
    return lambda tag, vr, length: look(tag, vr, length) or tag == _PIXEL_DATA


def _bounded() -> _Stop:
    """Ends the reading of a header that has too many elements, for `read_partial`."""
    n_seen = 0

    def look(tag: Any, vr: Any, length: int) -> bool:
        nonlocal n_seen
        n_seen += 1
        if n_seen > MAX_ELEMENTS:
            detail = f"header: more than {MAX_ELEMENTS:,} elements"
            raise ImageError(Reason.IMAGE_UNREADABLE, detail)
        return False

    return look


def _parsed(content: bytes, max_px: int) -> Dataset:
    """The data set of a file, with the transfer syntax of its pixels in its meta header."""
    syntax, start = transfer_syntax_of(content)
    if content[start : start + 16] == bytes(16):
        raise ImageError(Reason.IMAGE_UNREADABLE, "header: zeros in the place of elements")
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        inflated = io.BytesIO(_inflated(content[start:], max_px))
        data = read_dataset(inflated, False, True, stop_when=_bounded())
        syntax = uid.ExplicitVRLittleEndian
    else:
        data = read_partial(io.BytesIO(content), stop_when=_bounded(), force=True)
    meta = getattr(data, "file_meta", None)
    if meta is None or "TransferSyntaxUID" not in meta or syntax != meta.TransferSyntaxUID:
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = syntax or _syntax_by_content(data)
    return data


def _syntax_by_content(data: Dataset) -> uid.UID:
    """The transfer syntax of a data set that has no meta header to name it."""
    if "PixelData" in data and data["PixelData"].is_undefined_length:
        return _syntax_of_frame(next(generate_frames(data.PixelData, number_of_frames=1)))
    is_implicit, is_little = data.original_encoding
    if is_implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian


def _syntax_of_frame(frame: bytes) -> uid.UID:
    """The transfer syntax of a compressed frame, by its first marker segments."""
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
    detail = "compressed pixels, and no header that names their transfer syntax"
    raise ImageError(Reason.IMAGE_UNREADABLE, detail)


def _inflated(packed: bytes, max_px: int) -> bytes:
    """A deflated data set, inflated no further than the image that its header announces.

    Raises:
        ImageError: When it is longer, or too large an image.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    head = inflater.decompress(packed, HEADER_BYTES)
    if inflater.eof:
        return head
    data = read_dataset(io.BytesIO(head), False, True, stop_when=_until_pixels(_bounded()))
    rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
    check_size(columns, rows, max_px)
    n_bytes = get_expected_length(data) if rows and columns else 0
    limit = n_bytes + TRAILER_BYTES
    rest = inflater.decompress(inflater.unconsumed_tail, limit)
    if inflater.unconsumed_tail and not inflater.eof:  # a byte of padding may follow the end
        detail = f"deflated, and longer than the {n_bytes:,} pixel bytes that its header announces"
        raise ImageError(Reason.IMAGE_UNREADABLE, detail)
    return head + rest


# -- from a data set to pixels --


def _pixels(data: Dataset) -> np.ndarray:
    """The stored values, as the first plug-in gives them that can.

    Raises:
        ImageError: When no decoder of the transfer syntax is installed, or the frame is cut off.
        RuntimeError: When none can decode it.
    """
    syntax = data.file_meta.TransferSyntaxUID
    if syntax in NATIVE:
        return data.pixel_array
    plugins = [name for name in DECODERS.get(syntax, ()) if name in _installed(syntax)]
    if syntax == uid.JPEGExtended12Bit and int(data.BitsStored) > 8:
        plugins = ["gdcm"] if "gdcm" in _installed(syntax) else []
    if not plugins:
        said = (
            f"no installed decoder reads transfer syntax {_name_of(syntax)!r}; see `mmclip doctor`"
        )
        raise ImageError(Reason.IMAGE_UNREADABLE, said)
    is_whole = _END_MARKER in next(generate_frames(data.PixelData, number_of_frames=1))[-16:]
    if not is_whole and _LENIENT.issuperset(plugins):
        said = f"pixels in transfer syntax {_name_of(syntax)!r} without an end marker: RuntimeError"
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
    raise RuntimeError("no plug-in can decode the frame")


def _name_of(syntax: uid.UID) -> str:
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
