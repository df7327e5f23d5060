"""CSV tables of films, and the mapping that says what their columns and words mean."""

import difflib
import hashlib
import logging
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Literal, cast, get_args

from pydantic import Field, field_validator, model_validator

from mmclip.config import ConfigError, Frozen, parse
from mmclip.data.records import (
    ABSENT,
    PRESENT,
    UNCERTAIN,
    Excluded,
    Film,
    Reason,
    Record,
    Sex,
    Split,
    View,
)
from mmclip.data.rows import Row, SourceError, read_rows
from mmclip.data.text import Report, make_report, parse_report

logger = logging.getLogger(__name__)

LIKENESS = 0.85
"""A finding as much like another one (`difflib`, 1 is equal) is taken for a misspelling of it.
[chosen: "pleural efusion" and "oedema" are; "rib fracture" is none of "fracture"]"""


class Columns(Frozen):
    """Names of the table's columns. A column that is not named here is not read."""

    patient_id: str
    film_id: str | None = None  # default: the image's
    study_id: str | None = None  # default: see `read_csv`
    image: str | None = None  # path relative to the root folder
    report: str | None = None  # free text with or without headers; or the two sections below
    findings: str | None = None
    impression: str | None = None
    split: str | None = None
    view: str | None = None
    source: str | None = None
    age: str | None = None
    sex: str | None = None
    labels: str | None = None  # label words in one cell; or [labels.columns]

    @model_validator(mode="after")
    def _enough(self) -> "Columns":
        if self.report is not None and (self.findings is not None or self.impression is not None):
            raise ValueError("name either report, or findings and impression")
        if self.film_id is None and self.image is None:
            raise ValueError("name film_id or image: without them a row has no id")
        return self


class Meaning(Frozen):
    """What one label word of a source says of findings."""

    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()

    def labels(self) -> list[tuple[str, int]]:
        """Each finding that it speaks of, and the label."""
        return [
            *((finding, PRESENT) for finding in self.present),
            *((finding, ABSENT) for finding in self.absent),
            *((finding, UNCERTAIN) for finding in self.uncertain),
        ]


class Labels(Frozen):
    """How label cells are read. Finding names are lower-case radiology words.

    Attributes:
        separator: Between the words of a cell.
        unknown: Words such as "todo": the film is not labelled, or not to the end.
        blank: What an empty cell says of the source's findings.
        map: Label word -> what it says. A word that is a finding's name in `closed`, in any case,
            needs no entry.
        closed: Source -> all the findings that its readers looked for: one of them that a labelled
            film does not have is absent; any other finding is unknown. "*" stands for every source
            that is not named.
        columns: Table column -> finding, where each finding has its own column with 1 (present),
            0 (absent) or -1 (uncertain), as in CheXpert.
    """

    separator: str = Field(default="|", min_length=1)
    unknown: tuple[str, ...] = ()
    blank: Literal["unknown", "absent"] = "unknown"
    map: dict[str, Meaning] = Field(default_factory=dict)
    closed: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    columns: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _canonical(self) -> "Labels":
        names = {name for listed in self.closed.values() for name in listed}
        names |= set(self.columns.values())
        for meaning in self.map.values():
            names |= {*meaning.present, *meaning.absent, *meaning.uncertain}
        bad = sorted(name for name in names if name != " ".join(name.lower().split()) or not name)
        if bad:
            raise ValueError(f"finding names are lower case, single-spaced words; {bad} are not")
        return self


class CsvMapping(Frozen):
    """What the columns and words of a CSV table mean."""

    table: str = "studies.csv"  # relative to the root folder
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    source: str = "csv"  # of every row, where no column names it
    columns: Columns
    # The table's word -> ours, in any case. PA, AP, L, lateral, "?" and blank need no entry,
    # nor do the splits train, val, test and blank.
    views: dict[str, View] = Field(default_factory=dict)
    splits: dict[str, Split] = Field(default_factory=dict)
    labels: Labels = Labels()

    @field_validator("views", "splits")
    @classmethod
    def _lower(cls, words: dict[str, str]) -> dict[str, str]:
        return {word.strip().lower(): value for word, value in words.items()}

    @model_validator(mode="after")
    def _one_kind_of_labels(self) -> "CsvMapping":
        if self.columns.labels is not None and self.labels.columns:
            raise ValueError("name either columns.labels or [labels.columns]")
        words = self.labels.map or self.labels.closed or self.labels.unknown
        if words and self.columns.labels is None:
            raise ValueError("labels.map, closed and unknown need a column: name columns.labels")
        return self


def load_mapping(path: Path) -> CsvMapping:
    """Reads a mapping from its TOML file.

    Raises:
        SourceError: When the file cannot be read, or is no TOML.
        ConfigError: When a key is unknown or missing, or a value breaks a rule.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise SourceError(
            f"the mapping {path} cannot be read: {error.strerror}; give the TOML file that says "
            f"what the columns mean by --mapping (docs/data.md shows one)"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SourceError(
            f"the mapping {path} is no valid TOML: {error}; mend that place, or write it anew "
            f"after docs/data.md"
        ) from None
    columns = values.get("columns", {})
    if isinstance(columns, dict) and "patient_id" not in columns:
        lacks = "names no column patient_id in" if columns else "has no section"
        raise ConfigError(
            f"the mapping {path} {lacks} [columns], which says how the table calls what is read: "
            f"patient_id, film_id or image, and more; add such lines as "
            f'patient_id = "the name in the table" (docs/data.md shows them)'
        )
    return parse(CsvMapping, values, f"mapping {path}")


_VIEWS: dict[str, View] = {"": "unknown", "?": "unknown", "unknown": "unknown", "lateral": "L"}
_VIEWS |= {view.lower(): view for view in get_args(View)}
_SEXES: dict[str, Sex] = {"m": "M", "male": "M", "f": "F", "female": "F"}
_BLANKS = {"", "nan", "n/a", "na", "none", "null"}


def read_csv(root: Path, mapping: CsvMapping, table: Path | None = None) -> Iterator[Record]:
    """The rows of a CSV table, one record each.

    Without a study column, films of one patient with one report are a study, and a film without a
    report is a study of its own. A row whose number of fields differs from the header's, or whose
    labels contradict one another, is excluded; blank lines are no rows. Ages over 120 years, and
    ages and sexes that cannot be read, are unknown.

    Args:
        root: Folder that the image paths are relative to.
        table: Read in place of `mapping.table`.

    Raises:
        SourceError: At once, before any record: when the table cannot be read, lacks a column, or
            holds label, view or split words that the mapping does not explain (all are listed);
            or when `labels.closed` lists what looks like a misspelt finding.
    """
    path = root / mapping.table if table is None else table
    if not path.is_file():
        where = (
            f"name it in the mapping (table = ..., below --root; now {mapping.table!r}), or give "
            f"it by --table"
            if table is None
            else "give another one by --table (a path from here, not below --root)"
        )
        raise SourceError(f"there is no table {path}; {where}")
    _check_words(path, mapping)
    return _csv_records(path, mapping)


def _csv_records(path: Path, mapping: CsvMapping) -> Iterator[Record]:
    for row, (cells, problem) in enumerate(_rows(path, mapping)):
        if problem:
            yield Excluded(
                row=row,
                film_id=_film_id(cells, mapping.columns),
                reason=Reason.BAD_VALUE,
                detail=problem,
            )
        else:
            yield _film(row, cells, mapping)


def _film(row: int, cells: Mapping[str, str], mapping: CsvMapping) -> Record:
    columns = mapping.columns
    film_id, patient_id = _film_id(cells, columns), _cell(cells, columns.patient_id)
    source = _cell(cells, columns.source) or mapping.source
    try:
        labels, words = _labels(cells, mapping, source)
    except ValueError as error:
        return Excluded(row=row, film_id=film_id, reason=Reason.BAD_VALUE, detail=str(error))
    if columns.report is not None:
        report = parse_report(_cell(cells, columns.report))
    else:
        report = make_report(_cell(cells, columns.findings), _cell(cells, columns.impression))
    split = _cell(cells, columns.split).lower()
    return Film(
        film_id=film_id,
        study_id=_cell(cells, columns.study_id) or _study_id(film_id, patient_id, report),
        patient_id=patient_id,
        source=source,
        split=mapping.splits.get(split) or (cast(Split, split) if split else None),
        image=_cell(cells, columns.image).replace("\\", "/") or None,
        view=_view(_cell(cells, columns.view), mapping),
        findings=report.findings,
        impression=report.impression,
        report=report.text,
        labels=labels,
        source_labels=words,
        age_years=parse_age(_cell(cells, columns.age)),
        sex=_SEXES.get(_cell(cells, columns.sex).lower()),
    )


def _cell(cells: Mapping[str, str], column: str | None) -> str:
    """A cell without the white space around it; "" where it, or its column, is not there."""
    value = "" if column is None else cells.get(column, "").strip()
    return "" if value.lower() in _BLANKS else value


def _film_id(cells: Mapping[str, str], columns: Columns) -> str:
    return _cell(cells, columns.film_id or columns.image)


def _study_id(film_id: str, patient_id: str, report: Report) -> str:
    if report.text is None:
        return film_id
    return f"{patient_id}/{hashlib.sha256(report.text.encode()).hexdigest()[:12]}"


def _view(word: str, mapping: CsvMapping) -> View:
    return mapping.views.get(word.lower()) or _VIEWS[word.lower()]


def parse_age(text: str) -> float | None:
    """An age in years from "54", "54.0" or DICOM's "063Y", "018M"; None when it is unknown."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([YMWD]?)", text.strip().upper())
    if match is None:
        return None
    age = float(match[1]) / {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}[match[2]]
    return age if age <= 120 else None


def _labels(
    cells: Mapping[str, str], mapping: CsvMapping, source: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The known findings of a row, in the order of their names, and the source's own words.

    Raises:
        ValueError: When a value cannot be read, or the labels contradict one another.
    """
    rules = mapping.labels
    words = _words(_cell(cells, mapping.columns.labels), rules)
    said: dict[str, set[int]] = {}
    for finding, label in _said_by_columns(cells, rules) + _said_by_words(words, rules):
        said.setdefault(finding, set()).add(label)
    is_labelled = bool(words) or rules.blank == "absent"
    if is_labelled and not set(words) & set(rules.unknown):
        for finding in rules.closed.get(source, rules.closed.get("*", ())):
            said.setdefault(finding, {ABSENT})
    torn = sorted(finding for finding, labels in said.items() if len(labels) > 1)
    if torn:
        names = words or [column for column, finding in rules.columns.items() if finding in torn]
        raise ValueError(f"the labels {', '.join(names)} contradict one another on {torn}")
    return {finding: next(iter(said[finding])) for finding in sorted(said)}, words


def _said_by_words(words: tuple[str, ...], rules: Labels) -> list[tuple[str, int]]:
    said: list[tuple[str, int]] = []
    for word in words:
        if word in rules.map:
            said += rules.map[word].labels()
        elif word not in rules.unknown:
            said.append((word.lower(), PRESENT))  # `_check_words` has seen that it is a finding
    return said


def _said_by_columns(cells: Mapping[str, str], rules: Labels) -> list[tuple[str, int]]:
    said: list[tuple[str, int]] = []
    for column, finding in rules.columns.items():
        if value := _cell(cells, column):
            said.append((finding, _value(value, column)))
        elif rules.blank == "absent":
            said.append((finding, ABSENT))
    return said


def _words(cell: str, rules: Labels) -> tuple[str, ...]:
    return tuple(word for part in cell.split(rules.separator) if (word := part.strip()))


def _value(text: str, column: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if number not in (PRESENT, ABSENT, UNCERTAIN):
        raise ValueError(f"{column} is {text!r}, not 1, 0, -1 or blank")
    return int(number)


def _check_words(path: Path, mapping: CsvMapping) -> None:
    """Refuses a table with words that the mapping does not explain, all at once."""
    said = {finding for meaning in mapping.labels.map.values() for finding, _ in meaning.labels()}
    rules, columns = mapping.labels, mapping.columns
    known_labels = {*rules.map, *rules.unknown}
    names = {name for listed in rules.closed.values() for name in listed}
    known_views, known_splits = {*_VIEWS, *mapping.views}, {"", *get_args(Split), *mapping.splits}
    unmapped: dict[str, Counter[str]] = {"labels.map": Counter(), "views": Counter()}
    unmapped["splits"] = Counter()
    for cells, problem in _rows(path, mapping):
        if problem:
            continue
        for word in _words(_cell(cells, columns.labels), rules):
            if word not in known_labels and word.lower() not in names:
                unmapped["labels.map"][word] += 1
            elif word not in known_labels:
                said.add(word.lower())
        if (view := _cell(cells, columns.view)).lower() not in known_views:
            unmapped["views"][view] += 1
        if (split := _cell(cells, columns.split)).lower() not in known_splits:
            unmapped["splits"][split] += 1
    problems = [
        f"[{section}] does not explain "
        + ", ".join(f"{word!r} ({n})" for word, n in counts.most_common())
        for section, counts in unmapped.items()
        if counts
    ]
    if problems:
        raise SourceError(f"{path}: {'; '.join(problems)}; add the words to the mapping")
    _check_closed(path, rules.closed, said)


def _check_closed(path: Path, closed: Mapping[str, Sequence[str]], said: Set[str]) -> None:
    """Refuses a listed finding that is never said and is spelt nearly as one that is.

    Names of findings are free, so any other listed finding that no film has is only told.
    """
    misspelt, never = [], set()
    for source, listed in closed.items():
        for finding in sorted(set(listed) - said):
            if near := difflib.get_close_matches(finding, sorted(said), n=1, cutoff=LIKENESS):
                where = f"[labels.closed] {source} lists {finding!r}"
                misspelt.append(f"{where}, which no label says; {near[0]!r} is said")
            else:
                never.add(finding)
    if misspelt:
        raise SourceError(
            f"{path}: {'; '.join(misspelt)}; mend the name, or give it a word in [labels.map] if "
            f"it is another finding"
        )
    if never:
        logger.warning(
            "%s: no label says %s; where [labels.closed] lists it, it is absent from every film",
            path,
            ", ".join(map(repr, sorted(never))),
        )


def _rows(path: Path, mapping: CsvMapping) -> Iterator[Row]:
    """The rows of a user's table, with the columns that the mapping names."""
    named = {column for _, column in mapping.columns if column is not None}
    named |= set(mapping.labels.columns)
    return read_rows(
        path,
        sorted(named),
        delimiter=mapping.delimiter,
        remedy="mend the quotes of the table, the names of its columns, or the mapping",
    )
