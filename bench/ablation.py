"""The arms of the method over seeds, on the synthetic images of a preset, scored zero-shot.

    python bench/ablation.py OUT --arms contrastive whole --seeds 0 1 2
    python bench/ablation.py OUT --arms contrastive whole --seeds 0 1 2 --table

Draws the preset into OUT/raw and builds OUT/data unless they are there, trains each arm of
configs/arms/ under each seed, and scores it on the images of --split, as they are and under a
domain shift. A finished run appends one line to --jsonl and leaves the scores of its images in
OUT/scores; a run that the file already holds, with equal configuration and data, is skipped, so an
interrupted call is simply repeated. (The project's own lines are in bench/results/ablation.jsonl.)
ARM+shuffled_pairs is an arm with `--shuffle-pairs`; ARM,train.steps=11160
is one with a setting of its own, which goes before those of --set. --table prints what has
finished as Markdown.

Validation images are for choosing. `--split test` is refused until every run that is named has
finished on them; it scores the weights that are there and trains nothing twice. Two calls may share
OUT and --jsonl when their seeds differ and the data is built. The last line is one JSON object.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ceiling import with_knobs
from compare import Runs, Scores, table
from contrastive import make_data
from mmclip.checkpoint import Checkpoint, code_version
from mmclip.config import Config, LossConfig, config_names, load_config
from mmclip.config_io import config_hash
from mmclip.data.cache import ImageCache
from mmclip.data.folder import read_meta
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.sample import Split
from mmclip.data.sampling import image_key
from mmclip.data.synthetic import FINDINGS, PRESETS
from mmclip.evaluation.compute_metrics import metrics_by_finding
from mmclip.evaluation.results import Evaluation
from mmclip.evaluation.scores import Predictions
from mmclip.evaluation.selection import Selection, select_samples
from mmclip.evaluation.zeroshot import score_images
from mmclip.files import write_text_atomic
from mmclip.prompts import load_prompts
from mmclip.run import open_run
from mmclip.training.pretrain import PretrainRequest, pretrain

SHUFFLED = "+shuffled_pairs"
"""Behind the name of an arm: with `--shuffle-pairs`."""

KNOWN_ARMS = tuple(
    name.removeprefix("arms/") for name in config_names() if name.startswith("arms/")
)

SHIFT_SEED = 64
"""Of the domain shift; part of what the shifted images are."""


class Key(NamedTuple):
    """What makes two runs the same one."""

    arm: str
    seed: int
    split: str
    config_hash: str
    data_hash: str


def shift_domain(
    images: UInt8[np.ndarray, "n h w"], image_ids: Sequence[str]
) -> UInt8[np.ndarray, "n h w"]:
    """Images as another device might have taken them: resolution, exposure, noise.

    Each image goes down to 0.6 to 0.85 of its side and up again, through a gamma of 1/1.6 to 1.6
    and a contrast of 0.7 to 1.3 about mid-grey, and gets noise of 3 % of the grey range. The draws
    are keyed by image id, so the shifted images are the same for all arms and in any order.

    Source: [chosen: about twice the spread of exposure of the synthetic images, outside of the
        augmentation's ranges; a nodule of 4 px stays 2.5 px at least].
    """
    out = np.empty_like(images)
    for i, (pixels, image_id) in enumerate(zip(images, image_ids, strict=True)):
        rng = np.random.default_rng([SHIFT_SEED, image_key(image_id)])
        u = rng.random(3)
        height, width = pixels.shape
        side_ratio = 0.6 + 0.25 * u[0]
        small = (round(width * side_ratio), round(height * side_ratio))
        image = Image.fromarray(pixels).resize(small, Image.Resampling.BILINEAR)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        x = (np.asarray(image) / 255) ** (1.6 ** (2 * u[1] - 1))
        x = (x - 0.5) * (0.7 + 0.6 * u[2]) + 0.5 + 0.03 * rng.standard_normal(pixels.shape)
        out[i] = np.clip(x * 255, 0, 255).round().astype(np.uint8)
    return out


def shifted_dataset(dataset: ImageTextDataset, split: Split) -> ImageTextDataset:
    """The images of a split that are scored, under the domain shift, in memory."""
    kept = select_samples(dataset, split)
    numbers = np.arange(len(kept))
    images = shift_domain(
        kept.pixels(numbers).numpy(), [sample.image_id for sample in kept.samples]
    )
    where = np.stack([np.zeros_like(numbers), numbers], 1)
    return replace(kept, caches=(ImageCache(images),), where=where)


def config_of(arm: str, seed: int, overrides: Sequence[str]) -> Config:
    """The configuration of an arm, with settings of its own or not, under a seed."""
    name, *own = arm.split(",")
    name = name.removesuffix(SHUFFLED)
    return load_config(f"arms/{name}", [*overrides, *own, f"train.seed={seed}"])


def arm_argument(text: str) -> str:
    """Checks the name of an arm, for argparse; its settings are checked where they are read."""
    name = text.split(",")[0].removesuffix(SHUFFLED)
    if name not in KNOWN_ARMS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(KNOWN_ARMS)}")
    return text


def read_lines(path: Path) -> dict[Key, dict]:
    """The finished runs that a file holds; of a run that is there twice, the last line.

    Raises:
        ValueError: When a line is no JSON object with the fields of a key.
    """
    done: dict[Key, dict] = {}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            done[Key(*(line[field] for field in Key._fields))] = line
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no line of a finished run ({error!r}); a call that was "
                f"killed may have left half of one: remove it"
            ) from None
    return done


def unfinished(wanted: Mapping[Key, Config], done: Iterable[Key]) -> dict[Key, Config]:
    """The runs that no line holds, in their order."""
    done = set(done)
    return {key: config for key, config in wanted.items() if key not in done}


def check_test_may_be_scored(wanted: Iterable[Key], done: Iterable[Key]) -> None:
    """Test images are scored once all is chosen: every run must have finished on validation images.

    Raises:
        ValueError: When one has not; it names those that are missing.
    """
    done = set(done)
    missing = [key for key in wanted if key._replace(split="val") not in done]
    if missing:
        named = ", ".join(f"{key.arm} seed {key.seed}" for key in missing)
        raise ValueError(
            f"split test is scored when all runs named have finished on val with the same "
            f"configuration and data, and these have not: {named}; run them with --split val first"
        )


def train(
    arm: str, config: Config, data: Path, run: Path, also: Sequence[Path] = ()
) -> dict[str, float]:
    """Trains unless it is done, keeps the newest weights alone, and returns what it cost.

    Args:
        arm: Its name, with `+shuffled_pairs` for the control.
        config: Of the arm.
        data: Data folder, beside which raw/ holds synthetic images' lesions.
        run: Folder of the run.
        also: Further data folders to train on.
    """
    cost = run / "cost.json"
    if not cost.is_file():
        shutil.rmtree(run, ignore_errors=True)  # cut off: its seconds would not be the whole cost
        began, cpu_began = time.monotonic(), time.process_time()
        request = PretrainRequest(
            (data, *also),
            run,
            config,
            "bench/ablation.py",
            shuffle_pairs=arm.endswith(SHUFFLED),
            lesions=data.parent / "raw" if config.image_mask.policy == "oracle" else None,
        )
        newest = pretrain(request)
        spent = {
            "wall_s": round(time.monotonic() - began, 1),
            "cpu_s": round(time.process_time() - cpu_began, 1),
        }
        for folder in newest.parent.iterdir():  # dozens of runs of some 10 MB a checkpoint
            if folder != newest:
                shutil.rmtree(folder)
        (newest / "trainer.pt").unlink()
        write_text_atomic(cost, json.dumps(spent) + "\n")
    return json.loads(cost.read_text("utf-8"))


def losses_at_end(run: Path) -> dict[str, float]:
    """The loss and its terms, each the mean of the last five lines of the log."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    terms = lines[-1].keys() & {"loss", *LossConfig.model_fields}
    return {t: round(float(np.mean([line[t] for line in lines[-5:]])), 4) for t in sorted(terms)}


def evaluated(test: Predictions) -> Evaluation:
    """What scores are worth, without intervals."""
    return metrics_by_finding(
        test.labels, test.scores, test.patients(), test.names(), n_resamples=1
    )


def figures(checkpoint: Checkpoint, n_images: int, plain: Evaluation, shifted: Evaluation) -> dict:
    """What a line says of a checkpoint and its scores."""
    made_with = dict(checkpoint.meta["versions"])
    config = checkpoint.config
    n_pairs = config.train.batch_size
    rows_per_step = n_pairs + round(config.unpaired.rows_per_pair * n_pairs)

    def per_finding(result: Evaluation) -> dict[str, float]:
        return {row.finding: round(row.auroc, 5) for row in result.findings}

    return {
        "commit": made_with.pop("commit"),
        "scored_at_commit": code_version()["commit"],
        "versions": made_with,
        "macro_auroc": plain.macro_auroc,
        "macro_findings": plain.macro_findings,
        "auroc": per_finding(plain),
        "shift_macro_auroc": shifted.macro_auroc,
        "shift_auroc": per_finding(shifted),
        "n_images": n_images,
        "steps": checkpoint.meta["step"],
        "images_seen": checkpoint.meta["step"] * rows_per_step,
    }


def run_name(key: Key) -> str:
    """A name that no other configuration or data set gives."""
    return f"{key.arm}-{key.seed}-{key.config_hash[:12]}-{key.data_hash[:12]}"


def scores_path(out: Path, key: Key) -> Path:
    """Where the scores of a run lie."""
    return out / "scores" / f"{run_name(key)}-{key.split}.npz"


def load_scores(path: Path, key: Key) -> Scores:
    """Reads the scores of a run, as they are and under the domain shift.

    Raises:
        ValueError: When the file is not there, or holds the scores of another run.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the JSONL has this run from another OUT; name a file of your own "
            f"by --jsonl and run it, or give that OUT"
        )
    with np.load(path, allow_pickle=False) as stored:
        for name in ("config_hash", "data_hash"):
            if str(stored[name]) != getattr(key, name):
                raise ValueError(
                    f"{path} holds scores of another {name.removesuffix('_hash')} "
                    f"({str(stored[name])[:12]}, not {getattr(key, name)[:12]}); take the line of "
                    f"this run out of the JSONL and run it again"
                )
        return Scores(*(stored[name] for name in Scores._fields))


def run_all(
    configs: Mapping[Key, Config],
    out: Path,
    split: Split,
    jsonl: Path,
    facts: Mapping[Key, Mapping[str, object]],
) -> None:
    """Trains and scores runs, and appends a line for each as it finishes.

    Args:
        configs: The runs, all of one data set and split.
        out: Holds data/; gets runs/ and scores/.
        split: The images that are scored.
        jsonl: Gets the lines.
        facts: Further entries of the line of each.
    """
    if not configs:
        return
    prompts = load_prompts("default")
    dataset = open_dataset([out / "data"], next(iter(configs.values())).data.image_size)
    both = dataset, shifted_dataset(dataset, split)
    jsonl.parent.mkdir(parents=True, exist_ok=True)
    for key, config in configs.items():
        run = out / "runs" / run_name(key)
        cost = train(key.arm, config, out / "data", run)
        trained = open_run(run)
        plain, shifted = (
            score_images(trained, selected, prompts, Selection(split, findings=FINDINGS)).test
            for selected in both
        )
        plain.save(
            scores_path(out, key),
            shifted=shifted.scores,
            config_hash=np.array(key.config_hash),
            data_hash=np.array(key.data_hash),
        )
        prompt_set = f"{prompts.id} version {prompts.version}"
        line = {
            **key._asdict(),
            **figures(trained.checkpoint, len(plain), evaluated(plain), evaluated(shifted)),
            "loss_end": losses_at_end(run), **cost, "prompt_set": prompt_set, **facts[key],
        }  # fmt: skip
        with jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def print_table(
    keys: Mapping[str, Sequence[Key]], done: Mapping[Key, dict], out: Path, base: str
) -> None:
    """Prints what has finished of each arm, what has not, and the numbers as one JSON object."""
    runs: Runs = {
        arm: {key.seed: (done[key], load_scores(scores_path(out, key), key)) for key in found}
        for arm, some in keys.items()
        if (found := [key for key in some if key in done])
    }
    if not runs:
        raise SystemExit("none of these runs has finished; run without --table first")
    text, numbers = table(runs, base)
    print(text)
    every = [(arm, key) for arm, some in keys.items() for key in some]
    for arm, key in every:
        if key not in done:
            print(f"not finished: {arm} seed {key.seed}")
    some = every[0][1]
    metadata = {"base": base, "split": some.split, "data_hash": some.data_hash}
    print(json.dumps({**metadata, "arms": numbers}))


def main() -> None:
    """Draws, builds, trains and scores what is missing; or prints the table."""
    parser = argparse.ArgumentParser(description="Arms x seeds on synthetic images, zero-shot.")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--arms", nargs="+", default=list(KNOWN_ARMS), type=arm_argument, metavar="ARM[,KEY=V]",
        help=f"of {', '.join(KNOWN_ARMS)}; ARM{SHUFFLED} for the control",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--jsonl", type=Path, help="of finished runs; OUT/ablation.jsonl")
    parser.add_argument("--table", action="store_true", help="print what has finished, run nothing")
    parser.add_argument("--base", default="contrastive", help="of --table: compare with this arm")
    parser.add_argument("--preset", choices=list(PRESETS), default="hard")
    parser.add_argument("--knob", action="append", default=[], help="lesion_scale=1.2")
    parser.add_argument("--set", action="append", default=[], help="train.steps=200, in every arm")
    args = parser.parse_args()

    make_data(with_knobs(PRESETS[args.preset], args.knob), args.out)
    data_hash = read_meta(args.out / "data")["data_hash"]
    jsonl = args.jsonl or args.out / "ablation.jsonl"
    done = read_lines(jsonl)

    def runs_of(arms: Sequence[str]) -> dict[Key, Config]:
        found = {}
        for seed in dict.fromkeys(args.seeds):  # whole seeds first: they compare
            for arm in dict.fromkeys(arms):
                config = config_of(arm, seed, args.set)
                name = arm.split(",")[0]
                found[Key(name, seed, args.split, config_hash(config), data_hash)] = config
        return found

    if args.table:
        keys = {arm: list(runs_of([arm])) for arm in dict.fromkeys([args.base, *args.arms])}
        try:
            print_table(keys, done, args.out, args.base)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        return
    runs = runs_of(args.arms)
    if args.split == "test":
        try:
            check_test_may_be_scored(runs, done)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
    missing = unfinished(runs, done)
    if len(missing) < len(runs):
        n = len(runs) - len(missing)
        print(f"{n} of {len(runs)} runs are in {jsonl} and skipped; --jsonl names another file")
    metadata = {"preset": args.preset, "knobs": args.knob}
    facts = {
        key: {**metadata, "set": [*args.set, *arm.split(",")[1:]]}
        for arm in args.arms
        for key in runs_of([arm])
    }
    run_all(missing, args.out, args.split, jsonl, facts)
    done = read_lines(jsonl)
    found = {f"{key.arm} seed {key.seed}": done[key]["macro_auroc"] for key in runs}
    print(json.dumps({"split": args.split, "ran": len(missing), "macro_auroc": found}))


if __name__ == "__main__":
    main()
