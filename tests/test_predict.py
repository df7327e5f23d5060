"""`mmclip predict`: what is found and scored, one line an image or a study, nothing left unsaid."""

import csv
import json
import os
import shutil
import signal
import textwrap
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from mmclip.checkpoint import load_checkpoint
from mmclip.data.image_files import find_image_files
from mmclip.data.manifest import read_manifest
from mmclip.prediction.model import Skipped
from mmclip.prediction.tables import prediction_table, safe_cell, write_skipped
from mmclip.prompt_check import PromptError, check_prompts
from mmclip.prompts import known_prompt_sets, load_prompts, own_prompts
from tests.commands import Ended, mmclip, start
from tests.made import write_folder
from tests.made_files import dicom, encoded, ramp

DOC = Path(__file__).parents[1] / "docs" / "predict.md"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(folder: Path, run: Path, *given: str | Path) -> Ended:
    words = ["--finding", "pneumothorax", "--out", folder / "p.csv", "--workers", "1"]
    return mmclip(folder / "log", "predict", "--model", run, *given, *words)


def tree(root: Path) -> dict[str, bytes]:
    """A folder as a hospital leaves it: images with and without ending, and what is none."""
    files = {
        "a.PNG": encoded(ramp()),
        "deep/er/b.jpeg": encoded(ramp(), "JPEG"),
        "deep/IM0001": dicom(ramp()),
        "deep/c": encoded(ramp(), "PNG"),
        "d.tif": encoded(ramp(), "TIFF"),
        "e.dcm": dicom(ramp()),
        "=cmd.png": encoded(ramp()),
        "broken.dcm": dicom(ramp())[:300],
        "empty.png": b"",
        "DICOMDIR": dicom(ramp()),
        "notes.txt": b"hello",
        "list.csv": b"a,b\n",
        "deep/._b.jpeg": b"\0\5\x16\7",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return files


def test_a_folder_is_searched_through(tmp_path: Path):
    tree(tmp_path)
    os.mkfifo(tmp_path / "deep" / "pipe")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    found = find_image_files([tmp_path, tmp_path / "a.PNG"])
    names = [str(path.relative_to(tmp_path)) for path in found.images]
    assert names == ["=cmd.png", "a.PNG", "broken.dcm", "d.tif", "e.dcm", "empty.png",
                     "deep/IM0001", "deep/c", "deep/er/b.jpeg"]  # fmt: skip
    assert (found.n_others, found.n_again) == (5, 1)
    with pytest.raises(ValueError, match="no file or folder"):
        find_image_files([tmp_path / "nothing"])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_files_and_folders_give_a_line_each_and_the_unreadable_a_reason(
    made_run: Path, tmp_path: Path, workers: str
):
    root = tmp_path / "in"
    tree(root)
    out = tmp_path / "p.csv"
    ended = mmclip(
        tmp_path / "log", "predict", "--model", made_run, root, "--finding", "mass", "--finding",
        "pneumothorax", "--out", out, "--workers", workers,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.out == f"{out}\n"
    lines = read(out)
    assert list(lines[0]) == ["image_id", "mass", "pneumothorax"]
    assert len(lines) == 7
    assert all(0 < float(line["mass"]) < 1 for line in lines)
    skipped = read(tmp_path / "p.skipped.csv")
    assert [(Path(s["image_id"]).name, s["reason"]) for s in skipped] == [
        ("broken.dcm", "the image cannot be read"),
        ("empty.png", "the image has 0 bytes"),
    ]
    assert "WARNING 2 images have no numbers" in ended.err
    assert "files that are no images: 4, ignored" in ended.err
    by_name = {Path(line["image_id"]).name: line["mass"] for line in lines}
    assert by_name["a.PNG"] == by_name["c"] == by_name["d.tif"] == by_name["=cmd.png"]
    assert by_name["e.dcm"] == by_name["IM0001"]


def test_an_older_table_is_kept_unless_told(made_run: Path, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(encoded(ramp()))
    (tmp_path / "bad.png").write_bytes(b"no")
    assert predict(tmp_path, made_run, tmp_path / "a.png", tmp_path / "bad.png").code == 0
    assert (tmp_path / "p.skipped.csv").exists()
    assert "--overwrite" in predict(tmp_path, made_run, tmp_path / "a.png").error()
    assert predict(tmp_path, made_run, tmp_path / "a.png", "--overwrite").code == 0
    assert not (tmp_path / "p.skipped.csv").exists()


def test_where_nothing_is_to_be_scored_it_is_an_error(made_run: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("hello")
    assert "no image is in" in predict(tmp_path, made_run, tmp_path / "in").error()
    (tmp_path / "in" / "a.png").write_bytes(b"no image")
    assert "none of 1 images can be read" in predict(tmp_path, made_run, tmp_path / "in").error()
    assert not (tmp_path / "p.csv").exists()
    assert "no file or folder" in predict(tmp_path, made_run, tmp_path / "absent").error()
    assert "does not end in .csv" in mmclip(
        tmp_path, "predict", "--model", made_run, tmp_path / "in", "--finding", "mass", "--out",
        tmp_path / "p.json",
    ).error()  # fmt: skip
    assert (
        "no finding is named"
        in mmclip(
            tmp_path, "predict", "--model", made_run, tmp_path / "in", "--out", tmp_path / "p.csv"
        ).error()
    )


@pytest.mark.parametrize("name", ["pneumonia", "Pleural_Effusion"])
def test_a_second_finding_without_its_option_is_told_of(made_run: Path, tmp_path: Path, name: str):
    (tmp_path / "a.png").write_bytes(encoded(ramp(), "PNG"))
    ended = mmclip(
        tmp_path, "predict", "--model", made_run, tmp_path / "a.png", "--finding", "edema", name,
        "--out", tmp_path / "p.csv",
    )  # fmt: skip
    assert f"no file or folder {name}; if it is a finding, write --finding before" in ended.error()


def test_a_study_is_the_mean_of_its_frontal_images(made_run: Path, made_data: Path, tmp_path: Path):
    assert predict(tmp_path, made_run, made_data).code == 0
    by_image = {line["image_id"]: float(line["pneumothorax"]) for line in read(tmp_path / "p.csv")}
    ended = predict(tmp_path, made_run, made_data, "--by", "study", "--overwrite")
    assert ended.code == 0, ended.err
    studies: dict[str, list[float]] = {}
    for sample in read_manifest(made_data):
        studies.setdefault(sample.study_id, []).append(by_image[sample.image_id])
    assert len(studies) < len(by_image)
    lines = read(tmp_path / "p.csv")
    assert {line["study_id"]: int(line["n_images"]) for line in lines} == {
        study: len(values) for study, values in studies.items()
    }
    for line in lines:
        assert float(line["pneumothorax"]) == pytest.approx(np.mean(studies[line["study_id"]]))


def test_laterals_of_a_data_folder_are_left_out_of_the_mean_and_listed(
    made_run: Path, tmp_path: Path
):
    data = write_folder(tmp_path)
    ended = predict(tmp_path, made_run, data)
    assert "1 image is lateral" in ended.err
    assert len(read(tmp_path / "p.csv")) == 8
    ended = predict(tmp_path, made_run, data, "--by", "study", "--overwrite")
    assert ended.code == 0, ended.err
    assert [line["study_id"] for line in read(tmp_path / "p.csv")] == [f"s{i}" for i in range(7)]
    assert [s["image_id"] for s in read(tmp_path / "p.skipped.csv")] == ["f7"]
    assert "1 of them laterals" in ended.err


def test_studies_of_dicom_files_are_told_by_their_headers(made_run: Path, tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    for number, (study, view) in enumerate(
        [("1.2", "PA"), ("1.2", "AP"), ("1.3", "PA"), ("1.2", "LL")]
    ):
        content = dicom(ramp(30 + number, 40), StudyInstanceUID=study, ViewPosition=view)
        (root / f"IM{number}").write_bytes(content)
    (root / "own.png").write_bytes(encoded(ramp()))
    ended = predict(tmp_path, made_run, root, "--by", "study")
    assert ended.code == 0, ended.err
    lines = [(line["study_id"], line["n_images"]) for line in read(tmp_path / "p.csv")]
    assert lines == [("1.2", "2"), ("1.3", "1"), (str(root / "own.png"), "1")]
    assert "1 image tells no study" in ended.err
    (skipped,) = read(tmp_path / "p.skipped.csv")
    assert Path(skipped["image_id"]).name == "IM3"
    assert "lateral" in skipped["reason"]


def test_thresholds_decide(made_run: Path, made_results: Path, made_data: Path, tmp_path: Path):
    stored = json.loads((made_results / "results.json").read_text())
    rows = {row["finding"]: row for row in stored["findings"]}
    value = rows["pneumothorax"]["threshold"]["value"]
    ended = predict(tmp_path, made_run, made_data, "--thresholds", made_results / "results.json")
    assert ended.code == 0, ended.err
    lines = read(tmp_path / "p.csv")
    decided = [int(float(line["pneumothorax"]) >= value) for line in lines]
    assert [int(line["pneumothorax present"]) for line in lines] == decided
    assert set(decided) == {0, 1}


def test_maps_of_each_image_and_finding_are_written(made_run: Path, tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a b.png").write_bytes(encoded(ramp(40, 60)))
    (tmp_path / "x" / "c.png").write_bytes(encoded(ramp(30, 20)))
    ended = predict(tmp_path, made_run, tmp_path / "x", "--explain", tmp_path / "maps")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [
        "000001-a-b-pneumothorax.npz", "000001-a-b-pneumothorax.png",
        "000002-c-pneumothorax.npz", "000002-c-pneumothorax.png",
    ]  # fmt: skip
    assert np.load(tmp_path / "maps" / "000001-a-b-pneumothorax.npz")["saliency"].shape == (40, 60)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"), ("\t=1", "'\t=1"),
        ("  =1", "'  =1"), ("\r1", "'\r1"), ("＝1", "'＝1"), ("a=1", "a=1"), ("", ""),
        ("images/=1.png", "images/=1.png"),
    ],
)  # fmt: skip
def test_no_cell_is_a_formula(text: str, cell: str):
    assert safe_cell(text) == cell


def test_tables_hold_any_name_and_every_digit(tmp_path: Path):
    odd = os.fsdecode(b"/x/\xff\xfe.png")
    names = ["=a", 'q"uo,te', "new\nline", odd, "ä"]
    values = np.random.default_rng(0).random((len(names), 1))
    with prediction_table(tmp_path / "t.csv", ["=finding"]) as table:
        for name, row in zip(names, values, strict=True):
            table.write([name], row)
    lines = read(tmp_path / "t.csv")
    assert [line["image_id"] for line in lines][:3] == ["'=a", 'q"uo,te', "new\nline"]
    assert [float(line["'=finding"]) for line in lines] == values[:, 0].tolist()
    write_skipped(tmp_path / "s.csv", [Skipped("-x", "reason", "=detail")])
    assert read(tmp_path / "s.csv") == [
        {"image_id": "'-x", "reason": "reason", "detail": "'=detail"}
    ]


def test_a_table_that_is_interrupted_has_not_its_name(tmp_path: Path):
    def interrupted() -> None:
        with prediction_table(tmp_path / "t.csv", ["a"]) as table:
            table.write(["x"], np.array([0.5]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_killed_prediction_leaves_the_tables_before_it_and_the_next_clears_up(
    made_run: Path, made_raw: Path, tmp_path: Path
):
    (tmp_path / "in").mkdir()
    shutil.copy(next(made_raw.rglob("*.png")), tmp_path / "in/a.png")
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    given = [
        "predict", "--model", made_run, tmp_path / "in", "--finding", "edema", "--workers", 1,
        "--out", tmp_path / "out/p.csv", "--overwrite", "--cpu",
    ]  # fmt: skip
    assert mmclip(tmp_path / "first", *given).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == ["p.csv", "p.skipped.csv"]
    for name in before:  # as a kill within either leaves it
        (tmp_path / "out" / f"{name}.0123abcd.tmp").write_bytes(b"half of i")
    (tmp_path / "out/.p.csv.mmclip.lock").write_text("host x, process 1")
    assert mmclip(tmp_path / "again", *given).code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_to_end_leaves_nothing_half_written(
    made_run: Path, made_raw: Path, tmp_path: Path, name: str
):
    (tmp_path / "in").mkdir()
    image = next(made_raw.rglob("*.png"))
    for number in range(4000):
        os.link(image, tmp_path / f"in/{number}.png")
    running = start(
        tmp_path / "log", "predict", "--model", made_run, tmp_path / "in", "--finding", "edema",
        "--workers", "1", "--out", tmp_path / "out/p.csv", "--cpu",
    )  # fmt: skip
    while not list(tmp_path.glob("out/*.tmp")):
        assert running.process.is_alive()
        time.sleep(0.05)
    number = getattr(signal, name)
    os.kill(running.pid, number)
    ended = running.wait()
    assert ended.code == 128 + number
    assert "Traceback" not in ended.err
    assert not list((tmp_path / "out").iterdir())


# -- prompts --


@pytest.fixture(scope="module")
def words(made_run: Path):
    return load_checkpoint(made_run).tokenizer


def test_the_prompt_sets_of_the_package_are_quiet(words, caplog: pytest.LogCaptureFixture):
    for name in known_prompt_sets():
        prompts = load_prompts(name)
        named = {name for each in map(load_prompts, known_prompt_sets()) for name in each.named}
        check_prompts(words, [prompts], sorted(named), max_tokens=128)
    assert not caplog.records


@pytest.mark.parametrize(
    ("finding", "positive", "negative", "max_tokens", "said"),
    [
        (
            "肺炎",
            "There is {finding}.",
            "There is no {finding}.",
            128,
            "word of the finding's name",
        ),
        ("μ", "{finding}", "no {finding}", 128, "no word of the finding's name"),
        ("mass", "{finding}", "{finding}", 128, "same to the model"),
        ("mass", "A {finding}", "a  {finding}", 128, "same to the model"),
        ("mass", ["a {finding}", "no {finding}"], "no {finding}", 128, "same to the model"),
        ("mass", "the heart is large and {finding}", "no {finding}", 5, "cut after 5"),
    ],
)
def test_prompts_that_cannot_stand_for_a_finding_are_refused_by_its_name(
    words, finding: str, positive: str | list[str], negative: str, max_tokens: int, said: str
):
    given = own_prompts({"positive": positive, "negative": negative})
    with pytest.raises(PromptError, match=said) as error:
        check_prompts(words, [given], ["pneumothorax", finding], max_tokens)
    assert f"'{finding}'" in str(error.value)


def test_own_words_that_the_model_cannot_read_are_refused(words):
    given = own_prompts({"mass": {"positive": "肺", "negative": "no mass"}})
    with pytest.raises(PromptError, match="'mass': '肺' has no word that"):
        check_prompts(words, [given], ["mass"], 128)


@pytest.mark.parametrize("finding", ["xyzzy", "qwrtzp of the lung"])
def test_a_name_that_is_only_spelt_is_warned_of(
    words, finding: str, caplog: pytest.LogCaptureFixture
):
    check_prompts(words, [load_prompts("default")], [finding, "mass"], 128)
    (record,) = caplog.records
    assert f"'{finding}'" in record.message
    assert "mass" not in record.message


def test_both_commands_refuse_what_the_model_cannot_read(
    made_run: Path, made_data: Path, tmp_path: Path
):
    (tmp_path / "same.toml").write_text(
        'id="s"\nversion=1\ndescription="s"\n[templates]\npositive=["{finding}"]\nnegative=["{finding}"]\n'
    )
    given = ["--prompts", tmp_path / "same.toml"]
    assert "'pneumothorax'" in predict(tmp_path, made_run, made_data, *given).error()
    ended = mmclip(
        tmp_path, "zeroshot", "--model", made_run, "--data", made_data, "--out", tmp_path / "z",
        "--finding", "pneumothorax", *given,
    )  # fmt: skip
    assert "same to the model" in ended.error()


def test_zeroshot_names_predict_where_labels_are_missing(
    made_run: Path, made_data: Path, tmp_path: Path
):
    ended = mmclip(
        tmp_path, "zeroshot", "--model", made_run, "--data", made_data, "--out", tmp_path / "z",
        "--finding", "scoliosis",
    )  # fmt: skip
    assert "`mmclip predict" in ended.error()
    assert "--finding scoliosis" in ended.error()


@pytest.mark.parametrize(
    ("finding", "meant"),
    [
        ("plural efusion", "pleural effusion"), ("Pleural Efusion", "pleural effusion"),
        ("cardiomegally", "cardiomegaly"), ("noduel", "nodule"), ("pneumotorax", "pneumothorax"),
        ("atelactasis", "atelectasis"), ("my findign", "my finding"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_name_that_is_nearly_a_known_one_is_asked_about(
    words, finding: str, meant: str, has_tokenizer: bool, caplog: pytest.LogCaptureFixture
):
    own = own_prompts({"my finding": {"positive": "mass", "negative": "no mass"}})
    sets = [load_prompts("default"), own]
    check_prompts(words if has_tokenizer else None, sets, [finding, "mass"], 128)
    asked = [record.message for record in caplog.records if "did you mean" in record.message]
    said = f"prompts of '{finding}': no prompt set names it; did you mean '{meant}'?"
    assert asked == [said]


@pytest.mark.parametrize(
    ("finding", "names"),
    [
        ("mass,nodule", "'mass', 'nodule'"), ("Mass ; Nodule;", "'mass', 'nodule'"),
        ("edema|my finding", "'edema', 'my finding'"), ("mass, lobster", None), ("mass", None),
    ],
)  # fmt: skip
def test_a_list_of_findings_in_one_name_is_warned_of(
    finding: str, names: str | None, caplog: pytest.LogCaptureFixture
):
    own = own_prompts({"my finding": {"positive": "mass", "negative": "no mass"}})
    check_prompts(None, [load_prompts("default"), own], [finding], 128)
    said = [record.message for record in caplog.records if "apart" in record.message]
    one = f"prompts of {finding!r}: one finding to the model; name {names} apart"
    assert said == ([one] if names else [])


@pytest.mark.parametrize(
    ("finding", "is_one"),
    [
        ("There is a pneumothorax.", True), ("no pneumothorax", True), ("The heart is large", True),
        ("Pneumothorax!", True), ("no finding", False), ("No Finding", False), ("nodule", False),
        ("non-union", False), ("not my finding", False), ("notch", False),
    ],
)  # fmt: skip
def test_a_sentence_in_the_place_of_a_name_is_warned_of(
    finding: str, is_one: bool, caplog: pytest.LogCaptureFixture
):
    own = own_prompts({"not my finding": {"positive": "mass", "negative": "no mass"}})
    check_prompts(None, [load_prompts("default"), own], [finding], 128)
    assert any(finding in m and "a sentence" in m for m in caplog.messages) == is_one


@pytest.mark.parametrize("finding", ["scoliosis", "bronchiolitis", "miliary pattern", "lobster"])
def test_a_name_of_its_own_is_not_asked_about(finding: str, caplog: pytest.LogCaptureFixture):
    check_prompts(None, [load_prompts("default")], [finding], 128)
    assert not caplog.records


def test_the_example_of_the_page_is_a_prompt_set_of_ten_lines_or_so(words, tmp_path: Path):
    page = DOC.read_text("utf-8")
    start = page.index('    id = "mine"')
    block = textwrap.dedent(page[start : page.index("\n\n", start)])
    assert len(block.splitlines()) <= 12
    (tmp_path / "mine.toml").write_text(block)
    prompts = load_prompts(tmp_path / "mine.toml")
    assert prompts.texts("rib fractures").negatives[0] == "There are no rib fractures."
    assert prompts.texts("scoliosis").negatives == ("The spine is straight.",)
    assert tomllib.loads(block)["id"] == "mine"
    check_prompts(words, [prompts], ["scoliosis", "rib fractures"], 128)
