"""What contrastive training alone scores on the validation images of a preset.

    python bench/contrastive.py /tmp/hard --preset hard --config ablation --seed 0

Draws the preset into OUT/raw and builds OUT/data unless they are there, pre-trains into a new
folder OUT/run-..., and scores the run's kept checkpoints zero-shot on the validation images. The
test images are not looked at: this is what a preset is chosen with. `--knob` changes the preset
(use another OUT), `--set` the configuration. The last line is one JSON object.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np

from ceiling import with_knobs
from mmclip.config import load_config
from mmclip.config_io import config_hash
from mmclip.data.folder import META_FILE, read_meta
from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.ingest.build import BuildOptions, build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.synthetic import FINDINGS, PRESETS, Preset, holds_preset, write_dataset
from mmclip.evaluation.compute_metrics import metrics_by_finding
from mmclip.evaluation.selection import Selection
from mmclip.evaluation.zeroshot import score_images
from mmclip.prompts import load_prompts
from mmclip.run import open_run
from mmclip.training.pretrain import PretrainRequest, pretrain


def make_data(preset: Preset, out: Path) -> dict[str, float]:
    """Draws and builds unless that is done; returns the seconds that either took.

    Raises:
        SystemExit: When `out` holds other images.
    """
    raw, data = out / "raw", out / "data"
    if (data / META_FILE).is_file():
        if not holds_preset(raw, preset):
            raise SystemExit(f"{out} holds other images than these knobs give; choose another OUT")
        return {}
    began = time.monotonic()
    write_dataset(preset, raw)
    drawn = time.monotonic()
    reader = open_reader("csv", raw, mapping=raw / "mapping.toml", table=None)
    metadata = {"reader": "csv", "preset": f"{preset.name} version {preset.version}"}
    build_data(
        reader, raw, data, image_size=preset.image_size, options=BuildOptions(metadata=metadata)
    )
    return {"draw_s": drawn - began, "build_s": time.monotonic() - drawn}


def main() -> None:
    """Draws, builds, trains, scores, prints."""
    parser = argparse.ArgumentParser(description="Contrastive training alone on a preset.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=list(PRESETS), default="hard")
    parser.add_argument("--knob", action="append", default=[], help="lesion_scale=1.2")
    parser.add_argument("--config", default="ablation")
    parser.add_argument("--set", action="append", default=[], help="train.steps=200")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    preset = with_knobs(PRESETS[args.preset], args.knob)
    times = make_data(preset, args.out)
    config = load_config(args.config, [*args.set, f"train.seed={args.seed}"])
    run = args.out / f"run-{config_hash(config)[:12]}"
    shutil.rmtree(run, ignore_errors=True)
    began, cpu_began = time.monotonic(), time.process_time()
    newest = pretrain(
        PretrainRequest(folders=(args.out / "data",), run=run, config=config, command="bench")
    )
    times |= {
        "train_s": time.monotonic() - began,
        "train_cpu_s": time.process_time() - cpu_began,
    }
    dataset = open_dataset([args.out / "data"], config.data.image_size)
    prompts = load_prompts("default")
    by_step: dict[int, float] = {}
    interval: tuple[float, float] | None = None
    for folder in sorted(newest.parent.glob("step_*")):
        opened = open_run(folder)
        test = score_images(opened, dataset, prompts, Selection("val", findings=FINDINGS)).test
        found = metrics_by_finding(
            test.labels, test.scores, test.patients(), test.names(), n_resamples=200
        )
        interval = found.macro_auroc_ci
        assert found.macro_auroc is not None, "every finding of a preset has many images"
        by_step[opened.step] = round(found.macro_auroc, 4)
        each = {name: round(value, 3) for name, value in found.aurocs().items()}
        print(folder.name, by_step[opened.step], each, flush=True)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    results = {
        "preset": preset.name,
        "knobs": args.knob,
        "config": args.config,
        "set": args.set,
        "seed": args.seed,
        "data_hash": read_meta(args.out / "data")["data_hash"],
        "macro_auroc": by_step[max(by_step)],
        "ci": [round(x, 4) for x in interval or ()],
        "by_step": by_step,
        "loss_end": round(float(np.mean([line["loss"] for line in logged[-5:]])), 3),
        "times": {name: round(value, 1) for name, value in times.items()},
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
