"""Damaged and hostile inputs, for as many minutes as you like: what crashes, hangs, or passes?

    python bench/fuzz.py --minutes 20 [--seed 0]

Two kinds. *Free* inputs (reports, images, CSV, TOML, XML) may be read or refused with an error that
the package documents; anything else is a crash. *Sealed* ones (each file of a data folder, of a
checkpoint, of a run) are one file changed: they must be refused, or read as they were written;
anything else is a silent accept. An input that takes more than 20 s of CPU time is a time-out.
The last line is one JSON object: inputs tried, crashes, time-outs, silent accepts, by target.
"""

import argparse
import io
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from mmclip.checkpoint import CheckpointError, load_trainer_state
from mmclip.config import load_config
from mmclip.data.cache import CacheError
from mmclip.data.entities import find_entities
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.images import ImageError, decode_image
from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.leakage.splits import set_split
from mmclip.data.synthetic import Preset, write_dataset
from mmclip.data.text import parse_report, split_sentences
from mmclip.evaluation.results import read_results, read_scores
from mmclip.retrieval.ranking import read_retrieval
from mmclip.run import open_run
from mmclip.training.pretrain import PretrainRequest, pretrain

TIMEOUT_S, HANG_S = 20, 600
"""CPU time that an input may take, and time on the wall, which on a busy machine says little."""

PRESET = Preset(name="fuzz", version=1, seed=3, image_size=32, n_train=60, n_val=20, n_test=40)

TINY = (
    "model.embed_dim=16", "data.image_size=32", "model.image.width=32", "model.image.depth=1",
    "model.image.heads=2", "model.text.width=32", "model.text.depth=1", "model.text.heads=2",
    "model.text.vocab_size=400", "train.steps=2", "train.batch_size=8",
)  # fmt: skip

REFUSALS = (ValueError, ImageError, CheckpointError, CacheError, ManifestError, OSError)
"""What a command turns into one line for its user."""


WORDS = (b"\0", b"-1", b"1e999", b"NaN", b"<", b"]", b'"', b"\xff\xfe", b"9" * 40)
"""What parsers trip over."""


class TimedOut(BaseException):
    """An input took too long."""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Content with some bytes changed, cut, repeated or put in."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:]
            case 2:
                out[at:at] = rng.randbytes(rng.randrange(1, 16))
            case 3:
                del out[at : at + rng.randrange(1, 64)]
            case 4:
                out[at:at] = out[at : at + rng.randrange(1, 64)]
            case _:
                word = rng.choice(WORDS)
                out[at : at + len(word)] = word
    return bytes(out)


# -- free inputs: read or refused --

DICOM_SYNTAXES = (
    uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless,
    uid.JPEGLSLossless, uid.JPEG2000Lossless,
)  # fmt: skip


def dicom_file(syntax: uid.UID) -> bytes:
    """A small DICOM file in a transfer syntax, with padding, rescaling, a window and a LUT."""
    pixels = np.add.outer(np.arange(40) * 24, np.arange(48) * 39).astype(np.uint16)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.SOPInstanceUID, data.Modality, data.ViewPosition = "1.2.3", "DX", "PA"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PhotometricInterpretation, data.PixelPaddingValue = "MONOCHROME1", 0
    data.RescaleSlope, data.RescaleIntercept = "0.5", "-10"
    data.WindowCenter, data.WindowWidth = ["900", "500"], ["1800", "200"]
    lut = Dataset()
    lut.add_new("LUTDescriptor", "US", [1400, 0, 11])
    lut.add_new("LUTData", "US", list(range(1400)))
    data.VOILUTSequence = [lut]
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW"
    if syntax.is_compressed and syntax != uid.DeflatedExplicitVRLittleEndian:
        data.compress(syntax, generate_instance_uid=False)
    data.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def free_targets(folder: Path) -> dict[str, tuple[list[bytes], Callable[[bytes], object]]]:
    """By name: seeds, and what reads an input."""
    rng = np.random.default_rng(0)
    images = []
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"):
        made = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 32), np.uint8)).save(made, kind)
        images.append(made.getvalue())
    images += [dicom_file(syntax) for syntax in DICOM_SYNTAXES]
    reports = [
        b"FINDINGS: The heart is enlarged. No pleural effusion.\n\nIMPRESSION: 1. Cardiomegaly.",
        b"EXAM: CHEST TWO VIEWS\n___ year old [**Name**] with cough.\nFINDINGS:\nClear lungs.",
    ]
    mapping = (
        b'table = "t.csv"\nsource = "s"\n[columns]\nimage = "file"\npatient_id = "patient"\n'
        b'report = "report"\nlabels = "labels"\n[labels]\nseparator = "|"\n'
    )
    table = b"file,patient,report,labels\n0.png,p0,Clear lungs.,mass|edema\n1.png,p1,,\n"
    xml = (
        b'<?xml version="1.0"?><eCitation><MedlineCitation><Article><Abstract>'
        b'<AbstractText Label="FINDINGS">Clear.</AbstractText></Abstract></Article>'
        b'</MedlineCitation><parentImage id="CXR1_1"><figureId>F1</figureId></parentImage>'
        b"</eCitation>"
    )

    def read_report(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        report = parse_report(text)
        whole = report.text or ""
        split_sentences(whole)
        for entity in next(iter(find_entities([whole]))):
            assert 0 <= entity.start <= entity.end <= len(whole)

    def read_image(content: bytes) -> None:
        assert decode_image(content).ndim == 2

    def read_table(content: bytes, of: str) -> None:
        root = folder / "csv"
        root.mkdir(exist_ok=True)
        (root / "t.csv").write_bytes(content if of == "csv" else table)
        (root / "m.toml").write_bytes(content if of == "mapping" else mapping)
        list(open_reader("csv", root, mapping=root / "m.toml", table=None))

    def read_config(content: bytes) -> None:
        (folder / "c.toml").write_bytes(content)
        load_config(str(folder / "c.toml"))

    def read_xml(content: bytes) -> None:
        root = folder / "openi"
        (root / "ecgen-radiology").mkdir(parents=True, exist_ok=True)
        (root / "NLMCXR_png").mkdir(exist_ok=True)
        (root / "NLMCXR_png" / "CXR1_1.png").write_bytes(images[0])
        (root / "ecgen-radiology" / "1.xml").write_bytes(content)
        list(open_reader("openi", root, mapping=None, table=None))

    return {
        "reports": (reports, read_report),
        "images": (images, read_image),
        "csv": ([table], lambda content: read_table(content, "csv")),
        "mapping": ([mapping], lambda content: read_table(content, "mapping")),
        "config": ([b'extends = "tiny"\n[train]\nsteps = 6\nbase_lr = 0.01\n'], read_config),
        "xml": ([xml], read_xml),
    }


# -- sealed files: refused, or read as they were --


def state_of(folder: Path) -> dict[str, Any]:
    """All that is read of a data folder, a run and its results, as values that can be compared."""
    data, run = folder / "data", folder / "run"
    dataset = open_dataset([data])
    cache = dataset.caches[0]
    assert cache is not None
    opened = open_run(run)
    test = dataset.select([sample.split == "test" for sample in dataset.samples])
    results = read_results(folder / "results")
    scores = read_scores(folder / "results", results).arrays()
    return {
        "samples": repr(dataset.samples),
        "pixels": np.asarray(cache.images).tobytes(),
        "weights": {k: v.numpy().tobytes() for k, v in opened.model.state_dict().items()},
        "config": opened.config.model_dump(mode="json"),
        "vocabulary": opened.tokenizer.get_vocab(),
        "step": opened.step,
        "seen": opened.seen(["mass", "edema"]),
        "leak check": opened.check_unseen(test, "test"),
        "trainer": load_trainer_state(opened.checkpoint.folder)["step"],
        "results": results.model_dump_json(),
        "scores": {name: value.tobytes() for name, value in scores.items()},
        "retrieval": read_retrieval(folder / "ranks").model_dump_json(),
    }


def make(folder: Path) -> None:
    """A data folder with a split, a run, and what two evaluations leave of it."""
    raw = write_dataset(PRESET, folder / "raw")
    reader = open_reader("csv", raw, mapping=raw / "mapping.toml", table=None)
    build_data(reader, raw, folder / "data", image_size=32)
    request = PretrainRequest(
        (folder / "data",), folder / "run", load_config("tiny", TINY), "mmclip fuzz", cpu=True
    )
    set_split(folder / "data", "clean")
    pretrain(request)
    given = ["--model", folder / "run", "--data", folder / "data", "--cpu", "--n-resamples", "5"]
    for words in (
        ["zeroshot", *given, "--finding", "nodule", "--out", folder / "results"],
        ["retrieve", *given, "--evaluate", "--out", folder / "ranks"],
    ):
        subprocess.run([sys.executable, "-m", "mmclip", *map(str, words)], check=True)


READ = ("samples.parquet", "images.npy", "meta.json", "model.safetensors", "trainer.pt",
        "trained_on.npy", "trained_looks.npy", "seen.json", "split.json", "results.json",
        "scores.npz", "retrieval.json")  # fmt: skip


def sealed_files(folder: Path) -> list[Path]:
    """The files that commands read."""
    places = (folder / name for name in ("data", "run", "results", "ranks"))
    found = [path for place in places for path in sorted(place.rglob("*")) if path.is_file()]
    return [p for p in found if p.name in READ or p.parent.name == "tokenizer"]


# -- the loop --


class Tally:
    """Counts by target, and the first of each kind of failure."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.tried: Counter[str] = Counter()

    def run(self, target: str, what: str, read: Callable[[], str | None]) -> None:
        """Reads an input; `read` returns what is wrong of an accepted one."""
        self.tried[target] += 1
        signal.setitimer(signal.ITIMER_PROF, TIMEOUT_S)
        signal.alarm(HANG_S)
        try:
            if wrong := read():
                self.fail("silent accepts", target, what, wrong)
        except REFUSALS:
            self.counts["refused"] += 1
        except TimedOut:
            self.fail(
                "time-outs", target, what, f"more than {TIMEOUT_S} s of CPU time, or {HANG_S} s"
            )
        except Exception as error:  # noqa: BLE001  a crash of any kind is what is looked for
            self.fail("crashes", target, what, f"{type(error).__name__}: {error}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    def fail(self, kind: str, target: str, what: str, why: str) -> None:
        """Counts and says a failure."""
        self.counts[kind] += 1
        print(f"{kind}: {target}: {what}: {' '.join(why.split())[:300]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rng, tally = random.Random(args.seed), Tally()

    def time_out(*_: object) -> None:
        raise TimedOut

    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, time_out)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make(folder)
        whole, files, targets = state_of(folder), sealed_files(folder), free_targets(folder)
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            for name, (seeds, read) in targets.items():
                for _ in range(20):
                    content = mutated(rng.choice(seeds), rng)
                    tally.run(name, repr(content[:80]), lambda r=read, c=content: r(c) and None)
            path = rng.choice(files)
            before = path.read_bytes()
            path.write_bytes(mutated(before, rng) if rng.random() < 0.9 else b"")
            if path.read_bytes() != before:
                differs = lambda: _differs(state_of(folder), whole)  # noqa: E731
                tally.run("sealed", str(path.relative_to(folder)), differs)
            path.write_bytes(before)
            shutil.rmtree(folder / "csv", ignore_errors=True)
    found = {kind: tally.counts[kind] for kind in ("crashes", "time-outs", "silent accepts")}
    print(json.dumps({"inputs": sum(tally.tried.values()), **found, "seed": args.seed,
                      "minutes": args.minutes, "by_target": dict(tally.tried)}))  # fmt: skip


def _differs(found: dict[str, Any], whole: dict[str, Any]) -> str | None:
    changed = [key for key in whole if found[key] != whole[key]]
    return f"read with other {', '.join(changed)}" if changed else None


if __name__ == "__main__":
    main()
