"""What the routes answer, in plain calls of `mmclip.load`'s model: so API, CLI and page agree."""

import base64
import io
import logging
import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

import mmclip
from mmclip.api import Model, load
from mmclip.evaluation.protocols import load_protocol, protocol_names
from mmclip.evaluation.results import ResultsError
from mmclip.evaluation.scores import ScoresError
from mmclip.prediction.reference import Reference
from mmclip.prompts import known_prompt_sets, load_prompts, plain_name

if TYPE_CHECKING:
    from mmclip.retrieval.retrieve import ImageIndex

Grey = UInt8[np.ndarray, "h w"]

FEW_PAIRS = 10_000
"""Training pairs below which the page says that a model knows next to nothing. [chosen: the models
that are used for chest X-rays have seen 200,000 and more]"""

KEPT_WARNINGS = 1000
"""Questions whose warnings are kept: more than the prompts that `api.Model` keeps."""

BINS = 24
"""Of the histogram of reference scores."""

NO_DEVICE = "Research software, not a medical device: no answer here is fit for use on patients."


@dataclass(frozen=True)
class ServeRequest:
    """What is served.

    Attributes:
        model: As `mmclip.load` takes it.
        index: Data folders to search.
        reference: Results of the model, for the distribution of its validation scores; None looks
            in and around the run.
        device: As `mmclip.load` takes it.
        rule: Likewise.
    """

    model: str
    index: tuple[Path, ...] = ()
    reference: Path | None = None
    device: str = "auto"
    rule: str | None = None


@dataclass(frozen=True)
class Question:
    """Findings and the prompt set that words them; equal ones may be answered together."""

    findings: tuple[str, ...]
    prompts: str = "default"


@dataclass(frozen=True)
class Answer:
    """The probability of each finding in an image, and what the model could not read of them."""

    findings: tuple[str, ...]
    probabilities: Float[np.ndarray, " k"]
    warnings: tuple[str, ...] = ()


@dataclass
class Service:
    """A model, and what is known beside it. Calls of it are for one thread at a time."""

    request: ServeRequest
    model: Model
    index: "ImageIndex | None" = None
    references: dict[str, dict[str, Reference]] = field(default_factory=dict)  # by prompt set
    _warned: dict[Question, tuple[str, ...]] = field(default_factory=dict)

    def classify(self, question: Question, images: Sequence[Grey]) -> list[Answer]:
        """What the model says of some images.

        Raises:
            ValueError: When a finding cannot be asked for; the message says why.
        """
        with _warnings() as said:
            found = self.model.classify(list(images), question.findings or None, question.prompts)
        # The model warns where it first reads a prompt; who asks later is to know as well.
        warnings = self._warned.setdefault(question, tuple(said))
        if len(self._warned) > KEPT_WARNINGS:
            del self._warned[next(iter(self._warned))]
        return [Answer(found.findings, row, warnings) for row in found.probabilities]

    def explain(
        self, phrase: str, score: str, prompts: str, images: Sequence[Grey]
    ) -> list[tuple[dict[str, Any], Image.Image]]:
        """Facts and overlay of the saliency map of each image.

        Raises:
            ValueError: When the model has no such map, or can read no word of the phrase.
        """
        found = []
        for image in images:
            with _warnings() as said:
                saliency = self.model.explain(image, phrase, score, prompts)
            found.append(({**saliency.facts(), "warnings": said}, saliency.overlay()))
        return found

    def search(
        self, queries: Sequence[tuple[np.ndarray, str | None]], top: int
    ) -> list[list[dict[str, Any]]]:
        """The nearest patients of embeddings, each with a small picture.

        Args:
            queries: Embedding, and the patient who is no answer, if known.
            top: How many patients.

        Raises:
            ValueError: When no data folder is indexed.
        """
        from mmclip.retrieval.retrieve import Query

        index = self._index()
        found = []
        for embedding, patient in queries:
            search = index.search(Query("", embedding, patient=patient), top)
            pictures = [data_url(Image.fromarray(pixels)) for pixels in search.pixels()]
            found.append(
                [
                    {**record, "image": picture}
                    for record, picture in zip(search.records(), pictures, strict=True)
                ]
            )
        return found

    def patient_of(self, content: bytes) -> str | None:
        """The patient whose image of the index is this very file."""
        return self._index().patient_of_file(content)

    def _index(self) -> "ImageIndex":
        if self.index is None:
            raise ValueError(
                "no data folder is indexed; start the server with mmclip serve --index DATA_FOLDER"
            )
        return self.index

    def about_findings(self, answer: Answer, prompts: str) -> list[dict[str, Any]]:
        """What is known of each finding: how training named it, and its reference scores."""
        seen = self.model.seen(answer.findings)
        known = self.references.get(prompts, {})
        return [
            {"finding": name, "seen": seen.get(name)}
            | _reference_facts(known.get(plain_name(name)))
            for name in answer.findings
        ]

    def place_of(self, finding: str, probability: float, prompts: str) -> dict[str, Any] | None:
        """The shares of reference images that lie below a probability."""
        reference = self.references.get(prompts, {}).get(plain_name(finding))
        return None if reference is None else reference.below(probability)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What a client needs to know before it asks."""
        facts = self.model.facts()
        scored = list(self.references.get("default", {}))
        index = None
        if self.index is not None:
            samples = self.index.dataset.samples
            index = {
                "folders": [str(folder) for folder in self.request.index],
                "n_images": len(samples),
                "n_reports": sum(sample.report is not None for sample in samples),
            }
        learnt = self.model.findings
        return {
            "name": self.request.model,
            "version": mmclip.__version__,
            "device": str(self.model.device),
            "image_size": self.model.image_size,
            "has_text_encoder": learnt is None,
            "has_reference": bool(self.references),
            "zeroshot_rule": self.model.zeroshot_rule,
            "facts": facts,
            "caution": _caution(facts),
            "prompt_sets": [
                {"name": name, "description": load_prompts(name).description}
                for name in (known_prompt_sets() if learnt is None else [])
            ],
            "finding_lists": _finding_lists(scored, learnt),
            "index": index,
        }

    # The commands that give the same numbers.

    def predict_command(self, names: Sequence[str], question: Question) -> str:
        """Of `classify`."""
        words = ["mmclip", "predict", "--model", self.request.model, *names]
        for finding in question.findings:
            words += ["--finding", finding]
        if question.prompts != "default":
            words += ["--prompts", question.prompts]
        if self.request.rule is not None:
            words += ["--rule", self.request.rule]
        return shlex.join([*words, "--out", "predictions.csv"])

    def explain_command(self, name: str, phrase: str, score: str) -> str:
        """Of `explain`."""
        words = ["mmclip", "explain", "--model", self.request.model, "--image", name]
        words += ["--phrase", phrase]
        if score != "contribution":
            words += ["--score", score]
        return shlex.join([*words, "--out", "map.png"])

    def search_command(self, image: str | None, phrase: str, top: int) -> str:
        """Of `search`."""
        words = ["mmclip", "retrieve", "--model", self.request.model]
        for folder in self.request.index:
            words += ["--data", str(folder)]
        words += ["--phrase", phrase] if image is None else ["--image", image]
        return shlex.join([*words, "--top", str(top)])


def open_service(request: ServeRequest) -> Service:
    """Loads what is served.

    Raises:
        ValueError: When the model, the index or the reference cannot be read; see `mmclip.load`.
    """
    model = load(request.model, request.device, rule=request.rule)
    index = model.index(request.index) if request.index else None
    return Service(request, model, index, _references(model, request.reference))


def _references(model: Model, results: Path | None) -> dict[str, dict[str, Reference]]:
    """The reference scores by prompt set: of the one that results were made with.

    Raises:
        ResultsError, ScoresError: When the results that were named are of none.
    """
    found, faults = {}, []
    for name in known_prompt_sets():
        try:
            if reference := model.reference(results, name):
                found[name] = reference
        except (ResultsError, ScoresError) as error:
            faults.append(error)
    if results is not None and not found:
        raise faults[0]
    return found


def _reference_facts(reference: Reference | None) -> dict[str, Any]:
    """Of the distribution of validation scores, what a small picture of it needs."""
    if reference is None:
        return {"threshold": None, "reference": None}
    low, high = float(reference.scores[0]), float(reference.scores[-1])
    edges = np.linspace(low, max(high, low + 1e-9), BINS + 1)
    return {
        "threshold": reference.threshold,
        "reference": {
            "n": len(reference.scores),
            "n_present": len(reference.present),
            "n_absent": len(reference.absent),
            "low": low,
            "high": high,
            "present": np.histogram(reference.present, edges)[0].tolist(),
            "absent": np.histogram(reference.absent, edges)[0].tolist(),
        },
    }


def _caution(facts: dict[str, Any]) -> str:
    """What the page says of how far the model is to be trusted."""
    n = facts.get("training pairs")
    if isinstance(n, int) and n < FEW_PAIRS:
        return (
            f"{NO_DEVICE} This model has seen {n:,} image-text pairs and knows next to nothing of "
            f"real chest X-rays."
        )
    return NO_DEVICE


def _finding_lists(scored: Sequence[str], learnt: Sequence[str] | None) -> list[dict[str, Any]]:
    """Lists of findings that can be taken with one choice."""
    if learnt is not None:
        return [{"title": "All that the model has learnt", "findings": list(learnt)}]
    lists = [{"title": "Scored on validation images", "findings": list(scored)}] if scored else []
    for name in known_prompt_sets():
        if len(own := list(load_prompts(name).findings)) > 1:
            lists.append({"title": f"Worded by the prompt set {name}", "findings": own})
    for name in protocol_names():
        protocol = load_protocol(name)
        lists.append({"title": protocol.title, "findings": list(protocol.findings)})
    return lists


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Gathers what this package warns of in this thread, such as words that a model cannot read."""
    said: list[str] = []
    thread = threading.get_ident()

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread and record.levelno >= logging.WARNING:
                text = record.getMessage()
                if text not in said:
                    said.append(text)

    logger, handler = logging.getLogger("mmclip"), Gather()
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def png(image: Image.Image) -> bytes:
    """An image as a PNG, quickly rather than small."""
    file = io.BytesIO()
    options = {} if image.mode == "L" else {"transparency": image.info.get("transparency")}
    image.save(file, "PNG", compress_level=1, **options)
    return file.getvalue()


def data_url(image: Image.Image) -> str:
    """An image as a page can show it from JSON."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
