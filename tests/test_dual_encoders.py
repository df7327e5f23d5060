"""Models of others by our protocols: equal to transformers by hand, and told apart where they
cannot be."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import mmclip
from mmclip.checkpoint import CheckpointError
from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.ingest.build import BuildOptions, build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.inputs import read_rgb
from mmclip.data.leakage.trained_on import trained_on
from mmclip.data.manifest import read_manifest
from mmclip.data.sample import Sample
from mmclip.data.sampling import Schedule, image_key
from mmclip.evaluation.comparison import compare
from mmclip.evaluation.protocols import load_protocol
from mmclip.evaluation.results import read_results
from mmclip.evaluation.scores import load_scores
from mmclip.explanation.explain import explain_image
from mmclip.finetuning.task import own_protocol, task_of
from mmclip.model_loading import ModelRequest, open_dual_encoder
from mmclip.models.layout import EncoderError
from mmclip.prompts import load_prompts
from mmclip.retrieval.retrieve import SearchRequest, search
from tests.commands import mmclip as run_mmclip
from tests.dual_encoders import (
    SAVE,
    SMALL,
    VISION,
    ByHand,
    save_clip,
    save_dual_encoder,
    save_siglip2,
)
from tests.made_layouts import of_chexpert
from tests.published import lay_out
from tests.test_explain import write_boxes
from tests.test_protocols import CASES, plan

FAMILIES = list(SAVE)
SOME_SLOW = [
    pytest.param(name, marks=() if name in ("clip", "siglip") else pytest.mark.slow)
    for name in FAMILIES
]
"""Of tests that take seconds each: the third family is made of parts that the others have."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name, save in SAVE.items()}


@pytest.fixture(scope="session")
def chexpert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic folder in CheXpert's layout, with its official split."""
    root = tmp_path_factory.mktemp("chexpert")
    planned = plan(load_protocol("chexpert-5"), CASES["chexpert-5"])
    raw = lay_out(root / "raw", of_chexpert(planned))
    options = BuildOptions(metadata={"reader": "chexpert"})
    reader = open_reader("chexpert", raw, mapping=None, table=None)
    build_data(reader, raw, root / "data", image_size=32, options=options)
    ended = run_mmclip(root, "data", "split", root / "data", "--name", "official")
    assert ended.code == 0, ended.err
    return root / "data"


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_transformers_by_hand(
    family: str, models: dict[str, Path], chexpert: Path
):
    raw, hand = chexpert.parent / "raw", ByHand(models[family])
    files = sorted(raw.rglob("*.jpg"))[:5]
    model = mmclip.load(models[family], device="cpu")
    for file in files:
        ours = model._encoder.prepare(file)  # pyright: ignore[reportPrivateUsage]
        for name, values in hand.pixel_values(file).items():
            np.testing.assert_array_equal(ours[name], values[0].numpy())
    expected = torch.stack([hand.embed_image(file) for file in files]).numpy()
    np.testing.assert_allclose(model.encode_images(files), expected, atol=1e-6)
    assert np.ptp(expected, axis=0).max() > 1e-3, "the images must differ"
    texts = ["There is Edema.", "No pleural effusion is seen in this long sentence.", "x"]
    expected = torch.stack([hand.embed_text(text) for text in texts]).numpy()
    np.testing.assert_allclose(model.encode_texts(texts), expected, atol=1e-6)
    assert np.ptp(expected, axis=0).max() > 1e-3, "the texts must differ"


@pytest.mark.parametrize("family", SOME_SLOW)
def test_zeroshot_by_a_protocol_is_a_loop_of_transformers_finding_by_finding(
    family: str, models: dict[str, Path], chexpert: Path, tmp_path: Path
):
    ended = run_mmclip(
        tmp_path, "zeroshot", "--model", models[family], "--data", chexpert, "--protocol",
        "chexpert-5", "--out", tmp_path / "out", "--n-resamples", "5", "--cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    scores = load_scores(tmp_path / "out" / "scores.npz")
    hand, prompts = ByHand(models[family]), load_prompts("default")
    image_of = {sample.image_id: str(sample.image) for sample in read_manifest(chexpert)}
    rows = range(0, len(scores), 7)
    for k, finding in enumerate(load_protocol("chexpert-5").findings):
        texts = prompts.texts(finding)
        for row in rows:
            file = chexpert.parent / "raw" / image_of[str(scores.image_id[row])]
            expected = hand.score(file, texts.positives, texts.negatives)
            assert scores.scores[row, k] == pytest.approx(expected, abs=1e-6)
    results = read_results(tmp_path / "out")
    rule = "sigmoid" if family == "siglip" else "prompt_pair"
    assert results.provenance.zeroshot_rule == rule
    assert results.leak_check.startswith("not made: what ")
    assert results.facts["trained on"] == "unknown" and results.facts["images read"] == "files"
    assert "Pil" in str(results.facts["image processor"])


@pytest.mark.parametrize(
    "families",
    [
        pytest.param(["siglip"], id="siglip"),
        pytest.param(FAMILIES, id="all", marks=pytest.mark.slow),
    ],
)
def test_models_of_different_makes_stand_in_one_table_and_are_scored_once(
    families: list[str], models: dict[str, Path], chexpert: Path, made_run: Path, tmp_path: Path
):
    folders = [models[family] for family in families]
    given = [
        "compare-models", made_run, *folders, "--data", chexpert, "--protocol", "chexpert-5",
        "--out", tmp_path / "out", "--n-resamples", "20", "--cpu",
    ]  # fmt: skip
    first = run_mmclip(tmp_path, *given, "--save", tmp_path / "table.md")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    names = ["first", *families]
    assert [run["name"] for run in found["runs"]] == names
    folders = [tmp_path / "out" / name for name in names]
    for folder, run in zip(folders, found["runs"], strict=True):
        results = read_results(folder)
        assert run["macro_auroc"] == results.macro_auroc is not None
    paired = compare(folders, n_resamples=20)
    for run, one in zip(found["runs"][1:], paired[1:], strict=True):
        assert one.macro is not None and run["difference"]["interval"] is not None
        assert run["difference"]["value"] == one.macro.value
    (of_siglip,) = (run for run in found["runs"] if run["name"] == "siglip")
    assert any("zero-shot rule sigmoid" in said for said in of_siglip["differs"])
    for run in found["runs"][1:]:
        assert run is of_siglip or not any("rule" in said for said in run["differs"])
    table = (tmp_path / "table.md").read_text("utf-8")
    assert all(f"| {name} |" in table for name in names)
    # Again: nothing is scored; one more model: it alone is.
    stamps = [(folder / "results.json").stat().st_mtime_ns for folder in folders]
    again = run_mmclip(tmp_path, *given[:2], "tests.own_models:Pair", *given[2:])
    assert again.code == 0, again.err
    assert again.err.count("is done:") == len(names) and again.err.count("is scored:") == 1
    assert stamps == [(folder / "results.json").stat().st_mtime_ns for folder in folders]
    assert [run["name"] for run in json.loads(again.out)["runs"]][1] == "tests.own_models-Pair"
    # Other prompts are other results.
    other = run_mmclip(tmp_path, *given, "--prompts", "pair")
    assert "holds results of another model, data, protocol or prompts" in other.error()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere:Pair", "nowhere cannot be imported (No module named 'nowhere')"),
        ("broken_model:Pair", "broken_model cannot be imported (invalid syntax"),
        ("tests.own_models:Missing", "tests.own_models has no Missing; it has Pair"),
        ("tests.own_models:NUMBER", "tests.own_models has no NUMBER"),
        ("tests.own_models:nothing", "nothing returned a NoneType without encode_images"),
        ("tests.own_models:failing", "failing() failed with RuntimeError: no GPU here"),
        ("tests.own_models:Broken", "Broken failed with KeyError"),
        ("tests.own_models:OtherWidth", "images of 5 numbers and texts of 6, which do not compare"),
        ("tests.own_models:OneRow", "returned shape [5] for 1 images; return one row for each"),
        ("tests.own_models:Zero", "returned a row that is 0 or not finite"),
        ("tests.own_models:Words", "Words returned a list"),
    ],
)
def test_an_own_model_that_is_none_is_told_in_a_line(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken_model.py").write_text("def Pair(:\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        mmclip.load(source)
    assert "\n" not in str(caught.value)


def test_an_own_model_scores_as_it_says():
    model = mmclip.load("tests.own_models:Pair")
    image = np.tile(np.linspace(0, 255, 50).astype(np.uint8), (9, 1))
    ours = model.encode_images(image)
    expected = np.asarray(Image.fromarray(image).resize((5, 1)), float)[0] + 1
    np.testing.assert_allclose(ours[0], expected / np.linalg.norm(expected), atol=1e-6)
    assert model.logit_scale == 1.0 and model.zeroshot_rule == "prompt_pair"
    texts = load_prompts("pair").texts("edema")
    p, n = (model.encode_texts(side).mean(0) for side in texts)
    logits = ours @ np.stack([p / np.linalg.norm(p), n / np.linalg.norm(n)]).T
    found = model.classify(image, ["edema"], "pair").probabilities[0, 0]
    assert found == pytest.approx(float(np.exp(logits[0, 0]) / np.exp(logits[0]).sum()), abs=1e-6)
    with pytest.raises(ValueError, match="zero-shot rule 'softmax' is none of prompt_pair"):
        mmclip.load("tests.own_models:Pair", rule="softmax")
    alike = mmclip.load("tests.own_models:Pair", rule="similarity").classify(
        image, ["edema"], "pair"
    )
    assert alike.probabilities[0, 0] == pytest.approx(float(logits[0, 0]), abs=1e-6)


def of_bert(folder: Path) -> None:
    save_dual_encoder(folder)
    BertModel(BertConfig(**SMALL, vocab_size=99)).save_pretrained(folder)


def of_vit(folder: Path) -> None:
    save_dual_encoder(folder)
    ViTModel(ViTConfig(**VISION)).save_pretrained(folder)


def without(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save_clip(folder)
        for name in names:
            (folder / name).unlink()

    return make


def of_half_weights(folder: Path) -> None:
    save_clip(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "text" not in k}, folder / "model.safetensors",
        {"format": "pt"},
    )  # fmt: skip


def of_other_size(folder: Path) -> None:
    save_clip(folder, size=40, crop=40)


def of_other_shapes(folder: Path) -> None:
    save_clip(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "projection_dim": 77}))


def of_no_numbers(folder: Path) -> None:
    save_clip(folder)
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_weights(content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save_clip(folder)
        (folder / "model.safetensors").write_bytes(content)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_bert, "a 'bert' model, a text encoder without an image encoder; give a CLIPModel"),
        (of_vit, "a 'vit' model, an image encoder without a text encoder; give a CLIPModel"),
        (without("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer that can be read"),
        (without("processor_config.json"), "holds no image processor that can be read"),
        (without("model.safetensors"), "cannot load the weights of"),
        (of_half_weights, "of the parameters of CLIPModel"),
        (of_other_size, "cannot read an image or a text as its own image processor"),
        (of_other_shapes, "(its weights have other shapes than its config.json says)"),
        (of_no_numbers, "gives embeddings that are not finite: its weights hold NaN"),
        (
            of_weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
            "(model.safetensors is a pointer of Git LFS (see `git lfs pull`))",
        ),
        (of_weights(b"<!doctype html><p>404"), "(model.safetensors is a web page (HTML))"),
        (of_weights(b""), "(model.safetensors is empty)"),
        (of_weights(b"\x08\0\0\0\0\0\0\0{}"), "(damaged or cut off: "),
    ],
    ids=[
        "text alone",
        "image alone",
        "no tokenizer",
        "no processor",
        "no weights",
        "half",
        "size",
        "shapes",
        "NaN",
        "LFS",
        "HTML",
        "empty",
        "cut",
    ],
)
def test_a_folder_that_is_no_whole_dual_encoder_is_told_in_a_line(
    make: Callable[[Path], None], message: str, tmp_path: Path
):
    make(tmp_path / "model")
    with pytest.raises(EncoderError, match=re.escape(message)) as caught:
        mmclip.load(tmp_path / "model", device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"config.json": "{"}, "its config.json cannot be read"),
        ({"config.json": '{"architecture": "resnet50"}'}, "names no model_type"),
        ({"config.json": "[]"}, "names no model_type"),
        ({"open_clip_config.json": "{}"}, r"it is of open_clip.*docs/models\.md"),
        ({"image_encoder.onnx": "x", "config.json": "{}"}, "an export for onnxruntime; give its"),
        ({"adapter_config.json": "{}"}, "an adapter of PEFT; merge it"),
        ({"snapshots/abc/config.json": "{}"}, "the hub's cache of a model; give the model's id"),
    ],
)
def test_a_folder_of_other_tools_is_told_as_what_it_is(
    names: dict[str, str], said: str, tmp_path: Path
):
    for name, content in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"holds no finished checkpoint: .*{said}"):
        mmclip.load(tmp_path)


def test_a_function_of_a_file_is_told_how_modules_are_named():
    with pytest.raises(CheckpointError, match=r"a\.b:function for a/b\.py"):
        mmclip.load("tests/own_models.py:Pair")


def test_a_tokenizer_of_another_model_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_clip(tmp_path / "model")
    mmclip.load(tmp_path / "model", device="cpu")
    assert not caplog.messages
    save_dual_encoder(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "model" / name)
    mmclip.load(tmp_path / "model", device="cpu")
    assert "if it is of another model, texts are read as other words" in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "it is gated: accept the terms at https://huggingface.co/a/gated"),
        (RepositoryNotFoundError, "not found: there is no such folder, and no such model"),
        (OSError, "not found, no network: it is no folder here"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_told_with_the_next_step(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise error.__new__(error, "refused")

    monkeypatch.setattr("mmclip.hub.get_hf_file_metadata", refuse)
    with pytest.raises(EncoderError, match=re.escape(message)) as caught:
        mmclip.load("a/gated")
    assert ("HF_TOKEN" in str(caught.value)) == (error is not OSError)


def test_a_mistyped_path_of_a_run_is_no_id_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="runs/frist holds no finished checkpoint"):
        mmclip.load("runs/frist")


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        ("mimic-cxr", None),
        ("mimic-cxr,CheXpert", "chexpert (chexpert)"),
        ("chexpert_plus", "chexpert (chexpert-plus)"),
        ("chexpert:train", None),
        ("chexpert:test", "chexpert (chexpert:test)"),
    ],
)
def test_training_that_is_named_is_recorded_and_spoils_its_images(
    names: str, refused: str | None, models: dict[str, Path], chexpert: Path
):
    request = ModelRequest(str(models["clip"]), trained_on=(names,))
    encoder = open_dual_encoder(request)
    dataset = encoder.open_data([chexpert])
    if refused is None:
        said = encoder.check_unseen(dataset, "test")
        assert "by name alone" in said and encoder.facts()["trained on"] == names.lower()
    else:
        with pytest.raises(ManifestError, match=re.escape(refused)):
            encoder.check_unseen(dataset, "test")
        said = encoder.check_unseen(dataset, "train")  # says so alone
        assert ("split train" in said) == (":" not in names)


def test_images_of_one_data_set_in_another_are_known(caplog: pytest.LogCaptureFixture):
    rsna = [Sample(image_id="a", study_id="a", patient_id="a", source="rsna")]
    with pytest.raises(ManifestError, match=re.escape("rsna (chestxray14:train)")):
        trained_on(["chestxray14:train"]).check_unseen("m", rsna, "test")
    assert not caplog.text
    trained_on(["our-hospital"])
    assert "our-hospital is no data set that is known here" in caplog.text
    with pytest.raises(ValueError, match="names split 'dev', which is none of"):
        trained_on(["chexpert:dev"])


def test_copies_of_a_data_folder_stand_in_for_files_that_moved(
    models: dict[str, Path], chexpert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    data, meta = chexpert, {**read_meta(chexpert), "root": str(tmp_path / "gone")}
    monkeypatch.setattr("mmclip.data.original_images.read_meta", lambda folder: meta)
    encoder = open_dual_encoder(ModelRequest(str(models["siglip"])))
    dataset = encoder.open_data([data])
    assert "reads the copies in" in caplog.text and "enlarged" not in caplog.text
    row = next(i for i, sample in enumerate(dataset.samples) if sample.image)
    pixels = dataset.pixels(np.array([row]))[0].numpy()
    np.testing.assert_array_equal(dataset.image(row), pixels)
    again = encoder.open_data([data], [chexpert.parent / "raw"])
    assert isinstance(again.image(row), Path)
    raw = shutil.copytree(chexpert.parent / "raw", tmp_path / "raw")
    changed = encoder.open_data([data], [raw])
    (raw / str(changed.samples[row].image)).write_bytes(b"other")
    with pytest.raises(ManifestError, match="was changed since the data folder was built"):
        changed.image(row)


def test_a_deep_image_is_scaled_and_a_colour_image_keeps_its_colours(tmp_path: Path):
    deep = np.linspace(0, 4000, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = np.asarray(read_rgb(tmp_path / "deep.png"))
    assert found.shape == (8, 8, 3) and found.min() == 0 and found.max() == 255
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "colour.png"), colour)
    np.testing.assert_array_equal(read_rgb(colour), colour)


def test_siglip_2_that_keeps_the_aspect_is_read_by_its_own_processor(
    chexpert: Path, tmp_path: Path
):
    hand = ByHand(save_siglip2(tmp_path / "model"))
    files = sorted((chexpert.parent / "raw").rglob("*.jpg"))[:3]
    model = mmclip.load(tmp_path / "model", device="cpu")
    expected = torch.stack([hand.embed_image(file) for file in files]).numpy()
    np.testing.assert_allclose(model.encode_images(files), expected, atol=1e-6)
    assert model.zeroshot_rule == "sigmoid"


def test_scores_of_predict_are_those_of_zeroshot(
    models: dict[str, Path], chexpert: Path, tmp_path: Path
):
    given = ("--model", models["siglip"], "--cpu")
    ended = run_mmclip(
        tmp_path, "zeroshot", *given, "--data", chexpert, "--finding", "atelectasis", "--out",
        tmp_path / "out", "--n-resamples", "5",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    scores = load_scores(tmp_path / "out" / "scores.npz")
    image_of = {sample.image_id: str(sample.image) for sample in read_manifest(chexpert)}
    raw = chexpert.parent / "raw"
    files = [raw / image_of[str(image_id)] for image_id in scores.image_id]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no more")
    ended = run_mmclip(
        tmp_path, "predict", *given, *files, broken, "--finding", "atelectasis", "--thresholds",
        tmp_path / "out", "--out", tmp_path / "p.csv",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    lines = (tmp_path / "p.csv").read_text("utf-8").splitlines()[1:]
    np.testing.assert_array_equal(
        [float(line.split(",")[1]) for line in lines], scores.scores[:, 0]
    )
    assert "broken.png" in (tmp_path / "p.skipped.csv").read_text("utf-8")
    other = run_mmclip(
        tmp_path, "predict", *given, files[0], "--finding", "atelectasis", "--rule", "similarity",
        "--thresholds", tmp_path / "out", "--out", tmp_path / "q.csv",
    )  # fmt: skip
    assert "they are of another model, run or step" in other.error()


def test_retrieval_by_a_model_of_others_is_cosines_by_hand(
    models: dict[str, Path], made_data: Path, made_raw: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = ModelRequest(str(models["clip"]))
    found = search(SearchRequest(asked, (made_data,), phrase="pleural effusion", top=3))
    hand = ByHand(models["clip"])
    text = hand.embed_text("pleural effusion")
    for one in found.found:
        file = made_raw / str(found.dataset.samples[one.row].image)
        assert one.similarity == pytest.approx(float(hand.embed_image(file) @ text), abs=1e-6)
    assert list((tmp_path / "cache" / "mmclip" / "embeddings").glob("*/images-*.npy"))
    assert not list(models["clip"].glob("*.npy"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_map_is_of_patches_pooled_and_projected_alone(family: str, models: dict[str, Path]):
    encoder = open_dual_encoder(ModelRequest(str(models[family])))
    grey = np.random.default_rng(1).integers(0, 256, (40, 60), dtype=np.uint8)
    found = explain_image(encoder, grey, "edema", "contribution", load_prompts("default"))
    assert found.patches.shape == (4, 4)
    hand, prepared = ByHand(models[family]), encoder.prepare(grey)
    with torch.inference_mode():
        vision = hand.model.vision_model
        hidden = vision(pixel_values=torch.from_numpy(prepared["pixel_values"])[None])[0]
        patch = hidden[:, -16 + 5 : -16 + 6]  # second row, second column
        if family == "clip":
            alone = hand.model.visual_projection(vision.post_layernorm(patch[:, 0]))
        elif family == "siglip":
            alone = vision.head(patch)
        else:
            alone = hand.model.visual_projection(vision.pooler(patch))
    text = hand.embed_text("edema")
    expected = float(torch.nn.functional.normalize(alone, dim=-1)[0] @ text)
    assert found.patches[1, 1] == pytest.approx(expected, abs=1e-6)
    # The processor of CLIP crops the middle square; those of the others squash the whole image.
    seen = ~np.isnan(found.saliency)
    assert seen.all() == (family != "clip")
    if family == "clip":
        assert seen[:, 10:50].all() and not seen[:, :10].any() and not seen[:, 50:].any()
    with pytest.raises(ValueError, match=r"text decoder of a run, and .* has none"):
        explain_image(encoder, grey, "edema", "decoder_attention", load_prompts("default"))


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 64 x 48 px with one bright place each, a data folder, and MS-CXR's boxes."""
    root, rng = tmp_path_factory.mktemp("boxed"), np.random.default_rng(3)
    samples, lines = [], []
    for i in range(48):
        pixels = rng.integers(60, 120, (64, 48), dtype=np.uint8)
        x, y = int(rng.integers(0, 4)) * 12, int(rng.integers(0, 4)) * 16
        pixels[y : y + 16, x : x + 12] = 240
        Image.fromarray(pixels).save(root / f"{i}.png")
        samples.append(Sample(
            image_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i}", source="synthetic", view="PA",
            split="train" if i < 12 else "val" if i < 24 else "test", image=f"{i}.png",
        ))  # fmt: skip
        finding = "Edema" if i % 2 else "Pneumothorax"
        lines.append((f"f{i}", finding, f"there is {finding.lower()}", x, y, 12, 16))
    build_data(samples, root, root / "data", image_size=32)
    write_boxes(root, lines)
    return root


@pytest.mark.parametrize(
    ("family", "score"),
    [
        ("clip", "contribution"),
        ("siglip", "prompt_pair"),
        pytest.param("siglip", "contribution", marks=pytest.mark.slow),
        pytest.param("vision-text-dual-encoder", "contribution", marks=pytest.mark.slow),
    ],
)
def test_maps_of_others_are_measured_as_they_are_drawn(
    family: str, score: str, models: dict[str, Path], boxed: Path, tmp_path: Path
):
    out = tmp_path / "a.json"
    given = ["explain", "--model", models[family], "--data", boxed / "data", "--evaluate"]
    given += ["--boxes", f"ms-cxr={boxed}", "--score", score, "--n-resamples", "20", "--cpu"]
    ended = run_mmclip(tmp_path, *given, "--out", out)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["model"] == str(models[family]) and found["n_images"] == 24
    assert found["leak_check"].startswith("not made: what ")
    assert {"random weights", "brightest patch", "location prior"} <= {*found["saliency_maps"]}
    assert found["saliency_maps"]["brightest patch"]["hit"]["macro"]["mean"] > 0.3
    # By the maps that are drawn.
    model = mmclip.load(models[family], device="cpu")
    hits: dict[str, list[float]] = {"edema": [], "pneumothorax": []}
    with (boxed / "MS_CXR_Local_Alignment_v1.1.0.csv").open() as file:
        for row in list(csv.DictReader(file))[24:]:
            x, y = int(row["x"]), int(row["y"])
            values = model.explain(boxed / f"{row['dicom_id'][1:]}.png", row["label_text"], score)
            is_top = values.values == np.nanmax(values.values)
            inside = np.zeros_like(is_top)
            inside[y : y + 16, x : x + 12] = True
            hits[row["category_name"].lower()].append((is_top & inside).sum() / is_top.sum())
    for finding, each in hits.items():
        measured = found["saliency_maps"]["model"]["hit"]["findings"][finding]["mean"]
        assert measured == pytest.approx(np.mean(each), abs=1e-5)


def test_maps_beside_predictions_are_of_the_files(
    models: dict[str, Path], boxed: Path, tmp_path: Path
):
    given = ["predict", "--model", models["clip"], "--finding", "edema", "--cpu"]
    samples = [s for s in read_manifest(boxed / "data") if s.image_id in ("f3", "f4")]
    build_data(samples, boxed, tmp_path / "few", image_size=32)
    for name, inputs in (("files", boxed / "3.png"), ("data", tmp_path / "few")):
        ended = run_mmclip(
            tmp_path,
            *given,
            inputs,
            "--explain",
            tmp_path / name,
            "--out",
            tmp_path / f"{name}.csv",
        )
        assert ended.code == 0, ended.err
    (of_file,) = (tmp_path / "files").glob("*.npz")
    (of_data,) = (tmp_path / "data").glob("*-f3-*.npz")
    with np.load(of_file) as one, np.load(of_data) as other:
        assert one["saliency"].shape == (64, 48)
        np.testing.assert_array_equal(one["saliency"], other["saliency"])


def test_maps_of_others_are_not_laid_over_copies(
    models: dict[str, Path], boxed: Path, tmp_path: Path
):
    (tmp_path / "raw").mkdir()
    for file in boxed.glob("*.png"):
        shutil.copy(file, tmp_path / "raw")
    samples = [replace(sample, report=None) for sample in read_manifest(boxed / "data")]
    build_data(samples, tmp_path / "raw", tmp_path / "data", image_size=32)
    moved = (tmp_path / "raw").rename(tmp_path / "moved")
    given = ["explain", "--model", models["clip"], "--data", tmp_path / "data", "--cpu"]
    evaluate = [*given, "--evaluate", "--boxes", f"ms-cxr={boxed}", "--n-resamples", "5"]
    one = [*given, "--image-id", "f40", "--phrase", "edema"]
    for command, name in ((evaluate, "a.json"), (one, "a.png")):
        refused = run_mmclip(tmp_path, *command, "--out", tmp_path / name).error()
        assert "is not where it was" in refused and "--root" in refused
        ended = run_mmclip(tmp_path, *command, "--root", moved, "--out", tmp_path / name)
        assert ended.code == 0, ended.err


def test_models_without_patches_on_the_image_give_no_maps(boxed: Path, tmp_path: Path):
    grey = np.random.default_rng(1).integers(0, 256, (40, 60), dtype=np.uint8)
    save_siglip2(tmp_path / "naflex")
    save_clip(tmp_path / "cut", size=40, crop=32)
    for source, message in {
        "tests.own_models:Pair": "Pair gives no saliency maps: it returns one embedding",
        str(tmp_path / "naflex"): "Siglip2Model naflex gives no saliency maps",
        str(tmp_path / "cut"): "neither scales to a square nor crops the middle",
    }.items():
        model = mmclip.load(source, device="cpu")
        with pytest.raises(ValueError, match=re.escape(message)):
            model.explain(grey, "edema")
        given = ["--data", boxed / "data", "--evaluate", "--boxes", f"ms-cxr={boxed}", "--cpu"]
        out = tmp_path / "a.json"
        ended = run_mmclip(tmp_path, "explain", "--model", source, *given, "--out", out)
        assert message in ended.error()


def test_a_probe_on_a_model_of_others_reads_its_embeddings(
    models: dict[str, Path], made_data: Path, made_raw: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = ["finetune", "--model", models["clip"], "--data", made_data, "--finding", "mass"]
    given += ["--fraction", "1", "--seed", "0", "--n-resamples", "5", "--cpu"]
    ended = run_mmclip(tmp_path, *given, "--out", tmp_path / "ft")
    assert ended.code == 0, ended.err
    folder = tmp_path / "ft" / "probe-100-0"
    results, scores = read_results(folder), load_scores(folder / "scores.npz")
    assert results.leak_check.startswith("not made: what CLIPModel clip was trained on")
    assert results.facts["features"] == "embedding" and results.facts["images read"] == "files"
    # By hand: the regression of the result on embeddings of transformers.
    tuned = mmclip.load(folder, device="cpu")
    image_of = {sample.image_id: str(sample.image) for sample in read_manifest(made_data)}
    files = [made_raw / image_of[str(image_id)] for image_id in scores.image_id[:4]]
    np.testing.assert_allclose(tuned.classify(files).probabilities, scores.scores[:4], atol=1e-6)
    hand = ByHand(models["clip"])
    fit = tuned._model.model.fit()  # pyright: ignore[reportPrivateUsage]
    embedded = torch.stack([hand.embed_image(file) for file in files]).numpy()
    np.testing.assert_allclose(fit.scores(embedded), scores.scores[:4], atol=1e-5)


PLAINLY = (
    "train.steps=3", "train.batch_size=16", "train.save_every_steps=3", "train.base_lr=0.02",
    "train.weight_decay=0", "train.warmup_ratio=0", "train.final_lr_ratio=1", "train.clip_norm=1e9",
    "head=zeros", "lr_decay=1", "max_positive_weight=1", "augment.rotation_deg=0",
    "augment.translate_ratio=0", "augment.scale_ratio=0", "augment.brightness=0",
    "augment.contrast=0",
)  # fmt: skip
"""Fine-tuning without what a loop in ten lines does not have."""


@pytest.mark.parametrize("family", SOME_SLOW)
def test_full_fine_tuning_is_a_loop_of_transformers(
    family: str, models: dict[str, Path], made_data: Path, made_raw: Path, tmp_path: Path
):
    given = ["finetune", "--model", models[family], "--data", made_data, "--finding", "mass"]
    given += ["--method", "full", "--fraction", "1", "--seed", "0", "--n-resamples", "5", "--cpu"]
    given += [part for setting in PLAINLY for part in ("--set", setting)]
    ended = run_mmclip(tmp_path, *given, "--out", tmp_path / "ft")
    assert ended.code == 0, ended.err
    folder = tmp_path / "ft" / "full-100-0"
    results, scores = read_results(folder), load_scores(folder / "scores.npz")
    assert results.leak_check.startswith("not made: what ")
    assert results.facts["features"] == "pooled" and results.facts["images read"] == "files"
    # By hand.
    hand = ByHand(models[family])
    task = task_of(made_data, own_protocol(made_data, ["mass"], []), open_dataset([made_data]))
    rows, labels = task.train.dataset.samples, torch.from_numpy(task.train.labels).float()
    pixels = torch.cat(
        [hand.pixel_values(made_raw / str(row.image))["pixel_values"] for row in rows]
    )
    vision, head = hand.model.vision_model.train(), torch.nn.Linear(32, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    learns = [*vision.parameters(), *head.parameters()]
    lr = 0.02 * 16 / 256
    optimizer = torch.optim.AdamW(learns, lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0)
    keys = np.array([image_key(row.image_id) for row in rows], np.uint64)
    schedule = Schedule(keys, 16, seed=0)
    for step in range(3):
        batch, _ = schedule.rows(step)
        logits = head(vision(pixel_values=pixels[batch]).pooler_output)
        loss = binary_cross_entropy_with_logits(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image_of = {row.image_id: made_raw / str(row.image) for row in read_manifest(made_data)}
    files = [image_of[str(image_id)] for image_id in scores.image_id]
    with torch.inference_mode():
        seen = torch.cat([hand.pixel_values(file)["pixel_values"] for file in files])
        expected = head(vision.eval()(pixel_values=seen).pooler_output).sigmoid().numpy()
    assert expected.std() > 1e-3
    np.testing.assert_allclose(scores.scores, expected, atol=1e-4)
    tuned = mmclip.load(folder, device="cpu")
    np.testing.assert_allclose(tuned.classify(files).probabilities, scores.scores, atol=1e-6)
    table = tmp_path / "p.csv"
    ended = run_mmclip(tmp_path, "predict", "--model", folder, made_data, "--cpu", "--out", table)
    assert ended.code == 0, ended.err
    predicted = {line.split(",")[0]: line.split(",")[-1] for line in table.read_text().split()[1:]}
    assert all(str(p) in predicted.values() for p in tuned.classify(files[:3]).probabilities[:, 0])


def test_full_fine_tuning_of_a_model_that_gives_no_square_or_no_weights_is_refused(
    made_data: Path, tmp_path: Path
):
    save_siglip2(tmp_path / "naflex")
    given = ["finetune", "--data", made_data, "--finding", "mass", "--method", "full", "--cpu"]
    for source, message in {
        "tests.own_models:Pair": "Pair is a function of yours, which gives embeddings alone",
        str(tmp_path / "naflex"): "gives patches of [16, 192]; take --method probe",
    }.items():
        ended = run_mmclip(tmp_path, *given, "--model", source, "--out", tmp_path / "ft")
        assert message in ended.error()
