"""Raw scores of images for findings, with what is known of the images: what evaluations judge.

They lie in scores.npz beside each results.json, so that any metric can be computed again, and two
runs be compared image by image.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.leakage.check import content_key, patient_key
from mmclip.data.leakage.splits import ids_hash
from mmclip.data.readers.vocabulary import is_unfinished
from mmclip.data.sample import ABSENT, LABEL_MAKERS, PRESENT, Sample, Split
from mmclip.evaluation.protocols import BUILT, Protocol

SCORES_FILE = "scores.npz"


class ScoresError(ValueError):
    """A file of scores is missing, damaged, or of other images; the message names the next step."""


@dataclass(frozen=True)
class Predictions:
    """Images, what they are labelled with, and what a model says of them; one row per image."""

    image_id: np.ndarray
    patient_id: np.ndarray  # with the source, see `check.patient_key`: "1" of two is two people
    sex: np.ndarray  # F, M or "" for unknown
    age_years: Float[np.ndarray, " n"]  # NaN for unknown
    view: np.ndarray
    findings: np.ndarray  # names of the columns
    labels: Float[np.ndarray, "n k"]  # 1, 0 or NaN
    scores: Float[np.ndarray, "n k"]  # higher for present

    def __len__(self) -> int:
        return len(self.image_id)

    def names(self) -> list[str]:
        """The findings, as plain strings."""
        return [str(name) for name in self.findings]

    def patients(self) -> list[str]:
        """The patient of each image, as plain strings."""
        return [str(patient) for patient in self.patient_id]

    def arrays(self) -> dict[str, Any]:
        """All fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def where(self, keep: np.ndarray) -> "Predictions":
        """The images where `keep` is True."""
        of_images = {
            f.name: getattr(self, f.name)[keep] for f in fields(self) if f.name != "findings"
        }
        return replace(self, **of_images)

    def in_order(self, names: Sequence[str]) -> "Predictions":
        """With the columns in the order of some names; as it is where it has others."""
        if sorted(names) != sorted(self.names()):
            return self
        columns = [self.names().index(name) for name in names]
        return replace(
            self,
            findings=self.findings[columns],
            labels=self.labels[:, columns],
            scores=self.scores[:, columns],
        )

    def save(self, path: Path, **further: Any) -> None:
        """Writes an .npz file of all fields, and of more arrays by name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path, **{f.name: getattr(self, f.name) for f in fields(self)}, **further
        )


def make_predictions(
    dataset: ImageTextDataset,
    findings: Sequence[str],
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
) -> Predictions:
    """The scores of the rows of a data folder."""
    samples = dataset.samples
    return Predictions(
        image_id=np.array([sample.image_id for sample in samples], str),
        patient_id=np.array([patient_key(sample) for sample in samples], str),
        sex=np.array([sample.sex or "" for sample in samples], str),
        age_years=np.array(
            [np.nan if sample.age_years is None else sample.age_years for sample in samples], float
        ),
        view=np.array([sample.view for sample in samples], str),
        findings=np.array(list(findings), str),
        labels=labels,
        scores=scores,
    )


def images_hash(samples: Sequence[Sample]) -> str:
    """SHA-256 over the ids of some images and the bytes of their files, in any order.

    It is equal for one test set in two data folders: one of another image size, one with other
    training rows.
    """
    return ids_hash([f"{sample.image_id} {content_key(sample)}" for sample in samples])


def load_scores(path: Path, part: Literal["test", "val"] = "test") -> Predictions:
    """Reads scores.npz.

    Args:
        path: Of the file.
        part: The images that were scored, or those that chose thresholds.

    Raises:
        ScoresError: When it is missing, has no such part, or is no file of this version.
    """
    head = "" if part == "test" else "val_"
    try:
        with np.load(path, allow_pickle=False) as stored:
            if part == "val" and "val_scores" not in stored:
                raise ScoresError(
                    f"{path} holds no scores of validation images; score a data folder that has a "
                    f"val split with labels"
                )
            return Predictions(**{f.name: stored[head + f.name] for f in fields(Predictions)})
    except ScoresError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ScoresError(
            f"{path} is missing, damaged or of an older version ({error}); run the command that "
            f"made these results again"
        ) from None


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
    known = sorted({sample.source for sample in dataset.samples})
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
        known_sources = sorted({sample.source for sample in dataset.samples})
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
            found[k] = ", ".join(sorted({sample.source for sample in samples}))
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
            sources = ", ".join(sorted({sample.source for sample in samples}))
            said.append(f"{n:,} of {len(samples):,} of folder {k + 1} ({sources})")
    return "; ".join(said) or "none"


def findings_of(dataset: ImageTextDataset) -> list[str]:
    """All findings that some row is labelled with, in alphabetical order."""
    return sorted({finding for sample in dataset.samples for finding in sample.labels})


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


def read_scores_csv(path: Path, findings: Sequence[str]) -> dict[str, list[float]]:
    """Scores of any model from a CSV, by image: a column image_id, and one for each finding.

    Args:
        path: The file.
        findings: The columns that are read, in order.

    Raises:
        ScoresError: When it is no CSV in UTF-8, a column is missing or named twice, an image occurs
            twice, or a score is no finite number.
    """
    found: dict[str, list[float]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or ())
            _check_header(path, header, ("image_id", *findings))
            for number, row in enumerate(reader, start=2):
                if row["image_id"] in found:
                    raise ScoresError(
                        f"{path}, line {number}: image {row['image_id']!r} occurs twice"
                    )
                found[row["image_id"]] = [_number(path, number, row, name) for name in findings]
    except OSError as error:
        raise ScoresError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ScoresError(
            f"{path} is no CSV in UTF-8 ({error}); write it as such, with commas between columns"
        ) from None
    return found


def scores_of_images(
    path: Path, found: Mapping[str, Sequence[float]], image_ids: Sequence[str]
) -> Float[np.ndarray, "n k"]:
    """Some images' rows of `read_scores_csv`, in their order; others in the file are left alone.

    Raises:
        ScoresError: When the file has no score of an image.
    """
    if missing := [name for name in image_ids if name not in found]:
        raise ScoresError(
            f"{path} has no score of {len(missing)} of the {len(image_ids)} images, such as "
            f"{', '.join(missing[:3])}; every image of the protocol needs one"
        )
    return np.array([found[name] for name in image_ids], float).reshape(len(image_ids), -1)


def _check_header(path: Path, header: Sequence[str], needed: Sequence[str]) -> None:
    """Refuses a table that lacks a column, or names one twice."""
    other = next((sep for sep in (";", "\t") if len(header) == 1 and sep in header[0]), None)
    if other is not None:
        raise ScoresError(
            f"{path} has {other!r} between its columns; write it with commas, and with points in "
            f"decimals"
        )
    if missing := [name for name in needed if name not in header]:
        raise ScoresError(
            f"{path} lacks the columns {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, header)) or 'none'}"
        )
    if twice := [name for name in needed if header.count(name) > 1]:
        raise ScoresError(f"{path} names column {twice[0]!r} twice; leave one of them out")


def _number(path: Path, line: int, row: Mapping[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value):
        raise ScoresError(
            f"{path}, line {line}: the score of {name!r} is {row[name]!r}, no finite number"
        )
    return value
