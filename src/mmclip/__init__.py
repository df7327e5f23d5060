"""MMCLIP: masked medical contrastive language-image pre-training for chest X-rays and reports.

`mmclip.load(path)` opens a trained model; docs/python.md shows what it does. Importing this package
imports nothing else: torch and the rest come with the first use of `load` or `Model`.
"""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = ("Model", "load")


def __getattr__(name: str) -> object:
    """Imports `mmclip.api` at the first use of one of its names. Types: __init__.pyi."""
    if name in _LAZY:
        return vars(import_module("mmclip.api"))[name]
    raise AttributeError(f"module 'mmclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, also those that are not imported yet."""
    return sorted({*globals(), *_LAZY})
