"""Where an image answers to a phrase: a map in the image's own pixels.

A map shows which patches speak for a phrase in the model's own measure. It is no proof that a
finding is there, and whether it points at all is measured by `mmclip.explanation.pointing_game`.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from mmclip.data.folder import ManifestError
from mmclip.data.images import ImageError, read_image, unsquared
from mmclip.data.ingest.annotations import Annotation, read_annotations
from mmclip.data.sample import View
from mmclip.embed import warn_of_unread
from mmclip.evaluation.pictures import explanation_figure
from mmclip.explanation.grounding import mass_above_median
from mmclip.explanation.maps import check_files, map_grid, maps_of
from mmclip.explanation.saliency import ExplainScore
from mmclip.files import check_free, write_atomic
from mmclip.model_loading import ModelRequest, open_dual_encoder
from mmclip.models.dual_encoder import DualEncoder
from mmclip.patches import Grid
from mmclip.prompts import PromptSet, plain_name
from mmclip.run import Run

logger = logging.getLogger(__name__)

UNITS: dict[ExplainScore, str] = {
    "contribution": "contribution to the phrase",
    "prompt_pair": "contribution to the phrase less that to its denial",
    "decoder_attention": "share of the text decoder's attention",
}
"""What the values of a map are."""


@dataclass(frozen=True)
class Explanation:
    """How an image answers to a phrase.

    Args:
        phrase: As given.
        asked: The texts that were encoded: the phrase, or the prompts that were made of it.
        score: What the map shows.
        patches: Of each patch, in the unit of the score.
        grid: How the patches lie on the image.
        image: 0..255, as large as it was published.
        similarity: Cosine of the embeddings of image and phrase.
        annotations: That readers of the image marked, if they are known.
    """

    phrase: str
    asked: tuple[str, ...]
    score: ExplainScore
    patches: Float[np.ndarray, "side side"]
    grid: Grid
    image: UInt8[np.ndarray, "h w"]
    similarity: float
    annotations: tuple[Annotation, ...] = ()

    @property
    def saliency(self) -> Float[np.ndarray, "h w"]:
        """The score of each pixel of the image; NaN where the model did not look."""
        return self.grid.over_image(self.patches, *self.image.shape)

    def mass_inside(self, is_inside: Bool[np.ndarray, "h w"]) -> float | None:
        """Share of the map's mass (`grounding.mass_above_median`) in some pixels of the image.

        None where no patch stands out.
        """
        inside, total = self.grid.count_pixels(is_inside)
        mass = mass_above_median(torch.from_numpy(self.patches).flatten(), total)
        share = float((mass * inside / total.clamp(min=1)).sum())
        return share if float(mass.sum()) else None

    def facts(self) -> dict[str, Any]:
        """What the map says in numbers, for JSON; see docs/explanation.md."""
        height, width = self.image.shape
        y, x = np.indices((height, width))
        where = {
            "image left": 2 * x + 1 < width,
            "image right": 2 * x + 1 > width,
            "upper third": 3 * (2 * y + 1) < 2 * height,
            "middle third": np.abs(3 * (2 * y + 1) - 3 * height) <= height,
            "lower third": 3 * (2 * y + 1) > 4 * height,
        }
        patches = self.grid.on_image(self.patches, height, width)
        top = np.argwhere(patches == np.nanmax(patches))
        centre_px = None
        if len(top) == 1:
            row, column = map(int, top[0])
            x_px, y_px = self.grid.centre_px(row, column, height, width)
            centre_px = {"x": round(x_px, 1), "y": round(y_px, 1)}
        return {
            "phrase": self.phrase,
            "asked": list(self.asked),
            "score": self.score,
            "similarity": round(self.similarity, 5),
            "width_px": width,
            "height_px": height,
            "patches": list(self.patches.shape),
            "lowest": float(np.nanmin(patches)),
            "median": float(np.nanmedian(self.saliency)),
            "highest": float(np.nanmax(patches)),
            "highest_at_px": centre_px,
            "unseen_ratio": float(np.isnan(self.saliency).mean()),
            "mass": {name: _rounded(self.mass_inside(pixels)) for name, pixels in where.items()},
            "annotations": [
                {
                    "finding": annotation.finding,
                    "phrase": annotation.phrase,
                    "area_ratio": _rounded(float(annotation.is_inside.mean())),
                    "mass": _rounded(self.mass_inside(annotation.is_inside)),
                }
                for annotation in self.annotations
            ],
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else round(value, 5)


class Shown(NamedTuple):
    """An image to explain."""

    name: str
    pixels: UInt8[np.ndarray, "h w"]  # 0..255, air dark
    size_px: tuple[int, int] | None = None  # as published, where the pixels are a resized copy
    annotations: Sequence[Annotation] = ()


def explain_image(
    encoder: DualEncoder,
    pixels: UInt8[np.ndarray, "h w"],
    phrase: str,
    score: ExplainScore,
    prompts: PromptSet,
    size_px: tuple[int, int] | None = None,
    annotations: Sequence[Annotation] = (),
) -> Explanation:
    """The answer of one image to a phrase.

    Args:
        encoder: It is asked.
        pixels: 0..255, air dark, of any size; the model sees it as `images.resize_image` makes it.
        phrase: What is asked, in a report's words.
        score: What the map shows.
        prompts: For "prompt_pair", which puts the phrase in a finding's place.
        size_px: Height and width of the image as published, where `pixels` is what
            `images.resize_image` made of it.
        annotations: To be shown and measured beside the map.

    Raises:
        ValueError: When the phrase is empty, the model can read no word of it, or the score needs a
            decoder that is not there.
    """
    warn_of_unread(encoder, phrase)
    prepared = encoder.prepare(pixels)
    patches = maps_of(encoder, [prepared], [phrase], [0], score, prompts)[0]
    grid = map_grid(encoder)
    embedding = encoder.encode_images([prepared])
    text = encoder.encode_texts([phrase])
    made = prompts.texts(phrase) if score == "prompt_pair" else None
    return Explanation(
        phrase=phrase,
        asked=(phrase,) if made is None else (*made.positives, *made.negatives),
        score=score,
        patches=patches.unflatten(0, (grid.side, grid.side)).numpy(),
        grid=grid,
        image=pixels if size_px is None else unsquared(pixels, *size_px, grid.resize),
        similarity=float((embedding * text).sum()),
        annotations=tuple(annotations),
    )


@dataclass(frozen=True)
class ExplainRequest:
    """One image to map, by which model, and where to.

    Attributes:
        model: A run, or a model of others.
        phrase: What to look for, in a report's words.
        out: The picture, .png; the numbers of the map go beside it as .npz.
        command: For what is returned.
        score: What the map shows.
        prompts: For "prompt_pair".
        image: A file; or None, and the image is `image_id` of `folder`.
        folder: A data folder.
        image_id: Of the folder.
        boxes: Name and folder of a data set of boxes or masks, for an image of `folder`.
        root: Of the image files of `folder`, for a model of others.
        overwrite: Whether picture and numbers may be replaced.
        device: Where the model runs; None for the CPU.
    """

    model: ModelRequest
    phrase: str
    out: Path
    command: str
    score: ExplainScore
    prompts: PromptSet
    image: Path | None = None
    folder: Path | None = None
    image_id: str | None = None
    boxes: tuple[str, Path] | None = None
    root: Path | None = None
    overwrite: bool = False
    device: torch.device | None = None


def write_map(request: ExplainRequest) -> dict[str, Any]:
    """What `mmclip explain` does with one image: writes picture and numbers of its map.

    Returns:
        What the map says in numbers, and where it comes from.

    Raises:
        ValueError: When something named is not there, does not fit the rest, or would be replaced.
    """
    encoder = open_dual_encoder(request.model, request.device)
    shown = _image_of(encoder, request)
    arrays = request.out.with_suffix(".npz")
    check_free([request.out, arrays], request.overwrite)
    found = explain_image(
        encoder, shown.pixels, request.phrase, request.score, request.prompts,
        shown.size_px, shown.annotations,
    )  # fmt: skip
    facts = found.facts()
    write_explanation(request.out, found, facts, f"{shown.name}; {encoder.name}")
    return {
        "command": request.command,
        "image": shown.name,
        "model": encoder.name,
        **encoder.weights._asdict(),
        "picture": str(request.out),
        "arrays": str(arrays),
        **facts,
    }


def _image_of(encoder: DualEncoder, request: ExplainRequest) -> Shown:
    """The image that a request names."""
    if request.image is None:
        assert request.folder is not None and request.image_id is not None
        return image_of_folder(
            encoder, request.folder, request.image_id, request.boxes, request.root
        )
    try:
        return Shown(request.image.name, read_image(request.image))
    except ImageError as error:
        raise ValueError(f"--image {request.image}: {error}; give another file") from None


def draw_explanation(found: Explanation, facts: dict[str, Any], caption: str) -> Figure:
    """The picture of an explanation: image, overlay and map, with what they say in words.

    Annotations of findings that the phrase names are outlined; all of them, where it names none.

    Args:
        found: To be drawn.
        facts: As `Explanation.facts` gives them.
        caption: What was asked of what, such as the image's id and the run.
    """
    mass = facts["mass"]
    if None in mass.values():
        where = "No patch responds more than another."
    else:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in mass.items())
        where = f"Of what the map has above its median (amber): {shares}."
    lines = [f"{caption}. Similarity of image and phrase {found.similarity:.3f}.", where]
    named = [
        plain_name(annotation.finding) in plain_name(found.phrase)
        for annotation in found.annotations
    ]
    is_shown = [name or not any(named) for name in named]
    for annotation, shown in zip(facts["annotations"], is_shown, strict=True):
        if shown:
            share = "none" if annotation["mass"] is None else f"{100 * annotation['mass']:.0f} %"
            lines.append(
                f"Marked (blue): {annotation['phrase'] or annotation['finding']}, with "
                f"{100 * annotation['area_ratio']:.1f} % of the image and {share} of that."
            )
    if facts["unseen_ratio"]:
        lines.append(f"{100 * facts['unseen_ratio']:.1f} % of the image was not seen by the model.")
    lines.append(
        "Where the model's score comes from; no proof of a finding, and no medical device."
    )
    return explanation_figure(
        found.image,
        found.patches,
        found.grid,
        f"\u201c{found.phrase}\u201d",
        UNITS[found.score],
        lines,
        [
            annotation.is_inside
            for annotation, shown in zip(found.annotations, is_shown, strict=True)
            if shown
        ],
    )


def image_of_folder(
    encoder: DualEncoder,
    folder: Path,
    image_id: str,
    boxes: tuple[str, Path] | None = None,
    root: Path | None = None,
) -> Shown:
    """An image of a data folder as the model sees it, with its published size.

    For a model of others it is the file, whole, and the size None. An image of a view that the run
    has not learnt gives a warning.

    Args:
        encoder: Says the image size, and of a run the views that it has learnt.
        folder: As `mmclip data build` leaves it.
        image_id: Of the folder.
        boxes: Name and folder of a data set of boxes or masks, see `annotations.read_annotations`.
        root: Of the image files, for a model of others; None asks the data folder.

    Raises:
        ManifestError: When there is no such image, or it is a report alone.
        SourceError: See `annotations.read_annotations`.
    """
    dataset = encoder.open_data([folder], None if root is None else [root])
    ids = [sample.image_id for sample in dataset.samples]
    if image_id not in ids:
        some = ", ".join(ids[:3])
        raise ManifestError(f"{folder} has no image {image_id!r}; its images are {some}, ...")
    row = ids.index(image_id)
    sample = dataset.samples[row]
    if sample.image is None or sample.height_px is None or sample.width_px is None:
        raise ManifestError(f"{image_id} of {folder} is a report without an image; choose another")
    views = encoder.config.data.views if isinstance(encoder, Run) else get_args(View)
    if sample.view not in views:
        logger.warning(
            "image %s of %s %s, and the run was trained on the views %s alone: do not trust its "
            "map; choose an image of one of these views",
            image_id,
            folder,
            "is a lateral" if sample.view == "L" else f"has the view {sample.view}",
            ", ".join(views),
        )
    annotations: list[Annotation] = []
    if boxes is not None:
        annotations = list(read_annotations(*boxes, {image_id: sample}, Counter()))
    image = dataset.image(row)
    if isinstance(image, Path):
        return Shown(image_id, read_image(image), None, annotations)
    check_files(encoder, dataset.select(np.arange(len(dataset)) == row))
    return Shown(image_id, image, (sample.height_px, sample.width_px), annotations)


def write_explanation(out: Path, found: Explanation, facts: dict[str, Any], caption: str) -> None:
    """Writes the picture to `out`, and the numbers of the map beside it as .npz.

    The .npz holds `saliency` (float32, of the image's height and width, NaN where the model did not
    look), `patches` (the map as the model gives it), `phrase` and `score`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = draw_explanation(found, facts, caption)
    with write_atomic(out.with_suffix(".npz")) as file:
        np.savez_compressed(
            file,
            saliency=found.saliency.astype(np.float32),
            patches=found.patches,
            phrase=np.array(found.phrase),
            score=np.array(found.score),
        )
    with write_atomic(out) as file:
        figure.savefig(file, format="png", dpi=160, facecolor=figure.get_facecolor())
