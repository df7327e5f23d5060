"""What is installed, which device is used, and what of a folder that a command left is sound."""

import importlib.metadata
import json
import os
import platform
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmclip.checkpoint import load_checkpoint, load_trainer_state
from mmclip.data.cache import CacheError, verify_cache
from mmclip.data.check import find_overlaps, patient_key
from mmclip.data.folder import MANIFEST_FILE, META_FILE, ManifestError, read_meta
from mmclip.data.manifest import read_manifest
from mmclip.data.versions import changed_since
from mmclip.evaluation.metrics import auroc
from mmclip.evaluation.pages import PAGE_FILE
from mmclip.evaluation.results import RESULTS_FILE, checked

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "pydicom", "pillow", "spacy")
OPTIONAL = ("wandb",)

DIGITS = 1e-5
"""An AUROC in results.json may differ by this from the one of its scores: it has six digits."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    detail: str
    is_sound: bool = True


def examine_machine() -> Iterator[Finding]:
    """Versions and device."""
    yield Finding("mmclip", importlib.metadata.version("mmclip"))
    yield Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for name in PACKAGES:
        yield Finding(name, importlib.metadata.version(name))
    for name in OPTIONAL:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, f"not installed (optional; pip install 'mmclip[{name}]')")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            yield Finding(f"cuda:{i}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    else:
        yield Finding(
            "device",
            f"cpu, {torch.get_num_threads()} threads of {os.cpu_count()} cores "
            f"({torch.backends.cpu.get_cpu_capability()}); torch sees no GPU",
        )


def examine_data(folder: Path) -> Iterator[Finding]:
    """Whether a data folder is finished and unchanged."""
    try:
        meta = read_meta(folder)
        films = read_manifest(folder)
    except (ManifestError, OSError) as error:
        yield Finding("manifest", str(error), is_sound=False)
        return
    except ValueError as error:  # no JSON or no Parquet any more
        yield Finding(
            "manifest",
            f"{META_FILE} or {MANIFEST_FILE} is damaged ({error}); build the folder again with "
            f"`mmclip data build`",
            is_sound=False,
        )
        return
    yield Finding(
        "manifest",
        f"{len(films)} rows of {meta['n_patients']} patients, {meta['n_paired']} with film and "
        f"report, {meta['n_excluded']} excluded; data hash {meta['data_hash'][:12]}",
    )
    changed = ", ".join(changed_since(meta))
    said = f"{changed} changed since; build again to have it" if changed else "as installed"
    yield Finding("words", f"of mmclip {meta['made_with']['mmclip']}; {said}")
    splits = ", ".join(f"{name} {n}" for name, n in meta["splits"].items())
    shared = find_overlaps(films, [f.split for f in films], {"patients": patient_key})
    name = meta["split"]["name"] if "split" in meta else "as built"
    said = "; ".join(map(str, shared)) or "no patient is in two"
    yield Finding("splits", f"{name}: {splits}; {said}", is_sound=not shared)
    if meta["film_px"] is None:
        yield Finding("films", "none: the folder is text only")
        return
    try:
        verify_cache(folder, meta["films_sha256"])
    except (CacheError, OSError) as error:
        yield Finding("films", str(error), is_sound=False)
    else:
        yield Finding("films", f"{meta['n_with_image']} of {meta['film_px']} px; checksum as built")


def examine_run(folder: Path) -> Iterator[Finding]:
    """Whether a run holds a checkpoint that loads, and that training can go on from."""
    try:
        found = load_checkpoint(folder)
    except (ValueError, OSError) as error:
        yield Finding("checkpoint", str(error), is_sound=False)
        return
    yield Finding(
        "checkpoint",
        f"{found.folder.name} of data {found.meta['data_hash'][:12]}, config "
        f"{found.meta['config_hash'][:12]}; weights load, checksums as written",
    )
    try:
        step = load_trainer_state(found.folder)["step"]
    except (ValueError, OSError) as error:
        yield Finding("trainer state", str(error), is_sound=False)
    else:
        yield Finding("trainer state", f"loads; --resume goes on from step {step}")


def examine_results(folder: Path) -> Iterator[Finding]:
    """Whether results keep their contract, and the scores beside them give the same AUROC."""
    try:
        results = checked(json.loads((folder / RESULTS_FILE).read_text("utf-8")))
    except (ValueError, TypeError, OSError) as error:
        yield Finding(
            "results",
            f"{RESULTS_FILE} is damaged ({error}); score again with `mmclip zeroshot --overwrite`",
            is_sound=False,
        )
        return
    made = results.provenance
    again = f"make the results again by `{made.command}`"
    yield Finding(
        "results",
        f"{results.n_films} films of {results.n_patients} patients, data {made.data_hash[:12]}, "
        f"config {(made.config_hash or 'not ours')[:12]}; made by `{made.command}`",
    )
    try:
        with np.load(folder / "scores.npz") as stored:
            findings, labels, scores = (stored[key] for key in ("findings", "labels", "scores"))
        column = {str(finding): k for k, finding in enumerate(findings)}
        differ = []
        for row in results.findings:
            k = column[row.finding]
            found = auroc(labels[:, k], scores[:, k])
            if found is None or abs(found - row.auroc) > DIGITS:
                differ.append(row.finding)
    except (ValueError, LookupError, OSError, EOFError, zipfile.BadZipFile) as error:
        detail = f"scores.npz is missing or damaged ({error}); {again}"
        yield Finding("scores", detail, is_sound=False)
    else:
        n = len(results.findings)
        yield Finding(
            "scores",
            f"scores.npz gives {', '.join(differ)} another AUROC than {RESULTS_FILE}; {again}"
            if differ
            else f"AUROC of {n} findings from scores.npz as in {RESULTS_FILE}",
            is_sound=not differ,
        )
    if not (folder / PAGE_FILE).is_file():
        yield Finding("page", f"{PAGE_FILE} is missing; {again}", is_sound=False)


def examine(folder: Path) -> Iterator[Finding]:
    """A folder of any kind, or of several, told by what it holds."""
    if not folder.is_dir():
        yield Finding("folder", f"{folder} is no folder", is_sound=False)
        return
    is_checkpoint = (folder / "model.safetensors").is_file()
    is_run = is_checkpoint or (folder / "checkpoints").is_dir()
    is_data = (folder / META_FILE).is_file() and not is_checkpoint
    is_results = (folder / RESULTS_FILE).is_file()
    if is_data:
        yield from examine_data(folder)
    if is_run:
        yield from examine_run(folder)
    if is_results:
        yield from examine_results(folder)
    if not (is_data or is_run or is_results):
        yield Finding(
            "folder",
            f"{folder} is no data folder ({META_FILE}), run (checkpoints/) or results "
            f"({RESULTS_FILE}): no `mmclip data build`, `mmclip pretrain` or `mmclip zeroshot` has "
            f"finished there",
            is_sound=False,
        )
