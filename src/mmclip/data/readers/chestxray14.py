"""ChestX-ray14, the NIH Clinical Center's 112,120 frontal images of 30,805 patients."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mmclip.data.ages import parse_age, parse_sex
from mmclip.data.ingest.csv_rows import SourceError, read_rows
from mmclip.data.readers.files import (
    Box,
    bad_value,
    find_table,
    index_images,
    look_for_table,
)
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import Record, Sample, Split, View

WHERE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"

_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
_LISTS: dict[str, Split] = {"train_val_list.txt": "train", "test_list.txt": "test"}
_BOXES = "BBox_List_2017.csv"
_VIEWS: dict[str, View] = {"PA": "PA", "AP": "AP"}
_COLUMNS = (
    "Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position"
)  # fmt: skip


def read_chestxray14(root: Path) -> Iterator[Record]:
    """ChestX-ray14: one record per image, in the order of the table.

    Citation: Wang et al., ChestX-ray8, CVPR 2017 (arXiv:1705.02315).
    Licence: free use; name the NIH Clinical Center, and cite the paper.
    Layout: Data_Entry_2017_v2020.csv or Data_Entry_2017.csv (the first where both are there);
        images_001/images/ to images_012/images/, or the images in any other folders;
        train_val_list.txt and test_list.txt, both or neither.
    Quirks: Labels are text-mined. The older table has ages such as 414 years, which become
        unknown. Its header splits at the comma of "OriginalImage[Width,Height]", as its rows do.
        With the lists, their images go to train and test, and there is no val; without them, no
        image has a split. Each image counts as a study.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When the table, all images, or one of the two lists are missing.
    """
    table = find_table(root, _TABLES, WHERE)
    splits = _official_splits(root)
    images = index_images(
        root, {".png", ".jpg"}, f"{WHERE} (images_001.tar.gz to images_012.tar.gz)"
    )
    return _records(table, splits, images)


def _records(table: Path, splits: dict[str, Split], images: dict[str, str]) -> Iterator[Record]:
    labels_of = cache(load_words("chestxray14").labels)
    for row, (cells, problem) in enumerate(read_rows(table, _COLUMNS)):
        name = cells.get("Image Index", "")
        words = tuple(cells.get("Finding Labels", "").split("|"))
        if not problem and splits and name not in splits:
            problem = f"the image is neither in {' nor in '.join(_LISTS)}"
        try:
            if problem:
                raise ValueError(problem)
            labels = labels_of(words)
        except ValueError as error:
            yield bad_value(row, name, str(error))
            continue
        yield Sample(
            image_id=name,
            study_id=name,
            patient_id=cells["Patient ID"],
            source="chestxray14",
            split=splits.get(name),
            image=images.get(Path(name).stem, f"images/{name}"),
            view=_VIEWS.get(cells["View Position"], "unknown"),
            labels=labels,
            source_labels=words,
            label_origin="report-program",
            age_years=parse_age(cells["Patient Age"]),
            sex=parse_sex(cells["Patient Gender"]),
        )


def _official_splits(root: Path) -> dict[str, Split]:
    """The split of each image by the published lists; empty without them."""
    there = {name: path for name in _LISTS if (path := look_for_table(root, (name,)))}
    if not there:
        return {}
    if len(there) < len(_LISTS):
        (missing,) = set(_LISTS) - set(there)
        raise SourceError(
            f"{root} holds {next(iter(there))} but no {missing}; add it (from {WHERE}), or take "
            f"both away for splits of our own"
        )
    splits: dict[str, Split] = {}
    for name, split in _LISTS.items():
        for image_id in there[name].read_text("utf-8-sig").split():
            if splits.setdefault(image_id, split) != split:
                raise SourceError(f"{root}: {image_id} is in both lists; download them again")
    return splits


def read_chestxray14_boxes(root: Path) -> Iterator[Box]:
    """The 984 boxes on 880 images that BBox_List_2017.csv holds, in pixels of the 1024 px images.

    Raises:
        SourceError: When the list is missing, or names a finding that is unknown.
    """
    table = find_table(root, (_BOXES,), WHERE)
    words = load_words("chestxray14")
    # Its header reads "Bbox [x,y,w,h]": split at the commas, and three more without a name.
    for cells, problem in read_rows(table, ("Image Index", "Finding Label", "Bbox [x", "h]")):
        try:
            if problem:
                raise ValueError(problem)
            finding = words.finding(cells["Finding Label"])
            left, top, width, height = (float(cells[c]) for c in ("Bbox [x", "y", "w", "h]"))
        except ValueError as error:
            raise SourceError(f"{table}, {cells.get('Image Index')}: {error}") from None
        yield Box(cells["Image Index"], finding, left, top, width, height)
