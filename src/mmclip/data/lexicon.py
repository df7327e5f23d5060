"""The radiology lexicon: all its forms and cues, found in one pass over a report.

The pass is pyahocorasick's: one C extension without dependencies (0.1 MB, wheels for Linux, macOS
and Windows, BSD-3, kept since 2011), whose time is linear in the text whatever the text says. It
matches characters, so each word of the lexicon becomes one character of an alphabet of words.
"""

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from operator import itemgetter
from typing import NamedTuple, TypeVar

import ahocorasick

from mmclip.config_io import read_toml
from mmclip.data.negation import Heard, ListWords, Mark, Span, statuses
from mmclip.data.sample import Entity, EntityKind, EntityStatus

_SHORT_AND_MORE = {
    "sig": "significant", "signif": "significant", "bilat": "bilateral", "eval": "evaluate",
    "sm": "small", "mod": "moderate", "vs": "versus",
}  # fmt: skip
_SHORT = _SHORT_AND_MORE | {
    "pna": "pneumonia", "opac": "opacity", "opacs": "opacities", "consol": "consolidation",
    "atel": "atelectasis", "infil": "infiltrate", "eff": "effusion", "effs": "effusions",
}  # fmt: skip
"""Words that radiologists type in short, with a full stop or without; the former end no sentence,
as they speak of what follows."""

# A line break is a word where a paragraph, an item of a list or a structured line begins behind it.
_WORD = re.compile(
    r"\d+(?:[.,]\d+)+|\w+|\.{3,}|[^\w\s\-\u2010-\u2015]"
    r"|-(?:ve\b|free\b|(?<=\(-)(?=\)))|(?<=[^\d\s])\ [-\u2013\u2014]{1,2}(?=\s)"
    r"|\n(?=[ \t]*(?:\n|[-*\u2022]|\d+[.)]|[A-Z][\w /()-]{1,40}:))"
)
_ALIASES = {
    **{"\n": ".", "(": "[", ")": "]", "\u2019": "'", "=": ":"},
    **{"-": "negative", "-ve": "negative", " -": ":", " --": ":", " \u2013": ":", " \u2014": ":"},
    **_SHORT,
}
"""Words of a text that stand for another one; forms cannot have a bracket or a line break."""
_JOINED = frozenset((*_SHORT, "well"))  # may be joined with what stands beside them
_NO_LETTER = "\0"  # stands for a word that no phrase has
_LONG_WORD = 8  # [chosen: "effusion" fits; shorter words have neighbours that are words]
_LONGEST_WORD = 40  # [chosen: no word of a report is longer]
_MOST_UNKNOWN = 50_000  # [chosen: bounds the memory; a year of reports has fewer]
# Words, and an ending of Spanish, that are right although they differ from a word by a letter.
_OTHER_WORDS = frozenset(("atelectasias", "atelectasies"))
_OTHER_ENDINGS = ("cion", "ciones")
_SENTENCE_ENDS = ".!?"
_LEADER = "..."  # of "Pneumothorax ..... none", which stands for a colon
_OPENERS = ("", ",", ";", ":", "(", "-", ".")  # before a "?" that asks of what follows
_GAP = re.compile(r"\s*<(\d+)>\s*")
_SET = re.compile(r"\{(\w+)\}")
_GROUP = re.compile(r"\(([^()]*)\)")
_WALL, _OUTCOME = frozenset(("gap stop",)), frozenset(("outcome",))
_VOID = frozenset(("void", "degree"))
_KINDS: dict[str, EntityKind] = {
    "findings": "finding",
    "anatomy": "anatomy",
    "modifiers": "modifier",
}


class _Concept(NamedTuple):
    kind: EntityKind
    name: str


@dataclass(slots=True)
class _Senses:
    """What a phrase may stand for; most phrases have one sense."""

    concepts: list[_Concept] = field(default_factory=list)
    roles: frozenset[str] = frozenset()  # "negated before", "stop", "gap stop", ...
    left_of: list[int] = field(default_factory=list)  # numbers of forms
    right_of: list[tuple[int, int, _Concept | str]] = field(default_factory=list)  # form, gap, ...


class _Cue(NamedTuple):
    """A cue from word `start` to `end`; its gap reaches from `left_end` to `right_start`."""

    start: int
    end: int
    roles: frozenset[str]
    left_end: int
    right_start: int


_Found = tuple[int, int, _Concept]


class _Letters(dict[str, str]):
    """The letter of each word; of an unknown one that of the long word that it misspells."""

    def __init__(self):
        super().__init__()
        self._long: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._unknown: list[str] = []

    def learn(self, word: str) -> str:
        """The letter of a word of the lexicon."""
        if word not in self:
            self[word] = chr(len(self) + 1)
            if len(word) >= _LONG_WORD:
                self._long[word[0], word[-1]].append(word)
        return self[word]

    def __missing__(self, word: str) -> str:
        if len(self._unknown) == _MOST_UNKNOWN:
            for old in self._unknown:
                self.pop(old, None)
            self._unknown.clear()
        if len(word) > _LONGEST_WORD:
            return _NO_LETTER
        self._unknown.append(word)
        is_right = word in _OTHER_WORDS or word.endswith(_OTHER_ENDINGS)
        known = () if is_right else self._long.get((word[0], word[-1]), ())
        right = next((long for long in known if differs_by_one_slip(word, long)), None)
        self[word] = self[right] if right else _NO_LETTER
        return self[word]


class Lexicon:
    """All forms and cues, compiled into one matcher.

    Args:
        forms: Concept and form, in the syntax that findings.toml describes.
        cues: Role ("negated before", "stop", "pseudo", ...) and phrase, in the same syntax.
        lists: The words by which a list of findings is seen to end.
    """

    def __init__(
        self,
        forms: Iterable[tuple[_Concept, str]],
        cues: Iterable[tuple[str, str]],
        lists: ListWords,
    ):
        senses: dict[str, _Senses] = defaultdict(_Senses)
        for number, (meaning, form) in enumerate((*forms, *cues)):
            match _GAP.split(form):
                case [phrase]:
                    for words in expand(phrase):
                        if isinstance(meaning, str):
                            senses[words].roles |= {meaning}
                        else:
                            senses[words].concepts.append(meaning)
                case [left, gap, right]:
                    for words in expand(left):
                        senses[words].left_of.append(number)
                    for words in expand(right):
                        senses[words].right_of.append((number, int(gap), meaning))
                case _:
                    raise ValueError(f"form {form!r} of {meaning!r} has more than one gap <n>")
        for word in _SENTENCE_ENDS:
            senses[word].roles |= {"stop", "gap stop"}
        self._lists = lists
        self._most_words = max(len(words.split(" ")) for words in senses)
        self._letters = _Letters()
        self._matcher = ahocorasick.Automaton()
        for phrase, sense in senses.items():
            words = phrase.split(" ")
            self._matcher.add_word("".join(map(self._letters.learn, words)), (len(words), sense))
        self._matcher.make_automaton()
        self.phrases = frozenset(senses)
        self.senses = tuple(senses.values())

    def matches(self, words: Sequence[str]) -> list[tuple[int, int, _Senses]]:
        """Every phrase in some words, as start and end word and senses; in order of start."""
        letters = "".join(map(self._letters.__getitem__, words))
        found = [
            (last + 1 - length, last + 1, senses)
            for last, (length, senses) in self._matcher.iter(letters)
        ]
        return sorted(found, key=itemgetter(0))

    def find(self, text: str) -> list[Entity]:
        """The entities of a text, with the status of each finding: in order and disjoint."""
        words, places = _words(text)
        found, cues = self._candidates(words)
        taken: set[int] = set()  # "left hilar enlargement" is a hilar enlargement, not a left hilum
        chosen = longest_disjoint((f for f in found if f[2].kind == "finding"), taken)
        findings = [Span(start, end, concept.name) for start, end, concept in chosen]
        marks, in_cue = _marks(words, cues, findings)
        said = statuses(words, findings, marks, self._lists)
        said = _with_headings(words, chosen, said)
        heard = {finding.start: one for finding, one in zip(findings, said, strict=True)}
        taken |= in_cue
        chosen += longest_disjoint((f for f in found if f[2].kind != "finding"), taken)
        return [
            _entity(
                Entity(places[start][0], places[end - 1][1], concept.kind, concept.name),
                heard.get(start) if concept.kind == "finding" else None,
                places,
            )
            for start, end, concept in sorted(chosen, key=itemgetter(0))
        ]

    def assess(self, text: str, entities: Sequence[Entity]) -> list[Entity]:
        """Entities that another program found, with the status of each finding.

        Args:
            entities: In order, disjoint and inside the text. A cue inside one belongs to it.
        """
        words, places = _words(text)
        starts, ends = [a for a, _ in places], [b for _, b in places]
        spans = [
            Span(first, max(first, bisect_left(starts, e.end)), e.concept)
            for e in entities
            for first in [bisect_left(ends, e.start + 1)]
        ]
        findings = [s for s, e in zip(spans, entities, strict=True) if e.kind == "finding"]
        marks, _ = _marks(words, self._candidates(words)[1], findings)
        heard = iter(statuses(words, findings, marks, self._lists, is_own_cue_heard=False))
        return [_entity(e, next(heard) if e.kind == "finding" else None, places) for e in entities]

    def _candidates(self, words: Sequence[str]) -> tuple[list[_Found], list[_Cue]]:
        """Whatever the words may mean: concepts and cues, overlaps and all."""
        found: list[_Found] = []
        cues: list[_Cue] = []
        lefts: dict[int, list[tuple[int, int]]] = defaultdict(list)
        walls: list[int] = []  # where no gap may reach over
        for start, end, senses in self.matches(words):
            found += [(start, end, concept) for concept in senses.concepts]
            for number in senses.left_of:
                lefts[number].append((start, end))
            for number, gap, meaning in senses.right_of:
                for left_start, left_end in reversed(lefts.get(number, ())):
                    if left_start < start - gap - self._most_words:
                        break
                    is_open = bisect_left(walls, left_end) == bisect_left(walls, start)
                    if not (0 <= start - left_end <= gap and is_open):
                        continue
                    if isinstance(meaning, str):
                        cues.append(_Cue(left_start, end, frozenset((meaning,)), left_end, start))
                    else:
                        found.append((left_start, end, meaning))
            if senses.roles:
                if "gap stop" in senses.roles:
                    walls.append(start)
                cues.append(_Cue(start, end, senses.roles, end, end))
        return found, cues


def _words(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The words of a text in lower case, with their characters; the last one is always a "."."""
    places = [match.span() for match in _WORD.finditer(text)]
    words = [text[start:end].lower() for start, end in places]
    if not _JOINED.isdisjoint(words):
        words, places = _joined(text, words, places)
    if not _ALIASES.keys().isdisjoint(words):
        words = [_ALIASES.get(word, word) for word in words]
    if _LEADER in text:
        words = [":" if word.startswith(_LEADER) else word for word in words]
    if "?" in text:
        for i, (_, end) in enumerate(places):
            behind = text[max(0, end - 3) : end - 1].strip()[-1:]
            is_loose = behind in _OPENERS and text[end : end + 2].lstrip()[:1].isalpha()
            if words[i] == "?" and (is_loose or text[end : end + 1].isalpha()):
                words[i] = "\u00bf"  # of "?pneumonia" and "opacity, ? pneumonia"
    words.append(".")
    places.append((len(text), len(text)))
    return words, places


def _joined(
    text: str, words: Sequence[str], places: Sequence[tuple[int, int]]
) -> tuple[list[str], list[tuple[int, int]]]:
    """The words with "as well as" as an "and", and without the full stops of words in short.

    A full stop behind a short noun may end a sentence: a small letter that follows tells, but not
    where all letters are small or all are capitals.
    """
    has_both_cases = not (text.islower() or text.isupper())
    joined: list[str] = []
    where: list[tuple[int, int]] = []
    for word, (start, end) in zip(words, places, strict=True):
        if word == "as" and joined[-2:] == ["as", "well"]:
            joined[-2:], where[-2:] = ["and"], [(where[-2][0], end)]
            continue
        if word == "." and joined and joined[-1] in _SHORT:
            following = text[end : end + 2].lstrip()[:1]
            says_more = following.isalnum() and joined[-1] in _SHORT_AND_MORE
            if following == "," or says_more or (has_both_cases and following.islower()):
                continue
        joined.append(word)
        where.append((start, end))
    return joined, where


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
    has_resolution = any("negated resolution" in cue.roles for cue in cues)
    for cue in cues:
        if bisect_left(starts, cue.left_end) < bisect_left(starts, cue.right_start):
            continue  # a finding stands in the gap
        if "degree" in cue.roles and not _denies_change(words, cue, findings, starts):
            continue
        if cue.roles == _WALL or (cue.roles == _OUTCOME and not has_resolution):
            continue
        if not _VOID.isdisjoint(cue.roles):
            in_cue.update(range(cue.start, cue.end))
        else:
            rest.append(cue)
    return [
        _meaning(cue.roles)._replace(start=cue.start, end=cue.end)
        for cue in longest_disjoint(rest, in_cue)
        if "pseudo" not in cue.roles
    ], in_cue


def _denies_change(
    words: Sequence[str], cue: _Cue, findings: Sequence[Span], starts: Sequence[int]
) -> bool:
    """Whether a phrase such as "no relevant change" is about change, and about nothing else."""
    i = bisect_left(starts, cue.end) - 1
    is_part = i >= 0 and findings[i].end > cue.right_start
    return not is_part and words[cue.end] not in ("or", "nor")


@cache
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


def _entity(entity: Entity, heard: Heard | None, places: Sequence[tuple[int, int]]) -> Entity:
    """An entity with what was heard of it."""
    if heard is None or heard.mark is None:
        return entity
    cue = places[heard.mark.start][0], places[heard.mark.end - 1][1]
    return replace(entity, status=heard.status, cue=cue)


@cache  # the cues of the package are in every lexicon
def expand(form: str) -> tuple[str, ...]:
    """All wordings of a form without gaps, as words with single spaces: "rib(|s)" gives two."""
    group = _GROUP.search(form)
    if group is None:
        return (" ".join(m.group().lower() for m in _WORD.finditer(form)),)
    head, tail = form[: group.start()], form[group.end() :]
    wordings = (w for choice in group[1].split("|") for w in expand(head + choice + tail))
    return tuple(dict.fromkeys(wordings))


def differs_by_one_slip(a: str, b: str) -> bool:
    """Whether one letter more or less, two swapped, or a vowel for another make a word of another.

    S and z may stand for each other, too. Of other letters for another, too many are right words:
    "lobulated" and "loculated", "rejection" and "resection", "injection" and "infection".
    """
    if abs(len(a) - len(b)) > 1:
        return False
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    if len(a) == len(b) == 1:
        return any(a in alike and b in alike for alike in ("aeiouy", "sz"))
    return len(a) + len(b) <= 1 or (len(a) == 2 and a == b[::-1])


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
