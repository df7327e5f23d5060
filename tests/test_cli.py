"""The command line: help with examples, errors in one clear line, results alone on stdout."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import mmclip as package
from mmclip import doctor
from mmclip.cli import app, tables
from mmclip.cli.shared import check_results
from mmclip.data.ingest.sources import READERS
from mmclip.data.synthetic import FINDINGS, PRESETS
from mmclip.demo import _place
from mmclip.doctor import OPTIONAL
from tests.commands import Ended, mmclip
from tests.made import reseal


def all_commands(command, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], TyperCommand]:
    """Every command by the words that call it, groups left out."""
    if not isinstance(command, TyperGroup):
        return {path: command}
    found = {}
    for name in command.list_commands(NO_CONTEXT):
        found |= all_commands(command.get_command(NO_CONTEXT, name), (*path, name))
    return found


NO_CONTEXT = get_command(app).make_context("mmclip", [], resilient_parsing=True)
COMMANDS = all_commands(get_command(app))
NAMES = {" ".join(path[:2]) for path in COMMANDS}
"""The commands as a reader of the documents knows them: `data build` is one."""


@pytest.fixture(scope="module")
def help_text(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What a command prints with --help, each asked once; 80 columns wide, as it is no terminal."""
    folder = tmp_path_factory.mktemp("help")

    @cache
    def text(*path: str) -> str:
        shown = mmclip(folder, *path, "--help")
        assert shown.code == 0, shown.err
        return shown.out

    return text


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_an_example_that_parses(
    path: tuple[str, ...], help_text: Callable[..., str]
):
    assert "Example: mmclip" in help_text(*path)
    command = COMMANDS[path]
    examples = re.findall(r"Example: `mmclip (.+)`", command.help or "")
    assert examples
    for example in examples:
        words = example.split()
        assert tuple(words[: len(path)]) == path
        command.make_context(" ".join(path), words[len(path) :])  # raises on an unknown option


def test_every_option_says_what_it_is():
    silent = [
        (*path, parameter.name)
        for path, command in COMMANDS.items()
        for parameter in command.params
        if parameter.name != "help" and not getattr(parameter, "help", None)
    ]
    assert not silent


def test_the_version_is_that_of_the_package_and_alone_on_stdout(tmp_path: Path):
    assert mmclip(tmp_path, "--version") == (0, f"{package.__version__}\n", "")
    code = [sys.executable, "-m", "mmclip", "--version"]
    assert subprocess.check_output(code, text=True, timeout=60) == f"{package.__version__}\n"


@pytest.fixture(scope="module")
def shared(made_run: Path, made_data: Path, made_results: Path) -> dict[str, Path]:
    """Folders that a command can be given by name."""
    return {
        "run": made_run,
        "data": made_data,
        "checkpoint": made_run / "checkpoints/step_000006",
        "results": made_results,
    }


FEW = ("--finding", "nodule", "--finding", "mass")
"""Findings of which a page is soon drawn."""


def zeroshot_of(shared: dict[str, Path], tmp_path: Path, *more: str | Path) -> Ended:
    given = ("--model", shared["run"], "--data", shared["data"], "--n-resamples", "5")
    return mmclip(tmp_path, "zeroshot", "--out", tmp_path / "out", *given, *more)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_the_caller_closed_is_no_error(closed: str):
    said = ["--version", "--help", "predict -h", "no-such-command"]
    code = "import sys; from mmclip.cli import main; sys.argv = ['mmclip', *sys.argv[1:]]; main()"
    for arguments, expected in zip(said, (0, 0, 0, 2), strict=True):
        line = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {arguments} {closed}"
        ran = subprocess.run(
            ["/bin/sh", "-c", line], capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == expected, ran.stderr
        assert "AttributeError" not in ran.stderr


def test_zeroshot_prints_the_page_on_stdout_and_the_table_on_stderr(
    shared: dict[str, Path], tmp_path: Path
):
    ended = zeroshot_of(shared, tmp_path)
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out' / 'page.html'}\n")
    assert (tmp_path / "out" / "page.html").is_file()
    assert "AUROC" in ended.err and "Warning" not in ended.err
    assert all(finding in ended.err for finding in FINDINGS)


def test_zeroshot_writes_over_results_of_the_same_command_alone(
    shared: dict[str, Path], tmp_path: Path
):
    first = zeroshot_of(shared, tmp_path, *FEW)
    assert first.code == 0 and "again" not in first.err
    left = (tmp_path / "out/results.json").read_text("utf-8")
    error = zeroshot_of(shared, tmp_path, *FEW, "--split", "val").error()
    assert "already holds results of `mmclip zeroshot --out" in error and "--overwrite" in error
    assert (tmp_path / "out/results.json").read_text("utf-8") == left
    repeat = zeroshot_of(shared, tmp_path, *FEW)
    assert repeat.code == 0 and f"{tmp_path / 'out'} holds results of this very" in repeat.err


def test_zeroshot_does_not_write_over_results_that_it_cannot_read(
    shared: dict[str, Path], tmp_path: Path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text("{", "utf-8")
    error = zeroshot_of(shared, tmp_path).error()
    assert "results.json" in error and "--overwrite" in error
    assert zeroshot_of(shared, tmp_path, "--overwrite", *FEW).code == 0


@pytest.mark.parametrize("stage", ["zeroshot", "pretrain"])
def test_nothing_is_written_among_other_things(shared: dict[str, Path], tmp_path: Path, stage: str):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/image.png").write_bytes(b"mine")
    if stage == "zeroshot":
        error = zeroshot_of(shared, tmp_path, "--overwrite").error()
    else:
        (tmp_path / "out").rename(tmp_path / "new")
        error = pretrain_on("data")(shared, tmp_path).error()
        (tmp_path / "new").rename(tmp_path / "out")
    assert "holds other things, such as image.png; name a new or empty folder by" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["image.png"]


def test_data_build_prints_the_folder_on_stdout_and_the_counts_on_stderr(
    made_raw: Path, made_data: Path, tmp_path: Path
):
    given = ("--root", made_raw, "--mapping", made_raw / "mapping.toml", "--image-size", "32")
    out = tmp_path / "data"
    ended = mmclip(tmp_path, "data", "build", "csv", *given, "--out", out, "--workers", "1")
    assert (ended.code, ended.out) == (0, f"{out}\n")
    meta = json.loads((out / "meta.json").read_text())
    assert f"data hash {meta['data_hash'][:16]}" in ended.err
    assert meta["data_hash"] == json.loads((made_data / "meta.json").read_text())["data_hash"]
    again = mmclip(tmp_path, "data", "build", "csv", *given, "--out", out, "--workers", "1")
    assert "already holds a finished build" in again.error() and "--overwrite" in again.error()


def pretrain_on(data: str, *more: str) -> Callable[[dict[str, Path], Path], Ended]:
    """Trains on one of the shared folders, or on a folder in tmp_path."""

    def run(shared: dict[str, Path], tmp_path: Path) -> Ended:
        folder = shared.get(data, tmp_path / data)
        return mmclip(
            tmp_path, "pretrain", "--data", folder, "--out", tmp_path / "new", *more,
            "--set", "train.steps=1",
        )  # fmt: skip

    return run


def score(*more: str, run: str = "run", data: str = "data") -> Callable:
    """Scores with one of the shared folders, or a folder in tmp_path, in either place."""

    def call(shared: dict[str, Path], tmp_path: Path) -> Ended:
        folders = {name: shared.get(name, tmp_path / name) for name in (run, data)}
        return zeroshot_of({"run": folders[run], "data": folders[data]}, tmp_path, *more)

    return call


def build(name: str, *more: str) -> Callable:
    """Builds from an empty folder."""

    def call(shared: dict[str, Path], tmp_path: Path) -> Ended:
        given = ("--root", tmp_path / "raw", "--out", tmp_path / "built")
        return mmclip(tmp_path, "data", "build", name, *given, *more)

    return call


AT_32_PX = ("--set", "data.image_size=32")

ERRORS = {
    "no such data folder": (pretrain_on("nowhere"), ["nowhere is no finished data folder"]),
    "a run as data": (pretrain_on("run", *AT_32_PX), ["no finished data folder", "mmclip data"]),
    "images of another size": (
        pretrain_on("data"),
        ["32 px, 64 px are needed", "--set data.image_size=32", "--image-size 64"],
    ),
    "unknown configuration": (
        pretrain_on("data", "--config", "huge"),
        ["no configuration 'huge'", "demo, paper, recommended"],
    ),
    "no such TOML": (pretrain_on("data", "--config", "a.toml"), ["a.toml cannot be read"]),
    "no override": (pretrain_on("data", "--set", "steps"), ["'steps' is no override"]),
    "a value out of range": (
        pretrain_on("data", "--set", "train.batch_size=1"),
        ["train.batch_size", "greater than 1"],
    ),
    "no such run": (score(run="nowhere"), ["nowhere holds no finished checkpoint"]),
    "data as a run": (score(run="data"), ["holds no finished checkpoint", "mmclip pretrain"]),
    "no such scored folder": (score(data="nowhere"), ["nowhere is no finished data folder"]),
    "unknown source": (score("--source", "chexpert"), ["no source chexpert", "synthetic"]),
    "unknown split": (score("--split", "dev"), ["'dev' is none of train, val, test"]),
    "unknown finding": (score("--finding", "gout"), ["labelled with gout", "nodule"]),
    "a finding named twice": (score(*["--finding", "mass"] * 2), ["name each column once"]),
    "unknown prompts": (score("--prompts", "rare"), ["no prompt set 'rare'", "default"]),
    "unknown reader": (build("mimic"), ["no reader 'mimic'", "csv, dicom, own, chestxray14"]),
    "nothing to build from": (build("openi"), ["no folder", "--root"]),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_is_one_line_that_names_the_value_and_the_rule(
    shared: dict[str, Path], tmp_path: Path, what: str
):
    call, parts = ERRORS[what]
    error = call(shared, tmp_path).error()
    assert all(part in error for part in parts), error
    assert "unexpected" not in error
    assert not (tmp_path / "new").exists() and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def built_at_24_px(made_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as the command line builds it, in a folder whose name has a blank."""
    folder = tmp_path_factory.mktemp("other size")
    given = ("--root", made_raw, "--mapping", made_raw / "mapping.toml", "--image-size", "24")
    out = folder / "my images"
    assert mmclip(folder, "data", "build", "csv", *given, "--out", out, "--overwrite").code == 0
    return out


@pytest.mark.parametrize("stage", ["pretrain", "zeroshot"])
def test_images_of_another_size_come_with_the_command_that_builds_the_right_ones(
    shared: dict[str, Path], built_at_24_px: Path, tmp_path: Path, stage: str
):
    def call(folder: str | Path, *more: str) -> Ended:
        if stage == "zeroshot":
            given = {"run": shared["run"], "data": Path(folder)}
            return zeroshot_of(given, tmp_path, *FEW, *more)
        return pretrain_on(str(folder), "--set", "data.image_size=32", *more)(shared, tmp_path)

    error = call(built_at_24_px).error()
    assert "have 24 px, 32 px are needed" in error
    (command,) = re.findall(r"`mmclip (data build .+?)`", error)
    *words, option, out = shlex.split(command)
    assert option == "--out" and out == f"{built_at_24_px}-32px"
    assert mmclip(tmp_path, *words, option, str(tmp_path / "again")).code == 0
    assert call(tmp_path / "again").code == 0
    # Only who trains can take the images as they are; a run has its size.
    setting = re.findall(r"--set (\S+)", error)
    assert setting == (["data.image_size=24"] if stage == "pretrain" else [])
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    if setting:
        assert call(built_at_24_px, "--set", *setting).code == 0


MISSPELT = (
    "zeroshot --model nowhere --data DATA --out OUT",
    "zeroshot --model RUN --data nowhere --out OUT",
    "zeroshot --model RUN --data DATA --protocol nowhere --out OUT",
    "zeroshot --model RUN --data DATA --prompts nowhere --out OUT",
    "zeroshot --model RUN --data DATA --split nowhere --out OUT",
    "retrieve --model nowhere --data DATA --evaluate --out OUT",
    "retrieve --model RUN --data nowhere --evaluate --out OUT",
    "pretrain --data nowhere --out FULL",
    "pretrain --data DATA --config nowhere --out FULL",
    "demo --set train.nowhere=1 --out OUT",
    "explain --model nowhere --image a.png --phrase a --out OUT/a.png",
    "explain --model RUN --image nowhere --phrase a --out OUT/a.png",
    "explain --model RUN --data DATA --image-id nowhere --phrase a --out OUT/a.png",
    "explain --model RUN --data DATA --evaluate --boxes synthetic=nowhere --out OUT/a.json",
    "finetune --model RUN --data nowhere --finding mass --out OUT",
    "data build openi --root nowhere --out OUT",
)
"""Commands of which one input is misspelt, and whose --out holds results or other things."""


@pytest.mark.parametrize("command", MISSPELT)
def test_what_is_misspelt_is_told_before_what_is_in_out(
    shared: dict[str, Path], tmp_path: Path, command: str
):
    there = {"OUT": ("results.json", "retrieval.json", "a.png", "a.json"), "FULL": ("mine.txt",)}
    for folder, names in there.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("{")
    places = {"RUN": shared["run"], "DATA": shared["data"]}
    places |= {folder: tmp_path / folder for folder in there}
    words = [re.sub("^[A-Z]+", lambda m: str(places[m[0]]), word) for word in command.split()]
    error = mmclip(tmp_path, *words).error()
    assert "nowhere" in error and "--overwrite" not in error and "other things" not in error


def test_a_checkpoint_as_data_is_one_clear_line(shared: dict[str, Path], tmp_path: Path):
    error = pretrain_on("checkpoint", *AT_32_PX)(shared, tmp_path).error()
    assert "no finished data folder" in error


def test_an_unfinished_data_folder_is_told_from_a_finished_one(
    made_data: Path, shared: dict[str, Path], tmp_path: Path
):
    shutil.copytree(made_data, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "meta.json").unlink()
    error = pretrain_on("unfinished", *AT_32_PX)(shared, tmp_path).error()
    assert "no finished data folder (meta.json is missing)" in error
    error = pretrain_on("nowhere", *AT_32_PX)(shared, tmp_path).error()
    assert "no finished data folder (there is no such folder)" in error


def test_a_folder_around_the_right_one_is_answered_with_the_right_one(
    shared: dict[str, Path], tmp_path: Path
):
    demo = tmp_path / "demo"
    for name in ("run", "data"):
        shutil.copytree(shared[name], demo / name)
    error = score(run="demo")(shared, tmp_path).error()
    assert f"{demo} holds no finished checkpoint; did you mean {demo / 'run'}, which does?" in error
    error = score(run="demo/run/checkpoints")(shared, tmp_path).error()
    assert f"did you mean {demo / 'run'}, which does?" in error
    error = score(data="demo")(shared, tmp_path).error()
    assert f"{demo} is no finished data folder" in error
    assert f"did you mean {demo / 'data'}, which is one?" in error


def test_a_corrupt_run_is_one_line_that_names_the_file(
    made_run: Path, shared: dict[str, Path], tmp_path: Path
):
    run = shutil.copytree(made_run, tmp_path / "broken")
    weights = run / "checkpoints/step_000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    error = score(run="broken")(shared, tmp_path).error()
    assert f"{weights} is missing or damaged" in error and "take an older checkpoint" in error


def test_an_error_of_several_lines_is_said_in_one(
    made_run: Path, shared: dict[str, Path], tmp_path: Path
):
    run = shutil.copytree(made_run, tmp_path / "other")
    saved = run / "checkpoints/step_000006"
    config = json.loads((saved / "meta.json").read_text())["config"]
    reseal(saved, config={**config, "model": {**config["model"], "embed_dim": 8}})
    assert "size mismatch" in score(run="other")(shared, tmp_path).error()


def test_debug_gives_the_traceback(shared: dict[str, Path], tmp_path: Path):
    given = ("--data", tmp_path / "nowhere", "--out", tmp_path / "new")
    ended = mmclip(tmp_path, "--debug", "pretrain", *given)
    assert ended.code == 1
    assert "Traceback" in ended.err and "ManifestError" in ended.err


def test_an_option_that_is_missing_or_unknown_is_one_line_that_names_the_help(tmp_path: Path):
    for arguments, said in (
        (["pretrain", "--data", "a"], "error: missing option '--out'; see mmclip pretrain --help"),
        (["zeroshot", "--ru", "a"], "error: no such option: --ru"),
        (["data", "build", "csv", "--image-size", "x"], "see mmclip data build csv --help"),
        (["train"], "error: no such command 'train'"),
    ):
        ended = mmclip(tmp_path, *arguments)
        assert ended.code == 2 and ended.out == "", arguments
        (line,) = ended.err.splitlines()
        assert line.startswith("error: ") and said in line and line.endswith(" --help")


def test_the_name_of_a_group_alone_shows_its_help(tmp_path: Path):
    ended = mmclip(tmp_path, "data")
    assert ended.code == 2 and "Commands" in ended.out + ended.err
    assert "error:" not in ended.err


def test_doctor_finds_sound_folders_sound(shared: dict[str, Path], tmp_path: Path):
    ended = mmclip(tmp_path, "doctor", *shared.values())
    assert ended.code == 0, ended.err
    assert "BAD" not in ended.err and "checksum as built" in ended.err
    assert ended.err.count("step_000006 of data") == 2
    n_scored = len(json.loads((shared["results"] / "results.json").read_text())["findings"])
    assert f"AUROC of {n_scored} findings from scores.npz as in results.json" in ended.err


def test_doctor_examines_a_run_and_the_results_in_its_folder(
    shared: dict[str, Path], tmp_path: Path
):
    folder = shutil.copytree(shared["run"], tmp_path / "both")
    shutil.copytree(shared["results"], folder, dirs_exist_ok=True)
    ended = mmclip(tmp_path, "doctor", folder)
    assert ended.code == 0, ended.err
    assert "step_000006 of data" in ended.err and "as in results.json" in ended.err


def test_doctor_knows_what_fine_tuning_retrieval_and_explanations_leave(
    shared: dict[str, Path], tmp_path: Path
):
    run, out = shutil.copytree(shared["run"], tmp_path / "run"), tmp_path / "out"
    given = ("--model", run, "--data", shared["data"])
    learn = ("--finding", "nodule", "--fraction", "1", "--seed", "0", "--n-resamples", "5")
    few = ("--method", "full", "--set", "train.steps=2", "--set", "train.batch_size=8")
    for arguments in (
        ("finetune", *given, *learn, "--out", out / "probe"),
        ("finetune", *given, *learn, *few, "--out", out / "full"),
        ("retrieve", *given, "--evaluate", "--n-resamples", "5", "--out", out / "retrieval"),
        ("retrieve", *given, "--phrase", "nodule", "--out", out / "search"),
    ):
        ended = mmclip(tmp_path, *arguments)
        assert ended.code == 0, ended.err
    full = out / "full/full-100-0"
    (checkpoint,) = (full / "checkpoints").iterdir()
    folders = (out / "probe", out / "probe/probe-100-0", out / "full", full, checkpoint)
    folders += (out / "retrieval", out / "search", run / "embeddings")
    ended = mmclip(tmp_path, "doctor", *folders)
    assert ended.code == 0 and "BAD" not in ended.err, ended.err
    for said in ("full fine-tuning for nodule", "ranks.npz: ", "found.png", "checksum as written"):
        assert said in ended.err, said
    stored = next((run / "embeddings").glob("*.npy"))
    for file, folder in (
        (full / "results.json", out / "full"),
        (checkpoint / "model.safetensors", full),
        (out / "probe/summary.json", out / "probe"),
        (out / "retrieval/ranks.npz", out / "retrieval"),
        (stored, run / "embeddings"),
    ):
        cut(file)
        ended = mmclip(tmp_path, "doctor", folder)
        bad = [line for line in ended.err.splitlines() if line.startswith("BAD")]
        assert ended.code == 1 and any(file.name in line for line in bad), (file, ended.err)


@pytest.mark.parametrize("file", ["ranks.npz", "retrieval.json"])
def test_doctor_finds_changed_results_of_retrieval(shared: dict[str, Path], tmp_path: Path, file):
    given = ("--model", shared["run"], "--data", shared["data"], "--cpu", "--n-resamples", "5")
    out = tmp_path / "out"
    assert mmclip(tmp_path, "retrieve", *given, "--evaluate", "--out", out).code == 0
    if file == "ranks.npz":
        with np.load(out / file) as stored:
            arrays = dict(stored)
        np.savez_compressed(out / file, **{name: a[::-1] for name, a in arrays.items()})
    else:
        (out / file).write_text((out / file).read_text().replace('"n_images": ', '"n_images": 9'))
    ended = mmclip(tmp_path, "doctor", out)
    (bad,) = (line for line in ended.err.splitlines() if line.startswith("BAD"))
    assert ended.code == 1 and file in bad and "checksum differs" in bad


def test_doctor_knows_results_and_maps_of_explanations(tmp_path: Path):
    results = {"command": "mmclip explain", "saliency_maps": {}, "sanity": {}, "n_images": 1092}
    (tmp_path / "a.json").write_text(json.dumps(results))
    (tmp_path / "b.png").touch()
    np.savez(tmp_path / "b.npz", saliency=np.zeros((4, 5)))
    ended = mmclip(tmp_path / "log", "doctor", tmp_path)
    assert ended.code == 0, ended.err
    assert "a.json of 1,092 images" in ended.err and "b.npz: saliency (4, 5)" in ended.err


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def swap_scores(path: Path) -> None:
    """Gives the images of scores.npz the scores of other images."""
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **arrays | {"scores": arrays["scores"][::-1]})


STEP = "checkpoints/step_000006"


@pytest.mark.parametrize(
    ("kind", "file", "damage"),
    [
        ("data", "images.npy", flip_last_bit),
        ("data", "images.npy", Path.unlink),
        ("data", "samples.parquet", cut),
        ("data", "samples.parquet", Path.unlink),
        ("data", "meta.json", cut),
        ("data", "meta.json", Path.unlink),
        ("run", f"{STEP}/model.safetensors", flip_last_bit),
        ("run", f"{STEP}/model.safetensors", Path.unlink),
        ("run", f"{STEP}/trainer.pt", flip_last_bit),
        ("run", f"{STEP}/trainer.pt", Path.unlink),
        ("run", f"{STEP}/tokenizer/tokenizer.json", cut),
        ("run", f"{STEP}/meta.json", cut),
        ("run", f"{STEP}/meta.json", Path.unlink),
        ("results", "results.json", cut),
        ("results", "scores.npz", cut),
        ("results", "scores.npz", swap_scores),
        ("results", "scores.npz", Path.unlink),
        ("results", "page.html", Path.unlink),
    ],
)
def test_doctor_finds_a_damaged_folder_and_names_the_file(
    shared: dict[str, Path], tmp_path: Path, kind: str, file: str, damage: Callable[[Path], None]
):
    folder = shutil.copytree(shared[kind], tmp_path / "folder")
    damage(folder / file)
    ended = mmclip(tmp_path, "doctor", shared["data"], folder)
    assert ended.code == 1
    assert ended.out == "" and "Traceback" not in ended.err and "error: " not in ended.err
    (bad,) = (line for line in ended.err.splitlines() if line.startswith("BAD"))
    assert Path(file).name in bad


def test_doctor_names_every_package_of_every_extra():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    of_extras = {
        re.match(r"[\w.-]+", requirement)[0]: extra  # pyright: ignore[reportOptionalSubscript]
        for extra, requirements in extras.items()
        if extra not in ("dev", "docs")  # of those who work on mmclip
        for requirement in requirements
    }
    assert of_extras == OPTIONAL


def test_doctor_says_how_a_package_that_is_not_installed_is_had(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "dask"})
    (found,) = (f for f in doctor.examine_machine() if f.what == "no-such-package")
    assert found.is_sound
    assert found.detail == "not installed (optional; pip install 'mmclip[dask]')"


def test_doctor_says_of_any_other_folder_what_it_is_not(tmp_path: Path):
    ended = mmclip(tmp_path, "doctor", tmp_path, tmp_path / "nowhere")
    assert ended.code == 1
    assert (
        f"{tmp_path} is no data folder (meta.json), run (checkpoints/), results (results.json"
        in ended.err
    )
    assert f"{tmp_path / 'nowhere'} is no folder" in ended.err


def test_the_demo_replaces_nothing_that_it_did_not_make(tmp_path: Path):
    for name in ("data", "raw", "run"):
        kept = tmp_path / name / name / "mine.txt"
        kept.parent.mkdir(parents=True)
        kept.write_text("mine")
        error = mmclip(tmp_path, "demo", "--out", tmp_path / name).error()
        assert "not made by a demo" in error and kept.read_text() == "mine"


def made_demo(out: Path, *, finished: bool) -> Path:
    """What a demo of seed 0 leaves, but for the contents of its folders."""
    for name in ("raw", "data", "run"):
        (out / name).mkdir(parents=True)
        (out / name / "kept.txt").write_text("kept")
    (out / "raw/preset.json").write_text(json.dumps(asdict(PRESETS["demo"]), indent=2) + "\n")
    if finished:
        made = {"provenance": {"command": f"mmclip demo --out {out} --overwrite"}}
        (out / "results.json").write_text(json.dumps(made))
    return out


def test_a_demo_of_other_settings_is_refused_and_replaces_nothing(tmp_path: Path):
    finished = made_demo(tmp_path / "finished", finished=True)
    for more in (("--seed", "1"), ("--set", "train.steps=30"), ("--shuffle-pairs",)):
        error = mmclip(tmp_path, "demo", "--out", finished, *more).error()
        assert f"already holds results of `mmclip demo --out {finished}" in error
        assert "--overwrite" in error
    begun = made_demo(tmp_path / "begun", finished=False)
    error = mmclip(tmp_path, "demo", "--out", begun, "--seed", "1").error()
    assert "holds a demo of other synthetic images" in error and "--overwrite" in error
    for out in (finished, begun):
        assert all((out / name / "kept.txt").is_file() for name in ("raw", "data", "run"))
    assert (finished / "results.json").is_file()


def test_a_finished_demo_stays_until_the_one_that_replaces_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out, preset = made_demo(tmp_path / "demo", finished=True), PRESETS["demo"]
    monkeypatch.setattr(sys, "argv", ["mmclip", "demo", "--out", str(out)])
    check_results(out)
    assert "results of this very command; they are written again" in capsys.readouterr().err
    begun = made_demo(tmp_path / "begun", finished=False)
    assert _place(begun, preset, overwrite=False) == begun
    assert _place(out, preset, overwrite=False) == out / "rebuild"
    assert _place(out, replace(preset, seed=8), overwrite=True) == out / "rebuild"
    kept = ["data", "raw", "rebuild", "results.json", "run"]
    assert sorted(path.name for path in out.iterdir()) == kept


def test_mmclip_alone_shows_every_command_in_order_of_use(tmp_path: Path):
    ended = mmclip(tmp_path)
    shown = re.findall(r"^  mmclip ((?:data )?[\w-]+) ", ended.out, re.MULTILINE)
    assert ended.code == 0 and sorted(shown) == sorted(NAMES)
    used = ["data build", "pretrain", "zeroshot", "results"]
    assert [name for name in shown if name in used] == used
    assert list(dict.fromkeys(" ".join(path[:2]) for path in COMMANDS)) == shown


METAVARS = {
    "PATH", "NAME", "N", "RATIO", "TEXT", "KEY=V", "ADDRESS", "I/N", "NAME=FOLDER", "SPLIT=FILE",
    "MODEL", "NAMES", "MODEL=NAMES", "FORM", "ID",
}  # fmt: skip


def test_no_help_shows_a_type_of_the_code():
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if parameter.name != "help" and not getattr(parameter, "is_flag", False):
                assert parameter.metavar in METAVARS, (name, parameter.name)


@pytest.mark.parametrize(
    "path", [(), ("data",), ("data", "build"), *COMMANDS], ids=lambda path: " ".join(path)
)
def test_help_at_80_columns_has_plain_metavars_and_lines_of_80(
    path: tuple[str, ...], help_text: Callable[..., str]
):
    shown = help_text(*path)
    assert not re.search(r"<\w+", shown), shown
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80


def options_in(shown: str) -> set[str]:
    return set(re.findall(r"^│ (?:\* )? *(--[a-z-]+)", shown, re.MULTILINE))


OPTIONS_OF_EVERY_READER = {
    "--root", "--out", "--image-size", "--resize", "--entities", "--seed", "--val-ratio",
    "--test-ratio", "--workers", "--scheduler", "--shard", "--overwrite", "--help",
}  # fmt: skip
OPTIONS_OF_ONE = {
    "csv": {"--mapping", "--table"},
    "own": {"--reader"},
    "dicom": {"--mapping", "--reports", "--id-key", "--keep-age-sex"},
}


@pytest.mark.parametrize("reader", READERS)
def test_the_help_of_a_reader_shows_its_options_and_no_others(
    reader: str, help_text: Callable[..., str]
):
    shown = help_text("data", "build", reader)
    assert options_in(shown) == OPTIONS_OF_EVERY_READER | OPTIONS_OF_ONE.get(reader, set())
    assert READERS[reader] in shown and f"Usage: mmclip data build {reader} [OPTIONS]" in shown


@pytest.mark.parametrize("reader", ["openi", "siim", "csv"])
def test_an_option_of_another_reader_is_refused_and_says_why(tmp_path: Path, reader: str):
    error = build(reader, "--reports", "a.csv")({}, raw_of(tmp_path)).error()
    assert f"{reader} takes no --reports, --id-key or --keep-age-sex" in error
    if reader != "csv":
        error = build(reader, "--mapping", "a.toml")({}, tmp_path).error()
        assert f"{reader} has a layout of its own; leave --mapping" in error


def raw_of(folder: Path) -> Path:
    (folder / "raw").mkdir()
    return folder


def test_data_build_alone_lists_every_reader_in_a_line(
    tmp_path: Path,
):
    ended = mmclip(tmp_path, "data", "build")
    listed = dict(re.findall(r"^│ ([a-z][\w-]+)  +(\S.*?) *│$", ended.out, re.MULTILINE))
    assert ended.code == 2 and listed == READERS and "error:" not in ended.err
    assert "Usage: mmclip data build READER [OPTIONS]" in ended.out


def test_an_option_before_the_reader_is_told_to_stand_behind_it(tmp_path: Path):
    error = mmclip(tmp_path, "data", "build", "--root", tmp_path, "csv").error()
    assert "--root stands before the reader; write `mmclip data build READER --root`" in error


LONG = ("pretrain", "zeroshot", "finetune", "retrieve", "explain", "results")


@pytest.mark.parametrize("path", [*((name,) for name in LONG), ("data", "build", "csv")], ids=str)
def test_long_lists_of_options_are_grouped_by_purpose(
    path: tuple[str, ...], help_text: Callable[..., str]
):
    shown = help_text(*path)
    panels = re.findall(r"^╭─ (.+?) ─+╮\n(.*?)^╰", shown, re.MULTILINE | re.DOTALL)
    of_options = {title: options_in(lines) for title, lines in panels if title != "Arguments"}
    assert len(of_options) >= 4 and "Options" not in of_options
    assert "--help" in of_options["Other options"] and all(map(len, of_options.values()))
    given = {
        o
        for p in COMMANDS[path].params
        if not vars(p).get("hidden")
        for o in p.opts
        if o[:2] == "--"
    }
    assert set().union(*of_options.values()) == given | {"--help"}


@pytest.mark.parametrize("width", [100, 80, 60, 44, 30])
def test_a_number_of_a_table_is_whole_or_left_out(width: int, monkeypatch: pytest.MonkeyPatch):
    written = io.StringIO()
    narrow = Console(
        file=written, width=width, markup=False, force_terminal=True, color_system=None
    )
    monkeypatch.setattr(tables, "console", narrow)
    head = ("finding", "AUROC", "95 %", "present", "absent")
    row = ("enlarged cardiomediastinum [/x]", "0.507", "0.264\u20130.747", "12,345", "123,456")
    tables.print_table(head, [row, ("macro", "0.500")], ["", "bold"])
    said = written.getvalue()
    assert "\u2026" not in said and all(len(line) <= width for line in said.splitlines())
    assert all(word in said for word in (*row[0].split(), "macro"))
    shown = said.splitlines()[0].split("  ")
    for name, cell in zip(head[1:], row[1:], strict=True):
        assert (cell in said) == any(name == part.strip() for part in shown), name
    told = " ".join(said.split())
    assert ("left out, for a wider terminal" in told) == (row[-1] not in said)


def table_of(
    width: int, is_terminal: bool, monkeypatch: pytest.MonkeyPatch, *args: Any, **settings: Any
) -> list[str]:
    """The lines of a table, as a terminal or a pipe gets them."""
    written = io.StringIO()
    console = Console(
        file=written, width=width, markup=False, force_terminal=is_terminal, color_system=None
    )
    monkeypatch.setattr(tables, "console", console)
    tables.print_table(*args, **settings)
    return [line.rstrip() for line in written.getvalue().splitlines()]


def test_a_pipe_takes_the_whole_table(monkeypatch: pytest.MonkeyPatch):
    head = ("finding", *(f"number {i}" for i in range(20)), "report")
    row = ("enlarged cardiomediastinum", *(f"{i / 7:.3f}" for i in range(20)), "effusion " * 30)
    lines = table_of(80, False, monkeypatch, head, [row], has_text=True)
    assert [re.split(r" {2,}", line) for line in lines] == [[*head], [*row[:-1], row[-1].strip()]]


@pytest.mark.parametrize("width", [100, 80, 60, 44, 30, 10])
def test_a_text_beside_numbers_is_cut_with_a_sign_or_left_out(
    width: int, monkeypatch: pytest.MonkeyPatch
):
    head = ("image", "cosine", "images", "report")
    rows = [
        ("1.2.840.113619 x", "0.584", "1,112", "Small effusion. " * 9),
        ("b", "0.5", "1", "\u2013"),
    ]
    lines = table_of(width, True, monkeypatch, head, rows, has_text=True)
    said = "\n".join(lines)
    assert "1.2.840.113619" in said and all(len(line) <= max(width, 14) for line in lines)
    assert ("Small effusion" in said and "\u2026" in said) == (width >= 60)
    assert ("report" in " ".join(lines).partition("left out")[2]) == (width < 60)


def test_a_word_longer_than_the_terminal_stays_whole(monkeypatch: pytest.MonkeyPatch):
    word = "Lungenemphysemblasenverkleinerung"
    lines = table_of(20, True, monkeypatch, ("finding", "AUROC"), [(word, "0.507")])
    assert word in lines and "0.507" not in " ".join(lines) and "AUROC" in lines[-1]


def test_every_table_of_the_command_line_is_printed_in_one_way():
    users = {
        path.name
        for path in Path(tables.__file__).parent.glob("*.py")
        if "rich.table" in path.read_text("utf-8")
    }
    assert users == {"tables.py"}
