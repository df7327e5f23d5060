"""Pre-training by the command line: what a run leaves, and that no kill changes it."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

from mmclip.checkpoint import (
    CHECKPOINTS,
    checkpoint_meta,
    find_checkpoint,
    load_checkpoint,
    load_trainer_state,
)
from mmclip.config import load_config
from mmclip.data.folder import read_meta
from mmclip.data.text import train_tokenizer
from mmclip.training.announce import repeats
from mmclip.training.pretrain import PretrainRequest, pretrain
from tests.commands import Running, free_port, mmclip, mmclip_in_two_processes, start
from tests.conftest import build_made
from tests.made import reseal, write_folder


@pytest.fixture
def arguments(made_data: Path, small_config: Path) -> list[str | Path]:
    return ["pretrain", "--data", made_data, "--config", small_config]


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in log_of(run)]


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> bytes:
    return (find_checkpoint(run) / "model.safetensors").read_bytes()


def test_a_run_leaves_its_configuration_a_log_and_the_newest_checkpoints(
    made_run: Path, made_data: Path, small_config: Path
):
    left = json.loads((made_run / "config.json").read_text())
    assert left["config"] == load_config(str(small_config)).model_dump(mode="json")
    assert left["data_hash"] == read_meta(made_data)["data_hash"]
    assert left["shuffle_pairs"] is False
    assert left["command"].startswith("mmclip pretrain --data")
    assert steps_of(made_run) == [1, 2, 3, 4, 5, 6]
    kept = sorted(p.name for p in (made_run / CHECKPOINTS).iterdir())
    assert kept == ["step_000004", "step_000006"]
    assert not (made_run / "tensorboard").exists()
    assert load_checkpoint(made_run).meta["step"] == 6


def test_tensorboard_gets_the_log_where_it_is_asked_for(arguments: list, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs the extra mmclip[tensorboard]")
    run = tmp_path / "run"
    ended = mmclip(tmp_path, *arguments, "--out", run, "--tensorboard", "--set", "train.steps=1")
    assert ended.code == 0
    assert any((run / "tensorboard").rglob("events*"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line_that_names_its_extra(
    name: str, made_data: Path, small_config: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else 1)
    request = PretrainRequest(
        (made_data,), tmp_path / "run", load_config(str(small_config)), "", **{name: True}
    )
    with pytest.raises(ValueError, match=rf"--{name} .*mmclip\[{name}\]"):
        pretrain(request)
    assert not (tmp_path / "run").exists()


def test_stdout_is_the_path_of_the_newest_checkpoint(arguments: list, tmp_path: Path):
    run = tmp_path / "run"
    ended = mmclip(tmp_path, *arguments, "--out", run, "--set", "train.steps=2")
    assert ended.out == f"{run / CHECKPOINTS / 'step_000002'}\n"
    assert "60 patients" in ended.err and "training: 2/2" in ended.err


def test_equal_commands_give_equal_weights_and_another_seed_others(
    arguments: list, made_run: Path, tmp_path: Path
):
    assert mmclip(tmp_path, *arguments, "--out", tmp_path / "a").code == 0
    assert weights_of(tmp_path / "a") == weights_of(made_run)
    mmclip(tmp_path, *arguments, "--out", tmp_path / "b", "--set", "train.seed=1")
    assert weights_of(tmp_path / "b") != weights_of(made_run)


def test_the_label_control_trains_and_resumes(small_config: Path, tmp_path: Path):
    data, run = write_folder(tmp_path), tmp_path / "run"
    command = ["pretrain", "--data", data, "--config", small_config, "--out", run]
    for override in ("loss.label=1", "unpaired.rows_per_pair=0.5", "train.steps=4"):
        command += ["--set", override]
    assert mmclip(tmp_path, *command).code == 0
    assert all(line["label"] > 0 for line in log_of(run))
    head = load_checkpoint(run).model.label_head
    assert head is not None and head.out_features == 1  # of two labels one is never certain
    finished = weights_of(run)
    shutil.rmtree(find_checkpoint(run))
    assert mmclip(tmp_path, *command, "--resume").code == 0
    assert steps_of(run) == [1, 2, 3, 4] and weights_of(run) == finished


def until(happened: Callable[[], bool], running: Running, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert running.process.is_alive() and time.monotonic() < end
        time.sleep(0.002)


N_STEPS = 80
"""Of a run that is ended under way: so many that it has not finished when it is told to."""


@pytest.fixture(scope="module")
def uninterrupted(
    made_data: Path, small_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of so many steps that nothing ended."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    words = ["pretrain", "--data", made_data, "--config", small_config, "--out", folder / "run"]
    assert mmclip(folder, *words, "--set", f"train.steps={N_STEPS}").code == 0
    return folder / "run"


@pytest.mark.ledger("random numbers")
@pytest.mark.parametrize("n_kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_change_neither_weights_nor_log(
    arguments: list, uninterrupted: Path, tmp_path: Path, n_kills: int
):
    long = [*arguments, "--set", f"train.steps={N_STEPS}"]
    run = tmp_path / "killed"
    log = run / "metrics.jsonl"

    def saved() -> int:
        steps = (
            path.name.removeprefix("step_") for path in (run / CHECKPOINTS).glob("step_*[0-9]")
        )
        return max(map(int, steps), default=0)

    def logged() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    draw = random.Random(0)
    n_while_writing = 0
    for number in range(n_kills):
        # The log is up to two steps ahead of the last checkpoint, and cut when the run goes on.
        before = saved()
        further = before + draw.randint(3, 8)
        running = start(tmp_path / f"kill-{number}", *long, "--out", run, "--resume")
        if number % 2:
            until(lambda: any((run / CHECKPOINTS).glob("*.tmp")), running)
            time.sleep(draw.uniform(0, 0.02))
        else:
            until(lambda: saved() > before and logged() >= further, running)  # noqa: B023
        assert running.kill().code == -9
        n_while_writing += any((run / CHECKPOINTS).glob("*.tmp"))
        for whole in (run / CHECKPOINTS).glob("step_*[0-9]"):
            load_checkpoint(whole)
    assert n_while_writing or n_kills < 10  # a single try may miss
    assert 0 < saved() < N_STEPS
    assert mmclip(tmp_path, *long, "--out", run, "--resume").code == 0
    assert weights_of(run) == weights_of(uninterrupted)
    ours, theirs = (
        load_trainer_state(find_checkpoint(r))["optimizer"]["state"] for r in (run, uninterrupted)
    )
    for parameter, moments in theirs.items():
        assert all(torch.equal(ours[parameter][name], moments[name]) for name in moments)
    assert steps_of(run) == list(range(1, N_STEPS + 1))
    for line, whole in zip(log_of(run), log_of(uninterrupted), strict=True):
        assert {**line, "images_per_s": 0} == {**whole, "images_per_s": 0}
    assert not list((run / CHECKPOINTS).glob("*.tmp"))


@pytest.mark.parametrize(("asks", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_ends_a_run_after_its_step_and_resume_changes_nothing(
    arguments: list, uninterrupted: Path, tmp_path: Path, asks: str, code: int
):
    long = [*arguments, "--set", f"train.steps={N_STEPS}", "--set", "train.save_every_steps=1000"]
    run = tmp_path / "run"
    running = start(tmp_path / "interrupted", *long, "--out", run)
    until(lambda: (run / "metrics.jsonl").exists(), running)
    os.kill(running.pid, getattr(signal, asks))
    ended = running.wait()
    assert ended.code == code and ended.out == "" and "Traceback" not in ended.err
    step = int(find_checkpoint(run).name.removeprefix("step_"))
    assert 0 < step < N_STEPS
    said = ended.err.splitlines()
    assert f"stopped after step {step} of {N_STEPS}, which {run} holds" in said
    assert any(
        line.startswith("the same command with --resume goes on: mmclip pretrain ")
        and line.endswith(f"--out {run} --resume")
        for line in said
    )
    if asks == "SIGINT":
        assert mmclip(tmp_path, *long, "--out", run, "--resume").code == 0
        assert weights_of(run) == weights_of(uninterrupted)


def test_resuming_a_finished_run_changes_nothing(arguments: list, made_run: Path, tmp_path: Path):
    run = shutil.copytree(made_run, tmp_path / "run")
    ended = mmclip(tmp_path, *arguments, "--out", run, "--resume")
    assert ended.code == 0
    assert ended.out == f"{run / CHECKPOINTS / 'step_000006'}\n"
    assert weights_of(run) == weights_of(made_run)
    assert steps_of(run) == steps_of(made_run)


def test_a_run_remembers_the_command_that_began_it_and_those_that_went_on(
    arguments: list, made_run: Path, tmp_path: Path
):
    began = json.loads((made_run / "config.json").read_text())
    assert began["resumed_by"] == []
    run = shutil.copytree(made_run, tmp_path / "run")
    shutil.rmtree(run / CHECKPOINTS / "step_000006")
    for n_resumed in (1, 2):
        # --cpu once or twice: the commands are told apart by their words.
        words = ["--out", run, "--resume", *["--cpu"] * n_resumed]
        assert mmclip(tmp_path, *arguments, *words).code == 0
        left = json.loads((run / "config.json").read_text())
        assert left["command"] == began["command"]
        assert [c.count("--cpu") for c in left["resumed_by"]] == [1, 2][:n_resumed]
    made = load_checkpoint(run).meta  # by the first: there was nothing left to do for the second
    assert made["command"] == began["command"] and len(made["resumed_by"]) == 1


def test_a_run_is_not_trained_over(arguments: list, made_run: Path, tmp_path: Path):
    error = mmclip(tmp_path, *arguments, "--out", made_run).error()
    assert f"{made_run} already holds a run (step_000006); add --resume" in error


def test_a_batch_that_repeats_images_is_told_and_trains(small_config: Path, tmp_path: Path):
    data = write_folder(tmp_path)
    command = ["pretrain", "--data", data, "--config", small_config, "--set", "train.steps=1"]
    ended = mmclip(tmp_path, *command, "--out", tmp_path / "run", "--set", "train.batch_size=64")
    assert ended.code == 0 and log_of(tmp_path / "run")
    said = (
        "repeat within every step: train.batch_size=64 and there are 6 pairs; set it to at most 6"
    )
    assert ended.err.count(said) == 1  # of 8 images one is a lateral, and one has no report


def test_what_repeats_is_told_of_each_stream_and_only_where_it_does():
    def told(size: int, ratio: float) -> str:
        given = [f"train.batch_size={size}", f"unpaired.rows_per_pair={ratio}"]
        return "\n".join(repeats(load_config("tiny", given), n_pairs=8, n_unpaired=4))

    assert told(8, 0.5) == "" and told(8, 0) == ""
    assert "there are 8 pairs; set it to at most 8" in told(9, 0) and "unpaired" not in told(9, 0)
    assert "reads 8 unpaired images and there are 4; set it to at most 0.5" in told(8, 1)
    assert "batch_size" not in told(8, 1)
    # Both hints are followed together: each speaks of the batch that the other leaves.
    assert told(16, 0.5).endswith("reads 8 unpaired images and there are 4; with "
                                  "train.batch_size=8 it reads 4")  # fmt: skip
    assert told(16, 1).endswith("there are 4; set it to at most 0.5")


def test_pairs_train_alone_and_a_line_says_so_where_no_image_is_unpaired(
    arguments: list, made_run: Path, tmp_path: Path
):
    for number, key in enumerate(("unpaired.rows_per_pair=1", "unpaired.rows_per_pair=0.01")):
        run = tmp_path / str(number)
        ended = mmclip(tmp_path, *arguments, "--out", run, "--set", key)
        assert ended.code == 0, ended.err
        assert ended.err.count("no training image has labels and no report") == 1
        assert "pairs train alone" in ended.err and "repeat within" not in ended.err
        assert weights_of(run) == weights_of(made_run)
    labels = ["--set", "loss.label=1", "--set", "unpaired.rows_per_pair=1"]
    error = mmclip(tmp_path, *arguments, "--out", tmp_path / "label", *labels).error()
    assert "of which loss.label=1 learns; add a data folder with labelled images" in error


def test_another_configuration_does_not_resume(arguments: list, made_run: Path, tmp_path: Path):
    other = ("train.steps=8",)
    ended = mmclip(tmp_path, *arguments, "--out", made_run, "--resume", "--set", *other)
    assert "another config: train.steps was 6, is 8; resume" in ended.error()


def test_a_run_of_a_version_that_lacked_a_key_goes_on_where_the_key_has_its_default(
    arguments: list, made_run: Path, tmp_path: Path
):
    run = shutil.copytree(made_run, tmp_path / "run")
    for checkpoint in (run / CHECKPOINTS).iterdir():
        config = checkpoint_meta(checkpoint)["config"]
        del config["loss"]["local"], config["contrastive"]
        reseal(checkpoint, config=config)
    resume = (*arguments, "--out", run, "--resume")
    error = mmclip(tmp_path, *resume, "--set", "loss.local=1").error()
    assert "another config: loss.local was 0.0, is 1.0; resume" in error
    ended = mmclip(tmp_path, *resume)
    assert ended.code == 0, ended.err


@pytest.fixture
def other_data(made_raw: Path, tmp_path: Path) -> Path:
    """The synthetic data without its last image."""
    raw = shutil.copytree(made_raw, tmp_path / "raw")
    table = (raw / "studies.csv").read_text("utf-8").splitlines(keepends=True)
    (raw / "studies.csv").write_text("".join(table[:-1]), "utf-8")
    return build_made(raw, tmp_path / "other")


def test_other_data_does_not_resume(
    made_data: Path, other_data: Path, made_run: Path, small_config: Path, tmp_path: Path
):
    shared = ("--config", small_config, "--out", made_run, "--resume")
    error = mmclip(tmp_path, "pretrain", "--data", other_data, *shared).error()
    assert "other data" in error
    for folder in (made_data, other_data):
        assert read_meta(folder)["data_hash"][:12] in error


def test_a_run_on_true_pairs_does_not_resume_on_shuffled_ones(
    arguments: list, made_run: Path, tmp_path: Path
):
    run = shutil.copytree(made_run, tmp_path / "run")
    ended = mmclip(tmp_path, *arguments, "--out", run, "--resume", "--shuffle-pairs")
    assert "shuffle" in ended.error()


@pytest.mark.ledger("shuffled controls")
def test_shuffled_pairs_are_said_recorded_and_trained_on(
    arguments: list, made_run: Path, tmp_path: Path
):
    ended = mmclip(tmp_path, *arguments, "--out", tmp_path / "run", "--shuffle-pairs")
    assert ended.code == 0
    assert "control: every image has the report of another image" in ended.err
    assert load_checkpoint(tmp_path / "run").meta["shuffle_pairs"] is True
    assert weights_of(tmp_path / "run") != weights_of(made_run)


def test_an_unknown_key_is_one_line_with_the_known_ones(arguments: list, tmp_path: Path):
    ended = mmclip(tmp_path, *arguments, "--out", tmp_path / "run", "--set", "train.step=3")
    error = ended.error()
    assert "unknown key 'train.step'" in error
    assert "base_lr" in error and "save_every_steps" in error and "steps" in error
    assert not (tmp_path / "run").exists()


def test_two_processes_train_the_model_of_one_and_print_its_path_once(
    arguments: list, made_run: Path, tmp_path: Path
):
    run = tmp_path / "run"
    first, second = mmclip_in_two_processes(tmp_path, *arguments, "--out", run)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out + second.out == f"{run / CHECKPOINTS / 'step_000006'}\n"
    assert "cpu x 2" in first.err + second.err
    losses = [[line["loss"] for line in log_of(r)] for r in (run, made_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert load_checkpoint(run).meta["step"] == 6


LIMIT_S = 900
"""Of a part of a test that waits for processes; only one that hangs reaches it."""


@pytest.mark.slow
@pytest.mark.parametrize(("asks", "hosts"), [("SIGTERM", 1), ("SIGINT", 1), ("SIGUSR1", 2)])
def test_a_signal_ends_all_processes_after_one_step_and_resume_changes_nothing(
    arguments: list, tmp_path: Path, asks: str, hosts: int
):
    """Two processes of one `torchrun`, or two `torchrun`s of one process that meet by 127.0.0.1.

    It takes 20 s on an idle machine and two minutes on a busy one; the limits are for those that
    are several times as slow.
    """
    long = [*arguments, "--set", "train.steps=400", "--set", "train.save_every_steps=1000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def launch(*more: object) -> list[subprocess.Popen]:
        port = free_port()
        meet = [
            [
                f"--nnodes={hosts}",
                f"--node-rank={host}",
                "--nproc-per-node=1",
                "--master-addr=127.0.0.1",
                f"--master-port={port}",
            ]
            for host in range(hosts)
        ]
        if hosts == 1:
            meet = [["--standalone", "--nproc-per-node=2"]]
        handled = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
        return [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *each, handled, "-m", "mmclip",
                 *map(str, [*long, *more])], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, cwd=Path(__file__).parents[1], env=env,
            )
            for each in meet
        ]  # fmt: skip

    run, whole = tmp_path / "run", tmp_path / "whole"
    started = launch("--out", run)
    end = time.monotonic() + LIMIT_S
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < end and all(each.poll() is None for each in started)
        time.sleep(0.01)
    told = psutil.Process(started[-1].pid)
    if hosts > 1:  # a process of one host alone: a `torchrun` that is told waits for no other host
        (told,) = told.children()
    told.send_signal(getattr(signal, asks))
    said = "".join(each.communicate(timeout=LIMIT_S)[1] for each in started)
    step = int(find_checkpoint(run).name.removeprefix("step_"))
    assert 0 < step < 400
    assert said.count(f"stopped after step {step} of 400") == 1
    assert said.count("the same command with --resume goes on: mmclip pretrain") == 1
    for command in (("--out", run, "--resume"), ("--out", whole)):
        hosts_of_run = launch(*command)
        said = "".join(each.communicate(timeout=LIMIT_S)[1] for each in hosts_of_run)
        assert [each.returncode for each in hosts_of_run] == [0] * hosts, said
    assert weights_of(run) == weights_of(whole)
    assert [{**line, "images_per_s": 0} for line in log_of(run)] == [
        {**line, "images_per_s": 0} for line in log_of(whole)
    ]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A pretrained text encoder as it lies on disk: BERT, with dropout, and its tokenizer."""
    texts = [
        "there is a large left pleural effusion", "the heart is enlarged", "clear lungs",
        "cardiomegaly", "pulmonary edema", "lung mass", "nodule", "pneumothorax", "consolidation",
        "pneumonia", "atelectasis", "fracture",
    ]  # fmt: skip
    tokenizer = train_tokenizer(texts * 2, vocab_size=200)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=128, hidden_dropout_prob=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_pretrained_encoder_trains_in_training_mode(made_data: Path, tmp_path: Path):
    # transformers loads in evaluation mode, in which batch norm does not follow the images.
    torch.manual_seed(0)
    folder = tmp_path / "resnet"
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    ResNetModel(ResNetConfig(layer_type="basic", **sizes)).save_pretrained(folder)
    config = load_config(
        "tiny", [f"model.image.pretrained='{folder}'", "data.image_size=32", "train.steps=2",
                 "train.batch_size=4", "model.text.width=16"],
    )  # fmt: skip
    pretrain(PretrainRequest((made_data,), tmp_path / "run", config, "test", cpu=True))
    weights = load_checkpoint(tmp_path / "run").model.state_dict()
    tracked = [int(v) for name, v in weights.items() if name.endswith("num_batches_tracked")]
    assert tracked and set(tracked) == {2}


@pytest.mark.ledger("initialisation")
def test_a_run_from_a_pretrained_text_encoder_needs_its_folder_only_once(
    arguments: list, bert: Path, made_data: Path, tmp_path: Path
):
    run = tmp_path / "run"
    named = [*arguments, "--set", f"model.text.pretrained={bert}", "--set", "data.max_tokens=64"]
    ended = mmclip(tmp_path, *named, "--out", run)
    assert ended.code == 0, ended.err
    assert "missing and newly initialised 0; not used 0; other shape 0" in ended.err
    bert.rename(tmp_path / "gone")
    # Killed after step 4 and resumed: the same weights, so the checkpoint has turned dropout off.
    resumed = shutil.copytree(run, tmp_path / "resumed")
    shutil.rmtree(resumed / CHECKPOINTS / "step_000006")
    assert mmclip(tmp_path, *named, "--out", resumed, "--resume").code == 0
    assert weights_of(resumed) == weights_of(run)
    scored = mmclip(
        tmp_path, "zeroshot", "--model", run, "--data", made_data, "--out", tmp_path / "scores",
        "--n-resamples", "10", "--finding", "pleural effusion",
    )  # fmt: skip
    assert scored.code == 0, scored.err


def test_a_pretrained_encoder_that_is_not_there_is_one_line_with_a_remedy(
    arguments: list, tmp_path: Path
):
    missing = f"model.text.pretrained={tmp_path / 'nowhere'}"
    ended = mmclip(tmp_path, *arguments, "--out", tmp_path / "run", "--set", missing)
    assert "nowhere" in ended.error() and "give a folder" in ended.error()
