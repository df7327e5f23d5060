"""Disease-kind prompts: what stands in the report's place for an image that has labels and no
report.

The wording is data (disease_prompts/*.toml). An unknown finding is not in the prompt, neither as
present nor as absent; an uncertain one likewise.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from pydantic import Field, field_validator

from mmclip.config_io import Frozen, parse, read_toml
from mmclip.data.sample import ABSENT, PRESENT, Entity
from mmclip.prompts import Phrase, load_prompts

_T = TypeVar("_T")

NO_FINDING = "no finding"
"""The label that says of an image that nothing is wrong with it."""

PROMPT_UNIFORMS = 4
"""Draws that a prompt takes, beside two a finding."""


class DiseasePrompt(NamedTuple):
    """A prompt, and the names of the findings in it."""

    text: str
    entities: tuple[Entity, ...]


class _Name(NamedTuple):
    with_article: str
    bare: str
    verb: str  # "is" or "are"


class DiseasePromptSet(Frozen):
    """Wordings, as read from a TOML file; disease_prompts/default.toml says what each key means.

    Source: paper, disease-kind prompts, of which it gives one example; the wordings are ours.
    """

    id: str
    version: int = Field(ge=1)
    description: str
    present: tuple[str, ...] = Field(min_length=1)
    absent: tuple[str, ...] = Field(min_length=1)
    normal: tuple[str, ...] = Field(min_length=1)
    most_absent: int = Field(ge=1)
    normal_from: int = Field(ge=1)
    names: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    plural: tuple[str, ...] = ()
    grammar: str | None = None

    @field_validator("present", "absent")
    @classmethod
    def _has_a_place(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            if text.count("{findings}") != 1:
                raise ValueError(f"{text!r} must hold {{findings}} once")
        return texts

    def is_normal(self, labels: Mapping[str, int]) -> bool:
        """Whether labels say that nothing was found; see `normal_from` in default.toml."""
        others = [value for name, value in labels.items() if name != NO_FINDING]
        if PRESENT in others:
            return False
        if NO_FINDING in labels:
            return labels[NO_FINDING] == PRESENT
        return len(others) >= self.normal_from and all(value == ABSENT for value in others)

    def write(
        self, labels: Mapping[str, int], uniforms: Float[np.ndarray, " d"], absent_prob: float
    ) -> DiseasePrompt | None:
        """A prompt that says which findings are present, and perhaps some that are not.

        Args:
            labels: As in `Sample.labels`.
            uniforms: Uniform, PROMPT_UNIFORMS and two a finding.
            absent_prob: Of also naming absent findings; an image without present findings that
                cannot be called normal names them always.

        Returns:
            None where the labels say nothing for sure.

        Raises:
            ValueError: When there are too few random numbers.
        """
        looked_for = sorted(set(labels) - {NO_FINDING})
        if len(uniforms) < PROMPT_UNIFORMS + 2 * len(looked_for):
            raise ValueError(
                f"{len(uniforms)} random numbers for {len(looked_for)} findings; give "
                f"{PROMPT_UNIFORMS + 2 * len(looked_for)}"
            )
        order, name_uniforms = np.split(uniforms[PROMPT_UNIFORMS:][: 2 * len(looked_for)], 2)
        shuffled = [looked_for[i] for i in np.argsort(order, kind="stable")]
        name = {
            f: _pick(self._names_of(f), u) for f, u in zip(looked_for, name_uniforms, strict=True)
        }
        present = [f for f in shuffled if labels[f] == PRESENT]
        absent = [f for f in shuffled if labels[f] == ABSENT]
        says_absent = bool(absent) and uniforms[0] < absent_prob
        parts: list[tuple[str, Sequence[str], bool]] = []
        if present:
            parts.append((_pick(self.present, uniforms[1]), present, True))
        elif self.is_normal(labels):
            parts.append((_pick(self.normal, uniforms[1]), (), True))
        else:
            says_absent = bool(absent)
        if says_absent:
            some = absent[: 1 + int(uniforms[2] * min(self.most_absent, len(absent)))]
            parts.append((_pick(self.absent, uniforms[3]), some, False))
        return _joined(parts, name) if parts else None

    def _names_of(self, finding: str) -> Sequence[_Name]:
        """The names of a finding: those of the set, or else the one of its grammar."""
        if finding in self.names:
            return [
                _Name(n, n.removeprefix("an ").removeprefix("a "), self._verb(n))
                for n in self.names[finding]
            ]
        phrase = _phrases(self.grammar).get(finding, Phrase())
        bare = phrase.finding or finding
        return [_Name(phrase.a_finding or bare, bare, phrase.verb)]

    def _verb(self, name: str) -> str:
        return "are" if name in self.plural else "is"


@cache
def _phrases(prompt_set: str | None) -> Mapping[str, Phrase]:
    return {} if prompt_set is None else load_prompts(prompt_set).phrases


def _joined(
    parts: Sequence[tuple[str, Sequence[str], bool]], name: Mapping[str, _Name]
) -> DiseasePrompt:
    text, entities = "", []
    for template, findings, is_present in parts:
        text += " " if text else ""
        verb = name[findings[0]].verb if findings else "is"
        head, _, tail = template.replace("{is}", verb).partition("{findings}")
        cue = None
        if not is_present:
            at = head.lower().find("no ")
            cue = (len(text) + at, len(text) + at + 2) if at >= 0 else None
        sentence_start = len(text)
        text += head
        for i, finding in enumerate(findings):
            between = ", " if is_present else " or "
            text += "" if i == 0 else " and " if is_present and i == len(findings) - 1 else between
            status = "present" if is_present else "negated"
            start = len(text)
            text += name[finding].with_article if is_present else name[finding].bare
            entities.append(Entity(start, len(text), "finding", finding, status, cue))
        text += tail
        text = text[:sentence_start] + text[sentence_start].upper() + text[sentence_start + 1 :]
    return DiseasePrompt(text, tuple(entities))


def _pick(choices: Sequence[_T], draw: float) -> _T:
    return choices[int(draw * len(choices))]


def load_disease_prompts(name_or_path: str = "default") -> DiseasePromptSet:
    """Reads a set of the package by name, or any by the path of its TOML file.

    Raises:
        ConfigError: When there is no such set, or a key or value breaks a rule.
    """
    what = "set of disease-kind prompts"
    values = read_toml(what, "disease_prompts", name_or_path)
    return parse(DiseasePromptSet, values, f"{what} {name_or_path}")
