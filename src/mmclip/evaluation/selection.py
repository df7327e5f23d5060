"""Which images are scored, for which findings, by which rules."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.sample import Split
from mmclip.evaluation.compute_metrics import (
    MIN_COUNT,
)
from mmclip.evaluation.metrics import ThresholdRule
from mmclip.evaluation.protocols import Protocol
from mmclip.evaluation.scores import (
    findings_of,
    protocol_labels,
    select_samples,
)


@dataclass(frozen=True)
class Selection:
    """Which images are scored, for which findings, by which rules.

    Attributes:
        split: Which images; thresholds come from "val" of the same sources unless that is it.
        sources: Only these, when named.
        findings: In this order; by default all that the images are labelled with.
        protocol: Images, findings and rules; then `sources` and `findings` are its own.
    """

    split: Split = "test"
    sources: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    protocol: Protocol | None = None

    @property
    def min_count(self) -> int:
        """See `compute_metrics.metrics_by_finding`."""
        return MIN_COUNT if self.protocol is None else self.protocol.min_count

    @property
    def rule(self) -> ThresholdRule:
        """What a threshold does best on validation images."""
        return "f1" if self.protocol is None else self.protocol.threshold

    def said(self) -> str:
        """Split and sources, in words."""
        return f"split {self.split}" + (f" of {', '.join(self.sources)}" if self.sources else "")

    def samples(self, dataset: ImageTextDataset, split: Split | None = None) -> ImageTextDataset:
        """The labelled frontal images of the split, or of another.

        Raises:
            ManifestError: See `scores.select_samples`.
        """
        return select_samples(dataset, split or self.split, self.sources, self.protocol)

    def names(self, selected: ImageTextDataset) -> list[str]:
        """The findings that some images are scored for.

        Raises:
            ManifestError: When a finding is labelled in no image.
        """
        if self.protocol is not None:
            return list(self.protocol.findings)
        there = findings_of(selected)
        if missing := [f for f in self.findings if f not in there]:
            asked = " ".join(f"--finding {shlex.quote(name)}" for name in self.findings)
            raise ManifestError(
                f"no image is labelled with {', '.join(missing)}; these images are labelled with "
                f"{', '.join(there)}. To score images without labels: `mmclip predict --model RUN "
                f"DATA {asked} --out predictions.csv`"
            )
        return list(self.findings) or there

    def labels(self, selected: ImageTextDataset, names: Sequence[str]) -> np.ndarray:
        """float [n, k]: 1, 0 or NaN of each image and finding."""
        if self.protocol is None:
            return selected.labels(names)
        return protocol_labels(self.protocol, selected.samples)
