"""Help that people can read: plain metavars, options by purpose, commands in order of use."""

from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

IN_OUT = "Input and output"
TRAINING = "Training"
SELECTION = "Images and findings"
INTERVALS = "Intervals"
EVALUATION = "Evaluation"
OTHER = "Other options"
"""Titles of the panels that several commands share."""

ORDER = (
    "doctor", "demo", "data", "build", "labels", "split", "check",
    "pretrain", "zeroshot", "predict", "finetune", "results", "compare-models",
    "retrieve", "explain", "serve", "export",
)  # fmt: skip
"""The commands in order of use, those of `mmclip data` in their place."""


def _no_type(ctx: typer.Context) -> str:
    """In place of a type such as `<list[Path]>`: an argument's name already says what it is."""
    return ""


def _with_plain_metavars(params: list[Any]) -> list[Any]:
    """Drops what newer versions of Typer say of types, such as `<bool>` behind a flag."""
    for param in params:
        if isinstance(param, TyperArgument):
            vars(param)["display_type_rich"] = _no_type
        elif isinstance(param, TyperOption) and param.is_flag and param.metavar is None:
            param.metavar = ""
    # The option --help has no panel of its own; it stands with the last ones, not before the first.
    if any(param.rich_help_panel for param in params if isinstance(param, TyperOption)):
        for param in params:
            if param.name == "help":
                param.rich_help_panel = OTHER
    return params


class PlainCommand(TyperCommand):
    """A command whose help shows plain metavars."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, as help and parser take them."""
        return _with_plain_metavars(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """A group whose help shows plain metavars, and its commands in order of use."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, as help and parser take them."""
        return _with_plain_metavars(super().get_params(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of its commands."""
        return sorted(super().list_commands(ctx), key=ORDER.index)
