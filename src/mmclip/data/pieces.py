"""Texts cut at their spaces: a corpus has millions of pieces, and few distinct ones.

A tokenizer that lets no token reach over a space, as BERT's, needs to see each distinct piece once.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from jaxtyping import Int, Int32
from tokenizers import Tokenizer

from mmclip.data.flat import starts_of

CHUNK = 8192
"""Texts that are put together at once: what bounds the memory. [chosen: some megabytes]"""


@dataclass(frozen=True)
class FlatTokens:
    """Some texts as one flat array of tokens, without special ones.

    Text i is the tokens `start[i] : start[i + 1]`.

    Attributes:
        ids: Of the tokenizer.
        begin: The first character of each token, in its text.
        end: The character behind its last one.
        start: One more than texts.
    """

    ids: Int32[np.ndarray, " total"]
    begin: Int32[np.ndarray, " total"]
    end: Int32[np.ndarray, " total"]
    start: Int[np.ndarray, " starts"]


class PieceNumbers(dict[str, int]):
    """A number for each distinct piece, from 0 in the order in which they are asked for."""

    def __missing__(self, piece: str) -> int:
        number = self[piece] = len(self)
        return number


class PieceWords(dict[str, tuple[str, ...]]):
    """The words of each distinct piece, split when it is asked for first."""

    def __init__(self, split: Callable[[str], tuple[str, ...]]) -> None:
        super().__init__()
        self.split = split

    def __missing__(self, piece: str) -> tuple[str, ...]:
        words = self[piece] = self.split(piece)
        return words


def keeps_to_pieces(backend: Tokenizer) -> bool:
    """Whether the tokens of a text are those of its pieces, one piece after the other.

    So it is with BERT's way of splitting, if no added token takes the spaces beside it or holds
    one.
    """
    state = json.loads(backend.to_str())
    kinds = tuple(
        (state[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")
    )
    return kinds == ("BertNormalizer", "BertPreTokenizer", "WordPiece") and not any(
        token["lstrip"] or token["rstrip"] or " " in token["content"]
        for token in state["added_tokens"]
    )


def encode_pieces(backend: Tokenizer, texts: Sequence[str]) -> FlatTokens:
    """The tokens of some texts, by a tokenizer that `keeps_to_pieces`."""
    backend = Tokenizer.from_str(backend.to_str())  # a copy: others' settings stay
    backend.no_truncation()
    backend.no_padding()
    numbers, table = PieceNumbers(), _Table.of(backend, [])
    parts = [(np.zeros(0, np.int32),) * 4]
    for first in range(0, len(texts), CHUNK):
        pieces = [text.split(" ") for text in texts[first : first + CHUNK]]
        n_pieces = np.fromiter(map(len, pieces), np.int64, len(pieces))
        flat = map(numbers.__getitem__, chain.from_iterable(pieces))
        which = np.fromiter(flat, np.int64, n_pieces.sum())
        table = table.joined(_Table.of(backend, list(islice(numbers, len(table.length), None))))
        parts.append(table.tokens_of(which, n_pieces))
    ids, begin, end, counts = map(np.concatenate, zip(*parts, strict=True))
    return FlatTokens(ids, begin, end, starts_of(counts))


@dataclass(frozen=True)
class _Table:
    """The tokens of distinct pieces, one piece after the other."""

    ids: np.ndarray
    begin: np.ndarray  # in the piece
    end: np.ndarray
    n_tokens: np.ndarray  # a piece
    length: np.ndarray  # characters a piece

    @classmethod
    def of(cls, backend: Tokenizer, pieces: list[str]) -> "_Table":
        """Of new pieces."""
        encodings = backend.encode_batch(pieces, add_special_tokens=False)
        spans = np.array([span for each in encodings for span in each.offsets], np.int32).reshape(
            -1, 2
        )
        ids = np.array([number for each in encodings for number in each.ids], np.int32)
        counts = np.array([len(each.ids) for each in encodings], np.int64)
        # What is nothing of the text, such as a character that the tokenizer takes out, is none.
        is_text = spans[:, 1] > spans[:, 0]
        of_piece = np.repeat(np.arange(len(pieces)), counts)[is_text]
        return cls(
            ids[is_text],
            spans[is_text, 0],
            spans[is_text, 1],
            np.bincount(of_piece, minlength=len(pieces)),
            np.fromiter(map(len, pieces), np.int64, len(pieces)),
        )

    def joined(self, other: "_Table") -> "_Table":
        """Two tables as one."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Table(*(np.concatenate(pair) for pair in pairs))

    def tokens_of(self, which: np.ndarray, n_pieces: np.ndarray) -> tuple[np.ndarray, ...]:
        """Ids, first and last characters of the tokens of some texts, and tokens of each text.

        Args:
            which: Pieces of the texts.
            n_pieces: Of each text, at least one.
        """
        first_piece = starts_of(n_pieces)[:-1]
        at = starts_of(self.length[which] + 1)[:-1]  # a space is between two pieces
        at -= np.repeat(at[first_piece], n_pieces)
        counts = self.n_tokens[which]
        ends = np.cumsum(counts)
        token = np.arange(counts.sum()) + np.repeat(
            starts_of(self.n_tokens)[which] - (ends - counts), counts
        )
        at = np.repeat(at, counts).astype(np.int32)
        in_text = np.add.reduceat(counts, first_piece)
        return self.ids[token], self.begin[token] + at, self.end[token] + at, in_text
