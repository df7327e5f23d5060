"""Memory and time of a contrastive batch as gradient caching makes it larger, and of checkpointing.

    python bench/large_batch.py --out bench/results/large_batch.jsonl

Each row is `pretrain` itself, on a CPU, in a process of its own (or two), over the same folder of
pairs for as many images: a ViT and a BERT, images of noise, reports of common sentences. A row's
memory is the most that its process held, above what it held as training was called; of two
processes, that of the larger. `memory` and `time` are ratios to the plain batch of one micro-batch;
time is CPU seconds, as others may use the machine, without those of a start (the row of one small
step). bench/gpu.py has the rows of a GPU. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmclip.config import load_config
from mmclip.training.pretrain import PretrainRequest, pretrain
from side_by_side import print_line
from step_cost import made_rows

BASE = (
    "loss.image=0", "loss.text=0", "unpaired.rows_per_pair=0", "model.image.kind=vit",
    "model.image.width=128", "model.image.depth=6", "model.image.heads=4",
    "model.image.patch_size=8", "model.text.width=128", "model.text.depth=4", "model.text.heads=4",
    "train.save_every_steps=100000",
)  # fmt: skip
START = "start"


class Row(NamedTuple):
    """What is measured at once."""

    name: str
    pairs: int
    steps: int
    keys: tuple[str, ...] = ()
    processes: int = 1


def rows_of(pairs: int, micro: int) -> list[Row]:
    """A start, the plain batch, checkpointing, and caching up to a number of pairs."""
    caching = (f"train.micro_batch_size={micro}", "train.gradient_cache=true")
    towers = ("model.image.gradient_checkpointing=true", "model.text.gradient_checkpointing=true")
    sizes = [n for n in (micro * 4**power for power in range(1, 10)) if n <= pairs]
    return [
        Row(START, 2, 1),
        Row("plain", micro, pairs // micro),
        Row("checkpointing", micro, pairs // micro, towers),
        *(Row(f"caching, {n}", n, pairs // n, caching) for n in sizes),
        Row(f"caching, {sizes[0]}, two processes", sizes[0], pairs // sizes[0], caching, 2),
    ]


def held_mib() -> float:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def train(data: Path, run: Path, keys: Sequence[str]) -> None:
    """One row, in a process of its own; leaves what it took beside the run."""
    config = load_config("tiny", [*BASE, *keys])
    before = held_mib()
    pretrain(PretrainRequest((data,), run, config, "bench", cpu=True))
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "mib": round(used.ru_maxrss / 1024 - before),
        "mib_before": round(before),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
    }
    rank = os.environ.get("RANK", "0")
    Path(f"{run}-{rank}.json").write_text(json.dumps(found), "utf-8")


def measured(row: Row, folder: Path) -> dict[str, float]:
    """Memory and CPU seconds for an image of one row."""
    run = folder / row.name.replace(" ", "_").replace(",", "")
    keys = [f"train.batch_size={row.pairs}", f"train.steps={row.steps}", *row.keys]
    start = [sys.executable]
    if row.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc-per-node={row.processes}"]
    command = [*start, __file__, "--child", str(folder / "data"), str(run), *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row.name} failed:\n{done.stderr}")
    each = [json.loads(Path(f"{run}-{n}.json").read_text("utf-8")) for n in range(row.processes)]
    return {
        **max(each, key=lambda one: one["mib"]),
        "cpu_s": round(sum(one["cpu_s"] for one in each), 1),
    }


def main() -> None:
    """Builds, trains each row, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=4096, help="of the largest batch")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="a .jsonl that gets the last line, too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        data, run, *keys = args.child
        train(Path(data), Path(run), keys)
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_rows(folder, load_config("tiny", BASE), args.pairs, "openi", has_unpaired=False)
        for row in rows_of(args.pairs, args.micro_batch):
            found[row.name] = measured(row, folder)
            if row.name != START:
                plain, start = found["plain"], found[START]["cpu_s"]
                training = found[row.name]["cpu_s"] - row.processes * start
                theirs = plain["cpu_s"] - start
                found[row.name] |= {
                    "memory": round(found[row.name]["mib"] / plain["mib"], 3),
                    "time": round(training / theirs, 3),
                }
            print(row.name, json.dumps(found[row.name]), flush=True)
    print_line({"bench": "large_batch", "micro_batch": args.micro_batch, "rows": found}, args.out)


if __name__ == "__main__":
    main()
