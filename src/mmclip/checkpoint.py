"""Checkpoints: written aside and renamed, safetensors and plain tensors, no pickled code.

run/checkpoints/step_000500/
    model.safetensors   weights
    trainer.pt          optimiser, gradient scaler, random state (read with weights_only=True)
    tokenizer/          as transformers saves it
    meta.json           step, config, encoder configs, data hash, versions, checksums

meta.json holds the checksum of each file of the checkpoint, of what the run's own folder holds
beside it, and of itself. A file that it does not list is refused: tokenizers read whatever lies
beside them.
"""

import json
import os
import pickle
import platform
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmclip import __version__
from mmclip.config import Config
from mmclip.config_io import config_hash, parse
from mmclip.data.folder import MANIFEST_FILE
from mmclip.data.leakage.trained import KEY_FILE
from mmclip.files import file_sha256, is_sealed, json_sha256, other_format, sealed
from mmclip.models.build import build_mmclip
from mmclip.models.encoders import rebuild_encoder
from mmclip.models.mmclip import MMCLIP

CHECKPOINTS = "checkpoints"

WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".pkl")
"""Of files in which others keep weights."""

FORMAT = 4
"""Of a checkpoint, in meta.json: 2 has the configuration keys image_size and patch_size; from 3 on
decoders read a ResNet's features where they lie, and the text decoder is told patches' places; 4
has checksums of meta.json and of the run's own files."""

META_CHECKSUM, RUN_FILES_KEY = "meta_sha256", "run_sha256"
"""Keys of meta.json: over all of itself; of files in the run's folder, by name."""

STRAY = re.compile(r"\.DS_Store|\.nfs\w+|\._.*")
"""Files that a file system leaves by itself, and no one reads."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run; the message names the next step."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: the model, its tokenizer, and what meta.json says."""

    folder: Path
    model: MMCLIP
    tokenizer: PreTrainedTokenizerFast
    config: Config
    meta: dict[str, Any]


def code_version() -> dict[str, str]:
    """Versions that a result depends on, and the commit where the code is a git checkout."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "mmclip": __version__,
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save_checkpoint(
    run: Path,
    step: int,
    model: MMCLIP,
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    trainer: dict[str, Any],
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """Writes a checkpoint of pre-training; see `write_checkpoint`.

    Args:
        run: The run's folder.
        step: Optimiser steps done.
        model: Not wrapped.
        tokenizer: Of the text encoder.
        config: The resolved configuration.
        trainer: Tensors and plain values that training needs to go on.
        facts: Further entries of meta.json (data hash, commands). The checkpoint of "best_step"
            stays, and is what `find_checkpoint` finds.
        keep: Number of newest checkpoints that stay.

    Returns:
        The checkpoint's folder.
    """
    metadata = {
        "config": config.model_dump(mode="json"),
        "config_hash": config_hash(config),
        "vision_config": model.vision_model.config.to_dict(),
        "text_config": model.text_model.config.to_dict(),
        "versions": code_version(),
        **facts,
    }
    best = facts.get("best_step")
    spare = () if best is None else (best,)
    return write_checkpoint(
        run, step, model, trainer, metadata, keep, spare=spare, tokenizer=tokenizer
    )


def write_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    trainer: dict[str, Any],
    metadata: Mapping[str, Any],
    keep: int,
    *,
    spare: Collection[int] = (),
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Writes a checkpoint aside, syncs it to disk, renames it, and removes the oldest ones.

    A process killed at any moment leaves either the whole checkpoint or none under its name; what
    it was writing or removing lies in a folder *.tmp, which the next save clears away.

    Args:
        run: The run's folder.
        step: Optimiser steps done.
        model: Not wrapped.
        trainer: Tensors and plain values that training needs to go on.
        metadata: Further entries of meta.json.
        keep: Number of newest checkpoints that stay.
        spare: Steps of checkpoints that stay, too.
        tokenizer: Saved with the weights, where the model has one.

    Returns:
        The checkpoint's folder.
    """
    final = run / CHECKPOINTS / f"step_{step:06d}"
    aside = final.with_name(final.name + ".tmp")
    for left in final.parent.glob("*.tmp"):
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    shared = shared_names(model)
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n not in shared}
    try:
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        torch.save(trainer, aside / "trainer.pt")
    except (RuntimeError, SafetensorError) as error:  # what both say of a full disk
        shutil.rmtree(aside)
        raise OSError(
            f"{final} cannot be written ({_why_not_written(run, error)}); the checkpoints before "
            f"it are whole: make room, and resume"
        ) from None
    # safetensors lets only the owner read its files; colleagues may read what the folder lets them.
    (aside / "model.safetensors").chmod((aside / "trainer.pt").stat().st_mode)
    if tokenizer is not None:
        tokenizer.save_pretrained(aside / "tokenizer")
    _write_meta(aside, step, metadata)
    for path in [*aside.rglob("*"), aside]:
        _sync(path)
    if final.exists():
        _remove(final)
    aside.rename(final)
    _sync(final.parent)
    for old in _finished(run)[:-keep]:
        if int(old.name.removeprefix("step_")) not in spare:
            _remove(old)
    return final


def _write_meta(folder: Path, step: int, metadata: Mapping[str, Any]) -> None:
    """Writes meta.json, with a checksum of each file that is there."""
    written = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    sha256 = {name: file_sha256(folder / name) for name in written}
    meta = {"format": FORMAT, "step": step, **metadata, "sha256": sha256}
    text = json.dumps(sealed(meta, META_CHECKSUM), indent=2)
    (folder / "meta.json").write_text(text + "\n", "utf-8")


def _why_not_written(run: Path, error: Exception) -> str:
    free = shutil.disk_usage(run).free
    return str(error).splitlines()[0] if free > 2**20 else "no space left on device"


def _remove(folder: Path) -> None:
    # Renamed first: a half-removed folder must not pass for a checkpoint.
    aside = folder.with_name(folder.name + ".removed.tmp")
    folder.rename(aside)
    shutil.rmtree(aside)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finished(run: Path) -> list[Path]:
    folder = run / CHECKPOINTS
    found = [p for p in folder.glob("step_*") if p.is_dir() and re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path names: itself, or of a run's folder the best by
    validation; the newest where the run did not validate.

    Raises:
        CheckpointError: When there is none.
    """
    newest = newest_checkpoint(path)
    if newest == path:
        return path
    best = checkpoint_meta(newest).get("best_step")
    found = newest if best is None else newest.with_name(f"step_{best:06d}")
    return found if found.is_dir() else newest


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path names: itself, or the newest of a run's folder.

    Raises:
        CheckpointError: When there is none.
    """
    if _is_checkpoint(path):
        return path
    if finished := _finished(path):
        return finished[-1]
    if known := _what_it_is(path):
        raise CheckpointError(f"{path} holds no finished checkpoint: {known}")
    runs = path.parent, *(sorted(path.iterdir()) if path.is_dir() else ())
    meant = [run for run in runs if any((s / "tokenizer").is_dir() for s in _finished(run))]
    raise CheckpointError(
        f"{path} holds no finished checkpoint"
        + ("; " if path.exists() else ", as there is no such folder; check the path, ")
        + (f"did you mean {meant[0]}, which does? Else give" if meant else "give")
        + " the folder of a run that `mmclip pretrain` wrote, or one of its "
        "checkpoints/step_... folders"
    )


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "meta.json").is_file() and (folder / "model.safetensors").is_file()


def _what_it_is(path: Path) -> str | None:
    """What a path is that is given for a run, and what to give, where that is known."""
    if path.is_file() and _is_checkpoint(path.parent):
        return f"it is a file of one; give {path.parent}"
    if path.is_file() and path.suffix in WEIGHTS_SUFFIXES:
        return (
            "it is a file of weights, which does not say of what model; give a folder of "
            "transformers, or module:function that builds the model (docs/models.md)"
        )
    if (path / MANIFEST_FILE).is_file():
        return (
            f"it is a data folder, not a model; train one by `mmclip pretrain --data {path} --out "
            f"RUN`, or give the folder of one that is trained"
        )
    if path.parts[:1] and path.parts[0].startswith(("hf-hub:", "local-dir:")):
        return "it is a name of open_clip, which comes in by module:function (docs/models.md)"
    if re.fullmatch(r".+\.py:\w+", path.name):
        return "module:function names the module as Python imports it: a.b:function for a/b.py"
    return None if path.is_file() else _what_folder_it_is(path)


def _what_folder_it_is(folder: Path) -> str | None:
    """What a folder of other tools is, and what to give, where that is known."""
    if (folder / "snapshots").is_dir():
        return "it is the hub's cache of a model; give the model's id, or a folder in snapshots/"
    if (folder / "open_clip_config.json").is_file():
        return "it is of open_clip, whose models come in by module:function (docs/models.md)"
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter of PEFT; merge it into its model, and give that"
    if (folder / "image_encoder.onnx").is_file():
        return "it is an export for onnxruntime; give its run, or an export by --to hf"
    config = folder / "config.json"
    if not config.is_file() or (folder / CHECKPOINTS).is_dir():
        return None
    try:
        json.loads(config.read_text("utf-8"))
    except (OSError, ValueError):
        return "its config.json cannot be read; fetch the folder anew"
    return "its config.json names no model_type, as transformers' do; take a folder that it saved"


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint's folder lies in; the folder itself where it lies in none."""
    folder = checkpoint.resolve()
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else folder


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads model and tokenizer of a checkpoint or of a run's newest one. Executes no pickle.

    Raises:
        CheckpointError: When there is none, its files were changed, or the weights do not fit.
    """
    folder = find_checkpoint(path)
    meta = checkpoint_meta(folder)
    tensors = read_weights(folder, meta)
    config = parse(Config, meta["config"], f"configuration in {folder / 'meta.json'}")
    model = build_mmclip(
        config,
        rebuild_encoder(meta["vision_config"]),
        rebuild_encoder(meta["text_config"]),
        n_label_findings=len(tensors["label_head.bias"]) if "label_head.bias" in tensors else 0,
    )
    put_weights(model, tensors, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'tokenizer'} cannot be loaded: {error}") from None
    return Checkpoint(folder, model.eval(), tokenizer, config, meta)


def shared_names(model: nn.Module) -> dict[str, str]:
    """Further names of weights, with the first: T5 has its word embeddings under two.

    A checkpoint holds each weight once.
    """
    first: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: of for name, p in parameters if (of := first.setdefault(id(p), name)) != name}


def read_weights(folder: Path, meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint, once its files are found as they were written.

    Raises:
        CheckpointError: When one was changed since or is not listed; trainer.pt is not read.
    """
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    unlisted = there - meta["sha256"].keys() - {"meta.json"}
    if foreign := sorted(name for name in unlisted if not STRAY.fullmatch(Path(name).name)):
        raise CheckpointError(
            f"{folder / foreign[0]} is not of this checkpoint (meta.json does not list it); remove "
            f"it, or take another checkpoint"
        )
    for name, sha256 in meta["sha256"].items():
        if name != "trainer.pt" and not _is_intact(folder / name, sha256):
            raise CheckpointError(
                f"{folder / name} is missing or damaged (its checksum differs from meta.json); "
                f"take an older checkpoint"
            )
    return load_file(folder / "model.safetensors")


def put_weights(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Gives a model the weights of a checkpoint, each in its place and none left out.

    Raises:
        CheckpointError: When they do not fit.
    """
    shared = shared_names(model)
    whole = {**tensors, **{n: tensors[of] for n, of in shared.items() if of in tensors}}
    try:
        model.load_state_dict(whole, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / 'model.safetensors'} does not fit this version of the model: {error}"
        ) from None


def checkpoint_meta(folder: Path) -> dict[str, Any]:
    """What meta.json of a checkpoint says.

    Raises:
        CheckpointError: When it is missing, no JSON, or of another format.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}); take an older checkpoint"
        ) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        again = "train again into a new folder"
        raise CheckpointError(f"{folder} {other_format(found, FORMAT, again)}")
    if not is_sealed(meta, META_CHECKSUM):
        raise CheckpointError(
            f"{path} was changed since it was written (its checksum differs); take an older "
            f"checkpoint, or train again into a new folder"
        )
    named = re.fullmatch(r"step_(\d+)", folder.name)
    if named and int(named[1]) != meta["step"]:
        raise CheckpointError(
            f"{folder} is the checkpoint of step {meta['step']} under another name; call it "
            f"step_{meta['step']:06d}, or remove it"
        )
    if "config_hash" in meta and meta["config_hash"] != json_sha256(meta["config"]):
        raise CheckpointError(
            f"{path} holds another configuration than its config_hash is of; take an older "
            f"checkpoint, or train again into a new folder"
        )
    return meta


def run_file(checkpoint: Path, name: str) -> Path | None:
    """A file of the run's own folder that a checkpoint's meta.json lists, once it is found whole.

    Args:
        checkpoint: Its folder.
        name: Such as "trained_on.npy".

    Returns:
        The path; None where the checkpoint lies in no run's folder, or lists no such file.

    Raises:
        CheckpointError: When the file is missing or was changed since.
    """
    sha256 = checkpoint_meta(checkpoint).get(RUN_FILES_KEY, {}).get(name)
    folder = run_folder(checkpoint)
    if sha256 is None or folder == checkpoint.resolve():
        return None
    if not _is_intact(folder / name, sha256):
        raise CheckpointError(
            f"{folder / name} is missing or damaged (its checksum differs from meta.json of "
            f"{checkpoint.name}); put the file of this run back, or train again into a new folder"
        )
    return folder / name


def run_files(checkpoint: Path) -> list[str]:
    """The files of the run's own folder that `run_file` checks, by name.

    The key of what trained is not among them where the run came without it.
    """
    listed = checkpoint_meta(checkpoint).get(RUN_FILES_KEY, {})
    has_key = (run_folder(checkpoint) / KEY_FILE).is_file()
    return [name for name in listed if name != KEY_FILE or has_key]


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """What training needs to go on: plain values and tensors, read with weights_only=True.

    Raises:
        CheckpointError: When the file was changed since it was written, or holds code.
    """
    meta = checkpoint_meta(folder)
    path = folder / "trainer.pt"
    if not _is_intact(path, meta["sha256"]["trainer.pt"]):
        raise CheckpointError(
            f"{path} is missing or damaged (its checksum differs from meta.json); remove {folder} "
            f"to resume from the checkpoint before it"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, so mmclip did not write it; nothing "
            f"of it was run. Remove {folder} to resume from the checkpoint before it"
        ) from None
