"""DICOM of every kind: decoders, windows, padding, and files that would stop a build."""

import hashlib
import io
import logging
import os
import resource
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.data.data_manager import DATA_ROOT
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.tag import Tag

from mmclip.data import decode_worker
from mmclip.data.decode_worker import DecodeWorker
from mmclip.data.dicom import decode_dicom, decode_values, is_dicom, transfer_syntax_of
from mmclip.data.dicom_pixels import DECODERS, _extended_12_bit, decoders_installed
from mmclip.data.images import ImageError, decode_image, read_image, stretch
from mmclip.data.ingest.build import build_data
from mmclip.data.sample import Reason, Sample
from tests.made_files import dicom, encoded, ramp

DICOM_FILES = Path(DATA_ROOT) / "test_files"
REAL = Path(__file__).parents[2] / "shared" / "data" / "cxr2" / "dicom"


def refusal(content: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(content)
    return caught.value


def image_or_reason(path: Path) -> np.ndarray | ImageError:
    try:
        return read_image(path)
    except ImageError as error:
        return error


def levels(*values: int, dtype=np.uint16) -> np.ndarray:
    return np.tile(np.array(values, dtype), (4, 1))


def saved(data: Dataset) -> bytes:
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def in_syntax(pixels: np.ndarray, syntax: uid.UID, **tags) -> bytes:
    """A DICOM file whose pixels one of pydicom's encoders has compressed without loss."""
    data = pydicom.dcmread(io.BytesIO(dicom(pixels, **tags)))
    data.compress(syntax, generate_instance_uid=False)
    return saved(data)


def jpeg_lossless(pixels: np.ndarray, tmp_path: Path) -> bytes:
    """As `in_syntax`, by GDCM, which alone writes JPEG Lossless."""
    import gdcm

    plain, packed = tmp_path / "plain.dcm", tmp_path / "packed.dcm"
    plain.write_bytes(dicom(pixels))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(packed))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return packed.read_bytes()


def deep(rng_seed: int = 0) -> np.ndarray:
    """uint16 [40, 48] with 0 and 65535 in it, and noise in every bit."""
    noise = np.random.default_rng(rng_seed).integers(0, 65536, (40, 48), dtype=np.uint16)
    noise[0, :2] = 0, 65535
    return noise


# Transfer syntaxes.


def test_the_default_install_decodes_every_compressed_transfer_syntax():
    assert all(decoders_installed().values()), decoders_installed()


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_was_compressed_without_loss_is_the_image_of_the_plain_file(syntax, dtype):
    pixels = deep().astype(dtype)
    image = decode_image(in_syntax(pixels, syntax))
    np.testing.assert_array_equal(image, decode_image(dicom(pixels)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_jpeg_lossless_is_the_image_of_the_plain_file(dtype, tmp_path):
    pixels = deep().astype(dtype)
    content = jpeg_lossless(pixels, tmp_path)
    assert transfer_syntax_of(content)[0] == uid.JPEGLosslessSV1
    np.testing.assert_array_equal(decode_image(content), decode_image(dicom(pixels)))


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_jpeg_ls_lossless.dcm", "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm",
        "JPEG2000.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_jls_lossy_line.dcm",
        "693_J2KI.dcm",
    ],
)  # fmt: skip
def test_all_decoders_of_a_transfer_syntax_give_the_same_pixels(name):
    data = pydicom.dcmread(DICOM_FILES / name)
    known = DECODERS[data.file_meta.TransferSyntaxUID]
    assert len(known) > 1
    found = []
    for plugin in known:
        data.pixel_array_options(decoding_plugin=plugin)
        found.append(data.pixel_array.astype(int))
    lossy = 1 if name == "693_J2KI.dcm" else 0  # the 9-7 wavelet is of floats
    assert all(abs(found[0] - pixels).max() <= lossy for pixels in found[1:])


def test_jpeg_extended_of_12_bits_is_that_of_a_second_decoder():
    # Goldens: hashlib.sha256(imagecodecs.jpeg_decode(frame).astype("<u2").tobytes()) with
    # imagecodecs 2026.3.6 (libjpeg-turbo), of the one frame of each file; both hold one image.
    golden = "d30242775a414c01d616447854ebe3f2b20259822894bcd6891f879bcdcbf313"
    for name in ("JPEG-lossy.dcm", "JPGExtended.dcm"):
        pixels = _extended_12_bit(pydicom.dcmread(DICOM_FILES / name))
        assert hashlib.sha256(pixels.astype("<u2").tobytes()).hexdigest() == golden
        np.testing.assert_array_equal(read_image(DICOM_FILES / name), stretch(pixels))


def test_colour_in_jpeg_lossless_is_that_of_the_plain_file():
    lossless, plain = (
        read_image(DICOM_FILES / name) for name in ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_gdcm_KY.dcm")
    )
    np.testing.assert_array_equal(lossless, plain)


@pytest.mark.parametrize(
    "name",
    [
        "JPEG-lossy.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPEGLSNearLossless_16.dcm",
        "SC_rgb_jpeg_gdcm.dcm", "MR_small_jp2klossless.dcm", "GDCMJ2K_TextGBR.dcm",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kept_ratio", [0.3, 0.9, 0.99])
def test_a_cut_frame_of_any_syntax_is_no_image(name, kept_ratio):
    data = pydicom.dcmread(DICOM_FILES / name)
    frame = next(generate_frames(data.PixelData, number_of_frames=1))
    data.PixelData = encapsulate([frame[: int(len(frame) * kept_ratio)]])
    assert refusal(saved(data)).reason == Reason.IMAGE_UNREADABLE


def test_a_transfer_syntax_without_a_decoder_is_named_and_its_text_is_not_quoted():
    data = pydicom.dcmread(io.BytesIO(in_syntax(ramp(), uid.RLELossless)))
    for syntax, said in ((uid.MPEG2MPML, "MPEG2"), (uid.UID("1.2.3.4711"), "unknown")):
        data.file_meta.TransferSyntaxUID = syntax
        error = refusal(saved(data))
        assert said in error.detail and "4711" not in error.detail


def test_a_frame_that_no_decoder_reads_and_pixels_of_floats_are_named():
    data = pydicom.dcmread(io.BytesIO(dicom(ramp().astype(np.uint16))))
    data.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit  # of 8 bits, under a header of 16
    data.PixelData = encapsulate([encoded(ramp(), "JPEG")])
    data["PixelData"].is_undefined_length = True
    assert refusal(saved(data)).detail.endswith("which none of its decoders can read")
    floats = pydicom.dcmread(io.BytesIO(dicom(ramp())))
    del floats.PixelData
    floats.FloatPixelData = ramp().astype("<f4").tobytes()
    assert refusal(saved(floats)).detail == "pixels that are stored as floats"


def test_49_of_the_79_test_files_of_pydicom_are_read_as_the_documents_say():
    names = sorted(path for path in DICOM_FILES.rglob("*.dcm"))
    found = [image_or_reason(path) for path in names]
    assert all(isinstance(one, np.ndarray) or one.detail for one in found)
    n_read = sum(isinstance(one, np.ndarray) for one in found)
    assert len(names) == 79
    assert n_read == 49
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text("utf-8")
    assert f"{n_read} of the {len(names)}" in text


# No preamble, no meta header.


def bare(content: bytes, keep_meta: bool = False) -> bytes:
    return content[132:] if keep_meta else content[transfer_syntax_of(content)[1] :]


@pytest.mark.parametrize("keep_meta", [False, True])
@pytest.mark.parametrize(
    "name", ["MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "CT_small.dcm"]
)
def test_a_file_without_preamble_or_meta_header_is_read(name, keep_meta):
    content = (DICOM_FILES / name).read_bytes()
    image = decode_image(bare(content, keep_meta))
    np.testing.assert_array_equal(image, decode_image(content))


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless])
def test_compressed_pixels_without_a_meta_header_are_told_by_their_markers(syntax):
    content = in_syntax(deep(), syntax, SOPClassUID="1.2.840.10008.5.1.4.1.1.1")
    np.testing.assert_array_equal(decode_image(bare(content)), decode_image(content))


@pytest.mark.parametrize("said", ["Doe, Jane 1970", "1.2.840.10008.1.2.x\xff", "1..2", ""])
def test_nothing_is_warned_or_logged_of_a_value_in_the_place_of_a_transfer_syntax(said, caplog):
    content = dicom(ramp())
    known = b"1.2.840.10008.1.2.1\0"
    assert content.count(known) == 1
    changed = content.replace(known, said.encode("latin-1").ljust(len(known), b"\0"))
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        with suppress(ImageError):
            decode_image(changed)
    assert not caplog.text


def test_a_meta_header_without_a_transfer_syntax_is_no_hindrance():
    data = pydicom.dcmread(io.BytesIO(dicom(ramp())))
    del data.file_meta.TransferSyntaxUID
    file = io.BytesIO()
    data.save_as(file, implicit_vr=False, little_endian=True, enforce_file_format=False)
    np.testing.assert_array_equal(decode_image(file.getvalue()), decode_image(dicom(ramp())))


def test_no_raster_file_is_taken_for_dicom():
    kinds = ["PNG", "JPEG", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "WEBP", "TGA"]
    assert not any(is_dicom(encoded(ramp(), kind)) for kind in kinds)
    assert not is_dicom(b"") and not is_dicom(b"\x08\x00")


def test_real_radiographs_are_read_with_and_without_their_preamble():
    if not REAL.is_dir():
        pytest.skip("needs the four DICOM files of shared/data/cxr2/dicom")
    images = {path.name: read_image(path) for path in REAL.iterdir()}
    assert len(images) == 4
    np.testing.assert_array_equal(images["CR-MONO1-10-chest"], images["gdcm-CR-MONO1-10-chest.dcm"])
    difference = abs(images["RG1_JLSN"].astype(int) - images["RG1_J2KI.dcm"])
    assert difference.mean() < 1  # one radiograph, by two lossy codecs


# VOI LUT.


def with_lut(pixels: np.ndarray, table: np.ndarray, bits: int, first: int = 0, **tags) -> bytes:
    lut = Dataset()
    lut.LUTDescriptor = [len(table) % 65536, first, bits]
    lut.LUTData = table.astype(np.uint16).tobytes()
    return dicom(pixels, VOILUTSequence=[lut], **tags)


@pytest.mark.parametrize(("n", "top", "bits"), [(4096, 4095, 16), (1024, 1023, 12), (256, 255, 16)])
def test_a_voi_lut_that_overstates_its_bits_is_scaled_by_its_own_range(n, top, bits):
    pixels = levels(0, n // 3, n // 2, n - 1)
    table = np.linspace(0, top, n).round()
    expected = np.rint(table[[0, n // 3, n // 2, n - 1]] * 255 / top)
    assert decode_image(with_lut(pixels, table, bits))[0].tolist() == expected.tolist()
    inverted = with_lut(pixels, table, bits, PhotometricInterpretation="MONOCHROME1")
    assert decode_image(inverted)[0].tolist() == (255 - expected).tolist()


def test_a_lut_may_lack_entries_that_no_value_of_the_image_asks_for():
    table = np.linspace(0, 65_535, 4096).round()
    whole = decode_image(with_lut(levels(0, 1000, 2000, 2999), table, 16))
    for said in (4096, 65_536):  # and the file holds 3,000
        data = pydicom.dcmread(io.BytesIO(with_lut(levels(0, 1000, 2000, 2999), table[:3000], 16)))
        data.VOILUTSequence[0].LUTDescriptor = [said % 65_536, 0, 16]
        np.testing.assert_array_equal(decode_image(saved(data)), whole)
    data = pydicom.dcmread(io.BytesIO(with_lut(levels(0, 1000, 2000, 3000), table[:3000], 16)))
    data.VOILUTSequence[0].LUTDescriptor = [4096, 0, 16]
    assert (
        refusal(saved(data)).detail == "a LUT with 3,000 of 4,096 entries, and values beyond them"
    )


def test_a_lut_without_a_table_is_none():
    plain = decode_image(dicom(levels(0, 1, 2, 3)))
    for change in ({"LUTData": b""}, {"LUTDescriptor": None}):
        data = pydicom.dcmread(io.BytesIO(with_lut(levels(0, 1, 2, 3), np.arange(4)[::-1], 16)))
        for keyword, value in change.items():
            setattr(data.VOILUTSequence[0], keyword, value)
        np.testing.assert_array_equal(decode_image(saved(data)), plain)


def test_a_voi_lut_of_true_16_bits_keeps_their_range():
    table = np.array([0, 20_000, 40_000, 60_000])
    image = decode_image(with_lut(levels(0, 1, 2, 3), table, 16))
    assert image[0].tolist() == [0, 78, 156, 233]  # of 65,535, not of 60,000


def test_a_voi_lut_may_have_65536_entries_and_start_below_zero():
    table = np.arange(65536)
    image = decode_image(with_lut(levels(0, 16384, 32768, 65535), table, 16))
    assert image[0].tolist() == [0, 64, 128, 255]
    signed = levels(-2, -1, 0, 1, dtype=np.int16)
    table = np.array([0, 85, 170, 255])
    image = decode_image(with_lut(signed, table, 8, first=-2))
    assert image[0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_modality_lut_may_have_any_bits_and_start_below_zero(bits):
    lut = Dataset()
    lut.add_new("LUTDescriptor", "US", [4, 65536 - 2, bits])
    lut.add_new("LUTData", "US", [0, 50, 100, 200])
    signed = levels(-2, -1, 0, 1, dtype=np.int16)
    assert decode_image(dicom(signed, ModalityLUTSequence=[lut]))[0].tolist() == [0, 64, 128, 255]


def test_a_voi_lut_starts_below_zero_where_the_intercept_brings_the_values():
    table = np.array([0, 85, 170, 255])
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1000}
    content = with_lut(levels(998, 999, 1000, 1001), table, 8, first=0, **tags)
    data = pydicom.dcmread(io.BytesIO(content))
    data.VOILUTSequence[0].add_new("LUTDescriptor", "US", [4, 65536 - 2, 8])
    assert decode_image(saved(data))[0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("slope", ["", None, "1"])
def test_an_empty_slope_is_one_and_the_intercept_still_counts(slope):
    window = {"WindowCenter": "0.5", "WindowWidth": "101"}  # 0 to 100 after an intercept of -50
    content = dicom(levels(0, 100, 125, 200), RescaleSlope=slope, RescaleIntercept="-50", **window)
    assert decode_image(content)[0].tolist() == [0, 255, 255, 255]
    assert decode_image(dicom(levels(0, 50, 100, 200), RescaleSlope=slope))[0].tolist()[::3] == [
        0,
        255,
    ]


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID", "LINEAR"])
def test_a_window_of_values_with_decimals_may_be_narrower_than_one(function):
    pixels = levels(0, 1000, 1500, 2000)  # 0, 0.5, 0.75 and 1 after the slope
    tags = {"RescaleSlope": "0.0005", "RescaleIntercept": "0", "VOILUTFunction": function}
    image = decode_image(dicom(pixels, WindowCenter="0.5", WindowWidth="0.5", **tags))[0]
    sigmoid = [round(255 / (1 + np.exp(-4 * (v - 0.5) / 0.5))) for v in (0, 0.5, 0.75, 1)]
    expected = {
        "LINEAR_EXACT": [0, 128, 255, 255],
        "SIGMOID": sigmoid,
        "LINEAR": [0, 128, 191, 255],  # which has no such window: the image's own range
    }
    assert image.tolist() == expected[function]


# Padding.


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_background_and_takes_no_part_in_the_range(kind):
    pixels = levels(63536, 1000, 1100, 1200)
    image = decode_image(dicom(pixels, PixelPaddingValue=63536, PhotometricInterpretation=kind))
    shown = [0, 128, 255] if kind == "MONOCHROME2" else [255, 127, 0]
    assert image[0].tolist() == [0, *shown]


def test_signed_padding_is_told_whatever_its_sign_is_written_as():
    pixels = levels(-2000, 100, 200, 300, dtype=np.int16)
    for said in (-2000, 63536):
        data = pydicom.dcmread(io.BytesIO(dicom(pixels)))
        data.add_new("PixelPaddingValue", "SS" if said < 0 else "US", said)
        assert decode_image(saved(data))[0].tolist() == [0, 0, 128, 255]


def test_a_range_of_padding_is_background_in_both_orders():
    pixels = levels(0, 10, 500, 600)
    for value, limit in ((0, 10), (10, 0)):
        content = dicom(pixels, PixelPaddingValue=value, PixelPaddingRangeLimit=limit)
        assert decode_image(content)[0].tolist() == [0, 0, 0, 255]


def test_padding_is_told_before_rescaling_and_stays_dark_in_a_window():
    pixels = levels(0, 100, 200, 4095)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "PixelPaddingValue": 4095}
    assert decode_image(dicom(pixels, **tags))[0].tolist() == [0, 128, 255, 0]
    window = {"WindowCenter": -799.5, "WindowWidth": 401}
    assert decode_image(dicom(pixels, **tags, **window))[0].tolist() == [0, 128, 255, 0]


def test_an_image_of_nothing_but_padding_is_blank():
    error = refusal(dicom(levels(5, 5, 5, 5), PixelPaddingValue=5))
    assert error.reason == Reason.IMAGE_BLANK


# Files that would stop a build.

LOOP = bytes.fromhex("0000000c6a5020200d0a870a") + bytes(200)


def in_dicom(frame: bytes, syntax: uid.UID) -> bytes:
    data = pydicom.dcmread(io.BytesIO(dicom(ramp())))
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([frame])
    data["PixelData"].is_undefined_length = True
    return saved(data)


@pytest.fixture
def impatient(monkeypatch) -> DecodeWorker:
    worker = DecodeWorker(cpu_s=1.0)
    monkeypatch.setattr(decode_worker, "_WORKER", worker)
    yield worker
    worker.close()


def test_a_decoder_that_never_ends_is_killed_and_the_build_goes_on(tmp_path, impatient):
    root = tmp_path / "root"
    root.mkdir()
    (root / "loop.dcm").write_bytes(in_dicom(LOOP, uid.JPEG2000))
    for i in range(3):
        (root / f"{i}.dcm").write_bytes(in_syntax(deep(i), uid.JPEG2000Lossless))
    records = [
        Sample(image_id=name, study_id=name, patient_id=name, source="made", image=name)
        for name in ("0.dcm", "loop.dcm", "1.dcm", "2.dcm")
    ]
    meta = build_data(records, root, tmp_path / "out", image_size=16)
    assert meta["n_samples"] == 3 and meta["n_excluded"] == 1
    said = (tmp_path / "out" / "excluded.jsonl").read_text()
    assert "decoding takes more than 1 s of CPU time" in said and "loop.dcm" in said


def test_a_decoder_that_waits_is_killed_by_the_clock_on_the_wall():
    worker = DecodeWorker(cpu_s=60.0, wall_s=0.5)
    began = time.monotonic()
    with pytest.raises(ImageError, match=r"more than 0\.5 s"):
        worker.decode(in_dicom(LOOP, uid.JPEG2000), 1_000_000)
    assert time.monotonic() - began < 60
    sound = in_syntax(deep(), uid.JPEG2000Lossless)
    np.testing.assert_array_equal(worker.decode(sound, 1_000_000), stretch(deep()))
    worker.close()


def test_a_process_that_was_killed_from_outside_is_replaced():
    worker = DecodeWorker()
    sound = in_syntax(deep(), uid.JPEG2000Lossless)
    worker.decode(sound, 1_000_000)
    assert worker._process is not None
    worker._process.kill()
    worker._process.wait()
    np.testing.assert_array_equal(worker.decode(sound, 1_000_000), stretch(deep()))
    worker.close()


def test_a_decoder_that_asks_for_too_much_memory_loses_its_own_image_alone(monkeypatch):
    monkeypatch.setattr(
        decode_worker, "_START",
        decode_worker._START.replace(
            "; serve", "; import mmclip.data.decode_process as p; p.MEMORY_BYTES = 64 << 20; serve"
        ),
    )  # fmt: skip
    worker = DecodeWorker()
    large = np.zeros((6000, 6000), np.uint16)
    large[::2] = 4000
    with pytest.raises(ImageError, match=r"memory|ends the process"):
        worker.decode(in_syntax(large, uid.RLELossless), 100_000_000)
    small = in_syntax(deep(), uid.RLELossless)
    np.testing.assert_array_equal(worker.decode(small, 1_000_000), stretch(deep()))
    worker.close()


def test_the_process_decodes_as_this_one_does_and_says_the_same_reasons():
    for path in sorted(DICOM_FILES.glob("*.dcm")):
        if not is_dicom(
            path.read_bytes()
        ):  # of that the process makes a raster file, as a build does
            continue
        found = []
        for decode in (decode_worker.decode_apart, decode_dicom):
            try:
                found.append(decode(path.read_bytes(), 1_000_000).tobytes())
            except ImageError as error:
                found.append(str(error).encode())
        assert found[0] == found[1], path


def deflated(payload: bytes) -> bytes:
    """A file of the deflated transfer syntax, whose data set is the payload."""
    data = pydicom.dcmread(io.BytesIO(dicom(ramp())))
    data.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    content = saved(data)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return content[: transfer_syntax_of(content)[1]] + packer.compress(payload) + packer.flush()


@pytest.mark.parametrize("padding", [b"", b"\0"])
def test_a_large_deflated_file_is_read_with_its_byte_of_padding(padding: bytes):
    y, x = np.indices((1500, 1500), np.uint16)
    sound = dicom((x + y).astype(np.uint16))  # more than HEADER_BYTES
    content = deflated(sound[transfer_syntax_of(sound)[1] :]) + padding
    np.testing.assert_array_equal(decode_image(content), decode_image(sound))


def test_a_deflated_file_is_inflated_no_further_than_its_image():
    sound = dicom(ramp())
    payload = sound[transfer_syntax_of(sound)[1] :]
    np.testing.assert_array_equal(decode_image(deflated(payload)), decode_image(sound))
    worker = DecodeWorker()
    bombs = {
        "zeros": bytes(268_000_000),
        "behind the pixels": payload + bytes(300_000_000),
        "a flood of elements": b"\x08\x00\x05\x00CS\x00\x00" * 20_000_000,
    }
    for what, bomb in bombs.items():
        content = deflated(bomb)
        assert len(content) < 1_000_000
        before_s = time.process_time()
        with pytest.raises(ImageError):
            worker.decode(content, 100_000_000)
        assert worker._process is not None, what  # not killed: refused
        status = Path(f"/proc/{worker._process.pid}/status").read_text()
        peak_kb = int(status.split("VmHWM:")[1].split()[0])
        assert peak_kb < 400_000, what
        assert time.process_time() - before_s < 10
    worker.close()


def test_a_header_of_nothing_but_zeros_is_refused_at_once():
    sound = dicom(ramp())
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = sound[: transfer_syntax_of(sound)[1]] + bytes(50_000_000)
    assert "zeros" in refusal(content).detail
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 200_000


def test_the_process_ends_with_the_one_that_started_it():
    worker = DecodeWorker()
    worker.decode(in_syntax(ramp(), uid.RLELossless), 1_000_000)
    assert worker._process is not None and worker._process.stdin is not None
    os.close(os.dup(worker._process.stdin.fileno()))
    worker._process.stdin.close()  # what the system does when this process ends
    assert worker._process.wait(timeout=10) == 0


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
def test_stored_values_and_the_first_window_give_the_image_that_the_model_reads(kind):
    pixels = levels(0, 100, 200, 4095)
    tags = {"PhotometricInterpretation": kind, "RescaleSlope": 2, "RescaleIntercept": -1000}
    window = {"WindowCenter": -799.5, "WindowWidth": 401}
    content = dicom(pixels, PixelPaddingValue=4095, **tags, **window)
    worker = DecodeWorker()
    found = worker.values(content, 1_000_000)
    worker.close()
    assert found is not None and found.window == (-799.5, 401)
    assert found.is_inverted == (kind == "MONOCHROME1")
    values = found.low + found.step * found.steps
    shown = np.rint(255 * np.clip((values - (-1000)) / 400, 0, 1))
    shown = 255 - shown if found.is_inverted else shown
    np.testing.assert_array_equal(shown, decode_image(content))


def test_stored_values_of_16_bits_are_exact_and_those_of_8_bits_or_colour_are_none():
    worker = DecodeWorker()
    deep_values = deep().astype(np.uint16)
    found = worker.values(in_syntax(deep_values, uid.JPEG2000Lossless), 1_000_000)
    assert found is not None and found.step == 1 and found.window is None
    np.testing.assert_array_equal(found.low + found.steps, deep_values)
    halves = worker.values(dicom(deep_values, RescaleSlope=0.5, RescaleIntercept=0), 1_000_000)
    assert halves is not None
    np.testing.assert_allclose(
        halves.low + halves.step * halves.steps, deep_values / 2, atol=halves.step
    )
    for content in (dicom(ramp()), dicom(np.stack([ramp()] * 3, 2)), encoded(ramp())):
        assert worker.values(content, 1_000_000) is None
    with pytest.raises(ImageError, match="at most 10 pixels"):
        worker.values(dicom(deep_values), 10)
    worker.close()


def test_the_process_decodes_raster_files_too():
    worker = DecodeWorker()
    for content in (encoded(ramp()), encoded(ramp(), "TIFF"), encoded(ramp(), "JPEG")):
        np.testing.assert_array_equal(worker.decode(content, 1_000_000), decode_image(content))
    with pytest.raises(ImageError, match="not PNG"):
        worker.decode(b"no image", 1_000_000)
    worker.close()


# What headers leave out, contradict or garble.

FOUR = (0, 1365, 2730, 4095)


def rewritten(change: Callable[[Dataset], object], pixels: np.ndarray | None = None) -> bytes:
    """A file of 12 bits in 16 whose header was changed as no encoder would let it be."""
    pixels = levels(*FOUR) if pixels is None else pixels
    data = pydicom.dcmread(io.BytesIO(dicom(pixels, BitsStored=12, HighBit=11)))
    change(data)
    return saved(data)


def put(keyword: str, vr: str, value: object) -> Callable[[Dataset], object]:
    return lambda data: data.add_new(keyword, vr, value)


def raw(keyword: str, value: bytes) -> Callable[[Dataset], object]:
    """An attribute whose bytes are no value of its kind."""
    tag = Tag(keyword)
    element = RawDataElement(tag, "DS", len(value), value, 0, False, True)
    return lambda data: data.__setitem__(tag, element)


@pytest.mark.parametrize(
    "change",
    [
        *(lambda data, k=k: data.__delitem__(k) for k in (
            "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation",
            "SamplesPerPixel")),
        put("BitsStored", "US", 0),
        put("PhotometricInterpretation", "CS", "monochrome2"),
        put("PhotometricInterpretation", "CS", "MONOCHROME"),
        put("RescaleSlope", "DS", "0"), raw("RescaleSlope", b"n/a "), raw("WindowWidth", b"wide"),
        put("VOILUTSequence", "SQ", [Dataset()]), put("ModalityLUTSequence", "SQ", [Dataset()]),
        lambda data: setattr(data, "PixelData", data.PixelData + b"\0\0\0\0"),
    ],
)  # fmt: skip
def test_what_a_header_leaves_out_or_garbles_is_no_hindrance(change):
    assert decode_image(rewritten(change))[0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("keyword", ["Rows", "Columns", "BitsAllocated"])
@pytest.mark.parametrize("is_zero", [False, True])
def test_what_a_header_must_say_is_named_where_it_does_not(keyword: str, is_zero: bool):
    def change(data: Dataset) -> None:
        if is_zero:
            data[keyword].value = 0
        else:
            del data[keyword]

    said = refusal(rewritten(change))
    assert (said.reason, said.detail) == (
        Reason.IMAGE_UNREADABLE, f"the header has no {keyword}, or 0",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda data: setattr(data, "PixelData", data.PixelData * 2),
         "64 pixel bytes, and the header says 32"),
        (put("BitsAllocated", "US", 8), "32 pixel bytes, and the header says 16"),
        (put("BitsAllocated", "US", 12), "BitsAllocated is 12, and no multiple of 8"),
    ],
)  # fmt: skip
def test_pixels_that_are_others_than_the_header_says_are_refused_by_what_differs(change, detail):
    assert refusal(rewritten(change)).detail == detail


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", ["INVERSE", "IDENTITY", None])
def test_an_image_that_says_twice_that_it_is_inverted_is_inverted_once(kind, shape):
    content = dicom(levels(*FOUR), PhotometricInterpretation=kind, PresentationLUTShape=shape)
    expected = [0, 85, 170, 255]
    is_inverted = kind == "MONOCHROME1" or shape == "INVERSE"
    assert decode_image(content)[0].tolist() == expected[:: -1 if is_inverted else 1]


@pytest.mark.parametrize("syntax", [None, uid.RLELossless])
def test_values_in_the_upper_bits_of_their_words_are_moved_down(syntax):
    shifted = levels(*FOUR) << 4 | 3  # and what lies below them is no part of them
    tags = {"BitsStored": 12, "HighBit": 15}
    window = {"WindowCenter": "2048", "WindowWidth": "4096"}
    plain = dicom(shifted, **tags, **window)
    content = plain if syntax is None else in_syntax(shifted, syntax, **tags, **window)
    assert decode_image(content)[0].tolist() == [0, 85, 170, 255]
    signed = (levels(-2048, -683, 682, 2047, dtype=np.int16) << 4).astype(np.int16)
    assert decode_image(dicom(signed, **tags))[0].tolist() == [0, 85, 170, 255]


def test_a_high_bit_above_values_that_stand_in_the_lower_bits_is_wrong():
    window = {"WindowCenter": "2048", "WindowWidth": "4096"}
    content = dicom(levels(*FOUR), BitsStored=12, HighBit=15, **window)
    assert decode_image(content)[0].tolist() == [0, 85, 170, 255]


def smooth(top: int, height: int = 40, width: int = 50) -> np.ndarray:
    """int64 [h, w]: a slope and a bright round, as soft as an X-ray, from 0 to `top`."""
    y, x = np.mgrid[:height, :width]
    image = x + 2 * y + 60 * np.exp(-((x - 30) ** 2 + (y - 20) ** 2) / 60)
    return ((image - image.min()) * (top / (image.max() - image.min()))).astype(np.int64)


@pytest.mark.parametrize("syntax", [None, uid.RLELossless])
@pytest.mark.parametrize(
    ("top", "said"), [(4000, 10), (4000, 8), (65_000, 12), (1100, 10), (16_000, 12)]
)
def test_bits_above_those_that_the_header_says_are_read_where_they_go_on(syntax, top, said):
    """A wrong BitsStored would cut an X-ray into stripes."""
    pixels = smooth(top).astype(np.uint16)
    content = dicom(pixels) if syntax is None else in_syntax(pixels, syntax)
    data = pydicom.dcmread(io.BytesIO(content))
    data.BitsStored, data.HighBit = said, said - 1
    np.testing.assert_array_equal(decode_image(saved(data)), decode_image(dicom(pixels)))


def test_bits_above_those_that_the_header_says_are_read_with_their_sign():
    pixels = (smooth(8000) - 4000).astype(np.int16)
    content = dicom(pixels, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(decode_image(content), decode_image(dicom(pixels)))
    few = (smooth(4000) - 2000).astype(np.int16)  # whose sign does not go on in the upper bits
    cut = (few & 0xFFF).view(np.uint16).astype(np.int16)
    content = dicom(cut, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(decode_image(content), decode_image(dicom(few)))


@pytest.mark.parametrize("bit", [12, 13, 15])
def test_an_overlay_in_the_upper_bits_is_no_part_of_the_image(bit: int):
    pixels = smooth(4000).astype(np.uint16)
    marked = pixels.copy()
    marked[5:30:4, 10:40] |= 1 << bit
    content = dicom(marked, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(decode_image(content), decode_image(dicom(pixels)))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("low", "odd"), [(0, 65_535), (30_000, 0), (400, 60_000), (20_000, 65_535)]
)
def test_a_few_pixels_far_from_all_others_set_no_range(kind: str, low: int, odd: int):
    pixels = (smooth(3000) + low).astype(np.uint16)
    marked = pixels.copy()
    marked[2:5, 3:8] = odd  # 15 of 2,000
    plain, found = (
        decode_image(dicom(p, PhotometricInterpretation=kind)) for p in (pixels, marked)
    )
    is_odd = marked != pixels
    np.testing.assert_array_equal(found[~is_odd], plain[~is_odd])
    is_bright = (odd > low) == (kind == "MONOCHROME2")
    assert set(found[is_odd]) == {255 if is_bright else 0}
    shown = decode_values(dicom(marked, PhotometricInterpretation=kind), 10_000)
    assert shown is not None and int(shown.steps.max()) == 3000 and shown.low == low


@pytest.mark.parametrize(
    ("n_odd", "odd"), [(15, 4400), (40, 65_535)], ids=["near the others", "more than a few"]
)
def test_other_bright_pixels_belong_to_the_range(n_odd: int, odd: int):
    pixels = smooth(3000).astype(np.uint16)
    pixels.flat[900 : 900 + n_odd] = odd
    image = decode_image(dicom(pixels))
    np.testing.assert_array_equal(image, stretch(pixels, 0.0, float(odd)))


def test_a_window_holds_whatever_pixels_lie_far_from_all_others():
    pixels = smooth(3000).astype(np.uint16)
    window = {"WindowCenter": "1500.5", "WindowWidth": "3001"}
    plain = decode_image(dicom(pixels, **window))
    pixels[0, :5] = 65_535
    np.testing.assert_array_equal(decode_image(dicom(pixels, **window))[1:], plain[1:])


def test_a_slope_that_is_no_number_is_none():
    pixels = smooth(3000).astype(np.uint16)
    content = rewritten(raw("RescaleSlope", b"NaN "), pixels)
    np.testing.assert_array_equal(decode_image(content), decode_image(dicom(pixels)))


def test_numbers_of_another_kind_and_pixels_of_no_length_are_told():
    pixels = smooth(3000).astype(np.uint16)
    data = pydicom.dcmread(io.BytesIO(dicom(pixels)))
    data.add_new("BitsAllocated", "DS", "16")
    data.add_new("Rows", "DS", "40.0")
    np.testing.assert_array_equal(decode_image(saved(data)), decode_image(dicom(pixels)))
    assert "without pixels" in refusal(dicom(pixels, PixelData=b"")).detail


@pytest.mark.parametrize(
    ("centers", "widths", "expected"),
    [
        (["40", "2048"], ["80", "4096"], [6, 85, 170, 255]),  # of the first nothing is seen
        (["99999", "-5"], ["10", "2"], [0, 81, 168, 255]),  # of none: the image's own range
        (["", "1024"], ["", "2048"], [12, 170, 255, 255]),
        (["2048,5"], ["4096,0"], [6, 85, 170, 255]),
        (["1024"], ["2048", "50"], [12, 170, 255, 255]),
    ],
)
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_the_first_window_holds_that_shows_a_value(centers, widths, expected, kind):
    def change(data: Dataset) -> None:
        data.PhotometricInterpretation = kind
        raw("WindowCenter", "\\".join(centers).encode())(data)
        raw("WindowWidth", "\\".join(widths).encode())(data)

    image = decode_image(rewritten(change, levels(100, *FOUR[1:])))[0]
    assert (255 - image if kind == "MONOCHROME1" else image).tolist() == expected


def test_a_frame_of_another_codec_than_the_header_says_is_decoded_by_its_own():
    data = pydicom.dcmread(io.BytesIO(in_syntax(deep().astype(np.uint16), uid.JPEG2000Lossless)))
    for said in (uid.JPEGLSLossless, uid.JPEGLosslessSV1, uid.JPEGBaseline8Bit):
        data.file_meta.TransferSyntaxUID = said
        np.testing.assert_array_equal(decode_image(saved(data)), decode_image(dicom(deep())))


def test_compressed_pixels_under_a_header_that_says_otherwise_reach_no_codec():
    content = in_syntax(deep().astype(np.uint16), uid.JPEG2000Lossless)
    said = str(uid.JPEG2000Lossless).encode()
    other = str(uid.ExplicitVRLittleEndian).encode().ljust(len(said), b"\0")
    refused = refusal(content.replace(said, other, 1))
    assert refused.detail == "the pixels are compressed, and the header says that they are not"
