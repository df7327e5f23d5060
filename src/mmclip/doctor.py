"""What is installed, which device is used, and what of a folder that a command left is sound."""

import importlib.metadata
import json
import os
import platform
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmclip.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    checkpoint_meta,
    find_checkpoint,
    load_checkpoint,
    load_trainer_state,
    read_weights,
    run_file,
    run_files,
)
from mmclip.data.cache import CacheError, verify_cache
from mmclip.data.dicom_pixels import decoders_installed
from mmclip.data.folder import MANIFEST_FILE, META_FILE, ManifestError, read_meta
from mmclip.data.leakage.check import find_overlaps, patient_key
from mmclip.data.manifest import read_manifest
from mmclip.data.versions import changed_since
from mmclip.disclosure import given_away
from mmclip.evaluation.metrics import auroc
from mmclip.evaluation.pages import PAGE_FILE
from mmclip.evaluation.results import RESULTS_FILE, ResultsError, read_results, read_scores
from mmclip.evaluation.scores import ScoresError
from mmclip.files import file_sha256
from mmclip.finetuning.finetune import SUMMARY_FILE
from mmclip.retrieval.ranking import RANKS_FILE, RETRIEVAL_FILE, read_retrieval
from mmclip.retrieval.retrieve import SHEET_FILE

PACKAGES = (
    "torch", "transformers", "tokenizers", "accelerate", "pydicom", "pillow", "python-gdcm",
    "pyjpegls", "pylibjpeg-openjpeg",
)  # fmt: skip
OPTIONAL = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "spacy": "spacy",
    "distributed": "dask",
    "openpyxl": "xlsx",
    "sentencepiece": "sentencepiece",
    "protobuf": "sentencepiece",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "fastapi": "serve",
    "uvicorn": "serve",
    "python-multipart": "serve",
}
"""Each package of the extras in pyproject.toml, and its extra."""

DIGITS = 1e-5
"""An AUROC in results.json may differ by this from the one of its scores: it has six digits."""


@dataclass(frozen=True)
class HealthCheck:
    """One line of the report."""

    what: str
    detail: str
    is_sound: bool = True


def examine_machine() -> Iterator[HealthCheck]:
    """Versions and device."""
    yield HealthCheck("mmclip", importlib.metadata.version("mmclip"))
    yield HealthCheck("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for name in PACKAGES:
        yield HealthCheck(name, importlib.metadata.version(name))
    for name, extra in OPTIONAL.items():
        try:
            yield HealthCheck(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield HealthCheck(name, f"not installed (optional; pip install 'mmclip[{extra}]')")
    for syntax, names in decoders_installed().items():
        yield HealthCheck(
            "DICOM", f"{syntax}: {' or '.join(names) or 'no decoder is installed'}", bool(names)
        )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            yield HealthCheck(f"cuda:{i}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    else:
        yield HealthCheck(
            "device",
            f"cpu, {torch.get_num_threads()} of {os.cpu_count()} cores "
            f"({torch.backends.cpu.get_cpu_capability()}); torch sees no GPU",
        )


def examine_data(folder: Path) -> Iterator[HealthCheck]:
    """Whether a data folder is finished and unchanged."""
    try:
        meta = read_meta(folder)
        samples = read_manifest(folder)
    except (ManifestError, OSError) as error:
        yield HealthCheck("manifest", str(error), is_sound=False)
        return
    except ValueError as error:  # no JSON or no Parquet any more
        yield HealthCheck(
            "manifest",
            f"{META_FILE} or {MANIFEST_FILE} is damaged ({error}); build the folder again with "
            f"`mmclip data build`",
            is_sound=False,
        )
        return
    yield HealthCheck(
        "manifest",
        f"{len(samples):,} rows of {meta['n_patients']:,} patients, {meta['n_paired']:,} with "
        f"image and report, {meta['n_excluded']:,} excluded; data hash {meta['data_hash'][:12]}",
    )
    changed = ", ".join(changed_since(meta))
    said = f"{changed} changed since; build again to have it" if changed else "as installed"
    yield HealthCheck("words", f"of mmclip {meta['made_with']['mmclip']}; {said}")
    splits = ", ".join(f"{name} {n:,}" for name, n in meta["splits"].items())
    shared = find_overlaps(samples, [f.split for f in samples], {"patients": patient_key})
    name = meta["split"]["name"] if "split" in meta else "as built"
    said = "; ".join(map(str, shared)) or "no patient is in two"
    yield HealthCheck("splits", f"{name}: {splits}; {said}", is_sound=not shared)
    if meta["image_size"] is None:
        yield HealthCheck("images", "none: the folder is text only")
        return
    try:
        verify_cache(folder, meta["images_sha256"])
    except (CacheError, OSError) as error:
        yield HealthCheck("images", str(error), is_sound=False)
    else:
        yield HealthCheck(
            "images", f"{meta['n_with_image']:,} of {meta['image_size']} px; checksum as built"
        )


def examine_run(folder: Path) -> Iterator[HealthCheck]:
    """Whether a run holds a checkpoint that loads, and that training can go on from."""
    try:
        where = find_checkpoint(folder)
        meta = checkpoint_meta(where)
        if "findings" in meta:  # what fine-tuning saves
            yield from _examine_classifier(folder, where, meta)
            return
        found = load_checkpoint(folder)
    except (ValueError, OSError) as error:
        yield HealthCheck("checkpoint", str(error), is_sound=False)
        return
    yield from _run_files(where)
    yield HealthCheck(
        "checkpoint",
        f"{found.folder.name} of data {found.meta['data_hash'][:12]}, config "
        f"{found.meta['config_hash'][:12]}; weights load, checksums as written",
    )
    try:
        step = load_trainer_state(found.folder)["step"]
    except (ValueError, OSError) as error:
        yield HealthCheck("trainer state", str(error), is_sound=False)
    else:
        yield HealthCheck("trainer state", f"loads; --resume goes on from step {step}")
    yield from (HealthCheck("shared", said) for said in given_away(found))


def _run_files(checkpoint: Path) -> Iterator[HealthCheck]:
    """What of the run's own folder is not as it was written."""
    for name in run_files(checkpoint):
        try:
            run_file(checkpoint, name)
        except CheckpointError as error:
            yield HealthCheck(name, str(error), is_sound=False)


def examine_results(folder: Path) -> Iterator[HealthCheck]:
    """Whether results keep their contract, and the scores beside them give the same AUROC."""
    try:
        results = read_results(folder)
    except ResultsError as error:
        yield HealthCheck("results", str(error), is_sound=False)
        return
    made = results.provenance
    again = f"make the results again by `{made.command}`"
    yield HealthCheck(
        "results",
        f"{results.n_images:,} images of {results.n_patients:,} patients, "
        f"data {made.data_hash[:12]}, config {(made.config_hash or 'not ours')[:12]}; "
        f"made by `{made.command}`",
    )
    try:
        stored = read_scores(folder, results)
        column = {name: k for k, name in enumerate(stored.names())}
        differ = []
        for row in results.findings:
            k = column[row.finding]
            found = auroc(stored.labels[:, k], stored.scores[:, k])
            if found is None or abs(found - row.auroc) > DIGITS:
                differ.append(row.finding)
    except (ScoresError, LookupError) as error:
        yield HealthCheck("scores", f"{error}; {again}", is_sound=False)
    else:
        n = len(results.findings)
        yield HealthCheck(
            "scores",
            f"scores.npz gives {', '.join(differ)} another AUROC than {RESULTS_FILE}; {again}"
            if differ
            else f"AUROC of {n} findings from scores.npz as in {RESULTS_FILE}",
            is_sound=not differ,
        )
    if not (folder / PAGE_FILE).is_file():
        yield HealthCheck("page", f"{PAGE_FILE} is missing; {again}", is_sound=False)


def _examine_classifier(folder: Path, where: Path, meta: dict) -> Iterator[HealthCheck]:
    """The checkpoint of full fine-tuning: of a finished run the best one, without its trainer."""
    read_weights(where, meta)
    yield HealthCheck(
        "checkpoint",
        f"{where.name} of full fine-tuning for {', '.join(meta['findings'])}; checksums as written",
    )
    if (where / "trainer.pt").is_file():
        yield HealthCheck("trainer state", f"loads from step {load_trainer_state(where)['step']}")
    elif not (folder / RESULTS_FILE).is_file():
        yield HealthCheck(
            "trainer state", "none: the run is finished, or this is its best checkpoint"
        )


FINETUNED = re.compile(r"(probe|full)-[\d.e+-]+-\d+")
"""Folders of the runs in the --out of `mmclip finetune`."""


def examine_finetuned(folder: Path) -> Iterator[HealthCheck]:
    """Whether all runs of `mmclip finetune` are there and sound, and the summary is of them."""
    runs = {p.name: p for p in sorted(folder.iterdir()) if FINETUNED.fullmatch(p.name)}
    again = "the same `mmclip finetune` resumes it"
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text("utf-8"))
        reached = {
            f"{line['method']}-{100 * line['fraction']:g}-{seed}": value
            for line in summary["lines"]
            for seed, value in line["macro_auroc"].items()
        }
        said = f"{len(reached)} runs by protocol {summary['protocol']}, {summary['init']}"
        yield HealthCheck("summary", said)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        reached = {}
        detail = f"{SUMMARY_FILE} is missing or damaged ({error}); {again}"
        yield HealthCheck("summary", detail, is_sound=False)
    for name in sorted(runs.keys() | reached.keys()):
        if name not in runs:
            yield HealthCheck(name, f"{name} of {SUMMARY_FILE} is missing; {again}", is_sound=False)
            continue
        bad = [found for found in examine(runs[name]) if not found.is_sound]
        yield from (HealthCheck(name, f"{f.what}: {f.detail}", is_sound=False) for f in bad)
        if bad or not (runs[name] / RESULTS_FILE).is_file():
            if not bad:
                yield HealthCheck(name, f"is not finished; {again}")
            continue
        found = read_results(runs[name]).macro_auroc
        if name in reached and not _is_close(found, reached[name]):
            detail = f"{SUMMARY_FILE} gives it another macro AUROC; {again}"
            yield HealthCheck(name, detail, is_sound=False)
        else:
            yield HealthCheck(name, "results as its scores give them")


def _is_close(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and abs(one - other) <= DIGITS)


def examine_retrieval(folder: Path) -> Iterator[HealthCheck]:
    """Whether results of `mmclip retrieve --evaluate` keep their contract."""
    try:
        found = read_retrieval(folder)
    except ValueError as error:
        yield HealthCheck("retrieval", str(error), is_sound=False)
        return
    made = found.provenance
    yield HealthCheck(
        "retrieval",
        f"{found.n_images:,} images of {found.n_patients:,} patients, data {made.data_hash[:12]}; "
        f"made by `{made.command}`",
    )
    ranks, again = folder / RANKS_FILE, f"make the results again by `{made.command}`"
    if ranks.is_file() and file_sha256(ranks) != found.files_sha256.get(RANKS_FILE):
        detail = f"{RANKS_FILE} was changed (its checksum differs from {RETRIEVAL_FILE}); {again}"
        yield HealthCheck("arrays", detail, is_sound=False)
    else:
        yield from _arrays(ranks, again)


def examine_explanations(folder: Path, files: list[Path]) -> Iterator[HealthCheck]:
    """What `mmclip explain` left in a folder: results of --evaluate, and maps beside pictures."""
    for path in files:
        if path.suffix == ".json":
            known = json.loads(path.read_text("utf-8"))
            said = f"of {known['n_images']:,} images; made by `{known['command']}`"
            yield HealthCheck("explanations", f"{path.name} {said}")
        else:
            yield from _arrays(path, "explain the image again with --overwrite")


def _explanations(folder: Path) -> list[Path]:
    """Results and maps of `mmclip explain`, whose names their user gave."""
    found = [path for path in sorted(folder.glob("*.npz")) if path.with_suffix(".png").is_file()]
    for path in sorted(folder.glob("*.json")):
        try:
            known = json.loads(path.read_text("utf-8"))
        except ValueError:
            continue
        if (
            isinstance(known, dict)
            and {"command", "saliency_maps", "sanity", "n_images"} <= known.keys()
        ):
            found.append(path)
    return found


def _arrays(path: Path, again: str) -> Iterator[HealthCheck]:
    try:
        with np.load(path) as stored:
            sizes = ", ".join(f"{name} {stored[name].shape}" for name in stored.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        detail = f"{path.name} is missing or damaged ({error}); {again}"
        yield HealthCheck("arrays", detail, is_sound=False)
    else:
        yield HealthCheck("arrays", f"{path.name}: {sizes}")


def _stored(folder: Path) -> dict[Path, str]:
    """The notes of an embedding store, and the checksum that each tells."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            known = json.loads(path.read_text("utf-8"))
        except ValueError:
            continue
        if isinstance(known, dict) and known.keys() == {"of", "weights", "sha256"}:
            found[path] = str(known["sha256"])
    return found


def examine_store(notes: dict[Path, str]) -> Iterator[HealthCheck]:
    """Whether stored embeddings are as they were written."""
    for note, sha256 in notes.items():
        path = note.with_suffix(".npy")
        if path.is_file() and file_sha256(path) == sha256:
            shape = np.load(path, mmap_mode="r").shape
            yield HealthCheck("embeddings", f"{path.name} {shape}; checksum as written")
        else:
            detail = f"{path.name} is missing or damaged; the next command makes it anew"
            yield HealthCheck("embeddings", detail, is_sound=False)


def examine(folder: Path) -> Iterator[HealthCheck]:
    """A folder of any kind, or of several, told by what it holds."""
    if not folder.is_dir():
        yield HealthCheck(
            "folder", f"{folder} is no folder; give a data folder, a run or results", is_sound=False
        )
        return
    is_checkpoint = (folder / "model.safetensors").is_file()
    kinds: list[Iterator[HealthCheck]] = []
    if (folder / META_FILE).is_file() and not is_checkpoint:
        kinds.append(examine_data(folder))
    if is_checkpoint or (folder / CHECKPOINTS).is_dir():
        kinds.append(examine_run(folder))
    if (folder / RESULTS_FILE).is_file():
        kinds.append(examine_results(folder))
    if (folder / SUMMARY_FILE).is_file() or any(
        FINETUNED.fullmatch(path.name) for path in folder.iterdir()
    ):
        kinds.append(examine_finetuned(folder))
    if (folder / RETRIEVAL_FILE).is_file():
        kinds.append(examine_retrieval(folder))
    if (folder / SHEET_FILE).is_file():
        kinds.append(iter([HealthCheck("search", f"{SHEET_FILE}, images that a search found")]))
    if maps := _explanations(folder):
        kinds.append(examine_explanations(folder, maps))
    if notes := _stored(folder):
        kinds.append(examine_store(notes))
    for kind in kinds:
        yield from kind
    if not kinds:
        yield HealthCheck(
            "folder",
            f"{folder} is no data folder ({META_FILE}), run (checkpoints/), results "
            f"({RESULTS_FILE}, {SUMMARY_FILE}, {RETRIEVAL_FILE}), explanations or stored "
            f"embeddings: no command of mmclip has finished there",
            is_sound=False,
        )
