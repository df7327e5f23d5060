"""MMCLIP: two encoders, two projections, a learned temperature."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmclip.models.encoders import pooled


class Encoded(NamedTuple):
    """What one modality gives: features per token, and one embedding a row."""

    features: Float[Tensor, "b n d"]  # the encoder's last hidden state, class token first
    embedding: Float[Tensor, "b e"]  # projected and L2-normalised, float32


class MMCLIP(nn.Module):
    """The model of the paper: image encoder, text encoder, joint space.

    Names and shapes of encoders, projections and `logit_scale` are those of transformers'
    VisionTextDualEncoderModel (pooled output, bias-free linear projection).

    Source: paper, figure 1B; CLIP section 2.3 (arXiv:2103.00020).
    """

    def __init__(
        self,
        image_encoder: PreTrainedModel,
        text_encoder: PreTrainedModel,
        embed_dim: int,
        temperature: float,
        max_logit_scale: float,
    ) -> None:
        super().__init__()
        self.vision_model = image_encoder
        self.text_model = text_encoder
        self.visual_projection = nn.Linear(image_encoder.config.hidden_size, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_encoder.config.hidden_size, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_logit_scale = max_logit_scale
        for layer in (self.visual_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # [CLIP, released code]

    def encode_image(self, image: Float[Tensor, "b 1 h w"]) -> Encoded:
        """Encodes films in model space (see data.dataset.normalise)."""
        output = self.vision_model(pixel_values=image)
        projected = self.visual_projection(pooled(output, self.vision_model))
        return Encoded(output.last_hidden_state, F.normalize(projected.float(), dim=-1))

    def encode_text(self, ids: Int[Tensor, "b t"], is_valid: Bool[Tensor, "b t"]) -> Encoded:
        """Encodes token ids; `is_valid` is False on padding."""
        output = self.text_model(input_ids=ids, attention_mask=is_valid.long())
        projected = self.text_projection(pooled(output, self.text_model))
        return Encoded(output.last_hidden_state, F.normalize(projected.float(), dim=-1))

    def scale(self) -> Float[Tensor, ""]:
        """The inverse temperature; clamped, so that its gradient stops at the limit [CLIP 2.5]."""
        return self.logit_scale.exp().clamp(max=self.max_logit_scale)

    def forward(
        self,
        image: Float[Tensor, "b 1 h w"],
        ids: Int[Tensor, "r t"],
        is_valid: Bool[Tensor, "r t"],
    ) -> tuple[Encoded, Encoded, Float[Tensor, ""]]:
        """Encodes films and texts, which may differ in number, and gives the inverse temperature.

        One call a step, so that DistributedDataParallel sees every parameter used once.
        """
        return self.encode_image(image), self.encode_text(ids, is_valid), self.scale()

    def no_decay_names(self) -> set[str]:
        """Parameters that weight decay would pull away from where they mean something.

        Biases and norms (one-dimensional), the temperature, class token and position tables.
        Source: usual practice of ViT and BERT training (timm's `no_weight_decay`).
        """
        tables = ("position_embedding", "cls_token", "token_type_embedding")
        return {
            name
            for name, p in self.named_parameters()
            if p.ndim <= 1 or any(table in name for table in tables)
        }
