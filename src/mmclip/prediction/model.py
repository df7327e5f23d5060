"""Any model, fine-tuned ones among them, and what turns images into scores by it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mmclip.checkpoint import CHECKPOINTS, CheckpointError, checkpoint_meta, find_checkpoint
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.inputs import each_input, name_of
from mmclip.data.original_images import open_originals
from mmclip.data.pixels import ImageError
from mmclip.embed import embed_prompts, encode_batch
from mmclip.evaluation.results import RESULTS_FILE
from mmclip.finetuning.saved import FineTuned, is_fine_tuned, load_fine_tuned
from mmclip.model_loading import (
    ModelRequest,
    check_model,
    is_function,
    is_of_transformers,
    open_dual_encoder,
)
from mmclip.models.dual_encoder import DualEncoder, images_at_once, probe_image
from mmclip.models.own_encoder import OwnEncoder
from mmclip.prompt_check import check_prompts
from mmclip.prompts import PromptSet, load_prompts, own_prompts, plain_name
from mmclip.run import square_of

CHUNK_FILES = 64
"""Files that a process prepares at a time. [chosen: a second or two of work]"""


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
    """What turns images into vectors: embeddings of a dual encoder, or what a head reads.

    Attributes:
        prepare: Makes of an image what `encode` takes; it can be sent to another process.
        device: Where the model is.
        batch_size: Images that are encoded together.
        encode: Up to `batch_size` prepared images to vectors on the CPU.
        open_data: Data folders with images as the model reads them.
        chunk_files: Files that a process prepares at a time.
    """

    prepare: Callable[[object], Any]
    device: torch.device
    batch_size: int
    encode: Callable[[Sequence[Any]], Float[Tensor, "n d"]]
    open_data: Callable[[Sequence[Path]], ImageTextDataset]
    chunk_files: int = CHUNK_FILES


@dataclass(frozen=True)
class Scorer:
    """An encoder, and what its vectors say of some findings."""

    encoder: Encoder
    findings: tuple[str, ...]
    probabilities: Callable[[Float[Tensor, "n d"]], Float[np.ndarray, "n k"]]

    def scores(self, images: Sequence[Any]) -> Float[np.ndarray, "n k"]:
        """The score of each finding in up to `batch_size` prepared images."""
        return self.probabilities(self.encoder.encode(images))


@dataclass(frozen=True)
class EncodedImages:
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
    except (RuntimeError, TypeError):
        why = "torch knows no such device"
    else:
        try:
            torch.zeros(1, device=device).tolist()  # of a device without numbers, too
            return device
        except (RuntimeError, AssertionError) as error:
            why = re.split(r"[.;] ", str(error).splitlines()[0])[0]  # torch goes on for a page
    raise ValueError(
        f"device {str(name)!r} cannot be used ({why}); take 'auto', 'cpu', or 'cuda' where torch "
        f"sees a GPU"
    )


def find_model(source: str) -> None:
    """Refuses a model that is not there: a dual encoder, or a fine-tuned result.

    Raises:
        CheckpointError: When a folder holds none.
        EncoderError: When a model of others cannot be had.
    """
    try:
        check_model(source)
    except CheckpointError as error:
        raise CheckpointError(_why_no_model(Path(source)) or str(error)) from None


def open_model(request: ModelRequest, device: torch.device) -> DualEncoder | FineTuned:
    """A dual encoder or a fine-tuned result, on a device.

    Raises:
        CheckpointError: When a folder holds no weights, or damaged ones.
        EncoderError: When a model of others cannot be had.
        ValueError: When a fine-tuned result is to score by a rule of prompts.
    """
    source = request.source
    find_model(source)
    if is_function(source) or is_of_transformers(source):
        return open_dual_encoder(request, device)
    folder = find_checkpoint(Path(source))
    if not is_fine_tuned(checkpoint_meta(folder)):
        return open_dual_encoder(request, device)
    if request.rule is not None:
        raise ValueError(
            f"rule {request.rule} is for scores by prompts, and {source} is a fine-tuned model, "
            f"which reads none; leave the rule out"
        )
    found = load_fine_tuned(folder, device)
    found.model.to(device)
    return found


def _why_no_model(path: Path) -> str | None:
    """Why a folder that is no run holds no model, where it is one of ours."""
    if not path.is_dir():
        return None
    within = sorted(p.parent.name for p in path.glob(f"*/{RESULTS_FILE}"))
    if (path / "summary.json").is_file() and within:
        return (
            f"{path} is no fine-tuned result and holds {len(within)}; give {path / within[0]}"
            + (" or another of them" if len(within) > 1 else "")
        )
    if not (path / RESULTS_FILE).is_file() or (path / CHECKPOINTS).is_dir():
        return None
    if runs := sorted(each.parent for each in path.glob(f"*/{CHECKPOINTS}")):
        return f"{path} holds results, and a run in {runs[0]}; give that"
    return (
        f"{path} holds results and no weights; give the run that was scored, or the folder of "
        f"a fine-tuned result of this version of mmclip"
    )


def encoder_of(model: DualEncoder | FineTuned, batch_size: int | None = None) -> Encoder:
    """What turns images into vectors: embeddings, or what a fine-tuned head reads.

    Args:
        model: See `open_model`.
        batch_size: Of a fine-tuned model: images at once; by default what fits, see
            `dual_encoder.images_at_once`. A dual encoder has its own.
    """
    dual = model.others if isinstance(model, FineTuned) else model
    if dual is not None:
        # An own model is given images whole, which fill the memory.
        chunk = dual.batch_size if isinstance(dual, OwnEncoder) else CHUNK_FILES
        return Encoder(
            dual.prepare, dual.device, dual.batch_size, dual.encode_images, dual.open_data, chunk
        )
    assert isinstance(model, FineTuned) and model.image_size is not None
    size, resize = model.image_size, model.resize
    device = next(model.model.parameters()).device
    n = batch_size or images_at_once(device, size)

    def encode(squares: Sequence[UInt8[np.ndarray, "s s"]]) -> Float[Tensor, "n d"]:
        return encode_batch(model.encode, torch.from_numpy(np.stack(squares)), device, n)

    def open_data(folders: Sequence[Path]) -> ImageTextDataset:
        if model.square is not None:
            return open_originals(folders, None, size, str(model.folder))
        return open_dataset(folders, size, resize=resize)

    prepare = model.square or partial(square_of, image_size=size, resize=resize)
    return Encoder(prepare, device, n, encode, open_data)


def prompt_set_of(prompts: str | Path | PromptSet | Mapping[str, Any]) -> PromptSet:
    """A prompt set by name, by the path of its file, or by its content; see `own_prompts`."""
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, Mapping):
        return own_prompts(prompts)
    if not isinstance(prompts, str | Path):
        raise TypeError(
            f"prompts={prompts!r} are no prompts; give the name of a prompt set, the path of its "
            f"file, or templates: {{'positive': [...], 'negative': [...]}}"
        )
    return load_prompts(prompts)


def scorer_of(
    model: DualEncoder | FineTuned,
    findings: Sequence[str],
    prompts: PromptSet,
    batch_size: int | None = None,
) -> Scorer:
    """What says how probable findings are in an image.

    Args:
        model: See `open_model`.
        findings: In order; none takes those that a fine-tuned model has learnt.
        prompts: What stands for a finding; of no use to a fine-tuned model.
        batch_size: See `encoder_of`.

    Raises:
        ValueError: When no finding is named, one is named twice, or a fine-tuned model has not
            learnt it.
        PromptError: When the prompts of a finding cannot stand for it.
    """
    encoder = encoder_of(model, batch_size)
    _check_names(findings)
    if isinstance(model, FineTuned):
        return _fine_tuned_scorer(model, findings, encoder)
    if not findings:
        raise ValueError(
            "no finding is named; name what to look for by --finding, such as --finding "
            "'pleural effusion' (in Python: findings=['pleural effusion'])"
        )
    check_prompts(model.tokenizer, [prompts], findings, model.max_tokens)
    pair = embed_prompts(model, prompts, findings)
    return Scorer(encoder, tuple(findings), lambda vectors: model.scoring.scores(vectors, pair))


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


def _check_names(findings: Sequence[str]) -> None:
    for name in findings:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"finding {name!r} is no name; give words, such as 'pleural effusion'")
    names = [plain_name(name) for name in findings]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"finding {twice[0]!r} is named twice; name each once")


def encode_inputs(encoder: Encoder, images: object, errors: str) -> EncodedImages:
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
    batch: list[Any] = []
    for found in _prepared(encoder, images):
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
            parts.append(encoder.encode(batch))
            batch = []
    if batch:
        parts.append(encoder.encode(batch))
    if not parts:  # no image: a vector's width is still known
        parts.append(encoder.encode([encoder.prepare(probe_image())])[:0])
    return EncodedImages(torch.cat(parts), tuple(ids), tuple(skipped))


def _prepared(encoder: Encoder, images: object) -> Iterator[tuple[str, Any] | Skipped]:
    """Each image by name as the model takes it, or why it cannot be read."""
    for number, image in enumerate(each_input(images)):
        name = name_of(image, number)
        try:
            yield name, encoder.prepare(image)
        except ImageError as error:
            yield Skipped(name, str(error.reason), error.detail)
