"""`mmclip zeroshot`: what scores a model by prompts."""

import typer

from mmclip.cli.plain import PlainCommand
from mmclip.cli.shared import (
    CpuOption,
    FindingOption,
    FolderOption,
    ModelOption,
    OverwriteOption,
    PromptsOption,
    ProtocolOption,
    ResamplesOption,
    ResultsOption,
    RootOption,
    RuleOption,
    SeedOption,
    SourceOption,
    SplitOption,
    TrainedOnOption,
    check_inputs,
    check_results,
    command_line,
    device_of,
    model_request,
    print_results,
    split_name,
)
from mmclip.files import locked

app = typer.Typer()


@app.command(cls=PlainCommand)
def zeroshot(
    model: ModelOption,
    data: FolderOption,
    out: ResultsOption,
    root: RootOption = None,
    protocol: ProtocolOption = None,
    split: SplitOption = "test",
    source: SourceOption = None,
    finding: FindingOption = None,
    prompts: PromptsOption = None,
    rule: RuleOption = None,
    trained_on: TrainedOnOption = None,
    n_resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    cpu: CpuOption = False,
) -> None:
    """Scores images by what a report would say of them; AUROC with 95 % intervals.

    Example: `mmclip zeroshot --model runs/a --data data/images --source kermany --out runs/a/test`

    Example: `mmclip zeroshot --model openai/clip-vit-base-patch32 --data data/chestxray14
    --protocol chestxray14 --out peers/clip`
    """
    from mmclip.data.folder import check_place
    from mmclip.evaluation.pages import RESULT_FILES
    from mmclip.evaluation.zeroshot import ZeroshotRequest, evaluate

    if protocol is not None and (source or finding):
        raise ValueError(
            "--protocol names sources and findings itself; leave --source and --finding out"
        )
    of_split, asked = split_name(split), model_request(model, rule, trained_on)
    check_inputs(model, data, protocol, prompts or ())
    check_place(out, RESULT_FILES)
    if not overwrite:
        check_results(out)
    request = ZeroshotRequest(
        model=asked,
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
        roots=tuple(root) if root else None,
        device=device_of(cpu),
    )
    with locked(out):
        print_results(evaluate(request), out)
