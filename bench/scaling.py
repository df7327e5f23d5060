"""Time and memory of build, pre-training and zero-shot scoring as a data set grows 4 and 16 times.

    python bench/scaling.py --images 25000 --out bench/results/scaling.jsonl

Images are noise of 32 px, distinct, 58 of 100 with a report of the lengths of Open-I; one in ten is
of split test. Each stage runs in a process of its own: `build_data`, `pretrain` for one step, so
that its time is that of starting, and `evaluate` of the test images by prompts. A stage is linear
where seconds per image do not grow. CPU seconds stand beside wall seconds, as others may use the
machine. The last line is one JSON object.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, PER_FOLDER, REPORTS_IN_100, TEST_IN_10 = 32, 1000, 58, 1
STAGES = ("build", "pretrain", "zeroshot")


def path_of(i: int) -> str:
    """Of an image, below the root."""
    return f"{i // PER_FOLDER}/{i}.png"


def draw(root: Path, start: int, end: int) -> None:
    """Writes images from `start` to `end`."""
    for i in range(start, end):
        path = root / path_of(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
        Image.fromarray(pixels).save(path, compress_level=0)


def stage(name: str, folder: Path, n: int) -> None:
    """Runs one stage over the first n images; in a process of its own."""
    data, run = folder / f"data-{n}", folder / f"run-{n}"
    if name == "build":
        from mmclip.data.ingest.build import build_data

        build_data(samples(n), folder / "raw", data, image_size=SIDE)
    elif name == "pretrain":
        from mmclip.config import load_config
        from mmclip.training.pretrain import PretrainRequest, pretrain

        keys = ["train.steps=1", f"data.image_size={SIDE}", "model.text.vocab_size=2000"]
        keys += ["model.text.vocab_min_patients=1"]  # few images have rare words alone
        pretrain(PretrainRequest((data,), run, load_config("tiny", keys), "bench", cpu=True))
    else:
        from mmclip.evaluation.zeroshot import ZeroshotRequest, evaluate
        from mmclip.model_loading import ModelRequest

        out, model = folder / f"out-{n}", ModelRequest(str(run))
        evaluate(ZeroshotRequest(model, (data,), out, "bench", n_resamples=200))


def samples(n: int) -> Iterator["Sample"]:  # noqa: F821 (imported in the stage's process alone)
    """A record for each of the first n images."""
    from mmclip.data.sample import Sample
    from step_cost import report_lengths, write_report

    rng = np.random.default_rng(0)
    lengths = report_lengths("openi", n, 128, rng)
    for i in range(n):
        is_test = i % 10 < TEST_IN_10
        yield Sample(
            image_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i}", source="made",
            split="test" if is_test else "train", image=path_of(i), view="PA",
            report=write_report(int(lengths[i]), rng) if i % 100 < REPORTS_IN_100 else None,
            labels={name: int(rng.random() < 0.3) for name in ("edema", "nodule", "pneumothorax")},
        )  # fmt: skip


def run_stage(name: str, folder: Path, n: int) -> dict[str, float]:
    """Wall and CPU seconds of a stage, and the most memory of its process."""
    command = [
        sys.executable,
        __file__,
        "--stage",
        name,
        "--folder",
        str(folder),
        "--first",
        str(n),
    ]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    said = child.stderr.read().decode()
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{shlex.join(command)} failed:\n{said}")
    return {
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "mb": round(used.ru_maxrss / 1024),
    }


def main() -> None:
    """Draws, runs the stages at each size, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=25000, help="of the largest size")
    parser.add_argument("--out", type=Path, help="a .jsonl that gets the last line, too")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        stage(args.stage, args.folder, args.first)
        return
    # Not above: what a stage's process imports is part of what is measured.
    from side_by_side import print_line

    sizes = [args.images // 16, args.images // 4, args.images]
    found: dict[str, object] = {"bench": "scaling", "images": sizes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "raw", 0, args.images)
        for each in STAGES:
            rows = [run_stage(each, folder, n) for n in sizes]
            growth = (rows[2]["cpu_s"] - rows[1]["cpu_s"]) / max(
                rows[1]["cpu_s"] - rows[0]["cpu_s"], 0.1
            )
            found[each] = {
                **{key: [row[key] for row in rows] for key in rows[0]},
                # Of 16 - 4 and 4 - 1 parts: 4 is linear, whatever starting costs.
                "growth": round(growth, 2),
            }
            print(each, json.dumps(found[each]), flush=True)
    print_line(found, args.out)


if __name__ == "__main__":
    main()
