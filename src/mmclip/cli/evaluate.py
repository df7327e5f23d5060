"""`mmclip zeroshot`: what scores a run."""

from pathlib import Path
from typing import Annotated

import typer

from mmclip.cli.shared import (
    CpuOption,
    FolderOption,
    OverwriteOption,
    RunOption,
    check_inputs,
    check_results,
    command_line,
    device_of,
    print_results,
    split_name,
)

app = typer.Typer()


OutOption = Annotated[
    Path, typer.Option(help="Folder for results.json, scores.npz and the page.", metavar="PATH")
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        help="Images, findings and rules of a benchmark: a name or a path.", metavar="NAME"
    ),
]
SourceOption = Annotated[
    list[str] | None, typer.Option(help="Only these; may be repeated.", metavar="NAME")
]
FindingOption = Annotated[
    list[str] | None,
    typer.Option(help="Only these, in order; may be repeated.", metavar="NAME"),
]
PromptsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Prompt set, by name or path; the first scores, others show the spread. "
        "[the protocol's, or default, pair, sentence]",
        metavar="NAME",
    ),
]
NResamplesOption = Annotated[
    int, typer.Option(help="Bootstrap resamples of patients.", min=1, metavar="N")
]


@app.command()
def zeroshot(
    run: RunOption,
    data: FolderOption,
    out: OutOption,
    protocol: ProtocolOption = None,
    split: Annotated[str, typer.Option(help="train, val or test.", metavar="NAME")] = "test",
    source: SourceOption = None,
    finding: FindingOption = None,
    prompts: PromptsOption = None,
    n_resamples: NResamplesOption = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.", metavar="N")] = 0,
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
    print_results(evaluate(request), out)
