"""Writes a run as others read it: a folder of transformers, one encoder, or ONNX graphs."""

import glob
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from mmclip.checkpoint import CheckpointError, checkpoint_meta, find_checkpoint
from mmclip.evaluation.results import RunResults, read_results
from mmclip.export.card import CARD_FILE, write_card
from mmclip.export.dual_encoder import dual_encoder
from mmclip.export.graphs import check_onnx, write_graphs
from mmclip.export.towers import (
    Plain,
    clean_tokenizer_config,
    encoder_alone,
    facts_of,
    plain_model,
    processor_config,
)
from mmclip.exported import FACTS_FILE, write_facts
from mmclip.files import locked_file
from mmclip.finetuning.saved import is_fine_tuned
from mmclip.run import Run, open_run

Form = Literal["hf", "onnx", "vision", "text"]
"""hf: VisionTextDualEncoderModel; onnx: graphs of both encoders; vision, text: one encoder."""

PROJECTION_FILE = "projection.safetensors"
"""Beside an encoder that stands alone: the matrix from its pooled vector to the joint space."""


class ExportError(ValueError):
    """A run cannot be exported so, or there; the message names the next step."""


@dataclass(frozen=True)
class ExportRequest:
    """What to write, and where to.

    Attributes:
        run: Run or checkpoint.
        form: See `Form`.
        out: A folder that is not there yet.
        overwrite: Replace an export that is there.
        results: Folder with results.json of this run, for the model card.
        licence: Of the weights, as the hub names it.
        push_to_hub: Id of the repository that takes a copy.
    """

    run: Path
    form: Form
    out: Path
    overwrite: bool = False
    results: Path | None = None
    licence: str = "other"
    push_to_hub: str | None = None


def form_named(name: str) -> Form:
    """A form that was named on the command line.

    Raises:
        ExportError: When there is none of that name.
    """
    for form in get_args(Form):
        if form == name:
            return form
    raise ExportError(f"--to {name!r} is none of {', '.join(get_args(Form))}")


def export(request: ExportRequest) -> str | None:
    """Exports a run, and uploads it where that is asked for.

    The folder is written beside `out` and renamed last: a full disk leaves what was there, and what
    a killed export left beside it goes.

    Returns:
        The address of the upload; None without one.

    Raises:
        CheckpointError: When there is no run.
        ExportError: When `out` is there, or the hub cannot be used.
        EncoderError: When the form cannot express the run.
        LockedError: When another export writes there.
        OSError: When the folder cannot be written.
    """
    with locked_file(request.out.resolve()):
        _settle(request.out.resolve())
        return _export(request)


def _export(request: ExportRequest) -> str | None:
    _check(request)
    run = open_run(request.run)
    results = None if request.results is None else _results_of(request.results, run)
    plain = plain_model(run.checkpoint)
    write = _writer(request.form, plain)

    def fill(folder: Path) -> None:
        write(folder)
        write_facts(folder, {"form": request.form, **facts_of(plain)})
        name = (request.push_to_hub or request.out.resolve().name).rpartition("/")[2]
        card = folder / CARD_FILE
        write_card(card, name, request.form, run, plain, results, request.licence)

    _replace(request.out, fill, request.overwrite)
    if request.push_to_hub is None:
        return None
    return _upload(request.out, request.push_to_hub)


def _check(request: ExportRequest) -> None:
    """All that can be refused before a model is read."""
    if request.form == "onnx":
        check_onnx()
    meta = checkpoint_meta(find_checkpoint(request.run))
    if is_fine_tuned(meta):
        raise CheckpointError(
            f"{request.run} is a fine-tuned classifier, which has no text encoder; export takes "
            f"the run of `mmclip pretrain` that it was made of"
        )
    out = request.out
    if out.exists() and not request.overwrite:
        raise ExportError(f"{out} is there; add --overwrite to replace it, or choose another --out")
    if out.exists() and not _is_export(out):
        raise ExportError(
            f"{out} is no folder that `mmclip export` wrote, so --overwrite does not replace it; "
            f"choose another --out"
        )
    if request.push_to_hub is not None:
        _check_hub(request.push_to_hub)


def _is_export(folder: Path) -> bool:
    return folder.is_dir() and ((folder / FACTS_FILE).is_file() or not any(folder.iterdir()))


def _check_hub(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        said = str(error).splitlines()[0]
        raise ExportError(f"--push-to-hub {repo_id!r} is no name of the hub ({said})") from None
    if get_token() is None:
        raise ExportError(
            f"--push-to-hub {repo_id} needs a token of the hub; make one with write access at "
            f"https://huggingface.co/settings/tokens and set HF_TOKEN, or run `hf auth login`"
        )


def _results_of(folder: Path, run: Run) -> RunResults:
    """Results for the card, once they are found to be of this run.

    Raises:
        ResultsError: When there are none.
        ExportError: When they are of other weights.
    """
    results = read_results(folder)
    if results.kind == "finetune" or results.provenance.config_hash != run.config_hash:
        raise ExportError(
            f"{folder} holds results of other weights than {run.name}; give those that "
            f"`mmclip zeroshot` made of it"
        )
    step = results.facts.get("step")
    if step is not None and step != run.step:
        raise ExportError(
            f"{folder} holds results of step {step}, and this export is of step {run.step}; score "
            f"that checkpoint, or export the other"
        )
    return results


def _writer(form: Form, plain: Plain) -> Callable[[Path], None]:
    """What fills a folder; a form that cannot express the run is refused here."""
    if form == "onnx":

        def graphs(folder: Path) -> None:
            write_graphs(plain, folder)
            _write_processor(plain, folder)
            _write_tokenizer(plain, folder)

        return graphs
    if form == "hf":
        whole = dual_encoder(plain)

        def both(folder: Path) -> None:
            _save(whole, folder)
            _write_processor(plain, folder)
            _write_tokenizer(plain, folder)

        return both
    encoder = encoder_alone(plain, form)
    projection = plain.model.visual_projection if form == "vision" else plain.model.text_projection

    def alone(folder: Path) -> None:
        _save(encoder, folder)
        weight = projection.weight.detach().clone()
        save_file({"weight": weight}, folder / PROJECTION_FILE, metadata={"format": "pt"})
        if form == "vision":
            _write_processor(plain, folder)
        else:
            _write_tokenizer(plain, folder)

    return alone


def _save(model: PreTrainedModel, folder: Path) -> None:
    """As transformers saves it, without its progress bar over one file."""
    shows = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shows:
            transformers_logging.enable_progress_bar()


def _write_processor(plain: Plain, folder: Path) -> None:
    _write_json(folder / "preprocessor_config.json", processor_config(plain))


def _write_tokenizer(plain: Plain, folder: Path) -> None:
    plain.tokenizer.save_pretrained(folder)
    clean_tokenizer_config(folder / "tokenizer_config.json")


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")


def _settle(out: Path) -> None:
    """Removes what killed exports left beside `out`, and puts back what one had just moved away."""
    for left in sorted(out.parent.glob(f"{glob.escape(out.name)}.*.tmp")):
        if left.name.endswith(".old.tmp") and not out.exists():
            left.rename(out)
        elif left.is_dir():
            shutil.rmtree(left)


def _replace(out: Path, fill: Callable[[Path], None], overwrite: bool) -> None:
    """Fills a folder beside `out` and renames it; what is there stays until then, and links do."""
    out = out.resolve()
    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f"{out.name}.{os.getpid()}.old.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.mkdir()
    try:
        fill(aside)
        for path in aside.rglob("*.safetensors"):  # which only their owner may read, by default
            path.chmod((aside / CARD_FILE).stat().st_mode)
        if overwrite and out.exists():
            out.rename(old)
        aside.rename(out)
    except SafetensorError as error:
        raise OSError(f"{out} cannot be written ({error}); what was there is as it was") from None
    finally:
        for left in (aside, old):
            if left.exists():
                shutil.rmtree(left)


def _upload(folder: Path, repo_id: str) -> str:
    """Uploads an export into a repository of the hub, a new one private.

    Raises:
        ExportError: When the hub refuses it.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Export of an MMCLIP run"
        )
    except (HfHubHTTPError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise ExportError(f"{folder} is written, and the hub refused the upload: {said}") from None
    return f"{api.endpoint}/{repo_id}"
