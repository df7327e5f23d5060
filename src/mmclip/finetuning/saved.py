"""Fine-tuned weights: written with all that it takes to score images by them, and read again.

A result holds checkpoints/step_.../ with model.safetensors and meta.json: of full fine-tuning the
encoder and its head, of a probe the encoder and its logistic regressions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmclip.checkpoint import (
    CheckpointError,
    checkpoint_meta,
    find_checkpoint,
    put_weights,
    read_weights,
    write_checkpoint,
)
from mmclip.config import ResizeMode
from mmclip.evaluation.baselines import LogisticFit
from mmclip.model_loading import ModelRequest, open_dual_encoder
from mmclip.models.classifier import Classifier, Features, ImageEncoder
from mmclip.models.dual_encoder import DualEncoder, sigmoid
from mmclip.models.encoders import image_layout, rebuild_encoder
from mmclip.models.hub_tower import ProcessedSquare

PROBE_STEP = 0
"""A probe is fitted at once: its one checkpoint is that of no step."""


class Probe(nn.Module):
    """An image encoder as it was, and a logistic regression a finding on its vector.

    The encoder of others is not copied: there is None.
    """

    def __init__(self, image_encoder: ImageEncoder | None, n_findings: int, width: int) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        shape = (n_findings, width)
        for name in ("mean", "std", "weight"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(n_findings, dtype=torch.float64))

    def fit(self) -> LogisticFit:
        """The regressions, in float64, as they were fitted."""
        mean, std, weight, bias = (
            self.get_buffer(name).cpu().numpy() for name in ("mean", "std", "weight", "bias")
        )
        return LogisticFit(mean, std, weight, bias)

    def put(self, fit: LogisticFit) -> None:
        """Takes the regressions over."""
        values = {"mean": fit.mean, "std": fit.std, "weight": fit.weight, "bias": fit.bias}
        for name, value in values.items():
            self.get_buffer(name).copy_(torch.from_numpy(value))


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model as read.

    Attributes:
        folder: Its checkpoint.
        model: In evaluation mode, on the CPU.
        method: Full fine-tuning, or a probe.
        findings: The columns of its scores.
        image_size: Side of the images that it reads, px.
        resize: How they become squares.
        meta: What meta.json says.
        others: The model of others whose embeddings the probe reads, in place of an encoder.
        square: What makes a square of an image, where the encoder is of others; else `resize`.
    """

    folder: Path
    model: Classifier | Probe
    method: Literal["full", "probe"]
    findings: tuple[str, ...]
    image_size: int | None
    resize: ResizeMode
    meta: dict[str, Any]
    others: DualEncoder | None = None
    square: ProcessedSquare | None = None

    def encode(self, image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b d"]:
        """What `probabilities` reads: logits, or of a probe the vectors of its encoder."""
        if isinstance(self.model, Classifier):
            return self.model(image)[:, : self.model.n_findings]
        assert self.model.image_encoder is not None, "a model of others reads images itself"
        return self.model.image_encoder(image)

    def probabilities(self, encoded: Float[Tensor, "n d"]) -> Float[np.ndarray, "n k"]:
        """The probability of each finding."""
        if isinstance(self.model, Classifier):
            return sigmoid(encoded)
        return self.model.fit().scores(encoded.numpy())


def save_probe(
    folder: Path, encoder: ImageEncoder | None, fit: LogisticFit, metadata: Mapping[str, Any]
) -> Path:
    """Writes a probe's weights into the folder of its result.

    Args:
        folder: Of the result.
        encoder: Whose vectors were read; None of a model of others, which `metadata` names.
        fit: On them.
        metadata: Entries of meta.json; see `load_fine_tuned` for those that are needed.
    """
    probe = Probe(encoder, *fit.weight.shape).cpu()
    probe.put(fit)
    written = write_checkpoint(folder, PROBE_STEP, probe, {}, metadata, keep=1)
    (written / "trainer.pt").unlink()  # nothing goes on from a probe
    return written


def is_fine_tuned(meta: Mapping[str, Any]) -> bool:
    """Whether meta.json of a checkpoint is of fine-tuned weights, which have no text encoder."""
    return "text_config" not in meta and "findings" in meta


def _probe_of_others(folder: Path, meta: dict[str, Any], device: torch.device | None) -> FineTuned:
    """A probe on a model of others, which is opened by its name.

    Raises:
        CheckpointError: When that model is not what it was.
        EncoderError: When it cannot be had.
    """
    others = open_dual_encoder(ModelRequest(meta["dual_encoder"]), device)
    if others.weights.recipe_hash != meta["dual_encoder_hash"]:
        raise CheckpointError(
            f"{folder} is a probe on {meta['dual_encoder']}, which has other weights or another "
            f"processor by now; run `mmclip finetune` again into a new folder"
        )
    model = Probe(None, len(meta["findings"]), others.embed_dim)
    put_weights(model, read_weights(folder, meta), folder)
    size = others.image_size
    findings = tuple(meta["findings"])
    return FineTuned(folder, model.eval(), "probe", findings, size, "squash", meta, others)


def load_fine_tuned(path: Path, device: torch.device | None = None) -> FineTuned:
    """Reads the weights that `mmclip finetune` left in a result's folder. Executes no pickle.

    Args:
        path: The folder of the result, or of its checkpoint.
        device: Where a model of others goes whose embeddings a probe reads.

    Raises:
        CheckpointError: When there are none, files were changed, or an older version wrote them,
            which did not say all that scoring needs.
    """
    folder = find_checkpoint(path)
    meta = checkpoint_meta(folder)
    if "dual_encoder" in meta:
        return _probe_of_others(folder, meta, device)
    needed = (
        "method",
        "findings",
        "features",
        "image_size",
        "resize",
        "embed_dim",
        "vision_config",
    )
    if missing := [key for key in needed if key not in meta]:
        raise CheckpointError(
            f"{folder} does not say {', '.join(missing)}, which scoring needs; run `mmclip "
            f"finetune` again into a new folder"
        )
    features: Features = meta["features"]
    processor = meta.get("image_processor")
    backbone = rebuild_encoder(meta["vision_config"])
    projection = None
    if meta["embed_dim"] is not None:
        projection = nn.Linear(image_layout(backbone).width, meta["embed_dim"], bias=False)
    encoder = ImageEncoder(backbone, features, projection)
    n_findings = len(meta["findings"])
    is_probe = meta["method"] == "probe"
    model = (
        Probe(encoder, n_findings, encoder.width)
        if is_probe
        else Classifier(encoder, n_findings, meta.get("multiclass", ()))  # older ones have none
    )
    put_weights(model, read_weights(folder, meta), folder)
    return FineTuned(
        folder=folder,
        model=model.eval(),
        method="probe" if is_probe else "full",
        findings=tuple(meta["findings"]),
        image_size=meta["image_size"],
        resize=meta["resize"],
        meta=meta,
        square=None if processor is None else ProcessedSquare.of_config(processor),
    )
