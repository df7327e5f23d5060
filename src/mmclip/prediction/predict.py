"""`mmclip predict`: probabilities of findings for images without labels, a batch at a time."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from mmclip.data.folder import MANIFEST_FILE, META_FILE
from mmclip.data.image_files import decode_files, find_image_files
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.images import read_image
from mmclip.data.sample import View
from mmclip.explanation.explain import explain_image, write_explanation
from mmclip.explanation.maps import check_files
from mmclip.finetuning.saved import FineTuned
from mmclip.model_loading import ModelRequest
from mmclip.models.dual_encoder import DualEncoder
from mmclip.prediction.decisions import read_thresholds
from mmclip.prediction.model import Scorer, Skipped, open_model, prompt_set_of, scorer_of
from mmclip.prediction.tables import prediction_table, write_skipped
from mmclip.progress import counted, progress
from mmclip.prompts import PromptSet

logger = logging.getLogger(__name__)

LATERAL = "a lateral image, which the mean of a study leaves out"


@dataclass(frozen=True)
class PredictRequest:
    """What to score, by what, and where to.

    Attributes:
        model: A run, a fine-tuned result, or a model of others.
        inputs: Image files, folders of them, and data folders of `mmclip data build`.
        out: The CSV.
        findings: In order; see `model.scorer_of`.
        prompts: Name or path of a prompt set.
        by: One line an image, or one a study: the mean over its frontal images.
        thresholds: Results whose thresholds decide.
        explain: Folder for saliency maps, one an image and finding.
        workers: Processes that decode.
        device: Of the model.
    """

    model: ModelRequest
    inputs: tuple[Path, ...]
    out: Path
    findings: tuple[str, ...] = ()
    prompts: str = "default"
    by: Literal["image", "study"] = "image"
    thresholds: Path | None = None
    explain: Path | None = None
    workers: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable


@dataclass(frozen=True)
class Predicted:
    """What a prediction left, in numbers.

    Attributes:
        n_images: That have numbers.
        n_lines: Of the table.
        n_laterals: Images known as laterals: the means of studies leave them out.
        n_alone: Images of no known study, each a study by itself.
        n_others: Files in the folders that are no images.
        skipped: Where the images without numbers are listed; None where there are none.
        n_skipped: How many.
    """

    n_images: int
    n_lines: int
    n_laterals: int
    n_alone: int
    n_others: int
    n_skipped: int
    skipped: Path | None


@dataclass(frozen=True, slots=True)
class _Image:
    """An image that is to be scored: where it lies, and what is known of it."""

    image_id: str
    study: str | None
    view: View
    path: Path | None  # of a file
    dataset: ImageTextDataset | None = None
    row: int = -1  # of the data folder


@dataclass(frozen=True)
class _Batch:
    images: list[_Image]
    prepared: Sequence[Any]  # as the model takes them
    skipped: list[Skipped]


@dataclass
class _Studies:
    """Sums of the probabilities of each study's frontal images, in the order of their coming."""

    sums: dict[str, Float[np.ndarray, " k"]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, study: str, probabilities: Float[np.ndarray, " k"]) -> None:
        """Counts one image in."""
        self.sums[study] = self.sums.get(study, np.zeros(len(probabilities))) + probabilities
        self.counts[study] = self.counts.get(study, 0) + 1


def skipped_file(out: Path) -> Path:
    """Where the images without numbers are listed, beside a table."""
    return out.with_name(f"{out.stem}.skipped.csv")


def predict(request: PredictRequest) -> Predicted:
    """Scores images and writes the table, and beside it the images that cannot be read.

    Memory does not grow with the number of images, but for their paths, and k sums a study.

    Raises:
        ValueError: When nothing is there to be scored, or no image can be read.
        PromptError: When the prompts of a finding cannot stand for it.
        ResultsError: See `read_thresholds`.
    """
    model = open_model(request.model, request.device)
    prompts = prompt_set_of(request.prompts)
    scorer = scorer_of(model, request.findings, prompts)
    if request.explain is not None and isinstance(model, FineTuned):
        raise ValueError(
            f"--explain asks where an image answers to a phrase, and the fine-tuned model "
            f"{request.model.source} has no text encoder; give the run that it was made of"
        )
    thresholds = None
    if request.thresholds is not None:
        thresholds = read_thresholds(request.thresholds, model, prompts, scorer.findings)
    data = [path for path in request.inputs if is_data_folder(path)]
    found = find_image_files([path for path in request.inputs if path not in data])
    datasets = [_open_data(path, scorer) for path in dict.fromkeys(data)]
    total = len(found.images) + sum(map(len, datasets))
    if not total:
        raise ValueError(
            f"no image is in {', '.join(map(str, request.inputs))} (other files: "
            f"{found.n_others:,}); give image files, folders that hold some, or a data folder"
        )
    if found.n_again:
        again = counted(found.n_again, "file", ("was", "were"))
        logger.info("%s named more than once, and scored once", again)
    batches = _batches(found.images, datasets, scorer, request)
    explainer = None
    if request.explain is not None:
        assert not isinstance(model, FineTuned)
        explainer = _Explainer(request.explain, model, prompts, scorer.findings)
    return _write(request, scorer, thresholds, batches, total, found.n_others, explainer)


def is_data_folder(path: Path) -> bool:
    """Whether a path is a data folder, and no folder of image files."""
    return (path / META_FILE).is_file() and (path / MANIFEST_FILE).is_file()


def _open_data(folder: Path, scorer: Scorer) -> ImageTextDataset:
    """The images of a data folder, as the model reads them."""
    dataset = scorer.encoder.open_data([folder])
    return dataset.select([sample.image is not None for sample in dataset.samples])


# -- reading --


def _batches(
    files: Sequence[Path],
    datasets: Sequence[ImageTextDataset],
    scorer: Scorer,
    request: PredictRequest,
) -> Iterator[_Batch]:
    size = scorer.encoder.batch_size
    per_chunk = -(-scorer.encoder.chunk_files // size) * size
    chunks = [files[i : i + per_chunk] for i in range(0, len(files), per_chunk)]
    for chunk in decode_files(
        chunks,
        scorer.encoder.prepare,
        with_study=request.by == "study",
        workers=request.workers,
    ):
        images = [
            _Image(str(file.path), file.study, file.view, file.path)
            for file in chunk.files
            if file.fault is None
        ]
        skipped = [
            Skipped(str(file.path), *file.fault) for file in chunk.files if file.fault is not None
        ]
        yield _Batch([], [], skipped)
        for i in range(0, len(images), size):
            yield _Batch(images[i : i + size], chunk.images[i : i + size], [])
    sources = {sample.source for dataset in datasets for sample in dataset.samples}
    for dataset in datasets:
        for i in range(0, len(dataset), size):
            rows = range(i, min(i + size, len(dataset)))
            images = [_image_of_data(dataset, row, len(sources) > 1) for row in rows]
            yield _Batch(images, [scorer.encoder.prepare(dataset.image(row)) for row in rows], [])


def _image_of_data(dataset: ImageTextDataset, row: int, with_source: bool) -> _Image:
    sample = dataset.samples[row]
    study = f"{sample.source} {sample.study_id}" if with_source else sample.study_id
    return _Image(sample.image_id, study, sample.view, None, dataset, row)


# -- writing --


def _write(
    request: PredictRequest,
    scorer: Scorer,
    thresholds: dict[str, float | None] | None,
    batches: Iterator[_Batch],
    total: int,
    n_others: int,
    explainer: "_Explainer | None",
) -> Predicted:
    skipped: list[Skipped] = []
    studies = _Studies()
    n_images = n_laterals = n_alone = 0
    keys = ("image_id",) if request.by == "image" else ("study_id", "n_images")
    with (
        prediction_table(request.out, scorer.findings, thresholds, keys) as table,
        progress("scoring images", total) as advance,
    ):
        for batch in batches:
            skipped += batch.skipped
            advance(len(batch.skipped))
            if not batch.images:
                continue
            scores = scorer.scores(batch.prepared)
            for image, row in zip(batch.images, scores, strict=True):
                n_images += 1
                if explainer is not None:
                    explainer.explain(image, n_images)
                n_laterals += image.view == "L"
                if request.by == "image":
                    table.write([image.image_id], row)
                elif image.view == "L":
                    skipped.append(Skipped(image.image_id, LATERAL))
                else:
                    n_alone += image.study is None
                    studies.add(image.study or image.image_id, row)
            advance(len(batch.images))
        for study, total_of_study in studies.sums.items():
            n = studies.counts[study]
            table.write([study, n], total_of_study / n)
        listed = _list_skipped(request.out, skipped)
        if not n_images:
            raise ValueError(
                f"none of {total:,} images can be read; {listed} says why of each, such as "
                f"{skipped[0]}"
            )
    return Predicted(
        n_images=n_images,
        n_lines=n_images if request.by == "image" else len(studies.sums),
        n_laterals=n_laterals,
        n_alone=n_alone,
        n_others=n_others,
        n_skipped=len(skipped),
        skipped=listed,
    )


def _list_skipped(out: Path, skipped: Sequence[Skipped]) -> Path | None:
    path = skipped_file(out)
    if not skipped:
        path.unlink(missing_ok=True)  # of the table that is replaced
        return None
    write_skipped(path, skipped)
    return path


class _Explainer:
    """Writes the saliency maps of images, as `mmclip explain` does."""

    def __init__(
        self, folder: Path, encoder: DualEncoder, prompts: PromptSet, findings: Sequence[str]
    ) -> None:
        self.folder, self.encoder = folder, encoder
        self.prompts, self.findings = prompts, findings

    def explain(self, image: _Image, number: int) -> None:
        """One picture and one .npz a finding, named by the image's number in the table.

        Raises:
            ManifestError: When a model of others reads a copy, see `maps.check_files`.
        """
        dataset, row, size_px = image.dataset, image.row, None
        given = image.path if dataset is None else dataset.image(row)
        if isinstance(given, Path):
            pixels = read_image(given)
        else:
            assert dataset is not None and given is not None
            check_files(self.encoder, dataset.select(np.arange(len(dataset)) == row))
            sample, pixels = dataset.samples[row], given
            assert sample.height_px is not None and sample.width_px is not None
            size_px = (sample.height_px, sample.width_px)
        stem = _plain(Path(image.image_id).stem)
        for finding in self.findings:
            found = explain_image(
                self.encoder, pixels, finding, "contribution", self.prompts, size_px
            )
            out = self.folder / f"{number:06d}-{stem}-{_plain(finding)}.png"
            write_explanation(out, found, found.facts(), f"{image.image_id}")


def _plain(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60] or "image"
