"""Fine-tuning: what validation alone may choose, what resumes exactly, and what is refused."""

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

import mmclip.finetuning.supervised as supervised
import mmclip.finetuning.task as tasks
from mmclip.checkpoint import checkpoint_meta, find_checkpoint, load_checkpoint, read_weights
from mmclip.config_io import load_config_as
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, normalise, open_dataset
from mmclip.data.leakage.splits import set_split, subsets_of
from mmclip.data.manifest import read_manifest, replace_images
from mmclip.data.sample import Sample
from mmclip.data.streams import SEEN_FILE
from mmclip.data.synthetic import FINDINGS
from mmclip.evaluation.baselines import STRENGTHS, fit_logistic
from mmclip.evaluation.protocols import FineTuning, Protocol, load_protocol
from mmclip.evaluation.results import read_results
from mmclip.evaluation.scores import load_scores
from mmclip.finetuning.features import start_of, stored_features
from mmclip.finetuning.finetune import (
    SUMMARY_FILE,
    Common,
    FinetuneRequest,
    Part,
    finetune,
    fit_probe,
    recipe_of,
    run_one,
)
from mmclip.finetuning.saved import load_fine_tuned
from mmclip.finetuning.supervised import (
    FineTuneConfig,
    best_of,
    has_ended,
    macro_auroc,
    positive_weights,
    predict,
    train_classifier,
)
from mmclip.finetuning.task import (
    Task,
    multiclass_columns,
    open_task,
    own_protocol,
    training_ids,
    training_labels,
)
from mmclip.losses import label_sum
from mmclip.models.classifier import (
    Classifier,
    ImageEncoder,
    freeze_unused,
    image_of,
    layer_numbers,
    lr_scales,
)
from mmclip.models.encoders import build_image_encoder
from tests.commands import Ended, mmclip, mmclip_in_two_processes
from tests.made import IMAGE_SIZE, small_config, trained_on

ASKED = ("pleural effusion", "pneumothorax")
SHORT = (
    "train.steps=6", "train.batch_size=8", "train.save_every_steps=2", "patience=9",
    "train.log_every_steps=2",
)  # fmt: skip
CPU = torch.device("cpu")


def short(*overrides: str) -> FineTuneConfig:
    return load_config_as(FineTuneConfig, "configs_finetune", "tiny", [*SHORT, *overrides])


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def task(made_data: Path) -> Task:
    return open_task(made_data, own_protocol(made_data, ASKED, ()), IMAGE_SIZE)


@pytest.fixture
def finetune_request(made_data: Path, made_run: Path, tmp_path: Path) -> FinetuneRequest:
    run = shutil.copytree(made_run, tmp_path / "run")
    return FinetuneRequest(
        made_data, tmp_path / "out", short(), "mmclip finetune", findings=ASKED, run=run,
        fractions=(1.0,), seeds=(0,), n_resamples=20, cpu=True,
    )  # fmt: skip


def test_asked_findings_are_those_of_the_synthetic_images():
    assert set(ASKED) <= set(FINDINGS)


def small_encoder(kind: str) -> ImageEncoder:
    torch.manual_seed(0)
    config = small_config(f"model.image.kind={kind}")
    return ImageEncoder(build_image_encoder(config.model.image, IMAGE_SIZE), "pooled")


def test_layers_of_a_vit_and_a_resnet_by_hand():
    vit = {
        "image_encoder.encoder.embeddings.cls_token": 0,
        "image_encoder.encoder.layers.0.mlp.fc1.weight": 1,
        "image_encoder.encoder.layers.11.norm.bias": 12,
        "image_encoder.encoder.layernorm.weight": 13,
        "image_encoder.encoder.pooler.dense.weight": 13, "head.weight": 13,
    }  # fmt: skip
    assert layer_numbers(list(vit)) == vit
    resnet = {
        "image_encoder.encoder.embedder.embedder.convolution.weight": 0,
        "image_encoder.encoder.encoder.stages.0.layers.1.layer.0.convolution.weight": 1,
        "image_encoder.encoder.encoder.stages.3.layers.0.shortcut.convolution.weight": 4,
        "head.bias": 5,
    }  # fmt: skip
    assert layer_numbers(list(resnet)) == resnet
    assert list(lr_scales(list(resnet), 0.5).values()) == [1 / 32, 1 / 16, 1 / 2, 1]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_each_parameter_of_our_encoders_has_the_layer_of_its_depth(kind: str):
    names = [name for name, _ in Classifier(small_encoder(kind), 2).named_parameters()]
    number = layer_numbers(names)
    n_blocks = 2
    assert set(number.values()) == set(range(n_blocks + 2))
    assert number["head.weight"] == n_blocks + 1
    for name, layer in number.items():
        if "embed" in name:
            assert layer == 0, name


def test_rates_of_layers_are_what_the_optimiser_gets():
    model = Classifier(small_encoder("vit"), 2)
    names = [name for name, _ in model.named_parameters()]
    scales = lr_scales(names, 0.5)
    optimizer = supervised.make_optimizer(model, set(), short().train, scales)
    by_id = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: by_id[id(p)] for n, p in model.named_parameters()} == scales


def test_weights_of_present_labels_by_hand():
    nan = np.nan
    labels = np.array(
        [[1, 1, 1, 1, nan], [0, 1, 0, 1, nan], [0, 0, nan, 1, nan], [0, 1, 0, 1, nan]]
    )
    assert positive_weights(labels, 10.0).tolist() == [3, 1 / 3, 2, 1, 1]
    assert positive_weights(labels, 2.0).tolist() == [2, 1 / 2, 2, 1, 1]


def test_a_weight_of_present_labels_repeats_their_terms_and_no_others():
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    labels = torch.tensor([[1.0, 0.0], [0.0, torch.nan]])
    once = label_sum(logits, labels)
    thrice = label_sum(logits, labels, torch.tensor([3.0, 3.0]))
    present = torch.log1p(torch.exp(-logits[0, 0]))
    assert thrice.item() == pytest.approx((once + 2 * present).item(), rel=1e-6)


def test_the_first_of_equal_validations_is_best_and_patience_ends_by_hand():
    history = [(2, 0.6), (4, 0.8), (6, 0.8), (8, 0.7)]
    assert best_of(history) == 4
    assert not has_ended([], 1) and not has_ended(history, 3) and has_ended(history, 2)
    assert not has_ended([*history, (10, 0.9)], 1)


def test_macro_auroc_leaves_out_findings_of_one_class():
    labels = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, np.nan]])
    assert macro_auroc(labels, np.array([[0.4, 0.0], [0.5, 0.0], [0.1, 0.0]])) == 0.5
    assert macro_auroc(labels[:, 1:], np.zeros((3, 1))) is None


def test_uncertain_labels_train_as_the_protocol_says():
    facts = {"study_id": "s", "patient_id": "p", "source": "made", "split": "train"}
    sample = Sample(
        image_id="f", image="f.png", labels={"mass": -1, "edema": -1, "hernia": -1}, **facts
    )
    protocol = Protocol(
        id="p", version=1, title="t", description="a", readers=("made",), splits=("built",),
        findings=("mass", "edema", "hernia", "nodule"),
        finetune=FineTuning(uncertain="positive", uncertain_of={"edema": "negative"}),
    )  # fmt: skip
    assert training_labels(protocol, [sample])[0, :3].tolist() == [1, 0, 1]
    assert np.isnan(training_labels(protocol, [sample])[0, 3])
    rules = FineTuning(uncertain="U-MultiClass", uncertain_of={"edema": "ignore"})
    own_class = protocol.model_copy(update={"finetune": rules})
    assert training_labels(own_class, [sample])[0, [0, 2]].tolist() == [-1, -1]
    assert np.isnan(training_labels(own_class, [sample])[0, [1, 3]]).all()
    assert multiclass_columns(own_class) == (0, 2, 3) and multiclass_columns(protocol) == ()
    ignore = protocol.model_copy(update={"finetune": FineTuning()})
    assert np.isnan(training_labels(ignore, [sample])).all()


def test_blank_labels_and_no_finding_train_as_in_irvin_et_al():
    facts = {"study_id": "s", "patient_id": "p", "source": "chexpert", "split": "train"}
    labels = (
        {"no finding": 1, "support devices": 1},
        {"atelectasis": -1, "edema": 1, "cardiomegaly": -1},
        {"pleural effusion": 0, "consolidation": -1},
        {},
    )
    samples = [Sample(image_id=str(i), image="f", labels=x, **facts) for i, x in enumerate(labels)]
    protocol = load_protocol("chexpert-5")
    assert training_labels(protocol, samples)[:3].tolist() == [
        [0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert np.isnan(training_labels(protocol, samples)[3]).all()  # nobody labelled it
    unknown = protocol.model_copy(update={"finetune": FineTuning(blank="unknown")})
    found = training_labels(unknown, samples)
    assert found[0].tolist() == [0, 0, 0, 0, 0]  # "No Finding" says that much
    assert np.isnan(found[1:3]).sum() == 4 + 4
    devices = protocol.model_copy(update={"findings": ("support devices", "no finding")})
    assert training_labels(devices, samples)[:3].tolist() == [[1, 1], [0, 0], [0, 0]]


def test_policies_of_uncertain_labels_go_by_their_names_in_the_paper():
    by_name = {
        "U-Ignore": "ignore", "U-Ones": "positive", "U-zeros": "negative",
        "U-MultiClass": "multiclass",
    }  # fmt: skip
    for name, policy in by_name.items():
        assert FineTuning(uncertain=name, uncertain_of={"mass": name}).uncertain == policy
    with pytest.raises(ValueError, match="U-SelfTrained is not supported: it labels uncertain"):
        FineTuning(uncertain="U-SelfTrained")
    rules = load_protocol("chexpert-5").finetune
    assert rules is not None
    assert rules.label_rules(["edema", "cardiomegaly"]) == {
        "blank labels": "absent", "uncertain labels": "edema positive, cardiomegaly negative",
    }  # fmt: skip


def test_subsets_are_the_saved_ones_and_an_error_names_the_command(made_data: Path, tmp_path: Path):
    folder = shutil.copytree(made_data, tmp_path / "data")
    samples = open_dataset([folder]).samples
    built = [sample for sample in samples if sample.split == "train"]
    drawn = subsets_of(built, 5)["10"]["image_ids"]
    assert training_ids(folder, 0.1, 5) == set(drawn)
    assert training_ids(folder, 1.0, 5) == {sample.image_id for sample in built}
    split = set_split(folder, "clean", subset_seeds=(0, 1))
    assert training_ids(folder, 0.1, 1) == set(split["subsets"]["1"]["10"]["image_ids"])
    with pytest.raises(
        ManifestError, match="--name clean --subset-seed 0 --subset-seed 1 --subset-seed 5"
    ):
        training_ids(folder, 0.1, 5)
    with pytest.raises(ManifestError, match=r"0\.05 is not saved with splits; take 0\.01, 0\.1, 1"):
        training_ids(folder, 0.05, 0)


def test_images_are_encoded_once_for_each_set_of_weights(
    task: Task, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder, dataset = small_encoder("vit"), task.val.dataset

    def vectors() -> np.ndarray:
        return np.array(stored_features(encoder, dataset, made_data, tmp_path, CPU))

    first = vectors()
    with torch.no_grad():
        images = normalise(dataset.pixels(np.arange(len(dataset))))
        np.testing.assert_allclose(first, encoder(images).numpy(), atol=1e-5)
    forward = ImageEncoder.forward

    def refuse(self, image):
        raise AssertionError("an image was encoded again")

    monkeypatch.setattr(ImageEncoder, "forward", refuse)
    assert np.array_equal(vectors(), first)
    monkeypatch.setattr(ImageEncoder, "forward", forward)
    with torch.no_grad():
        next(encoder.parameters()).add_(1)
    assert not np.array_equal(vectors(), first)
    assert len(list(tmp_path.glob("pooled-*.npy"))) == 2


def test_what_the_output_does_not_need_is_frozen_and_all_else_learns():
    encoder = small_encoder("vit")
    by_class = Classifier(ImageEncoder(encoder.encoder, "class"), 2)
    frozen = freeze_unused(by_class, image_of(IMAGE_SIZE))
    assert sorted(frozen) == [
        f"image_encoder.encoder.pooler.dense.{end}" for end in ("bias", "weight")
    ]
    assert freeze_unused(Classifier(small_encoder("resnet"), 2), image_of(IMAGE_SIZE)) == []


def opposite(task: Task) -> Task:
    """The task with every test label turned round."""
    return replace(task, test=replace(task.test, labels=1 - task.test.labels))


@pytest.mark.parametrize("method", ["probe", "full"])
def test_test_labels_choose_neither_scores_nor_cut_step_or_weights(
    method: str, finetune_request: FinetuneRequest, task: Task, monkeypatch: pytest.MonkeyPatch
):
    left: list[dict] = []

    def keep(out, results, test, *, val, protocol, gallery):
        cuts = {row.finding: row.threshold for row in results.findings}
        left.append({"cuts": cuts, "facts": results.facts, "test": test.scores, "val": val.scores})

    monkeypatch.setattr("mmclip.finetuning.finetune.write_evaluation", keep)
    finetune_request = replace(finetune_request, method=method)
    for name, given in (("a", task), ("b", opposite(task))):
        start = start_of("run", finetune_request.run, finetune_request.folder)
        run_one(
            Common(finetune_request, start, given, "none", {}),
            Part(given, 1.0, 0, finetune_request.out / name),
        )
    straight, turned = left
    assert straight["cuts"] == turned["cuts"] and straight["cuts"].keys() == set(ASKED)
    assert straight["facts"] == turned["facts"]
    assert np.array_equal(straight["test"], turned["test"])
    assert np.array_equal(straight["val"], turned["val"])
    if method == "full":
        a, b = (find_checkpoint(finetune_request.out / name) for name in "ab")
        ours, theirs = (read_weights(f, checkpoint_meta(f)) for f in (a, b))
        assert a.name == b.name and all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_probe_learns_what_one_feature_says_and_leaves_unknown_labels_out(task: Task):
    labels = np.where(np.isnan(task.train.labels), 0.0, task.train.labels)
    labels[::3] = np.nan
    known = replace(task, train=replace(task.train, labels=labels))
    told = np.concatenate(
        [np.where(np.isnan(labels), 1e3, labels), task.val.labels, task.test.labels]
    )
    _, val, test = fit_probe(known, np.nan_to_num(told), known.dataset)
    assert macro_auroc(task.val.labels, val) == macro_auroc(task.test.labels, test) == 1.0


def test_a_probe_with_uncertain_as_a_class_scores_present_among_present_and_absent():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 3)), np.repeat([-1.0, 0.0, 1.0], 30)
    x[:, 0] += y
    fit = fit_logistic(x, y[:, None], x[:0], np.zeros((0, 1)))
    scaler = StandardScaler().fit(x)
    usual = LogisticRegression(C=STRENGTHS[0], max_iter=2000).fit(scaler.transform(x), y)
    _, absent, present = usual.predict_proba(scaler.transform(x)).T
    np.testing.assert_allclose(fit.scores(x)[:, 0], present / (present + absent), rtol=1e-9)
    without_absent = np.where(y == 0, np.nan, y)[:, None]
    assert (fit_logistic(x, without_absent, x, without_absent).scores(x) == 0.5).all()


MULTICLASS = """
id = "doubts"
version = 1
title = "t"
description = "a"
readers = ["unknown"]
splits = ["built"]
findings = ["pleural effusion", "pneumothorax"]
min_count = 1
[finetune]
fractions = [1.0]
seeds = [0]
uncertain = "ignore"
uncertain_of = { pneumothorax = "U-MultiClass" }
"""


@pytest.mark.parametrize("method", ["probe", "full"])
def test_uncertain_labels_are_learnt_as_a_class_and_the_saved_model_scores_as_the_results(
    method: str, finetune_request: FinetuneRequest, made_data: Path, tmp_path: Path
):
    folder = shutil.copytree(made_data, tmp_path / "doubted")
    samples = [
        replace(s, labels={**s.labels, "pneumothorax": -1}) if i % 3 == 0 else s
        for i, s in enumerate(read_manifest(folder))
    ]
    replace_images(folder, samples, {})
    path = tmp_path / "doubts.toml"
    path.write_text(MULTICLASS, "utf-8")
    request = replace(
        finetune_request, folder=folder, findings=(), protocol=str(path), fractions=(), seeds=(),
        method=method, init="random",
    )  # fmt: skip
    finetune(request)
    out = request.out / f"{method}-100-0"
    assert read_results(out).facts["uncertain labels"] == (
        "pleural effusion ignore, pneumothorax multiclass"
    )
    tuned, test = load_fine_tuned(out), load_scores(out / "scores.npz")
    dataset = open_dataset([folder], tuned.image_size)
    at = {s.image_id: i for i, s in enumerate(dataset.samples)}
    pixels = dataset.pixels(np.array([at[name] for name in test.image_id]))
    with torch.no_grad():
        again = tuned.probabilities(tuned.encode(normalise(pixels)))
    assert again.shape == test.scores.shape == (len(pixels), 2)
    np.testing.assert_allclose(again, test.scores, atol=1e-5)
    if method == "full":
        head = tuned.model.head.weight
        assert head.shape[0] == 3 and (head.abs().sum(1) > 0).all()  # its third class has learnt


class Killed(BaseException):
    pass


def full(task: Task, run: Path, *overrides: str, metadata: str = "a"):
    model = Classifier(small_encoder("resnet"), len(ASKED))
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_classifier(
        Accelerator(cpu=True), model, task.train, task.val, short(*overrides, "lr_decay=0.5"),
        0, run, {"run": metadata},
    )  # fmt: skip


@pytest.mark.parametrize("n_written", [1, 2])  # the probe alone, or a step of training too
def test_a_killed_run_goes_on_to_the_same_weights_and_validations(
    n_written: int, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = full(task, tmp_path / "whole")
    write, written = supervised.write_checkpoint, []

    def dies(*args, **kwargs):
        if len(written) == n_written:
            raise Killed
        written.append(write(*args, **kwargs))
        return written[-1]

    monkeypatch.setattr(supervised, "write_checkpoint", dies)
    with pytest.raises(Killed):
        full(task, tmp_path / "cut")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unfinished run of other weights"):
        full(task, tmp_path / "cut", metadata="b")
    resumed = full(task, tmp_path / "cut")
    assert resumed.history == whole.history and [s for s, _ in whole.history] == [0, 2, 4, 6]
    assert resumed.step == whole.step
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = full(task, tmp_path / "cut")  # finished: nothing is trained
    assert again.history == whole.history
    lines = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((tmp_path / "whole/metrics.jsonl").read_text().splitlines())


def test_the_head_starts_from_the_linear_probe_of_the_same_images(task: Task, tmp_path: Path):
    labels = task.train.labels.copy()
    labels[::5, 0], labels[1::5, 1] = np.nan, -1.0  # unknown, and uncertain as a class of its own
    train, encoder = replace(task.train, labels=labels), small_encoder("vit")
    still = ("train.base_lr=1e-30", "train.steps=1", "train.save_every_steps=1")

    def scores(folder: str, *overrides: str) -> np.ndarray:
        AcceleratorState._reset_state(reset_partial_state=True)
        trained = train_classifier(
            Accelerator(cpu=True), Classifier(copy.deepcopy(encoder), len(ASKED), [1]), train,
            task.val, short(*still, *overrides), 0, tmp_path / folder, {"run": folder},
        )  # fmt: skip
        return predict(trained.model, task.val.dataset, CPU)

    with torch.no_grad():
        known, asked = (
            encoder.eval()(normalise(part.dataset.pixels(np.arange(len(part))))).double().numpy()
            for part in (train, task.val)
        )
    probe = fit_logistic(known, labels, asked, task.val.labels).scores(asked)
    odds = probe / (1 - probe) * positive_weights(labels, 10.0)  # as the loss weighs the present
    np.testing.assert_allclose(scores("probe"), odds / (1 + odds), atol=1e-4)
    assert np.abs(probe - 0.5).max() > 0.05
    assert (scores("zeros", "head=zeros") == 0.5).all()


def test_patience_ends_training_and_the_best_step_is_what_scores(task: Task, tmp_path: Path):
    trained = full(
        task, tmp_path, "head=zeros", "train.base_lr=1e-30", "patience=1", "train.steps=100"
    )
    assert [step for step, _ in trained.history] == [2, 4]
    assert trained.step == 2
    reached = macro_auroc(task.val.labels, predict(trained.model, task.val.dataset, CPU))
    assert reached == trained.val_auroc


def test_training_that_harms_leaves_the_probe(task: Task, tmp_path: Path):
    trained = full(
        task, tmp_path, "train.base_lr=1e4", "train.warmup_ratio=0", "train.clip_norm=1e9"
    )
    assert trained.step == 0 and [step for step, _ in trained.history] == [0, 2, 4, 6]
    assert trained.val_auroc == max(value for _, value in trained.history)


def test_random_weights_start_from_zeros_at_one_rate():
    random = short("lr_decay=0.5").of_random_weights()
    assert (random.head, random.lr_decay) == ("zeros", 1.0)
    assert (short().head, short().of_random_weights().train) == ("probe", short().train)


def test_few_images_are_learnt_by_heart(task: Task, tmp_path: Path):
    few = replace(task, train=task.train.select(np.arange(len(task.train)) < 8))
    few = replace(few, val=few.train)
    options = ("train.steps=60", "train.save_every_steps=60", "augment.rotation_deg=0")
    trained = full(few, tmp_path, *options)
    assert trained.val_auroc > 0.95


def test_finished_runs_are_skipped_and_others_are_not_written_over(
    finetune_request: FinetuneRequest, task: Task
):
    assert finetune_request.run is not None
    summary = json.loads(finetune(finetune_request).read_text())
    folder = finetune_request.out / "probe-100-0"
    written = (folder / "results.json").stat().st_mtime_ns
    scores = load_scores(folder / "scores.npz")
    assert scores.image_id.tolist() == [f.image_id for f in task.test.dataset.samples]
    assert scores.names() == list(ASKED)
    with np.load(folder / "scores.npz") as stored:
        assert len(stored["val_scores"]) == len(task.val)
    found = read_results(folder)
    assert found.kind == "finetune" and found.controls["shortcut baseline"].macro_auroc is not None
    said = json.loads((finetune_request.run / SEEN_FILE).read_text())
    for row in found.findings:  # as the run of pre-training says, and not this one
        assert row.seen != "none" and row.finding in said[row.seen]
    card = (folder / "MODEL_CARD.md").read_text("utf-8")
    assert "seen in pre-training as" in card and "no score here is zero-shot" in card
    (line,) = summary["lines"]
    assert line["mean"] == line["macro_auroc"]["0"] == found.macro_auroc
    assert line["interval"][0] <= line["mean"] <= line["interval"][1]
    finetune(finetune_request)
    assert (folder / "results.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="other weights, images or settings"):
        finetune(replace(finetune_request, config=short("features=embedding")))
    assert (finetune_request.out / SUMMARY_FILE).is_file()


PROTOCOL = """\
id = "few"
version = 1
title = "Few images"
description = "For a test."
readers = ["unknown"]
splits = ["built"]
findings = ["pneumothorax", "pleural effusion"]

[finetune]
fractions = [0.1]
seeds = [0, 1]
uncertain = "positive"
"""


def test_a_protocol_gives_findings_fractions_and_seeds_and_seeds_are_averaged(
    finetune_request: FinetuneRequest, made_data: Path, tmp_path: Path
):
    path = tmp_path / "few.toml"
    path.write_text(PROTOCOL, "utf-8")
    finetune_request = replace(
        finetune_request, findings=(), protocol=str(path), fractions=(), seeds=(), init="random"
    )
    (line,) = json.loads(finetune(finetune_request).read_text())["lines"]
    found = {seed: read_results(finetune_request.out / f"probe-10-{seed}") for seed in (0, 1)}
    assert line["mean"] == pytest.approx(
        np.mean([line["macro_auroc"][str(seed)] for seed in found])
    )
    assert [one.protocol.id for one in found.values() if one.protocol] == ["few", "few"]
    built = [sample for sample in open_dataset([made_data]).samples if sample.split == "train"]
    for seed, one in found.items():
        assert one.facts["training images"] == subsets_of(built, seed)["10"]["n_images"]
        assert {row.seen for row in one.findings} == {"none"}  # random weights
        assert one.provenance.seed == one.provenance.train_seed == seed
        assert line["macro_auroc"][str(seed)] == one.macro_auroc
    assert found[0].macro_auroc != found[1].macro_auroc
    first, second = (one.provenance.recipe_hash for one in found.values())
    assert first == second is not None  # random weights of either seed are of one recipe
    low, high = line["interval"]
    assert low <= line["mean"] <= high


def test_the_recipe_of_fine_tuning_holds_the_weights_that_it_starts_from(
    finetune_request: FinetuneRequest, task: Task
):
    run, random = (
        start_of(init, finetune_request.run, finetune_request.folder) for init in ("run", "random")
    )
    recipes = [
        recipe_of(finetune_request, run, task, "weights", 0.1),
        recipe_of(finetune_request, run, task, "of another seed of pre-training", 0.1),
        recipe_of(finetune_request, run, task, "weights", 1.0),
        recipe_of(replace(finetune_request, method="full"), run, task, "weights", 0.1),
        recipe_of(replace(finetune_request, config=short("patience=3")), run, task, "weights", 0.1),
        recipe_of(finetune_request, random, task, "weights", 0.1),
    ]
    assert len(set(recipes)) == len(recipes)
    assert recipe_of(finetune_request, random, task, "of another seed", 0.1) == recipes[-1]


def test_images_that_trained_the_run_are_not_scored(finetune_request: FinetuneRequest, task: Task):
    assert finetune_request.run is not None
    trained_on(finetune_request.run, task.val.dataset.samples[:1])
    with pytest.raises(ManifestError, match="trained on 1 of these"):
        finetune(finetune_request)


def test_a_patient_in_train_and_test_is_refused(
    made_data: Path, task: Task, monkeypatch: pytest.MonkeyPatch
):
    def leaking(folders: list[Path], image_size: int | None, resize: str) -> ImageTextDataset:
        dataset = open_dataset(folders, image_size)
        test = next(f for f in dataset.samples if f.split == "test")
        shared = (
            replace(f, patient_id=test.patient_id) if f.split == "train" else f
            for f in dataset.samples
        )
        return replace(dataset, samples=tuple(shared))

    monkeypatch.setattr(tasks, "open_dataset", leaking)
    with pytest.raises(ManifestError, match="what trains would be scored"):
        open_task(made_data, task.protocol, IMAGE_SIZE)


def test_a_split_without_validation_images_is_refused_with_the_command_that_draws_some(
    made_data: Path, task: Task, monkeypatch: pytest.MonkeyPatch
):
    def without(folders: list[Path], image_size: int | None, resize: str) -> ImageTextDataset:
        dataset = open_dataset(folders, image_size)
        return dataset.select([sample.split != "val" for sample in dataset.samples])

    monkeypatch.setattr(tasks, "open_dataset", without)
    with pytest.raises(ManifestError, match=r"no validation images.*--name official"):
        open_task(made_data, task.protocol, IMAGE_SIZE)


def test_random_weights_have_the_architecture_of_the_run_and_follow_the_seed(
    finetune_request: FinetuneRequest,
):
    start = start_of("random", finetune_request.run, finetune_request.folder)
    run = load_checkpoint(find_checkpoint(start.run.folder)).model  # pyright: ignore
    one, same, other = (start.encoder(seed).encoder.state_dict() for seed in (1, 1, 2))
    trained = run.vision_model.state_dict()
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in trained.items()}
    name = next(n for n in one if n.endswith("convolution.weight"))
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name]) and not torch.equal(one[name], trained[name])


def test_a_vit_of_the_hub_is_fine_tuned_as_ours_is(
    finetune_request: FinetuneRequest, task: Task, tmp_path: Path
):
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    config = ViTMAEConfig(**sizes, decoder_hidden_size=16, decoder_num_hidden_layers=1)
    ViTMAEModel(config).save_pretrained(tmp_path / "mae")
    for name in ("vit", "mae"):
        start = start_of(f"hf:{tmp_path / name}", None, finetune_request.folder)
        assert start.features == "class" and start.image_size == IMAGE_SIZE
        encoder = start.encoder(0)
        image = torch.randn(2, 1, IMAGE_SIZE, IMAGE_SIZE)
        # MAE deals its patches anew at each reading: equal but for the order of sums.
        assert torch.allclose(encoder(image), encoder(image), atol=1e-5)
        model = Classifier(encoder, len(ASKED))
        trained = train_classifier(
            Accelerator(cpu=True), model, task.train, task.val, short("train.steps=2"), 0,
            tmp_path / f"{name}-run", {"run": name},
        )  # fmt: skip
        assert trained.step == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init": "hf:"}, "none of run, random, hf:FOLDER_OR_NAME"),
        ({"run": None}, "--init run needs --model"),
        ({"findings": ()}, "name a --protocol, or the findings to learn by --finding"),
        ({"findings": ("gout",)}, "is labelled with gout"),
        ({"findings": (), "protocol": "montgomery"}, "for zero-shot alone; those with fine-tuning"),
        (
            {"method": "full", "config": FineTuneConfig(features="embedding")},
            "take pooled or class",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_line(
    finetune_request: FinetuneRequest, changes: dict, said: str
):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        finetune(replace(finetune_request, **changes))


@pytest.fixture(scope="module")
def words(made_data: Path, made_run: Path) -> list[str]:
    """A command of full fine-tuning, without --out."""
    given = ["finetune", "--model", made_run, "--data", made_data, "--finding", "pneumothorax"]
    given += ["--method", "full", "--fraction", "1", "--seed", "3", "--n-resamples", "20", "--cpu"]
    return [str(word) for word in given] + [w for key in SHORT for w in ("--set", key)]


@pytest.fixture(scope="module")
def by_command(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """What the command left in its --out, and what it said."""
    folder = tmp_path_factory.mktemp("finetuned")
    return folder / "out", mmclip(folder, *words, "--out", folder / "out")


def test_the_command_prints_a_table_and_the_path_of_the_summary(
    by_command: tuple[Path, Ended], words: list[str], tmp_path: Path
):
    out, ended = by_command
    assert ended.code == 0, ended.err
    assert ended.out == f"{out / SUMMARY_FILE}\n"
    assert "3: 0." in ended.err and "95 %: over test patients and seeds" in ended.err
    assert len(list((out / "full-100-3/checkpoints").iterdir())) == 1
    assert json.loads((out / SUMMARY_FILE).read_text())["lines"][0]["method"] == "full"
    bad = mmclip(tmp_path, *words, "--out", tmp_path / "other", "--set", "train.seed=4")
    assert "a run's seed is that of its subset: --seed" in bad.error()


def test_two_processes_learn_what_one_does(
    by_command: tuple[Path, Ended], words: list[str], tmp_path: Path
):
    first, second = mmclip_in_two_processes(tmp_path, *words, "--out", tmp_path / "out")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out + second.out == f"{tmp_path / 'out' / SUMMARY_FILE}\n"
    ours, theirs = (
        [json.loads(line)["loss"] for line in (o / "full-100-3/metrics.jsonl").open()]
        for o in (tmp_path / "out", by_command[0])
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
    one, two = (read_results(o / "full-100-3") for o in (tmp_path / "out", by_command[0]))
    assert one.facts["step"] == two.facts["step"]
    assert one.macro_auroc == pytest.approx(two.macro_auroc, abs=1e-2)
