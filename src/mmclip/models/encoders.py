"""Image and text encoders over transformers: from sizes, from a folder, or from the hub.

Both encoders give `last_hidden_state` and, where they have one, `pooler_output`, which is what
transformers' VisionTextDualEncoderModel reads, so that a trained pair can be exported without a
change; but a ResNet's pooled output must be flattened there as it is here, see
`image_towers.adapt_batch_norm`, and another pooling than the encoder's own is not to be had there.
What else an output holds is in `layout`.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, ResNetModel, ViTModel

from mmclip.models.image_towers import (
    adapt_batch_norm,
    build_image_encoder,
    repeat_channel,
)
from mmclip.models.layout import (
    LAYOUT_KEY,
    EncoderError,
    ImageLayout,
    TextLayout,
    as_pooled,
    image_layout,
    no_decay_names,
    patch_grid,
    pooled,
    stop_unused,
    text_layout,
    token_features,
)
from mmclip.models.norm import no_tracking
from mmclip.models.pretrained import LoadReport, build_tower, check_named_encoders
from mmclip.models.text_towers import build_text_encoder, forward_text
from mmclip.patches import gather_visible

__all__ = [
    "EncoderError",
    "ImageLayout",
    "LoadReport",
    "TextLayout",
    "as_pooled",
    "build_image_encoder",
    "build_text_encoder",
    "check_hides_pixels",
    "check_named_encoders",
    "encode_visible",
    "forward_text",
    "image_layout",
    "no_decay_names",
    "patch_grid",
    "pooled",
    "rebuild_encoder",
    "text_layout",
    "token_features",
]


def rebuild_encoder(config: dict[str, Any]) -> PreTrainedModel:
    """An encoder with fresh weights from its own configuration, as a checkpoint holds it."""
    encoder = build_tower(config)
    held = config.get(LAYOUT_KEY, {})
    if rgb := held.get("rgb"):
        repeat_channel(encoder, *rgb)
    adapt_batch_norm(encoder)
    stop_unused(encoder, tuple(held.get("unused", ())))
    return encoder


def check_hides_pixels(encoder: PreTrainedModel) -> None:
    """What masking the pixels of patches counts on.

    Raises:
        EncoderError: When the encoder is neither a ResNet nor a ViT of transformers, whose layers
            can be run apart.
    """
    if not isinstance(encoder, ResNetModel | ViTModel):
        raise EncoderError(
            f"image_mask.mask_stage='pixels' needs a ViTModel or a ResNetModel, not "
            f"{encoder.config.model_type!r}; set image_mask.mask_stage='features'"
        )


def encode_visible(
    encoder: PreTrainedModel,
    image: Float[Tensor, "b 1 h w"],
    is_masked: Bool[Tensor, "b n"],
    n_masked: int,
) -> Float[Tensor, "b v d"]:
    """Features of the visible patches of images of which the encoder sees nothing else.

    Args:
        encoder: Reads the class token and the visible patches.
        image: Whole images.
        is_masked: Masks `n_masked` patches in every image.
        n_masked: See `masking.masked_patch_count`.

    A ResNet reads the whole image with mid-grey in place of masked patches, and the features of
    those are left out. That is no masked autoencoder: its convolutions and batch statistics see the
    grey, too (SparK, arXiv:2301.03580, says how to leave it out).

    Raises:
        EncoderError: See `check_hides_pixels`.

    Source: MAE section 3 (arXiv:2111.06377).
    """
    check_hides_pixels(encoder)
    if isinstance(encoder, ResNetModel):
        with no_tracking(encoder):
            output = encoder(pixel_values=patch_grid(encoder).blanked(image, is_masked))
        return gather_visible(token_features(output)[:, 1:], is_masked, n_masked)
    assert isinstance(encoder, ViTModel)
    x = encoder.embeddings(image)
    x = torch.cat([x[:, :1], gather_visible(x[:, 1:], is_masked, n_masked)], 1)
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layernorm(x)[:, 1:]
