"""Imports go one way, and importing does nothing else."""

import ast
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((SRC / "mmclip").rglob("*.py"))
}

LAYERS = (
    {"mmclip.cli", "mmclip.__main__"},
    {"mmclip.serving"},
    {"mmclip.api", "mmclip.demo", "mmclip.disclosure", "mmclip.doctor", "mmclip.prediction"},
    {"mmclip.export"},
    {"mmclip.explanation", "mmclip.finetuning", "mmclip.retrieval"},
    {"mmclip.training"},
    {"mmclip.evaluation"},
    {
        "mmclip.checkpoint", "mmclip.embed", "mmclip.embedding_store", "mmclip.model_loading",
        "mmclip.prompt_check", "mmclip.run",
    },
    {"mmclip.data", "mmclip.models"},
    {
        "mmclip", "mmclip.batch", "mmclip.config", "mmclip.config_io", "mmclip.escape",
        "mmclip.exported", "mmclip.files", "mmclip.hub", "mmclip.losses", "mmclip.masking",
        "mmclip.own_code", "mmclip.patches", "mmclip.progress", "mmclip.prompts", "mmclip.squares",
    },
)  # fmt: skip
"""A module may import from its own layer and those behind it. A new one at the top of the package
is to be named in one of them."""


def layer_of(module: str) -> int:
    """The layer of a module, or of the package that it is in."""
    return next(i for i, names in enumerate(LAYERS) if package_of(module) in names)


def package_of(module: str) -> str:
    """The module at the top of mmclip, or the package, that a module is in or is."""
    return ".".join(module.split(".")[:2])


def imported_by(module: str, tree: ast.AST) -> set[str]:
    """The modules of the package that a module imports, by full name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        found |= {name for name in names if name in MODULES}
    return found - {module}


IMPORTS = {
    module: imported_by(module, ast.parse(path.read_text("utf-8")))
    for module, path in MODULES.items()
}


def test_the_process_that_decodes_starts_without_torch():
    code = "import mmclip.data.decode_process, sys; print({'torch', 'pyarrow'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    said = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert said == "set()\n"


def test_no_module_imports_from_a_layer_before_its_own():
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in sorted(others)
        if layer_of(other) < layer_of(module)
    ]
    assert not wrong


def test_data_never_imports_models():
    for module, others in IMPORTS.items():
        if module.startswith("mmclip.data"):
            assert not [o for o in others if o.startswith("mmclip.models")], module


def test_stages_do_not_import_one_another():
    stages = {"mmclip.explanation", "mmclip.finetuning", "mmclip.retrieval"}
    assert not [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if {package_of(module), package_of(other)} <= stages
        and package_of(module) != package_of(other)
    ]


def test_imports_make_no_circle():
    # A package's own __init__ gathers the names of its modules; they may name one another.
    order = list(TopologicalSorter(IMPORTS).static_order())  # raises at a circle
    assert set(order) == set(MODULES)


def test_every_named_module_exists():
    missing = [name for names in LAYERS for name in names if name not in MODULES]
    assert not missing


def run_python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False, capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


HEAVY = (
    "print('heavy:', *sorted({'torch', 'transformers', 'numpy', 'spacy', 'tensorboard'}"
    " & set(sys.modules)))"
)


def test_the_package_imports_none_of_the_heavy_libraries():
    assert run_python(f"import sys, mmclip; {HEAVY}").split() == ["heavy:"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["pretrain", "--help"]])
def test_help_and_version_import_none_of_the_heavy_libraries(arguments: list[str]):
    code = f"import sys, atexit; atexit.register(lambda: {HEAVY}); import mmclip.cli as c; c.main()"
    assert run_python(code, *arguments).splitlines()[-1].split() == ["heavy:"]


EFFECTS = """
import json, os, random, socket, sys, warnings
modules, statements = json.loads(sys.argv[1])
for statement in statements:  # of other packages: what their import does is theirs
    exec(statement)
import logging, numpy, torch

def state():
    return {
        "Python's random state": random.getstate(),
        "numpy's random state": str(numpy.random.get_state()),
        "torch's random state": torch.get_rng_state().tolist(),
        "warning filters": list(warnings.filters),
        "environment": dict(os.environ),
        "log handlers": list(logging.root.handlers),
        "log level": logging.root.level,
        "torch's default type": torch.get_default_dtype(),
        "torch's threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "working folder": os.getcwd(),
    }

def refuse(*args, **kwargs):
    raise AssertionError("a module opens a connection where it is imported")

socket.socket.connect = refuse
for module in modules:
    before = state()
    __import__(module)
    print(*(f"{module} changes {what}" for what, value in state().items() if value != before[what]))
"""


def test_importing_a_module_changes_nothing_but_the_modules():
    statements = {
        ast.unparse(node)
        for path in MODULES.values()
        for node in ast.parse(path.read_text("utf-8")).body
        if (isinstance(node, ast.Import) and not node.names[0].name.startswith("mmclip"))
        or (isinstance(node, ast.ImportFrom) and not str(node.module).startswith("mmclip"))
    }
    modules = [name for name in MODULES if name != "mmclip.__main__"]
    assert run_python(EFFECTS, json.dumps([modules, sorted(statements)])).strip() == ""
