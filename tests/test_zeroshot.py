"""Zero-shot scores: by hand, blind to test labels, and honest about what has no score."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmclip.checkpoint import load_checkpoint
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.sample import LABEL_MAKERS, Sample
from mmclip.data.synthetic import FINDINGS
from mmclip.embed import embed_texts
from mmclip.evaluation.results import About, FindingScores
from mmclip.evaluation.selection import select_samples
from mmclip.evaluation.zeroshot import (
    Selection,
    ZeroShot,
    evaluate,
    made_now,
    write_zeroshot,
    zeroshot,
)
from mmclip.evaluation.zeroshot_task import ZeroshotRequest
from mmclip.model_loading import ModelRequest
from mmclip.models.dual_encoder import PromptEmbeddings, Scoring
from mmclip.prompts import PromptSet, load_prompts
from mmclip.run import Run, open_run


@pytest.fixture(scope="module")
def trained(made_run: Path) -> Run:
    return open_run(made_run)


@pytest.fixture(scope="module")
def dataset(made_data: Path) -> ImageTextDataset:
    return open_dataset([made_data])


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    return load_prompts("default")


@pytest.fixture(scope="module")
def scored(trained: Run, dataset: ImageTextDataset, prompts: PromptSet) -> ZeroShot:
    return zeroshot(trained, dataset, prompts, n_resamples=20)


def changed(dataset: ImageTextDataset, change: Callable[[Sample], Sample]) -> ImageTextDataset:
    return replace(dataset, samples=tuple(change(sample) for sample in dataset.samples))


def by_finding(result: ZeroShot) -> dict[str, FindingScores]:
    return {row.finding: row for row in result.evaluation.findings}


@pytest.mark.ledger("prompt pair")
def test_probabilities_of_two_images_by_hand():
    images = torch.eye(2)
    prompts = PromptEmbeddings(
        positive=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
        negative=torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]),
    )
    found = Scoring("prompt_pair", math.log(3)).scores(images, prompts)
    # 3 / (3 + 1/3 * 3) = 3/4 where the positive prompt is nearer by 1; equal prompts give 1/2.
    expected = [[3 / 4, 1 / 2, 3**0.6 / (1 + 3**0.6)], [1 / 4, 1 / 2, 1 / (1 + 3**0.2)]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_probabilities_are_the_softmax_over_the_pair(scored: ZeroShot):
    generator = torch.Generator().manual_seed(0)
    images, positive, negative = (torch.randn(n, 8, generator=generator) for n in (5, 3, 3))
    pair = torch.stack([images @ positive.T, images @ negative.T], -1) * 14.0
    expected = pair.double().softmax(-1)[..., 0].numpy()
    found = Scoring("prompt_pair", 14.0).scores(images, PromptEmbeddings(positive, negative))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert ((scored.test.scores > 0) & (scored.test.scores < 1)).all()


@pytest.mark.ledger("prompt pair")
def test_collapsed_embeddings_score_one_half(
    made_run: Path, dataset: ImageTextDataset, prompts: PromptSet
):
    collapsed = open_run(made_run)
    with torch.no_grad():
        collapsed.model.visual_projection.weight.zero_()
    result = zeroshot(collapsed, dataset, prompts, n_resamples=5)
    assert (result.test.scores == 0.5).all()
    assert [row.auroc for row in result.evaluation.findings] == [0.5] * len(FINDINGS)


def test_the_order_of_the_findings_is_the_order_of_the_results(
    trained: Run, dataset: ImageTextDataset, prompts: PromptSet, scored: ZeroShot
):
    order = np.random.default_rng(0).permutation(len(scored.test.names()))
    names = [scored.test.names()[i] for i in order]
    result = zeroshot(trained, dataset, prompts, Selection(findings=tuple(names)), n_resamples=20)
    assert result.test.names() == names
    assert [row.finding for row in result.evaluation.findings] == names
    np.testing.assert_allclose(result.test.scores, scored.test.scores[:, order], rtol=1e-9)
    for name, row in by_finding(scored).items():
        theirs = by_finding(result)[name]
        for metric in ("auroc", "auroc_ci", "auprc", "f1", "mcc", "n_positive", "n_negative"):
            assert getattr(theirs, metric) == pytest.approx(getattr(row, metric), abs=1e-9), (
                name,
                metric,
            )


def test_findings_are_scored_alone_as_among_others(
    trained: Run, dataset: ImageTextDataset, prompts: PromptSet, scored: ZeroShot
):
    result = zeroshot(trained, dataset, prompts, Selection(findings=("nodule",)), n_resamples=20)
    column = scored.test.names().index("nodule")
    np.testing.assert_allclose(result.test.scores[:, 0], scored.test.scores[:, column], rtol=1e-9)


@pytest.mark.ledger("thresholds")
def test_labels_of_test_images_change_neither_scores_nor_thresholds(
    trained: Run, dataset: ImageTextDataset, prompts: PromptSet, scored: ZeroShot
):
    def opposite(sample: Sample) -> Sample:
        if sample.split != "test":
            return sample
        return replace(sample, labels={name: 1 - value for name, value in sample.labels.items()})

    result = zeroshot(trained, changed(dataset, opposite), prompts, n_resamples=20)
    assert np.array_equal(result.test.labels, 1 - scored.test.labels)
    assert np.array_equal(result.test.scores, scored.test.scores)
    for name, row in by_finding(scored).items():
        theirs = by_finding(result)[name]
        assert theirs.threshold == row.threshold
        assert theirs.auroc == pytest.approx(1 - row.auroc)


@pytest.mark.ledger("thresholds")
def test_thresholds_come_from_the_validation_images(
    trained: Run, dataset: ImageTextDataset, prompts: PromptSet, scored: ZeroShot
):
    val = zeroshot(trained, dataset, prompts, Selection("val"), n_resamples=5)
    for name, row in by_finding(scored).items():
        column = val.test.names().index(name)
        if 0 < val.test.labels[:, column].sum() < len(val.dataset):
            assert (row.threshold.rule, row.threshold.chosen_on) == ("f1", "val")
            assert row.threshold.value in val.test.scores[:, column]
        else:
            assert (row.threshold.rule, row.threshold.value) == ("equal_prompts", 0.5)
    assert {row.threshold.rule for row in by_finding(val).values()} == {"equal_prompts"}


def test_without_validation_images_the_threshold_is_the_tie(
    trained: Run, dataset: ImageTextDataset, prompts: PromptSet
):
    no_val = dataset.select([sample.split != "val" for sample in dataset.samples])
    for row in zeroshot(trained, no_val, prompts, n_resamples=5).evaluation.findings:
        assert row.threshold.value == 0.5
        assert row.threshold.chosen_on.startswith("where both prompts fit equally well")


def test_findings_that_lack_a_class_are_listed_and_have_no_score(
    trained: Run, dataset: ImageTextDataset, prompts: PromptSet, tmp_path: Path
):
    def one_sided(sample: Sample) -> Sample:
        return replace(sample, labels={**sample.labels, "mass": 0, "edema": 1, "nodule": -1})

    result = zeroshot(trained, changed(dataset, one_sided), prompts, n_resamples=5)
    n = len(result.dataset)
    assert [row.model_dump() for row in result.evaluation.undefined] == [
        {"finding": "edema", "n_positive": n, "n_negative": 0, "n_unknown": 0,
         "reason": "no negative image"},
        {"finding": "mass", "n_positive": 0, "n_negative": n, "n_unknown": 0,
         "reason": "no positive image"},
        {"finding": "nodule", "n_positive": 0, "n_negative": 0, "n_unknown": n,
         "reason": "no positive and no negative image"},
    ]  # fmt: skip
    assert len(by_finding(result)) == len(FINDINGS) - 3
    assert not {"edema", "mass", "nodule"} & set(result.evaluation.macro_findings)


def test_results_of_images_without_any_finding_are_written_with_no_score(
    trained: Run, dataset: ImageTextDataset, prompts: PromptSet, tmp_path: Path
):
    healthy = changed(
        dataset, lambda sample: replace(sample, labels=dict.fromkeys(sample.labels, 0))
    )
    result = zeroshot(trained, healthy, prompts, n_resamples=5)
    write_zeroshot(
        tmp_path,
        result,
        About(title="t", kind="zeroshot", summary="s"),
        made_now(result, "c", 0, split="built", wall_s=0.0),
        gallery=[0],
    )
    left = json.loads((tmp_path / "results.json").read_text())
    assert left["findings"] == [] and left["macro_auroc"] is None
    assert [row["finding"] for row in left["undefined"]] == sorted(FINDINGS)
    assert (tmp_path / "page.html").is_file()


@pytest.mark.ledger("views")
def test_lateral_and_unlabelled_images_and_images_of_other_splits_are_not_scored(
    dataset: ImageTextDataset,
):
    test = [sample for sample in dataset.samples if sample.split == "test"]
    lateral, unlabelled = test[0].image_id, test[1].image_id

    def change(sample: Sample) -> Sample:
        if sample.image_id == lateral:
            return replace(sample, view="L")
        return replace(sample, labels={}) if sample.image_id == unlabelled else sample

    kept = select_samples(changed(dataset, change), "test")
    assert [sample.image_id for sample in kept.samples] == [sample.image_id for sample in test[2:]]


def test_one_image_is_scored_as_among_others(
    trained: Run, dataset: ImageTextDataset, prompts: PromptSet, scored: ZeroShot
):
    last = scored.dataset.samples[-1].image_id
    alone = dataset.select([sample.image_id == last for sample in dataset.samples])
    result = zeroshot(trained, alone, prompts, n_resamples=5)
    np.testing.assert_allclose(result.test.scores[0], scored.test.scores[-1], rtol=1e-4)


def test_equal_texts_are_encoded_once(trained: Run, monkeypatch: pytest.MonkeyPatch):
    n_encoded = 0
    encode_text = trained.model.encode_text

    def counting(ids: torch.Tensor, is_valid: torch.Tensor):
        nonlocal n_encoded
        n_encoded += len(ids)
        return encode_text(ids, is_valid)

    monkeypatch.setattr(trained.model, "encode_text", counting)
    texts = ["No edema.", "Edema.", "No edema.", "No edema."]
    found = embed_texts(trained.model, trained.tokenizer, texts, 32, batch_size=1)
    assert n_encoded == 2
    assert torch.equal(found[0], found[2]) and torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])


def test_padding_changes_no_embedding(trained: Run):
    model, tokenizer = trained.model, trained.tokenizer
    texts = ["No edema.", "There is a large left pleural effusion and a small right nodule."]
    together = embed_texts(model, tokenizer, texts, 64)
    alone = torch.cat([embed_texts(model, tokenizer, [text], 64) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_what_is_not_in_the_data_is_named_with_what_is(
    trained: Run, dataset: ImageTextDataset, prompts: PromptSet
):
    with pytest.raises(ManifestError, match="no source chexpert in this data; there are synthetic"):
        select_samples(dataset, "test", ["chexpert"])
    with pytest.raises(
        ManifestError, match="labelled with gout; these images are labelled with at"
    ):
        zeroshot(trained, dataset, prompts, Selection(findings=("gout",)))
    no_test = dataset.select([sample.split != "test" for sample in dataset.samples])
    with pytest.raises(ManifestError, match="no labelled frontal image in split 'test'"):
        select_samples(no_test, "test")


def test_the_files_hold_what_the_results_say(made_run: Path, made_data: Path, tmp_path: Path):
    results = evaluate(
        ZeroshotRequest(
            ModelRequest(str(made_run)),
            (made_data,),
            tmp_path,
            "mmclip zeroshot",
            findings=("nodule", "mass"),
            prompt_sets=("default", "pair"),
            n_resamples=10,
        )
    )
    with np.load(tmp_path / "scores.npz") as stored:
        assert stored["findings"].tolist() == ["nodule", "mass"]
        assert len(set(stored["image_id"])) == results.n_images == len(stored["scores"])
        assert len(set(stored["patient_id"])) == results.n_patients == 40
        assert stored["labels"][:, 0].sum() == results.findings[0].n_positive
    left = json.loads((tmp_path / "results.json").read_text())
    meta = load_checkpoint(made_run).meta
    assert left["provenance"]["config_hash"] == meta["config_hash"]
    assert left["provenance"]["data_hash"] == meta["data_hash"]
    assert left["provenance"]["train_seed"] == meta["config"]["train"]["seed"]
    assert left["provenance"]["recipe_hash"] == open_run(made_run).recipe_hash
    assert left["facts"]["step"] == 6
    assert left["facts"]["labelled by"] in LABEL_MAKERS.values()
    assert (tmp_path / "page.html").is_file() and (tmp_path / "plots" / "auroc.png").is_file()
