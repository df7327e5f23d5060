"""`mmclip predict`: probabilities of findings for images without labels."""

from pathlib import Path
from typing import Annotated

import typer

from mmclip.cli.plain import IN_OUT, SELECTION, PlainCommand
from mmclip.cli.shared import CpuOption, RuleOption, check_inputs, device_of, model_request
from mmclip.files import locked_file
from mmclip.progress import console

app = typer.Typer()


@app.command(cls=PlainCommand)
def predict(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Image files, folders that are searched through, and data folders.", metavar="PATH"
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            rich_help_panel=IN_OUT,
            help="A run, checkpoint or fine-tuned result; a CLIP, SigLIP or dual encoder of "
            "transformers, as a folder or hub id; or module:function.",
            metavar="MODEL",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(rich_help_panel=IN_OUT, help="The table to write, .csv.", metavar="PATH"),
    ],
    finding: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=SELECTION,
            help="What to look for; may be repeated. [a fine-tuned model: all it has learnt]",
            metavar="NAME",
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            rich_help_panel=SELECTION,
            help="Prompt set that words the findings: name or path.",
            metavar="NAME",
        ),
    ] = "default",
    rule: RuleOption = None,
    by: Annotated[
        str,
        typer.Option(
            rich_help_panel=SELECTION,
            help="A line for each image, or for each study: the mean of its frontal images.",
            metavar="NAME",
        ),
    ] = "image",
    thresholds: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=IN_OUT,
            help="Validated results whose thresholds decide: results.json.",
            metavar="PATH",
        ),
    ] = None,
    explain: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=IN_OUT,
            help="Folder for a saliency map of each image and finding.",
            metavar="PATH",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that decode. [all cores]", min=0, metavar="N")
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the table and maps that are there.")
    ] = False,
    cpu: CpuOption = False,
) -> None:
    """Scores images by what a report would say of them, without labels, into a CSV.

    Images that cannot be read are listed in a second CSV beside it, with the reason.

    Example: `mmclip predict --model runs/a images/ --finding pneumothorax --out predictions.csv`

    Example: `mmclip predict --model runs/a/ft/full-100-0 study/ --by study --out studies.csv`
    """
    from mmclip.data.ingest.shards import n_cores
    from mmclip.prediction.model import find_model
    from mmclip.prediction.predict import PredictRequest
    from mmclip.prediction.predict import predict as score

    if by not in ("image", "study"):
        raise ValueError(f"--by {by!r} is neither image nor study")
    asked = model_request(model, rule)
    find_model(model)
    check_inputs(prompts=[prompts])
    if out.suffix != ".csv":
        raise ValueError(f"--out {out} does not end in .csv; name the table to write")
    there = [out] if out.exists() else []
    if explain is not None and explain.exists() and (explain.is_file() or any(explain.iterdir())):
        there.append(explain)
    if there and not overwrite:
        raise ValueError(f"{there[0]} is there; add --overwrite to replace it, or name another")
    with locked_file(out):
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
    said = f"{done.n_images:,} images scored"
    if by == "study":
        said += f", {done.n_lines:,} studies"
    if done.n_others:
        said += f"; files that are no images: {done.n_others:,}, ignored"
    console.print(said, markup=False, soft_wrap=True)
    if done.n_alone:
        _warn(
            f"{done.n_alone:,} images tell no study (only DICOM and data folders do), and each "
            f"counts as one"
        )
    if done.n_laterals and by == "image":
        _warn(
            f"{done.n_laterals:,} images are laterals, which `mmclip zeroshot` leaves out: they "
            f"show other things under the same name"
        )
    if done.skipped is not None:
        is_of_them = done.n_laterals and by == "study"
        laterals = f", {done.n_laterals:,} of them laterals" if is_of_them else ""
        _warn(f"{done.n_skipped:,} images have no numbers{laterals}; {done.skipped} says why")
    print(out)


def _warn(text: str) -> None:
    console.print(f"WARNING {text}", style="yellow", markup=False, soft_wrap=True)
