"""Images a second that one process makes ready for training: our cache against decoding per epoch.

    python bench/data_loading.py --out bench/results/data_loading.jsonl

Both sides augment on the CPU by the same function. The baseline is what most repositories ship:
open the file with Pillow, make it grey, resize it to 224 px, augment. Ours reads the cache that
`mmclip data build` made once. The two take turns in one process, round by round, so that whatever
else the machine does weighs on both; a ratio is the median over rounds. The third figure is the
augmentation alone against itself with torch's `affine_grid`, as it was. The last line is one JSON
object.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmclip.config import GREY_MEAN, GREY_STD, AugmentConfig
from mmclip.data.image_text_dataset import (
    AUGMENT_UNIFORMS,
    affine_of,
    augmented,
    normalise,
    open_dataset,
)
from mmclip.data.ingest.build import build_data
from mmclip.data.sample import Sample
from side_by_side import print_line, take_turns

SIDE, BATCH = 224, 32
KINDS = {"390 x 320 JPEG": (320, 390, "jpg"), "1024 x 1024 PNG": (1024, 1024, "png")}


def draw(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth shapes under fine noise, which compress about as chest X-rays do."""
    coarse = Image.fromarray(rng.normal(128, 40, (12, 12)).astype(np.float32))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels = smooth + rng.normal(0, 3, smooth.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def with_affine_grid(pixels: Tensor, uniforms: Tensor, config: AugmentConfig) -> Tensor:
    """The augmentation as it was before `grid_of`."""
    image, black = normalise(pixels), -GREY_MEAN / GREY_STD
    grid = F.affine_grid(affine_of(uniforms, config), list(image.shape), align_corners=False)
    moved = F.grid_sample(image - black, grid, padding_mode="zeros", align_corners=False) + black
    u = 2 * uniforms - 1
    contrast = (1 + u[:, 4] * config.contrast).view(-1, 1, 1, 1)
    return moved * contrast + (u[:, 5] * config.brightness / GREY_STD).view(-1, 1, 1, 1)


def compared(
    sides: Mapping[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, float], float]:
    """Median seconds of each side, and the median over rounds of the second over the first."""
    seconds = take_turns(sides, rounds)
    ours, theirs = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return {name: statistics.median(some) for name, some in seconds.items()}, ratio


def measure(folder: Path, kind: str, n: int, rounds: int) -> dict[str, object]:
    """One kind of file."""
    height, width, suffix = KINDS[kind]
    rng, samples = np.random.default_rng(0), []
    for i in range(n):
        draw(rng, height, width).save(folder / f"{i}.{suffix}", quality=90)
        samples.append(
            Sample(image_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i}", source="made",
                   split="train", image=f"{i}.{suffix}", view="PA", labels={"mass": i % 2})
        )  # fmt: skip
    build_data(samples, folder, folder / "data", image_size=SIDE)
    dataset, config = open_dataset([folder / "data"], SIDE), AugmentConfig()
    uniforms = torch.rand(BATCH, AUGMENT_UNIFORMS, generator=torch.Generator().manual_seed(0))

    def cached() -> None:
        for start in range(0, n, BATCH):
            augmented(dataset.pixels(np.arange(start, start + BATCH)), uniforms, config)

    def decoded() -> None:
        for start in range(0, n, BATCH):
            images = [
                np.asarray(Image.open(folder / f"{i}.{suffix}").convert("L").resize((SIDE, SIDE)))
                for i in range(start, start + BATCH)
            ]
            augmented(torch.from_numpy(np.stack(images)), uniforms, config)

    seconds, ratio = compared({"cache": cached, "decode per epoch": decoded}, rounds)
    return {
        "images_per_s": {name: round(n / value) for name, value in seconds.items()},
        "ratio": round(ratio, 2),
    }


def main() -> None:
    """Draws, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=128, help="of each kind")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a .jsonl that gets the last line, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n = max(args.images // BATCH, 1) * BATCH
    found: dict[str, object] = {"bench": "data_loading", "threads": 1, "image_size": SIDE}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = measure(Path(folder), kind, n, args.rounds)
    pixels = torch.randint(0, 256, (BATCH, SIDE, SIDE), dtype=torch.uint8)
    uniforms, config = torch.rand(BATCH, AUGMENT_UNIFORMS), AugmentConfig()
    sides = {
        "now": lambda: augmented(pixels, uniforms, config),
        "with affine_grid": lambda: with_affine_grid(pixels, uniforms, config),
    }
    seconds, ratio = compared(sides, 10 * args.rounds)
    found["augmentation"] = {
        "images_per_s": {name: round(BATCH / value) for name, value in seconds.items()},
        "ratio": round(ratio, 2),
    }
    found["torch"] = torch.__version__
    print_line(found, args.out)


if __name__ == "__main__":
    main()
