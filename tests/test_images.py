import io
import os
import random
import resource
import struct
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data.data_manager import DATA_ROOT
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.multival import MultiValue
from pydicom.uid import JPEGLSLossless

from mmclip.data.images import ImageError, decode_image, read_image, resize_image, stretch
from mmclip.data.sample import Reason
from tests.made_files import NAME, NUMBER, blank, dicom, encoded, huge_png, ramp

DICOM_FILES = Path(DATA_ROOT) / "test_files"


def refusal(content: bytes, max_px: int = 1_000_000) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(content, max_px)
    return caught.value


def image_or_error(content: bytes) -> np.ndarray | ImageError:
    try:
        return decode_image(content, 1_000_000)
    except ImageError as error:
        return error


# Raster files.


def test_grey_of_8_bits_stays_as_it_is():
    np.testing.assert_array_equal(decode_image(encoded(ramp())), ramp())


def test_grey_of_16_bits_spans_its_own_range():
    deep = ramp().astype(np.uint16) * 10 + 3000  # 3000..5320
    image = decode_image(encoded(deep))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.rint((deep - 3000.0) * 255 / 2320))


def test_a_few_pixels_far_from_all_others_leave_the_range_to_them():
    deep = ramp().astype(np.uint16) * 10 + 3000
    marked = deep.copy()
    marked[5, :4], marked[9, -3:] = 65_535, 0  # 7 of 768: a marker, and dead pixels
    image = decode_image(encoded(marked))
    is_odd = marked != deep
    np.testing.assert_array_equal(image[~is_odd], decode_image(encoded(deep))[~is_odd])
    assert (image[5, 0], image[9, -1]) == (255, 0)


def test_grey_stored_as_colour_is_the_grey():
    colour = np.repeat(ramp()[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(encoded(colour)), ramp())


def test_colour_becomes_its_luminance():
    colour = np.zeros((10, 10, 3), np.uint8)
    colour[:, :5, 0], colour[:, 5:, 1] = 200, 200
    image = decode_image(encoded(colour))
    assert (image[0, 0], image[0, 9]) == (60, 117)  # 200 x 0.299, 200 x 0.587


def test_a_palette_is_looked_up():
    image = Image.fromarray((np.arange(64, dtype=np.uint8) % 4).reshape(8, 8)).convert("P")
    image.putpalette([v for grey in (0, 200, 50, 100) for v in (grey, grey, grey)])
    np.testing.assert_array_equal(decode_image(encoded(image))[0, :4], [0, 200, 50, 100])


def test_what_is_transparent_is_black():
    both = np.dstack([np.full((8, 8), 200, np.uint8), np.full((8, 8), 255, np.uint8)])
    both[:, :2, 1], both[:, 2:4, 1] = 0, 51  # invisible; one fifth
    image = Image.fromarray(both)
    assert image.mode == "LA"
    assert decode_image(encoded(image))[0].tolist() == [0, 0, 40, 40, 200, 200, 200, 200]
    np.testing.assert_array_equal(
        decode_image(encoded(image.convert("RGBA")))[0, ::2], [0, 40, 200, 200]
    )


def test_an_image_of_one_bit_is_black_and_white():
    image = decode_image(encoded(Image.fromarray(ramp() > 100)))
    assert set(np.unique(image)) == {0, 255}


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, ramp()),
        (2, ramp()[:, ::-1]),
        (3, ramp()[::-1, ::-1]),
        (6, np.rot90(ramp(), -1)),
        (8, np.rot90(ramp())),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_exif_orientation_is_applied(orientation, turned, kind):
    exif = Image.Exif()
    exif[274] = orientation
    np.testing.assert_array_equal(decode_image(encoded(ramp(), kind, exif=exif)), turned)


def test_jpeg_is_read_and_told_by_content():
    image = decode_image(encoded(ramp(), "JPEG", quality=95))
    assert abs(image.astype(int) - ramp()).max() <= 4


def test_tiff_whose_zero_is_white_is_inverted():
    for pixels in (ramp(), ramp().astype(np.uint16) * 200):
        content = bytearray(encoded(pixels, "TIFF"))
        at = content.index(struct.pack("<HHIH", 262, 3, 1, 1))  # black is zero
        content[at + 8] = 0
        image, inverted = decode_image(encoded(pixels, "TIFF")), decode_image(bytes(content))
        np.testing.assert_array_equal(inverted, 255 - image)


def test_float_pixels_span_their_range_and_must_be_finite():
    values = ramp().astype(np.float32) / 1000
    assert decode_image(encoded(values, "TIFF"))[-1, -1] == 255
    for bad in (np.nan, np.inf):
        values[3, 3] = bad
        assert "not finite" in refusal(encoded(values, "TIFF")).detail


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "WEBP"])
@pytest.mark.parametrize("kept_ratio", [0.2, 0.5, 0.9, 0.99])
def test_a_cut_file_is_no_image(kind, kept_ratio):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    content = encoded(noise, kind)
    reason = refusal(content[: int(len(content) * kept_ratio)]).reason
    if kind in ("PNG", "JPEG", "BMP", "TIFF"):
        assert reason == Reason.IMAGE_TRUNCATED
    else:
        assert reason in (Reason.IMAGE_TRUNCATED, Reason.IMAGE_UNREADABLE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000"])
def test_a_file_cut_at_any_byte_gives_the_whole_image_or_none(kind):
    content = encoded(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8), kind)
    whole = decode_image(content)
    for length in range(8, len(content)):
        image = image_or_error(content[:length])
        assert isinstance(image, ImageError) or np.array_equal(image, whole), length


def test_a_changed_byte_inside_a_png_is_not_called_a_cut():
    content = bytearray(encoded(ramp()))
    content[content.index(b"IDAT") + 8] ^= 0xFF
    assert refusal(bytes(content)).reason == Reason.IMAGE_UNREADABLE


def test_a_jpeg_damaged_in_its_middle_is_read_as_the_documents_say():
    # Once this fails, Pillow can tell: leave such images out, and docs/data.md says so no more.
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    content = bytearray(encoded(noise, "JPEG", quality=90))
    whole = decode_image(bytes(content))
    half = len(content) // 2
    content[half : half + 512] = bytes(512)
    assert not np.array_equal(decode_image(bytes(content)), whole)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_several_frames_are_no_image(kind):
    more = [Image.fromarray(255 - ramp())]
    error = refusal(encoded(ramp(), kind, save_all=True, append_images=more))
    assert (error.reason, error.detail.split(":")[0]) == (Reason.IMAGE_UNREADABLE, "several frames")


def test_formats_that_would_start_another_program_are_not_opened():
    error = refusal(encoded(ramp(), "EPS"))
    assert (error.reason, error.detail) == (
        Reason.IMAGE_UNREADABLE,
        "not PNG, JPEG, DICOM or the like",
    )


def test_an_image_is_blank_by_its_1_and_99_percent_quantiles():
    assert refusal(encoded(blank(7, 7, 0))).detail == "grey levels 7 to 7 of 255"
    assert refusal(encoded(blank(7, 255, 99))).reason == Reason.IMAGE_BLANK  # a burnt-in letter
    assert refusal(encoded(blank(7, 9, 5000))).reason == Reason.IMAGE_BLANK
    assert decode_image(encoded(blank(7, 10, 5000))).max() == 10
    assert decode_image(encoded(blank(7, 255, 101))).max() == 255


def test_an_image_too_large_is_refused_from_its_header():
    content = huge_png(40_000)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError) as caught:
        decode_image(content)
    assert caught.value.reason == Reason.IMAGE_TOO_LARGE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 50_000


def test_the_size_limit_is_in_pixels_and_holds_for_dicom_too():
    for content in (encoded(ramp(20, 30)), dicom(ramp(20, 30))):
        assert decode_image(content, max_px=600).shape == (20, 30)
        error = refusal(content, max_px=599)
        assert (error.reason, error.detail) == (
            Reason.IMAGE_TOO_LARGE,
            "30 x 20, at most 599 pixels",
        )


# DICOM files. By hand: two rows of four values, a copy of each to have some area.


def levels(*values: int, dtype=np.uint16) -> np.ndarray:
    return np.tile(np.array(values, dtype), (4, 1))


def test_dicom_without_a_window_spans_its_own_range():
    assert decode_image(dicom(levels(1000, 1255, 1510, 2020)))[0].tolist() == [0, 64, 128, 255]


def test_monochrome1_is_inverted():
    content = dicom(levels(0, 51, 204, 255), PhotometricInterpretation="MONOCHROME1")
    assert decode_image(content)[0].tolist() == [255, 204, 51, 0]


def test_signed_pixels_keep_their_order():
    image = decode_image(dicom(levels(-1000, -490, -235, 20, dtype=np.int16)))
    assert image[0].tolist() == [0, 128, 191, 255]


def linear(x: float, c: float, w: float) -> float:
    """The LINEAR function, word for word of DICOM PS3.3 C.11.2.1.2.1."""
    if x <= c - 0.5 - (w - 1) / 2:
        return 0
    if x > c - 0.5 + (w - 1) / 2:
        return 255
    return ((x - (c - 0.5)) / (w - 1) + 0.5) * 255


@given(st.integers(0, 4095), st.integers(2, 4096), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_window_is_applied_as_the_standard_says(center, width, is_inverted):
    values = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    kind = "MONOCHROME1" if is_inverted else "MONOCHROME2"
    window = {"WindowCenter": center, "WindowWidth": width, "PhotometricInterpretation": kind}
    expected = np.array([[linear(x, center, width) for x in row] for row in values.astype(float)])
    image = image_or_error(dicom(values, **window))
    if isinstance(image, ImageError):
        assert image.reason == Reason.IMAGE_BLANK
        assert np.ptp(np.quantile(expected, [0.01, 0.99], method="inverted_cdf")) < 4
    else:
        image = image.astype(float)
        assert abs((255 - image if is_inverted else image) - expected).max() <= 0.501


def test_the_first_of_several_windows_is_used():
    window = {"WindowCenter": [150.5, 9999], "WindowWidth": [101, 1]}
    assert decode_image(dicom(levels(0, 100, 150, 200), **window))[0].tolist() == [0, 0, 128, 255]


def test_the_other_window_functions():
    values = levels(0, 100, 150, 200)
    window = {"WindowCenter": 150, "WindowWidth": 100, "VOILUTFunction": "LINEAR_EXACT"}
    assert decode_image(dicom(values, **window))[0].tolist() == [0, 0, 128, 255]
    window["VOILUTFunction"] = "SIGMOID"
    by_hand = [255 / (1 + np.exp(-4 * (x - 150) / 100)) for x in (0, 100, 150, 200)]
    assert decode_image(dicom(values, **window))[0].tolist() == np.rint(by_hand).tolist()


def test_rescaling_comes_before_the_window():
    window = {"WindowCenter": -799.5, "WindowWidth": 401}  # -1000..-600 after rescaling
    content = dicom(levels(0, 100, 200, 300), RescaleSlope=2, RescaleIntercept=-1000, **window)
    assert decode_image(content)[0].tolist() == [0, 128, 255, 255]


def test_a_falling_rescale_inverts():
    content = dicom(levels(0, 51, 204, 255), RescaleSlope=-1, RescaleIntercept=255)
    assert decode_image(content)[0].tolist() == [255, 204, 51, 0]


def test_a_voi_lut_comes_before_a_window_and_spans_its_bits():
    table = Dataset()
    table.LUTDescriptor = [4, 10, 10]  # entries, first value, bits
    table.LUTData = np.array([0, 1023, 512, 256], np.uint16).tobytes()
    pixels = levels(10, 11, 12, 13)
    content = dicom(pixels, VOILUTSequence=[table], WindowCenter=1, WindowWidth=1)
    assert decode_image(content)[0].tolist() == [0, 255, 128, 64]
    content = dicom(pixels, VOILUTSequence=[table], PhotometricInterpretation="MONOCHROME1")
    assert decode_image(content)[0].tolist() == [255, 0, 127, 191]


def test_colour_in_dicom_becomes_its_luminance():
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[:, :2, 0], colour[:, 2:, 1] = 200, 200
    assert decode_image(dicom(colour))[0].tolist() == [60, 60, 117, 117]


def test_a_palette_in_dicom_is_looked_up():
    greys = np.array([0, 40000, 20000, 65535], np.uint16)
    tables = {
        f"{name}PaletteColorLookupTable{what}": value
        for name in ("Red", "Green", "Blue")
        for what, value in (("Descriptor", [4, 0, 16]), ("Data", greys.tobytes()))
    }
    pixels = levels(0, 1, 2, 3, dtype=np.uint8)
    content = dicom(pixels, PhotometricInterpretation="PALETTE COLOR", **tables)
    assert decode_image(content)[0].tolist() == [0, 156, 78, 255]


def test_several_dicom_frames_are_no_image():
    pixels = np.vstack([ramp(), ramp()])
    error = refusal(dicom(pixels, Rows=len(ramp()), NumberOfFrames=2))
    assert (error.reason, error.detail) == (
        Reason.IMAGE_UNREADABLE,
        "2 frames: a loop, not an image",
    )


def test_dicom_pixels_that_end_early_are_no_image():
    error = refusal(dicom(ramp(), PixelData=ramp().tobytes()[:-32]))
    assert (error.reason, error.detail) == (Reason.IMAGE_TRUNCATED, "736 of 768 pixel bytes")
    content = dicom(ramp())
    assert refusal(content[:-100]).reason == Reason.IMAGE_TRUNCATED


def test_a_dicom_file_without_pixels_is_no_image():
    assert "without pixels" in refusal(dicom(ramp(), PixelData=None)).detail


@pytest.mark.parametrize(
    ("compressed", "plain", "tolerance"),
    [
        ("MR_small_RLE.dcm", "MR_small.dcm", 0),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm", 0),
        ("MR_small_bigendian.dcm", "MR_small.dcm", 0),
        ("MR_small_implicit.dcm", "MR_small.dcm", 0),
        ("SC_rgb_rle.dcm", "SC_rgb_gdcm_KY.dcm", 0),
        ("SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle.dcm", 3),
    ],
)
def test_a_compressed_transfer_syntax_gives_the_image_of_a_plain_one(compressed, plain, tolerance):
    a, b = (read_image(DICOM_FILES / name).astype(int) for name in (compressed, plain))
    assert abs(a - b).max() <= tolerance


def test_grey_in_baseline_jpeg_inside_dicom_is_read():
    image = decode_image(in_dicom(encoded(ramp(), "JPEG", quality=95)))
    assert abs(image.astype(int) - stretch(ramp())).max() <= 5


def in_dicom(frame: bytes, syntax: str = pydicom.uid.JPEGBaseline8Bit) -> bytes:
    data = pydicom.dcmread(io.BytesIO(dicom(ramp())))
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([frame])
    data["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize("name", ["693_J2KI.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm"])
@pytest.mark.parametrize("kept_ratio", [0.3, 0.9, 0.99])
def test_a_compressed_frame_that_is_cut_is_no_image(name, kept_ratio):
    data = pydicom.dcmread(DICOM_FILES / name)
    frame = next(generate_frames(data.PixelData, number_of_frames=1))
    data.PixelData = encapsulate([frame[: int(len(frame) * kept_ratio)]])
    file = io.BytesIO()
    data.save_as(file)
    assert refusal(file.getvalue()).reason == Reason.IMAGE_UNREADABLE


def test_a_transfer_syntax_that_no_installed_decoder_reads_is_named():
    error = refusal(in_dicom(b"no JPEG-LS at all", JPEGLSLossless))
    assert "JPEG-LS Lossless Image Compression" in error.detail


def test_a_huge_jpeg_behind_a_small_dicom_header_is_refused():
    content = bytearray(encoded(ramp(), "JPEG"))
    at = content.index(b"\xff\xc0")  # frame header: length, precision, height, width
    content[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    assert refusal(in_dicom(bytes(content))).reason == Reason.IMAGE_UNREADABLE


# Any file at all: an image or a reason, and never a patient.


def said_of_patients(path: Path) -> set[str]:
    """Each patient's name and number in a file, as far as pydicom can read it."""
    found = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = pydicom.dcmread(path, force=True)
            for element in data.iterall():
                if element.keyword in ("PatientName", "PatientID"):
                    values = (
                        element.value if isinstance(element.value, MultiValue) else [element.value]
                    )
                    found |= {str(value) for value in values}
        except Exception:  # noqa: BLE001 - whatever a broken file does here, it is not ours
            pass
    return {text for text in found if len(text) > 3}


def test_every_test_file_of_pydicom_gives_an_image_or_a_reason_and_no_patient():
    folders = (DICOM_FILES, Path(DATA_ROOT) / "charset_files")
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    assert len(files) > 150
    images, n_patients = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none may reach a user, who could not act on it
        for path in files:
            image = image_or_error(path.read_bytes())
            if isinstance(image, ImageError):
                assert image.reason in Reason and "\n" not in str(image), path
                patients = said_of_patients(path)
                n_patients += bool(patients)
                assert not [text for text in patients if text in str(image)], path
            else:
                images += 1
                assert image.dtype == np.uint8 and image.ndim == 2 and image.max() > image.min(), (
                    path
                )
    assert images > 50 and n_patients > 20


SEEDS = {
    "png": encoded(ramp()),
    "deep": encoded(ramp().astype(np.uint16) * 200),
    "palette": encoded(Image.fromarray(ramp()).convert("P")),
    "jpeg": encoded(ramp(), "JPEG"),
    "tiff": encoded(ramp(), "TIFF"),
    "gif": encoded(ramp(), "GIF", save_all=True, append_images=[Image.fromarray(255 - ramp())]),
    "webp": encoded(ramp(), "WEBP"),
    "jp2": encoded(ramp(), "JPEG2000"),
    "dicom": dicom(ramp(), WindowCenter=90, WindowWidth=120, RescaleSlope=1, RescaleIntercept=0),
    "deflated": (DICOM_FILES / "image_dfl.dcm").read_bytes(),
    "rle": (DICOM_FILES / "MR_small_RLE.dcm").read_bytes(),
    "jpeg in dicom": in_dicom(encoded(ramp(), "JPEG")),
}


@pytest.mark.parametrize("kind", SEEDS)
def test_a_damaged_file_gives_an_image_or_a_reason_and_no_patient(kind):
    rng = random.Random(kind)
    for _ in range(150):
        content = bytearray(SEEDS[kind])
        start = 132 if content[128:132] == b"DICM" else 8  # what it claims to be stays
        end = min(len(content), rng.choice([start + 200, start + 800, len(content)]))
        if rng.random() < 0.25:
            del content[rng.randrange(start, len(content)) :]
        else:
            for _ in range(rng.choice([1, 2, 8])):
                content[rng.randrange(start, end)] = rng.choice([0, 0x7F, 0xFF, rng.randrange(256)])
        image = image_or_error(bytes(content))
        if isinstance(image, ImageError):
            assert not any(word in str(image) for word in (NAME, *NAME.split("^"), NUMBER))
        else:
            assert image.dtype == np.uint8 and image.ndim == 2


def test_nothing_of_a_dicom_header_is_quoted_warned_of_or_logged(caplog, recwarn):
    content = dicom(ramp(), NumberOfFrames="123456", StudyInstanceUID="1.2.123456")
    content = content.replace(b"1.2.123456", b"Doe^Jane..").replace(b"123456", b"Secret")
    error = refusal(content)
    assert error.detail == "header: ValueError"
    error = refusal(in_dicom(b"\xff\xd8 no more", JPEGLSLossless))
    assert error.detail.endswith("without an end marker")
    decode_image(dicom(ramp(), StudyInstanceUID="1.2.123456").replace(b"1.2.123456", b"Doe^Jane.."))
    assert not caplog.records and not [str(warning.message) for warning in recwarn.list]


# Places.


def test_what_is_no_file_has_a_reason(tmp_path: Path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")  # to read it would wait for ever
    reasons = {}
    for name in ("folder.png", "empty.png", "loop.png", "pipe.png", "no.png", "empty.png/a.png"):
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        reasons[name] = caught.value.reason
    assert reasons == {
        "folder.png": Reason.IMAGE_UNREADABLE,
        "empty.png": Reason.IMAGE_EMPTY,
        "loop.png": Reason.IMAGE_UNREADABLE,
        "pipe.png": Reason.IMAGE_UNREADABLE,
        "no.png": Reason.IMAGE_MISSING,
        "empty.png/a.png": Reason.IMAGE_MISSING,
    }


# Sizes.


def test_resizing_averages_what_it_shrinks_and_scales_each_side_on_its_own():
    image = np.zeros((8, 16), np.uint8)
    image[:, 8:] = 200
    small = resize_image(image, 4)
    assert small.shape == (4, 4) and small.dtype == np.uint8
    assert small[:, 0].tolist() == [0] * 4 and small[:, 3].tolist() == [200] * 4
    checks = (np.indices((32, 32)).sum(0) % 2 * 200).astype(np.uint8)
    assert abs(resize_image(checks, 8).astype(int) - 100).max() <= 10  # no alias


def test_resizing_to_the_same_size_changes_nothing():
    image = ramp(32, 32)
    np.testing.assert_array_equal(resize_image(image, 32), image)


def test_padding_keeps_the_shape_and_cropping_takes_the_middle():
    image = np.full((8, 16), 200, np.uint8)
    image[:, :4] = image[:, 12:] = 100
    assert resize_image(image, 8, "crop").tolist() == [[200] * 8] * 8
    padded = resize_image(image, 8, "pad")
    assert padded.shape == (8, 8)
    assert not padded[:2].any() and not padded[6:].any() and padded[2:6].min() >= 100
    np.testing.assert_array_equal(resize_image(image.T, 8, "pad"), padded.T)
    np.testing.assert_array_equal(resize_image(image, 8, "squash"), resize_image(image, 8))
    for how in ("pad", "crop"):
        assert resize_image(np.full((3, 4000), 9, np.uint8), 16, how).shape == (16, 16)
        square = ramp(32, 32)
        np.testing.assert_array_equal(resize_image(square, 16, how), resize_image(square, 16))
