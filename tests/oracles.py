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


def patchify_loop(image: Tensor, patch_size: int) -> Tensor:
    """One patch after another in reading order, each patch's pixels in reading order."""
    b, _, h, w = image.shape
    rows = []
    for i in range(b):
        patches = []
        for top in range(0, h, patch_size):
            for left in range(0, w, patch_size):
                patches.append(
                    [
                        float(image[i, 0, top + y, left + x])
                        for y in range(patch_size)
                        for x in range(patch_size)
                    ]
                )
        rows.append(patches)
    return torch.tensor(rows)


def cosine_of(a: list[float], b: list[float]) -> float:
    """Cosine of two vectors, 0 if one is zero."""
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def relevance_score_loop(
    kind: str,
    patches: Tensor,
    embedding: Tensor,
    tokens: Tensor,
    is_chosen: Tensor,
    attention: Tensor,
) -> Tensor:
    """Each candidate score, one patch at a time, in Python floats."""
    b, n, e = patches.shape
    out = torch.zeros(b, n)
    for i in range(b):
        chosen = [t for t in range(tokens.shape[1]) if is_chosen[i, t]]
        logit = {
            (p, t): float(patches[i, p] @ tokens[i, t]) / math.sqrt(e)
            for p in range(n)
            for t in chosen
        }
        for p in range(n):
            if kind == "contribution":
                out[i, p] = sum(
                    a * b
                    for a, b in zip(patches[i, p].tolist(), embedding[i].tolist(), strict=True)
                )
                continue
            if kind == "embedding":
                out[i, p] = cosine_of(patches[i, p].tolist(), embedding[i].tolist())
                continue
            if not chosen:
                continue
            weight = [math.exp(logit[p, t]) for t in chosen]
            if kind == "attended":
                mixed = [
                    sum(w * float(tokens[i, t, k]) for w, t in zip(weight, chosen, strict=True))
                    for k in range(e)
                ]
                out[i, p] = cosine_of(patches[i, p].tolist(), mixed)
            elif kind == "logsumexp":
                out[i, p] = math.log(sum(weight))
            elif kind == "token_attention":
                shares = [
                    math.exp(logit[p, t]) / sum(math.exp(logit[q, t]) for q in range(n))
                    for t in chosen
                ]
                out[i, p] = sum(shares) / len(shares)
            else:
                heads = range(attention.shape[1])
                shares = [float(attention[i, h, t, p]) for h in heads for t in chosen]
                out[i, p] = sum(shares) / len(shares)
    return out


def masked_patches_loop(
    score: Tensor, noise: Tensor, mask_ratio: float, mask_noise: float
) -> Tensor:
    """Ranks the patches of each image, mixes with the noise, masks the highest."""
    b, n = score.shape
    out = torch.zeros(b, n, dtype=torch.bool)
    for i in range(b):
        order = sorted(range(n), key=lambda p: (float(score[i, p]), float(noise[i, p])))
        priority = {
            p: (1 - mask_noise) * place / max(n - 1, 1) + mask_noise * float(noise[i, p])
            for place, p in enumerate(order)
        }
        for p in sorted(priority, key=lambda p: priority[p])[n - round(mask_ratio * n) :]:
            out[i, p] = True
    return out


def masked_entities_loop(
    groups: Tensor,
    is_maskable: Tensor,
    group_noise: Tensor,
    token_noise: Tensor,
    mask_ratio: float,
) -> Tensor:
    """Masks whole concepts of one text at a time, or 15 % of the tokens where there is none."""
    out = torch.zeros_like(is_maskable)
    for i in range(len(groups)):
        words = [t for t in range(groups.shape[1]) if is_maskable[i, t]]
        concepts = sorted({int(groups[i, t]) for t in words} - {0})
        if concepts:
            concepts.sort(key=lambda g: float(group_noise[i, g]))
            masked = concepts[: max(1, round(mask_ratio * len(concepts)))]
            chosen = [t for t in words if int(groups[i, t]) in masked]
        else:
            words.sort(key=lambda t: float(token_noise[i, t]))
            chosen = words[: max(1, round(0.15 * len(words)))]
        for t in chosen:
            out[i, t] = True
    return out


def add_cues_loop(
    is_masked: Tensor,
    groups: Tensor,
    cue_groups: Tensor,
    is_maskable: Tensor,
    cue_noise: Tensor,
    mask_prob: float,
) -> Tensor:
    """Masks the cue of each masked concept whose draw says so, token by token."""
    out = is_masked.clone()
    for i in range(len(groups)):
        masked = {int(g) for g, m in zip(groups[i], is_masked[i], strict=True) if m and g > 0}
        for t in range(groups.shape[1]):
            g = int(cue_groups[i, t])
            if g in masked and groups[i, t] == 0 and is_maskable[i, t]:
                out[i, t] |= bool(cue_noise[i, g] < mask_prob)
    return out


def masked_patch_sum_loop(pred: Tensor, target: Tensor, is_masked: Tensor) -> float:
    """Mean squared error of each masked patch, value by value, added up."""
    total = 0.0
    for i in range(len(pred)):
        for p in range(pred.shape[1]):
            if is_masked[i, p]:
                errors = [
                    (float(x) - float(y)) ** 2
                    for x, y in zip(pred[i, p], target[i, p], strict=True)
                ]
                total += sum(errors) / len(errors)
    return total


def masked_token_sum_loop(logits: Tensor, targets: Tensor) -> float:
    """-log softmax of each masked token, added up."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        total += math.log(sum(math.exp(v) for v in row)) - row[target]
    return total


def local_logit_loop(patches: Tensor, words: Tensor, scale: float) -> float:
    """`losses.local_logits` of one image and one text, word by word."""
    if not len(words):
        return 0.0
    patches = [p / p.norm() for p in patches]
    matches = []
    for word in words:
        word = word / word.norm()
        weights = [math.exp(scale * float(word @ p)) for p in patches]
        seen = sum(w * p for w, p in zip(weights, patches, strict=True)) / sum(weights)
        matches.append(math.exp(scale * float(seen @ word / seen.norm())))
    return math.log(sum(matches) / len(matches))
