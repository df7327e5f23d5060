"""One encoder out of whatever a folder or the hub holds: an encoder, or a model with one in it."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    MT5Config,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2TextConfig,
    Siglip2TextModel,
    SiglipTextConfig,
    SiglipTextModel,
    T5Config,
    UMT5Config,
    VisionTextDualEncoderConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
    set_verbosity_error,
)

from mmclip.config import ModelConfig
from mmclip.data.file_kinds import kind_of
from mmclip.hub import why_unavailable
from mmclip.models.layout import EncoderError

logger = logging.getLogger(__name__)

Modality = Literal["image", "text"]

TAKE_INSTEAD: Mapping[Modality, str] = {
    "image": "take an image encoder, such as a ViT, DINOv2, CLIP, SigLIP, Swin or ConvNeXt",
    "text": "take a text encoder, such as a BERT, RoBERTa, DeBERTa, ModernBERT, CLIP or T5",
}

READS: Mapping[Modality, str] = {"image": "pixel_values", "text": "input_ids"}
"""What an encoder of a modality reads, by the name that transformers gives it."""

NOT_IN_AUTO: Mapping[type[PreTrainedConfig], type[PreTrainedModel]] = {
    SiglipTextConfig: SiglipTextModel,
    Siglip2TextConfig: Siglip2TextModel,
}
"""Encoders that AutoModel does not know by their configuration."""

DROPS = ("dropout", "drop_path", "pdrop", "layerdrop", "drop_rate")
"""What the keys of a configuration have in their names that lose something at random."""

MOVES = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
"""Keys of DINOv3's configuration that move positions at random while it trains."""

LOAD_FAULTS = (
    OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, UnpicklingError,
    StrictDataclassError, SafetensorError,
)  # fmt: skip
"""What transformers raises for files that are missing, damaged, or of a model that it lacks."""

FORWARD_FAULTS = (
    AttributeError, TypeError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError,
)  # fmt: skip
"""What an encoder of another make raises when it is called as ours are."""


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' bar and its table of missing weights, which are told in one line."""
    shows_bars, level = is_progress_bar_enabled(), get_verbosity()
    disable_progress_bar()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(level)
        if shows_bars:
            enable_progress_bar()


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


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    if isinstance(error, UnpicklingError) or "weights_only" in text:  # torch says how to run it
        return (
            "it holds more than tensors and plain values, and nothing of it was run; take its "
            "model.safetensors"
        )
    if "ignore_mismatched_sizes" in text:  # transformers' table of them is not shown
        return "its weights have other shapes than its config.json says"
    return text.splitlines()[0].rstrip(":") if text else type(error).__name__


def why_unread(name: str, error: BaseException) -> str:
    """Why weights cannot be read: that a file of them holds none, else what the error says.

    Args:
        name: Folder or hub id.
        error: Of reading them.
    """
    folder = Path(name)
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))):
        with path.open("rb") as file:
            start = file.read(256)
        kind = kind_of(start) if start else "empty"
        if kind is not None and not kind.endswith("archive"):  # torch's own are such
            return f"{path.name} is {kind}"
    cut = "damaged or cut off: " if isinstance(error, SafetensorError) else ""
    return f"{cut}{first_line(error)}"


def check_named_encoders(config: ModelConfig) -> None:
    """Looks at the configurations of the encoders that are named, before anything is built.

    Raises:
        EncoderError: When one cannot be had, or is no encoder of its modality.
    """
    named: dict[Modality, str | None] = {
        "image": config.image.pretrained,
        "text": config.text.pretrained,
    }
    for modality, name in named.items():
        if name is not None:
            tower_class(read_config(name), modality, name)


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of a pretrained model, in which nothing is lost or moved at random.

    Every random draw of a run is keyed by image, and those of dropout cannot be.

    Raises:
        EncoderError: When there is none.
    """
    if reason := why_unavailable(name):
        raise cannot_load(name, reason)
    try:
        if is_checkpoint(name):
            config: PreTrainedConfig = _config_of_checkpoint(Path(name))
        else:
            with quiet_loading():
                config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except LOAD_FAULTS as error:
        raise cannot_load(name, first_line(error)) from error
    _make_deterministic(config)
    return config


def is_checkpoint(name: str) -> bool:
    """Whether a name is the folder of a checkpoint of `mmclip pretrain`."""
    folder = Path(name)
    return (folder / "meta.json").is_file() and not (folder / "config.json").exists()


def _config_of_checkpoint(folder: Path) -> VisionTextDualEncoderConfig:
    """Of the dual encoder whose weights a checkpoint holds, by the names that they have there."""
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    return VisionTextDualEncoderConfig(
        vision_config=meta["vision_config"],
        text_config=meta["text_config"],
        projection_dim=meta["config"]["model"]["embed_dim"],
    )


def cannot_load(name: str, reason: str) -> EncoderError:
    """The error that a model cannot be had."""
    return EncoderError(
        f"cannot load {name!r} ({reason}); give a folder with config.json and model.safetensors "
        f"(or pytorch_model.bin), or the id of a model on the hub"
    )


def _make_deterministic(config: PreTrainedConfig) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _make_deterministic(value)
        elif any(part in key for part in DROPS) and isinstance(value, float | int):
            setattr(config, key, False if isinstance(value, bool) else 0.0)
        elif key in MOVES:
            setattr(config, key, None)


def tower_config(config: PreTrainedConfig, modality: Modality) -> PreTrainedConfig | None:
    """The configuration of the encoder of a modality inside a model of several; None in others."""
    key = {"image": "vision_config", "text": "text_config"}[modality]
    inner = vars(config).get(key)
    return inner if isinstance(inner, PreTrainedConfig) else None


def tower_class(config: PreTrainedConfig, modality: Modality, name: str) -> type[PreTrainedModel]:
    """The class whose weights a configuration describes: the encoder's, or the whole model's.

    Args:
        config: As `read_config` gives it.
        modality: What is looked for.
        name: Of the model, for errors.

    Raises:
        EncoderError: When it is no encoder of the modality and has none in it.
    """
    kind = config.model_type
    what, instead = f"{name} is a {kind!r} model", TAKE_INSTEAD[modality]
    found: Any
    if tower_config(config, modality) is not None and type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        return found
    if type(config) in NOT_IN_AUTO:
        found = NOT_IN_AUTO[type(config)]
    elif _has_decoder(config):
        if modality == "image" or type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
            raise EncoderError(
                f"{what}, whose encoder cannot be taken without its decoder; {instead}"
            )
        found = MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]
    elif type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
    else:
        raise EncoderError(f"{what}, which transformers cannot build by itself; {instead}")
    found = found[0] if isinstance(found, tuple) else found
    if found.main_input_name != READS[modality]:
        raise EncoderError(
            f"{what}, which reads {found.main_input_name} and no {READS[modality]}, as an "
            f"{modality} encoder does; {instead}".replace("an text", "a text")
        )
    return found


def _has_decoder(config: PreTrainedConfig) -> bool:
    """Whether AutoModel builds an encoder with its decoder; T5's encoder alone says that it has
    none, and has the same configuration."""
    return config.is_encoder_decoder or type(config) in (T5Config, MT5Config, UMT5Config)


def load_tower(name: str, modality: Modality, config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder of a modality with its pretrained weights.

    A model of several modalities gives the encoder of this one. A masked autoencoder gives its
    ViT, which masks nothing and keeps patches in their order; its pooler is new.

    Args:
        name: A folder, or a hub id.
        modality: Which encoder.
        config: As `read_config` gives it, changed or not.

    Raises:
        EncoderError: When the weights cannot be loaded, or there is no such encoder.
    """
    found: Any = tower_class(config, modality, name)
    # A pytorch_model.bin is read by torch.load(weights_only=True): it cannot run code.
    try:
        with quiet_loading():
            model, info = found.from_pretrained(
                name, config=config, output_loading_info=True, trust_remote_code=False
            )
    except LOAD_FAULTS as error:
        raise cannot_load(name, why_unread(name, error)) from error
    report = LoadReport(
        name=name,
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
        mismatched=tuple(sorted(str(m) for m in info["mismatched_keys"])),
    )
    logger.info("%s", report)
    if tower_config(config, modality) is not None:
        return _tower_inside(model, modality, name)
    return _vit_of(model) if isinstance(model, ViTMAEModel) else model


def _tower_inside(whole: PreTrainedModel, modality: Modality, name: str) -> PreTrainedModel:
    part = {"image": "vision_model", "text": "text_model"}[modality]
    inside = dict(whole.named_children()).get(part)
    if not isinstance(inside, PreTrainedModel):
        raise EncoderError(
            f"{name} is a {whole.config.model_type!r} model without a {part} that stands alone; "
            f"{TAKE_INSTEAD[modality]}"
        )
    return inside


def _vit_of(mae: ViTMAEModel) -> ViTModel:
    config = mae.config
    assert isinstance(config, ViTMAEConfig)
    known = set(ViTConfig().to_dict()) - {"model_type", "architectures"}
    values = {key: value for key, value in config.to_dict().items() if key in known}
    vit = ViTModel(ViTConfig(**values), add_pooling_layer=True)
    missing, unexpected = vit.load_state_dict(mae.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("pooler.") for key in missing)
    return vit


def build_tower(config: Mapping[str, Any]) -> PreTrainedModel:
    """An encoder with fresh weights from its own configuration, as a checkpoint holds it."""
    made = AutoConfig.for_model(**config)
    if type(made) in NOT_IN_AUTO:
        return NOT_IN_AUTO[type(made)](made)
    if _has_decoder(made):
        encoder: Any = MODEL_FOR_TEXT_ENCODING_MAPPING[type(made)]
        return encoder(made)
    return AutoModel.from_config(made)
