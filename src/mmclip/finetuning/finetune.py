"""Fine-tuning: what an image encoder is worth where few images are labelled.

out/<method>-<percent>-<seed>/   results.json, scores.npz (test and val), page.html, MODEL_CARD.md,
                                 and of full fine-tuning metrics.jsonl and checkpoints/step_.../
out/summary.json                 each method, fraction and seed side by side
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmclip.config_io import config_hash
from mmclip.data.folder import ManifestError
from mmclip.data.leakage.check import patient_key
from mmclip.evaluation.baselines import shortcut_features
from mmclip.evaluation.bootstrap import bootstrap_metrics, macro_of_resamples
from mmclip.evaluation.compute_metrics import compute_metrics, control_of
from mmclip.evaluation.intervals import share_over_seeds
from mmclip.evaluation.pages import GalleryItem, extreme_cases, write_evaluation
from mmclip.evaluation.protocols import load_protocol
from mmclip.evaluation.results import (
    RESULTS_FILE,
    About,
    Control,
    Provenance,
    ScoredImages,
    provenance,
    read_results,
    read_scores,
    run_results,
)
from mmclip.evaluation.scores import (
    Predictions,
    make_predictions,
)
from mmclip.evaluation.selection import images_hash, label_makers, unknown_views
from mmclip.files import write_text_atomic
from mmclip.finetuning.features import Start, start_of, start_of_others
from mmclip.finetuning.learning import (
    Facts,
    Learnt,
    fit_probe,
    probed,
    probed_on_others,
    trained_fully,
)
from mmclip.finetuning.request import Common, FinetuneRequest, Method, Part, recipe_of, run_hash
from mmclip.finetuning.supervised import (
    keep_only,
    macro_auroc,
)
from mmclip.finetuning.task import Task, own_protocol, rules_of, task_of
from mmclip.models.dual_encoder import Seen, Weights
from mmclip.models.hub_encoder import weights_hash
from mmclip.progress import console

logger = logging.getLogger(__name__)


SUMMARY_FILE = "summary.json"


def finetune(request: FinetuneRequest) -> Path:
    """Runs each fraction under each seed, skips those that are finished, and compares them.

    Returns:
        The path of summary.json, which the first process writes.

    Raises:
        ManifestError: When images that would be scored were trained on, or a subset is not saved.
        ValueError: When what was asked for does not fit together.
    """
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if request.method == "probe" and n_processes > 1:
        raise ValueError(
            f"a linear probe is fitted by one process, and this is one of {n_processes}; start it "
            f"without torchrun or accelerate launch"
        )
    start = _start(request)
    if request.protocol is None:
        protocol = own_protocol(request.folder, request.findings, request.sources)
    else:
        protocol = load_protocol(request.protocol)
    rules = rules_of(protocol)
    task = task_of(request.folder, protocol, start.open_data(request.folder))
    said, seen = _leak_check(start, task)
    common = Common(request, start, task, said, seen)
    parts = [
        common.part(fraction, seed)
        for fraction in request.fractions or rules.fractions
        for seed in request.seeds or rules.seeds
    ]
    for part in parts:
        if not len(part.task.train):
            raise ManifestError(
                f"{part.fraction:.0%} of the training patients with seed {part.seed} have no image "
                f"that is labelled with {', '.join(protocol.findings)}; take a larger --fraction"
            )
    done: dict[float, dict[int, Path]] = {}
    for part in parts:
        run_one(common, part)
        done.setdefault(part.fraction, {})[part.seed] = part.folder
    if int(os.environ.get("RANK", "0")) == 0:  # the others may be here before results are written
        _write_summary(common, done)
    return request.out / SUMMARY_FILE


def _start(request: FinetuneRequest) -> Start:
    """Where weights come from.

    Raises:
        ValueError: When that does not go with the method.
    """
    features, is_full = request.config.features, request.method == "full"
    if features == "embedding" and is_full:
        raise ValueError("features=embedding is for a linear probe; take pooled or class")
    if request.others is not None:
        has_gpu = not is_full and not request.cpu and torch.cuda.is_available()
        device = torch.device("cuda" if has_gpu else "cpu")  # training copies its image encoder
        return start_of_others(request.others, request.init, features, device, is_full)
    return start_of(request.init, request.run, request.folder, features)


def _leak_check(start: Start, task: Task) -> tuple[str, dict[str, Seen]]:
    """What is known of the images that scored ones may have leaked to, and of findings' names.

    Raises:
        ManifestError: When images that would be scored were trained on.
    """
    if start.init == "run":
        encoder = start.others or start.run
        assert encoder is not None
        found = [encoder.check_unseen(task.val.dataset, "val")]
        found += [encoder.check_unseen(task.test.dataset, "test")]
        return "; ".join(dict.fromkeys(found)), encoder.seen(task.protocol.findings)
    said = "no image of train is in val or test, nor its patient"
    if start.is_random:
        return said, dict.fromkeys(task.protocol.findings, "none")
    return f"{said}; what {start.said} was trained on is not known", {}


def _write_summary(common: Common, done: Mapping[float, Mapping[int, Path]]) -> None:
    """Writes summary.json; `done` has the folder of each fraction and seed."""
    request, task = common.request, common.task
    summary = {
        "protocol": task.protocol.id,
        "init": common.start.said,
        "n_test": len(task.test),
        "data_hash": task.dataset.data_hash,
        "command": request.command,
        "lines": [summary_line(request.method, f, of_seed) for f, of_seed in done.items()],
    }
    write_text_atomic(request.out / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def run_one(common: Common, part: Part) -> None:
    """One fraction under one seed, unless it is finished.

    Raises:
        ValueError: When the folder holds results of another run.
    """
    began = time.monotonic()
    others = common.start.others
    is_read = others is not None and common.request.method == "probe"
    encoder = None if is_read else common.start.encoder(part.seed)
    if others is not None:
        weights = str(others.weights.recipe_hash)
    else:
        assert encoder is not None
        weights = weights_hash(encoder)
    this = run_hash(common.request, common.start, part.task, weights, part.seed)
    if (part.folder / RESULTS_FILE).is_file():
        if read_results(part.folder).facts.get("run") == this:
            console.print(f"{part.folder} is finished", markup=False, soft_wrap=True)
            return
        raise ValueError(
            f"{part.folder} holds results of other weights, images or settings; choose another "
            f"--out, or remove that folder"
        )
    facts = _facts(common, part, this)
    if encoder is None:
        learnt = probed_on_others(common, part, this)
    else:
        learn = probed if common.request.method == "probe" else trained_fully
        learnt = learn(common, part, encoder, this)
    if learnt is None:
        return
    made = provenance(
        common.request.command,
        part.seed,
        ScoredImages(
            common.task.dataset.data_hash,
            part.task.split,
            images_hash(part.task.test.dataset.samples),
        ),
        device=learnt.device,
        wall_s=time.monotonic() - began,
        weights=Weights(
            config_hash(common.request.config),
            part.seed,
            recipe_of(common.request, common.start, part.task, weights, part.fraction),
        ),
    )
    _write(common, part, learnt, {**facts, **learnt.facts}, made)
    if common.request.method == "full":
        keep_only(part.folder, int(learnt.facts["step"]))


def _facts(common: Common, part: Part, this: str) -> Facts:
    """What results say of a run before it has learnt; `this` identifies it."""
    task, train = part.task, part.task.train
    facts: Facts = {
        "run": this,
        "start": common.start.said,
        "method": common.request.method,
        "features": common.start.features,
        "fraction": part.fraction,
        "training images": len(train),
        "training patients": len({patient_key(sample) for sample in train.dataset.samples}),
        "test images labelled by": label_makers(task.test.dataset),
        "training images labelled by": label_makers(train.dataset),
        "images of unknown view": unknown_views(task.test.dataset),
    }
    facts |= rules_of(task.protocol).label_rules(task.protocol.findings)
    one_class = [
        name
        for k, name in enumerate(task.protocol.findings)
        if not {0.0, 1.0} <= set(train.labels[:, k])
    ]
    if one_class:
        facts["not learnt"] = ", ".join(one_class)
        logger.warning(
            "%s: the %d training images show one class alone of %s",
            part.folder.name, len(train), ", ".join(one_class),
        )  # fmt: skip
    return facts


def _write(common: Common, part: Part, learnt: Learnt, facts: Facts, made: Provenance) -> None:
    """Judges the scores of a run and writes what an evaluation leaves."""
    task = part.task
    val, test = make_predictions(task.val, learnt.val), make_predictions(task.test, learnt.test)
    chosen_by = macro_auroc(val.labels, val.scores)
    evaluation = compute_metrics(
        test,
        val,
        rule=task.protocol.threshold,
        min_count=task.protocol.min_count,
        n_resamples=common.request.n_resamples,
    )
    method = "linear probe" if common.request.method == "probe" else "full fine-tuning"
    about = About(
        title=f"{method.capitalize()}: {task.protocol.title}",
        kind="finetune",
        summary=f"{len(test):,} images, scored by {method} of {common.start.said}, on "
        f"{part.fraction:.0%} of the training patients ({len(task.train):,} images), seed "
        f"{part.seed}; it learnt the labels of every finding, and `seen` says how pre-training "
        "named it",
        leak_check=common.leak_check,
        facts=facts if chosen_by is None else {**facts, "validation macro AUROC": chosen_by},
    )
    results = run_results(
        evaluation.with_findings({name: {"seen": how} for name, how in common.seen.items()}),
        about,
        made,
        protocol=task.protocol,
        controls={"shortcut baseline": shortcut_baseline(task, test)},
    )
    write_evaluation(
        part.folder,
        results,
        test,
        val=val,
        protocol=task.protocol,
        gallery=gallery(task, test),
    )


def shortcut_baseline(task: Task, test: Predictions) -> Control:
    """The control that reads facts of the file and no lung, and learns from the same images."""
    dataset = task.dataset
    _, _, scores = fit_probe(task, shortcut_features(dataset), dataset)
    return control_of(
        test,
        scores,
        "logistic regression on the image's size, brightness, gradients, border and view, on the "
        "same training and validation images: a model that does not exceed it may have read no "
        "lung",
        task.protocol.min_count,
    )


def gallery(task: Task, test: Predictions) -> list[GalleryItem]:
    """The test images that the model is most right and most wrong about, for the page."""
    cases = extreme_cases(test)
    if not cases:
        return []
    pixels = task.test.dataset.pixels(np.array(list(cases), np.int64)).numpy()
    return [
        GalleryItem(row, task.test.dataset.samples[row].image_id, image, None, None, why)
        for (row, why), image in zip(cases.items(), pixels, strict=True)
    ]


def summary_line(method: Method, fraction: float, runs: Mapping[int, Path]) -> dict[str, Any]:
    """What a fraction reached under all seeds: mean, each seed, interval over patients and seeds.

    Every seed is evaluated on the same resamples of patients; see `intervals.interval_over_seeds`.

    Args:
        method: Of the runs.
        fraction: Of the training patients.
        runs: The folder of each seed.
    """
    results = {seed: read_results(folder) for seed, folder in runs.items()}
    reached = {seed: found.macro_auroc for seed, found in results.items()}
    shortcut = [found.controls["shortcut baseline"].macro_auroc for found in results.values()]
    by_seed = [value for value in reached.values() if value is not None]
    interval = None
    if len(by_seed) == len(runs):
        drawn = []
        for seed, folder in runs.items():
            test = read_scores(folder, results[seed])
            columns = [test.names().index(name) for name in results[seed].macro_findings]
            resampled = bootstrap_metrics(
                test.labels, test.scores, test.patients(), n_resamples=results[seed].n_resamples
            )
            drawn.append(macro_of_resamples(resampled.auroc, columns))
        interval = share_over_seeds(np.array(by_seed), np.stack(drawn))
    known = [value for value in shortcut if value is not None]
    return {
        "method": method,
        "fraction": fraction,
        "training_images": {s: found.facts["training images"] for s, found in results.items()},
        "macro_auroc": reached,
        "mean": float(np.mean(by_seed)) if by_seed else None,
        "interval": interval,
        "shortcut_baseline": float(np.mean(known)) if known else None,
    }
