"""Which images are scored, for which findings, by which rules, and what they are labelled with."""

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.leakage.check import content_key
from mmclip.data.leakage.splits import ids_hash
from mmclip.data.readers.vocabulary import is_unfinished
from mmclip.data.sample import ABSENT, LABEL_MAKERS, PRESENT, Sample, Split
from mmclip.evaluation.protocols import BUILT, MIN_COUNT, Protocol
from mmclip.evaluation.thresholds import ThresholdRule


@dataclass(frozen=True)
class LabelledImages:
    """Images of data folders, and what they are labelled with."""

    dataset: ImageTextDataset
    findings: tuple[str, ...]  # of the columns
    labels: Float[np.ndarray, "n k"]  # 1, 0 or NaN for unknown; -1 trains as a class of its own

    def __len__(self) -> int:
        return len(self.dataset)

    def select(self, keep: Sequence[bool] | np.ndarray) -> "LabelledImages":
        """The images where `keep` is True."""
        kept = self.labels[np.asarray(keep, bool)]
        return LabelledImages(self.dataset.select(keep), self.findings, kept)


@dataclass(frozen=True)
class Selection:
    """Which images are scored, for which findings, by which rules.

    Attributes:
        split: Which images; thresholds come from "val" of the same sources unless that is it.
        sources: Only these, when named.
        findings: In this order; by default all that the images are labelled with.
        protocol: Images, findings and rules; then `sources` and `findings` are its own.
    """

    split: Split = "test"
    sources: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    protocol: Protocol | None = None

    @property
    def min_count(self) -> int:
        """See `compute_metrics.metrics_by_finding`."""
        return MIN_COUNT if self.protocol is None else self.protocol.min_count

    @property
    def rule(self) -> ThresholdRule:
        """What a threshold does best on validation images."""
        return "f1" if self.protocol is None else self.protocol.threshold

    def said(self) -> str:
        """Split and sources, in words."""
        return f"split {self.split}" + (f" of {', '.join(self.sources)}" if self.sources else "")

    def select(self, dataset: ImageTextDataset) -> LabelledImages:
        """The labelled frontal images of the split, with the findings that they are scored for.

        Raises:
            ManifestError: When there is none, see `select_samples`, or a finding is labelled in
                none.
        """
        images = select_samples(dataset, self.split, self.sources, self.protocol)
        return self._labelled(images, self._names(images))

    def select_val(
        self, dataset: ImageTextDataset, findings: Sequence[str]
    ) -> LabelledImages | None:
        """The validation images that choose thresholds for some findings.

        Returns:
            None where the sources have none, or they are what is scored.
        """
        if self.split == "val":
            return None
        try:
            images = select_samples(dataset, "val", self.sources, self.protocol)
        except ManifestError:
            return None
        return self._labelled(images, findings)

    def _names(self, images: ImageTextDataset) -> Sequence[str]:
        if self.protocol is not None:
            return self.protocol.findings
        there = sorted({finding for sample in images.samples for finding in sample.labels})
        if missing := [f for f in self.findings if f not in there]:
            asked = " ".join(f"--finding {shlex.quote(name)}" for name in self.findings)
            raise ManifestError(
                f"no image is labelled with {', '.join(missing)}; these images are labelled with "
                f"{', '.join(there)}. To score images without labels: `mmclip predict --model RUN "
                f"DATA {asked} --out predictions.csv`"
            )
        return self.findings or there

    def _labelled(self, images: ImageTextDataset, findings: Sequence[str]) -> LabelledImages:
        labels = (
            images.labels(findings)
            if self.protocol is None
            else protocol_labels(self.protocol, images.samples)
        )
        return LabelledImages(images, tuple(findings), labels)


def sources_in(samples: Iterable[Sample]) -> list[str]:
    """The names of the data sets that images are of, each once, in order."""
    return sorted({sample.source for sample in samples})


def protocol_labels(protocol: Protocol, samples: Sequence[Sample]) -> Float[np.ndarray, "n k"]:
    """What images are labelled with, as a protocol reads it: 1, 0, or NaN for unknown and
    uncertain.

    Where the protocol has `own_words`, a finding is present in an image with the word, and absent
    in one that has words, none of which is `unfinished` but for what `closed_by` says.
    """
    known = {PRESENT: 1.0, ABSENT: 0.0}
    if not protocol.own_words:
        rows = [
            [known.get(f.labels.get(name, -1), np.nan) for name in protocol.findings]
            for f in samples
        ]
        return np.array(rows, float).reshape(len(samples), len(protocol.findings))
    asked = [
        {word.lower() for word in protocol.words.get(name, (name,))} for name in protocol.findings
    ]
    unfinished = {word.lower() for word in protocol.unfinished}
    closed_by = {
        word.lower(): {other.lower() for other in others}
        for word, others in protocol.closed_by.items()
    }
    labels = np.full((len(samples), len(protocol.findings)), np.nan)
    for row, sample in zip(labels, samples, strict=True):
        words = {word.lower() for word in sample.source_labels}
        words |= {word.split("/")[0].strip() for word in words}
        if words and not is_unfinished(words, unfinished, closed_by):
            row[:] = 0.0
        row[[bool(words & of_finding) for of_finding in asked]] = 1.0
    return labels


FRONTAL = ("PA", "AP", "unknown")
"""The views that are scored; a lateral image shows other things under the same name."""


def check_sources(dataset: ImageTextDataset, sources: Sequence[str]) -> None:
    """Refuses a source that the data does not have, and names those that it has."""
    known = sources_in(dataset.samples)
    if unknown := sorted(set(sources) - set(known)):
        raise ManifestError(
            f"there is no source {', '.join(unknown)} in this data; there are {', '.join(known)}"
        )


def select_samples(
    dataset: ImageTextDataset,
    split: Split,
    sources: Sequence[str] = (),
    protocol: Protocol | None = None,
) -> ImageTextDataset:
    """The labelled frontal images of a split.

    Args:
        dataset: Of data folders.
        split: Train, val or test.
        sources: Only these, where some are named.
        protocol: In place of `sources`, and to say what counts as labelled.

    Raises:
        ManifestError: When no image is left; it says what the folder holds. When the protocol
            needs to tell laterals, and no image is known as one.
    """
    if protocol is not None:
        sources = protocol.sources_of(split)
        blind = folders_without_laterals(dataset)
        if protocol.needs_laterals and blind:
            which = ", ".join(f"folder {k + 1} ({said})" for k, said in blind.items())
            raise ManifestError(
                f"no image of this data is known as a lateral in {which}, and protocol "
                f"{protocol.id} scores frontal images alone; add the table of views that the "
                f"reader takes (docs/data.md), and build the folder again"
            )
    check_sources(dataset, sources)
    is_labelled = (
        [bool(sample.labels) for sample in dataset.samples]
        if protocol is None
        else [not np.isnan(row).all() for row in protocol_labels(protocol, dataset.samples)]
    )
    kept = dataset.select(
        [
            sample.split == split
            and sample.image is not None
            and has_labels
            and sample.view in FRONTAL
            and (not sources or sample.source in sources)
            for sample, has_labels in zip(dataset.samples, is_labelled, strict=True)
        ]
    )
    if not len(kept):
        splits = sorted({str(f.split) for f in dataset.samples})
        known_sources = sources_in(dataset.samples)
        raise ManifestError(
            f"no labelled frontal image in split {split!r} of source "
            f"{', '.join(sources) or 'any'}; the data has the splits {', '.join(splits)} and the "
            f"sources {', '.join(known_sources)}. Images without labels are scored by `mmclip "
            f"predict`"
        )
    return kept


def folders_without_laterals(dataset: ImageTextDataset) -> dict[int, str]:
    """The data folders that know no lateral, by number, with their sources.

    Laterals pass for frontal images there.
    """
    found = {}
    for k in np.unique(dataset.where[:, 0]).tolist():
        samples = [f for f, at in zip(dataset.samples, dataset.where[:, 0], strict=True) if at == k]
        if all(sample.view != "L" for sample in samples):
            found[k] = ", ".join(sources_in(samples))
    return found


def label_makers(dataset: ImageTextDataset) -> str:
    """Who labelled the images, for results; with the number of each where they are several."""
    counts = Counter(LABEL_MAKERS[sample.label_origin] for sample in dataset.samples)
    if len(counts) <= 1:
        return "".join(counts)
    return ", ".join(f"{who} ({n:,})" for who, n in counts.most_common())


def unknown_views(dataset: ImageTextDataset) -> str:
    """How many images of each data folder have no known view, for results; "none" where all have.

    They count as frontal, so laterals may be among them.
    """
    said = []
    for k in np.unique(dataset.where[:, 0]).tolist():
        samples = [f for f, at in zip(dataset.samples, dataset.where[:, 0], strict=True) if at == k]
        n = sum(sample.view == "unknown" for sample in samples)
        if n:
            sources = ", ".join(sources_in(samples))
            said.append(f"{n:,} of {len(samples):,} of folder {k + 1} ({sources})")
    return "; ".join(said) or "none"


def split_of(folders: Sequence[Path], protocol: Protocol | None = None) -> str:
    """The split of data folders by name and hash, checked against a protocol.

    Raises:
        ValueError: When a folder is of another source or split than the protocol is for.
    """
    said = []
    for folder in folders:
        meta = read_meta(folder)
        split = meta.get("split", {"name": BUILT, "split_hash": ""})
        if protocol is not None:
            protocol.check_folder(meta.get("reader", "unknown"), split["name"], str(folder))
        said.append(f"{split['name']} {split['split_hash'][:16]}".strip())
    return ", ".join(dict.fromkeys(said))


def images_hash(samples: Sequence[Sample]) -> str:
    """SHA-256 over the ids of some images and the bytes of their files, in any order.

    It is equal for one test set in two data folders: one of another image size, one with other
    training rows.
    """
    return ids_hash([f"{sample.image_id} {content_key(sample)}" for sample in samples])
