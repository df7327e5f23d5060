"""Pictures show what training would do to an image, and nothing else of it is changed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmclip.checkpoint import Checkpoint
from mmclip.data.batches import TrainingBatches
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.sample import Entity
from mmclip.data.streams import deterministic_config
from mmclip.data.text import tokenise, train_tokenizer
from mmclip.evaluation.pages import gallery_of
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
from mmclip.evaluation.scores import make_predictions
from mmclip.evaluation.selection import LabelledImages
from mmclip.models.build import build_mmclip
from mmclip.models.encoders import build_image_encoder, build_text_encoder
from mmclip.models.mmclip import MMCLIP
from mmclip.patches import PatchGrid

from . import made

WORDS = [*made.REPORTS, "There is cardiomegaly. No evidence of cardiomegaly. An enlarged heart."]
TOKENIZER = train_tokenizer(WORDS, vocab_size=300, min_frequency=1)
PAIRED, UNPAIRED, SPEECHLESS = "f0", "f6", "f7"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageTextDataset:
    """Eight images: the last but one has labels alone, the last has nothing."""
    dataset = open_dataset([made.write_folder(tmp_path_factory.mktemp("images"))])
    speechless = replace(dataset.samples[7], report=None, entities=(), labels={})
    return replace(dataset, samples=(*dataset.samples[:7], speechless))


def checkpoint_of(*overrides: str) -> Checkpoint:
    """A model that has learnt nothing, with the decoders of its configuration."""
    config = made.small_config(*overrides)
    torch.manual_seed(0)
    model = build_mmclip(
        config,
        build_image_encoder(config.model.image, made.IMAGE_SIZE),
        build_text_encoder(config.model.text, len(TOKENIZER), max_tokens=64, pad_token_id=0),
        n_label_findings=1,
    )
    return Checkpoint(Path("run"), model.eval(), TOKENIZER, config, {})


@pytest.fixture(scope="module")
def whole() -> Checkpoint:
    return checkpoint_of(*made.WHOLE)


@pytest.fixture(scope="module")
def pictures(whole: Checkpoint, dataset: ImageTextDataset) -> dict[str, Picture]:
    return make_pictures(whole, dataset)


def over_pixels(patches: np.ndarray) -> np.ndarray:
    return np.kron(patches, np.ones((made.PATCH_SIZE, made.PATCH_SIZE), patches.dtype))


def masked_text(picture: Picture) -> str:
    return "".join(span.text for span in picture.spans if span.predicted is not None)


# -- which images --


def test_an_image_reads_its_report_else_its_labels_else_has_no_picture(
    pictures: dict[str, Picture], dataset: ImageTextDataset
):
    assert set(pictures) == {sample.image_id for sample in dataset.samples} - {SPEECHLESS}
    for sample in dataset.samples[:6]:
        assert "".join(span.text for span in pictures[sample.image_id].spans) == sample.report
        assert not pictures[sample.image_id].is_prompt
    prompt = pictures[UNPAIRED]
    predicted = "".join(span.text for span in prompt.spans)
    assert prompt.is_prompt and ("cardiomegaly" in predicted or "heart" in predicted)
    assert [span.entity.status for span in prompt.spans if span.entity][:1] == ["negated"]
    assert masked_text(prompt)


def test_images_without_any_report_have_pictures_too(
    whole: Checkpoint, pictures: dict[str, Picture], dataset: ImageTextDataset
):
    """An image's picture is its own, whatever other images are looked at."""
    alone = make_pictures(whole, dataset.select([f.image_id == UNPAIRED for f in dataset.samples]))
    assert set(alone) == {UNPAIRED}
    ours, among = alone[UNPAIRED], pictures[UNPAIRED]
    assert ours.spans == among.spans
    np.testing.assert_array_equal(ours.is_masked, among.is_masked)
    np.testing.assert_allclose(ours.relevance, among.relevance, atol=1e-4)
    assert (
        make_pictures(whole, dataset.select([f.image_id == SPEECHLESS for f in dataset.samples]))
        == {}
    )
    assert make_pictures(whole, dataset.select([False] * len(dataset))) == {}


def test_labels_have_prompts_even_where_the_run_used_them_otherwise(dataset: ImageTextDataset):
    for changes in ("loss.label=1", "unpaired.rows_per_pair=1"), ("unpaired.shuffle=true",):
        found = make_pictures(checkpoint_of(*made.WHOLE, *changes), dataset)
        assert found[UNPAIRED].is_prompt


# -- images --


def test_visible_patches_are_the_image_bit_for_bit_and_hidden_ones_are_not(
    pictures: dict[str, Picture], dataset: ImageTextDataset
):
    for number, picture in enumerate(pictures.values()):
        sample = dataset.pixels(np.array([number]))[0].numpy()
        assert picture.is_masked is not None and picture.rebuilt is not None
        assert picture.is_masked.sum() == made.N_PATCHES / 2
        masked = over_pixels(picture.is_masked)
        np.testing.assert_array_equal(picture.image, sample)
        np.testing.assert_array_equal(picture.rebuilt[~masked], sample[~masked])
        assert (picture.rebuilt[masked] != sample[masked]).mean() > 0.9


def test_the_most_responsive_patches_are_hidden_without_chance(pictures: dict[str, Picture]):
    for picture in pictures.values():
        assert picture.relevance is not None and picture.is_masked is not None
        assert (
            picture.relevance[picture.is_masked].min()
            >= picture.relevance[~picture.is_masked].max()
        )


def test_a_prediction_of_nothing_shows_the_mean_of_the_true_patch(dataset: ImageTextDataset):
    checkpoint = checkpoint_of(*made.WHOLE)
    assert checkpoint.model.image_decoder is not None
    torch.nn.init.zeros_(checkpoint.model.image_decoder.head.weight)
    torch.nn.init.zeros_(checkpoint.model.image_decoder.head.bias)
    picture = make_pictures(checkpoint, dataset)[PAIRED]
    assert picture.is_masked is not None and picture.rebuilt is not None
    for row, column in np.argwhere(picture.is_masked):
        here = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert np.unique(picture.rebuilt[here]).size == 1
        assert abs(picture.rebuilt[here].mean() - picture.image[here].mean()) <= 0.51


@pytest.mark.parametrize(
    ("changes", "panels", "has_words"),
    [
        (("loss.image=1", "loss.text=1"), ["relevance", "masked", "rebuilt"], True),
        (("loss.text=1",), [], True),
        (
            (
                "loss.image=1",
                "image_mask.score=token_attention",
                "image_mask.score_tokens=entities",
            ),
            ["relevance", "masked", "rebuilt"],
            False,
        ),
        (("loss.image=1", "image_mask.policy=random"), ["masked", "rebuilt"], False),
        (("loss.image=1", "loss.text=1", "image_mask.policy=oracle"), [], True),
    ],
)
def test_a_picture_has_the_parts_that_the_run_trained(
    dataset: ImageTextDataset, changes: tuple[str, ...], panels: list[str], has_words: bool
):
    for picture in make_pictures(checkpoint_of(*changes), dataset).values():
        assert list(picture.panels()) == panels
        assert bool(masked_text(picture)) == has_words


def test_a_contrastive_checkpoint_has_no_pictures(dataset: ImageTextDataset):
    assert make_pictures(checkpoint_of(), dataset) == {}


def test_warmth_and_hatching_by_hand():
    image = np.full((4, 4), 100, np.uint8)
    relevance = np.array([[0.1, 0.9], [0.5, 0.1]])  # median 0.3
    shown = warmed(image, relevance)
    assert shown[0, 0].tolist() == shown[3, 3].tolist() == [100] * 3
    assert shown[1, 3].tolist() == [round(25 + 0.75 * c) for c in HEAT]
    # A third of the way from the median to the top: 0.75 / 3 of the colour.
    assert shown[2, 1].tolist() == [round(75 + 0.25 * c) for c in HEAT]
    is_masked = np.array([[True, False], [False, False]])
    shown = hatched(image, is_masked)
    side = len(shown) // 2
    assert {tuple(c) for c in shown[:side, :side].reshape(-1, 3)} == {HATCH, HATCH_GROUND}
    assert np.unique(shown[side:]).tolist() == np.unique(shown[:, side:]).tolist() == [100]


# -- words --


def batch_of(checkpoint: Checkpoint, dataset: ImageTextDataset):
    some = dataset.select([sample.image_id != SPEECHLESS for sample in dataset.samples])
    batches = TrainingBatches(
        some, TOKENIZER, deterministic_config(checkpoint.config), PatchGrid(made.PATCH_SIZE)
    )
    return batches.of_rows(np.arange(len(some)))


def test_hidden_words_are_those_of_training(
    whole: Checkpoint, pictures: dict[str, Picture], dataset: ImageTextDataset
):
    batch = batch_of(whole, dataset)
    n_checked = 0
    for texts in batch.texts():
        for row, ids, is_masked in zip(texts.rows, texts.ids, texts.is_masked, strict=True):
            pieces = TOKENIZER.convert_ids_to_tokens(ids[is_masked].tolist())
            picture = pictures[batch.image_ids[int(row)]]
            ours = masked_text(picture).lower()
            assert ours == "".join(piece.removeprefix("##") for piece in pieces) != ""
            n_checked += 1
    assert n_checked == 7


def test_what_the_model_says_stands_at_its_own_word(
    whole: Checkpoint, dataset: ImageTextDataset, monkeypatch: pytest.MonkeyPatch
):
    """A model that is right in reports and always says [SEP] in prompts."""
    batch = batch_of(whole, dataset)

    def knowing(self, features):
        right = batch.reports.ids[batch.reports.is_masked]
        wrong = torch.full_like(batch.prompts.ids[batch.prompts.is_masked], 3)
        return F.one_hot(torch.cat([right, wrong]), len(TOKENIZER)).float()[: len(features)]

    monkeypatch.setattr(MMCLIP, "token_logits", knowing)
    for picture in make_pictures(whole, dataset).values():
        for span in picture.spans:
            if span.predicted is not None:
                assert span.is_right == (not picture.is_prompt)
                wanted = "[SEP]" if picture.is_prompt else span.text.lower()
                assert set(span.predicted.split()) == {wanted}


def spans(
    text: str, entities: list[Entity], masked: list[int], predicted: dict[int, str], n: int = 99
):
    """Spans of a text whose pieces of these numbers are masked; the model says these pieces."""
    tokens = tokenise(TOKENIZER, [text], max_tokens=n)
    ids = torch.from_numpy(tokens.ids[0]).long()
    is_masked = torch.zeros(len(ids), dtype=torch.bool)
    is_masked[[i + 1 for i in masked]] = True
    guess = ids.clone()
    for i, piece in predicted.items():
        guess[i + 1] = TOKENIZER.convert_tokens_to_ids(piece)
    return spans_of(TOKENIZER, text, entities, ids, is_masked, guess)


def test_a_word_of_several_pieces_is_right_only_as_a_whole():
    text = "Heartlungs  normal."
    pieces = TOKENIZER.tokenize(text)
    n = len(pieces) - 2  # pieces of the first word
    assert n >= 2
    right = spans(text, [], list(range(n)), {})
    assert [span.text for span in right] == ["Heartlungs", "  normal."]
    assert right[0].is_right and right[0].predicted == "heartlungs"
    assert right[1].predicted is None
    half = spans(text, [], list(range(n)), {0: "no"})
    assert not half[0].is_right and half[0].predicted == "no" + "heartlungs".removeprefix(pieces[0])
    part = spans(text, [], [0], {})  # the pieces that were shown belong to the word
    assert part == right


def test_entities_and_hidden_words_part_the_text_and_a_word_belongs_to_its_last_entity():
    text = "Large LEFT effusion."
    anatomy = Entity(6, 10, "anatomy", "left")
    inside = Entity(11, 15, "finding", "effusion", "negated")  # ends in the middle of a word
    found = spans(text, [anatomy, inside], [2], {2: "heart"})
    assert [(span.text, span.entity, span.predicted) for span in found] == [
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
    assert not [span for span in found if span.predicted is not None and not span.is_read]


@pytest.mark.parametrize("control", ["loss.label=1", "unpaired.prompt_pairs=true"])
def test_without_chance_nothing_of_the_image_or_the_text_is_left_out(control: str):
    changes = ("data.impression_prob=0.5", "data.sentence_drop_prob=0.5", "unpaired.shuffle=true")
    config = deterministic_config(made.small_config(*changes, "unpaired.rows_per_pair=1", control))
    augment = config.augment.model_dump()
    assert augment.pop("crop_scale") == 1 and set(augment.values()) == {0}
    assert config.data.impression_prob == config.data.sentence_drop_prob == config.loss.label == 0
    assert not (config.unpaired.shuffle or config.unpaired.prompt_pairs)


def test_the_gallery_has_the_pictures_of_its_images_in_its_order(
    whole: Checkpoint, dataset: ImageTextDataset
):
    n = len(dataset)
    nothing = make_predictions(LabelledImages(dataset, (), np.zeros((n, 0))), np.zeros((n, 0)))
    items = gallery_of(whole, dataset, nothing, [6, 0, 7])
    assert [item.name for item in items] == [UNPAIRED, PAIRED, SPEECHLESS]
    for item, has_picture in zip(items, (True, True, False), strict=True):
        assert (item.picture is not None) == has_picture
        if item.picture is not None:
            np.testing.assert_array_equal(item.picture.image, item.image)
    assert [item.picture for item in gallery_of(checkpoint_of(), dataset, nothing, [0, 6])] == [
        None,
        None,
    ]


def test_panels_of_patches_that_lie_between_those_of_the_image_are_put_back_over_it():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    is_masked = np.zeros((2, 2), bool)
    is_masked[1, 1] = True  # around pixel (4, 4)
    picture = Picture(image, is_masked.astype(float), is_masked, image, (), False, shift_px=2)
    panels = picture.panels()
    changed = (panels["relevance"] != image[..., None]).any(-1)
    wanted = np.zeros((8, 8), bool)
    wanted[2:6, 2:6] = True
    np.testing.assert_array_equal(changed, wanted)
    hidden = panels["masked"]
    scale = len(hidden) // 8
    whole = np.stack([image.repeat(scale, 0).repeat(scale, 1)] * 3, -1)
    is_hidden = wanted.repeat(scale, 0).repeat(scale, 1)
    np.testing.assert_array_equal(hidden[~is_hidden], whole[~is_hidden])
    assert (hidden[is_hidden] != whole[is_hidden]).any(-1).mean() > 0.9
