"""The record of an image: what is known of it, the rules that a sound one keeps, and its split."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, NamedTuple, get_args

Split = Literal["train", "val", "test"]
View = Literal["PA", "AP", "L", "unknown"]
Sex = Literal["F", "M"]
LabelOrigin = Literal["image-reader", "report-reader", "report-program", "diagnosis"]
"""Who made an image's labels: people who read the image, people who read its report, a program that
read its report, or the patient's diagnosis by tests and records, whatever the image shows."""

LABEL_MAKERS: dict[LabelOrigin | None, str] = {
    "image-reader": "people who read the images",
    "report-reader": "people who read the reports",
    "report-program": "a program that read the reports",
    "diagnosis": "the patients' diagnoses, not a reading of the images",
    None: "the source does not say",
}
"""Who made labels, in words."""

BY_PEOPLE: tuple[LabelOrigin, ...] = ("image-reader", "report-reader")

PRESENT, ABSENT, UNCERTAIN = 1, 0, -1
"""Values of a label. A finding that nobody looked for is unknown: it is not in the mapping."""

SPLITS: tuple[Split, ...] = ("train", "val", "test")
"""In order: an image or patient that a list puts into several is read as in the last of them."""


class Reason(StrEnum):
    """Why a row was left out. The text is what a user reads in excluded.jsonl.

    Images of no file have the same reasons: only a path that was given can be "the image file".
    """

    NO_ID = "the row has no image id"
    NO_PATIENT = "the row has no patient id"
    DUPLICATE_ID = "an earlier row has the same image id"
    BAD_VALUE = "a value of the row cannot be read"
    NOTHING_TO_LEARN = "the row has neither an image nor a report"
    NOT_FOR_USE = "the source itself says that the image is not for use"
    PATIENT_IN_TWO_SPLITS = "the patient is also in a split that is kept for evaluation"
    OTHER_MODALITY = "the image is no radiograph"
    OTHER_BODY_PART = "the image shows another part of the body"
    REPORT_WITHOUT_IMAGE = "no image that is read belongs to the report"
    IMAGE_OUTSIDE_ROOT = "the image lies outside the root folder"
    IMAGE_MISSING = "the image file does not exist"
    IMAGE_EMPTY = "the image has 0 bytes"
    IMAGE_UNREADABLE = "the image cannot be read"
    IMAGE_TRUNCATED = "the image ends before its last row"
    IMAGE_TOO_LARGE = "the image has more pixels than allowed"
    IMAGE_BLANK = "all pixels of the image are (nearly) equal"


EntityKind = Literal["finding", "anatomy", "modifier"]
EntityStatus = Literal["present", "negated", "uncertain"]


class Entity(NamedTuple):  # a frozen dataclass takes three times as long to make
    """A mention of a concept: text[start:end] of the report.

    `status` says what the report claims of a finding; anatomy and modifiers are always "present".
    `cue` is the span of the words that deny or doubt it, None for "present". The cue may lie inside
    the entity ("heart is not enlarged").
    """

    start: int
    end: int
    kind: EntityKind
    concept: str
    status: EntityStatus = "present"
    cue: tuple[int, int] | None = None


NOTHING_WORDS = ("normal", "clear", "acute")
"""Concepts of reports that name no finding at all, as "Normal chest." and "No acute disease."."""


def finds_nothing(entities: Sequence[Entity]) -> bool:
    """Whether a report says that nothing was found.

    Each finding that it names is denied, none is doubted; a report that names none says that all is
    normal or clear, or that there is nothing acute.
    """
    findings = [entity.status for entity in entities if entity.kind == "finding"]
    if findings:
        return all(status == "negated" for status in findings)
    return any(entity.concept in NOTHING_WORDS for entity in entities)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image and all that is known of it; a study without an image has `image=None`.

    Images of one study share `study_id` and the report. `labels` maps a finding to PRESENT, ABSENT
    or UNCERTAIN; a finding that is not in it is unknown. `report` is what the text encoder reads:
    cleaned, and None, never "", when there is nothing to read; `entities` are spans of it.
    """

    image_id: str
    study_id: str
    patient_id: str
    source: str
    split: Split | None = None  # None until `assign_splits`
    image: str | None = None  # relative to the root folder, with "/" between parts
    view: View = "unknown"
    findings: str | None = None
    impression: str | None = None
    report: str | None = None
    entities: tuple[Entity, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    source_labels: tuple[str, ...] = ()  # in the source's own words
    label_origin: LabelOrigin | None = None  # None: unknown, or nobody labelled it
    age_years: float | None = None
    sex: Sex | None = None
    width_px: int | None = None  # of the file, before any resizing
    height_px: int | None = None
    image_sha256: str | None = None  # of the file's bytes

    def sure_labels(self) -> dict[str, int]:
        """The findings that are known to be present or absent."""
        return {k: v for k, v in self.labels.items() if v in (PRESENT, ABSENT)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """A row that was left out: which, why, and the detail that helps to mend it."""

    row: int  # 0 is the first record of the source
    image_id: str
    reason: Reason
    detail: str = ""


Record = Sample | Excluded
"""What a reader yields, one for each row of its source: nothing is dropped in silence."""


def problem_of(sample: Sample) -> tuple[Reason, str] | None:
    """The first rule that a record breaks, with a detail, or None for a sound record."""
    if not sample.image_id.strip():
        return Reason.NO_ID, ""
    if not sample.patient_id.strip():
        return Reason.NO_PATIENT, ""
    if sample.image is None and sample.report is None:
        return Reason.NOTHING_TO_LEARN, ""
    if sample.image is not None and "\0" in sample.image:
        return Reason.BAD_VALUE, f"the image path {sample.image!r} holds a NUL byte"
    if sample.split is not None and sample.split not in get_args(Split):
        return Reason.BAD_VALUE, f"split {sample.split!r} is none of {', '.join(get_args(Split))}"
    if sample.view not in get_args(View):
        return Reason.BAD_VALUE, f"view {sample.view!r} is none of {', '.join(get_args(View))}"
    if sample.label_origin is not None and sample.label_origin not in get_args(LabelOrigin):
        known = ", ".join(get_args(LabelOrigin))
        return Reason.BAD_VALUE, f"label origin {sample.label_origin!r} is none of {known}"
    if sample.report is not None and not sample.report.strip():
        return Reason.BAD_VALUE, "the report is empty; an image without a report has report=None"
    bad = {k: v for k, v in sample.labels.items() if v not in (PRESENT, ABSENT, UNCERTAIN)}
    if bad:
        return Reason.BAD_VALUE, f"labels {bad} are not 1 (present), 0 (absent) or -1 (uncertain)"
    return None


def validate(records: Iterable[Record]) -> tuple[list[tuple[int, Sample]], list[Excluded]]:
    """Separates sound records from those that break a rule.

    The rules: an id of its own, a patient, an image or a report, known values, and no patient in
    two splits. Where a source names splits and one patient is in several, the images in the split
    used last (test, then val) stay and the others are excluded, so that nothing leaks.

    Returns:
        The sound images in order, each with its row, and the excluded rows in order. Their
        numbers add up to the number of records.
    """
    samples: list[tuple[int, Sample]] = []
    excluded: list[Excluded] = []
    seen: set[str] = set()
    split_of_patient: dict[str, Split] = {}
    for row, record in enumerate(records):
        if isinstance(record, Excluded):
            excluded.append(record)
            continue
        problem = problem_of(record)
        if problem is None and record.image_id in seen:
            problem = Reason.DUPLICATE_ID, ""
        if problem is not None:
            excluded.append(
                Excluded(row=row, image_id=record.image_id, reason=problem[0], detail=problem[1])
            )
            continue
        seen.add(record.image_id)
        samples.append((row, record))
        if record.split is not None:
            known = split_of_patient.get(record.patient_id, record.split)
            split_of_patient[record.patient_id] = SPLITS[
                max(map(SPLITS.index, (known, record.split)))
            ]
    kept: list[tuple[int, Sample]] = []
    for row, sample in samples:
        split = split_of_patient.get(sample.patient_id)
        if sample.split is not None and sample.split != split:
            detail = f"split {sample.split}, but the patient is also in {split}"
            excluded.append(
                Excluded(
                    row=row,
                    image_id=sample.image_id,
                    reason=Reason.PATIENT_IN_TWO_SPLITS,
                    detail=detail,
                )
            )
        else:
            kept.append((row, sample))
    return kept, sorted(excluded, key=lambda e: e.row)


@dataclass(frozen=True)
class RandomSplit:
    """Patients, or groups of them, put into splits by a hash of each one's name and the seed.

    The split depends on name and seed alone, so adding patients moves no other patient.

    Attributes:
        seed: Another seed gives another split.
        val_ratio: Of the patients, for val.
        test_ratio: Of the patients, for test.
    """

    seed: int = 0
    val_ratio: float = 0.1
    test_ratio: float = 0.1

    def check(self) -> None:
        """Refuses impossible ratios.

        Raises:
            ValueError: When the ratios are negative or leave nothing to train on.
        """
        is_sound = min(self.val_ratio, self.test_ratio) >= 0  # False of not a number
        if not (is_sound and self.val_ratio + self.test_ratio < 1):
            raise ValueError(
                f"val_ratio={self.val_ratio} and test_ratio={self.test_ratio} must not be negative "
                f"and must add up to less than 1"
            )

    def split_of(self, key: str) -> Split:
        """The split of a patient or group.

        Raises:
            ValueError: As for `check`.
        """
        self.check()
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        u = int.from_bytes(digest[:8], "big") / 2**64
        if u < self.test_ratio:
            return "test"
        return "val" if u < self.test_ratio + self.val_ratio else "train"


def assign_splits(samples: Sequence[Sample], how: RandomSplit | None = None) -> list[Sample]:
    """Gives every image without a split that of its patient, or one at random.

    A patient who has a split already (given by the source for another image) keeps it.

    Args:
        samples: Of a build.
        how: Of the patients without a split; None for the defaults.

    Raises:
        ValueError: When the ratios are negative or leave nothing to train on.
    """
    given = {sample.patient_id: sample.split for sample in samples if sample.split is not None}
    split_of = (how or RandomSplit()).split_of
    return [
        sample
        if sample.split is not None
        else replace(sample, split=given.get(sample.patient_id) or split_of(sample.patient_id))
        for sample in samples
    ]
