"""Text of Rich Text Format, in which many reporting systems export their reports."""

import re

_TOKEN = re.compile(
    r"\\([A-Za-z]{1,32})(-?\d{1,6})?[ ]?|\\'([0-9A-Fa-f]{2})|\\([^A-Za-z])|([{}])|([^\\{}\r\n]+)"
)
_BREAKS = {"par", "line", "sect", "page", "row"}
_SIGNS = {
    "tab": " ", "cell": " ", "nestcell": " ", "emdash": "-", "endash": "-", "bullet": "-",
    "lquote": "'", "rquote": "'", "ldblquote": '"', "rdblquote": '"', "emspace": " ",
    "enspace": " ", "~": " ", "_": "-", "-": "",
}  # fmt: skip
_NO_TEXT = {
    "fonttbl", "colortbl", "stylesheet", "info", "pict", "object", "header", "headerl", "headerr",
    "headerf", "footer", "footerl", "footerr", "footerf", "themedata", "listtable", "generator",
    "listoverridetable", "rsidtbl", "filetbl", "revtbl", "xmlnstbl", "fldinst", "datastore",
}  # fmt: skip
"""Groups that a page does not show, and those that repeat on each, with names of patients."""


def is_rtf(text: str) -> bool:
    """Whether a text is written in Rich Text Format."""
    return text.lstrip().startswith("{\\rtf")


def text_of_rtf(source: str) -> str:
    """The words of a text in Rich Text Format, with its line breaks; in time linear in its length.

    Source: Microsoft, Rich Text Format Specification 1.9.1.
    """
    found = re.search(r"\\ansicpg(\d{3,5})", source)
    page = f"cp{found[1]}" if found else "cp1252"
    parts: list[str] = []
    outer: list[tuple[bool, int]] = []
    is_shown, n_skipped, to_skip = True, 1, 0  # signs that stand in for one of Unicode
    for word, number, code, sign, brace, plain in _TOKEN.findall(source):
        if brace == "{":
            outer.append((is_shown, n_skipped))
        elif brace == "}":
            is_shown, n_skipped = outer.pop() if outer else (is_shown, n_skipped)
        elif sign == "*" or word in _NO_TEXT:
            is_shown = False
        elif not is_shown:
            continue
        elif word == "uc":
            n_skipped = int(number or 1)
        elif word == "u" and number:
            parts.append(chr(int(number) % 65_536))
            to_skip = n_skipped
        elif word in _BREAKS or sign in ("\r", "\n"):
            parts.append("\n")
        elif (word or sign) in _SIGNS:
            parts.append(_SIGNS[word or sign])
        elif sign:
            parts.append(sign)
        elif code:
            to_skip, is_new = max(0, to_skip - 1), not to_skip
            parts.append(_decoded(int(code, 16), page) if is_new else "")
        elif plain:
            parts.append(plain[to_skip:])
            to_skip = max(0, to_skip - len(plain))
    return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decoded(byte: int, page: str) -> str:
    try:
        return bytes([byte]).decode(page, "replace")
    except LookupError:  # a code page that Python does not know
        return bytes([byte]).decode("cp1252", "replace")
