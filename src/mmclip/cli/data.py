"""`mmclip data`: build, split and check data folders."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.table import Table

from mmclip.cli.shared import command_line, resume_hint, split_name
from mmclip.progress import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmclip.config import ResizeMode
    from mmclip.data.report_labels import Check
    from mmclip.data.sample import Split

app = typer.Typer(help="Build, label, split and check data folders.", no_args_is_help=True)


@app.command("build")
def data_build(
    name: Annotated[
        str,
        typer.Argument(
            help="Reader: csv, chestxray14, ...; docs/data.md lists them.", metavar="NAME"
        ),
    ],
    root_: Annotated[
        Path, typer.Option("--root", help="The data set, as downloaded.", metavar="PATH")
    ],
    out: Annotated[Path, typer.Option(help="The data folder to make.", metavar="PATH")],
    image_size: Annotated[
        int, typer.Option(help="Side of the cached images, in pixels.", min=8, metavar="N")
    ] = 224,
    resize: Annotated[
        str, typer.Option(help="How images become squares: squash, pad or crop.", metavar="NAME")
    ] = "squash",
    mapping: Annotated[
        Path | None,
        typer.Option(
            help="For csv or dicom: TOML file that says what the columns mean.", metavar="PATH"
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="For csv: the table, if it is not the mapping's.", metavar="PATH"),
    ] = None,
    reports: Annotated[
        Path | None,
        typer.Option(help="For dicom: table of reports, if not the mapping's.", metavar="PATH"),
    ] = None,
    id_key: Annotated[
        Path | None,
        typer.Option(
            help="For dicom: key that hashes ids; made if absent. [OUT.id-key]", metavar="PATH"
        ),
    ] = None,
    keep_age_sex: Annotated[
        bool, typer.Option("--keep-age-sex", help="For dicom: keep age and sex of patients.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of the splits, where the source has none.", metavar="N")
    ] = 0,
    val_ratio: Annotated[
        float, typer.Option(help="Of patients without a split.", metavar="RATIO")
    ] = 0.1,
    test_ratio: Annotated[
        float, typer.Option(help="Of patients without a split.", metavar="RATIO")
    ] = 0.1,
    workers: Annotated[
        int, typer.Option(help="Processes; 0 takes all cores.", min=0, metavar="N")
    ] = 0,
    entities: Annotated[
        str,
        typer.Option(
            help="Finds entities in reports: lexicon, spacy:NAME or hf:NAME.", metavar="NAME"
        ),
    ] = "lexicon",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished build.")
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Dask scheduler whose workers do it: tcp://host:port.", metavar="ADDRESS"
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Do this share only, 1/8 to 8/8; then run it without.", metavar="I/N"),
    ] = None,
) -> None:
    """Reads a data set and leaves a checked, hashed folder with images resized once.

    Example: `mmclip data build csv --root raw/ --mapping raw.toml --image-size 64 --out data/a`
    """
    from mmclip.data.build import build_data, build_shard
    from mmclip.data.shards import Shard, n_cores
    from mmclip.data.sources import DicomOptions, open_reader

    how = _resize_mode(resize)
    dicom = None
    if name == "dicom" or reports is not None or id_key is not None or keep_age_sex:
        dicom = DicomOptions(
            id_key or out.with_name(f"{out.resolve().name}.id-key"), reports, keep_age_sex
        )
    if scheduler is not None and workers:
        raise ValueError(
            f"--workers {workers} and --scheduler {scheduler} both say who works; give one of them"
        )
    who = scheduler or workers or n_cores()
    if shard is not None:
        share = Shard.parse(shard)
        if overwrite:
            raise ValueError(
                f"a shard never replaces a build; leave --overwrite out, and remove {out} first if "
                f"it holds an old one"
            )
        records = open_reader(name, root_, mapping=mapping, table=table, dicom=dicom)
        with resume_hint():
            build_shard(
                records, root_, out, share, image_size=image_size, workers=who, entities=entities,
                resize=how,
            )  # fmt: skip
        console.print(
            f"shard {shard} is done; when all are, run the same command without --shard",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        return
    with resume_hint():
        meta = build_data(
            open_reader(name, root_, mapping=mapping, table=table, dicom=dicom),
            root_,
            out,
            image_size=image_size,
            seed=seed,
            val_ratio=val_ratio,
            test_ratio=test_ratio,
            workers=who,
            entities=entities,
            metadata={"reader": name, "command": command_line()},
            overwrite=overwrite,
            hides_paths=name == "dicom",
            resize=how,
        )
    _print_meta(meta, out)


@app.command("split")
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
    seed: Annotated[int, typer.Option(help="Of what is drawn.", metavar="N")] = 0,
    val_ratio: Annotated[
        float, typer.Option(help="Of the patients, where they are drawn.", metavar="RATIO")
    ] = 0.1,
    test_ratio: Annotated[
        float, typer.Option(help="Of the patients, where they are drawn.", metavar="RATIO")
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
        bool, typer.Option("--near-duplicates", help="For clean: keep these together, too.")
    ] = False,
    subset_seed: Annotated[
        list[int] | None,
        typer.Option(
            help="Of the saved 1, 10 and 100 % of patients; may be repeated. [0, 1, 2]", metavar="N"
        ),
    ] = None,
) -> None:
    """Sets a named split of a data folder, and saves 1 %, 10 % and 100 % of its training patients.

    Example: `mmclip data split data/images --name clean --seed 0`
    """
    from mmclip.data.splits import SUBSET_SEEDS, set_split

    split = set_split(
        folder,
        name,
        seed=seed,
        val_ratio=val_ratio,
        test_ratio=test_ratio,
        lists=_lists(list_ or ()),
        patients=patients,
        near_duplicates=near_duplicates,
        subset_seeds=tuple(subset_seed or SUBSET_SEEDS),
    )
    _print_split(split, folder)


@app.command("labels")
def data_labels(
    folder: Annotated[Path, typer.Argument(help="Data folder of `mmclip data build`.")],
    findings: Annotated[
        str, typer.Option(help="Which findings: chexpert, or a TOML file of rules.")
    ] = "chexpert",
    uncertain_as: Annotated[
        str, typer.Option(help="How uncertain ones count: uncertain, present, absent or unknown.")
    ] = "uncertain",
    check: Annotated[
        Path | None,
        typer.Option(help="Change nothing; score the labels against this CSV of people's labels."),
    ] = None,
) -> None:
    """Labels images without labels by what their reports say, or checks how good such labels are.

    The result goes to stdout as JSON.

    Example: `mmclip data labels data/hospital --check gold.csv`
    """
    from typing import cast, get_args

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
    done = label_folder(folder, rules, cast(UncertainAs, uncertain_as))
    table = Table("finding", "present", "uncertain", "absent", box=None, pad_edge=False)
    for finding, counts in sorted(done.counts.items()):
        table.add_row(finding, *(f"{counts[value]:,}" for value in (1, -1, 0)))
    console.print(table)
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


@app.command("check")
def data_check(
    folders: Annotated[
        list[Path], typer.Argument(help="Data folders, examined together.", metavar="PATH")
    ],
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
        say("labels of the same image in two folders", found.disagreements)
    say("worth a look", found.oddities)
    if exact:
        console.print("near-duplicates were not looked for")
    print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    if found.leaks:
        raise typer.Exit(1)


def _print_agreement(check: "Check") -> None:
    table = Table("finding", "task", "gold", "precision", "recall", "F1", box=None, pad_edge=False)
    out: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for task, of_finding in check.agreement.items():
        for finding, scores in of_finding.items():
            values = (scores.precision, scores.recall, scores.f1)
            said = ("-" if value is None else f"{value:.3f}" for value in values)
            table.add_row(finding, task, f"{scores.n_gold:,}", *said)
            numbers = dict(zip(("precision", "recall", "f1"), values, strict=True))
            out.setdefault(task, {})[finding] = {"n_gold": scores.n_gold, **numbers}
    console.print(table)
    console.print(
        f"{check.n_rows:,} rows compared; {check.n_not_here:,} rows of images that are "
        f"not here or have no report; columns left out: {', '.join(check.ignored) or 'none'}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    metadata = {"n_rows": check.n_rows, "n_not_here": check.n_not_here, "ignored": check.ignored}
    print(json.dumps({**metadata, "agreement": out}, indent=2))


def _resize_mode(name: str) -> "ResizeMode":
    from mmclip.config import ResizeMode

    for known in get_args(ResizeMode):
        if name == known:
            return known
    raise ValueError(f"--resize {name!r} is none of {', '.join(get_args(ResizeMode))}")


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


def _print_meta(meta: dict, out: Path) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("rows read", meta["n_rows"]),
        ("kept", meta["n_samples"]),
        ("  with an image", meta["n_with_image"]),
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
    if meta["n_excluded"]:
        said = (
            f"{meta['n_excluded'] / meta['n_rows']:.0%} of the rows are excluded; which and why: "
        )
        console.print(
            f"{said}{out / 'excluded.jsonl'}", style="yellow", markup=False, soft_wrap=True
        )
    console.print(f"data hash {meta['data_hash'][:16]}")
    print(out)
