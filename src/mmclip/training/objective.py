"""The objective: which terms a configuration trains, their sums over a batch, and their counts.

    L = L_contrastive + loss.image * L_AttMIM + loss.text * L_EntMLM + loss.label * L_label

L_label is no part of the method: it is the control that asks whether prompts beat plain labels.

Every term is a sum over the elements it applies to, here; the training loop divides it by their
number over all processes and micro-batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmclip.batch import Batch
from mmclip.config import Config
from mmclip.losses import (
    contrastive_sum,
    label_sum,
    masked_patch_sum,
    masked_token_sum,
    positive_pairs,
)
from mmclip.masking import mask_noise_at, masked_patch_count
from mmclip.models.mmclip import MaskPlan, Outputs
from mmclip.patches import normalise_patches, patchify
from mmclip.training.loop import all_gather_rows


@dataclass(frozen=True)
class Objective:
    """The terms of a configuration. Source: paper, section 3; docs/method.md."""

    config: Config
    patch_size: int  # of the image encoder

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that is trained."""
        loss = self.config.loss
        wanted = {"contrastive": 1.0, **loss.model_dump()}
        return {name: weight for name, weight in wanted.items() if weight}

    def plan(self, step: int) -> MaskPlan | None:
        """How patches are masked at a step; None where no image term is trained."""
        if not self.config.loss.image:
            return None
        mask = self.config.image_mask
        return MaskPlan(
            mask.mask_ratio,
            mask.policy,
            mask.score,
            mask.score_tokens,
            mask.mask_stage,
            mask_noise_at(
                step / self.config.train.steps,
                mask.anneal_from,
                mask.anneal_to,
                mask.final_mask_noise,
            ),
        )

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Runs the model on this process's rows and sums each term over them."""
        out: Outputs = model(batch, self.plan(batch.step))
        terms = {"contrastive": contrastive_sums(out, batch)}
        if out.patches is not None and out.is_masked is not None:
            target = normalise_patches(patchify(batch.image, self.patch_size))
            terms["image"] = masked_patch_sum(out.patches, target, out.is_masked)
        if out.token_logits is not None:
            masked = [texts.ids[texts.is_masked] for texts in (batch.reports, batch.prompts)]
            terms["text"] = masked_token_sum(out.token_logits, torch.cat(masked))
        if out.label_logits is not None and batch.labels is not None:
            terms["label"] = label_sum(out.label_logits, batch.labels)
        return terms

    def counts(self, batch: Batch) -> dict[str, int]:
        """The number of elements of each term.

        Rows with a text, masked patches, masked tokens, known labels of rows without a report.
        """
        masked = masked_patch_count(batch.patch_noise.shape[1], self.config.image_mask.mask_ratio)
        n_tokens = sum(int(texts.is_masked.sum()) for texts in (batch.reports, batch.prompts))
        return {
            "contrastive": int(batch.has_text.sum()),
            "image": len(batch) * masked,
            "text": n_tokens,
            "label": 0 if batch.labels is None else int((~batch.labels.isnan()).sum()),
        }


def contrastive_sums(out: Outputs, batch: Batch) -> Tensor:
    """The mean of the two directions, summed over this process's rows that have a text.

    Each row of this process is compared with the rows of all processes.

    Source: paper, figure 1B; docs/method.md, row "contrastive term".
    """
    all_image, all_text = all_gather_rows(out.image_embedding), all_gather_rows(out.text_embedding)
    all_keys, all_has_text = all_gather_rows(batch.keys), all_gather_rows(batch.has_text)
    rows = batch.has_text
    is_positive = positive_pairs(batch.keys[rows], all_keys)
    image, text = out.image_embedding[rows], out.text_embedding[rows]
    to_text = contrastive_sum(image, all_text, is_positive, all_has_text, out.scale)
    to_image = contrastive_sum(text, all_image, is_positive, all_has_text, out.scale)
    return (to_text + to_image) / 2
