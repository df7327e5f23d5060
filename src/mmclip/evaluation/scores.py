"""Raw scores of images for findings, with what is known of the images: what evaluations measure.

They lie in scores.npz beside each results.json, so that any metric can be computed again, and two
runs be compared image by image.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mmclip.data.ingest.csv_rows import what_it_has
from mmclip.data.leakage.check import patient_key
from mmclip.evaluation.selection import LabelledImages

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


def make_predictions(images: LabelledImages, scores: Float[np.ndarray, "n k"]) -> Predictions:
    """What a model says of labelled images, a row an image and a column a finding."""
    samples = images.dataset.samples
    return Predictions(
        image_id=np.array([sample.image_id for sample in samples], str),
        patient_id=np.array([patient_key(sample) for sample in samples], str),
        sex=np.array([sample.sex or "" for sample in samples], str),
        age_years=np.array(
            [np.nan if sample.age_years is None else sample.age_years for sample in samples], float
        ),
        view=np.array([sample.view for sample in samples], str),
        findings=np.array(images.findings, str),
        labels=images.labels,
        scores=scores,
    )


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
            f"{path} lacks the columns {', '.join(map(repr, missing))}; "
            f"{what_it_has(header, needed)}"
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
