"""metrics.jsonl of a run: a line every so many steps, none twice after a crash."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from mmclip.files import write_text_atomic
from mmclip.training.state import TrainState

METRICS_FILE = "metrics.jsonl"


class TrainingLog:
    """Writes what steps gave to metrics.jsonl and to the trackers, with the speed since last time.

    Attributes:
        path: Of metrics.jsonl, which the main process writes.
        weights: Of the terms in the loss that is logged.
    """

    def __init__(
        self, run: Path, step: int, weights: Mapping[str, float], accelerator: Accelerator
    ) -> None:
        """Leaves out lines after `step`: they will be logged again."""
        self.path, self.weights, self.accelerator = run / METRICS_FILE, weights, accelerator
        if accelerator.is_main_process:
            _cut_log(self.path, step)
        self._restart()

    def _restart(self) -> None:
        self.began = time.monotonic()
        self.n_images = torch.zeros((), device=self.accelerator.device)

    def count(self, n_images: Tensor) -> None:
        """Counts the images of a step; the device is not waited for."""
        self.n_images = self.n_images + n_images

    def write(self, state: TrainState, values: Mapping[str, Tensor]) -> str:
        """Logs a step on every process, and says it for people."""
        images_per_s = float(self.n_images) / (time.monotonic() - self.began)
        self._restart()
        state.log = {k: float(v) for k, v in values.items()}
        loss = sum(weight * state.log[k] for k, weight in self.weights.items())
        self.add({"step": state.step, "loss": loss, **state.log, "images_per_s": images_per_s})
        return f"loss {loss:.3f}  {images_per_s:.0f} images/s"

    def add_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs what a validation found, whose time does not count as training's."""
        if metrics:
            self.add({"step": step, **metrics})
        self._restart()

    def add(self, line: Mapping[str, float | int]) -> None:
        """Adds a line, which has a step."""
        self.accelerator.log(dict(line), step=int(line["step"]))
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _cut_log(path: Path, step: int) -> None:
    # A run killed after its last checkpoint logged steps that will be logged again.
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip("\n") + "\n")
        except json.JSONDecodeError:
            break  # half a line, written as the process was killed
    write_text_atomic(path, "".join(kept))
