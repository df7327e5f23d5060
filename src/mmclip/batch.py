"""A batch: some images with what is said of them, as tensors. Made by `data`, read by `models`."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import accumulate
from typing import Any, TypeVar

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


TEXTS_PER_BUCKET = 64
"""Distinct texts below twice which there is one bucket. [chosen: on a CPU the padding of few texts
costs less than a second pass of the encoder]"""

BUCKET_COST = 4096
"""What a pass of the encoder costs beside its tokens, in tokens. [chosen: a GPU needs 7 ms to start
the kernels of 12 layers, forward and backward, and about 2 us a token of BERT-base]"""

WIDTH_STEP = 8
"""Tokens by which the widths of buckets differ at least: the multiple that matrix units want."""


@dataclass(frozen=True)
class TextBucket:
    """Distinct texts of similar length, padded to the longest of them. d texts, t tokens."""

    ids: Int[Tensor, "d t"]
    is_valid: Bool[Tensor, "d t"]


@dataclass(frozen=True)
class EncodingPlan:
    """How the texts of a batch pass the text encoder, and where their masked tokens are.

    Everything that would ask a GPU for a number (which texts are equal, how many tokens are masked)
    is known where the batch is made, so the plan is made there and the device is never waited for.
    """

    buckets: tuple[TextBucket, ...]  # each distinct text once, as it is or with [MASK]
    as_it_is: Int[Tensor, " m"]  # where each text stands among the texts of all buckets
    with_masks: Int[Tensor, " m"]  # where it stands with [MASK] in it
    masked_places: Int[Tensor, " h"]  # of the m * t tokens, in reading order
    most_masked: int  # tokens in the text that has most masked; at least 1
    most_entities: int  # tokens of entities, likewise


def plan_encoding(
    ids: Int[Tensor, "m t"],
    masked_ids: Int[Tensor, "m t"],
    is_valid: Bool[Tensor, "m t"],
    is_entity: Bool[Tensor, "m t"],
    is_masked: Bool[Tensor, "m t"],
) -> EncodingPlan:
    """The plan of some texts; see `Texts` for the arguments.

    Without texts, the plan holds one text that nobody asks for: BERT reads no empty batch, and
    every process must use every parameter.
    """
    both, valid = torch.cat([ids, masked_ids]), is_valid.repeat(2, 1)
    if not len(ids):
        both, valid = ids.new_zeros(1, ids.shape[1]), is_valid.new_ones(1, ids.shape[1])
    distinct, which = torch.unique(both, dim=0, return_inverse=True)
    is_real = torch.zeros_like(valid[: len(distinct)]).index_copy(0, which, valid)
    order, spans = _buckets(is_real.sum(1), ids.shape[1])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return EncodingPlan(
        tuple(TextBucket(distinct[rows, :width], is_real[rows, :width]) for rows, width in spans),
        place[which][: len(ids)],
        place[which][len(ids) : 2 * len(ids)],
        is_masked.flatten().nonzero()[:, 0],
        most_in_a_row(is_masked),
        most_in_a_row(is_entity & is_valid),
    )


def _buckets(
    lengths: Int[Tensor, " d"], longest: int
) -> tuple[Int[Tensor, " d"], list[tuple[Int[Tensor, " rows"], int]]]:
    """The order of some texts in their buckets, and the texts and the width of each bucket.

    Of all ways to cut the texts, sorted by length, this one has the fewest tokens, padding
    and BUCKET_COST for each bucket included. One bucket keeps their order.
    """
    n = len(lengths)
    if n < 2 * TEXTS_PER_BUCKET:
        order = torch.arange(n, device=lengths.device)
        return order, [(order, longest)]
    order = lengths.argsort(stable=True)
    rounded = ((lengths + WIDTH_STEP - 1) // WIDTH_STEP * WIDTH_STEP).clamp(max=longest)
    widths, counts = rounded.unique(return_counts=True)
    cuts = cheapest_cuts(widths.tolist(), counts.tolist(), BUCKET_COST)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[cuts].tolist()
    spans = zip(ends[:-1], ends[1:], widths[torch.tensor(cuts[1:]) - 1].tolist(), strict=True)
    return order, [(order[start:end], width) for start, end, width in spans]


def cheapest_cuts(widths: Sequence[int], counts: Sequence[int], cost_of_part: int) -> list[int]:
    """Where to cut rising widths into parts that are each padded to their last width.

    Args:
        widths: Rising.
        counts: Texts of each width.
        cost_of_part: Tokens that a part costs beside its own.

    Returns:
        The first width of each part, then len(widths): the cuts of least cost, by dynamic
        programming over the widths.
    """
    n_before = [0, *accumulate(counts)]
    best: list[tuple[int, list[int]]] = [(0, [0])]  # cost and cuts of the first i widths
    for end, width in enumerate(widths, start=1):
        found = [
            (cost + (n_before[end] - n_before[start]) * width + cost_of_part, [*cuts, end])
            for start, (cost, cuts) in enumerate(best)
        ]
        best.append(min(found))
    return best[-1][1]


def most_in_a_row(is_asked: Bool[Tensor, "b s"]) -> int:
    """How many places the row that asks for most asks for; at least 1."""
    return max(is_asked.sum(1).tolist(), default=1) or 1


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
    encoding: EncodingPlan = field(init=False)  # follows from the others

    def __post_init__(self) -> None:
        plan = plan_encoding(
            self.ids, self.masked_ids, self.is_valid, self.is_entity, self.is_masked
        )
        object.__setattr__(self, "encoding", plan)

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

    def most_chosen(self, tokens: ScoreTokens | None) -> int:
        """The most words of a text that are masked or of a kind, or a number above it."""
        plan, t = self.encoding, self.ids.shape[1]
        match tokens:
            case None | "masked":
                return plan.most_masked
            case "entities":
                return min(t, plan.most_masked + plan.most_entities)
            case "all":
                return t

    def take(self, keep: Bool[Tensor, " m"]) -> "TextBatch":
        """The texts where `keep` is True."""
        return TextBatch(*(tensor[keep] for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in the order of the fields."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def to(self, device: torch.device) -> "TextBatch":
        """The same texts on a device."""
        return on_each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))


REPORT, PROMPT, NO_TEXT = 0, 1, -1
"""What a row's text is, see `Batch.text_kinds`."""


@dataclass(frozen=True)
class Batch:
    """Some images with their reports and disease-kind prompts. b images, n patches, t and q tokens.

    A row may have a report, a prompt, both or neither. Its text is its report, else its prompt.
    """

    image: Float[Tensor, "b 1 h w"]  # model space, see `data.image_text_dataset.normalise`
    reports: TextBatch
    prompts: TextBatch
    # Study, text, label set, nothing found: equal in a column means positive, -1 none.
    keys: Int[Tensor, "b m"]
    patch_noise: Float[Tensor, "b n"]  # uniform random numbers for `masking.choose_masked_patches`
    # see `patches.lesion_ratio_of_patches`; synthetic images
    lesion_ratio: Float[Tensor, "b n"] | None
    image_ids: tuple[str, ...]
    step: int
    # Labels of rows without a report: 1, 0, NaN unknown; None where no label loss is trained.
    labels: Float[Tensor, "b k"] | None = None
    lone_reports: TextBatch | None = None  # that have no image; their rows are their own numbers
    text_rows: Int[Tensor, " r"] = field(init=False)  # that have a text, in order
    entity_rows: Int[Tensor, " s"] = field(init=False)  # whose text names an entity, in order

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_rows", self.has_text.nonzero()[:, 0])
        names_one = torch.zeros_like(self.has_text)
        for texts in (self.prompts, self.reports):  # a row's text is its report, else its prompt
            names_one = names_one.index_copy(0, texts.rows, texts.chosen("entities").any(1))
        object.__setattr__(self, "entity_rows", names_one.nonzero()[:, 0])

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

    @property
    def text_kinds(self) -> Int[Tensor, " b"]:
        """REPORT on rows with a report, PROMPT on others with a prompt, NO_TEXT on the rest."""
        kinds = torch.full((len(self),), NO_TEXT, device=self.image.device)
        return kinds.masked_fill(self.has_prompt, PROMPT).masked_fill(self.has_report, REPORT)

    def _has(self, texts: TextBatch) -> Tensor:
        has = torch.zeros(len(self.image), dtype=torch.bool, device=self.image.device)
        has[texts.rows] = True
        return has

    def masked_texts(self) -> tuple[TextBatch, ...]:
        """The texts whose masked words are recovered, in their order."""
        lone = () if self.lone_reports is None else (self.lone_reports,)
        return self.reports, self.prompts, *lone

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
        named = {"reports": self.reports, "prompts": self.prompts}
        if self.lone_reports is not None:
            named["lone_reports"] = self.lone_reports
        for name, texts in named.items():
            out |= {f"{name}.{key}": tensor for key, tensor in texts.tensors().items()}
        return out

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return on_each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU reads from while the CPU works."""
        return on_each_tensor(self, Tensor.pin_memory)

    def with_images(
        self, image: Float[Tensor, "b 1 h w"], lesion_ratio: Float[Tensor, "b n"] | None
    ) -> "Batch":
        """The same rows with other pixels; nothing is derived anew."""
        found = copy.copy(self)
        object.__setattr__(found, "image", image)
        object.__setattr__(found, "lesion_ratio", lesion_ratio)
        return found


T = TypeVar("T")


def on_each_tensor(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same dataclass, tuple or tensor with each of its tensors changed, derived ones too."""
    found: Any = value
    if isinstance(value, Tensor):
        found = change(value)
    elif isinstance(value, tuple):
        found = tuple(on_each_tensor(item, change) for item in value)
    elif is_dataclass(value):
        found = copy.copy(value)
        for each in fields(value):
            changed = on_each_tensor(getattr(value, each.name), change)
            object.__setattr__(found, each.name, changed)
    return found
