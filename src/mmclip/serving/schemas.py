"""What the routes take and give, with the examples of the OpenAPI description."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmclip.run import Seen

ScoreName = Literal["contribution", "prompt_pair", "decoder_attention"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ErrorBody(_Body):
    """Why a request is not answered, in one line."""

    error: str = Field(examples=["a.png: the file is empty; give another image"])


class TextsBody(_Body):
    """Texts to embed."""

    texts: list[str] = Field(min_length=1, examples=[["Small left pleural effusion."]])


class Below(_Body):
    """The share of reference images with a lower probability, 0..1; None of a kind without one."""

    all: float | None
    present: float | None
    absent: float | None


class Distribution(_Body):
    """The probabilities that validation images got; the histograms have equal bins."""

    n: int
    n_present: int
    n_absent: int
    low: float
    high: float
    present: list[int]
    absent: list[int]


class FindingAbout(_Body):
    """What is known of a finding, whatever the image."""

    finding: str = Field(examples=["pleural effusion"])
    seen: Seen | None = Field(
        description="How training named it: report, prompt, label or none; null where unknown."
    )
    threshold: float | None = Field(description="That validation images chose.")
    reference: Distribution | None


class ImageScores(_Body):
    """What the model says of an image."""

    name: str = Field(examples=["a.png"])
    width_px: int
    height_px: int
    probabilities: list[float] = Field(description="In the order of `findings`.")
    below: list[Below | None] = Field(description="Where each lies among reference images.")


class ClassifyAnswer(_Body):
    """Probabilities of findings in images."""

    findings: list[FindingAbout]
    images: list[ImageScores]
    warnings: list[str]
    command: str = Field(description="What gives the same numbers in a terminal.")


class ImageEmbeddingsAnswer(_Body):
    """L2-normalised embeddings."""

    names: list[str]
    embeddings: list[list[float]]


class TextEmbeddingsAnswer(_Body):
    """L2-normalised embeddings, in the order given."""

    embeddings: list[list[float]]


class SimilarityAnswer(_Body):
    """Cosines of images (rows) and texts (columns); times logit_scale they are logits."""

    names: list[str]
    texts: list[str]
    similarity: list[list[float]]
    logit_scale: float


class ExplainAnswer(_Body):
    """A saliency map; docs/explanation.md explains each fact."""

    name: str
    facts: dict[str, Any]
    overlay: str = Field(description="PNG of the image's size with transparency, as a data URL.")
    command: str


class FoundPatient(_Body):
    """A patient near the query, by the nearest of their images."""

    rank: int
    similarity: float = Field(description="Cosine.")
    image_id: str
    source: str
    split: str
    view: str
    n_images: int
    report: str | None
    labels: dict[str, float]
    image: str = Field(description="PNG at the model's size, as a data URL.")


class SearchAnswer(_Body):
    """The nearest patients in the indexed folders, best first."""

    found: list[FoundPatient]
    command: str


class PromptSetAbout(_Body):
    """A prompt set that can be named."""

    name: str
    description: str


class FindingList(_Body):
    """Findings that go together."""

    title: str
    findings: list[str]


class IndexAbout(_Body):
    """What can be searched."""

    folders: list[str]
    n_images: int
    n_reports: int


class ModelAnswer(_Body):
    """What is served."""

    name: str
    version: str
    device: str
    image_size: int | None
    has_text_encoder: bool
    has_reference: bool = Field(description="Whether validation scores are known.")
    zeroshot_rule: str | None = Field(
        description="How prompts become scores; null of a fine-tuned model."
    )
    facts: dict[str, Any]
    caution: str
    prompt_sets: list[PromptSetAbout]
    finding_lists: list[FindingList]
    index: IndexAbout | None
    limits: dict[str, float]


class Health(_Body):
    """That the server answers."""

    status: Literal["ok"] = "ok"
