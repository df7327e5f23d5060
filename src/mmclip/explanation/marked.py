"""What readers of the images marked, and what is asked of the maps that are held against it."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.ingest.annotations import EMPTY, Annotation, read_annotations
from mmclip.data.leakage.check import patient_key
from mmclip.data.sample import SPLITS, Split
from mmclip.evaluation.selection import FRONTAL
from mmclip.explanation.maps import check_files, map_grid
from mmclip.explanation.saliency import ExplainScore
from mmclip.models.dual_encoder import DualEncoder
from mmclip.patches import Grid
from mmclip.prompts import PromptSet

CHOSEN_ON: dict[Split, Split] = {"test": "val", "val": "train", "train": "val"}
"""The split on which thresholds are chosen for the images of another. Never test."""


class Targets(NamedTuple):
    """Annotations of some images, one per image, finding and phrase: m of them, n patches."""

    dataset: ImageTextDataset
    image_rows: list[int]  # the row of each
    findings: list[str]
    phrases: list[str]  # of the reader of the image; "" where there are none
    inside: Float[Tensor, "m n"]  # pixels of each patch in the annotation
    total: Float[Tensor, "m n"]

    def patients(self) -> list[str]:
        """The patient of each."""
        return [patient_key(self.dataset.samples[i]) for i in self.image_rows]

    def of(self, splits: Collection[Split]) -> "Targets":
        """Those on images of some splits."""
        return self.take([self.dataset.samples[i].split in splits for i in self.image_rows])

    def take(self, keep: Sequence[bool]) -> "Targets":
        """Those where `keep` is True."""
        index = torch.tensor(keep, dtype=torch.bool)
        return Targets(
            self.dataset,
            [sample for sample, k in zip(self.image_rows, keep, strict=True) if k],
            [finding for finding, k in zip(self.findings, keep, strict=True) if k],
            [phrase for phrase, k in zip(self.phrases, keep, strict=True) if k],
            self.inside[index],
            self.total[index],
        )


def find_targets(
    dataset: ImageTextDataset, annotations: Iterable[Annotation], grid: Grid, left_out: Counter[str]
) -> Targets:
    """The annotations of the frontal images, counted in patches.

    Args:
        dataset: Each with an image.
        annotations: On these images.
        grid: The patches.
        left_out: The number of annotations that are left out is added here, by reason.
    """
    row_of = {sample.image_id: i for i, sample in enumerate(dataset.samples)}
    samples, findings, phrases, counted = [], [], [], []
    for annotation in annotations:
        row = row_of[annotation.image_id]
        inside, total = grid.count_pixels(annotation.is_inside)
        if dataset.samples[row].view not in FRONTAL:
            left_out["the image is a lateral"] += 1
        elif not inside.any():
            left_out[EMPTY] += 1
        else:
            samples.append(row)
            findings.append(annotation.finding)
            phrases.append(annotation.phrase)
            counted.append(torch.stack([inside, total]))
    n = grid.side**2
    both = torch.stack(counted, 1) if counted else torch.zeros(2, 0, n)
    return Targets(dataset, samples, findings, phrases, both[0], both[1])


def asked_phrases(
    findings: Sequence[str], phrases: Sequence[str], score: ExplainScore, prompts: PromptSet
) -> list[str]:
    """What the model is asked about each annotation: its phrase, else one for the finding.

    That is the first positive prompt of the finding; for "prompt_pair", which makes prompts
    itself, the finding's name.
    """
    return [
        phrase or (finding if score == "prompt_pair" else prompts.texts(finding).positives[0])
        for finding, phrase in zip(findings, phrases, strict=True)
    ]


@dataclass(frozen=True)
class PointingRequest:
    """What is asked of a model's maps, and by which boxes or masks they are measured.

    Attributes:
        boxes: Name of the data set of boxes or masks, one of `annotations.ANNOTATION_SETS`.
        root: Its folder.
        score: What the maps show.
        prompts: What a finding is asked by, where the data set has no phrases of its own.
        split: Of the images that are scored. Thresholds and the location prior are of train and
            val, without this split.
        n_resamples: Bootstrap resamples of patients.
        seed: Of the bootstrap, and the first of the models of random weights.
        min_count: Annotations from which on a finding counts in a macro mean. [chosen: as AUROC's]
    """

    boxes: str
    root: Path
    score: ExplainScore
    prompts: PromptSet
    split: Split = "test"
    n_resamples: int = 1000
    seed: int = 0
    min_count: int = 10

    def asked(self, targets: Targets) -> list[str]:
        """See `asked_phrases`."""
        return asked_phrases(targets.findings, targets.phrases, self.score, self.prompts)


class Marked(NamedTuple):
    """What readers of the images marked."""

    dataset: ImageTextDataset  # each with an image
    scored: Targets  # on the images that are scored
    others: Targets  # on those that choose thresholds
    known: Targets  # on those of the location prior
    left_out: dict[str, int]
    leak_check: str  # whether the run trained on the images that are scored


def find_marked(
    encoder: DualEncoder, dataset: ImageTextDataset, request: PointingRequest
) -> Marked:
    """The annotations of a data set of boxes or masks on the images of data folders.

    Raises:
        ManifestError: When no annotation lies on an image of the split, or one of them trained.
        SourceError: See `annotations.read_annotations`.
    """
    dataset = dataset.select([sample.image is not None for sample in dataset.samples])
    samples = {sample.image_id: sample for sample in dataset.samples}
    left_out: Counter[str] = Counter()
    annotations = read_annotations(request.boxes, request.root, samples, left_out)
    every = find_targets(dataset, annotations, map_grid(encoder), left_out)
    split, scored = request.split, every.of([request.split])
    if not scored.image_rows:
        counts = Counter(str(dataset.samples[i].split) for i in every.image_rows)
        said = ", ".join(f"{n} of {part}" for part, n in sorted(counts.items())) or "none"
        raise ManifestError(
            f"{request.boxes} marks no image of split {split!r} of this data ({said}; left out: "
            f"{dict(left_out) or 'none'}); choose another --split, or the folder whose images it is"
        )
    is_scored = np.isin(np.arange(len(dataset)), scored.image_rows)
    check_files(encoder, dataset.select(is_scored))
    leak_check = encoder.check_unseen(dataset.select(is_scored), split)
    return Marked(
        dataset,
        scored,
        every.of([CHOSEN_ON[split]]),
        every.of([part for part in SPLITS if part not in ("test", split)]),
        dict(sorted(left_out.items())),
        leak_check,
    )
