"""Words that the text alone gives away: "right lower [mask]" is "lobe" in nearly every report.

A text decoder recovers them without the image, so to mask them teaches language.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mmclip.data.corpus import Corpus

Mention = tuple[int, int, tuple[int, ...], tuple[int, int]]
"""Report, concept, its tokens, and the tokens before and behind it (-1 at an end of the report)."""


def leave_given_away(corpus: Corpus, most_prob: float) -> Corpus:
    """The corpus without the concepts that the words beside them give away.

    A mention is as probable as it is frequent among the other mentions of any concept that stand
    between the same two tokens, its own not counted; one that stands there alone is not guessed. A
    concept stays in a report if none of its mentions there is more probable than most_prob. Left
    out, it is never masked, nor are its cues.

    Args:
        corpus: Of all reports.
        most_prob: 1 leaves all concepts in.

    Source: ours; the plainest guess that reads no image. docs/method.md, row "given away".
    """
    if most_prob >= 1:
        return corpus
    mentions = list(_mentions(corpus))
    together = Counter((beside, tokens) for *_, tokens, beside in mentions)
    between = Counter(beside for *_, beside in mentions)
    given = {
        (report, concept)
        for report, concept, tokens, beside in mentions
        if together[beside, tokens] - 1 > most_prob * (between[beside] - 1)
    }
    concept, cue = corpus.concept.copy(), corpus.cue.copy()
    for report, number in given:
        here = slice(int(corpus.start[report]), int(corpus.start[report + 1]))
        concept[here][concept[here] == number] = 0
        cue[here][cue[here] == number] = 0
    return replace(corpus, concept=concept, cue=cue)


def _mentions(corpus: Corpus) -> Iterator[Mention]:
    """Each run of tokens of one concept."""
    for report, (start, stop) in enumerate(
        zip(corpus.start[:-1].tolist(), corpus.start[1:].tolist(), strict=True)
    ):
        ids, concepts = corpus.ids[start:stop].tolist(), corpus.concept[start:stop]
        edges = np.flatnonzero(np.diff(concepts, prepend=0, append=0)).tolist()
        for first, last in itertools.pairwise(edges):
            if concepts[first]:
                before = ids[first - 1] if first else -1
                behind = ids[last] if last < len(ids) else -1
                yield report, int(concepts[first]), tuple(ids[first:last]), (before, behind)
