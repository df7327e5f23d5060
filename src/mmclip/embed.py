"""Embeddings of films, texts and prompts by a trained model, and what a film says of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.data.dataset import Rows, normalise
from mmclip.data.text import tokenise
from mmclip.models.mmclip import MMCLIP
from mmclip.progress import progress
from mmclip.prompts import PromptSet


@dataclass(frozen=True)
class PromptEmbeddings:
    """One embedding a finding and side: the normalised mean over the wordings."""

    positive: Float[Tensor, "k e"]
    negative: Float[Tensor, "k e"]


@torch.inference_mode()
def embed_films(
    model: MMCLIP, rows: Rows, batch_size: int = 256, show: bool = True
) -> Float[Tensor, "n e"]:
    """The embeddings of all films, on the CPU, in the order of the rows."""
    device = model.logit_scale.device
    out = []
    with progress("embedding films", len(rows), show=show) as advance:
        for start in range(0, len(rows), batch_size):
            part = np.arange(start, min(start + batch_size, len(rows)))
            image = normalise(rows.pixels(part)).to(device)
            out.append(model.encode_image(image).embedding.cpu())
            advance(len(part))
    return torch.cat(out)


@torch.inference_mode()
def embed_texts(
    model: MMCLIP,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    max_tokens: int,
    batch_size: int = 256,
) -> Float[Tensor, "n e"]:
    """The embeddings of some texts, on the CPU; a text that occurs twice is encoded once."""
    device = model.logit_scale.device
    distinct = list(dict.fromkeys(texts))
    out = []
    for start in range(0, len(distinct), batch_size):
        tokens = tokenise(tokenizer, distinct[start : start + batch_size], max_tokens=max_tokens)
        ids = torch.from_numpy(tokens.ids).long().to(device)
        is_valid = torch.from_numpy(tokens.is_valid).to(device)
        out.append(model.encode_text(ids, is_valid).embedding.cpu())
    number = {text: i for i, text in enumerate(distinct)}
    return torch.cat(out)[[number[text] for text in texts]]


def embed_prompts(
    model: MMCLIP,
    tokenizer: PreTrainedTokenizerFast,
    prompts: PromptSet,
    findings: Sequence[str],
    max_tokens: int,
) -> PromptEmbeddings:
    """Embeds the prompts of each finding and averages the wordings of a side.

    Source: prompt ensembling in embedding space, CLIP section 3.1.4 (arXiv:2103.00020).
    """

    def averaged(texts: Sequence[str]) -> Tensor:
        return F.normalize(embed_texts(model, tokenizer, texts, max_tokens).mean(0), dim=-1)

    sides = [prompts.texts(finding) for finding in findings]
    return PromptEmbeddings(
        positive=torch.stack([averaged(side.positives) for side in sides]),
        negative=torch.stack([averaged(side.negatives) for side in sides]),
    )


def probabilities(
    films: Float[Tensor, "n e"], prompts: PromptEmbeddings, scale: float
) -> Float[np.ndarray, "n k"]:
    """Softmax over the pair of prompts: the probability that the positive one fits the film.

    Source: CheXzero (Tiu et al. 2022), methods, "softmax evaluation".
    """
    difference = films.double() @ (prompts.positive - prompts.negative).double().T
    return torch.sigmoid(scale * difference).numpy()
