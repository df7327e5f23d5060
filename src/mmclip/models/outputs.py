"""What the model and its parts give."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


class EncoderOutput(NamedTuple):
    """What one modality gives: features per token, and one embedding a row."""

    features: Float[Tensor, "b n d"]  # the encoder's, class token (a ResNet's pooled feature) first
    embedding: Float[Tensor, "b e"]  # projected and L2-normalised, float32


class TextOutput(NamedTuple):
    """What the model makes of some texts. m texts, t tokens, h masked tokens."""

    features: Float[Tensor, "m t d"]
    embedding: Float[Tensor, "m e"]
    masked_features: Float[Tensor, "h w"] | None  # of the decoder; None without one
    attention: Float[Tensor, "m heads t n"] | None  # to the patches; where it was asked for


class Outputs(NamedTuple):
    """What the losses read. Rows without a text have a text embedding of 0."""

    image_embedding: Float[Tensor, "b e"]
    text_embedding: Float[Tensor, "b e"]
    scale: Float[Tensor, ""]
    bias: Float[Tensor, ""] | None  # of the sigmoid loss
    masked_token_features: Float[Tensor, "h w"] | None  # in the order of `Batch.masked_texts`
    masked_token_loss: Float[Tensor, ""] | None  # its sum over them, see `losses`
    patches: Float[Tensor, "b n p"] | None  # predicted pixels, see `ImageDecoder`
    is_masked: Bool[Tensor, "b n"] | None
    relevance: Float[Tensor, "b n"] | None  # what the choice went by, before policy and noise
    label_logits: Float[Tensor, "b k"] | None  # None without a label loss
    local_logits: Float[Tensor, "s s"] | None  # of `Batch.entity_rows`; None without a local loss


class MaskedPatches(NamedTuple):
    """What masked image modelling gives; see `Outputs`."""

    patches: Float[Tensor, "b n p"] | None
    is_masked: Bool[Tensor, "b n"] | None
    relevance: Float[Tensor, "b n"] | None
