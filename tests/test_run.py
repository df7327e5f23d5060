"""A run: its folder, what it saw and trained on, and the recipe of its weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmclip.data.batches import SEEN_FILE
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.leakage.check import TRAINED_FILE, trained_keys
from mmclip.run import Run, open_run


@pytest.fixture(scope="module")
def copied(made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose files a test may change."""
    return open_run(shutil.copytree(made_run, tmp_path_factory.mktemp("copied") / "run"))


def test_a_run_is_opened_by_its_folder_or_by_a_checkpoint(made_run: Path):
    by_run, by_step = open_run(made_run), open_run(made_run / "checkpoints" / "step_000004")
    assert (by_run.name, by_run.step) == ("first", 6)
    assert (by_step.name, by_step.step) == ("step_000004", 4)
    assert by_run.folder == by_step.folder == made_run.resolve()
    assert by_run.config_hash == by_run.checkpoint.meta["config_hash"]


def test_a_checkpoint_that_lies_in_no_run_is_its_own_folder(made_run: Path, tmp_path: Path):
    alone = shutil.copytree(made_run / "checkpoints" / "step_000006", tmp_path / "weights")
    run = open_run(alone)
    assert run.folder == alone.resolve()
    assert run.seen(["nodule"]) == {}
    assert run.check_unseen([], "test").startswith("not made: the run has no")


def test_data_are_opened_at_the_size_that_the_model_reads(made_run: Path, made_data: Path):
    run = open_run(made_run)
    assert run.open_data([made_data]).data_hash == open_dataset([made_data], 32).data_hash
    small = run.config.data.model_copy(update={"image_size": 48})
    config = run.config.model_copy(update={"data": small})
    other = replace(run, checkpoint=replace(run.checkpoint, config=config))
    with pytest.raises(ManifestError, match="32"):
        other.open_data([made_data])


def test_images_that_trained_are_not_scored(
    copied: Run, made_data: Path, caplog: pytest.LogCaptureFixture
):
    samples = copied.open_data([made_data]).samples
    tested = [sample for sample in samples if sample.split == "test"]
    trained = [sample for sample in samples if sample.split == "train"]
    assert copied.check_unseen(tested, "test").startswith("no image and no patient of these was")
    with pytest.raises(ManifestError, match="the run was trained on 1 of these 1 images"):
        copied.check_unseen(trained[:1], "test")
    assert copied.check_unseen(trained[:1], "train").startswith("split train: the run was trained")
    assert "split train" in caplog.text
    np.save(copied.folder / TRAINED_FILE, trained_keys(tested[:1]))
    with pytest.raises(ManifestError, match=tested[0].image_id):
        copied.check_unseen(tested, "test")


def test_what_labels_named_outweighs_prompts_and_prompts_outweigh_reports(copied: Run):
    stored = {"report": ["nodule", "edema", "mass"], "prompt": ["edema", "mass"], "label": ["mass"]}
    (copied.folder / SEEN_FILE).write_text(json.dumps(stored), "utf-8")
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
        return replace(last, checkpoint=replace(last.checkpoint, config=config))

    assert under(seed=5).recipe_hash == last.recipe_hash
    meta = last.checkpoint.meta | {"shuffle_pairs": True}
    shuffled = replace(last, checkpoint=replace(last.checkpoint, meta=meta))
    others = [
        under(batch_size=32),
        open_run(last.checkpoint.folder.with_name("step_000004")),
        shuffled,
    ]
    assert last.recipe_hash not in [other.recipe_hash for other in others]
