"""The documentation site: references come from the code, and no page loads from elsewhere."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mmclip.config import Config
from tests.test_cli import COMMANDS
from tests.test_docs import KEYS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site_pages() -> ModuleType:
    """docs/site_pages.py, which mkdocs loads as a hook."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_commands_holds_every_command_and_option(site_pages: ModuleType):
    text = site_pages.commands_page()
    parts = re.split(r"^## mmclip ", text, flags=re.MULTILINE)[1:]
    pages = {part.partition("\n")[0]: part for part in parts}
    assert pages.keys() == {" ".join(path) for path in COMMANDS}
    assert not re.search(r"`[A-Z]+ <\w", text), "an argument is shown with its type in Python"
    for path, command in COMMANDS.items():
        for parameter in command.params:
            is_shown = parameter.name != "help" and not getattr(parameter, "hidden", False)
            for name in parameter.opts if is_shown else []:
                shown = name if name.startswith("-") else (parameter.metavar or name)
                assert f"`{shown}" in pages[" ".join(path)], (path, name)


def test_the_reference_of_the_configuration_holds_every_key_with_its_meaning(
    site_pages: ModuleType,
):
    first = site_pages.configuration_page().partition("## Fine-tuning")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", first, re.MULTILINE)
    assert [key for key, _ in rows] == list(KEYS)
    assert all(kind for _, kind in rows)
    assert site_pages.meanings().keys() == KEYS.keys()
    assert "](#" not in first and "](training.md" not in first  # links lead out of reference/
    assert "| `train.base_lr` | number | `0.008` | > 0 |" in first
    assert '| `data.resize` | `"squash"` or `"pad"` or `"crop"` | `"squash"` |' in first


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (int | None, "integer"),
        (Config.model_fields["train"].annotation, "`TrainConfig`"),
        (tuple[float, ...], "list of number"),
        (dict[str, tuple[str, ...]], "table of list of string"),
        (bool, "true or false"),
    ],
)
def test_types_are_said_in_words_of_toml(site_pages: ModuleType, annotation: object, said: str):
    assert site_pages._type(annotation) == said


@pytest.mark.parametrize(
    ("target", "of_root", "link"),
    [
        ("docs/data.md#splits", True, "data.md#splits"),
        ("CONTRIBUTING.md", True, "contributing.md"),
        ("LICENSE", True, "files/LICENSE"),
        ("../README.md#two-commands", False, "index.md#two-commands"),
        ("../bench/entities.py", False, "files/bench/entities.py"),
        ("training.md#all-keys", False, "training.md#all-keys"),
        ("pictures/method.svg", False, "pictures/method.svg"),
        ("https://arxiv.org/abs/2407.19546", False, "https://arxiv.org/abs/2407.19546"),
    ],
)
def test_links_lead_to_the_pages_of_the_site(
    site_pages: ModuleType, target: str, of_root: bool, link: str
):
    assert site_pages.site_link(target, of_root) == link


def test_pictures_of_the_readme_are_found_from_the_start_page(site_pages: ModuleType):
    class Page:
        class file:
            src_uri = "index.md"

    text = '<img src="docs/pictures/a.png" width="9"> ![b](docs/pictures/b.png) <https://a.org>'
    made = site_pages.on_page_markdown(text, Page)
    assert made == '<img src="pictures/a.png" width="9"> ![b](pictures/b.png) <https://a.org>'


@pytest.mark.parametrize(
    ("page", "text", "shown"),
    [
        ("models.md", "see [data.md](data.md#splits)", "see [Data](data.md#splits)"),
        ("models.md", "[CONTRIBUTING.md](../CONTRIBUTING.md)", "[Contributing](contributing.md)"),
        (
            "index.md",
            "[docs/serve.md](docs/serve.md)",
            "[A page and an API on your machine](serve.md)",
        ),
        ("models.md", "[the splits](data.md#splits)", "[the splits](data.md#splits)"),
    ],
)
def test_a_page_that_is_linked_by_the_name_of_its_file_is_named_by_its_title(
    site_pages: ModuleType, page: str, text: str, shown: str
):
    class Page:
        class file:
            src_uri = page

    assert site_pages.on_page_markdown(text, Page) == shown


@pytest.mark.parametrize(
    ("page", "n_loads"),
    [
        ('<a href="https://arxiv.org/abs/2407.19546">paper</a>', 0),
        ('<link rel="canonical" href="https://a.org/">', 0),
        ('<img src="pictures/a.png">', 0),
        ('<script src="https://a.org/x.js"></script>', 1),
        ("<img alt=x src='//a.org/x.png'>", 1),
        ('<link href="https://fonts.a.org/css" rel="stylesheet">', 1),
        ("<style>@import 'https://a.org/x.css'; p { color: url(http://a.org/b) }</style>", 2),
    ],
)  # fmt: skip
def test_a_page_that_loads_from_another_host_is_found(
    site_pages: ModuleType, page: str, n_loads: int, tmp_path: Path
):
    (tmp_path / "index.html").write_text(page, "utf-8")
    assert len(site_pages.loads_of_others(tmp_path)) == n_loads


def test_a_document_without_a_place_in_the_navigation_is_found(site_pages: ModuleType):
    documents = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(site_pages.not_placed([])) == documents
    nav = [{"Data": [{"Splits": "splits.md"}]}, {"Reference": ["reference/data.md", "log.md"]}]
    assert documents - set(site_pages.not_placed(nav)) == {"splits.md", "log.md"}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="pip install '.[docs]' brings mkdocs"
)
def test_the_site_builds_without_a_warning(tmp_path: Path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    index = (tmp_path / "site" / "index.html").read_text("utf-8")
    assert "MMCLIP pre-trains an image and a text encoder" in index
    assert (tmp_path / "site" / "search" / "search_index.js").exists()  # read without a server
    shutil.rmtree(tmp_path / "site")
