"""`mmclip results`: results side by side, and scores of any model evaluated by the same rules."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mmclip.cli.plain import PlainCommand
from mmclip.cli.shared import (
    OverwriteOption,
    ResamplesOption,
    SeedOption,
    check_inputs,
    check_results,
    command_line,
    split_name,
)
from mmclip.cli.tables import print_table
from mmclip.files import locked, write_text_atomic
from mmclip.progress import console

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mmclip.evaluation.comparison import Compared, Difference, Published
    from mmclip.evaluation.over_seeds import Arm
    from mmclip.evaluation.results import RunResults

app = typer.Typer()

OF_SCORES = "CSV files of scores"
COMPARISON = "Comparison"
"""Titles of panels of the help."""


GivenArgument = Annotated[
    list[Path],
    typer.Argument(
        help="Folders with results.json, or CSV files of scores; the first is the base.",
        metavar="PATH",
    ),
]
DataOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        rich_help_panel=OF_SCORES,
        help="Data folder of the images; may be repeated.",
        metavar="PATH",
    ),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OF_SCORES,
        help="Protocol whose rules apply: a name or a path.",
        metavar="NAME",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(rich_help_panel=OF_SCORES, help="Folder that gets their results.", metavar="PATH"),
]
SplitOption = Annotated[
    str, typer.Option(rich_help_panel=OF_SCORES, help="val or test.", metavar="NAME")
]
OverSeedsOption = Annotated[
    bool,
    typer.Option(
        "--over-seeds",
        rich_help_panel=COMPARISON,
        help="One row for the runs that differ by their training seed alone.",
    ),
]
SaveOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=COMPARISON, help="Write the table as Markdown, too.", metavar="PATH"
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify",
        rich_help_panel="Reproduction",
        help="Run the commands that made the results again, and compare.",
    ),
]


@app.command(cls=PlainCommand)
def results(
    context: typer.Context,
    given: GivenArgument,
    data: DataOption = None,
    protocol: ProtocolOption = None,
    out: OutOption = None,
    split: SplitOption = "test",
    n_resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    over_seeds: OverSeedsOption = False,
    save: SaveOption = None,
    overwrite: OverwriteOption = False,
    verify: VerifyOption = False,
) -> None:
    """Compares results on the same images, with paired intervals; refuses what does not compare.

    Published numbers of the same protocol stand below, with what keeps them from comparing. A CSV
    has a column image_id and one for each finding; it is evaluated first, and leaves its page in
    --out.

    With --over-seeds, runs of one recipe (configuration but for the seed, training data, step) are
    one row, and intervals of differences are over seeds and patients together. Folders may stand in
    any order; the runs of the first one's recipe are the base.

    Example: `mmclip results runs/a/test runs/b/test`

    Example: `mmclip results runs/a/test --verify`

    Example: `mmclip results b.csv runs/a --data data/chestxray14 --protocol chestxray14 --out b`

    Example: `mmclip results runs/a-0/test runs/a-1/test runs/b-0/test runs/b-1/test --over-seeds`
    """
    from mmclip.evaluation.comparison import compute_metrics_of_csv

    if verify:
        _verify(context, given)
        return
    tables = _tables(given, data, protocol, out, over_seeds)
    check_inputs(data=data or (), protocol=protocol)
    if out is not None and not overwrite:
        for path in tables:
            check_results(out / path.stem)
    folders = [out / path.stem if out and path in tables else path for path in given]
    for path in tables:
        assert data and protocol and out
        with locked(out / path.stem):
            compute_metrics_of_csv(
                path, data, out / path.stem, protocol=protocol, split=split_name(split),
                n_resamples=n_resamples, seed=seed, command=command_line(),
            )  # fmt: skip
        console.print(f"{path}: {out / path.stem / 'page.html'}", markup=False, soft_wrap=True)
    show_side_by_side(folders, n_resamples, seed, over_seeds, save)


def show_side_by_side(
    folders: list[Path], n_resamples: int, seed: int, over_seeds: bool, save: Path | None
) -> None:
    """Prints results side by side, on stderr for people and on stdout as a line of JSON."""
    from mmclip.evaluation.comparison import published

    table = _table(folders, over_seeds, n_resamples, seed)
    first, parts, drawn, said = table.first, table.parts, table.drawn, table.said
    known = [] if first.protocol is None else published(first.protocol.id)
    _print_tables(parts, first, drawn)
    for sentence in said:
        console.print(sentence, style="yellow", markup=False)
    _print_published(known)
    if save is not None:
        write_text_atomic(save, _markdown(parts, said, first, known, drawn))
        console.print(f"written: {save}", markup=False, soft_wrap=True)
    of_others = {"published": [row.model_dump(mode="json") for row in known]}
    print(json.dumps({**table.plain, **of_others}, ensure_ascii=False))


def _verify(context: typer.Context, folders: "Sequence[Path]") -> None:
    """Runs the command of each folder's results again, and says what differs."""
    from mmclip.cli.verify import verify

    def run(words: list[str]) -> None:
        context.find_root().command.main(words, prog_name="mmclip", standalone_mode=False)

    found = {str(folder): verify(folder, run) for folder in folders}
    for folder, done in found.items():
        console.print(f"{folder}: `{done.command}`", soft_wrap=True)
        console.print(f"  {done.n_equal:,} values agree, {len(done.differ):,} differ")
        for line in done.differ[:20]:
            console.print(f"  {line}", style="red", soft_wrap=True)
    print(json.dumps({folder: done._asdict() for folder, done in found.items()}, indent=2))
    if any(done.differ for done in found.values()):
        raise typer.Exit(1)


class _Table(NamedTuple):
    """Results side by side."""

    first: "RunResults"  # the base
    parts: "list[Section]"
    drawn: str  # over what intervals are
    said: list[str]  # what a reader must know
    plain: dict[str, Any]  # for JSON


def _table(folders: list[Path], over_seeds: bool, n_resamples: int, seed: int) -> _Table:
    """Compares results, run by run or over the seeds of each recipe."""
    from mmclip.evaluation.comparison import compare
    from mmclip.evaluation.over_seeds import compare_over_seeds, remarks

    if not over_seeds:
        found = compare(folders, n_resamples=n_resamples, seed=seed)
        _say_differences((run.name, run.differs) for run in found)
        plain = {"runs": [_plain_run(run) for run in found]}
        return _Table(found[0].results, _sections(found), "patients", [], plain)
    arms = compare_over_seeds(folders, n_resamples=n_resamples, seed=seed)
    first = next(run for run in arms[0].runs.values() if run.folder == folders[0]).results
    _say_differences((arm.name, arm.differs) for arm in arms)
    said = remarks(arms)
    plain = {"arms": [_plain_arm(arm) for arm in arms], "remarks": said}
    return _Table(first, _sections_over_seeds(arms), "seeds and patients", said, plain)


def _tables(
    given: list[Path],
    data: list[Path] | None,
    protocol: str | None,
    out: Path | None,
    over_seeds: bool,
) -> list[Path]:
    """The CSV files among what was given; refuses options that do not go together."""
    tables = [path for path in given if path.suffix.lower() == ".csv"]
    if tables and over_seeds:
        raise ValueError(
            f"{tables[0]} holds scores, and no training seed; leave it or --over-seeds out"
        )
    if tables and not (data and protocol and out):
        raise ValueError(
            f"{tables[0]} holds scores alone; give --data, --protocol and --out to evaluate it"
        )
    if not tables and (data or protocol or out):
        raise ValueError(
            "--data, --protocol and --out are for CSV files of scores, and none is given; leave "
            "them out, or name a file that ends in .csv"
        )
    if len({path.stem for path in tables}) < len(tables):
        raise ValueError(
            f"{' and '.join(map(str, tables))} would share a folder in --out, which is named after "
            f"the file; rename one"
        )
    if missing := [path for path in given if not path.exists()]:
        raise ValueError(f"there is no {missing[0]}; give the --out of `mmclip zeroshot` or a CSV")
    return tables


def _say_differences(runs: "Iterable[tuple[str, Sequence[str]]]") -> None:
    for name, differs in runs:
        if differs:
            said = f"{name} compares, but for: {'; '.join(differs)}"
            console.print(said, markup=False, soft_wrap=True)


def _signed(difference: "Difference | None") -> str:
    if difference is None:
        return ""
    ci = difference.interval
    return f"{difference.value:+.3f}" + ("" if ci is None else f" [{ci[0]:+.3f}, {ci[1]:+.3f}]")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _rows(found: "Sequence[Compared]") -> list[tuple[str, ...]]:
    """A row a run: name, macro AUROC with interval, difference, AUPRC, F1, MCC."""
    out = []
    for run in found:
        r = run.results
        ci = r.macro_auroc_ci
        auroc = _number(r.macro_auroc) + ("" if ci is None else f" [{ci[0]:.3f}, {ci[1]:.3f}]")
        others = (r.macro_auprc, r.macro_f1, r.macro_mcc)
        out.append((run.name, auroc, _signed(run.macro), *map(_number, others)))
    return out


def _of_others(row: "Published") -> tuple[str, ...]:
    """A row of a published number: what and how, AUROC, F1, and what differs."""
    how = row.setting + ("" if row.fraction is None else f", {100 * row.fraction:g} %")
    f1 = "–" if row.f1 is None else f"{row.f1 / 100:.3f}"
    return (row.method, how, f"{row.auroc / 100:.3f}", f1, row.differs, row.source)


HEAD = ("run", "macro AUROC", "less the first", "AUPRC", "F1", "MCC")
HEAD_SEEDS = ("runs", "macro AUROC", "over seeds", "less the first")
HEAD_FINDINGS = ("finding", "first", "run", "AUROC", "less the first")
HEAD_PUBLISHED = ("published by others", "setting", "AUROC", "F1", "not as here", "source")


Section = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""A table: its head and its rows."""


def _sections(found: "Sequence[Compared]") -> list[Section]:
    base, *others = found
    of_others = [(run.name, run.results.aurocs(), run.findings) for run in others]
    return [(HEAD, _rows(found)), (HEAD_FINDINGS, _by_finding(base.results.aurocs(), of_others))]


def _sections_over_seeds(arms: "Sequence[Arm]") -> list[Section]:
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        values = arm.macro_aurocs().values()
        spread = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else "–"
        rows.append((_named(arm), _number(arm.mean()), spread, _signed(arm.macro)))
    base, *others = arms
    of_others = [(arm.name, arm.means(), arm.findings) for arm in others]
    return [(HEAD_SEEDS, rows), (HEAD_FINDINGS, _by_finding(base.means(), of_others))]


def _named(arm: "Arm") -> str:
    return f"{arm.name} x {len(arm.runs)} seed{'s' * (len(arm.runs) != 1)}"


def _by_finding(
    base: "Mapping[str, float]",
    others: "Sequence[tuple[str, Mapping[str, float], Mapping[str, Difference]]]",
) -> list[tuple[str, ...]]:
    """A row for each finding of each other: name of the other, its AUROC, its differences."""
    return [
        (finding, _number(base.get(finding)), name, _number(auroc), _signed(differences[finding]))
        for name, aurocs, differences in others
        for finding, auroc in aurocs.items()
        if finding in differences
    ]


def _print_tables(parts: "Sequence[Section]", first: "RunResults", drawn: str) -> None:
    for head, rows in parts:
        if rows:
            print_table(head, rows, justify="left")
    few = [row.finding for row in first.findings if not row.in_macro]
    if few:
        console.print(
            f"no interval, and not in the macro average, for fewer than "
            f"{first.min_count} images with the finding or without: {', '.join(few)}",
            style="dim",
        )
    console.print(f"in brackets: 95 %, over {drawn}, the same for both of a pair", style="dim")


def _print_published(known: "Sequence[Published]") -> None:
    if known:
        rows = [_of_others(row) for row in known]
        print_table(HEAD_PUBLISHED[:4], [row[:4] for row in rows], ["dim"] * len(rows), "left")
        whose: dict[str, dict[str, None]] = {}  # a method has a row for each share of the images
        for row in known:
            whose.setdefault(row.differs, {})[row.method] = None
        for differs, methods in whose.items():
            console.print(f"not as here, of {', '.join(methods)}: {differs}", style="dim")
        console.print(
            "published numbers were not run here; what is not as here keeps them from comparing",
            style="yellow",
        )


def _lines(head: "Sequence[str]", rows: "Sequence[Sequence[str]]") -> "Iterator[Sequence[str]]":
    """The lines of a table in Markdown, with what users named escaped."""
    from mmclip.escape import markdown

    yield [markdown(cell) for cell in head]
    yield ["---"] * len(head)
    yield from ([markdown(cell) for cell in row] for row in rows)


def _markdown(
    parts: "Sequence[Section]",
    said: "Sequence[str]",
    first: "RunResults",
    known: "Sequence[Published]",
    drawn: str,
) -> str:
    from mmclip.escape import markdown

    tables = [
        "".join(f"| {' | '.join(line)} |\n" for line in _lines(head, rows))
        for head, rows in (*parts, (HEAD_PUBLISHED, [_of_others(row) for row in known]))
        if rows
    ]
    made = first.provenance
    note = (
        f"In brackets 95 % intervals over {drawn}, the same for both of a pair. Data "
        f"{made.data_hash[:16]}, split {made.split}."
    )
    notes = [f"{note}\n", "".join(f"- {markdown(sentence)}\n" for sentence in said)]
    return "\n".join(part for part in [*tables, *notes] if part)


def _plain_run(run: "Compared") -> dict:
    return {
        "name": run.name,
        "macro_auroc": run.results.macro_auroc,
        "difference": None if run.macro is None else run.macro._asdict(),
        "findings": {name: diff._asdict() for name, diff in run.findings.items()},
        "differs": list(run.differs),
    }


def _plain_arm(arm: "Arm") -> dict:
    return {
        "name": arm.name,
        "folders": {seed: str(run.folder) for seed, run in arm.runs.items()},
        "macro_auroc": arm.mean(),
        "macro_auroc_by_seed": arm.macro_aurocs(),
        "auroc": arm.means(),
        "paired_seeds": list(arm.paired),
        "difference": None if arm.macro is None else arm.macro._asdict(),
        "findings": {name: diff._asdict() for name, diff in arm.findings.items()},
        "differs": list(arm.differs),
    }
