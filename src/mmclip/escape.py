"""Text of users in Markdown, in tables for spreadsheets, and in what is meant to be shared.

A name of a finding comes from somebody's table: it may hold HTML, a formula, or a bar.
"""

import re
import shlex
from pathlib import PurePath

_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", **{sign: f"\\{sign}" for sign in "\\`*[]|"}}
)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, in one line: no HTML, no links, no cells of its own."""
    return " ".join(text.translate(_MARKDOWN).split())


_RUN = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""What a formula begins with, in either width. Source: OWASP, "CSV injection"."""


def safe_cell(text: str) -> str:
    """A text that a spreadsheet shows and does not run: an apostrophe stands before a formula."""
    is_formula = text[:1] in ("\t", "\r", "\n") or text.lstrip()[:1] in _RUN
    return f"'{text}" if text and is_formula else text


_PATH = re.compile(r"(?<![\w./\\])(?:~|\.\.|[A-Za-z]:)?[/\\][^\s`'\"|,;()<>]+")


def without_paths(text: str) -> str:
    """Text with the last part alone of each path that tells of a machine: absolute, ~ or .."""
    return _PATH.sub(lambda found: _last_part(found[0]), text)


def portable_command(command: str) -> str:
    """A command without paths of the machine that it ran on; relative ones stay."""
    try:
        words = shlex.split(command)
    except ValueError:
        return without_paths(command)
    return shlex.join(_portable(word) for word in words)


def _portable(word: str) -> str:
    key, is_given, value = word.partition("=")
    if is_given and not re.search(r"[/\\]", key):
        return f"{key}={_portable(value)}"
    is_of_machine = re.match(r"~|\.\.|[A-Za-z]:[/\\]|[/\\]", word)
    return _last_part(word) if is_of_machine else word


def _last_part(path: str) -> str:
    return PurePath(path.replace("\\", "/")).name or "."
