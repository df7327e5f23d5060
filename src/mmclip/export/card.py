"""README.md of an export: the hub's metadata, code that runs, and what is known of the weights.

It names no path, no patient and no image of the machine that made it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from mmclip.checkpoint import code_version
from mmclip.config_io import RESOURCES
from mmclip.evaluation.results import RunResults
from mmclip.export.towers import Plain
from mmclip.models.encoders import image_layout, text_layout
from mmclip.run import Run

CARD_FILE = "README.md"

TAGS = ("chest-x-ray", "radiology", "medical", "contrastive", "clip", "mmclip")

LIBRARIES = {"hf": "transformers", "onnx": "onnx", "vision": "transformers", "text": "transformers"}

TASKS = {
    "hf": "zero-shot-image-classification",
    "onnx": "zero-shot-image-classification",
    "vision": "image-feature-extraction",
    "text": "feature-extraction",
}
"""What an export does, by the hub's names."""


def write_card(
    path: Path,
    name: str,
    form: str,
    run: Run,
    plain: Plain,
    results: RunResults | None,
    licence: str,
) -> None:
    """Writes README.md.

    Args:
        path: Of README.md.
        name: Of the model.
        form: See `export.Form`.
        run: That is exported.
        plain: As it is exported.
        results: Of this run, for metadata and a table; None says that there are none.
        licence: Of the weights.
    """
    image, words = image_layout(plain.model.vision_model), text_layout(plain.model.text_model)
    metadata = ModelCardData(
        model_name=name,
        license=licence,
        library_name=LIBRARIES[form],
        pipeline_tag=TASKS[form],
        tags=list(TAGS),
        eval_results=None if results is None else _eval_results(results),
    )
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.filters["interval"] = lambda ci: "–" if ci is None else f"{ci[0]:.3f}, {ci[1]:.3f}"
    template = (RESOURCES / "templates" / "export_card.md").read_text("utf-8")
    text = environment.from_string(template).render(
        name=name, form=form, plain=plain, run=run, r=results, licence=licence,
        model=plain.model, code=_code_of(plain), versions=code_version(),
        metadata=metadata.to_yaml(), layouts=(image, words), reads=words.reads,
    )  # fmt: skip
    path.write_text(text.rstrip() + "\n", "utf-8")


def _eval_results(results: RunResults) -> list[EvalResult]:
    """The metrics as the hub reads them: macro figures, then the AUROC of each finding."""
    protocol = results.protocol
    about: dict[str, Any] = {
        "task_type": "zero-shot-image-classification",
        "dataset_type": "chest-x-rays" if protocol is None else protocol.id,
        "dataset_name": "own images" if protocol is None else protocol.title,
        "dataset_split": "test" if protocol is None else None,
    }
    macro = (("roc_auc", "macro AUROC", results.macro_auroc),)
    macro += (("average_precision", "macro AUPRC", results.macro_auprc),)
    rows = [("roc_auc", f"AUROC, {row.finding}", row.auroc) for row in results.findings]
    return [
        EvalResult(metric_type=kind, metric_name=name, metric_value=round(value, 4), **about)
        for kind, name, value in (*macro, *rows)
        if value is not None
    ]


def _code_of(plain: Plain) -> dict[str, str]:
    """What the code of a card says of the two encoders: their classes, and how they pool."""
    vision, text = plain.model.vision_model, plain.model.text_model
    of_image, of_text = image_layout(vision), text_layout(text)
    is_grid = vision.config.model_type in GRIDS
    image_pools = {
        "pooler": "output.pooler_output.flatten(1)",
        "cls": "output.last_hidden_state[:, 0]",
        "mean": "output.last_hidden_state.flatten(2).mean(2)"
        if is_grid
        else f"output.last_hidden_state[:, {of_image.n_prefix}:].mean(1)",
    }
    text_pools = {
        "pooler": "output.pooler_output",
        "cls": "output.last_hidden_state[:, 0]",
        "mean": "(output.last_hidden_state * mask).sum(1) / mask.sum(1)",
    }
    return {
        "vision_class": _class_of(vision),
        "text_class": _class_of(text),
        "image_vector": image_pools[of_image.pooling],
        "text_vector": text_pools[of_text.pooling],
    }


GRIDS: Sequence[str] = ("resnet", "convnextv2", "convnext", "regnet")
"""Models whose features are [b, d, h, w]."""


def _class_of(encoder: Any) -> str:
    """The class to load an encoder by: AutoModel, where that gives this encoder and no other."""
    found = MODEL_MAPPING.get(type(encoder.config), None)
    return "AutoModel" if found is type(encoder) else type(encoder).__name__
