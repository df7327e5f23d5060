"""Every protocol, from a data set as it is published to results: what was planted is what counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mmclip.cli.data import app as data_commands
from mmclip.cli.evaluate import app as zeroshot_command
from mmclip.data.manifest import read_manifest
from mmclip.data.splits import LISTED, NAMES
from mmclip.metrics import auroc
from mmclip.plots import curves_figure
from mmclip.protocols import BUILT, Protocol, load_protocol, protocol_names
from mmclip.results import read_results
from mmclip.scores import load_scores
from tests import made_layouts as made
from tests.made_layouts import Files, Planned
from tests.published import lay_out

NAN = float("nan")
RATIOS = ("--val-ratio", "0.2", "--test-ratio", "0.6")


@dataclass(frozen=True)
class Case:
    """How a protocol is tried: by which reader, in which layout."""

    reader: str
    layout: Callable[[Sequence[Planned]], Files]
    film_id: str  # a pattern that takes the number of a film, and 1 or 0 for a finding
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
}


def plan(rules: Protocol, case: Case) -> list[Planned]:
    """72 films, two fifths of them with each finding, but for the last two of several findings.

    One of those three films have, the other none. A lateral and a film of which nothing is known
    are in test, where the source knows such; some of which little is known are in val.
    """
    names = [name for name in rules.findings if name != "no finding"]
    common, rare = (names[:-2], names[-2]) if len(names) > 2 else (names, None)
    films = []
    for number in range(72):
        split = "test" if number < 48 else "val" if number < 60 else "train"
        present = [name for k, name in enumerate(common) if (number + k) % 5 < 2]
        if rare is not None and number in (1, 2, 3):
            present.append(rare)
        if "no finding" in rules.findings and number % 6 == 5:
            present = ["no finding"]
        is_open = case.has_open and number % 24 == 7 and case.reader not in ("chexpert", "vindr")
        if case.reader in ("chexpert", "vindr"):  # test films are read for all findings
            is_open = split != "test" and number % 6 == 0
        films.append(
            Planned(
                number,
                split,
                () if is_open and case.reader == "openi" else tuple(present),
                is_open,
                is_lateral=case.has_laterals and number == 13,
            )
        )
    return films


def known_of(film: Planned, rules: Protocol) -> list[float]:
    """The labels that a plan says, as a protocol must read them."""
    absent = NAN if film.is_open else 0.0
    return [1.0 if name in film.present else absent for name in rules.findings]


def run(app: typer.Typer, *arguments: str | Path) -> None:
    """Runs a command in this process, where a test can make its plots small."""
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if ended.exception is not None:
        raise ended.exception


def build(case: Case, films: Sequence[Planned], folder: Path) -> Path:
    """Lays the films out under a folder, and builds its data folder."""
    raw = lay_out(folder / "raw", case.layout(films))
    given = ["--root", raw, "--out", folder / "data", "--film-px", "32", "--workers", "1", *RATIOS]
    if case.reader == "csv":
        given += ["--mapping", raw / "mapping.toml"]
    run(data_commands, "build", case.reader, *given)
    return folder / "data"


def set_its_split(folder: Path, rules: Protocol, films: dict[str, Planned]) -> str:
    """Sets the first split that a protocol names, if one must be set; returns its name."""
    if BUILT in rules.splits:
        return BUILT
    name = next(name for name in rules.splits if name in NAMES)
    given = list(RATIOS)
    if name in LISTED:
        for part in ("train", "val", "test"):
            path = folder.parent / f"{part}.txt"
            ids = [film_id for film_id, film in films.items() if film.split == part]
            path.write_text("".join(f"images/{film_id} 0 1\n" for film_id in ids))
            given += ["--list", f"{part}={path}"]
    run(data_commands, "split", folder, "--name", name, *given)
    return name


@pytest.mark.parametrize("name", protocol_names())
def test_a_protocol_runs_from_the_data_set_as_published_to_results(
    name: str, made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rules, case = load_protocol(name), CASES[name]
    planned = plan(rules, case)
    films = {case.film_id.format(f.number, int(bool(f.present))): f for f in planned}
    # These lists are none of the published ones, and a panel a finding takes a second to draw.
    monkeypatch.setattr("mmclip.data.splits.KNOWN_LISTS", {})
    monkeypatch.setattr("mmclip.pages.curves_figure", lambda panels: curves_figure(panels[:1]))
    data, out = build(case, planned, tmp_path), tmp_path / "out"
    split = set_its_split(data, rules, films)
    given = ("--run", made_run, "--data", data, "--protocol", name, "--out", out)
    run(zeroshot_command, *given, "--draws", "10", "--cpu")

    built = {film.film_id: film for film in read_manifest(data)}
    assert len(built) == len(films)

    def expected(part: str) -> dict[str, list[float]]:
        sources = rules.sources_of(part)
        found = {
            film_id: known_of(film, rules)
            for film_id, film in films.items()
            if film_id in built
            and not film.is_lateral
            and built[film_id].split == part
            and (not sources or built[film_id].source in sources)
        }
        return {film_id: row for film_id, row in found.items() if not np.isnan(row).all()}

    test, val = expected("test"), expected("val")
    if split in ("official", "physician", *LISTED):
        frontal = [i for i, f in films.items() if f.split == "test" and not f.is_lateral]
        assert set(test) == {i for i in frontal if not np.isnan(known_of(films[i], rules)).all()}
    results, scores = read_results(out), load_scores(out / "scores.npz")
    assert scores.names() == list(rules.findings)
    assert sorted(scores.film_id.tolist()) == sorted(test)
    truth = np.array([test[film_id] for film_id in scores.film_id])
    np.testing.assert_array_equal(scores.labels, truth)
    assert results.protocol is not None
    assert (results.protocol.id, results.protocol.hash) == (name, rules.hash)
    assert results.provenance.split.split(" ")[0] == split
    assert results.n_films == len(test)

    assert bool(val) == any(film.split == "val" for film in built.values())
    val_truth = np.array(list(val.values())).reshape(len(val), len(rules.findings))
    scored, undefined = iter(results.findings), iter(results.undefined)
    counted = []
    for k, finding in enumerate(rules.findings):
        n_positive, n_negative = int((truth[:, k] == 1).sum()), int((truth[:, k] == 0).sum())
        row = next(scored if n_positive and n_negative else undefined)
        assert row.finding == finding
        assert (row.n_positive, row.n_negative) == (n_positive, n_negative)
        assert row.n_unknown == np.isnan(truth[:, k]).sum()
        if not (n_positive and n_negative):
            assert row.reason == "no positive film"
            continue
        assert row.auroc == pytest.approx(auroc(truth[:, k], scores.scores[:, k]), rel=1e-5)
        chosen = {0.0, 1.0} <= set(val_truth[:, k].tolist())
        assert row.threshold.rule == ("f1" if chosen else "even")
        assert (row.threshold.chosen_on == "val") == chosen
        assert row.seen is not None
        counted += [finding] if min(n_positive, n_negative) >= rules.min_count else []
    assert results.macro_findings == counted and counted
    assert bool(results.undefined) == (len(rules.findings) > 2)
