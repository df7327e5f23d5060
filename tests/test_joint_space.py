"""`mmclip pretrain --init`: training starts where an export, a CLIP or a SigLIP model stands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, ViTImageProcessor

from mmclip.batch import BatchSlice
from mmclip.checkpoint import load_checkpoint, save_checkpoint
from mmclip.config import GREY_MEAN, GREY_STD, Config
from mmclip.config_io import parse
from mmclip.data.batches import TrainingBatches
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.streams import training_dataset
from mmclip.export.export import ExportRequest, export
from mmclip.models.encoders import EncoderError, patch_grid
from mmclip.models.joint_space import embed_dim_of
from mmclip.models.mmclip import MMCLIP
from mmclip.training.objective import Objective
from mmclip.training.pretrain import build_model, make_tokenizer
from tests.commands import mmclip
from tests.made import small_config as config_of
from tests.made import write_folder
from tests.towers import IMAGE_ROWS, TEXT_ROWS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageTextDataset:
    return open_dataset([write_folder(tmp_path_factory.mktemp("data"), 10)], 32)


def started(folder: Path, *settings: str) -> Config:
    """What `--init` makes of a configuration."""
    keys = [f"model.{key}='{folder}'" for key in ("image.pretrained", "text.pretrained")]
    dim = f"model.embed_dim={embed_dim_of(str(folder))}"
    return config_of(*keys, f"model.projections='{folder}'", dim, "data.max_tokens=32", *settings)


def first_loss(model: MMCLIP, config: Config, dataset: ImageTextDataset) -> Tensor:
    """The contrastive loss of all pairs, with the model's own tokenizer."""
    chosen = training_dataset(dataset, config)
    tokenizer, grid = make_tokenizer(config, dataset), patch_grid(model.vision_model)
    batches = TrainingBatches(chosen, tokenizer, config, grid)
    batch = batches.of_rows(np.arange(len(chosen)))
    with torch.no_grad():
        return Objective(config, grid).sums(model.eval(), batch)["contrastive"]


def contrastive_at_start(model: MMCLIP, config: Config, folder: Path) -> float:
    """The mean contrastive term of the first batch that the command reads of a data folder."""
    chosen = training_dataset(open_dataset([folder], 32), config)
    grid = patch_grid(model.vision_model)
    batches = TrainingBatches(chosen, make_tokenizer(config, chosen), config, grid)
    batch = batches.read(0, BatchSlice()).to(torch.device("cpu"))
    objective = Objective(config, grid)
    with torch.no_grad():
        total = objective.sums(model, batch)["contrastive"]
    return (total / objective.counts(batch)["contrastive"]).item()


@pytest.fixture(scope="module")
def source(dataset: ImageTextDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A run whose temperature and projections are not those of a new one, and its export."""
    root = tmp_path_factory.mktemp("source")
    config = config_of("data.max_tokens=32")
    tokenizer = make_tokenizer(config, dataset)
    torch.manual_seed(3)
    model = build_model(config, tokenizer).eval()
    with torch.no_grad():
        model.logit_scale.fill_(3.1)
    facts = {"n_pairs": 4, "data_hash": "0" * 64, "shuffle_pairs": False}
    save_checkpoint(root / "run", 1, model, tokenizer, config, {}, facts, 1)
    export(ExportRequest(root / "run", "hf", root / "hf"))
    return model, config, root / "hf"


def test_an_export_starts_at_the_loss_of_its_run(source: tuple, dataset: ImageTextDataset):
    model, config, folder = source
    start = started(folder)
    torch.manual_seed(8)
    again = build_model(start, make_tokenizer(start, dataset))
    want, got = first_loss(model, config, dataset), first_loss(again, start, dataset)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.scale(), model.scale())
    named = (f"model.{key}.pretrained='{folder}'" for key in ("image", "text"))
    new = config_of(*named, "data.max_tokens=32")
    without = build_model(new, make_tokenizer(new, dataset))
    assert abs(first_loss(without, new, dataset) - want) > 1e-2  # the encoders alone do not


def test_the_first_step_of_the_command_has_the_loss_of_the_run(
    source: tuple, made_data: Path, small_config: Path, tmp_path: Path
):
    model, _, folder = source
    given = (
        "pretrain", "--data", made_data, "--config", small_config, "--init", folder, "--set",
        "data.max_tokens=32", "--out", tmp_path / "run",
    )  # fmt: skip
    ended = mmclip(tmp_path, *given)
    assert ended.code == 0, ended.err
    said = json.loads((tmp_path / "run/config.json").read_text("utf-8"))["config"]
    assert said["model"]["projections"] == str(folder)
    want = contrastive_at_start(model, parse(Config, said, "the run"), made_data)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()[0])
    assert first["contrastive"] == pytest.approx(want, abs=1e-5)
    assert mmclip(tmp_path, *given, "--resume").code == 0


RUNS = {
    "resnet": ("model.image.kind='resnet'", "model.image.patch_size=8"),
    "mean": ("model.image.pooling='mean'", "model.text.pooling='cls'"),
    "sigmoid": ("loss.contrastive='sigmoid'", "model.logit_bias=-3"),
    "rgb": (),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_starts_at_the_loss_of_a_run_however_it_is_built(
    kind: str, made_data: Path, small_config: Path, tmp_path: Path
):
    """Most of these cannot be exported for transformers."""
    settings = [*RUNS[kind], "data.max_tokens=32"]
    if kind == "rgb":  # whose first convolution keeps three channels
        IMAGE_ROWS["clip_vision_model"].save(tmp_path / "clip")
        ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.2, 0.25, 0.3]).save_pretrained(
            tmp_path / "clip"
        )
        settings.append(f"model.image.pretrained='{tmp_path / 'clip'}'")
    given = ["pretrain", "--data", made_data, "--config", small_config, "--set", "train.steps=2"]
    own = [part for setting in settings for part in ("--set", setting)]
    first = tmp_path / "first"
    ended = mmclip(tmp_path, *given, *own, "--set", "model.temperature=0.11", "--out", first)
    assert ended.code == 0, ended.err
    shutil.rmtree(tmp_path / "clip", ignore_errors=True)
    loss = [part for setting in RUNS[kind] if "loss" in setting for part in ("--set", setting)]
    given += ["--init", first, *loss, "--set", "data.max_tokens=32", "--out", tmp_path / "run"]
    ended = mmclip(tmp_path, *given)
    assert ended.code == 0, ended.err
    started = json.loads((tmp_path / "run/config.json").read_text("utf-8"))["config"]
    model = load_checkpoint(first).model.train()
    want = contrastive_at_start(model, parse(Config, started, "the run"), made_data)
    found = json.loads((tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()[0])
    assert found["contrastive"] == pytest.approx(want, abs=1e-5)
    if kind != "resnet":
        return
    assert mmclip(tmp_path, *given, "--resume").code == 0
    scored = mmclip(
        tmp_path, "zeroshot", "--model", tmp_path / "run", "--data", made_data, "--n-resamples",
        "5", "--finding", "pleural effusion", "--out", tmp_path / "scores",
    )  # fmt: skip
    assert scored.code == 0, scored.err


def test_a_run_to_start_from_that_was_changed_is_refused(
    made_run: Path, made_data: Path, tmp_path: Path
):
    run = shutil.copytree(made_run, tmp_path / "first")
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    with (newest / "model.safetensors").open("ab") as file:
        file.write(b"0")
    given = ("pretrain", "--data", made_data, "--out", tmp_path / "run", "--init")
    assert "is missing or damaged" in mmclip(tmp_path, *given, run).error()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_public_dual_encoder_starts_with_its_own_embeddings(
    kind: str, dataset: ImageTextDataset, tmp_path: Path
):
    TEXT_ROWS[kind].save(tmp_path)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    config = started(tmp_path)
    model = build_model(config, make_tokenizer(config, dataset)).eval()
    theirs = AutoModel.from_pretrained(tmp_path).eval()
    image = torch.randn(2, 1, 32, 32)
    rgb = (image * GREY_STD + GREY_MEAN - 0.5) / 0.25
    with torch.no_grad():
        want = theirs.get_image_features(rgb.expand(-1, 3, -1, -1)).pooler_output
        got = model.encode_image(image).embedding
    torch.testing.assert_close(got, F.normalize(want, dim=-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.scale(), theirs.logit_scale.exp().squeeze())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.embed_dim=24", r"model.embed_dim=24, and .* joint space of 16; set .*=16"),
        ("model.image.pooling=mean", r"model.image.pooling gives 'mean'.*set it to 'pooler'"),
        ("model.text.pooling=cls", r"model.text.pooling gives 'cls'.*set it to 'pooler'"),
        ("model.max_logit_scale=5", r"model.max_logit_scale=5, and .* a scale of 22.198"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    setting: str, words: str, source: tuple, dataset: ImageTextDataset
):
    config = started(source[2], setting)
    with pytest.raises(EncoderError, match=words):
        build_model(config, make_tokenizer(config, dataset))


def test_projections_of_other_encoders_are_refused(source: tuple, dataset: ImageTextDataset):
    config = config_of(f"model.projections='{source[2]}'", "model.image.width=48")
    with pytest.raises(EncoderError, match=r"reads image vectors of 32, and .* gives 48"):
        build_model(config, make_tokenizer(config, dataset))


def test_folders_without_a_joint_space_are_told_of(made_data: Path, tmp_path: Path):
    TEXT_ROWS["bert"].save(tmp_path / "bert")
    given = ("pretrain", "--data", made_data, "--out", tmp_path / "run", "--init")
    error = mmclip(tmp_path, *given, tmp_path / "bert").error()
    assert "is a 'bert' model, which has no joint space" in error and "export --to hf" in error
    assert "cannot load" in mmclip(tmp_path, *given, tmp_path / "none").error()
    assert not (tmp_path / "run").exists()
