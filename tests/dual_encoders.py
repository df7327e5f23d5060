"""Tiny dual encoders of transformers with processors and tokenizers of their own, saved as theirs
are, and what transformers makes of images and texts when it is called by hand."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTModel,
)
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
VISION = {**SMALL, "image_size": 32, "patch_size": 8}

SENTENCES = [
    "There is a small left pleural effusion.", "No pneumothorax.", "Mild cardiomegaly is present.",
    "Findings suggesting consolidation, atelectasis and edema.", "The lungs are clear.",
    "No acute cardiopulmonary abnormality.", "There is no evidence of pneumonia.",
] * 4  # fmt: skip


def moved(model: PreTrainedModel, seed: int = 7) -> PreTrainedModel:
    """The model with weights far enough from their start that images and texts differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def clip_tokenizer() -> CLIPTokenizer:
    """Of bytes: every text can be read."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token="<|endoftext|>")


def save_clip(folder: Path, size: int = 32, crop: int = 32) -> Path:
    """A CLIPModel, whose processor scales the shorter side and crops."""
    tokenizer = clip_tokenizer()
    text = {
        **SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 77,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))
    moved(model).save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def siglip_tokenizer(folder: Path) -> SiglipTokenizer:
    """Over sentencepiece, as the published ones."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence.lower() for sentence in SENTENCES]), model_writer=model,
        vocab_size=60, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return SiglipTokenizer(str(path), model_max_length=64)


def save_siglip(folder: Path) -> Path:
    """A SiglipModel, whose processor squashes and whose texts are padded to 64 tokens."""
    tokenizer = siglip_tokenizer(folder)
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    text |= {"projection_size": 32, "pad_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(2)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-1.5)
    moved(model).save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    SiglipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def siglip2_tokenizer() -> Siglip2Tokenizer:
    """Of letters, in lower case."""
    listed = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    vocab = {word: i for i, word in enumerate(listed)}
    return Siglip2Tokenizer(vocab=vocab, merges=[], model_max_length=64)


def save_siglip2(folder: Path) -> Path:
    """A Siglip2Model, whose processor keeps the aspect and gives patches."""
    tokenizer = siglip2_tokenizer()
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    text |= {"projection_size": 32, "pad_token_id": 0, "eos_token_id": 1}
    vision = {**SMALL, "num_patches": 16, "patch_size": 8}
    torch.manual_seed(3)
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
    moved(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return folder


def save_dual_encoder(folder: Path) -> Path:
    """A VisionTextDualEncoderModel of a ViT and a BERT."""
    words = sorted({w.strip(".,").lower() for sentence in SENTENCES for w in sentence.split()})
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    listed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    listed += [".", ",", "-", *(word for word in words if len(word) > 1)]
    vocab = {word: i for i, word in enumerate(listed)}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=64)
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    torch.manual_seed(4)
    model = VisionTextDualEncoderModel(
        vision_model=ViTModel(ViTConfig(**VISION)), text_model=BertModel(BertConfig(**text))
    )
    moved(model).save_pretrained(folder)
    images = ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True)
    VisionTextDualEncoderProcessor(images, tokenizer).save_pretrained(folder)
    return folder


SAVE = {
    "clip": save_clip,
    "siglip": save_siglip,
    "vision-text-dual-encoder": save_dual_encoder,
}


class ByHand:
    """What a user of transformers writes: load, process, embed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.kind = self.model.config.model_type
        self.images = {
            "clip": CLIPImageProcessorPil,
            "siglip": SiglipImageProcessorPil,
            "siglip2": Siglip2ImageProcessorPil,
            "vision-text-dual-encoder": ViTImageProcessorPil,
        }[self.kind].from_pretrained(folder)

    def pixel_values(self, path: Path) -> dict[str, torch.Tensor]:
        return dict(self.images(images=load_image(str(path)), return_tensors="pt"))

    @torch.inference_mode()
    def embed_image(self, path: Path) -> torch.Tensor:
        found = self.model.get_image_features(**self.pixel_values(path)).pooler_output
        return F.normalize(found, dim=-1)[0]

    @torch.inference_mode()
    def embed_text(self, text: str) -> torch.Tensor:
        how: dict[str, Any] = {"padding": True}
        if self.kind.startswith("siglip"):
            how = {"padding": "max_length", "max_length": 64}
        tokens = self.tokenizer([text], truncation=True, return_tensors="pt", **how)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)[0]

    def side(self, texts: Sequence[str]) -> torch.Tensor:
        return F.normalize(torch.stack([self.embed_text(t) for t in texts]).mean(0), dim=-1)

    def score(self, path: Path, positives: Sequence[str], negatives: Sequence[str]) -> float:
        """By the rule that is usual for the family."""
        image, scale = self.embed_image(path), self.model.logit_scale.exp().item()
        positive = (image @ self.side(positives)).item()
        if self.kind.startswith("siglip"):
            return 1 / (1 + np.exp(-(scale * positive + self.model.logit_bias.item())))
        negative = (image @ self.side(negatives)).item()
        logits = torch.tensor([scale * positive, scale * negative], dtype=torch.float64)
        return logits.softmax(0)[0].item()
