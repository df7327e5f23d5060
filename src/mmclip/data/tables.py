"""CSV tables of films, read by a mapping that says what their columns and words mean."""

import difflib
import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import cast, get_args

from mmclip.data.mapping import Columns, CsvMapping, Labels
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
