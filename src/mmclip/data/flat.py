"""Runs that stand one after the other in a flat array."""

import numpy as np
from jaxtyping import Int


def starts_of(counts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " starts"]:
    """Where each of some runs starts that stand one after the other, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
