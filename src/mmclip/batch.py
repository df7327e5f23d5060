"""A batch: some images with what is said of them, as tensors. Made by `data`, read by `models`."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmclip.config import ScoreTokens


@dataclass(frozen=True)
class BatchSlice:
    """What one process reads of a step in one micro-batch: part `index` of `of`, counted from 0."""

    index: int = 0
    of: int = 1

    def of_rows(self, n: int) -> slice:
        """This part of n rows; parts differ by one row at most."""
        return slice(self.index * n // self.of, (self.index + 1) * n // self.of)


@dataclass(frozen=True)
class TextBatch:
    """Texts of some rows of a batch, at most one a row. m texts, t tokens.

    What is masked does not depend on the model, so it is chosen where the batch is made.
    """

    rows: Int[Tensor, " m"]  # the row of the batch that each text belongs to
    ids: Int[Tensor, "m t"]
    is_valid: Bool[Tensor, "m t"]
    is_entity: Bool[Tensor, "m t"]  # words of a finding, an anatomy or a modifier
    is_masked: Bool[Tensor, "m t"]  # to be recovered by the text decoder
    masked_ids: Int[Tensor, "m t"]  # `ids` with [MASK] where `is_masked`

    def __len__(self) -> int:
        return len(self.rows)

    def chosen(self, tokens: ScoreTokens) -> Bool[Tensor, "m t"]:
        """The words of a kind, as `config.ScoreTokens` names them."""
        kinds = {
            "entities": self.is_entity & self.is_valid,
            "masked": self.is_masked,
            "all": self.is_valid,
        }
        return kinds[tokens]

    def take(self, keep: Bool[Tensor, " m"]) -> "TextBatch":
        """The texts where `keep` is True."""
        return TextBatch(*(tensor[keep] for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device) -> "TextBatch":
        """The same texts on a device."""
        return TextBatch(
            *(tensor.to(device, non_blocking=True) for tensor in self.tensors().values())
        )


@dataclass(frozen=True)
class Batch:
    """Some images with their reports and disease-kind prompts. b images, n patches, t and q tokens.

    A row may have a report, a prompt, both or neither. Its text is its report, else its prompt.
    """

    image: Float[Tensor, "b 1 h w"]  # model space, see `data.image_text_dataset.normalise`
    reports: TextBatch
    prompts: TextBatch
    keys: Int[Tensor, "b 3"]  # study, text, label set; equal in a column means positive, -1 none
    patch_noise: Float[Tensor, "b n"]  # uniform random numbers for `masking.choose_masked_patches`
    # see `patches.lesion_ratio_of_patches`; synthetic images
    lesion_ratio: Float[Tensor, "b n"] | None
    image_ids: tuple[str, ...]
    step: int
    # Labels of rows without a report: 1, 0, NaN unknown; None where no label loss is trained.
    labels: Float[Tensor, "b k"] | None = None

    def __len__(self) -> int:
        return len(self.image)

    @property
    def has_report(self) -> Bool[Tensor, " b"]:
        """True on rows with a report."""
        return self._has(self.reports)

    @property
    def has_prompt(self) -> Bool[Tensor, " b"]:
        """True on rows with a prompt."""
        return self._has(self.prompts)

    @property
    def has_text(self) -> Bool[Tensor, " b"]:
        """True on rows with a report or a prompt."""
        return self.has_report | self.has_prompt

    def _has(self, texts: TextBatch) -> Tensor:
        has = torch.zeros(len(self.image), dtype=torch.bool, device=self.image.device)
        has[texts.rows] = True
        return has

    def texts(self) -> tuple[TextBatch, TextBatch]:
        """The texts that the losses read: every report, and the prompts of rows without one."""
        stands_alone = ~self.has_report[self.prompts.rows]
        return self.reports, self.prompts.take(stands_alone)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        out = {"image": self.image, "keys": self.keys, "patch_noise": self.patch_noise}
        if self.lesion_ratio is not None:
            out["lesion_ratio"] = self.lesion_ratio
        if self.labels is not None:
            out["labels"] = self.labels
        for name, texts in (("reports", self.reports), ("prompts", self.prompts)):
            out |= {f"{name}.{key}": tensor for key, tensor in texts.tensors().items()}
        return out

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        lesion, labels = self.lesion_ratio, self.labels
        return Batch(
            image=self.image.to(device, non_blocking=True),
            reports=self.reports.to(device),
            prompts=self.prompts.to(device),
            keys=self.keys.to(device, non_blocking=True),
            patch_noise=self.patch_noise.to(device, non_blocking=True),
            lesion_ratio=None if lesion is None else lesion.to(device, non_blocking=True),
            image_ids=self.image_ids,
            step=self.step,
            labels=None if labels is None else labels.to(device, non_blocking=True),
        )
