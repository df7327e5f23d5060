"""The whole path on synthetic images: draw, build, pre-train, score, show. What `make demo`
runs."""

import csv
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mmclip.checkpoint import CheckpointError
from mmclip.config import Config, load_config
from mmclip.data.folder import is_built
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.ingest.build import BuildOptions, build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.synthetic import FINDINGS, PRESETS, Preset, holds_preset, write_dataset
from mmclip.data.synthetic.dataset import PRESET_FILE
from mmclip.embed import embed_images, embed_prompts
from mmclip.evaluation.baselines import thumbnail_scores
from mmclip.evaluation.compute_metrics import control_of, metrics_by_finding
from mmclip.evaluation.protocols import BUILT
from mmclip.evaluation.results import RESULTS_FILE, About, Combination, Control, RunResults
from mmclip.evaluation.selection import select_samples
from mmclip.evaluation.zeroshot import (
    GALLERY_SIZE,
    Selection,
    ZeroShot,
    made_now,
    score_images,
    write_zeroshot,
    zeroshot,
)
from mmclip.evaluation.zeroshot_task import DEFAULT_PROMPT_SETS
from mmclip.files import locked, move_in
from mmclip.progress import progress
from mmclip.prompts import PromptSet, load_prompts
from mmclip.run import Run, open_run
from mmclip.training.pretrain import PretrainRequest, build_model, pretrain

UNTRAINED_SEEDS = range(10)


def run_demo(
    out: Path,
    seed: int,
    shuffle_pairs: bool,
    overrides: tuple[str, ...],
    command: str,
    overwrite: bool = False,
) -> RunResults:
    """Runs the demo and returns its results.

    Started again after a kill it goes on where it was; after a finished run it starts anew.
    Whether finished results may be replaced is for the caller to ask.

    Args:
        out: raw/ (images and reports as a data set would come), data/, run/, results.json,
            scores.npz, plots/, page.html.
        seed: Of the weights, the order and the drawn images.
        shuffle_pairs: The control: every image has the report, or the labels, of another.
        overrides: Of the configuration "demo".
        command: As typed, for the results.
        overwrite: Replace a demo of other settings, finished or not.

    Raises:
        ValueError: When something is there that no demo made, or, without `overwrite`, an
            unfinished demo of other settings.
    """
    if shuffle_pairs:
        overrides = (*overrides, "unpaired.shuffle=true")  # no image keeps what is true of it
    config = load_config("demo", (*overrides, f"train.seed={seed}"))
    preset = replace(PRESETS["demo"], seed=PRESETS["demo"].seed + seed)
    with locked(out):
        place = _place(out, preset, overwrite)
        results = _demo(out, place, preset, config, shuffle_pairs, command, overwrite)
        if place != out:
            move_in(place, out, RESULTS_FILE)
    return results


def _demo(
    out: Path,
    place: Path,
    preset: Preset,
    config: Config,
    shuffle_pairs: bool,
    command: str,
    overwrite: bool,
) -> RunResults:
    """Leaves a demo in `place`; images of the same preset are taken from `out`."""
    began, seed = time.monotonic(), config.train.seed
    home = out if is_built(out / "data") and holds_preset(out / "raw", preset) else place
    data = _make_data(home, preset)
    dataset = open_dataset([data], config.data.image_size)
    run = _train(place / "run", data, config, shuffle_pairs, command, overwrite or place != out)
    prompts, *other_prompt_sets = [load_prompts(name) for name in DEFAULT_PROMPT_SETS]
    held_out = _held_out(home / "raw")
    ordinary = dataset.select([sample.image_id not in held_out for sample in dataset.samples])
    result = zeroshot(
        run,
        ordinary,
        prompts,
        Selection(findings=FINDINGS),
        other_prompt_sets=other_prompt_sets,
        seed=seed,
    )
    wall_s = time.monotonic() - began
    return write_zeroshot(
        place,
        result,
        _about(run, preset, shuffle_pairs, run.check_unseen(result.dataset, "test")),
        made_now(result, command, seed, split=BUILT, wall_s=wall_s),
        gallery=_gallery(result),
        controls={
            "thumbnails": _thumbnails(ordinary, result),
            "untrained": _untrained(config, run, result),
        },
        combinations=_combinations(dataset, held_out, run, prompts, seed),
    )


def _train(
    folder: Path, data: Path, config: Config, shuffle_pairs: bool, command: str, may_replace: bool
) -> Run:
    """Pre-trains, or goes on where a killed demo was.

    Raises:
        CheckpointError: When the folder holds a run of another command, which may not be replaced.
    """
    request = PretrainRequest(
        folders=(data,),
        run=folder,
        config=config,
        command=command,
        resume=True,
        shuffle_pairs=shuffle_pairs,
    )
    try:
        return open_run(pretrain(request))
    except CheckpointError as error:
        if not may_replace:
            raise CheckpointError(
                f"{folder.parent} holds a demo that does not go on with this command ({error}); "
                f"add --overwrite to replace it"
            ) from None
    shutil.rmtree(folder)
    return open_run(pretrain(request))


def _about(run: Run, preset: Preset, shuffle_pairs: bool, leak_check: str) -> About:
    """What the page says of a demo."""
    meta, config = run.checkpoint.meta, run.config
    said = (
        "A tiny model trained with the whole method on synthetic images, half of them with "
        "reports and half with labels, scored by text prompts on synthetic patients it has not seen"
    )
    how = (
        ", after training on shuffled pairs and labels (a control)"
        if shuffle_pairs
        else ". Labels became prompts in training, so this is not a zero-shot score."
    )
    return About(
        title="Demo: synthetic images, tiny model",
        kind="demo",
        summary=said + how,
        leak_check=leak_check,
        facts={
            "training pairs": meta["n_pairs"],
            "unpaired images": meta["n_unpaired"],
            "steps": config.train.steps,
            "images": (
                f"{config.data.image_size} px, synthetic (preset demo, version {preset.version})"
            ),
        },
    )


REBUILD_FOLDER = "rebuild"
"""In the folder of a demo: the one that will replace it."""


def _place(out: Path, preset: Preset, overwrite: bool) -> Path:
    """Where a demo is made: in `out`, or beside what it will replace once it is finished.

    Raises:
        ValueError: When `out` holds what no demo made, or, without `overwrite`, another demo.
    """
    raw = out / "raw"
    there = [old for old in (raw, out / "data", out / "run") if old.exists()]
    if there and not (raw / PRESET_FILE).is_file():
        raise ValueError(
            f"{there[0]} is there and was not made by a demo, which would replace it; choose "
            f"another --out"
        )
    is_other = bool(there) and not holds_preset(raw, preset)
    if is_other and not overwrite:
        raise ValueError(
            f"{out} holds a demo of other synthetic images, by another --seed or version of "
            f"mmclip; add --overwrite to replace it, or choose another --out"
        )
    place = out / REBUILD_FOLDER if is_other or (out / RESULTS_FILE).is_file() else out
    place.mkdir(exist_ok=True)
    return place


def _make_data(out: Path, preset: Preset) -> Path:
    """Draws the images and builds the data folder, unless that is done."""
    raw, data = out / "raw", out / "data"
    if not (is_built(data) and holds_preset(raw, preset)):
        for old in (raw, data, out / "run"):
            shutil.rmtree(old, ignore_errors=True)
        total = sum(preset.n_patients(split) for split in ("train", "val", "test"))
        with progress("drawing patients", total) as advance:
            write_dataset(preset, raw, workers=2, on_progress=advance)
        build_data(
            open_reader("csv", raw, mapping=raw / "mapping.toml", table=None),
            raw,
            data,
            image_size=preset.image_size,
            options=BuildOptions(
                metadata={
                    "reader": "csv",
                    "preset": f"{preset.name} version {preset.version} seed {preset.seed}",
                }
            ),
        )
    return data


def _held_out(raw: Path) -> dict[str, str]:
    """The test images made to show a combination that training lacks: image id -> combination."""
    with (raw / "studies.csv").open(newline="", encoding="utf-8") as file:
        return {row["image_id"]: row["held_out"] for row in csv.DictReader(file) if row["held_out"]}


def _thumbnails(dataset: ImageTextDataset, result: ZeroShot) -> Control:
    """A logistic regression on 8 x 8 thumbnails, trained with labels: what brightness tells."""
    train, val = (select_samples(dataset, split) for split in ("train", "val"))
    scores = thumbnail_scores(train, val, result.dataset, result.test.names())
    return control_of(
        result.test,
        scores,
        "logistic regression on 8 x 8 thumbnails, trained with all labels of the training images",
    )


def _untrained(config: Config, run: Run, result: ZeroShot) -> Control:
    """The same model before any training, over ten initialisations."""
    found, test = [], result.test
    prompts = load_prompts("default")
    for seed in UNTRAINED_SEEDS:
        torch.manual_seed(seed)
        model = build_model(config, run.tokenizer).eval().to(run.device)
        untrained = replace(run, checkpoint=replace(run.checkpoint, model=model))
        pair = embed_prompts(untrained, prompts, test.names())
        images = embed_images(untrained, result.dataset, show=False)
        scores = untrained.scoring.scores(images, pair)
        evaluation = metrics_by_finding(
            test.labels, scores, test.patients(), test.names(), n_resamples=1
        )
        found.append(evaluation.macro_auroc)
    return Control(
        macro_auroc=float(np.mean(found)),
        note=f"the same model with random weights; mean of {len(found)} initialisations, "
        f"{min(found):.3f} to {max(found):.3f}",
    )


def _combinations(
    dataset: ImageTextDataset,
    held_out: dict[str, str],
    run: Run,
    prompts: PromptSet,
    seed: int,
) -> list[Combination]:
    """Test images of a finding, side and size that training lacks, against images without it."""
    out = []
    for name in sorted(set(held_out.values())):
        finding, side, size = name.split("/")
        keep = [
            held_out.get(sample.image_id) == name
            or (
                sample.split == "test"
                and sample.image_id not in held_out
                and sample.labels[finding] == 0
            )
            for sample in dataset.samples
        ]
        test = score_images(run, dataset.select(keep), prompts, Selection(findings=(finding,))).test
        row = metrics_by_finding(
            test.labels, test.scores, test.patients(), test.names(), seed=seed
        ).findings[0]
        out.append(
            Combination(
                finding=row.finding,
                side=side,
                size=size,
                n_positive=row.n_positive,
                n_negative=row.n_negative,
                auroc=row.auroc,
                auroc_ci=row.auroc_ci,
            )
        )
    return out


def _gallery(result: ZeroShot) -> list[int]:
    """The first images of the test split that show each finding, and two without any."""
    chosen: list[int] = []
    for k in range(len(result.test.names())):
        with_it = [r for r in np.flatnonzero(result.test.labels[:, k] == 1) if r not in chosen]
        chosen += [int(r) for r in with_it[:1]]
    normal = np.flatnonzero(np.nansum(result.test.labels, 1) == 0)[:2]
    return [*chosen[: GALLERY_SIZE - len(normal)], *map(int, normal)]
