import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, ViTMAEConfig, ViTMAEForPreTraining

from mmclip.losses import masked_patch_sum, masked_token_sum
from mmclip.patches import (
    gather_visible,
    lesion_ratio_of_patches,
    normalise_patches,
    patchify,
    rescale_patches,
    scatter_visible,
    unpatchify,
)
from tests.oracles import masked_patch_sum_loop, masked_token_sum_loop, patchify_loop

seeds = st.integers(0, 10_000)
quick = settings(deadline=None, max_examples=30)


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- patches --


def test_patchify_by_hand():
    image = torch.arange(8.0).view(1, 1, 2, 4)
    assert patchify(image, 2).tolist() == [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]


@quick
@given(st.integers(0, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), seeds)
def test_patchify_equals_the_slow_loop_and_comes_back(
    b: int, rows: int, columns: int, patch_size: int, seed: int
):
    image = made(seed, b, 1, rows * patch_size, columns * patch_size)
    patches = patchify(image, patch_size)
    if b:
        torch.testing.assert_close(patches, patchify_loop(image, patch_size))
    assert torch.equal(unpatchify(patches, columns * patch_size), image)


def test_an_image_that_patches_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="10x8 px cannot be cut into patches of 4 px"):
        patchify(torch.zeros(1, 1, 10, 8), 4)


def test_normalised_patches_have_mean_0_and_std_1_and_flat_ones_are_0():
    patches = 3 * made(0, 2, 5, 16) + 7
    patches[0, 0] = 2.0
    target = normalise_patches(patches)
    assert target[0, 0].tolist() == [0.0] * 16
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(target[1].std(-1), torch.ones(5))


def test_rescaled_patches_are_those_that_were_normalised():
    patches = 3 * made(0, 2, 5, 16) + 7
    patches[0, 0] = 2.0
    torch.testing.assert_close(rescale_patches(normalise_patches(patches), patches), patches)


def test_lesion_ratio_by_hand():
    lesion = torch.zeros(1, 1, 4, 4)
    lesion[..., 1:, 2:] = 1
    assert lesion_ratio_of_patches(lesion, 2).tolist() == [[0.0, 0.5, 0.0, 1.0]]


@quick
@given(st.integers(0, 3), st.integers(1, 6), st.data(), seeds)
def test_visible_features_keep_their_order_and_go_back_to_their_places(
    b: int, n: int, data: st.DataObject, seed: int
):
    n_masked = data.draw(st.integers(0, n))
    features = made(seed, b, n, 3)
    order = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)).argsort(1)
    is_masked = order < n_masked
    visible = gather_visible(features, is_masked, n_masked)
    if b:
        assert torch.equal(visible, features[~is_masked].view(b, n - n_masked, 3))
    placed = scatter_visible(visible, is_masked)
    assert torch.equal(placed, features.masked_fill(is_masked[..., None], 0.0))


def test_placing_passes_each_gradient_to_its_own_patch():
    visible = made(0, 1, 2, 3).requires_grad_()
    is_masked = torch.tensor([[True, False, True, False]])
    placed = scatter_visible(visible, is_masked)
    (placed * torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]).sum().backward()
    assert visible.grad is not None and visible.grad[0, :, 0].tolist() == [2.0, 4.0]


# -- the image term --


@pytest.mark.ledger("image target")
def test_masked_patch_sum_ignores_visible_patches():
    pred, target = torch.zeros(1, 2, 1), torch.tensor([[[3.0], [100.0]]])
    assert masked_patch_sum(pred, target, torch.tensor([[True, False]])).item() == 9.0


def test_masked_patch_sum_is_a_mean_over_values_and_a_sum_over_patches():
    pred, target = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    assert masked_patch_sum(pred, target, torch.tensor([[True, True]])).item() == 5.0 + 4.0


@quick
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), seeds)
def test_masked_patch_sum_equals_the_slow_loop(b: int, n: int, p: int, seed: int):
    pred, target, is_masked = made(seed, b, n, p), made(seed + 1, b, n, p), made(seed + 2, b, n) > 0
    slow = masked_patch_sum_loop(pred, target, is_masked)
    assert masked_patch_sum(pred, target, is_masked).item() == pytest.approx(slow, rel=1e-4)


@pytest.mark.ledger("image target")
def test_image_target_and_loss_equal_those_of_transformers_mae():
    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, num_channels=1, decoder_num_attention_heads=2,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_intermediate_size=32,
        mask_ratio=0.6, norm_pix_loss=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config).eval()
    image, noise = made(1, 3, 1, 32, 32), torch.rand(3, 16)
    with torch.no_grad():
        theirs = model(image, noise=noise)
    is_masked = theirs.mask.bool()
    ours = masked_patch_sum(theirs.logits, normalise_patches(patchify(image, 8)), is_masked)
    assert (ours / is_masked.sum()).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    torch.testing.assert_close(patchify(image, 8), model.patchify(image))
    torch.testing.assert_close(unpatchify(theirs.logits, 32), model.unpatchify(theirs.logits))


# -- the text term --


def test_masked_token_sum_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    loss = masked_token_sum(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(2) - math.log(3 / 4))


@quick
@given(st.integers(0, 5), st.integers(1, 6), seeds)
def test_masked_token_sum_equals_the_slow_loop(m: int, v: int, seed: int):
    logits = made(seed, m, v)
    targets = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(seed))
    slow = masked_token_sum_loop(logits, targets)
    assert masked_token_sum(logits, targets).item() == pytest.approx(slow, rel=1e-4, abs=1e-5)


@pytest.mark.ledger("text loss")
def test_text_loss_equals_that_of_transformers_masked_language_model():
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForMaskedLM(config).eval()
    ids = torch.randint(5, 40, (3, 9))
    is_masked = torch.rand(3, 9) < 0.4
    with torch.no_grad():
        theirs = model(ids.masked_fill(is_masked, 4), labels=ids.masked_fill(~is_masked, -100))
    ours = masked_token_sum(theirs.logits[is_masked], ids[is_masked])
    assert (ours / is_masked.sum()).item() == pytest.approx(theirs.loss.item(), rel=1e-5)


# -- both --


def test_nothing_hidden_costs_nothing_and_keeps_the_graph():
    pred, logits = made(0, 2, 3, 4).requires_grad_(), made(1, 0, 5).requires_grad_()
    image = masked_patch_sum(pred, made(2, 2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    text = masked_token_sum(logits, torch.zeros(0, dtype=torch.long))
    (image + text).backward()
    assert image.item() == 0 and text.item() == 0
    assert pred.grad is not None and not pred.grad.any()
    assert logits.grad is not None and logits.grad.shape == (0, 5)


@pytest.mark.ledger("sums over elements")
def test_sums_of_parts_add_up_to_the_sum_of_the_whole():
    pred, target, is_masked = made(0, 4, 3, 2), made(1, 4, 3, 2), made(2, 4, 3) > 0
    parts = [masked_patch_sum(pred[s], target[s], is_masked[s]) for s in (slice(1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), masked_patch_sum(pred, target, is_masked))
    logits, ids = made(3, 7, 5), torch.arange(7) % 5
    parts = [masked_token_sum(logits[s], ids[s]) for s in (slice(3), slice(3, 7))]
    torch.testing.assert_close(sum(parts), masked_token_sum(logits, ids))
