"""The tasks of transfer.py: each measures one thing of one model on fresh patients."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from mmclip.config_io import load_config_as
from mmclip.data.image_text_dataset import ImageTextDataset, normalise
from mmclip.data.sample import Split
from mmclip.data.streams import SEEN_FILE
from mmclip.data.synthetic import FINDINGS, Preset, read_masks
from mmclip.embed import embed_images
from mmclip.evaluation.baselines import fit_logistic
from mmclip.evaluation.bootstrap import (
    bootstrap_metrics,
    macro_of_resamples,
    patient_codes,
    patient_weights,
)
from mmclip.evaluation.metrics import auroc, calibration_error
from mmclip.evaluation.scores import Predictions, make_predictions
from mmclip.evaluation.selection import FRONTAL, Selection
from mmclip.evaluation.zeroshot import score_images
from mmclip.explanation.marked import PointingRequest, find_marked
from mmclip.explanation.pointing_game import point_metrics
from mmclip.explanation.saliency import saliency_maps
from mmclip.finetuning.finetune import fit_probe
from mmclip.finetuning.supervised import FineTuneConfig, encoded, predict, train_classifier
from mmclip.finetuning.task import Task, open_task, own_protocol, training_ids
from mmclip.losses import positive_pairs
from mmclip.models.classifier import Classifier, ImageEncoder
from mmclip.models.dual_encoder import sigmoid
from mmclip.models.encoders import patch_grid, token_features
from mmclip.prompts import load_prompts
from mmclip.retrieval.ranking import rank_candidates, report_keys, select_pairs
from mmclip.run import Run

FRESH_OFFSET = 2_000_003
"""Added to the preset's seed: no patient of these is one of pre-training's or of ceiling.py's."""

COVERED_RATIO = 0.25
"""A patch shows a lesion that covers this share of it. [chosen: a nodule of 4 px fills a quarter of
a patch of 8]"""

RANDOM, SUPERVISED = "random weights", "supervised"
"""The arms that stand beside those that are named."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        patients: Fresh ones: to learn from, to choose by, and to score.
        fractions: Of those to learn from.
        steps: Of full fine-tuning, at most, on each of the fractions. [chosen: on validation images
            of `prompts`, seed 0; docs/log.md]
        patch_images: Images of the lesion probe, to learn from and to score, and of pointing.
        n_resamples: Of the bootstrap.
    """

    patients: tuple[int, int, int] = (4000, 500, 1000)
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    steps: tuple[int, ...] = (200, 400, 1000)
    patch_images: int = 400
    n_resamples: int = 500


QUICK = Size((160, 60, 60), (0.1, 1.0), (4, 4), 40, 50)
"""For a test of the script: its numbers mean nothing."""


class Measured(NamedTuple):
    """A metric of one run: on all images, and in each resample of their patients."""

    value: float
    drawn: np.ndarray


class Weights(NamedTuple):
    """A model that is measured: a run, or random weights of its architecture."""

    arm: str
    run: Run
    name: str  # of these weights alone

    @property
    def seed(self) -> int:
        """Of the run; it also chooses the subset of the patients."""
        return self.run.config.train.seed


Found = dict[str, Measured]
"""By "task | findings"."""


class ScoredRows(NamedTuple):
    """Rows with labels and scores, a column a finding."""

    labels: np.ndarray
    scores: np.ndarray
    patients: Sequence[str]
    names: Sequence[str]


def fresh_preset(preset: Preset, size: Size) -> Preset:
    """The preset of the fresh patients, all of them labelled, with ids of their own."""
    train, val, test = size.patients
    return replace(
        preset, name=f"{preset.name}-fresh", seed=preset.seed + FRESH_OFFSET,
        n_train=train, n_val=val, n_test=test, n_unpaired=0, n_held_out=0,
    )  # fmt: skip


# -- metrics with their resamples --


def macro_aurocs(
    scored: ScoredRows, groups: Mapping[str, Sequence[str]], n_resamples: int, task: str
) -> Found:
    """Macro AUROC over each group of findings; a group of which none is defined is left out."""
    labels, scores, patients, names = scored
    value = [auroc(labels[:, k], scores[:, k]) for k in range(len(names))]
    drawn = bootstrap_metrics(labels, scores, patients, n_resamples=n_resamples).auroc
    found = {}
    for group, findings in groups.items():
        columns = [k for k, name in enumerate(names) if name in findings and value[k] is not None]
        if columns:
            mean = float(np.mean([value[k] or 0.0 for k in columns]))
            found[f"{task} | {group}"] = Measured(mean, macro_of_resamples(drawn, columns))
    return found


def aurocs(bench: "Bench", task: str, test: Predictions) -> Found:
    """`macro_aurocs` of the groups of a bench."""
    scored = ScoredRows(test.labels, test.scores, test.patients(), test.names())
    return macro_aurocs(scored, bench.groups, bench.size.n_resamples, task)


def mean_of(values: np.ndarray, patients: Sequence[str], n_resamples: int) -> Measured:
    """The mean of some values, by resamples of whole patients."""
    codes, n = patient_codes(patients)
    total, count = np.bincount(codes, values, n), np.bincount(codes, minlength=n)
    drawn = [w.T @ total / (w.T @ count) for w in patient_weights(n, n_resamples, 0, 100)]
    return Measured(float(values.mean()), np.concatenate(drawn))


# -- what is measured of a run --


@dataclass(frozen=True)
class Bench:
    """The fresh images, and what is asked of them."""

    out: Path
    split: Split
    size: Size
    groups: Mapping[str, tuple[str, ...]]  # of findings

    @property
    def data(self) -> Path:
        """The data folder of the fresh patients."""
        return self.out / "fresh" / "data"

    @property
    def raw(self) -> Path:
        """Its images and lesion masks, as they were drawn."""
        return self.out / "fresh" / "raw"

    def task(self, run: Run) -> Task:
        """All findings, learnt from the fresh patients."""
        protocol = own_protocol(self.data, FINDINGS, ())
        return open_task(self.data, protocol, run.config.data.image_size, run.config.data.resize)

    def scored(self, task: Task, val: np.ndarray, test: np.ndarray) -> Predictions:
        """The predictions of the images of the split."""
        part, scores = (task.val, val) if self.split == "val" else (task.test, test)
        return make_predictions(part, scores)

    def some(self, dataset: ImageTextDataset, split: Split) -> ImageTextDataset:
        """The first frontal images of a split, as many as dense tasks read."""
        is_of = [f.split == split and f.view in FRONTAL for f in dataset.samples]
        return dataset.select(np.array(is_of) & (np.cumsum(is_of) <= self.size.patch_images))


def by_prompts(bench: Bench, run: Run, dataset: ImageTextDataset) -> Found:
    """Zero-shot: named and withheld findings apart, and the calibration error of the named."""
    selection = Selection(bench.split, findings=FINDINGS)
    test = score_images(run, dataset, load_prompts("default"), selection).test
    found = aurocs(bench, "zero-shot", test)
    errors = [calibration_error(test.labels[:, k], test.scores[:, k]) for k in range(len(FINDINGS))]
    known = [error for error in errors if error is not None]
    if known:  # not resampled: its interval is over seeds alone
        mean = float(np.mean(known))
        found["calibration error | all"] = Measured(mean, np.full(bench.size.n_resamples, mean))
    return found


def by_label_head(bench: Bench, run: Run, dataset: ImageTextDataset) -> Found:
    """What the head of the label loss says; nothing of a run without one."""
    head = run.model.label_head
    if head is None:
        return {}
    names = json.loads((run.folder / SEEN_FILE).read_text("utf-8"))["label"]
    selection = Selection(bench.split, findings=tuple(names))
    images = selection.select(dataset)
    with torch.inference_mode():
        logits = head(run.model.scale() * embed_images(run, images.dataset))
    return aurocs(bench, "label head", make_predictions(images, sigmoid(logits)))


def by_labels(bench: Bench, weights: Weights, with_full: bool) -> Found:
    """Linear probes and full fine-tuning on shares of the fresh patients."""
    run = weights.run
    whole, found = bench.task(run), dict[str, Measured]()
    encoder = ImageEncoder(run.model.vision_model, "pooled").eval()
    features = encoded(encoder, encoder.width, whole.dataset, run.device).cpu().numpy()
    for fraction, steps in zip(bench.size.fractions, bench.size.steps, strict=True):
        task = whole.with_train(training_ids(bench.data, fraction, weights.seed))
        _, val, test = fit_probe(task, features, whole.dataset)
        found |= aurocs(bench, f"probe {fraction:.0%}", bench.scored(task, val, test))
        if with_full:
            scored = full_fine_tuned(bench, weights, task, steps)
            found |= aurocs(bench, f"full {fraction:.0%}", scored)
    return found


def full_fine_tuned(bench: Bench, weights: Weights, task: Task, steps: int) -> Predictions:
    """The scores of encoder and head after learning together; val chooses the step.

    Random weights train as in `mmclip finetune --init random`.
    """
    every = -(-steps // 10)  # ten validations
    settings = [f"train.steps={steps}", f"train.save_every_steps={every}"]
    config = load_config_as(FineTuneConfig, "configs_finetune", "tiny", settings)
    if weights.arm == RANDOM:
        config = config.of_random_weights()
    seed = weights.seed
    set_seed(seed)
    encoder = ImageEncoder(copy.deepcopy(weights.run.model.vision_model), "pooled")
    with TemporaryDirectory() as folder:
        trained = train_classifier(
            Accelerator(cpu=True), Classifier(encoder, len(FINDINGS)), task.train, task.val, config,
            seed, Path(folder), {"run": "transfer"},
        )  # fmt: skip
    device = torch.device("cpu")
    val, test = (predict(trained.model, of.dataset, device) for of in (task.val, task.test))
    return bench.scored(task, val, test)


def by_patches(bench: Bench, run: Run, dataset: ImageTextDataset) -> Found:
    """The lesion probe: single patches, each with the findings whose lesions cover it."""
    masks, grid, encoder = read_masks(bench.raw), patch_grid(run.model.vision_model), run.model
    none = np.zeros_like(next(iter(masks.values())))

    def read(split: Split) -> tuple[np.ndarray, np.ndarray, list[str]]:
        rows = bench.some(dataset, split)
        images = normalise(rows.pixels(np.arange(len(rows))))
        with torch.inference_mode():
            parts = [
                token_features(encoder.vision_model(pixel_values=part), encoder.vision_model)
                for part in images.split(128)
            ]
        features = torch.cat(parts)[:, 1:].flatten(0, 1).double().numpy()
        labels = []
        for finding in FINDINGS:
            each = [masks.get((sample.image_id, finding), none) for sample in rows.samples]
            ratio = grid.lesion_ratio(torch.from_numpy(np.stack(each)).float()[:, None])
            labels.append((ratio >= COVERED_RATIO).flatten().double().numpy())
        n_patches = len(features) // len(rows)
        return (
            features,
            np.stack(labels, 1),
            [sample.patient_id for sample in rows.samples for _ in range(n_patches)],
        )

    (x, y, _), (val_x, val_y, val_patients) = read("train"), read("val")
    is_val = bench.split == "val"
    test_x, labels, patients = (val_x, val_y, val_patients) if is_val else read("test")
    scores = fit_logistic(x, y, val_x, val_y).scores(test_x)
    scored = ScoredRows(labels, scores, patients, FINDINGS)
    return macro_aurocs(scored, bench.groups, bench.size.n_resamples, "lesion probe")


def by_maps(bench: Bench, run: Run, dataset: ImageTextDataset) -> Found:
    """The pointing game of each finding's phrase, with its denial taken away."""
    rows = bench.some(dataset, bench.split)
    request = PointingRequest(
        "synthetic", bench.raw, "prompt_pair", load_prompts("default"), bench.split
    )
    scored = find_marked(run, rows, request).scored
    names, images = sorted(set(scored.image_rows)), scored.image_rows
    place = {row: i for i, row in enumerate(names)}
    maps = saliency_maps(
        run, normalise(rows.pixels(np.array(names))), request.asked(scored),
        [place[row] for row in images], request.score, request.prompts,
    )  # fmt: skip
    hits, patients = point_metrics(maps, scored, {})["hit"], scored.patients()
    found = {}
    for group, findings in bench.groups.items():
        here = np.array([finding in findings for finding in scored.findings])
        if here.any():
            some = [patient for patient, is_here in zip(patients, here, strict=True) if is_here]
            found[f"pointing | {group}"] = mean_of(hits[here], some, bench.size.n_resamples)
    return found


def by_reports(bench: Bench, run: Run, dataset: ImageTextDataset) -> Found:
    """Retrieval of reports by images."""
    pairs = select_pairs(dataset, bench.split)
    keys = report_keys(run, pairs.samples)
    assert positive_pairs(keys, keys).diagonal().all()
    images = embed_images(run, pairs).numpy()
    texts = [str(sample.report) for sample in pairs.samples]
    reports = run.encode_texts(texts).numpy()
    found, _ = rank_candidates(images, reports, keys, keys, (min(10, len(pairs)),))
    patients = [sample.patient_id for sample in pairs.samples]
    return {"retrieval R@10 | all": mean_of(found.hit[:, 0], patients, bench.size.n_resamples)}


def measure(bench: Bench, weights: Weights, with_full: bool) -> Found:
    """All that is measured of one model."""
    run = weights.run
    dataset = run.open_data([bench.data])
    run.check_unseen(dataset.select([f.split == bench.split for f in dataset.samples]), bench.split)
    tasks: Sequence[Callable[[], Found]] = (
        lambda: by_prompts(bench, run, dataset),
        lambda: by_label_head(bench, run, dataset),
        lambda: by_labels(bench, weights, with_full),
        lambda: by_patches(bench, run, dataset),
        lambda: by_maps(bench, run, dataset),
        lambda: by_reports(bench, run, dataset),
    )
    found: Found = {}
    for task in tasks:
        found |= task()
    return found
