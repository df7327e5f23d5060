"""The command line. Each command reads its arguments, calls one stage, and prints what came out.

Imports of torch and transformers happen inside the commands, so that --help is quick.
"""

import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mmclip import __version__
from mmclip.progress import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmclip.data.manifest import Split
    from mmclip.doctor import Finding
    from mmclip.results import RunResults

app = typer.Typer(
    name="mmclip",
    help="Pre-train on chest X-rays and reports; classify zero-shot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Build, split and check data folders.", no_args_is_help=True)
app.add_typer(data_app, name="data")

FolderOption = Annotated[
    list[Path], typer.Option("--data", help="Data folder of `mmclip data build`; may be repeated.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override, e.g. train.steps=200; may be repeated.", metavar="KEY=V"),
]


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and details.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Settings of every command."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(message)s"
    )
    for noisy in ("matplotlib", "PIL", "urllib3", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mmclip").setLevel(logging.DEBUG if debug else logging.INFO)


def _command() -> str:
    return shlex.join(["mmclip", *sys.argv[1:]])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, run and results.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the made films, the weights and the order.")] = 0,
    shuffle_pairs: Annotated[
        bool,
        typer.Option(
            "--shuffle-pairs", help="Control: deal films the reports and labels of others."
        ),
    ] = False,
    set_: SetOption = None,
) -> None:
    """Made films and reports, a tiny model, a zero-shot result and a page to look at.

    Example: `mmclip demo --seed 1 --out runs/demo-seed1`
    """
    from mmclip.demo import run_demo

    results = run_demo(out, seed, shuffle_pairs, tuple(set_ or ()), _command())
    _print_results(results, out)


@data_app.command("build")
def data_build(
    name: Annotated[
        str, typer.Argument(help="Reader: csv, chestxray14, ...; docs/data.md lists them.")
    ],
    root_: Annotated[Path, typer.Option("--root", help="The data set, as downloaded.")],
    out: Annotated[Path, typer.Option(help="The data folder to make.")],
    film_px: Annotated[int, typer.Option(help="Side of the cached films, in pixels.", min=8)] = 224,
    mapping: Annotated[
        Path | None, typer.Option(help="For csv: TOML file that says what the columns mean.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="For csv: the table, if it is not the mapping's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the splits, where the source has none.")] = 0,
    val_ratio: Annotated[float, typer.Option(help="Of patients without a split.")] = 0.1,
    test_ratio: Annotated[float, typer.Option(help="Of patients without a split.")] = 0.1,
    workers: Annotated[int, typer.Option(help="Processes; 0 takes all cores.", min=0)] = 0,
    entities: Annotated[
        str, typer.Option(help="Finds entities in reports: lexicon, spacy:NAME or hf:NAME.")
    ] = "lexicon",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished build.")
    ] = False,
) -> None:
    """Reads a data set and leaves a checked, hashed folder with films resized once.

    Example: `mmclip data build csv --root films/ --mapping films.toml --film-px 64 --out data/a`
    """
    from mmclip.data.build import build_data
    from mmclip.data.sources import open_reader

    meta = build_data(
        open_reader(name, root_, mapping=mapping, table=table),
        root_,
        out,
        film_px=film_px,
        seed=seed,
        val_ratio=val_ratio,
        test_ratio=test_ratio,
        workers=workers or os.cpu_count() or 1,
        entities=entities,
        about={"reader": name, "command": _command()},
        overwrite=overwrite,
    )
    _print_meta(meta, out)


@data_app.command("split")
def data_split(
    folder: Annotated[Path, typer.Argument(help="Data folder of `mmclip data build`.")],
    name: Annotated[
        str, typer.Option(help="clean, official, benchx, legacy-mavl or legacy-mrm.")
    ] = "clean",
    seed: Annotated[int, typer.Option(help="Of the split clean.")] = 0,
    val_ratio: Annotated[float, typer.Option(help="Of the patients, for clean.")] = 0.1,
    test_ratio: Annotated[float, typer.Option(help="Of the patients, for clean.")] = 0.1,
    list_: Annotated[
        list[str] | None,
        typer.Option("--list", help="Published list of a split; once each.", metavar="SPLIT=FILE"),
    ] = None,
    patients: Annotated[
        Path | None, typer.Option(help="CSV film_id,patient_id for data without patient ids.")
    ] = None,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="For clean: keep these together, too.")
    ] = False,
    subset_seed: Annotated[
        list[int] | None,
        typer.Option(help="Of the saved 1, 10 and 100 % of patients; may be repeated. [0, 1, 2]"),
    ] = None,
) -> None:
    """Sets a named split of a data folder, and saves 1 %, 10 % and 100 % of its training patients.

    Example: `mmclip data split data/films --name clean --seed 0`
    """
    from mmclip.data.splits import set_split

    split = set_split(
        folder,
        name,
        seed=seed,
        val_ratio=val_ratio,
        test_ratio=test_ratio,
        lists=_lists(list_ or ()),
        patients=patients,
        near_duplicates=near_duplicates,
        subset_seeds=tuple(subset_seed or (0, 1, 2)),
    )
    _print_split(split, folder)


@data_app.command("check")
def data_check(
    folders: Annotated[list[Path], typer.Argument(help="Data folders, examined together.")],
    exact: Annotated[
        bool, typer.Option("--exact", help="Patients and equal files alone, no near-duplicates.")
    ] = False,
) -> None:
    """Says what splits and data sets share; exit code 1 when something is in two splits.

    The whole report goes to stdout as JSON.

    Example: `mmclip data check data/chestxray14 data/rsna`
    """
    from dataclasses import asdict

    from mmclip.data.check import check_data

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
        say("labels of the same film in two folders", found.disagreements)
    say("worth a look", found.oddities)
    if exact:
        console.print("near-duplicates were not looked for")
    print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    if found.leaks:
        raise typer.Exit(1)


def _lists(given: "Sequence[str]") -> "dict[Split, Path]":
    lists: dict[Split, Path] = {}
    for item in given:
        name, is_given, path = item.partition("=")
        if not is_given or not path:
            raise ValueError(f"--list {item!r} is no SPLIT=FILE, such as test=test_list.txt")
        if _split(name) in lists:
            raise ValueError(f"--list names {name} twice; give one file a split")
        lists[_split(name)] = Path(path)
    return lists


def _print_split(split: dict, folder: Path) -> None:
    for part, about in split.get("lists", {}).items():
        known = "the published list" if about["is_known"] else "not known"
        counts = f"{about['n_rows_found']:,} of {about['n_rows']:,} rows name {about['n_films']:,}"
        line = f"list {part}: {about['file']}, SHA-256 {about['sha256'][:16]} ({known}); {counts}"
        console.print(f"{line} films of the folder", markup=False, soft_wrap=True)
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


def _print_meta(meta: dict, out: Path) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("rows read", meta["n_rows"]),
        ("kept", meta["n_films"]),
        ("  with a film", meta["n_with_image"]),
        ("  with a report", meta["n_with_report"]),
        ("  with both", meta["n_paired"]),
        ("excluded", meta["n_excluded"]),
        *((f"  {reason}", n) for reason, n in meta["excluded"].items()),
        ("studies", meta["n_studies"]),
        ("patients", meta["n_patients"]),
        *((f"split {name}", n) for name, n in meta["splits"].items()),
    ]
    for what, n in rows:
        table.add_row(what, f"{n:,}", style="yellow" if what == "excluded" and n else "")
    console.print(table)
    console.print(f"data hash {meta['data_hash'][:16]}")
    print(out)


@app.command()
def doctor(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Data folders, runs and results to examine.")
    ] = None,
) -> None:
    """Says what is installed, which device is used, and what of the given folders is sound.

    Example: `mmclip doctor data/films runs/first runs/first/test`
    """
    from mmclip.doctor import examine, examine_machine

    def say(finding: "Finding") -> bool:
        # One line each, never cut: it names paths, and logs are searched by them.
        mark, style = ("ok", "") if finding.is_sound else ("BAD", "red")
        line = f"{mark:<5}{finding.what:<14} {finding.detail}"
        console.print(line, style=style, markup=False, soft_wrap=True)
        return finding.is_sound

    found = [say(finding) for finding in examine_machine()]
    for folder in folders or ():
        console.print(f"\n{folder}", markup=False, soft_wrap=True)
        found += [say(finding) for finding in examine(folder)]
    if not all(found):
        raise typer.Exit(1)


@app.command()
def pretrain(
    data: FolderOption,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    config: Annotated[
        str, typer.Option(help="Name (tiny, arms/whole, paper, ...) or path to a TOML.")
    ] = "tiny",
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    shuffle_pairs: Annotated[
        bool, typer.Option("--shuffle-pairs", help="Control: deal films the reports of others.")
    ] = False,
    lesion_masks: Annotated[
        Path | None,
        typer.Option("--lesion-masks", help="Folder of made films, for image_mask.policy=oracle."),
    ] = None,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases too.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.")] = False,
) -> None:
    """Pre-trains image and text encoder on films with reports.

    Example: `mmclip pretrain --data data/films --config tiny --set train.steps=2000 --out runs/a`

    On several GPUs: `accelerate launch -m mmclip pretrain ...` or
    `torchrun --nproc-per-node 2 -m mmclip pretrain ...`, with the same arguments.
    """
    from mmclip.config import load_config
    from mmclip.pretrain import Job
    from mmclip.pretrain import pretrain as run

    job = Job(
        folders=tuple(data),
        run=out,
        config=load_config(config, set_ or ()),
        command=_command(),
        resume=resume,
        shuffle_pairs=shuffle_pairs,
        lesions=lesion_masks,
        wandb=wandb,
        cpu=cpu,
    )
    newest = run(job)
    if os.environ.get("RANK", "0") == "0":  # torchrun and accelerate start this once a process
        print(newest)


@app.command()
def zeroshot(
    run: Annotated[Path, typer.Option("--run", help="Run or checkpoint of `mmclip pretrain`.")],
    data: FolderOption,
    out: Annotated[Path, typer.Option(help="Folder for results.json, scores.npz and the page.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    source: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    finding: Annotated[
        list[str] | None, typer.Option(help="Only these, in order; may be repeated.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompt set: a name or a path.")] = "default",
    draws: Annotated[int, typer.Option(help="Bootstrap draws of patients.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of another command in --out.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.")] = False,
) -> None:
    """Scores films by what a report would say of them; AUROC with 95 % intervals.

    Example: `mmclip zeroshot --run runs/a --data data/films --source kermany --out runs/a/kermany`
    """
    import torch

    from mmclip.zeroshot import evaluate

    if not overwrite:
        _check_results(out)
    results = evaluate(
        run,
        tuple(data),
        out,
        split=_split(split),
        sources=tuple(source or ()),
        findings=tuple(finding or ()),
        prompt_set=prompts,
        draws=draws,
        seed=seed,
        command=_command(),
        device=torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda"),
    )
    _print_results(results, out)


def _check_results(out: Path) -> None:
    """Refuses a folder with the results of another command; the same one may write again."""
    from mmclip.results import RESULTS_FILE

    path = out / RESULTS_FILE
    if not path.is_file():
        return
    try:
        command = json.loads(path.read_text("utf-8"))["provenance"]["command"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"{path} is damaged; add --overwrite to replace it, or choose another --out"
        ) from None
    if command != _command():
        raise ValueError(
            f"{out} already holds results of `{command}`; add --overwrite to replace them, or "
            f"choose another --out"
        )
    said = f"{out} holds results of this very command; they are written again"
    console.print(said, markup=False, soft_wrap=True)


def _split(name: str) -> "Split":
    if name not in ("train", "val", "test"):
        raise ValueError(f"split {name!r} is none of train, val, test")
    return name


def _print_results(results: "RunResults", out: Path) -> None:
    """The table for people on stderr, the page's path on stdout."""
    table = Table(box=None, pad_edge=False)
    wide = console.width >= 110
    beside = {name: c.auroc for name, c in results.controls.items() if c.auroc and wide}
    columns = ("finding", "AUROC", "95 %", "AUPRC", "F1", "MCC", "present", "absent", *beside)
    for column in columns:
        table.add_column(column, justify="left" if column == "finding" else "right")

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    def interval(ci: tuple[float, float] | None) -> str:
        return "–" if ci is None else f"{ci[0]:.3f}–{ci[1]:.3f}"

    for row in results.findings:
        values = (number(row.auroc), interval(row.auroc_ci), number(row.auprc), number(row.f1))
        counts = (str(row.n_positive), str(row.n_negative))
        others = (number(auroc.get(row.finding)) for auroc in beside.values())
        table.add_row(row.finding, *values, number(row.mcc), *counts, *others)
    macro = (results.macro_auroc, results.macro_auprc, results.macro_f1, results.macro_mcc)
    auroc, auprc, f1, mcc = map(number, macro)
    spread = interval(results.macro_auroc_ci)
    table.add_row("macro", auroc, spread, auprc, f1, mcc, "", "", style="bold")
    for name, control in results.controls.items():
        table.add_row(f"control: {name}", number(control.macro_auroc), style="dim")
    console.print(table)
    console.print(
        f"macro: the mean over findings with at least {results.min_count} films of either kind",
        style="dim",
    )
    for row in results.undefined:
        console.print(f"not scored: {row.finding} ({row.reason})", style="yellow")
    print(out / "page.html")


def main() -> None:
    """Runs the command line; an error is one line, a traceback needs --debug."""
    debug = "--debug" in sys.argv[1:]
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        if ended.code == 130:  # so typer ends at Ctrl-C, without a word
            console.print("interrupted")
        raise
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, ValueError | OSError | RuntimeError)
        kind = "" if known else f"unexpected {type(error).__name__}: "
        hint = "" if known else " (run again with --debug after `mmclip` for the traceback)"
        said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        console.print(f"error: {kind}{said}{hint}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
