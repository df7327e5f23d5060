"""Whole builds: damaged inputs as a user meets them, and the real films where they are at hand."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmclip.data.build import build_data, build_shard
from mmclip.data.cache import FilmCache, verify_cache
from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.images import resize_film
from mmclip.data.manifest import read_manifest
from mmclip.data.mapping import CsvMapping, load_mapping
from mmclip.data.parts import Shard
from mmclip.data.records import Film, Reason, Record
from mmclip.data.tables import SourceError, read_csv
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
        kept: Checks on the kept films of the case, one for each; none means none is kept.
        excluded: The reasons of the excluded rows of the case, in order.
        detail: Words of the first excluded row's detail.
        error: The build stops at once with this message instead.
    """

    content: bytes | Callable[[Path], object] | None = SOUND
    rows: bytes = row()
    kept: tuple[Callable[[Film, np.ndarray], bool], ...] = ()
    excluded: tuple[Reason, ...] = ()
    detail: str = ""
    error: str | None = None


def is_ramp(film: Film, pixels: np.ndarray) -> bool:
    return bool((pixels == resize_film(ramp(), PX)).all())


def is_stretched(film: Film, pixels: np.ndarray) -> bool:
    return pixels[0, 0] <= 8 and pixels[-1, -1] >= 247 and pixels[0, 0] < pixels[15, 15]


def is_inverted(film: Film, pixels: np.ndarray) -> bool:
    return pixels[0, 0] >= 247 and pixels[-1, -1] <= 8


def has(**values) -> Callable[[Film, np.ndarray], bool]:
    def check(film: Film, pixels: np.ndarray) -> bool:
        return {name: getattr(film, name) for name in values} == values

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
    "0 bytes": Case(b"", excluded=(Reason.IMAGE_EMPTY,)),
    "text named .png": Case(b"404 Not Found", excluded=(Reason.IMAGE_UNREADABLE,), detail="not"),
    "40,000 x 40,000 px": Case(
        lambda root: (root / "case.png").write_bytes(huge_png(40_000)),
        excluded=(Reason.IMAGE_TOO_LARGE,),
        detail="100,000,000",
    ),
    "blank film": Case(
        encoded(blank(9, 9, 0)), excluded=(Reason.IMAGE_BLANK,), detail="grey levels 9 to 9"
    ),
    "nearly blank film": Case(encoded(blank(0, 255, 50)), excluded=(Reason.IMAGE_BLANK,)),
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
    "a missing file": Case(None, excluded=(Reason.IMAGE_MISSING,)),
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
    "neither film nor report": Case(
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
        kept=(has(film_id="case2.png", split="test"),),
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
        return build_data(read_csv(root, MAPPING), root, out, film_px=PX)

    if case.error is not None:
        with pytest.raises(SourceError, match=case.error):
            build()
        assert not out.exists()
        return
    meta = build()
    n_rows = 2 + len(case.kept) + len(case.excluded)
    assert (meta["n_rows"], meta["n_films"], meta["n_excluded"]) == (
        n_rows, n_rows - len(case.excluded), len(case.excluded),
    )  # fmt: skip
    assert meta["excluded"] == {str(reason): n for reason, n in Counter(case.excluded).items()}
    lines = [json.loads(line) for line in (out / "excluded.jsonl").read_text("utf-8").splitlines()]
    assert [line["reason"] for line in lines] == list(case.excluded)
    assert all(0 < line["row"] < n_rows - 1 for line in lines)
    assert not any(word in str(lines) for word in (*NAME.split("^"), NUMBER))
    assert not lines or case.detail in lines[0]["detail"]
    first, *kept, last = read_manifest(out)
    pixels = FilmCache.open(out).films
    assert (first.film_id, last.film_id) == ("first.png", "last.png")
    assert is_ramp(first, pixels[0]) and is_ramp(last, pixels[-1])
    assert len(kept) == len(case.kept) == len(pixels) - 2
    for film, check, image in zip(kept, case.kept, pixels[1:-1], strict=True):
        assert check(film, image), film


# The folder as a whole.


def write_root(root: Path, n: int = 12) -> list[Film]:
    """Films 0, 1, ...; every third has no image, and file 4 is damaged."""
    root.mkdir()
    films = []
    for i in range(n):
        image = None if i % 3 == 2 else f"{i}.png"
        if image:
            content = encoded(np.roll(ramp(), i, axis=1))
            (root / image).write_bytes(content[:50] if i == 4 else content)
        films.append(
            Film(
                film_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i // 2}", source="made",
                image=image, report="Clear.",
            )
        )  # fmt: skip
    return films


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_folder_gives_the_same_bytes_and_hash(tmp_path: Path):
    films = write_root(tmp_path / "root")
    metas = [
        build_data(films, tmp_path / "root", tmp_path / f"out{n}", film_px=PX, workers=n)
        for n in (1, 2)
    ]
    assert metas[0] == metas[1]
    assert files(tmp_path / "out1") == files(tmp_path / "out2")


def test_one_changed_pixel_changes_the_hash_and_the_films(tmp_path: Path):
    films = write_root(tmp_path / "root")
    one = build_data(films, tmp_path / "root", tmp_path / "one", film_px=PX)
    pixels = ramp()
    pixels[3, 3] ^= 64
    (tmp_path / "root" / "0.png").write_bytes(encoded(pixels))
    two = build_data(films, tmp_path / "root", tmp_path / "two", film_px=PX)
    assert one["data_hash"] != two["data_hash"]
    assert one["films_sha256"] != two["films_sha256"]


def test_row_i_of_the_films_is_the_ith_record_with_an_image(tmp_path: Path):
    films = write_root(tmp_path / "root")
    meta = build_data(films, tmp_path / "root", tmp_path / "out", film_px=PX)
    kept = read_manifest(tmp_path / "out")
    assert [film.film_id for film in kept] == [f"f{i}" for i in range(12) if i != 4]
    pixels = FilmCache.open(tmp_path / "out").films
    with_image = [film for film in kept if film.image]
    for image, film in zip(pixels, with_image, strict=True):
        rolled = np.roll(ramp(), int(film.film_id[1:]), axis=1)
        np.testing.assert_array_equal(image, resize_film(rolled, PX))
        assert (film.width_px, film.height_px) == (32, 24)
    verify_cache(tmp_path / "out", meta["films_sha256"])


def test_excluded_rows_are_listed_in_their_order_whichever_step_left_them_out(tmp_path: Path):
    films = write_root(tmp_path / "root")
    images = {0: "no.png", 1: "../1.png", 3: "empty.png", 6: "../6.png", 7: "no.png"}
    (tmp_path / "root" / "empty.png").touch()
    films = [replace(film, image=images.get(i, film.image)) for i, film in enumerate(films)]
    films[5] = replace(films[5], film_id="")
    build_data(films, tmp_path / "root", tmp_path / "out", film_px=PX)
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
    films = write_root(tmp_path / "root")
    out = tmp_path / "out"
    first = build_data(films, tmp_path / "root", out, film_px=PX)
    with pytest.raises(ManifestError, match="finished build of 11 rows; add --overwrite"):
        build_data(films, tmp_path / "root", out, film_px=16)
    assert read_meta(out) == first
    again = build_data(films, tmp_path / "root", out, film_px=16, overwrite=True)
    assert again["film_px"] == FilmCache.open(out).films.shape[1] == 16


@pytest.mark.parametrize("name", ["film.png", "meta.json"])
def test_a_build_writes_nothing_into_a_folder_of_other_things(tmp_path: Path, name: str):
    films = write_root(tmp_path / "root")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ManifestError, match=f"holds other things .*such as {name}; name a new"):
        build_data(films, tmp_path / "root", out, film_px=PX, overwrite=True)
    with pytest.raises(ManifestError, match="holds other things"):
        build_shard(films, tmp_path / "root", out, Shard(1, 2), film_px=PX)
    with pytest.raises(ManifestError, match="is a file; name the folder"):
        build_data(films, tmp_path / "root", out / name, film_px=PX)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: "mine"}


def test_a_text_only_build_has_no_films_and_leaves_none_behind(tmp_path: Path):
    films = write_root(tmp_path / "root")
    out = tmp_path / "out"
    build_data(films, tmp_path / "root", out, film_px=PX)
    texts = [replace(film, image=None) for film in films]
    meta = build_data(texts, tmp_path / "root", out, film_px=PX, overwrite=True)
    assert (meta["film_px"], meta["films_sha256"], meta["n_with_image"]) == (None, None, 0)
    assert sorted(files(out)) == ["excluded.jsonl", "films.parquet", "meta.json"]


def test_a_build_of_nothing_says_what_went_wrong_most_often(tmp_path: Path):
    films = [replace(film, image="no.png") for film in write_root(tmp_path / "root")]
    with pytest.raises(ManifestError, match="12 of 12 rows: the image file does not exist"):
        build_data(films, tmp_path / "root", tmp_path / "out", film_px=PX)
    with pytest.raises(ManifestError, match="the source has no rows"):
        build_data([], tmp_path / "root", tmp_path / "out", film_px=PX)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_source_that_fails_leaves_the_finished_build_as_it_is(tmp_path: Path):
    films = write_root(tmp_path / "root")
    meta = build_data(films, tmp_path / "root", tmp_path / "out", film_px=PX)

    def failing() -> Iterator[Record]:
        yield films[0]
        raise SourceError("a damaged row")

    with pytest.raises(SourceError, match="a damaged row"):
        build_data(failing(), tmp_path / "root", tmp_path / "out", film_px=PX, overwrite=True)
    assert read_meta(tmp_path / "out") == meta


def test_a_root_behind_a_link_is_the_root(tmp_path: Path):
    films = write_root(tmp_path / "root")
    (tmp_path / "link").symlink_to("root")
    plain = build_data(films, tmp_path / "root", tmp_path / "one", film_px=PX)
    linked = build_data(films, tmp_path / "link", tmp_path / "two", film_px=PX)
    assert plain == linked


def test_the_command_builds_and_says_what_it_left_out(tmp_path: Path):
    films = write_root(tmp_path / "root")
    table = "film,patient\n" + "".join(f"{f.image},{f.patient_id}\n" for f in films if f.image)
    (tmp_path / "root" / "studies.csv").write_text(table)
    (tmp_path / "m.toml").write_text('[columns]\nimage = "film"\npatient_id = "patient"\n')
    command = [sys.executable, "-m", "mmclip", "data", "build", "csv", "--film-px", str(PX)]
    places = {"--root": "root", "--mapping": "m.toml", "--out": "out"}
    for option, name in places.items():
        command += [option, str(tmp_path / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the image ends before its last row" in result.stderr
    assert result.stdout.strip() == str(tmp_path / "out")
    assert read_meta(tmp_path / "out")["n_films"] == 7


def test_an_error_of_the_command_is_one_line(tmp_path: Path):
    command = [sys.executable, "-m", "mmclip", "data", "build", "csv"]
    command += ["--root", str(tmp_path), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: csv needs a file") and result.stderr.count("\n") == 1


# The real films.


@pytest.mark.skipif(not (REAL / "studies.csv").is_file(), reason="needs the real chest films")
def test_every_real_film_is_accounted_for(tmp_path: Path):
    mapping = load_mapping(REPOSITORY / "examples" / "mixed_films.toml")
    meta = build_data(read_csv(REAL, mapping), REAL, tmp_path, film_px=PX)
    with (REAL / "studies.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (len(rows), meta["n_rows"], meta["n_films"], meta["n_excluded"]) == (3620, 3620, 3620, 0)
    films = read_manifest(tmp_path)
    assert [film.image for film in films] == [row["film"] for row in rows]
    assert [film.split for film in films] == [row["split"] for row in rows]
    assert sum(film.report is not None for film in films) == 447
    assert Counter(film.view for film in films)["L"] == 53
    assert Counter(film.source for film in films)["kermany"] == 483
    pixels = FilmCache.open(tmp_path).films
    assert pixels.shape == (3620, PX, PX)
    assert (pixels.max(axis=(1, 2)) > pixels.min(axis=(1, 2)) + 10).all()
    for film, row in zip(films, rows, strict=True):
        known = set(film.labels.values())
        assert known <= {0, 1}
        assert bool(film.labels) == (row["labels"] not in ("", "todo")), row
        if film.source == "tb128":
            assert film.labels["tuberculosis"] == (row["labels"] == "TB")
        if film.source == "kermany":
            assert film.labels["pneumonia"] == (row["labels"] != "Normal")
            assert film.split == "test"
    verify_cache(tmp_path, meta["films_sha256"])
