"""Entities of a report: findings, anatomy and modifiers as character spans, with negation.

The default finder looks all forms of a radiology lexicon (lexicon/*.toml) up in one pass of spaCy's
PhraseMatcher, and then decides which findings a cue such as "no" or "may represent" governs. Any
spaCy pipeline or Hugging Face token-classification model can stand in for the lexicon; the cues
stay the same.
"""

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice, pairwise
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np
import spacy
from jaxtyping import Int32, Integer
from spacy.matcher import PhraseMatcher
from spacy.tokens import Doc
from spacy.vocab import Vocab

from mmclip.config import read_toml
from mmclip.data.sample import Entity, EntityKind, EntityStatus


class EntityFinder:
    """Finds the entities of reports; built once (0.3 s for the lexicon), used for many.

    Args:
        backend: "lexicon"; "spacy:NAME" for the named entities of a spaCy pipeline, installed or in
            a folder; "hf:NAME" for a Hugging Face token-classification model, likewise.

    Raises:
        ValueError: When the backend is none of these.
    """

    def __init__(self, backend: str = "lexicon"):
        family, _, name = backend.partition(":")
        if backend == "lexicon":
            self._lexicon, self._tag = _read_lexicon(), None
        elif family == "spacy" and name:
            self._lexicon, self._tag = _read_lexicon(cues_only=True), _spacy_tagger(name)
        elif family == "hf" and name:
            self._lexicon, self._tag = _read_lexicon(cues_only=True), _hf_tagger(name)
        else:
            raise ValueError(
                f"entity backend {backend!r} is unknown; use 'lexicon', 'spacy:NAME' or 'hf:NAME', "
                f"where NAME is an installed model or a folder"
            )

    def find(self, texts: Iterable[str]) -> Iterator[list[Entity]]:
        """The entities of each text: in order, disjoint and inside the text."""
        rest = iter(texts)
        while some := list(islice(rest, 64)):  # [chosen: keeps a model busy and memory small]
            tagged = self._tag(some) if self._tag else [None] * len(some)
            for text, spans in zip(some, tagged, strict=True):
                entities, marks = self._lexicon.scan(text)
                if spans is not None:
                    entities = [Entity(*span) for span in _longest_disjoint(spans, set())]
                yield _with_status(entities, marks)


def find_entities(texts: Iterable[str], backend: str = "lexicon") -> Iterator[list[Entity]]:
    """The entities of each text; EntityFinder says which backends there are."""
    return _finder(backend).find(texts)


def is_entity_tokens(
    entities: Sequence[Entity], offsets: Integer[np.ndarray, "t 2"]
) -> Int32[np.ndarray, " t"]:
    """Which concept each token mentions, so that all its mentions can be masked together.

    Args:
        entities: Disjoint entities of one report; leave those out that shall never be masked.
        offsets: Start and end character of each token; equal for [CLS], [SEP] and padding.

    Returns:
        0 for a token of no entity, otherwise the number of its concept, counted from 1 in order of
        first mention. A token that touches two entities belongs to the later one.
    """
    groups = np.zeros(len(offsets), np.int32)
    number: dict[str, int] = {}
    start, end = offsets[:, 0], offsets[:, 1]
    for entity in entities:
        touches = (start < entity.end) & (end > entity.start) & (end > start)
        groups[touches] = number.setdefault(entity.concept, len(number) + 1)
    return groups


@cache
def _finder(backend: str) -> EntityFinder:
    return EntityFinder(backend)


# -- what a cue governs --


class _Mark(NamedTuple):
    """Words that are no entity but bear on one: a cue, or the end of a clause."""

    start: int
    end: int
    before: EntityStatus | None = None  # what it says of the findings after it in the clause
    after: EntityStatus | None = None  # of the findings before it in the clause
    nearest: bool = False  # `after` holds for the last finding before it only


def _with_status(entities: Sequence[Entity], marks: Sequence[_Mark]) -> list[Entity]:
    """Gives each finding the status that the marks around it say.

    A finding heeds the last mark before it and the first mark after it, and of these two the
    nearer; every mark ends the reach of the one beyond it. A cue inside the finding goes first.

    Args:
        entities: In order and disjoint.
        marks: In order and disjoint.

    Source: after NegEx (Chapman et al. 2001) and ConText (Harkema et al. 2009): cues with a
        direction, pseudo cues and terminating words; nearest mark instead of a fixed window [ours].
    """
    starts, ends = [m.start for m in marks], [m.end for m in marks]
    findings = [e for e in entities if e.kind == "finding"]
    follower = {a.start: b.start for a, b in pairwise(findings)}
    out = []
    for entity in entities:
        if entity.kind != "finding":
            out.append(entity)
            continue
        first, last = bisect_left(starts, entity.start), bisect_right(ends, entity.end)
        heard: list[tuple[int, EntityStatus, _Mark]] = [
            (0, m.before, m) for m in marks[first:last] if m.before
        ]
        prior = bisect_right(ends, entity.start) - 1
        if prior >= 0 and (said := marks[prior].before):
            heard.append((entity.start - marks[prior].end, said, marks[prior]))
        nxt = bisect_left(starts, entity.end)
        if nxt < len(marks) and (said := marks[nxt].after):
            between = follower.get(entity.start, marks[nxt].end) < marks[nxt].start
            if not (marks[nxt].nearest and between):
                heard.append((marks[nxt].start - entity.end, said, marks[nxt]))
        if heard:
            _, status, mark = min(heard, key=lambda h: (h[0], h[1]))
            entity = replace(entity, status=status, cue=(mark.start, mark.end))
        out.append(entity)
    return out


# -- the lexicon --

_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+|[^\w\s\-\u2010-\u2015]|\n(?=\s*(?:\n|[-*\u2022]|\d+[.)]))")
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


class _Lexicon:
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
                    for words in _expand(phrase):
                        senses[words].whole.append((kind, concept))
                case [left, gap, right]:
                    for words in _expand(left):
                        senses[words].left_of.append(number)
                    for words in _expand(right):
                        senses[words].right_of.append((number, int(gap), kind, concept))
                case _:
                    raise ValueError(f"form {form!r} of {concept!r} has more than one gap <n>")
        for role, phrase in cues:
            for words in _expand(phrase):
                senses[words].roles.add(role)
        for word in _SENTENCE_ENDS:
            senses[word].roles |= {"stop", "gap stop"}
        self._most_words = max(len(words.split(" ")) for words in senses)
        self._vocab = Vocab()
        self._matcher = PhraseMatcher(self._vocab)
        for words in senses:
            self._matcher.add(words, [Doc(self._vocab, words=words.split(" "))])
        self._senses = {self._vocab.strings[words]: sense for words, sense in senses.items()}

    def scan(self, text: str) -> tuple[list[Entity], list[_Mark]]:
        """The entities of a text, all "present" so far, and the marks; both in order, disjoint."""
        spans = [m.span() for m in _WORD.finditer(text)]
        doc = Doc(self._vocab, words=[text[a:b].lower() for a, b in spans])
        found: list[
            tuple[int, int, EntityKind, str]
        ] = []  # start and end count words from here ...
        cues: list[tuple[int, int, set[str]]] = []
        lefts: dict[int, list[tuple[int, int]]] = defaultdict(list)
        walls: list[int] = []  # where no gap may reach over
        for key, start, end in self._matcher(doc):  # in order of start
            senses = self._senses[key]
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
            for start, end, roles in _longest_disjoint(cues, in_cue)
            if "pseudo" not in roles
        ]
        taken: set[int] = set()  # "left hilar enlargement" is a hilar enlargement, not a left hilum
        chosen = _longest_disjoint((f for f in found if f[2] == "finding"), taken)
        taken |= in_cue
        chosen += _longest_disjoint((f for f in found if f[2] != "finding"), taken)
        entities = [
            Entity(spans[start][0], spans[end - 1][1], kind, concept)
            for start, end, kind, concept in sorted(chosen)
        ]
        return entities, marks  # ... and characters here


def _mark(start: int, end: int, roles: set[str]) -> _Mark:
    """A mark of the roles that a phrase has in cues.toml; "stop" alone says nothing of findings."""
    said: dict[str, EntityStatus] = {}
    for status in ("negated", "uncertain"):
        for place in ("before", "after", "between"):
            if f"{status} {place}" in roles:
                said.setdefault(place, status)
    after = said.get("after") or said.get("between")
    return _Mark(start, end, said.get("before") or said.get("between"), after, "after" not in said)


def _expand(form: str) -> list[str]:
    """All wordings of a form without gaps, as words with single spaces: "rib(|s)" gives two."""
    group = _GROUP.search(form)
    if group is None:
        return [" ".join(m.group().lower() for m in _WORD.finditer(form))]
    head, tail = form[: group.start()], form[group.end() :]
    wordings = (w for choice in group[1].split("|") for w in _expand(head + choice + tail))
    return list(dict.fromkeys(wordings))


_Span = TypeVar("_Span", bound=tuple)


def _longest_disjoint(spans: Iterable[_Span], taken: set[int]) -> list[_Span]:
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


def _read_lexicon(cues_only: bool = False) -> _Lexicon:
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
    return _Lexicon(forms, cues)


# -- other models in place of the lexicon --


def _kind_of_label(label: str) -> EntityKind:
    """The kind that a model's label means: by a telling part of its name, else a finding.

    Source: ours; covers the labels of RadGraph ("ANAT-DP", "OBS-DP"), of UMLS semantic types
        ("Body Part, Organ, or Organ Component") and of general NER ("DISEASE").
    """
    label = label.lower()
    if any(part in label for part in ("anat", "body", "organ", "location", "region", "tissue")):
        return "anatomy"
    if any(part in label for part in ("modif", "qualif", "sever", "descri", "attrib", "tempor")):
        return "modifier"
    return "finding"


def _concept_of(mention: str) -> str:
    """The concept of a mention that its model does not name: its words in lower case."""
    return " ".join(mention.lower().split())


_Tagged = tuple[int, int, EntityKind, str]
_Tagger = Callable[[Sequence[str]], list[list[_Tagged]]]


def _spacy_tagger(name: str) -> _Tagger:
    nlp = spacy.load(name)

    def tag(texts: Sequence[str]) -> list[list[_Tagged]]:
        return [
            [
                (
                    e.start_char,
                    e.end_char,
                    _kind_of_label(e.label_),
                    e.ent_id_ or _concept_of(e.text),
                )
                for e in doc.ents
            ]
            for doc in nlp.pipe(texts)
        ]

    return tag


def _hf_tagger(name: str) -> _Tagger:
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    model = AutoModelForTokenClassification.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name!r} gives no character offsets; use a fast one")
    # A tokenizer may not know how long a text its model reads; RoBERTa cannot use 2 positions.
    window = min(tokenizer.model_max_length, model.config.max_position_embeddings - 2)
    tokenizer.model_max_length = window
    run = pipeline(
        "token-classification",
        model=model,
        tokenizer=tokenizer,
        aggregation_strategy="simple",
        stride=window // 8,  # [chosen: a long report is read in windows that overlap a little]
    )

    def tag(texts: Sequence[str]) -> list[list[_Tagged]]:
        return [
            [tagged(text, span) for span in run(text)] if text.strip() else [] for text in texts
        ]

    def tagged(text: str, span: dict) -> _Tagged:
        start, end = int(span["start"]), int(span["end"])
        return start, end, _kind_of_label(span["entity_group"]), _concept_of(text[start:end])

    return tag
