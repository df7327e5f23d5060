"""How fast, in how much memory and how evenly a data folder is built of many images.

    python bench/build_scale.py --images 100000 --image-size 64 --workers 2

Draws distinct images of 192 x 224 px (nine JPEG to one PNG), builds them with `build_data`, and
runs beside it the plain loop that most repositories ship: open with Pillow, convert, resize, save
as a PNG each, in one process, over `--plain-images` of the same images. Prints images a second of
both, their ratio, and the most memory that this process and a worker held. With `--kill 0.5` a
second build is killed, with its workers, when half of its chunks are done, and goes on: prints what
going on took, and fails unless it ends with the bytes of the first. Both find the files in the
page cache, just drawn. A busy machine makes images a second worth little: those a second of CPU
time stand beside them. The last line is one JSON object.
"""

import argparse
import contextlib
import filecmp
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mmclip.data.cache import CHUNK_IMAGES, SHARDS_FOLDER
from mmclip.data.ingest.build import build_data
from mmclip.data.manifest import read_manifest
from mmclip.data.sample import Record, Sample
from mmclip.progress import progress

HEIGHT_PX, WIDTH_PX, N_BASES = 192, 224, 300
PER_FOLDER = 1000  # files, so that no folder is slow to list


def draw_bases(rng: np.random.Generator, n: int = N_BASES) -> np.ndarray:
    """uint8 [n, 192, 224]: two dark lungs of varied place and size under smooth and fine noise."""
    y, x = np.mgrid[-1 : 1 : HEIGHT_PX * 1j, -1 : 1 : WIDTH_PX * 1j]
    samples = np.empty((n, HEIGHT_PX, WIDTH_PX), np.uint8)
    for sample in samples:
        coarse = Image.fromarray(rng.normal(0, 12, (12, 14)).astype(np.float32))
        smooth = np.asarray(coarse.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.BICUBIC))
        pixels = 150 + smooth + rng.normal(0, 3, smooth.shape)
        for side in (-1, 1):
            across = (x - side * rng.normal(0.45, 0.04)) / rng.normal(0.3, 0.03)
            pixels -= 90 * np.exp(-(across**2) - (y / 0.6) ** 2)
        sample[:] = np.clip(pixels, 0, 255)
    return samples


def image_of(i: int) -> str:
    return f"{i // PER_FOLDER:04d}/{i:07d}.{'png' if i % 10 == 9 else 'jpg'}"


def draw_images(root: Path, n: int, seed: int) -> None:
    """Writes image i: a base, shifted and inverted in contrast as no other image of that base
    is."""
    bases = draw_bases(np.random.default_rng(seed))
    with progress("drawing images", n) as advance:
        for i in range(n):
            base, variant = i % N_BASES, i // N_BASES
            shift = variant % HEIGHT_PX, variant // HEIGHT_PX
            path = root / image_of(i)
            if i % PER_FOLDER == 0:
                path.parent.mkdir(parents=True)
            sample = Image.fromarray(np.roll(bases[base], shift, (0, 1)))
            if path.suffix == ".jpg":
                sample.save(path, quality=85)
            else:
                sample.save(path, compress_level=1)
            advance(1)


def records(n: int) -> Iterator[Record]:
    """Two images a patient, without reports: those are for text_scale.py."""
    for i in range(n):
        yield Sample(
            image_id=f"f{i}", study_id=f"s{i // 2}", patient_id=f"p{i // 2}", source="made",
            image=image_of(i), labels={"nodule": i % 2, "pleural effusion": i % 3 - 1},
        )  # fmt: skip


def plain_loop(root: Path, out: Path, n: int, image_size: int) -> None:
    """What a preparation script mostly is."""
    out.mkdir()
    for i in range(n):
        image = Image.open(root / image_of(i)).convert("L")
        image.resize((image_size, image_size), Image.Resampling.BILINEAR).save(out / f"{i}.png")


class Clock:
    """Seconds since it was made, and seconds of CPU of this process and of children that ended."""

    def __init__(self) -> None:
        self._began, self._cpu = time.monotonic(), self._now()

    @staticmethod
    def _now() -> float:
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(u.ru_utime + u.ru_stime for u in used)

    def read(self) -> tuple[float, float]:
        """Wall and CPU seconds so far."""
        return time.monotonic() - self._began, self._now() - self._cpu


def peak_mb(pid: int | str) -> float:
    """The most memory that a process has held so far, from Linux; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


@contextlib.contextmanager
def watch_workers(every_s: float = 0.2) -> Iterator[list[float]]:
    """A list whose one value grows to the most memory of a child process, in MB."""
    peak, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(every_s):
            peak[0] = max(
                peak[0], *(peak_mb(c.pid or 0) for c in multiprocessing.active_children()), 0.0
            )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def build(root: Path, out: Path, args: argparse.Namespace) -> dict:
    return build_data(
        records(args.images), root, out, image_size=args.image_size, workers=args.workers
    )


def _build_alone(root: Path, out: Path, args: argparse.Namespace) -> None:
    os.setsid()  # so that its workers can be killed with it
    build(root, out, args)


def killed_and_resumed(root: Path, whole: Path, args: argparse.Namespace) -> dict[str, object]:
    """What a build costs that goes on where a killed one was.

    Raises:
        RuntimeError: When its bytes are not those of the whole one, or it was over too soon.
    """
    out = whole.with_name("killed")
    parts = out / SHARDS_FOLDER
    wanted = args.kill * math.ceil(args.images / CHUNK_IMAGES)
    first = multiprocessing.get_context("spawn").Process(
        target=_build_alone, args=(root, out, args)
    )
    first.start()
    assert first.pid is not None

    def n_done() -> int:
        return sum(1 for _ in parts.glob("*.json")) if parts.is_dir() else 0

    while n_done() < wanted:
        if not first.is_alive():
            raise RuntimeError(
                f"the build ended before {args.kill:.0%} of its chunks; kill earlier"
            )
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.join()
    n_before, clock = n_done(), Clock()
    build(root, out, args)
    seconds, cpu_s = clock.read()
    for name in ("images.npy", "samples.parquet"):
        if not filecmp.cmp(whole / name, out / name, shallow=False):
            raise RuntimeError(
                f"{name} of the build that went on differs from that of the whole one"
            )
    return {
        "killed_at_chunk": n_before, "resumed_s": round(seconds, 1),
        "resumed_cpu_s": round(cpu_s, 1), "same_bytes": True,
    }  # fmt: skip


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Draws, builds, runs the plain loop and compares."""
    root = folder / "root"
    draw_images(root, args.images, args.seed)
    clock = Clock()
    with watch_workers() as peak_of_workers:
        meta = build(root, folder / "data", args)
    build_s, build_cpu_s = clock.read()
    peak = peak_mb("self")
    n_plain = min(args.images, args.plain_images)
    clock = Clock()
    plain_loop(root, folder / "plain", n_plain, args.image_size)
    plain_s, plain_cpu_s = (seconds / n_plain for seconds in clock.read())
    n_distinct = len({sample.image_sha256 for sample in read_manifest(folder / "data")})
    assert meta["n_samples"] == n_distinct == args.images
    image_s, image_cpu_s = build_s / args.images, build_cpu_s / args.images
    return {
        "images": args.images, "image_size": args.image_size, "workers": args.workers,
        "build_s": round(build_s, 1), "build_cpu_s": round(build_cpu_s, 1),
        "images_per_s": round(1 / image_s), "plain_images_per_s": round(1 / plain_s),
        "ratio": round(plain_s / image_s, 2),
        "images_per_cpu_s": round(1 / image_cpu_s),
        "plain_images_per_cpu_s": round(1 / plain_cpu_s),
        "ratio_of_cpu": round(plain_cpu_s / image_cpu_s, 2),
        "peak_rss_mb": round(peak), "peak_rss_worker_mb": round(peak_of_workers[0]),
        "data_hash": meta["data_hash"][:16],
        **(killed_and_resumed(root, folder / "data", args) if args.kill else {}),
    }  # fmt: skip


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--image-size", type=int, default=64, help="side of the built images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plain-images", type=int, default=5000, help="images of the plain loop")
    parser.add_argument("--kill", type=float, help="share of the chunks at which one is killed")
    parser.add_argument("--folder", type=Path, help="for the images; a temporary one by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="build-scale-", dir=args.folder))
    try:
        found = measure(folder, args)
        for what, value in found.items():
            print(f"{what:25} {value}")
        print(json.dumps(found), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
