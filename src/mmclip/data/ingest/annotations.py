"""Annotations: what readers of images marked, as boxes or masks, on the images of a data
folder."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.readers.chestxray14 import read_chestxray14_boxes
from mmclip.data.readers.files import Box
from mmclip.data.readers.grounding import read_chestxdet10_boxes, read_mscxr_boxes
from mmclip.data.readers.rsna import read_rsna_boxes
from mmclip.data.readers.siim import read_siim_masks
from mmclip.data.readers.vindr import read_vindr_boxes
from mmclip.data.sample import Sample
from mmclip.data.synthetic import read_masks

FOREIGN = "the image is not in the data folder"
EMPTY = "no pixel of the image lies in it"
"""Why an annotation is left out."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """Where one finding is on an image: all its boxes, or its mask.

    Args:
        image_id: Of the data folder.
        finding: The class.
        phrase: The reader's own words for it; "" where the data set has none.
        is_inside: In the pixels of the image, or of a copy of it of another size.
    """

    image_id: str
    finding: str
    phrase: str
    is_inside: Bool[np.ndarray, "h w"]


def _chestxdet10(root: Path) -> Iterator[Box]:
    yield from read_chestxdet10_boxes(root, "train")
    yield from read_chestxdet10_boxes(root, "test")


_PUBLISHED_PX = 1024
"""Side of the images of ChestX-ray14, in every data set that is made of them."""

_BOXES: dict[str, tuple[Callable[[Path], Iterator[Box]], int | None]] = {
    "chestxdet10": (_chestxdet10, _PUBLISHED_PX),
    "chestxray14": (read_chestxray14_boxes, _PUBLISHED_PX),
    "ms-cxr": (read_mscxr_boxes, None),
    "rsna": (read_rsna_boxes, _PUBLISHED_PX),
    "vindr": (read_vindr_boxes, None),
}
"""The reader of each, and the side of the images that its boxes are in the pixels of; None for the
size of the file."""


def _made(root: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    for (image_id, finding), mask in read_masks(root).items():
        yield image_id, finding, mask


def _siim(root: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    for image_id, mask in read_siim_masks(root):
        yield image_id, "pneumothorax", mask


_MASKS: dict[str, Callable[[Path], Iterator[tuple[str, str, np.ndarray]]]] = {
    "synthetic": _made,
    "siim": _siim,
}

ANNOTATION_SETS = tuple(sorted({*_BOXES, *_MASKS}))
"""The data sets whose annotations are read. "synthetic" is a folder of synthetic images with
masks.npz."""


def read_annotations(
    name: str, root: Path, samples: Mapping[str, Sample], left_out: Counter[str]
) -> Iterator[Annotation]:
    """The annotations of a data set on some images, one per image, finding and phrase.

    Args:
        name: One of ANNOTATION_SETS.
        root: The data set's folder as downloaded.
        samples: By image id.
        left_out: The number of annotations that are left out is added here, by reason.

    Raises:
        SourceError: When the name is unknown, a table is missing or damaged, or an annotation
            does not fit its image.
    """
    if name not in ANNOTATION_SETS:
        raise SourceError(
            f"no boxes or masks of {name!r} are read; they are of {', '.join(ANNOTATION_SETS)}"
        )
    if not root.is_dir():
        raise SourceError(f"there is no folder {root}; give the one that holds {name}'s boxes")
    annotations = (
        _from_boxes(name, root, samples, left_out)
        if name in _BOXES
        else _from_masks(name, root, samples, left_out)
    )
    for annotation in annotations:
        if annotation.is_inside.any():
            yield annotation
        else:
            left_out[EMPTY] += 1


def _from_masks(
    name: str, root: Path, samples: Mapping[str, Sample], left_out: Counter[str]
) -> Iterator[Annotation]:
    for image_id, finding, mask in _MASKS[name](root):
        if image_id not in samples:
            left_out[FOREIGN] += 1
            continue
        _check_shape(name, samples[image_id], *mask.shape)
        yield Annotation(image_id, finding, "", mask)


def _from_boxes(
    name: str, root: Path, samples: Mapping[str, Sample], left_out: Counter[str]
) -> Iterator[Annotation]:
    read, side_px = _BOXES[name]
    boxes: dict[tuple[str, str, str], list[Box]] = {}
    for box in read(root):
        boxes.setdefault((box.image_id, box.finding, box.phrase), []).append(box)
    for (image_id, finding, phrase), some in boxes.items():
        if image_id not in samples:
            left_out[FOREIGN] += 1
            continue
        sample = samples[image_id]
        if sample.height_px is None or sample.width_px is None:
            raise SourceError(
                f"{image_id} has boxes and no image; build the data folder with images"
            )
        height, width = (side_px, side_px) if side_px else (sample.height_px, sample.width_px)
        _check_shape(name, sample, height, width)
        for box in some:
            right, bottom = box.left_px + box.width_px, box.top_px + box.height_px
            if min(box.left_px, box.top_px) < -1 or right > width + 1 or bottom > height + 1:
                raise SourceError(
                    f"{image_id} has {width} x {height} px, and a box of {name} from "
                    f"{box.left_px:g}, {box.top_px:g} to {right:g}, {bottom:g}; build the data "
                    f"folder from images of the published size"
                )
        yield Annotation(image_id, finding, phrase, pixels_in_boxes(some, height, width))


def pixels_in_boxes(
    boxes: Iterable[Box], height: int, width: int
) -> Bool[np.ndarray, "height width"]:
    """The pixels whose centre lies in one of some boxes."""
    is_inside = np.zeros((height, width), bool)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    for box in boxes:
        rows = (box.top_px <= y) & (y < box.top_px + box.height_px)
        columns = (box.left_px <= x) & (x < box.left_px + box.width_px)
        is_inside |= np.outer(rows, columns)
    return is_inside


def _check_shape(name: str, sample: Sample, height: int, width: int) -> None:
    if (sample.height_px or 0) * width != (sample.width_px or 0) * height:
        raise SourceError(
            f"{sample.image_id} has {sample.width_px} x {sample.height_px} px, and {name} marks "
            f"images of {width} x {height} px or of that shape; build the data folder from the "
            f"published images"
        )
