"""`mmclip zeroshot` and `mmclip compare-models`: what scores models by prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmclip.cli.plain import IN_OUT, SELECTION, PlainCommand
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
    refuse_choice_beside,
    resume_hint,
    split_name,
)
from mmclip.files import locked
from mmclip.progress import console

if TYPE_CHECKING:
    from mmclip.evaluation.compare_models import ScoredModel
    from mmclip.evaluation.zeroshot_task import ZeroshotRequest
    from mmclip.model_loading import ModelRequest

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
    """Scores labelled images by text prompts: AUROC with 95 % intervals, and controls.

    Example: `mmclip zeroshot --model runs/a --data data/images --source kermany --out runs/a/test`

    Example: `mmclip zeroshot --model openai/clip-vit-base-patch32 --data data/chestxray14
    --protocol chestxray14 --out peers/clip`
    """
    from mmclip.data.folder import check_place
    from mmclip.evaluation.pages import RESULT_FILES
    from mmclip.evaluation.zeroshot import evaluate
    from mmclip.evaluation.zeroshot_task import ZeroshotRequest

    refuse_choice_beside(protocol, source, finding)
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


ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        help="Models as --model of zeroshot takes them; the first is the base.", metavar="MODEL"
    ),
]
OutOption = Annotated[
    Path,
    typer.Option(
        "--out",
        rich_help_panel=IN_OUT,
        help="Folder that gets the results of each model.",
        metavar="PATH",
    ),
]
TrainedOnOfEachOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trained-on",
        rich_help_panel=SELECTION,
        help="Data sets that one of the models was trained on; may be repeated.",
        metavar="MODEL=NAMES",
    ),
]
SaveOption = Annotated[
    Path | None,
    typer.Option(
        "--save", rich_help_panel=IN_OUT, help="Write the table as Markdown.", metavar="PATH"
    ),
]


@app.command(name="compare-models", cls=PlainCommand)
def compare_models(
    models: ModelsArgument,
    data: FolderOption,
    out: OutOption,
    root: RootOption = None,
    protocol: ProtocolOption = None,
    split: SplitOption = "test",
    source: SourceOption = None,
    finding: FindingOption = None,
    prompts: PromptsOption = None,
    rule: RuleOption = None,
    trained_on: TrainedOnOfEachOption = None,
    n_resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    save: SaveOption = None,
    overwrite: OverwriteOption = False,
    cpu: CpuOption = False,
) -> None:
    """Scores models by prompts, each once, and compares them pair by pair on the same images.

    Each model reads images as it was trained and scores by its own rule; the table says where rules
    differ. Models whose results are there are skipped, so the same command goes on.

    Example: `mmclip compare-models runs/a models/clip mine:biomedclip --data data/a --out peers`
    """
    from mmclip.cli.results import show_side_by_side
    from mmclip.evaluation.compare_models import folder_names
    from mmclip.evaluation.zeroshot_task import ZeroshotRequest

    refuse_choice_beside(protocol, source, finding)
    of_split, known = split_name(split), _trained_on(models, trained_on or ())
    folder_names(models)
    for model in models:
        check_inputs(model)
    check_inputs(data=data, protocol=protocol, prompts=prompts or ())
    asked = [model_request(model, rule, known.get(model)) for model in models]
    request = ZeroshotRequest(
        model=asked[0],
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
    done = _score_each(asked, request, overwrite)
    show_side_by_side([scored.folder for scored in done], n_resamples, seed, False, save)
    if unchecked := [scored.folder.name for scored in done if scored.is_unchecked]:
        said = f"leaks are not checked of {', '.join(unchecked)}: what trained them is not known"
        console.print(said, style="yellow", markup=False, soft_wrap=True)


def _score_each(
    models: "list[ModelRequest]", request: "ZeroshotRequest", overwrite: bool
) -> "list[ScoredModel]":
    """Scores models one after another, and says of each when it is done."""
    from mmclip.evaluation.compare_models import score_models

    done = []
    with resume_hint(), locked(request.out):
        for scored in score_models(models, request, overwrite):
            done.append(scored)
            what = "is done" if scored.was_done else "is scored"
            said = f"{scored.source} {what}: {scored.folder / 'page.html'}"
            console.print(said, markup=False, soft_wrap=True)
    return done


def _trained_on(models: list[str], given: Sequence[str]) -> dict[str, list[str]]:
    """What each model was trained on, of MODEL=NAMES.

    Raises:
        ValueError: When a text is none, or names another model.
    """
    found: dict[str, list[str]] = {}
    for text in given:
        model, is_given, names = text.rpartition("=")
        if not is_given or model not in models:
            raise ValueError(
                f"--trained-on {text!r} is no MODEL=NAMES with a model that is compared, such as "
                f"{models[0]}=mimic-cxr"
            )
        found.setdefault(model, []).append(names)
    return found
