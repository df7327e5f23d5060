"""A table of reports by the studies that they belong to."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from mmclip.config_io import Frozen, parse
from mmclip.data.ingest.csv_mapping import known_encoding, mapping_values, one_delimiter
from mmclip.data.ingest.csv_rows import id_of, read_rows
from mmclip.data.ingest.csv_table import REMEDY
from mmclip.data.sample import View
from mmclip.data.text import Report, parse_reports

logger = logging.getLogger(__name__)


class ReportColumns(Frozen):
    """Names of the columns of a table of reports. A column that is not named is not read."""

    accession: str | None = None  # AccessionNumber of the study
    study_id: str | None = None  # StudyInstanceUID of the study
    report: str | None = None
    findings: str | None = None
    impression: str | None = None
    date: str | None = None  # several reports of a study are joined in its order

    @model_validator(mode="after")
    def _enough(self) -> "ReportColumns":
        if self.accession is None and self.study_id is None:
            raise ValueError("name accession or study_id: by one of them a report finds its images")
        if (self.report is None) == (self.findings is None and self.impression is None):
            raise ValueError("name either report, or findings and impression")
        return self


class ReportMapping(Frozen):
    """What the columns of a table of reports mean, and the words by which files name views."""

    table: str = "reports.csv"  # below the root folder, or else from where the command is run
    delimiter: str = ","
    encoding: str = "utf-8"
    date_format: str = "%Y-%m-%d"  # of columns.date, as Python's strptime reads it
    source: str = "dicom"
    columns: ReportColumns
    views: dict[str, View] = Field(default_factory=dict)  # word of ViewPosition or a description

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return known_encoding(name)

    @field_validator("delimiter")
    @classmethod
    def _is_one(cls, said: str) -> str:
        return one_delimiter(said)

    @field_validator("views")
    @classmethod
    def _lower(cls, words: dict[str, View]) -> dict[str, View]:
        return {word.strip().lower(): view for word, view in words.items()}


@dataclass
class Reports:
    """The reports of a table by what they name, and which of them an image was found for."""

    texts: list[tuple[datetime | None, str]] = field(default_factory=list)  # with their dates
    ids: list[str] = field(default_factory=list)  # what is hashed where a report is excluded
    by_accession: dict[str, list[int]] = field(default_factory=dict)
    by_study: dict[str, list[int]] = field(default_factory=dict)
    found: set[int] = field(default_factory=set)
    alike: dict[str, str] = field(default_factory=dict)  # a number by what is left of it bare
    missed: set[str] = field(default_factory=set)  # numbers that files write in another way
    empty: set[int] = field(default_factory=set)  # found, and adding nothing to others of the study
    _parsed: dict[tuple[int, ...], Report] = field(default_factory=dict)

    def report_of(self, accession: str, study: str) -> Report:
        """The report of a study, made of all of its reports by `text.parse_reports`."""
        numbers = tuple(self.of(accession, study))
        if not numbers:
            if accession and (other := self.alike.get(_bare(accession))) is not None:
                self.missed.add(other)
            return Report(None, None, None)
        if numbers not in self._parsed:  # the images of a study ask for it one after another
            self.found.update(numbers)
            report, empty = parse_reports([self.texts[n][1] for n in numbers])
            self.empty.update(numbers[i] for i in empty)
            self._parsed[numbers] = report
        return self._parsed[numbers]

    def of(self, accession: str, study: str) -> list[int]:
        """The numbers of a study's reports, in order of date, then of the table."""
        numbers = {*self.by_accession.get(accession, ()), *self.by_study.get(study, ())}
        last = datetime.max
        return sorted(numbers, key=lambda n: (self.texts[n][0] or last, n))


def _bare(accession: str) -> str:
    """A number without what tables lose or add: leading zeros, ".0", signs, and letters' case."""
    text = re.sub(r"\.0+$", "", accession)
    return re.sub(r"[\W_]", "", text).casefold().lstrip("0")


def load_report_mapping(path: Path) -> ReportMapping:
    """Reads the mapping of a table of reports from its TOML file.

    Raises:
        SourceError: When the file cannot be read, or is no TOML.
        ConfigError: When keys are unknown or missing, or values break a rule.
    """
    return parse(ReportMapping, mapping_values(path), f"mapping {path}")


def read_reports(table: Path, mapping: ReportMapping) -> Reports:
    """All reports of a table; a row without an id or without a text is told in a warning."""
    columns, found = mapping.columns, Reports()
    used = [name for name in dict(columns).values() if name is not None]
    n_no_id = n_empty = n_broken = n_cut = 0
    bad_dates: list[str] = []
    for cells, problem in read_rows(
        table, used, delimiter=mapping.delimiter, encoding=mapping.encoding, remedy=REMEDY
    ):

        def cell(name: str | None, cells: dict[str, str] = cells) -> str:
            return "" if name is None else cells.get(name, "").strip()

        accession, study = id_of(cell(columns.accession)), id_of(cell(columns.study_id))
        n_cut += _CUT.fullmatch(accession) is not None
        whole = cell(columns.report)
        parts = [
            f"{k}: {t}" for k in ("FINDINGS", "IMPRESSION") if (t := cell(dict(columns)[k.lower()]))
        ]
        text = whole or "\n".join(parts)
        n_broken += bool(problem)
        n_no_id += not (accession or study)
        n_empty += not text
        if problem or not text or not (accession or study):
            continue
        date = _date(cell(columns.date), mapping.date_format)
        if date is None and (said := cell(columns.date)):
            bad_dates.append(said)
        number = len(found.texts)
        found.texts.append((date, text))
        found.ids.append(accession or study)
        if accession:
            found.by_accession.setdefault(accession, []).append(number)
            found.alike.setdefault(_bare(accession), accession)
        if study:
            found.by_study.setdefault(study, []).append(number)
    for n, what in (
        (n_broken, "have another number of fields than the header, or an error of Excel, and are "
         "not read"),
        (n_no_id, "name no study, and are not read"),
        (n_cut, "have an accession number that Excel cut (1.2E+13), and find no image; export the "
         "column as text"),
        (n_empty, "hold no report, and are not read"),
        (len(bad_dates), f"have a date that is not {mapping.date_format!r}, and stand last"
         + _proposed(bad_dates)),
    ):  # fmt: skip
        if n:
            logger.warning("%s: %d rows %s", table, n, what)
    return found


_CUT = re.compile(r"\d([.,]\d+)?[eE]\+\d+")

_DATES = (
    "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%Y-%m-%d", "%Y/%m/%d", "%Y%m%d", "%d.%m.%y",
)  # fmt: skip
_TIMES = ("", " %H:%M", " %H:%M:%S", "%H%M%S")
"""What exports write; of two that read a date, the day is more often the first number."""


def _proposed(dates: Sequence[str]) -> str:
    """The format that reads all of some dates, for their warning; no date is quoted."""
    for form in (date + time for date in _DATES for time in _TIMES):
        if all(_date(text, form) is not None for text in dates):
            return f'; date_format = "{form}" in the mapping reads them'
    return ""


def _date(text: str, form: str) -> datetime | None:
    try:
        return datetime.strptime(text, form)
    except ValueError:
        pass
    try:
        date = datetime.fromisoformat(text if "-" in text else "")
    except ValueError:
        return None
    return date if date.tzinfo is None else date.astimezone(UTC).replace(tzinfo=None)
