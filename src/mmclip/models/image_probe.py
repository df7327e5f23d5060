"""Where the patches of an image encoder are, and how it pools: a look at what it gives one
image."""

import math
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mmclip.config import Pooling
from mmclip.models.layout import (
    EncoderError,
    ImageLayout,
    Pooled,
    keep_layout,
    pooled,
    unused_parameters,
)
from mmclip.models.pretrained import FORWARD_FAULTS, TAKE_INSTEAD, first_line

PREFIXES = {"deit": (2,)}
"""Tokens in front of the patches, beside none and one, of models that do not say so: DeiT has a
class and a distillation token."""


def side_of(size: Any) -> int | None:
    """A side in pixels, which some configurations give twice; None where they say nothing."""
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None


def find_layout(
    encoder: PreTrainedModel,
    image_size: int,
    pooling: Pooling,
    rgb: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> ImageLayout:
    """Looks at what an encoder makes of one image, and keeps what it finds; see `keep_layout`.

    Args:
        encoder: Reads one-channel images of image_size.
        image_size: Side of the images.
        pooling: What is asked for.
        rgb: As `take_one_channel` gives it.

    Raises:
        EncoderError: When it gives no features of a grid of patches, or cannot pool so.
    """
    kind, was_training = encoder.config.model_type, encoder.training
    pixels = next(encoder.parameters()).new_zeros(1, 1, image_size, image_size)
    encoder.eval()
    try:
        output = encoder(pixel_values=pixels)
    except FORWARD_FAULTS as error:
        raise EncoderError(
            f"{kind!r} does not read an image of {image_size} x {image_size} px alone "
            f"({first_line(error)}); {TAKE_INSTEAD['image']}"
        ) from error
    layout = _layout_of(output, encoder, image_size, pooling, rgb)
    keep_layout(encoder, layout)
    vector = pooled(output, encoder)
    layout = replace(layout, unused=unused_parameters(vector, encoder))
    keep_layout(encoder, layout)
    encoder.train(was_training)
    return layout


def _layout_of(
    output: Any,
    encoder: PreTrainedModel,
    image_size: int,
    pooling: Pooling,
    rgb: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> ImageLayout:
    kind = encoder.config.model_type
    features = output.get("last_hidden_state") if isinstance(output, ModelOutput) else None
    if features is None or features.ndim not in (3, 4):
        raise EncoderError(
            f"{kind!r} gives no last_hidden_state of one feature per patch; {TAKE_INSTEAD['image']}"
        )
    if features.ndim == 4:
        n_prefix, (width, height, side) = 0, features.shape[1:]
        is_square = height == side
    else:
        n_tokens, width = features.shape[1:]
        n_prefix, side = _prefix_and_side(n_tokens, encoder, image_size)
        is_square = n_prefix in _prefixes(encoder)
    if not is_square or not side:
        raise EncoderError(
            f"{kind!r} gives features of shape {list(features.shape[1:])} for an image of "
            f"{image_size} x {image_size} px, and which of them are patches is not known; "
            f"{TAKE_INSTEAD['image']}"
        )
    if image_size % side or image_size // side * side != image_size:
        stride = 2 ** round(math.log2(image_size / side))
        raise EncoderError(
            f"data.image_size={image_size} is not a multiple of the {stride} px that a feature of "
            f"{kind!r} covers; {max(image_size // stride, 1) * stride} is"
        )
    layout = ImageLayout(width, image_size, image_size // side, n_prefix, "mean", rgb)
    return replace(layout, pooling=_choose(pooling, output, layout, kind))


def _prefix_and_side(n_tokens: int, encoder: PreTrainedModel, image_size: int) -> tuple[int, int]:
    """Tokens in front of the patches, and patches along a side: as far as a patch size says, or
    the largest square, where the encoder halves its grid on the way."""
    patch = side_of(vars(encoder.config).get("patch_size"))
    side = math.isqrt(n_tokens) if patch is None else image_size // patch
    if side**2 > n_tokens:
        side = math.isqrt(n_tokens)
    return n_tokens - side**2, side


def _prefixes(encoder: PreTrainedModel) -> set[int]:
    n_registers = vars(encoder.config).get("num_register_tokens") or 0
    return {0, 1, 1 + n_registers, *PREFIXES.get(encoder.config.model_type, ())}


def _choose(pooling: Pooling, output: Any, layout: ImageLayout, kind: str) -> Pooled:
    """How to pool: as it is asked for, or by the pooler, the class token or the mean."""
    vector = output.get("pooler_output")
    has_pooler = vector is not None and vector.flatten(1).shape[1] == layout.width
    if pooling == "auto":
        return "pooler" if has_pooler else "cls" if layout.n_prefix else "mean"
    if pooling == "pooler" and not has_pooler:
        instead = "'cls' or 'mean'" if layout.n_prefix else "'mean'"
        raise EncoderError(
            f"model.image.pooling='pooler', and {kind!r} has no pooler of the width of its "
            f"features; set it to {instead}"
        )
    if pooling == "cls" and not layout.n_prefix:
        instead = "'pooler' or 'mean'" if has_pooler else "'mean'"
        raise EncoderError(
            f"model.image.pooling='cls', and {kind!r} has no class token; set it to {instead}"
        )
    return pooling
