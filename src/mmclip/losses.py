"""Losses as pure functions of tensors. Each returns a sum; the caller divides by a global count.

A sum over elements, divided by the number of elements over all processes and micro-batches, is
the same number however the rows are dealt out. A mean of means is not.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    is_positive = is_positive & is_candidate
    n_positive = is_positive.sum(1)
    log_prob = logits - logits.logsumexp(1, keepdim=True)
    picked = torch.where(is_positive, log_prob, 0.0).sum(1)
    return -(picked / n_positive.clamp(min=1))[n_positive > 0].sum()
