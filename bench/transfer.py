"""What pre-trained weights are worth where masked modelling pays: few labels, dense tasks, findings
that no prompt named.

    python bench/transfer.py OUT --runs prompts=RUN,RUN,RUN prompts_entmlm=RUN,RUN,RUN
    python bench/transfer.py OUT --runs prompts=RUN --quick

Draws FRESH patients of a preset (labels, reports and lesion masks; none of them was drawn for
pre-training) into OUT/fresh unless they are there, and measures each run on their images of
--split:

zero-shot     AUROC by prompts, and its calibration error
label head    AUROC of the head of `loss.label`, where a run has one
probe P %     AUROC of a linear probe on P % of the fresh labelled patients
full P %      AUROC of full fine-tuning on them
lesion probe  AUROC over patches: a linear probe on the features of single patches says which
              finding's lesion covers a quarter of the patch or more
pointing      share of lesions that the top patch of the phrase's map hits
retrieval     share of images that find a report as good as theirs among the first ten

Findings that a run's `unpaired.withheld` names are reported apart from the others. Beside the arms
stand random weights of the first arm's architecture under the same seeds; their full fine-tuning
on 100 % is the supervised ceiling. What a run gave is kept in OUT/measured, so an interrupted call
is simply repeated. Intervals are over seeds and patients. The seed of a run also chooses its subset
of the patients. The last line is one JSON object.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contrastive import make_data
from mmclip.data.folder import read_meta
from mmclip.data.synthetic import FINDINGS, PRESETS
from mmclip.evaluation.intervals import interval_over_seeds, share_over_seeds
from mmclip.explanation.saliency import random_weights
from mmclip.run import open_run
from transfer_tasks import (
    QUICK,
    RANDOM,
    SUPERVISED,
    Bench,
    Found,
    Measured,
    Size,
    Weights,
    fresh_preset,
    measure,
)


def kept(path: Path, make: Callable[[], Found]) -> Found:
    """What a run gave, from a file where it is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = make()
        columns = {name: np.append(m.drawn, m.value) for name, m in found.items()}
        aside = path.with_suffix(".tmp.npz")
        np.savez_compressed(aside, **columns)  # pyright: ignore[reportArgumentType]
        aside.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        return {name: Measured(float(stored[name][-1]), stored[name][:-1]) for name in stored.files}


# -- arms side by side --

Arms = dict[str, dict[int, Found]]
"""What each run gave, by arm and seed."""


def compared(arms: Arms, base: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By arm and task: the mean over seeds, and what it is above the base, paired by seed.

    `resolves` is half the width of the difference's interval: a smaller effect is not seen.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, by_seed in arms.items():
        names = list(dict.fromkeys(name for found in by_seed.values() for name in found))
        for name in names:
            here = {seed: found[name] for seed, found in by_seed.items() if name in found}
            values = np.array([m.value for m in here.values()])
            cell: dict[str, Any] = {
                "mean": round(float(values.mean()), 5),
                "by_seed": {seed: round(m.value, 5) for seed, m in here.items()},
                "ci": share_over_seeds(values, np.stack([m.drawn for m in here.values()])),
            }
            shared = [s for s in here if arm != base and name in arms.get(base, {}).get(s, {})]
            if shared:
                theirs = arms[base]
                gains = np.array([here[s].value - theirs[s][name].value for s in shared])
                drawn = np.stack([here[s].drawn - theirs[s][name].drawn for s in shared])
                ci = interval_over_seeds(gains, drawn)
                resolves = None if ci is None else round((ci[1] - ci[0]) / 2, 5)
                cell |= {"less_base": round(float(gains.mean()), 5), "less_base_ci": ci}
                cell["resolves"] = resolves
            out.setdefault(arm, {})[name] = cell
    return out


def print_table(found: dict[str, dict[str, dict[str, Any]]], base: str) -> None:
    """Markdown: a row a task, a column an arm."""
    names = list(dict.fromkeys(name for cells in found.values() for name in cells))
    print(f"| {'task':28} | " + " | ".join(found) + " |")
    print("|---" * (1 + len(found)) + "|")
    for name in names:
        cells = []
        for arm in found:
            cell = found[arm].get(name)
            if cell is None:
                cells.append("")
                continue
            text = f"{cell['mean']:.3f}"
            if cell.get("less_base_ci"):
                low, high = cell["less_base_ci"]
                text += f" ({100 * cell['less_base']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}])"
            cells.append(text)
        print(f"| {name:28} | " + " | ".join(cells) + " |")
    print(f"In brackets: points above {base}, with a 95 % interval over seeds and patients.")


def arm_argument(text: str) -> tuple[str, list[Path]]:
    """NAME=RUN,RUN, for argparse."""
    name, _, runs = text.partition("=")
    if not name or not runs:
        raise argparse.ArgumentTypeError(f"{text!r} is no arm; write it as NAME=RUN,RUN")
    return name, [Path(run) for run in runs.split(",")]


def models(arms: Sequence[tuple[str, list[Path]]]) -> Iterator[Weights]:
    """The weights of each run; then random weights, by the first arm's seeds."""
    for name, paths in arms:
        for path in paths:
            run = open_run(path)
            yield Weights(name, run, f"{run.config_hash}-{run.step}")
    for path in arms[0][1]:
        run = open_run(path)
        drawn = random_weights(run, run.config.train.seed)
        yield Weights(RANDOM, drawn, f"random-{run.config_hash}")


def main() -> None:
    """Draws what is missing, measures, compares, prints."""
    parser = argparse.ArgumentParser(description="Pre-trained weights on fresh labelled patients.")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--runs", nargs="+", required=True, type=arm_argument, metavar="ARM=RUN,RUN"
    )  # fmt: skip
    parser.add_argument("--base", help="compare with this arm; the first if it is not given")
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--preset", choices=list(PRESETS), default="hard")
    parser.add_argument("--no-full", action="store_true", help="leave full fine-tuning out")
    parser.add_argument("--quick", action="store_true", help="few patients, to test the script")
    args = parser.parse_args()
    size = QUICK if args.quick else Size()
    make_data(fresh_preset(PRESETS[args.preset], size), args.out / "fresh")
    every = list(models(args.runs))
    withheld = {f for weights in every for f in weights.run.config.unpaired.withheld}
    groups = {"all": FINDINGS}
    if withheld:
        groups = {
            "named": tuple(f for f in FINDINGS if f not in withheld),
            "withheld": tuple(f for f in FINDINGS if f in withheld),
        }
    bench = Bench(args.out, args.split, size, groups)
    meta = read_meta(bench.data)
    arms: Arms = {}
    for weights in every:
        said = [
            weights.name, meta["data_hash"], args.split, repr(size), repr(groups), not args.no_full
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]
        make = lambda weights=weights: measure(bench, weights, not args.no_full)  # noqa: E731
        found = kept(args.out / "measured" / f"{name}.npz", make)
        print(f"{weights.arm} seed {weights.seed}: {len(found)} numbers", flush=True)
        arms.setdefault(weights.arm, {})[weights.seed] = found
    ceiling = {
        seed: {
            name.replace("full", "probe"): measured
            for name, measured in found.items()
            if name.startswith("full 100%")
        }
        for seed, found in arms[RANDOM].items()
    }
    if all(ceiling.values()):
        arms[SUPERVISED] = ceiling
    base = args.base or args.runs[0][0]
    table = compared(arms, base)
    print_table(table, base)
    metadata = {
        "split": args.split, "base": base, "preset": args.preset, "data_hash": meta["data_hash"],
        "groups": groups, "quick": args.quick,
        "runs": {arm: [str(run) for run in runs] for arm, runs in args.runs},
    }  # fmt: skip
    print(json.dumps({**metadata, "arms": table}))


if __name__ == "__main__":
    main()
