"""Arms over seeds: the statistics of bench/compare.py, who is paired, what is refused and said."""

import importlib
import json
import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mmclip.config import load_config
from mmclip.config_io import config_hash, recipe_hash
from mmclip.evaluation.comparison import compare
from mmclip.evaluation.compute_metrics import metrics_by_finding
from mmclip.evaluation.over_seeds import compare_over_seeds, remarks
from mmclip.evaluation.results import (
    About,
    Evaluation,
    Provenance,
    ResultsError,
    read_results,
    run_results,
    write_results,
)
from mmclip.evaluation.scores import Predictions, ScoresError, load_scores
from mmclip.files import sealed
from tests.commands import Ended, mmclip

BENCH = str(Path(__file__).parents[1] / "bench")
sys.path.insert(0, BENCH)  # as `python bench/ablation.py` has it
bench = importlib.import_module("compare")
sys.path.remove(BENCH)

NAMES = ["edema", "mass", "rare"]
MADE = Provenance(
    command="mmclip zeroshot", seed=0, data_hash="d" * 64, commit=None, versions={}, device="cpu",
    wall_s=1.0, finished_at="2026-01-02T03:04:05+00:00",
)  # fmt: skip
N_IMAGES = 80
TRUTH = np.random.default_rng(0).integers(0, 2, (N_IMAGES, 3)).astype(float)
TRUTH[:, 2] = np.arange(N_IMAGES) < 3  # too few to count in the macro average


@cache
def scored(arm: str, seed: int, strength: float) -> tuple[Predictions, Evaluation]:
    """The scores of a run, and what is found of them."""
    rng = np.random.default_rng([ord(letter) for letter in arm] + [seed])
    test = Predictions(
        image_id=np.array([f"f{i}" for i in range(N_IMAGES)]),
        patient_id=np.array([f"p{i // 2}" for i in range(N_IMAGES)]),
        sex=np.full(N_IMAGES, ""),
        age_years=np.full(N_IMAGES, np.nan),
        view=np.full(N_IMAGES, "PA"),
        findings=np.array(NAMES),
        labels=TRUTH,
        scores=strength * TRUTH + rng.standard_normal(TRUTH.shape),
    )
    return test, metrics_by_finding(TRUTH, test.scores, test.patients(), NAMES, n_resamples=1)


def leave(folder: Path, arm: str, seed: int | None, strength: float = 1.0, **made: object) -> Path:
    """Results of a run as an evaluation leaves them, without its page."""
    test, found = scored(arm, seed or 0, strength)
    test.save(folder / "scores.npz")
    kind = made.pop("kind", "zeroshot")
    trained = {"train_seed": seed, "recipe_hash": arm * 4, "prompt_hash": "p", **made}
    about = About.model_validate({"title": "t", "kind": kind, "summary": "s"})
    write_results(folder, run_results(found, about, MADE.model_copy(update=trained)))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two arms, of seeds 0 to 2 and 1 to 3; tests leave them as they are."""
    tmp_path = tmp_path_factory.mktemp("arms")
    plain = [leave(tmp_path / f"plain-{s}", "plain", s, 0.5) for s in (0, 1, 2)]
    return plain + [leave(tmp_path / f"whole-{s}", "whole", s, 1.5) for s in (1, 2, 3)]


def test_two_arms_of_two_seeds_by_hand(tmp_path: Path):
    runs = {(arm, s): leave(tmp_path / f"{arm}{s}", arm, s) for arm in "ab" for s in (0, 1)}
    base, other = compare_over_seeds(list(runs.values()), n_resamples=20)
    reached = {key: read_results(folder).macro_auroc or 0.0 for key, folder in runs.items()}
    assert base.macro_aurocs() == {0: reached["a", 0], 1: reached["a", 1]}
    assert other.mean() == pytest.approx((reached["b", 0] + reached["b", 1]) / 2)
    assert other.macro is not None and base.macro is None and base.findings == {}
    gains = [reached["b", s] - reached["a", s] for s in (0, 1)]
    assert other.macro.value == pytest.approx(sum(gains) / 2)
    mass = [read_results(runs["b", s]).findings[1].auroc for s in (0, 1)]
    assert other.means()["mass"] == pytest.approx(sum(mass) / 2)
    assert [arm.name for arm in (base, other)] == ["a", "b"]


@pytest.mark.parametrize("findings", [["edema", "mass"], ["mass"]])
def test_the_statistics_are_those_of_the_bench(folders: list[Path], findings: list[str]):
    runs: dict[str, dict] = {"plain": {}, "whole": {}}
    for folder in folders:
        found, scores = read_results(folder), load_scores(folder / "scores.npz")
        line = {"auroc": {row.finding: row.auroc for row in found.findings}}
        columns = (scores.image_id, scores.patient_id, scores.findings, scores.labels)
        runs[folder.name[:-2]][found.provenance.train_seed] = (
            line,
            bench.Scores(*columns, scores.scores, scores.scores),
        )
    expected = bench.Comparison(runs, "plain", n_resamples=100).compare("whole", findings)
    arms = compare_over_seeds(folders, n_resamples=100)
    found = arms[1].macro if len(findings) > 1 else arms[1].findings["mass"]
    mean = arms[1].mean() if len(findings) > 1 else arms[1].means()["mass"]
    assert found is not None
    assert found.value == pytest.approx(expected.difference, abs=2e-6)  # results are rounded
    assert found.interval == pytest.approx(expected.interval, abs=1e-4)  # 12.7 times the spread
    assert mean == pytest.approx(expected.auroc, abs=2e-6)


def test_the_order_of_folders_names_the_base_and_changes_nothing_else(folders: list[Path]):
    base, other = compare_over_seeds(folders, n_resamples=50)
    mixed = [folders[i] for i in (2, 5, 0, 3, 4, 1)]
    assert compare_over_seeds(mixed, n_resamples=50)[1].macro == other.macro
    turned = compare_over_seeds(folders[::-1], n_resamples=50)
    assert [arm.name for arm in turned] == [other.name, base.name] == ["whole", "plain"]
    assert turned[1].macro is not None and other.macro is not None
    assert turned[1].macro.value == pytest.approx(-other.macro.value)


def test_seeds_of_one_arm_alone_are_left_out_and_named(folders: list[Path]):
    arms = compare_over_seeds(folders, n_resamples=20)
    shared = compare_over_seeds(folders[1:5], n_resamples=20)
    assert arms[1].paired == (1, 2) and list(arms[1].runs) == [1, 2, 3]
    assert arms[1].macro == shared[1].macro and arms[1].findings == shared[1].findings
    assert remarks(arms)[0] == (
        "whole less plain is of seeds 1, 2, which both have; left out: seed 3 of whole and "
        "seed 0 of plain"
    )
    assert not any("left out" in sentence for sentence in remarks(shared))


def test_one_seed_gives_what_a_pair_gives_and_says_that_it_is_over_patients(folders: list[Path]):
    pair = [folders[1], folders[3]]
    arms = compare_over_seeds(pair, n_resamples=50)
    plain = compare(pair, n_resamples=50)[1]
    for found, expected in (
        (arms[1].macro, plain.macro),
        *zip(arms[1].findings.values(), plain.findings.values(), strict=True),
    ):
        assert found is not None and expected is not None
        assert found.value == expected.value
        assert found.interval == pytest.approx(expected.interval, abs=1e-12)
    (said,) = remarks(arms)
    assert said.startswith("whole-1: of one seed, so the interval is over patients alone")


def test_a_finding_of_few_images_has_a_difference_and_no_interval(folders: list[Path]):
    found = compare_over_seeds(folders, n_resamples=20)[1].findings
    assert found["rare"].value and found["rare"].interval is None
    assert found["mass"].interval is not None


def test_nothing_is_remarked_of_arms_of_the_same_seeds(tmp_path: Path):
    runs = [leave(tmp_path / f"{arm}-{s}", arm, s) for arm in "ab" for s in range(3)]
    assert remarks(compare_over_seeds(runs, n_resamples=5)) == []
    assert remarks(compare_over_seeds(runs[:3], n_resamples=5)) == []  # one arm, and no difference


def test_prompts_make_arms_of_one_recipe_and_are_named(tmp_path: Path):
    runs = [
        leave(tmp_path / f"{s}-{prompts}", "a", s, prompt_hash=prompts, prompt_set=prompts)
        for prompts in ("pair", "sentence")
        for s in (0, 1)
    ]
    base, other = compare_over_seeds(runs, n_resamples=5)
    assert [arm.name for arm in (base, other)] == ["0-pair", "0-sentence"]
    assert other.differs == ("prompts sentence, the first: prompts pair",)
    with pytest.raises(ScoresError, match=r"are of different prompts, so of two .* no seed"):
        compare_over_seeds([runs[0], runs[3]], n_resamples=5)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("whole-0", "whole-1", "plain-0", "plain-1"), ["whole", "plain"]),
        (("whole-seed10", "whole-seed11", "b_s1", "b_s2"), ["whole", "b_s"]),
        (("0-whole", "1-whole", "0-plain", "1-plain"), ["0-whole", "0-plain"]),
        (("run-0-a", "run-1-a", "run-0-b", "run-1-b"), ["run-0-a", "run-0-b"]),
    ],
)
def test_arms_are_named_by_what_their_folders_begin_with(
    tmp_path: Path, names: tuple[str, ...], expected: list[str]
):
    folders = [leave(tmp_path / n, "aabb"[i], i % 2) for i, n in enumerate(names)]
    assert [arm.name for arm in compare_over_seeds(folders, n_resamples=2)] == expected


def test_folders_of_one_name_are_told_apart_by_their_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folders = [leave(Path(f"runs/{arm}-{s}/test"), arm, s) for arm in "ab" for s in (0, 1)]
    arms = compare_over_seeds(folders, n_resamples=2)
    assert [arm.name for arm in arms] == ["runs/a", "runs/b"]


@pytest.mark.parametrize(
    ("arm", "seed", "made", "message"),
    [
        ("plain", 1, {}, r"plain-1 and \S*more are of the same recipe and the same seed, 1; a"),
        ("other", 7, {}, r"plain-0 and \S*more are of different recipes .*s 0, 1, 2; seed 7"),
        ("other", None, {}, r"more/results\.json does not say .*; score again by `mmclip zeroshot"),
        ("other", None, {"kind": "finetune"}, r"remove \S*more and run `mmclip"),
        ("other", None, {"kind": "scores"}, "of another model; leave it out"),
        ("other", 1, {"data_hash": "e" * 64}, "not of the same data hash"),
        ("plain", 9, {"split": "clean 12ab"}, "not of the same split"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    folders: list[Path], tmp_path: Path, arm: str, seed: int | None, made: dict, message: str
):
    more = leave(tmp_path / "more", arm, seed, **made)
    with pytest.raises(ScoresError, match=message):
        compare_over_seeds([*folders[:3], more], n_resamples=2)


def test_seeds_of_fine_tuning_are_named_as_such(tmp_path: Path):
    runs = [leave(tmp_path / f"a-{s}", "a", s, kind="finetune") for s in (0, 1)]
    assert remarks(compare_over_seeds(runs, n_resamples=2)) == [
        "seeds are those of fine-tuning; a pre-training that it starts from is the same under all "
        "of them"
    ]


def test_results_of_older_versions_are_read_and_compare_pair_by_pair(tmp_path: Path):
    folders = [leave(tmp_path / f"a-{s}", "a", s) for s in (0, 1)]
    for folder in folders:
        path = folder / "results.json"
        old = json.loads(path.read_text())
        for key in ("train_seed", "recipe_hash"):
            del old["provenance"][key]
        path.write_text(json.dumps(sealed(old)))
    assert read_results(folders[0]).provenance.train_seed is None
    assert compare(folders, n_resamples=2)[1].macro is not None


def of_another_run(folder: Path) -> None:
    shutil.copy(folder.with_name("a-1") / "scores.npz", folder / "scores.npz")


def better_scores(folder: Path) -> None:
    scores = load_scores(folder / "scores.npz")
    replace(scores, scores=scores.labels).save(folder / "scores.npz")


def without_its_checksum(folder: Path) -> None:
    stored = json.loads((folder / "results.json").read_text())
    stored["files_sha256"] = {}
    (folder / "results.json").write_text(json.dumps(sealed(stored)))


def better_results(folder: Path) -> None:
    path = folder / "results.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"macro_auroc": 0.999}))


def unsealed(folder: Path) -> None:
    path = folder / "results.json"
    stored = json.loads(path.read_text())
    del stored["sha256"]
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_another_run, "scores.npz is not the file of these results"),
        (better_scores, "scores.npz is not the file of these results"),
        (without_its_checksum, "scores.npz is not the file of these results"),
        (better_results, "results.json is damaged .*checksum differs"),
        (unsealed, "results.json is damaged .*checksum differs"),
    ],
)
def test_results_and_scores_that_were_changed_are_not_compared(tmp_path: Path, change, said):
    folders = [leave(tmp_path / f"a-{s}", "a", s) for s in (0, 1)]
    change(folders[0])
    with pytest.raises((ScoresError, ResultsError), match=said):
        compare(folders, n_resamples=2)


def test_the_recipe_is_all_but_the_seed():
    given = {"data_hash": "d", "shuffle_pairs": False, "step": 9}
    configs = [load_config("tiny", [f"train.seed={s}"]) for s in (0, 1)]
    one, again = (config.model_dump(mode="json") for config in configs)
    assert recipe_hash(one, given) == recipe_hash(again, given)
    assert config_hash(configs[0]) != config_hash(configs[1])
    others = [load_config("tiny", ["train.steps=7"]), load_config("tiny", ["loss.text=1"])]
    hashes = {recipe_hash(c.model_dump(mode="json"), given) for c in (configs[0], *others)}
    hashes |= {recipe_hash(one, given | {"step": 8}), recipe_hash(one, given | {"data_hash": "e"})}
    assert len(hashes) == 5


def over_seeds(out: Path, *given: str | Path) -> Ended:
    return mmclip(out, "results", *given, "--over-seeds", "--n-resamples", "20")


def test_the_command_prints_arms_and_saves_them_with_what_must_be_known(
    folders: list[Path], tmp_path: Path
):
    ended = over_seeds(tmp_path, *folders, "--save", tmp_path / "table.md")
    assert ended.code == 0, ended.err
    base, other = json.loads(ended.out)["arms"]
    expected = compare_over_seeds(folders, n_resamples=20)[1]
    assert expected.macro is not None
    assert tuple(other["difference"]["interval"]) == expected.macro.interval
    assert other["paired_seeds"] == [1, 2] and base["difference"] is None
    assert base["folders"] == {str(s): str(folders[s]) for s in (0, 1, 2)}
    table = (tmp_path / "table.md").read_text("utf-8")
    row = re.search(r"\| whole x 3 seeds \| (\S+) \| (\S+) to (\S+) \| \+", table)
    assert row is not None and float(row[2]) < float(row[1]) < float(row[3])
    assert "| mass |" in table and "over seeds and patients" in table
    for sentence in json.loads(ended.out)["remarks"]:
        assert f"- {sentence}\n" in table and sentence in ended.err


def test_a_table_of_scores_has_no_seed(folders: list[Path], tmp_path: Path):
    given = (folders[0], "peer.csv", "--data", "d", "--protocol", "p", "--out", "o")
    error = over_seeds(tmp_path, *given).error()
    assert "peer.csv holds scores, and no training seed; leave it or --over-seeds out" in error
