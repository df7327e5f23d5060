"""Configuration files: TOML that extends other TOML, `a.b=c` overrides, frozen models, hashes.

`mmclip.config` declares what pre-training reads; mappings, prompt sets and protocols are read by
these functions, too.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from mmclip.files import json_sha256

RESOURCES = resources.files("mmclip") / "resources"
"""The data of the package: configurations, prompts, vocabularies, protocols, templates."""


class ConfigError(ValueError):
    """A configuration breaks a rule; the message names the key, the rule and the known keys."""


class Frozen(BaseModel):
    """Base of every configuration model: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


M = TypeVar("M", bound=BaseModel)


_TABLE = 'give a table of keys and values, in TOML { key = "value" }'
_LIST = 'give a list, such as ["one", "two"]'
_IN_WORDS = {
    "dict_type": _TABLE,
    "model_type": _TABLE,
    "list_type": _LIST,
    "tuple_type": _LIST,
    "too_short": "is empty; give at least one",
    "string_too_short": "is an empty text",
    "missing": "is missing",
}
"""What pydantic calls by names of Python, to whoever writes TOML."""


def parse(model: type[M], values: dict, origin: str) -> M:
    """Validates values into a model, with errors that a user can act on.

    Raises:
        ConfigError: One line a problem, each with the key; an unknown key lists the known ones.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "configuration"
            if problem["type"] == "extra_forbidden":
                known = ", ".join(_known_keys(model, problem["loc"][:-1]))
                lines.append(f"unknown key {key!r}; known here: {known}")
            else:
                said = _IN_WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
                lines.append(f"{key}: {said}")
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None


def _known_keys(model: type[BaseModel], path: tuple) -> list[str]:
    """The keys of the section that a path leads to; a table of sections takes any name."""
    section: Any = model
    for part in path:
        if get_origin(section) is dict:
            section = get_args(section)[1]
        elif isinstance(section, type) and issubclass(section, BaseModel):
            field = section.model_fields.get(part)
            section = None if field is None else field.annotation
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return []
    return sorted(field.alias or name for name, field in section.model_fields.items())


def packaged_names(folder: str) -> list[str]:
    """The names of the TOML files in a folder of the package, such as "tiny" and "arms/whole"."""

    def found(folder: Traversable, prefix: str) -> Iterator[str]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from found(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".toml"):
                yield prefix + entry.name.removesuffix(".toml")

    return sorted(found(RESOURCES / folder, ""))


def _listed(names: Sequence[str]) -> str:
    """Names for people: "demo, tiny, or of arms/ one of prompts, whole"."""
    folders = sorted({name.rpartition("/")[0] for name in names} - {""})
    parts = [", ".join(name for name in names if "/" not in name)]
    for folder in folders:
        inside = (
            name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")
        )
        parts.append(f"or of {folder}/ one of {', '.join(inside)}")
    return ", ".join(parts)


def read_toml(what: str, folder: str, name_or_path: str | Path) -> dict[str, Any]:
    """The values of a TOML file of the package, by name, or of any, by its path.

    Args:
        what: For errors, such as "prompt set".
        folder: Of the package.
        name_or_path: One of `packaged_names(folder)`, or a path that ends in .toml.

    Raises:
        ConfigError: When there is no such file, it cannot be read, or it is no TOML.
    """
    if isinstance(name_or_path, Path) or name_or_path.lower().endswith(".toml"):
        path = Path(name_or_path)
    elif name_or_path in (names := packaged_names(folder)):
        path = RESOURCES / folder / f"{name_or_path}.toml"
    else:
        raise ConfigError(
            f"there is no {what} {name_or_path!r}; name one of {_listed(names)}, or give a path "
            f"that ends in .toml"
        )
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} is no valid TOML: {error}") from None


def load_config_as(
    model: type[M], folder: str, name_or_path: str, overrides: Sequence[str] = ()
) -> M:
    """Reads a configuration of any stage, as `load_config` does.

    A file may start with `extends = "NAME"`: then it holds only what differs from that one.

    Args:
        model: Of the stage.
        folder: Of the package, with the files that have names.
        name_or_path: A name of `packaged_names(folder)`, or a path that ends in .toml.
        overrides: As in `load_config`.
    """
    values = _read(folder, name_or_path, seen=())
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"{override!r} is no override; write it as train.steps=200")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        *parents, last = key.strip().split(".")
        node: Any = values
        for part in parents:
            node = node.get(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{override!r}: {part!r} is a value, not a section")
        top: Any = {last: value}
        for part in reversed(parents):
            top = {part: top}
        values = _merge(values, top)
    return parse(model, values, f"configuration {name_or_path}")


def _read(folder: str, name_or_path: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name_or_path in seen:
        raise ConfigError(
            f"{' -> '.join((*seen, name_or_path))}: configurations extend in a circle"
        )
    values = read_toml("configuration", folder, name_or_path)
    base = values.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(
            f"{name_or_path}: extends = {base!r} is no name; name one configuration in quotes, "
            f'such as extends = "tiny"'
        )
    return values if base is None else _merge(_read(folder, base, (*seen, name_or_path)), values)


OTHER_LENGTH = {"steps": "epochs", "epochs": "steps"}
"""Two keys that say how long to train: the one that is given later counts."""


def _merge(base: dict, top: dict) -> dict:
    merged = {key: value for key, value in base.items() if OTHER_LENGTH.get(key) not in top}
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def config_hash(config: BaseModel) -> str:
    """SHA-256 of the resolved values: equal settings, equal hash, however they were written."""
    return json_sha256(config.model_dump(mode="json"))


def recipe_hash(config: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """SHA-256 of all that weights follow from but the seed: equal of runs that repeat one another.

    Args:
        config: As JSON holds it, with the seed in its section `train`; of a run the one that it
            saved, without the keys that a later version added.
        given: What training had beside it, such as the hash of its data.
    """
    train = {key: value for key, value in config["train"].items() if key != "seed"}
    return json_sha256({"config": {**config, "train": train}, "given": dict(given)})
