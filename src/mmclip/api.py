"""MMCLIP from Python: `mmclip.load(path)` gives a `Model` that embeds, classifies and explains.

import mmclip

model = mmclip.load("runs/first")
images = model.encode_images(["a.png", "b.dcm", pil_image, uint16_array])
texts = model.encode_texts(["Small left pleural effusion."])
model.similarity(images, texts)
result = model.classify(["a.png"], findings=["pleural effusion"])
saliency = model.explain("a.png", "pneumothorax")
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from PIL import Image
from torch import Tensor

from mmclip.data.inputs import ImageInput, ImageInputs, name_of, read_input
from mmclip.data.pixels import ImageError
from mmclip.data.text import check_text
from mmclip.embed import check_texts
from mmclip.files import write_atomic
from mmclip.finetuning.saved import FineTuned
from mmclip.model_loading import ModelRequest
from mmclip.models.dual_encoder import DualEncoder, ZeroshotRule, rule_named
from mmclip.prediction.decisions import decide, read_thresholds
from mmclip.prediction.model import (
    EncodedImages,
    ImageInputError,
    Scorer,
    Skipped,
    device_named,
    encode_inputs,
    encoder_of,
    open_model,
    prompt_set_of,
    scorer_of,
)
from mmclip.prediction.reference import Reference, find_reference, read_reference
from mmclip.prediction.tables import prediction_table
from mmclip.progress import counted
from mmclip.prompts import PromptSet, plain_name
from mmclip.run import Seen

if TYPE_CHECKING:
    from mmclip.explanation.explain import Explanation
    from mmclip.explanation.saliency import ExplainScore
    from mmclip.retrieval.retrieve import ImageIndex

__all__ = [
    "Classification",
    "ImageEmbeddings",
    "ImageInput",
    "ImageInputError",
    "ImageInputs",
    "Model",
    "Saliency",
    "Skipped",
    "load",
]

logger = logging.getLogger(__name__)

IMPORTED_BY = os.getpid()

KEPT_SCORERS = 16
"""Embedded prompts that a model keeps. [chosen: a few lists of findings by a few prompt sets]"""

Prompts = str | Path | PromptSet | Mapping[str, Any]
"""A prompt set by name, by the path of its file, or by its content; see `prompts.own_prompts`."""


class ImageEmbeddings(np.ndarray):
    """float32 [n, e], L2-normalised: an array that also knows what it is of.

    Attributes:
        image_ids: Of the rows; None of an array that was made of this one.
        skipped: The images that could not be read, with `errors="skip"`.
    """

    image_ids: tuple[str, ...] | None
    skipped: tuple[Skipped, ...]

    def __array_finalize__(self, other: object) -> None:
        """Of numpy: a part or a sum of these is of other rows."""
        self.image_ids, self.skipped = None, ()


@dataclass(frozen=True)
class Classification:
    """What a model says of some images.

    Attributes:
        probabilities: float64 [n, k].
        findings: Of the columns.
        image_ids: Of the rows: a path as it was given, else "image" and its number from 0.
        thresholds: By finding; None where no results were given, and of a finding for which they
            hold none.
        skipped: The images that could not be read, with `errors="skip"`.
    """

    probabilities: Float[np.ndarray, "n k"]
    findings: tuple[str, ...]
    image_ids: tuple[str, ...]
    thresholds: dict[str, float | None] | None = None
    skipped: tuple[Skipped, ...] = ()

    @property
    def decisions(self) -> list[list[bool | None]] | None:
        """Whether each probability reaches its threshold; None without thresholds."""
        if self.thresholds is None:
            return None
        return decide(self.probabilities, [self.thresholds[name] for name in self.findings])

    def to_csv(self, path: str | Path) -> Path:
        """Writes the table that `mmclip predict` writes, and returns its path."""
        with prediction_table(Path(path), self.findings, self.thresholds) as table:
            for image_id, row in zip(self.image_ids, self.probabilities, strict=True):
                table.write([image_id], row)
        return Path(path)


@dataclass(frozen=True)
class Saliency:
    """Which parts of an image match a phrase.

    Attributes:
        image_id: What the image is called in the picture.
        phrase: That was asked.
        similarity: Cosine of the embeddings of image and phrase.
    """

    image_id: str
    phrase: str
    similarity: float
    _found: "Explanation" = field(repr=False)

    @property
    def values(self) -> Float32[np.ndarray, "h w"]:
        """The score of each pixel of the image; NaN where the model did not look."""
        return self._found.saliency.astype(np.float32)

    def facts(self) -> dict[str, Any]:
        """What the map says in numbers; docs/explanation.md explains each."""
        return self._found.facts()

    def overlay(self) -> Image.Image:
        """The map alone, as large as the image, to be laid over it: mode "P" with transparency.

        Opaque where a patch answers most, clear where it answers less than half of them do.
        """
        from mmclip.evaluation.pictures import heat_overlay

        found = self._found
        return heat_overlay(found.patches, found.grid, *found.image.shape)

    def save(self, path: str | Path) -> Path:
        """Writes the picture (.png), or the values (.npy), and returns the path.

        Raises:
            ValueError: When the path ends otherwise.
        """
        from mmclip.explanation.explain import draw_explanation

        out = Path(path)
        if out.suffix.lower() not in (".png", ".npy"):
            raise ValueError(f"{out} ends in neither .png nor .npy; name a picture or an array")
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix.lower() == ".npy":
            with write_atomic(out) as file:
                np.save(file, self.values)
            return out
        figure = draw_explanation(self._found, self.facts(), self.image_id)
        with write_atomic(out) as file:
            figure.savefig(file, format="png", dpi=160, facecolor=figure.get_facecolor())
        return out


class Model:
    """A trained model: a run, a fine-tuned result, or a model of others."""

    def __init__(self, model: DualEncoder | FineTuned, batch_size: int | None = None) -> None:
        """Takes a model that is read and on its device; `load` does both.

        Args:
            model: See `prediction.model.open_model`.
            batch_size: Of a fine-tuned model: images that are encoded together.
        """
        self._model, self._batch_size = model, batch_size
        self._encoder = encoder_of(model, batch_size)
        self._scorers: dict[tuple[tuple[str, ...], str], Scorer] = {}

    def __reduce__(self) -> "tuple[type[Model], tuple[DualEncoder | FineTuned, int | None]]":
        """For another process; prompts are embedded anew there."""
        return Model, (self._model, self._batch_size)

    def __repr__(self) -> str:
        """Name, kind and device."""
        return f"Model({self.name!r}, {self.device})"

    @property
    def name(self) -> str:
        """For people, such as "first at step 600" or "CLIPModel xray-clip"."""
        if isinstance(self._model, FineTuned):
            return f"{self._model.folder}, {self._model.method} fine-tuned"
        return self._model.name

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._encoder.device

    @property
    def image_size(self) -> int | None:
        """Side of the square that an image becomes, px; None where an own model does not say."""
        return self._model.image_size

    @property
    def findings(self) -> tuple[str, ...] | None:
        """What a fine-tuned model scores; None of others, which score any finding by prompts."""
        return self._model.findings if isinstance(self._model, FineTuned) else None

    @property
    def logit_scale(self) -> float:
        """The inverse temperature that multiplies similarities in training and classification."""
        return self._dual("logit_scale").scoring.scale

    @property
    def zeroshot_rule(self) -> ZeroshotRule | None:
        """By which `classify` scores; None of a fine-tuned model. See docs/models.md."""
        return None if isinstance(self._model, FineTuned) else self._model.scoring.rule

    def encode_images(self, images: ImageInputs, errors: str = "raise") -> ImageEmbeddings:
        """The embeddings of images.

        Args:
            images: One, several, or a generator; `ImageInput` says of what kinds and ranges.
            errors: "raise" stops at an image that cannot be read, and names it; "skip" leaves it
                out, with its reason in `.skipped`.

        Returns:
            float32 [n, e], L2-normalised, in the order given.

        Raises:
            ImageInputError: With errors="raise".
            ValueError: Of a fine-tuned model, which has no space that images share with texts.
        """
        self._dual("encode_images")
        found = encode_inputs(self._encoder, images, errors)
        _say_skipped(found)
        embeddings = found.vectors.numpy().view(ImageEmbeddings)
        embeddings.image_ids, embeddings.skipped = found.image_ids, found.skipped
        return embeddings

    def encode_texts(self, texts: str | Iterable[object]) -> Float32[np.ndarray, "m e"]:
        """The embeddings of texts: float32 [m, e], L2-normalised, in the order given.

        Raises:
            ValueError: Of a fine-tuned model, which has no text encoder, and of a text that is
                empty, or of which the model knows no word.
            TypeError: When it is neither a text nor several.
        """
        encoder = self._dual("encode_texts")
        several = [
            check_text(text, f"text {number}")
            for number, text in enumerate(_several(texts, "a text"))
        ]
        check_texts(encoder, several)
        if not several:
            return np.zeros((0, encoder.embed_dim), np.float32)
        return encoder.encode_texts(several).numpy()

    def similarity(
        self, images: np.ndarray | Tensor, texts: np.ndarray | Tensor
    ) -> Float32[np.ndarray, "n m"]:
        """The cosine of each image with each text, -1..1; times `logit_scale` it is a logit.

        Args:
            images: Of `encode_images`, or means of them; so is the width. Of any length.
            texts: Of `encode_texts`, likewise.

        Raises:
            TypeError: When they are no embeddings.
            ValueError: When they are of other widths, not finite, or zero.
        """
        try:
            left, right = (np.atleast_2d(np.asarray(each, np.float32)) for each in (images, texts))
        except (TypeError, ValueError):
            raise TypeError(
                "similarity compares embeddings; give those of encode_images and encode_texts"
            ) from None
        if left.shape[1] != right.shape[1]:
            raise ValueError(
                f"embeddings of {left.shape[1]} and {right.shape[1]} numbers do not compare; give "
                f"those of one model"
            )
        left, right = (
            each / _lengths(each, what) for each, what in ((left, "images"), (right, "texts"))
        )
        return left @ right.T

    def classify(
        self,
        images: ImageInputs,
        findings: str | Sequence[str] | None = None,
        prompts: Prompts = "default",
        thresholds: str | Path | None = None,
        errors: str = "raise",
    ) -> Classification:
        """How probable findings are in images, by the numbers of `mmclip zeroshot` and `predict`.

        Args:
            images: As for `encode_images`.
            findings: In order; None takes all that a fine-tuned model has learnt.
            prompts: What stands for a finding; of no use to a fine-tuned model.
            thresholds: Results (results.json) of the same model, whose validation images chose
                thresholds.
            errors: As for `encode_images`.

        Raises:
            ImageInputError: With errors="raise".
            ValueError: When no finding is named, or a fine-tuned model has not learnt it.
            TypeError: When thresholds or prompts are something else.
            PromptError: When the prompts of a finding cannot stand for it.
            ResultsError: When the thresholds are of another model or other prompts.
        """
        named = [] if findings is None else _several(findings, "a finding")
        prompt_set = prompt_set_of(prompts)
        scorer = self._scorer(named, prompt_set)
        chosen = None
        if thresholds is not None:
            if not isinstance(thresholds, str | os.PathLike):
                raise TypeError(
                    f"thresholds={thresholds!r} is no path of a results.json; give one whose "
                    f"validation images chose thresholds, or compare .probabilities with your own"
                )
            chosen = read_thresholds(Path(thresholds), self._model, prompt_set, scorer.findings)
        found = encode_inputs(scorer.encoder, images, errors)
        _say_skipped(found)
        return Classification(
            scorer.probabilities(found.vectors),
            scorer.findings,
            found.image_ids,
            chosen,
            found.skipped,
        )

    def explain(
        self,
        image: ImageInput,
        phrase: str,
        score: str = "contribution",
        prompts: Prompts = "default",
    ) -> Saliency:
        """Which parts of an image match a phrase, in the image's own pixels.

        Args:
            image: One image.
            phrase: In a report's words.
            score: What the map shows: "contribution", "prompt_pair" or "decoder_attention".
            prompts: For "prompt_pair", which puts the phrase in a finding's place.

        Raises:
            ImageInputError: When the image cannot be read.
            ValueError: When the model can read no word of the phrase, or has no text encoder.
        """
        from mmclip.explanation.explain import UNITS, explain_image

        encoder = self._dual("explain")
        kinds: dict[str, ExplainScore] = {name: name for name in UNITS}
        kind = kinds.get(score)
        if kind is None:
            raise ValueError(f"score={score!r} is none of {', '.join(UNITS)}")
        image_id = name_of(image, 0)
        try:
            pixels = read_input(image)
        except ImageError as error:
            raise ImageInputError(f"{image_id}: {error}; give another image") from None
        found = explain_image(encoder, pixels, phrase, kind, prompt_set_of(prompts))
        return Saliency(image_id, phrase, found.similarity, found)

    def reference(
        self, results: str | Path | None = None, prompts: Prompts = "default"
    ) -> dict[str, Reference]:
        """What the model gives validation images, by plain name of the finding.

        Args:
            results: results.json of `mmclip zeroshot` or `mmclip finetune`, or its folder; None
                looks in and around the run, and gives {} where there are none.
            prompts: As for `classify`.

        Raises:
            ResultsError: When the results are of another model or other prompts, or damaged.
            ScoresError: When the scores beside them are, or have no validation image.
        """
        prompt_set = prompt_set_of(prompts)
        path = find_reference(self._model, prompt_set) if results is None else Path(results)
        return {} if path is None else read_reference(path, self._model, prompt_set)

    def seen(self, findings: Sequence[str]) -> dict[str, Seen]:
        """How training named each finding (`dual_encoder.Seen`); empty where it is not known."""
        if isinstance(self._model, FineTuned):
            known = {plain_name(name) for name in self._model.findings}
            return {name: "label" for name in findings if plain_name(name) in known}
        return self._model.seen(findings)

    def facts(self) -> dict[str, str | int | float]:
        """What the weights follow from, as far as the model says: steps, training pairs, data."""
        if isinstance(self._model, FineTuned):
            return {"method": self._model.method, "findings": len(self._model.findings)}
        return self._model.facts()

    def index(self, folders: str | Path | Sequence[str | Path]) -> "ImageIndex":
        """The images of one data folder or several, to be searched by `ImageIndex.search`.

        Raises:
            ManifestError: When a folder is unfinished, or holds no image.
            ValueError: Of a fine-tuned model, or of no folder.
        """
        from mmclip.retrieval.retrieve import open_index

        several = [folders] if isinstance(folders, str | Path) else folders
        if not several:
            raise ValueError("no data folder is named; give one or more of `mmclip data build`")
        return open_index(self._dual("index"), [Path(folder) for folder in several])

    def _scorer(self, findings: Sequence[str], prompts: PromptSet) -> Scorer:
        """See `scorer_of`. The last few are kept: prompts take a large text encoder seconds."""
        _fit_to_process()
        key = (tuple(findings), prompts.hash)
        scorer = self._scorers.pop(key, None)
        if scorer is None:
            scorer = scorer_of(self._model, findings, prompts, self._batch_size)
        self._scorers[key] = scorer
        if len(self._scorers) > KEPT_SCORERS:
            del self._scorers[next(iter(self._scorers))]
        return scorer

    def _dual(self, asked: str) -> DualEncoder:
        """The dual encoder, for what needs its text encoder or its joint space.

        Raises:
            ValueError: When the model is fine-tuned.
        """
        _fit_to_process()
        if not isinstance(self._model, FineTuned):
            return self._model
        raise ValueError(
            f"{asked} needs an image and a text encoder, and {self._model.folder} is a "
            f"fine-tuned classifier without a text encoder; load the run that it was made of, or "
            f"use classify"
        )


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    rule: str | None = None,
) -> Model:
    """Loads a model.

    Args:
        path: Folder of a run of `mmclip pretrain`, of one of its checkpoints, of a result of
            `mmclip finetune`, or of a dual encoder of transformers; the id of one on the hub; or
            module:function. See docs/models.md.
        device: "auto" takes the GPU that torch sees, else the CPU; or a name such as "cpu".
        batch_size: Images that are encoded together; by default what fits. The numbers of one
            batch size are equal to the last digit, those of two are equal to rounding.
        rule: How `classify` scores: "prompt_pair", "similarity" or "sigmoid"; None takes what is
            usual for the model.

    Raises:
        CheckpointError: When the folder holds no weights, or damaged ones.
        EncoderError: When a model of others cannot be had, or is no pair of encoders.
        ValueError: When there is no such device or rule.
    """
    if not isinstance(path, str | os.PathLike) or not str(path).strip():
        raise TypeError(
            f"{path!r} is no path of a model; give the folder of a run, the id of a model of "
            f"transformers on the hub, or module:function"
        )
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size={batch_size!r} is no number of images; give 1 or more")
    named = None if rule is None else rule_named(rule)
    request = ModelRequest(str(path), named, batch_size=batch_size)
    return Model(open_model(request, device_named(device)), batch_size)


def _fit_to_process() -> None:
    """One thread in a process that was forked: those of the process before it are not there, and
    OpenMP waits for them for ever."""
    if os.getpid() != IMPORTED_BY and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def _several(given: object, what: str) -> list[Any]:
    """One name or text, or several, as a list.

    Raises:
        TypeError: When it is neither; the keys of a mapping are not meant.
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, Iterable) and not isinstance(given, bytes | bytearray | Mapping):
        return list(given)
    raise TypeError(f"{given!r} is neither {what} nor several; give one, or a list of them")


def _lengths(rows: Float32[np.ndarray, "n e"], what: str) -> Float32[np.ndarray, "n 1"]:
    """The length of each embedding.

    Raises:
        ValueError: When one has no direction.
    """
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if bad := np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0))).tolist():
        raise ValueError(f"row {bad[0]} of the {what} is zero or not finite; embed it anew")
    return lengths


def _say_skipped(found: EncodedImages) -> None:
    """One warning for all images that were left out."""
    if found.skipped:
        some = "; ".join(map(str, found.skipped[:3]))
        more = len(found.skipped) - 3
        rest = f"; and {more} more" if more > 0 else ""
        n = counted(len(found.skipped), "image", ("is", "are"))
        logger.warning("%s skipped: %s%s", n, some, rest)
