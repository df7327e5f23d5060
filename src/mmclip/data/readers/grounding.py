"""Boxes on images of other data sets: MS-CXR on MIMIC-CXR, ChestX-Det10 on ChestX-ray14."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mmclip.data.ingest.csv_rows import SourceError
from mmclip.data.readers.files import Box, find_table, read_sound_rows
from mmclip.data.readers.vocabulary import load_words

WHERE_MSCXR = "https://physionet.org/content/ms-cxr/"
WHERE_DET10 = "https://github.com/Deepwise-AILab/ChestX-Det10-Dataset"

_MSCXR = tuple(
    f"MS_CXR_Local_Alignment_v{version}.{kind}"
    for kind in ("json", "csv")
    for version in ("1.1.0", "1.0.0")
)


def read_mscxr_boxes(root: Path) -> Iterator[Box]:
    """The boxes of MS-CXR with the phrase that each stands for, in pixels of MIMIC-CXR's images.

    Citation: Boecking et al., ECCV 2022 (arXiv:2204.09817).
    Licence: PhysioNet Credentialed Health Data License 1.5.0; no sharing.
    Layout: MS_CXR_Local_Alignment_v1.1.0.json (COCO) or .csv, or v1.0.0 of them; the first where
        several are there.
    Quirks: A phrase with several boxes has several rows. An image's id is MIMIC-CXR's `dicom_id`,
        as `read_mimic_cxr_jpg` gives it. The split of version 1.1.0 is not MIMIC-CXR's, and is not
        read: whether an image was trained on is for MIMIC-CXR's split to say.

    Raises:
        SourceError: When there is no such file, or it is damaged.
    """
    path = find_table(root, _MSCXR, WHERE_MSCXR)
    # Its eight categories are among CheXpert's names.
    words = load_words("chexpert")
    rows = _coco_rows(path) if path.suffix == ".json" else _csv_rows(path)
    for image_id, category, phrase, sides in rows:
        try:
            finding = words.finding(category)
            left, top, width, height = (float(side) for side in sides)
        except (ValueError, TypeError) as error:
            raise SourceError(f"{path}, {image_id}: {error}; download it again") from None
        yield Box(image_id, finding, left, top, width, height, phrase)


_MsCxrRow = tuple[str, str, str, tuple | list]  # image, category, phrase, left top width height


def _csv_rows(path: Path) -> Iterator[_MsCxrRow]:
    columns = ("dicom_id", "category_name", "label_text", "x", "y", "w", "h")
    for cells in read_sound_rows(path, columns):
        image_id, category, phrase, *sides = (cells[name] for name in columns)
        yield image_id, category, phrase, sides


def _coco_rows(path: Path) -> Iterator[_MsCxrRow]:
    try:
        said = json.loads(path.read_text("utf-8-sig"))
        images = {image["id"]: Path(image["file_name"]).stem for image in said["images"]}
        names = {category["id"]: category["name"] for category in said["categories"]}
        for mark in said["annotations"]:
            image_id, category = images[mark["image_id"]], names[mark["category_id"]]
            yield image_id, category, " ".join(mark["label_text"].split()), mark["bbox"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{path} is no COCO file of MS-CXR ({type(error).__name__}: {error}); download it again"
        ) from None


def read_chestxdet10_boxes(root: Path, split: Literal["train", "test"]) -> Iterator[Box]:
    """The boxes of ChestX-Det10 in its train.json or test.json, in pixels of 1024 px images.

    Citation: Liu et al. 2020 (arXiv:2006.10550).
    Licence: none is given with it; the images are of ChestX-ray14.
    Layout: train.json (3,001 images, 6,863 boxes) and test.json (542 images, 1,476 boxes), lists of
        {"file_name", "syms", "boxes"}; a box is left, top, right, bottom.
    Quirks: Image names such as 36204.png are its own: which image of ChestX-ray14 each is is not
        published, so who trains there must not test here. Images without a finding (681 and 83)
        have no box.

    Raises:
        SourceError: When the file is missing or damaged.
    """
    path = find_table(root, (f"{split}.json",), WHERE_DET10)
    words = load_words("chestxdet10")
    try:
        for image in json.loads(path.read_text("utf-8-sig")):
            for word, box in zip(image["syms"], image["boxes"], strict=True):
                left, top, right, bottom = map(float, box)
                finding = words.finding(word)
                yield Box(image["file_name"], finding, left, top, right - left, bottom - top)
    except (ValueError, LookupError, TypeError) as error:
        raise SourceError(f"{path}: {type(error).__name__}: {error}; download it again") from None
