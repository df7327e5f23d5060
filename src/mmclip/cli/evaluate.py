"""`mmclip zeroshot`: what scores a run."""

from pathlib import Path
from typing import Annotated

import typer

from mmclip.cli.plain import IN_OUT, INTERVALS, SELECTION, PlainCommand
from mmclip.cli.shared import (
    CpuOption,
    FolderOption,
    OverwriteOption,
    check_inputs,
    check_results,
    command_line,
    device_of,
    print_results,
    split_name,
)
from mmclip.files import locked

app = typer.Typer()


@app.command(cls=PlainCommand)
def zeroshot(
    run: Annotated[
        Path,
        typer.Option(
            "--run",
            rich_help_panel=IN_OUT,
            help="Run or checkpoint of `mmclip pretrain`.",
            metavar="PATH",
        ),
    ],
    data: FolderOption,
    out: Annotated[
        Path,
        typer.Option(
            rich_help_panel=IN_OUT,
            help="Folder for results.json, scores.npz and the page.",
            metavar="PATH",
        ),
    ],
    protocol: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SELECTION,
            help="Images, findings and rules of a benchmark: a name or a path.",
            metavar="NAME",
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(rich_help_panel=SELECTION, help="train, val or test.", metavar="NAME")
    ] = "test",
    source: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=SELECTION, help="Only these; may be repeated.", metavar="NAME"
        ),
    ] = None,
    finding: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=SELECTION, help="Only these, in order; may be repeated.", metavar="NAME"
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=SELECTION,
            help="Prompt set, by name or path; the first scores, others show the spread. "
            "[the protocol's, or default, pair, sentence]",
            metavar="NAME",
        ),
    ] = None,
    n_resamples: Annotated[
        int,
        typer.Option(
            rich_help_panel=INTERVALS, help="Bootstrap resamples of patients.", min=1, metavar="N"
        ),
    ] = 1000,
    seed: Annotated[
        int, typer.Option(rich_help_panel=INTERVALS, help="Of the bootstrap.", metavar="N")
    ] = 0,
    overwrite: OverwriteOption = False,
    cpu: CpuOption = False,
) -> None:
    """Scores images by what a report would say of them; AUROC with 95 % intervals.

    Example: `mmclip zeroshot --run runs/a --data data/images --source kermany --out runs/a/kermany`

    Example: `mmclip zeroshot --run runs/a --data data/chestxray14 --protocol chestxray14 --out a/b`
    """
    from mmclip.data.folder import check_place
    from mmclip.evaluation.pages import RESULT_FILES
    from mmclip.evaluation.zeroshot import ZeroshotRequest, evaluate

    if protocol is not None and (source or finding):
        raise ValueError(
            "--protocol names sources and findings itself; leave --source and --finding out"
        )
    of_split = split_name(split)
    check_inputs(run, data, protocol, prompts or ())
    check_place(out, RESULT_FILES)
    if not overwrite:
        check_results(out)
    request = ZeroshotRequest(
        run=run,
        folders=tuple(data),
        out=out,
        command=command_line(),
        protocol=protocol,
        split=of_split,
        sources=tuple(source or ()),
        findings=tuple(finding or ()),
        prompt_sets=tuple(prompts or ()),
        n_resamples=n_resamples,
        seed=seed,
        device=device_of(cpu),
    )
    with locked(out):
        print_results(evaluate(request), out)
