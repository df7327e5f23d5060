"""What the model and the objective make of a batch: the step of every arm."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from accelerate import Accelerator

from mmclip.batch import PROMPT, REPORT, Batch, TextBatch
from mmclip.config import ScoreKind, TrainConfig
from mmclip.config_io import ConfigError
from mmclip.losses import contrastive_sum, local_logits, local_sum, positive_pairs
from mmclip.masking import attended_score, blend_scores
from mmclip.models.mmclip import MMCLIP
from mmclip.models.outputs import Outputs
from mmclip.patches import PatchGrid
from mmclip.training.loop import fit
from mmclip.training.objective import Objective, contrastive_sums
from mmclip.training.optimizer import make_optimizer
from mmclip.training.state import TrainState
from mmclip.training.terms import Embeddings
from tests.made import (
    LABELS,
    N_PATCHES,
    PATCH_SIZE,
    WHOLE,
    MadeBatches,
    cut_batch,
    no_texts,
    small_config,
    small_model,
)

PIXELS = (*WHOLE, "image_mask.mask_stage='pixels'")
RANDOM = (*WHOLE, "image_mask.policy='random'")
MIXED = MadeBatches(8, without_report=(1, 5, 6, 7), with_prompt=(0, 1, 5, 6))
"""Row 0 has report and prompt, 2 to 4 a report, 1, 5 and 6 a prompt, 7 neither."""


def made(*overrides: str) -> tuple[MMCLIP, Objective]:
    config = small_config(*overrides)
    return small_model(config), Objective(config, PatchGrid(PATCH_SIZE))


def run(model: MMCLIP, objective: Objective, batch: Batch) -> Outputs:
    with torch.no_grad():
        return objective.outputs(model, batch)


@pytest.mark.ledger("loss weights")
@pytest.mark.parametrize(
    "overrides",
    [
        (), WHOLE, PIXELS, RANDOM, ("loss.text=1",), ("loss.contrastive=sigmoid",),
        ("loss.image=1",), (*WHOLE, "image_mask.score='decoder_attention'"),
        (*WHOLE, "image_mask.policy='oracle'"),
        (*WHOLE, "model.text_decoder.image_context='pooled'"), LABELS, (*WHOLE, *LABELS),
        ("loss.local=0.5",), (*WHOLE, "loss.local=0.5"),
    ],
)  # fmt: skip
def test_every_parameter_gets_a_gradient_in_every_arm(overrides: tuple[str, ...]):
    model, objective = made(*overrides)
    terms = objective.sums(model, MIXED.batch())
    assert terms.keys() == objective.weights.keys()
    torch.stack(list(terms.values())).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.ledger("loss weights")
def test_arms_have_the_terms_and_decoders_of_their_weights_and_no_more():
    assert made()[1].weights == {"contrastive": 1.0}
    assert made("loss.image=0.5", "loss.text=2")[1].weights == {
        "contrastive": 1.0, "image": 0.5, "text": 2.0,
    }  # fmt: skip
    model, _ = made("loss.text=1")
    assert model.image_decoder is None and model.text_decoder is not None
    assert made()[0].state_dict().keys() < model.state_dict().keys()


@pytest.mark.ledger("sums over elements")
@pytest.mark.parametrize("overrides", [WHOLE, PIXELS])
def test_masked_terms_of_a_mixed_batch_are_the_sums_of_its_parts(overrides: tuple[str, ...]):
    model, objective = made(*overrides)
    batch = MIXED.batch(3)
    with torch.no_grad():
        whole = objective.sums(model, batch)
        parts = [cut_batch(batch, slice(i, i + 1)) for i in range(len(batch))]
        sums = [objective.sums(model, part) for part in parts]
    for term in ("image", "text"):
        together = float(sum(s[term] for s in sums))
        assert float(whole[term]) == pytest.approx(together, rel=1e-4), term
        assert objective.counts(batch)[term] == sum(objective.counts(p)[term] for p in parts)


@pytest.mark.ledger("local loss")
def test_the_local_term_is_that_of_the_rows_whose_text_names_an_entity():
    model, objective = made("loss.local=1")
    batch = MIXED.batch(3)
    reports = replace(batch.reports, is_entity=batch.reports.is_entity.clone())
    reports.is_entity[1] = False  # row 2's report names nothing
    batch = replace(batch, reports=reports)
    assert batch.entity_rows.tolist() == [0, 1, 3, 4, 5, 6]  # row 7 has no text
    assert objective.counts(batch)["local"] == 6
    with torch.no_grad():
        out = objective.outputs(model, batch)
        image = model.encode_image(batch.image)
        patches = model.project_patches(image.features[:, 1:])
        expected = torch.zeros(len(batch), len(batch))
        for texts in batch.texts():  # one text at a time, all its words
            for i, row in enumerate(texts.rows.tolist()):
                read = model.encode_text(texts.ids[i : i + 1], texts.is_valid[i : i + 1])
                words = model.project_words(read.features)
                is_word = texts.chosen("entities")[i : i + 1]
                expected[:, row] = local_logits(patches, words, is_word, model.scale())[:, 0]
    rows = batch.entity_rows
    assert out.local_logits is not None
    torch.testing.assert_close(out.local_logits, expected[rows][:, rows], rtol=1e-4, atol=1e-5)
    term = float(objective.sums(model, batch)["local"].detach())
    assert term == pytest.approx(float(local_sum(expected[rows][:, rows], batch.keys[rows])), 1e-4)


def test_the_local_term_leaves_the_temperature_to_the_contrastive_term_and_may_have_no_rows():
    model, objective = made("loss.local=1")
    objective.sums(model, MIXED.batch())["local"].backward()
    assert model.logit_scale.grad is None and model.visual_projection.weight.grad is not None
    nothing = MIXED.batch()
    nothing = replace(nothing, reports=no_texts(), prompts=no_texts())
    terms = objective.sums(model, nothing)
    assert objective.counts(nothing)["local"] == 0 and float(terms["local"].detach()) == 0


def test_label_terms_of_a_mixed_batch_are_the_sums_of_its_parts():
    model, objective = made(*LABELS)
    batch = MIXED.batch(3)
    parts = [cut_batch(batch, slice(i, i + 1)) for i in range(len(batch))]
    with torch.no_grad():
        sums = [float(objective.sums(model, part)["label"]) for part in parts]
        assert float(objective.sums(model, batch)["label"]) == pytest.approx(sum(sums), rel=1e-4)
    counts = [objective.counts(part)["label"] for part in parts]
    assert counts == [0, 2, 0, 0, 0, 2, 2, 2]  # of three labels one is unknown; pairs have none
    assert [s > 0 for s in sums] == [c > 0 for c in counts]
    assert objective.counts(batch)["label"] == sum(counts)


def test_a_batch_without_unpaired_rows_uses_the_label_head_and_learns_nothing_of_it():
    model, objective = made(*LABELS)
    terms = objective.sums(model, MadeBatches(8).batch())
    assert float(terms["label"].detach()) == 0
    torch.stack(list(terms.values())).sum().backward()
    assert model.label_head is not None
    for parameter in model.label_head.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_the_label_loss_leaves_the_temperature_to_the_contrastive_term():
    model, objective = made(*LABELS)
    objective.sums(model, MIXED.batch())["label"].backward()
    assert model.logit_scale.grad is None and model.visual_projection.weight.grad is not None


def test_embeddings_do_not_depend_on_the_label_head():
    with_head, without = made(*LABELS)[0], made()[0]
    batch = MIXED.batch()
    assert with_head.label_head is not None and without.label_head is None
    with torch.no_grad():
        with_head.label_head.weight.mul_(100.0)
        a, b = with_head.encode_image(batch.image), without.encode_image(batch.image)
    assert torch.equal(a.embedding, b.embedding)


def test_labels_without_unpaired_images_or_beside_prompts_are_refused():
    with pytest.raises(ConfigError, match=r"unpaired\.rows_per_pair=0 reads none; give"):
        small_config("loss.label=1")
    with pytest.raises(ConfigError, match=r"control in which no label becomes a prompt"):
        small_config(*LABELS, "unpaired.prompt_pairs=true")


@pytest.mark.ledger("rows without a text")
def test_rows_without_a_text_add_nothing_to_terms_of_texts():
    model, objective = made(*WHOLE)
    batch = MIXED.batch()
    loud = replace(batch, image=batch.image.clone())
    loud.image[7] += 10.0  # has neither report nor prompt
    with torch.no_grad():
        a, b = objective.sums(model, batch), objective.sums(model, loud)
    assert float(a["contrastive"]) == pytest.approx(float(b["contrastive"]), rel=1e-6)
    assert float(a["text"]) == pytest.approx(float(b["text"]), rel=1e-6)
    assert float(a["image"]) != pytest.approx(float(b["image"]), rel=1e-4)


@pytest.mark.ledger("prompt beside a report")
def test_a_prompt_beside_a_report_is_no_text_of_its_row():
    model, objective = made(*WHOLE)
    batch = MIXED.batch(objective.config.train.steps - 1)
    alone = replace(batch, prompts=batch.texts()[1])
    a, b = run(model, objective, batch), run(model, objective, alone)
    torch.testing.assert_close(a.text_embedding, b.text_embedding)
    # It guides what is masked of its image, and of no other.
    assert a.relevance is not None and b.relevance is not None
    differs = ~torch.isclose(a.relevance, b.relevance, atol=1e-4).all(1)
    assert differs.tolist() == [True, *[False] * 7]


@pytest.mark.ledger("image encoder")
def test_embeddings_are_those_of_the_encoders_alone():
    model, objective = made(*WHOLE)
    batch = MIXED.batch()
    out = run(model, objective, batch)
    with torch.no_grad():
        torch.testing.assert_close(out.image_embedding, model.encode_image(batch.image).embedding)
        for texts in batch.texts():
            theirs = model.encode_text(texts.ids, texts.is_valid).embedding
            torch.testing.assert_close(out.text_embedding[texts.rows], theirs, atol=1e-5, rtol=1e-4)
    assert not out.text_embedding[7].any()


@pytest.mark.ledger("text encoder")
def test_equal_texts_are_encoded_once():
    model, objective = made(*WHOLE)
    batch = MIXED.batch()
    first = {name: x[:1].repeat_interleave(4, 0) for name, x in batch.reports.tensors().items()}
    same = TextBatch(**{**first, "rows": batch.reports.rows})
    rows = []
    model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    run(model, objective, replace(batch, reports=same, prompts=no_texts()))
    assert rows == [2]  # as it is and with masked words; no prompts cost no pass


@pytest.mark.parametrize(("has_reports", "has_prompts"), [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_a_kind_without_texts_costs_no_pass_and_every_parameter_has_its_gradient(
    has_reports: int, has_prompts: int
):
    # DistributedDataParallel waits for the gradient of each parameter, in each process.
    model, objective = made(*WHOLE)
    batch = MIXED.batch()
    reports = batch.reports if has_reports else no_texts()
    prompts = batch.prompts if has_prompts else no_texts()
    passes = []
    model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    batch = replace(batch, reports=reports, prompts=prompts)
    torch.stack(list(objective.sums(model, batch).values())).sum().backward()
    assert len(passes) == max(has_reports + has_prompts, 1)
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    embedded = model(batch, embeddings_only=True)
    torch.testing.assert_close(embedded.text_embedding, run(model, objective, batch).text_embedding)


def test_gradients_of_equal_texts_do_not_change_with_the_order_of_threads():
    # Their sum is over many rows of one text: with threads that add as they come, the last bits
    # differ from run to run.
    model, _ = made("loss.text=1")
    n, width = 240, 12
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(5, 50, (3, width), generator=generator)
    ids = few[torch.randint(0, 3, (n,), generator=generator)]
    is_valid = torch.ones_like(ids, dtype=torch.bool)
    is_masked = torch.zeros_like(is_valid)
    is_masked[:, 3] = True
    texts = TextBatch(torch.arange(n), ids, is_valid, is_valid, is_masked, ids)
    images = torch.randn(n, 1 + N_PATCHES, 32, generator=generator)
    weights = torch.randn(n, width, 24, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(10):
            model.zero_grad()
            (model.forward_text(texts, images).features * weights).sum().backward()
            grad = model.text_model.get_input_embeddings().weight.grad
            assert grad is not None
            found.append(grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, found[0]) for grad in found)


@pytest.mark.ledger("image encoder")
def test_the_image_passes_its_encoder_once_or_twice():
    for overrides, passes in ((WHOLE, 1), (PIXELS, 2)):
        model, objective = made(*overrides)
        calls = []
        model.vision_model.layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run(model, objective, MIXED.batch())
        assert len(calls) == passes


@pytest.mark.ledger("mask ratio")
def test_exactly_the_share_is_hidden_in_every_image():
    for ratio, n in ((0.5, 8), (0.25, 4), (0.8, 13)):
        model, objective = made(*WHOLE, f"image_mask.mask_ratio={ratio}")
        out = run(model, objective, MIXED.batch())
        assert out.is_masked is not None and out.is_masked.sum(1).tolist() == [n] * 8
        assert objective.counts(MIXED.batch())["image"] == 8 * n == 8 * round(ratio * N_PATCHES)


@pytest.mark.ledger("features or pixels")
def test_hidden_pixels_have_no_path_to_their_prediction_when_pixels_are_hidden():
    model, objective = made(*RANDOM, "image_mask.mask_stage='pixels'")
    batch = MIXED.batch()
    out = run(model, objective, batch)
    assert out.is_masked is not None and out.patches is not None
    masked = out.is_masked.view(8, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.randn(batch.image.shape, generator=torch.Generator().manual_seed(9))
    other = replace(batch, image=torch.where(masked, noise, batch.image))
    again = run(model, objective, other)
    torch.testing.assert_close(out.patches, again.patches)


@pytest.mark.ledger("features or pixels")
def test_hidden_features_have_seen_the_hidden_pixels_and_so_leak():
    # The paper's reading: the encoder has mixed masked pixels into the visible features.
    model, objective = made(*RANDOM)
    batch = MIXED.batch()
    batch.image.requires_grad_(True)
    out = objective.outputs(model, batch)
    out.patches[0][out.is_masked[0]].sum().backward()
    assert batch.image.grad is not None
    masked = out.is_masked[0].view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert batch.image.grad[0, 0][masked].abs().max() > 0


@pytest.mark.ledger("text decoder")
def test_hidden_words_have_no_path_to_their_prediction():
    model, objective = made(*WHOLE)
    batch = MIXED.batch()
    ids = torch.where(
        batch.reports.is_masked, (batch.reports.ids - 5 + 7) % 45 + 5, batch.reports.ids
    )
    reports = TextBatch(**{**batch.reports.tensors(), "ids": ids})
    other = replace(batch, reports=reports)
    a, b = run(model, objective, batch), run(model, objective, other)
    torch.testing.assert_close(a.masked_token_features, b.masked_token_features)
    assert not torch.allclose(a.text_embedding[2:5], b.text_embedding[2:5])  # unmasked there


@pytest.mark.ledger("text decoder")
def test_words_are_recovered_with_the_own_image():
    model, objective = made("loss.text=1")
    batch = MIXED.batch()
    turned = replace(batch, image=batch.image.roll(1, 0))
    a, b = run(model, objective, batch), run(model, objective, turned)
    assert a.masked_token_features is not None and b.masked_token_features is not None
    logits = [model.token_logits(out.masked_token_features) for out in (a, b)]
    assert (logits[0] != logits[1]).any(1).all()


@pytest.mark.ledger("annealing")
def test_the_choice_is_random_before_the_annealing_and_guided_after_it():
    model, objective = made(*WHOLE, "image_mask.final_mask_noise=0")
    batch = MIXED.batch()
    mask = objective.config.image_mask
    by_noise = batch.patch_noise.topk(8, 1).indices.sort(1).values
    with torch.no_grad():
        early = model(batch, mask, mask_noise=1.0)
        late = model(batch, mask, mask_noise=0.0)
    assert torch.equal(early.is_masked.nonzero()[:, 1].view(8, 8), by_noise)
    assert not early.relevance.any()  # it is not even computed
    by_relevance = late.relevance[:7].topk(8, 1).indices.sort(1).values
    assert torch.equal(late.is_masked[:7].nonzero()[:, 1].view(7, 8), by_relevance)
    assert torch.equal(late.is_masked[7].nonzero()[:, 0], by_noise[7])  # no text, no guide


@pytest.mark.ledger("annealing")
def test_annealing_follows_the_step():
    _, objective = made(
        *WHOLE, "train.steps=100", "image_mask.anneal_from=0.2", "image_mask.anneal_to=0.6",
        "image_mask.final_mask_noise=0.1",
    )  # fmt: skip
    mask_noise = [objective.mask_noise(step) for step in (0, 20, 40, 60, 99)]
    assert mask_noise == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])


@pytest.mark.ledger("controls")
def test_the_oracle_hides_the_lesion_first():
    model, objective = made(*WHOLE, "image_mask.policy='oracle'", "image_mask.final_mask_noise=0")
    batch = MIXED.batch()
    assert batch.lesion_ratio is not None
    out = run(model, objective, batch)
    masked = out.is_masked.nonzero()[:, 1].view(8, 8)
    assert torch.equal(masked, batch.lesion_ratio.topk(8, 1).indices.sort(1).values)


@pytest.mark.ledger("score tokens")
@pytest.mark.parametrize("score", get_args(ScoreKind))
@pytest.mark.parametrize("tokens", ["entities", "masked", "all"])
def test_every_score_guides_the_rows_that_have_a_text(score: str, tokens: str):
    model, objective = made(
        *WHOLE, f"image_mask.score='{score}'", f"image_mask.score_tokens='{tokens}'"
    )
    out = run(model, objective, MIXED.batch())
    assert out.relevance is not None and out.relevance.isfinite().all()
    assert out.relevance[:7].std(1).min() > 0 and not out.relevance[7].any()


@pytest.mark.ledger("score space")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_scores_read_patches_and_words_after_the_layers_that_the_contrastive_term_trains(kind: str):
    # By hand with a BERT's pooler and a new ViT's, which has no tanh; a ResNet has none to pass.
    score = ("image_mask.score=attended", "image_mask.score_tokens=all")
    model, objective = made("loss.image=1", *WHOLE[2:], f"model.image.kind={kind}", *score)
    model.eval()
    batch = MadeBatches(3).batch()
    with torch.no_grad():
        out = model(batch, objective.config.image_mask, mask_noise=0.0)
        image = model.encode_image(batch.image)
        text = model.forward_text(batch.reports, image.features)
        pooler = model.text_model.pooler
        words = model.text_projection(torch.tanh(pooler.dense(text.features)))
        patches = image.features[:, 1:]
        if kind == "vit":
            patches = model.vision_model.pooler.dense(patches)
        patches = model.visual_projection(patches)
    torch.testing.assert_close(
        torch.nn.functional.normalize(words[:, 0], dim=-1), text.embedding
    )  # as the text's own token does
    score = attended_score(patches, words, batch.reports.is_valid)
    one, none = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    wanted = blend_scores(score, torch.zeros_like(score), one, none)
    torch.testing.assert_close(out.relevance, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.ledger("prompts and reports apart")
@pytest.mark.parametrize("by_kind", [False, True])
def test_prompts_and_reports_share_a_softmax_or_have_one_each(by_kind: bool):
    _, objective = made(f"contrastive.by_kind={str(by_kind).lower()}")
    batch = MIXED.batch(2)
    is_report, is_prompt = batch.text_kinds == REPORT, batch.text_kinds == PROMPT
    assert is_report.nonzero()[:, 0].tolist() == [0, 2, 3, 4]
    assert is_prompt.nonzero()[:, 0].tolist() == [1, 5, 6]
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=-1)
        for _ in range(2)
    )
    embeddings = Embeddings(image, text, torch.tensor(9.0))
    groups = [is_report, is_prompt] if by_kind else [is_report | is_prompt]
    wanted = 0.0
    for here in groups:
        positive = positive_pairs(batch.keys[here], batch.keys[here])
        every = torch.ones(int(here.sum()), dtype=torch.bool)
        for a, b in ((image, text), (text, image)):
            wanted += 0.5 * float(
                contrastive_sum(a[here], b[here], positive, every, torch.tensor(9.0))
            )
    found = contrastive_sums(embeddings, batch, by_kind)
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    cached, _ = objective.contrast(embeddings, [batch], torch.tensor(1.0))
    assert float(cached) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.ledger("relevance score")
def test_an_untrained_score_without_its_decoder_is_refused():
    with pytest.raises(ConfigError, match=r"give loss\.text a weight or choose another score"):
        small_config(
            "loss.image=1",
            "image_mask.score='decoder_attention'",
            "image_mask.score_tokens='all'",
        )
    with pytest.raises(ConfigError, match=r"asks the masked words, and loss\.text=0 masks none"):
        small_config("loss.image=1", "image_mask.score='token_attention'")
    with pytest.raises(ConfigError, match="image_context='pooled' shows it none; choose"):
        small_config(
            *WHOLE,
            "image_mask.score='decoder_attention'",
            "model.text_decoder.image_context='pooled'",
        )
    assert small_config("loss.image=1", "image_mask.policy='random'").loss.image == 1


def test_patches_are_only_hidden_where_the_image_loss_is_trained():
    for overrides, hides in ((("loss.text=1",), False), (WHOLE, True)):
        model, objective = made(*overrides)
        assert (run(model, objective, MIXED.batch()).is_masked is not None) == hides


@pytest.mark.ledger("loss weights")
@pytest.mark.parametrize(
    "overrides",
    [pytest.param(WHOLE, id="whole"), pytest.param(PIXELS, id="pixels", marks=pytest.mark.slow)],
)
def test_the_whole_method_can_learn_one_batch_by_heart(overrides: tuple[str, ...], tmp_path):
    class OneBatch(MadeBatches):
        def batch(self, step=0, share=None):
            return super().batch(0, share)

    accelerator = Accelerator(cpu=True)
    train = TrainConfig(steps=80, batch_size=8, base_lr=0.2, log_every_steps=80)
    model, objective = made(
        *overrides, "image_mask.policy='random'", "model.image_decoder.width=64"
    )
    optimizer = make_optimizer(model, model.no_decay_names(), train)
    state = TrainState(*accelerator.prepare(model, optimizer))
    batches = OneBatch(8)
    fit(accelerator, state, batches.batch, objective, train, tmp_path, lambda s: None)
    assert state.log["contrastive"] == pytest.approx(math.log(2), abs=0.05)
    assert state.log["text"] < 0.1  # log 50 by chance
    assert state.log["image"] < 0.7  # 1 for predicting grey
