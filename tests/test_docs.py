"""The documents say what the code does: commands, options, keys, defaults, paths, names of tests.

Nothing is trained here; that the commands do what they should is for other tests.
"""

import ast
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from pydantic import BaseModel
from typer.main import get_command

import mmclip
from mmclip.cli import app
from mmclip.config import WHOLE_TEXT_SCORES, Config, config_names, load_config
from mmclip.config_io import parse
from mmclip.data.ingest.csv_mapping import CsvMapping
from mmclip.data.ingest.csv_table import read_csv
from mmclip.data.ingest.report_table import ReportMapping
from mmclip.data.ingest.sources import READERS
from mmclip.data.manifest import SCHEMA
from mmclip.data.sample import Reason, Sample
from mmclip.evaluation.pages import CARD_FILE
from mmclip.evaluation.protocols import Protocol
from mmclip.prompts import PromptSet
from tests.test_cli import COMMANDS, NAMES

ROOT = Path(__file__).parents[1]
README, METHOD, DATA, TRAINING = (
    ROOT / name for name in ("README.md", "docs/method.md", "docs/data.md", "docs/training.md")
)
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
OTHERS_OPTIONS = {
    "--minutes", "--processes", "--signals-to-handle", "--require-hashes", "--no-deps", "--rounds",
    "--nproc-per-node", "--check", "--images", "--knob", "--preset", "--arms", "--seeds", "--table",
    "--half", "--raw", "--base", "--jsonl", "--cache", "--batch-size", "--steps", "--image-size",
    "--tokens", "--lengths", "--array", "--cpus-per-task", "--wait", "--port", "--nworkers",
    "--nthreads", "--reports", "--plain-images", "--repeats", "--kill", "--device", "--misses",
    "--runs", "--boxes", "--also", "--user", "--ask-password", "--negspacy", "--medspacy",
    "--before", "--no-full", "--shutdown-timeout",
}  # fmt: skip
"""Of torchrun, pip, ruff, wget, sbatch, dask, and the scripts of bench/."""


class Block(NamedTuple):
    """A code block."""

    language: str  # "" without one
    text: str


def blocks(document: Path) -> list[Block]:
    """The code blocks of a document, fenced or indented."""
    text = document.read_text("utf-8")
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    found = [Block(*match.groups()) for match in fence.finditer(text)]
    indented = re.findall(r"(?:^    .*\n)+", fence.sub("", text), re.MULTILINE)
    return found + [Block("", re.sub(r"^    ", "", block, flags=re.M)) for block in indented]


def prose(document: Path) -> str:
    """A document without its code blocks."""
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*\n", "", text, flags=re.MULTILINE)


def spans(document: Path) -> list[str]:
    """The code spans in a document's prose."""
    return re.findall(r"`([^`\n]+)`", prose(document))


def rows(document: Path, heading: str) -> list[list[str]]:
    """The cells of each row of all tables whose first column has this heading."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", document.read_text("utf-8"), re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line.strip("|\n")) for line in table.splitlines()]
        if lines[0][0].strip() == heading:
            found += [[cell.strip() for cell in line] for line in lines[2:]]
    return found


def commands(document: Path) -> list[str]:
    """What stands behind `mmclip` on the lines of code blocks that call it, by itself or not."""
    lines = [line for block in blocks(document) for line in block.text.splitlines()]
    return [m[1] for line in lines if (m := re.match(r"(?:.* -m )?mmclip (.+)", line))]


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Every key of a configuration with its default."""
    found: dict[str, object] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            found |= leaves(type(field.default), f"{prefix}{name}.")
        else:
            found[prefix + name] = field.default
    return found


KEYS = leaves(Config)
SECTIONS = sorted(Config.model_fields)
FILES = {
    line.relative_to(ROOT).as_posix(): {
        node.name
        for node in ast.parse(line.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    for line in (ROOT / "tests").glob("test_*.py")
}


def test_the_documents_are_there_and_hold_commands():
    assert {README, METHOD, DATA, TRAINING} <= set(DOCUMENTS)
    assert all(commands(document) for document in (README, DATA, TRAINING))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_command_line_of_a_document_parses(document: Path):
    for line in commands(document):
        words = line.split()
        if words == ["--help"]:
            continue
        path = max((p for p in COMMANDS if tuple(words[: len(p)]) == p), key=len, default=None)
        assert path is not None, f"there is no command `mmclip {line}`"
        context = COMMANDS[path].make_context("mmclip", words[len(path) :])
        config = context.params.get("config", "tiny")
        load_config(
            config if config in config_names() else "tiny", context.params.get("set_") or ()
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_command_and_option_that_is_named_exists(document: Path):
    options = {o for command in COMMANDS.values() for p in command.params for o in p.opts}
    options |= {"--help", *(o for p in get_command(app).params for o in p.opts)} | OTHERS_OPTIONS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text("utf-8")))
    assert named <= options
    for span in spans(document):
        if span.startswith("mmclip "):
            words = tuple(w for w in span.split()[1:] if not w.startswith("-"))
            names = {tuple(name.split()) for name in NAMES}
            assert any(words[: len(path)] == path for path in names), span


def test_every_command_is_in_the_readme():
    named = {
        span.removeprefix("mmclip ")
        for cells in rows(README, "command")
        for span in spans_of(cells[0])
    }
    assert named == NAMES


def spans_of(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_make_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    lines = [line for d in DOCUMENTS for block in blocks(d) for line in block.text.splitlines()]
    named = {m[1] for line in lines if (m := re.match(r"make (\w+)", line))}
    assert {"demo", "test"} <= named <= targets


def test_the_table_of_keys_holds_every_key_with_its_default():
    table = {spans_of(key)[0]: spans_of(default) for key, default, _ in rows(TRAINING, "key")}
    assert table.keys() == KEYS.keys()
    for key, default in table.items():
        value = KEYS[key]
        if value is None:
            assert default == [], key
        else:
            said = tomllib.loads(f"v = {default[0]}")["v"]
            assert (tuple(said) if isinstance(said, list) else said) == value, key
            assert type(said) is type(value) or isinstance(value, tuple), key


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_key_that_is_named_exists(document: Path):
    key = re.compile(rf"(?:{'|'.join(SECTIONS)})\.[a-z_.0-9]+(?=\s*=|$)")
    named = {m[0] for span in spans(document) if (m := key.match(span))}
    known = {*KEYS, *(k.rpartition(".")[0] for k in KEYS), "model.safetensors"}
    assert named <= known


@pytest.mark.parametrize("arm", rows(TRAINING, "arm"), ids=lambda cells: cells[0])
def test_every_arm_is_its_file_and_differs_as_its_row_says(arm: list[str]):
    _, file, differences = arm
    overrides = spans_of(differences)
    assert all("=" in override for override in overrides)
    config = load_config(spans_of(file)[0])
    assert config == load_config("ablation", overrides)
    if config.loss.image and config.image_mask.policy == "attention":
        # Without EntMLM no word is masked, and a score that reads masked words guides nothing.
        mask = config.image_mask
        assert config.loss.text or mask.score in WHOLE_TEXT_SCORES or mask.score_tokens != "masked"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_toml_block_is_valid(document: Path):
    for block in blocks(document):
        if block.language == "toml":
            values = tomllib.loads(block.text)
            if "date_format" in values:
                assert parse(ReportMapping, values, document.name).columns
            elif "columns" in values:
                assert parse(CsvMapping, values, document.name).columns
            elif "readers" in values:
                assert parse(Protocol, values, document.name).findings
            elif "templates" in values:
                assert parse(PromptSet, values, document.name).templates
            else:
                values.pop("extends", None)
                assert parse(Config, values, document.name).train


def test_the_example_table_is_read_as_the_document_says(tmp_path: Path):
    (table,) = (b.text for b in blocks(DATA) if b.language == "csv")
    mapping = next(tomllib.loads(b.text) for b in blocks(DATA) if b.language == "toml")
    (tmp_path / "studies.csv").write_text(table, "utf-8")
    samples = list(read_csv(tmp_path, parse(CsvMapping, mapping, "the example")))
    assert all(isinstance(sample, Sample) for sample in samples)
    one, two, three, four = (sample for sample in samples if isinstance(sample, Sample))
    assert one.report == "Small left effusion. Effusion." and not one.labels
    assert two.report is None
    assert two.labels == {"infiltration": 1, "no finding": 0, "pleural effusion": 1}
    assert [sample.view for sample in samples if isinstance(sample, Sample)] == [
        "PA",
        "AP",
        "L",
        "unknown",
    ]
    assert three.labels == {"infiltration": 0, "no finding": 1, "pleural effusion": 0}
    assert four.report is None and not four.labels


def test_every_reader_is_in_the_tables_and_has_its_command():
    named = [spans_of(name)[0] for name, *_ in rows(DATA, "reader")]
    assert ["csv", "dicom", "own", *named] == list(READERS)
    assert {line.split()[2] for line in commands(DATA) if "data build" in line} == set(READERS)
    (row,) = (cells for cells in rows(README, "command") if "data build" in cells[0])
    assert set(spans_of(row[1])) == set(READERS)


def test_the_columns_and_reasons_of_a_data_folder_are_all_there():
    assert [spans_of(name)[0] for name, *_ in rows(DATA, "column")] == SCHEMA.names
    said = [reason for reason, _ in rows(DATA, "reason in `excluded.jsonl`")]
    assert said == [str(reason) for reason in Reason]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_test_and_path_that_is_named_exists(document: Path):
    path = re.compile(r"(?:src|tests|docs|examples|bench|\.ci)/[\w./-]+|\w[\w-]*\.(?:lock|cff|md)")
    for span in spans(document):
        file, _, test = span.partition("::")
        if test:
            assert test in FILES[file], span
        elif path.fullmatch(span) and span != CARD_FILE:  # that one is left by a command
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_relative_link_resolves(document: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def ledger_marks(path: Path) -> list[tuple[str, str]]:
    """The tests of a file that hold a row of the ledger: name of the row, name of the test."""
    found = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.ledger":
                    found += [(ast.literal_eval(row), node.name) for row in mark.args]
    return found


def test_every_row_of_the_ledger_is_held_by_a_test_and_code_names_rows_that_exist():
    names = [cells[0] for cells in rows(METHOD, "row")]
    assert names and len(set(names)) == len(names)
    marks = [mark for file in FILES for mark in ledger_marks(ROOT / file)]
    assert {row for row, _ in marks} == set(names)
    assert all(test.startswith("test_") for _, test in marks)
    code = "".join(p.read_text("utf-8") for p in sorted((ROOT / "src").rglob("*.py")))
    assert set(re.findall(r'docs/method\.md, row "([^"]+)"', code)) <= set(names)


def test_every_configuration_of_the_package_is_in_a_table():
    named = {spans_of(name)[0] for name, _ in rows(TRAINING, "name")}
    arms = {spans_of(file)[0] for _, file, _ in rows(TRAINING, "arm")}
    assert named | arms == set(config_names())


def test_the_picture_is_small_enough_for_a_page():
    assert (ROOT / "docs/pictures/images.png").stat().st_size < 400_000


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {mmclip.__version__}\n" in citation
