"""Tries an installed mmclip here: help, import, a short training, load, classify, predict.

It imports nothing that the package does not declare, and leaves smoke/ behind.
"""

import csv
import subprocess
import sys
from pathlib import Path

import mmclip
from mmclip.data.synthetic import Preset, write_dataset

FINDINGS = ["pleural effusion", "pneumothorax"]
SMALL = ["train.steps=4", "train.batch_size=8", "train.save_every_steps=4", "data.image_size=32"]


def command(*arguments: str | Path) -> str:
    """Runs a command of the installed package; what it prints."""
    ended = subprocess.run(["mmclip", *map(str, arguments)], capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"mmclip {' '.join(map(str, arguments))}:\n{ended.stderr}")
    return ended.stdout


def main() -> None:
    """One thing after another; an assertion or a command that fails ends it."""
    assert "site-packages" in str(Path(mmclip.__file__)), mmclip.__file__
    assert "mmclip pretrain" in command()
    assert "--finding" in command("predict", "--help")
    assert command("--version").strip() == mmclip.__version__
    here = Path("smoke")
    preset = Preset(name="smoke", version=1, seed=3, image_size=32, n_train=60, n_val=4, n_test=4)
    raw = write_dataset(preset, here / "raw")
    command("data", "build", "csv", "--root", raw, "--mapping", raw / "mapping.toml",
            "--image-size", "32", "--out", here / "data")  # fmt: skip
    sets = [word for override in SMALL for word in ("--set", override)]
    command("pretrain", "--data", here / "data", "--out", here / "run", "--cpu", *sets)
    command("doctor", here / "data", here / "run")

    images = sorted((raw / "images").iterdir())[:3]
    result = mmclip.load(here / "run").classify(images, findings=FINDINGS)
    assert result.probabilities.shape == (3, 2), result.probabilities
    named = [word for finding in FINDINGS for word in ("--finding", finding)]
    command("predict", "--model", here / "run", *images, *named, "--out", here / "scores.csv")
    with (here / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, expected in zip(rows, result.probabilities, strict=True):
        assert [float(row[finding]) for finding in FINDINGS] == expected.tolist(), row
    print(f"mmclip {mmclip.__version__}: help, import, training, load, classify and predict work")


if __name__ == "__main__":
    main()
