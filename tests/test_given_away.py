"""Concepts that the words beside them give away are left alone; the rest are masked as before."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmclip.data.corpus import Corpus
from mmclip.data.entities import find_entities
from mmclip.data.given_away import leave_given_away
from mmclip.data.ingest.build import build_data
from mmclip.data.tokenizer import frame_of
from mmclip.masking import choose_masked_entities
from tests.made import write_images
from tests.test_batches import TOKENIZER, make_batches


def corpus(*reports: list[tuple[int, int, int]]) -> Corpus:
    """Of (token, concept, cue)."""
    ids, concept, cue = (
        np.array([word[i] for words in reports for word in words], np.int32) for i in range(3)
    )
    return Corpus(
        ids, np.zeros_like(ids), concept, cue,
        start=np.cumsum([0, *map(len, reports)]),
        n_sentences=np.ones(len(reports), np.int32), impression=np.ones(len(reports), np.int32),
        frame=frame_of(TOKENIZER),
    )  # fmt: skip


def concepts_of(corpus: Corpus) -> list[list[int]]:
    return [part.tolist() for part in np.split(corpus.concept, corpus.start[1:-1])]


# "lower [lobe] opacity" three times, "lower [zone] opacity" once; "no [x] ." of all kinds.
LOBE, ZONE = [(1, 0, 0), (2, 1, 0), (3, 0, 0)], [(1, 0, 0), (4, 1, 0), (3, 0, 0)]
FINDINGS = [[(5, 0, 1), (10 + i, 1, 0), (6, 0, 0)] for i in range(3)]


@pytest.mark.ledger("given away")
def test_a_mention_is_as_probable_as_the_others_between_its_neighbours_by_hand():
    whole = corpus(LOBE, LOBE, LOBE, ZONE, *FINDINGS)
    left = concepts_of(leave_given_away(whole, 0.5))
    # Of a lobe's three others two are lobes, 0.67; of the zone's none is a zone; findings differ.
    assert left == [[0, 0, 0]] * 3 + [[0, 1, 0]] + [[0, 1, 0]] * 3
    assert concepts_of(leave_given_away(whole, 0.67)) == concepts_of(whole)
    assert leave_given_away(whole, 1.0) is whole


@pytest.mark.ledger("given away")
def test_one_guessed_mention_gives_its_concept_away_with_its_cue():
    # The second report speaks of the lobe twice: between words that say nothing, and as all do.
    again = [(9, 0, 0), (2, 1, 0), (8, 0, 1), *LOBE]
    left = leave_given_away(corpus(LOBE, again), 0.5)
    assert concepts_of(left) == [[0, 0, 0], [0] * 6] and not left.cue.any()


@pytest.mark.ledger("given away")
def test_a_mention_of_several_pieces_counts_as_a_whole_and_one_alone_is_not_guessed():
    pieces = [[(1, 0, 0), (2, 1, 0), (20 + i, 1, 0), (3, 0, 0)] for i in range(2)]
    assert concepts_of(leave_given_away(corpus(*pieces), 0.5)) == [[0, 1, 1, 0]] * 2
    assert concepts_of(leave_given_away(corpus(LOBE), 0.01)) == [[0, 1, 0]]


@pytest.mark.ledger("no entities")
@pytest.mark.parametrize(("ratio", "n_masked"), [(0.0, 0), (0.15, 1), (0.5, 3)])
def test_the_share_of_words_that_stand_in_for_concepts_is_as_configured(
    ratio: float, n_masked: int
):
    groups = torch.tensor([[0] * 6, [0, 1, 1, 0, 0, 0]])
    noise = torch.arange(6) / 6
    masked = choose_masked_entities(
        groups,
        torch.ones(2, 6, dtype=torch.bool),
        torch.zeros(2, 2),
        noise.expand(2, 6),
        0.5,
        ratio,
    )
    assert masked[0].sum() == n_masked
    assert masked[1].tolist() == [False, True, True, False, False, False]


@pytest.mark.ledger("given away")
def test_what_is_given_away_is_masked_no_more_in_a_step(tmp_path: Path):
    options = ("loss.text=1", "text_mask.mask_ratio=1", "text_mask.fallback_ratio=0")
    samples = write_images(tmp_path, 3)
    for i, size in enumerate(("A small", "A large", "No")):
        report = f"{size} opacity in the heart."
        samples[i] = replace(
            samples[i], report=report, entities=tuple(next(iter(find_entities([report]))))
        )
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    folder = tmp_path / "data"

    def masked(*more: str) -> torch.Tensor:
        batches = make_batches(folder, *options, *more)
        batch = batches.of_rows(np.arange(len(batches.dataset)))
        return batch.reports.is_masked

    every, some = masked(), masked("text_mask.given_away_prob=0.01")
    assert some.sum() < every.sum() and not (some & ~every).any()
