"""What is masked: patches by their relevance to a text, tokens by the concept they mention.

Pure functions. Every random choice comes in as uniform random numbers, so that a row's masks depend
on its image and epoch and not on the batch or the process. Nothing here passes a gradient.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmclip.config import MaskPolicy, ScoreKind

# -- how strongly each patch responds to a text --


@contextmanager
def _scoring(device: torch.device) -> Iterator[None]:
    # Ranks of nearly equal scores are decided by the last bits: no half precision here.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def contribution_score(
    patches: Float[Tensor, "b n e"], embedding: Float[Tensor, "b e"]
) -> Float[Tensor, "b n"]:
    """Dot product of each projected patch with the embedding of the text.

    Where the pooled feature is the mean of the patches', as a ResNet's, the mean of this score is
    the similarity of image and text, up to the image's length: a patch's score is its part in it.

    Source: class activation mapping (Zhou et al., arXiv:1512.04150), with a text in the place of a
        class.
    """
    with _scoring(patches.device):
        return (patches.float() @ embedding.float()[..., None])[..., 0]


def embedding_score(
    patches: Float[Tensor, "b n e"], embedding: Float[Tensor, "b e"]
) -> Float[Tensor, "b n"]:
    """Cosine of each projected patch with the embedding of the text."""
    with _scoring(patches.device):
        return F.cosine_similarity(patches.float(), embedding.float()[:, None], dim=-1)


def attended_score(
    patches: Float[Tensor, "b n e"],
    tokens: Float[Tensor, "b t e"],
    is_chosen: Bool[Tensor, "b t"],
) -> Float[Tensor, "b n"]:
    """Cosine of each projected patch with the tokens it attends to, A_i of the paper.

    A_i = softmax_t(<patch_i, token_t> / sqrt(e)) token_t, over the chosen tokens.

    Source: paper, attention extraction; the cosine is ours, as A_i is no scalar.
    """
    with _scoring(patches.device):
        patches, tokens = patches.float(), tokens.float()
        attended = _token_logits(patches, tokens, is_chosen).softmax(-1) @ tokens
        score = F.cosine_similarity(patches, attended, dim=-1)
        return score.masked_fill(~is_chosen.any(1, keepdim=True), 0.0)


def logsumexp_score(
    patches: Float[Tensor, "b n e"],
    tokens: Float[Tensor, "b t e"],
    is_chosen: Bool[Tensor, "b t"],
) -> Float[Tensor, "b n"]:
    """log sum_t exp(<patch_i, token_t> / sqrt(e)) over the chosen tokens: a soft maximum."""
    with _scoring(patches.device):
        score = _token_logits(patches.float(), tokens.float(), is_chosen).logsumexp(-1)
        return score.masked_fill(~is_chosen.any(1, keepdim=True), 0.0)


def token_attention(
    patches: Float[Tensor, "b n e"], tokens: Float[Tensor, "b t e"]
) -> Float[Tensor, "b 1 t n"]:
    """Attention of each token to the patches in the joint space, as one head.

    softmax_n(<token_t, patch_n> / sqrt(e)): the paper's matrix, normalised over the patches.
    """
    with _scoring(patches.device):
        logits = tokens.float() @ patches.float().mT / math.sqrt(patches.shape[-1])
        return logits.softmax(-1)[:, None]


def attention_share_score(
    attention: Float[Tensor, "b heads t n"], is_chosen: Bool[Tensor, "b t"]
) -> Float[Tensor, "b n"]:
    """Share of the text-to-image attention that falls on each patch, over heads and chosen tokens.

    Where attention also went to a class token, leave its column out and the rest as it is: a token
    that looks at the whole image then counts for little.
    """
    with _scoring(attention.device):
        over_heads = attention.float().mean(1)
        weight = is_chosen.float() / is_chosen.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bt,btn->bn", weight, over_heads)


def _token_logits(patches: Tensor, tokens: Tensor, is_chosen: Tensor) -> Tensor:
    logits = patches @ tokens.mT / math.sqrt(patches.shape[-1])
    return logits.masked_fill(~is_chosen[:, None], -torch.inf)


def relevance_score(
    kind: ScoreKind,
    patches: Float[Tensor, "b n e"],
    embedding: Float[Tensor, "b e"],
    tokens: Float[Tensor, "b t e"],
    is_chosen: Bool[Tensor, "b t"],
    attention: Float[Tensor, "b heads t n"] | None = None,
) -> Float[Tensor, "b n"]:
    """How strongly each patch responds to the text of its row, in float32 and without gradient.

    Only the order within a row is used. Rows without a chosen token have the same score everywhere,
    but for `config.WHOLE_TEXT_SCORES`, which read no tokens.

    Args:
        kind: The formula.
        patches: Image features in the joint space, without the class token.
        embedding: Of the text, in the joint space.
        tokens: Text features in the joint space.
        is_chosen: The tokens that count: all valid ones, or the entities only.
        attention: Of the text decoder to the patches, for kind "decoder_attention".

    Source: docs/method.md, row "relevance score"; the paper names no scalar.
    """
    match kind:
        case "contribution":
            return contribution_score(patches, embedding)
        case "embedding":
            return embedding_score(patches, embedding)
        case "attended":
            return attended_score(patches, tokens, is_chosen)
        case "logsumexp":
            return logsumexp_score(patches, tokens, is_chosen)
        case "token_attention":
            return attention_share_score(token_attention(patches, tokens), is_chosen)
        case "decoder_attention":
            if attention is None:
                raise ValueError(
                    'the score "decoder_attention" needs the attention of a text decoder; train '
                    "with one, or choose another score"
                )
            return attention_share_score(attention, is_chosen)


def blend_scores(
    report_score: Float[Tensor, "b n"],
    prompt_score: Float[Tensor, "b n"],
    has_report: Bool[Tensor, " b"],
    has_prompt: Bool[Tensor, " b"],
) -> Float[Tensor, "b n"]:
    """One score a patch from the relevance to the two texts, each scaled to mean 0, std 1 a row.

    The mean of both where a row has both, the one it has where it has one, 0 everywhere where it
    has none (then `choose_masked_patches` goes by noise alone). Standardised, not ranked: one
    patch that stands far out from the others keeps its lead in the blend.

    Source: ours; the paper does not say how its two attentions become one mask.
    """
    with _scoring(report_score.device):
        total = torch.zeros_like(report_score, dtype=torch.float32)
        for score, has in ((report_score, has_report), (prompt_score, has_prompt)):
            score = score.float()
            std, mean = torch.std_mean(score, 1, correction=0, keepdim=True)
            total += torch.where(has[:, None], (score - mean) / std.clamp(min=1e-12), 0.0)
        return total / (has_report.float() + has_prompt.float()).clamp(min=1)[:, None]


# -- which patches are masked --


def policy_score(
    policy: MaskPolicy,
    relevance: Float[Tensor, "b n"],
    lesion_ratio: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b n"]:
    """What a policy ranks the patches by; equal scores leave the choice to the noise.

    Args:
        policy: Which patches go first.
        relevance: As `blend_scores` gives it.
        lesion_ratio: As `patches.lesion_ratio_of_patches` gives it, for policy "oracle".

    Raises:
        ValueError: When the oracle has no lesion masks.
    """
    match policy:
        case "attention":
            return relevance
        case "random":
            return torch.zeros_like(relevance)
        case "least_relevant":
            return -relevance
        case "oracle":
            if lesion_ratio is None:
                raise ValueError(
                    'the mask policy "oracle" needs lesion masks, which only synthetic images '
                    "have; choose another policy for this data"
                )
            return lesion_ratio


def masked_patch_count(n_patches: int, mask_ratio: float) -> int:
    """Patches masked in every image: mask_ratio of them, rounded half to even.

    Raises:
        ValueError: When the ratio is not between 0 and 1.
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask_ratio={mask_ratio} is not between 0 and 1")
    return round(mask_ratio * n_patches)


def choose_masked_patches(
    score: Float[Tensor, "b n"],
    noise: Float[Tensor, "b n"],
    mask_ratio: float,
    mask_noise: float,
) -> Bool[Tensor, "b n"]:
    """Masks `masked_patch_count` patches of each image: those with the highest priority.

    priority = (1 - mask_noise) * rank + mask_noise * noise

    with rank the place of a patch's score in its image, from 0 (lowest) to 1, so that neither the
    scale nor the spread of a score matters. Patches of equal score are ordered by their noise.

    Args:
        score: As `policy_score` gives it; an image with one score everywhere is masked by noise.
        noise: Uniform random numbers.
        mask_ratio: Share of the patches to mask.
        mask_noise: 0 takes the top scores, 1 the noise alone; see `mask_noise_at`.

    Returns:
        True on masked patches.

    Source: paper, attention-based mask generation; rank and noise are ours.
    """
    n = score.shape[1]
    n_masked = masked_patch_count(n, mask_ratio)
    with _scoring(score.device):
        noise = noise.float()
        by_noise = noise.argsort(dim=1, stable=True)
        by_score = score.gather(1, by_noise).argsort(dim=1, stable=True)
        order = by_noise.gather(1, by_score)
        position = torch.arange(n, device=score.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, position) / max(n - 1, 1)
        priority = (1 - mask_noise) * rank + mask_noise * noise
        masked = priority.topk(n_masked, dim=1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, masked, True)


def mask_noise_at(
    progress: float, anneal_from: float, anneal_to: float, final_mask_noise: float
) -> float:
    """How much of the choice of patches is left to chance at a point of training.

    1 until `anneal_from`, then falling linearly to `final_mask_noise` at `anneal_to`.

    Args:
        progress: Steps done, as a share of all steps; so are `anneal_from` and `anneal_to`.
        anneal_from: Where guidance begins: before, the relevance of a patch means nothing.
        anneal_to: Where it is complete.
        final_mask_noise: What stays, so that no patch is always masked or never.

    Source: ours; after the easy-to-hard schedules of learned masking (HPM, arXiv:2304.05919).
    """
    if progress >= anneal_to:
        return final_mask_noise
    if progress <= anneal_from:
        return 1.0
    return 1 - (1 - final_mask_noise) * (progress - anneal_from) / (anneal_to - anneal_from)


# -- which tokens are masked --


def maskable_tokens(
    ids: Int[Tensor, "b t"], is_valid: Bool[Tensor, "b t"], special_ids: Sequence[int]
) -> Bool[Tensor, "b t"]:
    """True on words of the text: no padding, and no [CLS], [SEP] or other special token."""
    return is_valid & ~torch.isin(ids, torch.tensor(special_ids, device=ids.device))


def choose_masked_entities(
    groups: Int[Tensor, "b t"],
    is_maskable: Bool[Tensor, "b t"],
    group_noise: Float[Tensor, "b g"],
    token_noise: Float[Tensor, "b t"],
    mask_ratio: float,
    fallback_ratio: float = 0.15,
) -> Bool[Tensor, "b t"]:
    """Masks whole concepts of each text, every mention of a masked one.

    Of c concepts max(1, mask_ratio * c) are masked, rounded half to even: those with the smallest
    draws. A text without concepts has a share of its tokens masked instead, at least one; a text
    without maskable tokens none.

    Args:
        groups: Number of the concept that a token mentions; 0 for none (see
            `data.entities.is_entity_tokens`).
        is_maskable: See `maskable_tokens`.
        group_noise: Uniform; column g decides on concept g, column 0 is not used.
        token_noise: Uniform; they decide where there is no concept.
        mask_ratio: Share of the concepts to mask.
        fallback_ratio: Share of the tokens to mask in a text without concepts; 0 masks none.
            Source of the default: BERT section 3.1.

    Returns:
        True on masked tokens.

    Raises:
        ValueError: When a concept has no draw.

    Source: paper, EntMLM; the ratio, the rounding and the fallback are ours.
    """
    groups = torch.where(is_maskable, groups, 0).long()
    highest = int(groups.max()) if groups.numel() else 0
    if highest >= group_noise.shape[1]:
        raise ValueError(
            f"a text mentions concept {highest}, and there are draws for concepts up to "
            f"{group_noise.shape[1] - 1}; draw {highest + 1} numbers a row"
        )
    is_mentioned = _groups_at(groups, is_maskable, group_noise.shape[1])
    is_masked_group = _smallest(group_noise, is_mentioned, _share(is_mentioned, mask_ratio))
    n_fallback = _share(is_maskable, fallback_ratio) * bool(fallback_ratio)
    fallback = _smallest(token_noise, is_maskable, n_fallback)
    return torch.where(
        is_mentioned.any(1, keepdim=True), is_masked_group.gather(1, groups), fallback
    )


def add_cues(
    is_masked: Bool[Tensor, "b t"],
    groups: Int[Tensor, "b t"],
    cue_groups: Int[Tensor, "b t"],
    is_maskable: Bool[Tensor, "b t"],
    cue_noise: Float[Tensor, "b g"],
    mask_prob: float,
) -> Bool[Tensor, "b t"]:
    """Masks, with a probability, the words that deny or doubt a masked concept, all of them.

    A cue inside an entity ("heart is not enlarged") is masked with that entity and not otherwise,
    so that concepts stay whole.

    Args:
        is_masked: As `choose_masked_entities` gives it.
        groups: As there.
        cue_groups: Number of the concept of which a token is the cue; 0 for none.
        is_maskable: As there.
        cue_noise: Uniform; column g decides on the cues of concept g.
        mask_prob: Of masking the cues of a masked concept.

    Source: ours; whether a finding is there is what the image knows and the rest of the report
        does not.
    """
    is_masked_group = _groups_at(groups.long(), is_masked, cue_noise.shape[1])
    goes_along = (is_masked_group & (cue_noise < mask_prob)).gather(1, cue_groups.long())
    return is_masked | (goes_along & (groups == 0) & is_maskable)


def random_tokens_instead(
    is_masked: Bool[Tensor, "b t"],
    is_maskable: Bool[Tensor, "b t"],
    token_noise: Float[Tensor, "b t"],
) -> Bool[Tensor, "b t"]:
    """As many tokens of each text as `is_masked` masks, taken at random: the arm without entities.

    Args:
        is_masked: What the entities would mask.
        is_maskable: See `maskable_tokens`.
        token_noise: Uniform; the smallest go.
    """
    return _smallest(token_noise, is_maskable, is_masked.sum(1))


def _groups_at(groups: Tensor, is_here: Tensor, n_groups: int) -> Tensor:
    """bool [b, g]: the groups with a token where `is_here`; group 0 is none."""
    found = torch.zeros(len(groups), n_groups, dtype=torch.bool, device=groups.device)
    found.scatter_(1, torch.where(is_here, groups, 0), True)
    found[:, 0] = False
    return found


def _share(is_candidate: Tensor, ratio: float) -> Tensor:
    # In double: in float32, 0.15 * 190 is not the 28.5 that it is in Python, and rounds elsewhere.
    return (ratio * is_candidate.sum(1).double()).round().clamp(min=1)


def _smallest(noise: Tensor, is_candidate: Tensor, count: Tensor) -> Tensor:
    """True on the `count` candidates of each row with the smallest draws; fewer, if so few."""
    noise = noise.masked_fill(~is_candidate, torch.inf)
    position = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return is_candidate & (position < count[:, None])
