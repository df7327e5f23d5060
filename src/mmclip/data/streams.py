"""What trains: the kinds of rows of a data set, and which of them a run reads."""

from collections.abc import Sequence
from dataclasses import replace

from mmclip.config import AugmentConfig, Config
from mmclip.config_io import ConfigError
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.leakage.check import patient_key
from mmclip.data.sample import ABSENT, UNCERTAIN, Sample


def is_pair(sample: Sample) -> bool:
    """Whether an image has a report."""
    return sample.image is not None and sample.report is not None


def is_unpaired(sample: Sample) -> bool:
    """Whether an image has no report, and labels that say something for sure."""
    return sample.image is not None and sample.report is None and bool(sample.sure_labels())


def is_report_only(sample: Sample) -> bool:
    """Whether a report has no image."""
    return sample.image is None and sample.report is not None


def is_bare(sample: Sample) -> bool:
    """Whether an image has no report, and no label that says something for sure."""
    return sample.image is not None and sample.report is None and not sample.sure_labels()


STREAMS = {
    "n_pairs": is_pair,
    "n_unpaired": is_unpaired,
    "n_lone_reports": is_report_only,
    "n_bare": is_bare,
}
"""What trains: the kinds of rows, by the name of their number."""


def rows_by_stream(dataset: ImageTextDataset) -> dict[str, int]:
    """How many rows of each kind there are, by the names of STREAMS."""
    return {name: sum(map(is_kind, dataset.samples)) for name, is_kind in STREAMS.items()}


RESERVED_FOR_EVALUATION = ("padchest-physician",)
"""Sources whose images never pre-train, nor any other image of their patients. Source: the 39,053
images of PadChest whose report a physician read, on which KAD, CheXzero and MAVL test."""


def reserved_for_evaluation(dataset: ImageTextDataset) -> list[bool]:
    """Which images no run may pre-train on, whatever their split; see RESERVED_FOR_EVALUATION."""
    patients = {
        patient_key(sample)
        for sample in dataset.samples
        if sample.source in RESERVED_FOR_EVALUATION
    }
    if not patients:
        return [False] * len(dataset)
    return [patient_key(sample) in patients for sample in dataset.samples]


def training_dataset(dataset: ImageTextDataset, config: Config) -> ImageTextDataset:
    """The rows to train on: pairs of split "train", and of each stream that is asked for.

    Raises:
        ConfigError: When a finding is withheld that no label names.
    """
    dataset = _without_labels(dataset, config.unpaired.withheld)
    kinds = [
        is_kind
        for is_kind, is_wanted in (
            (is_pair, True),
            (is_unpaired, config.unpaired.rows_per_pair > 0),
            (is_report_only, config.unpaired.reports_per_pair > 0),
            (is_bare, config.unpaired.bare_per_pair > 0),
        )
        if is_wanted
    ]
    views = config.data.views
    return dataset.select(
        [
            sample.split == "train"
            and (sample.view in views or sample.image is None)
            and not is_reserved
            and any(is_kind(sample) for is_kind in kinds)
            for sample, is_reserved in zip(
                dataset.samples, reserved_for_evaluation(dataset), strict=True
            )
        ]
    )


def _without_labels(dataset: ImageTextDataset, withheld: Sequence[str]) -> ImageTextDataset:
    """The rows with what is withheld struck out of their labels.

    A present finding becomes an uncertain one: nothing names it, and the image is not normal.
    """
    if not withheld:
        return dataset
    known = {name for sample in dataset.samples for name in sample.labels}
    if unknown := sorted(set(withheld) - known):
        raise ConfigError(
            f"unpaired.withheld names {', '.join(unknown)}, and images are labelled with "
            f"{', '.join(sorted(known)) or 'nothing'}"
        )

    def left(sample: Sample) -> Sample:
        labels = {
            name: UNCERTAIN if name in withheld else value
            for name, value in sample.labels.items()
            if name not in withheld or value != ABSENT
        }
        return replace(sample, labels=labels)

    return replace(dataset, samples=tuple(map(left, dataset.samples)))


SEEN_FILE = "seen.json"
"""In the folder of a run: see `seen_in_training`."""


def seen_in_training(dataset: ImageTextDataset, config: Config) -> dict[str, list[str]]:
    """The findings that training names: in reports, in prompts made of labels, as labels.

    Args:
        dataset: As `training_dataset` gives them.
        config: Says what becomes of labels.

    Returns:
        Names by "report", "prompt" and "label". A report names what its entities are, denied ones,
        too; a prompt may name whatever its image is labelled with for sure.
    """
    reports = {
        entity.concept
        for sample in dataset.samples
        if sample.report is not None
        for entity in sample.entities
        if entity.kind == "finding"
    }
    labels = label_names(dataset)
    as_labels = config.loss.label > 0
    return {
        "report": sorted(reports),
        "prompt": [] if as_labels else labels,
        "label": labels if as_labels else [],
    }


def deterministic_config(config: Config) -> Config:
    """The configuration under which images come as they are and texts whole, for looking at a
    model.

    Reports alone speak for images that have one, and prompts for the others, whatever the run did
    with labels. Which words are masked still follows from the seed of the run.
    """
    none = AugmentConfig(rotation_deg=0, translate_ratio=0, scale_ratio=0, brightness=0, contrast=0)
    unpaired = {"rows_per_pair": 0.0, "prompt_pairs": False, "shuffle": False}
    unpaired |= {"reports_per_pair": 0.0, "bare_per_pair": 0.0}
    whole = {"impression_prob": 0.0, "sentence_drop_prob": 0.0}
    return config.model_copy(
        update={
            "augment": none,
            "loss": config.loss.model_copy(update={"label": 0.0}),
            "unpaired": config.unpaired.model_copy(update=unpaired),
            "data": config.data.model_copy(update=whole),
        }
    )


def label_names(dataset: ImageTextDataset) -> list[str]:
    """What unpaired images are labelled with for sure, sorted: the columns of the label loss.

    Args:
        dataset: As `training_dataset` gives them. Labels of images with a report are not looked at.
    """
    return sorted({name for f in dataset.samples if is_unpaired(f) for name in f.sure_labels()})
