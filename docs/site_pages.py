"""Pages of the documentation site that are made, not written; a hook of mkdocs (mkdocs.yml).

The start page is the README. The references of commands and configuration come from Typer and from
the pydantic models, so that they cannot drift. Files outside docs/ that a page links to are copied
into the site. A built page that would load anything from another host fails the build.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from mmclip.cli import app
from mmclip.config import Config
from mmclip.data.disease_prompts import DiseasePromptSet
from mmclip.data.ingest.csv_mapping import CsvMapping
from mmclip.data.ingest.report_table import ReportMapping
from mmclip.evaluation.protocols import Protocol
from mmclip.finetuning.supervised import FineTuneConfig
from mmclip.prompts import PromptSet

ROOT = Path(__file__).parents[1]

MODULES = {
    "python": ("Python", ["mmclip.api", "mmclip.run", "mmclip.embed"]),
    "losses": (
        "Losses and masking",
        ["mmclip.losses", "mmclip.masking", "mmclip.patches", "mmclip.prompts", "mmclip.batch"],
    ),
    "data": ("Data", ["mmclip.data.sample", "mmclip.data.image_text_dataset"]),
    "evaluation": (
        "Evaluation",
        ["mmclip.evaluation.metrics", "mmclip.evaluation.intervals", "mmclip.evaluation.results"],
    ),
}
"""Pages of the Python reference: title, and the modules whose docstrings they show."""

OTHER_MODELS: dict[type[BaseModel], str] = {
    FineTuneConfig: "Fine-tuning (`mmclip finetune --config`)",
    CsvMapping: "Mapping of a CSV table (`mmclip data build csv --mapping`)",
    ReportMapping: "Mapping of a table of reports (`mmclip data build dicom --mapping`)",
    PromptSet: "Prompt set (`--prompts`)",
    DiseasePromptSet: "Disease-kind prompts (`unpaired.prompts`)",
    Protocol: "Protocol (`--protocol`)",
}

THEME_SCRIPT = "https://unpkg.com/iframe-worker/shim"
"""What the theme loads so that a search works on pages that are opened as files."""

LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|object|embed)\b[^>]*?\b(?:src|data)\s*=\s*[\"']?"
    r"(?:https?:)?//[^\"'\s>]+"
    r"|<link\b(?=[^>]*\brel\s*=\s*[\"']?(?:stylesheet|preconnect|preload|icon|prefetch))"
    r"[^>]*?\bhref\s*=\s*[\"']?(?:https?:)?//[^\"'\s>]+"
    r"|url\(\s*[\"']?(?:https?:)?//[^)]+\)|@import\s+[\"'](?:https?:)?//[^\"']+",
    re.IGNORECASE,
)
"""What a page or a style sheet loads from another host; links that a reader follows are not."""


def _cell(text: str) -> str:
    """Text as the cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _commands(
    command: Any, context: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, TyperCommand]]:
    """Every command by the words that call it."""
    if not isinstance(command, TyperGroup):
        yield " ".join(path), command
        return
    for name in command.list_commands(context):
        yield from _commands(command.get_command(context, name), context, (*path, name))


def _parameter_row(parameter: Any, context: Any) -> str:
    """A row of a command's table: how the parameter is given, its default, what it does."""
    # The record holds the names as --help writes them, and the help with "[default: 3]" behind it.
    names, text = parameter.get_help_record(context) or (parameter.name, parameter.help or "")
    names = re.sub(r" <list\[\w+\]>$", " ...", names)
    names = re.sub(r" <\w+>$", "", names)
    given = ", ".join(f"`{name.strip()}`" for name in names.split(","))
    notes = re.findall(r"\[((?:default: |required)[^\]]*)\]\s*$", text)
    default = "; ".join(notes).removeprefix("default: ")
    default = re.sub(r"x(>=|<=)", lambda sign: "≥ " if sign[1] == ">=" else "≤ ", default)
    meaning = re.sub(r"\s*\[(?:default: |required)[^\]]*\]\s*$", "", text)
    return f"| {_cell(given)} | {_cell(default)} | {_cell(meaning)} |"


def commands_page() -> str:
    """The reference of the commands, from Typer."""
    root = get_command(app)
    context = root.make_context("mmclip", [], resilient_parsing=True)
    parts = ["# Commands", "Made from the commands themselves; `--help` of each says the same.", ""]
    for name, command in _commands(root, context):
        parts += [f"## mmclip {name}", "", (command.help or "").strip(), ""]
        parts += ["| option | default | meaning |", "|---|---|---|"]
        shown = (p for p in command.params if p.name != "help" and not getattr(p, "hidden", False))
        parts += [_parameter_row(p, context) for p in shown]
        parts.append("")
    return "\n".join(parts)


NAMES = {str: "string", int: "integer", float: "number", bool: "true or false"}


def _type(annotation: Any) -> str:
    """A type as a reader of TOML knows it: "string", `"a"` or `"b"`, "list of number"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(one) for one in inner if one is not NoneType)
    if origin in (tuple, list, Sequence):
        return f"list of {_type(inner[0])}"
    if origin in (dict, Mapping):
        return f"table of {_type(inner[1])}"
    return NAMES.get(annotation) or f"`{annotation.__name__}`"


def _rule(field: Any) -> str:
    """The bounds of a field, such as "> 0, ≤ 1"."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥"}
    bounds = (
        (sign, getattr(rule, name, None)) for rule in field.metadata for name, sign in signs.items()
    )
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a model with its field; keys of sections by their path."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _leaves(inner, f"{prefix}{field.alias or name}.")
        else:
            yield prefix + (field.alias or name), field


def _default(field: Any) -> str:
    if field.default_factory is not None:
        return ""
    if field.default is PydanticUndefined:
        return "required"
    return "" if field.default in (None, ()) else f"`{json.dumps(field.default)}`"


def meanings() -> dict[str, str]:
    """What docs/training.md says of each key."""
    rows = re.findall(r"^\| `([\w.]+)` \|[^|]*\|(.*)\|$", _training(), re.MULTILINE)
    return {key: text.strip() for key, text in rows}


def _training() -> str:
    return (ROOT / "docs" / "training.md").read_text("utf-8")


def _class_docs(model: type[BaseModel]) -> str:
    """A model's docstring as Markdown: its first part, and its attributes as a list."""
    text, _, attributes = (model.__doc__ or "").partition("Attributes:")
    lines = [" ".join(text.split())]
    for name, meaning in re.findall(r"^ +(\w+): (.*(?:\n {12,}\S.*)*)", attributes, re.MULTILINE):
        lines.append(f"- `{name}`: {' '.join(meaning.split())}")
    return "\n\n".join([lines[0], "\n".join(lines[1:])])


def configuration_page() -> str:
    """The reference of the configuration, from the pydantic models."""
    said = meanings()
    parts = [
        "# Configuration",
        "Made from the models that read the files. A training configuration is a TOML file of "
        "these keys, or `--set KEY=VALUE`; [Training](../training.md) says how they go together.",
        "",
    ]
    section = ""
    for key, field in _leaves(Config):
        if (now := key.rpartition(".")[0]) != section:
            section = now
            parts += ["", f"## {section}", "", "| key | type | default | rule | meaning |"]
            parts.append("|---|---|---|---|---|")
        # The page is one folder further in than training.md, which may link to its own parts.
        meaning = said.get(key, "").replace("](#", "](training.md#")
        meaning = re.sub(r"\]\((\w+\.md)", r"](../\1", meaning)
        cells = (f"`{key}`", _type(field.annotation), _default(field), _rule(field), meaning)
        parts.append("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", c) for c in cells) + " |")
    for model, title in OTHER_MODELS.items():
        parts += ["", f"## {title}", "", _class_docs(model), ""]
        parts += ["| key | type | default | rule |", "|---|---|---|---|"]
        for key, field in _leaves(model):
            cells = (f"`{key}`", _type(field.annotation), _default(field), _rule(field))
            parts.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def python_page(name: str) -> str:
    """A page of the Python reference: mkdocstrings fills it in from the docstrings."""
    title, modules = MODULES[name]
    return f"# {title}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"


ROOT_PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Pages of the site -> documents of the root."""


def made_pages() -> dict[str, str]:
    """Every page that is made, by its path in the site."""
    pages = {page: (ROOT / source).read_text("utf-8") for page, source in ROOT_PAGES.items()}
    pages["reference/commands.md"] = commands_page()
    pages["reference/configuration.md"] = configuration_page()
    return pages | {f"reference/{name}.md": python_page(name) for name in MODULES}


def site_link(target: str, is_root_page: bool) -> str:
    """Where a relative link of a document leads in the site; a file of the tree in files/."""
    name, _, anchor = target.partition("#")
    if target.startswith(("http:", "https:", "mailto:", "#")) or not name:
        return target
    path = name if is_root_page else f"docs/{name}"
    path = (ROOT / path).resolve().relative_to(ROOT).as_posix()
    page = {source: page for page, source in ROOT_PAGES.items()}.get(path)
    if page is None:
        page = path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
    return page + (f"#{anchor}" if anchor else "")


LINK = re.compile(r'(?<=\]\()([^)\s]+)(?=\))|(?<=<img src=")([^"]+)(?=")')
"""The target of a link or a picture, also of one in HTML."""


def files_linked() -> list[str]:
    """Files outside docs/ that a document links to."""
    found = set()
    documents = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ROOT_PAGES.values())]
    for document in documents:
        for target in LINK.finditer(document.read_text("utf-8")):
            link = site_link(target[0], document.parent == ROOT).partition("#")[0]
            if link.startswith("files/") and (ROOT / link.removeprefix("files/")).is_file():
                found.add(link.removeprefix("files/"))
    return sorted(found)


def not_placed(nav: Sequence[Any]) -> list[str]:
    """Documents that the navigation of mkdocs.yml does not name."""
    placed = set(re.findall(r"[\w/]+\.md", json.dumps(list(nav))))
    return [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in placed]


def on_config(config: Any) -> Any:
    """Lists documents without a place under "More", so that none is lost."""
    if more := not_placed(config["nav"]):
        config["nav"].append({"More": more})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the made pages, and the files that are linked to."""
    from mkdocs.structure.files import File

    for path, content in made_pages().items():
        files.append(File.generated(config, path, content=content))
    for path in files_linked():
        files.append(
            File.generated(config, f"files/{path}", content=(ROOT / path).read_text("utf-8"))
        )
    return files


NAMED_BY_FILE = re.compile(r"\[[\w/]+\.md\](?=\(([^)#\s]+\.md)(#[^)]*)?\))")
"""The text of a link that is the name of a document, as it is read in the tree."""


def title_of(target: str, is_root_page: bool) -> str:
    """The title of the document that a link leads to, without what stands behind its colon."""
    path = ROOT / target if is_root_page else ROOT / "docs" / target
    first = path.read_text("utf-8").partition("\n")[0]
    return first.removeprefix("# ").partition(":")[0]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads the links of a document to the pages of the site, and names pages by their titles."""
    if page.file.src_uri.startswith("reference/"):
        return markdown
    is_root = page.file.src_uri in ROOT_PAGES
    markdown = NAMED_BY_FILE.sub(lambda link: f"[{title_of(link[1], is_root)}]", markdown)
    return LINK.sub(lambda link: site_link(link[0], is_root), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Takes the copy of the site for the one script that the theme names at another host."""
    here = "../" * page.file.dest_uri.count("/")
    return output.replace(THEME_SCRIPT, f"{here}assets/iframe-worker.js")


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for pages that are no document: 404.html."""
    return output_content.replace(THEME_SCRIPT, "assets/iframe-worker.js")


def loads_of_others(site: Path) -> list[str]:
    """What built pages and styles would load from another host."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            found += [
                f"{path.relative_to(site)}: {load[0][:160]}"
                for load in LOADED.finditer(path.read_text("utf-8"))
            ]
    return found


def on_post_build(config: Any) -> None:
    """Refuses a site that is not whole without a network."""
    if found := loads_of_others(Path(config["site_dir"])):
        raise SystemExit("the site loads from other hosts:\n" + "\n".join(found))
