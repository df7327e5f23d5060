"""Text encoders: a new BERT of given sizes, or a pretrained encoder with its own tokenizer."""

import logging
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from mmclip.config import Pooling, TextEncoderConfig
from mmclip.models.layout import (
    EncoderError,
    Pooled,
    TextLayout,
    keep_layout,
    pooled,
    text_layout,
    unused_parameters,
)
from mmclip.models.pretrained import (
    FORWARD_FAULTS,
    TAKE_INSTEAD,
    first_line,
    load_tower,
    read_config,
    tower_config,
)

logger = logging.getLogger(__name__)

POSITIONS_BEHIND_PADDING = {
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet",
    "longformer", "data2vec-text", "ibert", "esm", "luke",
}  # fmt: skip
"""Models that number positions from the id of padding + 1, so that some of their table is not for
tokens."""

READ_WHOLE = {"siglip_text_model", "siglip2_text_model"}
"""Models that read a text padded to their longest, without a mask, and pool its last place.
Source: SigLIP's released weights, whose processor pads to max_length."""


def build_text_encoder(
    config: TextEncoderConfig,
    vocab_size: int,
    max_tokens: int,
    pad_token_id: int,
    *,
    has_class_token: bool = True,
    end_token_id: int | None = None,
    mask_token_id: int | None = None,
) -> PreTrainedModel:
    """A text encoder for `vocab_size` token ids and up to `max_tokens` tokens.

    Dropout is 0: every random draw of a run is keyed by image, and dropout's cannot be. A [MASK]
    that was added to the tokenizer behind a pretrained vocabulary gets the mean embedding.

    Args:
        config: New or pretrained, and how it pools.
        vocab_size: Tokens of the tokenizer.
        max_tokens: Of the longest text, special tokens included.
        pad_token_id: Of the tokenizer.
        has_class_token: Whether the tokenizer sets a token in front of a text, to be pooled.
        end_token_id: The token behind a text, at which CLIP pools.
        mask_token_id: Of the tokenizer.

    Raises:
        EncoderError: When pretrained weights cannot be found, do not fit the tokenizer, or are of
            no text encoder; or it cannot pool as it is told to.
    """
    if config.pretrained is None:
        # initializer_range: as in `build_image_encoder`.
        bert = BertConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=max_tokens,
            pad_token_id=pad_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=config.width**-0.5,
        )
        encoder = BertModel(bert, add_pooling_layer=True)
        if config.pooling not in ("auto", "pooler"):
            find_layout(encoder, max_tokens, pad_token_id, config.pooling, has_class_token)
        return encoder
    name = config.pretrained
    read = read_config(name)
    own = tower_config(read, "text") or read
    if own.model_type == "clip_text_model" and end_token_id is not None:
        # By the old id, 2, CLIP pools at the highest id of a text, which an added token may be.
        own.eos_token_id = end_token_id
    encoder = load_tower(name, "text", read)
    _fit_vocabulary(encoder, name, vocab_size, mask_token_id)
    _check_length(encoder, name, max_tokens, pad_token_id)
    find_layout(encoder, max_tokens, pad_token_id, config.pooling, has_class_token, end_token_id)
    return encoder


def _fit_vocabulary(
    encoder: PreTrainedModel, name: str, vocab_size: int, mask_token_id: int | None
) -> None:
    words = _word_embeddings(encoder, name)
    known = len(words.weight)
    if known >= vocab_size:
        return
    if (known, known + 1) != (mask_token_id, vocab_size):  # anything but an added [MASK]
        raise EncoderError(
            f"{name} knows {known} tokens, its tokenizer has {vocab_size}; take both from the same "
            f"folder"
        )
    mean = words.weight.detach().mean(0)
    encoder.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        _word_embeddings(encoder, name).weight[known:] = mean
    logger.info("%s: token %d is new, with the mean embedding", name, known)


def _word_embeddings(encoder: PreTrainedModel, name: str) -> nn.Embedding:
    try:
        words = encoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        words = None
    if not isinstance(words, nn.Embedding):
        raise EncoderError(
            f"{name} is a {encoder.config.model_type!r} model without a table of word embeddings; "
            f"{TAKE_INSTEAD['text']}"
        )
    return words


def _check_length(encoder: PreTrainedModel, name: str, max_tokens: int, pad_token_id: int) -> None:
    most = vars(encoder.config).get("max_position_embeddings")
    if not isinstance(most, int):  # T5 has positions of any distance
        return
    if encoder.config.model_type in POSITIONS_BEHIND_PADDING:
        most -= pad_token_id + 1
    if most < max_tokens:
        raise EncoderError(
            f"{name} reads at most {most} tokens; set data.max_tokens to that or less (it is "
            f"{max_tokens})"
        )


def find_layout(
    encoder: PreTrainedModel,
    max_tokens: int,
    pad_token_id: int,
    pooling: Pooling,
    has_class_token: bool,
    end_token_id: int | None = None,
) -> TextLayout:
    """Looks at what an encoder makes of one text, and keeps what it finds; see `keep_layout`.

    The first token of a causal model, and a pooler that reads it, are the same for every text:
    they do not count as a class token and as a pooler.

    Raises:
        EncoderError: When it gives no feature per token, or cannot pool so.
    """
    kind, was_training = encoder.config.model_type, encoder.training
    reads = encoder.config.max_position_embeddings if kind in READ_WHOLE else None
    layout = TextLayout(0, "mean", reads, pad_token_id)
    keep_layout(encoder, layout)
    device = next(encoder.parameters()).device
    ids = torch.full((1, max_tokens), int(pad_token_id == 0), device=device)
    if end_token_id is not None:
        ids[0, -1] = end_token_id
    is_valid = torch.ones_like(ids, dtype=torch.bool)
    encoder.eval()
    try:
        output = forward_text(encoder, ids, is_valid)
    except FORWARD_FAULTS as error:
        raise EncoderError(
            f"{kind!r} does not read a text of {max_tokens} tokens alone ({first_line(error)}); "
            f"{TAKE_INSTEAD['text']}"
        ) from error
    features = output.get("last_hidden_state") if isinstance(output, ModelOutput) else None
    if features is None or features.shape[:2] != (1, max_tokens):
        raise EncoderError(f"{kind!r} gives no feature per token; {TAKE_INSTEAD['text']}")
    width = features.shape[2]
    other = ids.clone()
    other[0, 1] = next(i for i in range(3) if i not in (pad_token_id, int(ids[0, 1])))
    with torch.no_grad():
        of_other = forward_text(encoder, other, is_valid)
    is_told = not torch.equal(features[:, 0], of_other.last_hidden_state[:, 0])
    before, behind = output.get("pooler_output"), of_other.get("pooler_output")
    has_pooler = (
        before is not None and before.shape[1:] == (width,) and not torch.equal(before, behind)
    )
    chosen = _choose(pooling, has_pooler, has_class_token, is_told, kind)
    layout = replace(layout, width=width, pooling=chosen)
    keep_layout(encoder, layout)
    vector = pooled(output, encoder, is_valid)
    layout = replace(layout, unused=unused_parameters(vector, encoder))
    keep_layout(encoder, layout)
    encoder.train(was_training)
    return layout


def _choose(
    pooling: Pooling, has_pooler: bool, has_class_token: bool, is_told: bool, kind: str
) -> Pooled:
    """How to pool: as it is asked for, or by the pooler, the first token or the mean.

    Args:
        pooling: What is asked for.
        has_pooler: Whether there is one of the width of the features that the text changes.
        has_class_token: Whether the tokenizer sets a token in front of a text.
        is_told: Whether the first token sees those behind it.
        kind: Of the model.
    """
    if pooling == "auto":
        return "pooler" if has_pooler else "cls" if has_class_token and is_told else "mean"
    if pooling == "pooler" and not has_pooler:
        instead = "'cls' or 'mean'" if has_class_token and is_told else "'mean'"
        what = "of the width of its features" if is_told else "that sees a text"
        raise EncoderError(
            f"model.text.pooling='pooler', and {kind!r} has no pooler {what}; set it to {instead}"
        )
    if pooling == "cls" and not (has_class_token and is_told):
        instead = "'pooler' or 'mean'" if has_pooler else "'mean'"
        why = (
            f"{kind!r} is causal: its first token sees no other"
            if has_class_token
            else f"the tokenizer of {kind!r} sets no class token in front of a text"
        )
        raise EncoderError(f"model.text.pooling='cls', and {why}; set it to {instead}")
    return pooling


def forward_text(
    encoder: PreTrainedModel, ids: Int[torch.Tensor, "b t"], is_valid: Bool[torch.Tensor, "b t"]
) -> Any:
    """The output of a text encoder: `last_hidden_state` [b, t, d], and what its pooler gives.

    Args:
        encoder: Of this package.
        ids: Padded at the end.
        is_valid: False on padding.
    """
    layout = text_layout(encoder)
    if layout.reads is None:
        return encoder(input_ids=ids, attention_mask=is_valid.long())
    n_tokens = ids.shape[1]
    ids = ids.masked_fill(~is_valid, layout.pad_id)
    ids = F.pad(ids, (0, layout.reads - n_tokens), value=layout.pad_id)
    output = encoder(input_ids=ids)
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state[:, :n_tokens],
        pooler_output=output.pooler_output,
    )
