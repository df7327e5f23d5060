"""Slow and obvious versions of what the package computes fast."""

import math

import torch
from torch import Tensor


def contrastive_sum_loop(
    query: Tensor, candidates: Tensor, is_positive: Tensor, is_candidate: Tensor, scale: float
) -> float:
    """Multi-positive contrastive loss of one direction, one pair at a time, in Python floats."""
    total = 0.0
    for i in range(len(query)):
        logits = {
            j: scale * float(query[i] @ candidates[j])
            for j in range(len(candidates))
            if is_candidate[j]
        }
        positives = [j for j in logits if is_positive[i, j]]
        if not positives:
            continue
        log_sum = math.log(sum(math.exp(v) for v in logits.values()))
        total -= sum(logits[j] - log_sum for j in positives) / len(positives)
    return total


def positive_pairs_loop(keys: Tensor, others: Tensor) -> Tensor:
    """Two rows are positives where a column holds the same non-negative key."""
    out = torch.zeros(len(keys), len(others), dtype=torch.bool)
    for i in range(len(keys)):
        for j in range(len(others)):
            out[i, j] = any(
                int(a) == int(b) and int(a) >= 0 for a, b in zip(keys[i], others[j], strict=True)
            )
    return out
