"""No input of others crashes a reader: it is read, or refused in the package's own words."""

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmclip.checkpoint import CheckpointError, checkpoint_meta, find_checkpoint, load_checkpoint
from mmclip.config import load_config
from mmclip.data.cache import CacheError, ImageCache
from mmclip.data.folder import ManifestError
from mmclip.data.images import ImageError
from mmclip.data.manifest import read_manifest
from mmclip.files import json_sha256
from tests.made import write_folder

BENCH = str(Path(__file__).parents[1] / "bench")
sys.path.insert(0, BENCH)  # as `python bench/fuzz.py` has it
from fuzz import free_targets  # noqa: E402

sys.path.remove(BENCH)

REFUSALS = (ValueError, ImageError, OSError)

BUDGET = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""The same inputs at each run; bench/fuzz.py tries others for as long as one likes."""

EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 8), st.binary(max_size=12)),
    min_size=1, max_size=4,
)  # fmt: skip


def edited(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Content with some bytes replaced by others, at places counted round."""
    out = bytearray(content)
    for at, n, other in edits:
        start = at % (len(out) + 1)
        out[start : start + n] = other
    return bytes(out)


@pytest.mark.parametrize("target", ["reports", "images", "csv", "mapping", "config", "xml"])
@BUDGET
@given(edits=EDITS, number=st.integers(0, 10))
def test_what_others_wrote_is_read_or_refused(
    tmp_path: Path, target: str, edits: list, number: int
):
    seeds, read = free_targets(tmp_path)[target]
    with suppress(*REFUSALS):
        read(edited(seeds[number % len(seeds)], edits))


@pytest.mark.parametrize("target", ["reports", "config"])
@BUDGET
@given(text=st.text(max_size=300))
def test_any_text_is_read_or_refused(tmp_path: Path, target: str, text: str):
    _, read = free_targets(tmp_path)[target]
    with suppress(*REFUSALS):
        read(text.encode("utf-8", "surrogatepass"))


@BUDGET
@given(edits=EDITS)
def test_edited_metadata_of_a_checkpoint_is_refused_or_means_the_same(
    made_run: Path, tmp_path_factory: pytest.TempPathFactory, edits: list
):
    saved = find_checkpoint(made_run)
    whole = checkpoint_meta(saved)
    folder = tmp_path_factory.mktemp("meta")
    (folder / "meta.json").write_bytes(edited((saved / "meta.json").read_bytes(), edits))
    with suppress(CheckpointError):
        assert json_sha256(checkpoint_meta(folder)) == json_sha256(whole)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "tokenizer/tokenizer.json"])
def test_edited_files_of_a_checkpoint_are_refused(made_run: Path, tmp_path: Path, name: str):
    saved = find_checkpoint(shutil.copytree(made_run, tmp_path / "run"))
    path = saved / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 6).tolist():
        path.write_bytes(edited(whole, [(at, 1, bytes([whole[at] ^ 1]))]))
        if name == "trainer.pt":
            from mmclip.checkpoint import load_trainer_state as load
        else:
            load = load_checkpoint
        with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
            load(saved)


@pytest.mark.parametrize("name", ["images.npy", "samples.parquet", "meta.json"])
def test_edited_files_of_a_data_folder_are_refused_or_read_as_they_were(tmp_path: Path, name: str):
    folder = write_folder(tmp_path)
    samples, pixels = read_manifest(folder), ImageCache.open(folder).images.copy()
    path = folder / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(0, len(whole), 30).tolist():
        path.write_bytes(edited(whole, [(at, 1, bytes([whole[at] ^ (1 << (at % 8))]))]))
        try:
            assert read_manifest(folder) == samples
            np.testing.assert_array_equal(ImageCache.open(folder).images, pixels)
        except (ManifestError, CacheError):
            refused += 1
    assert refused > 10
    path.write_bytes(whole)
    assert json.loads((folder / "meta.json").read_text())["data_hash"]


@pytest.mark.parametrize("value", ["6", "[]", "true", "{ a = 1 }", "1.5"])
def test_extends_that_is_no_name_is_refused(tmp_path: Path, value: str):
    (tmp_path / "c.toml").write_text(f"extends = {value}\n")
    with pytest.raises(ValueError, match="is no name; name one configuration"):
        load_config(str(tmp_path / "c.toml"))


def test_an_empty_image_cache_is_refused(tmp_path: Path):
    folder = write_folder(tmp_path)
    (folder / "images.npy").write_bytes(b"")
    with pytest.raises(CacheError, match="cannot be opened"):
        ImageCache.open(folder)
