"""A dual encoder of transformers out of a folder or the hub, refused by name where it is none."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from mmclip.data.leakage.trained_on import TrainedOn
from mmclip.hub import why_unavailable
from mmclip.models.dual_encoder import (
    PROBE_TEXT,
    Scoring,
    ZeroshotRule,
    images_at_once,
    probe_image,
)
from mmclip.models.hub_encoder import FAMILIES, HubEncoder, Processed
from mmclip.models.layout import EncoderError
from mmclip.models.pretrained import (
    FORWARD_FAULTS,
    LOAD_FAULTS,
    first_line,
    quiet_loading,
    why_unread,
)

logger = logging.getLogger(__name__)

MOST_PADDED = 0.9
"""A tokenizer of less than this part of its encoder's words is told of. [chosen: tables of words
are padded to a multiple of 64 or so; BERT's 30,522 tokens are 0.62 of CLIP's 49,408]"""

TAKE_INSTEAD = (
    "give a CLIPModel, SiglipModel, Siglip2Model or VisionTextDualEncoderModel, or name a function "
    "of yours, as module:function, that returns an object with encode_images and encode_texts"
)


def check_hub_encoder(source: str) -> PreTrainedConfig:
    """The configuration of a dual encoder, before its weights are read.

    Raises:
        EncoderError: When it cannot be had, or is no dual encoder.
    """
    if reason := why_unavailable(source):
        raise EncoderError(f"cannot load {source!r}: {reason}")
    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except LOAD_FAULTS as error:
        raise EncoderError(
            f"cannot load {source!r} ({first_line(error)}); {TAKE_INSTEAD}"
        ) from error
    if config.model_type not in FAMILIES:
        raise EncoderError(f"{source} is {_what_it_is(config)}; {TAKE_INSTEAD}")
    return config


def _what_it_is(config: PreTrainedConfig) -> str:
    """A model that is no dual encoder, in words."""
    said = f"a {config.model_type!r} model"
    built: Any = MODEL_MAPPING.get(type(config), None)
    reads = None if built is None else built.main_input_name
    if reads == "pixel_values":
        return f"{said}, an image encoder without a text encoder"
    if reads == "input_ids":
        return f"{said}, a text encoder without an image encoder"
    return f"{said}, which mmclip does not know as an image and a text encoder with a joint space"


def open_hub_encoder(
    source: str,
    device: torch.device,
    rule: ZeroshotRule | None = None,
    known: TrainedOn = TrainedOn(),
    batch_size: int | None = None,
) -> HubEncoder:
    """Reads a dual encoder of transformers, and tries it on one image and one text.

    Args:
        source: Folder or hub id.
        device: Where the model goes.
        rule: In place of its family's.
        known: What it is said to be trained on.
        batch_size: Images at once; by default what fits.

    Raises:
        EncoderError: When model, image processor or tokenizer cannot be had, or do not fit.
    """
    config = check_hub_encoder(source)
    processor = _load(
        "image processor",
        "preprocessor_config.json",
        source,
        lambda: AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False),
    )
    tokenizer = _load(
        "tokenizer",
        "tokenizer.json or the like",
        source,
        lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False),
    )
    # Where its files are missing, transformers makes one of special tokens alone.
    if len({*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens}) < 2:
        raise EncoderError(_lacks(source, "tokenizer", "tokenizer.json or the like"))
    words = config.get_text_config().vocab_size
    if len(tokenizer) < MOST_PADDED * words:
        logger.warning(
            "the tokenizer of %s has %d tokens, and its text encoder knows %d: if it is of another "
            "model, texts are read as other words",
            source, len(tokenizer), words,
        )  # fmt: skip
    model: Any = _load_weights(source).to(device)  # pyright: ignore[reportArgumentType]
    model.eval()
    prepare = Processed(processor)
    family = FAMILIES[config.model_type]
    weights = dict(model.named_parameters())
    bias = weights.get("logit_bias")
    scoring = Scoring(
        rule or family.rule,
        float(weights["logit_scale"].detach().exp()),
        0.0 if bias is None else float(bias.detach()),
    )
    side = _side(prepare)
    n = batch_size or images_at_once(device, side)
    opened = HubEncoder(source, model, tokenizer, prepare, side, 0, scoring, known, n)
    return _tried(opened)


def _tried(opened: HubEncoder) -> HubEncoder:
    """The same, once an image and a text have gone through it.

    Raises:
        EncoderError: When its processor or tokenizer does not fit its encoders.
    """
    try:
        with torch.inference_mode():
            image = opened.encode_as_given([opened.prepare(probe_image())])
        text = opened.encode_texts([PROBE_TEXT])
    except FORWARD_FAULTS as error:
        raise EncoderError(
            f"{opened.source} cannot read an image or a text as its own image processor and "
            f"tokenizer give them ({first_line(error)}); save those of this model beside it"
        ) from error
    if not (image.isfinite().all() and text.isfinite().all()):
        raise EncoderError(
            f"{opened.source} gives embeddings that are not finite: its weights hold NaN or "
            f"infinity, or overflow; take other weights"
        )
    if image.shape != text.shape:
        raise EncoderError(
            f"{opened.source} gives images of {image.shape[1]} numbers and texts of "
            f"{text.shape[1]}, which do not compare; {TAKE_INSTEAD}"
        )
    return replace(opened, embed_dim=image.shape[1])


def _load(what: str, file: str, source: str, load: Callable[[], Any]) -> Any:
    """A part that lies beside the weights.

    Raises:
        EncoderError: When it is not there.
    """
    try:
        with quiet_loading():
            return load()
    except LOAD_FAULTS as error:
        raise EncoderError(f"{_lacks(source, what, file)} ({first_line(error)})") from error


def _lacks(source: str, what: str, file: str) -> str:
    return (
        f"{source} holds no {what} that can be read ({file}); save the model's own beside its "
        f"weights, by processor.save_pretrained(...)"
    )


def _load_weights(source: str) -> PreTrainedModel:
    """The weights, in float32.

    Raises:
        EncoderError: When they cannot be read, or some are missing and would be random.
    """
    try:
        with quiet_loading():
            model, info = AutoModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except LOAD_FAULTS as error:
        said = why_unread(source, error)
        raise EncoderError(f"cannot load the weights of {source!r} ({said})") from error
    missing = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if missing:
        raise EncoderError(
            f"the weights of {source} lack {len(missing)} of the parameters of "
            f"{type(model).__name__} ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}), "
            f"which would be random; {TAKE_INSTEAD}"
        )
    return model


def _side(prepare: Processed) -> int:
    """Side of the images that a processor gives, px; of one that cuts them into patches, at most.

    The sizes of a batch are one: a processor that keeps the aspect is refused elsewhere.
    """
    arrays = prepare(probe_image())
    pixels = arrays["pixel_values"]
    if pixels.ndim == 3:
        return int(pixels.shape[-1])
    n_patches, values = pixels.shape
    return math.isqrt(n_patches) * math.isqrt(values // 3)
