"""Our contrastive step against transformers' VisionTextDualEncoderModel of equal size, on a CPU.

    python bench/vs_transformers.py --out bench/results/vs_transformers.jsonl

Two baselines: as users write it (three channels, every text padded to max_length, plain AdamW) and
given our settings (one channel, texts padded to the longest, the same groups of AdamW). All
steps take turns in one process on equal batches, so that whatever else the machine does weighs on
all; a ratio is the median over turns. Ours is `train_step`, with its checks and its learning rate.
`bench/gpu.py` has the same row for a GPU. The last line is one JSON object.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from mmclip.batch import Batch, BatchSlice
from mmclip.config import Config, load_config
from mmclip.data.batches import TrainingBatches
from mmclip.data.streams import training_dataset
from mmclip.data.text import train_tokenizer
from mmclip.models.layout import patch_grid
from mmclip.training.objective import Objective
from mmclip.training.optimizer import make_optimizer
from mmclip.training.pretrain import build_model
from mmclip.training.state import TrainState
from mmclip.training.step import train_step
from side_by_side import print_line, take_turns, transformers_model
from step_cost import made_rows

MAX_TOKENS = 128


def settings(image_size: int, batch_size: int) -> Config:
    """A ViT and a BERT of which a step takes about a second on a core."""
    return load_config(
        "tiny",
        [
            "model.embed_dim=256", "model.image.kind='vit'", "model.image.width=192",
            "model.image.depth=6", "model.image.heads=3", "model.image.patch_size=16",
            "model.image.pooling='pooler'", "model.text.width=192", "model.text.depth=6",
            "model.text.heads=3", "model.text.pooling='pooler'", f"data.image_size={image_size}",
            f"data.max_tokens={MAX_TOKENS}", "data.sentence_drop_prob=0",
            f"train.batch_size={batch_size}",
        ],
    )  # fmt: skip


def their_step(
    model: nn.Module, batch: Batch, channels: int, width: int, groups: list[dict] | None
) -> Callable[[], None]:
    """A step of a plain loop: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=1e-4)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    is_valid = torch.zeros(len(batch), width, dtype=torch.long)
    ids[:, : batch.reports.ids.shape[1]] = batch.reports.ids
    is_valid[:, : batch.reports.ids.shape[1]] = batch.reports.is_valid.long()
    pixels = batch.image.expand(-1, channels, -1, -1).contiguous()

    def step() -> None:
        loss = model(
            pixel_values=pixels, input_ids=ids, attention_mask=is_valid, return_loss=True
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a loop logs it

    return step


def spared(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters with weight decay and without."""
    few = [p for p in model.parameters() if p.ndim < 2]
    many = [p for p in model.parameters() if p.ndim >= 2]
    return [{"params": many, "weight_decay": weight_decay}, {"params": few, "weight_decay": 0.0}]


def measure(image_size: int, batch_size: int, turns: int) -> dict[str, object]:
    """Milliseconds of each side, and ours over theirs."""
    config = settings(image_size, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        dataset = made_rows(Path(folder), config, batch_size, "openi")
        reports = [sample.report for sample in dataset.samples if sample.report]
        tokenizer = train_tokenizer(reports * 2, vocab_size=400)
        torch.manual_seed(0)
        model = build_model(config, tokenizer).train()
        grid = patch_grid(model.vision_model)
        batches = TrainingBatches(training_dataset(dataset, config), tokenizer, config, grid)
        batch = batches.batch(0, BatchSlice())
    accelerator, objective = Accelerator(cpu=True), Objective(config, grid)
    optimizer = make_optimizer(model, model.no_decay_names(), config.train)
    state = TrainState(*accelerator.prepare(model, optimizer))
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: train_step(accelerator, state, [batch], objective, config.train)
    }
    for name, channels, width in (
        ("as users write it", 3, MAX_TOKENS),
        ("given our settings", 1, batch.reports.ids.shape[1]),
    ):
        other = transformers_model(config, channels, len(tokenizer), MAX_TOKENS)
        groups = spared(other, config.train.weight_decay) if channels == 1 else None
        sides[name] = their_step(other, batch, channels, width, groups)
    seconds = take_turns(sides, turns)
    found: dict[str, object] = {
        "ms": {name: round(1000 * statistics.median(some)) for name, some in seconds.items()},
        "tokens": batch.reports.ids.shape[1],
    }
    for name in ("as users write it", "given our settings"):
        pairs = zip(seconds["ours"], seconds[name], strict=True)
        found[f"ratio, {name}"] = round(statistics.median(a / b for a, b in pairs), 3)
    return found


def main() -> None:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--image-size", type=int, action="append", help="128 and 224 by default")
    parser.add_argument("--out", type=Path, help="a .jsonl that gets the last line, too")
    args = parser.parse_args()
    found: dict[str, object] = {
        "bench": "vs_transformers", "device": "cpu", "threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
    }  # fmt: skip
    for image_size in args.image_size or (128, 224):
        found[f"{image_size} px"] = measure(image_size, args.batch_size, args.turns)
    found["torch"] = torch.__version__
    print_line(found, args.out)


if __name__ == "__main__":
    main()
