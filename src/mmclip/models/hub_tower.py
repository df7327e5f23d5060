"""The image encoder of a dual encoder of transformers, to be trained, and the squares it reads.

Its image processor scales and crops an image as it does for the dual encoder. What the processor
normalises by stands before the first convolution (`image_towers.take_one_channel`), so that images
stay bytes until they are on the device. X-rays are grey: colours become their luminance.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

from mmclip.config import ImageEncoderConfig
from mmclip.data.image_text_dataset import normalise
from mmclip.data.inputs import read_rgb
from mmclip.models.dual_encoder import DualEncoder, probe_image
from mmclip.models.hub_encoder import HubEncoder
from mmclip.models.image_towers import build_image_encoder
from mmclip.models.layout import pooled
from mmclip.models.pretrained import FORWARD_FAULTS, first_line

TOLERANCE = 1e-3
"""How far the pooled vector of the trained encoder may be from that of the dual encoder. [chosen:
above the rounding of float32 in a large model, below what another normalisation changes]"""


@dataclass(frozen=True)
class ProcessedSquare:
    """The grey square that a model's own image processor makes of an image before it normalises."""

    processor: BaseImageProcessor

    def __call__(self, image: object) -> UInt8[np.ndarray, "s s"]:
        """Of any `inputs.ImageInput`.

        Raises:
            ImageError: When it cannot be read.
        """
        found: Any = self.processor(
            images=read_rgb(image), do_rescale=False, do_normalize=False, return_tensors="np"
        )
        rgb = np.asarray(found["pixel_values"][0]).transpose(1, 2, 0)
        return np.asarray(Image.fromarray(rgb).convert("L"))

    def config(self) -> dict[str, Any]:
        """All that it takes to make it again, for JSON."""
        return json.loads(self.processor.to_json_string())

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "ProcessedSquare":
        """That of a saved configuration."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / IMAGE_PROCESSOR_NAME).write_text(json.dumps(config), "utf-8")
            return cls(AutoImageProcessor.from_pretrained(folder, backend="pil"))


def square_of_tower(encoder: DualEncoder) -> ProcessedSquare:
    """What makes the squares that `build_tower_of` is trained on.

    Raises:
        ValueError: When the encoder has no image encoder that can be trained here, by name.
    """
    probe = "take --method probe, which reads embeddings"
    if not isinstance(encoder, HubEncoder):
        raise ValueError(
            f"--method full trains weights, and {encoder.name} is a function of yours, which gives "
            f"embeddings alone; {probe}"
        )
    square = ProcessedSquare(encoder.prepare.processor)
    image = encoder.prepare(probe_image())["pixel_values"]
    if image.ndim != 3 or image.shape[-1] != image.shape[-2]:
        raise ValueError(
            f"--method full trains on square images, and the image processor of {encoder.name} "
            f"gives patches of {list(image.shape)}; {probe}"
        )
    try:
        tower = build_tower_of(encoder).eval()
        with torch.inference_mode():
            grey = torch.from_numpy(square(probe_image()).copy())[None]
            ours = pooled(tower(pixel_values=normalise(grey)), tower)
            whole: Any = encoder.model
            theirs = whole.vision_model(pixel_values=torch.from_numpy(image)[None].to(whole.device))
            off = (ours - theirs.pooler_output.flatten(1).cpu()).abs().max().item()
    except FORWARD_FAULTS as error:
        raise ValueError(
            f"--method full cannot train the image encoder of {encoder.name} "
            f"({first_line(error)}); {probe}"
        ) from error
    if not off <= TOLERANCE:
        raise ValueError(
            f"--method full cannot train the image encoder of {encoder.name}: its pooled vector of "
            f"one image moves by {off:.2g} once images are normalised behind its image processor; "
            f"{probe}"
        )
    return square


def build_tower_of(encoder: HubEncoder) -> PreTrainedModel:
    """A new copy of the image encoder with its pretrained weights, which reads grey squares."""
    config = ImageEncoderConfig(pretrained=encoder.source)
    return build_image_encoder(config, encoder.image_size, folds=False)
