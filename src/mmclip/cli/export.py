"""`mmclip export`: a run as other tools read it."""

from pathlib import Path
from typing import Annotated

import typer

from mmclip.cli.plain import IN_OUT, OTHER, PlainCommand
from mmclip.progress import console

app = typer.Typer()

HUB = "Hugging Face hub"
"""Title of a panel of the help."""


RunArgument = Annotated[
    Path, typer.Argument(help="Run or checkpoint of `mmclip pretrain`.", metavar="PATH")
]
OutOption = Annotated[
    Path, typer.Option(rich_help_panel=IN_OUT, help="Folder to write.", metavar="PATH")
]
ToOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="hf (VisionTextDualEncoderModel), onnx (both encoders), vision or text (one).",
        metavar="FORM",
    ),
]
ResultsOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="Folder of `mmclip zeroshot` on this run, for the model card.",
        metavar="PATH",
    ),
]
LicenceOption = Annotated[
    str,
    typer.Option(
        "--license",
        rich_help_panel=HUB,
        help="Licence of the weights, by the hub's name; ask the owner of the training data.",
        metavar="NAME",
    ),
]
PushToHubOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=HUB,
        help="Upload to this repository, made private if new; needs HF_TOKEN.",
        metavar="ID",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=OTHER, help="Replace an export in --out."),
]


@app.command(cls=PlainCommand)
def export(
    run: RunArgument,
    out: OutOption,
    to: ToOption = "hf",
    results: ResultsOption = None,
    licence: LicenceOption = "other",
    push_to_hub: PushToHubOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Writes a run for transformers, the hub or onnxruntime, with a model card.

    Example: `mmclip export runs/first --to hf --out exports/first`

    Example: `mmclip export runs/demo/run --to onnx --out exports/demo --results runs/demo`
    """
    from mmclip.export.export import ExportRequest, form_named
    from mmclip.export.export import export as write

    address = write(
        ExportRequest(
            run=run,
            form=form_named(to),
            out=out,
            overwrite=overwrite,
            results=results,
            licence=licence,
            push_to_hub=push_to_hub,
        )
    )
    if address is not None:
        console.print(f"uploaded to {address}", markup=False, soft_wrap=True)
    print(out)
