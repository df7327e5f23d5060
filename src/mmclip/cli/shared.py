"""What several commands have in common: options, checks of what was given, printed results."""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmclip.cli.plain import IN_OUT, INTERVALS, OTHER, SELECTION, TRAINING
from mmclip.cli.tables import print_table
from mmclip.progress import console

if TYPE_CHECKING:
    import torch

    from mmclip.data.sample import Split
    from mmclip.evaluation.results import RunResults
    from mmclip.model_loading import ModelRequest

FolderOption = Annotated[
    list[Path],
    typer.Option(
        "--data",
        rich_help_panel=IN_OUT,
        help="Data folder of `mmclip data build`; may be repeated.",
        metavar="PATH",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        rich_help_panel=IN_OUT,
        help="A run or checkpoint; a CLIP, SigLIP or dual encoder of transformers, as a folder or "
        "hub id; or module:function.",
        metavar="MODEL",
    ),
]
RootOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--root",
        rich_help_panel=IN_OUT,
        help="Model of others: where the image files of each data folder are. [where they were]",
        metavar="PATH",
    ),
]
TrainedOnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trained-on",
        rich_help_panel=SELECTION,
        help="Model of others: data sets that it was trained on, such as mimic-cxr,chexpert:train.",
        metavar="NAMES",
    ),
]
RuleOption = Annotated[
    str | None,
    typer.Option(
        "--rule",
        rich_help_panel=SELECTION,
        help="Zero-shot rule: prompt_pair, similarity or sigmoid. [the model's]",
        metavar="NAME",
    ),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        rich_help_panel=SELECTION,
        help="Images, findings and rules of a benchmark: a name or a path.",
        metavar="NAME",
    ),
]
SplitOption = Annotated[
    str,
    typer.Option("--split", rich_help_panel=SELECTION, help="train, val or test.", metavar="NAME"),
]
SourceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        rich_help_panel=SELECTION,
        help="Source to take; may be repeated.",
        metavar="NAME",
    ),
]
FindingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--finding",
        rich_help_panel=SELECTION,
        help="Finding to score, in order; may be repeated.",
        metavar="NAME",
    ),
]
PromptsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts",
        rich_help_panel=SELECTION,
        help="Prompt set, by name or path; the first scores, others show the spread. "
        "[the protocol's, or default, pair, sentence]",
        metavar="NAME",
    ),
]
ResamplesOption = Annotated[
    int,
    typer.Option(
        "--n-resamples",
        rich_help_panel=INTERVALS,
        help="Bootstrap resamples of patients.",
        min=1,
        metavar="N",
    ),
]
SeedOption = Annotated[
    int,
    typer.Option("--seed", rich_help_panel=INTERVALS, help="Seed of the bootstrap.", metavar="N"),
]
ResultsOption = Annotated[
    Path,
    typer.Option(
        "--out",
        rich_help_panel=IN_OUT,
        help="Folder for results.json, scores.npz and the page.",
        metavar="PATH",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        rich_help_panel=TRAINING,
        help="Override a key, such as train.steps=200; may be repeated.",
        metavar="KEY=V",
    ),
]
CpuOption = Annotated[bool, typer.Option("--cpu", rich_help_panel=OTHER, help="Do not use a GPU.")]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", rich_help_panel=OTHER, help="Replace results of another command in --out."
    ),
]


def command_line() -> str:
    """The command as it was given, for results and logs."""
    return shlex.join(["mmclip", *sys.argv[1:]])


@contextmanager
def resume_hint(how: str = "the same command goes on") -> Iterator[None]:
    """Says behind Ctrl-C and other signals how a long task that keeps its work goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if os.environ.get("RANK", "0") == "0":  # torchrun and accelerate start several processes
            console.print(how, markup=False, soft_wrap=True)
        raise


def device_of(cpu: bool) -> "torch.device":
    """The GPU if torch sees one and `--cpu` was not given."""
    import torch

    return torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")


def split_name(name: str) -> "Split":
    """A split that was named on the command line.

    Raises:
        ValueError: When there is none of that name.
    """
    if name not in ("train", "val", "test"):
        raise ValueError(f"split {name!r} is none of train, val, test")
    return name


def refuse_choice_beside(
    protocol: str | None, source: Sequence[str] | None, finding: Sequence[str] | None
) -> None:
    """Refuses --source and --finding where a protocol names both.

    Raises:
        ValueError: When they are given.
    """
    if protocol is not None and (source or finding):
        raise ValueError(
            "--protocol names sources and findings itself; leave --source and --finding out"
        )


def model_request(
    model: str, rule: str | None = None, trained_on: Sequence[str] | None = None
) -> "ModelRequest":
    """The model that was named on the command line.

    Raises:
        ValueError: When there is no such rule.
    """
    from mmclip.model_loading import ModelRequest
    from mmclip.models.dual_encoder import rule_named

    named = None if rule is None else rule_named(rule)
    return ModelRequest(model, named, tuple(trained_on or ()))


def check_inputs(
    model: str | None = None,
    data: Sequence[Path] = (),
    protocol: str | None = None,
    prompts: Sequence[str] = (),
) -> None:
    """Refuses what is not there, at once: each command calls this before it looks at --out.

    Whoever misspells a model must not first be told to replace results. So the order of every
    command is: options that do not go together, what it reads, where it writes, the work.

    Raises:
        ValueError: When a model, data folder, protocol or prompt set is not there.
    """
    from mmclip.data.folder import read_meta
    from mmclip.evaluation.protocols import load_protocol
    from mmclip.prompts import load_prompts

    if model is not None:
        from mmclip.model_loading import check_model

        check_model(model)
    for folder in data:
        read_meta(folder)
    if protocol is not None:
        load_protocol(protocol)
    for name in prompts:
        load_prompts(name)


def _what_it_makes(command: str) -> list[str]:
    """The words of a command without those that change nothing in its results."""
    return [word for word in shlex.split(command) if word not in ("--overwrite", "--debug")]


def check_results(out: Path, name: str = "results.json") -> None:
    """Refuses a folder with the results of another command; the same one may write again.

    Args:
        out: The folder.
        name: Of the file that holds the results.
    """
    path = out / name
    if not path.is_file():
        return
    try:
        command = json.loads(path.read_text("utf-8"))["provenance"]["command"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"{path} is damaged; add --overwrite to replace it, or choose another --out"
        ) from None
    if _what_it_makes(command) != _what_it_makes(command_line()):
        raise ValueError(
            f"{out} already holds results of `{command}`; add --overwrite to replace them, or "
            f"choose another --out"
        )
    said = f"{out} holds results of this very command; they are written again"
    console.print(said, markup=False, soft_wrap=True)


def print_results(results: "RunResults", out: Path) -> None:
    """The table for people on stderr, the page's path on stdout."""
    beside = {name: c.auroc for name, c in results.controls.items() if c.auroc}
    head = ("finding", "AUROC", "95 %", "AUPRC", "F1", "MCC", "present", "absent", *beside)
    rows: list[tuple[str, ...]] = []

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    def interval(ci: tuple[float, float] | None) -> str:
        return "–" if ci is None else f"{ci[0]:.3f}–{ci[1]:.3f}"

    for row in results.findings:
        values = (number(row.auroc), interval(row.auroc_ci), number(row.auprc), number(row.f1))
        counts = (f"{row.n_positive:,}", f"{row.n_negative:,}")
        others = (number(auroc.get(row.finding)) for auroc in beside.values())
        rows.append((row.finding, *values, number(row.mcc), *counts, *others))
    macro = (results.macro_auroc, results.macro_auprc, results.macro_f1, results.macro_mcc)
    auroc, auprc, f1, mcc = map(number, macro)
    spread = interval(results.macro_auroc_ci)
    rows.append(("macro", auroc, spread, auprc, f1, mcc))
    rows += [(name, number(each.macro_auroc)) for name, each in results.controls.items()]
    print_table(
        head, rows, [*[""] * len(results.findings), "bold", *["dim"] * len(results.controls)]
    )
    console.print(
        f"macro: the mean over findings with at least {results.min_count} images of either kind"
        + (f"; below it {' and '.join(results.controls)}, as controls" if results.controls else ""),
        style="dim",
    )
    for row in results.undefined:
        console.print(f"not scored: {row.finding} ({row.reason})", style="yellow")
    print(out / "page.html")
