"""Search: the nearest patients for an image or a phrase, in one's own data folders."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from matplotlib.figure import Figure

from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.images import ImageError, decode_image, read_bytes, resize_image
from mmclip.data.leakage.check import patient_key
from mmclip.data.sample import Split
from mmclip.embed import warn_of_unread
from mmclip.embedding_store import finite, image_embeddings
from mmclip.evaluation.plots import INK, QUIET
from mmclip.evaluation.selection import check_sources
from mmclip.files import write_atomic
from mmclip.model_loading import ModelRequest, open_dual_encoder
from mmclip.models.dual_encoder import DualEncoder
from mmclip.progress import console

SHEET_FILE = "found.png"

SHOWN_PX = 224
"""Side of a query in the picture. [chosen: more than the picture shows]"""


@dataclass(frozen=True)
class Query:
    """What is searched for.

    Args:
        said: A few words for people.
        embedding: Normalised, as those of the images.
        pixels: Of an image, 0..255, air dark; None for a phrase.
        patient: The image's own (`check.patient_key`), who is no answer; None where unknown here.
    """

    said: str
    embedding: Float32[np.ndarray, " e"]
    pixels: UInt8[np.ndarray, "h w"] | None = None
    patient: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A patient near a query, by the image that is nearest."""

    rank: int  # from 1
    similarity: float  # cosine, -1..1
    row: int  # of the image
    n_images: int  # of the patient, among those searched


@dataclass(frozen=True)
class Search:
    """A query, and the patients nearest to it."""

    query: Query
    dataset: ImageTextDataset  # all images with an image
    found: list[Found]

    def records(self) -> Iterator[dict]:
        """What is found, a plain record a patient. Ids of patient and study are left out."""
        for found in self.found:
            sample = self.dataset.samples[found.row]
            yield {
                "rank": found.rank,
                "similarity": round(found.similarity, 6),
                "image_id": sample.image_id,
                "source": sample.source,
                "split": sample.split,
                "view": sample.view,
                "n_images": found.n_images,
                "report": sample.report,
                "labels": dict(sample.labels),
            }

    def pixels(self) -> UInt8[np.ndarray, "m h w"]:
        """The images that are found."""
        return self.dataset.pixels(np.array([f.row for f in self.found], np.int64)).numpy()


def nearest_patients(
    similarity: Float32[np.ndarray, " n"],
    patients: Sequence[str],
    is_searched: Sequence[bool] | np.ndarray,
    top: int,
) -> list[Found]:
    """The patients with the most similar images, best first; equals in the order of the rows.

    Args:
        similarity: Of each image with the query.
        patients: Of each image.
        is_searched: The images that may be found.
        top: How many patients; fewer where there are no more.
    """
    among = np.flatnonzero(is_searched)
    best: dict[str, int] = {}
    for row in map(int, among[np.argsort(-similarity[among], kind="stable")]):
        best.setdefault(patients[row], row)
        if len(best) == top:
            break
    n_images = dict.fromkeys(best, 0)
    for row in map(int, among):
        if patients[row] in n_images:
            n_images[patients[row]] += 1
    return [
        Found(rank, float(similarity[row]), row, n_images[patient])
        for rank, (patient, row) in enumerate(best.items(), 1)
    ]


@dataclass(frozen=True)
class SearchRequest:
    """What to search for, by which model, and where.

    Attributes:
        model: A run, or a model of others.
        folders: Data folders to search.
        image: An image id of the folders, or the path of an image file.
        phrase: In the place of an image.
        top: How many patients.
        split: Only of this split, when named.
        sources: Only of these, when named.
        roots: For a model of others, where the files of each folder's images lie.
        device: Where the model runs; None for the CPU.
    """

    model: ModelRequest
    folders: tuple[Path, ...]
    image: str | None = None
    phrase: str | None = None
    top: int = 10
    split: Split | None = None
    sources: tuple[str, ...] = ()
    roots: tuple[Path, ...] | None = None
    device: torch.device | None = None


def search(request: SearchRequest) -> Search:
    """What `mmclip retrieve` does without --evaluate: the nearest patients for an image or a
    phrase.

    The whole comparison is exact: one product of the stored embeddings with the query.

    Raises:
        ValueError: When the query cannot be read, or there is nothing to search.
    """
    encoder = open_dual_encoder(request.model, request.device)
    dataset = _images_of(encoder, request.folders, request.roots)
    is_searched = _searched(dataset, request.split, request.sources)
    # Asked before images are embedded, which can take hours: a mistyped path must not wait for it.
    row = next((i for i, f in enumerate(dataset.samples) if f.image_id == request.image), None)
    if request.image is not None and row is None:
        query = query_of_file(encoder, dataset, Path(request.image))
    elif request.phrase is not None:
        query = query_of_phrase(encoder, request.phrase)
    else:
        query = None
    index = ImageIndex(dataset, image_embeddings(encoder, dataset, request.folders))
    if query is None:
        assert row is not None, "an image or a phrase was given"
        pixels = dataset.pixels(np.array([row]))[0].numpy()
        own = dataset.samples[row]
        vector = np.array(index.embeddings[row])
        query = Query(f"image {own.image_id}", vector, pixels, patient_key(own))
    return index.search(query, request.top, is_searched)


@dataclass(frozen=True)
class ImageIndex:
    """Images that can be searched, with their embeddings.

    Attributes:
        dataset: All with an image.
        embeddings: Of each, normalised.
    """

    dataset: ImageTextDataset
    embeddings: Float32[np.ndarray, "n e"]

    def search(self, query: Query, top: int, is_searched: np.ndarray | None = None) -> Search:
        """The nearest patients, each by the nearest of their images; never the query's own.

        Args:
            query: What is searched for.
            top: How many patients; fewer where there are no more.
            is_searched: bool [n], the images that may be found; all by default.
        """
        patients = [patient_key(sample) for sample in self.dataset.samples]
        among = np.array([patient != query.patient for patient in patients])
        if is_searched is not None:
            among &= is_searched
        found = nearest_patients(self.embeddings @ query.embedding, patients, among, top)
        return Search(query, self.dataset, found)

    def patient_of_file(self, content: bytes) -> str | None:
        """The patient (`check.patient_key`) that the very same image file is of, if any."""
        sha256 = hashlib.sha256(content).hexdigest()
        samples = (s for s in self.dataset.samples if s.image_sha256 == sha256)
        return next((patient_key(sample) for sample in samples), None)


def open_index(encoder: DualEncoder, folders: Sequence[Path]) -> ImageIndex:
    """The images of data folders with their embeddings, made where not yet stored.

    Raises:
        ManifestError: When a folder is unfinished, or there is no image.
    """
    dataset = _images_of(encoder, folders)
    _searched(dataset, None, ())
    return ImageIndex(dataset, image_embeddings(encoder, dataset, folders))


def _images_of(
    encoder: DualEncoder, folders: Sequence[Path], roots: Sequence[Path] | None = None
) -> ImageTextDataset:
    dataset = encoder.open_data(folders, roots)
    return dataset.select([sample.image is not None for sample in dataset.samples])


def _searched(dataset: ImageTextDataset, split: Split | None, sources: Sequence[str]) -> np.ndarray:
    """bool [n]: the images of a split and of some sources, each where it is named."""
    check_sources(dataset, sources)
    is_searched = np.array(
        [
            (f.split == (split or f.split)) and (not sources or f.source in sources)
            for f in dataset.samples
        ],
        bool,
    )
    if not is_searched.any():
        of = f"split {split!r}" if split else "any split"
        raise ManifestError(
            f"no image is in {of} of source {', '.join(sources) or 'any'}; choose another split or "
            f"source"
        )
    return is_searched


def query_of_file(encoder: DualEncoder, dataset: ImageTextDataset, path: Path) -> Query:
    """An image that need not be in the data: a PNG, JPEG, other raster or DICOM file.

    Where the data has the very same file, its patient is the query's own.

    Raises:
        ValueError: When there is no such file, or it gives no image.
    """
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} is neither an image id of the data nor a file; give one of the ids in "
            f"samples.parquet (with an image), or the path of a PNG, JPEG or DICOM file"
        )
    try:
        content = read_bytes(path)
        prepared = encoder.prepare(path)
        pixels = resize_image(decode_image(content), SHOWN_PX)
    except ImageError as error:
        raise ValueError(f"{path}: {error}; give another file") from None
    embedding = encoder.encode_images([prepared])[0]
    sha256 = hashlib.sha256(content).hexdigest()
    own = next((f for f in dataset.samples if f.image_sha256 == sha256), None)
    if own is not None:
        said = f"{path} is image {own.image_id} of the data: its own patient is left out"
        console.print(said, markup=False, soft_wrap=True)
    return Query(
        f"image {path.name}",
        finite(embedding),
        pixels,
        None if own is None else patient_key(own),
    )


def query_of_phrase(encoder: DualEncoder, phrase: str) -> Query:
    """A phrase, as a report would say it; it says what of it the model cannot read.

    Raises:
        ValueError: When the model can read no word of it.
    """
    warn_of_unread(encoder, phrase)
    return Query(f"“{phrase}”", finite(encoder.encode_texts([phrase])[0]))


def write_sheet(folder: Path, search: Search, columns: int = 5) -> Path:
    """Writes found.png: the images found, best first, after the image that was asked for."""
    panels = [
        (
            f"{f.rank}   {f.similarity:.3f}   {search.dataset.samples[f.row].view}\n"
            f"{_shortened(search.dataset.samples[f.row].image_id, 28)}",
            sample,
            INK,
        )
        for f, sample in zip(search.found, search.pixels(), strict=True)
    ]
    if search.query.pixels is not None:
        panels.insert(0, ("query", search.query.pixels, QUIET))
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    with mpl.rc_context({"font.size": 8, "text.color": INK}):
        figure = Figure(figsize=(1.7 * columns, 2.0 * lines + 0.4), layout="constrained")
        all_axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in all_axes:
            axes.set_axis_off()
        for axes, (title, sample, colour) in zip(all_axes, panels, strict=False):
            axes.imshow(sample, cmap="gray", vmin=0, vmax=255)
            axes.set_title(title, loc="left", fontsize=6, color=colour, parse_math=False)
        said = f"nearest patients: {search.query.said}"
        figure.suptitle(_shortened(said, 24 * columns), fontsize=9, parse_math=False)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomic(folder / SHEET_FILE) as file:
        figure.savefig(file, format="png", dpi=160, facecolor="white")
    return folder / SHEET_FILE


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
