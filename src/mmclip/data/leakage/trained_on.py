"""What a model of others is said to have been trained on, and which images that spoils."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmclip.data.folder import ManifestError
from mmclip.data.ingest.sources import READERS
from mmclip.data.leakage.check import COLLECTIONS
from mmclip.data.sample import SPLITS, Sample, Split

logger = logging.getLogger(__name__)

IMAGES_OF = {
    **{source: collection for source, collection in COLLECTIONS.items() if "/" not in source},
    "covidx": "chestxray14",  # a part of it, and names do not say which images
    "mimic-cxr-jpg": "mimic-cxr",
    "openi-kaggle": "openi",
    "openi-r2gen": "openi",
}
"""Data sets, by the names of readers and sources, that have images of another. Source: the RSNA
challenge takes its images from ChestX-ray14 (Shih et al. 2019), SIIM-ACR too (docs/splits.md), and
COVIDx takes some from RSNA (Wang et al. 2020)."""


@dataclass(frozen=True)
class TrainedOn:
    """Data sets by name, each whole, or one of its published splits as NAME:SPLIT.

    Attributes:
        names: As `trained_on` reads them; none says that nothing is known.
    """

    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(self.names) or "unknown"

    def check_unseen(self, model: str, samples: Sequence[Sample], split: Split) -> str:
        """As `DualEncoder.check_unseen`, by the names of data sets alone.

        Args:
            model: That is evaluated, by name.
            samples: To be scored.
            split: That they are of.

        Raises:
            ManifestError: When a data set of these images is among the names.
        """
        if not self.names:
            return (
                f"not made: what {model} was trained on is not known here, and these images may be "
                f"among it"
            )
        sources = sorted({_plain(sample.source) for sample in samples})
        spoilt = [
            f"{source} ({name})"
            for source in sources
            for name in self.names
            if _shares(name, source, split)
        ]
        said = f"by name alone: it is said to be trained on {self}"
        if not spoilt:
            return f"{said}, which shares no data set with these images ({', '.join(sources)})"
        fault = (
            f"{model} is said to be trained on the images of {', '.join(spoilt)}, so that their "
            f"{split} images are no test of it"
        )
        if split == "train":
            logger.warning("split train: %s", fault)
            return f"{said}; split train: {fault}"
        raise ManifestError(
            f"{fault}; score another data set, or where the published split was kept apart, say so "
            f"by --trained-on {spoilt[0].partition(' (')[0]}:train"
        )


def trained_on(said: Iterable[str]) -> TrainedOn:
    """The names of data sets, each alone or several with commas between them.

    A name that is no data set here is kept, with a warning: nothing can be checked against it but
    images of a source of that name.

    Raises:
        ValueError: When a split has no such name.
    """
    names = []
    for name in (part.strip() for text in said for part in text.split(",")):
        if not name:
            continue
        plain, _, split = name.partition(":")
        if split not in ("", *SPLITS):
            raise ValueError(
                f"--trained-on {name!r} names split {split!r}, which is none of "
                f"{', '.join(SPLITS)}; write NAME or NAME:SPLIT, such as chexpert:train"
            )
        known = {*READERS, *IMAGES_OF, *IMAGES_OF.values()}
        if _plain(plain) not in known:
            logger.warning(
                "--trained-on %s is no data set that is known here; only images of a source of "
                "this very name are refused. Known are %s",
                plain, ", ".join(sorted(known - {"csv", "dicom"})),
            )  # fmt: skip
        names.append(_plain(plain) + (f":{split}" if split else ""))
    return TrainedOn(tuple(dict.fromkeys(names)))


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _shares(name: str, source: str, split: Split) -> bool:
    """Whether images of a source's split may be among those of a named data set."""
    data_set, _, trained = name.partition(":")
    if data_set == source:
        return trained in ("", split)
    # Splits of two data sets with images in common have nothing to do with one another.
    return IMAGES_OF.get(data_set, data_set) == IMAGES_OF.get(source, source)
