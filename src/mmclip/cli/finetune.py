"""`mmclip finetune`: what an encoder is worth where few images are labelled."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmclip.cli.plain import IN_OUT, SELECTION, TRAINING, PlainCommand
from mmclip.cli.shared import (
    CpuOption,
    ResamplesOption,
    SetOption,
    TrainedOnOption,
    command_line,
    model_request,
    refuse_choice_beside,
    resume_hint,
)
from mmclip.cli.tables import print_table
from mmclip.files import locked
from mmclip.progress import console

app = typer.Typer()


DataOption = Annotated[
    Path,
    typer.Option(
        "--data",
        rich_help_panel=IN_OUT,
        help="Data folder of `mmclip data build`.",
        metavar="PATH",
    ),
]
OutOption = Annotated[
    Path,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="Folder of the results, with one folder per run.",
        metavar="PATH",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        rich_help_panel=IN_OUT,
        help="A run or checkpoint; a CLIP, SigLIP or dual encoder of transformers, as a folder "
        "or hub id; or module:function.",
        metavar="MODEL",
    ),
]
InitOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=TRAINING,
        help="Weights: run, random (the run's architecture) or hf:FOLDER_OR_NAME.",
        metavar="NAME",
    ),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SELECTION,
        help="Findings, images and rules of a benchmark: name or path.",
        metavar="NAME",
    ),
]
FindingOption = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=SELECTION,
        help="Without a protocol: finding to learn; may be repeated.",
        metavar="NAME",
    ),
]
SourceOption = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=SELECTION,
        help="Without a protocol: source to take; may be repeated.",
        metavar="NAME",
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=TRAINING,
        help="probe (linear, encoder as it is) or full (encoder and head).",
        metavar="NAME",
    ),
]
FractionOption = Annotated[
    list[float] | None,
    typer.Option(
        rich_help_panel=TRAINING,
        help="Share of the training patients: 0.01, 0.1 or 1; may be repeated.",
        metavar="RATIO",
    ),
]
SeedOption = Annotated[
    list[int] | None,
    typer.Option(
        rich_help_panel=TRAINING,
        help="Seed of subset, weights and order; may be repeated. [the protocol's]",
        metavar="N",
    ),
]
ConfigOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=TRAINING,
        help="Configuration of full fine-tuning: tiny, vit_b, or a TOML file.",
        metavar="NAME",
    ),
]


@app.command(cls=PlainCommand)
def finetune(
    data: DataOption,
    out: OutOption,
    model: ModelOption = None,
    init: InitOption = "run",
    protocol: ProtocolOption = None,
    finding: FindingOption = None,
    source: SourceOption = None,
    method: MethodOption = "probe",
    trained_on: TrainedOnOption = None,
    fraction: FractionOption = None,
    seed: SeedOption = None,
    config: ConfigOption = "tiny",
    overrides: SetOption = None,
    n_resamples: ResamplesOption = 1000,
    cpu: CpuOption = False,
) -> None:
    """Learns findings from 1, 10 and 100 % of the training patients, and scores the test images.

    Rerun an interrupted call to resume it; finished runs are skipped.

    Example: `mmclip finetune --model runs/a --data data/nih --protocol chestxray14 --out ft`

    Example: `mmclip finetune --model runs/a --init random --data data/images --finding tuberculosis
    --method full --fraction 0.1 --seed 0 --out runs/random/ft`
    """
    from mmclip.config_io import load_config_as
    from mmclip.finetuning.finetune import FinetuneRequest
    from mmclip.finetuning.finetune import finetune as learn
    from mmclip.finetuning.supervised import FineTuneConfig
    from mmclip.model_loading import is_function, is_of_transformers

    refuse_choice_beside(protocol, source, finding)
    is_of_others = model is not None and (is_function(model) or is_of_transformers(model))
    if trained_on and not is_of_others:
        raise ValueError("--trained-on is for models of others; leave it out")
    request = FinetuneRequest(
        folder=data,
        out=out,
        config=load_config_as(FineTuneConfig, "configs_finetune", config, overrides or ()),
        command=command_line(),
        protocol=protocol,
        findings=tuple(finding or ()),
        sources=tuple(source or ()),
        run=None if model is None or is_of_others else Path(model),
        others=model_request(model, None, trained_on) if model and is_of_others else None,
        init=init,
        method=_method_named(method),
        fractions=tuple(fraction or ()),
        seeds=tuple(seed or ()),
        n_resamples=n_resamples,
        cpu=cpu,
    )
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun starts this once a process
    with resume_hint(), locked(out) if is_first else nullcontext():
        summary = learn(request)
    if is_first:
        _print_summary(json.loads(summary.read_text("utf-8")))
        print(summary)


def _method_named(name: str) -> Literal["probe", "full"]:
    if name not in ("probe", "full"):
        raise ValueError(f"--method {name!r} is none of probe, full")
    return name


def _print_summary(summary: dict) -> None:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    head = ("method", "patients", "images", "macro AUROC", "95 %", "each seed", "shortcut")
    rows: list[tuple[str, ...]] = []
    for line in summary["lines"]:
        interval = line["interval"]
        images = sorted(set(line["training_images"].values()))
        row = (
            line["method"],
            f"{line['fraction']:.0%}",
            f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,}–{images[-1]:,}",
            number(line["mean"]),
            "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}",
            "  ".join(f"{seed}: {number(v)}" for seed, v in line["macro_auroc"].items()),
            number(line["shortcut_baseline"]),
        )
        rows.append(row)
    said = f"{summary['protocol']}: {summary['init']}, {summary['n_test']:,} test images"
    console.print(said, markup=False, soft_wrap=True)
    print_table(head, rows)
    console.print(
        "patients, images: that it learned from; 95 %: over test patients and seeds, drawn "
        "together; shortcut: the shortcut baseline",
        style="dim",
    )
    if any(line["mean"] is None for line in summary["lines"]):
        console.print(
            "no macro AUROC: too few test images with a finding or without; results.json of each "
            "run has what there is",
            style="yellow",
            soft_wrap=True,
        )
