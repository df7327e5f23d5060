"""The mapping of a CSV table: a TOML file that says what its columns and words mean."""

import codecs
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmclip.config_io import ConfigError, Frozen, parse
from mmclip.data.ingest.csv_rows import SourceError
from mmclip.data.sample import ABSENT, PRESENT, UNCERTAIN, LabelOrigin, Split, View

KEY_LIKENESS = 0.75
"""A key as much like a known one (`difflib`, 1 is equal) is taken for a misspelling of it.
[chosen: "imgae" and "reprot" are]"""


YES_WORDS = (
    "true", "yes", "y", "wahr", "ja", "j", "vrai", "oui", "si", "sí", "verdadero", "present",
    "positive", "pos", "positiv", "positif", "positivo",
)  # fmt: skip
NO_WORDS = (
    "false", "no", "n", "falsch", "nein", "faux", "non", "falso", "absent", "negative", "neg",
    "negativ", "négatif", "negativo",
)  # fmt: skip
MAYBE_WORDS = ("uncertain", "equivocal")
"""Words of spreadsheets for present, absent and uncertain, in lower case: Excel writes TRUE in the
user's language."""


def one_delimiter(said: str) -> str:
    """A delimiter as one character; "tab" is one.

    Raises:
        ValueError: When it is none.
    """
    delimiter = "\t" if said.lower() in ("tab", "\\t") else said
    if len(delimiter) != 1:
        raise ValueError(f'delimiter {said!r} is no single character; say ",", ";", "|" or "tab"')
    return delimiter


def known_encoding(name: str) -> str:
    """The name of an encoding, as it is.

    Raises:
        ValueError: When Python knows none of this name.
    """
    try:
        codecs.lookup(name)
    except LookupError:
        raise ValueError(
            f"there is no encoding {name!r}; say utf-8, utf-16, cp1252 or latin-1"
        ) from None
    return name


class Columns(Frozen):
    """Names of the table's columns. A column that is not named here is not read."""

    patient_id: str
    image_id: str | None = None  # default: the image's
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
        if self.image_id is None and self.image is None:
            raise ValueError("name image_id or image: without them a row has no id")
        return self


class Meaning(Frozen):
    """What one label word of a source says of findings.

    Attributes:
        unknown: What the word leaves open, though the readers looked for it: a sign of a finding
            ("costophrenic angle blunting") neither names the finding nor rules it out.
    """

    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _says_one_thing_of_a_finding(self) -> "Meaning":
        listed = [*self.present, *self.absent, *self.uncertain, *self.unknown]
        if twice := sorted({finding for finding in listed if listed.count(finding) > 1}):
            raise ValueError(
                f"a word says one thing of a finding, and names {', '.join(twice)} twice"
            )
        return self

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
        unknown: Words such as "todo": the image is not labelled, or not to the end.
        blank: What an empty cell says of the source's findings.
        map: Label word -> what it says. A word that is a finding's name in `closed`, in any case,
            needs no entry.
        closed: Source -> all the findings that its readers looked for: one of them that a labelled
            image does not have is absent; any other finding is unknown. "*" stands for every source
            that is not named.
        columns: Table column -> finding, where each finding has its own column with 1 (present),
            0 (absent) or -1 (uncertain), as in CheXpert, or a word for yes or no.
        yes: Further words for present in those columns, in any case; YES_WORDS are known.
        no: The same of absent; NO_WORDS are known.
        maybe: The same of uncertain; MAYBE_WORDS are known.
        origin: Who made the labels; results say it.
    """

    separator: str = Field(default="|", min_length=1)
    unknown: tuple[str, ...] = ()
    blank: Literal["unknown", "absent"] = "unknown"
    map: dict[str, Meaning] = Field(default_factory=dict)
    closed: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    columns: dict[str, str] = Field(default_factory=dict)
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()
    maybe: tuple[str, ...] = ()
    origin: LabelOrigin | None = None

    def label_of_word(self) -> dict[str, int]:
        """What each word of a cell of `columns` says, in lower case."""
        known = dict.fromkeys(YES_WORDS, PRESENT) | dict.fromkeys(NO_WORDS, ABSENT)
        known |= dict.fromkeys(MAYBE_WORDS, UNCERTAIN)
        for words, label in ((self.yes, PRESENT), (self.no, ABSENT), (self.maybe, UNCERTAIN)):
            known |= dict.fromkeys((word.strip().lower() for word in words), label)
        return known

    @model_validator(mode="after")
    def _one_meaning(self) -> "Labels":
        said = [word.strip().lower() for word in (*self.yes, *self.no, *self.maybe)]
        if doubled := sorted({word for word in said if said.count(word) > 1}):
            raise ValueError(f"{doubled} stand twice among the words yes, no and maybe")
        return self

    @model_validator(mode="after")
    def _canonical(self) -> "Labels":
        names = {name for listed in self.closed.values() for name in listed}
        names |= set(self.columns.values())
        for meaning in self.map.values():
            names |= {*meaning.present, *meaning.absent, *meaning.uncertain, *meaning.unknown}
        bad = sorted(name for name in names if name != " ".join(name.lower().split()) or not name)
        if bad:
            raise ValueError(f"finding names are lower case, single-spaced words; {bad} are not")
        return self


class CsvMapping(Frozen):
    """What the columns and words of a CSV table mean."""

    table: str = "studies.csv"  # below the root folder, or else from where the command is run
    delimiter: str = ","
    encoding: str = "utf-8"  # as Python names it: utf-8, utf-16, cp1252 (Excel's), latin-1
    source: str = "csv"  # of every row, where no column names it
    columns: Columns
    # The table's word -> ours, in any case. PA, AP, L, lateral, "?" and blank need no entry,
    # nor do the splits train, val, test and blank.
    views: dict[str, View] = Field(default_factory=dict)
    splits: dict[str, Split] = Field(default_factory=dict)
    labels: Labels = Labels()

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return known_encoding(name)

    @field_validator("delimiter")
    @classmethod
    def _is_one(cls, said: str) -> str:
        return one_delimiter(said)

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
        ConfigError: When keys are unknown or missing, or values break a rule; all at once.
    """
    mapping, _, problems = check_mapping(mapping_values(path))
    if mapping is None:
        raise ConfigError(several(f"mapping {path}", problems))
    return mapping


def mapping_values(path: Path) -> dict[str, Any]:
    """What the TOML file of a mapping holds.

    Raises:
        SourceError: When the file cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
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


def check_mapping(values: dict[str, Any]) -> tuple[CsvMapping | None, dict[str, Any], list[str]]:
    """Checks the values of a mapping.

    Returns:
        The mapping, or None where there is a problem; the values as they were most likely meant,
        which tell the columns of the table; and all problems. What follows from a misspelt key
        alone is none.
    """
    problems: list[str] = []
    meant = dict(_known(values, CsvMapping, "the mapping", problems))
    columns = meant["columns"] = _known(meant.get("columns", {}), Columns, "[columns]", problems)
    if isinstance(columns, dict) and "patient_id" not in columns:
        problems.append(
            f"{'[columns] names no column patient_id' if columns else 'there is no [columns]'}, "
            f"which says how the table calls what is read: patient_id, image_id or image, and "
            f"more; "
            f'add such lines as patient_id = "the name in the table" (docs/data.md shows them)'
        )
        meant["columns"] = {
            "patient_id": "",
            **(columns or {"image_id": ""}),
        }  # told; `parse` goes on
    if isinstance(meant.get("labels"), dict):
        labels = meant["labels"] = dict(_known(meant["labels"], Labels, "[labels]", problems))
        if isinstance(labels.get("map"), dict):
            labels["map"] = {
                word: _known(meaning, Meaning, f"[labels.map] {word}", problems)
                for word, meaning in labels["map"].items()
            }
    try:
        mapping = parse(CsvMapping, meant, "rules")
    except ConfigError as error:
        problems.append(str(error).removeprefix("rules: "))
        mapping = None
    return None if problems else mapping, meant, problems


def _known(values: Any, model: type[Frozen], section: str, problems: list[str]) -> Any:
    """A section with its unknown keys left out, or as most likely meant; tells them all."""
    if not isinstance(values, dict):
        return values  # `parse` tells what it must be
    known, unknown, out = list(model.model_fields), [], {}
    for key, value in values.items():
        if key in known:
            out[key] = value
            continue
        near = difflib.get_close_matches(key, set(known) - set(values), 1, KEY_LIKENESS)
        unknown.append(f"{key!r} ({near[0]}?)" if near else repr(key))
        if near:
            out.setdefault(near[0], value)
    if unknown:
        its = ", ".join(sorted(known))
        problems.append(f"{section} has no key {', '.join(unknown)}; its keys are {its}")
    return out


def several(where: str, problems: Sequence[str]) -> str:
    """A message of one problem or more, each then on a line of its own.

    They are numbered, as the command line says an error in one line.
    """
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    numbered = (f"({number}) {problem}" for number, problem in enumerate(problems, 1))
    return "\n".join((f"{where} has {len(problems)} problems:", *numbered))
