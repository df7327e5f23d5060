"""A run: its folder, what it saw and trained on, and the recipe of its weights."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmclip import doctor
from mmclip.checkpoint import CheckpointError
from mmclip.config_io import recipe_hash
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.leakage.trained import KEY_FILE, LOOKS_FILE, TRAINED_FILE
from mmclip.data.streams import SEEN_FILE
from mmclip.models.dual_encoder import PromptEmbeddings
from mmclip.run import Run, open_run
from tests.made import put_run_file, reseal, small_config, small_model, trained_on


@pytest.fixture(scope="module")
def copied(made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose files a test may change."""
    return open_run(shutil.copytree(made_run, tmp_path_factory.mktemp("copied") / "run"))


def test_a_run_is_opened_by_its_folder_or_by_a_checkpoint(made_run: Path):
    by_run, by_step = open_run(made_run), open_run(made_run / "checkpoints" / "step_000004")
    assert (by_run.name, by_run.step) == ("first at step 6", 6)
    assert (by_step.name, by_step.step) == ("step_000004 at step 4", 4)
    assert by_run.folder == by_step.folder == made_run.resolve()
    assert by_run.config_hash == by_run.checkpoint.meta["config_hash"]


def test_a_run_keeps_the_recipe_that_it_had_before_a_version_added_a_key(
    made_run: Path, tmp_path: Path
):
    """So that thresholds and references of its results hold."""
    checkpoint = made_run / "checkpoints" / "step_000006"
    earlier = shutil.copytree(checkpoint, tmp_path / "earlier")
    meta = json.loads((checkpoint / "meta.json").read_text())
    loss = {key: value for key, value in meta["config"]["loss"].items() if key != "local"}
    config = {**meta["config"], "loss": loss}
    reseal(earlier, config=config)
    run = open_run(earlier)
    assert run.config.loss.local == 0
    given = {key: meta[key] for key in ("data_hash", "shuffle_pairs", "step")}
    assert run.recipe_hash == recipe_hash(config, given) != open_run(checkpoint).recipe_hash


def test_a_checkpoint_that_lies_in_no_run_is_its_own_folder(
    made_run: Path, made_data: Path, tmp_path: Path
):
    alone = shutil.copytree(made_run / "checkpoints" / "step_000006", tmp_path / "weights")
    run = open_run(alone)
    assert run.folder == alone.resolve()
    assert run.seen(["nodule"]) == {}
    verdict = run.check_unseen(open_dataset([made_data], 32), "test")
    assert verdict.startswith("not decidable") and "without the folder of its run" in verdict


def test_data_are_opened_at_the_size_that_the_model_reads(made_run: Path, made_data: Path):
    run = open_run(made_run)
    assert run.open_data([made_data]).data_hash == open_dataset([made_data], 32).data_hash
    small = run.config.data.model_copy(update={"image_size": 48})
    config = run.config.model_copy(update={"data": small})
    other = replace(run, checkpoint=replace(run.checkpoint, config=config))
    with pytest.raises(ManifestError, match="32"):
        other.open_data([made_data])


def test_the_sigmoid_rule_is_that_of_runs_with_a_bias(made_run: Path):
    run = open_run(made_run)
    with pytest.raises(ValueError, match="first learnt by softmax; take prompt_pair or"):
        run.used("sigmoid", None)
    model = small_model(small_config("loss.contrastive='sigmoid'", "model.logit_bias=-3"))
    of_sigmoid = replace(run, checkpoint=replace(run.checkpoint, model=model))
    assert of_sigmoid.scoring.rule == "prompt_pair"
    scoring = of_sigmoid.used("sigmoid", None).scoring
    assert (scoring.rule, scoring.bias) == ("sigmoid", -3.0)
    image, texts = torch.eye(1, 4), torch.tensor([[0.6, 0.8, 0, 0]])
    found = scoring.scores(image, PromptEmbeddings(texts, -texts)).item()
    assert found == pytest.approx(1 / (1 + math.exp(3 - 0.6 * model.scale().item())), rel=1e-6)


def test_images_that_trained_are_not_scored(
    copied: Run, made_data: Path, caplog: pytest.LogCaptureFixture
):
    dataset = copied.open_data([made_data])
    tested = dataset.select([sample.split == "test" for sample in dataset.samples])
    trained = dataset.select([sample.split == "train" for sample in dataset.samples])
    assert copied.check_unseen(tested, "test").startswith("no image and no patient of these was")
    one = trained.select([i == 0 for i in range(len(trained))])
    with pytest.raises(ManifestError, match="the run was trained on 1 of these 1 images"):
        copied.check_unseen(one, "test")
    assert copied.check_unseen(one, "train").startswith("split train: the run was trained")
    assert "split train" in caplog.text
    trained_on(copied.folder, tested.samples[:1])
    with pytest.raises(ManifestError, match=tested.samples[0].image_id):
        open_run(copied.folder).check_unseen(tested, "test")


@pytest.mark.parametrize("name", [TRAINED_FILE, LOOKS_FILE, SEEN_FILE])
@pytest.mark.parametrize("damage", ["emptied", "gone", "of another run"])
def test_a_run_without_what_it_trained_on_is_refused_and_not_called_clean(
    made_run: Path, made_data: Path, tmp_path: Path, name: str, damage: str
):
    run = open_run(shutil.copytree(made_run, tmp_path / "run"))
    dataset = run.open_data([made_data])
    path = run.folder / name
    if damage == "gone":
        path.unlink()
    elif name == SEEN_FILE:
        path.write_text("{}" if damage == "emptied" else '{"report":[],"prompt":[],"label":[]}')
    else:
        np.save(path, np.load(path)[: 0 if damage == "emptied" else -1])
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged"):
        _ = run.seen(["mass"]) if name == SEEN_FILE else run.check_unseen(dataset, "test")


def test_a_run_without_its_key_decides_nothing(made_run: Path, made_data: Path, tmp_path: Path):
    run = open_run(shutil.copytree(made_run, tmp_path / "run"))
    (run.folder / KEY_FILE).unlink()
    verdict = run.check_unseen(run.open_data([made_data]), "test")
    assert verdict.startswith("not decidable: the run came without its private.key")


@pytest.mark.parametrize("key", ["0" * 64, "flipped", "of another format", ""])
def test_the_key_of_another_run_does_not_find_that_nothing_trained(
    made_run: Path, made_data: Path, tmp_path: Path, key: str
):
    run = open_run(shutil.copytree(made_run, tmp_path / "run"))
    path = run.folder / KEY_FILE
    text = path.read_text()
    path.chmod(0o600)
    path.write_text(("1" if text[0] == "0" else "0") + text[1:] if key == "flipped" else key)
    with pytest.raises(CheckpointError, match=rf"{KEY_FILE} is missing or damaged"):
        run.check_unseen(run.open_data([made_data]), "test")
    (bad,) = (found for found in doctor.examine_run(run.folder) if not found.is_sound)
    assert bad.what == KEY_FILE
    path.unlink()
    assert all(found.is_sound for found in doctor.examine_run(run.folder))


def test_what_labels_named_outweighs_prompts_and_prompts_outweigh_reports(copied: Run):
    stored = {"report": ["nodule", "edema", "mass"], "prompt": ["edema", "mass"], "label": ["mass"]}
    put_run_file(copied.folder, SEEN_FILE, json.dumps(stored).encode())
    assert copied.seen(["Mass", "edema", "lung nodules", "gout"]) == {
        "Mass": "label",
        "edema": "prompt",
        "lung nodules": "report",
        "gout": "none",
    }


def test_the_recipe_of_weights_is_all_but_the_seed(made_run: Path):
    last = open_run(made_run)

    def under(**train: int) -> Run:
        changed = last.config.train.model_copy(update=train)
        config = last.config.model_copy(update={"train": changed})
        meta = last.checkpoint.meta | {"config": config.model_dump(mode="json")}
        return replace(last, checkpoint=replace(last.checkpoint, config=config, meta=meta))

    assert under(seed=5).recipe_hash == last.recipe_hash
    meta = last.checkpoint.meta | {"shuffle_pairs": True}
    shuffled = replace(last, checkpoint=replace(last.checkpoint, meta=meta))
    others = [
        under(batch_size=32),
        open_run(last.checkpoint.folder.with_name("step_000004")),
        shuffled,
    ]
    assert last.recipe_hash not in [other.recipe_hash for other in others]


def test_a_fine_tuned_result_is_no_run(made_run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mmclip.run.checkpoint_meta", lambda folder: {"findings": ["mass"]})
    with pytest.raises(CheckpointError, match="is a fine-tuned result, which has no text encoder"):
        open_run(made_run)
