import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmclip.config import WHOLE_TEXT_SCORES, ImageMaskConfig, ScoreKind, load_config
from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.synthetic import PRESETS, read_masks, write_dataset
from mmclip.explanation.grounding import expected_hits
from mmclip.explanation.mechanism import (
    deal_to_other_patients,
    expected_masked_share,
    own_patches,
    patient_mean,
)
from mmclip.explanation.saliency import saliency_by_score, score_names
from mmclip.masking import blend_scores
from mmclip.models.outputs import EncoderOutput, TextOutput
from mmclip.training.pretrain import PretrainRequest, pretrain

from . import made


@pytest.fixture(scope="module")
def mechanism():
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    yield importlib.import_module("mechanism")
    sys.path.pop(0)


def test_pointing_on_a_grid_of_four_by_four_by_hand():
    score = torch.zeros(3, 16)
    score[0, 5] = score[1, 6] = 1.0  # second row: its second and its third patch
    score[2, 5] = score[2, 6] = 1.0  # a tie
    is_target = torch.zeros(3, 16, dtype=torch.bool)
    is_target[:, [1, 5, 9]] = True  # the second column, but for its last
    assert expected_hits(score, is_target).tolist() == [1.0, 0.0, 0.5]


def test_an_oracle_always_hits_and_a_constant_hits_by_chance():
    generator = torch.Generator().manual_seed(0)
    is_target = torch.rand(50, 16, generator=generator) < 0.3
    is_target[:, 0] = True
    noise = torch.rand(50, 16, generator=generator)
    assert (expected_hits(is_target + noise, is_target) == 1).all()
    share = is_target.float().mean(1)
    torch.testing.assert_close(expected_hits(torch.full((50, 16), 2.5), is_target), share)
    by_noise = expected_hits(noise, is_target).mean().item()
    assert by_noise == pytest.approx(share.mean().item(), abs=0.2)


def test_the_hidden_share_by_hand_with_a_tie_for_the_last_places():
    score = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 0.0]])
    is_target = torch.tensor([[True, True, False, False, True, False]])
    # Three places: patch 0 for sure, and two of the three patches at 2.
    found = expected_masked_share(score, is_target, 0.5)
    torch.testing.assert_close(found, torch.tensor([(1 + 2 / 3) / 3]))


def test_the_hidden_share_of_an_oracle_is_one_and_of_a_constant_the_ratio():
    is_target = torch.arange(16).expand(2, 16) < 5
    torch.testing.assert_close(
        expected_masked_share(is_target.float(), is_target, 0.5), torch.ones(2)
    )
    torch.testing.assert_close(
        expected_masked_share(torch.zeros(2, 16), is_target, 0.25), torch.full((2,), 0.25)
    )


def test_a_patch_that_two_findings_touch_is_of_neither():
    touched = torch.tensor([[True, True, False], [False, True, True]])
    assert own_patches(touched).tolist() == [[True, False, False], [False, False, True]]


def test_every_row_is_dealt_one_of_another_patient_and_each_once():
    patients = ["a"] * 4 + ["b"] * 3 + ["c", "d", "e"]
    for seed in range(20):
        dealt = deal_to_other_patients(patients, seed)
        assert sorted(dealt.tolist()) == list(range(10))
        assert all(patients[i] != patients[j] for i, j in enumerate(dealt))
    assert (deal_to_other_patients(patients, 0) != deal_to_other_patients(patients, 1)).any()


def test_a_patient_with_most_of_the_rows_is_refused():
    assert sorted(deal_to_other_patients(["a", "a", "b", "c"], 0).tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="one patient has 3 of 5 rows"):
        deal_to_other_patients(["a", "a", "a", "b", "c"], 0)


def test_a_mean_over_elements_weighs_rows_by_their_count_and_pairs_by_seed():
    total, count = np.array([6.0, 1.0, 0.0]), np.array([3, 1, 0])
    found = patient_mean(total, count, ["a", "b", "c"], n_resamples=200)
    assert found.mean == 7 / 4 and found.n == 2
    assert found.interval == (1.0, 2.0)
    assert patient_mean(total, count, ["a", "b", "c"], n_resamples=200) == found
    assert patient_mean(total, 0 * count, ["a", "b", "c"]).mean is None


def test_images_of_one_patient_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(size=40).repeat(5)
    ones = np.ones(200)
    alike = patient_mean(values, ones, np.arange(40).repeat(5).tolist()).interval
    apart = patient_mean(values, ones, list(range(200))).interval
    assert alike is not None and apart is not None
    assert alike[1] - alike[0] > 1.7 * (apart[1] - apart[0])


def test_maps_of_a_phrase_are_what_training_would_go_by():
    model = made.small_model(made.small_config(*made.WHOLE)).eval()
    batch = made.MadeBatches(4, without_report=range(4), with_prompt=range(4)).batch()
    texts = batch.prompts
    texts = replace(texts, is_masked=texts.is_entity, masked_ids=texts.ids.masked_fill(
        texts.is_entity, made.MASK_ID))  # fmt: skip
    seen = replace(texts, masked_ids=texts.ids)
    maps = saliency_by_score(model, batch.image, texts, size=3)
    assert {name.partition("/")[0] for name in maps} == set(get_args(ScoreKind))
    everyone, no_one = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    for kind, tokens in score_names(True):
        asked = replace(batch, prompts=texts if tokens == "masked" else seen)
        mask = ImageMaskConfig(score=kind, score_tokens=tokens)
        with torch.no_grad():
            relevance = model(asked, mask, mask_noise=0.0).relevance
        name = kind if kind in WHOLE_TEXT_SCORES else f"{kind}/{tokens}"
        ours = blend_scores(torch.zeros(4, 16), maps[name], no_one, everyone)
        torch.testing.assert_close(ours, relevance, atol=1e-3, rtol=1e-3)


def test_two_phrases_of_one_image_are_asked_of_that_image(mechanism):
    model = made.small_model(made.small_config(*made.WHOLE)).eval()
    batch = made.MadeBatches(3, without_report=range(3), with_prompt=range(3)).batch()
    texts = replace(batch.prompts, rows=torch.tensor([2, 0, 2]))
    maps = saliency_by_score(model, batch.image, texts, size=8)
    of_last = replace(
        mechanism.numbered(texts, torch.tensor([0, 2])), rows=torch.zeros(2, dtype=torch.long)
    )
    alone = saliency_by_score(model, batch.image[2:], of_last, size=8)
    for name, score in alone.items():
        torch.testing.assert_close(maps[name][[0, 2]], score, atol=1e-5, rtol=1e-4)


class ReadsTheImage:
    """Says of every masked word that it is the number that the image is full of."""

    logit_scale = torch.zeros(())

    def encode_image(self, image):
        return EncoderOutput(image.mean((2, 3))[:, None], torch.zeros(len(image), 1))

    def forward_text(self, texts, features):
        shown = features[texts.rows, 0, 0].round().long()
        word = shown[:, None].expand_as(texts.ids)[texts.is_masked]
        return TextOutput(features, features[:, 0], 10 * F.one_hot(word, made.VOCAB).float(), None)

    def token_logits(self, masked_features):
        return masked_features


def test_a_model_that_reads_the_image_is_right_with_its_own_image_only(mechanism):
    texts = made.made_texts(range(6), 9, torch.Generator().manual_seed(0))
    words = torch.arange(10, 16)
    ids = torch.where(texts.is_masked, words[:, None], texts.ids)
    images = words.float().view(6, 1, 1, 1).expand(6, 1, 4, 4)
    texts, patients = replace(texts, ids=ids), ["a", "a", "b", "b", "c", "c"]
    count = texts.is_masked.sum(1).numpy()
    _, right = mechanism.masked_words(ReadsTheImage(), images, texts, size=4)
    assert right.tolist() == count.tolist()
    other = images[torch.from_numpy(deal_to_other_patients(patients, 0))]
    loss, right = mechanism.masked_words(ReadsTheImage(), other, texts, size=4)
    assert right.sum() == 0
    wrong = 10 + np.log(1 + (made.VOCAB - 1) * np.exp(-10))
    np.testing.assert_allclose(loss, count * wrong, rtol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("mechanism")
    preset = replace(
        PRESETS["hard"], image_size=32, n_train=8, n_unpaired=0, n_val=10, n_test=2,
        n_findings_probs=(0.0, 0.0, 0.5, 0.5), second_image_prob=0.3,
    )  # fmt: skip
    write_dataset(preset, root / "raw")
    reader = open_reader("csv", root / "raw", mapping=root / "raw" / "mapping.toml", table=None)
    build_data(reader, root / "raw", root / "data", image_size=32)
    config = load_config("tiny", [*made.SMALL, *made.WHOLE, "train.steps=2", "train.batch_size=4"])
    pretrain(PretrainRequest((root / "data",), root / "run", config, "test", cpu=True))
    return root


def test_the_script_measures_all_three_parts(mechanism, trained, monkeypatch, capsys):
    argv = ["mechanism.py", trained / "run", "--raw", trained / "raw", "--data", trained / "data",
            "--n-resamples", "20", "--batch-size", "4", "--out", trained / "out.json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
    mechanism.main()
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(last)
    assert (trained / "out.json").read_text("utf-8") == last + "\n"
    words = found["entmlm"]["as trained"]
    assert words["true image"]["loss_less_true"]["mean"] == 0
    assert words["mid-grey"]["loss"] != words["true image"]["loss"]
    assert words["n_words"] > found["entmlm"]["modifier"]["n_words"] > 0
    places = found["attmim"]["pixels, oracle, the lesion's"]
    assert set(places) == {"own report", "another patient's", "no text"}
    assert places["no text"]["loss"] != places["own report"]["loss"]
    pointing = found["pointing"]
    assert pointing["n_headline"] <= pointing["n_asked"] - pointing["n_without_own_patch"]
    assert pointing["configured"] in pointing["scores"]
    assert pointing["baselines"]["chance"]["hidden_share"]["mean"] == pytest.approx(0.5)


def test_every_finding_of_an_image_with_several_is_asked_in_the_split_alone(mechanism, trained):
    masks = read_masks(trained / "raw")
    dataset = mechanism.open_dataset([trained / "data"])
    val = dataset.select([sample.split == "val" for sample in dataset.samples])
    asked = mechanism.asked_of(val, masks, trained / "raw")
    ids = [val.samples[item.row].image_id for item in asked]
    assert len(asked) == sum(image_id in set(ids) for image_id, _ in masks) > 20
    for item, image_id in zip(asked, ids, strict=True):
        assert val.samples[item.row].labels[item.finding] == 1
        assert item.area_ratio == masks[image_id, item.finding].mean()


def test_a_phrase_names_one_finding_and_its_name_is_what_is_hidden(mechanism, trained):
    checkpoint = mechanism.load_checkpoint(trained / "run")
    asked = [mechanism.Asked(0, "nodule", "left", "small", 0.01, "p"),
             mechanism.Asked(0, "edema", "none", "small", 0.01, "p")]  # fmt: skip
    texts = mechanism.phrases(checkpoint, asked, with_side=True)
    said = [
        checkpoint.tokenizer.decode(ids[valid].tolist(), skip_special_tokens=True)
        for ids, valid in zip(texts.ids, texts.is_valid, strict=True)
    ]
    # Rare words are pieces in the small vocabulary of the test's reports.
    assert [text.replace(" ##", "").replace(" .", ".") for text in said] == [
        "there is a nodule in the left lung.", "there is edema."
    ]  # fmt: skip
    assert (texts.masked_ids != texts.ids).equal(texts.is_masked)
    assert texts.is_masked.any(1).all() and texts.is_masked.equal(texts.is_entity)


def test_the_location_prior_knows_training_images_only(mechanism, trained):
    masks = read_masks(trained / "raw")
    dataset = mechanism.open_dataset([trained / "data"])
    prior = mechanism.location_prior(dataset, masks, 8)
    train = {sample.image_id for sample in dataset.samples if sample.split == "train"}
    shown = [(i, f) for i, f in masks if i in train]
    assert set(prior) == {finding for _, finding in shown}
    finding = shown[0][1]
    mean = np.mean([masks[i, f] for i, f in shown if f == finding], 0)
    assert prior[finding][0].item() == pytest.approx(mean[:8, :8].mean())
