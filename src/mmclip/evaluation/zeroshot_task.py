"""What is scored by prompts, by which model and under which rules: a request, and it opened."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.original_images import images_said
from mmclip.data.sample import Split
from mmclip.evaluation.protocols import load_protocol
from mmclip.evaluation.results import ResultsError, read_results
from mmclip.evaluation.selection import (
    LabelledImages,
    Selection,
    images_hash,
    label_makers,
    split_of,
    unknown_views,
)
from mmclip.model_loading import ModelRequest, open_dual_encoder
from mmclip.models.dual_encoder import DualEncoder
from mmclip.prompts import PromptSet, load_prompts

DEFAULT_PROMPT_SETS = ("default", "pair", "sentence")
"""Where no protocol names others."""


@dataclass(frozen=True)
class ZeroshotRequest:
    """What to score by prompts, on what, and where to.

    Attributes:
        model: A run, or a model of others.
        folders: Data folders.
        out: Folder of the results.
        command: For results.
        protocol: Name or path; it names sources and findings itself.
        split: Which images; thresholds come from "val" of the same sources unless that is it.
        sources: Only these, when named.
        findings: In this order; by default all that the images are labelled with.
        prompt_sets: Names or paths. The protocol's unless some are named; the first gives the
            result, the others its spread over wordings.
        n_resamples: Bootstrap resamples of patients.
        seed: Of the bootstrap.
        roots: For a model of others, where the files of each folder's images lie; None asks the
            folders.
        device: Where the model runs; None for the CPU.
    """

    model: ModelRequest
    folders: tuple[Path, ...]
    out: Path
    command: str
    protocol: str | None = None
    split: Split = "test"
    sources: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    prompt_sets: tuple[str, ...] = ()
    n_resamples: int = 1000
    seed: int = 0
    roots: tuple[Path, ...] | None = None
    device: torch.device | None = None


@dataclass(frozen=True)
class ZeroshotTask:
    """A request with all that it names opened: what is scored, by what, under which rules."""

    request: ZeroshotRequest
    encoder: DualEncoder
    prompts: PromptSet
    other_prompts: tuple[PromptSet, ...]
    dataset: ImageTextDataset
    selected: LabelledImages  # of it, what is scored
    selection: Selection
    split: str  # of the data folders, by name and hash
    leak_check: str

    def facts(self) -> dict[str, str | int | float]:
        """What results say of model and images."""
        return {
            "labelled by": label_makers(self.selected.dataset),
            "images of unknown view": unknown_views(self.selected.dataset),
            "images read": images_said(self.selected.dataset),
            **self.encoder.facts(),
        }

    def is_done(self) -> bool:
        """Whether the folder of the request holds these very results.

        Equal are model, rule, data, images, split, protocol, findings, prompts, intervals, and what
        is said of the model.
        """
        try:
            found = read_results(self.request.out)
        except ResultsError:
            return False
        made, rules = found.provenance, self.selection.protocol
        weights = self.encoder.weights
        scored = sorted(row.finding for row in (*found.findings, *found.undefined))
        return (
            (made.recipe_hash, made.train_seed) == (weights.recipe_hash, weights.train_seed)
            and made.zeroshot_rule == self.encoder.scoring.rule
            and (made.data_hash, made.split) == (self.dataset.data_hash, self.split)
            and made.images_hash == images_hash(self.selected.dataset.samples)
            and (found.protocol and found.protocol.hash) == (rules and rules.hash)
            and scored == sorted(self.selected.findings)
            and made.prompt_hash == self.prompts.hash
            and [o.prompt_hash for o in found.other_prompt_sets]
            == [prompts.hash for prompts in self.other_prompts]
            and (found.n_resamples, made.seed) == (self.request.n_resamples, self.request.seed)
            and found.facts == self.facts()
        )


def open_task(request: ZeroshotRequest) -> ZeroshotTask:
    """Opens what a request names, and looks whether the model was trained on the images.

    Raises:
        ValueError: When something named is not there, or does not fit the rest.
        ManifestError: When there is nothing to score, or it was trained on.
    """
    rules = None if request.protocol is None else load_protocol(request.protocol)
    split = split_of(request.folders, rules)
    named = request.prompt_sets or (DEFAULT_PROMPT_SETS if rules is None else rules.prompt_sets)
    prompts, *others = map(load_prompts, named)
    selection = Selection(request.split, request.sources, request.findings, rules)
    encoder = open_dual_encoder(request.model, request.device)
    dataset = encoder.open_data(request.folders, request.roots)
    selected = selection.select(dataset)
    leak_check = encoder.check_unseen(selected.dataset, request.split)
    return ZeroshotTask(
        request, encoder, prompts, tuple(others), dataset, selected, selection, split, leak_check
    )
