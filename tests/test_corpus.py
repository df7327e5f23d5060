"""All reports at once give what each of them gives by itself."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mmclip.data.corpus import UNCUT, encode_flat, mark_concepts, tokenise_corpus
from mmclip.data.entities import find_entities
from mmclip.data.pieces import keeps_to_pieces
from mmclip.data.sample import Entity
from mmclip.data.text import SPECIAL_TOKENS, split_sentences, tokenise, train_tokenizer
from tests.made import REPORTS

ODD = [
    "", " ", "  two  spaces ", "tab\tand\nline", "é e\u0301 \u0301alone", "漢字 and漢",
    "Σας ΣΑΣ İ ß",
    "no\u00a0break\u2003wide\u3000", "nul\0 \ufffd \u200b", "[MASK] a[SEP]b [PAD", "##s # ## s",
    "x" * 120, "5.2 cm. No.3, p.m.! (Dr. A.) end?\n\nNew", "😀 👨‍👩‍👧", "ﬁne ﬃ ½",
]  # fmt: skip
SIGNS = " \n\t.aAbé\u0301漢İ[]#'-5,\u00a0😀"


def written(n: int) -> list[str]:
    """Reports, odd texts, and texts of signs in any order."""
    rng = random.Random(0)
    made = ["".join(rng.choice(SIGNS) for _ in range(rng.randint(0, 30))) for _ in range(n)]
    return [*REPORTS, *ODD, *made]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's and RoBERTa's: a space belongs to the word behind it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        REPORTS,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<s>", "</s>", "<pad>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ),
    )  # fmt: skip
    made.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True),
    )  # fmt: skip


def with_a_greedy_token() -> PreTrainedTokenizerFast:
    """BERT's way, but for a token that takes the space before it."""
    made = train_tokenizer(REPORTS)
    made.add_tokens([AddedToken("lungs", lstrip=True)])
    return made


def with_a_token_of_two_words() -> PreTrainedTokenizerFast:
    made = train_tokenizer(REPORTS)
    made.add_tokens(["pleural effusion"])
    return made


def cased() -> PreTrainedTokenizerFast:
    """As BERT's cased models: accents stay."""
    made = train_tokenizer(REPORTS)
    made.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    return made


TOKENIZERS: dict[Callable[[], PreTrainedTokenizerFast], bool] = {
    lambda: train_tokenizer(REPORTS): True,
    cased: True,
    with_a_greedy_token: False,
    with_a_token_of_two_words: False,
    byte_level: False,
}


@pytest.mark.parametrize(("make", "by_pieces"), TOKENIZERS.items())
def test_a_corpus_is_what_each_report_gives_by_itself(make, by_pieces, monkeypatch):
    monkeypatch.setattr("mmclip.data.pieces.CHUNK", 50)
    monkeypatch.setattr("mmclip.data.corpus.CHUNK", 50)
    tokenizer = make()
    assert keeps_to_pieces(tokenizer.backend_tokenizer) == by_pieces
    texts = written(300)
    entities = [tuple(found) for found in find_entities(texts)]
    impressions = [len(text) // 2 if i % 3 else None for i, text in enumerate(texts)]
    corpus = tokenise_corpus(tokenizer, texts, entities, impressions)
    assert corpus.concept.any() and corpus.cue.any()
    for i, text in enumerate(texts):
        alone = tokenise(tokenizer, [text], max_tokens=UNCUT)
        ids, offsets = alone.ids[0], alone.offsets[0]
        is_text = offsets[:, 1] > offsets[:, 0]
        here = slice(int(corpus.start[i]), int(corpus.start[i + 1]))
        np.testing.assert_array_equal(corpus.ids[here], ids[is_text])
        ends = [end for _, end in split_sentences(text)]
        n = max(len(ends), 1)
        said = [min(sum(end <= at for end in ends), n - 1) for at in offsets[is_text, 0]]
        assert corpus.sentence[here].tolist() == said
        concepts, cues = mark_concepts(entities[i], offsets[is_text])
        np.testing.assert_array_equal(corpus.concept[here], concepts)
        np.testing.assert_array_equal(corpus.cue[here], cues)
        assert corpus.n_sentences[i] == n
        at = impressions[i]
        begins = n if at is None else sum(end <= at for end in ends)
        assert corpus.impression[i] == begins


def test_spans_of_any_kind_mark_what_they_mark_by_themselves():
    # Entities that share a cue or a token, a cue inside an entity, and one that governs backwards.
    texts = ["no effusion or nodule effusion", "heart is not enlarged", "edema"]
    entities = [
        (
            Entity(3, 11, "finding", "effusion", "negated", (0, 2)),
            Entity(15, 18, "finding", "nodule", "negated", (0, 2)),
            Entity(18, 21, "finding", "other", "uncertain", (12, 14)),
            Entity(22, 30, "finding", "effusion", "uncertain", (12, 30)),
        ),
        (Entity(0, 21, "finding", "cardiomegaly", "negated", (9, 12)),),
        (),
    ]
    tokenizer = train_tokenizer(texts, min_frequency=1)
    corpus = tokenise_corpus(tokenizer, texts, entities, [None] * 3)
    flat = encode_flat(tokenizer, texts)
    for i, some in enumerate(entities):
        here = slice(int(flat.start[i]), int(flat.start[i + 1]))
        offsets = np.stack([flat.begin[here], flat.end[here]], 1)
        concepts, cues = mark_concepts(some, offsets)
        np.testing.assert_array_equal(corpus.concept[here], concepts)
        np.testing.assert_array_equal(corpus.cue[here], cues)


def test_reports_marked_one_by_one_are_marked_as_all_at_once(monkeypatch):
    # As for a tokenizer that puts characters in another order.
    tokenizer = train_tokenizer(REPORTS)
    entities = [tuple(found) for found in find_entities(REPORTS)]
    nothing = [None] * len(REPORTS)
    at_once = tokenise_corpus(tokenizer, REPORTS, entities, nothing)
    monkeypatch.setattr("mmclip.data.corpus.is_ordered", lambda values: False)
    by_one = tokenise_corpus(tokenizer, REPORTS, entities, nothing)
    assert at_once.concept.any() and at_once.cue.any()
    np.testing.assert_array_equal(by_one.concept, at_once.concept)
    np.testing.assert_array_equal(by_one.cue, at_once.cue)


def test_the_settings_of_a_tokenizer_stay_as_they_are():
    tokenizer = train_tokenizer(REPORTS)
    tokenise(tokenizer, ["the lungs are clear"], max_tokens=3)
    before = tokenizer.backend_tokenizer.to_str()
    encode_flat(tokenizer, REPORTS)
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("min_frequency", [1, 2])
def test_a_vocabulary_is_that_of_the_trainer_over_whole_texts(min_frequency):
    texts = written(200) * 2
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = sorted(set().union(*map(made.normalizer.normalize_str, texts)))
    inner = [c for c in letters if len(made.pre_tokenizer.pre_tokenize_str(f"a{c}")) == 1]
    special = [*SPECIAL_TOKENS, *(f"##{c}" for c in inner if not c.isspace())]
    trainer = trainers.WordPieceTrainer(
        vocab_size=8192, min_frequency=min_frequency, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    assert train_tokenizer(texts, min_frequency=min_frequency).get_vocab() == made.get_vocab()
