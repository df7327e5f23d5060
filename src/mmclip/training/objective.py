"""The objective: which terms a configuration trains, their sums over a batch, and their counts.

    L = L_contrastive + loss.image * L_AttMIM + loss.text * L_EntMLM
        + loss.label * L_label + loss.local * L_local

The last two are no part of the method. L_label is the control that asks whether prompts beat plain
labels; L_local compares words with patches, as GLoRIA does.

Every term is a sum over the elements it applies to, here; the training loop divides it by their
number over all processes and micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mmclip.batch import PROMPT, REPORT, Batch
from mmclip.config import Config
from mmclip.data.batches import RawBatch
from mmclip.losses import (
    ContrastiveSum,
    contrastive_sum,
    contrastive_sum_in_blocks,
    label_sum,
    local_sum,
    masked_patch_sum,
    sigmoid_sum,
)
from mmclip.masking import mask_noise_at, masked_patch_count
from mmclip.models.outputs import Outputs
from mmclip.own_code import load_own
from mmclip.patches import PatchGrid, normalise_patches
from mmclip.training.gather import all_gather_rows
from mmclip.training.terms import Embeddings


@dataclass(frozen=True)
class Objective:
    """The terms of a configuration. Source: paper, section 3; docs/method.md."""

    config: Config
    grid: PatchGrid  # where the features of the image encoder lie

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that is trained."""
        loss = self.config.loss
        wanted = {"contrastive": 1.0, **loss.model_dump(exclude={"contrastive"})}
        return {name: weight for name, weight in wanted.items() if weight}

    @property
    def contrastive_sum(self) -> ContrastiveSum:
        """The contrastive loss of one direction.

        Raises:
            ValueError: When it is a function of yours that cannot be had.
        """
        name = self.config.loss.contrastive
        if name == "sigmoid":
            return sigmoid_sum
        return contrastive_sum if name == "softmax" else load_own(name, "loss.contrastive")

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Runs the model on a batch as training does at the step that the batch is of."""
        if not self.config.loss.image:
            return model(batch)
        return model(batch, self.config.image_mask, self.mask_noise(batch.step))

    def mask_noise(self, step: int) -> float:
        """How much of the choice of patches a step leaves to chance."""
        mask = self.config.image_mask
        progress = step / self.config.train.steps
        return mask_noise_at(progress, mask.anneal_from, mask.anneal_to, mask.final_mask_noise)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Runs the model on this process's rows and sums each term over them."""
        out = self.outputs(model, batch)
        contrastive = contrastive_sums(
            embeddings_of(out), batch, self.config.contrastive.by_kind, self.contrastive_sum
        )
        return {"contrastive": contrastive} | self._others(out, batch)

    def sums_given(self, model: nn.Module, batch: Batch, gradient: Embeddings) -> dict[str, Tensor]:
        """As `sums`, but that the contrastive term is linear in the embeddings, with a gradient
        that `contrast` gave; its value is without meaning."""
        out = self.outputs(model, batch)
        pulled = zip(embeddings_of(out), gradient, strict=True)
        linear = torch.stack([(x * g).sum() for x, g in pulled]).sum()
        return {"contrastive": linear} | self._others(out, batch)

    def _others(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The terms of masked modelling and labels."""
        terms = {}
        if out.patches is not None and out.is_masked is not None:
            target = normalise_patches(self.grid.cut(batch.image))
            terms["image"] = masked_patch_sum(out.patches, target, out.is_masked)
        if out.masked_token_loss is not None:
            terms["text"] = out.masked_token_loss
        if out.label_logits is not None and batch.labels is not None:
            terms["label"] = label_sum(out.label_logits, batch.labels)
        if out.local_logits is not None:
            terms["local"] = local_sum(
                out.local_logits, batch.keys.index_select(0, batch.entity_rows)
            )
        return terms

    def embed(self, model: nn.Module, batch: Batch) -> Embeddings:
        """The embeddings of a batch, and nothing that a gradient needs."""
        with torch.no_grad():
            return embeddings_of(model(batch, embeddings_only=True))

    def contrast(
        self, embeddings: Embeddings, batches: Sequence[Batch | RawBatch], weight: Tensor
    ) -> tuple[Tensor, Embeddings]:
        """The contrastive term over some batches as one, and its gradient.

        Args:
            embeddings: Of all rows of the batches, in their order.
            batches: Wherever they are.
            weight: Of the gradient.

        Returns:
            The sum over this process's rows, and the gradient of weight times it with respect to
            the embeddings; the rows of other processes have their part in it.
        """
        leaves = Embeddings(*(x.detach().requires_grad_() for x in embeddings))
        rows = [batch.rest if isinstance(batch, RawBatch) else batch for batch in batches]
        device = leaves.image.device
        keys = torch.cat([batch.keys for batch in rows]).to(device)
        kinds = torch.cat([batch.text_kinds for batch in rows])
        text_rows = (kinds >= 0).nonzero()[:, 0].to(device)
        by_kind = self.config.contrastive.by_kind
        term = contrastive_sum_of(
            leaves, keys, kinds.to(device), text_rows, by_kind, self.contrastive_sum
        )
        gradients = torch.autograd.grad(weight * term, list(leaves))
        return term.detach(), Embeddings(*gradients)

    def counts(self, batch: Batch | RawBatch) -> dict[str, int]:
        """The number of elements of each term.

        Rows with a text, masked patches, masked tokens, known labels of rows without a report,
        rows whose text names an entity.
        """
        batch = batch.rest if isinstance(batch, RawBatch) else batch
        masked = masked_patch_count(batch.patch_noise.shape[1], self.config.image_mask.mask_ratio)
        n_tokens = sum(len(each.encoding.masked_places) for each in batch.masked_texts())
        return {
            "contrastive": len(batch.text_rows),
            "image": len(batch) * masked,
            "text": n_tokens,
            "label": 0 if batch.labels is None else int((~batch.labels.isnan()).sum()),
            "local": len(batch.entity_rows),
        }


def embeddings_of(out: Outputs) -> Embeddings:
    """What the contrastive term reads of a model's output."""
    scale = out.scale if out.bias is None else torch.stack([out.scale, out.bias])
    return Embeddings(out.image_embedding, out.text_embedding, scale)


def contrastive_sums(
    embeddings: Embeddings,
    batch: Batch,
    by_kind: bool = False,
    sum_of: ContrastiveSum = contrastive_sum,
) -> Tensor:
    """`contrastive_sum_of` the rows of a batch."""
    return contrastive_sum_of(
        embeddings, batch.keys, batch.text_kinds, batch.text_rows, by_kind, sum_of
    )


def contrastive_sum_of(
    embeddings: Embeddings,
    keys: Int[Tensor, "b m"],
    text_kinds: Int[Tensor, " b"],
    text_rows: Int[Tensor, " r"],
    by_kind: bool = False,
    sum_of: ContrastiveSum = contrastive_sum,
) -> Tensor:
    """The mean of the two directions, summed over this process's rows that have a text.

    Each row of this process is compared with the rows of all processes.

    Args:
        embeddings: Of this process's rows.
        keys: See `Batch.keys`.
        text_kinds: See `Batch.text_kinds`.
        text_rows: The numbers of the rows that have a text.
        by_kind: Compare rows with a report among themselves, and those with a prompt likewise.
        sum_of: The loss of one direction.

    Source: paper, figure 1B; docs/method.md, row "contrastive term".
    """
    all_image, all_text = all_gather_rows(embeddings.image), all_gather_rows(embeddings.text)
    all_keys, all_kinds = all_gather_rows(keys), all_gather_rows(text_kinds)
    own_keys, own_kinds = keys.index_select(0, text_rows), text_kinds.index_select(0, text_rows)
    image, text = (x.index_select(0, text_rows) for x in (embeddings.image, embeddings.text))
    scale, sums = embeddings.scale, []
    for kind in (REPORT, PROMPT) if by_kind else (None,):
        is_here = all_kinds >= 0 if kind is None else all_kinds == kind
        # Rows of the other kind lose their keys: without a positive they add nothing.
        mine = own_keys if kind is None else own_keys.masked_fill((own_kinds != kind)[:, None], -1)
        for query, others in ((image, all_text), (text, all_image)):
            part = contrastive_sum_in_blocks(
                query, others, mine, all_keys, is_here, scale, sum_of=sum_of
            )
            sums.append(part / 2)
    return torch.stack(sums).sum()
