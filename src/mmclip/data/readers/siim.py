"""SIIM-ACR Pneumothorax Segmentation of 2019: images of ChestX-ray14 with masks."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from mmclip.data.flat import starts_of
from mmclip.data.readers.files import (
    bad_value,
    find_table,
    image_of_unknown_patient,
    index_images,
    read_sound_rows,
)
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import Record

WHERE = "https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation"

SIDE_PX = 1024
"""Of the images, and so of the masks. Source: the challenge's data page."""

_TABLES = ("stage_2_train.csv", "train-rle.csv")
_NO_MASK = {"-1", "-1.0", ""}


def read_siim(root: Path) -> Iterator[Record]:
    """SIIM-ACR Pneumothorax: one record per image, in the order of the table.

    Citation: Filice et al., Journal of Digital Imaging 2020; images: ChestX-ray14.
    Licence: the challenge's rules: no commercial use.
    Layout: stage_2_train.csv (12,954 rows, 12,047 images) or train-rle.csv (stage 1; the first
        where both are there), in the root or, as in Kaggle's re-uploads, in a folder of it; the
        images in dicom-images-train/STUDY/SERIES/IMAGE.dcm, stage_2_images/IMAGE.dcm, or any other
        folders, as DICOM, or as PNG of that name.
    Quirks: An image with several masks has several rows: split by image, never by row. The column
        is called " EncodedPixels", with a space, or without. -1 means no pneumothorax. Some images
        of stage 1 are in no row, and not read. Patients are unknown: each image counts as one, and
        patients can be in two splits. All images are from ChestX-ray14: who trains there must not
        test here. View, age and sex are those of the DICOM header.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When the table or all images are missing.
    """
    masks = _read_masks(root)
    images = index_images(root, {".dcm", ".png", ".jpg"}, WHERE)
    return _records(root, masks, images)


def _records(
    root: Path, masks: Mapping[str, list[str]], images: Mapping[str, str]
) -> Iterator[Record]:
    words = load_words("siim")
    for row, (image_id, codes) in enumerate(masks.items()):
        image = images.get(image_id, f"{image_id}.dcm")
        said = tuple("-1" if code in _NO_MASK else "mask" for code in codes)
        try:
            for code in codes:
                if code not in _NO_MASK:
                    _runs(code)
            labels = words.labels(said)
        except ValueError as error:
            yield bad_value(row, image_id, str(error))
            continue
        yield image_of_unknown_patient(
            root, image_id, source="siim", image=image, labels=labels, source_labels=said
        )


def _read_masks(root: Path) -> dict[str, list[str]]:
    """The code of each mask of each image, in the order of the table.

    Raises:
        SourceError: When the table is missing or damaged.
    """
    table = find_table(root, _TABLES, WHERE)
    masks: dict[str, list[str]] = {}
    for cells in read_sound_rows(table, ("ImageId", "EncodedPixels")):
        masks.setdefault(cells["ImageId"], []).append(cells["EncodedPixels"])
    return masks


def read_siim_masks(root: Path) -> Iterator[tuple[str, Bool[np.ndarray, "1024 1024"]]]:
    """The id of each image with a pneumothorax, and where it is: the union of the image's masks.

    Raises:
        SourceError: When the table is missing.
    """
    for image_id, codes in _read_masks(root).items():
        if found := [code for code in codes if code not in _NO_MASK]:
            yield image_id, np.logical_or.reduce([decode_mask(code) for code in found])


def decode_mask(code: str, side_px: int = SIDE_PX) -> Bool[np.ndarray, "h h"]:
    """A mask from the challenge's code: pairs of "pixels to skip since the last run, pixels in it".

    Pixels are counted down the columns, the first column first.

    Args:
        code: As in the column EncodedPixels.
        side_px: Of the image.

    Raises:
        ValueError: When it is no such code, or runs over the image's end.
    """
    skip, length = _runs(code, side_px)
    begin = np.cumsum(skip) + starts_of(length)[:-1]
    flat = np.zeros(side_px * side_px, bool)
    for start, n in zip(begin, length, strict=True):
        flat[start : start + n] = True
    return flat.reshape(side_px, side_px).T


def _runs(code: str, side_px: int = SIDE_PX) -> tuple[np.ndarray, np.ndarray]:
    """The pixels to skip before each run, and the pixels in it."""
    try:
        numbers = np.array(code.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        raise ValueError(f"the mask {code[:40]!r} holds what is no number") from None
    n_pixels = side_px * side_px
    if len(numbers) % 2 or (numbers < 0).any() or numbers.sum() > n_pixels or not len(numbers):
        raise ValueError(f"the mask {code[:40]!r} is no list of runs within {n_pixels} pixels")
    return numbers[::2], numbers[1::2]
