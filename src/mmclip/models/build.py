"""From a configuration and two encoders to a model, with the decoders that its losses need."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ResNetModel

from mmclip.config import Config
from mmclip.models.decoders import ImageDecoder, TextDecoder
from mmclip.models.encoders import image_layout, text_layout
from mmclip.models.mmclip import MMCLIP


def build_mmclip(
    config: Config,
    image_encoder: PreTrainedModel,
    text_encoder: PreTrainedModel,
    n_label_findings: int = 0,
) -> MMCLIP:
    """A model around two encoders, with the decoders that the losses of the configuration need.

    Args:
        config: Of the run.
        image_encoder: Keeps its weights.
        text_encoder: Keeps its weights.
        n_label_findings: Columns of the label loss; without that loss there is no head.
    """
    vision, text = image_layout(image_encoder), text_layout(text_encoder)
    words = text_encoder.get_input_embeddings().weight
    assert isinstance(words, Tensor)
    side = vision.image_size // vision.patch_size
    image_decoder = text_decoder = None
    if config.loss.image:
        sizes = config.model.image_decoder
        image_decoder = ImageDecoder(
            vision.width,
            text.width,
            sizes.width,
            sizes.depth,
            sizes.heads,
            (side, side),
            vision.patch_size,
        )
    if config.loss.text:
        sizes = config.model.text_decoder
        text_decoder = TextDecoder(
            text.width,
            vision.width,
            sizes.width,
            sizes.depth,
            sizes.heads,
            *words.shape,
            grid=(side, side),
            image_context=sizes.image_context,
        )
    return MMCLIP(
        image_encoder,
        text_encoder,
        config.model,
        image_decoder,
        text_decoder,
        n_label_findings if config.loss.label else 0,
        has_bias=config.loss.contrastive == "sigmoid",
        has_local=config.loss.local > 0,
    )


def compile_layers(model: MMCLIP) -> None:
    """Lets torch.compile make kernels for the layers of the transformers; weights keep their names.

    Layer by layer, as equal layers share one compilation, which takes seconds where the whole model
    takes minutes. Texts come in many shapes, images in one. A ResNet is left as it is: its batch
    norm talks to other processes.
    """
    # Image and text decoder share the code of a block, with and without masks and places.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    is_vit = not isinstance(model.vision_model, ResNetModel)
    parts: list[tuple[nn.Module | None, bool]] = [
        (model.vision_model if is_vit else None, False),
        (model.text_model, True),
        (model.image_decoder, True),
        (model.text_decoder, True),
    ]
    for part, is_dynamic in parts:
        for stack in [] if part is None else part.modules():
            if isinstance(stack, nn.ModuleList):
                for layer in stack:
                    layer.compile(dynamic=is_dynamic)
