"""Where in an image a dual encoder of transformers answers: each patch in the joint space.

A patch is pooled alone as the whole image is, and projected: through the last layer norm of CLIP,
the attention pooling of SigLIP, the pooler of a ViT. Source: ours, in the way of dense CLIP (Zhou
et al., MaskCLIP, arXiv:2112.01071), which applies CLIP's own head to every place.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmclip.config import ResizeMode
from mmclip.models.hub_encoder import HubEncoder
from mmclip.patches import Grid


class PatchEmbeddings(NamedTuple):
    """The patches of one image, normalised, in reading order, and how they lie on it."""

    patches: Float[Tensor, "n e"]
    grid: Grid


@torch.inference_mode()
def patch_embeddings(encoder: HubEncoder, image: Mapping[str, np.ndarray]) -> PatchEmbeddings:
    """Each patch of a prepared image in the joint space.

    Raises:
        ValueError: When the model has no patch tokens, or its image processor does not scale and
            crop in a way that a map can be laid on.
    """
    config = encoder.model.config.to_dict()["vision_config"]
    patch_size, side_px = config.get("patch_size"), image["pixel_values"].shape[-1]
    if not isinstance(patch_size, int) or image["pixel_values"].ndim != 3:
        raise ValueError(
            f"{encoder.name} gives no saliency maps: it is a {config['model_type']!r} without one "
            f"patch token for each place of a square image"
        )
    pixels = torch.from_numpy(image["pixel_values"])[None].to(encoder.device)
    whole: Any = encoder.model
    output = whole.vision_model(pixel_values=pixels)
    tokens, side = output.last_hidden_state, side_px // patch_size
    is_known = tokens.ndim == 3 and tokens.shape[1] >= side**2
    # Pooled in the way that is known here, the whole image must be what the model makes of it.
    if not is_known or not torch.allclose(
        _pooled(whole.vision_model, tokens), output.pooler_output, atol=1e-4
    ):
        raise ValueError(
            f"{encoder.name} gives no saliency maps: how its {config['model_type']!r} pools patch "
            f"tokens is not known"
        )
    alone = _pooled(whole.vision_model, tokens[0, -(side**2) :, None])
    project = dict(whole.named_children()).get("visual_projection", nn.Identity())
    patches = F.normalize(project(alone).float(), dim=-1).cpu()
    return PatchEmbeddings(patches, Grid(side, patch_size, side_px, _resize_of(encoder)))


def _pooled(vision: nn.Module, tokens: Float[Tensor, "n t d"]) -> Float[Tensor, "n d"]:
    """The tokens of images pooled as the model does, by the parts that it has."""
    parts = dict(vision.named_children())
    if "head" in parts:  # SigLIP: attention over the tokens, behind the layer norm
        return parts["head"](tokens)
    if "pooler" in parts:  # ViT and the like
        return parts["pooler"](tokens)
    if "post_layernorm" in parts and "pre_layrnorm" in parts:  # CLIP norms the class token alone
        return parts["post_layernorm"](tokens[:, 0])
    return tokens[:, 0]  # DINOv2 and the like, whose tokens have the layer norm behind them


def _resize_of(encoder: HubEncoder) -> ResizeMode:
    """How the image processor makes a square of an image.

    Raises:
        ValueError: When a map cannot be laid on the image.
    """
    config = encoder.prepare.processor.to_dict()
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    is_cropped = bool(config.get("do_center_crop")) and crop.get("height") == crop.get("width")
    if config.get("do_resize") and not config.get("do_center_crop") and size.get("height"):
        return "squash"
    if config.get("do_resize") and is_cropped and size.get("shortest_edge") == crop.get("height"):
        return "crop"
    raise ValueError(
        f"{encoder.name} gives no saliency maps: its image processor, "
        f"{encoder.processor_said}, neither scales to a square nor crops the middle of the shorter "
        f"side"
    )
