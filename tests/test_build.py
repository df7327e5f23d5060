"""Whole builds: damaged inputs as a user meets them, and the real images where they are at hand."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmclip.data.cache import ImageCache, verify_cache
from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.images import resize_image
from mmclip.data.ingest.build import build_data, build_shard
from mmclip.data.ingest.csv_mapping import CsvMapping, load_mapping
from mmclip.data.ingest.csv_table import SourceError, read_csv
from mmclip.data.ingest.shards import Shard
from mmclip.data.manifest import read_manifest
from mmclip.data.sample import Reason, Record, Sample
from tests.made_files import NAME, NUMBER, blank, dicom, encoded, huge_png, ramp

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = REPOSITORY.parent / "shared" / "data" / "cxr"
PX = 32

HEADER = ["film", "patient", "report", "split", "age", "sex", "labels"]
MAPPING = CsvMapping.model_validate(
    {
        "columns": {
            "image": "film", "patient_id": "patient", "report": "report", "split": "split",
            "age": "age", "sex": "sex", "labels": "labels",
        },
        "labels": {
            "closed": {"*": ["mass", "tuberculosis"]},
            "map": {"TB": {"present": ["tuberculosis"]}, "No TB": {"absent": ["tuberculosis"]}},
        },
    }
)  # fmt: skip

SOUND = encoded(ramp())
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)


def row(**cells: str) -> bytes:
    """A line of the table; "case.png" of patient "p" with a report, if nothing else is said."""
    known = {"film": "case.png", "patient": "p", "report": "Clear."} | cells
    return ",".join(known.get(name, "") for name in HEADER).encode() + b"\n"


@dataclass(frozen=True)
class Case:
    """One damaged input between two sound rows, and what becomes of it.

    Attributes:
        content: Of case.png, or what makes it in the root folder; None leaves it out.
        rows: The lines of the table that stand for the case.
        kept: Checks on the kept images of the case, one for each; none means none is kept.
        excluded: The reasons of the excluded rows of the case, in order.
        detail: Words of the first excluded row's detail.
        error: The build stops at once with this message instead.
    """

    content: bytes | Callable[[Path], object] | None = SOUND
    rows: bytes = row()
    kept: tuple[Callable[[Sample, np.ndarray], bool], ...] = ()
    excluded: tuple[Reason, ...] = ()
    detail: str = ""
    error: str | None = None


def is_ramp(sample: Sample, pixels: np.ndarray) -> bool:
    return bool((pixels == resize_image(ramp(), PX)).all())


def is_stretched(sample: Sample, pixels: np.ndarray) -> bool:
    return pixels[0, 0] <= 8 and pixels[-1, -1] >= 247 and pixels[0, 0] < pixels[15, 15]


def is_inverted(sample: Sample, pixels: np.ndarray) -> bool:
    return pixels[0, 0] >= 247 and pixels[-1, -1] <= 8


def has(**values) -> Callable[[Sample, np.ndarray], bool]:
    def check(sample: Sample, pixels: np.ndarray) -> bool:
        return {name: getattr(sample, name) for name in values} == values

    return check


def link_outside(root: Path) -> None:
    (root.parent / "outside.png").write_bytes(SOUND)
    (root / "case.png").symlink_to(root.parent / "outside.png")


def outside(root: Path) -> None:
    (root.parent / "outside.png").write_bytes(SOUND)


CASES = {
    # Files.
    "sound": Case(kept=(is_ramp,)),
    "truncated jpeg": Case(encoded(NOISE, "JPEG")[:900], excluded=(Reason.IMAGE_TRUNCATED,)),
    "truncated png": Case(encoded(NOISE)[:900], excluded=(Reason.IMAGE_TRUNCATED,)),
    "0 bytes": Case(b"", excluded=(Reason.IMAGE_EMPTY,), detail="case.png"),
    "text named .png": Case(b"404 Not Found", excluded=(Reason.IMAGE_UNREADABLE,), detail="not"),
    "40,000 x 40,000 px": Case(
        lambda root: (root / "case.png").write_bytes(huge_png(40_000)),
        excluded=(Reason.IMAGE_TOO_LARGE,),
        detail="100,000,000",
    ),
    "blank image": Case(
        encoded(blank(9, 9, 0)), excluded=(Reason.IMAGE_BLANK,), detail="grey levels 9 to 9"
    ),
    "nearly blank image": Case(encoded(blank(0, 255, 50)), excluded=(Reason.IMAGE_BLANK,)),
    "animated gif": Case(
        encoded(ramp(), "GIF", save_all=True, append_images=[Image.fromarray(255 - ramp())]),
        excluded=(Reason.IMAGE_UNREADABLE,),
        detail="animation",
    ),
    "16-bit png": Case(encoded(ramp().astype(np.uint16) * 100), kept=(is_stretched,)),
    "monochrome1 dicom": Case(
        dicom(ramp(), PhotometricInterpretation="MONOCHROME1"), kept=(is_inverted,)
    ),
    "dicom without pixels": Case(
        dicom(ramp(), PixelData=None), excluded=(Reason.IMAGE_UNREADABLE,), detail="without pixels"
    ),
    "dicom with truncated pixels": Case(
        dicom(ramp())[:-50], excluded=(Reason.IMAGE_TRUNCATED,), detail="718 of 768 pixel bytes"
    ),
    "dicom of two frames": Case(
        dicom(ramp(), Rows=12, NumberOfFrames=2), excluded=(Reason.IMAGE_UNREADABLE,)
    ),
    # Places.
    "a folder in place of an image": Case(
        lambda root: (root / "case.png").mkdir(), excluded=(Reason.IMAGE_UNREADABLE,)
    ),
    "a pipe in place of an image": Case(
        lambda root: os.mkfifo(root / "case.png"), excluded=(Reason.IMAGE_UNREADABLE,)
    ),
    "a missing file": Case(None, excluded=(Reason.IMAGE_MISSING,), detail="case.png"),
    "an absolute path": Case(
        rows=row(film="/etc/hostname"), excluded=(Reason.IMAGE_OUTSIDE_ROOT,), detail="/etc"
    ),
    "a path to the folder above": Case(
        outside, rows=row(film="../outside.png"), excluded=(Reason.IMAGE_OUTSIDE_ROOT,)
    ),
    "a path out and in again": Case(rows=row(film="../root/case.png"), kept=(is_ramp,)),
    "a link to outside": Case(link_outside, excluded=(Reason.IMAGE_OUTSIDE_ROOT,)),
    "a link to itself": Case(
        lambda root: (root / "case.png").symlink_to("case.png"),
        excluded=(Reason.IMAGE_UNREADABLE,),
    ),
    "a path longer than any file's": Case(
        rows=row(film="x" * 5000), excluded=(Reason.IMAGE_UNREADABLE,), detail="too long"
    ),
    # Reports.
    "a report of nan": Case(rows=row(report="NaN"), kept=(has(report=None, study_id="case.png"),)),
    "a report of white space": Case(rows=row(report=" \t "), kept=(has(report=None),)),
    "neither image nor report": Case(
        rows=row(film="", report=""), excluded=(Reason.NO_ID,)
    ),
    # Rows.
    "one id twice": Case(
        rows=row(report="First.") + row(report="Second."),
        kept=(has(report="First."),),
        excluded=(Reason.DUPLICATE_ID,),
    ),
    "no patient": Case(rows=row(patient=" "), excluded=(Reason.NO_PATIENT,)),
    "a patient in two splits": Case(
        lambda root: [(root / name).write_bytes(SOUND) for name in ("case.png", "case2.png")],
        rows=row(split="train") + row(film="case2.png", split="test"),
        kept=(has(image_id="case2.png", split="test"),),
        excluded=(Reason.PATIENT_IN_TWO_SPLITS,),
        detail="split train, but the patient is also in test",
    ),
    "too many fields": Case(
        rows=row(report="Clear, normal."),
        excluded=(Reason.BAD_VALUE,),
        detail="8 fields, the header 7",
    ),
    "too few fields": Case(
        rows=b"case.png,p\n", excluded=(Reason.BAD_VALUE,), detail="2 fields, the header 7"
    ),
    "labels that contradict": Case(
        rows=row(labels="TB|No TB"), excluded=(Reason.BAD_VALUE,), detail="tuberculosis"
    ),
    "odd age and sex": Case(
        rows=row(age="-3", sex="divers"), kept=(has(age_years=None, sex=None),)
    ),
    "an age of 148 years": Case(
        rows=row(age="148Y", sex="male"), kept=(has(age_years=None, sex="M"),)
    ),
    "NUL in the path": Case(
        rows=row(film="case\0.png"), excluded=(Reason.BAD_VALUE,), detail="NUL"
    ),
    "NUL in the report": Case(
        rows=row(report="Clear\0 lungs."), kept=(has(report="Clear lungs."),)
    ),
    "unknown label words": Case(
        rows=row(labels="Mass|Dragon") + row(film="other.png", labels="Unicorn"),
        error=r"\[labels.map\] does not explain 'Dragon' \(1\), 'Unicorn' \(1\)",
    ),
    "latin-1 bytes": Case(
        rows="case.png,p,Müde.,,,,\n".encode("latin-1"), error="line 3: not UTF-8"
    ),
    "a quote that never closes": Case(rows=b'case.png,p,"Clear.,,,,\n', error="mend the quotes"),
}  # fmt: skip


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_a_damaged_input(tmp_path: Path, name: str, mark: bytes):
    case, root, out = CASES[name], tmp_path / "root", tmp_path / "out"
    root.mkdir()
    for sound in ("first.png", "last.png"):
        (root / sound).write_bytes(SOUND)
    if callable(case.content):
        case.content(root)
    elif case.content is not None:
        (root / "case.png").write_bytes(case.content)
    table = [",".join(HEADER).encode() + b"\n", row(film="first.png", patient="first")]
    table += [case.rows, row(film="last.png", patient="last")]
    (root / "studies.csv").write_bytes(mark + b"".join(table))

    def build() -> dict:
        return build_data(read_csv(root, MAPPING), root, out, image_size=PX)

    if case.error is not None:
        with pytest.raises(SourceError, match=case.error):
            build()
        assert not out.exists()
        return
    meta = build()
    n_rows = 2 + len(case.kept) + len(case.excluded)
    assert (meta["n_rows"], meta["n_samples"], meta["n_excluded"]) == (
        n_rows, n_rows - len(case.excluded), len(case.excluded),
    )  # fmt: skip
    assert meta["excluded"] == {str(reason): n for reason, n in Counter(case.excluded).items()}
    lines = [json.loads(line) for line in (out / "excluded.jsonl").read_text("utf-8").splitlines()]
    assert [line["reason"] for line in lines] == list(case.excluded)
    assert all(0 < line["row"] < n_rows - 1 for line in lines)
    assert not any(word in str(lines) for word in (*NAME.split("^"), NUMBER))
    assert not lines or case.detail in lines[0]["detail"]
    first, *kept, last = read_manifest(out)
    pixels = ImageCache.open(out).images
    assert (first.image_id, last.image_id) == ("first.png", "last.png")
    assert is_ramp(first, pixels[0]) and is_ramp(last, pixels[-1])
    assert len(kept) == len(case.kept) == len(pixels) - 2
    for sample, check, image in zip(kept, case.kept, pixels[1:-1], strict=True):
        assert check(sample, image), sample


# The folder as a whole.


def write_root(root: Path, n: int = 12) -> list[Sample]:
    """Images 0, 1, ...; every third has no image, and file 4 is damaged."""
    root.mkdir()
    samples = []
    for i in range(n):
        image = None if i % 3 == 2 else f"{i}.png"
        if image:
            content = encoded(np.roll(ramp(), i, axis=1))
            (root / image).write_bytes(content[:50] if i == 4 else content)
        samples.append(
            Sample(
                image_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i // 2}", source="made",
                image=image, report="Clear.",
            )
        )  # fmt: skip
    return samples


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_folder_gives_the_same_bytes_and_hash(tmp_path: Path):
    samples = write_root(tmp_path / "root")
    metas = [
        build_data(samples, tmp_path / "root", tmp_path / f"out{n}", image_size=PX, workers=n)
        for n in (1, 2)
    ]
    assert metas[0] == metas[1]
    assert files(tmp_path / "out1") == files(tmp_path / "out2")


def test_one_changed_pixel_changes_the_hash_and_the_images(tmp_path: Path):
    samples = write_root(tmp_path / "root")
    one = build_data(samples, tmp_path / "root", tmp_path / "one", image_size=PX)
    pixels = ramp()
    pixels[3, 3] ^= 64
    (tmp_path / "root" / "0.png").write_bytes(encoded(pixels))
    two = build_data(samples, tmp_path / "root", tmp_path / "two", image_size=PX)
    assert one["data_hash"] != two["data_hash"]
    assert one["images_sha256"] != two["images_sha256"]


def test_row_i_of_the_images_is_the_ith_record_with_an_image(tmp_path: Path):
    samples = write_root(tmp_path / "root")
    meta = build_data(samples, tmp_path / "root", tmp_path / "out", image_size=PX)
    kept = read_manifest(tmp_path / "out")
    assert [sample.image_id for sample in kept] == [f"f{i}" for i in range(12) if i != 4]
    pixels = ImageCache.open(tmp_path / "out").images
    with_image = [sample for sample in kept if sample.image]
    for image, sample in zip(pixels, with_image, strict=True):
        rolled = np.roll(ramp(), int(sample.image_id[1:]), axis=1)
        np.testing.assert_array_equal(image, resize_image(rolled, PX))
        assert (sample.width_px, sample.height_px) == (32, 24)
    verify_cache(tmp_path / "out", meta["images_sha256"])


def test_excluded_rows_are_listed_in_their_order_whichever_step_left_them_out(tmp_path: Path):
    samples = write_root(tmp_path / "root")
    images = {0: "no.png", 1: "../1.png", 3: "empty.png", 6: "../6.png", 7: "no.png"}
    (tmp_path / "root" / "empty.png").touch()
    samples = [
        replace(sample, image=images.get(i, sample.image)) for i, sample in enumerate(samples)
    ]
    samples[5] = replace(samples[5], image_id="")
    build_data(samples, tmp_path / "root", tmp_path / "out", image_size=PX)
    lines = (tmp_path / "out" / "excluded.jsonl").read_text().splitlines()
    assert [(line["row"], line["reason"]) for line in map(json.loads, lines)] == [
        (0, Reason.IMAGE_MISSING),
        (1, Reason.IMAGE_OUTSIDE_ROOT),
        (3, Reason.IMAGE_EMPTY),
        (4, Reason.IMAGE_TRUNCATED),
        (5, Reason.NO_ID),
        (6, Reason.IMAGE_OUTSIDE_ROOT),
        (7, Reason.IMAGE_MISSING),
    ]


def test_a_finished_build_is_replaced_only_when_asked_to(tmp_path: Path):
    samples = write_root(tmp_path / "root")
    out = tmp_path / "out"
    first = build_data(samples, tmp_path / "root", out, image_size=PX)
    with pytest.raises(ManifestError, match="finished build of 11 rows; add --overwrite"):
        build_data(samples, tmp_path / "root", out, image_size=16)
    assert read_meta(out) == first
    again = build_data(samples, tmp_path / "root", out, image_size=16, overwrite=True)
    assert again["image_size"] == ImageCache.open(out).images.shape[1] == 16


@pytest.mark.parametrize("name", ["image.png", "meta.json"])
def test_a_build_writes_nothing_into_a_folder_of_other_things(tmp_path: Path, name: str):
    samples = write_root(tmp_path / "root")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ManifestError, match=f"holds other things .*such as {name}; name a new"):
        build_data(samples, tmp_path / "root", out, image_size=PX, overwrite=True)
    with pytest.raises(ManifestError, match="holds other things"):
        build_shard(samples, tmp_path / "root", out, Shard(1, 2), image_size=PX)
    with pytest.raises(ManifestError, match="is a file; name the folder"):
        build_data(samples, tmp_path / "root", out / name, image_size=PX)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: "mine"}


def test_a_text_only_build_has_no_images_and_leaves_none_behind(tmp_path: Path):
    samples = write_root(tmp_path / "root")
    out = tmp_path / "out"
    build_data(samples, tmp_path / "root", out, image_size=PX)
    texts = [replace(sample, image=None) for sample in samples]
    meta = build_data(texts, tmp_path / "root", out, image_size=PX, overwrite=True)
    assert (meta["image_size"], meta["images_sha256"], meta["n_with_image"]) == (None, None, 0)
    assert sorted(files(out)) == ["excluded.jsonl", "meta.json", "samples.parquet"]


def test_a_build_of_nothing_says_what_went_wrong_most_often(tmp_path: Path):
    samples = [replace(sample, image="no.png") for sample in write_root(tmp_path / "root")]
    with pytest.raises(ManifestError, match="12 of 12 rows: the image file does not exist"):
        build_data(samples, tmp_path / "root", tmp_path / "out", image_size=PX)
    with pytest.raises(ManifestError, match="the source has no rows"):
        build_data([], tmp_path / "root", tmp_path / "out", image_size=PX)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_source_that_fails_leaves_the_finished_build_as_it_is(tmp_path: Path):
    samples = write_root(tmp_path / "root")
    meta = build_data(samples, tmp_path / "root", tmp_path / "out", image_size=PX)

    def failing() -> Iterator[Record]:
        yield samples[0]
        raise SourceError("a damaged row")

    with pytest.raises(SourceError, match="a damaged row"):
        build_data(failing(), tmp_path / "root", tmp_path / "out", image_size=PX, overwrite=True)
    assert read_meta(tmp_path / "out") == meta


def test_a_root_behind_a_link_is_the_root(tmp_path: Path):
    samples = write_root(tmp_path / "root")
    (tmp_path / "link").symlink_to("root")
    plain = build_data(samples, tmp_path / "root", tmp_path / "one", image_size=PX)
    linked = build_data(samples, tmp_path / "link", tmp_path / "two", image_size=PX)
    assert plain == linked


def test_the_command_builds_and_says_what_it_left_out(tmp_path: Path):
    samples = write_root(tmp_path / "root")
    table = "film,patient\n" + "".join(f"{f.image},{f.patient_id}\n" for f in samples if f.image)
    (tmp_path / "root" / "studies.csv").write_text(table)
    (tmp_path / "m.toml").write_text('[columns]\nimage = "film"\npatient_id = "patient"\n')
    command = [sys.executable, "-m", "mmclip", "data", "build", "csv", "--image-size", str(PX)]
    places = {"--root": "root", "--mapping": "m.toml", "--out": "out"}
    for option, name in places.items():
        command += [option, str(tmp_path / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the image ends before its last row" in result.stderr
    assert result.stdout.strip() == str(tmp_path / "out")
    assert read_meta(tmp_path / "out")["n_samples"] == 7


def test_an_error_of_the_command_is_one_line(tmp_path: Path):
    command = [sys.executable, "-m", "mmclip", "data", "build", "csv"]
    command += ["--root", str(tmp_path), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: csv needs a file") and result.stderr.count("\n") == 1


# The real images.


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "studies.csv").is_file(), reason="needs the real chest X-rays")
def test_every_real_image_is_accounted_for(tmp_path: Path):
    mapping = load_mapping(REPOSITORY / "examples" / "mixed_images.toml")
    meta = build_data(read_csv(REAL, mapping), REAL, tmp_path, image_size=PX)
    with (REAL / "studies.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (len(rows), meta["n_rows"], meta["n_samples"], meta["n_excluded"]) == (
        3620,
        3620,
        3620,
        0,
    )
    samples = read_manifest(tmp_path)
    assert [sample.image for sample in samples] == [row["film"] for row in rows]
    assert [sample.split for sample in samples] == [row["split"] for row in rows]
    assert sum(sample.report is not None for sample in samples) == 447
    assert Counter(sample.view for sample in samples)["L"] == 53
    assert Counter(sample.source for sample in samples)["kermany"] == 483
    pixels = ImageCache.open(tmp_path).images
    assert pixels.shape == (3620, PX, PX)
    assert (pixels.max(axis=(1, 2)) > pixels.min(axis=(1, 2)) + 10).all()
    for sample, row in zip(samples, rows, strict=True):
        known = set(sample.labels.values())
        assert known <= {0, 1}
        assert bool(sample.labels) == (row["labels"] not in ("", "todo")), row
        if sample.source == "tb128":
            assert sample.labels["tuberculosis"] == (row["labels"] == "TB")
        if sample.source == "kermany":
            assert sample.labels["pneumonia"] == (row["labels"] != "Normal")
            assert sample.split == "test"
    verify_cache(tmp_path, meta["images_sha256"])


def of_reports(reports: Iterable[str]) -> list[Sample]:
    return [
        Sample(image_id=f"{i}", study_id=f"{i}", patient_id=f"{i}", source="x", report=report)
        for i, report in enumerate(reports)
    ]


GERMAN = [
    "Kein Pneumothorax.",
    "Herz normal gross.",
    "Lungen frei.",
    "Kein Erguss.",
    "Unauffällig.",
]
SPANISH = ["Sin derrame.", "Silueta normal.", "No se observa neumotórax.", "Campos claros."]
ENGLISH = ["No effusion.", "The lungs are clear.", "Cardiomegaly.", "Normal."]


@pytest.mark.parametrize(("reports", "n_known"), [(GERMAN, "1 of 5"), (SPANISH, "0 of 4")])
def test_reports_in_another_language_are_said_with_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reports: list[str], n_known: str
):
    build_data(of_reports(reports), tmp_path, tmp_path / "out", image_size=8)
    (line,) = (r.getMessage() for r in caplog.records if "English" in r.getMessage())
    assert f"only {n_known} reports" in line and "--entities" in line


def test_english_reports_are_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    build_data(of_reports(ENGLISH), tmp_path, tmp_path / "out", image_size=8)
    assert "English" not in caplog.text
