"""The reports of a data set as tokens: tokenised once, then read whole or in part."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerFast

from mmclip.data.entities import is_entity_tokens
from mmclip.data.flat import starts_of
from mmclip.data.pieces import FlatTokens, encode_pieces, keeps_to_pieces
from mmclip.data.sample import Entity
from mmclip.data.text import split_sentences, tokenise
from mmclip.data.tokenizer import Frame, frame_of

CHUNK = 2048
"""Reports tokenised at once: what bounds the memory. [chosen: some megabytes]"""

UNCUT = 1 << 20
"""Tokens that no report has: a report is cut where it is read, not here."""

MAX_SENTENCES = 32
"""Draws a row for choosing sentences; sentences behind these stay or go with the last one."""


@dataclass(frozen=True)
class TokenRows:
    """Some texts as tokens, padded at the end. n texts, t tokens.

    Attributes:
        concepts: Number of the concept that a token mentions, from 1 within its text; 0 for none.
        cues: Number of the concept that a token denies or doubts; 0 for none.
    """

    ids: Int[np.ndarray, "n t"]
    is_valid: Bool[np.ndarray, "n t"]
    concepts: Int[np.ndarray, "n t"]
    cues: Int[np.ndarray, "n t"]


@dataclass(frozen=True)
class Corpus:
    """All reports as one flat array of tokens, without the special tokens around a text.

    Report r is the tokens `start[r] : start[r + 1]`; `sentence` numbers the sentence of each token
    from 0 within its report, `concept` and `cue` as in `TokenRows`.
    """

    ids: Int[np.ndarray, " total"]
    sentence: Int[np.ndarray, " total"]
    concept: Int[np.ndarray, " total"]
    cue: Int[np.ndarray, " total"]
    start: Int[np.ndarray, " starts"]  # one more than reports
    n_sentences: Int[np.ndarray, " reports"]
    impression: Int[np.ndarray, " reports"]  # its first sentence; n_sentences where there is none
    frame: Frame  # of the tokenizer: what stands around a text, and padding

    def assemble(
        self,
        reports: Int[np.ndarray, " n"],
        max_tokens: int,
        keep: Sequence[Bool[np.ndarray, " _"]] | None = None,
    ) -> TokenRows:
        """Some reports, whole or in part, in the frame of the tokenizer: [CLS] ... [SEP] of BERT.

        Args:
            reports: Report numbers.
            max_tokens: Longer texts are cut.
            keep: The sentences that are read, of each of these reports, see `sentences_read`; None
                reads all.
        """
        spans = []
        for i, report in enumerate(reports):
            tokens = np.arange(int(self.start[report]), int(self.start[report + 1]))
            if keep is not None:
                tokens = tokens[keep[i][self.sentence[tokens]]]
            spans.append(tokens[: max_tokens - self.frame.size])
        width = max((len(tokens) for tokens in spans), default=0) + self.frame.size
        begin, end_ids = self.frame.begin, self.frame.end
        ids = np.full((len(spans), width), self.frame.pad, np.int64)
        concepts, cues = np.zeros_like(ids), np.zeros_like(ids)
        is_valid = np.zeros(ids.shape, bool)
        for i, tokens in enumerate(spans):
            here = slice(len(begin), len(begin) + len(tokens))
            ids[i, : here.start], ids[i, here] = begin, self.ids[tokens]
            ids[i, here.stop : here.stop + len(end_ids)] = end_ids
            concepts[i, here], cues[i, here] = self.concept[tokens], self.cue[tokens]
            is_valid[i, : here.stop + len(end_ids)] = True
        return TokenRows(ids, is_valid, concepts, cues)


def sentences_read(
    n_sentences: int,
    impression: int,
    uniforms: Float[np.ndarray, " d"],
    impression_prob: float,
    drop_prob: float,
) -> Bool[np.ndarray, " s"]:
    """Which sentences of a report are read: the impression's, some, or all.

    Of some, the number is uniform in 1..n, and the choice uniform given the number.

    Args:
        n_sentences: Sentences of the report.
        impression: The first of its impression; n_sentences where there is none.
        uniforms: Uniform [3 + MAX_SENTENCES]: one for either choice, one for the number, one a
            sentence.
        impression_prob: Of reading the impression alone.
        drop_prob: Of reading some sentences, where it is not the impression.

    Source: the impression alone, CheXzero (Tiu et al., Nature BME 2022); some sentences, after
        the sampling of ConVIRT (arXiv:2010.00747): a prompt is one sentence, and a model that only
        ever read whole reports has not seen one alone. Mixing them is ours [docs/log.md].
    """
    number = np.arange(n_sentences)
    if uniforms[0] < impression_prob and impression < n_sentences:
        return number >= impression
    if uniforms[1] >= drop_prob:
        return np.ones(n_sentences, bool)
    order = np.argsort(uniforms[3:][np.minimum(number, MAX_SENTENCES - 1)])
    keep = np.zeros(n_sentences, bool)
    keep[order[: 1 + int(uniforms[2] * n_sentences)]] = True
    return keep


def mark_concepts(
    entities: Sequence[Entity], offsets: Int[np.ndarray, "t 2"]
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """The concepts and the cues of one text, as in `TokenRows`.

    A cue that governs several findings ("no effusion or pneumothorax") goes by the first of them.
    """
    concepts = is_entity_tokens(entities, offsets)
    cues = np.zeros_like(concepts)
    number: dict[str, int] = {}
    start, end = offsets[:, 0], offsets[:, 1]
    for entity in entities:
        own = number.setdefault(entity.concept, len(number) + 1)
        if entity.cue is not None:
            touches = (start < entity.cue[1]) & (end > entity.cue[0]) & (end > start)
            cues[touches & (cues == 0)] = own
    return concepts, cues


def tokenise_corpus(
    tokenizer: PreTrainedTokenizerFast,
    reports: Sequence[str],
    entities: Sequence[Sequence[Entity]],
    impressions: Sequence[int | None],
) -> Corpus:
    """Tokenises each report once, and notes sentence, concept and cue of every token.

    Args:
        tokenizer: Of the text encoder.
        reports: The texts, none of them empty.
        entities: Of each report; leave those out that shall never be masked.
        impressions: The character at which the impression of each report begins, if it has one.
    """
    tokens = encode_flat(tokenizer, reports)
    of_report = np.repeat(np.arange(len(reports)), np.diff(tokens.start))
    # Characters of one text that all reports are, a character apart.
    shift = starts_of(np.fromiter(map(len, reports), np.int64, len(reports)) + 1)[:-1]
    begin, end = tokens.begin + shift[of_report], tokens.end + shift[of_report]

    ends = [[stop for _, stop in split_sentences(report)] for report in reports]
    n_ends = np.fromiter(map(len, ends), np.int64, len(ends))
    flat = np.fromiter(chain.from_iterable(ends), np.int64, n_ends.sum())
    before = np.searchsorted(flat + np.repeat(shift, n_ends), begin, side="right")
    last = np.maximum(n_ends - 1, 0)
    sentence = np.minimum(before - starts_of(n_ends)[of_report], last[of_report])
    impression = [
        last[i] + 1 if at is None else bisect_right(ends[i], at) for i, at in enumerate(impressions)
    ]
    if is_ordered(begin) and is_ordered(end):
        concept, cue = _marked(entities, shift, begin, end)
    else:  # a tokenizer that puts characters in another order
        marked = [
            mark_concepts(some, np.stack([tokens.begin[here], tokens.end[here]], 1))
            for some, here in zip(entities, map(slice, tokens.start, tokens.start[1:]), strict=True)
        ]
        concept, cue = (
            np.concatenate([np.zeros(0, np.int32), *c]) for c in zip(*marked, strict=True)
        )
    return Corpus(
        ids=tokens.ids,
        sentence=sentence.astype(np.int32),
        concept=concept,
        cue=cue,
        start=tokens.start,
        n_sentences=(last + 1).astype(np.int32),
        impression=np.array(impression, np.int32),
        frame=frame_of(tokenizer),
    )


def is_ordered(values: Int[np.ndarray, " n"]) -> bool:
    """Whether no value is smaller than the one before it."""
    return bool((values[1:] >= values[:-1]).all())


def _marked(
    entities: Sequence[Sequence[Entity]],
    shift: Int[np.ndarray, " reports"],
    begin: Int[np.ndarray, " total"],
    end: Int[np.ndarray, " total"],
) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " total"]]:
    """As `mark_concepts`, of all reports at once.

    Args:
        entities: Of each report.
        shift: What is added to the characters of each report.
        begin: The first character of each token, shifted, in order.
        end: The character behind its last one, likewise.
    """
    of_report, spans, numbers, cues, with_cue = [], [], [], [], []
    for report, some in enumerate(entities):
        known: dict[str, int] = {}
        for entity in some:
            if entity.cue is not None:
                with_cue.append(len(numbers))
                cues.append(entity.cue)
            numbers.append(known.setdefault(entity.concept, len(known) + 1))
            spans.append((entity.start, entity.end))
            of_report.append(report)
    named = np.array([0, *numbers], np.int32)
    which, shifted = np.array(with_cue, np.int64), shift[np.array(of_report, np.int64)]

    def touched(pairs: list[tuple[int, int]], at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that each span touches, and the number of the span for each of them."""
        span = np.array(pairs, np.int64).reshape(-1, 2) + at[:, None]
        first = np.searchsorted(end, span[:, 0], side="right")
        counts = np.maximum(np.searchsorted(begin, span[:, 1]) - first, 0)
        number = np.repeat(np.arange(len(span)), counts)
        return np.arange(len(number)) + (first - starts_of(counts)[:-1])[number], number

    concept, cue = np.zeros(len(begin), np.int64), np.full(len(begin), len(numbers) + 1)
    tokens, touching = touched(spans, shifted)
    np.maximum.at(concept, tokens, touching + 1)  # of two entities, the later one
    tokens, touching = touched(cues, shifted[which])
    np.minimum.at(cue, tokens, which[touching] + 1)  # of two cues, the earlier one
    return named[concept], np.append(named, np.int32(0))[cue]


def encode_flat(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> FlatTokens:
    """The tokens of some texts that stand for characters of them, in one array."""
    backend = tokenizer.backend_tokenizer
    if keeps_to_pieces(backend):
        return encode_pieces(backend, texts)
    ids, offsets = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)]
    counts = [np.zeros(0, np.int64)]
    for start in range(0, len(texts), CHUNK):
        tokens = tokenise(tokenizer, texts[start : start + CHUNK], max_tokens=UNCUT)
        is_text = tokens.is_valid & (tokens.offsets[:, :, 1] > tokens.offsets[:, :, 0])
        ids.append(tokens.ids[is_text])
        offsets.append(tokens.offsets[is_text])
        counts.append(is_text.sum(1))
    begin, end = np.concatenate(offsets).T
    return FlatTokens(np.concatenate(ids), begin, end, starts_of(np.concatenate(counts)))
