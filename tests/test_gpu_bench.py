"""The script of the GPU rows, tried with small shapes on a CPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"

ROWS = ("whole", "vs_transformers", "large_batch 4", "checkpointing", "inference")


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("gpu")
    sys.path.remove(str(BENCH))


@pytest.mark.slow
def test_rows_are_measured_once_and_the_last_line_is_their_summary(
    gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "gpu.jsonl"
    argv = ["gpu.py", "--tiny", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, *(part for row in ROWS for part in ("--row", row))])
    gpu.main()
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["row"] for line in lines] == [row for row in gpu_order() if row in ROWS]
    found = {line["row"]: line for line in lines}
    assert found["whole"]["images_per_s"] > 0 and 0 <= found["whole"]["waiting"] < 1
    assert found["large_batch 4"]["batch"] == 4 * found["large_batch 4"]["pairs"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == len(ROWS)
    gpu.main()  # again: nothing is left to measure
    assert len(out.read_text("utf-8").splitlines()) == len(ROWS)


def gpu_order() -> list[str]:
    """The rows in the order of the script."""
    text = (BENCH / "gpu.py").read_text("utf-8")
    return sorted(ROWS, key=lambda row: text.index(f'"{row}": lambda'))


def test_operations_of_a_layer_are_those_of_its_matrix_products(gpu):
    # Of 3 tokens of width 4: projections 4 x 16, MLP 2 x 64 a token; scores and sums 2 x 9 x 4.
    macs = 3 * (4 * 16 + 2 * 64) + 2 * 9 * 4
    assert gpu.layer_flops(3, 4) == 6 * macs
    cross = 2 * 3 * 16 + 2 * 5 * 7 * 4 + 2 * 3 * 5 * 4
    assert gpu.layer_flops(3, 4, context=5, context_width=7) == 6 * (macs + cross)
