"""What a long training adds to the loop: its length, validation, early stop, averaged weights."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mmclip.checkpoint import CHECKPOINTS, find_checkpoint, newest_checkpoint
from mmclip.config import TrainConfig, load_config
from mmclip.config_io import ConfigError
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import open_dataset
from mmclip.evaluation.metrics import macro_auroc
from mmclip.evaluation.selection import Selection
from mmclip.evaluation.zeroshot import score_images
from mmclip.finetuning.supervised import FineTuneConfig
from mmclip.losses import contrastive_sum, positive_pairs
from mmclip.models.layout import patch_grid
from mmclip.prompts import load_prompts
from mmclip.run import open_run
from mmclip.training.validation import Validation, evaluating, validation_data
from tests.commands import mmclip, start

VALIDATES = ("--set", "validation.every_steps=2", "--set", "train.ema_decay=0.8")


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def weights_of(run: Path) -> bytes:
    return (newest_checkpoint(run) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def arguments(made_data: Path, small_config: Path) -> list[str | Path]:
    return ["pretrain", "--data", made_data, "--config", small_config]


@pytest.fixture(scope="module")
def validated(arguments: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that validates after 2, 4 and 6 of them."""
    folder = tmp_path_factory.mktemp("validated")
    ended = mmclip(folder, *arguments, *VALIDATES, "--out", folder / "run")
    assert ended.code == 0, ended.err
    return folder / "run"


# -- length and learning rate --


def test_epochs_become_steps_of_the_pairs_there_are():
    train = TrainConfig(epochs=2.5, batch_size=8)
    assert train.in_steps(20).steps == 7 and train.in_steps(20).epochs is None  # 50 pairs
    assert TrainConfig(steps=9).in_steps(20).steps == 9


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        (["train.steps=3"], 3, None),
        (["train.epochs=3"], 1000, 3),
        (["train.steps=3", "train.epochs=4"], 1000, 4),
        (["train.epochs=4", "train.steps=3"], 3, None),
    ],
)
def test_the_length_that_is_given_last_counts(
    overrides: list[str], steps: int, epochs: float | None, tmp_path: Path
):
    for base in ("train.steps = 50", "train.epochs = 50"):
        path = tmp_path / "own.toml"
        path.write_text(base)
        train = load_config(str(path), overrides).train
        assert (train.steps, train.epochs) == (steps, epochs)


def test_two_lengths_in_one_file_and_epochs_of_fine_tuning_are_refused(tmp_path: Path):
    path = tmp_path / "both.toml"
    path.write_text("[train]\nsteps = 5\nepochs = 3\n")
    with pytest.raises(ConfigError, match=r"steps=5 and epochs=3\.0 are both given; keep one"):
        load_config(str(path))
    for own in ({"epochs": 3}, {"ema_decay": 0.9}):
        with pytest.raises(ValueError, match="are for pre-training"):
            FineTuneConfig.model_validate({"train": own})


def test_the_rate_grows_with_the_batch_or_with_its_root():
    sizes = {"batch_size": 1024, "base_lr": 1e-4}
    assert TrainConfig(**sizes).peak_lr == pytest.approx(4e-4)  # pyright: ignore
    by_root = TrainConfig(**sizes, lr_scaling="sqrt")  # pyright: ignore
    assert by_root.peak_lr == pytest.approx(2e-4)
    assert TrainConfig(batch_size=256, base_lr=1e-4, lr_scaling="sqrt").peak_lr == 1e-4


def test_a_run_says_its_epochs_in_steps_and_resumes_by_them(arguments: list, tmp_path: Path):
    run = tmp_path / "run"
    command = [*arguments, "--set", "train.epochs=0.5", "--out", run]
    assert mmclip(tmp_path, *command).code == 0
    resolved = json.loads((run / "config.json").read_text())
    assert resolved["config"]["train"]["epochs"] is None
    assert resolved["config"]["train"]["steps"] == -(-resolved["n_pairs"] // 16)  # 8 a step
    assert mmclip(tmp_path, *command, "--resume").code == 0


# -- validation --


def test_validations_are_in_the_log_and_change_nothing(
    validated: Path, made_run: Path, made_data: Path
):
    assert weights_of(validated) == weights_of(made_run)
    steps = [line for line in log_of(validated) if "loss" in line]
    assert steps == log_of(made_run)
    found = [line for line in log_of(validated) if "loss" not in line]
    assert [line["step"] for line in found] == [2, 4, 6]
    for line in found:
        assert set(line) == {
            "step", "val_loss", "val_contrastive", "val_auroc",
            "val_ema_loss", "val_ema_contrastive", "val_ema_auroc",
        }  # fmt: skip
        assert line["val_loss"] == pytest.approx(line["val_contrastive"])


def test_the_auroc_is_that_of_zeroshot_and_the_loss_that_of_the_whole_split(
    validated: Path, made_data: Path
):
    AcceleratorState._reset_state(reset_partial_state=True)
    run = open_run(validated / CHECKPOINTS / "step_000006")
    dataset = open_dataset([made_data], 32)
    data = validation_data(dataset, run.config)
    whole = run.config.train.model_copy(update={"batch_size": len(data.pairs)})
    config = run.config.model_copy(update={"train": whole})
    grid = patch_grid(run.model.vision_model)
    validation = Validation(Accelerator(cpu=True), config, data, run.tokenizer, grid, {})
    found = validation.measure(run.model)
    scored = score_images(run, dataset, load_prompts("default"), Selection("val"))
    assert found["auroc"] == pytest.approx(macro_auroc(scored.test.labels, scored.test.scores))
    last = log_of(validated)[-1]
    assert last["val_auroc"] == pytest.approx(found["auroc"], abs=1e-9)
    assert validation.batches is not None and validation.n_batches == 1
    batch = validation.batches.of_rows(validation.batches.pairs)
    with torch.no_grad():
        image = run.model.encode_image(batch.image).embedding
        text = run.model.encode_text(batch.reports.ids, batch.reports.is_valid).embedding
        scale = run.model.scale()
    everyone = torch.ones(len(batch), dtype=torch.bool)
    positives = positive_pairs(batch.keys, batch.keys)
    both = [
        contrastive_sum(a, b, positives, everyone, scale) / len(batch)
        for a, b in ((image, text), (text, image))
    ]
    assert found["loss"] == pytest.approx(float(sum(both)) / 2, rel=1e-4)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_evaluating_leaves_each_module_in_its_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2))
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
    assert model.training and model[0].training and not model[1].training


def test_the_best_step_stays_and_is_what_a_run_is_used_at(arguments: list, tmp_path: Path):
    # With so high a rate the loss on val is lowest early, and patience ends the run.
    run = tmp_path / "run"
    command = [
        *arguments, "--set", "train.steps=60", "--set", "train.base_lr=2.0",
        "--set", "train.warmup_ratio=0", "--set", "train.keep_checkpoints=1",
        "--set", "train.save_every_steps=100",
        "--set", "validation.every_steps=1", "--set", "validation.patience=3", "--out", run,
    ]  # fmt: skip
    assert mmclip(tmp_path, *command).code == 0
    losses = {line["step"]: line["val_loss"] for line in log_of(run) if "val_loss" in line}
    best = min(losses, key=lambda step: (losses[step], step))
    last = max(losses)
    assert last == best + 3 < 60
    kept = sorted(path.name for path in (run / CHECKPOINTS).iterdir())
    assert kept == [f"step_{best:06d}", f"step_{last:06d}"]
    assert find_checkpoint(run).name == f"step_{best:06d}"
    assert newest_checkpoint(run).name == f"step_{last:06d}"
    assert open_run(run).step == best
    before = log_of(run)
    ended = mmclip(tmp_path, *command, "--resume")  # patience is at its end: nothing is left to do
    assert ended.code == 0 and log_of(run) == before
    assert ended.out == f"{newest_checkpoint(run)}\n"


def test_the_average_is_a_run_of_its_own(validated: Path, made_data: Path, tmp_path: Path):
    ended = mmclip(
        tmp_path, "zeroshot", "--model", validated / "ema", "--data", made_data, "--split", "val",
        "--out", tmp_path / "out", "--n-resamples", "10", "--finding", "pleural effusion",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    model, average = (open_run(path).model.state_dict() for path in (validated, validated / "ema"))
    assert model.keys() == average.keys()
    name = "visual_projection.weight"
    assert not torch.equal(model[name], average[name])
    assert "not made" not in (tmp_path / "out/results.json").read_text()


def test_the_average_is_that_of_the_steps(arguments: list, tmp_path: Path):
    run = tmp_path / "run"
    command = [
        *arguments, "--set", "train.save_every_steps=1", "--set", "train.keep_checkpoints=9",
        "--set", "train.ema_decay=0.5", "--out", run,
    ]  # fmt: skip
    assert mmclip(tmp_path, *command).code == 0
    name = "logit_scale"
    weights, averages = (
        [
            float(open_run(folder / CHECKPOINTS / f"step_{step:06d}").model.state_dict()[name])
            for step in range(1, 7)
        ]
        for folder in (run, run / "ema")
    )
    for before, after, weight in zip(averages, averages[1:], weights[1:], strict=False):
        assert after == pytest.approx(0.5 * before + 0.5 * weight, abs=1e-6)


def test_a_stopped_run_goes_on_with_its_validations_and_its_average(
    arguments: list, tmp_path: Path
):
    long = [*arguments, *VALIDATES, "--set", "train.steps=24", "--set", "train.save_every_steps=99"]
    long += ["--set", "validation.every_steps=4"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    running = start(tmp_path / "stopped", *long, "--out", run)
    end = time.monotonic() + 600
    log = run / "metrics.jsonl"
    while not (log.exists() and "val_loss" in log.read_text()):
        assert running.process.is_alive() and time.monotonic() < end
        time.sleep(0.001)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait().code == 143
    assert mmclip(tmp_path, *long, "--out", run, "--resume").code == 0
    assert mmclip(tmp_path, *long, "--out", whole).code == 0
    assert log_of(run) == log_of(whole)
    assert weights_of(run) == weights_of(whole)
    assert weights_of(run / "ema") == weights_of(whole / "ema")
    assert find_checkpoint(run).name == find_checkpoint(whole).name


def test_validation_without_images_for_it_is_one_line_with_the_next_step(made_data: Path):
    config = load_config("tiny", ["validation.every_steps=5"])
    dataset = open_dataset([made_data], 32)
    train = dataset.select([sample.split != "val" for sample in dataset.samples])
    with pytest.raises(ManifestError, match=r"at least two images of split val with a report"):
        validation_data(train, config)
    by_auroc = load_config("tiny", ["validation.every_steps=5", "validation.select_by=auroc"])
    with pytest.raises(ManifestError, match="needs a finding that some images of split val have"):
        validation_data(train, by_auroc)
    with pytest.raises(ConfigError, match=r"give validation\.every_steps a value"):
        load_config("tiny", ["validation.patience=2"])
