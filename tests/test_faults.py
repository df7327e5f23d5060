"""What goes wrong outside is one clear line with the next step, and nothing is trained on it."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from mmclip import checkpoint as checkpoints
from mmclip.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from mmclip.config import load_config
from mmclip.data.sample import RandomSplit
from mmclip.data.synthetic import PRESETS, write_dataset
from mmclip.data.tokenizer import load_tokenizer
from mmclip.models.pretrained import first_line
from tests.commands import fork, mmclip


@pytest.mark.parametrize("with_", [(), ("tokenizer_config.json",), ("special_tokens_map.json",)])
def test_a_text_encoder_without_a_tokenizer_is_refused_and_says_what_is_missing(
    tmp_path: Path, with_: tuple[str, ...]
):
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    for name in with_:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"holds no tokenizer.*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("key", ["train.base_lr", "unpaired.rows_per_pair", "loss.image"])
def test_a_setting_that_is_no_number_is_refused(key: str, value: str):
    with pytest.raises(ValueError, match=key.rpartition(".")[2]):
        load_config("tiny", [f"{key}={value}"])


@pytest.mark.parametrize(("val", "test"), [(float("nan"), 0.1), (0.1, float("nan")), (1e400, 0.1)])
def test_a_ratio_that_is_no_number_is_refused(val: float, test: float):
    with pytest.raises(ValueError, match="must not be negative and must add up to less than 1"):
        RandomSplit(0, val, test).check()


def run(*arguments: str, **settings: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **settings}
    return subprocess.Popen(
        [sys.executable, "-m", "mmclip", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def test_who_reads_only_the_head_of_the_output_sees_no_error(made_data: Path):
    process = run("data", "check", str(made_data), "--exact")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| true` does
    said = process.stderr.read().decode()
    assert process.wait(600) in (0, 1, 141)
    assert "error" not in said and "Broken pipe" not in said


@pytest.mark.parametrize("command", ["data check", pytest.param("doctor", marks=pytest.mark.slow)])
def test_a_terminal_of_ascii_alone_shows_everything(command: str, tmp_path: Path):
    settings = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    process = run(*command.split(), str(tmp_path / "für Größe"), **settings)
    _, err = process.communicate(timeout=600)
    assert b"UnicodeEncodeError" not in err and b"Traceback" not in err
    assert b"f\\xfcr" in err or b"f\\udcc3" in err, err


@pytest.mark.parametrize("fails", ["save_file", "torch.save"])
def test_a_disk_that_is_full_while_saving_is_one_line_and_leaves_the_one_before(
    made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
):
    trained = load_checkpoint(shutil.copytree(made_run, tmp_path / "run"))

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64\nmore")

    if fails == "save_file":
        monkeypatch.setattr(checkpoints, "save_file", full)
    else:
        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step_000009 cannot be written .*make room, and resume"):
        save_checkpoint(
            tmp_path / "run", 9, trained.model, trained.tokenizer, trained.config, {}, {}, 2
        )
    assert find_checkpoint(tmp_path / "run").name == "step_000006"
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_an_error_of_torch_about_code_in_weights_gives_no_advice_to_run_it():
    said = first_line(
        pickle.UnpicklingError(
            "Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` "
            "will likely succeed, but it can result in arbitrary code execution."
        )
    )
    assert "weights_only" not in said and "nothing of it was run" in said


def test_wandb_that_is_not_installed_is_said(made_data: Path, small_config: Path, tmp_path: Path):
    pytest.importorskip("mmclip")
    try:
        import wandb  # noqa: F401

        pytest.skip("wandb is installed")
    except ImportError:
        pass
    given = ("--data", made_data, "--config", small_config, "--out", tmp_path / "run", "--wandb")
    error = mmclip(tmp_path, "pretrain", *given).error()
    assert "wandb" in error and "pip install 'mmclip[wandb]'" in error
    assert not (tmp_path / "run").exists()


def draw(folder: Path) -> None:
    """What a process of its own runs."""
    write_dataset(PRESETS["demo"], folder, workers=2)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads children in /proc")
def test_workers_that_draw_images_end_with_their_parent(tmp_path: Path):
    parent = fork(tmp_path / "log", draw, tmp_path / "raw")
    began = time.monotonic()
    while not any((tmp_path / "raw").rglob("*.png")):
        assert parent.process.is_alive() and time.monotonic() - began < 60
        time.sleep(0.05)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    pids = [int(pid) for pid in children.read_text().split()]
    assert len(pids) >= 2
    parent.kill()
    began = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() - began < 30, "a worker outlives its parent"
        time.sleep(0.05)
