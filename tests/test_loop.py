import gc
import json
import math
import os
import signal
from collections.abc import Iterator, Sequence
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mmclip.batch import Batch, BatchSlice
from mmclip.config import TrainConfig
from mmclip.patches import PatchGrid
from mmclip.training import log
from mmclip.training.finite import NonFiniteLoss
from mmclip.training.interrupt import STOP_SIGNALS, stop_between_steps
from mmclip.training.loop import fit
from mmclip.training.objective import Objective
from mmclip.training.optimizer import learning_rate, make_optimizer
from mmclip.training.processes import start_accelerator
from mmclip.training.state import TrainState
from mmclip.training.step import train_step
from mmclip.training.step_loader import batch_slices, step_loader
from tests.commands import in_two_processes
from tests.made import LABELS, PATCH_SIZE, WHOLE, MadeBatches, small_config, small_model

CONTRASTIVE = Objective(small_config(), PatchGrid(PATCH_SIZE))
CONFIG = TrainConfig(steps=10, batch_size=8, base_lr=0.03, save_every_steps=5, log_every_steps=2)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def new_state(
    accelerator: Accelerator, config: TrainConfig = CONFIG, objective: Objective = CONTRASTIVE
) -> TrainState:
    model = small_model(objective.config)
    optimizer = make_optimizer(model, model.no_decay_names(), config)
    return TrainState(*accelerator.prepare(model, optimizer))


def gradients(
    config: TrainConfig, batches: MadeBatches, objective: Objective
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients of one step, in whatever processes this runs."""
    accelerator = Accelerator(cpu=True)
    state = new_state(accelerator, config, objective)
    kept: dict[str, torch.Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            names = [n for n, _ in accelerator.unwrap_model(state.model).named_parameters()]
            for name, p in zip(names, self.param_groups[0]["params"], strict=True):
                assert p.grad is not None, name
                kept[name] = p.grad.clone()

    state.optimizer = accelerator.prepare(Keep(state.model.parameters(), lr=1.0))
    micro = [batches.batch(0, share) for share in batch_slices(config.n_micro_batches, accelerator)]
    terms = train_step(accelerator, state, micro, objective, config)
    return {name: float(terms[name]) for name in objective.weights}, kept


CASES = {  # rows, those without a report, those with a prompt
    "equal shares": (8, (), ()),
    "unequal rows per process": (7, (), ()),
    "rows without a text": (8, (1, 6), ()),
    "a process without pairs": (8, (4, 5, 6, 7), ()),
    "prompts beside and in place of reports": (8, (1, 5, 6, 7), (0, 1, 5, 6)),
}
PIXELS = (*WHOLE, "image_mask.mask_stage='pixels'")
RESNET = ("model.image.kind='resnet'", "model.image.depth=1")
ARMS = {
    "contrastive": (), "sigmoid": ("loss.contrastive='sigmoid'",), "whole": WHOLE, "pixels": PIXELS,
    "contrastive, resnet": RESNET, "whole, resnet": (*WHOLE, *RESNET),
    "pixels, resnet": (*PIXELS, *RESNET), "labels, resnet": (*LABELS, *RESNET),
}  # fmt: skip


CACHED = ("contrastive", "sigmoid", "whole")
"""Arms that two processes also train with a gradient cache."""


def in_one_process(
    case: str, arm: str, n_micro: int = 0
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """A step; with micro-batches, by a gradient cache."""
    n, without, prompted = CASES[case]
    cache = {"micro_batch_size": n // n_micro, "gradient_cache": True} if n_micro else {}
    config = TrainConfig(batch_size=n, clip_norm=1e9).model_copy(update=cache)
    objective = Objective(small_config(*ARMS[arm]), PatchGrid(PATCH_SIZE))
    return gradients(config, MadeBatches(n, without, prompted), objective)


ALL_PAIRS = list(product(CASES, ARMS))
SOME_PAIRS = [(c, a) for c, a in ALL_PAIRS if a == "contrastive" or c.startswith("prompts beside")]
"""Each case and each arm once at least."""


def write_gradients_of_this_process(folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """What each of two processes runs: see the test below."""
    for case, arm in pairs:
        losses, kept = in_one_process(case, arm)
        if os.environ["RANK"] == "0":
            torch.save({"losses": losses, "gradients": kept}, folder / f"{case}, {arm}.pt")
        AcceleratorState._reset_state(reset_partial_state=False)
        if arm in CACHED:
            losses, kept = in_one_process(case, arm, n_micro=2)
            if os.environ["RANK"] == "0":
                cached = folder / f"{case}, {arm}, cached.pt"
                torch.save({"losses": losses, "gradients": kept}, cached)
            AcceleratorState._reset_state(reset_partial_state=False)
    # torch aborts a process that ends while wrapped models still hold on to gloo's threads.
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.ledger("batch statistics", "contrastive term")
@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(SOME_PAIRS, id="some"),
        pytest.param(ALL_PAIRS, id="all", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_loss_and_gradients_of_one_on_the_joined_batch(
    tmp_path: Path, pairs: Sequence[tuple[str, str]]
):
    for ended in in_two_processes(tmp_path, write_gradients_of_this_process, tmp_path, pairs):
        assert ended.code == 0, ended.err
    for case, arm in pairs:
        AcceleratorState._reset_state(reset_partial_state=True)
        losses, alone = in_one_process(case, arm)
        for how in ("", *([", cached"] if arm in CACHED else [])):
            together = torch.load(tmp_path / f"{case}, {arm}{how}.pt", weights_only=True)
            assert together["losses"] == pytest.approx(losses, abs=1e-5), (case, arm, how)
            assert together["gradients"].keys() == alone.keys()
            for name, gradient in alone.items():
                torch.testing.assert_close(
                    together["gradients"][name], gradient, atol=1e-5, rtol=1e-5,
                    msg=f"{case}, {arm}{how}: {name}",
                )  # fmt: skip


def test_shares_of_a_batch_partition_it():
    for n, of in [(24, 1), (24, 5), (7, 2), (3, 4)]:
        rows = [row for index in range(of) for row in range(n)[BatchSlice(index, of).of_rows(n)]]
        assert rows == list(range(n))


@pytest.mark.ledger("optimiser")
def test_learning_rate_warms_up_to_the_peak_and_ends_at_its_floor():
    config = TrainConfig(
        steps=100, batch_size=128, base_lr=1.0, warmup_ratio=0.1, final_lr_ratio=0.02
    )
    assert learning_rate(0, config) == pytest.approx(0.05)
    assert learning_rate(9, config) == pytest.approx(0.5)  # base_lr * 128 / 256
    assert learning_rate(10, config) == pytest.approx(0.5)
    assert learning_rate(55, config) == pytest.approx(0.5 * 0.51)
    assert learning_rate(100, config) == pytest.approx(0.5 * 0.02)


@pytest.mark.ledger("sums over elements")
def test_accumulation_divides_by_the_count_of_the_whole_batch():
    # Micro-batches of one study each: their mean is not weighted by micro-batch but by row.
    batches = MadeBatches(8, without_report=(4, 5, 6))
    accelerator = Accelerator(cpu=True)
    state = new_state(accelerator)
    config = CONFIG.model_copy(update={"micro_batch_size": 4})
    with torch.no_grad():
        sums = [
            float(
                CONTRASTIVE.sums(state.model, batches.batch(0, BatchSlice(half, 2)))["contrastive"]
            )
            for half in (0, 1)
        ]
    halves = [batches.batch(0, BatchSlice(half, 2)) for half in (0, 1)]
    terms = train_step(accelerator, state, halves, CONTRASTIVE, config)
    assert float(terms["contrastive"]) == pytest.approx(sum(sums) / 5, rel=1e-5)


def fit_here(
    run: Path, batches: MadeBatches, state: TrainState, accelerator: Accelerator, saved: list[int]
) -> None:
    fit(
        accelerator, state, batches.batch, CONTRASTIVE, CONFIG, run,
        lambda s: saved.append(s.step),
    )  # fmt: skip


@pytest.mark.parametrize("arm", CACHED)
def test_a_gradient_cache_gives_loss_and_gradients_of_one_batch(arm: str):
    batches = MadeBatches(8, without_report=(1, 5, 6), with_prompt=(1, 5))
    objective = Objective(small_config(*ARMS[arm]), PatchGrid(PATCH_SIZE))
    config = TrainConfig(batch_size=8, clip_norm=1e9)
    losses, wanted = gradients(config, batches, objective)
    for n_micro in (1, 2, 4):
        cached = config.model_copy(
            update={"micro_batch_size": 8 // n_micro, "gradient_cache": True}
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        found, kept = gradients(cached, batches, objective)
        assert found == pytest.approx(losses, rel=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(kept[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_one_batch_can_be_learnt_by_heart(tmp_path: Path):
    class OneBatch(MadeBatches):
        def batch(self, step: int = 0, batch_slice: BatchSlice | None = None) -> Batch:
            return super().batch(0, batch_slice)

    accelerator = Accelerator(cpu=True)
    config = TrainConfig(steps=60, batch_size=8, base_lr=0.2, log_every_steps=60)
    state = new_state(accelerator, config)
    fit(accelerator, state, OneBatch().batch, CONTRASTIVE, config, tmp_path, lambda s: None)
    # Texts are equal two by two, so the floor is log 2: the even split over two positives.
    assert state.log["contrastive"] == pytest.approx(math.log(2), abs=0.02)


def test_the_log_has_a_line_every_so_many_steps_and_none_twice_after_a_crash(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    state = new_state(accelerator)
    state.step = 4
    saved: list[int] = []
    fit_here(tmp_path, MadeBatches(), state, accelerator, saved)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert lines[-1].keys() >= {"loss", "contrastive", "lr", "grad_norm", "images_per_s"}
    assert saved == [5, 10]


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(tmp_path: Path):
    class Poisoned(MadeBatches):
        def batch(self, step: int = 0, batch_slice: BatchSlice | None = None) -> Batch:
            batch = super().batch(step, batch_slice)
            if step == 3:
                batch.image[2] = torch.nan
            return batch

    accelerator = Accelerator(cpu=True)
    state = new_state(accelerator)
    with pytest.raises(NonFiniteLoss, match="step 3: the loss term contrastive is not finite"):
        fit_here(tmp_path, Poisoned(), state, accelerator, [])
    assert state.step == 3
    assert all(p.isfinite().all() for p in state.model.parameters())
    folder = tmp_path / "nonfinite_step_000003_process_0"
    assert "image-2" in (folder / "batch_0_images.txt").read_text().split()
    assert (folder / "batch_0.safetensors").is_file()


class WithARoot(Objective):
    """A finite loss whose gradient is not: the root of 0 is 0, and its slope is infinite."""

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        terms = super().sums(model, batch)
        weight = next(model.parameters())
        return {"contrastive": terms["contrastive"] + (0 * weight).abs().sum().sqrt()}


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    state = new_state(accelerator)
    with pytest.raises(
        NonFiniteLoss, match="step 0: the gradient, of a finite loss, is not finite"
    ):
        fit(
            accelerator, state, MadeBatches().batch,
            WithARoot(small_config(), PatchGrid(PATCH_SIZE)), CONFIG, tmp_path, lambda s: None,
        )  # fmt: skip
    assert state.step == 0
    assert all(p.isfinite().all() for p in state.model.parameters())


def test_the_fused_optimiser_leaves_out_a_step_that_the_device_found_not_finite():
    # What the loop on a GPU counts on; torch has the same kernel for a CPU.
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for found, moves in ((0.0, True), (1.0, False), (0.0, True)):
        before = weight.detach().clone()
        steps = [float(s["step"]) for s in optimizer.state.values()]
        weight.grad = torch.ones(3) if moves else torch.full((3,), torch.nan)
        optimizer.found_inf = torch.tensor(found)  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        assert (not torch.equal(before, weight.detach())) == moves
        if not moves:
            assert steps == [float(s["step"]) for s in optimizer.state.values()]
    assert weight.isfinite().all()


def test_bf16_trains_and_keeps_weights_in_fp32(tmp_path: Path):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    state = new_state(accelerator)
    fit_here(tmp_path, MadeBatches(), state, accelerator, [])
    assert math.isfinite(state.log["contrastive"])
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}


def test_a_worker_makes_the_batches_of_their_steps_ahead_and_in_order():
    batches, of_this = MadeBatches(), [BatchSlice(half, 2) for half in (0, 1)]
    for device, is_ahead in ((torch.device("cpu"), False), (torch.device("cuda"), True)):
        loader = step_loader(batches.batch, of_this, 2, 6, device)
        assert (loader.num_workers == 1) == is_ahead
        loader.pin_memory = False  # no GPU is needed for what is asked here
        for step, micro in zip(range(2, 6), loader, strict=True):
            for batch_slice, batch in zip(of_this, micro, strict=True):
                expected = batches.batch(step, batch_slice)
                assert batch.step == step and batch.image_ids == expected.image_ids
                torch.testing.assert_close(
                    batch.tensors(), expected.tensors(), rtol=0, atol=0, equal_nan=True
                )


def test_a_batch_that_cannot_be_made_fails_at_its_own_step():
    def read_batch(step: int, batch_slice: BatchSlice) -> Batch:
        if step == 2:
            raise OSError("no image")
        return MadeBatches().batch(step, batch_slice)

    for device in (torch.device("cpu"), torch.device("cuda")):
        loader = step_loader(read_batch, [BatchSlice()], 0, 9, device)
        loader.pin_memory = False
        steps = iter(loader)
        assert [next(steps)[0].step, next(steps)[0].step] == [0, 1]
        with pytest.raises(OSError, match="no image"):
            next(steps)


@pytest.mark.parametrize("asks", STOP_SIGNALS)
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(asks: signal.Signals):
    def before(*_: object) -> None:
        raise InterruptedError

    theirs = {each: signal.signal(each, before) for each in STOP_SIGNALS}
    try:
        with stop_between_steps(1) as asked_to_stop:
            assert asked_to_stop() is None
            signal.raise_signal(asks)
            assert asked_to_stop() == asks
            for each in STOP_SIGNALS:
                with pytest.raises(InterruptedError):
                    signal.raise_signal(each)
        assert {signal.getsignal(each) for each in STOP_SIGNALS} == {before}
    finally:
        for each, handler in theirs.items():
            signal.signal(each, handler)


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch):
    start_accelerator(CONFIG, cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2 processes were started"):
        start_accelerator(CONFIG, cpu=True)


@pytest.mark.parametrize("micro_batch_size", [None, 2, 4])
def test_a_step_counts_every_image_that_it_reads(micro_batch_size: int | None):
    # Four pairs a step, and four unpaired images on top, which are images read like any other.
    config = CONFIG.model_copy(update={"batch_size": 4, "micro_batch_size": micro_batch_size})
    assert config.n_micro_batches == 4 // (micro_batch_size or 4)
    accelerator = Accelerator(cpu=True)
    batches = MadeBatches(8, without_report=(4, 5, 6, 7))
    slices = batch_slices(config.n_micro_batches, accelerator)
    micro = [batches.batch(0, batch_slice) for batch_slice in slices]
    terms = train_step(accelerator, new_state(accelerator), micro, CONTRASTIVE, config)
    assert int(terms["n_images"]) == 8


def test_the_speed_in_the_log_is_of_images_and_not_of_pairs(tmp_path: Path, monkeypatch):
    ticks = count()
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    batches = MadeBatches(8, without_report=(4, 5, 6, 7))
    accelerator = Accelerator(cpu=True)
    config = CONFIG.model_copy(update={"steps": 1, "batch_size": 4, "log_every_steps": 1})
    fit(
        accelerator, new_state(accelerator, config), batches.batch, CONTRASTIVE, config,
        tmp_path, lambda s: None,
    )  # fmt: skip
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["images_per_s"] == 8  # in the one second between two ticks
