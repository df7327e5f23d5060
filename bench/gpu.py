"""The GPU rows of docs/performance.md: speed, memory and utilisation at the paper's sizes, at once.

    python bench/gpu.py --out bench/results/gpu.jsonl

Each row is a line of OUT as soon as it is measured; the same command again goes on with the rows
that are missing. The table comes last, and the last line is one JSON object. `--tiny` runs every
row with small shapes on a CPU, which shows that the script works and nothing else.

Both sides of a comparison do the same work in the same process, in turns, with the same precision,
allocator and optimiser. Images are noise, reports are common sentences with the lengths of
Open-I's; of a pretrained encoder only the size matters, and it starts from random weights.
Utilisation (MFU) counts the floating-point operations of the model on valid tokens, forward and
backward, against the rate of a bf16 matrix product measured in the same run.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
)

from mmclip.batch import Batch, BatchSlice
from mmclip.config import Config, load_config
from mmclip.data.batches import TrainingBatches
from mmclip.data.image_text_dataset import ImageTextDataset, normalise
from mmclip.data.streams import training_dataset
from mmclip.data.text import train_tokenizer
from mmclip.embed import encode_squares
from mmclip.models.build import build_mmclip, compile_layers
from mmclip.models.encoders import build_image_encoder, build_text_encoder, patch_grid
from mmclip.models.mmclip import MMCLIP
from mmclip.training.objective import Objective
from mmclip.training.optimizer import make_optimizer
from mmclip.training.state import TrainState
from mmclip.training.step import train_step
from mmclip.training.step_loader import step_loader
from side_by_side import take_turns, transformers_model
from step_cost import PRETRAINED_TEXT, made_rows, synchronise

VOCAB_SIZE = 28996
"""Source: BioClinicalBERT."""

DECODERS = (
    "model.image_decoder.width=512", "model.image_decoder.depth=4", "model.image_decoder.heads=8",
    "model.text_decoder.width=384", "model.text_decoder.depth=4", "model.text_decoder.heads=6",
)  # fmt: skip
"""Decoders that suit a ViT-B. Source: MAE's width and half its depth; see docs/performance.md."""

GUIDED = ("image_mask.anneal_from=0", "image_mask.anneal_to=0")
"""Patches are chosen as at the end of training, where choosing costs most."""

ALONE = ("loss.image=0", "loss.text=0", "unpaired.rows_per_pair=0")

TINY = (
    "model.embed_dim=16", "model.image.width=32", "model.image.depth=2", "model.image.heads=2",
    "model.image.patch_size=8", "model.text.width=32", "model.text.depth=2", "model.text.heads=2",
    "model.image_decoder.width=16", "model.image_decoder.depth=1", "model.image_decoder.heads=2",
    "model.text_decoder.width=16", "model.text_decoder.depth=1", "model.text_decoder.heads=2",
    "data.image_size=32", "data.max_tokens=64", "train.precision=fp32",
)  # fmt: skip


@dataclass
class Bench:
    """What all rows share."""

    device: torch.device
    tiny: bool
    pairs: int
    steps: int  # measured, of each side
    dataset: ImageTextDataset
    tokenizer: PreTrainedTokenizerFast
    tflops: float  # of a bf16 matrix product

    def config(self, *keys: str) -> Config:
        """The paper's sizes, with these keys."""
        return sized(self.tiny, self.pairs, *keys)

    @property
    def accelerator(self) -> Accelerator:
        """The one of this process."""
        return Accelerator(
            mixed_precision="no" if self.tiny else "bf16", cpu=self.device.type == "cpu"
        )


def sized(tiny: bool, pairs: int, *keys: str) -> Config:
    """The paper's configuration with this many pairs a step."""
    base = [*GUIDED, f"train.batch_size={pairs}", *DECODERS, *(TINY if tiny else ()), *keys]
    config = load_config("paper", base)
    if tiny:
        text = config.model.text.model_copy(update={"pretrained": None, "vocab_size": 200})
    else:
        text = PRETRAINED_TEXT
    return config.model_copy(update={"model": config.model.model_copy(update={"text": text})})


@dataclass
class Trainer:
    """A new model with all that its steps need."""

    config: Config
    model: MMCLIP
    state: TrainState
    batches: TrainingBatches
    objective: Objective
    accelerator: Accelerator

    def shares(self) -> list[BatchSlice]:
        """The micro-batches of a step."""
        n = self.config.train.n_micro_batches
        return [BatchSlice(m, n) for m in range(n)]

    def step(self, micro: Sequence[Any]) -> None:
        """One step on these micro-batches."""
        train_step(self.accelerator, self.state, micro, self.objective, self.config.train)


def trainer(bench: Bench, *keys: str, checkpointing: bool = False) -> Trainer:
    """A model of a configuration, ready to train."""
    config, accelerator = bench.config(*keys), bench.accelerator
    torch.manual_seed(0)
    pad = bench.tokenizer.pad_token_id
    assert isinstance(pad, int)
    vocab_size = 200 if bench.tiny else VOCAB_SIZE
    image = build_image_encoder(config.model.image, config.data.image_size)
    text = build_text_encoder(config.model.text, vocab_size, config.data.max_tokens, pad)
    model = build_mmclip(config, image, text).train().to(accelerator.device)
    if checkpointing:
        image.gradient_checkpointing_enable()
        text.gradient_checkpointing_enable()
    optimizer = make_optimizer(model, model.no_decay_names(), config.train)
    if config.train.compile:
        compile_layers(model)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    objective = Objective(config, patch_grid(image))
    dataset = training_dataset(bench.dataset, config)
    batches = TrainingBatches(dataset, bench.tokenizer, config, objective.grid)
    state = TrainState(wrapped, optimizer)
    return Trainer(config, model, state, batches, objective, accelerator)


# -- what a step takes --


def seconds_per_step(bench: Bench, one: Trainer) -> dict[str, float]:
    """A step of the training loop with its loader, and the share of it that waits for batches.

    The first steps, in which torch.compile and the allocator learn the shapes, are not counted. A
    shape that comes up later is compiled then, so such a measurement is thrown away.
    """
    warm, tries = 2 if bench.tiny else 10, 3
    end = warm + tries * bench.steps
    steps = iter_waiting(step_loader(one.batches.read, one.shares(), 0, end, bench.device))
    for _ in range(warm):
        one.step(next(steps).batch)
    found: dict[str, float] = {}
    for number in range(tries):
        one.state.settle()
        synchronise(bench.device)
        waited, began, graphs = 0.0, time.perf_counter(), n_graphs()
        for _ in range(bench.steps):
            micro = next(steps)
            waited += micro.waited_s
            one.step(micro.batch)
        launched = time.perf_counter() - began
        one.state.settle()
        synchronise(bench.device)
        seconds = (time.perf_counter() - began) / bench.steps
        found = {
            "s": seconds,
            "waiting": waited / bench.steps / seconds,
            "host_s": launched / bench.steps,
            "thrown_away": number,
            "recompiled": n_graphs() - graphs,
        }
        if not found["recompiled"]:
            break
    return found


def n_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@dataclass
class Waited:
    """A step's batch and how long the loop waited for it."""

    batch: list[Any]
    waited_s: float


def iter_waiting(loader: Any) -> Iterator[Waited]:
    """The batches of a loader with the time that each was waited for."""
    steps = iter(loader)
    while True:
        began = time.perf_counter()
        batch = next(steps, None)
        if batch is None:
            return
        yield Waited(batch, time.perf_counter() - began)


def images_per_step(one: Trainer) -> int:
    """Images that a step reads."""
    n = one.config.train.batch_size
    return n + round(one.config.unpaired.rows_per_pair * n)


def peak_mib(bench: Bench, work: Callable[[], object]) -> float:
    """The most memory that torch's allocator held during some work; 0 on a CPU."""
    if bench.device.type == "cpu":
        work()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


@contextmanager
def memory_freed() -> Iterator[None]:
    """Whatever was built inside is gone afterwards."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# -- floating-point operations --


def layer_flops(tokens: float, width: int, context: float = 0, context_width: int = 0) -> float:
    """Forward and backward of a transformer layer with an MLP of 4 widths, on one sequence.

    Args:
        tokens: Valid ones.
        width: Of a token.
        context: Tokens that a cross-attention reads; 0 without one.
        context_width: Their width.
    """
    macs = 12 * width**2 * tokens + 2 * tokens**2 * width
    if context:
        macs += 2 * width**2 * tokens + 2 * context * context_width * width
        macs += 2 * tokens * context * width
    return 6 * macs


def step_flops(one: Trainer, step: int = 0) -> float:
    """Operations that the model needs for a step, without padding and without recomputation."""
    model, total = one.config.model, 0.0
    batch = one.batches.batch(step, BatchSlice())
    side = one.config.data.image_size // one.objective.grid.patch_size
    n, image, text = side**2 + 1, model.image, model.text
    total += len(batch) * image.depth * layer_flops(n, image.width)
    total += len(batch) * 6 * (n - 1) * one.objective.grid.patch_size**2 * image.width
    for texts in (batch.reports, batch.prompts):
        for bucket in texts.encoding.buckets if len(texts) else ():
            for length in bucket.is_valid.sum(1).tolist():
                total += text.depth * layer_flops(length, text.width)
        if one.config.loss.text and len(texts):
            own = model.text_decoder
            for length in texts.is_valid.sum(1).tolist():
                total += own.depth * layer_flops(length, own.width, n, image.width)
            masked = len(texts.encoding.masked_places)
            vocab = one.model.text_model.config.vocab_size
            total += 6 * masked * text.width * (own.width + vocab)
    if one.config.loss.image:
        own = model.image_decoder
        read = sum(float(t.is_valid.sum()) for t in batch.texts()) / len(batch)
        total += len(batch) * own.depth * layer_flops(n - 1, own.width, read, text.width)
    return total


def matmul_tflops(device: torch.device, side: int, seconds: float = 0.3) -> float:
    """The rate of a bf16 matrix product of random numbers, in TFLOP/s."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronise(device)
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            a @ b
        synchronise(device)
        n += 10
    return 2 * side**3 * n / (time.perf_counter() - began) / 1e12


# -- the rows --


def training_row(bench: Bench, *keys: str) -> dict[str, Any]:
    """Time, memory and utilisation of one arm."""
    one = trainer(bench, *keys)
    flops = step_flops(one)
    found: dict[str, float] = {}
    memory = peak_mib(bench, lambda: found.update(seconds_per_step(bench, one)))
    n = images_per_step(one)
    one.state.settle()
    return {
        "ms": round(1000 * found["s"], 1),
        "images_per_s": round(n / found["s"]),
        "mfu": round(flops / found["s"] / bench.tflops / 1e12, 3),
        "waiting": round(found["waiting"], 4),
        "host_ms": round(1000 * found["host_s"], 1),
        "recompiled_meanwhile": round(found["recompiled"]),
        "mib": round(memory),
        "tflop_a_step": round(flops / 1e12, 2),
    }


def arm(name: str, is_compiled: bool, pairs: int) -> tuple[str, ...]:
    """The keys of an arm."""
    keys = {
        "contrastive": ALONE,
        "contrastive, all images": (*ALONE, f"train.batch_size={2 * pairs}"),
        "whole": ("unpaired.rows_per_pair=1",),
    }[name]
    return (*keys, f"train.compile={str(is_compiled).lower()}")


def alternate(
    bench: Bench, sides: dict[str, Callable[[], object]], steps: int | None = None
) -> dict[str, float]:
    """Median seconds of each side, in turns, after a warm-up."""
    seconds = take_turns(sides, steps or bench.steps, 3, lambda: synchronise(bench.device))
    return {name: statistics.median(some) for name, some in seconds.items()}


def compile_stacks(model: nn.Module) -> None:
    """Compiles the layers of a model of others as `compile_layers` does ours."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for layer in stack:
                layer.compile()


def their_step(bench: Bench, model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    """A step of a plain loop: autocast, backward, clip, fused AdamW."""
    is_gpu = bench.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=is_gpu)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=not bench.tiny):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def vs_transformers(bench: Bench, is_compiled: bool) -> dict[str, Any]:
    """Our contrastive step against VisionTextDualEncoderModel, as users write it and as we do."""
    one = trainer(bench, *arm("contrastive, all images", is_compiled, bench.pairs))
    batch = one.batches.batch(0, BatchSlice()).to(bench.device)
    max_tokens = 32 if bench.tiny else 128
    ids, is_valid = batch.reports.ids, batch.reports.is_valid
    ids, is_valid = ids[:, :max_tokens], is_valid[:, :max_tokens]
    full = torch.zeros(len(ids), max_tokens, dtype=ids.dtype, device=ids.device)
    full[:, : ids.shape[1]] = ids
    sides: dict[str, Callable[[], object]] = {"ours": lambda: one.step([batch])}
    for name, channels, tokens in (
        ("as users write it", 3, full),
        ("given our settings", 1, ids),
    ):
        config = bench.config(*ALONE)
        model = transformers_model(
            config, channels, config.model.text.vocab_size, max(max_tokens, 64)
        ).to(bench.device)
        if is_compiled:
            compile_stacks(model)
        inputs = {
            "pixel_values": batch.image.expand(-1, channels, -1, -1).contiguous(),
            "input_ids": tokens,
            "attention_mask": (
                torch.arange(tokens.shape[1], device=ids.device) < is_valid.sum(1)[:, None]
            ).long(),
        }
        sides[name] = their_step(
            bench, model, lambda m=model, i=inputs: m(**i, return_loss=True).loss
        )
    seconds = alternate(bench, sides)
    one.state.settle()
    return {
        "ms": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "ratio_as_users_write_it": round(seconds["ours"] / seconds["as users write it"], 3),
        "ratio_given_our_settings": round(seconds["ours"] / seconds["given our settings"], 3),
    }


def vs_open_clip(bench: Bench, is_compiled: bool) -> dict[str, Any]:
    """The same against open_clip's CLIP of equal shape: RGB, its own text tower, its own loss."""
    try:
        import open_clip
    except ImportError as error:
        return {"not_run": f"open_clip cannot be imported here ({error})"}
    one = trainer(bench, *arm("contrastive, all images", is_compiled, bench.pairs))
    config = one.config
    batch = one.batches.batch(0, BatchSlice()).to(bench.device)
    context = batch.reports.ids.shape[1]
    image, text = config.model.image, config.model.text
    model = open_clip.model.CLIP(
        embed_dim=config.model.embed_dim,
        vision_cfg={
            "layers": image.depth, "width": image.width, "patch_size": image.patch_size,
            "head_width": image.width // image.heads, "image_size": config.data.image_size,
        },
        text_cfg={
            "context_length": context, "vocab_size": text.vocab_size, "width": text.width,
            "heads": text.heads, "layers": text.depth,
        },
    ).train().to(bench.device)  # fmt: skip
    if is_compiled:
        compile_stacks(model)
    loss = open_clip.ClipLoss()
    rgb = batch.image.expand(-1, 3, -1, -1).contiguous()

    def loss_of() -> Tensor:
        found = model(rgb, batch.reports.ids)
        with torch.autocast(bench.device.type, enabled=False):
            return loss(*(x.float() for x in found[:2]), found[2].float())

    sides = {"ours": lambda: one.step([batch]), "open_clip": their_step(bench, model, loss_of)}
    seconds = alternate(bench, sides)
    one.state.settle()
    return {
        "ms": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "ratio": round(seconds["ours"] / seconds["open_clip"], 3),
    }


def inference(bench: Bench) -> dict[str, Any]:
    """Images/s of `encode_squares` against a bare loop over the same encoder and pixels."""
    one = trainer(bench, *ALONE)
    model, n = one.model.eval(), len(bench.dataset)
    size = 256

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, n, size):
            part = np.arange(start, min(start + size, n))
            image = normalise(bench.dataset.pixels(part).to(bench.device))
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=not bench.tiny):
                found = model.vision_model(pixel_values=image).pooler_output
                found = model.visual_projection(found)
            found.float().cpu()

    def ours() -> None:
        for start in range(0, n, size):
            part = np.arange(start, min(start + size, n))
            encode_squares(model, bench.dataset.pixels(part), size)

    sides = {"ours": ours, "bare": bare}
    seconds = alternate(bench, sides, steps=3)
    return {
        "images_per_s": {name: round(n / value) for name, value in seconds.items()},
        "ratio": round(seconds["bare"] / seconds["ours"], 3),
    }


def large_batch(bench: Bench, n_micro: int) -> dict[str, Any]:
    """Memory and time of a contrastive batch of n micro-batches by gradient caching."""
    pairs = bench.pairs * n_micro
    one = trainer(
        bench, *ALONE, f"train.batch_size={pairs}", f"train.micro_batch_size={bench.pairs}",
        "train.gradient_cache=true",
    )  # fmt: skip
    part = one.batches.read(0, BatchSlice(0, n_micro))  # the same rows in each: only memory counts
    if bench.device.type == "cuda":
        part = part.pin_memory()
    n_steps = 1 if n_micro > 4 else 3

    def work() -> float:
        one.step([part] * n_micro)
        synchronise(bench.device)
        began = time.perf_counter()
        for _ in range(n_steps):
            one.step([part] * n_micro)
        one.state.settle()
        synchronise(bench.device)
        return (time.perf_counter() - began) / n_steps

    found: list[float] = []
    memory = peak_mib(bench, lambda: found.append(work()))
    return {
        "batch": pairs,
        "ms_a_micro_batch": round(1000 * found[0] / n_micro, 1),
        "mib": round(memory),
    }


def checkpointing(bench: Bench) -> dict[str, Any]:
    """Memory and time of the contrastive step with gradient checkpointing of the towers."""
    out = {}
    for name, is_on in (("plain", False), ("checkpointed", True)):
        one = trainer(bench, *arm("contrastive", False, bench.pairs), checkpointing=is_on)
        found: dict[str, float] = {}
        memory = peak_mib(
            bench, lambda one=one, found=found: found.update(seconds_per_step(bench, one))
        )
        out[name] = {"ms": round(1000 * found["s"], 1), "mib": round(memory)}
    ratio = out["checkpointed"]["ms"] / out["plain"]["ms"]
    out["time_ratio"] = round(ratio, 3)
    out["memory_ratio"] = round(out["checkpointed"]["mib"] / max(out["plain"]["mib"], 1), 3)
    return out


def profile(bench: Bench, *keys: str) -> dict[str, Any]:
    """Where a step's time on the device goes, by kernel, and what the host waits for."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    one = trainer(bench, *keys)
    batch: Batch = one.batches.batch(0, BatchSlice()).to(bench.device)
    for _ in range(2 if bench.tiny else 6):
        one.step([batch])
    one.state.settle()
    synchronise(bench.device)
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(2):
            one.step([batch])
        one.state.settle()
        synchronise(bench.device)
    events, cpu = recorded.key_averages(), torch.autograd.DeviceType.CPU
    busy = sum(e.self_device_time_total for e in events if e.device_type != cpu) / 2000
    table = events.table(
        sort_by="self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total",
        row_limit=22, max_name_column_width=50,
    )  # fmt: skip
    print(table, flush=True)
    calls = {
        event.key: event.count // 2
        for event in events
        if "Synchronize" in event.key
        or event.key in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "aten::item")
    }
    top = sorted(events, key=lambda e: -e.self_device_time_total)[:12]
    return {
        "device_busy_ms_a_step": round(busy, 1),
        "calls_a_step": calls,
        "device_ms_a_step": {
            e.key[:60]: round(e.self_device_time_total / 2000, 2)
            for e in top
            if e.self_device_time_total
        },
    }


def measure(bench: Bench, wanted: Sequence[str], out: Path) -> dict[str, dict[str, Any]]:
    """Runs the rows that OUT lacks."""
    pairs = bench.pairs
    whole, pair, every = (
        (arm(name, True, pairs) if not bench.tiny else arm(name, False, pairs))
        for name in ("whole", "contrastive", "contrastive, all images")
    )
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "contrastive, all images": lambda: training_row(bench, *every),
        "whole": lambda: training_row(bench, *whole),
        "contrastive, not compiled": lambda: training_row(bench, *arm("contrastive", False, pairs)),
        "vs_transformers": lambda: vs_transformers(bench, False),
        "vs_open_clip": lambda: vs_open_clip(bench, False),
        "large_batch 1": lambda: large_batch(bench, 1),
        "large_batch 4": lambda: large_batch(bench, 4),
        "checkpointing": lambda: checkpointing(bench),
        "inference": lambda: inference(bench),
        "large_batch 16": lambda: large_batch(bench, 16),
        "whole, not compiled": lambda: training_row(bench, *arm("whole", False, pairs)),
        "large_batch 64": lambda: large_batch(bench, 64),
        "contrastive": lambda: training_row(bench, *pair),
        "vs_transformers, compiled": lambda: vs_transformers(bench, not bench.tiny),
        "profile, whole": lambda: profile(bench, *whole),
        "profile, contrastive": lambda: profile(bench, *pair),
        "profile, not compiled": lambda: profile(bench, *arm("contrastive", False, pairs)),
    }
    found: dict[str, dict[str, Any]] = {}
    if out.exists():
        lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        here = device_name(bench.device)
        found = {line["row"]: line for line in lines if line["device"] == here}
    for name, run in rows.items():
        if name in found or (wanted and name not in wanted):
            continue
        began = time.perf_counter()
        with memory_freed():
            line = {"row": name, "device": device_name(bench.device), "pairs": pairs, **run()}
        line["took_s"] = round(time.perf_counter() - began, 1)
        found[name] = line
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return found


def device_name(device: torch.device) -> str:
    """Of the card, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main() -> None:
    """Prepares, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="a .jsonl that grows by a line a row"
    )
    parser.add_argument("--row", action="append", default=[], help="only these rows")
    parser.add_argument("--pairs", type=int, default=256, help="of a step")
    parser.add_argument("--steps", type=int, default=20, help="measured")
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU")
    args = parser.parse_args()

    is_gpu = torch.cuda.is_available() and not args.tiny
    if not is_gpu and not args.tiny:
        raise SystemExit("no GPU is here; --tiny tries the script on a CPU")
    device = torch.device("cuda" if is_gpu else "cpu")
    pairs = 8 if args.tiny else args.pairs
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = sized(args.tiny, pairs)
        dataset = made_rows(Path(folder), config, 4 * pairs, "openi")
        reports = [sample.report for sample in dataset.samples if sample.report]
        tokenizer = train_tokenizer(reports * 2, vocab_size=150 if args.tiny else VOCAB_SIZE)
        tflops = matmul_tflops(device, 256 if args.tiny else 8192)
        print(f"prepared in {time.perf_counter() - began:.0f} s, {tflops:.0f} TFLOP/s", flush=True)
        bench = Bench(
            device, args.tiny, pairs, 2 if args.tiny else args.steps, dataset, tokenizer, tflops
        )
        found = measure(bench, args.row, args.out)
    print(f"\n{device_name(device)}, torch {torch.__version__}, bf16 matmul {tflops:.0f} TFLOP/s")
    for name, line in found.items():
        shown = {k: v for k, v in line.items() if k not in ("row", "device", "device_ms_a_step")}
        print(f"{name:28} {json.dumps(shown)}")
    summary = {"device": device_name(device), "tflops": round(tflops, 1), "rows": len(found)}
    if {"whole", "contrastive, all images"} <= found.keys():
        a, b = found["whole"], found["contrastive, all images"]
        summary["step_cost_time"] = round(a["ms"] / b["ms"], 3)
        summary["step_cost_memory"] = round(a["mib"] / max(b["mib"], 1), 3)
    print(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(main())
