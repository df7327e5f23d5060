"""Small image files, made where a test needs them."""

import io
import struct
import zlib

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

NAME, NUMBER = "Doe^Jane^Secret", "MRN-0815-4711"
"""What stands for a patient in a made DICOM file, and must be found nowhere else."""


def ramp(height: int = 24, width: int = 32) -> np.ndarray:
    """uint8 [h, w]: dark at the top left, bright at the bottom right, no two corners equal."""
    return np.add.outer(np.arange(height) * 2, np.arange(width) * 6).astype(np.uint8)


def blank(value: int, bright: int, n_bright: int) -> np.ndarray:
    """uint8 [100, 100] of one value, with some other pixels at its start."""
    image = np.full((100, 100), value, np.uint8)
    image.flat[:n_bright] = bright
    return image


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    """A raster file's bytes."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def dicom(pixels: np.ndarray, **tags) -> bytes:
    """A DICOM file's bytes, with a patient in its header.

    Args:
        pixels: uint8, uint16 or int16 [h, w], or uint8 [h, w, 3].
        tags: Further attributes by keyword, or others for those set here; None removes one.
    """
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    bits = pixels.dtype.itemsize * 8
    values = {
        "PatientName": NAME,
        "PatientID": NUMBER,
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 3 if pixels.ndim == 3 else 1,
        "PhotometricInterpretation": "RGB" if pixels.ndim == 3 else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
        **({"PlanarConfiguration": 0} if pixels.ndim == 3 else {}),
        **tags,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(data, keyword, value)
    if "PixelData" in data:
        data["PixelData"].VR = "OW"
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def huge_png(side_px: int) -> bytes:
    """A whole, valid PNG of one bit a pixel, all black."""
    packer = zlib.compressobj(1)
    row = b"\0" * (1 + side_px // 8)
    packed = b"".join(packer.compress(row * 1000) for _ in range(side_px // 1000)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )
