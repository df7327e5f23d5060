"""`mmclip explain`: which parts of an image match a phrase, and how well such maps point."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmclip.cli.plain import EVALUATION, IN_OUT, PlainCommand
from mmclip.cli.shared import (
    CpuOption,
    ModelOption,
    OverwriteOption,
    ResamplesOption,
    RootOption,
    check_inputs,
    command_line,
    device_of,
    model_request,
    split_name,
)
from mmclip.cli.tables import print_table
from mmclip.files import locked_file
from mmclip.progress import console

if TYPE_CHECKING:
    from mmclip.explanation.saliency import ExplainScore

app = typer.Typer()

ONE_IMAGE = "One image"
MAPS = "Maps and boxes"
"""Titles of panels of the help."""


OutOption = Annotated[
    Path,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="The picture, .png, with an .npz beside it; a .json to evaluate.",
        metavar="PATH",
    ),
]
ImageOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=ONE_IMAGE,
        help="An image: PNG, JPEG, DICOM or the like.",
        metavar="PATH",
    ),
]
DataOption = Annotated[
    list[Path] | None,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="Data folder of `mmclip data build`; may be repeated to evaluate.",
        metavar="PATH",
    ),
]
ImageIdOption = Annotated[
    str | None,
    typer.Option(rich_help_panel=ONE_IMAGE, help="An image of the data folder.", metavar="NAME"),
]
PhraseOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ONE_IMAGE, help="Phrase to look for, as in a report.", metavar="TEXT"
    ),
]
ScoreOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=MAPS,
        help="contribution, prompt_pair or decoder_attention.",
        metavar="NAME",
    ),
]
PromptsOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=MAPS,
        help="Prompt set for findings and prompt_pair: a name or a path.",
        metavar="NAME",
    ),
]
BoxesOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MAPS,
        help="Boxes or masks: chestxdet10, chestxray14, ms-cxr, rsna, siim, synthetic or "
        "vindr, and the folder that holds them.",
        metavar="NAME=FOLDER",
    ),
]
EvaluateOption = Annotated[
    bool,
    typer.Option(
        "--evaluate",
        rich_help_panel=EVALUATION,
        help="Measure the maps of all images with --boxes.",
    ),
]
SplitOption = Annotated[
    str, typer.Option(rich_help_panel=EVALUATION, help="train, val or test.", metavar="NAME")
]
SeedOption = Annotated[
    int,
    typer.Option(
        rich_help_panel=EVALUATION,
        help="Seed of the bootstrap and the random weights.",
        metavar="N",
    ),
]


@app.command(cls=PlainCommand)
def explain(
    model: ModelOption,
    out: OutOption,
    image: ImageOption = None,
    data: DataOption = None,
    image_id: ImageIdOption = None,
    phrase: PhraseOption = None,
    score: ScoreOption = "contribution",
    prompts: PromptsOption = "default",
    boxes: BoxesOption = None,
    root: RootOption = None,
    evaluate: EvaluateOption = False,
    split: SplitOption = "test",
    n_resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    cpu: CpuOption = False,
) -> None:
    """Draws a saliency map of a phrase; --evaluate measures how well maps point.

    Example: `mmclip explain --model runs/a --image a.png --phrase cardiomegaly --out a.png`

    Example: `mmclip explain --model runs/a --data b --evaluate --boxes rsna=rsna/ --out a.json`
    """
    from mmclip.explanation.explain import ExplainRequest, write_map
    from mmclip.explanation.pointing_game import MapsRequest, PointingRequest, evaluate_maps
    from mmclip.prompts import load_prompts

    kind = _score_name(score)
    _check_suffix(out, ".json" if evaluate else ".png")
    _check_given(evaluate, image=image, data=data, image_id=image_id, phrase=phrase, boxes=boxes)
    of_split = split_name(split)
    marked = None if boxes is None else _boxes(boxes)
    check_inputs(model, data or (), prompts=[prompts])
    prompt_set = load_prompts(prompts)
    if evaluate:
        assert data and marked
        pointing = PointingRequest(
            *marked, kind, prompt_set, split=of_split, n_resamples=n_resamples, seed=seed
        )
        maps = MapsRequest(
            model=model_request(model),
            folders=tuple(data),
            out=out,
            command=command_line(),
            pointing=pointing,
            roots=tuple(root or ()),
            overwrite=overwrite,
            device=device_of(cpu),
        )
        with locked_file(out):
            _print_pointing(evaluate_maps(maps))
        print(out.read_text("utf-8"), end="")
        return
    assert phrase is not None
    request = ExplainRequest(
        model=model_request(model),
        phrase=phrase,
        out=out,
        command=command_line(),
        image=image,
        folder=data[0] if data else None,
        image_id=image_id,
        boxes=marked,
        root=root[0] if root else None,
        score=kind,
        prompts=prompt_set,
        overwrite=overwrite,
        device=device_of(cpu),
    )
    with locked_file(out, out.with_suffix(".npz")):
        print(json.dumps(write_map(request), indent=2, ensure_ascii=False))


def _score_name(name: str) -> "ExplainScore":
    if name not in ("contribution", "prompt_pair", "decoder_attention"):
        raise ValueError(
            f"--score {name!r} is none of contribution, prompt_pair, decoder_attention"
        )
    return name


def _check_suffix(out: Path, suffix: str) -> None:
    if out.suffix.lower() != suffix:
        raise ValueError(f"--out {out} does not end in {suffix}; name the file to write")


def _check_given(
    evaluate: bool,
    *,
    image: Path | None,
    data: list[Path] | None,
    image_id: str | None,
    phrase: str | None,
    boxes: str | None,
) -> None:
    """Refuses options that do not go together."""
    given = {"--image": image, "--data": data, "--image-id": image_id, "--phrase": phrase}
    given["--boxes"] = boxes
    if evaluate:
        way, needs, may = "--evaluate", ("--data", "--boxes"), ()
    elif image is not None:
        way, needs, may = "a map of --image", ("--image", "--phrase"), ()
    else:
        way, may = "a map of one image", ("--boxes",)
        needs = ("--data", "--image-id", "--phrase")
    if missing := [name for name in needs if not given[name]]:
        other = "" if evaluate or image else " (or --image in place of --data and --image-id)"
        raise ValueError(f"{way} needs {', '.join(missing)}{other}; add what is missing")
    if extra := [name for name, value in given.items() if value and name not in (*needs, *may)]:
        raise ValueError(f"{way} has no use for {', '.join(extra)}; leave it out")
    if not evaluate and data and len(data) > 1:
        raise ValueError(f"--data was given {len(data)} times; one image is in one data folder")


def _boxes(given: str) -> tuple[str, Path]:
    name, is_given, folder = given.partition("=")
    if not is_given or not folder:
        raise ValueError(f"--boxes {given!r} is no NAME=FOLDER, such as rsna=downloads/rsna")
    if not Path(folder).is_dir():
        raise ValueError(f"--boxes {given!r}: there is no folder {folder}; give that of the boxes")
    return name, Path(folder)


def _print_pointing(results: "dict[str, Any]") -> None:
    """The macro means for people on stderr, and the hits of each finding."""

    def said(value: "dict[str, Any]", percent: bool = True) -> str:
        if value["mean"] is None:
            return "–"
        mean = f"{100 * value['mean']:.1f}" if percent else f"{value['mean']:.2f}"
        if not value["ci"]:
            return mean
        low, high = value["ci"]
        return f"{mean} [{100 * low:.0f}, {100 * high:.0f}]" if percent else mean

    columns = {
        "hit": "hit %", "touch": "touch %", "iou_0.5": "IoU % at 0.5", "iou_chosen": "chosen",
        "cnr": "CNR",
    }  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name, found in results["saliency_maps"].items():
        macros = {metric: found[metric]["macro"] for metric in columns}
        for metric in list(macros)[1:]:
            macros[metric] = {**macros[metric], "ci": None}  # a terminal is narrow
        rows.append((name, *(said(macro, metric != "cnr") for metric, macro in macros.items())))
    styles = ["bold" if row[0] == "model" else "" for row in rows]
    print_table(("macro mean", *columns.values()), rows, styles)
    shown = [
        n for n in ("model", "location prior", "random weights") if n in results["saliency_maps"]
    ]
    rows = []
    for finding, value in results["saliency_maps"]["model"]["hit"]["findings"].items():
        cells = [said(results["saliency_maps"][name]["hit"]["findings"][finding]) for name in shown]
        rows.append((finding, f"{value['n']:,}", *cells))
    print_table(("hit %", "annotations", *shown), rows)
    console.print(
        f"{results['n_annotations']:,} annotations on {results['n_images']:,} images of "
        f"{results['n_patients']:,} patients; [95 % over patients]; macro over findings with at "
        f"least {results['min_count']} annotations",
        style="dim",
    )
    for reason, n in results["left_out"].items():
        console.print(f"left out: {n:,} annotations ({reason})", style="yellow")
    for control, found in results["sanity"].items():
        verdict = {True: "passed", False: "FAILED", None: "not decided"}[found["is_lost"]]
        console.print(
            f"sanity check by {control} {verdict}: it loses {said(found['hit_lost'])} points",
            style="" if found["is_lost"] else "red",
            soft_wrap=True,
        )
