"""`mmclip demo` and `mmclip pretrain`: what trains."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from mmclip.cli.plain import IN_OUT, TRAINING, PlainCommand
from mmclip.cli.shared import (
    CpuOption,
    FolderOption,
    OverwriteOption,
    SetOption,
    check_inputs,
    check_results,
    command_line,
    print_results,
    resume_hint,
)

app = typer.Typer()

CONTROLS = "Controls"
LOGGING = "Logging"
"""Titles of panels of the help."""


@app.command(cls=PlainCommand)
def demo(
    out: Annotated[
        Path,
        typer.Option(
            rich_help_panel=IN_OUT, help="Folder for data, run and results.", metavar="PATH"
        ),
    ] = Path("runs/demo"),
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=TRAINING,
            help="Seed of the synthetic images, the weights and the order.",
            metavar="N",
        ),
    ] = 0,
    shuffle_pairs: Annotated[
        bool,
        typer.Option(
            "--shuffle-pairs",
            rich_help_panel=CONTROLS,
            help="Control: give each image the report and labels of another.",
        ),
    ] = False,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Draws synthetic images and reports, trains a tiny model, scores it, and writes a page.

    Rerun an interrupted demo to resume it; a finished one is made anew.

    Example: `mmclip demo --seed 1 --out runs/demo-seed1`
    """
    from mmclip.config import load_config
    from mmclip.demo import run_demo

    load_config("demo", set_ or ())  # a mistyped key is told before what is in --out
    if not overwrite:
        check_results(out)
    with resume_hint():
        results = run_demo(out, seed, shuffle_pairs, tuple(set_ or ()), command_line(), overwrite)
    print_results(results, out)


OutOption = Annotated[
    Path, typer.Option(rich_help_panel=IN_OUT, help="Folder of the run.", metavar="PATH")
]
ConfigOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=TRAINING,
        help="Configuration: a name (tiny, arms/whole, paper, ...) or a TOML file.",
        metavar="NAME",
    ),
]
InitOption = Annotated[
    str | None,
    typer.Option(
        "--init",
        rich_help_panel=TRAINING,
        help="Start from a dual encoder: a run, an export, a CLIP or SigLIP folder, or hub id.",
        metavar="NAME",
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", rich_help_panel=TRAINING, help="Resume the run in --out."),
]
ShufflePairsOption = Annotated[
    bool,
    typer.Option(
        "--shuffle-pairs",
        rich_help_panel=CONTROLS,
        help="Control: give each image the report of another.",
    ),
]
LesionMasksOption = Annotated[
    Path | None,
    typer.Option(
        "--lesion-masks",
        rich_help_panel=CONTROLS,
        help="Folder of synthetic images, for image_mask.policy=oracle.",
        metavar="PATH",
    ),
]
TensorboardOption = Annotated[
    bool, typer.Option("--tensorboard", rich_help_panel=LOGGING, help="Log to TensorBoard too.")
]
WandbOption = Annotated[
    bool, typer.Option("--wandb", rich_help_panel=LOGGING, help="Log to Weights & Biases too.")
]


@app.command(cls=PlainCommand)
def pretrain(
    data: FolderOption,
    out: OutOption,
    config: ConfigOption = "tiny",
    set_: SetOption = None,
    init: InitOption = None,
    resume: ResumeOption = False,
    shuffle_pairs: ShufflePairsOption = False,
    lesion_masks: LesionMasksOption = None,
    tensorboard: TensorboardOption = False,
    wandb: WandbOption = False,
    cpu: CpuOption = False,
) -> None:
    """Pre-trains an image and a text encoder on images with reports.

    Example: `mmclip pretrain --data data/images --config tiny --set train.steps=2000 --out runs/a`

    Example: `mmclip pretrain --data data/images --init runs/a --out runs/b`

    On several GPUs: `accelerate launch -m mmclip pretrain ...` or
    `torchrun --nproc-per-node 2 -m mmclip pretrain ...`, with the same arguments.
    """
    from mmclip.config import load_config
    from mmclip.data.folder import check_place
    from mmclip.training.pretrain import RUN_FILES, PretrainRequest
    from mmclip.training.pretrain import pretrain as run

    settings = load_config(config, [*_start_of(init), *(set_ or ())])
    check_inputs(data=data)
    check_place(out, RUN_FILES)
    request = PretrainRequest(
        folders=tuple(data),
        run=out,
        config=settings,
        command=command_line(),
        resume=resume,
        shuffle_pairs=shuffle_pairs,
        lesions=lesion_masks,
        wandb=wandb,
        tensorboard=tensorboard,
        cpu=cpu,
    )
    with resume_hint(f"the same command with --resume goes on: {_resuming(request.command)}"):
        newest = run(request)
    if os.environ.get("RANK", "0") == "0":  # torchrun and accelerate start this once a process
        print(newest)


def _start_of(init: str | None) -> list[str]:
    """The keys that `--init` stands for; a `--set` of the same key comes after them and wins."""
    if init is None:
        return []
    from mmclip.models.joint_space import embed_dim_of

    source, reads = _checkpoint_of(init)
    name = json.dumps(source)
    return [
        f"model.image.pretrained={name}",
        f"model.text.pretrained={name}",
        f"model.projections={name}",
        f"model.embed_dim={embed_dim_of(source)}",
        *reads,
    ]


def _checkpoint_of(init: str) -> tuple[str, list[str]]:
    """Of a run, its checkpoint and the keys of how it reads; of others, what was given.

    Raises:
        CheckpointError: When the run has none, or a damaged one.
    """
    from mmclip.checkpoint import CHECKPOINTS, checkpoint_meta, find_checkpoint, read_weights
    from mmclip.models.pretrained import is_checkpoint

    if not (is_checkpoint(init) or (Path(init) / CHECKPOINTS).is_dir()):
        return init, []
    folder = find_checkpoint(Path(init))
    meta = checkpoint_meta(folder)
    if "text_config" not in meta:
        raise ValueError(
            f"--init {init} is a fine-tuned result, which has no text encoder; give the run that "
            f"it was made of"
        )
    read_weights(folder, meta)  # refuses changed files
    model = meta["config"]["model"]
    pooling = [
        f"model.{name}.pooling={json.dumps(model[name]['pooling'])}" for name in ("image", "text")
    ]
    max_tokens = meta["config"]["data"]["max_tokens"]
    return str(folder), [*pooling, f"data.max_tokens={max_tokens}"]


def _resuming(command: str) -> str:
    """A command with --resume; of several processes, what each of them runs."""
    return command if " --resume" in command else f"{command} --resume"
