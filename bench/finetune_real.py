"""Fine-tuning with 4, 34 and 334 real images, from trained weights and from random ones.

    python bench/finetune_real.py CXR OUT out/real/runs/contrastive-0-* out/real/runs/whole-0-*
    python bench/finetune_real.py CXR OUT out/real/runs/contrastive-0-* --table

CXR is a folder with studies.csv and the images that examples/mixed_images.toml describes; of these,
the Shenzhen images (source tb128) with their own splits, for tuberculosis. Behind OUT stand runs of
bench/real_images.py, which have not trained on these images; random weights have the architecture
of the first. Subsets of the training images are drawn with as many images with the finding as
without it, 20 for the linear probe and 3 for full fine-tuning; random weights are drawn anew for
each subset of full fine-tuning, and three times over for the probe.

Beside each stands `shortcut_baseline`: a logistic regression on the image's size, brightness,
gradients, border and view, which learns from the very same images, and validates on the same.
Validation images choose strength and step; test images are scored once a run, and choose nothing.

A finished run appends one line to --jsonl and leaves the scores of its test images in OUT/scores; a
call skips those that the file holds. The table has the mean over subsets with 95 % intervals over
test patients and subsets, drawn together, and the difference from random weights on the same
subsets. The last line is one JSON object.
"""

import argparse
import csv
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from jaxtyping import Float

from compare import markdown
from mmclip.checkpoint import code_version
from mmclip.config_io import config_hash, load_config_as
from mmclip.data.folder import META_FILE
from mmclip.data.ingest.build import BuildOptions, build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.leakage.splits import stratified
from mmclip.evaluation.baselines import shortcut_features
from mmclip.evaluation.bootstrap import bootstrap_metrics
from mmclip.evaluation.intervals import (
    Interval,
    interval_over_seeds,
    share_over_seeds,
)
from mmclip.finetuning.features import Start, start_of, stored_features, weights_hash
from mmclip.finetuning.finetune import fit_probe
from mmclip.finetuning.supervised import FineTuneConfig, macro_auroc, predict, train_classifier
from mmclip.finetuning.task import Task, open_task, own_protocol
from mmclip.models.classifier import Classifier

MAPPING = Path("examples/mixed_images.toml")
SOURCE, FINDING = "tb128", "tuberculosis"
SIZES = (4, 34, 334)
"""Training images: 1, 10 and 100 % of 334, rounded so that both classes are as many."""

SUBSETS = {"probe": 20, "full": 3}
RANDOM, SHORTCUT = "random", "shortcut_baseline"
CPU = torch.device("cpu")
N_RESAMPLES = 1000


class Key(NamedTuple):
    """What tells one run from another."""

    start: str  # name of a run, random or shortcut baseline
    method: str
    n_train: int
    subset: int  # seed of the subset
    weights: str  # hash of the weights to start from
    config_hash: str
    data_hash: str


def build(root: Path, out: Path, image_size: int) -> Path:
    """The data folder of the Shenzhen images, built unless it is there."""
    folder, table = out / f"data-{image_size}", out / "tb128.csv"
    if not (folder / META_FILE).is_file():
        out.mkdir(parents=True, exist_ok=True)
        with (root / "studies.csv").open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            lines = [line for line in reader if line["source"] == SOURCE]
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(lines)
        reader = open_reader("csv", root, mapping=MAPPING, table=table)
        build_data(
            reader,
            root,
            folder,
            image_size=image_size,
            options=BuildOptions(metadata={"reader": "csv"}),
        )
    return folder


def subset_of(task: Task, n_images: int, seed: int) -> Task:
    """The task with some of its training images, as many with the finding as without."""
    samples = task.train.dataset.samples
    kind = {
        sample.patient_id: ["present" if label == 1 else "absent"]
        for sample, label in zip(samples, task.train.labels[:, 0], strict=True)
    }
    kept = stratified(kind, n_images, seed)
    return task.with_train({sample.image_id for sample in samples if sample.patient_id in kept})


def read_lines(path: Path) -> dict[Key, dict]:
    """The lines of finished runs."""
    text = path.read_text("utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    return {Key(*(line[field] for field in Key._fields)): line for line in lines}


def scores_path(out: Path, key: Key) -> Path:
    """Where the test scores of a run lie."""
    name = f"{key.start}-{key.method}-{key.n_train}-{key.subset}"
    return out / "scores" / f"{name}-{key.weights[:8]}-{key.config_hash[:8]}.npy"


def probe_scores(
    task: Task, whole: Task, start: Start, weights_seed: int, data: Path, out: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Validation and test scores of a probe on the features of some weights."""
    encoder = start.encoder(weights_seed)
    features = stored_features(encoder, whole.dataset, data, out / "features", CPU)
    return fit_probe(task, features, whole.dataset)[1:]


def fit_full(
    task: Task, start: Start, config: FineTuneConfig, seed: int, run: Path, key: Key
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Validation and test scores of full fine-tuning, and at which step."""
    encoder = start.encoder(seed)
    accelerator = Accelerator(cpu=True)
    set_seed(seed)
    trained = train_classifier(
        accelerator,
        Classifier(encoder, 1),
        task.train,
        task.val,
        config.of_random_weights() if start.is_random else config,
        seed,
        run,
        {"run": json.dumps(key)},
    )
    val, test = (predict(trained.model, part.dataset, CPU) for part in (task.val, task.test))
    shutil.rmtree(run)
    return val, test, {"step": trained.step, "steps": trained.history[-1][0]}


def mean_and_interval(
    labels: Float[np.ndarray, "n 1"],
    scores: Float[np.ndarray, "n s"],
    base: Float[np.ndarray, "n s"] | None,
    patients: Sequence[str],
) -> tuple[float, Interval | None]:
    """The mean AUROC over subsets, or the mean difference from a base, with its interval."""
    many = np.repeat(labels, scores.shape[1], axis=1)

    def of(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reached = [macro_auroc(labels, some[:, [s]]) or 0.0 for s in range(some.shape[1])]
        return np.array(reached), bootstrap_metrics(
            many, some, patients, n_resamples=N_RESAMPLES
        ).auroc

    reached, drawn = of(scores)
    if base is None:
        return float(reached.mean()), share_over_seeds(reached, drawn.T)
    base_reached, base_drawn = of(base)
    gains = reached - base_reached
    return float(gains.mean()), interval_over_seeds(gains, (drawn - base_drawn).T)


def print_table(task: Task, keys: Sequence[Key], done: Mapping[Key, dict], out: Path) -> None:
    """The finished runs as Markdown, and as one JSON object."""
    by_cell: dict[tuple[str, int, str], dict[int, Key]] = defaultdict(dict)
    for key in keys:
        if key in done:
            by_cell[key.method, key.n_train, key.start][key.subset] = key
    patients = [sample.patient_id for sample in task.test.dataset.samples]

    def stacked(cell: Mapping[int, Key], subsets: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.load(scores_path(out, cell[s])) for s in subsets], 1)

    lines, numbers = [], {}
    for (method, n_train, start), cell in by_cell.items():
        subsets = sorted(cell)
        scores = stacked(cell, subsets)
        mean, interval = mean_and_interval(task.test.labels, scores, None, patients)
        each = [done[cell[s]]["test_auroc"] for s in subsets]
        columns = [start, method, str(n_train), str(len(subsets)), with_interval(mean, interval)]
        columns.append(f"{min(each):.3f} to {max(each):.3f}")
        base = by_cell.get((method, n_train, RANDOM), {})
        shared = [s for s in subsets if s in base]
        found: dict[str, object] = {"auroc": mean, "ci": interval, "subsets": len(subsets)}
        if start not in (RANDOM, SHORTCUT) and shared:
            difference, spread = mean_and_interval(
                task.test.labels, stacked(cell, shared), stacked(base, shared), patients
            )
            columns.append(with_interval(difference, spread))
            found |= {"above_random": difference, "above_random_ci": spread}
        else:
            columns.append("")
        lines.append(columns)
        numbers[f"{start} {method} {n_train}"] = found
    head = ["weights", "method", "images", "subsets", "AUROC", "lowest to highest", "above random"]
    print(markdown(head, lines))
    print(json.dumps({"n_test": len(patients), "runs": numbers}))


def with_interval(value: float, interval: Interval | None) -> str:
    """A number for people."""
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def main() -> None:
    """Builds, fits and scores what is missing; or prints the table."""
    parser = argparse.ArgumentParser(
        description="Few real images, from trained and random weights."
    )
    parser.add_argument("cxr", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--method", choices=[*SUBSETS, "both"], default="both")
    parser.add_argument("--jsonl", type=Path, help="of finished runs; OUT/finetune_real.jsonl")
    parser.add_argument("--table", action="store_true", help="print what has finished, run nothing")
    parser.add_argument("--set", action="append", default=[], help="train.steps=200")
    args = parser.parse_args()
    jsonl = args.jsonl or args.out / "finetune_real.jsonl"

    config = load_config_as(FineTuneConfig, "configs_finetune", "tiny", args.set)
    starts = {}
    for run in args.runs:  # a model of ours reads no data folder here
        starts[run.name.rsplit("-", 2)[0]] = start_of("run", run, args.out)
    starts[RANDOM] = start_of(RANDOM, args.runs[0], args.out)
    image_size = starts[RANDOM].image_size
    folder = build(args.cxr, args.out, image_size)
    task = open_task(folder, own_protocol(folder, [FINDING], [SOURCE]), image_size)
    facts = shortcut_features(task.dataset)
    done = read_lines(jsonl)
    hashes = {}
    keys: list[Key] = []
    for method, n_subsets in SUBSETS.items():
        if args.method not in (method, "both"):
            continue
        for n_train in SIZES:
            for name in [*starts, *([SHORTCUT] if method == "probe" else [])]:
                # All training images are one subset: only random weights differ then.
                for subset in range(min(n_subsets, 3) if n_train == len(task.train) else n_subsets):
                    seed = subset % 3 if method == "probe" else subset
                    at = name, seed if name == RANDOM else 0
                    if at not in hashes and name != SHORTCUT:
                        hashes[at] = weights_hash(starts[name].encoder(seed))
                    this = config_hash(config) if method == "full" else ""
                    data = task.dataset.data_hash
                    key = Key(name, method, n_train, subset, hashes.get(at, ""), this, data)
                    keys.append(key)
                    if args.table or key in done:
                        continue
                    part, further, began = subset_of(task, n_train, subset), {}, time.monotonic()
                    if name == SHORTCUT:
                        _, val, test = fit_probe(part, facts, task.dataset)
                    elif method == "probe":
                        val, test = probe_scores(part, task, starts[name], seed, folder, args.out)
                    else:
                        run = args.out / "runs" / f"{name}-{n_train}-{subset}"
                        val, test, further = fit_full(part, starts[name], config, subset, run, key)
                    path = scores_path(args.out, key)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.save(path, test)
                    line = {
                        **key._asdict(),
                        "commit": code_version()["commit"],
                        "n_images": len(part.train),
                        "n_positive": int((part.train.labels == 1).sum()),
                        "val_auroc": macro_auroc(task.val.labels, val),
                        "test_auroc": macro_auroc(task.test.labels, test),
                        **further,
                        "wall_s": round(time.monotonic() - began, 2),
                    }
                    jsonl.parent.mkdir(parents=True, exist_ok=True)
                    with jsonl.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    done[key] = line
    if not any(key in done for key in keys):
        raise SystemExit("none of these runs has finished; run without --table first")
    print_table(task, keys, done, args.out)


if __name__ == "__main__":
    main()
