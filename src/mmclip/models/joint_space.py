"""Projections and temperature of a dual encoder that others trained, or that a run was exported to.

VisionTextDualEncoderModel and CLIP project each pooled vector by a matrix, as a run does. SigLIP's
pooled vectors are its embeddings: there the matrix is the identity, and a bias stands beside the
temperature.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedConfig,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from mmclip.models.layout import EncoderError, Pooled, image_layout, text_layout
from mmclip.models.mmclip import MMCLIP
from mmclip.models.pretrained import (
    LOAD_FAULTS,
    cannot_load,
    first_line,
    is_checkpoint,
    quiet_loading,
    read_config,
)

TAKES = (
    "a run, a VisionTextDualEncoderModel (`mmclip export --to hf`), a CLIPModel or a SiglipModel"
)


@dataclass(frozen=True)
class JointSpace:
    """What stands between two encoders.

    Attributes:
        visual: From the pooled vector of an image to its embedding, before it is normalised.
        text: Likewise of a text.
        logit_scale: The logarithm of the inverse temperature.
        logit_bias: Of SigLIP's loss; None of others.
        pools: How the vectors of an image and of a text were pooled.
    """

    visual: Float[Tensor, "e v"]
    text: Float[Tensor, "e t"]
    logit_scale: float
    logit_bias: float | None = None
    pools: tuple[Pooled, Pooled] = ("pooler", "pooler")


def embed_dim_of(name: str) -> int:
    """The width of the joint space of a dual encoder, from its configuration alone.

    Raises:
        EncoderError: When it cannot be had, or is none.
    """
    config = read_config(name)
    if isinstance(config, CLIPConfig | VisionTextDualEncoderConfig):
        assert config.projection_dim is not None
        return config.projection_dim
    if isinstance(config, SiglipConfig):
        vision = config.vision_config
        assert isinstance(vision, PreTrainedConfig)
        return vision.hidden_size
    raise EncoderError(
        f"{name} is a {config.model_type!r} model, which has no joint space of images and texts; "
        f"give {TAKES}, or name one encoder by model.image.pretrained or model.text.pretrained"
    )


def read_joint_space(name: str) -> JointSpace:
    """The joint space of a dual encoder, from a folder or the hub.

    Raises:
        EncoderError: When it cannot be had, or is none.
    """
    embed_dim_of(name)
    try:
        with quiet_loading():
            if is_checkpoint(name):
                config = read_config(name)
                whole = VisionTextDualEncoderModel.from_pretrained(name, config=config)
            else:
                whole = AutoModel.from_pretrained(name, trust_remote_code=False)
    except LOAD_FAULTS as error:
        raise cannot_load(name, first_line(error)) from error
    with torch.no_grad():
        if isinstance(whole, SiglipModel):
            identity = torch.eye(embed_dim_of(name))
            scale, bias = whole.logit_scale.item(), whole.logit_bias.item()
            return JointSpace(identity, identity, scale, bias)
        assert isinstance(whole, CLIPModel | VisionTextDualEncoderModel)
        found = JointSpace(
            whole.visual_projection.weight.clone(),
            whole.text_projection.weight.clone(),
            whole.logit_scale.item(),
        )
        if not is_checkpoint(name):
            return found
        bias, pools = _held_by_checkpoint(Path(name), whole)
        return replace(found, logit_bias=bias, pools=pools)


def _held_by_checkpoint(
    folder: Path, whole: CLIPModel | VisionTextDualEncoderModel
) -> tuple[float | None, tuple[Pooled, Pooled]]:
    """What only a run has: the bias of a sigmoid loss, and poolings other than transformers'."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        has_one = "logit_bias" in file.keys()  # noqa: SIM118 - it is no dictionary
        bias = float(file.get_tensor("logit_bias")) if has_one else None
    encoders: tuple[Any, Any] = whole.vision_model, whole.text_model
    return bias, (image_layout(encoders[0]).pooling, text_layout(encoders[1]).pooling)


def start_from(model: MMCLIP, space: JointSpace, name: str) -> None:
    """Gives a new model the projections and the temperature of a joint space.

    Raises:
        EncoderError: When they are of another width, read another pooled vector, or the
            temperature is beyond the model's limit.
    """
    layouts = image_layout(model.vision_model), text_layout(model.text_model)
    parts = (
        ("image", model.visual_projection, space.visual, layouts[0], space.pools[0]),
        ("text", model.text_projection, space.text, layouts[1], space.pools[1]),
    )
    for modality, own, theirs, layout, pools in parts:
        embed_dim, width = theirs.shape
        if width != layout.width:
            raise EncoderError(
                f"model.projections={name} reads {modality} vectors of {width}, and the {modality} "
                f"encoder gives {layout.width}; take the encoder from there too, by "
                f"model.{modality}.pretrained"
            )
        if embed_dim != own.out_features:
            raise EncoderError(
                f"model.embed_dim={own.out_features}, and {name} has a joint space of {embed_dim}; "
                f"set model.embed_dim={embed_dim}"
            )
        if layout.pooling != pools:
            raise EncoderError(
                f"model.{modality}.pooling gives {layout.pooling!r}, and the projections of {name} "
                f"read {pools!r}; set it to {pools!r}" + " or 'auto'" * (pools == "pooler")
            )
        with torch.no_grad():
            own.weight.copy_(theirs)
    if math.exp(space.logit_scale) > model.max_logit_scale * (1 + 1e-4):
        raise EncoderError(
            f"model.max_logit_scale={model.max_logit_scale:g}, and {name} has a scale of "
            f"{math.exp(space.logit_scale):.5g}; set model.max_logit_scale to that or more"
        )
    with torch.no_grad():
        model.logit_scale.fill_(space.logit_scale)
        if model.logit_bias is not None and space.logit_bias is not None:
            model.logit_bias.fill_(space.logit_bias)
