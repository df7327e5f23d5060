"""Saliency maps of a dual encoder: of a run, or of a model of others with patch tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel

from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, normalise
from mmclip.explanation.saliency import (
    ExplainScore,
    grid_of,
    pair_asks,
    random_weights,
    saliency_maps,
)
from mmclip.models.dual_encoder import DualEncoder, probe_image
from mmclip.models.hub_encoder import HubEncoder
from mmclip.models.patch_embeddings import patch_embeddings
from mmclip.patches import Grid, patchify
from mmclip.prompts import PromptSet
from mmclip.run import Run


def map_grid(encoder: DualEncoder) -> Grid:
    """How the patches of a map lie on an image.

    Raises:
        ValueError: When the encoder gives no maps.
    """
    if isinstance(encoder, Run):
        return grid_of(encoder)
    of_others = _with_patches(encoder)
    return patch_embeddings(of_others, of_others.prepare(probe_image())).grid


def check_files(encoder: DualEncoder, dataset: ImageTextDataset) -> None:
    """Refuses copies in a data folder for a model of others, whose maps lie on files.

    Raises:
        ManifestError: When an image is read from a copy, which was made a square by other rules.
    """
    if isinstance(encoder, Run):
        return
    copies = [row for row in range(len(dataset)) if dataset.root(row) is None]
    if copies:
        raise ManifestError(
            f"the file of {dataset.samples[copies[0]].image_id} is not where it was, and maps of "
            f"{encoder.name} are laid over files; give the folder of the images by --root"
        )


def prepared_rows(encoder: DualEncoder, dataset: ImageTextDataset, rows: np.ndarray) -> list[Any]:
    """Some images of a data set as the encoder takes them."""
    return [encoder.prepare(dataset.image(int(row))) for row in rows]


def maps_of(
    encoder: DualEncoder,
    prepared: Sequence[Any],
    phrases: Sequence[str],
    rows: Sequence[int],
    score: ExplainScore,
    prompts: PromptSet,
) -> Float[Tensor, "m n"]:
    """The score of each patch of an image for a phrase, one row a phrase.

    Of a model of others it is the cosine of the phrase and the patch, see `patch_embeddings`.

    Args:
        encoder: It is asked.
        prepared: Images as its `prepare` gives them.
        phrases: As they are read; for "prompt_pair" the names that prompts are made of.
        rows: The image that each phrase is asked of.
        score: What a map shows.
        prompts: For "prompt_pair".

    Raises:
        ValueError: When the encoder gives no maps, or no such score.
    """
    if isinstance(encoder, Run):
        images = normalise(torch.from_numpy(np.stack(prepared)))
        return saliency_maps(encoder, images, phrases, rows, score, prompts)
    of_others = _with_patches(encoder)
    if score == "decoder_attention":
        raise ValueError(
            f"the score decoder_attention is that of the text decoder of a run, and {encoder.name} "
            f"has none; choose contribution or prompt_pair"
        )
    patches = [patch_embeddings(of_others, image).patches for image in prepared]
    if score == "prompt_pair":
        asked = pair_asks(encoder, prompts, phrases)
    else:
        asked = encoder.encode_texts(phrases)
    return torch.stack([patches[row] @ ask for row, ask in zip(rows, asked, strict=True)])


def brightness(encoder: DualEncoder, prepared: Sequence[Any], grid: Grid) -> Float[Tensor, "b n"]:
    """The mean grey of each patch of prepared images, as the encoder reads them normalised."""
    if isinstance(encoder, Run):
        images = normalise(torch.from_numpy(np.stack(prepared)))
    else:
        pixels = np.stack([image["pixel_values"] for image in prepared])
        images = torch.from_numpy(pixels).mean(1, keepdim=True)
    seen = slice(grid.side * grid.patch_size)
    return patchify(images[..., seen, seen], grid.patch_size).mean(-1)


def untrained(encoder: DualEncoder, seed: int) -> DualEncoder:
    """The encoder before any training, on its device."""
    if isinstance(encoder, Run):
        return random_weights(encoder, seed)
    of_others = _with_patches(encoder)
    torch.manual_seed(seed)
    fresh = AutoModel.from_config(of_others.model.config).eval()
    return replace(of_others, model=fresh.to(of_others.device))


def _with_patches(encoder: DualEncoder) -> HubEncoder:
    """A model of others that can have patch tokens.

    Raises:
        ValueError: When it returns embeddings alone.
    """
    if isinstance(encoder, HubEncoder):
        return encoder
    raise ValueError(
        f"{encoder.name} gives no saliency maps: it returns one embedding for an image, and no "
        f"patches"
    )
