"""`mmclip predict`: probabilities of findings for images without labels."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmclip.cli.plain import IN_OUT, SELECTION, PlainCommand
from mmclip.cli.shared import CpuOption, RuleOption, check_inputs, device_of, model_request
from mmclip.files import check_free, locked, locked_file
from mmclip.progress import console, counted

if TYPE_CHECKING:
    from mmclip.prediction.predict import Predicted

app = typer.Typer()


InputsArgument = Annotated[
    list[Path],
    typer.Argument(
        help="Image files, folders that are searched through, and data folders.", metavar="PATH"
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="A run, checkpoint or fine-tuned result; a CLIP, SigLIP or dual encoder of "
        "transformers, as a folder or hub id; or module:function.",
        metavar="MODEL",
    ),
]
OutOption = Annotated[
    Path,
    typer.Option(rich_help_panel=IN_OUT, help="The table to write, .csv.", metavar="PATH"),
]
FindingOption = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=SELECTION,
        help="Finding to score; may be repeated. [a fine-tuned model: all it has learnt]",
        metavar="NAME",
    ),
]
PromptsOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=SELECTION,
        help="Prompt set that words the findings: name or path.",
        metavar="NAME",
    ),
]
ByOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=SELECTION,
        help="A row per image, or per study: the mean of its frontal images.",
        metavar="NAME",
    ),
]
ThresholdsOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="Validated results whose thresholds decide: results.json.",
        metavar="PATH",
    ),
]
ExplainOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="Folder for a saliency map of each image and finding.",
        metavar="PATH",
    ),
]
WorkersOption = Annotated[
    int, typer.Option(help="Processes that decode images. [all cores]", min=0, metavar="N")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the table and maps that are there.")
]


@app.command(cls=PlainCommand)
def predict(
    inputs: InputsArgument,
    model: ModelOption,
    out: OutOption,
    finding: FindingOption = None,
    prompts: PromptsOption = "default",
    rule: RuleOption = None,
    by: ByOption = "image",
    thresholds: ThresholdsOption = None,
    explain: ExplainOption = None,
    workers: WorkersOption = 0,
    overwrite: OverwriteOption = False,
    cpu: CpuOption = False,
) -> None:
    """Scores images without labels by text prompts, and writes a CSV.

    Images that cannot be read are listed in a second CSV beside it, with the reason.

    Example: `mmclip predict --model runs/a images/ --finding pneumothorax --out predictions.csv`

    Example: `mmclip predict --model runs/a/ft/full-100-0 study/ --by study --out studies.csv`
    """
    from mmclip.data.ingest.shards import n_cores
    from mmclip.prediction.model import find_model
    from mmclip.prediction.predict import PredictRequest, skipped_file
    from mmclip.prediction.predict import predict as score

    if by not in ("image", "study"):
        raise ValueError(f"--by {by!r} is neither image nor study")
    asked = model_request(model, rule)
    find_model(model)
    check_inputs(prompts=[prompts])
    _refuse_findings_as_paths(inputs, prompts)
    if out.suffix.lower() != ".csv":
        raise ValueError(f"--out {out} does not end in .csv; name the table to write")
    has_maps = explain is not None and (explain.is_file() or any(explain.glob("*")))
    check_free([out, explain] if explain is not None and has_maps else [out], overwrite)
    maps = nullcontext() if explain is None else locked(explain)
    with locked_file(out, skipped_file(out)), maps:
        done = score(
            PredictRequest(
                model=asked,
                inputs=tuple(inputs),
                out=out,
                findings=tuple(finding or ()),
                prompts=prompts,
                by="study" if by == "study" else "image",
                thresholds=thresholds,
                explain=explain,
                workers=workers or n_cores(),
                device=device_of(cpu),
            )
        )
    _say(done, by)
    print(out)


def _refuse_findings_as_paths(inputs: Sequence[Path], prompts: str) -> None:
    """Tells those who name a second finding without a --finding of its own."""
    from mmclip.prompts import load_prompts, plain_name

    named = load_prompts(prompts).named
    for path in inputs:
        if plain_name(str(path)) in named and not path.exists():
            raise ValueError(
                f"there is no file or folder {path}; if it is a finding, write --finding before "
                f"it, as before each of them"
            )


def _say(done: "Predicted", by: str) -> None:
    """What was scored, for people, and what of it they must know."""
    said = f"{counted(done.n_images, 'image')} scored"
    if by == "study":
        said += f", {counted(done.n_lines, 'study')}"
    if done.n_others:
        said += f"; files that are no images: {done.n_others:,}, ignored"
    console.print(said, markup=False, soft_wrap=True)
    if done.n_alone:
        _warn(
            f"{counted(done.n_alone, 'image', ('tells', 'tell'))} no study (only DICOM and data "
            f"folders do), and each counts as one"
        )
    if done.n_laterals and by == "image":
        _warn(
            f"{counted(done.n_laterals, 'image', ('is lateral', 'are laterals'))}, which `mmclip "
            f"zeroshot` leaves out: they show other things under the same name"
        )
    if done.skipped is not None:
        is_of_them = done.n_laterals and by == "study"
        laterals = f", {done.n_laterals:,} of them laterals" if is_of_them else ""
        without = counted(done.n_skipped, "image", ("has", "have"))
        _warn(f"{without} no numbers{laterals}; {done.skipped} says why")


def _warn(text: str) -> None:
    console.print(f"WARNING {text}", style="yellow", markup=False, soft_wrap=True)
