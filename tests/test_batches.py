import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmclip.batch import Batch, BatchSlice, cheapest_cuts, plan_encoding
from mmclip.data.batches import TrainingBatches
from mmclip.data.corpus import MAX_SENTENCES, mark_concepts, sentences_read, tokenise_corpus
from mmclip.data.entities import find_entities
from mmclip.data.image_text_dataset import normalise, open_dataset
from mmclip.data.ingest.build import build_data
from mmclip.data.sample import Entity
from mmclip.data.streams import label_names, training_dataset
from mmclip.data.synthetic import FINDINGS
from mmclip.data.text import train_tokenizer
from mmclip.patches import PatchGrid
from tests.made import REPORTS, small_config, write_folder, write_images

STILL = tuple(
    f"augment.{name}=0"
    for name in ("rotation_deg", "translate_ratio", "scale_ratio", "brightness", "contrast")
)
UNPAIRED = ("unpaired.rows_per_pair=0.5",)
WORDS = [
    *REPORTS,
    "There is cardiomegaly. No evidence of cardiomegaly. An enlarged heart.",
    "Large nodule.",
]
TOKENIZER = train_tokenizer(WORDS, vocab_size=300, min_frequency=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def make_batches(folder: Path, *overrides: str, **options) -> TrainingBatches:
    config = small_config(
        *STILL, "data.max_tokens=32", "train.batch_size=4", "train.seed=5", *overrides
    )
    dataset = training_dataset(open_dataset([folder], 32), config)
    return TrainingBatches(dataset, TOKENIZER, config, PatchGrid(8), **options)


def texts_of(batch: Batch) -> dict[str, str]:
    """What each image of a batch comes with, as the tokenizer spells it."""
    out = {}
    for texts in batch.texts():
        for row, ids in zip(texts.rows.tolist(), texts.ids, strict=True):
            out[batch.image_ids[row]] = TOKENIZER.decode(ids, skip_special_tokens=True)
    return out


@pytest.mark.ledger("views")
def test_pairs_have_image_report_split_and_view_and_unpaired_images_come_where_asked(folder: Path):
    dataset = open_dataset([folder], 32)
    paired = training_dataset(dataset, small_config())
    assert [sample.image_id for sample in paired.samples] == [f"f{i}" for i in range(6)]
    both = training_dataset(dataset, small_config(*UNPAIRED))
    assert [sample.image_id for sample in both.samples] == [f"f{i}" for i in range(7)]


def test_images_that_others_test_on_never_train_nor_do_others_of_their_patients(folder: Path):
    dataset = open_dataset([folder], 32)
    chosen = training_dataset(dataset, small_config(*UNPAIRED))
    read, *others = chosen.samples
    changed = {
        read.image_id: replace(read, source="padchest-physician", patient_id="x"),
        others[0].image_id: replace(others[0], source="padchest", patient_id="x"),
        others[1].image_id: replace(others[1], source="made", patient_id="x"),  # of other data
    }
    samples = tuple(changed.get(sample.image_id, sample) for sample in dataset.samples)
    left = training_dataset(replace(dataset, samples=samples), small_config(*UNPAIRED))
    gone = {sample.image_id for sample in chosen.samples} - {
        sample.image_id for sample in left.samples
    }
    assert gone == {read.image_id, others[0].image_id}


def test_a_batch_holds_the_images_and_reports_of_its_rows(folder: Path):
    batches = make_batches(folder)
    samples = {sample.image_id: (i, sample) for i, sample in enumerate(batches.dataset.samples)}
    batch = batches.batch(3, BatchSlice())
    assert len(batch) == len(batch.reports) == 4 and not len(batch.prompts)
    for row, image_id in enumerate(batch.image_ids):
        i, sample = samples[image_id]
        pixels = batches.dataset.pixels(np.array([i]))
        torch.testing.assert_close(batch.image[row], normalise(pixels)[0], atol=1e-4, rtol=0)
        ids = batch.reports.ids[row][batch.reports.is_valid[row]].tolist()
        assert ids == TOKENIZER(sample.report)["input_ids"]


@pytest.mark.ledger("mixing")
def test_a_share_of_a_batch_is_that_share_of_each_stream(folder: Path):
    batches = make_batches(folder, *UNPAIRED, "loss.text=1", "augment.rotation_deg=9")
    whole = batches.batch(2, BatchSlice())
    parts = [batches.batch(2, BatchSlice(i, 2)) for i in range(2)]
    pairs = [sample for part in parts for sample in part.image_ids[:2]]
    unpaired = [sample for part in parts for sample in part.image_ids[2:]]
    assert (*pairs, *unpaired) == whole.image_ids
    for part in parts:
        for row, image_id in enumerate(part.image_ids[:2]):
            there = whole.image_ids.index(image_id)
            assert torch.equal(part.image[row], whole.image[there])
            assert torch.equal(part.keys[row], whole.keys[there])
            assert torch.equal(part.patch_noise[row], whole.patch_noise[there])
            width = min(part.reports.ids.shape[1], whole.reports.ids.shape[1])
            assert torch.equal(
                part.reports.is_masked[row, :width], whole.reports.is_masked[there, :width]
            )


@pytest.mark.ledger("mixing")
def test_a_step_reads_the_same_pairs_with_and_without_unpaired_images(folder: Path):
    alone, mixed = make_batches(folder), make_batches(folder, *UNPAIRED)
    for step in range(5):
        a, b = alone.batch(step, BatchSlice()), mixed.batch(step, BatchSlice())
        assert a.image_ids == b.image_ids[:4] and len(b) == 6
        assert torch.equal(a.image, b.image[:4])


@pytest.mark.ledger("prompt in the report's place")
def test_an_unpaired_image_has_a_prompt_of_its_certain_labels_in_the_reports_place(folder: Path):
    batches = make_batches(folder, *UNPAIRED, "unpaired.absent_prob=1")
    batch = batches.batch(0, BatchSlice())
    said = texts_of(batch)["f6"]  # cardiomegaly is absent, and whether there is a mass is uncertain
    assert "cardiomegaly" in said or "enlarged heart" in said
    assert said.split()[0] in ("no", "there") and " no " in f" {said} " and "mass" not in said
    assert batch.has_text.all() and batch.prompts.rows.tolist() == [4, 5]


@pytest.mark.ledger("equal texts")
def test_equal_reports_have_equal_text_keys_and_others_not(folder: Path):
    batches = make_batches(folder)
    report_of = {sample.image_id: sample.report for sample in batches.dataset.samples}
    for step in range(6):
        batch = batches.batch(step, BatchSlice())
        for i, a in enumerate(batch.image_ids):
            for j, b in enumerate(batch.image_ids):
                same = bool(batch.keys[i, 1] == batch.keys[j, 1])
                assert same == (report_of[a] == report_of[b])
        assert (batch.keys[:, :2] >= 0).all()
        assert (batch.keys[:, 2] == -1).all()  # the labels of pairs stay out of the loss


def unpaired_folder(root: Path, *labels: dict[str, int]) -> Path:
    """Six pairs, and an image for each of the label sets."""
    samples = write_images(root, 6 + len(labels))
    samples[6:] = [
        replace(f, report=None, labels=known) for f, known in zip(samples[6:], labels, strict=True)
    ]
    build_data(samples, root, root / "data", image_size=32)
    return root / "data"


@pytest.mark.ledger("label sets")
def test_images_that_are_labelled_alike_are_positives_whatever_the_wording(tmp_path: Path):
    folder = unpaired_folder(
        tmp_path, {"cardiomegaly": 1}, {"cardiomegaly": 1, "mass": -1}, {"cardiomegaly": 0},
        {"cardiomegaly": 1, "mass": 0}, {"mass": 0, "cardiomegaly": 1},
    )  # fmt: skip
    batches = make_batches(folder, *UNPAIRED, "unpaired.rows_per_pair=1.25")
    said = set()
    for step in range(4):
        batch = batches.batch(step, BatchSlice())
        number = {image_id: i for i, image_id in enumerate(batch.image_ids)}
        keys = [int(batch.keys[number[f"f{6 + i}"], 2]) for i in range(5)]
        assert keys[0] == keys[1] >= 0 and keys[3] == keys[4] >= 0  # "not known" says nothing
        assert len(set(keys)) == 3
        said |= {texts_of(batch)[f"f{i}"] for i in (6, 7)}
    assert len(said) > 1


NORMAL = ("No acute disease.", "Normal chest film.", "No effusion. No pneumothorax.")
FOUND = ("There is a mass. No effusion.", "Possible nodule.", "Heart size is unchanged.")


@pytest.mark.ledger("nothing found")
@pytest.mark.parametrize("match_normal", [False, True])
def test_images_in_which_nothing_was_found_are_positives_whatever_says_so(
    tmp_path: Path, match_normal: bool
):
    nothing = dict.fromkeys(FINDINGS[:8], 0)
    labels = [
        {"no finding": 1}, nothing, {"no finding": 1, "mass": 0},  # normal
        {"mass": 0}, {"no finding": 1, "support devices": 1}, {**nothing, "mass": -1},
        {"no finding": 0, **nothing},
    ]  # fmt: skip
    samples = write_images(tmp_path, 6 + len(labels))
    reports = [*NORMAL, *FOUND]
    for i, (report, entities) in enumerate(zip(reports, find_entities(reports), strict=True)):
        samples[i] = replace(samples[i], report=report, entities=tuple(entities))
    samples[6:] = [
        replace(f, report=None, labels=known) for f, known in zip(samples[6:], labels, strict=True)
    ]
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    batches = make_batches(
        tmp_path / "data", *UNPAIRED, f"contrastive.match_normal={str(match_normal).lower()}"
    )
    batch = batches.of_rows(np.arange(len(batches.dataset)))
    is_nothing = batch.keys[:, 3] >= 0
    wanted = {"f0", "f1", "f2", "f6", "f7", "f8"} if match_normal else set()
    assert {i for i, is_one in zip(batch.image_ids, is_nothing, strict=True) if is_one} == wanted
    assert (batch.keys[is_nothing, 3] == 0).all()


def test_studies_of_two_patients_or_sources_are_two_even_of_one_number(tmp_path: Path):
    samples = write_images(tmp_path, 8)
    same = [("a", "p1"), ("a", "p1"), ("a", "p2"), ("b", "p1"), ("rsna", "9"), ("chestxray14", "9")]
    samples[:6] = [
        replace(f, study_id="1", source=source, patient_id=patient, report=f"Nodule {i}.")
        for i, (f, (source, patient)) in enumerate(zip(samples[:6], same, strict=True))
    ]
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    keys = make_batches(tmp_path / "data").study_keys.tolist()
    assert keys[0] == keys[1] and keys[4] == keys[5]  # rsna's patients are ChestX-ray14's
    assert len(set(keys)) == 8 - 2


@pytest.mark.ledger("reading in part")
def test_reports_read_in_part_are_whole_sentences_of_the_report(folder: Path):
    batches = make_batches(folder, "data.sentence_drop_prob=1")
    report_of = {sample.image_id: sample.report for sample in batches.dataset.samples}
    lengths = set()
    for step in range(12):
        for image_id, said in texts_of(batches.batch(step, BatchSlice())).items():
            report = report_of[image_id]
            assert report is not None
            sentences = [s.strip() for s in report.lower().split(".") if s.strip()]
            kept = [s.strip() for s in said.split(".") if s.strip()]
            assert kept and all(s in sentences for s in kept)
            assert kept == [s for s in sentences if s in kept]  # in the order of the report
            lengths.add(len(kept))
    assert lengths == {1, 2, 3}


@pytest.mark.ledger("reading in part")
def test_the_number_of_kept_sentences_is_uniform():
    rng = np.random.default_rng(0)
    counts = np.bincount(
        [sentences_read(4, 4, rng.random(3 + MAX_SENTENCES), 0.0, 1.0).sum() for _ in range(4000)],
        minlength=5,
    )
    assert counts[0] == 0
    assert (abs(counts[1:] - 1000) < 4 * np.sqrt(750)).all()


@pytest.mark.ledger("reading in part")
def test_what_is_read_of_a_report_by_hand():
    def read(impression: int, choice: float, dropped: float, number: float = 0.5) -> list[int]:
        uniforms = np.array([choice, dropped, number, 0.3, 0.1, 0.2, 0.4, *[0.9] * MAX_SENTENCES])
        keep = sentences_read(4, impression, uniforms, impression_prob=0.5, drop_prob=0.5)
        return np.flatnonzero(keep).tolist()

    assert read(impression=3, choice=0.4, dropped=0.0) == [3]
    assert read(impression=4, choice=0.4, dropped=0.9) == [0, 1, 2, 3]  # it has none: all
    assert read(impression=3, choice=0.6, dropped=0.9) == [0, 1, 2, 3]
    assert read(impression=3, choice=0.6, dropped=0.0) == [0, 1, 2]  # 3 of 4, the lowest draws
    assert read(impression=3, choice=0.6, dropped=0.0, number=0.0) == [1]


@pytest.mark.ledger("reading in part")
def test_the_impression_is_read_alone_as_often_as_the_configuration_says(tmp_path: Path):
    samples = [
        replace(sample, findings="There is cardiomegaly.", impression=impression, report=report)
        for i, sample in enumerate(write_images(tmp_path, 44))
        for impression in [None if i < 4 else "Large nodule."]
        for report in [f"There is cardiomegaly. {impression or ''}".strip()]
    ]
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    options = ("data.impression_prob=0.5", "train.batch_size=44")
    batches = make_batches(tmp_path / "data", *options)
    said = [
        text for step in range(20) for text in texts_of(batches.batch(step, BatchSlice())).values()
    ]
    count = {text: said.count(text) for text in set(said)}
    assert count["there is cardiomegaly ."] == 4 * 20
    assert abs(count["large nodule ."] - 400) < 4 * np.sqrt(200)
    assert count["there is cardiomegaly . large nodule ."] == 880 - 80 - count["large nodule ."]


@pytest.mark.ledger("shuffled controls")
def test_shuffled_pairs_give_each_image_the_report_of_another(tmp_path: Path):
    samples = [replace(f, report=f"Nodule {i}.") for i, f in enumerate(write_images(tmp_path, 8))]
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    straight = make_batches(tmp_path / "data")
    shuffled = make_batches(tmp_path / "data", shuffle_pairs=True)
    assert sorted(straight.report_of_row) == sorted(shuffled.report_of_row) == list(range(8))
    assert (straight.report_of_row != shuffled.report_of_row).all()
    assert len(set(shuffled.study_keys)) == len(shuffled.dataset)


@pytest.mark.ledger("shuffled controls")
def test_shuffled_prompts_are_the_labels_of_another_image(tmp_path: Path):
    folder = unpaired_folder(tmp_path, *({"mass": i % 2} for i in range(5)))
    batches = make_batches(folder, *UNPAIRED, "unpaired.shuffle=true")
    lonely = batches.unpaired
    assert sorted(batches.labels_of_row[lonely]) == lonely.tolist() == list(range(6, 11))
    assert (batches.labels_of_row[lonely] != lonely).all()
    assert (batches.labels_of_row[batches.pairs] == batches.pairs).all()


@pytest.mark.ledger("labels in place of prompts")
def test_in_the_label_loss_unpaired_images_have_labels_and_no_prompts(folder: Path):
    batches = make_batches(folder, *UNPAIRED, "loss.label=1")
    assert label_names(batches.dataset) == ["cardiomegaly"]  # whether there is a mass is uncertain
    batch = batches.batch(0, BatchSlice())
    assert batch.image_ids == (*batch.image_ids[:4], "f6", "f6")
    assert len(batch.prompts) == 0 and batch.has_text.tolist() == [True] * 4 + [False] * 2
    assert batch.labels is not None
    assert batch.labels[:4].isnan().all()  # the labels of pairs stay out of the loss
    assert batch.labels[4:].tolist() == [[0.0], [0.0]]
    assert make_batches(folder, *UNPAIRED).batch(0, BatchSlice()).labels is None


def test_shuffled_labels_are_those_of_another_image(tmp_path: Path):
    samples = write_images(tmp_path, n=8)
    samples[5:] = [
        replace(f, report=None, labels={"mass": i % 2}) for i, f in enumerate(samples[5:])
    ]
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    options = (*UNPAIRED, "loss.label=1")
    straight = make_batches(tmp_path / "data", *options)
    shuffled = make_batches(tmp_path / "data", *options, "unpaired.shuffle=true")
    assert straight.labels is not None and shuffled.labels is not None
    lonely = straight.unpaired
    assert np.array_equal(shuffled.labels[lonely], straight.labels[shuffled.labels_of_row[lonely]])
    assert not np.array_equal(shuffled.labels[lonely], straight.labels[lonely])


def test_without_a_text_loss_nothing_is_hidden(folder: Path):
    batch = make_batches(folder, *UNPAIRED).batch(0, BatchSlice())
    assert not batch.reports.is_masked.any() and not batch.prompts.is_masked.any()
    assert torch.equal(batch.reports.ids, batch.reports.masked_ids)


@pytest.mark.ledger("EntMLM on the prompt")
def test_hidden_words_are_words_of_entities_and_show_the_mask_token(folder: Path):
    batches = make_batches(folder, *UNPAIRED, "loss.text=1", "text_mask.cue_prob=0")
    for step in range(6):
        batch = batches.batch(step, BatchSlice())
        for texts in (batch.reports, batch.prompts):
            has_entity = texts.is_entity.any(1)
            assert (texts.is_masked & ~texts.is_entity)[has_entity].sum() == 0
            assert (texts.is_masked[has_entity].any(1)).all()
            assert not (texts.is_masked & ~texts.is_valid).any()
            assert (texts.masked_ids[texts.is_masked] == TOKENIZER.mask_token_id).all()
            assert torch.equal(texts.masked_ids[~texts.is_masked], texts.ids[~texts.is_masked])
            assert not torch.isin(texts.ids[texts.is_masked], torch.tensor([0, 2, 3])).any()


@pytest.mark.ledger("entity kinds")
def test_the_kinds_of_entities_that_are_hidden_are_those_of_the_configuration(folder: Path):
    batches = make_batches(
        folder, "loss.text=1", "text_mask.kinds=['finding']", "text_mask.mask_ratio=1",
        "text_mask.cue_prob=0",
    )  # fmt: skip
    masked = set()
    for step in range(6):
        texts = batches.batch(step, BatchSlice()).reports
        for ids, is_masked in zip(texts.ids, texts.is_masked, strict=True):
            masked |= set(TOKENIZER.convert_ids_to_tokens(ids[is_masked].tolist()))
    assert "effusion" in masked and "left" not in masked


def test_special_tokens_and_padding_are_never_hidden_where_any_word_may_be(tmp_path: Path):
    texts = ["Zzz.", "Large nodule. Clear lungs. Zzz zzz zzz zzz."]  # no entity; many words
    samples = [replace(f, report=texts[i % 2]) for i, f in enumerate(write_images(tmp_path))]
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    for policy in ("entities", "random"):
        batches = make_batches(
            tmp_path / "data", "loss.text=1", f"text_mask.policy={policy}",
            "text_mask.mask_ratio=1",
        )  # fmt: skip
        counts = set()
        for step in range(8):
            reports = batches.batch(step, BatchSlice()).reports
            assert not reports.is_masked[~reports.is_valid].any()
            masked = reports.ids[reports.is_masked].tolist()
            assert not set(masked) & set(TOKENIZER.all_special_ids) - {TOKENIZER.unk_token_id}
            counts |= set(reports.is_masked.sum(1).tolist())
        assert min(counts) > 0


def test_random_words_are_as_many_as_the_entities_and_not_they(folder: Path):
    options = ("loss.text=1", "text_mask.cue_prob=0")
    entities = make_batches(folder, *options)
    random = make_batches(folder, *options, "text_mask.policy='random'")
    of_entities = []
    for step in range(8):
        a, b = (batches.batch(step, BatchSlice()).reports for batches in (entities, random))
        assert torch.equal(a.is_masked.sum(1), b.is_masked.sum(1))
        of_entities += b.is_entity[b.is_masked].tolist()
    assert 0.2 < np.mean(of_entities) < 0.9  # of the words of these reports, half are entities'


def test_a_denial_is_hidden_with_what_it_denies_as_often_as_the_configuration_says(
    tmp_path: Path,
):
    samples = [replace(f, report="No effusion.") for f in write_images(tmp_path)]
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    for cue_prob, expected in ((0, 0.0), (0.5, 0.5), (1, 1.0)):
        batches = make_batches(
            tmp_path / "data", "loss.text=1", "text_mask.mask_ratio=1",
            f"text_mask.cue_prob={cue_prob}",
        )  # fmt: skip
        no = TOKENIZER.convert_tokens_to_ids("no")
        found = []
        for step in range(30):
            reports = batches.batch(step, BatchSlice()).reports
            found += reports.is_masked[reports.ids == no].tolist()
        assert len(found) == 120
        assert abs(np.mean(found) - expected) <= 4 * np.sqrt(expected * (1 - expected) / 120)


def test_a_cue_whose_finding_was_cut_off_goes_with_no_other(tmp_path: Path):
    # Cut after "no", the report denies a concept that it no longer names.
    samples = [replace(f, report="Large nodule. No effusion.") for f in write_images(tmp_path)]
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    batches = make_batches(
        tmp_path / "data", "loss.text=1", "data.max_tokens=6", "text_mask.mask_ratio=1",
        "text_mask.cue_prob=1",
    )  # fmt: skip
    texts = batches.batch(0, BatchSlice()).reports
    shown = [TOKENIZER.convert_ids_to_tokens(ids.tolist()) for ids in texts.masked_ids]
    assert "no" in TOKENIZER.convert_ids_to_tokens(texts.ids[0].tolist())
    assert all("no" in tokens for tokens in shown)
    assert texts.is_masked.any(1).all()


@pytest.mark.ledger("prompt beside a report")
def test_a_pair_with_labels_gets_a_prompt_that_guides_and_is_not_learnt_from(folder: Path):
    batches = make_batches(folder, "unpaired.prompt_pairs=true", "loss.text=1")
    batch = batches.batch(0, BatchSlice())
    assert len(batch.prompts) == len(batch.reports) == 4
    assert not batch.prompts.is_masked.any() and batch.reports.is_masked.any()
    reports, alone = batch.texts()
    assert len(reports) == 4 and len(alone) == 0
    assert (batch.keys[:, 2] == -1).all()


@pytest.mark.ledger("augmentation")
def test_lesions_move_with_their_image(folder: Path):
    lesion = np.zeros((32, 32), bool)
    lesion[8:16, 16:24] = True  # the patch in row 1, column 2
    lesions = {f"f{i}": lesion for i in range(6)}
    still = make_batches(folder, lesions=lesions).batch(0, BatchSlice())
    assert still.lesion_ratio is not None
    assert still.lesion_ratio.argmax(1).tolist() == [6] * 4
    torch.testing.assert_close(still.lesion_ratio.sum(1), torch.ones(4), atol=1e-4, rtol=0)
    moving = make_batches(
        folder, "augment.translate_ratio=0.2", "augment.rotation_deg=20", lesions=lesions
    ).batch(0, BatchSlice())
    assert moving.lesion_ratio is not None
    assert not torch.equal(moving.lesion_ratio, still.lesion_ratio)
    assert abs(float(moving.lesion_ratio.sum(1).mean()) - 1) < 0.5


def test_a_lesion_that_is_bright_stays_bright_as_its_image_moves(tmp_path: Path):
    samples = write_images(tmp_path, 8)
    lesion = np.zeros((32, 32), bool)
    lesion[2:10, 18:26] = True
    for sample in samples:
        Image.fromarray(255 * lesion.astype(np.uint8)).save(tmp_path / str(sample.image))
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    lesions = {sample.image_id: lesion for sample in samples}
    batch = make_batches(
        tmp_path / "data", "augment.translate_ratio=0.2", "augment.rotation_deg=40",
        "augment.scale_ratio=0.2", lesions=lesions,
    ).batch(0, BatchSlice())  # fmt: skip
    assert batch.lesion_ratio is not None
    dark = normalise(torch.zeros(1, 32, 32, dtype=torch.uint8)).min()
    bright = batch.image - dark
    share = bright.unfold(2, 8, 8).unfold(3, 8, 8).sum((1, 4, 5)).flatten(1)
    share = share / share.sum(1, keepdim=True)
    ratio = batch.lesion_ratio / batch.lesion_ratio.sum(1, keepdim=True)
    torch.testing.assert_close(ratio, share, atol=0.02, rtol=0)
    assert (share.argmax(1) != share[0].argmax()).any()  # they did move


def test_a_long_report_is_cut_and_keeps_its_special_tokens():
    nothing = [()] * len(REPORTS)
    corpus = tokenise_corpus(TOKENIZER, REPORTS, nothing, [None] * len(REPORTS))
    rows = corpus.assemble(np.array([0, 2]), max_tokens=8)
    assert rows.ids.shape == (2, 8)
    assert rows.ids[0, 0] == TOKENIZER.cls_token_id and rows.ids[0, 7] == TOKENIZER.sep_token_id
    assert rows.is_valid[0].all() and not rows.is_valid[1].all()


def test_no_reports_are_an_empty_corpus_of_empty_rows():
    rows = tokenise_corpus(TOKENIZER, [], [], []).assemble(np.zeros(0, np.int64), 8)
    assert rows.ids.shape == (0, 2)


@pytest.mark.ledger("negated entities")
def test_concepts_and_cues_by_hand():
    #       0         1         2
    #       0123456789012345678901234
    text = "No effusion or nodule. Effusion"
    offsets = np.array([[0, 0], [0, 2], [3, 11], [12, 14], [15, 21], [21, 22], [23, 31], [0, 0]])
    entities = [
        Entity(3, 11, "finding", "effusion", "negated", (0, 2)),
        Entity(15, 21, "finding", "nodule", "negated", (0, 2)),
        Entity(23, 31, "finding", "effusion"),
    ]
    assert text[15:21] == "nodule"
    concepts, cues = mark_concepts(entities, offsets)
    assert concepts.tolist() == [0, 0, 1, 0, 2, 0, 1, 0]
    assert cues.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]  # by the first that it governs


def test_rows_that_are_asked_for_come_in_that_order_with_the_draws_of_the_first_epoch(folder: Path):
    batches = make_batches(folder, "loss.text=1", *UNPAIRED)
    unpaired = int(batches.unpaired[0])
    rows = np.array([3, unpaired, 0])
    batch = batches.of_rows(rows)
    assert batch.image_ids == tuple(batches.dataset.samples[row].image_id for row in rows)
    said = texts_of(batch)
    prompt = batches.prompts(rows, np.zeros_like(rows))[1]
    assert prompt is not None
    assert said[batch.image_ids[1]] == TOKENIZER.decode(
        TOKENIZER(prompt.text).input_ids, skip_special_tokens=True
    )
    first, masked = batches.batch(0, BatchSlice()), {}
    for texts, of in ((first.reports, first), (batch.reports, batch)):
        for row, ids in zip(texts.rows.tolist(), texts.masked_ids, strict=True):
            masked.setdefault(of.image_ids[row], []).append([i for i in ids.tolist() if i])
    both = [found for found in masked.values() if len(found) == 2]
    assert both and all(one == other for one, other in both)


def test_without_pairs_rows_can_be_looked_at_and_not_trained_on(folder: Path):
    config = small_config(*STILL)
    dataset = open_dataset([folder], 32)
    dataset = dataset.select([sample.report is None for sample in dataset.samples])
    batches = TrainingBatches(dataset, TOKENIZER, config, PatchGrid(8))
    assert len(batches.of_rows(np.array([0])).prompts) == 1
    with pytest.raises(ValueError, match="there are no rows to read from"):
        batches.batch(0, BatchSlice())


def test_texts_in_buckets_are_each_there_once_and_padded_least():
    generator = torch.Generator().manual_seed(0)
    n, t = 400, 64
    lengths = torch.randint(3, t + 1, (n,), generator=generator)
    is_valid = torch.arange(t)[None] < lengths[:, None]
    ids = torch.randint(5, 40, (n, t), generator=generator).masked_fill(~is_valid, 0)
    ids[7] = ids[3]
    is_valid[7] = is_valid[3]
    masked = ids.clone()
    masked[::2, 1] = 4
    is_masked = masked != ids
    plan = plan_encoding(ids, masked, is_valid, is_valid, is_masked)
    assert len(plan.buckets) > 1
    texts = [
        tuple(row[ok].tolist())
        for b in plan.buckets
        for row, ok in zip(b.ids, b.is_valid, strict=True)
    ]
    assert len(set(texts)) == len(texts)
    for which, wanted in ((plan.as_it_is, ids), (plan.with_masks, masked)):
        for place, row, ok in zip(which.tolist(), wanted, is_valid, strict=True):
            assert texts[place] == tuple(row[ok].tolist())
    assert torch.equal(masked.flatten()[plan.masked_places], torch.full((n // 2,), 4))
    assert plan.most_masked == 1


def test_buckets_are_cut_where_tokens_and_passes_cost_least():
    widths, counts = [8, 16, 24, 64], [10, 1, 5, 2]
    for cost in (0, 20, 100, 400, 10_000):
        n = len(widths)
        tried = {}
        for inner in itertools.chain.from_iterable(
            itertools.combinations(range(1, n), k) for k in range(n)
        ):
            cuts = [0, *inner, n]
            spans = list(itertools.pairwise(cuts))
            tried[tuple(cuts)] = sum(sum(counts[a:b]) * widths[b - 1] + cost for a, b in spans)
        found = cheapest_cuts(widths, counts, cost)
        assert tried[tuple(found)] == min(tried.values())
