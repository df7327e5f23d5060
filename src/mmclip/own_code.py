"""Code of yours by its name, module:name, as commands take it."""

import importlib
import os
import re
import sys
from typing import Any

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own_code(name: str) -> bool:
    """Whether a name is written as module:name."""
    return _NAME.fullmatch(name) is not None


def load_own(name: str, what: str) -> Any:
    """A function or class by module:name; modules of the working folder are found, too.

    What the module raises while it is imported is its own, and is not caught.

    Args:
        name: Such as my_readers:read_hospital.
        what: It is, for errors.

    Raises:
        ValueError: When it is no such name, cannot be imported, or is nothing to be called.
    """
    if not is_own_code(name):
        raise ValueError(f"{what} {name!r} is not module:name, such as my_readers:read_hospital")
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # as in a notebook or `python -m`; the command does not put it there
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"{what} {name}: {module} cannot be imported ({error}); it must lie in the working "
            f"folder or be installed"
        ) from error
    called = vars(found).get(attribute)
    if not callable(called):
        own = [n for n, value in vars(found).items() if _is_of(value, module) and n[0] != "_"]
        there = ", ".join(own) or "none"
        raise ValueError(f"{what} {name}: {module} has no {attribute}; it has {there}")
    return called


def _is_of(value: Any, module: str) -> bool:
    """Whether something can be called and was written in a module, not imported into it."""
    return callable(value) and getattr(value, "__module__", None) == module
