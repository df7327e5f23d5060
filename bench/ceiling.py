"""What the images of a preset show: the score of a model that is told the labels of many of them.

    python bench/ceiling.py --preset hard --images 60000

A benchmark of pre-training means little if the lesions cannot be seen at its resolution. So a
small ConvNet is trained with a binary cross-entropy on the labels of images of the same preset
under another seed, each drawn as it is needed and seen once, and scored on the preset's own
validation images. It is a ConvNet because a ViT learns small things slowly; `--model vit` takes the
image encoder of a configuration instead. All labels of synthetic images are known, so none is left
out of the loss. `--set` changes a knob of the preset, to try one. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmclip.config import load_config
from mmclip.data.image_text_dataset import normalise
from mmclip.data.sample import Split
from mmclip.data.synthetic import FINDINGS, PRESETS, Preset, SyntheticSample, make_patient
from mmclip.evaluation.baselines import logistic_scores, shrunk
from mmclip.evaluation.metrics import auroc
from mmclip.models.encoders import build_image_encoder, pooled

SEED_OFFSET = 1_000_003
"""Added to the preset's seed: no image of these is one of the benchmark's."""


class SmallConvNet(nn.Module):
    """Seven 3 x 3 convolutions, then the mean and the maximum over places.

    A finding is anywhere, so places are pooled last; a learned map tells the places apart. The
    maximum lets a small lesion speak for the image.
    """

    def __init__(self, image_size: int, n_findings: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            )

        widths = (24, 48, 96, 128)
        self.stem = conv(1, widths[0], 1)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(conv(a, b, 2) for a, b in pairs)
        self.more = nn.ModuleList(conv(b, b, 1) for _, b in pairs)
        self.places = nn.Parameter(torch.zeros(widths[-1], image_size // 8, image_size // 8))
        self.head = nn.Linear(2 * widths[-1], n_findings)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [b, k] of images [b, 1, h, w] in model space."""
        x = self.stem(image)
        for down, more in zip(self.down, self.more, strict=True):
            x = down(x)
            x = x + more(x)
        x = x + self.places
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


class VisionTransformer(nn.Module):
    """The image encoder of a configuration with a linear head."""

    def __init__(self, config_name: str, image_size: int, n_findings: int) -> None:
        super().__init__()
        config = load_config(config_name).model.image
        self.encoder = build_image_encoder(config, image_size)
        self.head = nn.Linear(config.width, n_findings)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [b, k] of images [b, 1, h, w] in model space."""
        return self.head(pooled(self.encoder(pixel_values=image), self.encoder))


def with_knobs(preset: Preset, knobs: list[str]) -> Preset:
    """The preset with some knobs changed, such as "lesion_scale=1.2"; values are read as JSON."""
    for knob in knobs:
        name, _, value = knob.partition("=")
        read = json.loads(value)
        preset = replace(preset, **{name: tuple(read) if isinstance(read, list) else read})
    return preset


def labels_of(samples: list[SyntheticSample]) -> np.ndarray:
    """1.0 where an image shows a finding, else 0.0: [n, k]."""
    return np.array([[float(name in sample.labels) for name in FINDINGS] for sample in samples])


def pixels_of(samples: list[SyntheticSample]) -> Tensor:
    """The images, uint8 [n, h, w]."""
    return torch.from_numpy(np.stack([sample.image for sample in samples]))


def batches(preset: Preset, n_images: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in model space and labels of ever new training patients, `size` at a time."""
    endless = replace(preset, seed=preset.seed + SEED_OFFSET, n_train=n_images, n_unpaired=0)
    for start in range(0, n_images - size + 1, size):
        samples = [make_patient(endless, "train", i) for i in range(start, start + size)]
        yield normalise(pixels_of(samples)), torch.from_numpy(labels_of(samples)).float()


def train(
    model: nn.Module, preset: Preset, n_images: int, batch_size: int, lr: float, bf16: bool
) -> None:
    """One pass over new images with AdamW, the rate rising over a tenth and falling to 0."""
    steps = n_images // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for step, (image, labels) in enumerate(batches(preset, n_images, batch_size), 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(image.contiguous(memory_format=torch.channels_last))
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}, loss {loss.item():.4f}", flush=True)


@torch.inference_mode()
def scores_of(model: nn.Module, images: Tensor) -> np.ndarray:
    """Logits [n, k] of uint8 images."""
    model.eval()
    return torch.cat([model(normalise(part)) for part in images.split(256)]).double().numpy()


def per_finding(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """AUROC of each finding that has both classes."""
    found = {name: auroc(labels[:, k], scores[:, k]) for k, name in enumerate(FINDINGS)}
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def thumbnail_auroc(preset: Preset, val: Tensor, labels: np.ndarray) -> dict[str, float]:
    """AUROC of a logistic regression on 8 x 8 thumbnails of the preset's own training pairs.

    Half of the validation images choose the regularisation, the other half are scored.
    """
    samples = [make_patient(preset, "train", i) for i in range(preset.n_train)]
    half = len(val) // 2
    scores = logistic_scores(
        shrunk(pixels_of(samples)),
        labels_of(samples),
        shrunk(val[:half]),
        labels[:half],
        shrunk(val),
    )
    return per_finding(labels[half:], scores[half:])


def main() -> None:
    """Trains, scores, prints."""
    parser = argparse.ArgumentParser(description="The supervised ceiling of a preset.")
    parser.add_argument("--preset", choices=list(PRESETS), default="hard")
    parser.add_argument("--set", action="append", default=[], help="a knob, lesion_scale=1.2")
    parser.add_argument(
        "--images", type=int, default=60_000, help="training images, each seen once"
    )
    parser.add_argument("--model", choices=["conv", "vit"], default="conv")
    parser.add_argument("--config", default="ablation", help="whose image encoder, for vit")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--fp32", action="store_true")
    args = parser.parse_args()

    preset = with_knobs(PRESETS[args.preset], args.set)
    split: Split = args.split
    n_scored = preset.n_val if split == "val" else preset.n_test
    samples = [make_patient(preset, split, i) for i in range(n_scored)]
    pixels, labels = pixels_of(samples), labels_of(samples)
    areas = {name: [f.masks[name].mean() for f in samples if name in f.masks] for name in FINDINGS}
    thumbs = thumbnail_auroc(preset, pixels, labels)

    torch.manual_seed(args.seed)
    if args.model == "conv":
        model = SmallConvNet(preset.image_size, len(FINDINGS))
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    else:
        model = VisionTransformer(args.config, preset.image_size, len(FINDINGS))
    began, cpu_began = time.monotonic(), time.process_time()
    train(model, preset, args.images, args.batch_size, args.lr, not args.fp32)
    wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
    found = per_finding(labels, scores_of(model, pixels))

    print(f"\n{'':20}ceiling thumbnails  positives  median area in %")
    for k, name in enumerate(FINDINGS):
        print(
            f"{name:20}{found[name]:7.3f}{thumbs[name]:11.3f}{int(labels[:, k].sum()):11}"
            f"{100 * float(np.median(areas[name])):14.2f}"
        )
    results = {
        "preset": preset.name,
        "version": preset.version,
        "knobs": args.set,
        "split": split,
        "n_scored": n_scored,
        "model": args.model,
        "images": args.images,
        "seed": args.seed,
        "macro_auroc": round(float(np.mean(list(found.values()))), 4),
        "worst": min(found.items(), key=lambda item: item[1]),
        "thumbnails_macro_auroc": round(float(np.mean(list(thumbs.values()))), 4),
        "auroc": found,
        "wall_s": round(wall_s, 1),
        "cpu_s": round(cpu_s, 1),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
