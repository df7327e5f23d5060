"""A synthetic data set and a short run on it, shared by the tests of commands and stages.

Fixtures import torch and the package when they are first asked for: the process that deals the
tests to others needs neither, and all wait for it.
"""

from pathlib import Path

import pytest

from tests.network import block_network

block_network()

IMAGE_SIZE = 32

SMALL = """\
extends = "tiny"

[model]
embed_dim = 16
image = { width = 32, depth = 1, heads = 2 }
text = { width = 32, depth = 1, heads = 2, vocab_size = 400 }

[data]
image_size = 32

[train]
steps = 6
batch_size = 8
base_lr = 0.01
log_every_steps = 1
save_every_steps = 2
"""
"""The configuration of the runs here: small enough that a step takes some milliseconds."""


def build_made(root: Path, out: Path) -> Path:
    """Builds a data folder of a written preset, by the reader that `mmclip data build csv` uses."""
    from mmclip.data.ingest.build import build_data
    from mmclip.data.ingest.sources import open_reader

    reader = open_reader("csv", root, mapping=root / "mapping.toml", table=None)
    build_data(reader, root, out, image_size=IMAGE_SIZE)
    return out


@pytest.fixture(scope="session")
def made_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic images and reports of 120 patients, as a data set comes."""
    from mmclip.data.synthetic import Preset, write_dataset

    preset = Preset(
        name="test", version=1, seed=3, image_size=IMAGE_SIZE, n_train=60, n_val=20, n_test=40
    )
    return write_dataset(preset, tmp_path_factory.mktemp("made") / "raw")


@pytest.fixture(scope="session")
def made_data(made_raw: Path) -> Path:
    """Their data folder; tests leave it as it is."""
    return build_made(made_raw, made_raw.parent / "data")


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TOML file for --config."""
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(SMALL, "utf-8")
    return path


@pytest.fixture(scope="session")
def made_run(made_data: Path, small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 4 and 6; tests leave it as it is."""
    from tests.commands import mmclip

    folder = tmp_path_factory.mktemp("runs")
    run = folder / "first"
    ended = mmclip(folder, "pretrain", "--data", made_data, "--out", run, "--config", small_config)
    assert ended.code == 0, ended.err
    return run


@pytest.fixture(scope="session")
def made_results(made_run: Path, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the run for two findings, with the scores of its validation images."""
    from tests.commands import mmclip

    out = tmp_path_factory.mktemp("results") / "test"
    ended = mmclip(
        out.parent, "zeroshot", "--model", made_run, "--data", made_data, "--out", out,
        "--n-resamples", "10", "--finding", "pleural effusion", "--finding", "pneumothorax",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    return out
