"""--resize from the build to the map: recorded, checked wherever images are read, and undone."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmclip.data.folder import read_meta
from mmclip.data.images import resize_image
from tests.commands import mmclip
from tests.made_files import dicom

PX = 32
WAYS = ("squash", "pad", "crop")
SETS = (
    "model.embed_dim=16", "data.image_size=32", "model.image.width=32", "model.image.depth=1",
    "model.image.heads=2", "model.text.width=32", "model.text.depth=1", "model.text.heads=2",
    "model.text.vocab_size=400", "model.text.vocab_min_patients=1", "train.steps=2",
    "train.batch_size=8", "validation.every_steps=0",
)  # fmt: skip


def picture(i: int) -> np.ndarray:
    """uint8 of another shape for each image: upright, lying, and a strip."""
    height, width = ((60, 90), (90, 60), (40, 160))[i % 3]
    image = np.add.outer(np.arange(height), np.arange(width)) % 120
    image[height // 3 : height // 2, width // 3 : width // 2] = 200 + i
    return image.astype(np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 patients, half of them as DICOM, and a table."""
    folder = tmp_path_factory.mktemp("resize") / "raw"
    folder.mkdir()
    rows = []
    for i in range(24):
        name = f"{i}.{'dcm' if i % 2 else 'png'}"
        if i % 2:
            (folder / name).write_bytes(dicom(picture(i), PatientName="A"))
        else:
            Image.fromarray(picture(i)).save(folder / name)
        said = "Large pleural effusion." if i % 4 < 2 else "No pleural effusion."
        split = ("train", "train", "test")[i % 3]
        rows.append((name, f"p{i}", f"FINDINGS: {said} Heart {i}.", int(i % 4 < 2), split))
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "patient", "report", "e", "split"), *rows])
    (folder / "m.toml").write_text(
        'table = "t.csv"\nsource = "s"\n[columns]\nimage = "image"\npatient_id = "patient"\n'
        'report = "report"\nsplit = "split"\n[labels.columns]\ne = "pleural effusion"\n'
    )
    return folder


@pytest.fixture(scope="module")
def folders(root: Path) -> dict[str, Path]:
    """A data folder by each way."""
    made = {}
    for how in WAYS:
        made[how] = root.parent / how
        ended = mmclip(
            root.parent / "log", "data", "build", "csv", "--root", root, "--mapping",
            root / "m.toml", "--image-size", str(PX), "--resize", how, "--out", made[how],
        )  # fmt: skip
        assert ended.code == 0, ended.err
    return made


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path]) -> dict[str, Path]:
    """A run on padded images, and one on cropped ones."""
    made = {}
    for how in ("pad", "crop"):
        data = folders[how]
        made[how] = data.parent / f"run-{how}"
        sets = [word for value in (*SETS, f"data.resize={how}") for word in ("--set", value)]
        ended = mmclip(
            data.parent / "log", "pretrain", "--data", data, "--config", "tiny", *sets, "--cpu",
            "--out", made[how],
        )  # fmt: skip
        assert ended.code == 0, ended.err
    return made


def test_a_build_records_the_way_and_makes_each_image_by_it(root: Path, folders: dict[str, Path]):
    assert len({read_meta(folder)["data_hash"] for folder in folders.values()}) == len(WAYS)
    for how, folder in folders.items():
        assert read_meta(folder)["resize"] == how
        images = np.load(folder / "images.npy")
        for i in (0, 1, 2, 5):  # PNG and DICOM, of every shape
            pixels = picture(i).astype(float)
            if i % 2:  # DICOM is stretched to its own range
                pixels = np.rint((pixels - pixels.min()) * 255 / np.ptp(pixels))
            expected = resize_image(pixels.astype(np.uint8), PX, how)
            assert np.abs(images[i].astype(int) - expected).max() <= 1, (how, i)


def test_a_build_that_goes_on_by_another_way_decodes_anew(root: Path, tmp_path: Path):
    given = ("data", "build", "csv", "--root", root, "--mapping", root / "m.toml", "--image-size",
             str(PX), "--out", tmp_path / "data")  # fmt: skip
    for how in ("pad", "crop"):
        more = ("--overwrite",) if how == "crop" else ()
        assert mmclip(tmp_path / "log", *given, "--resize", how, *more).code == 0
        image = np.load(tmp_path / "data" / "images.npy")[0]
        np.testing.assert_array_equal(image, resize_image(picture(0), PX, how))


@pytest.mark.parametrize(("of", "given"), [("pad", "crop"), ("crop", "squash")])
def test_images_of_another_way_neither_train_nor_are_scored(
    folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path, of: str, given: str
):
    model = ("--model", runs[of], "--data", folders[given], "--cpu")
    finding = ("--finding", "pleural effusion")
    out, table = ("--out", tmp_path / "out.png"), tmp_path / "out.csv"
    sets = [word for value in (*SETS, f"data.resize={of}") for word in ("--set", value)]
    for command in (
        ("pretrain", "--data", folders[given], "--config", "tiny", *sets, "--cpu", *out),
        ("zeroshot", *model, *finding, *out),
        ("finetune", *model, *finding, "--fraction", "1", "--seed", "0", *out),
        ("retrieve", *model, "--evaluate", *out),
        ("predict", "--model", runs[of], folders[given], "--cpu", *finding, "--out", table),
        ("explain", *model, "--image-id", "0.png", "--phrase", "effusion", *out),
    ):
        error = mmclip(tmp_path / "log", *command).error()
        assert f"became squares by {given}, {of} is needed" in error, command
        assert f"--resize {of}" in error


@pytest.mark.parametrize("how", ["pad", "crop"])
def test_a_run_scores_files_as_it_scores_its_data_folder(
    root: Path, folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path, how: str
):
    def scores(*what: Path) -> dict[str, float]:
        out = tmp_path / f"{len(what)}.csv"
        given = ("--model", runs[how], "--finding", "pleural effusion", "--cpu", "--out", out)
        ended = mmclip(tmp_path / "log", "predict", *given, *what)
        assert ended.code == 0, ended.err
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {Path(row["image_id"]).name: float(row["pleural effusion"]) for row in rows}

    of_files = scores(*(root / name for name in ("0.png", "1.dcm", "2.png", "5.dcm")))
    of_data = scores(folders[how])
    assert len(of_files) == 4 and len(set(of_files.values())) == 4
    for name, score in of_files.items():
        assert score == pytest.approx(of_data[name], abs=1e-5), name


@pytest.mark.parametrize(
    ("name", "number", "how"),
    [
        ("2.png", 2, "crop"),
        ("5.dcm", 5, "pad"),
        pytest.param("2.png", 2, "pad", marks=pytest.mark.slow),
        pytest.param("5.dcm", 5, "crop", marks=pytest.mark.slow),
    ],
)
def test_a_map_has_the_pixels_of_the_image_that_was_published(
    root: Path, folders, runs: dict[str, Path], tmp_path: Path, how: str, name: str, number: int
):
    height, width = picture(number).shape
    given = ("--model", runs[how], "--phrase", "pleural effusion", "--cpu")
    maps = []
    for k, which in enumerate(
        (
            ("--image", root / name),
            ("--data", folders[how], "--image-id", name),
        )
    ):
        ended = mmclip(tmp_path, "explain", *given, *which, "--out", tmp_path / f"{k}.png")
        assert ended.code == 0, ended.err
        facts = json.loads(ended.out)
        with np.load(tmp_path / f"{k}.npz") as stored:
            maps.append(stored["saliency"])
        unseen = 1 - min(height, width) / max(height, width) if how == "crop" else 0
        assert facts["unseen_ratio"] == pytest.approx(unseen, abs=1e-5)
    for found in maps:
        assert found.shape == (height, width)
        short = min(height, width)
        inside = np.isfinite(found)
        assert inside.sum() == (short * short if how == "crop" else height * width)
        np.testing.assert_allclose(found[inside], maps[0][inside], atol=1e-4)
