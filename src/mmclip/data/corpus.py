"""The reports of a data set as tokens: tokenised once, then read whole or in part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerFast

from mmclip.data.entities import is_entity_tokens
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
    columns: list[list[np.ndarray]] = [[], [], [], []]
    n_sentences, first = [], []
    for i, (report, tokens) in enumerate(zip(reports, _tokens_of(tokenizer, reports), strict=True)):
        ids, offsets, is_valid = tokens
        is_text = is_valid & (offsets[:, 1] > offsets[:, 0])
        ends = np.array([end for _, end in split_sentences(report)])
        last = max(len(ends) - 1, 0)
        sentence = np.minimum(np.searchsorted(ends, offsets[is_text, 0], side="right"), last)
        concepts, cues = mark_concepts(entities[i], offsets[is_text])
        for column, values in zip(columns, (ids[is_text], sentence, concepts, cues), strict=True):
            column.append(values)
        n_sentences.append(last + 1)
        at = impressions[i]
        begins = last + 1 if at is None else int(np.searchsorted(ends, at, side="right"))
        first.append(begins)

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)

    counts = [len(ids) for ids in columns[0]]
    return Corpus(
        *(joined(column) for column in columns),
        start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        n_sentences=np.array(n_sentences, np.int32),
        impression=np.array(first, np.int32),
        frame=frame_of(tokenizer),
    )


def _tokens_of(
    tokenizer: PreTrainedTokenizerFast, reports: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids, offsets and validity of the tokens of each report."""
    for start in range(0, len(reports), CHUNK):
        tokens = tokenise(tokenizer, reports[start : start + CHUNK], max_tokens=UNCUT)
        yield from zip(tokens.ids, tokens.offsets, tokens.is_valid, strict=True)
