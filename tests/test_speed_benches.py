"""The scripts that measure speed on a CPU run, and their last line is JSON; no time is tested."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def _bench_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def line_of(
    name: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> dict:
    out = tmp_path / "lines.jsonl"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--out", str(out)])
    importlib.import_module(name).main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert out.read_text("utf-8") == last + "\n"
    return json.loads(last)


@pytest.mark.slow
def test_data_loading(monkeypatch, capsys, tmp_path: Path):
    found = line_of(
        "data_loading", ["--images", "32", "--rounds", "1"], monkeypatch, capsys, tmp_path
    )
    for kind in ("390 x 320 JPEG", "1024 x 1024 PNG", "augmentation"):
        assert found[kind]["ratio"] > 0 and len(found[kind]["images_per_s"]) == 2


def test_the_augmentation_that_was_is_that_which_is(monkeypatch):
    import torch

    from mmclip.config import AugmentConfig
    from mmclip.data.image_text_dataset import augmented

    bench = importlib.import_module("data_loading")
    generator = torch.Generator().manual_seed(0)
    smooth = torch.linspace(0, 255, 64).to(torch.uint8).expand(4, 64, 64).contiguous()
    uniforms = torch.rand(4, 9, generator=generator)
    was = bench.with_affine_grid(smooth, uniforms, AugmentConfig())
    inside = (slice(None), slice(None), slice(12, 52), slice(12, 52))
    torch.testing.assert_close(
        augmented(smooth, uniforms, AugmentConfig())[inside], was[inside], atol=1e-5, rtol=0
    )


def test_vs_transformers(monkeypatch, capsys, tmp_path: Path):
    small = ["--image-size", "32", "--batch-size", "4", "--turns", "1"]
    found = line_of("vs_transformers", small, monkeypatch, capsys, tmp_path)
    assert found["32 px"]["ratio, as users write it"] > 0
    assert found["32 px"]["ratio, given our settings"] > 0


@pytest.mark.slow
def test_scaling(monkeypatch, capsys, tmp_path: Path):
    found = line_of("scaling", ["--images", "320"], monkeypatch, capsys, tmp_path)
    assert found["images"] == [20, 80, 320]
    for stage in ("build", "pretrain", "zeroshot"):
        assert len(found[stage]["cpu_s"]) == 3 and min(found[stage]["mb"]) > 0


@pytest.mark.slow
def test_large_batch(monkeypatch, capsys, tmp_path: Path):
    arguments = ["--pairs", "32", "--micro-batch", "8"]
    rows = line_of("large_batch", arguments, monkeypatch, capsys, tmp_path)["rows"]
    caching = {"caching, 32", "caching, 32, two processes"}
    assert set(rows) == {"start", "plain", "checkpointing", *caching}
    assert rows["plain"]["memory"] == rows["plain"]["time"] == 1
    assert all(row["mib"] > 0 and row["cpu_s"] > 0 for row in rows.values())
