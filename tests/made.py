"""Small data folders, random batches and small models, shared by tests."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmclip.batch import Batch, BatchSlice, TextBatch
from mmclip.checkpoint import CHECKPOINTS, META_CHECKSUM, RUN_FILES_KEY
from mmclip.config import Config, load_config
from mmclip.data.ingest.build import build_data
from mmclip.data.leakage.trained import KEY_FILE, TRAINED_FILE, trained_keys
from mmclip.data.sample import Sample
from mmclip.files import file_sha256, json_sha256, sealed
from mmclip.models.build import build_mmclip
from mmclip.models.encoders import build_image_encoder, build_text_encoder
from mmclip.models.mmclip import MMCLIP

VOCAB, MASK_ID, IMAGE_SIZE, PATCH_SIZE, N_PATCHES = 50, 4, 32, 8, 16
N_LABELS = 3
SMALL = (
    "model.embed_dim=16", "data.image_size=32", "model.image.kind=vit", "model.image.width=32",
    "model.image.depth=2", "model.image.heads=2",
    "model.text.width=24", "model.text.depth=2", "model.text.heads=2",
    "model.image_decoder.width=16", "model.image_decoder.heads=2",
    "model.text_decoder.width=16", "model.text_decoder.heads=2", "data.sentence_drop_prob=0",
)  # fmt: skip
LABELS = ("loss.label=1", "unpaired.rows_per_pair=1")
WHOLE = ("loss.image=1", "loss.text=1", "image_mask.anneal_from=0", "image_mask.anneal_to=0")


def small_config(*overrides: str) -> Config:
    return load_config("tiny", [*SMALL, *overrides])


def small_model(config: Config | None = None, seed: int = 0) -> MMCLIP:
    config = config or small_config()
    torch.manual_seed(seed)
    return build_mmclip(
        config,
        build_image_encoder(config.model.image, IMAGE_SIZE),
        build_text_encoder(config.model.text, VOCAB, max_tokens=16, pad_token_id=0),
        n_label_findings=N_LABELS,
    )


def no_texts(width: int = 2) -> TextBatch:
    ids = torch.zeros(0, width, dtype=torch.long)
    is_valid = ids.bool()
    return TextBatch(torch.zeros(0, dtype=torch.long), ids, is_valid, is_valid, is_valid, ids)


def made_texts(rows: Sequence[int], n_tokens: int, generator: torch.Generator) -> TextBatch:
    """Texts of 3 to `n_tokens` tokens, [CLS] and [SEP] included, with masked words."""
    m = len(rows)
    ids = torch.randint(5, VOCAB, (m, n_tokens), generator=generator)
    length = torch.randint(3, n_tokens + 1, (m, 1), generator=generator)
    place = torch.arange(n_tokens)[None]
    is_valid = place < length
    ids = ids.masked_fill(~is_valid, 0)
    ids[:, 0] = 2
    ids = ids.masked_fill(place == length - 1, 3)
    is_word = is_valid & (place > 0) & (place < length - 1)
    is_masked = is_word & (torch.rand(ids.shape, generator=generator) < 0.4)
    is_masked[:, 1] = True  # at least one of each text
    masked_ids = ids.masked_fill(is_masked, MASK_ID)
    return TextBatch(
        torch.tensor(list(rows), dtype=torch.long), ids, is_valid, is_word, is_masked, masked_ids
    )


def cut(texts: TextBatch, rows: slice) -> TextBatch:
    """The texts of some rows, numbered from the first of them."""
    keep = (texts.rows >= rows.start) & (texts.rows < rows.stop)
    taken = texts.take(keep)
    return TextBatch(**{**taken.tensors(), "rows": taken.rows - rows.start})


def cut_batch(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch as a batch of their own."""
    return Batch(
        image=batch.image[rows],
        reports=cut(batch.reports, rows),
        prompts=cut(batch.prompts, rows),
        keys=batch.keys[rows],
        patch_noise=batch.patch_noise[rows],
        lesion_ratio=None if batch.lesion_ratio is None else batch.lesion_ratio[rows],
        image_ids=batch.image_ids[rows],
        step=batch.step,
        labels=None if batch.labels is None else batch.labels[rows],
    )


def made_labels(n: int, without_report: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Labels of the rows without a report, one of each unknown; the other rows have none."""
    labels = torch.randint(0, 2, (n, N_LABELS), generator=generator).float()
    labels[torch.arange(n), torch.arange(n) % N_LABELS] = torch.nan
    has_report = torch.tensor([i not in without_report for i in range(n)])
    return labels.masked_fill(has_report[:, None], torch.nan)


class MadeBatches:
    """Random images and texts, the same for a step whoever asks for which share."""

    def __init__(
        self,
        batch_size: int = 8,
        without_report: Sequence[int] = (),
        with_prompt: Sequence[int] = (),
    ) -> None:
        self.batch_size, self.without_report = batch_size, without_report
        self.with_prompt = with_prompt

    def batch(self, step: int = 0, share: BatchSlice | None = None) -> Batch:
        n = self.batch_size
        generator = torch.Generator().manual_seed(step)
        reports = made_texts([i for i in range(n) if i not in self.without_report], 9, generator)
        prompts = made_texts(self.with_prompt, 6, generator)
        keys = torch.stack(  # texts are equal two by two, and label sets are not known
            [torch.arange(n), torch.arange(n) // 2, torch.full((n,), -1)], 1
        )
        whole = Batch(
            image=torch.randn(n, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
            reports=reports,
            prompts=prompts,
            keys=keys,
            patch_noise=torch.rand(n, N_PATCHES, generator=generator),
            lesion_ratio=torch.rand(n, N_PATCHES, generator=generator),
            image_ids=tuple(f"image-{i}" for i in range(n)),
            step=step,
            labels=made_labels(n, self.without_report, generator),
        )
        return whole if share is None else cut_batch(whole, share.of_rows(n))


REPORTS = [
    "The heart is enlarged. No pleural effusion. Clear lungs.",
    "Large left pleural effusion. The heart size is normal.",
    "No acute disease.",
    "No acute disease.",
]


def write_images(root: Path, n: int = 8) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (40, 48), dtype=np.uint8)).save(root / f"{i}.png")
        sample = Sample(
            image_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i}", source="made",
            split="train", image=f"{i}.png", report=REPORTS[i % len(REPORTS)],
            labels={"cardiomegaly": i % 2, "mass": -1}, view="PA",
        )  # fmt: skip
        samples.append(sample)
    return samples


def write_folder(root: Path, n: int = 8) -> Path:
    """A data folder of 32 px: the last image is a lateral, the last but one has no report."""
    samples = write_images(root, n)
    samples[-2] = replace(samples[-2], report=None)
    samples[-1] = replace(samples[-1], view="L")
    build_data(samples, root, root / "data", image_size=32)
    return root / "data"


def reseal(checkpoint: Path, **changes: Any) -> None:
    """Changes meta.json of a checkpoint with checksums that fit, as one who means to deceive."""
    path = checkpoint / "meta.json"
    meta = {**json.loads(path.read_text("utf-8")), **changes}
    meta["config_hash"] = json_sha256(meta["config"])
    path.write_text(json.dumps(sealed(meta, META_CHECKSUM)), "utf-8")


def put_run_file(run: Path, name: str, content: bytes) -> None:
    """Replaces a file in the folder of a run, and its checksum in all checkpoints."""
    (run / name).write_bytes(content)
    for checkpoint in (run / CHECKPOINTS).iterdir():
        listed = json.loads((checkpoint / "meta.json").read_text("utf-8"))[RUN_FILES_KEY]
        reseal(checkpoint, **{RUN_FILES_KEY: {**listed, name: file_sha256(run / name)}})


def trained_on(run: Path, samples: Sequence[Sample]) -> None:
    """Has a run say that it was trained on some images."""
    secret = bytes.fromhex((run / KEY_FILE).read_text("utf-8").strip())
    keys = io.BytesIO()
    np.save(keys, trained_keys(samples, secret))
    put_run_file(run, TRAINED_FILE, keys.getvalue())
