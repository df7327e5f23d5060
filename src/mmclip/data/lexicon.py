"""The radiology lexicon: all its forms and cues, found in one pass over a report.

The pass is pyahocorasick's: one C extension without dependencies (0.1 MB, wheels for Linux, macOS
and Windows, BSD-3, kept since 2011), whose time is linear in the text whatever the text says. It
matches characters, so each word of the lexicon becomes one character of an alphabet of words.
"""

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TypeVar

import ahocorasick

from mmclip.config import read_toml
from mmclip.data.negation import Mark
from mmclip.data.sample import Entity, EntityKind, EntityStatus

_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+|[^\w\s\-\u2010-\u2015]|\n(?=\s*(?:\n|[-*\u2022]|\d+[.)]))")
_NO_LETTER = "\0"  # stands for a word that no phrase has
_SENTENCE_ENDS = ".!?\n"
_GAP = re.compile(r"\s*<(\d+)>\s*")
_SET = re.compile(r"\{(\w+)\}")
_GROUP = re.compile(r"\(([^()]*)\)")
_KINDS: dict[str, EntityKind] = {
    "findings": "finding",
    "anatomy": "anatomy",
    "modifiers": "modifier",
}


@dataclass(slots=True)
class _Senses:
    """What a phrase may stand for; most phrases have one sense."""

    whole: list[tuple[EntityKind, str]] = field(default_factory=list)
    left_of: list[int] = field(default_factory=list)  # numbers of forms
    right_of: list[tuple[int, int, EntityKind, str]] = field(default_factory=list)  # form, gap, ...
    roles: set[str] = field(default_factory=set)  # "negated before", "stop", "gap stop", ...


class Lexicon:
    """All forms and cues, compiled into one matcher.

    Args:
        forms: Kind, concept and form, in the syntax that findings.toml describes.
        cues: Role ("negated before", "stop", "pseudo", ...) and phrase, in the same syntax.
    """

    def __init__(
        self, forms: Iterable[tuple[EntityKind, str, str]], cues: Iterable[tuple[str, str]]
    ):
        senses: dict[str, _Senses] = defaultdict(_Senses)
        for number, (kind, concept, form) in enumerate(forms):
            match _GAP.split(form):
                case [phrase]:
                    for words in expand(phrase):
                        senses[words].whole.append((kind, concept))
                case [left, gap, right]:
                    for words in expand(left):
                        senses[words].left_of.append(number)
                    for words in expand(right):
                        senses[words].right_of.append((number, int(gap), kind, concept))
                case _:
                    raise ValueError(f"form {form!r} of {concept!r} has more than one gap <n>")
        for role, phrase in cues:
            for words in expand(phrase):
                senses[words].roles.add(role)
        for word in _SENTENCE_ENDS:
            senses[word].roles |= {"stop", "gap stop"}
        self._most_words = max(len(words.split(" ")) for words in senses)
        self._letters: dict[str, str] = {}
        self._matcher = ahocorasick.Automaton()
        for phrase, sense in senses.items():
            words = phrase.split(" ")
            letters = (self._letters.setdefault(w, chr(len(self._letters) + 1)) for w in words)
            self._matcher.add_word("".join(letters), (len(words), sense))
        self._matcher.make_automaton()
        self.phrases = frozenset(senses)

    def matches(self, words: Sequence[str]) -> list[tuple[int, int, _Senses]]:
        """Every phrase in some words, as start and end word and senses; in order of start."""
        letters = "".join([self._letters.get(word.lower(), _NO_LETTER) for word in words])
        found = [
            (last + 1 - length, last + 1, senses)
            for last, (length, senses) in self._matcher.iter(letters)
        ]
        return sorted(found, key=itemgetter(0))

    def scan(self, text: str) -> tuple[list[Entity], list[Mark]]:
        """The entities of a text, all "present" so far, and the marks; both in order, disjoint."""
        spans = [m.span() for m in _WORD.finditer(text)]
        found: list[
            tuple[int, int, EntityKind, str]
        ] = []  # start and end count words from here ...
        cues: list[tuple[int, int, set[str]]] = []
        lefts: dict[int, list[tuple[int, int]]] = defaultdict(list)
        walls: list[int] = []  # where no gap may reach over
        for start, end, senses in self.matches([text[a:b] for a, b in spans]):
            found += [(start, end, *whole) for whole in senses.whole]
            for number in senses.left_of:
                lefts[number].append((start, end))
            for number, gap, kind, concept in senses.right_of:
                for left_start, left_end in reversed(lefts.get(number, ())):
                    if left_start < start - gap - self._most_words:
                        break
                    is_open = bisect_left(walls, left_end) == bisect_left(walls, start)
                    if 0 <= start - left_end <= gap and is_open:
                        found.append((left_start, end, kind, concept))
            if "gap stop" in senses.roles:
                walls.append(start)
            if senses.roles - {"gap stop"}:
                cues.append((start, end, senses.roles))

        in_cue: set[int] = set()
        marks = [
            _mark(spans[start][0], spans[end - 1][1], roles)
            for start, end, roles in longest_disjoint(cues, in_cue)
            if "pseudo" not in roles
        ]
        taken: set[int] = set()  # "left hilar enlargement" is a hilar enlargement, not a left hilum
        chosen = longest_disjoint((f for f in found if f[2] == "finding"), taken)
        taken |= in_cue
        chosen += longest_disjoint((f for f in found if f[2] != "finding"), taken)
        entities = [
            Entity(spans[start][0], spans[end - 1][1], kind, concept)
            for start, end, kind, concept in sorted(chosen)
        ]
        return entities, marks  # ... and characters here


def _mark(start: int, end: int, roles: set[str]) -> Mark:
    """A mark of the roles that a phrase has in cues.toml; "stop" alone says nothing of findings."""
    said: dict[str, EntityStatus] = {}
    for status in ("negated", "uncertain"):
        for place in ("before", "after", "between"):
            if f"{status} {place}" in roles:
                said.setdefault(place, status)
    after = said.get("after") or said.get("between")
    return Mark(start, end, said.get("before") or said.get("between"), after, "after" not in said)


def expand(form: str) -> list[str]:
    """All wordings of a form without gaps, as words with single spaces: "rib(|s)" gives two."""
    group = _GROUP.search(form)
    if group is None:
        return [" ".join(m.group().lower() for m in _WORD.finditer(form))]
    head, tail = form[: group.start()], form[group.end() :]
    wordings = (w for choice in group[1].split("|") for w in expand(head + choice + tail))
    return list(dict.fromkeys(wordings))


_Span = TypeVar("_Span", bound=tuple)


def longest_disjoint(spans: Iterable[_Span], taken: set[int]) -> list[_Span]:
    """Of spans (start, end, ...) that overlap the longest, then the first; in order of start.

    Args:
        taken: Places that no span may touch; those of the spans that are kept are added to it.
    """
    kept: list[_Span] = []
    for span in sorted(spans, key=lambda s: (s[0] - s[1], s[0])):
        places = range(span[0], span[1])
        if taken.isdisjoint(places):
            taken.update(places)
            kept.append(span)
    return sorted(kept, key=itemgetter(0))


def read_lexicon(cues_only: bool = False) -> Lexicon:
    """The lexicon of the package."""

    def read(name: str) -> dict:
        return read_toml("lexicon", "lexicon", name)

    forms: list[tuple[EntityKind, str, str]] = []
    kinds: dict[str, EntityKind] = {} if cues_only else _KINDS
    for name, kind in kinds.items():
        entries = read(name)
        sets = {key: f"({'|'.join(some)})" for key, some in entries.pop("sets", {}).items()}
        for concept, entry in entries.items():
            for form in entry["forms"]:
                forms.append((kind, concept, _SET.sub(lambda m, sets=sets: sets[m[1]], form)))
    cues = [(role, phrase) for role, phrases in read("cues").items() for phrase in phrases]
    return Lexicon(forms, cues)
