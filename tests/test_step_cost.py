import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmclip.data.text import tokenise, train_tokenizer


@pytest.fixture(scope="module")
def step_cost():
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    yield importlib.import_module("step_cost")
    sys.path.pop(0)


def test_the_peak_is_the_highest_running_sum_in_order_of_time(step_cost):
    assert step_cost.peak_of([(3, -40), (1, 50), (2, 30), (4, 20)]) == 80
    assert step_cost.peak_of([]) == 0


def test_the_profiler_sees_what_a_piece_of_work_holds_at_once(step_cost):
    n = 300_000  # floats

    def one_then_two():
        torch.ones(n)  # freed at once
        first = torch.ones(n)
        second = first + 1
        del first, second

    peak = step_cost.peak_of(step_cost.allocations(one_then_two))
    assert 8 * n <= peak < 8 * n + 100_000


def test_lengths_of_openi_have_their_median_and_never_pass_the_limit(step_cost):
    lengths = step_cost.report_lengths("openi", 20_000, 96, np.random.default_rng(0))
    assert abs(np.median(lengths) - step_cost.OPENI_MEDIAN) <= 1
    assert lengths.max() == 96 and 0.03 < (lengths == 96).mean() < 0.05
    assert set(step_cost.report_lengths("full", 4, 256, np.random.default_rng(0))) == {256}
    assert set(step_cost.report_lengths("40", 4, 256, np.random.default_rng(0))) == {40}


def test_reports_have_as_many_tokens_as_asked_for(step_cost):
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer(list(2 * step_cost.SENTENCES), vocab_size=1000)
    texts = [step_cost.write_report(n, rng) for n in (8, 42, 96)]
    found = tokenise(tokenizer, texts, max_tokens=200).is_valid.sum(1)
    assert found.tolist() == [8, 42, 96]


def test_arms_differ_in_nothing_but_terms_and_images(step_cost):
    configs = step_cost.configs_of("ablation", ["loss.text=0.5", "train.batch_size=8"])
    assert [c.loss.text for c in configs.values()] == [0, 0, 0.5, 0.5, 0.5]
    assert [c.loss.image for c in configs.values()] == [0, 0, 0, 1, 1]
    assert [c.unpaired.rows_per_pair for c in configs.values()] == [0, 0, 0, 0, 1]
    assert [c.train.batch_size for c in configs.values()] == [8, 16, 8, 8, 8]
    assert len({c.model.model_dump_json() for c in configs.values()}) == 1


def test_a_clock_counts_and_leaves_no_trace(step_cost):
    class Box:
        def open(self):
            return 7

    box, clock = Box(), step_cost.Stopwatch(torch.device("cpu"))
    clock.watch(box, "open", "opening")
    assert box.open() == 7 and clock.seconds["opening"] > 0
    clock.release()
    assert "open" not in vars(box)


@pytest.mark.slow
def test_the_script_measures_every_arm(step_cost, monkeypatch, capsys):
    sizes = ["model.image.width=16", "model.text.width=24", "model.image_decoder.width=24",
             "model.text_decoder.width=24", "model.image.depth=1"]  # fmt: skip
    argv = ["step_cost.py", "--image-size", "32", "--batch-size", "4", "--steps", "1", "--lengths",
            "20", "--precision", "fp32", "--vocab", "300",
            *(f"--set={size}" for size in sizes)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    step_cost.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["time_ratio"] > 0 and results["memory_ratio"] > 1
    assert set(results["seconds"]) == set(results["memory_mib"]) == set(step_cost.ARMS)
    parts = results["parts_ms"]["whole"]
    assert {"image decoder", "text decoder", "backward", "data"} <= set(parts)
    assert {p for p in parts if p.startswith("text encoder")} == {
        "text encoder, reports", "text encoder, masked reports", "text encoder, prompts"
    }  # fmt: skip
