"""Embeddings of images, texts and prompts by a dual encoder."""

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, normalise
from mmclip.data.ingest.shards import n_cores
from mmclip.data.pixels import ImageError
from mmclip.data.text import check_text, tokenise
from mmclip.models.dual_encoder import DualEncoder, PromptEmbeddings, images_at_once
from mmclip.models.mmclip import MMCLIP
from mmclip.progress import progress
from mmclip.prompts import PromptSet

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 4096
"""Texts that are looked through at a time. [chosen: some megabytes of tokens]"""


def batch_size_of(dataset: ImageTextDataset, device: torch.device) -> int:
    """See `images_at_once`."""
    return images_at_once(device, dataset.pixels(np.zeros(1, np.int64)).shape[-1])


@torch.inference_mode()
def encode_batch(
    encode: Callable[[Float[Tensor, "b 1 h w"]], Float[Tensor, "b d"]],
    pixels: UInt8[Tensor, "n h w"],
    device: torch.device,
    batch_size: int,
) -> Float[Tensor, "n d"]:
    """Vectors of up to `batch_size` images, on the CPU.

    A batch is filled up with its first image: kernels of matrix products add in an order that
    depends on the size of the batch, and an image must have the same numbers to the last digit
    whatever stands beside it.

    Args:
        encode: Of images in model space, on the device.
        pixels: 0..255; 1 to `batch_size` images.
        device: Where the model is.
        batch_size: See `images_at_once`.
    """
    n = len(pixels)
    if n < batch_size:
        pixels = torch.cat([pixels, pixels[:1].expand(batch_size - n, -1, -1)])
    return encode(normalise(pixels.to(device, non_blocking=True)))[:n].float().cpu()


BATCHES_AHEAD = 2
"""Batches of images that are read while another is encoded: memory stays flat. [chosen]"""


def embed_images(
    encoder: DualEncoder, dataset: ImageTextDataset, show: bool = True
) -> Float[Tensor, "n e"]:
    """The embeddings of all images, on the CPU, in the order of the rows."""
    out: list[Tensor] = []
    with progress("embedding images", len(dataset), show=show) as advance:
        for images in prepared_images(encoder.prepare, dataset, encoder.batch_size):
            out.append(encoder.encode_images(images))
            advance(len(images))
    return torch.cat(out)


def prepared_images(
    prepare: Callable[[object], Any], dataset: ImageTextDataset, size: int
) -> Iterator[list[Any]]:
    """All images as an encoder takes them, `size` at a time, read by threads ahead of it.

    Raises:
        ManifestError: When an image cannot be read.
    """

    def read(row: int) -> Any:
        try:
            return prepare(dataset.image(row))
        except ImageError as error:
            raise ManifestError(
                f"image {dataset.samples[row].image_id} cannot be read: {error}; build the data "
                f"folder again, which leaves such images out"
            ) from None

    n = len(dataset)
    waiting: deque[list[Future[Any]]] = deque()
    with ThreadPoolExecutor(n_cores()) as pool:
        try:
            for start in range(0, n, size):
                rows = range(start, min(start + size, n))
                waiting.append([pool.submit(read, row) for row in rows])
                if len(waiting) > BATCHES_AHEAD:
                    yield [each.result() for each in waiting.popleft()]
            while waiting:
                yield [each.result() for each in waiting.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode_squares(
    model: MMCLIP, pixels: UInt8[Tensor, "n h w"], batch_size: int
) -> Float[Tensor, "n e"]:
    """The embeddings of up to `batch_size` images, on the CPU; see `encode_batch`."""
    device = model.logit_scale.device

    def encode(image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b e"]:
        with half_on_gpu(device):
            return model.encode_image(image).embedding

    return encode_batch(encode, pixels, device, batch_size)


def half_on_gpu(device: torch.device) -> torch.autocast:
    """bf16 for the matrix products of a GPU, which are many times faster so; nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


MIN_PIECE_CHARS = 2.0
"""Mean length of a word's pieces below which the tokenizer has hardly seen it. [chosen: words of
radiology that BERT's vocabulary lacks have 2.2 and more (em-phy-se-ma), "xyzzy" has 1.7]"""


def words_hardly_known(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The words of a text that a tokenizer can only spell: in pieces of hardly a letter.

    A vocabulary holds whole what its texts say often, and spells out the rest, so such words were
    rare or absent in what the tokenizer was trained on. The rule is blind to words that are made of
    longer pieces, and to those that a vocabulary of other texts holds ("giraffe"); it also names
    abbreviations that are not in the vocabulary.

    Args:
        tokenizer: Of the run.
        text: As given.

    Returns:
        Each once, in order, in lower case as in the text.
    """
    found = dict.fromkeys(re.findall(r"[^\W\d_]{2,}", text.lower()))
    out = []
    for word in found:
        pieces = tokenizer.tokenize(word)
        is_unknown = tokenizer.unk_token in pieces or not pieces
        if is_unknown or (len(pieces) > 1 and len(word) / len(pieces) < MIN_PIECE_CHARS):
            out.append(word)
    return out


def check_texts(encoder: DualEncoder, texts: Sequence[str]) -> None:
    """Warns of texts that a model reads in part, where it tells what it reads.

    Raises:
        ValueError: When it can read no word of one.
    """
    tokenizer, max_tokens = encoder.tokenizer, encoder.max_tokens
    if tokenizer is None:
        return
    n_cut = 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        tokens = tokenise(tokenizer, texts[start : start + TEXTS_AT_ONCE], max_tokens=max_tokens)
        is_word = tokens.offsets[..., 1] > tokens.offsets[..., 0]
        is_read = (is_word & (tokens.ids != tokenizer.unk_token_id)).any(axis=1)
        if not is_read.all():
            raise ValueError(
                f"text {start + int(is_read.argmin())} has no word that the model knows; say it as "
                f"a report of the training data would"
            )
        n_cut += tokens.n_truncated
    if n_cut:
        logger.warning(
            "%d of %d texts are longer than the %d tokens that the model reads, and are cut there",
            n_cut,
            len(texts),
            max_tokens,
        )


def warn_of_unread(encoder: DualEncoder, phrase: str) -> None:
    """Says what of a phrase a model cannot read, or has hardly read in training, where it tells.

    Raises:
        ValueError: When it is no text, or the model can read no word of it.
    """
    check_text(phrase, "the phrase")
    tokenizer, max_tokens = encoder.tokenizer, encoder.max_tokens
    if tokenizer is None:
        return
    tokens = tokenise(tokenizer, [phrase], max_tokens=max_tokens)
    words = tokens.ids[0][tokens.offsets[0, :, 1] > tokens.offsets[0, :, 0]]
    n_unknown = int((words == tokenizer.unk_token_id).sum())
    if n_unknown == len(words):
        raise ValueError(
            f"the phrase {phrase!r} has no word that the model knows; say it as a report of the "
            f"training data would"
        )
    if n_unknown or tokens.n_truncated:
        faults = [f"{n_unknown} of {len(words)} tokens are unknown"] if n_unknown else []
        faults += [f"it is cut after {max_tokens} tokens"] if tokens.n_truncated else []
        logger.warning("the model does not read all of the phrase: %s", ", and ".join(faults))
    if spelt := words_hardly_known(tokenizer, phrase):
        logger.warning(
            "%s: not in the vocabulary of the model, which spells it letter by letter and can "
            "hardly know what it means: check the spelling, or say it as a report would",
            ", ".join(spelt),
        )


@torch.inference_mode()
def embed_texts(
    model: MMCLIP,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    max_tokens: int,
    batch_size: int = 256,
) -> Float[Tensor, "n e"]:
    """The embeddings of some texts, on the CPU; a text that occurs twice is encoded once."""
    device = model.logit_scale.device
    distinct = list(dict.fromkeys(texts))
    out = []
    for start in range(0, len(distinct), batch_size):
        tokens = tokenise(tokenizer, distinct[start : start + batch_size], max_tokens=max_tokens)
        ids = torch.from_numpy(tokens.ids).long().to(device)
        is_valid = torch.from_numpy(tokens.is_valid).to(device)
        with half_on_gpu(device):
            out.append(model.encode_text(ids, is_valid).embedding.cpu())
    number = {text: i for i, text in enumerate(distinct)}
    return torch.cat(out)[[number[text] for text in texts]]


def embed_prompts(
    encoder: DualEncoder, prompts: PromptSet, findings: Sequence[str]
) -> PromptEmbeddings:
    """Embeds the prompts of each finding, see `average_prompts`."""
    return average_prompts(encoder.encode_texts, prompts, findings)


def average_prompts(
    encode_texts: Callable[[Sequence[str]], Float[Tensor, "n e"]],
    prompts: PromptSet,
    findings: Sequence[str],
) -> PromptEmbeddings:
    """Embeds the prompts of each finding and averages the wordings of a side.

    Source: prompt ensembling in embedding space, CLIP section 3.1.4 (arXiv:2103.00020).
    """

    def averaged(texts: Sequence[str]) -> Tensor:
        return F.normalize(encode_texts(texts).mean(0), dim=-1)

    sides = [prompts.texts(finding) for finding in findings]
    return PromptEmbeddings(
        positive=torch.stack([averaged(side.positives) for side in sides]),
        negative=torch.stack([averaged(side.negatives) for side in sides]),
    )
