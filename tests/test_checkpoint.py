"""A checkpoint is whole or not there, is what was saved, and runs nothing when it is read."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mmclip
from mmclip.checkpoint import (
    CHECKPOINTS,
    META_CHECKSUM,
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    load_trainer_state,
    save_checkpoint,
)
from mmclip.config import Config
from mmclip.config_io import config_hash, parse
from mmclip.data.folder import read_meta
from mmclip.files import file_sha256, sealed
from mmclip.models.build import build_mmclip
from tests.made import reseal

FACTS = {"data_hash": "d" * 64, "n_pairs": 2}


@pytest.fixture(scope="module")
def trained(made_run: Path) -> Checkpoint:
    return load_checkpoint(made_run)


def save(run: Path, trained: Checkpoint, step: int, keep: int = 2) -> Path:
    model, tokenizer, config = trained.model, trained.tokenizer, trained.config
    state = {"step": step, "moment": torch.arange(3.0)}
    return save_checkpoint(run, step, model, tokenizer, config, state, FACTS, keep)


@torch.no_grad()
def embeddings(checkpoint: Checkpoint) -> list[torch.Tensor]:
    image = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(checkpoint.tokenizer(["There is a nodule."])["input_ids"])
    model = checkpoint.model
    text = model.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
    return [model.encode_image(image).embedding, text.embedding]


def test_a_checkpoint_embeds_as_the_model_did_before_saving(trained: Checkpoint, tmp_path: Path):
    loaded = load_checkpoint(save(tmp_path, trained, 3))
    assert not loaded.model.training
    for before, after in zip(embeddings(trained), embeddings(loaded), strict=True):
        assert torch.equal(before, after)


def test_a_label_head_of_any_size_comes_back_from_the_weights(trained: Checkpoint, tmp_path: Path):
    labels = {"loss": {"label": 1.0}, "unpaired": {"rows_per_pair": 1.0}}
    config = parse(Config, {**trained.config.model_dump(), **labels}, "test")
    encoders = trained.model.vision_model, trained.model.text_model
    model = build_mmclip(config, *encoders, n_label_findings=5)
    save_checkpoint(tmp_path, 1, model, trained.tokenizer, config, {"step": 1}, FACTS, 1)
    loaded = load_checkpoint(tmp_path).model.state_dict()
    assert loaded["label_head.weight"].shape == (5, 16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_the_trainer_state_comes_back_as_it_was(trained: Checkpoint, tmp_path: Path):
    state = load_trainer_state(save(tmp_path, trained, 3))
    assert state["step"] == 3 and torch.equal(state["moment"], torch.arange(3.0))


def test_meta_says_what_the_weights_come_from(made_run: Path, made_data: Path, small_config: Path):
    meta = load_checkpoint(made_run).meta
    assert meta["step"] == 6
    assert meta["config"]["data"]["image_size"] == 32
    assert meta["config_hash"] == config_hash(load_checkpoint(made_run).config)
    assert meta["data_hash"] == read_meta(made_data)["data_hash"]
    assert meta["command"].startswith("mmclip pretrain") and str(small_config) in meta["command"]
    assert meta["versions"]["mmclip"] == mmclip.__version__
    assert meta["versions"]["torch"] == torch.__version__
    commit = meta["versions"]["commit"]
    assert commit == "unknown" or len(commit) == 40


def test_the_newest_checkpoints_stay_and_are_found(trained: Checkpoint, tmp_path: Path):
    for step in (2, 4, 1_000_000, 6):
        save(tmp_path, trained, step, keep=3)
    names = sorted(p.name for p in (tmp_path / CHECKPOINTS).iterdir())
    assert names == ["step_000004", "step_000006", "step_1000000"]
    assert find_checkpoint(tmp_path).name == "step_1000000"
    older = tmp_path / CHECKPOINTS / "step_000004"
    assert find_checkpoint(older) == older


def test_a_folder_with_another_name_is_no_checkpoint(trained: Checkpoint, tmp_path: Path):
    saved = save(tmp_path, trained, 2)
    shutil.copytree(saved, saved.with_name("step_000009_backup"))
    assert find_checkpoint(tmp_path) == saved


def test_every_file_can_be_read_by_whom_the_folder_lets_in(trained: Checkpoint, tmp_path: Path):
    saved = save(tmp_path, trained, 2)
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    assert {p.stat().st_mode for p in saved.rglob("*") if p.is_file()} == {expected}


class Killed(BaseException):
    """Stands for the process's end: no `except Exception` sees it."""


def at_call(number: int, function: Callable) -> Callable:
    """The function, that ends the process at its call of that number, the first being 0."""
    calls = iter(range(1000))

    def killing(*args, **kwargs):
        if next(calls) == number:
            raise Killed
        return function(*args, **kwargs)

    return killing


def half_removed(folder: Path, ignore_errors: bool = False) -> None:
    """rmtree, killed after the first file; nothing happens to a folder that is not there."""
    if folder.exists() or not ignore_errors:
        min(p for p in folder.iterdir() if p.is_file()).unlink()
        raise Killed


@pytest.mark.parametrize(
    ("owner", "name", "n_calls"),
    [(torch, "save", 1), (os, "fsync", 7), (Path, "write_text", 1), (Path, "rename", 2)],
)
def test_a_save_killed_at_any_step_leaves_whole_checkpoints_only(
    trained: Checkpoint, tmp_path: Path, owner, name: str, n_calls: int
):
    for number in range(n_calls):
        run = tmp_path / str(number)
        save(run, trained, 2, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, at_call(number, getattr(owner, name)))
            with pytest.raises(Killed):
                save(run, trained, 4, keep=1)
        assert load_checkpoint(run).meta["step"] in (2, 4)
        save(run, trained, 4, keep=1)
        assert [p.name for p in (run / CHECKPOINTS).iterdir()] == ["step_000004"]


def test_a_checkpoint_half_removed_is_not_found(
    trained: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for step in (2, 4):
        save(tmp_path, trained, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_removed)
        with pytest.raises(Killed):
            save(tmp_path, trained, 6)
    shutil.rmtree(tmp_path / CHECKPOINTS / "step_000004")
    shutil.rmtree(tmp_path / CHECKPOINTS / "step_000006")
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        find_checkpoint(tmp_path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip_a_bit),
        ("model.safetensors", cut_in_half),
        ("model.safetensors", Path.unlink),
        ("tokenizer/tokenizer.json", flip_a_bit),
        ("tokenizer/tokenizer.json", Path.unlink),
        ("meta.json", cut_in_half),
        ("meta.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(
    trained: Checkpoint, tmp_path: Path, name: str, damage: Callable[[Path], None]
):
    saved = save(tmp_path, trained, 2)
    damage(saved / name)
    with pytest.raises(CheckpointError, match=Path(name).name) as caught:
        load_checkpoint(tmp_path)
    assert "older checkpoint" in str(caught.value)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, Path.unlink])
def test_a_damaged_trainer_state_is_refused_and_the_weights_still_load(
    trained: Checkpoint, tmp_path: Path, damage: Callable[[Path], None]
):
    saved = save(tmp_path, trained, 2)
    damage(saved / "trainer.pt")
    with pytest.raises(CheckpointError, match=r"trainer\.pt is missing or damaged .* resume"):
        load_trainer_state(saved)
    load_checkpoint(saved)


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_a_hostile_trainer_state_runs_nothing(trained: Checkpoint, tmp_path: Path):
    saved = save(tmp_path, trained, 2)
    proof = tmp_path / "was run"
    state = saved / "trainer.pt"
    torch.save({"step": 2, "optimizer": Hostile(proof)}, state)
    meta = json.loads((saved / "meta.json").read_text())
    meta["sha256"]["trainer.pt"] = file_sha256(state)
    reseal(saved, sha256=meta["sha256"])
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        load_trainer_state(saved)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Hostile(proof)))  # noqa: S301  what pickle itself would have done
    assert proof.exists()


def test_code_beside_a_tokenizer_is_not_run(trained: Checkpoint, tmp_path: Path):
    saved = save(tmp_path, trained, 2)
    proof = tmp_path / "was run"
    folder = saved / "tokenizer"
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(proof)!r})\nclass Evil: pass\n")
    config = folder / "tokenizer_config.json"
    known = json.loads(config.read_text())
    known |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    config.write_text(json.dumps(known))
    meta = json.loads((saved / "meta.json").read_text())
    names = [*meta["sha256"], "tokenizer/evil.py"]
    reseal(saved, sha256={n: file_sha256(saved / n) for n in names})
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_checkpoint(saved)
    assert not proof.exists()


def test_weights_of_another_model_are_refused(trained: Checkpoint, tmp_path: Path):
    saved = save(tmp_path, trained, 2)
    meta = json.loads((saved / "meta.json").read_text())
    meta["config"]["model"]["embed_dim"] = 8
    reseal(saved, config=meta["config"])
    with pytest.raises(CheckpointError, match="does not fit this version of the model"):
        load_checkpoint(saved)


def test_a_folder_without_checkpoints_is_refused_with_the_next_step(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            CheckpointError, match="give the folder of a run that `mmclip pretrain`"
        ):
            find_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"config": {"data": {"max_tokens": 6}}}, "checksum differs"),
        ({"step": 7}, "checksum differs"),
        ({"sha256": {}}, "checksum differs"),
        ({"data_hash": "0" * 64}, "checksum differs"),
        ({"meta_sha256": "0" * 64}, "checksum differs"),
        ({"format": 2}, "has format 2, and this version reads format 4; train again"),
        ({"format": 99}, "has format 99, .*; a newer mmclip wrote it"),
        ({"format": "new"}, "has format new, .*; train again"),
    ],
)
def test_a_changed_meta_is_refused(made_run: Path, tmp_path: Path, change: dict, error: str):
    run = shutil.copytree(made_run, tmp_path / "run")
    path = find_checkpoint(run) / "meta.json"
    meta = json.loads(path.read_text())
    if "config" in change:
        change = {"config": meta["config"] | {"data": meta["config"]["data"] | {"max_tokens": 6}}}
    path.write_text(json.dumps(meta | change))
    for read in (load_checkpoint, lambda f: load_trainer_state(find_checkpoint(f))):
        with pytest.raises(CheckpointError, match=error):
            read(run)


def test_a_configuration_of_another_hash_is_refused(made_run: Path, tmp_path: Path):
    saved = find_checkpoint(shutil.copytree(made_run, tmp_path / "run"))
    meta = json.loads((saved / "meta.json").read_text())
    del meta["meta_sha256"]
    meta["config"]["data"]["max_tokens"] = 6
    text = json.dumps(sealed(meta, META_CHECKSUM))
    (saved / "meta.json").write_text(text)
    with pytest.raises(CheckpointError, match="another configuration than its config_hash"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "name", ["tokenizer/added_tokens.json", "tokenizer/more/x.txt", "model.bin", "evil.py"]
)
def test_a_file_that_meta_does_not_list_is_refused(made_run: Path, tmp_path: Path, name: str):
    run = shutil.copytree(made_run, tmp_path / "run")
    added = find_checkpoint(run) / name
    added.parent.mkdir(exist_ok=True)
    added.write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{Path(name).name} is not of this checkpoint"):
        load_checkpoint(run)
    added.rename(added.with_name(".DS_Store"))  # what a file system leaves by itself
    load_checkpoint(run)


@pytest.mark.parametrize("name", ["step_000008", "step_000005", "step_4000000"])
def test_a_checkpoint_under_the_name_of_another_step_is_refused(
    made_run: Path, tmp_path: Path, name: str
):
    run = shutil.copytree(made_run, tmp_path / "run")
    older = find_checkpoint(run).with_name("step_000004")
    renamed = shutil.copytree(older, older.with_name(name))
    for read in (load_checkpoint, lambda folder: load_trainer_state(folder)):
        with pytest.raises(CheckpointError, match="the checkpoint of step 4 under another name"):
            read(renamed)
    assert load_checkpoint(shutil.copytree(older, tmp_path / "best")).meta["step"] == 4
