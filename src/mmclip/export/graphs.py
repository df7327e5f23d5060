"""Both encoders as ONNX graphs that give embeddings: batch, and length of texts, are free."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmclip.export.towers import Plain, embed_pixels, embed_tokens, probe_inputs
from mmclip.models.encoders import EncoderError
from mmclip.models.pretrained import first_line

IMAGE_GRAPH, TEXT_GRAPH = "image_encoder.onnx", "text_encoder.onnx"

NEEDS = ("onnx", "onnxscript", "onnxruntime")
"""The packages of the extra `onnx`."""

TOLERANCE = 1e-4
"""How far an embedding of onnxruntime may be from torch's. [chosen: kernels add in any order]"""


def check_onnx() -> None:
    """Refuses at once where the packages are missing.

    Raises:
        ValueError: When one is.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--to onnx needs {', '.join(missing)}, which is not installed; pip install "
            f"'mmclip[onnx]'"
        )


class _Images(nn.Module):
    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.plain, self.model = plain, plain.model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embeddings of images."""
        return embed_pixels(self.plain, pixel_values)


class _Texts(nn.Module):
    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.plain, self.model = plain, plain.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of texts."""
        return embed_tokens(self.plain, input_ids, attention_mask)


def write_graphs(plain: Plain, folder: Path) -> None:
    """Writes image_encoder.onnx and text_encoder.onnx, and compares what they give with torch.

    Inputs are `pixel_values` [batch, 3, side, side], and `input_ids` and `attention_mask`
    [batch, tokens]; outputs are `image_embeds` and `text_embeds` [batch, embed_dim], of length 1.

    Raises:
        EncoderError: When an encoder cannot become a graph, or its graph gives other numbers.
    """
    images, texts = probe_inputs(plain)
    given = {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
    _write(_Images(plain), {"pixel_values": images}, "image_embeds", folder / IMAGE_GRAPH)
    _write(_Texts(plain), given, "text_embeds", folder / TEXT_GRAPH)


def _write(module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    free: dict[str, Any] = {name: {0: batch} for name in inputs}
    if "input_ids" in inputs:
        tokens = torch.export.Dim("tokens", min=2)
        free = {name: {0: batch, 1: tokens} for name in inputs}
    try:
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=free,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise EncoderError(f"{path.name} cannot be made: {first_line(error)}") from None
    _compare(module, inputs, path)


def _compare(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    """The graph on one row and on three, with texts of another length."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in ([0], [1, 0, 1]):
        part = {name: value[rows] for name, value in inputs.items()}
        if "input_ids" in part and len(rows) == 1:
            longest = int(part["attention_mask"].sum())
            part = {name: value[:, :longest] for name, value in part.items()}
        with torch.no_grad():
            mine = module(*part.values())
        (theirs,) = session.run(None, {name: value.numpy() for name, value in part.items()})
        off = (torch.from_numpy(theirs) - mine).abs().max().item()
        if not off <= TOLERANCE:
            raise EncoderError(
                f"{path.name} differs from the model by {off:.2g}, more than {TOLERANCE:g}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its own stages and of what it will change; none of it is ours."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
