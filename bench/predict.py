"""Speed and memory of `mmclip predict` against a bare loop of the same work in one process.

The bare loop decodes and resizes by the same functions, fills batches of the same size, encodes
them by the same model, and writes the same columns; it has no search, no table that survives an
interruption, no progress bar and no reasons. Both run in processes of their own, one after the
other, `--repeats` times in turn, with as many threads. Prints one line of JSON last.

    python bench/predict.py --model runs/demo/run --images images/
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FINDINGS = ("pleural effusion", "pneumothorax")


def bare(model: Path, images: Path, out: Path) -> dict[str, float]:
    """Scores all files of a folder in a loop; seconds of the loop, without start and loading."""
    import numpy as np
    import torch

    from mmclip.data.image_text_dataset import normalise
    from mmclip.data.images import decode_image, resize_image
    from mmclip.embed import embed_prompts
    from mmclip.prompts import load_prompts
    from mmclip.run import open_run

    run = open_run(model)
    data, net, scoring, size = run.config.data, run.model, run.scoring, run.batch_size
    pair = embed_prompts(run, load_prompts("default"), FINDINGS)
    files = sorted(path for path in images.iterdir() if path.is_file())
    began, began_cpu = time.perf_counter(), time.process_time()
    with out.open("w", newline="") as file, torch.inference_mode():
        writer = csv.writer(file)
        for start in range(0, len(files), size):
            some = files[start : start + size]
            squares = [
                resize_image(decode_image(path.read_bytes()), data.image_size, data.resize)
                for path in some
            ]
            image = normalise(torch.from_numpy(np.stack(squares)))
            scores = scoring.scores(net.encode_image(image).embedding, pair)
            writer.writerows([str(path), *row] for path, row in zip(some, scores, strict=True))
    return {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - began_cpu,
        "n_images": len(files),
    }


def ours(model: Path, images: Path, out: Path, workers: int) -> dict[str, float]:
    """`mmclip predict`, timed from the search for files to the finished table."""
    import mmclip.prediction.predict as stage
    from mmclip.model_loading import ModelRequest
    from mmclip.prediction.predict import PredictRequest

    began = began_cpu = 0.0
    find = stage.find_image_files

    def timed(paths):
        nonlocal began, began_cpu
        began, began_cpu = time.perf_counter(), time.process_time()
        return find(paths)

    stage.find_image_files = timed
    request = PredictRequest(
        model=ModelRequest(str(model)),
        inputs=(images,),
        out=out,
        findings=FINDINGS,
        workers=workers,
    )
    done = stage.predict(request)
    return {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - began_cpu,
        "n_images": done.n_images,
    }


def measured(args: argparse.Namespace, side: str, images: Path) -> dict[str, float]:
    """One side in a process of its own, with the most memory that it held, MB."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "p.csv"
        given = [sys.executable, __file__, "--model", str(args.model), "--images", str(images)]
        given += ["--side", side, "--out", str(out), "--workers", str(args.workers)]
        said = subprocess.run(given, check=True, capture_output=True, text=True).stdout
        return json.loads(said.splitlines()[-1])


def main() -> None:
    """Runs both sides in turn, then ours on a part of the files, for the memory."""
    parser = argparse.ArgumentParser(description="Speed and memory of mmclip predict.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--side", choices=("ours", "bare"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.side:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if args.side == "bare":
            found = bare(args.model, args.images, args.out)
        else:
            found = ours(args.model, args.images, args.out, args.workers)
        found["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return
    speeds: dict[str, list[float]] = {"ours": [], "bare": []}
    cpu: dict[str, list[float]] = {"ours": [], "bare": []}
    rss: dict[str, float] = {}
    n = 0
    for _ in range(args.repeats):
        for side, reached in speeds.items():
            found = measured(args, side, args.images)
            n = int(found["n_images"])
            reached.append(found["n_images"] / found["wall_s"])
            cpu[side].append(found["cpu_s"])
            rss[side] = found["rss_mb"]
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(args.images.iterdir())[: n // 10]:
            (Path(folder) / path.name).symlink_to(path.resolve())
        rss["ours, a tenth"] = measured(args, "ours", Path(folder))["rss_mb"]
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["bare"], strict=True)]
    print(
        json.dumps(
            {
                "n_images": n,
                "images_per_s": {k: [round(v, 1) for v in each] for k, each in speeds.items()},
                "ratio": round(statistics.median(ratios), 3),
                "cpu_s": {k: [round(v, 2) for v in each] for k, each in cpu.items()},
                "ratio_by_cpu_time": round(min(cpu["bare"]) / min(cpu["ours"]), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "rss_mb": {k: round(v) for k, v in rss.items()},
                "workers": args.workers,
                "load": [round(v, 1) for v in os.getloadavg()],
                "cores": len(os.sched_getaffinity(0)),
            }
        )
    )


if __name__ == "__main__":
    main()
