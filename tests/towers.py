"""Tiny encoders of every family, saved as transformers saves them, each with its tokenizer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextV2Config,
    ConvNextV2Model,
    DebertaV2Config,
    DebertaV2Model,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5EncoderModel,
    T5Model,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from tests.made import REPORTS

Maker = Callable[[Path], None]

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
GRID = {**SIZES, "image_size": 32, "patch_size": 8}
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
    "window_size": 4,
}  # fmt: skip
RESNET = {
    "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip
MAE = {
    **GRID, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16,
}  # fmt: skip
TEXT = {**SIZES, "max_position_embeddings": 40}
DISTILBERT = {
    "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 40,
}  # fmt: skip
DEBERTA = {
    **TEXT, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "type_vocab_size": 0,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2, "d_ff": 48}


@dataclass(frozen=True)
class ImageRow:
    """A row of the table of image encoders.

    Attributes:
        save: Writes one to a folder.
        pools: What pooling="auto" is.
        refuses: Poolings that are refused.
        patch_size: Side of the part of an image that a feature is of.
        hides_pixels: Whether image_mask.mask_stage="pixels" works.
        recomputes: Whether gradient checkpointing works.
        exports: Whether `mmclip export --to hf` can express it.
    """

    save: Maker
    pools: str = "pooler"
    refuses: tuple[str, ...] = ()
    patch_size: int = 8
    hides_pixels: bool = False
    recomputes: bool = True
    exports: bool = True


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model whose biases, scales and tables are random, too, as if it were trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "position" in name or "embed" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def of(model: type[PreTrainedModel], config: type[PreTrainedConfig], **values: Any) -> Maker:
    """Writes a model of random weights."""

    def make(folder: Path) -> None:
        torch.manual_seed(7)
        save(model(config(**values)), folder)

    return make


def clip() -> CLIPModel:
    text = {**TEXT, **ids_of("clip")}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=GRID, projection_dim=16))


def siglip() -> SiglipModel:
    text = {**TEXT, "projection_size": 32, **ids_of("siglip")}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=GRID))


def dual_encoder() -> VisionTextDualEncoderModel:
    bert = BertModel(BertConfig(**TEXT, **ids_of("wordpiece")))
    return VisionTextDualEncoderModel(vision_model=ViTModel(ViTConfig(**GRID)), text_model=bert)


def whole(make: Callable[[], PreTrainedModel]) -> Maker:
    """Writes a model of two encoders."""

    def write(folder: Path) -> None:
        torch.manual_seed(7)
        save(make(), folder)

    return write


NO_CLASS = ("cls",)
IMAGE_ROWS = {
    "vit": ImageRow(of(ViTModel, ViTConfig, **GRID), hides_pixels=True),
    "deit": ImageRow(of(DeiTModel, DeiTConfig, **GRID)),
    "dinov2": ImageRow(of(Dinov2Model, Dinov2Config, **GRID, drop_path_rate=0.2)),
    "dinov2_with_registers": ImageRow(
        of(Dinov2WithRegistersModel, Dinov2WithRegistersConfig, **GRID, num_register_tokens=4)
    ),
    "dinov3_vit": ImageRow(of(DINOv3ViTModel, DINOv3ViTConfig, **GRID, num_register_tokens=4)),
    "beit": ImageRow(
        of(BeitModel, BeitConfig, **GRID, drop_path_rate=0.2, use_relative_position_bias=True)
    ),
    "beit, absolute positions": ImageRow(
        of(
            BeitModel,
            BeitConfig,
            **GRID,
            use_absolute_position_embeddings=True,
            use_shared_relative_position_bias=True,
            use_mask_token=True,
        )
    ),
    "vit_mae": ImageRow(of(ViTMAEModel, ViTMAEConfig, **MAE), "cls", hides_pixels=True),
    "vit_mae, with decoder": ImageRow(
        of(ViTMAEForPreTraining, ViTMAEConfig, **MAE), "cls", hides_pixels=True
    ),
    "clip_vision_model": ImageRow(of(CLIPVisionModel, CLIPVisionConfig, **GRID)),
    "clip": ImageRow(whole(clip)),
    "siglip_vision_model": ImageRow(
        of(SiglipVisionModel, SiglipVisionConfig, **GRID), refuses=NO_CLASS
    ),
    "siglip": ImageRow(whole(siglip), refuses=NO_CLASS),
    "vision-text-dual-encoder": ImageRow(whole(dual_encoder), hides_pixels=True),
    "resnet": ImageRow(
        of(ResNetModel, ResNetConfig, **RESNET),
        refuses=NO_CLASS,
        hides_pixels=True,
        recomputes=False,
        exports=False,
    ),
    "swin": ImageRow(of(SwinModel, SwinConfig, **SWIN), refuses=NO_CLASS),
    "convnextv2": ImageRow(
        of(ConvNextV2Model, ConvNextV2Config, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
        refuses=NO_CLASS,
        recomputes=False,
    ),
}


def ids_of(kind: str) -> dict[str, int]:
    """Size and special tokens of a tokenizer, as a configuration says them."""
    t = TOKENIZERS[kind]()
    ids = {"pad": t.pad_token_id, "eos": t.eos_token_id, "bos": t.bos_token_id}
    known = {f"{role}_token_id": number for role, number in ids.items() if number is not None}
    return {"vocab_size": len(t), **known}


def trained(made: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    made.train_from_iterator(REPORTS, trainer)
    return made


def wordpiece() -> PreTrainedTokenizerFast:
    """Of BERT, DistilBERT, ELECTRA and MPNet: [CLS] words [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made = trained(
        made, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def byte_bpe() -> PreTrainedTokenizerFast:
    """Of RoBERTa and ModernBERT: <s> words </s>, with <mask>, and padding of id 1."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made = trained(
        made, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", cls_token="<s>", sep_token="</s>", mask_token="<mask>",
    )  # fmt: skip


def clip_bpe() -> PreTrainedTokenizerFast:
    """Of CLIP: <|startoftext|> words <|endoftext|>, padded by the latter, without a mask."""
    start, end, suffix = "<|startoftext|>", "<|endoftext|>", "</w>"
    first = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    first.normalizer = normalizers.Lowercase()
    first.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]+"), "removed", invert=True)
    trainer = trainers.BpeTrainer(vocab_size=120, end_of_word_suffix=suffix, show_progress=False)
    first.train_from_iterator(REPORTS, trainer)
    learnt = json.loads(first.to_str())["model"]
    vocab = learnt["vocab"] | {start: len(learnt["vocab"]), end: len(learnt["vocab"]) + 1}
    merges = [tuple(merge) for merge in learnt["merges"]]
    made = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix=suffix, unk_token=end))
    made.normalizer, made.pre_tokenizer = first.normalizer, first.pre_tokenizer
    made.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(t, vocab[t]) for t in (start, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=start, eos_token=end, pad_token=end, unk_token=end
    )


def unigram() -> PreTrainedTokenizerFast:
    """Of T5 and SigLIP: words </s>, with neither a class token nor a mask."""
    special = ["<pad>", "</s>", "<unk>"]
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made = trained(
        made,
        trainers.UnigramTrainer(
            vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def siglip_unigram() -> PreTrainedTokenizerFast:
    """Of SigLIP, which pads by its end of text."""
    tokenizer = unigram()
    tokenizer.pad_token = "</s>"
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "wordpiece": wordpiece,
    "byte_bpe": byte_bpe,
    "clip": clip_bpe,
    "unigram": unigram,
    "siglip": siglip_unigram,
}


@dataclass(frozen=True)
class TextRow:
    """A row of the table of text encoders; see `ImageRow`."""

    make: Maker
    tokenizer: str = "wordpiece"
    pools: str = "pooler"
    refuses: tuple[str, ...] = ()
    recomputes: bool = True
    exports: bool = True

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer to a folder."""
        self.make(folder)
        TOKENIZERS[self.tokenizer]().save_pretrained(folder)


NO_POOLER = ("pooler",)


def text(
    tokenizer: str,
    model: type[PreTrainedModel],
    config: type[PreTrainedConfig],
    **values: Any,
) -> dict[str, Any]:
    """The first two fields of a row."""
    return {"make": of(model, config, **ids_of(tokenizer), **values), "tokenizer": tokenizer}


T5_ROW: dict[str, Any] = {"pools": "mean", "refuses": ("cls", "pooler"), "exports": False}
TEXT_ROWS = {
    "bert": TextRow(**text("wordpiece", BertModel, BertConfig, **TEXT)),
    "roberta": TextRow(
        **text("byte_bpe", RobertaModel, RobertaConfig, **SIZES, max_position_embeddings=42)
    ),
    "distilbert": TextRow(
        **text("wordpiece", DistilBertModel, DistilBertConfig, **DISTILBERT),
        pools="cls",
        refuses=NO_POOLER,
        exports=False,
    ),
    "electra": TextRow(
        **text("wordpiece", ElectraModel, ElectraConfig, **TEXT, embedding_size=16),
        pools="cls",
        refuses=NO_POOLER,
        exports=False,
    ),
    "deberta-v2": TextRow(
        **text("wordpiece", DebertaV2Model, DebertaV2Config, **DEBERTA),
        pools="cls",
        refuses=NO_POOLER,
        exports=False,
    ),
    "modernbert": TextRow(
        **text(
            "byte_bpe",
            ModernBertModel,
            ModernBertConfig,
            **TEXT,
            cls_token_id=0,
            sep_token_id=2,
            local_attention=8,
        ),
        pools="cls",
        refuses=NO_POOLER,
        exports=False,
    ),
    "mpnet": TextRow(
        **text("byte_bpe", MPNetModel, MPNetConfig, **SIZES, max_position_embeddings=42),
        recomputes=False,
    ),
    "clip_text_model": TextRow(
        **text("clip", CLIPTextModel, CLIPTextConfig, **TEXT), refuses=NO_CLASS
    ),
    "clip": TextRow(whole(clip), "clip", refuses=NO_CLASS),
    "siglip_text_model": TextRow(
        **text("siglip", SiglipTextModel, SiglipTextConfig, **TEXT, projection_size=32),
        refuses=NO_CLASS,
        exports=False,
    ),
    "siglip": TextRow(whole(siglip), "siglip", refuses=NO_CLASS, exports=False),
    "t5": TextRow(**text("unigram", T5Model, T5Config, **T5), **T5_ROW),
    "t5, its encoder alone": TextRow(**text("unigram", T5EncoderModel, T5Config, **T5), **T5_ROW),
    "vision-text-dual-encoder": TextRow(whole(dual_encoder)),
}
