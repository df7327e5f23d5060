"""What validations say as training goes: the best step, and when to wait no longer.

Pure functions of a history: the step and the score of each validation, higher is better.
"""

from collections.abc import Sequence


def best_of(history: Sequence[tuple[int, float]]) -> int:
    """The step of the highest validation score, the first of equals."""
    return max(history, key=lambda entry: (entry[1], -entry[0]))[0]


def has_ended(history: Sequence[tuple[int, float]], patience: int) -> bool:
    """Whether the last `patience` validations were no better than one before them."""
    if not history:
        return False
    steps = [step for step, _ in history]
    return len(history) - 1 - steps.index(best_of(history)) >= patience
