"""A run as transformers' VisionTextDualEncoderModel, or the reason why it cannot be one."""

import torch
from transformers import PreTrainedModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from mmclip.export.towers import Plain, embed_pixels, embed_tokens, plain_config, probe_inputs
from mmclip.models.encoders import EncoderError
from mmclip.models.pretrained import FORWARD_FAULTS, first_line

INSTEAD = "take --to onnx, which holds all of it, or --to vision and --to text, the encoders alone"

TOLERANCE = 1e-4
"""How far an embedding may be from ours before the class is said not to express it. [chosen: far
above the rounding of float32, far below what another pooling changes]"""


def dual_encoder(plain: Plain) -> VisionTextDualEncoderModel:
    """The model of transformers with a run's weights, once its embeddings are found to be equal.

    Raises:
        EncoderError: When the class cannot hold the encoders, or pools in another way.
    """
    if reason := _why_not(plain):
        raise EncoderError(f"--to hf: {reason}; {INSTEAD}")
    ours = plain.model
    config = VisionTextDualEncoderConfig(
        vision_config=plain_config(ours.vision_model),
        text_config=plain_config(ours.text_model),
        projection_dim=ours.visual_projection.out_features,
        logit_scale_init_value=ours.logit_scale.item(),
    )
    state = ours.state_dict()
    try:
        theirs = VisionTextDualEncoderModel(config).eval()
        theirs.load_state_dict({name: state[name] for name in theirs.state_dict()})
        wrong = _unlike(plain, theirs)
    except FORWARD_FAULTS as error:
        kinds = f"{ours.vision_model.config.model_type!r}, {ours.text_model.config.model_type!r}"
        raise EncoderError(
            f"--to hf: VisionTextDualEncoderModel does not run with these encoders ({kinds}: "
            f"{first_line(error)}); {INSTEAD}"
        ) from None
    if wrong:
        raise EncoderError(f"--to hf: {' and '.join(wrong)}; {INSTEAD}")
    return theirs


def _why_not(plain: Plain) -> str | None:
    """What can be said without building anything of theirs."""
    if plain.data.resize == "pad":
        return (
            "data.resize='pad', and no image processor of transformers pads an image around its "
            "middle"
        )
    images, texts = probe_inputs(plain)
    vision, text = plain.model.vision_model, plain.model.text_model
    with torch.no_grad():
        outputs = vision(pixel_values=images), text(**_ids_and_mask(texts))
    for encoder, output in zip((vision, text), outputs, strict=True):
        pooled = output.get("pooler_output")
        kind = f"VisionTextDualEncoderModel reads pooler_output, and {encoder.config.model_type!r}"
        if pooled is None:
            return f"{kind} gives none"
        if _is_grid(encoder):
            return f"{kind} gives it as an image of 1 x 1"
    return None


def _ids_and_mask(texts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: texts[name] for name in ("input_ids", "attention_mask")}


def _is_grid(encoder: PreTrainedModel) -> bool:
    """A ResNet, which this package makes give [b, d] where transformers' gives [b, d, 1, 1]."""
    return encoder.config.model_type == "resnet"


@torch.no_grad()
def _unlike(plain: Plain, theirs: VisionTextDualEncoderModel) -> list[str]:
    """What of a model of transformers gives other embeddings than ours."""
    images, texts = probe_inputs(plain)
    found = theirs(**texts, pixel_values=images)
    wrong = []
    for name, embedding, mine in (
        ("image", found.image_embeds, embed_pixels(plain, images)),
        ("text", found.text_embeds, embed_tokens(plain, **_ids_and_mask(texts))),
    ):
        off = (embedding - mine).abs().max().item()
        if not off <= TOLERANCE:
            wrong.append(
                f"VisionTextDualEncoderModel pools the {name} encoder in another way than "
                f"this run, which moves embeddings by {off:.2g}"
            )
    return wrong
