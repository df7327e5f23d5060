"""The command line. Each command reads its arguments, calls one stage, and prints what came out.

Imports of torch and transformers happen inside the commands, so that --help is quick.
"""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmclip import __version__
from mmclip.cli import data, evaluate, explain, finetune, results, retrieve, train
from mmclip.progress import console

if TYPE_CHECKING:
    from mmclip.doctor import Finding

app = typer.Typer(
    name="mmclip",
    help="Pre-train on chest X-rays and reports; classify zero-shot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(train.app)
app.add_typer(evaluate.app)
app.add_typer(finetune.app)
app.add_typer(results.app)
app.add_typer(retrieve.app)
app.add_typer(explain.app)
app.add_typer(data.app, name="data")


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and details.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Settings of every command."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(message)s"
    )
    for noisy in ("matplotlib", "PIL", "urllib3", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mmclip").setLevel(logging.DEBUG if debug else logging.INFO)


@app.command()
def doctor(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Data folders, runs and results to examine.")
    ] = None,
) -> None:
    """Says what is installed, which device is used, and what of the given folders is sound.

    Example: `mmclip doctor data/films runs/first runs/first/test`
    """
    from mmclip.doctor import examine, examine_machine

    def say(finding: "Finding") -> bool:
        # One line each, never cut: it names paths, and logs are searched by them.
        mark, style = ("ok", "") if finding.is_sound else ("BAD", "red")
        line = f"{mark:<5}{finding.what:<14} {finding.detail}"
        console.print(line, style=style, markup=False, soft_wrap=True)
        return finding.is_sound

    found = [say(finding) for finding in examine_machine()]
    for folder in folders or ():
        console.print(f"\n{folder}", markup=False, soft_wrap=True)
        found += [say(finding) for finding in examine(folder)]
    if not all(found):
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; an error is one line, a traceback needs --debug."""
    debug = "--debug" in sys.argv[1:]
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        if ended.code == 130:  # so typer ends at Ctrl-C, without a word
            console.print("interrupted")
        raise
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, ValueError | OSError | RuntimeError)
        kind = "" if known else f"unexpected {type(error).__name__}: "
        hint = "" if known else " (run again with --debug after `mmclip` for the traceback)"
        said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        console.print(f"error: {kind}{said}{hint}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
