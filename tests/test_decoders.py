import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel

from mmclip.config import ImageContext
from mmclip.losses import masked_patch_sum, masked_token_sum
from mmclip.models.decoders import Attention, ImageDecoder, TextDecoder, grid_positions

GRID = (3, 4)


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_decoder(depth: int = 2) -> ImageDecoder:
    torch.manual_seed(0)
    return ImageDecoder(
        feature_width=10, text_width=6, width=16, depth=depth, heads=2, grid=GRID, patch_size=2
    )


def text_decoder(depth: int = 2, image_context: ImageContext = "patches") -> TextDecoder:
    torch.manual_seed(0)
    return TextDecoder(
        feature_width=6, image_width=10, width=16, depth=depth, heads=2, vocab_size=20, grid=GRID,
        image_context=image_context,
    )  # fmt: skip


def some_image(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return made(1, rows, 12, 10), made(2, rows, 12) > 0


def some_text(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    is_valid = torch.ones(rows, 5, dtype=torch.bool)
    is_valid[0, 3:] = False
    return made(3, rows, 5, 6), is_valid


# -- attention --


@pytest.mark.ledger("relevance score")
@pytest.mark.parametrize("seed", range(5))
def test_the_weights_are_those_that_the_fused_kernel_uses(seed: int):
    torch.manual_seed(seed)
    attention = Attention(width=8, heads=2, context_width=6)
    x, context = made(seed, 3, 4, 8), made(seed + 1, 3, 5, 6)
    is_valid = made(seed + 2, 3, 5) > 0
    is_valid[:, 0] = True
    out, weights = attention(x, context, is_valid, want_weights=True)
    assert weights is not None and weights.shape == (3, 2, 4, 5) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 4))
    assert not weights.masked_select(~is_valid[:, None, None]).any()
    value = attention.key_value(context)[..., 8:].view(3, 5, 2, 4).transpose(1, 2)
    by_hand = attention.out((weights @ value).transpose(1, 2).reshape(3, 4, 8))
    torch.testing.assert_close(out, by_hand)


def test_attention_by_hand():
    # Identity projections, one head: the softmax of 0 and log 3 mixes the two values 1 : 3.
    attention = Attention(width=1, heads=1, context_width=1)
    with torch.no_grad():
        attention.query.weight.fill_(1)
        attention.query.bias.zero_()
        attention.key_value.weight.fill_(1)
        attention.out.weight.fill_(1)
        attention.out.bias.zero_()
    context = torch.tensor([[[0.0], [math.log(3)]]])
    out, weights = attention(torch.ones(1, 1, 1), context, want_weights=True)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([[[[0.25, 0.75]]]]))
    assert out.item() == pytest.approx(0.75 * math.log(3), rel=1e-6)


def test_a_row_without_a_valid_token_gathers_nothing_and_spoils_no_other():
    attention = Attention(width=8, heads=2, context_width=6)
    x, context = made(0, 2, 4, 8), made(1, 2, 5, 6)
    is_valid = torch.tensor([[False] * 5, [True] * 5])
    out, weights = attention(x, context, is_valid, want_weights=True)
    assert weights is not None and not weights[0].any() and not out[0].any()
    alone, _ = attention(x[1:], context[1:], is_valid[1:])
    torch.testing.assert_close(out[1:], alone)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="decoder width 9 is not a multiple of its 2 heads"):
        Attention(width=9, heads=2, context_width=4)


# -- positions --


def test_positions_by_hand():
    angles = grid_positions((1, 2), 4)
    want = [[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, math.sin(1), math.cos(1)]]
    torch.testing.assert_close(angles, torch.tensor(want))


def test_one_half_of_a_position_says_the_row_and_the_other_the_column():
    row, column = grid_positions((2, 3), 16).view(2, 3, 16).split(8, -1)
    assert torch.equal(row, row[:, :1].expand_as(row)) and not torch.equal(row[0], row[1])
    assert torch.equal(column, column[:1].expand_as(column))
    assert torch.pdist(column[0]).min() > 0.1


def test_every_place_of_the_grid_has_its_own_position():
    positions = grid_positions((14, 14), 64)
    distance = torch.cdist(positions, positions) + 10 * torch.eye(196)
    assert distance.min() > 0.5


def test_a_width_that_cannot_hold_positions_is_refused():
    with pytest.raises(ValueError, match="not a multiple of 4"):
        grid_positions((2, 2), 6)


# -- the image decoder --


@pytest.mark.ledger("image decoder")
def test_no_prediction_of_pixels_depends_on_a_hidden_feature():
    decoder = image_decoder()
    features, is_masked = some_image()
    features.requires_grad_()
    pred = decoder(features, is_masked, *some_text())
    (gradient,) = torch.autograd.grad(pred[is_masked].square().sum(), features)
    assert not gradient[is_masked].any()
    assert gradient[~is_masked].any(-1).all()
    other = torch.where(is_masked[..., None], 1e6, features)
    assert torch.equal(decoder(other, is_masked, *some_text()), pred)


def test_hidden_patches_of_one_image_differ_by_their_place():
    everything = torch.ones(1, 12, dtype=torch.bool)
    pred = image_decoder()(made(0, 1, 12, 10), everything, *some_text(1))
    assert torch.pdist(pred[0]).min() > 1e-3


@pytest.mark.ledger("image decoder")
def test_the_text_reaches_every_predicted_patch_and_its_padding_none():
    decoder = image_decoder()
    features, is_masked = some_image()
    text, is_valid = some_text()
    pred = decoder(features, is_masked, text, is_valid)
    noise = torch.where(is_valid[..., None], text, 100.0)
    assert torch.equal(decoder(features, is_masked, noise, is_valid), pred)
    torch.testing.assert_close(
        decoder(features[:1], is_masked[:1], text[:1, :3], is_valid[:1, :3]), pred[:1]
    )
    other = decoder(features, is_masked, text.flip(0), is_valid.flip(0))
    assert ((other - pred).abs().amax(-1)[is_masked] > 1e-5).all()


@pytest.mark.ledger("image decoder")
def test_an_image_without_a_text_is_decoded_from_its_patches_alone():
    decoder = image_decoder()
    features, is_masked = some_image()
    text, is_valid = some_text()
    is_valid[1] = False
    pred = decoder(features, is_masked, text, is_valid)
    text[1] = made(9, 5, 6)
    assert torch.equal(decoder(features, is_masked, text, is_valid), pred)
    alone = decoder(features[1:], is_masked[1:], text[1:, :1], is_valid[1:, :1])
    torch.testing.assert_close(alone, pred[1:])


def test_rows_of_a_batch_are_decoded_apart():
    decoder = image_decoder()
    features, is_masked = some_image(3)
    text, is_valid = some_text(3)
    together = decoder(features, is_masked, text, is_valid)
    apart = [
        decoder(*(x[i : i + 1] for x in (features, is_masked, text, is_valid))) for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(apart))


def test_every_parameter_of_the_image_decoder_gets_a_gradient():
    decoder = image_decoder()
    features, is_masked = some_image()
    pred = decoder(features, is_masked, *some_text())
    masked_patch_sum(pred, made(5, 2, 12, 4), is_masked).backward()
    without = [n for n, p in decoder.named_parameters() if p.grad is None or p.grad.norm() < 1e-6]
    assert without == []


def test_without_texts_the_image_decoder_still_reaches_every_parameter_in_the_graph():
    # DistributedDataParallel waits for a gradient of each, be it zero.
    decoder = image_decoder()
    features, is_masked = some_image()
    text, is_valid = some_text()
    pred = decoder(features, is_masked, text, torch.zeros_like(is_valid))
    masked_patch_sum(pred, made(5, 2, 12, 4), is_masked).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_the_image_decoder_can_learn_one_batch_by_heart():
    decoder = image_decoder()
    features, is_masked = some_image()
    target = made(5, 2, 12, 4)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    loss = torch.tensor(math.inf)
    for _ in range(100):
        loss = masked_patch_sum(decoder(features, is_masked, *some_text()), target, is_masked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() / is_masked.sum().item() < 0.02


# -- the text decoder --


def word_embeddings() -> torch.Tensor:
    return made(7, 20, 6)


@pytest.mark.ledger("text decoder")
def test_logits_are_those_of_the_hidden_positions_in_reading_order():
    decoder = text_decoder()
    text, is_valid = some_text()
    every = decoder(
        text, is_valid, made(1, 2, 13, 10), torch.ones_like(is_valid), word_embeddings()
    )
    is_masked = torch.tensor([[False, True, False, False, False], [True, False, False, True, True]])
    logits = decoder(text, is_valid, made(1, 2, 13, 10), is_masked, word_embeddings())
    assert logits.shape == (4, 20)
    torch.testing.assert_close(logits, every.view(2, 5, 20)[is_masked])


def test_no_prediction_of_a_word_depends_on_what_was_hidden():
    # Through the text encoder as in training: the masked words are replaced before it reads.
    torch.manual_seed(0)
    encoder = BertModel(
        BertConfig(
            vocab_size=20, hidden_size=6, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    decoder, is_valid = text_decoder(), some_text()[1]
    words = made(8, 2, 5, 6).requires_grad_()
    is_masked = torch.tensor(
        [[False, True, False, False, False], [False, False, True, True, False]]
    )
    embedded = torch.where(is_masked[..., None], torch.ones(6), words)
    features = encoder(inputs_embeds=embedded, attention_mask=is_valid.long()).last_hidden_state
    logits = decoder(features, is_valid, made(1, 2, 13, 10), is_masked, word_embeddings())
    (gradient,) = torch.autograd.grad(logits.square().sum(), words)
    assert not gradient[is_masked].any()
    assert gradient[is_valid & ~is_masked].any(-1).all()
    assert not gradient[~is_valid].any()


def test_padding_of_the_report_changes_no_logit():
    decoder = text_decoder()
    text, is_valid = some_text()
    image, is_masked = made(1, 2, 13, 10), torch.zeros_like(is_valid)
    is_masked[:, 1] = True
    logits = decoder(text, is_valid, image, is_masked, word_embeddings())
    noise = torch.where(is_valid[..., None], text, 100.0)
    again = decoder(noise, is_valid, image, is_masked, word_embeddings())
    assert torch.equal(logits, again)
    short = decoder(text[:1, :3], is_valid[:1, :3], image[:1], is_masked[:1, :3], word_embeddings())
    torch.testing.assert_close(short, logits[:1])


@pytest.mark.ledger("text decoder")
def test_the_image_reaches_every_predicted_word():
    decoder = text_decoder()
    text, is_valid = some_text()
    is_masked = is_valid.clone()
    image = made(1, 2, 13, 10)
    logits = decoder(text, is_valid, image, is_masked, word_embeddings())
    other = decoder(text, is_valid, image.flip(0), is_masked, word_embeddings())
    assert ((logits - other).abs().amax(-1) > 1e-5).all()


@pytest.mark.ledger("text decoder")
@pytest.mark.parametrize("depth", [1, 2])
def test_the_text_decoder_knows_where_a_patch_is(depth: int):
    # A lesion on the right and the same on the left: the same features in another order.
    decoder = text_decoder(depth)
    text, is_valid = some_text()
    image = made(1, 2, 13, 10)
    mirrored = torch.cat([image[:, :1], image[:, 1:].unflatten(1, GRID).flip(2).flatten(1, 2)], 1)
    logits = decoder(text, is_valid, image, is_valid, word_embeddings())
    other = decoder(text, is_valid, mirrored, is_valid, word_embeddings())
    assert ((logits - other).abs().amax(-1) > 1e-4).all()


@pytest.mark.ledger("text decoder")
def test_the_text_decoder_sees_of_the_image_what_its_context_says():
    text, is_valid = some_text()
    image, words = made(1, 2, 13, 10), word_embeddings()
    shuffled = torch.cat([image[:, :1], image[:, 1:].flip(1)], 1)
    other_patches = torch.cat([image[:, :1], made(9, 2, 12, 10)], 1)
    other_first = torch.cat([made(9, 2, 1, 10), image[:, 1:]], 1)

    def moved(context: ImageContext, changed: torch.Tensor) -> bool:
        decoder = text_decoder(2, context)
        logits = [decoder(text, is_valid, x, is_valid, words) for x in (image, changed)]
        return not torch.allclose(*logits, atol=1e-5)

    seen = {
        context: [moved(context, x) for x in (shuffled, other_patches, other_first)]
        for context in get_args(ImageContext)
    }
    assert seen == {
        "patches": [True, True, True],
        "patches_unplaced": [False, True, True],
        "pooled": [False, False, True],
    }


@pytest.mark.parametrize("depth", [1, 3])
def test_attention_of_the_text_decoder_is_that_of_its_blocks_and_changes_no_result(depth: int):
    decoder = text_decoder(depth)
    text, is_valid = some_text()
    image = made(1, 2, 13, 10)
    everywhere = torch.ones_like(is_valid)
    plain, none = decoder.decode(text, is_valid, image, everywhere)
    x, attention = decoder.decode(text, is_valid, image, everywhere, want_attention=True)
    assert none is None and torch.equal(x, plain)
    assert attention is not None and attention.shape == (2, 2 * depth, 5, 13)
    assert not attention.requires_grad
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2 * depth, 5))


@pytest.mark.parametrize("depth", [1, 2])
def test_the_tokens_asked_for_get_what_they_get_when_all_are_asked(depth: int):
    decoder = text_decoder(depth)
    text, is_valid = some_text(3)
    image = made(1, 3, 13, 10)
    is_asked = torch.zeros_like(is_valid)
    is_asked[0, [1, 2]] = is_asked[2, 3] = True  # two, none, one
    x, attention = decoder.decode(text, is_valid, image, torch.ones_like(is_valid), True)
    part, of_part = decoder.decode(text, is_valid, image, is_asked, True)
    assert attention is not None and of_part is not None
    torch.testing.assert_close(part[is_asked], x[is_asked])
    assert not part[~is_asked].any()
    chosen = is_asked[:, None].expand(-1, attention.shape[1], -1)
    torch.testing.assert_close(of_part[chosen], attention[chosen])
    assert not of_part[:, -2:].masked_select(~is_asked[:, None, :, None]).any()  # of the last block


def test_hidden_patches_get_what_they_get_in_a_slow_decoder_of_all_patches():
    decoder = image_decoder()
    features, is_masked = some_image(3)
    is_masked[1] = False
    is_masked[1, 7] = True  # rows of unequal numbers
    text, is_valid = some_text(3)
    pred = decoder(features, is_masked, text, is_valid)
    x = torch.where(is_masked[..., None], decoder.mask_token, decoder.embed(features))
    x = x + decoder.positions
    for block in decoder.blocks:
        x, _ = block(x, None, text, is_valid)
    slow = decoder.head(decoder.norm(x))
    torch.testing.assert_close(pred[is_masked], slow[is_masked])
    assert not pred[~is_masked].any()


def test_every_parameter_of_the_text_decoder_gets_a_gradient():
    decoder = text_decoder()
    text, is_valid = some_text()
    logits = decoder(text, is_valid, made(1, 2, 13, 10), is_valid, word_embeddings())
    masked_token_sum(logits, torch.arange(len(logits))).backward()
    without = [n for n, p in decoder.named_parameters() if p.grad is None or p.grad.norm() < 1e-6]
    assert without == []


@pytest.mark.parametrize("rows", [0, 2])
def test_with_nothing_hidden_the_text_decoder_gives_no_logits_and_zero_gradients(
    rows: int, monkeypatch: pytest.MonkeyPatch
):
    fused = F.scaled_dot_product_attention

    def as_on_a_gpu(query: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return fused(query, *args, **kwargs) if len(query) else None  # torch 2.11, bf16, H200

    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_a_gpu)
    decoder = text_decoder()
    text, is_valid = some_text(2)
    text, is_valid, image = text[:rows], is_valid[:rows], made(1, 2, 13, 10)[:rows]
    logits = decoder(text, is_valid, image, torch.zeros_like(is_valid), word_embeddings())
    assert logits.shape == (0, 20)
    masked_token_sum(logits, torch.zeros(0, dtype=torch.long)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())


def test_the_gradient_reaches_both_encoders_and_the_shared_words():
    decoder = text_decoder()
    text, is_valid = some_text()
    inputs = [text.requires_grad_(), made(1, 2, 13, 10).requires_grad_(), word_embeddings()]
    inputs[2].requires_grad_()
    decoder(text, is_valid, inputs[1], is_valid, inputs[2]).square().sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in inputs)


def test_both_decoders_run_in_bf16_autocast_with_float32_attention():
    text, is_valid = some_text()
    features, is_masked = some_image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pred = image_decoder()(features, is_masked, text, is_valid)
        everywhere = torch.ones_like(is_valid)
        x, attention = text_decoder().decode(
            text, is_valid, made(1, 2, 13, 10), everywhere, want_attention=True
        )
    assert pred.isfinite().all() and x.isfinite().all()
    assert attention is not None and attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 5))
