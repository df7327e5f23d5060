"""MMCLIP: two encoders, two projections, a learned temperature, and the decoders of training."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from mmclip.batch import Batch, TextBatch
from mmclip.config import ImageMaskConfig, ModelConfig, ScoreTokens
from mmclip.losses import local_logits, masked_token_sum_in_blocks
from mmclip.masking import (
    blend_scores,
    choose_masked_patches,
    masked_patch_count,
    policy_score,
    relevance_score,
)
from mmclip.models.decoders import ImageDecoder, TextDecoder
from mmclip.models.encoders import (
    as_pooled,
    encode_visible,
    forward_text,
    image_layout,
    no_decay_names,
    pooled,
    text_layout,
    token_features,
)
from mmclip.models.outputs import EncoderOutput, MaskedPatches, Outputs, TextOutput
from mmclip.patches import scatter_visible

KERNELS_OF_TEXTS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Attention kernels for texts, whose shape changes with every batch. cuDNN's is not among them: it
plans anew for each shape, on the host. [docs/performance.md]"""


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
        config: ModelConfig,
        image_decoder: ImageDecoder | None = None,
        text_decoder: TextDecoder | None = None,
        n_label_findings: int = 0,
        has_bias: bool = False,
        has_local: bool = False,
    ) -> None:
        """Puts a new joint space on top of two encoders.

        Args:
            image_encoder: Keeps its weights.
            text_encoder: Keeps its weights.
            config: Width of the joint space, and the temperature; not the sizes of the encoders.
            image_decoder: None where no masked patches are rebuilt.
            text_decoder: None where no masked words are recovered.
            n_label_findings: Outputs of the label head; 0 leaves it out.
            has_bias: Learn the bias of the sigmoid loss.
            has_local: Compare words with patches.
        """
        super().__init__()
        embed_dim = config.embed_dim
        self.vision_model = image_encoder
        self.text_model = text_encoder
        self.visual_projection = nn.Linear(image_layout(image_encoder).width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_layout(text_encoder).width, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.register_parameter("logit_bias", None)
        if has_bias:
            self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias))
        self.max_logit_scale = config.max_logit_scale
        for layer in (self.visual_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # [CLIP, released code]
        self.image_decoder, self.text_decoder = image_decoder, text_decoder
        self.has_local = has_local
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
        with sdpa_kernel(KERNELS_OF_TEXTS):
            output = forward_text(self.text_model, ids, is_valid)
        projected = self.text_projection(pooled(output, self.text_model, is_valid))
        return EncoderOutput(output.last_hidden_state, F.normalize(projected.float(), dim=-1))

    def project_patches(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """Features of patches in the joint space, by the way of the pooled vector."""
        return self.visual_projection(as_pooled(features, self.vision_model))

    def project_words(self, features: Float[Tensor, "m t d"]) -> Float[Tensor, "m t e"]:
        """Features of words in the joint space, by the way of the pooled vector."""
        return self.text_projection(as_pooled(features, self.text_model, of_text=True))

    def scale(self) -> Float[Tensor, ""]:
        """The inverse temperature; clamped, so that its gradient stops at the limit [CLIP 2.5]."""
        return self.logit_scale.exp().clamp(max=self.max_logit_scale)

    def forward(
        self,
        batch: Batch,
        mask: ImageMaskConfig | None = None,
        mask_noise: float = 1.0,
        embeddings_only: bool = False,
    ) -> Outputs:
        """All that a training step needs, in one call, as DistributedDataParallel wants it.

        The image passes its encoder once (twice where `mask.mask_stage` is "pixels"). Equal texts
        pass theirs once.

        Args:
            batch: On the model's device.
            mask: How to mask patches; None without an image decoder.
            mask_noise: What of the choice is left to chance, see `masking.mask_noise_at`.
            embeddings_only: Leave out whatever masked modelling needs.
        """
        image = self.encode_image(batch.image)
        if embeddings_only:
            return self._embeddings(batch, image)
        wanted = None
        if mask is not None and mask.is_guided(mask_noise) and mask.score == "decoder_attention":
            wanted = mask.score_tokens
        # Lone reports have masked words alone.
        kinds = batch.masked_texts() if self.text_decoder else (batch.reports, batch.prompts)
        encoded = self._encode_texts(kinds)
        reports = self._read(batch.reports, encoded[0], image.features, wanted)
        prompts = self._read(batch.prompts, encoded[1], image.features, wanted)
        both = [(batch.prompts, prompts.embedding), (batch.reports, reports.embedding)]
        text_embedding = self._texts_of_rows(image.embedding, both)
        read = [reports, prompts]
        read += [self._read(*lone, None) for lone in zip(kinds[2:], encoded[2:], strict=True)]
        token_features, token_loss = self._masked_token_loss(batch.masked_texts(), read)
        rebuilt = MaskedPatches(None, None, None)
        if self.image_decoder is not None and mask is not None:
            rebuilt = self._rebuild(batch, image, (reports, prompts), mask, mask_noise)
        scale = self.scale()
        label_logits = None
        if self.label_head is not None:  # of every row: each process uses every parameter
            label_logits = self.label_head(scale.detach() * image.embedding)
        local = None
        if self.has_local:
            local = self._local_logits(batch, image, (reports, prompts), scale.detach())
        return Outputs(
            image.embedding,
            text_embedding,
            scale,
            self.logit_bias,
            token_features,
            token_loss,
            *rebuilt,
            label_logits,
            local,
        )

    def _embeddings(self, batch: Batch, image: EncoderOutput) -> Outputs:
        """The embeddings of a batch alone."""
        both = batch.reports, batch.prompts
        texts = [
            (each, encoded.embedding.index_select(0, each.encoding.as_it_is))
            for each, encoded in zip(both, self._encode_texts(both), strict=True)
        ]
        text = self._texts_of_rows(image.embedding, texts[::-1])
        nothing = dict.fromkeys(Outputs._fields[4:])
        return Outputs(image.embedding, text, self.scale(), self.logit_bias, **nothing)

    def _local_logits(
        self,
        batch: Batch,
        image: EncoderOutput,
        texts: tuple[TextOutput, TextOutput],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "s s"]:
        """The images of `Batch.entity_rows` against the words of entities of their texts."""
        rows = batch.entity_rows
        patches = self.project_patches(image.features[:, 1:].index_select(0, rows))
        logits = patches.new_zeros(len(rows), len(batch), dtype=torch.float32)
        reports, prompts = texts
        for each, read in ((batch.prompts, prompts), (batch.reports, reports)):
            is_entity = each.chosen("entities")
            width = each.encoding.most_entities
            first = is_entity.int().argsort(dim=1, descending=True, stable=True)[:, :width]
            words = self.project_words(torch.take_along_dim(read.features, first[..., None], 1))
            found = local_logits(patches, words, is_entity.gather(1, first), scale)
            logits = logits.index_copy(1, each.rows, found)
        return logits.index_select(1, rows)

    def _rebuild(
        self,
        batch: Batch,
        image: EncoderOutput,
        texts: tuple[TextOutput, TextOutput],
        mask: ImageMaskConfig,
        mask_noise: float,
    ) -> MaskedPatches:
        """Masks patches, and rebuilds them from the others and the texts, reports and prompts."""
        assert self.image_decoder is not None
        reports, prompts = texts
        guide = mask if mask.is_guided(mask_noise) else None
        relevance = self._relevance(batch, image, reports, prompts, guide)
        is_masked = choose_masked_patches(
            policy_score(mask.policy, relevance, batch.lesion_ratio),
            batch.patch_noise,
            mask.mask_ratio,
            mask_noise,
        )
        features = image.features[:, 1:]
        n_masked = masked_patch_count(is_masked.shape[1], mask.mask_ratio)
        if mask.mask_stage == "pixels":
            visible = encode_visible(self.vision_model, batch.image, is_masked, n_masked)
            features = scatter_visible(visible, is_masked)
        context, is_valid = _side_by_side(batch, prompts.features, reports.features)
        with sdpa_kernel(KERNELS_OF_TEXTS):
            patches = self.image_decoder(features, is_masked, context, is_valid, n_masked)
        return MaskedPatches(patches, is_masked, relevance)

    def forward_text(
        self,
        texts: TextBatch,
        image_features: Float[Tensor, "b i d"] | None,
        attention_of: ScoreTokens | None = None,
    ) -> TextOutput:
        """Encodes texts as they are, and recovers their masked words with the images' help.

        Args:
            texts: At most one per image.
            image_features: Of all images of the batch, class token first; None where the texts
                have no images.
            attention_of: Also give how these words, masked ones in their places, looked at the
                patches; it costs the attention once more, as the fused kernel does not show it.
        """
        return self._read(texts, self._encode_distinct(texts), image_features, attention_of)

    def _read(
        self,
        texts: TextBatch,
        encoded: EncoderOutput,
        image_features: Float[Tensor, "b i d"] | None,
        attention_of: ScoreTokens | None = None,
    ) -> TextOutput:
        """As `forward_text`, of texts whose distinct ones are encoded."""
        plan = texts.encoding
        distinct, embeddings = encoded
        # Not distinct[plan.which]: its gradient adds the rows of a text in the order in which
        # threads come, so that the last bits would differ from run to run.
        features = distinct.index_select(0, plan.as_it_is)
        embedding = embeddings.index_select(0, plan.as_it_is)
        if self.text_decoder is None:
            return TextOutput(features, embedding, None, None)
        asked = texts.is_masked
        with sdpa_kernel(KERNELS_OF_TEXTS):
            x, attention = self.text_decoder.decode(
                distinct.index_select(0, plan.with_masks),
                texts.is_valid,
                None if image_features is None else image_features.index_select(0, texts.rows),
                asked | texts.chosen(attention_of) if attention_of else asked,
                attention_of is not None,
                texts.most_chosen(attention_of),
            )
        masked = x.flatten(0, 1).index_select(0, plan.masked_places)
        return TextOutput(
            features, embedding, masked, None if attention is None else attention[..., 1:]
        )

    def _encode_texts(self, kinds: Sequence[TextBatch]) -> list[EncoderOutput]:
        """The distinct texts of each kind.

        A kind without texts costs no pass of the encoder. Where all are without, there is one over
        the text that nobody asks for of the first kind: every process must use every parameter.
        """
        asked = [each for each in kinds if len(each)] or kinds[:1]
        found = {id(each): self._encode_distinct(each) for each in asked}
        like = found[id(asked[0])]

        def nothing(texts: TextBatch) -> EncoderOutput:
            features = like.features.new_zeros(0, texts.ids.shape[1], like.features.shape[2])
            return EncoderOutput(features, like.embedding[:0])

        return [found[id(each)] if id(each) in found else nothing(each) for each in kinds]

    def _encode_distinct(self, texts: TextBatch) -> EncoderOutput:
        """The distinct texts, bucket after bucket."""
        parts = [self.encode_text(each.ids, each.is_valid) for each in texts.encoding.buckets]
        features = [padded(part.features, texts.ids.shape[1]) for part in parts]
        return EncoderOutput(joined(features), joined([part.embedding for part in parts]))

    def _texts_of_rows(
        self, like: Float[Tensor, "b e"], texts: Sequence[tuple[TextBatch, Tensor]]
    ) -> Float[Tensor, "b e"]:
        """The embedding of each row's text, the last that it has of these; 0 without one."""
        out = like.new_zeros(like.shape)
        for each, embedding in texts:  # a row's text is its report, else its prompt
            out = out.index_copy(0, each.rows, embedding)
        return out

    def token_logits(self, masked_features: Float[Tensor, "h w"]) -> Float[Tensor, "h v"]:
        """What the text decoder says of masked tokens: logits over the vocabulary."""
        assert self.text_decoder is not None
        words = self.text_model.get_input_embeddings().weight
        assert isinstance(words, Tensor)
        return self.text_decoder.predict(masked_features, words)

    def _masked_token_loss(
        self, texts: Sequence[TextBatch], read: Sequence[TextOutput]
    ) -> tuple[Float[Tensor, "h w"] | None, Float[Tensor, ""] | None]:
        """Features of all masked tokens of some texts, and the sum of their cross-entropies.

        The loss is computed here, as its logits would be the largest output of the model.
        """
        features = [output.masked_features for output in read if output.masked_features is not None]
        if self.text_decoder is None:
            return None, None
        targets = [
            each.ids.flatten().index_select(0, each.encoding.masked_places) for each in texts
        ]
        loss = masked_token_sum_in_blocks(features, targets, self.token_logits)
        return torch.cat(features), loss

    @torch.no_grad()
    def _relevance(
        self,
        batch: Batch,
        image: EncoderOutput,
        reports: TextOutput,
        prompts: TextOutput,
        mask: ImageMaskConfig | None,
    ) -> Float[Tensor, "b n"]:
        """How strongly each patch responds to the texts of its row; 0 where `mask` is None, as
        nothing asks for it."""
        features = image.features[:, 1:]
        zero = features.new_zeros(features.shape[:2], dtype=torch.float32)
        if mask is None:
            return zero
        joint = self.project_patches(features)
        scores: list[Tensor] = []
        for texts, text_output in ((batch.reports, reports), (batch.prompts, prompts)):
            score = relevance_score(
                mask.score,
                joint.index_select(0, texts.rows),
                text_output.embedding,
                self.project_words(text_output.features),
                texts.chosen(mask.score_tokens),
                text_output.attention,
            )
            scores.append(zero.index_copy(0, texts.rows, score))
        by_report, by_prompt = scores
        return blend_scores(by_report, by_prompt, batch.has_report, batch.has_prompt)

    def no_decay_names(self) -> set[str]:
        """See `encoders.no_decay_names`."""
        return no_decay_names(self)


def padded(features: Float[Tensor, "m t d"], width: int) -> Float[Tensor, "m u d"]:
    """Features with zeros behind them, up to `width` tokens."""
    missing = width - features.shape[1]
    return F.pad(features, (0, 0, 0, missing)) if missing else features


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors in a row; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _side_by_side(
    batch: Batch, prompts: Float[Tensor, "p s d"], reports: Float[Tensor, "r t d"]
) -> tuple[Float[Tensor, "b u d"], Bool[Tensor, "b u"]]:
    """The features of each row's text, its report else its prompt, padded; and their validity."""
    width = max(prompts.shape[1], reports.shape[1])
    context = prompts.new_zeros(len(batch), width, prompts.shape[2])
    is_valid = torch.zeros(len(batch), width, dtype=torch.bool, device=context.device)
    for texts, features in ((batch.prompts, prompts), (batch.reports, reports)):
        context = context.index_copy(0, texts.rows, padded(features, width))
        missing = width - features.shape[1]
        is_valid = is_valid.index_copy(0, texts.rows, F.pad(texts.is_valid, (0, missing)))
    return context, is_valid
