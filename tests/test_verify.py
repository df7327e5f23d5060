"""Results say the command that made them, and --verify runs it again and compares."""

import json
import shutil
from pathlib import Path

import pytest

from mmclip.cli.verify import verify
from tests.commands import mmclip


@pytest.fixture(scope="module")
def scored(made_run: Path, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    few = ("--finding", "nodule", "--n-resamples", "20", "--out", folder / "out")
    ended = mmclip(folder, "zeroshot", "--model", made_run, "--data", made_data, *few)
    assert ended.code == 0, ended.err
    return folder / "out"


def test_results_that_the_command_gives_again_are_verified(scored: Path, tmp_path: Path):
    before = {p.name: p.stat().st_mtime_ns for p in scored.rglob("*")}
    ended = mmclip(tmp_path, "results", scored, "--verify")
    assert ended.code == 0, ended.err
    (found,) = json.loads(ended.out).values()
    assert found["differ"] == [] and found["n_equal"] > 20
    assert {p.name: p.stat().st_mtime_ns for p in scored.rglob("*")} == before


def test_results_that_were_changed_are_not(scored: Path, tmp_path: Path):
    changed = shutil.copytree(scored, tmp_path / "changed")
    stored = json.loads((changed / "results.json").read_text())
    stored["findings"][0]["auroc"] += 0.01
    stored["n_images"] += 1
    (changed / "results.json").write_text(json.dumps(stored))
    ended = mmclip(tmp_path, "results", changed, "--verify")
    assert ended.code == 1
    (found,) = json.loads(ended.out).values()
    assert {line.split(":")[0] for line in found["differ"]} == {"findings[0].auroc", "n_images"}


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf /", "mmclip", "", "mmclip data build csv --overwrite --out /x", "mmclip 'open",
        "sh -c mmclip", "mmclip zeroshot; touch PROOF", "mmclip export --out x", "$(touch PROOF)",
    ],
)  # fmt: skip
def test_no_other_command_is_run_and_never_by_a_shell(tmp_path: Path, command: str):
    stored = {"provenance": {"command": command.replace("PROOF", str(tmp_path / "proof"))}}
    (tmp_path / "results.json").write_text(json.dumps(stored))
    ran: list[list[str]] = []

    def run(words: list[str]) -> None:
        ran.append(words)
        raise ValueError("is not run again")

    with pytest.raises(ValueError, match="is not run again"):
        verify(tmp_path, run)
    assert not (tmp_path / "proof").exists()
    assert ran == []
