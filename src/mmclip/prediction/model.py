"""A model as it is read from any folder of ours, and what turns images into probabilities by it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mmclip.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_meta,
    find_checkpoint,
    load_checkpoint,
)
from mmclip.config import ResizeMode
from mmclip.data.images import resize_image
from mmclip.data.inputs import each_input, name_of, read_input
from mmclip.data.pixels import ImageError
from mmclip.embed import (
    embed_batch,
    embed_prompts,
    encode_batch,
    images_at_once,
    probabilities,
)
from mmclip.evaluation.results import RESULTS_FILE
from mmclip.finetuning.saved import FineTuned, is_fine_tuned, load_fine_tuned
from mmclip.prompt_check import check_prompts
from mmclip.prompts import PromptSet, load_prompts, own_prompts, plain_name


class ImageInputError(ValueError):
    """An image that was given cannot be read; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that gives no numbers, and why."""

    image_id: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.image_id}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Encoder:
    """What turns squares of pixels into vectors.

    Attributes:
        image_size: Side of the squares, px.
        resize: How images become squares.
        device: Where the model is.
        batch_size: Images that are encoded together.
        encode: Up to `batch_size` squares to vectors on the CPU; the numbers of an image do not
            depend on the others.
    """

    image_size: int
    resize: ResizeMode
    device: torch.device
    batch_size: int
    encode: Callable[[UInt8[Tensor, "n s s"]], Float[Tensor, "n d"]]

    def square(self, image: object) -> UInt8[np.ndarray, "s s"]:
        """An image as the model sees it; see `inputs.read_input`."""
        return resize_image(read_input(image), self.image_size, self.resize)


@dataclass(frozen=True)
class Scorer:
    """An encoder, and what its vectors say of some findings."""

    encoder: Encoder
    findings: tuple[str, ...]
    probabilities: Callable[[Float[Tensor, "n d"]], Float[np.ndarray, "n k"]]

    def scores(self, squares: UInt8[np.ndarray, "n s s"]) -> Float[np.ndarray, "n k"]:
        """The probability of each finding in up to `batch_size` images."""
        return self.probabilities(self.encoder.encode(torch.from_numpy(squares)))


@dataclass(frozen=True)
class Encoded:
    """Vectors of images, in their order, and the images that have none."""

    vectors: Float[Tensor, "n d"]
    image_ids: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def device_named(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is the GPU that torch sees, else the CPU.

    Raises:
        ValueError: When there is none of that name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"device {str(name)!r} cannot be used ({why}); take 'auto', 'cpu', or 'cuda' where "
            f"torch sees a GPU"
        ) from None
    return device


def find_model(path: Path) -> Path:
    """The checkpoint of a run, a checkpoint or a fine-tuned result.

    Raises:
        CheckpointError: When the folder holds none.
    """
    try:
        return find_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(_why_no_model(path) or str(error)) from None


def open_model(path: Path, device: torch.device) -> Checkpoint | FineTuned:
    """The model of a run, a checkpoint or a fine-tuned result, on a device.

    Raises:
        CheckpointError: When the folder holds no weights, or damaged ones.
    """
    folder = find_model(path)
    if is_fine_tuned(checkpoint_meta(folder)):
        found = load_fine_tuned(folder)
        found.model.to(device)
        return found
    checkpoint = load_checkpoint(folder)
    checkpoint.model.to(device)
    return checkpoint


def _why_no_model(path: Path) -> str | None:
    """Why a folder that is no run holds no model, where it is one of fine-tuning."""
    if not path.is_dir():
        return None
    within = sorted(p.parent.name for p in path.glob(f"*/{RESULTS_FILE}"))
    if (path / "summary.json").is_file() and within:
        return (
            f"{path} holds several fine-tuned results; give one of them, such as {path / within[0]}"
        )
    if (path / RESULTS_FILE).is_file():
        return (
            f"{path} holds results and no weights; give the run that was scored, or the folder of "
            f"a fine-tuned result of this version of mmclip"
        )
    return None


def encoder_of(model: Checkpoint | FineTuned, batch_size: int | None = None) -> Encoder:
    """What turns images into vectors: embeddings of a run, or what a fine-tuned head reads.

    Args:
        model: See `open_model`.
        batch_size: Images at once; by default what fits, see `embed.images_at_once`.
    """
    if isinstance(model, Checkpoint):
        data = model.config.data
        size_px, resize, device = data.image_size, data.resize, model.model.logit_scale.device
    else:
        size_px, resize = model.image_size, model.resize
        device = next(model.model.parameters()).device
    n = batch_size or images_at_once(device, size_px)

    def encode(pixels: UInt8[Tensor, "n s s"]) -> Float[Tensor, "n d"]:
        if isinstance(model, Checkpoint):
            return embed_batch(model.model, pixels, n)
        return encode_batch(model.encode, pixels, device, n)

    return Encoder(size_px, resize, device, n, encode)


def prompt_set_of(prompts: str | Path | PromptSet | Mapping[str, Any]) -> PromptSet:
    """A prompt set by name, by the path of its file, or by its content; see `own_prompts`."""
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, Mapping):
        return own_prompts(prompts)
    return load_prompts(prompts)


def scorer_of(
    model: Checkpoint | FineTuned,
    findings: Sequence[str],
    prompts: PromptSet,
    batch_size: int | None = None,
) -> Scorer:
    """What says how probable findings are in an image.

    Args:
        model: See `open_model`.
        findings: In order; none takes those that a fine-tuned model has learnt, or that the prompt
            set words by itself.
        prompts: What stands for a finding; of no use to a fine-tuned model.
        batch_size: See `encoder_of`.

    Raises:
        ValueError: When no finding is named, one is named twice, or a fine-tuned model has not
            learnt it.
        PromptError: When the prompts of a finding cannot stand for it.
    """
    encoder = encoder_of(model, batch_size)
    _refuse_twice(findings)
    if isinstance(model, FineTuned):
        return _fine_tuned_scorer(model, findings, encoder)
    if not findings:
        raise ValueError(
            "no finding is named; name what to look for by --finding, such as --finding "
            "'pleural effusion' (in Python: findings=['pleural effusion'])"
        )
    max_tokens = model.config.data.max_tokens
    check_prompts(model.tokenizer, [prompts], findings, max_tokens)
    pair = embed_prompts(model.model, model.tokenizer, prompts, findings, max_tokens)
    scale = float(model.model.scale().detach())
    return Scorer(encoder, tuple(findings), lambda vectors: probabilities(vectors, pair, scale))


def _fine_tuned_scorer(model: FineTuned, findings: Sequence[str], encoder: Encoder) -> Scorer:
    column = {plain_name(name): k for k, name in enumerate(model.findings)}
    if missing := [name for name in findings if plain_name(name) not in column]:
        raise ValueError(
            f"this fine-tuned model has not learnt {', '.join(missing)}; it scores "
            f"{', '.join(model.findings)}, and a run of `mmclip pretrain` scores any finding by "
            f"prompts"
        )
    columns = [column[plain_name(name)] for name in findings or model.findings]
    return Scorer(
        encoder,
        tuple(findings) or model.findings,
        lambda vectors: model.probabilities(vectors)[:, columns],
    )


def _refuse_twice(findings: Sequence[str]) -> None:
    names = [plain_name(name) for name in findings]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"finding {twice[0]!r} is named twice; name each once")


def encode_inputs(encoder: Encoder, images: object, errors: str) -> Encoded:
    """The vectors of images of any kind, read and encoded a batch at a time.

    Raises:
        ImageInputError: With errors="raise", at the first image that cannot be read.
        ValueError: When `errors` is neither.
    """
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors={errors!r} is neither 'raise' nor 'skip'")
    ids: list[str] = []
    skipped: list[Skipped] = []
    parts: list[Tensor] = []
    batch: list[np.ndarray] = []
    for found in _squares(encoder, images):
        if isinstance(found, Skipped):
            if errors == "raise":
                raise ImageInputError(
                    f"{found}; give another image, or errors='skip' to leave such images out"
                )
            skipped.append(found)
            continue
        ids.append(found[0])
        batch.append(found[1])
        if len(batch) == encoder.batch_size:
            parts.append(encoder.encode(torch.from_numpy(np.stack(batch))))
            batch = []
    if batch:
        parts.append(encoder.encode(torch.from_numpy(np.stack(batch))))
    if not parts:
        side = encoder.image_size
        grey = torch.zeros(1, side, side, dtype=torch.uint8)
        parts.append(encoder.encode(grey)[:0])  # no image: a vector's width is still known
    return Encoded(torch.cat(parts), tuple(ids), tuple(skipped))


def _squares(encoder: Encoder, images: object) -> Iterator[tuple[str, np.ndarray] | Skipped]:
    """Each image by name as the model sees it, or why it cannot be seen."""
    for number, image in enumerate(each_input(images)):
        name = name_of(image, number)
        try:
            yield name, encoder.square(image)
        except ImageError as error:
            yield Skipped(name, str(error.reason), error.detail)
