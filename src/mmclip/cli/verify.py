"""`mmclip results --verify`: the recorded command runs again in a fresh folder, and is compared."""

import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

FILES = ("results.json", "retrieval.json")

REPEATED = ("zeroshot", "retrieve", "finetune", "demo")
"""Commands that are run again: they write into --out alone."""

OF_THE_RUN = ("command", "commit", "device", "finished_at", "versions", "wall_s", "run",
              "sha256", "files_sha256")  # fmt: skip
"""What two runs of a command may differ in."""

REL_TOL, ABS_TOL = 1e-4, 1e-6
"""Of numbers: another processor sums in another order, and results have six digits. [chosen]"""


class Verified(NamedTuple):
    """What came of a repeated command."""

    command: str
    n_equal: int  # values that agree
    differ: list[str]  # those that do not, each in one line


def verify(folder: Path, run: Callable[[list[str]], None]) -> Verified:
    """Runs the command of some results again, by our own parser and in a fresh folder.

    Args:
        folder: With results.json or retrieval.json.
        run: Runs the words of a command behind `mmclip`.

    Raises:
        ValueError: When there are no results, or their command is none that is run again.
    """
    name = next((name for name in FILES if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{folder} holds no {' and no '.join(FILES)}; give a folder of results")
    stored = _read(folder / name)
    command = stored.get("provenance", {}).get("command", "")
    words = _words(command)
    with tempfile.TemporaryDirectory(prefix="mmclip-verify-") as made:
        again, below = _elsewhere(words, folder, Path(made) / "out")
        arguments = sys.argv
        sys.argv = ["mmclip", *again]  # what the new results will say
        try:
            with redirect_stdout(sys.stderr):
                run(again)
        finally:
            sys.argv = arguments
        found = _read(Path(made) / "out" / below / name)
    differ, n_equal = [], 0
    for key, was, now in _pairs(stored, found):
        if _agree(was, now):
            n_equal += 1
        else:
            differ.append(f"{key}: was {was!r}, is {now!r}")
    return Verified(command, n_equal, differ)


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); make it again") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no results; make it again")
    return stored


def _words(command: str) -> list[str]:
    """The words behind `mmclip`, of a command that may be run again."""
    try:
        name, *words = shlex.split(command)
    except ValueError:
        name, words = "", []
    words = [word for word in words if word not in ("--debug", "--overwrite")]
    if name != "mmclip" or not words or words[0] not in REPEATED:
        raise ValueError(
            f"`{command}` is not run again: only mmclip {', '.join(REPEATED)} are, which write "
            f"into --out alone"
        )
    return words


def _elsewhere(words: list[str], folder: Path, out: Path) -> tuple[list[str], Path]:
    """The words with another --out, and where below it the results will lie."""
    kept, given, rest = [], "", iter(words)
    for word in rest:
        if word == "--out":
            given = next(rest, "")
        elif word.startswith("--out="):
            given = word.removeprefix("--out=")
        else:
            kept.append(word)
    below = Path()
    if words[0] == "finetune" and given:
        below = Path(folder.resolve().name)
    return [*kept, "--out", str(out)], below


def _pairs(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """All values of two results by their keys; one that is not there is None."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted(was.keys() | now.keys()):
            if name not in OF_THE_RUN:
                yield from _pairs(was.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (one, other) in enumerate(zip(was, now, strict=True)):
            yield from _pairs(one, other, f"{key}[{i}]")
    else:
        yield key, was, now


def _agree(was: Any, now: Any) -> bool:
    is_number = [isinstance(v, int | float) and not isinstance(v, bool) for v in (was, now)]
    if all(is_number):
        return math.isclose(was, now, rel_tol=REL_TOL, abs_tol=ABS_TOL)
    return was == now
