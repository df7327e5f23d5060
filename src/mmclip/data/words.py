"""The words of a report, as the lexicon reads them: each with its place in the text."""

import re
from collections.abc import Sequence

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
WORD = re.compile(
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
_LEADER = "..."  # of "Pneumothorax ..... none", which stands for a colon
_OPENERS = ("", ",", ";", ":", "(", "-", ".")  # before a "?" that asks of what follows


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
