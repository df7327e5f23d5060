"""The radiology lexicon: all its forms and cues, found in one pass over a report.

The pass is pyahocorasick's: one C extension without dependencies (0.1 MB, wheels for Linux, macOS
and Windows, BSD-3, kept since 2011), whose time is linear in the text whatever the text says. It
matches characters, so each word of the lexicon becomes two characters of an alphabet of words.
"""

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import NamedTuple, TypeVar

import ahocorasick

from mmclip.config_io import read_toml
from mmclip.data.negation import Heard, Mark, Span, statuses
from mmclip.data.sample import Entity, EntityKind, EntityStatus
from mmclip.data.spelling import Letters
from mmclip.data.words import WORD, ListWords, words_of

_SENTENCE_ENDS = ".!?"
_GAP = re.compile(r"\s*<(\d+)>\s*")
_SET = re.compile(r"\{(\w+)\}")
_GROUP = re.compile(r"\(([^()]*)\)")
_KINDS: dict[str, EntityKind] = {
    "findings": "finding",
    "anatomy": "anatomy",
    "modifiers": "modifier",
}


class _Concept(NamedTuple):
    kind: EntityKind
    name: str


class _Use(NamedTuple):
    """What a phrase with some roles does, worked out once for all reports.

    Attributes:
        is_wall: No gap reaches over it.
        is_only_wall: It does nothing else.
        is_void: It switches off every cue that it touches, a denied change among them.
        is_degree: It denies a change, which it may not do everywhere.
        is_only_outcome: It takes back a resolution, and says nothing where there is none.
        is_pseudo: It switches off the cues inside it.
        mark: What it says of findings, at no place yet.
    """

    is_wall: bool
    is_only_wall: bool
    is_void: bool
    is_degree: bool
    is_only_outcome: bool
    is_pseudo: bool
    mark: Mark


@dataclass(slots=True)
class _Senses:
    """What a phrase may stand for; most phrases have one sense."""

    concepts: list[_Concept] = field(default_factory=list)
    roles: frozenset[str] = frozenset()  # "negated before", "stop", "gap stop", ...
    left_of: dict[str, None] = field(default_factory=dict)  # what stands before a gap, in order
    right_of: list[tuple[str, int, _Concept | _Use]] = field(default_factory=list)  # left, gap, ...


class _Cue(NamedTuple):
    """A cue from word `start` to `end`; its gap reaches from `left_end` to `right_start`."""

    start: int
    end: int
    use: _Use
    left_end: int
    right_start: int


_Found = tuple[int, int, _Concept]


class Lexicon:
    """All forms and cues, compiled into one matcher.

    Args:
        forms: Concept and form, in the syntax that findings.toml describes.
        cues: Role ("negated before", "stop", "pseudo", ...) and phrase, in the same syntax.
        lists: The words by which a list of findings is seen to end.
    """

    def __init__(
        self,
        forms: Sequence[tuple[_Concept, str]],
        cues: Iterable[tuple[str, str]],
        lists: ListWords,
    ):
        senses: dict[str, _Senses] = defaultdict(_Senses)
        for meaning, form in (*forms, *cues):
            match _GAP.split(form):
                case [phrase]:
                    for words in expand(phrase):
                        if isinstance(meaning, str):
                            senses[words].roles |= {meaning}
                        else:
                            senses[words].concepts.append(meaning)
                case [left, gap, right]:
                    for words in expand(left):
                        senses[words].left_of[left] = None
                    use = _use(frozenset((meaning,))) if isinstance(meaning, str) else meaning
                    for words in expand(right):
                        senses[words].right_of.append((left, int(gap), use))
                case _:
                    raise ValueError(f"form {form!r} of {meaning!r} has more than one gap <n>")
        for word in _SENTENCE_ENDS:
            senses[word].roles |= {"stop", "gap stop"}
        self._lists = lists
        self._most_words = max(len(words.split(" ")) for words in senses)
        self._letters = Letters()
        self._matcher = ahocorasick.Automaton()
        for phrase, sense in senses.items():
            words = phrase.split(" ")
            self._matcher.add_word("".join(map(self._letters.learn, words)), (len(words), sense))
        self._matcher.make_automaton()
        self.phrases = frozenset(senses)
        self.concepts = frozenset(concept.name for concept, _ in forms)

    def matches(self, words: Sequence[str]) -> list[tuple[int, int, _Senses]]:
        """Every phrase in some words, as start and end word and senses; in order of start."""
        return self._matches("".join(map(self._letters.__getitem__, words)))

    def _matches(self, letters: str) -> list[tuple[int, int, _Senses]]:
        found = [
            ((end := (last + 1) // 2) - length, end, senses)
            for last, (length, senses) in self._matcher.iter(letters)
        ]
        found.sort(key=itemgetter(0))
        return found

    def find(self, text: str) -> list[Entity]:
        """The entities of a text, with the status of each finding: in order and disjoint."""
        words, places, letters = self._letters.spell(*words_of(text))
        found, cues = self._candidates(letters)
        taken: set[int] = set()  # "left hilar enlargement" is a hilar enlargement, not a left hilum
        chosen = longest_disjoint((f for f in found if f[2].kind == "finding"), taken)
        findings = [Span(start, end, concept.name) for start, end, concept in chosen]
        marks, in_cue = _marks(words, cues, findings)
        said = statuses(words, findings, marks, self._lists)
        said = _with_headings(words, chosen, said)
        heard = {finding.start: one for finding, one in zip(findings, said, strict=True)}
        taken |= in_cue
        chosen += longest_disjoint((f for f in found if f[2].kind != "finding"), taken)
        chosen.sort(key=itemgetter(0))
        entities: list[Entity] = []
        for start, end, (kind, name) in chosen:
            status, cue = _said(heard[start], places) if kind == "finding" else ("present", None)
            place = places[start][0], places[end - 1][1]
            entities.append(Entity(*place, kind, name, status, cue))
        return entities

    def assess(self, text: str, entities: Sequence[Entity]) -> list[Entity]:
        """Entities that another program found, with the status of each finding.

        Args:
            entities: In order, disjoint and inside the text. A cue inside one belongs to it.
        """
        words, places, letters = self._letters.spell(*words_of(text))
        starts, ends = [a for a, _ in places], [b for _, b in places]
        spans = [
            Span(first, max(first, bisect_left(starts, e.end)), e.concept)
            for e in entities
            for first in [bisect_left(ends, e.start + 1)]
        ]
        findings = [s for s, e in zip(spans, entities, strict=True) if e.kind == "finding"]
        marks, _ = _marks(words, self._candidates(letters)[1], findings)
        heard = iter(statuses(words, findings, marks, self._lists, is_own_cue_heard=False))
        out: list[Entity] = []
        for entity in entities:
            if entity.kind == "finding":
                status, cue = _said(next(heard), places)
                entity = entity._replace(status=status, cue=cue)
            out.append(entity)
        return out

    def _candidates(self, letters: str) -> tuple[list[_Found], list[_Cue]]:
        """Whatever some words may mean: concepts and cues, overlaps and all."""
        found: list[_Found] = []
        cues: list[_Cue] = []
        lefts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        walls: list[int] = []  # where no gap may reach over
        for start, end, senses in self._matches(letters):
            for concept in senses.concepts:
                found.append((start, end, concept))
            for left in senses.left_of:
                lefts[left].append((start, end))
            for left, gap, meaning in senses.right_of:
                if left not in lefts:
                    continue
                for left_start, left_end in reversed(lefts[left]):
                    if left_start < start - gap - self._most_words:
                        break
                    is_open = bisect_left(walls, left_end) == bisect_left(walls, start)
                    if not (0 <= start - left_end <= gap and is_open):
                        continue
                    if isinstance(meaning, _Use):
                        cues.append(_Cue(left_start, end, meaning, left_end, start))
                    else:
                        found.append((left_start, end, meaning))
            if senses.roles:
                use = _use(senses.roles)
                if use.is_wall:
                    walls.append(start)
                if not use.is_only_wall:
                    cues.append(_Cue(start, end, use, end, end))
        return found, cues


def _with_headings(
    words: Sequence[str], chosen: Sequence[_Found], said: Sequence[Heard]
) -> list[Heard]:
    """What is said of the findings, where a line names one and then states it ("Edema: no edema").

    The name before the colon says what the same concept in the sentence behind it says.
    """
    out = list(said)
    for i in range(len(chosen) - 2, -1, -1):
        (_, end, concept), (start, _, following) = chosen[i], chosen[i + 1]
        is_heading = words[end] == ":" and said[i].mark is None and concept == following
        if is_heading and "." not in words[end:start]:
            out[i] = out[i + 1]
    return out


def _marks(
    words: Sequence[str], cues: Sequence[_Cue], findings: Sequence[Span]
) -> tuple[list[Mark], set[int]]:
    """The cues that hold, in order and disjoint, and the words that any cue takes up."""
    starts = [finding.start for finding in findings]
    in_cue: set[int] = set()
    rest: list[_Cue] = []
    has_resolution = any(cue.use.mark.is_resolution for cue in cues)
    for cue in cues:
        start, end, use, left_end, right_start = cue
        if left_end < right_start and bisect_left(starts, left_end) < bisect_left(
            starts, right_start
        ):
            continue  # a finding stands in the gap
        if use.is_degree and not _denies_change(words, cue, findings, starts):
            continue
        if use.is_void:
            in_cue.update(range(start, end))
        elif has_resolution or not use.is_only_outcome:
            rest.append(cue)
    return [
        Mark(cue.start, cue.end, *cue.use.mark[2:])
        for cue in longest_disjoint(rest, in_cue)
        if not cue.use.is_pseudo
    ], in_cue


def _denies_change(
    words: Sequence[str], cue: _Cue, findings: Sequence[Span], starts: Sequence[int]
) -> bool:
    """Whether a phrase such as "no relevant change" is about change, and about nothing else."""
    i = bisect_left(starts, cue.end) - 1
    is_part = i >= 0 and findings[i].end > cue.right_start
    return not is_part and words[cue.end] not in ("or", "nor")


@cache
def _use(roles: frozenset[str]) -> _Use:
    """What a phrase does that has some roles in cues.toml."""
    return _Use(
        is_wall="gap stop" in roles,
        is_only_wall=roles == {"gap stop"},
        is_void=not roles.isdisjoint(("void", "degree")),
        is_degree="degree" in roles,
        is_only_outcome=roles == {"outcome"},
        is_pseudo="pseudo" in roles,
        mark=_meaning(roles),
    )


def _meaning(roles: frozenset[str]) -> Mark:
    """A mark of the roles that a phrase has in cues.toml; "stop" alone says nothing of findings."""
    said: dict[str, EntityStatus] = {}
    for status in ("negated", "uncertain"):
        for place in (
            "before", "after", "either", "between", "copula", "suffix", "purpose", "resolution"
        ):  # fmt: skip
            if f"{status} {place}" in roles:
                said.setdefault(place, status)
    both = said.get("either") or said.get("between") or said.get("copula")
    before = said.get("before") or said.get("purpose") or said.get("resolution") or both
    return Mark(
        0,
        0,
        before,
        after=said.get("after") or said.get("suffix") or both,
        is_either="either" in said,
        is_between="between" in said and "after" not in said,
        is_copula="copula" in said,
        is_suffix="suffix" in said,
        is_purpose="purpose" in said,
        is_resolution="resolution" in said,
        is_outcome="outcome" in roles,
    )


def _said(
    heard: Heard, places: Sequence[tuple[int, int]]
) -> tuple[EntityStatus, tuple[int, int] | None]:
    """The status of a finding, and the characters that say so."""
    if heard.mark is None:
        return "present", None
    return heard.status, (places[heard.mark.start][0], places[heard.mark.end - 1][1])


@cache  # the cues of the package are in every lexicon
def expand(form: str) -> tuple[str, ...]:
    """All wordings of a form without gaps, as words with single spaces: "rib(|s)" gives two."""
    group = _GROUP.search(form)
    if group is None:
        return (" ".join(m.group().lower() for m in WORD.finditer(form)),)
    head, tail = form[: group.start()], form[group.end() :]
    wordings = (w for choice in group[1].split("|") for w in expand(head + choice + tail))
    return tuple(dict.fromkeys(wordings))


_Span = TypeVar("_Span", bound=tuple)


def longest_disjoint(spans: Iterable[_Span], taken: set[int]) -> list[_Span]:
    """Of spans (start, end, ...) that overlap the longest, then the first; in order of start.

    Args:
        taken: Places that no span may touch; those of the spans that are kept are added to it.
    """
    kept: list[_Span] = []
    longest_first = sorted(spans, key=itemgetter(0))
    longest_first.sort(key=lambda span: span[0] - span[1])
    for span in longest_first:
        places = range(span[0], span[1])
        if taken.isdisjoint(places):
            taken.update(places)
            kept.append(span)
    kept.sort(key=itemgetter(0))
    return kept


def lexicon_of(findings: Mapping[str, Sequence[str]]) -> Lexicon:
    """A lexicon of a user's own findings, each with its forms, and of the cues of the package.

    Raises:
        ValueError: When a form has more than one gap.
    """
    return _with_cues(
        [(_Concept("finding", name), form) for name, forms in findings.items() for form in forms]
    )


def read_lexicon(cues_only: bool = False) -> Lexicon:
    """The lexicon of the package."""
    forms: list[tuple[_Concept, str]] = []
    kinds: dict[str, EntityKind] = {} if cues_only else _KINDS
    for name, kind in kinds.items():
        entries = read_toml("lexicon", "lexicon", name)
        sets = flat_sets(entries.pop("sets", {}))
        for concept, entry in entries.items():
            forms += [(_Concept(kind, concept), insert(sets, form)) for form in entry["forms"]]
    return _with_cues(forms)


def _with_cues(forms: Sequence[tuple[_Concept, str]]) -> Lexicon:
    cues = read_toml("lexicon", "lexicon", "cues")
    sets = flat_sets(cues["sets"])
    phrases = [(role, insert(sets, form)) for role, some in cues["cues"].items() for form in some]
    lists = ListWords(**{name: frozenset(some) for name, some in cues["lists"].items()})
    return Lexicon(forms, phrases, lists)


def flat_sets(sets: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Each named set as one group of all its wordings."""
    return {
        name: f"({'|'.join(words for form in forms for words in expand(form))})"
        for name, forms in sets.items()
    }


def insert(sets: Mapping[str, str], form: str) -> str:
    """A form with the sets that it names in their place."""
    return _SET.sub(lambda match: sets[match[1]], form)
