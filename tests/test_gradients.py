"""bench/gradients.py: the pull of a term by hand, and of a real objective."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCH = str(Path(__file__).parents[1] / "bench")
sys.path.insert(0, BENCH)  # as `python bench/gradients.py` has it
gradients = importlib.import_module("gradients")
sys.path.remove(BENCH)


def test_pulls_by_hand():
    found = gradients.pulls(
        {
            "contrastive": torch.tensor([[3.0, 4.0], [3.0, 4.0]]),
            "image": torch.tensor([[0.0, 2.0], [1.0, 0.0]]),
        }
    )
    assert found["contrastive"] == pytest.approx((5.0, 1.0))
    assert found["image"] == pytest.approx((1.5, (4 / 5 + 3 / 5) / 2))


def test_the_gradient_of_a_module_is_in_the_order_of_its_parameters_and_0_where_none_is_used():
    module = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)])
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 1.0]]))
    loss = (module[0](torch.tensor([[2.0, 5.0]])) ** 2).sum()
    found = gradients.flat_gradient(loss, module)
    assert found.tolist() == [2 * 7 * 2.0, 2 * 7 * 5.0, 0.0]


def test_the_script_measures_a_run(
    made_run: Path, made_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    argv = ["gradients.py", str(made_run), "--data", str(made_data), "--batches", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    gradients.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["batches"] == 2 and found["step"] == 6
    for weights in ("new", "trained"):
        for encoder in ("image encoder", "text encoder"):
            pull = found[weights][encoder]["contrastive"]
            assert pull["norm"] > 0
            assert pull["cosine"] == pytest.approx(1, abs=1e-4)
