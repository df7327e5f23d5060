"""Prompts: what the text encoder is asked about a finding, present and absent, as versioned data.

A prompt set is a TOML file. Templates serve any finding; a finding may have its own wording:

    id = "sentence"
    version = 1
    description = "One plain sentence for each side."

    [templates]
    positive = ["There {is} {a_finding}."]
    negative = ["There {is} no {finding}."]

    [phrases]                                   # how the templates name a finding
    nodule = { a_finding = "a nodule" }
    "support devices" = { is = "are" }

    [findings."no finding"]                     # in place of the templates
    positive = ["No acute cardiopulmonary abnormality."]
    negative = ["Abnormal chest."]
"""

import hashlib
import json
import tomllib
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Annotated, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

PLACEHOLDERS = ("finding", "a_finding", "is")
"""What a template may hold: the bare name, the name with its article, and "is" or "are"."""

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]


class PromptError(ValueError):
    """A prompt set cannot be found or breaks a rule; the message names the file and the rule."""


class Prompts(NamedTuple):
    """The texts of one finding; each side is averaged in embedding space."""

    positives: tuple[str, ...]
    negatives: tuple[str, ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Phrase(_Frozen):
    """How templates name a finding; what is left out follows from the finding's name."""

    finding: Text | None = None
    a_finding: Text | None = None
    verb: Text = Field(default="is", alias="is")


class Wording(_Frozen):
    """Texts for a finding that is present, and for one that is absent."""

    positive: Texts
    negative: Texts


class Templates(Wording):
    """Texts with placeholders, for any finding."""

    @field_validator("positive", "negative")
    @classmethod
    def _knows_its_placeholders(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            names = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
            if unknown := names - set(PLACEHOLDERS):
                raise ValueError(
                    f"{text!r} has the placeholder {sorted(unknown)[0]!r}; known are "
                    f"{', '.join(PLACEHOLDERS)}"
                )
            if not names & {"finding", "a_finding"}:
                raise ValueError(f"{text!r} does not name the finding")
        return texts


class PromptSet(_Frozen):
    """One prompt set, as read from its file."""

    id: Text
    version: int = Field(ge=1)
    description: Text
    templates: Templates
    phrases: dict[str, Phrase] = {}
    findings: dict[str, Wording] = {}

    @field_validator("phrases", "findings")
    @classmethod
    def _keys_are_plain(cls, by_name: dict) -> dict:
        for name in by_name:
            if name != plain_name(name):
                raise ValueError(f"finding {name!r} must be written {plain_name(name)!r}")
        return by_name

    def texts(self, finding: str) -> Prompts:
        """The prompts of a finding: its own wording, else the templates with its name filled in.

        Args:
            finding: Any name; case and underscores make no difference.
        """
        name = plain_name(finding)
        if not name:
            raise PromptError("a finding needs a name to make prompts of")
        if name in self.findings:
            return Prompts(self.findings[name].positive, self.findings[name].negative)
        phrase = self.phrases.get(name, Phrase())
        bare = phrase.finding or name
        words = {"finding": bare, "a_finding": phrase.a_finding or bare, "is": phrase.verb}
        positives, negatives = (
            tuple(text.format_map(words) for text in side)
            for side in (self.templates.positive, self.templates.negative)
        )
        return Prompts(positives, negatives)

    @property
    def hash(self) -> str:
        """SHA-256 of the content; comments and layout of the file do not change it."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def plain_name(finding: str) -> str:
    """A finding's name as prompt sets write it: lower case, words apart by one space."""
    return " ".join(finding.lower().replace("_", " ").split())


def known_prompt_sets() -> list[str]:
    """Names of the prompt sets that come with the package."""
    folder = resources.files("mmclip") / "prompt_sets"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")


def load_prompts(name_or_path: str | Path) -> PromptSet:
    """Reads a prompt set of the package by name, or any by the path of its TOML file.

    Raises:
        PromptError: When there is no such set, or the file breaks a rule.
    """
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml"):
        source = Path(name_or_path)
        if not source.is_file():
            raise PromptError(f"there is no prompt set {source}")
    elif name_or_path in known_prompt_sets():
        source = resources.files("mmclip") / "prompt_sets" / f"{name_or_path}.toml"
    else:
        raise PromptError(
            f"there is no prompt set {name_or_path!r}; known are {', '.join(known_prompt_sets())}, "
            f"or give the path of a .toml file"
        )
    try:
        return PromptSet.model_validate(tomllib.loads(source.read_text("utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise PromptError(f"{source} is no TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = (
            "; known keys are " + ", ".join(PromptSet.model_fields)
            if len(first["loc"]) == 1
            else ""
        )
        raise PromptError(f"{source}: {where}: {first['msg']}{known}") from error
