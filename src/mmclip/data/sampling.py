"""Counter-based random numbers by (seed, purpose, epoch, image), and what each step reads.

Nothing here depends on the process, the worker, the batch, or what was drawn before. So a run can
be resumed, or dealt out to more processes, without a change of what it sees.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache, partial

import numpy as np


class Purpose(IntEnum):
    """What a counter-based random number is for; each purpose has its own stream of numbers."""

    ORDER = 0
    AUGMENT = 1
    SENTENCES = 2
    SHUFFLE_PAIRS = 3
    PATCHES = 4
    CONCEPTS = 5
    CUES = 6
    TOKENS = 7
    PROMPT = 8


_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)


def _splitmix(x: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64 (Steele et al., OOPSLA 2014), a bijection that mixes all bits.
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MIX[0]
        x = (x ^ (x >> np.uint64(27))) * _MIX[1]
        return x ^ (x >> np.uint64(31))


def keyed_uniform(
    seed: int, purpose: Purpose, epochs: np.ndarray, image_keys: np.ndarray, n_numbers: int
) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on (seed, purpose, epoch, image) and on nothing else.

    Args:
        seed: The run's seed.
        purpose: Which stream.
        epochs: int [b], the epoch in which each row is drawn.
        image_keys: uint64 [b], see `image_key`.
        n_numbers: Numbers a row.

    Returns:
        float64 [b, n_draws].

    Source: counter-based random numbers (Salmon et al., SC 2011), here SplitMix64 over the key.
    """
    with np.errstate(over="ignore"):
        state = _splitmix(np.asarray(image_keys, np.uint64) + _STEP)
        for part in (np.uint64(seed % 2**64), np.uint64(purpose), np.asarray(epochs, np.uint64)):
            state = _splitmix((state ^ part) + _STEP)
        counter = np.arange(1, n_numbers + 1, dtype=np.uint64) * _STEP
        bits = _splitmix(state[:, None] + counter[None, :])
    return (bits >> np.uint64(11)) * 2.0**-53


def image_key(image_id: str) -> int:
    """64 bits that stand for an image (or any other name) in counter-based random numbers and
    comparisons."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "big")


def order_of_epoch(seed: int, epoch: int, image_keys: np.ndarray) -> np.ndarray:
    """The permutation of the rows in an epoch: a sort by counter-based random numbers."""
    epochs = np.full(len(image_keys), epoch)
    uniforms = keyed_uniform(seed, Purpose.ORDER, epochs, image_keys, 1)[:, 0]
    return np.argsort(uniforms, kind="stable")


@dataclass(frozen=True)
class Schedule:
    """Which rows each step reads: one endless stream of permuted epochs, cut into batches.

    No row is left out at an epoch's end, and no batch is short. The rows of a step follow from its
    number, so there is no state to save.
    """

    image_keys: np.ndarray  # uint64 [n]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not len(self.image_keys):
            raise ValueError("there are no rows to read from")

    @cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        """`order_of_epoch`, kept for the two epochs that a step may read from."""
        return lru_cache(2)(partial(order_of_epoch, self.seed, image_keys=self.image_keys))

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers [batch_size] and the epoch of each [batch_size] for a step from 0 on."""
        n = len(self.image_keys)
        position = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = np.divmod(position, n)
        rows = np.empty_like(position)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._order(int(epoch))[within[here]]
        return rows, epochs
