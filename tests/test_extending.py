"""docs/extending.md, as a reader would: its files are written, its commands run in their order."""

import csv
import json
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
from transformers import VisionTextDualEncoderModel

from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.ingest.sources import read_own
from tests.commands import Ended, mmclip
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "extending.md"


def write_hospital(made_raw: Path, made_data: Path, root: Path) -> None:
    """Radiographs with a list such as the page names; behind them a CT and two rows with faults."""
    shutil.copytree(made_raw / "images", root / "images")
    with (root / "list.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "exam", "patient", "modality", "report", "effusion"])
        for sample in open_dataset([made_data]).samples:
            name = Path(str(sample.image)).name
            effusion = "yes" if sample.labels.get("pleural effusion") == 1 else "no"
            row = [name, sample.study_id, sample.patient_id, "DX", sample.report or "", effusion]
            table.writerow(row)
        table.writerow(["slice.png", "e", "p", "CT", "", "no"])
        table.writerow(["nobody.png", "e", "", "DX", "Normal.", "no"])
        table.writerow(["missing.png", "e", "p", "DX", "Normal.", "no"])


def n_radiographs(desk: Path) -> int:
    """Lines of the list that become images."""
    with (desk / "raw" / "list.csv").open(newline="", encoding="utf-8") as file:
        return len(list(csv.DictReader(file))) - 3


@pytest.fixture(scope="module")
def desk(made_raw: Path, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page and the images that it speaks of."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "raw").mkdir()
    write_hospital(made_raw, made_data, folder / "raw")
    for block in blocks(PAGE):
        first = block.text.partition("\n")[0]
        if block.language in ("python", "toml"):
            assert first.startswith("# my_"), "each file of the page says its name"
            (folder / first.removeprefix("# ")).write_text(block.text, "utf-8")
    return folder


@pytest.fixture
def run(desk: Path) -> Callable[[str], Ended]:
    """Runs a line of the page in the folder."""

    def line(text: str) -> Ended:
        name, *words = shlex.split(text)
        if name == "python":
            with chdir(desk):
                runpy.run_path(words[0], run_name="__main__")
            return Ended(0, "", "")
        if words[:2] == ["data", "build"]:
            words += ["--workers", "1"]  # processes take longer to start than this takes
        return mmclip(desk / "logs", *words, cwd=desk)

    return line


def lines_of_page() -> list[str]:
    """The commands, in their order."""
    return [line for b in blocks(PAGE) if not b.language for line in b.text.splitlines() if line]


@pytest.mark.slow
def test_every_command_of_the_page_runs_in_its_order(desk: Path, run: Callable[[str], Ended]):
    lines = lines_of_page()
    assert {line.split()[1] for line in lines} >= {"data", "pretrain", "predict", "zeroshot"}
    for line in lines:
        ended = run(line)
        assert ended.code == 0, (line, ended.err)
    meta = json.loads((desk / "data/own/meta.json").read_text("utf-8"))
    assert meta["reader"] == "my_readers:read_hospital"
    n = n_radiographs(desk)
    assert (meta["n_rows"], meta["n_samples"], meta["n_excluded"]) == (n + 3, n, 3)
    assert set(meta["excluded"]) == {
        "the image is no radiograph", "the row has no patient id", "the image file does not exist",
    }  # fmt: skip
    said = json.loads((desk / "runs/own/config.json").read_text("utf-8"))
    assert said["config"]["loss"]["contrastive"] == "my_losses:smoothed_sum"
    results = json.loads((desk / "runs/own/hospital/results.json").read_text("utf-8"))
    assert results["protocol"]["id"] == "hospital"
    assert results["provenance"]["prompt_set"] == "my-prompts version 1"
    assert VisionTextDualEncoderModel.from_pretrained(desk / "exports/vit").vision_model


def test_the_loss_of_the_page_trains(
    run: Callable[[str], Ended], desk: Path, made_data: Path, made_run: Path, small_config: Path
):
    given = f"--data {made_data} --config {small_config} --set train.steps=2"
    loss = "--set loss.contrastive=my_losses:smoothed_sum"
    ended = run(f"mmclip pretrain {given} {loss} --out runs/smoothed")
    assert ended.code == 0, ended.err
    (own, *_), (softmax, *_) = (
        [json.loads(line)["contrastive"] for line in (folder / "metrics.jsonl").open()]
        for folder in (desk / "runs/smoothed", made_run)
    )
    assert own > 0 and abs(own - softmax) > 1e-3


def test_a_reader_may_be_a_class_and_may_be_named_first(desk: Path, run: Callable[[str], Ended]):
    (desk / "of_class.py").write_text(
        "from my_readers import read_hospital\n"
        "class Hospital:\n"
        "    def __init__(self, root): self.root = root\n"
        "    def __iter__(self): return read_hospital(self.root)\n",
        "utf-8",
    )
    options = "--root raw --image-size 16 --out"
    assert run(f"mmclip data build --reader of_class:Hospital {options} data/class").code == 0
    same = f"mmclip data build own --reader my_readers:read_hospital {options} data/same"
    assert run(same).code == 0
    one, other = (
        json.loads((desk / f"data/{n}/meta.json").read_text("utf-8")) for n in ("class", "same")
    )
    assert one["data_hash"] == other["data_hash"]
    assert "--overwrite" in run(same).error()  # as of every reader


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_readers", "is not module:name"),
        ("no_such_module:f", "no_such_module cannot be imported"),
        ("faulty:f", "faulty cannot be imported"),
        ("my_readers:read_hospitl", "my_readers has no read_hospitl; it has"),
        ("gives:number", "gave a int for"),
        ("gives:dicts", "record 1 is a dict; yield mmclip.data.sample.Sample"),
    ],
)
def test_a_reader_that_is_none_is_told_of_in_a_line(
    name: str, words: str, desk: Path, run: Callable[[str], Ended]
):
    (desk / "faulty.py").write_text("def f(:\n", "utf-8")
    (desk / "gives.py").write_text(
        "from mmclip.data.sample import Sample\n"
        "def number(root): return 3\n"
        "def dicts(root):\n"
        "    yield Sample(image_id='a', study_id='a', patient_id='a', source='s', report='a')\n"
        "    yield {'image_id': 'b'}\n",
        "utf-8",
    )
    ended = run(f"mmclip data build own --reader {name} --root raw --out data/none")
    assert words in ended.error()
    assert not (desk / "data/none/meta.json").exists()


def test_own_needs_a_reader_and_others_take_none(run: Callable[[str], Ended]):
    ended = run("mmclip data build own --root raw --out data/none")
    assert "own needs --reader module:name" in ended.error()
    ended = run("mmclip data build csv --reader a:b --root raw --out data/none")
    assert "csv takes no --reader" in ended.error()


def test_rows_that_a_reader_leaves_out_are_counted_where_they_stand(
    desk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (desk / "three.py").write_text("def number(root): return 3\n", "utf-8")
    rows = [r.row for r in read_own("my_readers:read_hospital", desk / "raw") if hasattr(r, "row")]
    assert rows == [n_radiographs(desk)]
    with pytest.raises(SourceError, match="gave a int"):
        read_own("three:number", desk / "raw")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("sofmax", "neither 'softmax' nor 'sigmoid'"),
        ("no_such_module:f", "loss.contrastive no_such_module:f: no_such_module cannot be"),
        ("my_losses:other", "my_losses has no other; it has smoothed_sum"),
    ],
)
def test_a_loss_that_is_none_is_told_of_in_a_line(
    value: str, words: str, made_data: Path, run: Callable[[str], Ended]
):
    given = f"--data {made_data} --set data.image_size=32 --set train.batch_size=8"
    ended = run(f"mmclip pretrain {given} --set loss.contrastive={value} --out runs/none")
    assert words in ended.error()
