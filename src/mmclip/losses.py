"""Losses as pure functions of tensors. Each returns a sum; the caller divides by a global count.

A sum over elements, divided by the number of elements over all processes and micro-batches, is
the same number however the rows are dealt out. A mean of means is not.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CONTRASTIVE_BLOCK_ELEMENTS = 2**22
"""Logits that stand in memory at once: those of 2,048 rows and as many others, of 256 rows and
16,384. [chosen: 17 MB of float32, of which a step holds a few]"""

TOKENS_PER_BLOCK = 4096
"""Masked tokens whose logits over the vocabulary stand in memory at once. [chosen: 475 MB of
float32 for BERT's 28,996 words]"""


def positive_pairs(keys: Int[Tensor, "a m"], other_keys: Int[Tensor, "b m"]) -> Bool[Tensor, "a b"]:
    """True where two rows are positives of one another: they share a key in the same column.

    Args:
        keys: One column a kind of key (study, text, label set); a negative key is no key.
        other_keys: The same of the other rows.
    """
    same = keys[:, None, :] == other_keys[None, :, :]
    return (same & (keys >= 0)[:, None, :]).any(-1)


def contrastive_sum(
    query: Float[Tensor, "a e"],
    candidates: Float[Tensor, "b e"],
    is_positive: Bool[Tensor, "a b"],
    is_candidate: Bool[Tensor, " b"],
    logit_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Multi-positive contrastive loss of one direction, summed over the rows of `query`.

    -sum_i 1/|P_i| sum_{p in P_i} log softmax_j(logit_scale * <query_i, candidates_j>)[p]

    With one positive a row this is the cross-entropy of CLIP. Rows without a positive candidate
    add nothing.

    Args:
        query: Normalised embeddings.
        candidates: Normalised embeddings of the other modality, gathered over all processes.
        is_positive: The positives of each row, P_i.
        is_candidate: False for rows that have no text (or are padding of the gathering): they are
            in no softmax.
        logit_scale: The inverse temperature, not its logarithm.

    Source: CLIP section 2.3 (arXiv:2103.00020); the mean over positives is L_out of Supervised
        Contrastive Learning (arXiv:2004.11362, eq. 2); docs/method.md, row "equal texts".
    """
    logits = logit_scale * query @ candidates.T
    logits = logits.masked_fill(~is_candidate, -torch.inf)
    return softmax_sum(logits, is_positive & is_candidate)


def softmax_sum(
    logits: Float[Tensor, "a b"], is_positive: Bool[Tensor, "a b"]
) -> Float[Tensor, ""]:
    """-sum_i 1/|P_i| sum_{p in P_i} log softmax_j(logits_ij)[p]; see `contrastive_sum`."""
    n_positive = is_positive.sum(1)
    log_prob = logits - logits.logsumexp(1, keepdim=True)
    picked = torch.where(is_positive, log_prob, 0.0).sum(1)  # 0 in a row without a positive
    return -(picked / n_positive.clamp(min=1)).sum()


def sigmoid_sum(
    query: Float[Tensor, "a e"],
    candidates: Float[Tensor, "b e"],
    is_positive: Bool[Tensor, "a b"],
    is_candidate: Bool[Tensor, " b"],
    scale_and_bias: Float[Tensor, "2"],
) -> Float[Tensor, ""]:
    """Sigmoid contrastive loss of one direction, summed over the rows of `query`.

    -sum_i sum_j log sigmoid(z_ij * (scale * <query_i, candidates_j> + bias)), z_ij = 1 or -1

    Each pair is a question of its own, with no softmax over the batch. Both directions ask about
    the same pairs, so the mean of the two is SigLIP's loss. Rows without a positive candidate add
    nothing, as in `contrastive_sum`.

    Args:
        query: Normalised embeddings.
        candidates: Normalised embeddings of the other modality, gathered over all processes.
        is_positive: The pairs with z = 1; SigLIP has one a row, equal texts give several.
        is_candidate: False for rows that have no text: no pair is made with them.
        scale_and_bias: The inverse temperature, not its logarithm, and the bias.

    Source: SigLIP (arXiv:2303.15343), equation in section 3.2; several positives: ours, as in
        `contrastive_sum`.
    """
    scale, bias = scale_and_bias.unbind()
    logits = scale * query @ candidates.T + bias
    is_positive = is_positive & is_candidate
    loss = -F.logsigmoid(torch.where(is_positive, logits, -logits))
    is_asked = is_candidate & is_positive.any(1, keepdim=True)
    return torch.where(is_asked, loss, 0.0).sum()


ContrastiveSum = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A contrastive loss of one direction: `contrastive_sum`, `sigmoid_sum`, or one of your own with
the arguments of the former."""


def contrastive_sum_in_blocks(
    query: Float[Tensor, "a e"],
    candidates: Float[Tensor, "b e"],
    query_keys: Int[Tensor, "a m"],
    candidate_keys: Int[Tensor, "b m"],
    is_candidate: Bool[Tensor, " b"],
    logit_scale: Float[Tensor, "..."],
    block_elements: int = CONTRASTIVE_BLOCK_ELEMENTS,
    sum_of: ContrastiveSum = contrastive_sum,
) -> Float[Tensor, ""]:
    """A contrastive loss with the positives of `positive_pairs`, some rows of `query` at a time.

    Nothing of size a x b is kept for the backward pass, which computes each block's logits again,
    so memory does not grow with a * b. Up to block_elements logits it is `sum_of` itself.

    Source: ours; as memory-efficient attention does it (arXiv:2112.05682).
    """

    def block(query: Tensor, candidates: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        is_positive = positive_pairs(keys, candidate_keys)
        return sum_of(query, candidates, is_positive, is_candidate, scale)

    n_rows = max(1, block_elements // max(1, len(candidates)))
    if len(query) <= n_rows:
        return block(query, candidates, query_keys, logit_scale)
    sums = [
        checkpoint(block, rows, candidates, keys, logit_scale, use_reentrant=False)
        for rows, keys in zip(query.split(n_rows), query_keys.split(n_rows), strict=True)
    ]
    return torch.stack(sums).sum()  # pyright: ignore[reportArgumentType, reportCallIssue]


LOCAL_BLOCK_ELEMENTS = 2**24
"""Cosines of words and patches that stand in memory at once. [chosen: 67 MB of float32, of which a
step holds a few]"""


def local_logits(
    patches: Float[Tensor, "b n e"],
    words: Float[Tensor, "m k e"],
    is_word: Bool[Tensor, "m k"],
    scale: Float[Tensor, ""],
    block_elements: int = LOCAL_BLOCK_ELEMENTS,
) -> Float[Tensor, "b m"]:
    """How well the words of each text find what they name among the patches of each image.

    a_kn = softmax_n(scale * <w_k, p_n>) is where word k looks, c_k = sum_n a_kn p_n what it sees,
    and the logit is log mean_k exp(scale * cos(c_k, w_k)).

    Args:
        patches: In the joint space, of any length.
        words: Likewise.
        is_word: False where a text has fewer words than the longest; such places count for
            nothing. A text without any has a logit of 0.
        scale: The inverse temperature, of all three: that of the contrastive term.
        block_elements: Cosines beyond which some texts pass at a time, and the backward pass
            computes theirs again.

    Source: the local contrastive loss of GLoRIA (Huang et al., ICCV 2021, section 3.3). Ours: one
        temperature, which is learned, in place of three; and the mean over words in place of the
        sum, which favours long texts.
    """
    with torch.autocast(patches.device.type, enabled=False):  # logits of half precision are coarse
        patches, words = F.normalize(patches.float(), dim=-1), F.normalize(words.float(), dim=-1)
        gram = patches @ patches.mT

        def block(words: Tensor, is_word: Tensor) -> Tensor:
            cosine = torch.einsum("mke,bne->bmkn", words, patches)
            attention = (scale * cosine).softmax(-1)
            # <c, w> and |c| by the cosines and those among patches: no [b, m, k, e] is made.
            along = (attention * cosine).sum(-1)
            square = torch.einsum("bmkn,bnp,bmkp->bmk", attention, gram, attention)
            match = scale * along * (square + 1e-12).rsqrt()
            has_word = is_word.any(-1, keepdim=True)
            match = match.masked_fill(~(is_word | ~has_word), -torch.inf)
            n_words = is_word.sum(-1).clamp(min=1)
            return (match.logsumexp(-1) - n_words.log()).masked_fill(~has_word[:, 0], 0.0)

        per_text = max(1, len(patches) * patches.shape[1] * words.shape[1])
        n_texts = max(1, block_elements // per_text)
        if len(words) <= n_texts:
            return block(words, is_word)
        parts = [
            checkpoint(block, some, known, use_reentrant=False)
            for some, known in zip(words.split(n_texts), is_word.split(n_texts), strict=True)
        ]
        return torch.cat(parts, 1)  # pyright: ignore[reportArgumentType, reportCallIssue]


def local_sum(logits: Float[Tensor, "r r"], keys: Int[Tensor, "r m"]) -> Float[Tensor, ""]:
    """The mean of both directions of `softmax_sum`, over rows that have an image and words.

    Args:
        logits: Of each image against each text, see `local_logits`.
        keys: Of the rows, see `positive_pairs`.
    """
    is_positive = positive_pairs(keys, keys)
    return (softmax_sum(logits, is_positive) + softmax_sum(logits.T, is_positive.T)) / 2


def masked_patch_sum(
    pred: Float[Tensor, "b n p"], target: Float[Tensor, "b n p"], is_masked: Bool[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """Mean squared error of each masked patch, summed over the masked patches.

    Args:
        pred: Output of the image decoder, in per-patch standard deviations.
        target: As `patches.normalise_patches` gives it.
        is_masked: The patches that were masked; the others add nothing.

    Source: MAE section 3 (arXiv:2111.06377); docs/method.md, row "image target".
    """
    per_patch = (pred.float() - target.float()).square().mean(-1)
    return torch.where(is_masked, per_patch, 0.0).sum()


def label_sum(
    logits: Float[Tensor, "b k"],
    labels: Float[Tensor, "b k"],
    positive_weight: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of each known label, summed over them.

    Args:
        logits: Of the presence of each finding.
        labels: 1 present, 0 absent; NaN is not known and adds nothing.
        positive_weight: Of the labels that are present, by finding; 1 where it is None.

    Source: the usual loss of multi-label classification; docs/training.md, "Prompts or labels".
    """
    is_known = ~labels.isnan()
    target = torch.where(is_known, labels, 0.0)
    per_label = F.binary_cross_entropy_with_logits(
        logits.float(), target, reduction="none", pos_weight=positive_weight
    )
    return torch.where(is_known, per_label, 0.0).sum()


def label_class_sum(
    logits: Float[Tensor, "b k"],
    uncertain_logits: Float[Tensor, "b m"],
    columns: Sequence[int],
    labels: Float[Tensor, "b k"],
    positive_weight: Float[Tensor, " k"],
) -> Float[Tensor, ""]:
    """Cross-entropy of each known label, where "uncertain" is a class of its own for some findings.

    These have the classes absent (logit 0), present and uncertain, so that the sigmoid of `logits`
    is the probability of present among present and absent. The others are as in `label_sum`.

    Args:
        logits: Of present against absent, of each finding.
        uncertain_logits: Of uncertain against absent, of the findings at `columns`.
        columns: Places of those findings.
        labels: 1 present, 0 absent, -1 uncertain; NaN is not known and adds nothing.
        positive_weight: Of the labels that are present, by finding.

    Source: U-MultiClass of Irvin et al. 2019 (arXiv:1901.07031), section 3; one logit of its three
    is 0 here, as a softmax does not change when all three move alike.
    """
    uncertain = torch.full_like(logits, -torch.inf, dtype=torch.float32)
    uncertain[:, list(columns)] = uncertain_logits.float()
    present = logits.float()
    absent = torch.zeros_like(present)
    of_label = torch.where(labels == 1, present, torch.where(labels == -1, uncertain, absent))
    per_label = torch.stack((absent, present, uncertain)).logsumexp(0) - of_label
    per_label = torch.where(labels == 1, positive_weight * per_label, per_label)
    return torch.where(labels.isnan(), 0.0, per_label).sum()


def masked_token_sum(logits: Float[Tensor, "m v"], targets: Int[Tensor, " m"]) -> Float[Tensor, ""]:
    """Cross-entropy of the masked tokens, summed over them.

    Args:
        logits: Output of the text decoder.
        targets: Token ids that were masked, in the same order: `ids[is_masked]`.

    Source: BERT section 3.1 (arXiv:1810.04805).
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def masked_token_sum_in_blocks(
    features: Sequence[Float[Tensor, "_ w"]],
    targets: Sequence[Int[Tensor, " _"]],
    predict: Callable[[Tensor], Tensor],
    block_tokens: int = TOKENS_PER_BLOCK,
) -> Float[Tensor, ""]:
    """`masked_token_sum` of logits that are computed some tokens at a time.

    The logits of many tokens over a large vocabulary are the largest tensor of a step. Beyond
    block_tokens tokens, the backward pass computes those of a block again, and keeps none.

    Args:
        features: Of masked tokens, one tensor for each kind of text.
        targets: Their token ids.
        predict: Vocabulary logits [m, v] of features [m, w].
        block_tokens: Tokens of a block.
    """
    if sum(map(len, features)) <= block_tokens:
        logits = torch.cat([predict(some) for some in features])
        return masked_token_sum(logits, torch.cat(list(targets)))

    def block(features: Tensor, targets: Tensor) -> Tensor:
        return masked_token_sum(predict(features), targets)

    together, wanted = torch.cat(list(features)), torch.cat(list(targets))
    sums = [
        checkpoint(block, some, ids, use_reentrant=False)
        for some, ids in zip(together.split(block_tokens), wanted.split(block_tokens), strict=True)
    ]
    return torch.stack(sums).sum()  # pyright: ignore[reportArgumentType, reportCallIssue]
