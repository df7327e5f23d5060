import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmclip.masking import (
    MaskPolicy,
    ScoreKind,
    add_cues,
    attended_score,
    attention_share_score,
    blend_scores,
    choose_masked_entities,
    choose_masked_patches,
    contribution_score,
    embedding_score,
    logsumexp_score,
    mask_noise_at,
    maskable_tokens,
    masked_patch_count,
    policy_score,
    random_tokens_instead,
    relevance_score,
    token_attention,
)
from tests.oracles import (
    add_cues_loop,
    masked_entities_loop,
    masked_patches_loop,
    relevance_score_loop,
)

KINDS: tuple[ScoreKind, ...] = get_args(ScoreKind)
POLICIES: tuple[MaskPolicy, ...] = get_args(MaskPolicy)
seeds = st.integers(0, 10_000)
quick = settings(deadline=None, max_examples=30)


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- relevance scores --


@pytest.mark.ledger("relevance score")
def test_contribution_score_by_hand():
    patches = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]]])
    score = contribution_score(patches, torch.tensor([[3.0, 1.0]]))
    assert score.tolist() == [[6.0, 5.0, 4.0]]


@pytest.mark.ledger("relevance score")
def test_embedding_score_by_hand():
    patches = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]]])
    score = embedding_score(patches, torch.tensor([[3.0, 0.0]]))
    torch.testing.assert_close(score, torch.tensor([[1.0, 0.0, math.sqrt(0.5)]]))


@pytest.mark.ledger("attention extraction")
def test_attended_and_logsumexp_scores_by_hand():
    # One token: A_i is that token, and the log-sum-exp is its scaled logit.
    patches = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    tokens, chosen = torch.tensor([[[0.0, 3.0]]]), torch.ones(1, 1, dtype=torch.bool)
    assert attended_score(patches, tokens, chosen).tolist() == [[0.0, 1.0]]
    score = logsumexp_score(patches, tokens, chosen)
    torch.testing.assert_close(score, torch.tensor([[0.0, 6 / math.sqrt(2)]]))


@pytest.mark.ledger("relevance score")
def test_attention_share_by_hand_counts_chosen_tokens_and_all_heads():
    attention = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]], [[0.1, 0.1], [0.0, 1.0]]]])  # 1 2 2 2
    chosen = torch.tensor([[True, False]])
    torch.testing.assert_close(attention_share_score(attention, chosen), torch.tensor([[0.3, 0.3]]))
    both = attention_share_score(attention, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(both, torch.tensor([[0.4, 0.4]]))


@pytest.mark.ledger("relevance score")
@quick
@given(st.sampled_from(KINDS), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), seeds)
def test_every_score_equals_the_slow_loop(kind: ScoreKind, b: int, n: int, t: int, seed: int):
    patches, embedding, tokens = made(seed, b, n, 4), made(seed + 1, b, 4), made(seed + 2, b, t, 4)
    is_chosen = uniform(seed + 3, b, t) < 0.6
    attention = made(seed + 4, b, 2, t, n).softmax(-1)
    fast = relevance_score(kind, patches, embedding, tokens, is_chosen, attention)
    slow = relevance_score_loop(kind, patches, embedding, tokens, is_chosen, attention)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.ledger("no gradient")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_stop_the_gradient_and_stay_in_float32_under_autocast(kind: ScoreKind):
    patches = made(0, 2, 5, 8).requires_grad_()
    embedding, tokens = made(1, 2, 8).requires_grad_(), made(2, 2, 3, 8).requires_grad_()
    is_chosen = torch.ones(2, 3, dtype=torch.bool)
    attention = made(3, 2, 1, 3, 5).softmax(-1).requires_grad_()
    inputs = (patches, embedding, tokens, is_chosen, attention)
    plain = relevance_score(kind, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = relevance_score(kind, *inputs)
    assert not plain.requires_grad and torch.equal(plain, mixed)
    halves = relevance_score(
        kind, patches.bfloat16(), embedding.bfloat16(), tokens.bfloat16(), is_chosen, attention
    )
    assert halves.dtype == torch.float32


@pytest.mark.ledger("score tokens")
@pytest.mark.parametrize("kind", ["attended", "logsumexp", "token_attention", "decoder_attention"])
def test_tokens_that_are_not_chosen_change_nothing_and_none_gives_no_order(kind: ScoreKind):
    patches, tokens = made(0, 2, 5, 8), made(1, 2, 4, 8)
    attention = made(2, 2, 3, 4, 5).softmax(-1)
    is_chosen = torch.tensor([[True, True, False, False], [False] * 4])
    score = relevance_score(kind, patches, made(3, 2, 8), tokens, is_chosen, attention)
    tokens[:, 2:], attention[:, :, 2:] = 99.0, 0.3
    again = relevance_score(kind, patches, made(4, 2, 8), tokens, is_chosen, attention)
    assert torch.equal(score, again)
    assert score[1].unique().tolist() == [0.0]


def test_token_attention_shares_out_each_token_over_the_patches():
    attention = token_attention(made(0, 2, 5, 8), made(1, 2, 3, 8))
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 1, 3))


def test_the_decoder_score_without_a_decoder_is_one_clear_error():
    with pytest.raises(ValueError, match="needs the attention of a text decoder"):
        relevance_score(
            "decoder_attention",
            made(0, 1, 2, 3),
            made(1, 1, 3),
            made(2, 1, 1, 3),
            torch.ones(1, 1, dtype=torch.bool),
        )


@pytest.mark.ledger("blending")
def test_blend_by_hand():
    report = torch.tensor([[0.0, 2.0]] * 4)
    prompt = torch.tensor([[300.0, 100.0], [300.0, 100.0], [100.0, 300.0], [100.0, 300.0]])
    has_report = torch.tensor([True, False, True, False])
    has_prompt = torch.tensor([False, True, True, False])
    blend = blend_scores(report, prompt, has_report, has_prompt)
    want = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(blend, want)


@pytest.mark.ledger("blending")
@quick
@given(st.floats(0.01, 100), st.floats(-10, 10), seeds)
def test_neither_scale_nor_offset_of_a_score_changes_the_blend(
    scale: float, offset: float, seed: int
):
    report, prompt, both = made(seed, 3, 6), made(seed + 1, 3, 6), torch.ones(3, dtype=torch.bool)
    blend = blend_scores(report, prompt, both, both)
    moved = blend_scores(scale * report + offset, prompt, both, both)
    torch.testing.assert_close(blend, moved, rtol=1e-2, atol=1e-2)


@pytest.mark.ledger("blending")
def test_what_a_missing_text_scores_never_reaches_the_blend():
    poison = torch.full((2, 4), torch.nan)
    neither = torch.tensor([False, False])
    assert blend_scores(poison, poison, neither, neither).tolist() == [[0.0] * 4] * 2
    prompt = made(0, 2, 4)
    blend = blend_scores(poison, prompt, neither, ~neither)
    assert torch.equal(blend.argsort(1), prompt.argsort(1))


# -- patches --


@pytest.mark.ledger("mask noise")
def test_masked_patches_by_hand():
    score, noise = torch.tensor([[5.0, 1.0, 900.0, 2.0]]), torch.tensor([[0.1, 0.9, 0.2, 0.3]])
    assert choose_masked_patches(score, noise, 0.5, 0.0).tolist() == [[True, False, True, False]]
    assert choose_masked_patches(score, noise, 0.5, 1.0).tolist() == [[False, True, False, True]]
    # Half and half: ranks 2/3, 0, 1, 1/3 plus the noise: .77, .9, 1.2, .63.
    assert choose_masked_patches(score, noise, 0.5, 0.5).tolist() == [[False, True, True, False]]


@pytest.mark.ledger("mask ratio")
@quick
@given(
    st.integers(1, 3), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.booleans(), seeds
)
def test_masked_patches_equal_the_slow_loop_and_are_exactly_the_share(
    b: int, n: int, ratio: float, mask_noise: float, with_ties: bool, seed: int
):
    score, noise = made(seed, b, n), uniform(seed + 1, b, n)
    score = score.round() if with_ties else score
    fast = choose_masked_patches(score, noise, ratio, mask_noise)
    assert torch.equal(fast, masked_patches_loop(score, noise, ratio, mask_noise))
    assert fast.sum(1).tolist() == [round(ratio * n)] * b == [masked_patch_count(n, ratio)] * b


@pytest.mark.ledger("mask noise")
@quick
@given(st.integers(1, 10), st.floats(0, 1), seeds)
def test_masked_patches_follow_a_permutation_and_no_rescaling(n: int, mask_noise: float, seed: int):
    score, noise = made(seed, 2, n).round(decimals=1), uniform(seed + 1, 2, n)
    masked = choose_masked_patches(score, noise, 0.5, mask_noise)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = choose_masked_patches(score[:, order], noise[:, order], 0.5, mask_noise)
    assert torch.equal(masked[:, order], moved)
    assert torch.equal(masked, choose_masked_patches(3 * score.exp(), noise, 0.5, mask_noise))


@pytest.mark.ledger("mask noise")
def test_a_row_masks_the_same_patches_in_every_batch():
    score, noise = made(0, 4, 9), uniform(1, 4, 9)
    together = choose_masked_patches(score, noise, 0.4, 0.3)
    apart = [choose_masked_patches(score[i : i + 1], noise[i : i + 1], 0.4, 0.3) for i in range(4)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.ledger("controls")
def test_each_policy_hides_what_it_names():
    relevance = torch.tensor([[0.1, 0.9, 0.5, 0.3]])
    lesion = torch.tensor([[0.0, 0.0, 0.2, 0.9]])
    noise = torch.tensor([[0.9, 0.1, 0.8, 0.2]])
    masked = {
        policy: choose_masked_patches(policy_score(policy, relevance, lesion), noise, 0.5, 0.0)
        .nonzero()[:, 1]
        .tolist()
        for policy in POLICIES
    }
    assert masked == {
        "attention": [1, 2],
        "random": [0, 2],
        "least_relevant": [0, 3],
        "oracle": [2, 3],
    }


@pytest.mark.ledger("controls")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask_noise", [0.0, 0.4, 1.0])
def test_an_image_that_no_text_guides_is_masked_by_noise_under_every_policy(
    policy: MaskPolicy, mask_noise: float
):
    noise, nothing = uniform(0, 2, 10), torch.zeros(2, 10)
    score = policy_score(policy, nothing, nothing)
    masked = choose_masked_patches(score, noise, 0.3, mask_noise)
    assert torch.equal(masked, choose_masked_patches(made(1, 2, 10), noise, 0.3, 1.0))


def test_the_oracle_without_lesion_masks_is_one_clear_error():
    with pytest.raises(ValueError, match="only synthetic images have"):
        policy_score("oracle", torch.zeros(1, 2))


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_a_ratio_that_is_none_is_refused(ratio: float):
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        masked_patch_count(10, ratio)


@pytest.mark.ledger("annealing")
def test_chance_gives_way_to_guidance_linearly():
    at = [mask_noise_at(p, 0.1, 0.5, 0.2) for p in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert at == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])
    assert [mask_noise_at(p, 0.0, 0.0, 0.2) for p in (0.0, 0.5)] == [0.2, 0.2]


# -- tokens --


def test_special_tokens_and_padding_are_not_maskable():
    ids = torch.tensor([[2, 7, 1, 8, 3, 0], [7] * 6])
    is_valid = torch.tensor([[True] * 5 + [False], [False] * 6])
    assert maskable_tokens(ids, is_valid, (1, 2, 3)).tolist() == [
        [False, True, False, True, False, False],
        [False] * 6,
    ]


@pytest.mark.ledger("all mentions")
def test_masked_entities_by_hand():
    # "[CLS] right effusion with nodule , effusion [SEP] [PAD]"
    groups = torch.tensor([[0, 1, 2, 0, 3, 0, 2, 0, 0]])
    is_maskable = torch.tensor([[False] + [True] * 6 + [False] * 2])
    group_noise = torch.tensor([[0.0, 0.8, 0.1, 0.5]])

    def hidden(ratio: float) -> list[int]:
        masked = choose_masked_entities(groups, is_maskable, group_noise, uniform(0, 1, 9), ratio)
        return masked.nonzero()[:, 1].tolist()

    assert hidden(0.01) == hidden(0.34) == [2, 6]
    assert hidden(0.6) == [2, 4, 6]
    assert hidden(1.0) == [1, 2, 4, 6]


@st.composite
def texts(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    b, t, g = draw(st.integers(1, 4)), draw(st.integers(1, 24)), draw(st.integers(1, 6))
    seed = draw(seeds)
    random = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, g, (b, t), generator=random) * (uniform(seed, b, t) < 0.5)
    is_maskable = uniform(seed + 1, b, t) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return groups, is_maskable, uniform(seed + 2, b, g), uniform(seed + 3, b, t)


@pytest.mark.ledger("text mask ratio", "no entities")
@settings(deadline=None, max_examples=60)
@given(texts(), st.floats(0.01, 1))
def test_masked_entities_equal_the_slow_loop(made_texts: tuple[torch.Tensor, ...], ratio: float):
    fast = choose_masked_entities(*made_texts, mask_ratio=ratio)
    assert torch.equal(fast, masked_entities_loop(*made_texts, mask_ratio=ratio))


@pytest.mark.ledger("whole entities")
@settings(deadline=None, max_examples=60)
@given(texts(), st.floats(0.01, 1))
def test_concepts_are_hidden_whole_and_nothing_else_with_them(
    made_texts: tuple[torch.Tensor, ...], ratio: float
):
    groups, is_maskable, _, _ = made_texts
    masked = choose_masked_entities(*made_texts, mask_ratio=ratio)
    assert not (masked & ~is_maskable).any()
    for row in range(len(groups)):
        words = is_maskable[row]
        concepts = set(groups[row][words].tolist()) - {0}
        hidden = set(groups[row][masked[row]].tolist())
        if concepts:
            assert 0 not in hidden
            assert len(hidden) == max(1, round(ratio * len(concepts)))
            for g in hidden:
                assert masked[row][words & (groups[row] == g)].all()
        else:
            n = int(words.sum())
            assert int(masked[row].sum()) == min(n, max(1, round(0.15 * n)))


@pytest.mark.ledger("random words")
@settings(deadline=None, max_examples=60)
@given(texts(), st.floats(0.01, 1))
def test_random_tokens_hide_as_many_and_never_special_ones(
    made_texts: tuple[torch.Tensor, ...], ratio: float
):
    _, is_maskable, _, token_noise = made_texts
    masked = choose_masked_entities(*made_texts, mask_ratio=ratio)
    random = random_tokens_instead(masked, is_maskable, token_noise)
    assert torch.equal(random.sum(1), masked.sum(1))
    assert not (random & ~is_maskable).any()
    chosen = token_noise.masked_fill(~random, -1).amax(1)
    left = token_noise.masked_fill(random | ~is_maskable, 2).amin(1)
    assert (chosen < left).all()


@pytest.mark.ledger("negated entities")
@settings(deadline=None, max_examples=60)
@given(texts(), seeds, st.sampled_from([0.0, 0.5, 1.0]))
def test_cues_equal_the_slow_loop(
    made_texts: tuple[torch.Tensor, ...], seed: int, mask_prob: float
):
    groups, is_maskable, group_noise, _ = made_texts
    masked = choose_masked_entities(*made_texts, mask_ratio=0.5)
    random = torch.Generator().manual_seed(seed)
    cues = torch.randint(0, group_noise.shape[1], groups.shape, generator=random)
    noise = uniform(seed, *group_noise.shape)
    fast = add_cues(masked, groups, cues, is_maskable, noise, mask_prob)
    slow = add_cues_loop(masked, groups, cues, is_maskable, noise, mask_prob)
    assert torch.equal(fast, slow)
    assert not (masked & ~fast).any() and not (fast & ~is_maskable).any()
    assert mask_prob > 0 or torch.equal(fast, masked)


@pytest.mark.ledger("negated entities")
def test_cues_by_hand():
    # "[CLS] no effusion . heart is not enlarged . without nodule [SEP]"
    groups = torch.tensor([[0, 0, 1, 0, 2, 2, 2, 2, 0, 0, 3, 0]])
    cues = torch.tensor([[0, 1, 0, 0, 0, 0, 2, 0, 0, 3, 0, 0]])
    is_maskable = torch.tensor([[False] + [True] * 10 + [False]])
    noise = torch.tensor([[0.0, 0.1, 0.1, 0.1]])

    def hidden(concept: int, prob: float) -> list[int]:
        masked = add_cues(groups == concept, groups, cues, is_maskable, noise, prob)
        return masked.nonzero()[:, 1].tolist()

    assert hidden(1, 0.5) == [1, 2]
    assert hidden(1, 0.05) == [2]
    assert hidden(2, 0.5) == [4, 5, 6, 7]
    assert hidden(3, 0.5) == [9, 10]


@pytest.mark.ledger("no entities")
def test_a_fallback_text_has_no_cue_to_hide():
    groups, cues = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)
    masked, every = uniform(0, 1, 8) < 0.5, torch.ones(1, 8, dtype=torch.bool)
    assert torch.equal(add_cues(masked, groups, cues, every, torch.zeros(1, 3), 1.0), masked)


@settings(deadline=None, max_examples=30)
@given(texts())
def test_token_masks_follow_a_permutation_and_stand_alone(made_texts: tuple[torch.Tensor, ...]):
    groups, is_maskable, group_noise, token_noise = made_texts
    masked = choose_masked_entities(groups, is_maskable, group_noise, token_noise, 0.5)
    order = torch.arange(groups.shape[1]).flip(0)
    moved = choose_masked_entities(
        groups[:, order], is_maskable[:, order], group_noise, token_noise[:, order], 0.5
    )
    assert torch.equal(moved, masked[:, order])
    alone = choose_masked_entities(*(x[-1:] for x in made_texts), mask_ratio=0.5)
    assert torch.equal(alone, masked[-1:])
    wider = torch.cat([group_noise, group_noise], 1)  # more draws than concepts
    again = choose_masked_entities(groups, is_maskable, wider, token_noise, 0.5)
    assert torch.equal(again, masked)


def test_a_concept_without_a_draw_is_one_clear_error():
    groups = torch.tensor([[1, 5]])
    with pytest.raises(ValueError, match=r"concept 5, .* up to 2; draw 6 numbers a row"):
        choose_masked_entities(
            groups, torch.ones(1, 2, dtype=torch.bool), uniform(0, 1, 3), uniform(1, 1, 2), 0.5
        )


@pytest.mark.ledger("text mask ratio")
def test_shares_are_rounded_as_python_rounds_them():
    # 0.15 * 190 is 28.5 and is rounded to 28; in single precision it is a little more.
    every = torch.ones(1, 190, dtype=torch.bool)
    none = torch.zeros(1, 190, dtype=torch.long)
    masked = choose_masked_entities(none, every, uniform(0, 1, 1), uniform(1, 1, 190), 0.5)
    assert int(masked.sum()) == round(0.15 * 190) == 28
