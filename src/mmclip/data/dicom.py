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
from pydicom.filewriter import dcmwrite
from pydicom.pixels.utils import get_expected_length
from pydicom.tag import BaseTag, Tag

from mmclip.data.dicom_grey import StoredValues, stored_values, to_grey
from mmclip.data.dicom_pixels import (
    NATIVE,
    NoDecoder,
    complete_header,
    name_of,
    stored_pixels,
    syntax_of_frame,
)
from mmclip.data.file_kinds import but_it_is
from mmclip.data.pixels import FAULTS, ImageError, check_file, check_size
from mmclip.data.sample import Reason

MAX_ELEMENTS = 20_000
"""Elements of the largest header that is read. [chosen: those of 176 test files of pydicom have up
to 400; a header of nothing but zeros has one every 8 bytes, and each takes 100 bytes of memory]"""

HEADER_BYTES, TRAILER_BYTES = 4 << 20, 16 << 20
"""What a deflated file may hold before and behind its pixels. [chosen: headers take 10 kB inflated,
with overlays and icons up to a megabyte]"""

_Stop = Callable[[Any, Any, int], bool]
"""Of pydicom: whether to stop reading before the element of this tag, VR and length."""

_PIXEL_DATA = 0x7FE00010
_START_BYTES = 16 << 10  # hold the meta header

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


def written(data: Dataset) -> bytes:
    """The file of a data set that a user has read, received or made; it stays as it is.

    One without a transfer syntax, as a network hands it over, is written plain: compressed pixels
    are then told by their content.

    Raises:
        ImageError: When pydicom cannot write it.
    """
    meta = data.get("file_meta") or FileMetaDataset()
    how = {} if "TransferSyntaxUID" in meta else {"implicit_vr": False, "little_endian": True}
    file = io.BytesIO()
    with silent_pydicom():
        try:
            dcmwrite(file, data, **how)
        except FAULTS as error:  # whose text may quote the header: only its kind is told
            detail = f"a data set that pydicom cannot write: {type(error).__name__}"
            raise ImageError(Reason.IMAGE_UNREADABLE, detail) from None
    content = file.getvalue()
    return content if is_dicom(content) else bytes(128) + _MAGIC + content


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
            if not data.get("PixelData"):
                is_float = "FloatPixelData" in data or "DoubleFloatPixelData" in data
                detail = "a DICOM file without pixels, or cut off before their end"
                detail = "pixels that are stored as floats" if is_float else detail
                raise ImageError(Reason.IMAGE_UNREADABLE, detail)
            complete_header(data)
            if frames > 1:
                raise ImageError(Reason.IMAGE_UNREADABLE, f"{frames} frames: a loop, not an image")
            step = f"pixels in transfer syntax {name_of(data.file_meta.TransferSyntaxUID)!r}"
            return make(data, stored_pixels(data))
        except ImageError:
            raise
        except NoDecoder:
            detail = f"{step}, which none of its decoders can read"
            raise ImageError(Reason.IMAGE_UNREADABLE, detail) from None
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
    check_file(path)
    with silent_pydicom():
        try:
            with path.open("rb") as file:
                start = file.read(_START_BYTES)
                if not start:
                    raise ImageError(Reason.IMAGE_EMPTY)
                if not is_dicom(start):
                    detail = f"no DICOM file{but_it_is(start)}"
                    raise ImageError(Reason.IMAGE_UNREADABLE, detail)
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
        except OSError as error:
            raise ImageError(Reason.IMAGE_UNREADABLE, error.strerror or "") from None
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
        syntax = syntax_of_frame(next(generate_frames(data.PixelData, number_of_frames=1)))
        if syntax is None:
            detail = "compressed pixels, and no header that names their transfer syntax"
            raise ImageError(Reason.IMAGE_UNREADABLE, detail)
        return syntax
    is_implicit, is_little = data.original_encoding
    if is_implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian


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
