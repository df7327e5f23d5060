"""Pictures show what training would do to a film, and nothing else of it is changed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmclip.checkpoint import Checkpoint
from mmclip.data.batches import TrainingBatches, still
from mmclip.data.dataset import Rows, open_rows
from mmclip.data.records import Entity
from mmclip.data.text import tokenise, train_tokenizer
from mmclip.evaluation.pictures import (
    HATCH,
    HATCH_GROUND,
    HEAT,
    Picture,
    hatched,
    make_pictures,
    spans_of,
    warmed,
)
from mmclip.evaluation.scores import scored
from mmclip.evaluation.zeroshot import ZeroShot
from mmclip.models.encoders import build_image_encoder, build_text_encoder
from mmclip.models.mmclip import MMCLIP, build_mmclip

from . import made

WORDS = [*made.REPORTS, "There is cardiomegaly. No evidence of cardiomegaly. An enlarged heart."]
TOKENIZER = train_tokenizer(WORDS, vocab_size=300, min_frequency=1)
PAIRED, UNPAIRED, SPEECHLESS = "f0", "f6", "f7"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Eight films: the last but one has labels alone, the last has nothing."""
    rows = open_rows([made.write_folder(tmp_path_factory.mktemp("films"))])
    speechless = replace(rows.films[7], report=None, entities=(), labels={})
    return replace(rows, films=(*rows.films[:7], speechless))


def checkpoint_of(*overrides: str) -> Checkpoint:
    """A model that has learnt nothing, with the decoders of its configuration."""
    config = made.small_config(*overrides)
    torch.manual_seed(0)
    model = build_mmclip(
        config,
        build_image_encoder(config.model.image, made.FILM_PX),
        build_text_encoder(config.model.text, len(TOKENIZER), max_tokens=64, pad_token_id=0),
        n_label_findings=1,
    )
    return Checkpoint(Path("run"), model.eval(), TOKENIZER, config, {})


@pytest.fixture(scope="module")
def whole() -> Checkpoint:
    return checkpoint_of(*made.WHOLE)


@pytest.fixture(scope="module")
def pictures(whole: Checkpoint, rows: Rows) -> dict[str, Picture]:
    return make_pictures(whole, rows)


def over_pixels(patches: np.ndarray) -> np.ndarray:
    return np.kron(patches, np.ones((made.PATCH_PX, made.PATCH_PX), patches.dtype))


def hidden_text(picture: Picture) -> str:
    return "".join(span.text for span in picture.spans if span.said is not None)


# -- which films --


def test_a_film_reads_its_report_else_its_labels_else_has_no_picture(
    pictures: dict[str, Picture], rows: Rows
):
    assert set(pictures) == {film.film_id for film in rows.films} - {SPEECHLESS}
    for film in rows.films[:6]:
        assert "".join(span.text for span in pictures[film.film_id].spans) == film.report
        assert not pictures[film.film_id].is_prompt
    prompt = pictures[UNPAIRED]
    said = "".join(span.text for span in prompt.spans)
    assert prompt.is_prompt and ("cardiomegaly" in said or "heart" in said)
    assert [span.entity.status for span in prompt.spans if span.entity][:1] == ["negated"]
    assert hidden_text(prompt)


def test_films_without_any_report_have_pictures_too(
    whole: Checkpoint, pictures: dict[str, Picture], rows: Rows
):
    """A film's picture is its own, whatever other films are looked at."""
    alone = make_pictures(whole, rows.select([f.film_id == UNPAIRED for f in rows.films]))
    assert set(alone) == {UNPAIRED}
    ours, among = alone[UNPAIRED], pictures[UNPAIRED]
    assert ours.spans == among.spans
    np.testing.assert_array_equal(ours.is_hidden, among.is_hidden)
    np.testing.assert_allclose(ours.response, among.response, atol=1e-4)
    assert make_pictures(whole, rows.select([f.film_id == SPEECHLESS for f in rows.films])) == {}
    assert make_pictures(whole, rows.select([False] * len(rows))) == {}


def test_labels_have_prompts_even_where_the_run_used_them_otherwise(rows: Rows):
    for changes in ("loss.label=1", "unpaired.rows_per_pair=1"), ("unpaired.shuffle=true",):
        found = make_pictures(checkpoint_of(*made.WHOLE, *changes), rows)
        assert found[UNPAIRED].is_prompt


# -- films --


def test_visible_patches_are_the_film_bit_for_bit_and_hidden_ones_are_not(
    pictures: dict[str, Picture], rows: Rows
):
    for number, picture in enumerate(pictures.values()):
        film = rows.pixels(np.array([number]))[0].numpy()
        assert picture.is_hidden is not None and picture.rebuilt is not None
        assert picture.is_hidden.sum() == made.N_PATCHES / 2
        hidden = over_pixels(picture.is_hidden)
        np.testing.assert_array_equal(picture.film, film)
        np.testing.assert_array_equal(picture.rebuilt[~hidden], film[~hidden])
        assert (picture.rebuilt[hidden] != film[hidden]).mean() > 0.9


def test_the_most_responsive_patches_are_hidden_without_chance(pictures: dict[str, Picture]):
    for picture in pictures.values():
        assert picture.response is not None and picture.is_hidden is not None
        assert (
            picture.response[picture.is_hidden].min() >= picture.response[~picture.is_hidden].max()
        )


def test_a_prediction_of_nothing_shows_the_mean_of_the_true_patch(rows: Rows):
    checkpoint = checkpoint_of(*made.WHOLE)
    assert checkpoint.model.image_decoder is not None
    torch.nn.init.zeros_(checkpoint.model.image_decoder.head.weight)
    torch.nn.init.zeros_(checkpoint.model.image_decoder.head.bias)
    picture = make_pictures(checkpoint, rows)[PAIRED]
    assert picture.is_hidden is not None and picture.rebuilt is not None
    for row, column in np.argwhere(picture.is_hidden):
        here = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert np.unique(picture.rebuilt[here]).size == 1
        assert abs(picture.rebuilt[here].mean() - picture.film[here].mean()) <= 0.51


@pytest.mark.parametrize(
    ("changes", "panels", "has_words"),
    [
        (("loss.image=1", "loss.text=1"), ["response", "hidden", "rebuilt"], True),
        (("loss.text=1",), [], True),
        (
            (
                "loss.image=1",
                "image_mask.score=token_attention",
                "image_mask.score_tokens=entities",
            ),
            ["response", "hidden", "rebuilt"],
            False,
        ),
        (("loss.image=1", "image_mask.policy=random"), ["hidden", "rebuilt"], False),
        (("loss.image=1", "loss.text=1", "image_mask.policy=oracle"), [], True),
    ],
)
def test_a_picture_has_the_parts_that_the_run_trained(
    rows: Rows, changes: tuple[str, ...], panels: list[str], has_words: bool
):
    for picture in make_pictures(checkpoint_of(*changes), rows).values():
        assert list(picture.panels()) == panels
        assert bool(hidden_text(picture)) == has_words


def test_a_contrastive_checkpoint_has_no_pictures(rows: Rows):
    assert make_pictures(checkpoint_of(), rows) == {}


def test_warmth_and_hatching_by_hand():
    film = np.full((4, 4), 100, np.uint8)
    response = np.array([[0.1, 0.9], [0.5, 0.1]])  # median 0.3
    shown = warmed(film, response)
    assert shown[0, 0].tolist() == shown[3, 3].tolist() == [100] * 3
    assert shown[1, 3].tolist() == [round(25 + 0.75 * c) for c in HEAT]
    # A third of the way from the median to the top: 0.75 / 3 of the colour.
    assert shown[2, 1].tolist() == [round(75 + 0.25 * c) for c in HEAT]
    is_hidden = np.array([[True, False], [False, False]])
    shown = hatched(film, is_hidden)
    side = len(shown) // 2
    assert {tuple(c) for c in shown[:side, :side].reshape(-1, 3)} == {HATCH, HATCH_GROUND}
    assert np.unique(shown[side:]).tolist() == np.unique(shown[:, side:]).tolist() == [100]


# -- words --


def batch_of(checkpoint: Checkpoint, rows: Rows):
    some = rows.select([film.film_id != SPEECHLESS for film in rows.films])
    batches = TrainingBatches(some, TOKENIZER, still(checkpoint.config), made.PATCH_PX)
    return batches.of_rows(np.arange(len(some)))


def test_hidden_words_are_those_of_training(
    whole: Checkpoint, pictures: dict[str, Picture], rows: Rows
):
    batch = batch_of(whole, rows)
    n_checked = 0
    for texts in batch.texts():
        for row, ids, is_masked in zip(texts.rows, texts.ids, texts.is_masked, strict=True):
            pieces = TOKENIZER.convert_ids_to_tokens(ids[is_masked].tolist())
            picture = pictures[batch.film_ids[int(row)]]
            ours = hidden_text(picture).lower()
            assert ours == "".join(piece.removeprefix("##") for piece in pieces) != ""
            n_checked += 1
    assert n_checked == 7


def test_what_the_model_says_stands_at_its_own_word(
    whole: Checkpoint, rows: Rows, monkeypatch: pytest.MonkeyPatch
):
    """A model that is right in reports and always says [SEP] in prompts."""
    forward: Callable = MMCLIP.forward

    def knowing(self, batch, plan):
        right = batch.reports.ids[batch.reports.is_masked]
        wrong = torch.full_like(batch.prompts.ids[batch.prompts.is_masked], 3)
        logits = F.one_hot(torch.cat([right, wrong]), len(TOKENIZER)).float()
        return forward(self, batch, plan)._replace(token_logits=logits)

    monkeypatch.setattr(MMCLIP, "forward", knowing)
    for picture in make_pictures(whole, rows).values():
        for span in picture.spans:
            if span.said is not None:
                assert span.is_right == (not picture.is_prompt)
                wanted = "[SEP]" if picture.is_prompt else span.text.lower()
                assert set(span.said.split()) == {wanted}


def spans(text: str, entities: list[Entity], hidden: list[int], said: dict[int, str], n: int = 99):
    """Spans of a text whose pieces of these numbers are hidden; the model says these pieces."""
    tokens = tokenise(TOKENIZER, [text], max_tokens=n)
    ids = torch.from_numpy(tokens.ids[0]).long()
    is_masked = torch.zeros(len(ids), dtype=torch.bool)
    is_masked[[i + 1 for i in hidden]] = True
    guess = ids.clone()
    for i, piece in said.items():
        guess[i + 1] = TOKENIZER.convert_tokens_to_ids(piece)
    return spans_of(TOKENIZER, text, entities, ids, is_masked, guess)


def test_a_word_of_several_pieces_is_right_only_as_a_whole():
    text = "Heartlungs  normal."
    pieces = TOKENIZER.tokenize(text)
    n = len(pieces) - 2  # pieces of the first word
    assert n >= 2
    right = spans(text, [], list(range(n)), {})
    assert [span.text for span in right] == ["Heartlungs", "  normal."]
    assert right[0].is_right and right[0].said == "heartlungs"
    assert right[1].said is None
    half = spans(text, [], list(range(n)), {0: "no"})
    assert not half[0].is_right and half[0].said == "no" + "heartlungs".removeprefix(pieces[0])
    part = spans(text, [], [0], {})  # the pieces that were shown belong to the word
    assert part == right


def test_entities_and_hidden_words_part_the_text_and_a_word_belongs_to_its_last_entity():
    text = "Large LEFT effusion."
    anatomy = Entity(6, 10, "anatomy", "left")
    inside = Entity(11, 15, "finding", "effusion", "negated")  # ends in the middle of a word
    found = spans(text, [anatomy, inside], [2], {2: "heart"})
    assert [(span.text, span.entity, span.said) for span in found] == [
        ("Large ", None, None),
        ("LEFT", anatomy, None),
        (" ", None, None),
        ("effusion", inside, "heart"),
        (".", None, None),
    ]


def test_what_was_cut_off_is_there_and_marked():
    text = "Clear lungs. No acute disease."
    late = Entity(22, 29, "finding", "disease")
    found = spans(text, [late], [1], {}, n=5)
    assert "".join(span.text for span in found) == text
    read = [span.text for span in found if span.is_read]
    assert read == ["Clear ", "lungs", "."]
    assert [span.text for span in found if span.entity] == ["disease"]
    assert not [span for span in found if span.said is not None and not span.is_read]


@pytest.mark.parametrize("control", ["loss.label=1", "unpaired.prompt_pairs=true"])
def test_without_chance_nothing_of_the_film_or_the_text_is_left_out(control: str):
    changes = ("data.impression_prob=0.5", "data.sentence_drop_prob=0.5", "unpaired.shuffle=true")
    config = still(made.small_config(*changes, "unpaired.rows_per_pair=1", control))
    assert set(config.augment.model_dump().values()) == {0}
    assert config.data.impression_prob == config.data.sentence_drop_prob == config.loss.label == 0
    assert not (config.unpaired.shuffle or config.unpaired.prompt_pairs)


def test_the_gallery_has_the_pictures_of_its_films_in_its_order(whole: Checkpoint, rows: Rows):
    n = len(rows)
    nothing = scored(rows, [], np.zeros((n, 0)), np.zeros((n, 0)))
    result = ZeroShot(rows, torch.zeros(n, 2), nothing, None, {})
    items = result.gallery(whole, [6, 0, 7])
    assert [item.name for item in items] == [UNPAIRED, PAIRED, SPEECHLESS]
    for item, has_picture in zip(items, (True, True, False), strict=True):
        assert (item.picture is not None) == has_picture
        if item.picture is not None:
            np.testing.assert_array_equal(item.picture.film, item.film)
    assert [item.picture for item in result.gallery(checkpoint_of(), [0, 6])] == [None, None]
