"""What a run in training makes of split val: its loss, and its AUROC by prompts.

Test images are never looked at. Labels of val are read for the AUROC alone, which chooses the best
step only where validation.select_by asks for it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mmclip.batch import BatchSlice
from mmclip.config import Config
from mmclip.data.batches import TrainingBatches
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.streams import deterministic_config, is_pair, reserved_for_evaluation
from mmclip.embed import average_prompts, batch_size_of, embed_texts, encode_squares
from mmclip.evaluation.metrics import macro_auroc
from mmclip.models.dual_encoder import Scoring
from mmclip.models.mmclip import MMCLIP
from mmclip.patches import PatchGrid
from mmclip.prompts import load_prompts
from mmclip.training.early_stop import best_of, has_ended
from mmclip.training.gather import all_gather_rows
from mmclip.training.objective import Objective
from mmclip.training.state import TrainState
from mmclip.training.terms import Verdict

Histories = dict[str, list[tuple[int, float]]]
"""Step and score of each validation, higher is better, of the "model" and of its "average"."""

PROMPTS = "default"
"""The prompt set of the AUROC."""


@dataclass(frozen=True)
class ValidationData:
    """What of split val can be looked at.

    Attributes:
        pairs: Images with a report, of the views that train.
        labelled: Images with labels, as `mmclip zeroshot --split val` scores them.
        findings: That some labelled image has and another has not.
    """

    pairs: ImageTextDataset
    labelled: ImageTextDataset
    findings: tuple[str, ...]


def validation_data(dataset: ImageTextDataset, config: Config) -> ValidationData:
    """The images of split val in data folders.

    Args:
        dataset: All images of the folders.
        config: Of the run, which validates.

    Raises:
        ManifestError: When there is nothing for what chooses the best step.
    """
    val = dataset.select(
        [
            sample.split == "val" and sample.image is not None and not is_reserved
            for sample, is_reserved in zip(
                dataset.samples, reserved_for_evaluation(dataset), strict=True
            )
        ]
    )
    frontal = val.select([sample.view != "L" for sample in val.samples])
    pairs = val.select([is_pair(s) and s.view in config.data.views for s in val.samples])
    names = sorted({name for sample in frontal.samples for name in sample.labels})
    labels = frontal.labels(names)
    both = (labels == 1).any(0) & (labels == 0).any(0)
    findings = tuple(name for name, has_both in zip(names, both, strict=True) if has_both)
    by = config.validation.select_by
    if by == "loss" and len(pairs) < 2:
        raise ManifestError(
            f"validation.select_by='loss' needs at least two images of split val with a report, "
            f"and there are {len(pairs)}; set a split by `mmclip data split`, set "
            f"validation.select_by='auroc', or validation.every_steps=0"
        )
    if by == "auroc" and not findings:
        raise ManifestError(
            "validation.select_by='auroc' needs a finding that some images of split val have and "
            "others have not; set a split by `mmclip data split`, set validation.select_by='loss', "
            "or validation.every_steps=0"
        )
    return ValidationData(pairs, frontal, findings)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Validation:
    """Validates a model, and the average of its weights, as training goes.

    The loss is that of training on whole batches of the training's size, so with as many negatives;
    images come as they are and texts whole, no image is masked by relevance, and which patches and
    words are masked is the same each time. So losses of two steps differ by the weights alone.

    Attributes:
        histories: Of all validations until now; grows.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        data: ValidationData,
        tokenizer: PreTrainedTokenizerFast,
        grid: PatchGrid,
        histories: Histories,
    ) -> None:
        """Tokenises the reports once.

        Args:
            accelerator: Of the training.
            config: Of the run.
            data: To look at.
            tokenizer: Of the text encoder.
            grid: Of the image encoder.
            histories: Of the validations before, where training is resumed.
        """
        self.accelerator, self.data, self.tokenizer = accelerator, data, tokenizer
        self.settings, self.histories = config.validation, histories
        self.max_tokens = config.data.max_tokens
        size = min(config.train.batch_size, len(data.pairs))
        if not config.train.gradient_cache and config.train.micro_batch_size is not None:
            size = min(size, config.train.micro_batch_size)
        plain = deterministic_config(config)
        mask = plain.image_mask.model_copy(update={"policy": "random"})
        train = plain.train.model_copy(update={"batch_size": size})
        plain = plain.model_copy(update={"image_mask": mask, "train": train})
        self.objective = Objective(plain, grid)
        self.batches: TrainingBatches | None = None
        self.n_batches = 0
        if size > 1:
            self.batches = TrainingBatches(data.pairs, tokenizer, plain, grid)
            self.n_batches = len(data.pairs) // size

    @property
    def every_steps(self) -> int:
        """See `terms.Validate`."""
        return self.settings.every_steps

    @property
    def has_ended(self) -> bool:
        """Whether patience is at its end; the average of the weights has no say in it."""
        patience = self.settings.patience
        return patience > 0 and has_ended(self.histories.get("model", []), patience)

    def best_step(self, which: str) -> int | None:
        """The best step of "model" or "average"; None before the first validation."""
        history = self.histories.get(which)
        return best_of(history) if history else None

    def __call__(self, state: TrainState) -> Verdict:
        """Validates now. Every process must take part; all come to the same verdict."""
        models = {"model": self.accelerator.unwrap_model(state.model)}
        if state.average is not None:
            models["average"] = state.average.module
        metrics: dict[str, float] = {}
        is_best = False
        for which, model in models.items():
            found = self.measure(model)
            prefix = "val" if which == "model" else "val_ema"
            metrics |= {f"{prefix}_{name}": value for name, value in found.items()}
            by = self.settings.select_by
            score = found["auroc"] if by == "auroc" else -found["loss"]
            self.histories.setdefault(which, []).append((state.step, score))
            is_best |= self.best_step(which) == state.step
        return Verdict(metrics, saves=is_best or self.has_ended, ends=self.has_ended)

    def measure(self, model: MMCLIP) -> dict[str, float]:
        """Loss, its terms, and macro AUROC of a model, of what there is data for."""
        with evaluating(model), torch.no_grad():
            found = self._losses(model) if self.batches is not None else {}
            return found | ({"auroc": self._auroc(model)} if self.data.findings else {})

    def _losses(self, model: MMCLIP) -> dict[str, float]:
        """The loss, and each term, over whole batches."""
        assert self.batches is not None
        accelerator, weights = self.accelerator, self.objective.weights
        own = BatchSlice(accelerator.process_index, accelerator.num_processes)
        totals = torch.zeros(2, len(weights), dtype=torch.float64, device=accelerator.device)
        for number in range(self.n_batches):
            raw = self.batches.read(number, own)
            with accelerator.autocast():
                sums = self.objective.sums(model, raw.to(accelerator.device))
            counts = self.objective.counts(raw)
            totals[0] += torch.stack([sums[name].detach() for name in weights])
            totals[1] += torch.tensor([counts[name] for name in weights]).to(totals.device)
        joined = accelerator.reduce(totals, reduction="sum")
        assert isinstance(joined, Tensor)
        means = (joined[0] / joined[1].clamp(min=1)).tolist()
        terms: Mapping[str, float] = dict(zip(weights, means, strict=True))
        return {"loss": sum(weights[name] * terms[name] for name in weights), **terms}

    def _auroc(self, model: MMCLIP) -> float:
        """The macro AUROC over the findings, by the prompts of the package."""
        images, findings, accelerator = self.data.labelled, self.data.findings, self.accelerator
        slice_of_all = BatchSlice(accelerator.process_index, accelerator.num_processes)
        own, size = slice_of_all.of_rows(len(images)), batch_size_of(images, accelerator.device)
        parts = [torch.zeros(0, model.visual_projection.out_features)]
        for start in range(own.start, own.stop, size):
            rows = np.arange(start, min(start + size, own.stop))
            parts.append(encode_squares(model, images.pixels(rows), size))
        everyone = all_gather_rows(torch.cat(parts).to(accelerator.device)).cpu()
        encode = partial(embed_texts, model, self.tokenizer, max_tokens=self.max_tokens)
        prompts = average_prompts(encode, load_prompts(PROMPTS), findings)
        scores = Scoring("prompt_pair", float(model.scale())).scores(everyone, prompts)
        found = macro_auroc(images.labels(findings), scores)
        assert found is not None  # each finding has both classes
        return found
