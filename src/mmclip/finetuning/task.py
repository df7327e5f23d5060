"""What fine-tuning learns: the findings of a protocol, from some images of a data folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mmclip.config import ResizeMode
from mmclip.config_io import packaged_names
from mmclip.data.disease_prompts import NO_FINDING
from mmclip.data.folder import ManifestError, read_meta, read_split
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.leakage.check import refuse_leaks
from mmclip.data.leakage.splits import PERCENTS, read_subset, subsets_of
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import PRESENT, UNCERTAIN, Sample
from mmclip.data.versions import WORDS_OF
from mmclip.evaluation.protocols import (
    BUILT,
    OWN_PROTOCOL,
    FineTuning,
    Protocol,
    load_protocol,
    protocol_names,
)
from mmclip.evaluation.selection import (
    FRONTAL,
    LabelledImages,
    Selection,
    protocol_labels,
    sources_in,
    split_of,
)


@dataclass(frozen=True)
class Task:
    """What is learnt: the findings of a protocol, from some images, evaluated on others."""

    protocol: Protocol
    train: LabelledImages  # all of it
    val: LabelledImages
    test: LabelledImages
    split: str  # by name and hash

    @cached_property
    def dataset(self) -> ImageTextDataset:
        """Training, validation and test images, in this order."""
        parts = [part.dataset for part in (self.train, self.val, self.test)]
        samples = tuple(sample for part in parts for sample in part.samples)
        where = np.concatenate([part.where for part in parts])
        return replace(parts[0], samples=samples, where=where)

    def with_train(self, ids: set[str]) -> "Task":
        """The same task with some of its training images."""
        keep = [sample.image_id in ids for sample in self.train.dataset.samples]
        return replace(self, train=self.train.select(keep))


def own_protocol(folder: Path, findings: Sequence[str], sources: Sequence[str]) -> Protocol:
    """The rules where no benchmark is named: some findings, by the folder's own split.

    Raises:
        ManifestError: When no finding is named.
    """
    if not findings:
        raise ManifestError("name a --protocol, or the findings to learn by --finding")
    meta = read_meta(folder)
    words = WORDS_OF.get(meta.get("reader", ""), meta.get("reader", ""))
    blank = load_words(words).blank if words in packaged_names("findings") else "unknown"
    return Protocol(
        id=OWN_PROTOCOL,
        version=1,
        title=", ".join(findings),
        description="Findings that were named on the command line, with the folder's own split.",
        readers=(meta.get("reader", "unknown"),),
        sources=tuple(sources),
        splits=(meta.get("split", {"name": BUILT})["name"],),
        findings=tuple(findings),
        finetune=FineTuning(blank=blank),
    )


def rules_of(protocol: Protocol) -> FineTuning:
    """What a protocol says of fine-tuning.

    Raises:
        ManifestError: When it is for zero-shot alone.
    """
    if protocol.finetune is None:
        others = [name for name in protocol_names() if load_protocol(name).finetune is not None]
        raise ManifestError(
            f"protocol {protocol.id} is for zero-shot alone; those with fine-tuning are "
            f"{', '.join(others)}; or name --finding in its place"
        )
    return protocol.finetune


NO_PATHOLOGY = (NO_FINDING, "support devices", "pacemaker", "catheter")
"""What an image without a finding may show: CheXpert's "No Finding" stands beside devices.
Source: Irvin et al. 2019, section 2."""


_TRAINS_AS = {"positive": 1.0, "negative": 0.0, "multiclass": float(UNCERTAIN)}


def multiclass_columns(protocol: Protocol) -> tuple[int, ...]:
    """The findings, by their place, whose uncertain labels are a class of its own."""
    rules = rules_of(protocol)
    return tuple(
        k
        for k, finding in enumerate(protocol.findings)
        if rules.uncertain_of.get(finding, rules.uncertain) == "multiclass"
    )


def training_labels(protocol: Protocol, samples: Sequence[Sample]) -> Float[np.ndarray, "n k"]:
    """Labels to learn from: those of the protocol, uncertain and blank ones as it says.

    An image without a finding has no pathology, whatever else its labels leave blank. A blank is
    read as the protocol says where the image has any label.

    Returns:
        1 present, 0 absent, NaN unknown; -1 uncertain, of `multiclass_columns` alone.
    """
    labels = protocol_labels(protocol, samples)
    rules = rules_of(protocol)
    if not protocol.own_words:
        for row, sample in zip(labels, samples, strict=True):
            is_normal = sample.labels.get(NO_FINDING) == PRESENT
            for k, finding in enumerate(protocol.findings):
                is_ruled_out = is_normal and finding not in NO_PATHOLOGY
                is_blank_absent = rules.blank == "absent" and bool(sample.labels)
                if finding not in sample.labels and (is_ruled_out or is_blank_absent):
                    row[k] = 0.0
    for k, finding in enumerate(protocol.findings):
        policy = rules.uncertain_of.get(finding, rules.uncertain)
        if policy == "ignore" or protocol.own_words:
            continue
        is_uncertain = [sample.labels.get(finding) == UNCERTAIN for sample in samples]
        labels[is_uncertain, k] = _TRAINS_AS[policy]
    return labels


def open_task(
    folder: Path, protocol: Protocol, image_size: int | None, resize: ResizeMode | None = None
) -> Task:
    """The images of a data folder as a protocol reads them, see `task_of`."""
    return task_of(folder, protocol, open_dataset([folder], image_size, resize=resize))


def task_of(folder: Path, protocol: Protocol, dataset: ImageTextDataset) -> Task:
    """The images of an opened data folder as a protocol reads them.

    Raises:
        ManifestError: When no training image is labelled with a finding, a split has no labelled
            image, or a patient or image of train is in another split.
        ValueError: When the folder does not fit the protocol.
    """
    split = split_of([folder], protocol)
    if not any(sample.split == "val" for sample in dataset.samples):
        raise ManifestError(
            f"{folder} has no validation images, and nothing else may choose; draw some from the "
            f"training patients by `mmclip data split {folder} --name official` (or clean), or "
            f"name a list by --list val=FILE"
        )
    sources = protocol.sources_of("train")
    candidates = dataset.select(
        [
            sample.split == "train"
            and sample.image is not None
            and sample.view in FRONTAL
            and (not sources or sample.source in sources)
            for sample in dataset.samples
        ]
    )
    labels = training_labels(protocol, candidates.samples)
    train = LabelledImages(candidates, protocol.findings, labels)
    train = train.select([not np.isnan(row).all() for row in train.labels])

    named = {finding for sample in candidates.samples for finding in sample.labels}
    if missing := [
        finding
        for finding, column in zip(protocol.findings, train.labels.T, strict=True)
        if np.isnan(column).all() or not (protocol.own_words or finding in named)
    ]:
        there = sorted(named)
        raise ManifestError(
            f"no frontal training image of {folder}, source {', '.join(sources) or 'any'}, is "
            f"labelled with {', '.join(missing)}; the {len(candidates)} that there are have the "
            f"labels {', '.join(there) or '(none)'}, and the data has the sources "
            f"{', '.join(sources_in(dataset.samples))}"
        )

    val = Selection("val", protocol=protocol).select(dataset)
    test = Selection("test", protocol=protocol).select(dataset)
    task = Task(protocol, train, val, test, split)
    refuse_leaks(task.dataset.samples)
    return task


def training_ids(folder: Path, fraction: float, seed: int) -> set[str]:
    """The image ids of a fraction of the training patients.

    Those that `mmclip data split` saved; a folder with its built split, which has none, gets what
    would be saved.

    Raises:
        ManifestError: When no such subset is saved, with the command that saves it.
    """
    percent = round(100 * fraction)
    if percent not in PERCENTS or abs(percent - 100 * fraction) > 1e-9:
        raise ManifestError(
            f"a fraction of {fraction:g} is not saved with splits; take "
            f"{', '.join(f'{p / 100:g}' for p in reversed(PERCENTS))}"
        )
    split = read_split(folder)
    if split is None or percent == 100:
        train = [sample for sample in read_manifest(folder) if sample.split == "train"]
        ids = None if percent == 100 else subsets_of(train, seed)[str(percent)]["image_ids"]
        return {sample.image_id for sample in train} if ids is None else set(ids)
    if str(seed) not in split["subsets"]:
        saved = ", ".join(split["subsets"]) or "none"
        again = " ".join(f"--subset-seed {s}" for s in dict.fromkeys([*split["subsets"], seed]))
        raise ManifestError(
            f"{folder} has no subset of {percent} % with seed {seed} (saved seeds: {saved}); save "
            f"it by `mmclip data split {folder} --name {split['name']} {again}`, with the other "
            f"options that set the split"
        )
    return read_subset(folder, percent, seed)
