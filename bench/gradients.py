"""How hard each term of the objective pulls on each encoder, and whether terms pull the same way.

    python bench/gradients.py runs/whole --data made/data [--batches 32] [--mask-stage pixels]

On batches of the first steps at new weights, and of the last steps at those of the run. A term's
pull is the gradient of its mean over a batch, before its weight, on the parameters of an encoder:

norm     its length, mean over batches
cosine   with the contrastive term's, mean over batches

The encoder learns little of a term whose pull is short beside the others', whatever the term's own
decoder learns. The last line is one JSON object.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from jaxtyping import Float
from torch import Tensor, nn

from compare import markdown
from mmclip.batch import BatchSlice
from mmclip.checkpoint import load_checkpoint
from mmclip.config import Config, MaskStage
from mmclip.data.batches import TrainingBatches
from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.streams import training_dataset
from mmclip.models.encoders import patch_grid
from mmclip.models.mmclip import MMCLIP
from mmclip.training.objective import Objective
from mmclip.training.pretrain import build_model

ENCODERS = {"image encoder": "vision_model", "text encoder": "text_model"}


class Pull(NamedTuple):
    """Of one term on one encoder; see the module."""

    norm: float
    cosine: float


def pulls(gradients: Mapping[str, Float[Tensor, "batches n"]]) -> dict[str, Pull]:
    """The pull of each term.

    Args:
        gradients: By term, "contrastive" among them; a row a batch.
    """
    base = gradients["contrastive"]
    return {
        term: Pull(float(of.norm(dim=1).mean()), float(F.cosine_similarity(of, base, dim=1).mean()))
        for term, of in gradients.items()
    }


def measure(
    model: MMCLIP, batches: TrainingBatches, config: Config, first_step: int, n_batches: int
) -> dict[str, dict[str, Pull]]:
    """The pull of each term that the configuration trains, by encoder."""
    objective = Objective(config, patch_grid(model.vision_model))
    model.train()
    found: dict[str, dict[str, list[Tensor]]] = {name: defaultdict(list) for name in ENCODERS}
    for i in range(n_batches):
        batch = batches.batch(first_step + i, BatchSlice())
        counts = objective.counts(batch)
        for term, total in objective.sums(model, batch).items():
            for name, part in ENCODERS.items():
                gradient = flat_gradient(total / max(counts[term], 1), getattr(model, part))
                found[name][term].append(gradient)
    return {
        name: pulls({term: torch.stack(rows) for term, rows in by_term.items()})
        for name, by_term in found.items()
    }


def flat_gradient(loss: Tensor, module: nn.Module) -> Float[Tensor, " n"]:
    """The gradient of a loss on all parameters of a module, in a row; 0 where it has none."""
    weights = list(module.parameters())
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    parts = (
        torch.zeros_like(weight) if gradient is None else gradient
        for gradient, weight in zip(found, weights, strict=True)
    )
    return torch.cat([part.flatten() for part in parts])


def main() -> None:
    """Loads, measures, prints."""
    parser = argparse.ArgumentParser(description="How hard does each term pull on each encoder?")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder")
    parser.add_argument(
        "--data", type=Path, required=True, help="the data folder that it trained on"
    )
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument(
        "--mask-stage",
        choices=get_args(MaskStage),
        help="in place of the run's own image_mask.mask_stage",
    )
    args = parser.parse_args()

    checkpoint = load_checkpoint(args.checkpoint)
    config, step = checkpoint.config, int(checkpoint.meta["step"])
    if args.mask_stage is not None:
        masked = config.image_mask.model_copy(update={"mask_stage": args.mask_stage})
        config = config.model_copy(update={"image_mask": masked})
    dataset = training_dataset(open_dataset([args.data], config.data.image_size), config)
    grid = patch_grid(checkpoint.model.vision_model)
    batches = TrainingBatches(dataset, checkpoint.tokenizer, config, grid)
    last = max(config.train.steps - args.batches, 0)
    set_seed(config.train.seed)
    new = build_model(config, checkpoint.tokenizer)
    numbers: dict[str, dict] = {}
    for name, model, first_step in (("new", new, 0), ("trained", checkpoint.model, last)):
        found = measure(model, batches, config, first_step, args.batches)
        lines = [
            [encoder, term, *(f"{value:.3f}" for value in pull)]
            for encoder, by_term in found.items()
            for term, pull in by_term.items()
        ]
        said = f"step {step:,}" if model is checkpoint.model else "new weights"
        print(f"\n{said}\n\n{markdown(['encoder', 'term', *Pull._fields], lines)}")
        numbers[name] = {
            encoder: {term: pull._asdict() for term, pull in by_term.items()}
            for encoder, by_term in found.items()
        }
    metadata = {
        "config_hash": checkpoint.meta["config_hash"],
        "data_hash": dataset.data_hash,
        "step": step,
        "mask": config.image_mask.mask_stage,
        "batches": args.batches,
    }
    print(json.dumps({**metadata, **numbers}))


if __name__ == "__main__":
    main()
