"""Image encoders: new ones of given sizes, and pretrained ones that are made to read one channel.

A pretrained encoder keeps its weights. Its first convolution is folded into one channel, or fed
with three equal ones where that is not exact; its grid of positions is resampled to the size of the
images; and a look at one output says where its patches are.
"""

import copy
import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel
from transformers.image_processing_base import ImageProcessingMixin

from mmclip.config import GREY_MEAN, GREY_STD, ImageEncoderConfig
from mmclip.models.image_probe import find_layout, side_of
from mmclip.models.layout import LAYOUT_KEY, EncoderError
from mmclip.models.norm import globalise_batch_norm
from mmclip.models.pretrained import (
    TAKE_INSTEAD,
    is_checkpoint,
    load_tower,
    read_config,
)

logger = logging.getLogger(__name__)

RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The normalisation of a pretrained three-channel encoder whose folder has no
preprocessor_config.json. Source: ImageNet, as in torchvision's and timm's weights."""

ANTIALIASED = ("dinov2_with_registers",)
"""Models whose positions are resampled with antialiasing. Source: their code in transformers."""


def build_image_encoder(
    config: ImageEncoderConfig, image_size: int, folds: bool = True
) -> PreTrainedModel:
    """An image encoder for one-channel images of image_size x image_size.

    A pretrained encoder keeps its weights: a three-channel patch projection is folded into one
    channel (the same output as for the image repeated three times, at a third of the work), and
    the position grid is resampled to the image's size.

    A new ViT starts with weights of deviation 1 / sqrt(width), where transformers' 0.02, meant for
    768 wide layers, shrinks every layer of a narrow one; and its pooler has no tanh, which
    saturates. Both shorten the time in which all embeddings are alike. [docs/log.md]
    A new ResNet has basic blocks and one stage for each halving of the image after the second.

    Args:
        config: What to build.
        image_size: Of what it reads.
        folds: False keeps three channels of a pretrained encoder, see `take_one_channel`.

    Raises:
        EncoderError: When the weights cannot be found, are of no image encoder, image_size is not a
            multiple of its patch size, or it cannot pool as it is told to.
    """
    if config.pretrained is None:
        encoder = (
            _new_resnet(config, image_size)
            if config.kind == "resnet"
            else _new_vit(config, image_size)
        )
        if config.pooling not in ("auto", "pooler"):
            find_layout(encoder, image_size, config.pooling)
        return encoder
    name, pooling = config.pretrained, config.pooling
    read = read_config(name)
    if read.model_type == "vit_mae" and pooling == "auto":
        pooling = "cls"  # a masked autoencoder has no pooler, and its ViT's would be a random one
    encoder = load_tower(name, "image", read)
    _check_patch_size(encoder, image_size)
    held = vars(encoder.config).get(LAYOUT_KEY, {}).get("rgb")  # of a checkpoint
    mean, std = held or (
        (RGB_MEAN, RGB_STD) if is_checkpoint(name) else _normalisation_of(name)
    )  # a checkpoint without it reads one channel
    rgb = take_one_channel(encoder, mean, std, folds)
    encoder = resize_position_grid(encoder, image_size)
    adapt_batch_norm(encoder)
    find_layout(encoder, image_size, pooling, rgb)
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
    adapt_batch_norm(encoder)
    return encoder


def adapt_batch_norm(encoder: PreTrainedModel) -> None:
    """Makes batch norm look at the rows of all processes; and more of a ResNet, see below.

    A ResNet pools to [b, d], and keeps channels last in memory, which its convolutions are a
    quarter faster on. None of this adds or renames a weight. VisionTextDualEncoderModel reads the
    weights once its `vision_model.pooler` is replaced as here.
    """
    globalise_batch_norm(encoder)
    if isinstance(encoder, ResNetModel):
        encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        setattr(encoder, "pooler", pool)  # noqa: B010


def _check_patch_size(encoder: PreTrainedModel, image_size: int) -> None:
    patch = side_of(vars(encoder.config).get("patch_size"))
    if patch is not None and image_size % patch:
        raise EncoderError(
            f"data.image_size={image_size} is not a multiple of the encoder's patch size {patch}; "
            f"{max(image_size // patch, 1) * patch} is"
        )


def patch_projection(encoder: PreTrainedModel) -> nn.Conv2d:
    """The convolution that turns pixels into patch features.

    Raises:
        EncoderError: When the encoder has none.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise EncoderError(
        f"{encoder.config.model_type!r} has no patch projection, which a convolution is; "
        f"{TAKE_INSTEAD['image']}"
    )


def _normalisation_of(name: str) -> tuple[Sequence[float], Sequence[float]]:
    try:
        facts, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        logger.info("%s has no preprocessor_config.json; taking ImageNet's normalisation", name)
        return RGB_MEAN, RGB_STD
    return facts.get("image_mean", RGB_MEAN), facts.get("image_std", RGB_STD)


class GreyConv2d(nn.Conv2d):
    """A convolution of three channels that reads one, which it repeats in their normalisation.

    Its weights keep name and shape. It stands where folding is not exact: with padding, as the
    three channels' zeros are three different greys, and without a bias that takes the shift up.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, old: nn.Conv2d, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(
            old.in_channels,
            old.out_channels,
            old.kernel_size,  # pyright: ignore[reportArgumentType]
            old.stride,  # pyright: ignore[reportArgumentType]
            old.padding,  # pyright: ignore[reportArgumentType]
            bias=old.bias is not None,
        )
        self.load_state_dict(old.state_dict())
        m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        self.register_buffer("scale", GREY_STD / s, persistent=False)
        self.register_buffer("shift", (GREY_MEAN - m) / s, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Convolves [b, 1, h, w] in model space (see data.image_text_dataset.normalise)."""
        return super().forward(input * self.scale + self.shift)


def take_one_channel(
    encoder: PreTrainedModel,
    rgb_mean: Sequence[float] = RGB_MEAN,
    rgb_std: Sequence[float] = RGB_STD,
    folds: bool = True,
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Makes a three-channel encoder take one channel, normalised by GREY_MEAN and GREY_STD.

    Folded, where that is exact. With x the image in 0..1, channel c of the old input is
    (x - m_c) / s_c, and x = g z + m for the new input z. So w' = g sum_c w_c / s_c, and the bias
    takes up sum_c w_c (m - m_c) / s_c over the kernel.

    Args:
        encoder: Changed in place.
        rgb_mean: Of each of the three channels.
        rgb_std: Likewise.
        folds: False leaves the weights as they are, so that they also train as they are.

    Returns:
        None for a folded encoder; else what `GreyConv2d` needs to be made again.

    Raises:
        EncoderError: When it has another number of channels.
    """
    old = patch_projection(encoder)
    if old.in_channels == 1:
        return None
    if old.in_channels != 3:
        raise EncoderError(
            f"{encoder.config.model_type!r} is an encoder of {old.in_channels} channels; only 1 "
            f"and 3 are supported"
        )
    if not folds or old.bias is None or old.padding not in ((0, 0), "valid"):
        repeat_channel(encoder, rgb_mean, rgb_std)
        return tuple(map(float, rgb_mean)), tuple(map(float, rgb_std))
    kernel, stride = ((size[0], size[1]) for size in (old.kernel_size, old.stride))
    new = nn.Conv2d(1, old.out_channels, kernel, stride)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (rgb_mean, rgb_std))
    with torch.no_grad():
        weight = old.weight / std
        new.weight.copy_(GREY_STD * weight.sum(1, keepdim=True))
        assert new.bias is not None
        new.bias.copy_(old.bias + (weight * (GREY_MEAN - mean)).sum((1, 2, 3)))
    put_projection(encoder, old, new)
    encoder.config.num_channels = 1
    return None


def repeat_channel(
    encoder: PreTrainedModel, rgb_mean: Sequence[float], rgb_std: Sequence[float]
) -> None:
    """Puts a `GreyConv2d` in the place of an encoder's first convolution."""
    old = patch_projection(encoder)
    put_projection(encoder, old, GreyConv2d(old, rgb_mean, rgb_std))


def put_projection(
    encoder: PreTrainedModel, old: nn.Conv2d, new: nn.Conv2d, n_channels: int = 1
) -> None:
    """Puts a convolution in the place of another.

    Args:
        encoder: Both are, or will be, of.
        old: Its first one.
        new: Takes its place.
        n_channels: Of the images that the encoder reads from now on; some modules check it.
    """
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
        if not isinstance(parent, nn.Conv2d) and getattr(parent, "num_channels", None) in (1, 3):
            parent.num_channels = n_channels  # pyright: ignore[reportArgumentType]


def resize_position_grid(encoder: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The encoder for images of image_size, with its learned grid of positions resampled.

    Bicubic over the square grid; class and register tokens in front of it keep theirs. Tables of
    relative positions are resampled over their square of differences. An encoder without either,
    as a ResNet or one of rotary positions, reads any size.

    Raises:
        EncoderError: When the encoder keeps its positions in another way.
    """
    old_px = side_of(vars(encoder.config).get("image_size"))
    if old_px is None or old_px == image_size:
        return encoder
    config = copy.deepcopy(encoder.config)
    is_pair = isinstance(config.image_size, list | tuple)
    config.image_size = [image_size, image_size] if is_pair else image_size
    with torch.random.fork_rng(devices=[]):  # whatever is made next starts from the same state
        resized = type(encoder)(config)
    for old, new in zip(_convolutions(encoder), _convolutions(resized), strict=True):
        if isinstance(old, GreyConv2d):
            put_projection(resized, new, copy.deepcopy(old))
    shapes = {name: tensor.shape for name, tensor in resized.state_dict().items()}
    state = encoder.state_dict()
    for name, tensor in state.items():
        if shapes.get(name) != tensor.shape:
            state[name] = _resampled(tensor, name, shapes.get(name), encoder, old_px, image_size)
    resized.load_state_dict(state)
    return resized.train(encoder.training)


def _convolutions(encoder: nn.Module) -> list[nn.Conv2d]:
    return [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]


def _resampled(
    table: Tensor,
    name: str,
    shape: torch.Size | None,
    encoder: PreTrainedModel,
    old_px: int,
    image_size: int,
) -> Tensor:
    """A table of positions for another size of image."""
    patch = side_of(vars(encoder.config).get("patch_size"))
    if shape is not None and patch is not None:
        sides = old_px // patch, image_size // patch
        if "position_embedding" in name:
            flat = table.reshape(-1, table.shape[-1])
            n_prefix = len(flat) - sides[0] ** 2
            if 0 <= n_prefix == math.prod(shape[:-1]) - sides[1] ** 2:
                antialias = encoder.config.model_type in ANTIALIASED
                rows = [flat[:n_prefix], resample_grid(flat[n_prefix:], sides[1], antialias)]
                return torch.cat(rows).reshape(shape)
        if name.endswith("relative_position_bias_table"):
            n, new = ((2 * side - 1) ** 2 for side in sides)
            if len(table) - n == shape[0] - new >= 0:
                grid = resample_grid(table[:n], 2 * sides[1] - 1)
                return torch.cat([grid, table[n:]])
    raise EncoderError(
        f"the position grid of {encoder.config.model_type!r} ({name}) cannot be resized; set "
        f"data.image_size to its own size, {old_px}"
    )


def resample_grid(
    rows: Float[Tensor, "n d"], side: int, antialias: bool = False
) -> Float[Tensor, "m d"]:
    """The rows of a square grid, in reading order, bicubic for one of another side."""
    old_side = math.isqrt(len(rows))
    grid = rows.reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)  # 1 d h w
    size = (side, side)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    return grid.permute(0, 2, 3, 1).reshape(side**2, -1)
