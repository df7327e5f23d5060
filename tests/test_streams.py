"""Reports without an image and images with neither report nor labels: streams beside the pairs."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmclip.batch import Batch, BatchSlice
from mmclip.config import Config
from mmclip.config_io import ConfigError
from mmclip.data.batches import TrainingBatches
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.ingest.build import build_data
from mmclip.data.sample import Sample
from mmclip.data.streams import rows_by_stream, seen_in_training, training_dataset
from mmclip.models.encoders import patch_grid
from mmclip.models.mmclip import MMCLIP
from mmclip.patches import PatchGrid
from mmclip.training.objective import Objective
from mmclip.training.pretrain import PretrainRequest, build_model, pretrain
from tests.made import REPORTS, WHOLE, cut_batch, small_config, write_images
from tests.test_batches import TOKENIZER
from tests.test_pretrain import weights_of

STREAMS = (
    "unpaired.rows_per_pair=0.5",
    "unpaired.reports_per_pair=0.75",
    "unpaired.bare_per_pair=1",
)
SETTINGS = (*WHOLE, "train.batch_size=4", "data.max_tokens=32", "image_mask.final_mask_noise=0")
BARE = ["f10", "f11", "f12", "f9"]


def mixed_samples(root: Path) -> list[Sample]:
    """Four pairs, two images with labels, three reports alone, four images alone."""
    samples = write_images(root, 13)
    for i in range(4, 13):
        samples[i] = replace(samples[i], report=None)
    for i, report in zip((6, 7, 8), REPORTS, strict=False):
        samples[i] = replace(samples[i], report=report, image=None, view="unknown", labels={})
    for i in range(9, 13):
        samples[i] = replace(samples[i], labels={"mass": -1} if i == 9 else {})
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    build_data(mixed_samples(root), root, root / "data", image_size=32)
    return root / "data"


def config_of(*overrides: str) -> Config:
    return small_config(*SETTINGS, *overrides)


def batches_of(folder: Path, config: Config) -> TrainingBatches:
    dataset = training_dataset(open_dataset([folder], 32), config)
    return TrainingBatches(dataset, TOKENIZER, config, PatchGrid(8))


def made(config: Config) -> tuple[MMCLIP, Objective]:
    torch.manual_seed(0)
    model = build_model(config, TOKENIZER)
    return model, Objective(config, patch_grid(model.vision_model))


@pytest.mark.ledger("mixing")
def test_a_step_reads_each_stream_by_its_ratio_and_the_same_pairs_as_without(folder: Path):
    mixed, plain = batches_of(folder, config_of(*STREAMS)), batches_of(folder, config_of())
    assert rows_by_stream(mixed.dataset) == {
        "n_pairs": 4, "n_unpaired": 2, "n_lone_reports": 3, "n_bare": 4,
    }  # fmt: skip
    for step in range(3):
        batch, pairs = mixed.batch(step, BatchSlice()), plain.batch(step, BatchSlice())
        assert pairs.lone_reports is None and batch.lone_reports is not None
        assert batch.image_ids[:4] == pairs.image_ids and len(batch) == 4 + 2 + 4
        assert torch.equal(batch.image[:4], pairs.image)
        assert sorted(batch.image_ids[6:]) == BARE
        assert len(batch.lone_reports) == 3 and batch.lone_reports.is_masked.any(1).all()
        assert batch.has_text.tolist() == [True] * 6 + [False] * 4
        assert torch.equal(batch.reports.ids, pairs.reports.ids)


@pytest.mark.ledger("mixing")
def test_a_step_of_all_streams_is_the_sum_of_its_parts(folder: Path):
    config = config_of(*STREAMS)
    model, objective = made(config)
    batch = batches_of(folder, config).batch(2, BatchSlice())
    rows = [cut_batch(batch, slice(i, i + 1)) for i in range(len(batch))]
    alone = replace(cut_batch(batch, slice(0, 0)), lone_reports=batch.lone_reports)
    with torch.no_grad():
        whole = objective.sums(model, batch)
        parts = [objective.sums(model, part) for part in rows]
        text = float(sum(part["text"] for part in parts))
        # The reports have no image to be put with: what they add is what is left.
        first = replace(rows[0], lone_reports=batch.lone_reports)
        lone = float(objective.sums(model, first)["text"] - parts[0]["text"])
    assert lone > 0
    assert float(whole["text"]) == pytest.approx(text + lone, rel=1e-4)
    assert float(whole["image"]) == pytest.approx(float(sum(p["image"] for p in parts)), rel=1e-4)
    counts = [objective.counts(part) for part in [*rows, alone]]
    assert {k: sum(c[k] for c in counts) for k in counts[0]} == objective.counts(batch)
    assert objective.counts(alone) == {**dict.fromkeys(counts[0], 0), "text": counts[-1]["text"]}


@pytest.mark.ledger("reports alone")
def test_a_report_alone_trains_the_text_terms_and_no_image(folder: Path):
    config = config_of(*STREAMS)
    model, objective = made(config)
    batch = batches_of(folder, config).batch(0, BatchSlice())
    assert batch.lone_reports is not None
    output = model.forward_text(batch.lone_reports, None)
    assert output.masked_features is not None
    model.token_logits(output.masked_features).square().sum().backward()
    moved = {
        name.split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert moved == {"text_model", "text_decoder"}
    contrastive = [
        objective.sums(model, part)["contrastive"]
        for part in (batch, replace(batch, lone_reports=None))
    ]
    assert torch.equal(*contrastive)


@pytest.mark.ledger("images alone")
@pytest.mark.parametrize("policy", ["attention", "least_relevant", "random"])
def test_an_image_alone_is_masked_at_random_and_trains_the_image_term_alone(
    folder: Path, policy: str
):
    config = config_of(*STREAMS, f"image_mask.policy={policy}")
    model, objective = made(config)
    batch = batches_of(folder, config).batch(0, BatchSlice())
    with torch.no_grad():
        out = model(batch, config.image_mask, mask_noise=0.0)
    assert out.relevance is not None and not out.relevance[6:].any()
    by_noise = batch.patch_noise[6:].topk(8, dim=1).indices.sort(1).values
    assert torch.equal(out.is_masked[6:].nonzero()[:, 1].view(4, 8), by_noise)
    bare = cut_batch(batch, slice(6, 10))
    sums = objective.sums(model, replace(bare, lone_reports=None))
    assert float(sums["image"].detach()) > 0 and float(sums["contrastive"].detach()) == 0
    assert objective.counts(bare)["contrastive"] == 0


@pytest.mark.ledger("random numbers")
def test_every_number_of_a_mixed_step_is_its_rows_own(folder: Path):
    config = config_of(*STREAMS)
    batches = batches_of(folder, config)
    whole = batches.batch(1, BatchSlice())
    parts = [batches.batch(1, BatchSlice(i, 3)) for i in range(3)]
    assert whole.lone_reports is not None

    def words(*of: Batch) -> list[list[int]]:
        texts = [each.lone_reports for each in of if each.lone_reports is not None]
        return [
            ids[is_valid].tolist()
            for each in texts
            for ids, is_valid in zip(each.masked_ids, each.is_valid, strict=True)
        ]

    assert sorted(words(whole)) == sorted(words(*parts))
    names = [name for part in parts for name in part.image_ids]
    assert sorted(names) == sorted(whole.image_ids)


def test_a_run_of_all_streams_resumes_to_the_same_bytes(folder: Path, tmp_path: Path):
    config = config_of(
        *STREAMS, "train.steps=4", "train.save_every_steps=2", "train.log_every_steps=1"
    )
    whole = PretrainRequest((folder,), tmp_path / "whole", config, "a test", cpu=True)
    pretrain(whole)
    cut = replace(whole, run=tmp_path / "cut")
    shutil.rmtree(pretrain(cut))  # as if it had been killed after the checkpoint before
    pretrain(replace(cut, resume=True))
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "cut")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("unpaired.reports_per_pair=1", "loss.text=0 leaves out the term"),
        ("unpaired.bare_per_pair=1", "loss.image=0 leaves out the term"),
    ],
)
def test_a_stream_without_a_term_that_learns_from_it_is_refused(override: str, said: str):
    with pytest.raises(ConfigError, match=said):
        small_config(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("unpaired.reports_per_pair=1", "no training report has no image"),
        ("unpaired.bare_per_pair=1", "no training image has neither report nor labels"),
    ],
)
def test_a_stream_without_rows_is_refused_by_its_key(override: str, said: str, tmp_path: Path):
    build_data(write_images(tmp_path), tmp_path, tmp_path / "data", image_size=32)
    config = config_of(override)
    with pytest.raises(ManifestError, match=f"{said}.*{override.split('=')[0]}=1.0 asks for"):
        pretrain(PretrainRequest((tmp_path / "data",), tmp_path / "run", config, "", cpu=True))


@pytest.mark.ledger("withheld findings")
def test_a_withheld_finding_is_in_no_prompt_and_no_image_that_has_it_is_normal(tmp_path: Path):
    absent = dict.fromkeys(["mass", "nodule", "edema", "hernia", "mass b", "c", "d", "e", "f"], 0)
    samples = write_images(tmp_path, 9)
    labels = [{"nodule": 1}, {**absent, "nodule": 1}, {**absent, "nodule": 0}, {"edema": 1}, {}]
    samples[4:] = [
        replace(f, report=None, labels=own) for f, own in zip(samples[4:], labels, strict=True)
    ]
    build_data(samples, tmp_path, tmp_path / "data", image_size=32)
    dataset = open_dataset([tmp_path / "data"], 32)
    config = small_config(
        "unpaired.rows_per_pair=1", "unpaired.absent_prob=1", "unpaired.withheld=['nodule']"
    )
    chosen = training_dataset(dataset, config)
    assert "f4" not in {f.image_id for f in chosen.samples}  # nothing else is known of it
    assert "nodule" not in seen_in_training(chosen, config)["prompt"]
    batches = TrainingBatches(chosen, TOKENIZER, config, PatchGrid(8))
    rows = np.arange(len(chosen))
    said = {
        f.image_id: prompt.text
        for f, prompt in zip(chosen.samples, batches.prompts(rows, 0 * rows), strict=True)
        if prompt is not None and f.report is None
    }
    assert said.keys() == {"f5", "f6", "f7"} and "nodule" not in "".join(said.values()).lower()
    assert not batches.prompt_templates.is_normal(chosen.samples[rows[4]].labels)  # f5 has it
    assert batches.prompt_templates.is_normal(chosen.samples[rows[5]].labels)
    with pytest.raises(ConfigError, match=r"withheld names cysts, and images are labelled with"):
        training_dataset(dataset, small_config("unpaired.withheld=['cysts']"))
