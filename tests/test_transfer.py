"""bench/transfer.py: comparisons by hand, and the script in its quick mode on two small runs."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.synthetic import PRESETS, write_dataset
from mmclip.evaluation.intervals import interval_over_seeds
from mmclip.training.pretrain import PretrainRequest, pretrain
from tests.made import small_config

BENCH = str(Path(__file__).parents[1] / "bench")
sys.path.insert(0, BENCH)  # as `python bench/transfer.py` has it
transfer, tasks = importlib.import_module("transfer"), importlib.import_module("transfer_tasks")
sys.path.remove(BENCH)

SMALL = (
    "data.image_size=64", "data.max_tokens=72", "train.steps=2", "train.batch_size=8",
    "unpaired.rows_per_pair=1", "loss.text=1", "model.image.kind=resnet", "model.image.depth=1",
)  # fmt: skip


def test_an_arm_is_compared_by_the_seeds_that_it_shares_with_the_base():
    rng = np.random.default_rng(0)

    def found(value: float) -> dict:
        return {"probe 1% | all": tasks.Measured(value, value + 0.01 * rng.standard_normal(200))}

    ours, theirs = {1: found(0.8), 2: found(0.9), 5: found(0.1)}, {1: found(0.7), 2: found(0.7)}
    cells = transfer.compared({"base": theirs, "arm": ours}, "base")
    cell = cells["arm"]["probe 1% | all"]
    assert cell["mean"] == pytest.approx(0.6) and cell["less_base"] == pytest.approx(0.15)
    drawn = [ours[s]["probe 1% | all"].drawn - theirs[s]["probe 1% | all"].drawn for s in (1, 2)]
    low, high = interval_over_seeds(np.array([0.1, 0.2]), np.stack(drawn)) or (0, 0)
    assert cell["less_base_ci"] == pytest.approx((low, high))
    assert cell["resolves"] == pytest.approx((high - low) / 2, abs=1e-5)
    assert "less_base" not in cells["base"]["probe 1% | all"]


def test_the_mean_over_patients_and_its_resamples():
    values, patients = np.array([1.0, 0.0, 0.0, 0.0]), ["a", "a", "b", "c"]
    found = tasks.mean_of(values, patients, 300)
    assert found.value == 0.25 and found.drawn.shape == (300,)
    assert found.drawn.min() == 0.0 and found.drawn.max() == 0.5  # a alone, both of its values


def test_fresh_patients_are_none_of_pretraining():
    preset = PRESETS["hard"]
    fresh = tasks.fresh_preset(preset, tasks.QUICK)
    assert fresh.seed != preset.seed and fresh.name != preset.name  # ids carry the name
    assert (fresh.n_train, fresh.n_unpaired) == (160, 0)


def test_fine_tuning_takes_the_steps_of_its_share_and_random_weights_an_even_rate(monkeypatch):
    configs = []

    class _Stop(Exception):
        pass

    def train(*args):
        configs.append(args[4])
        raise _Stop

    monkeypatch.setattr(tasks, "train_classifier", train)
    run = SimpleNamespace(
        config=small_config("train.seed=3"), model=SimpleNamespace(vision_model=torch.nn.Identity())
    )
    monkeypatch.setattr(tasks, "ImageEncoder", lambda encoder, features: encoder)
    monkeypatch.setattr(tasks, "Classifier", lambda encoder, n: encoder)
    task = SimpleNamespace(train=None, val=None)
    for arm in ("prompts", tasks.RANDOM):
        with pytest.raises(_Stop):
            tasks.full_fine_tuned(None, tasks.Weights(arm, run, "w"), task, 40)
    assert [config.lr_decay for config in configs] == [0.75, 1.0]
    assert {(config.train.steps, config.train.save_every_steps) for config in configs} == {(40, 4)}
    for size in (tasks.Size(), tasks.QUICK):
        assert len(size.steps) == len(size.fractions)


@pytest.mark.slow
def test_the_script_measures_named_and_withheld_findings_of_every_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    preset = replace(PRESETS["hard"], n_train=24, n_val=4, n_test=4, n_unpaired=24)
    raw, data = write_dataset(preset, tmp_path / "raw"), tmp_path / "data"
    reader = open_reader("csv", raw, mapping=raw / "mapping.toml", table=None)
    build_data(reader, raw, data, image_size=64)
    runs = {}
    for arm, more in (
        ("prompts", "unpaired.withheld=['nodule','mass']"),
        ("labels", "loss.label=1"),
    ):
        config = small_config(*SMALL, more)
        runs[arm] = tmp_path / arm
        pretrain(PretrainRequest((data,), runs[arm], config, "a test", cpu=True))
    command = ["transfer.py", str(tmp_path / "out"), "--quick", "--runs"]
    monkeypatch.setattr(sys, "argv", [*command, *(f"{arm}={run}" for arm, run in runs.items())])
    transfer.main()
    printed = capsys.readouterr().out
    results = json.loads(printed.splitlines()[-1])
    arms = results["arms"]
    assert results["groups"]["withheld"] == ["mass", "nodule"]
    assert set(arms) == {"prompts", "labels", "random weights", "supervised"}
    names = {name for name, _ in (key.split(" | ") for key in arms["labels"])}
    assert names == {
        "zero-shot", "calibration error", "label head", "probe 10%", "probe 100%", "full 10%",
        "full 100%", "lesion probe", "pointing", "retrieval R@10",
    }  # fmt: skip
    assert not any(key.startswith("label head") for key in arms["prompts"])
    assert set(arms["supervised"]) == {"probe 100% | named", "probe 100% | withheld"}
    for cells in arms.values():
        assert all(0 <= cell["mean"] <= 1 for cell in cells.values())
    assert "less_base" in arms["random weights"]["lesion probe | named"]
    transfer.main()  # all is kept
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
