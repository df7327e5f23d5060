"""`mmclip data`: build, label, split and check data folders."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmclip.cli import build
from mmclip.cli.plain import PlainCommand, PlainGroup
from mmclip.cli.shared import split_name
from mmclip.cli.tables import print_table
from mmclip.files import locked
from mmclip.progress import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmclip.data.report_labels import Check, Derived
    from mmclip.data.sample import Split

app = typer.Typer(
    cls=PlainGroup, help="Build, label, split and check data folders.", no_args_is_help=True
)
app.add_typer(build.app, name="build")


@app.command("split", cls=PlainCommand)
def data_split(
    folder: Annotated[
        Path, typer.Argument(help="Data folder of `mmclip data build`.", metavar="PATH")
    ],
    name: Annotated[
        str,
        typer.Option(
            help="clean, official, physician, benchx, legacy-mavl or legacy-mrm.", metavar="NAME"
        ),
    ] = "clean",
    seed: Annotated[int, typer.Option(help="Seed of random choices.", metavar="N")] = 0,
    val_ratio: Annotated[
        float, typer.Option(help="Share of patients, if drawn at random.", metavar="RATIO")
    ] = 0.1,
    test_ratio: Annotated[
        float, typer.Option(help="Share of patients, if drawn at random.", metavar="RATIO")
    ] = 0.1,
    list_: Annotated[
        list[str] | None,
        typer.Option("--list", help="Published list of a split; once each.", metavar="SPLIT=FILE"),
    ] = None,
    patients: Annotated[
        Path | None,
        typer.Option(help="CSV image_id,patient_id for data without patient ids.", metavar="PATH"),
    ] = None,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="For clean: keep them in one split, too.")
    ] = False,
    subset_seed: Annotated[
        list[int] | None,
        typer.Option(
            help="Seed of the saved 1, 10 and 100 %; may be repeated. [0, 1, 2]", metavar="N"
        ),
    ] = None,
) -> None:
    """Gives a data folder a named split, and saves 1 %, 10 % and 100 % of its training patients.

    Example: `mmclip data split data/images --name clean --seed 0`
    """
    from mmclip.data.folder import read_built_meta
    from mmclip.data.leakage.splits import SUBSET_SEEDS, set_split
    from mmclip.data.sample import RandomSplit

    read_built_meta(folder)
    with locked(folder):
        split = set_split(
            folder,
            name,
            RandomSplit(seed, val_ratio, test_ratio),
            lists=_lists(list_ or ()),
            patients=patients,
            near_duplicates=near_duplicates,
            subset_seeds=tuple(subset_seed or SUBSET_SEEDS),
        )
    _print_split(split, folder)


@app.command("labels", cls=PlainCommand)
def data_labels(
    folder: Annotated[
        Path, typer.Argument(help="Data folder of `mmclip data build`.", metavar="PATH")
    ],
    findings: Annotated[
        str,
        typer.Option(help="Which findings: chexpert, or a TOML file of rules.", metavar="NAME"),
    ] = "chexpert",
    uncertain_as: Annotated[
        str,
        typer.Option(
            help="What uncertain mentions become: uncertain, present, absent, unknown.",
            metavar="NAME",
        ),
    ] = "uncertain",
    check: Annotated[
        Path | None,
        typer.Option(
            help="Change nothing; score the labels against this CSV of people's labels.",
            metavar="PATH",
        ),
    ] = None,
) -> None:
    """Labels images by what their reports say, or checks such labels against a table.

    The result goes to stdout as JSON.

    Example: `mmclip data labels data/hospital --check gold.csv`
    """
    from typing import cast, get_args

    from mmclip.data.folder import read_built_meta
    from mmclip.data.report_labels import (
        UncertainAs,
        check_labels,
        label_folder,
        read_label_rules,
    )

    if uncertain_as not in get_args(UncertainAs):
        raise ValueError(
            f"--uncertain-as {uncertain_as} is none of {', '.join(get_args(UncertainAs))}"
        )
    rules = read_label_rules(findings)
    if check is not None:
        _print_agreement(check_labels(folder, rules, check))
        return
    read_built_meta(folder)
    with locked(folder):
        done = label_folder(folder, rules, cast(UncertainAs, uncertain_as))
    _print_labels(done)


@app.command("check", cls=PlainCommand)
def data_check(
    folders: Annotated[list[Path], typer.Argument(help="Data folders to compare.", metavar="PATH")],
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare patients and equal files, not near-duplicates.")
    ] = False,
) -> None:
    """Finds patients and images that splits and data sets share; exit code 1 for a leak.

    The whole report goes to stdout as JSON.

    Example: `mmclip data check data/chestxray14 data/rsna`
    """
    from dataclasses import asdict

    from mmclip.data.leakage.check import check_data

    found = check_data(folders, near_duplicates=not exact)

    def say(what: str, lines: "Sequence[object]", style: str = "") -> None:
        console.print(f"{what}: {'' if lines else 'none'}".rstrip())
        for line in lines:
            console.print(f"  {line}", style=style, markup=False, soft_wrap=True)

    counts = [
        f"{name}: " + ", ".join(f"{what} {n:,}" for what, n in known.items())
        for name, known in found.counts.items()
    ]
    say("folders", counts)
    say("shared between splits", found.leaks, "red")
    if len(folders) > 1:
        say("shared between folders", found.shared, "yellow")
        say("labels of the same image in two folders", found.disagreements)
    say("worth a look", found.oddities)
    if exact:
        console.print("near-duplicates were not looked for")
    print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    if found.leaks:
        raise typer.Exit(1)


def _print_labels(done: "Derived") -> None:
    rows = [
        (finding, *(f"{counts[value]:,}" for value in (1, -1, 0)))
        for finding, counts in sorted(done.counts.items())
    ]
    print_table(("finding", "present", "uncertain", "absent"), rows)
    console.print(
        f"{done.n_labelled:,} images labelled by their reports; {done.n_kept:,} keep the labels "
        f"they had, {done.n_without_report:,} have no report; data hash {done.data_hash[:16]}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    counts = {f: {str(value): n for value, n in c.items()} for f, c in done.counts.items()}
    metadata = {
        "labelled": done.n_labelled,
        "kept": done.n_kept,
        "no_report": done.n_without_report,
    }
    print(json.dumps({**metadata, "data_hash": done.data_hash, "labels": counts}, indent=2))


def _print_agreement(check: "Check") -> None:
    rows: list[tuple[str, ...]] = []
    out: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for task, of_finding in check.agreement.items():
        for finding, scores in of_finding.items():
            values = (scores.precision, scores.recall, scores.f1)
            said = ("–" if value is None else f"{value:.3f}" for value in values)
            rows.append((finding, task, f"{scores.n_gold:,}", *said))
            numbers = dict(zip(("precision", "recall", "f1"), values, strict=True))
            out.setdefault(task, {})[finding] = {"n_gold": scores.n_gold, **numbers}
    print_table(("finding", "task", "gold", "precision", "recall", "F1"), rows)
    console.print(
        f"{check.n_rows:,} rows compared; {check.n_not_here:,} rows of images that are "
        f"not here or have no report; columns left out: {', '.join(check.ignored) or 'none'}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    metadata = {"n_rows": check.n_rows, "n_not_here": check.n_not_here, "ignored": check.ignored}
    print(json.dumps({**metadata, "agreement": out}, indent=2))


def _lists(given: "Sequence[str]") -> "dict[Split, Path]":
    lists: dict[Split, Path] = {}
    for item in given:
        name, is_given, path = item.partition("=")
        if not is_given or not path:
            raise ValueError(f"--list {item!r} is no SPLIT=FILE, such as test=test_list.txt")
        if split_name(name) in lists:
            raise ValueError(f"--list names {name} twice; give one file a split")
        lists[split_name(name)] = Path(path)
    return lists


def _print_split(split: dict, folder: Path) -> None:
    for part, listed in split.get("lists", {}).items():
        known = "the published list" if listed["is_known"] else "not known"
        counts = (
            f"{listed['n_rows_found']:,} of {listed['n_rows']:,} rows name {listed['n_images']:,}"
        )
        line = f"list {part}: {listed['file']}, SHA-256 {listed['sha256'][:16]} ({known}); {counts}"
        console.print(f"{line} images of the folder", markup=False, soft_wrap=True)
    for warning in split["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    counts = ", ".join(f"{name} {n:,}" for name, n in split["splits"].items())
    left = split["n_in_no_split"]
    console.print(f"split {split['name']}: {counts}" + (f", in none {left:,}" if left else ""))
    for seed, subsets in split["subsets"].items():
        sizes = (f"{p} % {s['n_patients']:,} ({s['hash'][:8]})" for p, s in subsets.items())
        console.print(f"training patients, seed {seed}: {', '.join(sizes)}", soft_wrap=True)
    console.print(f"split hash {split['split_hash'][:16]}, data hash {split['data_hash'][:16]}")
    print(folder)
