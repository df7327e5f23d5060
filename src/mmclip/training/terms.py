"""What the training loop asks of a batch and of an objective."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmclip.batch import BatchSlice


@runtime_checkable
class AnyBatch(Protocol):
    """What the loop needs of a batch."""

    @property
    def image_ids(self) -> tuple[str, ...]:
        """The image of each row."""
        ...

    def to(self, device: torch.device) -> Any:
        """The batch that the objective reads, on a device; images are augmented there."""
        ...

    def pin_memory(self) -> Any:
        """The same batch in memory that a GPU reads from while the CPU works."""
        ...


B = TypeVar("B", bound=AnyBatch)

ReadBatch = Callable[[int, BatchSlice], B]
"""What the loop reads from: (step, slice) -> that slice of the batch of a step.

The same step and slice give the same batch, whenever they are asked for."""


@runtime_checkable
class Terms(Protocol):
    """What the loop trains: weighted terms, each a sum over the elements that it applies to."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each term that is trained."""
        ...

    def sums(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Each term, summed over the elements of this process's rows."""
        ...

    def counts(self, batch: Any) -> dict[str, int]:
        """Elements of each term in a batch as it is read; known before the model has run."""
        ...


class Verdict(NamedTuple):
    """What a validation found, and what is to follow."""

    metrics: dict[str, float]  # for the log
    saves: bool  # a checkpoint of this step
    ends: bool  # training, here


@runtime_checkable
class Validate(Protocol):
    """What looks at validation images as training goes."""

    @property
    def every_steps(self) -> int:
        """Steps from one validation to the next; there is one after the last step, too."""
        ...

    def __call__(self, state: Any) -> Verdict:
        """Validates a state, on every process, with the same verdict on all."""
        ...


class Embeddings(NamedTuple):
    """What a contrastive term reads of the model."""

    image: Float[Tensor, "b e"]
    text: Float[Tensor, "b e"]  # 0 in rows without a text
    scale: Float[Tensor, "..."]  # [], or of the sigmoid loss [2]: the scale and its bias


@runtime_checkable
class ContrastiveTerms(Terms, Protocol):
    """Terms of which one, "contrastive", compares all rows of a step; for a gradient cache."""

    def embed(self, model: nn.Module, batch: Any) -> Embeddings:
        """The embeddings of a batch, without what a gradient needs."""
        ...

    def contrast(
        self, embeddings: Embeddings, batches: Sequence[Any], weight: Tensor
    ) -> tuple[Tensor, Embeddings]:
        """The term over some batches as one, and the gradient of weight times it."""
        ...

    def sums_given(self, model: nn.Module, batch: Any, gradient: Embeddings) -> dict[str, Tensor]:
        """As `sums`, but that the contrastive term is any that has this gradient."""
        ...
