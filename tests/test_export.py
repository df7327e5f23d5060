"""`mmclip export`: what transformers and onnxruntime make of it equals what the run makes."""

import json
import re
import resource
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    VisionTextDualEncoderModel,
    pipeline,
)

import mmclip as package
from mmclip.checkpoint import save_checkpoint
from mmclip.data.image_text_dataset import normalise
from mmclip.data.text import train_tokenizer
from mmclip.export.export import ExportError, ExportRequest, export
from mmclip.files import LockedError, locked_file
from mmclip.models.layout import EncoderError
from mmclip.run import Run, open_run
from mmclip.training.pretrain import build_model
from tests.commands import fork, mmclip, run_command
from tests.made import REPORTS
from tests.made import small_config as config_of

VIT = ("--set", "model.image.kind=vit", "--set", "train.steps=4")


@pytest.fixture(scope="module")
def vit_run(made_data: Path, small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a ViT and a BERT, which transformers' class can hold."""
    folder = tmp_path_factory.mktemp("vit")
    run = folder / "run"
    given = ("pretrain", "--data", made_data, "--config", small_config, *VIT, "--out", run)
    ended = mmclip(folder, *given)
    assert ended.code == 0, ended.err
    return run


@pytest.fixture(scope="module")
def hf(vit_run: Path) -> Path:
    """Its export for the hub."""
    out = vit_run.parent / "hf"
    ended = mmclip(vit_run.parent, "export", vit_run, "--to", "hf", "--out", out)
    assert (ended.code, ended.out) == (0, f"{out}\n"), ended.err
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A grey image that is not square, one of the model's size, and one kept as RGB."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for name, shape, mode in (("grey", (90, 70), "L"), ("small", (32, 32), "L"),
                              ("rgb", (60, 80), "RGB")):  # fmt: skip
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(mode)
        paths.append(folder / f"{name}.png")
        image.save(paths[-1])
    return paths


def ours_of(run: Path, images: list[Path], texts: list[str]) -> tuple[Tensor, Tensor, float]:
    """Embeddings and scale of a run, by Python."""
    model = package.load(run, device="cpu")
    scale = open_run(run).model.scale().item()
    image = torch.from_numpy(np.asarray(model.encode_images(images)))
    return image, torch.from_numpy(np.asarray(model.encode_texts(texts))), scale


def close(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@torch.no_grad()
def test_transformers_gives_the_same_embeddings_for_the_same_pixels(vit_run: Path, hf: Path):
    run: Run = open_run(vit_run)
    theirs = VisionTextDualEncoderModel.from_pretrained(hf)
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    ours = run.model.encode_image(normalise(pixels)).embedding
    rgb = normalise(pixels).expand(-1, 3, -1, -1)  # mean and deviation are those of one channel
    tokens = AutoTokenizer.from_pretrained(hf)(REPORTS, padding=True, return_tensors="pt")
    found = theirs(**tokens, pixel_values=rgb)
    close(found.image_embeds, ours, 1e-5)
    words = run.model.encode_text(tokens.input_ids, tokens.attention_mask.bool()).embedding
    close(found.text_embeds, words, 1e-5)
    close(theirs.logit_scale.exp(), run.model.scale(), 1e-5)


@torch.no_grad()
def test_transformers_gives_the_same_embeddings_for_the_same_files(
    vit_run: Path, hf: Path, pictures: list[Path]
):
    ours, words, scale = ours_of(vit_run, pictures, REPORTS)
    theirs = VisionTextDualEncoderModel.from_pretrained(hf)
    processor, tokenizer = (
        AutoImageProcessor.from_pretrained(hf),
        AutoTokenizer.from_pretrained(hf),
    )
    pixels = processor([Image.open(path).convert("RGB") for path in pictures], return_tensors="pt")
    found = theirs(**tokenizer(REPORTS, padding=True, return_tensors="pt"), **pixels)
    close(found.image_embeds, ours, 1e-3)
    close(found.logits_per_image, scale * ours @ words.T, 1e-2)


def test_an_export_comes_back_by_load_with_the_same_embeddings_and_rule(
    vit_run: Path, hf: Path, pictures: list[Path]
):
    run, back = package.load(vit_run, device="cpu"), package.load(hf, device="cpu")
    np.testing.assert_allclose(back.encode_texts(REPORTS), run.encode_texts(REPORTS), atol=1e-5)
    np.testing.assert_allclose(back.encode_images(pictures), run.encode_images(pictures), atol=1e-3)
    assert back.logit_scale == pytest.approx(run.logit_scale, rel=1e-5)
    assert back.zeroshot_rule == run.zeroshot_rule == "prompt_pair"
    assert np.isfinite(back.explain(pictures[0], "effusion").values).all()


@pytest.mark.parametrize("change", ["weights", "tokenizer", "processor", "gone", "added", "facts"])
def test_an_export_that_was_changed_is_refused(hf: Path, tmp_path: Path, change: str):
    folder = tmp_path / "export"
    shutil.copytree(hf, folder)
    weights = folder / "model.safetensors"
    if change == "weights":
        whole = bytearray(weights.read_bytes())
        whole[-1] ^= 1  # the size stays
        weights.write_bytes(whole)
    elif change == "tokenizer":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    elif change == "processor":
        (folder / "preprocessor_config.json").unlink()
    elif change == "gone":
        weights.unlink()
    elif change == "added":
        (folder / "added_tokens.json").write_text("{}")
    else:
        facts = json.loads((folder / "mmclip.json").read_text())
        (folder / "mmclip.json").write_text(json.dumps({**facts, "form": "vision"}))
    with pytest.raises(EncoderError, match=r"export the run again|remove it"):
        package.load(folder, device="cpu")


def test_the_card_of_an_export_is_for_its_reader_to_fill_in(hf: Path, tmp_path: Path):
    folder = tmp_path / "export"
    shutil.copytree(hf, folder)
    (folder / "README.md").write_text("# Ours\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert package.load(folder, device="cpu").logit_scale > 0
    assert VisionTextDualEncoderModel.from_pretrained(folder)


@torch.no_grad()
def test_a_colour_image_is_read_as_its_luminance(vit_run: Path, hf: Path):
    colour = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(hf)(colour, return_tensors="pt").pixel_values
    theirs = VisionTextDualEncoderModel.from_pretrained(hf).get_image_features(pixels)
    shares = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey = (pixels * shares).sum(1, keepdim=True)
    ours = open_run(vit_run).model.encode_image(grey).embedding
    close(torch.nn.functional.normalize(theirs.pooler_output, dim=-1), ours, 1e-4)


def test_the_pipeline_classifies_with_scale_times_our_similarity(
    vit_run: Path, hf: Path, pictures: list[Path]
):
    texts = ["Large pleural effusion.", "No pleural effusion."]
    ours, words, scale = ours_of(vit_run, pictures[:1], texts)
    classify = pipeline("zero-shot-image-classification", model=str(hf))
    said = classify(str(pictures[0]), candidate_labels=texts, hypothesis_template="{}")
    want = (scale * ours @ words.T).softmax(1)[0]
    for text, value in zip(texts, want, strict=True):
        (row,) = (row for row in said if row["label"] == text)
        assert row["score"] == pytest.approx(value.item(), abs=1e-4)


def test_load_gives_the_embeddings_and_scores_of_the_run(
    vit_run: Path, hf: Path, pictures: list[Path]
):
    ours, words, scale = ours_of(vit_run, pictures, REPORTS)
    again = package.load(hf, device="cpu")
    close(torch.from_numpy(np.asarray(again.encode_images(pictures))), ours, 1e-4)
    close(torch.from_numpy(np.asarray(again.encode_texts(REPORTS))), words, 1e-5)
    assert again.logit_scale == pytest.approx(scale, rel=1e-5)
    run, findings = package.load(vit_run, device="cpu"), ["pleural effusion", "mass"]
    want = run.classify(pictures, findings).probabilities
    np.testing.assert_allclose(again.classify(pictures, findings).probabilities, want, atol=1e-3)


def test_the_folder_holds_nothing_of_ours_or_of_this_machine(hf: Path):
    files = {path.name for path in hf.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    modes = {path.stat().st_mode for path in hf.iterdir()}
    assert len(modes) == 1  # the weights may be read by whoever may read the rest
    for path in hf.iterdir():
        content = path.read_bytes()
        for word in (b"/tmp", str(hf.parent.parent).encode(), b"mmclip_layout", b"patient_"):
            assert word not in content, (path.name, word)


# What stands in the model card


def code_of(folder: Path) -> str:
    """The Python of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.S)
    return code


def run_card(folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Runs a card's code as a reader would, in the export's folder beside an image."""
    monkeypatch.chdir(folder)
    (folder / "image.png").write_bytes(picture.read_bytes())
    names: dict = {}
    try:
        exec(compile(code_of(folder), "README.md", "exec"), names)
    finally:
        (folder / "image.png").unlink()
    return names


def exported(tmp_path: Path, run: Path, form: str, *more: str | Path) -> Path:
    out = tmp_path / "my-export"
    ended = mmclip(tmp_path, "export", run, "--to", form, "--out", out, *more)
    assert (ended.code, ended.out) == (0, f"{out}\n"), ended.err
    return out


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_card_of_each_encoder_gives_our_embeddings(
    kind: str,
    made_run: Path,
    vit_run: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    run = made_run if kind == "resnet" else vit_run
    ours, words, _ = ours_of(run, pictures[:1], ["No acute disease."])
    for form, want in (("vision", ours), ("text", words)):
        out = exported(tmp_path / form, run, form)
        close(run_card(out, pictures[0], monkeypatch)["embedding"], want, 1e-4)
        assert "AutoModel" in code_of(out)


def test_the_card_of_the_graphs_gives_our_probabilities(
    made_run: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("onnxscript", reason="needs pip install 'mmclip[onnx]'")
    out = exported(tmp_path, made_run, "onnx")  # of a ResNet, as the demo's
    names = run_card(out, pictures[0], monkeypatch)
    texts = ["Pleural effusion.", "No pleural effusion."]
    ours, words, scale = ours_of(made_run, pictures[:1], texts)
    close(torch.from_numpy(names["image_embeds"]), ours, 1e-4)
    close(torch.from_numpy(names["text_embeds"]), words, 1e-4)
    want = (scale * ours @ words.T).softmax(1)[0, 0].item()
    assert names["present"][0] == pytest.approx(want, abs=1e-4)
    many = np.repeat(names["pixels"], 5, 0)
    assert names["images"].run(None, {"pixel_values": many})[0].shape == (5, 16)
    assert not (out / "model.safetensors").exists()
    files = {path.name for path in out.iterdir()}
    assert {"image_encoder.onnx", "text_encoder.onnx", "tokenizer.json", "README.md"} <= files


def test_the_card_of_the_whole_runs(
    hf: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run_card(hf, pictures[0], monkeypatch)
    assert "No pleural effusion." in capsys.readouterr().out


def test_the_card_has_the_hubs_metadata_and_the_results(
    vit_run: Path, made_data: Path, tmp_path: Path
):
    scored = mmclip(
        tmp_path, "zeroshot", "--model", vit_run, "--data", made_data, "--n-resamples", "5",
        "--split", "train", "--finding", "nodule", "--finding", "pleural effusion", "--out",
        tmp_path / "scores",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    given = ("--results", tmp_path / "scores", "--license", "cc-by-4.0")
    out = exported(tmp_path, vit_run, "vision", *given)
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("cc-by-4.0", "transformers")
    assert data["pipeline_tag"] == "image-feature-extraction" and "chest-x-ray" in data["tags"]
    results = json.loads((tmp_path / "scores/results.json").read_text("utf-8"))
    metrics = {r.metric_name: r.metric_value for r in card.data.eval_results or ()}
    for row in results["findings"]:
        assert metrics[f"AUROC, {row['finding']}"] == round(row["auroc"], 4)
        assert f"| {row['finding']} | {row['auroc']:.3f} |" in card.text
    assert metrics["macro AUROC"] == round(results["macro_auroc"], 4)
    assert all(r.dataset_name == "own images" for r in card.data.eval_results or ())
    assert str(tmp_path) not in card.content and "# my-export" in card.text
    assert "These images trained the model" in card.text and "image-" not in card.text


def test_results_of_other_weights_are_refused(
    vit_run: Path, made_run: Path, made_results: Path, tmp_path: Path
):
    out = tmp_path / "out"
    given = ("export", vit_run, "--to", "vision", "--out", out, "--results", made_results)
    assert "results of other weights" in mmclip(tmp_path, *given).error()
    first = made_run / "checkpoints" / "step_000004"
    given = ("export", first, "--to", "vision", "--out", out, "--results", made_results)
    assert "results of step 6" in mmclip(tmp_path, *given).error()
    assert not out.exists()


# What is refused, and what stays


def test_a_resnet_is_refused_by_name_for_the_hub(made_run: Path, tmp_path: Path):
    error = mmclip(tmp_path, "export", made_run, "--out", tmp_path / "out").error()
    assert "'resnet'" in error and "--to onnx" in error and "--to vision" in error
    assert not list(tmp_path.glob("out*"))


def untrained(folder: Path, *settings: str) -> Path:
    """A run of no steps, on the tokenizer of some reports."""
    config = config_of("data.max_tokens=24", *settings)
    tokenizer = train_tokenizer(REPORTS)
    model = build_model(config, tokenizer)
    facts = {"n_pairs": 4, "data_hash": "0" * 64, "shuffle_pairs": False}
    save_checkpoint(folder, 1, model, tokenizer, config, {}, facts, 1)
    return folder


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.text.pooling=mean", "pools the text encoder in another way"),
        pytest.param(
            "model.text.pooling=cls",
            "pools the text encoder in another way",
            marks=pytest.mark.slow,
        ),
        ("model.image.pooling=mean", "pools the image encoder in another way"),
        ("data.resize=pad", "data.resize='pad'"),
    ],
)
def test_what_the_class_cannot_express_is_refused(
    setting: str, words: str, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = untrained(tmp_path / "run", setting)
    error = mmclip(tmp_path, "export", run, "--out", tmp_path / "out").error()
    assert words in error and "--to onnx" in error and "--to vision" in error
    ours, texts, _ = ours_of(run, pictures[1:2], ["No acute disease."])
    for form, want in (("vision", ours), ("text", texts)):
        out = exported(tmp_path / form, run, form)
        close(run_card(out, pictures[1], monkeypatch)["embedding"], want, 1e-4)
        is_said = "Pad an image with black" in (out / "README.md").read_text("utf-8")
        assert is_said == ("pad" in setting and form == "vision")


def test_a_vit_that_pools_its_class_token_is_expressed(tmp_path: Path, pictures: list[Path]):
    run = untrained(tmp_path / "run", "model.image.pooling=cls")
    theirs = VisionTextDualEncoderModel.from_pretrained(exported(tmp_path, run, "hf"))
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "my-export")(
        [Image.open(path).convert("RGB") for path in pictures], return_tensors="pt"
    )
    with torch.no_grad():
        found = theirs.get_image_features(**pixels).pooler_output
    ours, _, _ = ours_of(run, pictures, ["normal"])
    close(torch.nn.functional.normalize(found, dim=-1), ours, 1e-4)


def test_cutting_out_the_middle_is_exported_to_rounding(tmp_path: Path, pictures: list[Path]):
    run = untrained(tmp_path / "run", "data.resize=crop")
    out = exported(tmp_path, run, "hf")
    theirs = VisionTextDualEncoderModel.from_pretrained(out)
    wide = tmp_path / "wide.png"
    Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (64, 1))).save(wide)
    pixels = AutoImageProcessor.from_pretrained(out)(
        Image.open(wide).convert("RGB"), return_tensors="pt"
    )
    with torch.no_grad():
        found = theirs.get_image_features(**pixels).pooler_output
    ours, _, _ = ours_of(run, [wide], ["normal"])
    close(torch.nn.functional.normalize(found, dim=-1), ours, 5e-3)
    assert "differs by rounding" in (out / "README.md").read_text("utf-8")


def test_an_export_that_is_there_is_replaced_by_overwrite_alone(vit_run: Path, tmp_path: Path):
    out = exported(tmp_path, vit_run, "text")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    given = ("export", vit_run, "--to", "vision", "--out", out)
    assert f"{out} is there; add --overwrite" in mmclip(tmp_path, *given).error()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    ended = mmclip(tmp_path, *given, "--overwrite")
    assert ended.code == 0, ended.err
    assert (out / "preprocessor_config.json").is_file() and not (out / "tokenizer.json").exists()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {out.name}


def test_what_a_killed_export_left_is_put_right_by_the_next(
    vit_run: Path, hf: Path, tmp_path: Path
):
    out = tmp_path / "export[1]"
    shutil.copytree(hf, tmp_path / "export[1].77.old.tmp")  # moved away, and killed
    (tmp_path / "export[1].77.tmp").mkdir()
    request = ExportRequest(vit_run, "vision", out)
    with pytest.raises(ExportError, match="is there; add --overwrite"):
        export(request)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    assert (out / "README.md").read_bytes() == (hf / "README.md").read_bytes()
    with locked_file(out), pytest.raises(LockedError, match="writes"):
        export(request)
    export(replace(request, overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_an_export_into_a_link_goes_where_the_link_leads(vit_run: Path, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk", target_is_directory=True)
    for _ in range(2):
        ended = mmclip(tmp_path, "export", vit_run, "--to", "vision", "--out", link, "--overwrite")
        assert ended.code == 0, ended.err
        assert link.is_symlink() and (tmp_path / "disk/config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["disk", "link"]


def test_overwrite_replaces_no_folder_of_something_else(vit_run: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.md").write_text("years of work", "utf-8")
    given = ("export", vit_run, "--out", tmp_path / "thesis", "--overwrite")
    assert "is no folder that `mmclip export` wrote" in mmclip(tmp_path, *given).error()
    assert (tmp_path / "thesis" / "chapter.md").read_text("utf-8") == "years of work"


def test_a_full_disk_leaves_what_was_there(vit_run: Path, tmp_path: Path):
    out = exported(tmp_path, vit_run, "vision")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a larger file is an OSError
    try:
        with pytest.raises(OSError, match=r"cannot be written .*as it was"):
            export(ExportRequest(vit_run, "vision", out, overwrite=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_fine_tuned_result_and_a_folder_that_is_no_run_are_told_of(
    vit_run: Path, made_data: Path, tmp_path: Path
):
    tuned = mmclip(
        tmp_path, "finetune", "--model", vit_run, "--data", made_data, "--finding", "mass",
        "--fraction", "1", "--seed", "0", "--n-resamples", "5", "--out", tmp_path / "ft",
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    (result,) = (path.parent.parent.parent for path in tmp_path.rglob("ft/**/meta.json"))
    given = ("--to", "vision", "--out", tmp_path / "out")
    assert "is a fine-tuned classifier" in mmclip(tmp_path, "export", result, *given).error()
    for wrong in (made_data, tmp_path / "missing"):
        assert "holds no finished checkpoint" in mmclip(tmp_path, "export", wrong, *given).error()
    assert "none of hf, onnx" in mmclip(
        tmp_path, "export", vit_run, "--to", "tflite", "--out", tmp_path / "out"
    ).error()  # fmt: skip


def test_the_extra_for_graphs_is_named_where_it_is_missing(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mmclip.export.graphs.NEEDS", ("onnx_that_is_not_there",))
    with pytest.raises(ValueError, match=r"onnx_that_is_not_there.*pip install 'mmclip\[onnx\]'"):
        export(ExportRequest(vit_run, "onnx", tmp_path / "out"))


# The hub, by a stand-in that speaks its protocol


class Hub(BaseHTTPRequestHandler):
    """Takes what `huggingface_hub` sends for a new repository with small files."""

    def do_POST(self) -> None:
        """Answers a call, and keeps it."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        said: dict = {}
        if self.path == "/api/repos/create":
            address = f"http://{self.headers['host']}/me/chest"
            said = {"url": address, "id": "me/chest", "name": "me/chest"}
        elif self.path == "/api/validate-yaml":
            said = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            said = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                              for f in files]}  # fmt: skip
        elif "/commit/" in self.path:
            address = f"http://{self.headers['host']}/me/chest/commit/{'1' * 40}"
            said = {"commitUrl": address, "commitOid": "1" * 40}
        self.keep(body)
        self.answer(said)

    def do_GET(self) -> None:
        """Answers with an empty repository."""
        self.keep(b"")
        self.answer({"id": "me/chest", "sha": "0" * 40, "siblings": [], "private": True})

    def keep(self, body: bytes) -> None:
        """Remembers a call."""
        calls: list = vars(self.server)["calls"]
        calls.append((self.path, self.headers.get("authorization"), body))

    def answer(self, said: dict) -> None:
        """Sends JSON."""
        content = json.dumps(said).encode()
        self.send_response(403 if vars(self.server).get("refuses") else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    vars(server)["calls"] = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run_with_hub(address: str, words: list[str]) -> None:
    """What a process does that has started with HF_ENDPOINT=address."""
    constants.ENDPOINT = address
    run_command(words)


def test_an_export_goes_to_the_hub_as_the_library_sends_it(
    vit_run: Path, tmp_path: Path, hub: ThreadingHTTPServer
):
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    words = ["export", vit_run, "--to", "vision", "--out", tmp_path / "out"]
    words = [*map(str, words), "--push-to-hub", "me/chest"]
    with_token = {"HF_TOKEN": "hf_secret"}
    ended = fork(tmp_path / "log", run_with_hub, address, words, environment=with_token).wait()
    assert ended.code == 0, ended.err
    assert f"uploaded to {address}/me/chest" in ended.err
    calls = vars(hub)["calls"]
    assert all(token == "Bearer hf_secret" for path, token, _ in calls if "validate" not in path)
    made = json.loads(next(body for path, _, body in calls if path == "/api/repos/create"))
    assert made["name"] == "chest" and "private" in (made.get("visibility"), *made)
    (sent,) = (body for path, _, body in calls if "/commit/" in path)
    files = {json.loads(line)["value"].get("path") for line in sent.splitlines()}
    assert files >= {path.name for path in (tmp_path / "out").iterdir()}
    assert "# chest" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "hf_secret" not in ended.err + ended.out


def test_a_hub_that_refuses_leaves_the_export(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: ThreadingHTTPServer
):
    vars(hub)["refuses"] = True
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_address[1]}"
    )
    monkeypatch.setenv("HF_TOKEN", "x")
    with pytest.raises(ExportError, match="is written, and the hub refused the upload"):
        export(ExportRequest(vit_run, "vision", tmp_path / "out", push_to_hub="me/chest"))
    assert any("/me/chest" in path or "create" in path for path, *_ in vars(hub)["calls"])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_no_token_and_no_name_are_told_before_anything_is_written(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for repo_id, words in (
        ("me/chest", "needs a token of the hub.*set HF_TOKEN"),
        ("not a/name/at all", "is no name of the hub"),
    ):
        request = ExportRequest(vit_run, "vision", tmp_path / "out", push_to_hub=repo_id)
        with pytest.raises(ExportError, match=words):
            export(request)
    assert not (tmp_path / "out").exists()
