"""MMCLIP: two encoders, two projections, a learned temperature, and the decoders of training."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmclip.batch import Batch, TextBatch
from mmclip.config import Config, MaskPolicy, MaskStage, ScoreKind, ScoreTokens
from mmclip.masking import (
    blend_scores,
    choose_masked_patches,
    masked_patch_count,
    policy_score,
    relevance_score,
)
from mmclip.models.decoders import ImageDecoder, TextDecoder
from mmclip.models.encoders import (
    encode_visible,
    forward_text,
    image_layout,
    no_decay_names,
    pooled,
    text_layout,
    token_features,
)
from mmclip.patches import scatter_visible


class EncoderOutput(NamedTuple):
    """What one modality gives: features per token, and one embedding a row."""

    features: Float[Tensor, "b n d"]  # the encoder's, class token (a ResNet's pooled feature) first
    embedding: Float[Tensor, "b e"]  # projected and L2-normalised, float32


class MaskPlan(NamedTuple):
    """How AttMIM chooses what to mask at a point of training; see `config.ImageMaskConfig`."""

    mask_ratio: float
    policy: MaskPolicy
    score: ScoreKind
    score_tokens: ScoreTokens
    mask_stage: MaskStage
    mask_noise: float

    @property
    def is_guided(self) -> bool:
        """Whether the choice looks at what the texts say."""
        return self.policy in ("attention", "least_relevant") and self.mask_noise < 1


class TextOutput(NamedTuple):
    """What the model makes of some texts. m texts, t tokens, h masked tokens."""

    features: Float[Tensor, "m t d"]
    embedding: Float[Tensor, "m e"]
    token_logits: Float[Tensor, "h v"] | None  # None without a text decoder
    attention: Float[Tensor, "m heads t n"] | None  # to the patches; where it was asked for


class Outputs(NamedTuple):
    """What the losses read. Rows without a text have a text embedding of 0."""

    image_embedding: Float[Tensor, "b e"]
    text_embedding: Float[Tensor, "b e"]
    scale: Float[Tensor, ""]
    token_logits: Float[Tensor, "h v"] | None  # of reports, then of prompts
    patches: Float[Tensor, "b n p"] | None  # predicted pixels, see `ImageDecoder`
    is_masked: Bool[Tensor, "b n"] | None
    relevance: Float[Tensor, "b n"] | None  # what the choice went by, before policy and noise
    label_logits: Float[Tensor, "b k"] | None  # None without a label loss


class MMCLIP(nn.Module):
    """The model of the paper: image encoder, text encoder, joint space, two decoders.

    Names and shapes of encoders, projections and `logit_scale` are those of transformers'
    VisionTextDualEncoderModel (pooled output, bias-free linear projection). A decoder is None
    where its loss is not trained.

    The label head of the control is linear on the embedding e of the image, times the scale:
    scale * <w_k, e> + b_k. A prompt acts there and in that way, and zero-shot scoring reads e; the
    one difference is that w_k is a free vector in place of the embedding of a text. On the pooled
    feature the labels would leave the projection alone, and the control would be weaker for that.
    No gradient of it reaches the scale, which the contrastive term learns. Embeddings do not
    depend on the head, so zero-shot scoring ignores it.

    Source: paper, figure 1B; CLIP section 2.3 (arXiv:2103.00020).
    """

    def __init__(
        self,
        image_encoder: PreTrainedModel,
        text_encoder: PreTrainedModel,
        embed_dim: int,
        temperature: float,
        max_logit_scale: float,
        image_decoder: ImageDecoder | None = None,
        text_decoder: TextDecoder | None = None,
        n_label_findings: int = 0,
    ) -> None:
        super().__init__()
        self.vision_model = image_encoder
        self.text_model = text_encoder
        self.visual_projection = nn.Linear(image_layout(image_encoder).width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_layout(text_encoder).width, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_logit_scale = max_logit_scale
        for layer in (self.visual_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # [CLIP, released code]
        self.image_decoder, self.text_decoder = image_decoder, text_decoder
        self.label_head: nn.Linear | None = None
        if n_label_findings:  # last, so that other weights are those of the arm without it
            self.label_head = nn.Linear(embed_dim, n_label_findings)
            nn.init.normal_(self.label_head.weight, std=embed_dim**-0.5)  # unit length, as a text
            nn.init.zeros_(self.label_head.bias)

    def encode_image(self, image: Float[Tensor, "b 1 h w"]) -> EncoderOutput:
        """Encodes images in model space (see data.image_text_dataset.normalise)."""
        output = self.vision_model(pixel_values=image)
        projected = self.visual_projection(pooled(output, self.vision_model))
        features = token_features(output, self.vision_model)
        return EncoderOutput(features, F.normalize(projected.float(), dim=-1))

    def encode_text(self, ids: Int[Tensor, "b t"], is_valid: Bool[Tensor, "b t"]) -> EncoderOutput:
        """Encodes token ids; `is_valid` is False on padding."""
        output = forward_text(self.text_model, ids, is_valid)
        projected = self.text_projection(pooled(output, self.text_model, is_valid))
        return EncoderOutput(output.last_hidden_state, F.normalize(projected.float(), dim=-1))

    def scale(self) -> Float[Tensor, ""]:
        """The inverse temperature; clamped, so that its gradient stops at the limit [CLIP 2.5]."""
        return self.logit_scale.exp().clamp(max=self.max_logit_scale)

    def forward(self, batch: Batch, plan: MaskPlan | None = None) -> Outputs:
        """All that a training step needs, in one call, as DistributedDataParallel wants it.

        The image passes its encoder once (twice where `plan.mask` is "pixels"). Equal texts pass
        theirs once.

        Args:
            batch: On the model's device.
            plan: How to mask patches; None without an image decoder.
        """
        image = self.encode_image(batch.image)
        wanted = None
        if plan is not None and plan.is_guided and plan.score == "decoder_attention":
            wanted = plan.score_tokens
        reports = self.forward_text(batch.reports, image.features, wanted)
        prompts = self.forward_text(batch.prompts, image.features, wanted)
        # A row's text is its report, else its prompt: reports are put in place last.
        both = ((batch.prompts, prompts), (batch.reports, reports))
        text_embedding = image.embedding.new_zeros(image.embedding.shape)
        for texts, text_output in both:
            text_embedding = text_embedding.index_copy(0, texts.rows, text_output.embedding)
        logits = [
            text_output.token_logits
            for text_output in (reports, prompts)
            if text_output.token_logits is not None
        ]
        token_logits = torch.cat(logits) if logits else None
        patches = is_masked = relevance = None
        if self.image_decoder is not None and plan is not None:
            relevance = self._relevance(batch, image, reports, prompts, plan)
            is_masked = choose_masked_patches(
                policy_score(plan.policy, relevance, batch.lesion_ratio),
                batch.patch_noise,
                plan.mask_ratio,
                plan.mask_noise,
            )
            features = image.features[:, 1:]
            n_masked = masked_patch_count(is_masked.shape[1], plan.mask_ratio)
            if plan.mask_stage == "pixels":
                visible = encode_visible(self.vision_model, batch.image, is_masked, n_masked)
                features = scatter_visible(visible, is_masked)
            context, is_valid = _side_by_side(batch, prompts.features, reports.features)
            patches = self.image_decoder(features, is_masked, context, is_valid, n_masked)
        scale = self.scale()
        label_logits = None
        if self.label_head is not None:  # of every row: each process uses every parameter
            label_logits = self.label_head(scale.detach() * image.embedding)
        return Outputs(
            image.embedding,
            text_embedding,
            scale,
            token_logits,
            patches,
            is_masked,
            relevance,
            label_logits,
        )

    def forward_text(
        self,
        texts: TextBatch,
        image_features: Float[Tensor, "b i d"],
        attention_of: ScoreTokens | None = None,
    ) -> TextOutput:
        """Encodes texts as they are, and recovers their masked words with the images' help.

        Args:
            texts: At most one per image.
            image_features: Of all images of the batch, class token first.
            attention_of: Also give how these words, masked ones in their places, looked at the
                patches; it costs the attention once more, as the fused kernel does not show it.
        """
        ids, is_valid = texts.ids, texts.is_valid
        if self.text_decoder is not None:
            ids, is_valid = torch.cat([ids, texts.masked_ids]), is_valid.repeat(2, 1)
        if not len(texts):
            # BERT reads no empty batch, and every process must use every parameter: a text that
            # nobody asks for.
            width = ids.shape[1]
            ids, is_valid = ids.new_zeros(1, width), is_valid.new_ones(1, width)
        ids, which = torch.unique(ids, dim=0, return_inverse=True)
        first = torch.zeros_like(is_valid[: len(ids)]).index_copy(0, which, is_valid)
        encoded = self.encode_text(ids, first)
        m = len(texts)
        # Not encoded.features[which]: its gradient adds the rows of a text in the order in which
        # threads come, so that the last bits would differ from run to run.
        features = encoded.features.index_select(0, which[:m])
        embedding = encoded.embedding.index_select(0, which[:m])
        if self.text_decoder is None:
            return TextOutput(features, embedding, None, None)
        x, attention = self.text_decoder.decode(
            encoded.features.index_select(0, which[m : 2 * m]),
            texts.is_valid,
            image_features[texts.rows],
            texts.is_masked | texts.chosen(attention_of) if attention_of else texts.is_masked,
            attention_of is not None,
        )
        words = self.text_model.get_input_embeddings().weight
        assert isinstance(words, Tensor)
        logits = self.text_decoder.predict(x, texts.is_masked, words)
        return TextOutput(
            features, embedding, logits, None if attention is None else attention[..., 1:]
        )

    @torch.no_grad()
    def _relevance(
        self,
        batch: Batch,
        image: EncoderOutput,
        reports: TextOutput,
        prompts: TextOutput,
        plan: MaskPlan,
    ) -> Float[Tensor, "b n"]:
        """How strongly each patch responds to the texts of its row; 0 where nothing asks for it."""
        features = image.features[:, 1:]
        zero = features.new_zeros(features.shape[:2], dtype=torch.float32)
        if not plan.is_guided:
            return zero
        joint = self.visual_projection(features)
        scores: list[Tensor] = []
        for texts, text_output in ((batch.reports, reports), (batch.prompts, prompts)):
            score = relevance_score(
                plan.score,
                joint[texts.rows],
                text_output.embedding,
                self.text_projection(text_output.features),
                texts.chosen(plan.score_tokens),
                text_output.attention,
            )
            scores.append(zero.index_copy(0, texts.rows, score))
        by_report, by_prompt = scores
        return blend_scores(by_report, by_prompt, batch.has_report, batch.has_prompt)

    def no_decay_names(self) -> set[str]:
        """See `encoders.no_decay_names`."""
        return no_decay_names(self)


def _side_by_side(
    batch: Batch, prompts: Float[Tensor, "p s d"], reports: Float[Tensor, "r t d"]
) -> tuple[Float[Tensor, "b u d"], Bool[Tensor, "b u"]]:
    """The features of each row's text, its report else its prompt, padded; and their validity."""
    width = max(prompts.shape[1], reports.shape[1])
    context = prompts.new_zeros(len(batch), width, prompts.shape[2])
    is_valid = torch.zeros(len(batch), width, dtype=torch.bool, device=context.device)
    for texts, features in ((batch.prompts, prompts), (batch.reports, reports)):
        pad = width - features.shape[1]
        context = context.index_copy(0, texts.rows, F.pad(features, (0, 0, 0, pad)))
        is_valid = is_valid.index_copy(0, texts.rows, F.pad(texts.is_valid, (0, pad)))
    return context, is_valid


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
    image_decoder = text_decoder = None
    if config.loss.image:
        side = vision.image_px // vision.patch_size
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
        )
    return MMCLIP(
        image_encoder,
        text_encoder,
        config.model.embed_dim,
        config.model.temperature,
        config.model.max_logit_scale,
        image_decoder,
        text_decoder,
        n_label_findings if config.loss.label else 0,
    )
