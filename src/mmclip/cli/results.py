"""`mmclip results`: results side by side, and scores of any model judged by the same rules."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mmclip.cli.shared import OverwriteOption, check_results, command_line, split_name
from mmclip.progress import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmclip.evaluation.comparison import Compared, Difference, Published

app = typer.Typer()


@app.command()
def results(
    given: Annotated[
        list[Path],
        typer.Argument(
            help="Folders with results.json, or CSV files of scores; the first is the base."
        ),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="For CSV files: data folder of the films; may be repeated."),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="For CSV files: by whose rules; a name or a path.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="For CSV files: folder that gets their results.")
    ] = None,
    split: Annotated[str, typer.Option(help="For CSV files: val or test.")] = "test",
    draws: Annotated[int, typer.Option(help="Bootstrap draws of patients.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write the table as Markdown, too.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compares results on the same films, pair by pair; refuses what does not compare.

    Published numbers of the same protocol stand below, with what keeps them from comparing. A CSV
    has a column film_id and one for each finding; it is judged first, and leaves its page in --out.

    Example: `mmclip results runs/a/test runs/b/test`

    Example: `mmclip results b.csv runs/a --data data/chestxray14 --protocol chestxray14 --out b`
    """
    from mmclip.evaluation.comparison import compare, judge_csv, published

    tables = [path for path in given if path.suffix.lower() == ".csv"]
    if tables and not (data and protocol and out):
        raise ValueError(
            f"{tables[0]} holds scores alone; give --data, --protocol and --out to have it judged"
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
    if out is not None and not overwrite:
        for path in tables:
            check_results(out / path.stem)
    folders = []
    for path in given:
        if path in tables:
            assert data and protocol and out
            judge_csv(
                path, data, out / path.stem, protocol=protocol, split=split_name(split),
                draws=draws, seed=seed, command=command_line(),
            )  # fmt: skip
            console.print(f"{path}: {out / path.stem / 'page.html'}", markup=False, soft_wrap=True)
            folders.append(out / path.stem)
        else:
            folders.append(path)
    found = compare(folders, draws=draws, seed=seed)
    for run in found:
        if run.differs:
            said = f"{run.name} compares, but for: {'; '.join(run.differs)}"
            console.print(said, markup=False, soft_wrap=True)
    rules = found[0].results.protocol
    known = [] if rules is None else published(rules.id)
    _print_compared(found, known)
    if save is not None:
        save.write_text(_markdown(found, known), "utf-8")
        console.print(f"written: {save}", markup=False, soft_wrap=True)
    print(json.dumps(_plain(found, known), ensure_ascii=False))


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
HEAD_FINDINGS = ("finding", "first", "run", "AUROC", "less the first")
HEAD_PUBLISHED = ("published by others", "setting", "AUROC", "F1", "not as here", "source")


def _by_finding(found: "Sequence[Compared]") -> list[tuple[str, ...]]:
    base = {row.finding: row.auroc for row in found[0].results.findings}
    return [
        (row.finding, _number(base.get(row.finding)), run.name, _number(row.auroc), _signed(diff))
        for run in found[1:]
        for row in run.results.findings
        if (diff := run.findings.get(row.finding)) is not None
    ]


def _print_compared(found: "Sequence[Compared]", known: "Sequence[Published]") -> None:
    parts = ((HEAD, _rows(found)), (HEAD_FINDINGS, _by_finding(found)))
    for head, rows in parts:
        if rows:
            table = Table(*head, box=None, pad_edge=False)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    few = [row.finding for row in found[0].results.findings if not row.in_macro]
    if few:
        console.print(
            f"no interval, and not in the macro average, for fewer than "
            f"{found[0].results.min_count} films with the finding or without: {', '.join(few)}",
            style="dim",
        )
    if known:
        table = Table(*HEAD_PUBLISHED[:5], box=None, pad_edge=False)
        for row in known:
            table.add_row(*_of_others(row)[:5], style="dim")
        console.print(table)
        console.print(
            "published numbers were not run here; what is not as here keeps them from comparing",
            style="yellow",
        )


def _markdown(found: "Sequence[Compared]", known: "Sequence[Published]") -> str:
    parts = [(HEAD, _rows(found)), (HEAD_FINDINGS, _by_finding(found))]
    parts.append((HEAD_PUBLISHED, [_of_others(row) for row in known]))
    tables = [
        "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))
        for head, rows in parts
        if rows
    ]
    made = found[0].results.provenance
    note = (
        f"In brackets 95 % intervals over resampled patients, the same for both of a pair. Data "
        f"{made.data_hash[:16]}, split {made.split}."
    )
    return "\n".join([*tables, note + "\n"])


def _plain(found: "Sequence[Compared]", known: "Sequence[Published]") -> dict:
    return {
        "runs": [
            {
                "name": run.name,
                "macro_auroc": run.results.macro_auroc,
                "difference": None if run.macro is None else run.macro._asdict(),
                "findings": {name: diff._asdict() for name, diff in run.findings.items()},
                "differs": list(run.differs),
            }
            for run in found
        ],
        "published": [row.model_dump(mode="json") for row in known],
    }
