"""The Python API: any image in, the numbers of the commands out, and every snippet of its page."""

import copy
import csv
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

import mmclip
from mmclip import api
from mmclip.api import ImageInputError, Model
from mmclip.checkpoint import CheckpointError
from mmclip.config_io import ConfigError
from mmclip.data.image_text_dataset import open_dataset
from mmclip.evaluation.results import ResultsError
from mmclip.prompt_check import PromptError
from tests.commands import mmclip as command
from tests.made_files import dicom, encoded, ramp

FINDINGS = ["pleural effusion", "pneumothorax"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(made_run: Path) -> Model:
    return mmclip.load(made_run)


@pytest.fixture(scope="module")
def files(made_raw: Path) -> list[str]:
    """More than two batches."""
    return [str(path) for path in sorted((made_raw / "images").iterdir())[:70]]


@pytest.fixture(scope="module")
def tuned(made_run: Path, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe and a full fine-tuning of two findings."""
    out = tmp_path_factory.mktemp("tuned")
    named = [word for finding in FINDINGS for word in ("--finding", finding)]
    given = ["finetune", "--model", made_run, "--data", made_data, "--out", out, *named]
    given += ["--fraction", "1", "--seed", "0", "--n-resamples", "10"]
    short = ["--set", "train.steps=4", "--set", "train.save_every_steps=2"]
    for further in (
        ["--method", "probe"],
        ["--method", "full", *short, "--set", "train.batch_size=8"],
    ):
        ended = command(out / "log", *given, *further)
        assert ended.code == 0, ended.err
    return out


def file_of(image_id: str, made_raw: Path) -> str:
    return str(made_raw / "images" / f"{image_id}.png")


def test_importing_the_package_imports_nothing_else():
    code = (
        "import time, sys; t = time.perf_counter(); import mmclip; s = time.perf_counter() - t; "
        "print(s, [m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'pydantic')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = said.stdout.split(maxsplit=1)
    assert float(seconds) < 0.1
    assert modules.strip() == "[]"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    assert {"load", "Model"} <= set(dir(mmclip))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = mmclip.lod  # pyright: ignore[reportAttributeAccessIssue]


def test_embeddings_are_normalised_and_similar_to_what_the_logits_are_made_of(
    model: Model, files: list[str]
):
    images = model.encode_images(files[:5])
    texts = model.encode_texts(["Small left pleural effusion.", "No pneumothorax."])
    assert images.dtype == texts.dtype == np.float32
    assert np.linalg.norm(images, axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    assert np.linalg.norm(texts, axis=1) == pytest.approx(np.ones(2), abs=1e-6)
    similarity = model.similarity(images, texts)
    assert similarity.shape == (5, 2)
    assert similarity[3, 1] == pytest.approx(float(images[3] @ texts[1]), abs=1e-6)
    assert model.similarity(torch.from_numpy(np.array(images)), texts) == pytest.approx(similarity)
    one = model.classify(
        files[0], ["mass"], prompts={"positive": "a {finding}", "negative": "b {finding}"}
    )
    pair = model.similarity(images[:1], model.encode_texts(["a mass", "b mass"]))[0]
    expected = 1 / (1 + np.exp(-model.logit_scale * (pair[0] - pair[1])))
    assert one.probabilities[0, 0] == pytest.approx(expected, rel=1e-4)


def test_an_image_has_the_same_numbers_whatever_stands_beside_it(model: Model, files: list[str]):
    whole = model.classify(files, FINDINGS).probabilities
    for first, last in ((0, 1), (3, 5), (60, 70), (1, 34)):
        part = model.classify(files[first:last], FINDINGS)
        np.testing.assert_array_equal(part.probabilities, whole[first:last])
    backwards = model.classify(files[::-1], FINDINGS[::-1]).probabilities
    np.testing.assert_array_equal(backwards[::-1, ::-1], whole)


def test_prompts_are_embedded_once_and_their_number_stays_small(
    made_run: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
):
    model = mmclip.load(made_run)
    first = model.classify(files[:3], FINDINGS).probabilities
    made = []
    real = api.scorer_of
    monkeypatch.setattr(api, "scorer_of", lambda *given: made.append(given) or real(*given))
    np.testing.assert_array_equal(model.classify(files[:3], FINDINGS).probabilities, first)
    assert not made
    assert not np.array_equal(model.classify(files[:3], FINDINGS, "pair").probabilities, first)
    backwards = model.classify(files[:3], FINDINGS[::-1])
    assert len(made) == 2 and backwards.findings == tuple(FINDINGS[::-1])
    for number in range(2 * api.KEPT_SCORERS):
        model.classify(files[:1], [f"nodule {number}"])
    assert len(model._scorers) == api.KEPT_SCORERS
    np.testing.assert_array_equal(model.classify(files[:3], FINDINGS).probabilities, first)


def test_api_predict_and_zeroshot_give_the_same_numbers(
    model: Model, made_run: Path, made_data: Path, made_raw: Path, tmp_path: Path
):
    """To the last digit, of a file, of a folder of files, and through a data folder."""
    named = [word for finding in FINDINGS for word in ("--finding", finding)]
    out = tmp_path / "zeroshot"
    ended = command(
        tmp_path, "zeroshot", "--model", made_run, "--data", made_data, "--out", out,
        "--n-resamples", "10", *named,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    scores = np.load(out / "scores.npz")
    for inputs in ([made_raw / "images"], [made_data]):
        table = tmp_path / "p.csv"
        ended = command(
            tmp_path, "predict", "--model", made_run, *inputs, "--out", table, *named,
            "--overwrite", "--workers", "1",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        with table.open(newline="") as file:
            lines = {
                Path(line["image_id"]).name.removesuffix(".png"): [float(line[f]) for f in FINDINGS]
                for line in csv.DictReader(file)
            }
        ids = scores["image_id"].tolist()
        np.testing.assert_array_equal([lines[i] for i in ids], scores["scores"])
    of_files = model.classify([file_of(i, made_raw) for i in ids], FINDINGS)
    np.testing.assert_array_equal(of_files.probabilities, scores["scores"])


def variants(pixels: np.ndarray, folder: Path) -> dict[str, object]:
    """One image of 8 bits in every form that holds all of it."""
    folder.mkdir()
    for kind, name in (("PNG", "a.png"), ("TIFF", "a.tif"), ("BMP", "a")):
        (folder / name).write_bytes(encoded(pixels, kind))
    (folder / "scan").write_bytes(
        dicom(pixels, WindowCenter=127.5, WindowWidth=256, VOILUTFunction="LINEAR_EXACT")
    )
    return {
        "PNG": folder / "a.png",
        "str": str(folder / "a.png"),
        "TIFF": folder / "a.tif",
        "without an ending": folder / "a",
        "PIL": Image.fromarray(pixels),
        "PIL RGB": Image.fromarray(pixels).convert("RGB"),
        "opened": Image.open(folder / "a.png"),
        "uint8": pixels,
        "float64": pixels / 255,
        "float32": (pixels / 255).astype(np.float32),
        "[h, w, 1]": pixels[..., None],
        "[1, h, w]": pixels[None],
        "[h, w, 3]": np.stack([pixels] * 3, -1),
        "[3, h, w]": np.stack([pixels] * 3),
        "torch uint8": torch.from_numpy(pixels.copy()),
        "torch float": torch.from_numpy(pixels / 255)[None],
        "torch colour": torch.from_numpy(np.stack([pixels] * 3).astype(np.float32) / 255),
        "read only": np.broadcast_to(pixels, pixels.shape),
        "turned": np.ascontiguousarray(pixels[::-1])[::-1],
    }


def test_one_image_has_the_same_numbers_in_every_form(model: Model, tmp_path: Path):
    pixels = np.clip(np.add.outer(np.arange(64) * 2, np.arange(48) * 3), 3, 250).astype(np.uint8)
    forms = variants(pixels, tmp_path / "forms")
    expected = model.encode_images(pixels)[0]
    for name, form in forms.items():
        np.testing.assert_array_equal(model.encode_images([form])[0], expected, err_msg=name)  # pyright: ignore[reportArgumentType]


def test_deep_pixels_take_the_range_of_the_image_as_a_file_of_them_does(
    model: Model, tmp_path: Path
):
    deep = ramp(40, 40).astype(np.uint16) * 11 + 100
    (tmp_path / "deep.png").write_bytes(encoded(Image.fromarray(deep), "PNG"))
    (tmp_path / "deep.dcm").write_bytes(dicom(deep))
    expected = model.encode_images(tmp_path / "deep.png")[0]
    wide = torch.from_numpy(deep.astype(np.int64))
    opened = Image.fromarray(deep)
    for form in (deep, deep.astype(np.int32), wide, opened, str(tmp_path / "deep.dcm")):
        np.testing.assert_array_equal(model.encode_images(form)[0], expected)


def said_or_kind(value: object) -> str:
    """An id that is the same in every process: that of an object may hold its address."""
    return value if isinstance(value, str) else type(value).__name__


def test_a_data_set_of_pydicom_is_the_file_that_it_was_read_from(model: Model, tmp_path: Path):
    (tmp_path / "a.dcm").write_bytes(dicom(ramp()))
    (expected,) = model.encode_images(tmp_path / "a.dcm")
    read = pydicom.dcmread(tmp_path / "a.dcm")
    kept = copy.deepcopy(read)
    received = pydicom.Dataset()  # as a network hands it over
    received.update(dict(read.items()))
    packed = copy.deepcopy(read)
    packed.compress(pydicom.uid.RLELossless)
    implicit = copy.deepcopy(read)
    implicit.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    for form in (read, received, packed, implicit):
        np.testing.assert_array_equal(model.encode_images(form)[0], expected)
    assert read == kept
    assert model.encode_images([read, received]).image_ids == ("image 0", "image 1")
    without = pydicom.dcmread(tmp_path / "a.dcm", stop_before_pixels=True)
    for form in (without, pydicom.Dataset()):
        with pytest.raises(ImageInputError, match="a DICOM file without pixels"):
            model.encode_images(form)


def test_forms_that_hold_the_same_pixels_are_one_image(model: Model):
    grey = ramp()
    image = Image.fromarray(grey)
    (expected,) = model.encode_images(image)
    for form in (image.convert("LA").convert("La"), np.asmatrix(grey), np.ma.array(grey)):
        np.testing.assert_array_equal(model.encode_images(form)[0], expected)
    unit = torch.from_numpy(grey / 255.0).float()
    near = model.encode_images(unit.to(torch.float8_e4m3fn))[0]
    assert near @ expected > 0.9
    for path in ("", " "):
        with pytest.raises(ImageInputError, match=r"^image 0: .*its path is empty"):
            model.encode_images(path)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.full((20, 20), 7, np.uint8), "nearly"),
        (np.linspace(0, 255, 400).reshape(20, 20), "floats must lie in 0..1"),
        (np.linspace(-1, 1, 400).reshape(20, 20), "from -1 to 1"),
        (np.full((20, 20), np.nan), "not finite"),
        (np.ma.masked_less(np.eye(20, dtype=np.uint8), 1), r"masked pixels.*\.filled"),
        (Image.new("L", (0, 5)), r"has 0 bytes \(0 x 5 pixels"),
        (torch.eye(20).to_sparse(), "torch.sparse_coo.*make it a dense one"),
        (torch.zeros(20, 20, device="meta"), "on meta, which numpy cannot hold"),
        (np.zeros((0, 5), np.uint8), "0 bytes|shape"),
        (np.zeros((7, 20, 20), np.uint8), r"shape \[7, 20, 20\]"),
        (np.zeros((20, 20), complex), "complex128"),
        (None, "a NoneType"),
        (12, "an? int"),
        ("no/such/file.png", "does not exist"),
        ("a\0b", "does not exist"),
        (b"\x89PNG", "cannot be read"),
        (b"", "0 bytes"),
        (io.BytesIO(), r"0 bytes \(nothing is left to read: rewind"),
        (np.zeros((0, 5)), r"0 bytes \(an array of shape \[0, 5\]\)"),
        (io.StringIO("a"), "gives str; open it by mode 'rb'"),
        ({"image": 1}, "a dict"),
        ("https://example.org/a.png", "an address; nothing is fetched: download it"),
    ],
    ids=said_or_kind,
)  # fmt: skip
def test_an_unreadable_image_is_named_or_skipped_with_its_reason(
    model: Model, files: list[str], image: object, said: str
):
    given: list = [files[0], image, files[1]]
    name = image if isinstance(image, str) else "image 1"
    with pytest.raises(ImageInputError, match=said) as error:
        model.encode_images(given)
    assert str(error.value).startswith(f"{name}: ")
    found = model.encode_images(given, errors="skip")
    np.testing.assert_array_equal(found, model.encode_images(files[:2]))
    assert found.image_ids == (files[0], files[1])
    (skipped,) = found.skipped
    assert skipped.image_id == name
    # Who hands an image over in memory looks for no file.
    assert "file" not in skipped.reason or isinstance(image, str)
    result = model.classify((each for each in given), FINDINGS, errors="skip")
    assert result.image_ids == (files[0], files[1])
    assert result.skipped == (skipped,)


def test_one_many_and_a_generator(model: Model, files: list[str]):
    whole = model.encode_images(files[:3])
    np.testing.assert_array_equal(model.encode_images(Path(files[0])), whole[:1])
    np.testing.assert_array_equal(model.encode_images(name for name in files[:3]), whole)
    np.testing.assert_array_equal(model.encode_images(np.array(files[:3])), whole)
    arrays = np.stack([np.asarray(Image.open(name)) for name in files[:3]])
    np.testing.assert_array_equal(model.encode_images(arrays[:, None]), whole)
    np.testing.assert_array_equal(model.encode_images(torch.from_numpy(arrays[..., None])), whole)
    assert model.encode_images([]).shape == (0, 16)
    assert model.encode_texts([]).shape == (0, 16)
    assert model.classify([], FINDINGS).probabilities.shape == (0, 2)
    with pytest.raises(TypeError):
        model.encode_images(5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="dict is neither an image nor several"):
        model.encode_images({"image": arrays[0]})
    with pytest.raises(ImageInputError, match=r"image 0: .*complex128"):
        model.encode_images(arrays[0].astype(complex))
    with pytest.raises(ValueError, match="errors='ignore'"):
        model.encode_images(files[0], errors="ignore")  # pyright: ignore[reportArgumentType]


def test_a_file_by_path_by_content_or_opened_is_one_image(model: Model, tmp_path: Path):
    for name, content in (("a.png", encoded(ramp(), "PNG")), ("a.dcm", dicom(ramp()))):
        (tmp_path / name).write_bytes(content)
        (expected,) = model.encode_images(tmp_path / name)
        with (tmp_path / name).open("rb") as file:
            forms = [content, bytearray(content), memoryview(content), io.BytesIO(content), file]
            for form in forms[:4]:
                np.testing.assert_array_equal(model.encode_images(form)[0], expected)
            for row in model.encode_images([content, io.BytesIO(content), file]):
                np.testing.assert_array_equal(row, expected)
            with pytest.raises(
                ImageInputError, match=r"image 0: the image has 0 bytes \(nothing is left.*seek"
            ):
                model.encode_images(file)  # it was read to its end
    with pytest.raises(ImageInputError, match=r"image 0: .*reading failed"):
        model.encode_images([file])
    with tempfile.NamedTemporaryFile() as kept:  # hands `read` on, and is iterated by lines
        kept.write(content)
        kept.seek(0)
        np.testing.assert_array_equal(model.encode_images(kept)[0], expected)
    for encoding in ("utf-8", "latin-1"):
        with (
            (tmp_path / name).open(encoding=encoding) as text,
            pytest.raises(ImageInputError, match="a file that gives str; open it by mode 'rb'"),
        ):
            model.encode_images(text)
    # Models of others read the same.
    other = mmclip.load("tests.own_models:Pair")
    np.testing.assert_array_equal(
        other.encode_images(content), other.encode_images(tmp_path / "a.dcm")
    )


def test_a_generator_is_read_a_batch_at_a_time(model: Model, files: list[str]):
    """Memory does not grow with what a generator yields."""
    read: list[str] = []

    def endless():
        for name in files[:40]:
            read.append(name)
            yield name
        yield "no/such/file.png"
        raise AssertionError("read behind the error")

    with pytest.raises(ImageInputError, match="no/such/file"):
        model.encode_images(endless())
    assert len(read) == 40


def test_thresholds_are_those_of_validation_images_of_the_same_model(
    model: Model, made_run: Path, made_data: Path, files: list[str], tmp_path: Path
):
    for prompts in ("default", "pair"):
        ended = command(
            tmp_path, "zeroshot", "--model", made_run, "--data", made_data, "--prompts", prompts,
            "--out", tmp_path / prompts, "--n-resamples", "10",
            *[word for finding in FINDINGS for word in ("--finding", finding)],
        )  # fmt: skip
        assert ended.code == 0, ended.err
    assert model.classify(files[:9], FINDINGS).decisions is None
    stored = json.loads((tmp_path / "default" / "results.json").read_text())
    value = {row["finding"]: row["threshold"]["value"] for row in stored["findings"]}
    result = model.classify(
        files[:9], [*FINDINGS, "scoliosis"], thresholds=tmp_path / "default" / "results.json"
    )
    assert result.thresholds == {**{f: value[f] for f in FINDINGS}, "scoliosis": None}
    assert result.decisions is not None
    for decided, row in zip(result.decisions, result.probabilities, strict=True):
        assert decided == [row[0] >= value[FINDINGS[0]], row[1] >= value[FINDINGS[1]], None]
    with pytest.raises(ValueError, match=r" is a folder; name a file, such as one in it"):
        result.to_csv(tmp_path)
    with (result.to_csv(tmp_path / "t.csv")).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["scoliosis present"] for line in lines} == {""}
    assert [line["pneumothorax present"] for line in lines] == [
        str(int(d[1] or 0)) for d in result.decisions
    ]
    with pytest.raises(ResultsError, match="prompts pair"):
        model.classify(files[0], FINDINGS, thresholds=tmp_path / "pair")
    with pytest.raises(ResultsError, match="no threshold"):
        model.classify(files[0], ["scoliosis"], thresholds=tmp_path / "default")
    other = mmclip.load(made_run / "checkpoints" / "step_000004")
    with pytest.raises(ResultsError, match="another model, run or step"):
        other.classify(files[0], FINDINGS, thresholds=tmp_path / "default")


@pytest.mark.parametrize("method", ["probe", "full"])
def test_a_fine_tuned_result_scores_as_its_own_results_and_reads_no_text(
    tuned: Path, made_raw: Path, made_data: Path, tmp_path: Path, method: str
):
    folder = tuned / f"{method}-100-0"
    model = mmclip.load(folder)
    scores = np.load(folder / "scores.npz")
    images = [file_of(i, made_raw) for i in scores["image_id"].tolist()]
    result = model.classify(images, thresholds=folder / "results.json")
    assert result.findings == model.findings == tuple(FINDINGS)
    assert result.decisions is not None
    np.testing.assert_array_equal(result.probabilities, scores["scores"])
    one = model.classify(images[:3], "pneumothorax")
    np.testing.assert_array_equal(one.probabilities[:, 0], scores["scores"][:3, 1])
    ended = command(tmp_path, "predict", "--model", folder, made_data, "--out", tmp_path / "p.csv")
    assert ended.code == 0, ended.err
    with (tmp_path / "p.csv").open(newline="") as file:
        lines = {
            line["image_id"]: [float(line[f]) for f in FINDINGS] for line in csv.DictReader(file)
        }
    np.testing.assert_array_equal([lines[i] for i in scores["image_id"].tolist()], scores["scores"])
    for asks in (
        lambda: model.encode_texts(["effusion"]),
        lambda: model.encode_images(images[:1]),
        lambda: model.explain(images[0], "effusion"),
        lambda: model.logit_scale,
    ):
        with pytest.raises(ValueError, match="fine-tuned classifier without a text encoder"):
            asks()
    with pytest.raises(ValueError, match="encode_texts needs"):
        model.encode_texts(["effusion"])
    with pytest.raises(ValueError, match="not learnt mass"):
        model.classify(images[:1], ["mass"])
    explained = command(
        tmp_path, "predict", "--model", folder, made_data, "--out", tmp_path / "e.csv",
        "--explain", tmp_path / "maps",
    )  # fmt: skip
    assert "has no text encoder" in explained.error()


def test_a_data_folder_in_the_place_of_a_model_is_told_with_the_command(made_data: Path):
    for give in (mmclip.load, lambda path: mmclip.load(str(path))):
        with pytest.raises(CheckpointError, match="is a data folder, not a model; train one by"):
            give(made_data)


def test_a_folder_without_weights_says_what_to_give(tuned: Path, tmp_path: Path, made_run: Path):
    with pytest.raises(CheckpointError, match=r"no fine-tuned result.*full-100-0"):
        mmclip.load(tuned)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        mmclip.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder; check the path, give"):
        mmclip.load(tmp_path / "nowhere")
    demo = tmp_path / "demo"
    shutil.copytree(made_run, demo / "run")
    (demo / "results.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds results, and a run in .*run; give that"):
        mmclip.load(demo)
    (tmp_path / "model.pt").write_bytes(b"x")
    weights = made_run / "checkpoints" / "step_000004" / "model.safetensors"
    for path, said in {
        tmp_path / "model.pt": "it is a file of weights, .*transformers, or module:function",
        weights: f"it is a file of one; give {re.escape(str(weights.parent))}$",
        "hf-hub:microsoft/BiomedCLIP-x": r"it is a name of open_clip.*docs/models\.md",
    }.items():
        with pytest.raises(CheckpointError, match=f"holds no finished checkpoint: {said}"):
            mmclip.load(path)
    with pytest.raises(ValueError, match="'cuda:99' cannot be used"):
        mmclip.load(made_run, device="cuda:99")
    with pytest.raises(ValueError, match="batch_size=0"):
        mmclip.load(made_run, batch_size=0)


def test_own_templates_and_own_words(model: Model, files: list[str], tmp_path: Path):
    templates = {"positive": ["{finding} is seen."], "negative": "no {finding} is seen."}
    given = model.classify(files[:3], FINDINGS, prompts=templates).probabilities
    path = tmp_path / "own.toml"
    path.write_text(
        'id = "own"\nversion = 1\ndescription = "mine"\n[templates]\n'
        'positive = ["{finding} is seen."]\nnegative = ["no {finding} is seen."]\n'
    )
    of_file = model.classify(files[:3], FINDINGS, prompts=path).probabilities
    np.testing.assert_array_equal(given, of_file)
    words = {"effusion of mine": {"positive": ["left effusion"], "negative": ["clear lungs"]}}
    own = model.classify(files[:3], ["effusion of mine", "mass"], prompts=words).probabilities
    np.testing.assert_array_equal(own[:, 1], model.classify(files[:3], "mass").probabilities[:, 0])
    with pytest.raises(ConfigError, match="does not name the finding"):
        model.classify(files[0], "mass", prompts={"positive": "yes", "negative": "no {finding}"})
    with pytest.raises(PromptError, match=r"'mass'.*the same to the model"):
        model.classify(files[0], "mass", prompts={"positive": "{finding}", "negative": "{finding}"})


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        (lambda m, f: m.classify(f), "no finding is named"),
        (lambda m, f: m.classify(f, ["mass", "Mass"]), "named twice"),
        (lambda m, f: m.classify(f, "mass", prompts="no-such-set"), "no-such-set"),
        (lambda m, f: m.encode_texts(["a", " "]), "text 1 is ' '"),
        (lambda m, f: m.encode_texts(["mass", "气胸"]), "^text 1 has no word that the model knows"),
        (lambda m, f: m.encode_texts("mass \ud800"), "^text 0 has half a character at place 5"),
        (lambda m, f: m.explain(f, ""), "the phrase is ''"),
        (lambda m, f: m.explain(f, "mass \udfff"), "^the phrase has half a character"),
        (lambda m, f: m.similarity(np.zeros((1, 3)), np.ones((1, 3))), "row 0 of the images is ze"),
        (lambda m, f: m.similarity(np.ones((1, 3)), np.full((1, 3), np.nan)), "of the texts is"),
        (lambda m, f: m.classify(f, "mass", prompts={"positive": "{finding}"}), "negative: is "),
        (lambda m, f: m.classify(f, "mass", prompts={"positive": [], "negative": "no {finding}"}),
         "templates.positive: is empty; give at least one"),
        (lambda m, f: m.classify(f, "mass", prompts={"positive": "a {}", "negative": "{finding}"}),
         r"has the placeholder \{\}; known are \{finding\}, "),
        (lambda m, f: m.explain(f, "mass", score="magic"), "score='magic'"),
        (lambda m, f: m.similarity(np.zeros((1, 3)), np.zeros((1, 4))), "of one model"),
        (lambda m, f: m.classify(f, ["mass", ""]), "finding '' is no name"),
        (lambda m, f: m.index([]), "no data folder is named"),
        (lambda m, f: m.index(f), r"\.png is no finished data folder"),
        (lambda m, f: mmclip.load("no_such_module:model"), "^model no_such_module:model: no_such"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(
    model: Model, files: list[str], asks: Callable[[Model, str], object], said: str
):
    with pytest.raises((ValueError, TypeError), match=said):
        asks(model, files[0])


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        (lambda m, f: m.similarity([f], ["mass"]), "give those of encode_images"),
        (lambda m, f: m.classify(f, [3]), "finding 3 is no name"),
        (lambda m, f: m.classify(f, "mass", prompts=5), "prompts=5 are no prompts; give the name"),
        (lambda m, f: m.classify(f, "mass", thresholds=0.5), r"thresholds=0.5 is no path.*compare"),
        (lambda m, f: m.encode_texts(None), "None is neither a text nor several"),
        (lambda m, f: m.encode_texts(b"mass"), "b'mass' is neither a text nor several"),
        (lambda m, f: m.encode_texts({"a": "mass"}), "neither a text nor several"),
        (lambda m, f: m.encode_texts([None]), "text 0 is None"),
        (lambda m, f: m.classify(f, {"mass": ["A mass."]}), "neither a finding nor several"),
        (lambda m, f: m.classify(f, 3), "3 is neither a finding nor several"),
        (lambda m, f: m.explain(f, ["mass"]), r"the phrase is \['mass'\]; give words"),
        (lambda m, f: m.explain(f, None), "the phrase is None; give words"),
        (lambda m, f: mmclip.load(f, device=None), "^device 'None' cannot be used"),
        (lambda m, f: mmclip.load(f, device=2.5), "^device '2.5' cannot be used"),
        (lambda m, f: mmclip.load(None), "None is no path of a model"),
        (lambda m, f: mmclip.load(torch.nn.Identity()), r"Identity\(\) is no path of a model"),
        (lambda m, f: mmclip.load(""), "'' is no path of a model"),
        (lambda m, f: mmclip.load(f, batch_size="8"), "batch_size='8' is no number of images"),
    ],
)  # fmt: skip
def test_what_a_type_checker_would_refuse_is_refused_in_words(
    model: Model, files: list[str], asks: Callable[[Any, Any], object], said: str
):
    jaxtyping.config.update("jaxtyping_disable", True)  # as it is outside of tests
    try:
        with pytest.raises((ValueError, TypeError), match=said):
            asks(model, files[0])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("device", ["mps", "gpu", "CPU", "meta", "cuda:77"])
def test_a_device_that_is_not_there_is_refused_in_a_line(made_run: Path, device: str):
    with pytest.raises(ValueError, match=f"^device '{device}' cannot be used .*take 'auto'") as e:
        mmclip.load(made_run, device=device)
    assert len(str(e.value)) < 200


def test_similarity_is_the_cosine_of_embeddings_of_any_length(model: Model, files: list[str]):
    images = model.encode_images(files[:3])
    texts = model.encode_texts(["Pleural effusion.", "No pleural effusion."])
    cosines = model.similarity(images, texts)
    np.testing.assert_allclose(model.similarity(images * 5, texts / 7), cosines, atol=1e-6)
    mean = texts.mean(0)
    np.testing.assert_allclose(
        model.similarity(images, mean)[:, 0], images @ mean / np.linalg.norm(mean), atol=1e-6
    )


def test_texts_that_are_cut_are_told_of(model: Model, caplog: pytest.LogCaptureFixture):
    model.encode_texts(["Mass."] * 5)
    assert not caplog.messages
    model.encode_texts(["Mass.", "pleural effusion " * 500, "No mass."])
    (said,) = caplog.messages
    assert said.startswith("1 of 3 texts are longer than the ")


def test_a_model_goes_to_another_process(model: Model, tuned: Path, files: list[str]):
    for one in (model, mmclip.load(tuned / "probe-100-0")):
        expected = one.classify(files[:3], FINDINGS).probabilities
        sent = pickle.loads(pickle.dumps(one))  # noqa: S301 of this test
        np.testing.assert_array_equal(sent.classify(files[:3], FINDINGS).probabilities, expected)


@pytest.mark.slow
def test_a_forked_process_does_not_wait_for_threads_that_it_lacks(made_run: Path, files: list[str]):
    """In a process of its own: two threads of OpenMP, then a fork, as of multiprocessing.Pool."""
    program = f"""
import multiprocessing, torch, mmclip
torch.set_num_threads(2)
model = mmclip.load({str(made_run)!r}, device="cpu")
def score(model):
    return model.classify({files[:3]!r}, ["edema"]).probabilities.tolist()
want = score(model)
with multiprocessing.get_context("fork").Pool(1) as pool:
    (found,) = pool.map_async(score, [model]).get(60)
assert all(abs(a - b) < 1e-6 for x, y in zip(found, want) for a, b in zip(x, y))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_a_saliency_map_lies_on_the_pixels_of_the_image(model: Model, tmp_path: Path):
    found = model.explain(ramp(50, 70), "pneumothorax")
    assert found.values.shape == (50, 70)
    assert found.values.dtype == np.float32
    assert found.save(tmp_path / "new" / "map.png").stat().st_size > 1000
    for name in ("map.npy", "MAP.NPY"):
        np.testing.assert_array_equal(np.load(found.save(tmp_path / name)), found.values)
    with Image.open(found.save(tmp_path / "MAP.PNG")) as picture:
        assert picture.format == "PNG"
    with pytest.raises(ValueError, match=r"neither \.png nor .npy"):
        found.save(tmp_path / "map.jpg")


@pytest.fixture(scope="module")
def desk(
    made_run: Path, made_results: Path, tuned: Path, files: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A folder that holds what the documents name: runs, results and images."""
    desk = tmp_path_factory.mktemp("desk")
    for run in ("runs/first", "runs/demo/run"):
        (desk / run).parent.mkdir(parents=True, exist_ok=True)
        (desk / run).symlink_to(made_run)
    (desk / "ft").symlink_to(tuned)
    Image.open(files[0]).save(desk / "a.png")
    (desk / "b.dcm").write_bytes(dicom(ramp()))
    (desk / "validated").symlink_to(made_results)
    return desk


def snippets(document: Path) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"^```python\n(.*?)^```", document.read_text("utf-8"), re.M | re.S)


OWN_TEST = {"extending.md": "tests/test_extending.py"}
"""Pages whose blocks are files, which a test of their own writes and runs."""

WITH_SNIPPETS = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if snippets(path) and path.name not in OWN_TEST
]


def test_the_readme_and_the_page_of_the_api_have_snippets():
    assert {"README.md", "python.md"} <= {path.name for path in WITH_SNIPPETS}


@pytest.mark.parametrize("document", WITH_SNIPPETS, ids=lambda path: path.name)
def test_every_snippet_of_the_documents_runs(
    document: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
):
    """One after another, as a reader would type them, in a folder that holds what they name."""
    monkeypatch.chdir(desk)
    names: dict = {}
    for snippet in snippets(document):
        exec(compile(snippet, str(document), "exec"), names)
    if document.name == "python.md":
        assert (desk / "map.png").exists()
        assert (desk / "predictions.csv").exists()


def test_a_data_folder_of_the_same_images_is_read_alike(made_data: Path, made_run: Path):
    """The squares that the API makes of files are the bytes of the data folder."""
    dataset = open_dataset([made_data])
    model = mmclip.load(made_run)
    root = made_data.parent / "raw"
    for row in (0, 17, 90):
        path = root / str(dataset.samples[row].image)
        square = model._encoder.prepare(path)  # pyright: ignore[reportPrivateUsage]
        np.testing.assert_array_equal(square, dataset.pixels(np.array([row]))[0].numpy())
