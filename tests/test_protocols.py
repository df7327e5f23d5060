"""Every protocol from a data set as published to results: what was planted is what is counted."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mmclip.cli.data import app as data_commands
from mmclip.cli.evaluate import app as evaluation_commands
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.leakage.splits import LISTED, NAMES
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.vocabulary import load_words
from mmclip.evaluation.comparison import compute_metrics_of_csv
from mmclip.evaluation.metrics import auroc
from mmclip.evaluation.plots import curves_figure
from mmclip.evaluation.protocols import BUILT, Protocol, load_protocol, protocol_names
from mmclip.evaluation.results import Undefined, read_results
from mmclip.evaluation.scores import ScoresError, load_scores
from mmclip.evaluation.selection import select_samples, unknown_views
from mmclip.files import sealed
from mmclip.finetuning.task import open_task
from tests import made_layouts as made
from tests.commands import Ended, mmclip
from tests.made_layouts import Files, Planned
from tests.published import lay_out

NAN = float("nan")
RATIOS = ("--val-ratio", "0.2", "--test-ratio", "0.6")


@dataclass(frozen=True)
class Case:
    """How a protocol is tried: by which reader, in which layout."""

    reader: str
    layout: Callable[[Sequence[Planned]], Files]
    image_id: str  # a pattern that takes the number of an image, and 1 or 0 for a finding
    has_open: bool = False  # whether the source can leave labels unknown
    has_laterals: bool = False


NIH = Case("chestxray14", made.of_chestxray14, "{:08}_000.png")
PADCHEST = Case("padchest", made.of_padchest, "{}.png", has_open=True, has_laterals=True)
CASES = {
    "chestxray14": NIH,
    "chestxray14-benchx": NIH,
    "chexpert-5": Case(
        "chexpert", made.of_chexpert, "patient{:05}/study1/view1_frontal", True, True
    ),
    "covidx": Case("covidx", made.of_covidx, "{}.png"),
    "montgomery": Case("montgomery", made.of_montgomery, "MCUCXR_{:04}_{}"),
    "openi": Case("openi", made.of_openi, "CXR{}_IM-0001-1001", True, True),
    "padchest-rare": PADCHEST,
    "padchest-seen": PADCHEST,
    "padchest-unseen": PADCHEST,
    "rsna": Case("rsna", made.of_rsna, "f{}"),
    "shenzhen": Case("shenzhen", made.of_shenzhen, "CHNCXR_{:04}_{}"),
    "siim": Case("siim", made.of_siim, "1.2.826.{}"),
    "siim-benchx": Case("csv", made.of_siim_reupload, "{}_train"),
    "vindr": Case("vindr", made.of_vindr, "f{}", has_open=True),
    "vindr-benchx": Case("vindr", made.of_vindr, "f{}", has_open=True),
}


def plan(rules: Protocol, case: Case) -> list[Planned]:
    """72 images, two fifths of them with each finding, but for the last two of several findings.

    One of those three images have, the other none. A lateral and an image of which nothing is known
    are in test, where the source knows such; some of which little is known are in val.
    """
    names = [name for name in rules.findings if name != "no finding"]
    common, rare = (names[:-2], names[-2]) if len(names) > 2 else (names, None)
    samples = []
    for number in range(72):
        split = "test" if number < 48 else "val" if number < 60 else "train"
        present = [name for k, name in enumerate(common) if (number + k) % 5 < 2]
        if rare is not None and number in (1, 2, 3):
            present.append(rare)
        if "no finding" in rules.findings and number % 6 == 5:
            present = ["no finding"]
        is_open = case.has_open and number % 24 == 7 and case.reader not in ("chexpert", "vindr")
        if case.reader in ("chexpert", "vindr"):  # test images are read for all findings
            is_open = split != "test" and number % 6 == 0
        samples.append(
            Planned(
                number,
                split,
                () if is_open and case.reader == "openi" else tuple(present),
                is_open,
                is_lateral=case.has_laterals and number == 13,
            )
        )
    return samples


def known_of(sample: Planned, rules: Protocol) -> list[float]:
    """The labels that a plan says, as a protocol must read them."""
    absent = NAN if sample.is_open else 0.0
    return [1.0 if name in sample.present else absent for name in rules.findings]


def run(app: typer.Typer, *arguments: str | Path) -> None:
    """Runs a command in this process, where a test can make its plots small."""
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if ended.exception is not None:
        raise ended.exception


def build(case: Case, samples: Sequence[Planned], folder: Path) -> Path:
    """Lays the images out under a folder, and builds its data folder."""
    raw = lay_out(folder / "raw", case.layout(samples))
    given = [
        "--root",
        raw,
        "--out",
        folder / "data",
        "--image-size",
        "32",
        "--workers",
        "1",
        *RATIOS,
    ]
    if case.reader == "csv":
        given += ["--mapping", raw / "mapping.toml"]
    run(data_commands, "build", case.reader, *given)
    return folder / "data"


def set_its_split(folder: Path, rules: Protocol, samples: dict[str, Planned]) -> str:
    """Sets the first split that a protocol names, if one must be set; returns its name."""
    if BUILT in rules.splits:
        return BUILT
    name = next(name for name in rules.splits if name in NAMES)
    given = list(RATIOS)
    if name in LISTED:
        for part in ("train", "val", "test"):
            path = folder.parent / f"{part}.txt"
            ids = [image_id for image_id, sample in samples.items() if sample.split == part]
            path.write_text("".join(f"images/{image_id} 0 1\n" for image_id in ids))
            given += ["--list", f"{part}={path}"]
    run(data_commands, "split", folder, "--name", name, *given)
    return name


MANY_FINDINGS = ("chestxray14-benchx", "padchest-rare", "padchest-unseen", "vindr-benchx")
"""Protocols that take seconds and whose data set another protocol reads, too."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in MANY_FINDINGS else ())
        for name in protocol_names()
    ],
)
def test_a_protocol_runs_from_the_data_set_as_published_to_results(
    name: str, made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rules, case = load_protocol(name), CASES[name]
    planned = plan(rules, case)
    samples = {case.image_id.format(f.number, int(bool(f.present))): f for f in planned}
    # These lists are none of the published ones, and two panels a finding take long to draw.
    monkeypatch.setattr("mmclip.data.leakage.split_lists.KNOWN_LISTS", {})
    monkeypatch.setattr(
        "mmclip.evaluation.pages.curves_figure", lambda panels: curves_figure(panels[:1])
    )
    monkeypatch.setattr(
        "mmclip.evaluation.pages.curve_svg", lambda panel: f"<svg><!--{panel.title}--></svg>"
    )
    data, out = build(case, planned, tmp_path), tmp_path / "out"
    split = set_its_split(data, rules, samples)
    given = ("--model", made_run, "--data", data, "--protocol", name, "--out", out)
    run(evaluation_commands, "zeroshot", *given, "--n-resamples", "10", "--cpu")

    built = {sample.image_id: sample for sample in read_manifest(data)}
    assert len(built) == len(samples)

    def expected(part: str) -> dict[str, list[float]]:
        sources = rules.sources_of(part)
        found = {
            image_id: known_of(sample, rules)
            for image_id, sample in samples.items()
            if image_id in built
            and not sample.is_lateral
            and built[image_id].split == part
            and (not sources or built[image_id].source in sources)
        }
        return {image_id: row for image_id, row in found.items() if not np.isnan(row).all()}

    test, val = expected("test"), expected("val")
    if split in ("official", "physician", *LISTED):
        frontal = [i for i, f in samples.items() if f.split == "test" and not f.is_lateral]
        assert set(test) == {i for i in frontal if not np.isnan(known_of(samples[i], rules)).all()}
    results, scores = read_results(out), load_scores(out / "scores.npz")
    assert scores.names() == list(rules.findings)
    assert sorted(scores.image_id.tolist()) == sorted(test)
    truth = np.array([test[image_id] for image_id in scores.image_id])
    np.testing.assert_array_equal(scores.labels, truth)
    assert results.protocol is not None
    assert (results.protocol.id, results.protocol.hash) == (name, rules.hash)
    assert results.provenance.split.split(" ")[0] == split
    assert results.n_images == len(test)

    assert bool(val) == any(sample.split == "val" for sample in built.values())
    val_truth = np.array(list(val.values())).reshape(len(val), len(rules.findings))
    scored, undefined = iter(results.findings), iter(results.undefined)
    counted = []
    for k, finding in enumerate(rules.findings):
        n_positive, n_negative = int((truth[:, k] == 1).sum()), int((truth[:, k] == 0).sum())
        counts = (finding, n_positive, n_negative, int(np.isnan(truth[:, k]).sum()))
        if not (n_positive and n_negative):
            lacking = next(undefined)
            assert lacking == Undefined(
                finding=finding, n_positive=n_positive, n_negative=n_negative,
                n_unknown=counts[3], reason="no positive image",
            )  # fmt: skip
            continue
        row = next(scored)
        assert (row.finding, row.n_positive, row.n_negative, row.n_unknown) == counts
        assert row.threshold is not None
        assert row.auroc == pytest.approx(auroc(truth[:, k], scores.scores[:, k]), rel=1e-5)
        chosen = {0.0, 1.0} <= set(val_truth[:, k].tolist())
        assert row.threshold.rule == ("f1" if chosen else "equal_prompts")
        assert (row.threshold.chosen_on == "val") == chosen
        assert row.seen is not None
        counted += [finding] if min(n_positive, n_negative) >= rules.min_count else []
    assert results.macro_findings == counted and counted
    assert next(scored, None) is None and next(undefined, None) is None
    assert bool(results.undefined) == (len(rules.findings) > 2)
    if rules.finetune is not None:
        task = open_task(data, rules, 32)
        assert [f.image_id for f in task.test.dataset.samples] == scores.image_id.tolist()
        train = [i for i, sample in built.items() if sample.split == "train" and i in samples]
        assert [f.image_id for f in task.train.dataset.samples] == train and train


@pytest.mark.parametrize("name", [name for name in protocol_names() if "padchest" in name])
def test_padchests_findings_are_words_or_findings_that_its_reader_knows(name: str):
    rules, source = load_protocol(name), load_words("padchest")
    if rules.own_words:
        known = {word.lower() for word in source.words}
        asked = {word for f in rules.findings for word in rules.words.get(f, (f,))}
        assert {word.lower() for word in asked} <= known
        assert set(rules.unfinished) <= set(source.unfinished)
    else:
        # A finding that is not closed is absent in no image, and could not be scored.
        assert set(rules.findings) <= set(source.closed)


def test_where_laterals_must_be_told_a_folder_without_any_is_refused(made_data: Path):
    dataset = open_dataset([made_data])
    rules = load_protocol("openi").model_copy(
        update={"own_words": False, "findings": ("nodule",), "unfinished": ()}
    )
    with pytest.raises(ManifestError, match="no image of this data is known as a lateral"):
        select_samples(dataset, "test", protocol=rules)
    test = [i for i, sample in enumerate(dataset.samples) if sample.split == "test"]
    samples = tuple(
        replace(f, view="L") if i == test[0] else f for i, f in enumerate(dataset.samples)
    )
    kept = select_samples(replace(dataset, samples=samples), "test", protocol=rules)
    assert len(kept) == len(test) - 1
    # A second folder that knows no view is refused, though the first one has laterals.
    where = dataset.where.copy()
    where[len(where) // 2 :, 0] += 1
    samples = tuple(
        replace(f, view="unknown" if k else "L" if i == 0 else f.view)
        for i, (f, k) in enumerate(zip(dataset.samples, where[:, 0], strict=True))
    )
    two = replace(dataset, samples=samples, where=where)
    with pytest.raises(ManifestError, match=r"known as a lateral in folder 2 \("):
        select_samples(two, "test", protocol=rules)
    assert "of folder 2 (" in unknown_views(two)


# Commands.


@pytest.fixture(scope="module")
def rsna(made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A data folder of RSNA's layout, and the results of two checkpoints of a run on it."""
    folder = tmp_path_factory.mktemp("rsna")
    rules, case = load_protocol("rsna"), CASES["rsna"]
    found = {"data": build(case, plan(rules, case), folder)}
    set_its_split(found["data"], rules, {})
    for step in (4, 6):
        out = found[f"step {step}"] = folder / f"step-{step}"
        checkpoint = made_run / f"checkpoints/step_{step:06}"
        given = ("--model", checkpoint, "--data", found["data"], "--protocol", "rsna", "--out", out)
        run(evaluation_commands, "zeroshot", *given, "--n-resamples", "5", "--cpu")
    return found


@pytest.fixture(scope="module")
def peer(rsna: dict[str, Path]) -> list[tuple[str, object]]:
    """The rows of a table of scores for every image of RSNA's: another model's."""
    samples = read_manifest(rsna["data"])
    scores = np.random.default_rng(0).normal(size=len(samples)).round(3)
    rows = [
        (sample.image_id, score) for sample, score in zip(samples, scores.tolist(), strict=True)
    ]
    return [("image_id", "pneumonia"), *rows]


def judged(rsna: dict[str, Path], out: Path, *given: str | Path) -> Ended:
    more = ("--data", rsna["data"], "--protocol", "rsna", "--out", out, "--n-resamples", "5")
    return mmclip(out, "results", *given, *more)


def test_two_runs_stand_side_by_side_with_what_others_published(
    rsna: dict[str, Path], tmp_path: Path
):
    runs = (rsna["step 4"], rsna["step 6"])
    ended = mmclip(
        tmp_path, "results", *runs, "--n-resamples", "20", "--save", tmp_path / "table.md"
    )
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    first, second = found["runs"]
    assert [first["name"], second["name"]] == ["step-4", "step-6"]
    assert first["difference"] is None
    values = [read_results(folder).findings[0].auroc for folder in runs]
    assert second["difference"]["value"] == pytest.approx(values[1] - values[0], abs=1e-5)
    low, high = second["difference"]["interval"]
    assert low <= second["difference"]["value"] <= high
    assert {row["protocol"] for row in found["published"]} == {"rsna"}
    table = (tmp_path / "table.md").read_text("utf-8")
    for said in ("| step-4 |", "| pneumonia |", found["published"][0]["method"], "split clean"):
        assert said in table and said.strip("| ") in ended.err + table
    assert "published numbers were not run here" in ended.err


def test_scores_of_another_model_are_judged_and_stand_beside_ours(
    rsna: dict[str, Path], peer: list[tuple[str, object]], tmp_path: Path
):
    table = tmp_path / "peer.csv"
    table.write_text("\ufeff" + made.lines(*peer), "utf-8")  # as Excel writes it
    ended = judged(rsna, tmp_path / "out", table, rsna["step 6"])
    assert ended.code == 0, ended.err
    assert [row["name"] for row in json.loads(ended.out)["runs"]] == ["peer", "step-6"]
    results = read_results(tmp_path / "out/peer")
    (row,) = results.findings
    assert row.threshold is not None and row.threshold.chosen_on == "val"
    score_of = dict(peer[1:])
    stored = load_scores(tmp_path / "out/peer/scores.npz")
    assert [score_of[i] for i in stored.image_id] == stored.scores[:, 0].tolist()
    ours = load_scores(rsna["step 6"] / "scores.npz")
    np.testing.assert_array_equal(stored.labels, ours.labels)
    # Again is another command: it does not take the place of what is there.
    error = judged(rsna, tmp_path / "out", table).error()
    assert "already holds results" in error and "--overwrite" in error
    assert judged(rsna, tmp_path / "out", table, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_id;pneumonia\nf0;0,5\n", "has ';' between its columns; write it with commas"),
        (
            "image_id,Pneumonia\nf0,1\n",
            "lacks the columns 'pneumonia'; its columns are image_id, Pneumonia",
        ),
        ("image_id,pneumonia,pneumonia\nf0,1,2\n", "names column 'pneumonia' twice"),
        ("image_id,pneumonia\nf0,1\n", r"no score of \d+ of the \d+ images, such as f\d+"),
        ("", "lacks the columns 'image_id', 'pneumonia'; it is empty"),
        ("image_id,pneumonia\nf0,ü\n".encode("utf-16"), "is no CSV in UTF-8"),
        ("image_id,pneumonia\nf\0,1\n", "is no CSV in UTF-8|no score of"),
    ],
    ids=["semicolons", "other name", "twice", "images missing", "empty", "utf-16", "null"],
)
def test_a_table_that_cannot_be_judged_is_one_clear_line(
    rsna: dict[str, Path], tmp_path: Path, content: str | bytes, message: str
):
    path = tmp_path / "peer.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ScoresError, match=message):
        compute_metrics_of_csv(
            path, [rsna["data"]], tmp_path / "out", protocol="rsna", n_resamples=2
        )


def test_results_that_do_not_compare_and_careless_calls_are_one_clear_line(
    rsna: dict[str, Path], made_run: Path, made_data: Path, tmp_path: Path
):
    folder, table = rsna["step 6"], tmp_path / "peer.csv"
    table.write_text("image_id,pneumonia\n")

    def error(*given: str | Path) -> str:
        return mmclip(tmp_path, *given).error()

    assert "holds no results.json; give the --out of" in error("results", folder, tmp_path)
    assert "give --data, --protocol and --out" in error("results", table, folder)
    assert "are for CSV files of scores, and none is given" in error(
        "results", folder, "--out", tmp_path
    )
    assert (
        "would share a folder in --out" in judged(rsna, tmp_path, table, tmp_path / table).error()
    )
    other = ("zeroshot", "--model", made_run, "--data", made_data, "--n-resamples", "2", "--cpu")
    ended = mmclip(tmp_path, *other, "--finding", "nodule", "--out", tmp_path / "other")
    assert ended.code == 0, ended.err
    assert "are not of the same images" in error("results", folder, tmp_path / "other")
    alone = mmclip(tmp_path, "results", folder, "--n-resamples", "2")
    assert alone.code == 0 and len(json.loads(alone.out)["runs"]) == 1


def test_results_of_an_older_version_say_how_to_get_them_again(
    rsna: dict[str, Path], tmp_path: Path
):
    copy = tmp_path / "copy"
    shutil.copytree(rsna["step 6"], copy)
    left = json.loads((copy / "results.json").read_text("utf-8"))
    for key in ("macro_auprc", "macro_auprc_ci", "subgroups", "other_prompt_sets"):  # came later
        del left[key]
    (copy / "results.json").write_text(json.dumps(sealed(left)), "utf-8")
    error = mmclip(tmp_path, "results", rsna["step 6"], copy).error()
    assert "results.json is damaged or of another version of mmclip" in error
    assert "macro_auprc" in error and "run the command that made it again" in error


def test_zeroshot_by_a_protocol_refuses_what_is_not_its_own(
    rsna: dict[str, Path], made_run: Path, made_data: Path, tmp_path: Path
):
    def error(data: Path, *given: str) -> str:
        out = ("--model", made_run, "--out", tmp_path / "out", "--cpu")
        return mmclip(tmp_path, "zeroshot", "--data", data, *out, *given).error()

    for option in ("--finding", "--source"):
        assert "leave --source and --finding out" in error(
            rsna["data"], "--protocol", "rsna", option, "mass"
        )
    unknown = error(rsna["data"], "--protocol", "rnsa")
    assert all(name in unknown for name in ("rnsa", *protocol_names()))
    assert "protocol siim is for data of 'siim', and" in error(rsna["data"], "--protocol", "siim")
    assert "was built by reader 'rsna'" in error(rsna["data"], "--protocol", "siim")
    unset = tmp_path / "unset"
    shutil.copytree(rsna["data"], unset)
    (unset / "split.json").unlink()
    said = error(unset, "--protocol", "rsna")
    assert "has split 'built'" in said and f"`mmclip data split {unset} --name clean`" in said
    assert not (tmp_path / "out").exists()
