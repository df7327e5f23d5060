"""A hospital's day, as examples/hospital tells it: from a PACS export to a fine-tuned model."""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "hospital"
REAL = ROOT.parent / "shared" / "data" / "cxr" / "films" / "nih1024"
N_IMAGES = 60


@pytest.fixture(scope="module")
def make_export():
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module("make_export")
    sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def export(make_export, tmp_path_factory) -> Path:
    """An export of real radiographs, or of pictures where there are none."""
    folder = tmp_path_factory.mktemp("hospital")
    images = REAL
    if not REAL.is_dir():
        images = folder / "images"
        images.mkdir()
        rng = np.random.default_rng(0)
        for i in range(N_IMAGES):
            y, x = np.indices((120 + i % 3 * 20, 110))
            grey = 90 + 60 * np.sin((x + i) / 17) + 30 * np.cos(y / 23) + rng.normal(0, 8, x.shape)
            Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(images / f"{i:03d}.png")
    assert make_export.write_export(images, folder / "export", N_IMAGES) == N_IMAGES
    return folder / "export"


def test_an_export_is_as_mixed_as_an_archive(make_export, export: Path):
    syntaxes, kinds, n_bare = Counter(), Counter(), 0
    for path in (export / "PACS").rglob("IM *"):
        n_bare += path.read_bytes()[128:132] != b"DICM"
        data = pydicom.dcmread(path, force=True)
        syntax = getattr(data.file_meta, "TransferSyntaxUID", "none")
        syntaxes[str(syntax)] += 1
        kinds[data.PhotometricInterpretation] += 1
    assert len(syntaxes) == len(make_export.WAYS) and n_bare > 3
    assert kinds["MONOCHROME1"] >= 10
    rows = (export / "reports.csv").read_text("cp1252")
    assert "ADDENDUM" in rows and "Grünwald" in rows and rows.startswith("Auftragsnummer;")
    assert rows.count("\r\n") or "\r" in (export / "reports.csv").read_bytes().decode("cp1252")


@pytest.mark.slow
def test_every_command_of_a_hospitals_day_runs_and_names_nobody(export: Path, tmp_path: Path):
    environment = {
        **os.environ,
        "MMCLIP": f"{sys.executable} -m mmclip",
        "PYTHONPATH": str(ROOT / "src"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    out = tmp_path / "out"
    out.mkdir()
    ended = subprocess.run(
        ["bash", EXAMPLE / "run.sh", export, out],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    meta = json.loads((out / "data" / "meta.json").read_text())
    assert meta["n_with_image"] == N_IMAGES
    reasons = meta["excluded"]
    assert sum(reasons.values()) == 5 and reasons["the image is no radiograph"] == 2
    labels = json.loads((out / "labels.json").read_text())["labels"]["pleural effusion"]
    assert labels["1"] > 10 and labels["0"] > 10
    for name in ("predictions.csv", "found/found.png", "map.png", "finetuned/summary.json",
                 "run/test/results.json"):  # fmt: skip
        assert (out / name).is_file(), name
    secrets = ("Änne", "Ayşe", "Jörg", "P-4711", "0000150", "1.2.826.0.1", "Grünwald")
    left = {
        path.relative_to(out): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl", ".csv", ".parquet", ".html")
    }
    for secret in secrets:
        assert not [name for name, content in left.items() if secret.encode() in content], secret
        assert secret not in ended.stdout + ended.stderr, secret
