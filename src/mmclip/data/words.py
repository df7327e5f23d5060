"""The words of a report, as the lexicon reads them: each with its place in the text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SHORT_AND_MORE = {
    "sig": "significant", "signif": "significant", "bilat": "bilateral", "eval": "evaluate",
    "sm": "small", "mod": "moderate", "vs": "versus", "poss": "possible", "prob": "probable",
    "pulm": "pulmonary", "susp": "suspicious",
}  # fmt: skip
_SHORT = _SHORT_AND_MORE | {
    "pna": "pneumonia", "opac": "opacity", "opacs": "opacities", "consol": "consolidation",
    "atel": "atelectasis", "infil": "infiltrate", "eff": "effusion", "effs": "effusions",
    "atx": "atelectasis", "infilt": "infiltrate", "effus": "effusion", "cardiomeg": "cardiomegaly",
}  # fmt: skip
"""Words that radiologists type in short, with a full stop or without; the former end no sentence,
as they speak of what follows."""

# A line break is a word where a paragraph, an item of a list or a structured line begins behind it.
WORD = re.compile(
    r"\d+(?:[.,]\d+)+|\w+|\.{3,}|[^\w\s\-\u2010-\u2015]"
    r"|-(?:ve\b|free\b|(?<=\(-)(?=\))|(?<=: -)(?=[\s,;.]|$))"
    r"|(?<=[^\d\s])\ [-\u2013\u2014]{1,2}(?=\s)"
    r"|\n(?=[ \t]*(?:\n|[-*\u2022]|\d+[.)]|[A-Z][\w /()-]{1,40}:))"
)
_ALIASES = {
    **{"\n": ".", "(": "[", ")": "]", "\u2019": "'", "=": ":"},
    **{"-": "negative", "-ve": "negative", " -": ":", " --": ":", " \u2013": ":", " \u2014": ":"},
    **_SHORT,
}
"""Words of a text that stand for another one; forms cannot have a bracket or a line break."""
_JOINED = frozenset((*_SHORT, "well"))  # may be joined with what stands beside them
_LEADER = "..."  # of "Pneumothorax ..... none", which stands for a colon
# Words before "CM" where it is cardiomegaly and no unit.
_BEFORE_CM = frozenset((
    ".", ",", ";", ":", "and", "no", "mild", "moderate", "severe", "marked", "massive", "stable",
    "unchanged", "persistent", "borderline", "known", "with", "has",
))  # fmt: skip
_BOX = re.compile(r"[\[(] ?([xX\u2713\u2714]?) ?[\])]|[\u2610-\u2612]")
_BOX_SIGNS = ("[ ]", "[]", "[x]", "[X]", "(x)", "(X)", "\u2610", "\u2611", "\u2612", "[\u2713]")
_ANSWERS = frozenset((
    "yes", "no", "none", "present", "absent", "negative", "positive", "normal", "unknown",
    "trace", "minimal", "mild", "small", "moderate", "large", "severe",
))  # fmt: skip
_OPENERS = ("", ",", ";", ":", "(", "-", ".")  # before a "?" that asks of what follows


@dataclass(frozen=True)
class ListWords:
    """The words by which the end of a list is seen; cues.toml has them.

    Attributes:
        size: Words with which a statement of its own begins ("mild", "stable", "two").
        side: Words that do so behind a comma, but not behind "and" ("left").
        verb: Verbs that a finding may have for itself.
        subject: First words of findings that a statement of its own begins with ("heart enlarged").
        residue: Names of what is left of an old disease.
        seen: Participles that a list shares ("no effusion or pneumothorax is seen").
    """

    size: frozenset[str]
    side: frozenset[str]
    verb: frozenset[str]
    subject: frozenset[str]
    residue: frozenset[str]
    seen: frozenset[str]


def words_of(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The words of a text in lower case, with their characters; the last one is always a "."."""
    places = [match.span() for match in WORD.finditer(text)]
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
    if "CM" in text:
        for i, (start, end) in enumerate(places):
            if text[start:end] == "CM" and (i == 0 or words[i - 1] in _BEFORE_CM):
                words[i] = "cardiomegaly"
    if any(sign in text for sign in _BOX_SIGNS):
        words, places = _without_boxes(text, words, places)
    words.append(".")
    places.append((len(text), len(text)))
    return words, places


def _without_boxes(
    text: str, words: Sequence[str], places: Sequence[tuple[int, int]]
) -> tuple[list[str], list[tuple[int, int]]]:
    """The words with what the boxes of a form say in their place.

    An empty box before an item denies it ("[x] effusion [ ] mass"), one behind an item, where the
    first box stands behind one, does so, too. Of answers ("[ ] yes [x] no") the ticked one stays. A
    single box that is empty is no form.
    """
    boxes = [
        (match.span(), bool(match[1]) or match[0] in "\u2611\u2612")
        for match in _BOX.finditer(text)
    ]
    if len(boxes) < 2 and not any(is_ticked for _, is_ticked in boxes):
        return list(words), list(places)
    inside = {at for (start, end), _ in boxes for at in range(start, end)}
    items: list[tuple[str, tuple[int, int], bool | None]] = [
        (word, place, None)
        for word, place in zip(words, places, strict=True)
        if place[0] not in inside
    ]
    items = sorted([*items, *(("", place, ticked) for place, ticked in boxes)], key=lambda i: i[1])
    is_box = [ticked is not None for *_, ticked in items]
    is_answer = [
        i + 1 < len(items)
        and is_box[i]
        and items[i + 1][0] in _ANSWERS
        and (i + 2 == len(items) or is_box[i + 2] or not items[i + 2][0].isalnum())
        for i in range(len(items))
    ]
    first = next((i for i, box in enumerate(is_box) if box and not is_answer[i]), 0)
    is_behind = first > 0 and items[first - 1][0].isalnum()
    out: list[tuple[str, tuple[int, int]]] = []
    for i, (word, place, ticked) in enumerate(items):
        if is_answer[i] or (i and is_answer[i - 1] and not items[i - 1][2]):
            continue
        if ticked is None:
            out.append((word, place))
            out += [(".", place)] if i and is_answer[i - 1] else []
        elif is_behind:
            out += [(".", place)] if ticked else [(":", place), ("no", place), (".", place)]
        else:
            out += [(".", place)] if ticked else [(".", place), ("no", place)]
    return [word for word, _ in out], [place for _, place in out]


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
