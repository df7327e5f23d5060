"""CSV tables of images, read by a mapping that says what their columns and words mean."""

import codecs
import difflib
import hashlib
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import cast, get_args

from mmclip.config_io import ConfigError
from mmclip.data.ages import parse_age, parse_sex
from mmclip.data.ingest.csv_mapping import (
    Columns,
    CsvMapping,
    Labels,
    check_mapping,
    mapping_values,
    several,
)
from mmclip.data.ingest.csv_rows import (
    BLANKS,
    Row,
    SourceError,
    header_of,
    id_of,
    lacking,
    n_alike,
    read_rows,
)
from mmclip.data.sample import (
    ABSENT,
    PRESENT,
    UNCERTAIN,
    Excluded,
    Reason,
    Record,
    Sample,
    Split,
    View,
)
from mmclip.data.text import Report, make_report, parse_report

logger = logging.getLogger(__name__)

LIKENESS = 0.85
"""A finding as much like another one (`difflib`, 1 is equal) is taken for a misspelling of it.
[chosen: "pleural efusion" and "oedema" are; "rib fracture" is none of "fracture"]"""

REMEDY = "mend the quotes of the table, the names of its columns, or the mapping"
"""The next step where a user's table cannot be read."""


_VIEWS: dict[str, View] = {"": "unknown", "?": "unknown", "unknown": "unknown", "lateral": "L"}
_VIEWS |= {view.lower(): view for view in get_args(View)}


def read_mapped(root: Path, mapping: Path, table: Path | None = None) -> Iterator[Record]:
    """The rows of a CSV table by the TOML file of its mapping; see `read_csv`.

    Raises:
        SourceError: When either cannot be read, or they do not fit.
        ConfigError: When the mapping breaks a rule; then columns that are not there are told, too.
    """
    found, meant, problems = check_mapping(mapping_values(mapping))
    if found is not None:
        return read_csv(root, found, table)
    try:
        path = find_table(root, str(meant.get("table", "studies.csv")), table)
        delimiter = meant.get("delimiter", ",")
        encoding = meant.get("encoding", "utf-8")
        if isinstance(delimiter, str) and len(delimiter) == 1 and _is_encoding(encoding):
            header = header_of(path, delimiter=delimiter, encoding=encoding, remedy=REMEDY)
            labels = meant.get("labels")
            of_findings = labels.get("columns") if isinstance(labels, dict) else None
            used = _used(meant["columns"], of_findings)
            found = _column_problems(path, header, used, delimiter, encoding)
            problems += [f"{path}: {said}" for said in found]
    except SourceError as error:
        problems.append(str(error))
    raise ConfigError(several(f"mapping {mapping}", problems))


def read_csv(root: Path, mapping: CsvMapping, table: Path | None = None) -> Iterator[Record]:
    """The rows of a CSV table, one record each.

    Without a study column, images of one patient with one report are a study, and an image without
    a report is a study of its own. A row whose number of fields differs from the header's, or whose
    labels contradict one another, is excluded; blank lines are no rows. Ages over 120 years, and
    ages and sexes that cannot be read, are unknown.

    Args:
        root: Folder that the image paths are relative to.
        mapping: Of the table.
        table: Read in place of `csv_mapping.table`.

    Raises:
        SourceError: At once, before any record, with all problems: when the table cannot be read,
            has no rows, lacks columns, or holds label, view or split words that the mapping does
            not explain; or when `labels.closed` lists what looks like a misspelt finding.
    """
    path = find_table(root, mapping.table, table)
    _check_table(path, mapping)
    return _csv_records(root, path, mapping)


def _is_encoding(name: object) -> bool:
    try:
        return isinstance(name, str) and bool(codecs.lookup(name))
    except LookupError:
        return False


def find_table(root: Path, name: str, table: Path | None) -> Path:
    """The table's path: the mapping's, or the one that is given, below the root or else from here.

    Raises:
        SourceError: When there is none.
    """
    given = Path(name) if table is None else table
    for path in (root / given, given):
        if path.is_file():
            return path
    where = (
        f"name it in the mapping (table = ..., below --root; now {name!r}), or give it by --table"
        if table is None
        else "give another one by --table (a path below --root, or else from here)"
    )
    raise SourceError(f"there is no table {root / given}; {where}")


def _csv_records(root: Path, path: Path, mapping: CsvMapping) -> Iterator[Record]:
    patients: set[str] = set()
    for row, (cells, problem) in enumerate(_rows(path, mapping)):
        if problem:
            yield Excluded(
                row=row,
                image_id=_image_id(cells, mapping.columns),
                reason=Reason.BAD_VALUE,
                detail=problem,
            )
        else:
            patients.add(id_of(_cell(cells, mapping.columns.patient_id)))
            yield _image(row, root, cells, mapping)
    if n := n_alike(patients):
        logger.warning(
            "%s: %d patient ids are those of others but for leading zeros or \".0\"; they count as "
            "patients of their own, who may be in two splits; write each in one way", path, n,
        )  # fmt: skip


def _image(row: int, root: Path, cells: Mapping[str, str], mapping: CsvMapping) -> Record:
    columns = mapping.columns
    image_id, patient_id = _image_id(cells, columns), id_of(_cell(cells, columns.patient_id))
    source = _cell(cells, columns.source) or mapping.source
    try:
        labels, words = _labels(cells, mapping, source)
    except ValueError as error:
        return Excluded(row=row, image_id=image_id, reason=Reason.BAD_VALUE, detail=str(error))
    if columns.report is not None:
        report = parse_report(_cell(cells, columns.report))
    else:
        report = make_report(_cell(cells, columns.findings), _cell(cells, columns.impression))
    split = _cell(cells, columns.split).lower()
    return Sample(
        image_id=image_id,
        study_id=id_of(_cell(cells, columns.study_id)) or _study_id(image_id, patient_id, report),
        patient_id=patient_id,
        source=source,
        split=mapping.splits.get(split) or (cast(Split, split) if split else None),
        image=_on_disk(root, _cell(cells, columns.image).replace("\\", "/")) or None,
        view=_view(_cell(cells, columns.view), mapping),
        findings=report.findings,
        impression=report.impression,
        report=report.text,
        labels=labels,
        source_labels=words,
        label_origin=mapping.labels.origin if labels or words else None,
        age_years=parse_age(_cell(cells, columns.age)),
        sex=parse_sex(_cell(cells, columns.sex)),
    )


def _on_disk(root: Path, image: str) -> str:
    """A path as the disk has it: letters with accents are written in two ways, and macOS changes
    one into the other when it packs files."""
    if image.isascii() or (root / image).exists():
        return image
    forms = (unicodedata.normalize(form, image) for form in ("NFC", "NFD"))
    return next((form for form in forms if (root / form).exists()), image)


def _cell(cells: Mapping[str, str], column: str | None) -> str:
    """A cell without the white space around it; "" where it, or its column, is not there."""
    value = "" if column is None else cells.get(column, "").strip()
    return "" if value.lower() in BLANKS else value


def _image_id(cells: Mapping[str, str], columns: Columns) -> str:
    return id_of(_cell(cells, columns.image_id or columns.image))


def _study_id(image_id: str, patient_id: str, report: Report) -> str:
    if report.text is None:
        return image_id
    return f"{patient_id}/{hashlib.sha256(report.text.encode()).hexdigest()[:12]}"


def _view(word: str, mapping: CsvMapping) -> View:
    return mapping.views.get(word.lower()) or _VIEWS[word.lower()]


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
        left_open = {f for word in words if word in rules.map for f in rules.map[word].unknown}
        for finding in rules.closed.get(source, rules.closed.get("*", ())):
            if finding not in left_open:
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
            said.append((word.lower(), PRESENT))  # `_check_table` has seen that it is a finding
    return said


def _said_by_columns(cells: Mapping[str, str], rules: Labels) -> list[tuple[str, int]]:
    said: list[tuple[str, int]] = []
    for column, finding in rules.columns.items():
        if value := _cell(cells, column):
            said.append((finding, _value(value, column, rules)))
        elif rules.blank == "absent":
            said.append((finding, ABSENT))
    return said


def _words(cell: str, rules: Labels) -> tuple[str, ...]:
    return tuple(word for part in cell.split(rules.separator) if (word := part.strip()))


def _value(text: str, column: str, rules: Labels) -> int:
    words = rules.label_of_word()
    if text.lower() in words:
        return words[text.lower()]
    try:
        number = float(_DECIMAL_COMMA.sub(r"\1.\2", text.replace("\u2212", "-")))
    except ValueError:
        number = math.nan
    if number not in (PRESENT, ABSENT, UNCERTAIN):
        raise ValueError(
            f"{column} is {text[:_LONGEST_WORD]!r}, not 1, 0, -1 or blank, nor a word of "
            f"{', '.join(words)}; add it to yes, no or maybe in [labels]"
        )
    return int(number)


_DECIMAL_COMMA = re.compile(r"^(-?\d+),(\d+)$")  # "1,0" of an Excel in most of Europe

_LONGEST_WORD = 60
"""Characters of a cell that is still a label. [chosen: the longest of PadChest has 37]"""


def _unexplained(section: str, counts: Counter[str]) -> str:
    """The words of a column that a mapping does not explain; a report among them is not printed."""
    words = [f"{word!r} ({n})" for word, n in counts.most_common() if len(word) <= _LONGEST_WORD]
    if n_long := len(counts) - len(words):
        words.append(
            f"{n_long} cells of more than {_LONGEST_WORD} characters, which are not printed: is "
            f"this the right column"
        )
    return f"[{section}] does not explain {', '.join(words)}; add the words to the mapping"


def _check_table(path: Path, mapping: CsvMapping) -> None:
    """Refuses a table that the mapping does not fit, with all problems at once."""
    rules, columns = mapping.labels, mapping.columns
    how = {"delimiter": mapping.delimiter, "encoding": mapping.encoding, "remedy": REMEDY}
    header = header_of(path, **how)
    used = _used(dict(columns), rules.columns)
    problems = (
        _column_problems(path, header, used, mapping.delimiter, mapping.encoding) if header else []
    )  # `read_rows` tells of an empty one
    said = {finding for meaning in rules.map.values() for finding, _ in meaning.labels()}
    known_labels = {*rules.map, *rules.unknown}
    names = {name for listed in rules.closed.values() for name in listed}
    known_views, known_splits = {*_VIEWS, *mapping.views}, {"", *get_args(Split), *mapping.splits}
    unmapped: dict[str, Counter[str]] = {"labels.map": Counter(), "views": Counter()}
    unmapped["splits"] = Counter()
    n_rows = n_sound = 0
    try:
        for cells, problem in read_rows(path, (), **how):
            n_rows += 1
            if problem:
                continue
            n_sound += 1
            for word in _words(_cell(cells, columns.labels), rules):
                if word not in known_labels and word.lower() not in names:
                    unmapped["labels.map"][word] += 1
                elif word not in known_labels:
                    said.add(word.lower())
            if (view := _cell(cells, columns.view)).lower() not in known_views:
                unmapped["views"][view] += 1
            if (split := _cell(cells, columns.split)).lower() not in known_splits:
                unmapped["splits"][split] += 1
    except SourceError as error:
        if not problems:
            raise
        problems.append(str(error))
    else:
        if not n_rows:
            problems.append("a header and no rows below it; give a table with rows")
    for section, counts in unmapped.items():
        if counts:
            problems.append(_unexplained(section, counts))
    never: set[str] = set()
    if n_sound and (columns.labels is None or columns.labels in header):
        misspelt, never = _never_said(rules.closed, said)
        problems += misspelt
    if problems:
        raise SourceError(several(str(path), problems))
    if never:
        logger.warning(
            "%s: no label says %s; where [labels.closed] lists it, it is absent from every image",
            path,
            ", ".join(map(repr, sorted(never))),
        )


def _used(columns: object, of_findings: object) -> dict[str, list[str]]:
    """The table's columns that a mapping names, and under which keys."""
    used: dict[str, list[str]] = {}
    for key, name in columns.items() if isinstance(columns, dict) else ():
        if isinstance(name, str) and name:
            used.setdefault(name, []).append(key)
    for name in of_findings if isinstance(of_findings, dict) else ():
        used.setdefault(name, []).append("labels.columns")
    return used


def _column_problems(
    path: Path,
    header: list[str],
    used: Mapping[str, Sequence[str]],
    delimiter: str,
    encoding: str,
) -> list[str]:
    """What keeps a table from being read by the columns that its mapping names."""
    said = {name: f"{name!r} ({', '.join(keys)})" for name, keys in used.items()}
    problems = []
    if used.keys() - set(header):
        problems.append(lacking(path, header, said, delimiter, encoding))
    if doubled := [said[name] for name in used if header.count(name) > 1]:
        problems.append(f"the column {', '.join(doubled)} is there twice; rename one in the table")
    return problems


def _never_said(closed: Mapping[str, Sequence[str]], said: Set[str]) -> tuple[list[str], set[str]]:
    """The listed findings that no label says: problems of those that look misspelt, and the others.

    Names of findings are free, so one that is spelt nearly as a finding that is said is a problem,
    and any other is only told.
    """
    misspelt, never = [], set()
    for source, listed in closed.items():
        for finding in sorted(set(listed) - said):
            if near := difflib.get_close_matches(finding, sorted(said), n=1, cutoff=LIKENESS):
                misspelt.append(
                    f"[labels.closed] {source} lists {finding!r}, which no label says; "
                    f"{near[0]!r} is said; mend the name, or give it a word in [labels.map] if it "
                    f"is another finding"
                )
            else:
                never.add(finding)
    return misspelt, never


def _rows(path: Path, mapping: CsvMapping) -> Iterator[Row]:
    """The rows of a user's table, with the columns that the mapping names."""
    used = _used(dict(mapping.columns), mapping.labels.columns)
    return read_rows(
        path, list(used), delimiter=mapping.delimiter, encoding=mapping.encoding, remedy=REMEDY
    )
