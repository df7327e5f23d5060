import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SiglipModel

from mmclip.losses import (
    contrastive_sum,
    contrastive_sum_in_blocks,
    label_class_sum,
    label_sum,
    local_logits,
    local_sum,
    masked_token_sum,
    masked_token_sum_in_blocks,
    positive_pairs,
    sigmoid_sum,
    softmax_sum,
)
from tests.oracles import contrastive_sum_loop, local_logit_loop, positive_pairs_loop
from tests.towers import TEXT_ROWS


def unit(n: int, e: int, seed: int) -> torch.Tensor:
    rows = torch.randn(n, e, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=-1)


def all_candidates(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bool)


@pytest.mark.ledger("contrastive term")
def test_two_orthogonal_pairs_by_hand():
    e = torch.eye(2)
    loss = contrastive_sum(
        e, e, torch.eye(2, dtype=torch.bool), all_candidates(2), torch.tensor(1.0)
    )
    assert loss.item() == pytest.approx(2 * (math.log(math.e + 1) - 1), rel=1e-6)


@pytest.mark.ledger("contrastive term")
def test_collapsed_embeddings_score_chance():
    e = F.normalize(torch.ones(4, 8), dim=1)
    loss = contrastive_sum(
        e, e, torch.eye(4, dtype=torch.bool), all_candidates(4), torch.tensor(14.0)
    )
    assert loss.item() / 4 == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.ledger("contrastive term")
def test_one_positive_a_row_is_the_cross_entropy_of_clip():
    image, text, scale = unit(6, 8, 0), unit(6, 8, 1), torch.tensor(10.0)
    eye = torch.eye(6, dtype=torch.bool)
    ours = (
        contrastive_sum(image, text, eye, all_candidates(6), scale)
        + contrastive_sum(text, image, eye, all_candidates(6), scale)
    ) / 12
    logits = scale * image @ text.T
    theirs = (
        F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))
    ) / 2
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.ledger("contrastive term")
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10_000))
def test_loss_equals_the_slow_loop(n_query: int, n_candidates: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    query, candidates = unit(n_query, 5, seed), unit(n_candidates, 5, seed + 1)
    is_positive = torch.rand(n_query, n_candidates, generator=generator) < 0.4
    is_candidate = torch.rand(n_candidates, generator=generator) < 0.7
    is_candidate[0] = True
    ours = contrastive_sum(query, candidates, is_positive, is_candidate, torch.tensor(7.0))
    slow = contrastive_sum_loop(query, candidates, is_positive, is_candidate, 7.0)
    assert ours.item() == pytest.approx(slow, rel=1e-4, abs=1e-5)


@pytest.mark.ledger("equal texts")
def test_equal_texts_are_never_negatives():
    # Images 0 and 1 have the same report. The best embedding puts both on it: nothing is lost
    # against each other, which single-positive targets would punish without end.
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[0, 5], [1, 5], [2, 6]])
    is_positive = positive_pairs(keys, keys)
    scale = torch.tensor(50.0)
    loss = contrastive_sum(image, image, is_positive, all_candidates(3), scale)
    assert loss.item() == pytest.approx(2 * math.log(2), abs=1e-4)  # the even split of a shared 1
    single = contrastive_sum(image, image, torch.eye(3, dtype=torch.bool), all_candidates(3), scale)
    query = image.clone().requires_grad_()
    contrastive_sum(query, image, is_positive, all_candidates(3), scale).backward()
    assert query.grad is not None and query.grad.abs().max() < 1e-4
    assert single.item() == pytest.approx(loss.item(), abs=1e-4)


@pytest.mark.ledger("rows without a text")
def test_a_row_that_is_no_candidate_changes_nothing():
    image, text, scale = unit(4, 8, 0), unit(4, 8, 1), torch.tensor(9.0)
    eye = torch.eye(4, dtype=torch.bool)
    few = contrastive_sum(image[:3], text[:3], eye[:3, :3], all_candidates(3), scale)
    is_candidate = torch.tensor([True, True, True, False])
    all_rows = contrastive_sum(image, text, eye, is_candidate, scale)
    assert all_rows.item() == pytest.approx(few.item(), rel=1e-6)


def test_no_rows_give_zero_that_still_carries_a_gradient_path():
    text = unit(3, 8, 0).requires_grad_()
    loss = contrastive_sum(
        torch.zeros(0, 8),
        text,
        torch.zeros(0, 3, dtype=torch.bool),
        all_candidates(3),
        torch.tensor(5.0),
    )
    loss.backward()
    assert loss.item() == 0 and text.grad is not None and not text.grad.any()


@pytest.mark.ledger("equal texts")
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=1, max_size=6))
def test_positives_equal_the_slow_loop_and_are_symmetric(rows: list[tuple[int, int]]):
    keys = torch.tensor(rows)
    ours = positive_pairs(keys, keys)
    assert torch.equal(ours, positive_pairs_loop(keys, keys))
    assert torch.equal(ours, ours.T)


@pytest.mark.ledger("label sets")
def test_a_negative_key_is_no_key():
    keys = torch.tensor([[-1, 4], [-1, 5]])
    assert positive_pairs(keys, keys).tolist() == [[True, False], [False, True]]


def test_label_loss_of_two_images_by_hand():
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    labels = torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    by_hand = math.log(2) + math.log(1 + math.e) + math.log(2)
    assert label_sum(logits, labels).item() == pytest.approx(by_hand, rel=1e-6)


def test_an_unknown_label_adds_neither_loss_nor_gradient():
    logits = torch.tensor([[3.0, torch.inf, -2.0]]).requires_grad_()
    labels = torch.tensor([[torch.nan, torch.nan, 0.0]])
    label_sum(logits, labels).backward()
    assert logits.grad is not None and logits.grad[0, :2].tolist() == [0.0, 0.0]
    assert logits.grad[0, 2] > 0
    assert label_sum(logits, torch.full((1, 3), torch.nan)).item() == 0


def test_uncertain_as_a_class_of_its_own_by_hand():
    logits = torch.tensor([[1.0, 0.5], [1.0, 0.5], [1.0, 0.5], [1.0, 0.5]])
    uncertain = torch.full((4, 1), 2.0)
    labels = torch.tensor([[1.0, torch.nan], [0.0, torch.nan], [-1.0, 1.0], [torch.nan, 0.0]])
    weight = torch.tensor([3.0, 2.0])
    norm = math.log(1 + math.e + math.e**2)
    own = 3 * (norm - 1) + norm + (norm - 2)
    other = 2 * math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.5))
    found = label_class_sum(logits, uncertain, (0,), labels, weight)
    assert found.item() == pytest.approx(own + other, rel=1e-6)


def test_classes_of_uncertain_equal_torchs_cross_entropy_whatever_all_three_logits_move_by():
    three = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))  # absent, present, ...
    target = torch.tensor([0, 1, 2, 2, 1])
    moved = (three - three[:, :1]).requires_grad_()
    labels = torch.tensor([0.0, 1.0, -1.0])[target].unsqueeze(1)
    found = label_class_sum(moved[:, 1:2], moved[:, 2:], (0,), labels, torch.ones(1))
    assert found.item() == pytest.approx(
        torch.nn.functional.cross_entropy(three, target, reduction="sum").item(), rel=1e-6
    )
    found.backward()
    assert moved.grad is not None and moved.grad.isfinite().all() and (moved.grad[:, 1:] != 0).all()
    binary = label_class_sum(three[:, :1], three[:, :0], (), labels.abs(), torch.ones(1))
    assert binary.item() == pytest.approx(label_sum(three[:, :1], labels.abs()).item(), rel=1e-6)


def test_losses_in_blocks_are_those_at_once_with_their_gradients():
    generator = torch.Generator().manual_seed(0)
    query, others = (F.normalize(torch.randn(9, 4, generator=generator), dim=1) for _ in range(2))
    keys = torch.randint(-1, 4, (9, 2), generator=generator)
    keys[:, 0] = torch.arange(9)
    is_candidate = torch.tensor([True] * 7 + [False, True])
    found = []
    for rows in (2, 4, 9, 100):
        leaves = [x.clone().requires_grad_() for x in (query, others, torch.tensor(5.0))]
        loss = contrastive_sum_in_blocks(
            leaves[0], leaves[1], keys, keys, is_candidate, leaves[2], block_elements=9 * rows
        )
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    expected = contrastive_sum(
        query, others, positive_pairs(keys, keys), is_candidate, torch.tensor(5.0)
    )
    torch.testing.assert_close(found[-1][0], expected, rtol=0, atol=0)
    for some in found:
        for a, b in zip(some, found[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_logits_of_masked_tokens_in_blocks_are_those_at_once_with_their_gradients():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(n, 3, generator=generator) for n in (5, 0, 6)]
    targets = [torch.randint(0, 7, (n,), generator=generator) for n in (5, 0, 6)]
    found = []
    for tokens in (2, 11):
        layer = torch.nn.Linear(3, 7)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(21.0).view(7, 3) / 10)
            layer.bias.zero_()
        loss = masked_token_sum_in_blocks(features, targets, layer, block_tokens=tokens)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    logits = torch.cat(features) @ (torch.arange(21.0).view(7, 3) / 10).T
    torch.testing.assert_close(found[0][0], masked_token_sum(logits, torch.cat(targets)))


def test_two_orthogonal_pairs_by_hand_of_the_sigmoid():
    e = torch.eye(2)
    both = torch.tensor([3.0, -1.0])  # logits: 2 of the pairs, -1 of the others
    loss = sigmoid_sum(e, e, torch.eye(2, dtype=torch.bool), all_candidates(2), both)
    by_hand = 2 * math.log(1 + math.exp(-2)) + 2 * math.log(1 + math.exp(-1))
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


@torch.no_grad()
def test_the_sigmoid_loss_is_that_of_siglip(tmp_path: Path):
    TEXT_ROWS["siglip"].save(tmp_path)
    model = SiglipModel.from_pretrained(tmp_path).eval()
    model.logit_scale.fill_(math.log(7.0))
    model.logit_bias.fill_(-3.0)
    ids = torch.randint(3, 20, (5, 40), generator=torch.Generator().manual_seed(0))
    found = model(input_ids=ids, pixel_values=torch.randn(5, 3, 32, 32), return_loss=True)
    both, eye = torch.tensor([7.0, -3.0]), torch.eye(5, dtype=torch.bool)
    pair = found.image_embeds, found.text_embeds
    ours = sum(sigmoid_sum(a, b, eye, all_candidates(5), both) / 2 for a, b in (pair, pair[::-1]))
    assert float(ours) / 5 == pytest.approx(found.loss.item(), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 7))
def test_the_sigmoid_loss_is_its_slow_loop_whole_and_in_blocks(seed: int, a: int, b: int):
    generator = torch.Generator().manual_seed(seed)
    query, candidates = unit(a, 4, seed), unit(b, 4, seed + 1)
    keys, others = (torch.randint(-1, 3, (n, 2), generator=generator) for n in (a, b))
    is_candidate = torch.rand(b, generator=generator) < 0.7
    both = torch.tensor([9.0, -2.0])
    wanted = 0.0
    for i in range(a):
        positive = [
            bool(is_candidate[j])
            and any(x == y and x >= 0 for x, y in zip(keys[i], others[j], strict=True))
            for j in range(b)
        ]
        if any(positive):
            for j in range(b):
                if is_candidate[j]:
                    logit = 9.0 * float(query[i] @ candidates[j]) - 2.0
                    z = 1.0 if positive[j] else -1.0
                    wanted += math.log1p(math.exp(-z * logit))
    for n_rows in (1, 2, 100):
        found = contrastive_sum_in_blocks(
            query, candidates, keys, others, is_candidate, both, n_rows * b, sigmoid_sum
        )
        assert found.item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_sigmoid_gradients_in_blocks_are_those_of_the_whole():
    both = torch.tensor([9.0, -2.0], requires_grad=True)
    query, candidates = (unit(7, 4, seed).requires_grad_() for seed in (0, 1))
    keys = torch.arange(7)[:, None]
    grads = []
    for n_rows in (3, 7):
        loss = contrastive_sum_in_blocks(
            query, candidates, keys, keys, all_candidates(7), both, 7 * n_rows, sigmoid_sum
        )
        grads.append(torch.autograd.grad(loss, [query, candidates, both]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    assert grads[0][2].abs().min() > 0


@pytest.mark.parametrize(
    ("n", "elements", "rows"), [(6, 36, 6), (6, 35, 5), (12, 36, 3), (9, 4, 1)]
)
def test_a_block_of_logits_is_no_larger_however_many_rows_there_are(
    n: int, elements: int, rows: int
):
    seen = []

    def counted(query, *others):
        seen.append(len(query))
        return contrastive_sum(query, *others)

    both, keys = unit(n, 4, 0), torch.arange(n)[:, None]
    contrastive_sum_in_blocks(
        both, both, keys, keys, all_candidates(n), torch.tensor(5.0), elements, counted
    )
    assert max(seen) == rows and sum(seen) == n


def test_a_word_that_finds_its_patch_by_hand():
    e = torch.eye(2)
    # Text 0 names what patch 0 of image 0 shows; image 1 shows it nowhere.
    patches = torch.stack([e, torch.stack([e[1], e[1]])])
    words = torch.stack([e[0], e[1]])[:1, None] * 3  # lengths count for nothing
    found = local_logits(patches, words, torch.ones(1, 1, dtype=torch.bool), torch.tensor(2.0))
    a = math.exp(2) / (math.exp(2) + 1)  # the word's attention to patch 0: softmax of (2, 0)
    seen = a / math.hypot(a, 1 - a)  # cosine of a * e0 + (1 - a) * e1 with e0
    assert found[0, 0].item() == pytest.approx(2 * seen, rel=1e-6)
    assert found[1, 0].item() == pytest.approx(0, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(0, 3), st.integers(1, 4))
def test_local_logits_are_those_of_the_slow_loop(seed: int, b: int, m: int, k: int):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(b, 5, 4, generator=generator, dtype=torch.float32)
    words = torch.randn(m, k, 4, generator=generator)
    is_word = torch.rand(m, k, generator=generator) < 0.6
    scale = torch.tensor(6.0)
    found = local_logits(patches, words, is_word, scale)
    assert found.shape == (b, m)
    for i in range(b):
        for j in range(m):
            slow = local_logit_loop(patches[i], words[j][is_word[j]], 6.0)
            assert found[i, j].item() == pytest.approx(slow, abs=1e-4)


def test_local_logits_in_blocks_are_those_at_once_with_their_gradients():
    generator = torch.Generator().manual_seed(3)
    patches = torch.randn(4, 6, 8, generator=generator, requires_grad=True)
    words = torch.randn(7, 3, 8, generator=generator, requires_grad=True)
    is_word = torch.rand(7, 3, generator=generator) < 0.7
    is_word[2] = False  # a text that names nothing
    keys = torch.arange(4)[:, None]

    def run(block_elements: int) -> tuple[torch.Tensor, ...]:
        logits = local_logits(patches, words, is_word, torch.tensor(9.0), block_elements)
        loss = local_sum(logits[:, 3:], keys)
        return logits, loss, *torch.autograd.grad(loss, (patches, words))

    for found, expected in zip(run(150), run(10**6), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_local_logits_are_in_full_precision_under_autocast():
    generator = torch.Generator().manual_seed(4)
    patches, words = (torch.randn(3, 5, 16, generator=generator) for _ in range(2))
    is_word, scale = torch.ones(3, 5, dtype=torch.bool), torch.tensor(90.0)
    expected = local_logits(patches, words, is_word, scale)
    for block_elements in (1, 10**6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = local_logits(patches, words, is_word, scale, block_elements)
        torch.testing.assert_close(found, expected)


def test_the_mean_over_words_does_not_favour_a_text_that_says_it_twice():
    generator = torch.Generator().manual_seed(0)
    patches, words = torch.randn(2, 4, 8, generator=generator), torch.randn(1, 2, 8)
    once = local_logits(patches, words, torch.ones(1, 2, dtype=torch.bool), torch.tensor(5.0))
    twice = local_logits(
        patches, words.repeat(1, 2, 1), torch.ones(1, 4, dtype=torch.bool), torch.tensor(5.0)
    )
    torch.testing.assert_close(once, twice)


def test_the_local_loss_is_clips_loss_of_its_logits_where_each_row_has_one_positive():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    own = torch.arange(5)
    expected = (
        F.cross_entropy(logits, own, reduction="sum")
        + F.cross_entropy(logits.T, own, reduction="sum")
    ) / 2
    torch.testing.assert_close(local_sum(logits, own[:, None]), expected)
    assert softmax_sum(logits, torch.zeros(5, 5, dtype=torch.bool)) == 0
    nothing = local_sum(logits[:0, :0], own[:0, None])
    assert nothing == 0
