"""Kills commands at random moments and runs them again: does the result stay that of no kill?

    python bench/kill.py --minutes 10 [--seed 0] [--processes 2]

Five stages: build, split, pretrain, zeroshot, finetune. Each command is killed by SIGKILL at a
random moment of the time that it takes, run again until it ends (pretrain with --resume), and what
it leaves is compared with what an undisturbed run left: records and pixels, weights, scores. With
--processes 2, pretrain runs by torchrun, and one of its processes is killed.
The last line is one JSON object: kills survived and tried, by stage.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from mmclip.checkpoint import find_checkpoint
from mmclip.data.folder import read_meta
from mmclip.data.synthetic import Preset, write_dataset

PRESET = Preset(name="kill", version=1, seed=3, image_size=32, n_train=60, n_val=20, n_test=40)

TINY = (
    "model.embed_dim=16", "data.image_size=32", "model.image.width=32", "model.image.depth=1",
    "model.image.heads=2", "model.text.width=32", "model.text.depth=1", "model.text.heads=2",
    "train.steps=12", "train.batch_size=8", "train.save_every_steps=2",
)  # fmt: skip


def commands(folder: Path, place: Path, n_processes: int) -> dict[str, list[str]]:
    """The words of each stage's command, whose inputs lie in `folder` and outputs in `place`."""
    one = [sys.executable, "-m", "mmclip"]
    many = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_processes)]
    several = one if n_processes == 1 else [*many, "-m", "mmclip"]
    raw, data, run = folder / "raw", folder / "data", folder / "run"
    sets = [word for value in TINY for word in ("--set", value)]
    few = ["--n-resamples", "20", "--finding", "nodule"]
    given = {
        "build": [*one, "data", "build", "csv", "--root", raw, "--mapping", raw / "mapping.toml",
                  "--image-size", "32", "--workers", "1", "--out", place / "data"],
        "split": [*one, "data", "split", place / "data", "--name", "clean"],
        "pretrain": [*several, "pretrain", "--data", data, "--cpu", *sets, "--resume",
                     "--out", place / "run"],
        "zeroshot": [*one, "zeroshot", "--model", run, "--data", data, "--cpu", *few,
                     "--out", place / "test"],
        "finetune": [*one, "finetune", "--model", run, "--data", data, "--cpu", *few, "--method",
                     "probe", "--fraction", "1", "--seed", "0", "--out", place / "ft"],
    }  # fmt: skip
    return {stage: [str(word) for word in words] for stage, words in given.items()}


def left(stage: str, place: Path) -> object:
    """What a stage leaves, as a value that can be compared."""
    if stage == "build":
        return read_meta(place / "data")["data_hash"], (place / "data/images.npy").read_bytes()
    if stage == "split":
        return read_meta(place / "data")["data_hash"]
    if stage == "pretrain":
        weights = load_file(find_checkpoint(place / "run") / "model.safetensors")
        return {name: value.tobytes() for name, value in weights.items()}
    scores = place / ("test/scores.npz" if stage == "zeroshot" else "ft/probe-100-0/scores.npz")
    with np.load(scores) as stored:
        return {name: stored[name].tobytes() for name in stored.files}


def run(words: list[str], kill_after_s: float | None, rng: random.Random, log: Path) -> int:
    """Runs a command, which speaks to `log`; kills it, or one of its processes, after some time."""
    with log.open("wb") as said:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
    try:
        return process.wait(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        pass
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(pid) for pid in listed.read_text().split()] if listed.exists() else []
    if "torch.distributed.run" in words and children:
        os.kill(rng.choice(children), signal.SIGKILL)  # the launcher ends the others
        process.wait()
    else:
        os.killpg(process.pid, signal.SIGKILL)  # with its workers
        process.wait()
    return -9


def last_line(log: Path) -> str:
    """The last line that a command said."""
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "nothing was said"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    survived: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        log = folder / "said"
        write_dataset(PRESET, folder / "raw")
        whole, took = {}, {}
        for stage, words in commands(folder, folder, args.processes).items():
            began = time.monotonic()
            if code := run(words, None, rng, log):
                raise SystemExit(f"{stage} ends with {code} undisturbed: {last_line(log)}")
            took[stage], whole[stage] = time.monotonic() - began, left(stage, folder)
        # A split is of its folder: those that follow read the folder with it.
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            for stage in took:
                place = folder / "place"
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                if stage == "split":
                    shutil.copytree(folder / "data", place / "data")
                    (place / "data/split.json").unlink()
                words = commands(folder, place, args.processes)[stage]
                n_kills, code = 0, -9
                while code and n_kills < 20:
                    kill = n_kills < rng.choice((1, 1, 2))
                    after_s = rng.uniform(0, took[stage]) if kill else None
                    code = run(words, after_s, rng, log)
                    n_kills += code == -9
                    if code == 1 and "already holds" in last_line(log):
                        code = 0  # it was killed when all was written, and says so
                    if code not in (0, -9):
                        print(f"{stage}: ends with {code}: {last_line(log)}", flush=True)
                        break
                tried[stage] += n_kills
                if code == 0 and left(stage, place) == whole[stage]:
                    survived[stage] += n_kills
                else:
                    print(f"{stage}: differs after {n_kills} kills", flush=True)
                if time.monotonic() > end:
                    break
    by_stage = {stage: f"{survived[stage]}/{tried[stage]}" for stage in took}
    print(json.dumps({"survived": survived.total(), "tried": tried.total(), "by_stage": by_stage,
                      "seed": args.seed, "processes": args.processes}))  # fmt: skip


if __name__ == "__main__":
    main()
