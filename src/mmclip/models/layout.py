"""What an encoder's output holds: where its patches or words lie, and what of it is pooled.

An encoder of transformers says this of itself nowhere, so it is found once, by a look at one
output, and kept in the encoder's own configuration, which a checkpoint saves and rebuilds from. An
encoder without such an entry is one that is built here with its defaults: a ViT, a ResNet or a
BERT, whose pooler pools.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmclip.patches import PatchGrid

LAYOUT_KEY = "mmclip_layout"
"""The entry of an encoder's configuration."""

Pooled = Literal["cls", "mean", "pooler"]
"""How features become one vector: the first token, the mean over patches or valid tokens, or the
encoder's own pooled output."""

CORNER_STRIDES = ("resnet", "regnet")
"""Models whose strided convolutions are centred on the first pixel; see `patches.PatchGrid`."""


POOLED_NORM = {
    "clip_vision_model": "post_layernorm",
    "convnext": "layernorm",
    "convnextv2": "layernorm",
}
"""Models whose pooled output passes a norm that their features do not, by its name."""


class EncoderError(ValueError):
    """Weights or a configuration that cannot serve as an encoder here; names the next step."""


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """The output of an image encoder for images of one size.

    Attributes:
        width: Of a feature, and of the pooled vector.
        image_size: Side of the images.
        patch_size: Side of the part of an image that a feature is of.
        n_prefix: Tokens in front of the patches: class, distillation and register tokens.
        pooling: What `pooled` gives.
        rgb: Mean and deviation of each of three channels, where the first convolution still has
            three, see `image_towers.GreyConv2d`; None where it has one.
        unused: Parameters that the pooled vector does not depend on; they take no gradient.
    """

    width: int
    image_size: int
    patch_size: int
    n_prefix: int = 1
    pooling: Pooled = "pooler"
    rgb: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextLayout:
    """The output of a text encoder.

    Attributes:
        width: Of a feature, and of the pooled vector.
        pooling: What `pooled` gives.
        reads: Tokens that every text is padded to, without a mask, as SigLIP was trained; None
            where padding is masked.
        pad_id: The padding token.
        unused: As in `ImageLayout`.
    """

    width: int
    pooling: Pooled = "pooler"
    reads: int | None = None
    pad_id: int = 0
    unused: tuple[str, ...] = ()


def keep_layout(encoder: PreTrainedModel, layout: ImageLayout | TextLayout) -> None:
    """Writes a layout into an encoder's configuration, and stops the gradient of what is unused."""
    encoder.config.update({LAYOUT_KEY: asdict(layout)})
    stop_unused(encoder, layout.unused)


def stop_unused(encoder: PreTrainedModel, unused: tuple[str, ...]) -> None:
    """Turns off the gradient of parameters: processes that train together wait for each one."""
    for name in unused:
        encoder.get_parameter(name).requires_grad_(False)


def image_layout(encoder: PreTrainedModel) -> ImageLayout:
    """The layout of an image encoder of this package."""
    config = encoder.config
    held = vars(config).get(LAYOUT_KEY)
    if held is None:
        return ImageLayout(config.hidden_size, config.image_size, config.patch_size)
    rgb = held["rgb"]
    tuples = {
        "rgb": None if rgb is None else (tuple(rgb[0]), tuple(rgb[1])),
        "unused": tuple(held["unused"]),
    }
    return ImageLayout(**{**held, **tuples})


def text_layout(encoder: PreTrainedModel) -> TextLayout:
    """The layout of a text encoder of this package."""
    held = vars(encoder.config).get(LAYOUT_KEY)
    if held is None:
        return TextLayout(encoder.config.hidden_size)
    return TextLayout(**{**held, "unused": tuple(held["unused"])})


def image_features(output: Any, layout: ImageLayout) -> Float[Tensor, "b n d"]:
    """The features of the patches, in reading order and as the encoder gives them."""
    features = output.last_hidden_state
    if features.ndim == 4:
        return features.flatten(2).mT
    return features[:, layout.n_prefix :]


def pooled(
    output: Any, encoder: PreTrainedModel, is_valid: Bool[Tensor, "b t"] | None = None
) -> Tensor:
    """The pooled output [b, d], which the projection reads.

    Args:
        output: Of the encoder.
        encoder: Says how it pools; see `ImageLayout` and `TextLayout`.
        is_valid: False on padding of texts; None for images.

    Raises:
        EncoderError: When the encoder pools nothing.
    """
    layout = image_layout(encoder) if is_valid is None else text_layout(encoder)
    if layout.pooling == "cls":
        return output.last_hidden_state[:, 0]
    if layout.pooling == "mean":
        if isinstance(layout, ImageLayout):
            return image_features(output, layout).mean(1)
        assert is_valid is not None
        weight = is_valid.to(output.last_hidden_state.dtype)[..., None]
        return (output.last_hidden_state * weight).sum(1) / weight.sum(1).clamp(min=1)
    value = getattr(output, "pooler_output", None)
    if value is None:
        raise EncoderError(
            f"{encoder.config.model_type!r} gives no pooler_output; take a ViT- or BERT-like "
            f"encoder with a pooling layer, or pooling='cls' or 'mean'"
        )
    return value.flatten(1)


def as_pooled(
    features: Float[Tensor, "b n d"], encoder: PreTrainedModel, of_text: bool = False
) -> Float[Tensor, "b n d"]:
    """Features after what stands between them and the projection, token by token.

    The projection is trained on the pooled vector, which has passed a pooler's layer or a norm; a
    score that compares single tokens with embeddings reads them after the same. A token is given to
    the pooler as if the whole sequence were it, so that a mean and an attention change nothing.

    Args:
        features: Of patches or words, as the encoder gives them.
        encoder: Says how it pools; see `pooled`.
        of_text: Whether it reads texts.

    Source: ours; for attention pooling as in MaskCLIP (arXiv:2112.01071).
    """
    layout = text_layout(encoder) if of_text else image_layout(encoder)
    if layout.pooling != "pooler":
        return features
    parts = dict(encoder.named_children())
    norm = parts.get(POOLED_NORM.get(encoder.config.model_type, ""))
    if norm is not None:
        return norm(features)
    layer = parts.get("head", parts.get("pooler"))
    if layer is None or not any(True for _ in layer.parameters()):
        return features
    alone = features.flatten(0, 1)[:, None].expand(-1, 2, -1)
    found = layer(alone)
    return (found if found.ndim == 2 else found[:, 0]).unflatten(0, features.shape[:2])


def token_features(output: Any, encoder: PreTrainedModel | None = None) -> Float[Tensor, "b n d"]:
    """The features of an image encoder's output: the image's own first, then one a patch.

    The image's own is the class token; an encoder without one gives its pooled vector there. What
    else stands before the patches, as register tokens, is left out. Nothing mixes the features, so
    that a masked one is gone; `patch_grid` says where they lie.

    Args:
        output: Of the encoder.
        encoder: Says where its patches lie; None is a ViT or a ResNet that is built here.
    """
    features = output.last_hidden_state
    layout = None if encoder is None else image_layout(encoder)
    if features.ndim == 3:
        if layout is None or layout.n_prefix == 1:
            return features
        patches = features[:, layout.n_prefix :]
        own = pooled(output, encoder) if layout.n_prefix == 0 and encoder else features[:, 0]
        return torch.cat([own[:, None], patches], 1)
    own = output.pooler_output.flatten(1) if encoder is None else pooled(output, encoder)
    return torch.cat([own[:, None], features.flatten(2).mT], 1)


def patch_grid(encoder: PreTrainedModel) -> PatchGrid:
    """Where the features of an image encoder lie on its images."""
    patch_size = image_layout(encoder).patch_size
    return PatchGrid(
        patch_size, patch_size // 2 if encoder.config.model_type in CORNER_STRIDES else 0
    )


def no_decay_names(model: nn.Module) -> set[str]:
    """Parameters that weight decay would pull away from where they mean something.

    Biases and norms (one-dimensional), a temperature, class token and position tables.
    Source: usual practice of ViT and BERT training (timm's `no_weight_decay`).
    """
    tables = (
        "position_embedding",
        "cls_token",
        "token_type_embedding",
        "register_tokens",
        "relative_position_bias",
    )
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim <= 1 or any(table in name for table in tables)
    }


def unused_parameters(vector: Tensor, encoder: PreTrainedModel) -> tuple[str, ...]:
    """The names of the trainable parameters that a pooled vector [b, d] does not depend on.

    Several processes would wait for their gradients for ever, so they do not train.
    """
    named = [(n, p) for n, p in encoder.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(vector.sum(), [p for _, p in named], allow_unused=True)
    return tuple(n for (n, _), grad in zip(named, grads, strict=True) if grad is None)
