"""What of a model trains, how fast, and with how much memory: layers, frozen ones among them."""

import re
import warnings
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from mmclip.config import Config, FreezeLayers, ModelConfig
from mmclip.models.layout import EncoderError
from mmclip.models.mmclip import MMCLIP
from mmclip.models.norm import GlobalBatchNorm2d

_BLOCK = re.compile(r"(?:^|\.)(?:layer|layers|block|blocks|stages)\.(\d+)\.")
_BEFORE = re.compile(r"(?:^|\.)(?:embed|pre_layrnorm|shared|rel_embeddings)")


def layer_numbers(names: Sequence[str]) -> dict[str, int]:
    """The layer of each parameter: 0 for what embeds pixels, then blocks, last what stands on them.

    A block is one of a transformer's, or a stage of a ResNet. Norm and pooler behind the last
    block, and the head, are one layer above it.

    Args:
        names: Of the parameters.
    """
    block = {name: int(found[1]) for name in names if (found := _BLOCK.search(name))}
    last = max(block.values(), default=-1)
    return {
        name: block[name] + 1 if name in block else 0 if _BEFORE.search(name) else last + 2
        for name in names
    }


def set_trainable(model: MMCLIP, config: ModelConfig) -> None:
    """Freezes layers of the encoders, and recomputes in the backward pass, as configured.

    Args:
        model: New, or of a checkpoint.
        config: Of the run.

    Raises:
        EncoderError: When an encoder has fewer layers, or cannot recompute.
    """
    for name, encoder, own in (
        ("image", model.vision_model, config.image),
        ("text", model.text_model, config.text),
    ):
        freeze(encoder, own.freeze_layers, f"model.{name}.freeze_layers")
        if not own.gradient_checkpointing:
            continue
        if not encoder.supports_gradient_checkpointing:
            raise EncoderError(
                f"model.{name}.gradient_checkpointing=true, and {encoder.config.model_type!r} of "
                f"transformers cannot recompute its layers; set it to false"
            )
        with warnings.catch_warnings():  # of a new name, which older versions lack
            warnings.simplefilter("ignore", FutureWarning)
            encoder.gradient_checkpointing_enable({"use_reentrant": False})


def freeze(encoder: PreTrainedModel, layers: FreezeLayers, key: str) -> None:
    """Keeps the weights of what embeds and of the first blocks, or of all of an encoder.

    A frozen batch norm normalises by its running statistics, and keeps those, too.

    Args:
        encoder: Pretrained.
        layers: Blocks, or "all"; 0 freezes nothing.
        key: Of the configuration, for errors.

    Raises:
        EncoderError: When the encoder has fewer blocks.
    """
    if layers == 0:
        return
    number = layer_numbers([name for name, _ in encoder.named_parameters()])
    n_blocks = max((number[name] for name in number if _BLOCK.search(name)), default=0)
    if layers != "all" and layers > n_blocks:
        raise EncoderError(
            f"{key}={layers}, and {encoder.config.model_type!r} has {n_blocks} blocks here; set it "
            f"to that or less, or to 'all'"
        )
    for name, parameter in encoder.named_parameters():
        if layers == "all" or number[name] <= layers:
            parameter.requires_grad_(False)
    for module in encoder.modules():
        if isinstance(module, GlobalBatchNorm2d) and not module.weight.requires_grad:
            module.is_frozen = True


def lr_ratios(model: nn.Module, config: Config) -> dict[str, float] | None:
    """The learning rate of each parameter, as a share of the schedule's; None where all are 1.

    Args:
        model: Its encoders are `vision_model` and `text_model`.
        config: Of the run.
    """
    ratio = config.train.pretrained_lr_ratio
    if ratio == 1:
        return None
    encoders = {"vision_model.": config.model.image, "text_model.": config.model.text}
    slow = tuple(prefix for prefix, own in encoders.items() if own.pretrained is not None)
    return {name: ratio if name.startswith(slow) else 1.0 for name, _ in model.named_parameters()}
