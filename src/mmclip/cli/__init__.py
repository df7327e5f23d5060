"""The command line. Each command reads its arguments, calls one stage, and prints what came out.

Imports of torch and transformers happen inside the commands, so that --help is quick.
"""

import errno
import io
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mmclip import __version__
from mmclip.cli import (
    data,
    evaluate,
    explain,
    export,
    finetune,
    predict,
    results,
    retrieve,
    serve,
    train,
)
from mmclip.cli.plain import PlainCommand, PlainGroup
from mmclip.progress import console

if TYPE_CHECKING:
    from mmclip.doctor import HealthCheck

app = typer.Typer(
    name="mmclip",
    cls=PlainGroup,
    help="Pre-train on chest X-rays and reports; classify zero-shot.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.add_typer(train.app)
app.add_typer(evaluate.app)
app.add_typer(predict.app)
app.add_typer(finetune.app)
app.add_typer(results.app)
app.add_typer(retrieve.app)
app.add_typer(explain.app)
app.add_typer(serve.app)
app.add_typer(export.app)
app.add_typer(data.app, name="data")


MAP = """\
Pre-train on chest X-rays and reports; classify zero-shot. The commands, in order of use:

  mmclip doctor          what is installed, and what of a folder is sound
  mmclip demo            all of it on synthetic images, in a few minutes
  mmclip data build      a data set as downloaded -> a data folder
  mmclip data labels     label images by what their reports say
  mmclip data split      set a named split of a data folder
  mmclip data check      what splits and data sets share
  mmclip pretrain        data folders -> a run
  mmclip zeroshot        a run or a public model, scored by text prompts
  mmclip predict         images without labels, scored by any model
  mmclip finetune        a run, fine-tuned on few labels
  mmclip results         results side by side
  mmclip compare-models  models of any make, scored and set side by side
  mmclip retrieve        the nearest patients for an image or a phrase
  mmclip explain         which parts of an image match a phrase
  mmclip serve           scores, maps and search on a local web page
  mmclip export          a run for transformers, the hub or onnxruntime

mmclip COMMAND --help says more of each."""


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and details.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Settings of every command."""
    if context.invoked_subcommand is None:
        print(MAP)
        raise typer.Exit
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(message)s"
    )
    for noisy in ("matplotlib", "PIL", "urllib3", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mmclip").setLevel(logging.DEBUG if debug else logging.INFO)


@app.command(cls=PlainCommand)
def doctor(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Data folders, runs and results to examine.", metavar="PATH"),
    ] = None,
) -> None:
    """Checks the installation, names the device, and checks data folders, runs and results.

    Example: `mmclip doctor data/images runs/first runs/first/test`
    """
    from mmclip.doctor import examine, examine_machine

    def say(check: "HealthCheck") -> bool:
        # One line each, never cut: it names paths, and logs are searched by them.
        mark, style = ("ok", "") if check.is_sound else ("BAD", "red")
        line = f"{mark:<5}{check.what:<14} {check.detail}"
        console.print(line, style=style, markup=False, soft_wrap=True)
        return check.is_sound

    found = [say(check) for check in examine_machine()]
    for folder in folders or ():
        console.print(f"\n{folder}", markup=False, soft_wrap=True)
        found += [say(check) for check in examine(folder)]
    if not all(found):
        raise typer.Exit(1)


UsageError = cast("type[Exception]", typer.BadParameter.__base__)
"""Of Click, or of its copy in newer versions of Typer: it has no public name in both."""


def main() -> None:
    """Runs the command line; an error is one line, a traceback needs --debug."""
    debug = "--debug" in sys.argv[1:]
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(each, _end)
    if not sys.stdout:  # None where the caller closed it
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if not sys.stderr:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without a sign shows its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="mmclip", standalone_mode=False) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # `mmclip ... | head`: who reads has what he wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # as of other programs: 128 and SIGPIPE
    except UsageError as error:
        code = _say_usage_error(error)
    except typer.Abort:  # the older Typers end so at Ctrl-C
        code = 130
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, ValueError | OSError | RuntimeError)
        kind = "" if known else f"unexpected {type(error).__name__}: "
        hint = "" if known else " (run again with --debug after `mmclip` for the traceback)"
        said = " ".join(error_line(error).split())
        console.print(f"error: {kind}{said}{hint}", style="red", markup=False, soft_wrap=True)
        code = 1
    if code == 130:
        console.print("interrupted")
    sys.exit(code)


def _end(number: int, _: object) -> None:
    """Ends the command as Ctrl-C does, so that what it wrote aside goes; the second signal kills.

    `pretrain` and full fine-tuning end between two steps instead, and the server by itself.
    """
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


def error_line(error: Exception) -> str:
    """What an error says; of the system's, the path, the reason and the next step."""
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # so numpy says it
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return str(error)
    reason = error.strerror[:1].lower() + error.strerror[1:]
    where = "" if error.filename is None else f"{error.filename}: "
    step = _NEXT_STEPS.get(error.errno, "")
    return f"{where}{reason}{step}"


_NEXT_STEPS = {
    errno.ENOENT: "; check the path",
    errno.EEXIST: "; choose a place that is not below a file",
    errno.ENOTDIR: "; choose a place that is not below a file",
    errno.EISDIR: "; name a file",
    errno.ENOSPC: "; make room, or write to another disk: what was there before is as it was",
    errno.EDQUOT: "; make room, or write to another disk: what was there before is as it was",
    errno.EACCES: "; ask for the right to it, or choose another place",
    errno.EROFS: "; choose a place that can be written, by --out",
}


def _say_usage_error(error: Any) -> int:
    """One line for what cannot be parsed, the help where nothing was given; the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # `mmclip data` alone
        error.show()
        return error.exit_code
    said = " ".join(error.format_message().split()).rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "mmclip"
    see = f"{' See' if said.endswith('?') else '; see'} {path} --help"
    line = f"error: {said[:1].lower()}{said[1:]}{see}"
    console.print(line, style="red", markup=False, soft_wrap=True)
    return error.exit_code
