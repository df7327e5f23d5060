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
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, StringConstraints, field_validator

from mmclip.config_io import Frozen, packaged_names, parse, read_toml

PLACEHOLDERS = ("finding", "a_finding", "is")
"""What a template may hold: the bare name, the name with its article, and "is" or "are"."""

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
TextTuple = Annotated[tuple[Text, ...], Field(min_length=1)]


class Prompts(NamedTuple):
    """The texts of one finding; each side is averaged in embedding space."""

    positives: tuple[str, ...]
    negatives: tuple[str, ...]


class Phrase(Frozen):
    """How templates name a finding; what is left out follows from the finding's name."""

    model_config = ConfigDict(populate_by_name=True)

    finding: Text | None = None
    a_finding: Text | None = None
    verb: Text = Field(default="is", alias="is")


class PromptTemplate(Frozen):
    """Texts for a finding that is present, and for one that is absent."""

    positive: TextTuple
    negative: TextTuple


class Templates(PromptTemplate):
    """Texts with placeholders, for any finding."""

    @field_validator("positive", "negative")
    @classmethod
    def _knows_its_placeholders(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            names = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
            if unknown := names - set(PLACEHOLDERS):
                known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
                raise ValueError(
                    f"{text!r} has the placeholder {{{sorted(unknown)[0]}}}; known are {known}"
                )
            if not names & {"finding", "a_finding"}:
                raise ValueError(f"{text!r} does not name the finding")
        return texts


class PromptSet(Frozen):
    """One prompt set, as read from its file."""

    id: Text
    version: int = Field(ge=1)
    description: Text
    templates: Templates
    phrases: dict[str, Phrase] = Field(default_factory=dict)
    findings: dict[str, PromptTemplate] = Field(default_factory=dict)

    @field_validator("phrases", "findings")
    @classmethod
    def _keys_are_plain(cls, by_name: dict) -> dict:
        for name in by_name:
            if name != plain_name(name):
                raise ValueError(f"finding {name!r} must be written {plain_name(name)!r}")
        return by_name

    @property
    def named(self) -> frozenset[str]:
        """The findings that the set names by themselves; templates take any other."""
        return frozenset((*self.phrases, *self.findings))

    def texts(self, finding: str) -> Prompts:
        """The prompts of a finding: its own wording, else the templates with its name filled in.

        Args:
            finding: Any name; case and underscores make no difference.
        """
        name = plain_name(finding)
        if not name:
            raise ValueError("a finding needs a name to make prompts of")
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

    def names(self, finding: str) -> tuple[str, ...]:
        """What the prompts of a finding may call it: as templates name it, and as it was given."""
        name = plain_name(finding)
        return tuple(dict.fromkeys((self.phrases.get(name, Phrase()).finding or name, name)))

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
    return packaged_names("prompt_sets")


def own_prompts(content: Mapping[str, Any]) -> PromptSet:
    """A prompt set from plain values, for those who write it in Python.

    Args:
        content: `positive` and `negative` templates for any finding, a text or several each; or a
            finding's own texts by its name, likewise, beside those of the set "default"; or what a
            prompt set's file holds.

    Raises:
        ConfigError: When a key or value breaks a rule.
    """
    head = {"id": "own", "version": 1, "description": "Given in Python."}
    default = load_prompts("default").model_dump(by_alias=True, exclude_none=True)
    if content.keys() & {"templates", "findings", "phrases"}:
        known = {"templates": default["templates"], **head, **content}
    elif content.keys() and content.keys() <= {"positive", "negative"}:
        known = {**head, "templates": _sides(content)}
    else:
        own = {plain_name(name): _sides(sides) for name, sides in content.items()}
        known = {**default, **head, "findings": {**default["findings"], **own}}
    return parse(PromptSet, known, "prompts=")


def _sides(content: Any) -> Any:
    """Both sides as lists of texts; what is no pair of sides is left for `parse` to refuse."""
    if not isinstance(content, Mapping):
        return content
    return {side: [said] if isinstance(said, str) else said for side, said in content.items()}


def load_prompts(name_or_path: str | Path) -> PromptSet:
    """Reads a prompt set of the package by name, or any by the path of its TOML file.

    Raises:
        ConfigError: When there is no such set, or a key or value breaks a rule.
    """
    values = read_toml("prompt set", "prompt_sets", name_or_path)
    return parse(PromptSet, values, f"prompt set {name_or_path}")
