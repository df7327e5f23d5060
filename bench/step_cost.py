"""What a step of the whole method costs against a contrastive step on the same encoders.

    python bench/step_cost.py --config ablation --batch-size 32 --steps 10
    python bench/step_cost.py --config paper --device cuda --tokens 256 --lengths full

The arms take turns in one process, so that a drift of the machine cancels in the ratios. Each arm
runs the training loop's own `train_step` on the batches of `TrainingBatches`: images of noise,
reports of common sentences cut to the wanted number of tokens. The arms are

    contrastive              the pairs of a step, and that term alone
    contrastive, all images   the same with as many pairs as the whole method reads images
    + EntMLM, + AttMIM       the masked terms, one after the other
    whole                    + unpaired images with prompts, which come on top of the pairs

`time_ratio` and `memory_ratio` are whole : contrastive with all images, that is for one image;
`*_same_pairs` are whole : contrastive, where the whole method also reads more images; and
`*_masked_terms` are + AttMIM : contrastive, the same pairs and nothing else. Of a pretrained text
encoder only the size matters; it starts from random weights, so that nothing is downloaded.

Memory is the peak of a step: weights, state of the optimiser, and all that the step allocates. On a
GPU it is what torch's allocator counts with one arm alive; on a CPU the running sum of the events
that torch's profiler records of its allocator. Neither sees the scratch space inside a library. The
last line is one JSON object.
"""

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from mmclip.batch import BatchSlice, TextBatch
from mmclip.config import Config, TextEncoderConfig, load_config
from mmclip.data.batches import RawBatch, TrainingBatches
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.ingest.build import build_data
from mmclip.data.sample import Sample
from mmclip.data.streams import training_dataset
from mmclip.data.text import train_tokenizer
from mmclip.models.build import build_mmclip
from mmclip.models.encoders import build_image_encoder, build_text_encoder, patch_grid
from mmclip.models.mmclip import MMCLIP
from mmclip.training.objective import Objective
from mmclip.training.optimizer import make_optimizer
from mmclip.training.state import TrainState
from mmclip.training.step import train_step

OPENI_MEDIAN, OPENI_SIGMA = 42, 0.456
"""Tokens of a report of Open-I, as a log-normal: 5 % have fewer than 20, 5 % more than 89.
Source: 3,826 reports, with a vocabulary of 3,317 that was trained on them."""

VOCAB_SIZE, PRETRAINED_VOCAB_SIZE = 3317, 28996
"""Source: as above; BioClinicalBERT."""

PRETRAINED_TEXT = TextEncoderConfig(width=768, depth=12, heads=12, vocab_size=PRETRAINED_VOCAB_SIZE)

SENTENCES = (
    "The heart is normal in size.", "The lungs are clear.", "No pleural effusion is seen.",
    "There is no pneumothorax.", "Mild cardiomegaly is unchanged.",
    "The mediastinal contours are within normal limits.", "There is a small left pleural effusion.",
    "Degenerative changes are present in the thoracic spine.", "The osseous structures are intact.",
    "A calcified granuloma is seen in the right upper lobe.", "No focal consolidation.",
    "There are low lung volumes with bibasilar atelectasis.", "Pulmonary vascularity is normal.",
    "No acute cardiopulmonary abnormality.", "A right central venous catheter ends in the atrium.",
    "Streaky opacity in the left lower lobe may represent atelectasis or scarring.",
    "The aorta is tortuous and calcified.", "There is a nodule in the left lung.",
)  # fmt: skip

ARMS = ("contrastive", "contrastive, all images", "+ EntMLM", "+ AttMIM", "whole")


class Arm(NamedTuple):
    """All that one arm trains with."""

    config: Config
    model: MMCLIP
    state: TrainState
    batches: TrainingBatches
    objective: Objective


def configs_of(name: str, overrides: Sequence[str]) -> dict[str, Config]:
    """The configuration of each arm. Patches are chosen as at the end of training.

    A weight or ratio that the configuration leaves at 0 is 1 in the arms that have it.
    """
    guided = ["image_mask.anneal_from=0", "image_mask.anneal_to=0"]
    base = load_config(name, [*guided, *overrides])
    text, image = base.loss.text or 1.0, base.loss.image or 1.0
    per_pair, pairs = base.unpaired.rows_per_pair or 1.0, base.train.batch_size

    def arm(*keys: str) -> Config:
        off = ["loss.image=0", "loss.text=0", "unpaired.rows_per_pair=0"]
        config = load_config(name, [*guided, *overrides, *off, *keys])
        if config.model.text.pretrained is None:
            return config
        sizes = config.model.model_copy(update={"text": PRETRAINED_TEXT})
        return config.model_copy(update={"model": sizes})

    words, patches = f"loss.text={text}", f"loss.image={image}"
    return dict(
        zip(
            ARMS,
            (
                arm(),
                arm(f"train.batch_size={pairs + round(per_pair * pairs)}"),
                arm(words),
                arm(words, patches),
                arm(words, patches, f"unpaired.rows_per_pair={per_pair}"),
            ),
            strict=True,
        )
    )


def report_lengths(kind: str, n: int, max_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of n reports, [CLS] and [SEP] included, at most `max_tokens` and at least 8.

    Args:
        kind: "openi", "full" (all as long as can be), or a number of tokens.
        n: Reports.
        max_tokens: Longer ones are cut.
        rng: Draws the lengths of Open-I.
    """
    if kind == "openi":
        lengths = np.exp(rng.normal(math.log(OPENI_MEDIAN), OPENI_SIGMA, n)).round()
    else:
        lengths = np.full(n, max_tokens if kind == "full" else int(kind))
    return np.clip(lengths, 8, max_tokens).astype(np.int64)


def write_report(n_tokens: int, rng: np.random.Generator) -> str:
    """Sentences in random order, cut to the number of tokens; a word or a stop is a token."""
    words: list[str] = []
    while len(words) < n_tokens - 2:
        words += rng.choice(SENTENCES).replace(".", " .").split()
    return " ".join(words[: n_tokens - 2]).replace(" .", ".")


def made_rows(
    folder: Path, config: Config, n: int, lengths: str, has_unpaired: bool = True
) -> ImageTextDataset:
    """n pairs of noise and as many unpaired images, or none, built as any data set is."""
    rng = np.random.default_rng(0)
    px = config.data.image_size
    tokens = report_lengths(lengths, n, config.data.max_tokens, rng)
    findings = ("cardiomegaly", "edema", "nodule", "pleural effusion", "pneumothorax")
    samples = []
    for i in range(2 * n if has_unpaired else n):
        Image.fromarray(rng.integers(0, 256, (px, px), dtype=np.uint8)).save(folder / f"{i}.png")
        report = write_report(int(tokens[i]), rng) if i < n else None
        sample = Sample(
            image_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i}", source="made", split="train",
            image=f"{i}.png", view="PA", report=report,
            labels={name: int(rng.random() < 0.3) for name in findings},
        )  # fmt: skip
        samples.append(sample)
    build_data(samples, folder, folder / "data", image_size=px)
    return open_dataset([folder / "data"], px)


def build_arm(
    config: Config,
    dataset: ImageTextDataset,
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    accelerator: Accelerator,
) -> Arm:
    """A new model with its optimiser and batches."""
    torch.manual_seed(0)
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    image = build_image_encoder(config.model.image, config.data.image_size)
    text = build_text_encoder(config.model.text, vocab_size, config.data.max_tokens, pad)
    model = build_mmclip(config, image, text).train()
    optimizer = make_optimizer(model, model.no_decay_names(), config.train)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    objective = Objective(config, patch_grid(model.vision_model))
    batches = TrainingBatches(
        training_dataset(dataset, config), tokenizer, config, objective.grid
    )  # fmt: skip
    return Arm(config, model, TrainState(wrapped, optimizer), batches, objective)


def run_step(accelerator: Accelerator, arm: Arm, micro: list[RawBatch] | None = None) -> float:
    """One step of the training loop; returns its seconds.

    Args:
        accelerator: Of the arm.
        arm: Moves on by a step.
        micro: Its batch; None has it made on the spot.
    """
    synchronise(accelerator.device)
    began = time.perf_counter()
    batch = micro or [arm.batches.read(arm.state.step, _whole_step(arm))]
    train_step(accelerator, arm.state, batch, arm.objective, arm.config.train)
    synchronise(accelerator.device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    """Waits for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(
    accelerator: Accelerator, arms: Mapping[str, Arm], steps: int
) -> dict[str, list[float]]:
    """Seconds of each step of each arm, with the making of its batch."""
    seconds: dict[str, list[float]] = defaultdict(list)
    names = list(arms)
    for turn in range(steps + 2):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            if accelerator.device.type != "cpu":
                # The last arm's blocks of memory do not fit; freeing them takes as long as a
                # step, so one goes by.
                run_step(accelerator, arms[name])
            took = run_step(accelerator, arms[name])
            if turn >= 2:  # the first steps make buffers, plans and the optimiser's state
                seconds[name].append(took)
    return seconds


# -- memory --


def peak_of(changes: Iterable[tuple[int, int]]) -> int:
    """The highest running sum of (time, bytes allocated or, negative, freed), in order of time."""
    total = peak = 0
    for _, n_bytes in sorted(changes, key=lambda change: change[0]):
        total += n_bytes
        peak = max(peak, total)
    return peak


def allocations(work: Callable[[], object]) -> list[tuple[int, int]]:
    """Time in ns and bytes of each allocation and release of torch's CPU allocator in some work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    result = recorded.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    assert result is not None
    events: list[Any] = [e for e in result.events() if e.name() == "[memory]"]
    return [(event.start_ns(), event.nbytes()) for event in events]


def peak_bytes(accelerator: Accelerator, arm: Arm) -> int:
    """The peak of a step with this arm alone, after two steps have made the optimiser's state."""
    for _ in range(2):
        run_step(accelerator, arm)
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
        run_step(accelerator, arm)
        return torch.cuda.max_memory_allocated(accelerator.device)
    states = [v for s in arm.state.optimizer.state.values() for v in s.values()]
    held = [*arm.model.parameters(), *arm.model.buffers(), *filter(torch.is_tensor, states)]
    at_rest = sum(t.numel() * t.element_size() for t in held)
    return at_rest + peak_of(allocations(lambda: run_step(accelerator, arm)))


# -- the parts of a step --


class Stopwatch:
    """Adds up the seconds inside some functions while a step runs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)
        self._undo: list[Callable[[], None]] = []

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Replaces a method of one object by itself with a clock; `release` puts it back."""
        own = vars(owner).get(method)
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronise(self.device)
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                synchronise(self.device)
                self.seconds[part] += time.perf_counter() - began

        setattr(owner, method, timed)
        self._undo.append(
            lambda: delattr(owner, method) if own is None else setattr(owner, method, own)
        )

    def release(self) -> None:
        """Puts all methods back."""
        while self._undo:
            self._undo.pop()()


def parts_of(accelerator: Accelerator, arm: Arm, steps: int) -> dict[str, float]:
    """Mean seconds of each part of a step; the clocks wait for the device, so the sum is no race.

    Reports, masked reports and prompts may go through the text encoder together: its seconds are
    dealt out in the ratio of what each takes alone.
    """
    clock, model = Stopwatch(accelerator.device), arm.model
    clock.watch(model, "encode_image", "image encoder")
    clock.watch(model, "encode_text", "text")
    if model.image_decoder is not None:
        clock.watch(model.image_decoder, "forward", "image decoder")
        clock.watch(model, "_relevance", "score")
    if model.text_decoder is not None:
        clock.watch(model.text_decoder, "decode", "text decoder")
        clock.watch(model.text_decoder, "predict", "text decoder")
    clock.watch(accelerator, "backward", "backward")
    clock.watch(arm.state.optimizer, "step", "optimiser")
    batches = arm.batches
    clock.watch(batches, "read", "data")
    try:
        run_step(accelerator, arm)  # as in `time_steps`
        clock.seconds.clear()
        total = sum(run_step(accelerator, arm) for _ in range(steps))
    finally:
        clock.release()
    seconds = {part: value / steps for part, value in clock.seconds.items()}
    text = seconds.pop("text")
    alone = _alone(accelerator, arm, steps)
    whole = sum(alone.values())
    seconds |= {part: text * value / whole for part, value in alone.items()}
    seconds["rest"] = total / steps - sum(seconds.values())
    return seconds


def _alone(accelerator: Accelerator, arm: Arm, steps: int) -> dict[str, float]:
    """Seconds of the text encoder on the reports, on the masked reports and on the prompts."""
    step, one = arm.state.step, _whole_step(arm)
    batch = arm.batches.batch(step, one).to(accelerator.device)
    has_decoder = arm.model.text_decoder is not None
    reports, prompts = batch.reports, batch.prompts

    def both(texts: TextBatch) -> torch.Tensor:
        return torch.cat([texts.ids, texts.masked_ids]) if has_decoder else texts.ids

    ids = {"text encoder, reports": (reports.ids, reports.is_valid)}
    if has_decoder:
        ids["text encoder, masked reports"] = (reports.masked_ids, reports.is_valid)
    if len(prompts):
        is_valid = prompts.is_valid.repeat(2 if has_decoder else 1, 1)
        ids["text encoder, prompts"] = (both(prompts), is_valid)
    found = {}
    for part, (some, is_valid) in ids.items():
        some, first = np.unique(some.cpu().numpy(), axis=0, return_index=True)
        distinct = torch.from_numpy(some).to(accelerator.device)
        valid = is_valid[torch.from_numpy(first).to(accelerator.device)]
        times = []
        for _ in range(max(steps, 2)):
            synchronise(accelerator.device)
            began = time.perf_counter()
            with accelerator.autocast():
                arm.model.encode_text(distinct, valid)
            synchronise(accelerator.device)
            times.append(time.perf_counter() - began)
        found[part] = statistics.median(times)
    return found


def _whole_step(arm: Arm) -> BatchSlice:
    return BatchSlice(0, arm.config.train.n_micro_batches)


def ratio_of(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio of two arms, round by round."""
    ratios = np.array(a) / np.array(b)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def main() -> None:
    """Builds, measures memory, then time, then parts; prints."""
    parser = argparse.ArgumentParser(description="The cost of a step, arm by arm.")
    parser.add_argument("--config", default="ablation")
    parser.add_argument("--set", action="append", default=[], help="model.image.width=64")
    parser.add_argument("--image-size", type=int, help="side of the images; the configuration's")
    parser.add_argument("--tokens", type=int, help="longer reports are cut; the configuration's")
    parser.add_argument("--lengths", default="openi", help="openi, full, or a number of tokens")
    parser.add_argument("--batch-size", type=int, help="pairs a step; the configuration's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=10, help="measured, of each arm")
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--vocab", type=int, help="of the text encoder")
    args = parser.parse_args()

    short = {
        "data.image_size": args.image_size,
        "data.max_tokens": args.tokens,
        "train.batch_size": args.batch_size,
        "train.precision": args.precision,
    }
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    configs = configs_of(args.config, [*given, *args.set])
    whole, train = configs["whole"], configs["contrastive"].train
    is_pretrained = whole.model.text == PRETRAINED_TEXT
    vocab_size = args.vocab or (PRETRAINED_VOCAB_SIZE if is_pretrained else VOCAB_SIZE)
    if train.precision == "fp16":
        raise SystemExit("fp16 scales the gradients of all arms at once; take bf16 or fp32")
    mixed = {"fp32": "no", "bf16": "bf16"}[train.precision]
    accelerator = Accelerator(mixed_precision=mixed, cpu=args.device == "cpu")
    with tempfile.TemporaryDirectory() as folder:
        n = 2 * configs["contrastive, all images"].train.batch_size
        dataset = made_rows(Path(folder), whole, n, args.lengths)
        reports = [sample.report for sample in dataset.samples if sample.report]
        tokenizer = train_tokenizer([*2 * SENTENCES, *reports], vocab_size=vocab_size)

        def build(name: str) -> Arm:
            return build_arm(configs[name], dataset, tokenizer, vocab_size, accelerator)

        memory = {}
        for name in ARMS:
            memory[name] = peak_bytes(accelerator, build(name)) / 2**20
            accelerator.free_memory()  # it holds every model that it prepared
            gc.collect()
            print(f"{name:24}{memory[name]:10.1f} MiB", flush=True)
        arms = {name: build(name) for name in ARMS}
        seconds = time_steps(accelerator, arms, args.steps)
        named = {"contrastive": ARMS[1], "whole": "whole"}
        parts = {
            key: parts_of(accelerator, arms[name], max(args.steps // 2, 2))
            for key, name in named.items()
        }
        texts = arms["whole"].batches.batch(0, _whole_step(arms["whole"])).reports
        padding = 1 - texts.is_valid.float().mean().item()
        n_tokens = texts.is_valid.sum(1)

    print(f"\n{'':30}{'s a step':>10}{'MiB':>10}")
    for name in ARMS:
        print(f"{name:30}{statistics.median(seconds[name]):10.4f}{memory[name]:10.1f}")
    print(f"\n{'ms of a step':30}{'contrastive, all images':>24}{'whole':>10}")
    for part in dict.fromkeys([*parts["contrastive"], *parts["whole"]]):
        a, b = (1000 * parts[key].get(part, 0.0) for key in named)
        print(f"{part:30}{a:24.1f}{b:10.1f}")
    compared = {
        "": ("whole", "contrastive, all images"),
        "_same_pairs": ("whole", "contrastive"),
        "_masked_terms": ("+ AttMIM", "contrastive"),
    }
    ratios: dict[str, Any] = {}
    for suffix, (a, b) in compared.items():
        ratio = ratio_of(seconds[a], seconds[b])
        ratios[f"time_ratio{suffix}"] = ratio["median"]
        ratios[f"time_ratio{suffix}_quartiles"] = [ratio["low"], ratio["high"]]
        ratios[f"memory_ratio{suffix}"] = round(memory[a] / memory[b], 3)
    results = {
        "config": args.config,
        "set": [*given, *args.set],
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": args.steps,
        "lengths": args.lengths,
        "tokens_median_and_most": [int(n_tokens.median()), int(n_tokens.max())],
        "padding_ratio": round(padding, 3),
        "pairs": train.batch_size,
        "unpaired": round(whole.unpaired.rows_per_pair * train.batch_size),
        "image_size": whole.data.image_size,
        "max_tokens": whole.data.max_tokens,
        "vocab_size": vocab_size,
        "precision": train.precision,
        **ratios,
        "seconds": {name: round(statistics.median(some), 5) for name, some in seconds.items()},
        "memory_mib": {name: round(value, 1) for name, value in memory.items()},
        "parts_ms": {
            key: {part: round(1000 * value, 2) for part, value in found.items()}
            for key, found in parts.items()
        },
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
