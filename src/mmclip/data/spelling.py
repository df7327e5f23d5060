"""Slips of the pen: the word of a lexicon, or of some headings, that a misspelt word stands for."""

from collections import defaultdict
from collections.abc import Sequence

_UNKNOWN = "\0\0"  # stands for a word that no phrase has
_BASE = 64  # [chosen: 1,600 words fit in two letters of 64; 32 and 128 are as fast]
_LONG_WORD = 8  # [chosen: "effusion" fits; shorter words have neighbours that are words]
_SHORTER_WORD = 5  # [chosen: two neighbours swapped make no other word of so many letters]
_LONGEST_WORD = 40  # [chosen: no word of a report is longer]
_PART = 7  # [chosen: "pleural" fits; no word of English is "no" and one of so many letters]
_JOINED = "\0\1"  # stands for a word that is two
_LEADS = (
    "no", "without", "and", "or", "nor", "with", "of", "the", "pleural", "focal", "acute", "small",
    "mild", "moderate", "large", "left", "right",
)  # fmt: skip
_TAILS = ("or", "and", "nor", "is", "are", "with", "seen")
_MOST_UNKNOWN = 50_000  # [chosen: bounds the memory; a year of reports has fewer]
# Words, and an ending of Spanish, that are right although they differ from a word by a letter.
_OTHER_WORDS = frozenset(("atelectasias", "atelectasies"))
_OTHER_ENDINGS = ("cion", "ciones")


class Letters(dict[str, str]):
    """The two letters of each word; of an unknown one those of the long word that it misspells.

    First letters and second ones are letters of their own, so no match begins inside a word. One
    letter a word would do, but a matcher that looks a node's branches through one by one
    (pyahocorasick) takes twice as long at a root with 1,600 branches as with 26.
    """

    def __init__(self):
        super().__init__()
        self._long: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._parts: set[str] = set()
        self._unknown: list[str] = []

    def learn(self, word: str) -> str:
        """The letters of a word of the lexicon."""
        if word not in self:
            first, second = divmod(len(self), _BASE)
            self[word] = chr(1 + _BASE + first) + chr(1 + second)
            if len(word) >= _SHORTER_WORD:
                self._long[word[0], word[-1]].append(word)
            if len(word) >= _PART:
                self._parts.add(word)
        return self[word]

    def __missing__(self, word: str) -> str:
        if len(self._unknown) == _MOST_UNKNOWN:
            for old in self._unknown:
                self.pop(old, None)
            self._unknown.clear()
        if len(word) > _LONGEST_WORD:
            return _UNKNOWN
        self._unknown.append(word)
        is_right = word in _OTHER_WORDS or word.endswith(_OTHER_ENDINGS)
        known = () if is_right else self._long.get((word[0], word[-1]), ())
        right = next((long for long in known if _is_slip(word, long)), None)
        unknown = _UNKNOWN if self._joint(word) is None else _JOINED
        self[word] = self[right] if right else unknown
        return self[word]

    def spell(
        self, words: list[str], places: list[tuple[int, int]]
    ) -> tuple[list[str], list[tuple[int, int]], str]:
        """The words, those that run together ("noeffusion") as two, their places and letters."""
        letters = "".join(map(self.__getitem__, words))
        if _JOINED not in letters:
            return words, places, letters
        parted: list[tuple[str, tuple[int, int]]] = []
        for word, (start, end) in zip(words, places, strict=True):
            at = self._joint(word) if self[word] == _JOINED else None
            if at is None:
                parted.append((word, (start, end)))
            else:
                parted.append((word[:at], (start, start + at)))
                parted.append((word[at:], (start + at, end)))
        words = [word for word, _ in parted]
        return words, [place for _, place in parted], "".join(map(self.__getitem__, words))

    def _joint(self, word: str) -> int | None:
        """Where a word is two that run together ("noeffusion"), or None."""
        for lead in _LEADS:
            if word.startswith(lead) and word[len(lead) :] in self._parts:
                return len(lead)
        for tail in _TAILS:
            if word.endswith(tail) and word[: -len(tail)] in self._parts:
                return len(word) - len(tail)
        return None


def _is_slip(word: str, right: str) -> bool:
    """Whether a word may misspell a right one; a shorter one by two swapped letters only."""
    if min(len(word), len(right)) < _LONG_WORD and sorted(word) != sorted(right):
        return False
    return differs_by_one_slip(word, right)


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


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """How many letters to add, drop, change or swap with their neighbour to come from a to b.

    Source: optimal string alignment; each pair of letters is swapped at most once.
    """
    rows = [list(range(len(b) + 1))]
    for i in range(1, len(a) + 1):
        row = [i]
        for j in range(1, len(b) + 1):
            cost = a[i - 1] != b[j - 1]
            best = min(row[j - 1] + 1, rows[i - 1][j] + 1, rows[i - 1][j - 1] + cost)
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                best = min(best, rows[i - 2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
