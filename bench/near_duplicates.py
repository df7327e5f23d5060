"""How many planted near-duplicates the check finds among many images, how fast, and what else.

    python bench/near_duplicates.py --images 100000
    python bench/near_duplicates.py --cache data/images/images.npy

Synthetic images of 32 px: two dark lungs under smooth noise of their own, of which 1 % come again
as another file would show them: smaller and back, paler or darker, and with noise of compression.
Prints minutes, recall, pairs whose hashes are close, and pairs found that are no planted ones.
`--cache` takes the images of a data folder instead, plants copies of 1 % of them, and counts all
other near pairs as false (some may be true). The last line is one JSON object.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from mmclip.data.leakage.duplicates import are_alike, hash_in_blocks, near_pairs

PX = 32
PLANTED_RATIO = 0.01


def synthetic_images(n: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [n, 32, 32]: lungs of varied place and size, and noise of 12 x 12 values, blurred."""
    y, x = np.mgrid[-1 : 1 : PX * 1j, -1 : 1 : PX * 1j].astype(np.float32)
    place = rng.normal(0.45, 0.04, (n, 2, 1, 1)).astype(np.float32)
    width = rng.normal(0.3, 0.03, (n, 2, 1, 1)).astype(np.float32)
    image = np.full((n, PX, PX), 140, np.float32)
    for side, sign in enumerate((-1, 1)):
        across = ((x - sign * place[:, side]) / width[:, side]) ** 2
        image -= 80 * np.exp(-across - (y / 0.6) ** 2)
    at = np.linspace(0, 11, PX)
    weight = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(12)[None])).astype(np.float32)
    noise = rng.normal(0, 22, (n, 12, 12)).astype(np.float32)
    return np.clip(image + weight @ noise @ weight.T, 0, 255).astype(np.uint8)


def passed_on(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The images as another file would show them: halved and back, another contrast, noise."""
    n, px, _ = images.shape
    small = images.reshape(n, px // 2, 2, px // 2, 2).mean((2, 4))
    back = 0.5 * images + 0.5 * small.repeat(2, 1).repeat(2, 2)
    contrast = rng.uniform(0.7, 1.2, (n, 1, 1))
    noise = rng.normal(0, 2, images.shape)
    return np.clip(
        contrast * (back - 128) + 128 + rng.uniform(-10, 10, (n, 1, 1)) + noise, 0, 255
    ).astype(np.uint8)


def measure(images: np.ndarray, rng: np.random.Generator) -> dict[str, object]:
    """Plants copies, hashes all, and compares what is found with what was planted."""
    n = len(images)
    chosen = rng.choice(n, max(1, round(PLANTED_RATIO * n)), replace=False)
    began, cpu = time.monotonic(), time.process_time()
    copies = passed_on(images[chosen], rng)
    hashes = np.concatenate([hash_in_blocks(images), hash_in_blocks(copies)])
    hashed = time.process_time()
    # Equal hashes count as pairs of the first of them, as in `near_groups`.
    different, at, which = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    close = near_pairs(different)

    def image_of(number: int) -> np.ndarray:
        k = int(at[number])
        return np.asarray(images[k]) if k < n else copies[k - n]

    pairs = close[are_alike(different, close, image_of)]
    near = {tuple(pair) for pair in pairs.tolist()}
    which = which.ravel()
    planted = {tuple(sorted((which[image], which[n + i]))) for i, image in enumerate(chosen)}
    found = {pair for pair in planted if pair[0] == pair[1] or pair in near}
    n_equal = len(hashes) - len(different) - sum(a == b for a, b in planted)
    return {
        "images": n, "px": images.shape[1], "planted": len(chosen),
        "minutes": round((time.monotonic() - began) / 60, 3),
        "hash_cpu_s": round(hashed - cpu, 2),
        "search_cpu_s": round(time.process_time() - hashed, 2),
        "close_pairs": len(close),
        "recall": len(found) / len(planted),
        "false_pairs": len(near - planted) + int(n_equal),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip


def main() -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000, help="synthetic images")
    parser.add_argument("--cache", type=Path, help="images.npy of a data folder, in their place")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    if args.cache is not None:
        images = np.load(args.cache, mmap_mode="r")
    else:
        blocks = range(0, args.images, 5000)
        images = np.concatenate(
            [synthetic_images(min(5000, args.images - at), rng) for at in blocks]
        )
    found = measure(images, rng)
    for what, value in found.items():
        print(f"{what:14} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
