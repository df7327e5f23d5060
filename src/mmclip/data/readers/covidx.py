"""COVIDx CXR-2, CXR-3 and CXR-4: images of COVID-19 and others, from many collections."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mmclip.data.ingest.csv_rows import SourceError
from mmclip.data.readers.files import bad_value, index_images
from mmclip.data.readers.vocabulary import SourceWords, load_words
from mmclip.data.sample import Record, Sample, Split

WHERE = "https://www.kaggle.com/datasets/andyczhao/covidx-cxr2"

_LISTS: dict[Split, str] = {"train": "train.txt", "val": "val.txt", "test": "test.txt"}
_SUFFIXES = {".png", ".jpg", ".jpeg"}
_SOURCES = {"rnsa": "rsna"}  # misspelt in 199 rows of the lists of November 2021


def read_covidx(root: Path) -> Iterator[Record]:
    """COVIDx CXR-2, -3 or -4: one record per image, in the order of train.txt, val.txt and
    test.txt.

    Citation: Pavlova et al. 2022 (CXR-3: arXiv:2206.03671); Wu et al. 2023 (CXR-4:
        arXiv:2311.17677).
    Licence: those of the collections, for research; some forbid commercial use.
    Layout: train.txt and test.txt, with CXR-4 val.txt, too, in the root; the images in train/,
        val/ and test/, or any other folders.
    Quirks: A row is "patient file class source", without a header. A patient may be two words
        ("COVID 1", in older lists), so file, class and source are counted from the end. Patient
        ids are those of the collection that an image comes from, and are joined with its name; of
        images of rsna the file's name stands for the patient, who is unknown. These images come
        from ChestX-ray14, as RSNA's do: who trains on one must not test on the other. "positive"
        is the patient's diagnosis, mostly by a laboratory's test; nobody read it off the image.
        "negative" may be any other disease. Without val.txt there is no val. Which collection an
        image is of is nearly its label: all of stonybrook are positive, all of rsna negative.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When train.txt, test.txt or all images are missing, or a list cannot be read.
    """
    for split in ("train", "test"):
        if not (root / _LISTS[split]).is_file():
            raise SourceError(f"{root} holds no {_LISTS[split]}; it comes from {WHERE}")
    images = index_images(root, _SUFFIXES, WHERE)
    return _records(root, images)


def _records(root: Path, images: Mapping[str, str]) -> Iterator[Record]:
    words = load_words("covidx")
    row = 0
    for split, name in _LISTS.items():
        for line in _lines(root / name):
            yield _image(row, line, split, root, images, words)
            row += 1


def _lines(path: Path) -> Iterator[str]:
    """The lines of a list that are not blank; none where there is no list."""
    if not path.is_file():
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line for line in map(str.strip, file) if line)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read ({error}); download it again") from None


def _image(
    row: int, line: str, split: Split, root: Path, images: Mapping[str, str], words: SourceWords
) -> Record:
    parts = line.split()
    if len(parts) < 4:
        name = parts[1] if len(parts) > 1 else ""
        return bad_value(row, name, f"{line!r} is no 'patient file class source'")
    *patient, file, word, collection = parts
    try:
        labels = words.labels([word])
    except ValueError as error:
        return bad_value(row, file, str(error))
    image = f"{split}/{file}"
    if not (root / image).is_file():
        image = images.get(Path(file).stem, image)
    collection = _SOURCES.get(collection, collection)
    return Sample(
        image_id=file,
        study_id=file,
        patient_id=f"{collection}/{' '.join(patient)}",
        source="covidx",
        split=split,
        image=image,
        labels=labels,
        label_origin="diagnosis",
        source_labels=(word, collection),
    )
