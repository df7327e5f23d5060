"""Image and text encoders over transformers: from sizes, from a folder, or from the hub.

Both encoders give `last_hidden_state` and `pooler_output`, which is what transformers'
VisionTextDualEncoderModel reads, so that a trained pair can be exported without a change; but a
ResNet's pooled output must be flattened there as it is here, see `adapt_resnet`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from mmclip.config import GREY_MEAN, GREY_STD, ImageEncoderConfig, TextEncoderConfig
from mmclip.hub import why_unavailable
from mmclip.models.norm import globalise_batch_norm, no_tracking
from mmclip.patches import gather_visible, patchify, unpatchify

logger = logging.getLogger(__name__)

RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The normalisation of a pretrained three-channel encoder whose folder has no
preprocessor_config.json. Source: ImageNet, as in torchvision's and timm's weights."""


class EncoderError(ValueError):
    """Weights or a configuration that cannot serve as an encoder here; names the next step."""


@dataclass(frozen=True)
class LoadReport:
    """What became of pretrained weights: nothing is loaded or left out in silence."""

    name: str
    missing: tuple[str, ...]  # parameters of the model that the file lacks: newly initialised
    unexpected: tuple[str, ...]  # weights of the file that the model has no place for
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        def listed(names: tuple[str, ...]) -> str:
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            return f"{len(names)} ({shown})" if names else "0"

        return (
            f"{self.name}: missing and newly initialised {listed(self.missing)}; "
            f"not used {listed(self.unexpected)}; other shape {listed(self.mismatched)}"
        )


def build_image_encoder(config: ImageEncoderConfig, image_size: int) -> PreTrainedModel:
    """An image encoder for one-channel images of image_size x image_size.

    A pretrained encoder keeps its weights: a three-channel patch projection is folded into one
    channel (the same output as for the image repeated three times, at a third of the work), and
    the position grid is resampled to the image's size.

    A new ViT starts with weights of deviation 1 / sqrt(width), where transformers' 0.02, meant for
    768 wide layers, shrinks every layer of a narrow one; and its pooler has no tanh, which
    saturates. Both shorten the time in which all embeddings are alike. [docs/log.md, "init"]
    A new ResNet has basic blocks and one stage for each halving of the image after the second.

    Raises:
        EncoderError: When the weights cannot be found, are no ViT-like encoder, or image_size is
            not a multiple of its patch size.
    """
    if config.pretrained is None:
        return (
            _new_resnet(config, image_size)
            if config.kind == "resnet"
            else _new_vit(config, image_size)
        )
    encoder = _load_pretrained(config.pretrained)
    if not hasattr(encoder.config, "patch_size"):
        raise EncoderError(
            f"{config.pretrained} is a {encoder.config.model_type!r} model without patches; "
            f"model.image.pretrained takes a vision transformer"
        )
    fold_to_one_channel(encoder, *_normalisation_of(config.pretrained))
    resize_position_grid(encoder, image_size)
    return encoder


def _new_vit(config: ImageEncoderConfig, image_size: int) -> ViTModel:
    # BERT's and ViT's 0.02 is about width**-0.5 at their widths. In a narrow encoder it hides
    # the input from the class token: all embeddings are alike and training does not begin.
    vit = ViTConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        image_size=image_size,
        patch_size=config.patch_size,
        num_channels=1,
        initializer_range=config.width**-0.5,
        pooler_act="linear",
    )
    return ViTModel(vit, add_pooling_layer=True)


def _new_resnet(config: ImageEncoderConfig, image_size: int) -> ResNetModel:
    halvings = (config.patch_size // 4).bit_length() - 1  # after the two of the stem
    widths = [config.width >> i for i in range(halvings, -1, -1)]
    resnet = ResNetConfig(
        num_channels=1,
        embedding_size=widths[0],
        hidden_sizes=widths,
        depths=[config.depth] * len(widths),
        layer_type="basic",
        downsample_in_first_stage=False,
    )
    # What a ViT's configuration says of its features, under the same names.
    resnet.update(
        {"hidden_size": config.width, "image_size": image_size, "patch_size": config.patch_size}
    )
    encoder = ResNetModel(resnet)
    adapt_resnet(encoder)
    return encoder


def adapt_resnet(encoder: ResNetModel) -> None:
    """Makes a ResNet pool to [b, d], normalise over the rows of all processes, and keep channels
    last in memory, which its convolutions are a quarter faster on.

    None of these adds or renames a weight. VisionTextDualEncoderModel reads the weights once its
    `vision_model.pooler` is replaced as here.
    """
    globalise_batch_norm(encoder)
    encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    setattr(encoder, "pooler", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))  # noqa: B010


def build_text_encoder(
    config: TextEncoderConfig, vocab_size: int, max_tokens: int, pad_token_id: int
) -> PreTrainedModel:
    """A text encoder for `vocab_size` token ids and up to `max_tokens` tokens.

    Dropout is 0: every random draw of a run is keyed by image, and dropout's cannot be.

    Raises:
        EncoderError: When pretrained weights cannot be found or do not fit the tokenizer.
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
        return BertModel(bert, add_pooling_layer=True)
    encoder = _load_pretrained(config.pretrained)
    if encoder.config.vocab_size < vocab_size:
        raise EncoderError(
            f"{config.pretrained} knows {encoder.config.vocab_size} tokens, its tokenizer has "
            f"{vocab_size}; take both from the same folder"
        )
    if encoder.config.max_position_embeddings < max_tokens:
        raise EncoderError(
            f"{config.pretrained} reads at most {encoder.config.max_position_embeddings} tokens; "
            f"set data.max_tokens to that or less (it is {max_tokens})"
        )
    return encoder


def rebuild_encoder(config: dict[str, Any]) -> PreTrainedModel:
    """An encoder with fresh weights from its own configuration, as a checkpoint holds it."""
    encoder = AutoModel.from_config(AutoConfig.for_model(**config))
    if isinstance(encoder, ResNetModel):
        adapt_resnet(encoder)
    return encoder


def _load_pretrained(name: str) -> PreTrainedModel:
    remedy = (
        "give a folder with config.json and model.safetensors (or pytorch_model.bin), or the id of "
        "a model on the hub"
    )
    if reason := why_unavailable(name):
        raise EncoderError(f"cannot load {name!r} ({reason}); {remedy}")
    # A pytorch_model.bin is read by torch.load(weights_only=True): it cannot run code.
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if hasattr(config, key):
                setattr(config, key, 0.0)
        encoder, info = AutoModel.from_pretrained(
            name, config=config, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise EncoderError(f"cannot load {name!r} ({first}); {remedy}") from error
    report = LoadReport(
        name=name,
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
        mismatched=tuple(sorted(str(m) for m in info["mismatched_keys"])),
    )
    logger.info("%s", report)
    return encoder


def check_patches(encoder: PreTrainedModel) -> None:
    """What decoders and relevance scores count on: a class token, then one feature per patch.

    Raises:
        EncoderError: When an encoder of one-channel images gives others, as one with register or
            distillation tokens and one that halves its grid on the way do.
    """
    side = encoder.config.image_size // encoder.config.patch_size
    weight = next(encoder.parameters())
    image = weight.new_zeros(1, 1, encoder.config.image_size, encoder.config.image_size)
    was_training = encoder.training
    with torch.no_grad():
        found = token_features(encoder.eval()(pixel_values=image)).shape[1]
    encoder.train(was_training)
    if found != 1 + side**2:
        raise EncoderError(
            f"{encoder.config.model_type!r} gives {found} features for an image of {side} x {side} "
            f"patches, where AttMIM and EntMLM read 1 + {side**2}: a class token, then the "
            f"patches; take a plain ViT, or train without them by loss.image=0 and loss.text=0"
        )


def patch_projection(encoder: PreTrainedModel) -> nn.Conv2d:
    """The convolution that turns pixels into patch features.

    Raises:
        EncoderError: When the encoder has none.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise EncoderError(f"{encoder.config.model_type!r} has no patch projection")


def _normalisation_of(name: str) -> tuple[Sequence[float], Sequence[float]]:
    try:
        facts, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        logger.info("%s has no preprocessor_config.json; taking ImageNet's normalisation", name)
        return RGB_MEAN, RGB_STD
    return facts.get("image_mean", RGB_MEAN), facts.get("image_std", RGB_STD)


def fold_to_one_channel(
    encoder: PreTrainedModel,
    rgb_mean: Sequence[float] = RGB_MEAN,
    rgb_std: Sequence[float] = RGB_STD,
) -> None:
    """Makes a three-channel encoder take one channel, normalised by GREY_MEAN and GREY_STD.

    With x the image in 0..1, channel c of the old input is (x - m_c) / s_c, and x = g z + m for the
    new input z. So w' = g sum_c w_c / s_c, and the bias takes up sum_c w_c (m - m_c) / s_c over
    the kernel: exact everywhere, as patches do not overlap and are not padded.
    """
    old = patch_projection(encoder)
    if old.in_channels == 1:
        return
    if old.in_channels != 3:
        raise EncoderError(f"an encoder of {old.in_channels} channels; only 1 and 3 are supported")
    # pyright: ignore[reportArgumentType]
    new = nn.Conv2d(1, old.out_channels, old.kernel_size, old.stride)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (rgb_mean, rgb_std))
    with torch.no_grad():
        weight = old.weight / std
        new.weight.copy_(GREY_STD * weight.sum(1, keepdim=True))
        shift = (weight * (GREY_MEAN - mean)).sum((1, 2, 3))
        assert new.bias is not None
        new.bias.copy_(shift if old.bias is None else old.bias + shift)
    for parent in encoder.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
        if not isinstance(parent, nn.Conv2d) and getattr(parent, "num_channels", None) == 3:
            parent.num_channels = 1  # pyright: ignore[reportArgumentType]
    encoder.config.num_channels = 1


def resize_position_grid(encoder: PreTrainedModel, image_size: int) -> None:
    """Resamples the learned position grid of a ViT-like encoder to images of image_size.

    Bicubic over the square grid; class and register tokens in front of it keep theirs.

    Raises:
        EncoderError: When image_size is not a multiple of the patch size, or the encoder keeps its
            positions in another way than a table of [1, tokens, width].
    """
    patch = encoder.config.patch_size
    if image_size % patch:
        raise EncoderError(
            f"data.image_size={image_size} is not a multiple of the encoder's patch size {patch}; "
            f"{max(image_size // patch, 1) * patch} is"
        )
    if encoder.config.image_size == image_size:
        return
    embeddings: Any = getattr(encoder, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Parameter):
        raise EncoderError(
            f"the position grid of {encoder.config.model_type!r} cannot be resized; build the "
            f"images at its own size, {encoder.config.image_size} px"
        )
    old_side, side = encoder.config.image_size // patch, image_size // patch
    n_prefix = table.shape[1] - old_side**2
    prefix, grid = table[:, :n_prefix], table[:, n_prefix:]
    grid = grid.reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)  # 1 d h w
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, side**2, -1)
    embeddings.position_embeddings = nn.Parameter(torch.cat([prefix, grid], 1).detach())
    for module in (embeddings, embeddings.patch_embeddings):
        module.image_size = (image_size, image_size)
    embeddings.patch_embeddings.num_patches = side**2
    encoder.config.image_size = image_size


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
    those are left out.

    Raises:
        EncoderError: When the encoder is neither a ResNet nor a ViT of transformers, whose layers
            can be run apart.

    Source: MAE section 3 (arXiv:2111.06377).
    """
    if isinstance(encoder, ResNetModel):
        patches = patchify(image, encoder.config.patch_size).masked_fill(is_masked[..., None], 0.0)
        with no_tracking(encoder):
            output = encoder(pixel_values=unpatchify(patches, image.shape[-1]))
        return gather_visible(token_features(output)[:, 1:], is_masked, n_masked)
    if not isinstance(encoder, ViTModel):
        raise EncoderError(
            f"image_mask.mask_stage='pixels' needs a ViTModel or a ResNetModel, not "
            f"{encoder.config.model_type!r}; set image_mask.mask_stage='features'"
        )
    x = encoder.embeddings(image)
    x = torch.cat([x[:, :1], gather_visible(x[:, 1:], is_masked, n_masked)], 1)
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layernorm(x)[:, 1:]


def token_features(output: Any) -> Float[Tensor, "b n d"]:
    """The features of an encoder's output: the image's or text's own first, then one a token.

    A ResNet has no class token; the image's own is its pooled output. Its features are those of
    the patches, see `at_patch_centres`.
    """
    features = output.last_hidden_state
    if features.ndim == 3:
        return features
    patches = at_patch_centres(features).flatten(2).mT
    return torch.cat([output.pooler_output[:, None], patches], 1)


def at_patch_centres(features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
    """A ResNet's features half a patch further down and right, between four of them, linearly.

    Each convolution of stride 2 takes its first place on the first pixel, so that feature (0, 0) of
    a ResNet looks at the corner of the image, and feature k at pixel k * stride: the corner of its
    patch, not its middle. Left as they are, they point at the patch beside the lesion as often as
    at the lesion's. The last row and column keep their place: there is nothing beyond.

    Source: ours; what it changes is in docs/log.md, "Where a ResNet's features look".
    """
    for dim in (2, 3):
        last = features.shape[dim] - 1
        following = torch.cat([features.narrow(dim, 1, last), features.narrow(dim, last, 1)], dim)
        features = torch.lerp(features, following, 0.5)
    return features


def no_decay_names(model: nn.Module) -> set[str]:
    """Parameters that weight decay would pull away from where they mean something.

    Biases and norms (one-dimensional), a temperature, class token and position tables.
    Source: usual practice of ViT and BERT training (timm's `no_weight_decay`).
    """
    tables = ("position_embedding", "cls_token", "token_type_embedding")
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim <= 1 or any(table in name for table in tables)
    }


def pooled(output: Any, encoder: PreTrainedModel) -> Tensor:
    """The pooled output [b, d], which the projection reads.

    Raises:
        EncoderError: When the encoder pools nothing.
    """
    value = getattr(output, "pooler_output", None)
    if value is None:
        raise EncoderError(
            f"{encoder.config.model_type!r} gives no pooler_output; take a ViT- or BERT-like "
            f"encoder with a pooling layer"
        )
    return value
