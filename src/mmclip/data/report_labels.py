"""Labels derived from reports, as CheXpert's labeler makes them, and their check against people's.

A finding that a report mentions is present where one mention says so, else uncertain where one
does, else absent. A finding that it does not mention is unknown, unless it is absent because the
report calls its place normal ("heart size is normal").
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from mmclip.config_io import Frozen, parse, read_toml
from mmclip.data.entities import find_entities
from mmclip.data.folder import (
    SPLIT_FILE,
    ManifestError,
    read_built_meta,
    read_split,
)
from mmclip.data.ingest.csv_rows import SourceError, read_rows
from mmclip.data.lexicon import lexicon_of
from mmclip.data.manifest import read_built, replace_images
from mmclip.data.sample import ABSENT, PRESENT, UNCERTAIN, Entity, Sample

NO_FINDING = "no finding"

UncertainAs = Literal["uncertain", "present", "absent", "unknown"]
"""What an uncertain mention makes of a label; "unknown" leaves the finding out."""

Task = Literal["mention", "negated", "uncertain"]

_LABEL_OF = {"present": PRESENT, "uncertain": UNCERTAIN, "negated": ABSENT}
_DENIED = {"present": ("negated",), "uncertain": ("uncertain",), "negated": ()}
"""What a finding is where a report calls its place normal, doubts that, or denies it."""


class LabelRules(Frozen):
    """Which findings are labelled from which concepts of the lexicon.

    Attributes:
        no_finding_but: Findings that "no finding" does not speak of, such as support devices.
        findings: Finding of the vocabulary -> concepts of the lexicon.
        normal: Finding -> forms, as in the lexicon's files, of statements that deny it without
            naming it ("heart size is normal").
    """

    id: str
    version: int = Field(ge=1)
    description: str
    no_finding_but: tuple[str, ...] = ()
    findings: dict[str, tuple[str, ...]] = Field(min_length=1)
    normal: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _knows_what_is_normal(self) -> "LabelRules":
        if unknown := self.normal.keys() - self.findings.keys():
            raise ValueError(f"normal names {sorted(unknown)}, which are not under findings")
        lexicon_of(self.normal)
        return self

    def labels(
        self,
        entities: Iterable[Entity],
        normal: Iterable[Entity] = (),
        uncertain_as: UncertainAs = "uncertain",
    ) -> dict[str, int]:
        """The known findings of one report, in the order of their names.

        Args:
            entities: Of the whole report.
            normal: Statements of `normal` in it, by lexicons of their forms.
            uncertain_as: How a finding counts whose surest mention is uncertain.
        """
        said: dict[str, set[str]] = {}
        for entity in entities:
            if entity.kind == "finding":
                said.setdefault(entity.concept, set()).add(entity.status)
        denied: dict[str, set[str]] = {}
        for entity in normal:
            denied.setdefault(entity.concept, set()).update(_DENIED[entity.status])
        labels: dict[str, int] = {}
        for finding, concepts in self.findings.items():
            statuses = set[str]().union(*(said.get(concept, ()) for concept in concepts))
            statuses |= denied.get(finding, set())
            for status, label in _LABEL_OF.items():  # the surest first
                if status in statuses:
                    labels[finding] = label
                    break
        is_normal = all(
            label == ABSENT for f, label in labels.items() if f not in self.no_finding_but
        )
        labels[NO_FINDING] = PRESENT if is_normal else ABSENT
        counted: dict[UncertainAs, int | None] = {
            "uncertain": UNCERTAIN, "present": PRESENT, "absent": ABSENT, "unknown": None,
        }  # fmt: skip
        as_said = {
            f: counted[uncertain_as] if label == UNCERTAIN else label for f, label in labels.items()
        }
        return {f: label for f, label in sorted(as_said.items()) if label is not None}


def read_label_rules(name_or_path: str | Path) -> LabelRules:
    """The rules of a file of the package ("chexpert"), or of any TOML file.

    Raises:
        ConfigError: When there is no such file, or a key of it is wrong.
    """
    values = read_toml("list of label rules", "report_labels", name_or_path)
    return parse(LabelRules, values, str(name_or_path))


class Derived(NamedTuple):
    """What `label_folder` did.

    Attributes:
        samples: As they are now.
        n_labelled: Images whose labels were derived.
        n_kept: Images that keep labels which others made.
        n_without_report: Images without a report and without labels.
        counts: Finding -> how many of the derived labels have each value.
        data_hash: Of the folder as it is now.
    """

    samples: list[Sample]
    n_labelled: int
    n_kept: int
    n_without_report: int
    counts: dict[str, Counter[int]]
    data_hash: str


def derive_labels(
    samples: Sequence[Sample], rules: LabelRules, uncertain_as: UncertainAs = "uncertain"
) -> list[dict[str, int]]:
    """The labels that the reports of some images give, whoever labelled them; none without one."""
    reports = list(dict.fromkeys(sample.report for sample in samples if sample.report is not None))
    lexicons = [lexicon_of({name: forms}) for name, forms in rules.normal.items()]
    found = {
        report: rules.labels(
            entities, (e for lexicon in lexicons for e in lexicon.find(report)), uncertain_as
        )
        for report, entities in zip(reports, find_entities(reports), strict=True)
    }
    return [{} if sample.report is None else found[sample.report] for sample in samples]


def label_folder(
    folder: Path, rules: LabelRules, uncertain_as: UncertainAs = "uncertain"
) -> Derived:
    """Gives every image with a report and without labels the labels that its report gives.

    Labels that others made stay; those that this derived before are derived anew. The folder gets
    a new data hash, as other labels are other data.

    Raises:
        ManifestError: When the folder is unfinished, has a named split, or no image can be
            labelled.
    """
    meta = read_built_meta(folder)
    if read_split(folder) is not None:
        raise ManifestError(
            f"{folder / SPLIT_FILE} names a split of the folder as it is; remove it, run this "
            f"again, and set it again with `mmclip data split`"
        )
    built = read_built(folder)
    ours = set(meta.get("report_labels", {}).get("image_ids", ()))
    is_free = [not sample.labels or sample.image_id in ours for sample in built]
    samples, counts = [], {name: Counter[int]() for name in (*rules.findings, NO_FINDING)}
    labelled: list[str] = []
    for sample, free, labels in zip(
        built, is_free, derive_labels(built, rules, uncertain_as), strict=True
    ):
        if free and labels:
            labelled.append(sample.image_id)
            for finding, label in labels.items():
                counts[finding][label] += 1
            sample = replace(sample, labels=labels, source_labels=(), label_origin="report-program")
        elif free:
            sample = replace(sample, labels={}, source_labels=(), label_origin=None)
        samples.append(sample)
    if not labelled:
        raise ManifestError(
            f"no image of {folder} can be labelled: {sum(not free for free in is_free)} of "
            f"{len(built)} have labels, and the others no report; build the folder with reports"
        )
    metadata = {"rules": f"{rules.id}/{rules.version}", "uncertain_as": uncertain_as}
    meta = replace_images(folder, samples, {"report_labels": {**metadata, "image_ids": labelled}})
    n_kept = sum(not free for free in is_free)
    n_bare = len(built) - n_kept - len(labelled)
    return Derived(samples, len(labelled), n_kept, n_bare, counts, meta["data_hash"])


# -- against labels that people made --


class Agreement(NamedTuple):
    """How derived labels agree with a gold table for one finding and task, over its reports."""

    n_gold: int
    n_found: int
    n_both: int

    @property
    def precision(self) -> float | None:
        """None where nothing was found."""
        return self.n_both / self.n_found if self.n_found else None

    @property
    def recall(self) -> float | None:
        """None where the gold table has none."""
        return self.n_both / self.n_gold if self.n_gold else None

    @property
    def f1(self) -> float | None:
        """None where there is neither."""
        n = self.n_gold + self.n_found
        return 2 * self.n_both / n if n else None


@dataclass(frozen=True)
class Check:
    """Agreement by task, and within it by finding; "micro" sums the findings up.

    Attributes:
        n_rows: Rows of the gold table that were compared.
        n_not_here: Rows whose image the folder does not have, or has without a report.
        findings: Columns of the table that were compared.
        ignored: Columns that name no finding of the rules.
    """

    n_rows: int
    n_not_here: int
    findings: tuple[str, ...]
    ignored: tuple[str, ...]
    agreement: Mapping[Task, Mapping[str, Agreement]]


_IS: dict[Task, frozenset[int]] = {
    "mention": frozenset((PRESENT, ABSENT, UNCERTAIN)),
    "negated": frozenset((ABSENT,)),
    "uncertain": frozenset((UNCERTAIN,)),
}


def check_labels(folder: Path, rules: LabelRules, gold: Path) -> Check:
    """Compares what the reports of a folder give with a table of labels that people made.

    Args:
        gold: CSV with image_id, and a column a finding ("pleural effusion" or "Pleural Effusion")
            with 1 (present), 0 (absent), -1 (uncertain) or blank (not mentioned).

    Raises:
        ManifestError: When the folder is unfinished.
        SourceError: When the table cannot be read, has no column of a finding, a value is none of
            these, or none of its images is in the folder.
    """
    if not gold.is_file():
        raise SourceError(f"--check {gold}: there is no such file; give a CSV table with image_id")
    samples = [sample for sample in read_built(folder) if sample.report is not None]
    derived = dict(
        zip((sample.image_id for sample in samples), derive_labels(samples, rules), strict=True)
    )
    columns: dict[str, str] = {}
    ignored: list[str] = []
    rows, n_not_here = [], 0
    for number, (cells, problem) in enumerate(read_rows(gold, ("image_id",))):
        if problem:
            raise SourceError(f"{gold}, row {number}: {problem}; mend the row")
        if not number:
            for name in cells.keys() - {"image_id"}:
                finding = " ".join(name.lower().split())
                if finding in rules.findings:
                    columns[name] = finding
                else:
                    ignored.append(name)
        if cells["image_id"] not in derived:
            n_not_here += 1
            continue
        values = {f: _gold_value(gold, number, name, cells[name]) for name, f in columns.items()}
        rows.append((values, derived[cells["image_id"]]))
    if not columns or not rows:
        why = "none of its image_id is in the folder" if columns else "no column names a finding"
        raise SourceError(
            f"{gold} cannot be compared: {why}; columns may be image_id, "
            f"{', '.join(rules.findings)}"
        )
    findings = tuple(sorted(columns.values()))
    return Check(
        len(rows), n_not_here, findings, tuple(sorted(ignored)), _agreement(rows, findings)
    )


def _gold_value(gold: Path, number: int, name: str, cell: str) -> int | None:
    """A cell of the gold table; None for a finding that is not mentioned."""
    known = {"": None, "1": PRESENT, "0": ABSENT, "-1": UNCERTAIN}
    value = cell.removesuffix(".0")
    if value not in known:
        raise SourceError(
            f"{gold}, row {number}: {name} is {cell!r}; write 1 (present), 0 (absent), -1 "
            f"(uncertain), or nothing (not mentioned)"
        )
    return known[value]


def _agreement(
    rows: Sequence[tuple[Mapping[str, int | None], Mapping[str, int]]], findings: Sequence[str]
) -> dict[Task, dict[str, Agreement]]:
    agreement: dict[Task, dict[str, Agreement]] = {}
    for task in get_args(Task):
        of_finding = {}
        for finding in findings:
            pairs = [
                (gold.get(finding) in _IS[task], found.get(finding) in _IS[task])
                for gold, found in rows
            ]
            n_gold, n_found = (sum(side) for side in zip(*pairs, strict=True))
            of_finding[finding] = Agreement(n_gold, n_found, pairs.count((True, True)))
        micro = Agreement(*(sum(column) for column in zip(*of_finding.values(), strict=True)))
        agreement[task] = {**of_finding, "micro": micro}
    return agreement
