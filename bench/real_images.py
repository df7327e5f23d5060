"""Contrastive training and the whole method on real images, beside what a shortcut would reach.

    python bench/real_images.py CXR OUT --arms contrastive whole --seeds 0 1 2
    python bench/real_images.py CXR OUT --arms contrastive whole --seeds 0 1 2 --table

CXR is a folder with studies.csv and the images that examples/mixed_images.toml describes. The pairs
are clinical notes of one source; unpaired images are those with labels of ChestX-ray14. An arm
trains `tiny` for 600 steps. ARM+one_label also trains on the sources that have one label each, so
that the label is the source; ARM+no_covid takes the words for COVID-19 and its tests out of the
notes. ARM+streams reads the data folders of --also beside them: reports without an image
(`mmclip data build openi`), and images with neither report nor labels, half as many a step as
pairs.

The images scored are of other sources than the pairs. Those of ChestX-ray14 are of the source of
the unpaired images: a finding that was a prompt there is prompt-supervised, and no zero-shot
result. Beside each macro AUROC stand `shortcut_baseline` (a logistic regression on the image's
size, brightness, gradients, border and view), `any` (the model's own score for "not normal", taken
for every finding) and `sick` (the same images without those that have no finding). Test images of
`kermany` choose
nothing: that source is all test.

A finished run appends one line to --jsonl; a call skips those that it holds. The last line is one
JSON object.
"""

import argparse
import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ablation import Key, losses_at_end, read_lines, run_name, train, unfinished
from compare import markdown
from mmclip.checkpoint import code_version
from mmclip.config import Config, load_config
from mmclip.config_io import config_hash
from mmclip.data.folder import META_FILE
from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.ingest.build import BuildOptions, build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.sample import Split
from mmclip.data.streams import STREAMS as STREAMS_READ
from mmclip.evaluation.compute_metrics import metrics_by_finding, shortcut_baseline
from mmclip.evaluation.metrics import known
from mmclip.evaluation.results import Control
from mmclip.evaluation.selection import Selection
from mmclip.evaluation.zeroshot import ZeroShot, abnormality_score, zeroshot
from mmclip.prompts import load_prompts
from mmclip.run import open_run

MAPPING = Path("examples/mixed_images.toml")

UNPAIRED = ("unpaired.rows_per_pair=1",)
ARMS: Mapping[str, tuple[str, ...]] = {
    "contrastive": (),
    "entmlm": ("loss.text=1",),
    "attmim": ("loss.image=1",),
    "attmim_entmlm": ("loss.image=1", "loss.text=1"),
    "prompts": UNPAIRED,
    "label_loss": ("loss.label=1", *UNPAIRED),
    "whole": ("loss.image=1", "loss.text=1", *UNPAIRED),
}
"""What an arm sets. Source: docs/training.md, "The arms of the method"."""

ONE_LABEL, NO_COVID, WITH_STREAMS = "+one_label", "+no_covid", "+streams"
STREAMS = ("unpaired.reports_per_pair=0.5", "unpaired.bare_per_pair=0.5")
"""What +streams sets."""

UNPAIRED_SOURCES = ("nih1024", "nih64")
"""Whose labelled images train as unpaired ones. Source: the images with labels of ChestX-ray14;
tb128 is for fine-tuning, and its images are scored here."""

ONE_LABEL_SOURCES = ("hannover", "openist")
COVID = re.compile(
    r"\b(covid(-?\s?19)?|sars-?\s?cov-?\s?2|(novel )?corona\s?virus\w*|2019-ncov|ncov\w*"
    r"|(real-time )?(rt-?)?pcr|swabs?)\b",
    re.IGNORECASE,
)
"""The words that the arm `+no_covid` masks: the disease and its test."""

SCORED: tuple[tuple[str, Split], ...] = (
    ("kermany", "test"), ("nih1024", "val"), ("nih64", "val"), ("tb128", "val"),
)  # fmt: skip
"""Source and split of the images that are scored, with the labels that those sources have."""


def write_table(root: Path, path: Path, *, one_label: bool, no_covid: bool) -> None:
    """The rows of studies.csv that an arm may read, and the notes as it may read them."""
    with (root / "studies.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        unpaired = UNPAIRED_SOURCES + ONE_LABEL_SOURCES * one_label
        lines = [
            line
            for line in reader
            if line["split"] != "train" or line["report"] or line["source"] in unpaired
        ]
    if no_covid:
        for line in lines:
            line["report"] = COVID.sub("", line["report"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def data_of(arm: str, root: Path, out: Path, image_size: int) -> Path:
    """The data folder of an arm, built unless it is there."""
    one_label, no_covid = ONE_LABEL in arm, NO_COVID in arm
    name = "images" + ONE_LABEL * one_label + NO_COVID * no_covid
    folder, table = out / "data" / name, out / "tables" / f"{name}.csv"
    if not (folder / META_FILE).is_file():
        write_table(root, table, one_label=one_label, no_covid=no_covid)
        reader = open_reader("csv", root, mapping=MAPPING, table=table)
        options = BuildOptions(metadata={"reader": "csv"})
        build_data(reader, root, folder, image_size=image_size, options=options)
    return folder


def config_of(arm: str, seed: int, overrides: Sequence[str]) -> Config:
    """The configuration of an arm under a seed."""
    name = arm.removesuffix(WITH_STREAMS)
    own = ARMS[name.removesuffix(NO_COVID).removesuffix(ONE_LABEL)]
    own += STREAMS if arm.endswith(WITH_STREAMS) else ()
    return load_config("tiny", ["train.steps=600", *own, *overrides, f"train.seed={seed}"])


def figures(result: ZeroShot, beside: Mapping[str, Control]) -> dict:
    """The macro AUROC of a scored source with its interval, and what stands beside it."""
    return {
        "n_images": len(result.dataset),
        "macro_findings": result.evaluation.macro_findings,
        "auroc": result.evaluation.macro_auroc,
        "ci": result.evaluation.macro_auroc_ci,
        "by_finding": result.evaluation.aurocs(),
        **{name: control.macro_auroc for name, control in beside.items()},
        "sick": among_the_sick(result),
    }


def among_the_sick(result: ZeroShot) -> dict[str, float] | None:
    """Each finding's AUROC over images with some finding; None where no image is labelled
    normal."""
    test = result.test
    if "no finding" not in test.names():
        return None
    normal = test.labels[:, test.names().index("no finding")]
    rows = np.flatnonzero(normal == 0)
    columns = [k for k, name in enumerate(test.names()) if name != "no finding"]
    labels, scores = test.labels[rows][:, columns], test.scores[rows][:, columns]
    kept = [i for i in range(len(columns)) if known(labels[:, i], scores[:, i]) is not None]
    if not kept:
        return None
    patients = test.patients()
    found = metrics_by_finding(
        labels[:, kept],
        scores[:, kept],
        [patients[row] for row in rows],
        [test.names()[columns[i]] for i in kept],
        n_resamples=1,
    )
    return found.aurocs() | ({"macro": found.macro_auroc} if found.macro_auroc is not None else {})


def run(key: Key, config: Config, folders: Sequence[Path], out: Path) -> dict:
    """Trains and scores one run, and returns its line."""
    where, (folder, *also) = out / "runs" / run_name(key), folders
    cost = train(key.arm, config, folder, where, also)
    trained, prompts = open_run(where), load_prompts("default")
    dataset = open_dataset([folder], config.data.image_size)
    scored = {}
    for source, split in SCORED:
        result = zeroshot(trained, dataset, prompts, Selection(split, (source,)), n_resamples=1000)
        beside = {
            "shortcut_baseline": shortcut_baseline(result.dataset, result.test),
            "abnormality_score": abnormality_score(result),
        }
        scored[source] = figures(result, beside)
    return {
        **key._asdict(),
        "commit": trained.checkpoint.meta["versions"]["commit"],
        "scored_at_commit": code_version()["commit"],
        **{name: trained.checkpoint.meta[name] for name in STREAMS_READ},
        "scored": scored,
        "loss_end": losses_at_end(where),
        **cost,
        "prompt_set": f"{prompts.id} version {prompts.version}",
    }


def print_table(found: Sequence[dict]) -> None:
    """The mean and range over seeds of each arm and scored source, as Markdown."""
    by_arm: dict[str, list[dict]] = defaultdict(list)
    for line in found:
        by_arm[line["arm"]].append(line["scored"])

    def cell(values: Sequence[float | None]) -> str:
        some = [value for value in values if value is not None]
        if not some:
            return "–"
        mean = f"{np.mean(some):.3f}"
        return mean if len(some) == 1 else f"{mean} ({min(some):.3f} to {max(some):.3f})"

    for source, split in SCORED:
        lines = []
        for arm, scored in by_arm.items():
            here = [one[source] for one in scored]
            sick = [(one["sick"] or {}).get("macro") for one in here]
            columns = [
                [one[name] for one in here]
                for name in ("auroc", "shortcut_baseline", "abnormality_score")
            ]
            lines.append([arm, str(len(here)), *map(cell, columns), cell(sick)])
        some = next(iter(by_arm.values()))[0][source]
        print(
            f"\n{source}, {split}: {some['n_images']} images, {len(some['macro_findings'])} count\n"
        )
        head = [
            "arm",
            "seeds",
            "macro AUROC",
            "shortcut_baseline",
            "abnormality score",
            "among the sick",
        ]
        print(markdown(head, lines))


def main() -> None:
    """Builds, trains and scores what is missing; or prints the table."""
    parser = argparse.ArgumentParser(description="Arms x seeds on real images.")
    parser.add_argument("cxr", type=Path)
    parser.add_argument("out", type=Path)
    every = [
        arm + a + b + c
        for arm in ARMS
        for a in ("", ONE_LABEL)
        for b in ("", NO_COVID)
        for c in ("", WITH_STREAMS)
    ]
    parser.add_argument(
        "--arms", nargs="+", default=["contrastive", "whole"], choices=every, metavar="ARM",
        help=f"of {', '.join(ARMS)}, with {ONE_LABEL}, {NO_COVID} or {WITH_STREAMS} behind it",
    )  # fmt: skip
    parser.add_argument("--also", nargs="+", type=Path, default=[], help="folders of +streams")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jsonl", type=Path, help="of finished runs; OUT/real_images.jsonl")
    parser.add_argument("--table", action="store_true", help="print what has finished, run nothing")
    parser.add_argument("--set", action="append", default=[], help="train.steps=200, in every arm")
    args = parser.parse_args()
    jsonl = args.jsonl or args.out / "real_images.jsonl"

    wanted: dict[Key, Config] = {}
    folders: dict[Key, list[Path]] = {}
    for seed in args.seeds:
        for arm in args.arms:
            config = config_of(arm, seed, args.set)
            every = [data_of(arm, args.cxr, args.out, config.data.image_size)]
            every += args.also if arm.endswith(WITH_STREAMS) else []
            data_hash = open_dataset(every, config.data.image_size).data_hash
            key = Key(arm, seed, "val", config_hash(config), data_hash)
            wanted[key], folders[key] = config, every
    if not args.table:
        jsonl.parent.mkdir(parents=True, exist_ok=True)
        for key, config in unfinished(wanted, read_lines(jsonl)).items():
            line = run(key, config, folders[key], args.out)
            with jsonl.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    done = read_lines(jsonl)
    found = [
        done[key] for key in sorted(wanted, key=lambda k: args.arms.index(k.arm)) if key in done
    ]
    if not found:
        raise SystemExit("none of these runs has finished; run without --table first")
    print_table(found)
    numbers = {
        f"{line['arm']} seed {line['seed']}": {
            source: one["auroc"] for source, one in line["scored"].items()
        }
        for line in found
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
