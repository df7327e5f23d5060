"""A run as plain modules of transformers that read three channels, as their image processors give.

A model of this package reads one grey channel. Here its first convolution is unfolded to three, so
that it reads the grey image repeated as it read the grey image, to rounding, and a colour image as
its luminance.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ViTModel
from transformers.models.vit.modeling_vit import ViTPooler

from mmclip.checkpoint import Checkpoint
from mmclip.config import GREY_MEAN, GREY_STD, DataConfig
from mmclip.models.encoders import forward_text, image_layout, pooled, text_layout
from mmclip.models.image_towers import patch_projection, put_projection
from mmclip.models.layout import LAYOUT_KEY
from mmclip.models.mmclip import MMCLIP

LUMINANCE = (19595 / 65536, 38470 / 65536, 7471 / 65536)
"""The share of red, green and blue in a grey value. Source: Pillow's convert("L"), by which
`data.images` reads colour; ITU-R 601-2."""

PROBES = ("No acute disease.", "Large left pleural effusion with an enlarged heart.")
"""Texts that an export and we both encode, to compare."""


@dataclass(frozen=True)
class Plain:
    """A run that reads three channels.

    Attributes:
        model: In evaluation mode, on the CPU, float32; its encoders are plain modules.
        mean: Of each channel, in 0..1.
        std: Of each channel.
        tokenizer: Of the text encoder; cuts at the run's `data.max_tokens`.
        data: What the run reads.
    """

    model: MMCLIP
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: PreTrainedTokenizerFast
    data: DataConfig

    def as_rgb(self, image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Images in model space as the pixel_values that the image processor gives."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (image * GREY_STD + GREY_MEAN - mean) / std


def plain_model(checkpoint: Checkpoint) -> Plain:
    """Unfolds a checkpoint; the checkpoint's own model stays as it is."""
    model = copy.deepcopy(checkpoint.model).float().cpu().eval()
    mean, std = take_three_channels(model.vision_model)
    _pool_by_pooler(model.vision_model)
    tokenizer = copy.deepcopy(checkpoint.tokenizer)
    tokenizer.model_max_length = checkpoint.config.data.max_tokens
    tokenizer.padding_side = "right"
    with torch.no_grad():  # the clamp is ours; transformers takes the exponential as it is
        model.logit_scale.copy_(model.scale().log())
    return Plain(model, mean, std, tokenizer, checkpoint.config.data)


def take_three_channels(encoder: PreTrainedModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Makes an encoder of this package read three channels; the inverse of `take_one_channel`.

    With w the weights of one channel and l_c the luminance shares, which add to 1, w_c = l_c w
    gives sum_c w_c z = w z for equal channels z: exact whatever the padding. A `GreyConv2d` has
    three channels already, and gives its normalisation up to the image processor.

    Returns:
        Mean and deviation of the channels, as an image processor has them.
    """
    layout = image_layout(encoder)
    old = patch_projection(encoder)
    kernel, stride, padding = (
        (size[0], size[1]) if not isinstance(size, str) else size
        for size in (old.kernel_size, old.stride, old.padding)
    )
    new = nn.Conv2d(3, old.out_channels, kernel, stride, padding, bias=old.bias is not None)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        if layout.rgb is None:
            shares = torch.tensor(LUMINANCE, dtype=torch.float64).view(1, 3, 1, 1)
            new.weight.copy_(old.weight.double() * shares)
        else:
            new.weight.copy_(old.weight)
        if old.bias is not None:
            assert new.bias is not None
            new.bias.copy_(old.bias)
    put_projection(encoder, old, new, n_channels=3)
    encoder.config.num_channels = 3
    return layout.rgb or ((GREY_MEAN,) * 3, (GREY_STD,) * 3)


def _pool_by_pooler(encoder: PreTrainedModel) -> None:
    """Gives a ViT that pools its class token a pooler that gives it on: linear, the identity."""
    if image_layout(encoder).pooling == "cls" and isinstance(encoder, ViTModel):
        encoder.config.pooler_act = "linear"
        pooler = ViTPooler(encoder.config)
        with torch.no_grad():
            pooler.dense.weight.copy_(torch.eye(encoder.config.hidden_size))
            pooler.dense.bias.zero_()
        encoder.pooler = pooler


def plain_config(encoder: PreTrainedModel) -> dict[str, Any]:
    """An encoder's configuration without what is ours, or of the machine that it came from.

    With a `hidden_size`, which VisionTextDualEncoderModel asks of every encoder and a ConvNeXt says
    by stages.
    """
    values = encoder.config.to_dict()
    for ours in (LAYOUT_KEY, "_name_or_path", "transformers_version"):
        values.pop(ours, None)
    if encoder.main_input_name == "pixel_values":
        values.setdefault("hidden_size", image_layout(encoder).width)
    return values


def processor_config(plain: Plain) -> dict[str, Any]:
    """preprocessor_config.json: how transformers makes pixel_values of an image file.

    "squash" is done exactly as `data.images.resize_image` does it. "crop" is done by scaling first
    and cutting then, which differs by rounding. "pad" has no image processor: an image that is a
    square already is read right.
    """
    side = plain.data.image_size
    size = {"height": side, "width": side}
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(plain.mean),
        "image_std": list(plain.std),
        "resample": 2,  # PIL.Image.Resampling.BILINEAR
        "rescale_factor": 1 / 255,
    }
    if plain.data.resize == "crop":
        cut = {"do_center_crop": True, "crop_size": size, "size": {"shortest_edge": side}}
        return {**common, **cut, "image_processor_type": "CLIPImageProcessor"}
    return {**common, "size": size, "image_processor_type": "ViTImageProcessor"}


def facts_of(plain: Plain) -> dict[str, Any]:
    """What stands in no file of transformers: how encoders pool, and the scale of similarities."""
    model = plain.model
    return {
        "image_pooling": image_layout(model.vision_model).pooling,
        "text_pooling": text_layout(model.text_model).pooling,
        "logit_scale": model.scale().item(),
        "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
        "resize": plain.data.resize,
        "image_size": plain.data.image_size,
        "max_tokens": plain.data.max_tokens,
    }


def probe_inputs(plain: Plain) -> tuple[Float[Tensor, "b 3 h w"], dict[str, Tensor]]:
    """Two images of noise and two texts, as transformers prepares them."""
    side = plain.data.image_size
    noise = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    images = plain.as_rgb((noise - GREY_MEAN) / GREY_STD)
    texts = plain.tokenizer(list(PROBES), padding=True, truncation=True, return_tensors="pt")
    return images, dict(texts)


def embed_pixels(plain: Plain, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
    """Our embeddings of images that an image processor prepared."""
    model = plain.model
    output = model.vision_model(pixel_values=images)
    projected = model.visual_projection(pooled(output, model.vision_model))
    return F.normalize(projected, dim=-1)


def embed_tokens(
    plain: Plain, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"]
) -> Float[Tensor, "b e"]:
    """Our embeddings of texts that a tokenizer prepared."""
    model, is_valid = plain.model, attention_mask.bool()
    output = forward_text(model.text_model, input_ids, is_valid)
    projected = model.text_projection(pooled(output, model.text_model, is_valid))
    return F.normalize(projected, dim=-1)


def encoder_alone(plain: Plain, modality: str) -> PreTrainedModel:
    """One encoder as transformers saves it, without what is ours in its configuration."""
    model = plain.model
    encoder = copy.deepcopy(model.vision_model if modality == "vision" else model.text_model)
    for ours in (LAYOUT_KEY, "_name_or_path"):
        vars(encoder.config).pop(ours, None)
    return encoder


def clean_tokenizer_config(path: Path) -> None:
    """Drops what tokenizer_config.json keeps of the folder that a tokenizer was read from."""
    values = json.loads(path.read_text("utf-8"))
    for key in ("name_or_path", "tokenizer_file", "is_local", "local_files_only"):
        values.pop(key, None)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
