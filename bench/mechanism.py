"""Does a trained model use the other modality, and does AttMIM's score find the lesion?

    python bench/mechanism.py runs/whole --raw made/raw --data made/data [--out mechanism.json]

On synthetic images, whose lesions are known; the validation images unless --split says another.
Formulas are chosen on those only.

EntMLM      Loss and accuracy of the masked words with the true image, with the image of another
            patient, with mid-grey and with the mean training image. Words are masked as in
            training, and then one kind of entity at a time.
AttMIM      Loss of the masked patches with the image's own report, with another patient's and with
            none, on the same patches: chosen at random, or the lesion's first. `features` masks
            behind the encoder, whose visible features have seen the masked pixels; `pixels` before.
Pointing    Images with two findings or more are asked for one by a phrase ("There is a nodule.").
            A hit is a top patch that this finding's mask touches and no other finding's does; ties
            are broken by their mean. The headline counts lesions under 3 % of the image.

`decoder_attention/masked` masks the finding's name from the decoder, as in training, so that it can
point to any lesion; under `entities` and `all` the decoder reads the name. The other scores read
the whole phrase, whose only entity is the name: for them `masked` is `entities`. `contribution,
prompt pair` takes the contribution to a finding's denial away from that to the finding, as the
zero-shot score does. The last line is one JSON object.
"""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmclip.batch import Batch, BatchSlice, TextBatch
from mmclip.checkpoint import Checkpoint, load_checkpoint
from mmclip.config import WHOLE_TEXT_SCORES, ImageMaskConfig, MaskPolicy, MaskStage
from mmclip.data.batches import TrainingBatches
from mmclip.data.disease_prompts import PROMPT_UNIFORMS, load_disease_prompts
from mmclip.data.image_text_dataset import ImageTextDataset, normalise, open_dataset
from mmclip.data.sample import PRESENT
from mmclip.data.streams import deterministic_config, is_pair
from mmclip.data.synthetic import read_masks
from mmclip.explanation.grounding import expected_hits, mean_annotations
from mmclip.explanation.mechanism import (
    PatientMean,
    deal_to_other_patients,
    expected_masked_share,
    own_patches,
    patient_mean,
)
from mmclip.explanation.saliency import (
    pair_asks,
    phrase_texts,
    random_weights,
    saliency_by_score,
)
from mmclip.models.encoders import image_layout, patch_grid
from mmclip.models.mmclip import MMCLIP
from mmclip.patches import lesion_ratio_of_patches, normalise_patches, patchify
from mmclip.prompts import load_prompts
from mmclip.run import Run
from mmclip.training.pretrain import read_lesions

SMALL_RATIO = 0.03
"""Lesions under this share of the image count in the headline. [chosen: a heart or an edema fills
so much of the image that pointing at it is no feat]"""

MEAN_IMAGES = 2000
"""Training images in the mean image. [chosen: more change no pixel by a grey level]"""


# -- batches without chance --


def whole_batch(
    checkpoint: Checkpoint,
    dataset: ImageTextDataset,
    kinds: Sequence[str],
    lesions: dict[str, np.ndarray] | None = None,
) -> Batch:
    """All the rows, each a pair, as one batch in the order of the first epoch."""
    config = deterministic_config(checkpoint.config)
    changes = {
        "text_mask": config.text_mask.model_copy(update={"kinds": tuple(kinds)}),
        "loss": config.loss.model_copy(update={"text": config.loss.text or 1.0}),
        "train": config.train.model_copy(
            update={"batch_size": len(dataset), "micro_batch_size": None}
        ),
    }
    config = config.model_copy(update=changes)
    grid = patch_grid(checkpoint.model.vision_model)
    batches = TrainingBatches(dataset, checkpoint.tokenizer, config, grid, lesions=lesions)
    return batches.batch(0, BatchSlice())


def numbered(texts: TextBatch, index: Tensor) -> TextBatch:
    """The texts of these numbers, in their order."""
    return TextBatch(*(tensor[index] for tensor in texts.tensors().values()))


def texts_of(texts: TextBatch, index: Tensor) -> TextBatch:
    """The texts of these numbers, dealt to the rows 0, 1, 2, ..."""
    return replace(numbered(texts, index), rows=torch.arange(len(index)))


def chunks(n: int, size: int) -> Iterator[Tensor]:
    """The numbers 0 to n - 1, at most `size` at a time."""
    return iter(torch.arange(n).split(size))


# -- EntMLM --


@torch.inference_mode()
def masked_words(
    model: MMCLIP, images: Tensor, texts: TextBatch, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of right words of each text, with one image a text."""
    device = model.logit_scale.device
    loss, right = np.zeros(len(texts)), np.zeros(len(texts))
    for index in chunks(len(texts), size):
        some = texts_of(texts, index).to(device)
        read = model.forward_text(some, model.encode_image(images[index].to(device)).features)
        assert read.masked_features is not None
        logits = model.token_logits(read.masked_features)
        target = some.ids[some.is_masked]
        row = index.numpy()[some.is_masked.nonzero()[:, 0].cpu().numpy()]
        each = F.cross_entropy(logits.float(), target, reduction="none")
        is_right = logits.argmax(-1) == target
        np.add.at(loss, row, each.double().cpu().numpy())
        np.add.at(right, row, is_right.double().cpu().numpy())
    return loss, right


def measure_text(
    checkpoint: Checkpoint,
    dataset: ImageTextDataset,
    mean_image: Tensor,
    n_resamples: int,
    size: int,
) -> dict[str, Any]:
    """Part 1: by kind of masked words and image shown, loss and accuracy; and their differences."""
    configured = checkpoint.config.text_mask.kinds
    found: dict[str, Any] = {}
    for name, kinds in {"as trained": configured, **{kind: (kind,) for kind in configured}}.items():
        batch = whole_batch(checkpoint, dataset, kinds)
        patient_of = {sample.image_id: sample.patient_id for sample in dataset.samples}
        patients = [patient_of[image_id] for image_id in batch.image_ids]
        has_kind = (batch.reports.is_masked & batch.reports.is_entity).any(1)
        # A text without such an entity has any words masked, which are not asked about here.
        is_masked = batch.reports.is_masked & (has_kind[:, None] | (name == "as trained"))
        texts = replace(batch.reports, is_masked=is_masked)
        other = torch.from_numpy(deal_to_other_patients(patients, seed=0))
        count = is_masked.sum(1).numpy()
        shown = {
            "true image": batch.image,
            "another patient's": batch.image[other],
            "mid-grey": torch.zeros_like(batch.image),
            "mean image": mean_image.expand_as(batch.image),
        }
        values = {
            sample: masked_words(checkpoint.model, images, texts, size)
            for sample, images in shown.items()
        }
        own_loss, own_right = values["true image"]
        found[name] = {
            sample: {
                "loss": patient_mean(loss, count, patients, n_resamples),
                "accuracy": patient_mean(right, count, patients, n_resamples),
                "loss_less_true": patient_mean(loss - own_loss, count, patients, n_resamples),
                "accuracy_true_less": patient_mean(own_right - right, count, patients, n_resamples),
            }
            for sample, (loss, right) in values.items()
        }
        found[name]["n_words"] = int(count.sum())
    return found


# -- AttMIM --


@torch.inference_mode()
def masked_patches(
    model: MMCLIP, batch: Batch, texts: TextBatch, mask: ImageMaskConfig, size: int
) -> tuple[Tensor, Tensor]:
    """Squared error of each patch, and which are masked, [b, n] both; `texts` one a row or none."""
    device = model.logit_scale.device
    grid = patch_grid(model.vision_model)
    errors, masked = [], []
    for index in chunks(len(batch), size):
        lesion = batch.lesion_ratio
        part = Batch(
            image=batch.image[index],
            reports=texts_of(texts, index if len(texts) else index[:0]),
            prompts=texts_of(batch.prompts, index[:0]),
            keys=batch.keys[index],
            patch_noise=batch.patch_noise[index],
            lesion_ratio=None if lesion is None else lesion[index],
            image_ids=tuple(batch.image_ids[i] for i in index.tolist()),
            step=0,
        ).to(device)
        out = model(part, mask, mask_noise=0.0)
        target = normalise_patches(grid.cut(part.image))
        errors.append((out.patches.float() - target).square().mean(-1).cpu())
        masked.append(out.is_masked.cpu())
    return torch.cat(errors), torch.cat(masked)


def measure_image(
    checkpoint: Checkpoint,
    dataset: ImageTextDataset,
    lesions: dict[str, np.ndarray],
    n_resamples: int,
    size: int,
) -> dict[str, Any]:
    """Part 2: by place of masking, choice of patches and text given, the loss of masked patches."""
    mask = checkpoint.config.image_mask
    batch = whole_batch(checkpoint, dataset, checkpoint.config.text_mask.kinds, lesions)
    assert batch.lesion_ratio is not None
    patient_of = {sample.image_id: sample.patient_id for sample in dataset.samples}
    patients = [patient_of[image_id] for image_id in batch.image_ids]
    other = torch.from_numpy(deal_to_other_patients(patients, seed=0))
    given = {
        "own report": batch.reports,
        "another patient's": texts_of(batch.reports, other),
        "no text": texts_of(batch.reports, other[:0]),
    }
    found: dict[str, Any] = {}
    for mask_stage in get_args(MaskStage):
        policies: tuple[MaskPolicy, ...] = ("random", "oracle")
        for policy in policies:
            chosen = mask.model_copy(update={"policy": policy, "mask_stage": mask_stage})
            errors = {
                name: masked_patches(checkpoint.model, batch, texts, chosen, size)
                for name, texts in given.items()
            }
            own, is_masked = errors["own report"]
            places = {"all masked": is_masked, "the lesion's": is_masked & (batch.lesion_ratio > 0)}
            for place, here in places.items():
                count = here.sum(1).numpy()

                def over(
                    error: Tensor, here: Tensor = here, count: np.ndarray = count
                ) -> PatientMean:
                    total = torch.where(here, error.double(), 0.0).sum(1).numpy()
                    return patient_mean(total, count, patients, n_resamples)

                found[f"{mask_stage}, {policy}, {place}"] = {
                    name: {"loss": over(error), "loss_less_own": over(error - own)}
                    for name, (error, _) in errors.items()
                }
    return found


# -- pointing --


@dataclass(frozen=True)
class Asked:
    """One finding of an image with several, and what is known of its lesion."""

    row: int  # of the rows that are asked
    finding: str
    side: str
    size: str  # as drawn: small, moderate or large
    area_ratio: float  # of the image
    patient_id: str


def asked_of(
    dataset: ImageTextDataset, masks: dict[tuple[str, str], np.ndarray], raw: Path
) -> list[Asked]:
    """Every finding of every image that shows two or more."""
    with (raw / "lesions.csv").open(encoding="utf-8") as file:
        drawn = {(line["image_id"], line["finding"]): line for line in csv.DictReader(file)}
    by_image: dict[str, list[str]] = {}
    for image_id, finding in sorted(masks):
        by_image.setdefault(image_id, []).append(finding)
    asked = []
    for row, sample in enumerate(dataset.samples):
        findings = by_image.get(sample.image_id, [])
        for finding in findings if len(findings) > 1 else []:
            lesion = drawn[sample.image_id, finding]
            area = float(masks[sample.image_id, finding].mean())
            asked.append(
                Asked(row, finding, lesion["side"], lesion["size"], area, sample.patient_id)
            )
    return asked


def phrases(checkpoint: Checkpoint, asked: Sequence[Asked], with_side: bool) -> TextBatch:
    """What each is asked by, with the name as the only entity, and masked in `masked_ids`."""
    prompt_templates = load_disease_prompts(checkpoint.config.unpaired.prompts)
    prompts = []
    for item in asked:
        prompt = prompt_templates.write({item.finding: PRESENT}, np.zeros(PROMPT_UNIFORMS + 2), 0.0)
        assert prompt is not None
        text = prompt.text
        if with_side and item.side in ("left", "right"):
            text = f"{text.removesuffix('.')} in the {item.side} lung."
        prompts.append(prompt._replace(text=text))
    return phrase_texts(
        Run("", checkpoint),
        [prompt.text for prompt in prompts],
        [prompt.entities for prompt in prompts],
        [item.row for item in asked],
    )


def location_prior(
    dataset: ImageTextDataset, masks: dict[tuple[str, str], np.ndarray], patch_size: int
) -> dict[str, Tensor]:
    """The mean share of each patch that a finding covers, over the training images that show it."""
    train = {sample.image_id for sample in dataset.samples if sample.split == "train"}
    shown = {key: mask for key, mask in masks.items() if key[0] in train}
    lesions = torch.from_numpy(np.stack(list(shown.values()))).float()[:, None]
    ratio = lesion_ratio_of_patches(lesions, patch_size)
    return mean_annotations(ratio, [finding for _, finding in shown])


def measure_pointing(
    checkpoint: Checkpoint,
    all_rows: ImageTextDataset,
    dataset: ImageTextDataset,
    raw: Path,
    n_resamples: int,
    size: int,
    with_side: bool,
) -> dict[str, Any]:
    """Part 3: hits of each score and baseline, all lesions and small ones, by finding and size."""
    masks = read_masks(raw)
    patch_size = image_layout(checkpoint.model.vision_model).patch_size
    asked = asked_of(dataset, masks, raw)
    ids = [sample.image_id for sample in dataset.samples]
    touched = lesion_ratio_of_patches(
        torch.from_numpy(np.stack([masks[ids[a.row], a.finding] for a in asked])).float()[:, None],
        patch_size,
    ) > 0  # fmt: skip
    row_of = torch.tensor([a.row for a in asked])
    target = torch.zeros_like(touched)
    next_of = torch.arange(len(asked))  # the next finding of the same image
    for row in row_of.unique():
        here = (row_of == row).nonzero()[:, 0]
        target[here] = own_patches(touched[here])
        next_of[here] = here.roll(-1)
    images = normalise(dataset.pixels(np.arange(len(dataset))))
    texts = phrases(checkpoint, asked, with_side)
    run = Run("", checkpoint)
    maps, untrained = (
        saliency_by_score(
            each.model,
            images,
            texts,
            size,
            pair_asks(each, load_prompts("default"), [a.finding for a in asked]),
        )
        for each in (run, random_weights(run))
    )
    patches = patchify(images, patch_size)[row_of]
    prior = location_prior(all_rows, masks, patch_size)
    nowhere = torch.zeros(target.shape[1])
    baselines = {
        "brightest patch": patches.mean(-1),
        "local contrast": patches.std(-1),
        "location prior": torch.stack([prior.get(a.finding, nowhere) for a in asked]),
        "chance": torch.zeros(target.shape),
    }

    has_own = target.any(1)
    is_small = torch.tensor([a.area_ratio < SMALL_RATIO for a in asked]) & has_own
    mask_ratio = checkpoint.config.image_mask.mask_ratio

    def over(values: Tensor, where: Tensor) -> PatientMean:
        patients = [a.patient_id for a, w in zip(asked, where.tolist(), strict=True) if w]
        some = values[where].double().numpy()
        return patient_mean(some, np.ones(len(some)), patients, n_resamples)

    def grouped(values: Tensor, where: Tensor, key: str) -> dict[str, Any]:
        names = [getattr(a, key) for a in asked]
        return {
            name: {"hit": round(float(values[here].mean()), 4), "n": int(here.sum())}
            for name in sorted(set(names))
            if (here := torch.tensor([n == name for n in names]) & where).any()
        }

    def summary(score: Tensor) -> dict[str, Any]:
        hits = expected_hits(score, target)
        return {
            "hit": over(hits, is_small),
            "hit_all_sizes": over(hits, has_own),
            "hidden_share": over(expected_masked_share(score, target, mask_ratio), is_small),
            "by_finding": grouped(hits, is_small, "finding"),
            "by_size": grouped(hits, has_own, "size"),
        }

    prior_hits = expected_hits(baselines["location prior"], target)
    scores = {}
    for name, score in maps.items():
        hits = expected_hits(score, target)
        other = expected_hits(score[next_of], target)
        new = expected_hits(untrained[name], target)
        scores[name] = {
            **summary(score),
            "other_phrase": over(other, is_small),
            "random_weights": over(new, is_small),
            "less_other_phrase": over(hits - other, is_small),
            "less_random_weights": over(hits - new, is_small),
            "less_location_prior": over(hits - prior_hits, is_small),
        }
    mask = checkpoint.config.image_mask
    areas = torch.tensor([a.area_ratio for a in asked])
    return {
        "configured": mask.score
        if mask.score in WHOLE_TEXT_SCORES
        else f"{mask.score}/{mask.score_tokens}",
        "n_images": len(row_of.unique()),
        "n_asked": len(asked),
        "n_without_own_patch": int((~has_own).sum()),
        "n_headline": int(is_small.sum()),
        "area_ratio": round(float(areas[is_small].mean()), 5),
        "mask_ratio": mask_ratio,
        "example": checkpoint.tokenizer.decode(texts.ids[0][texts.is_valid[0]].tolist()),
        "scores": scores,
        "baselines": {name: summary(score) for name, score in baselines.items()},
    }


# -- the page --


def said(value: PatientMean | None, percent: bool = False) -> str:
    """A mean with its interval, for a table."""
    if value is None or value.mean is None:
        return "-"
    factor, digits = (100, 1) if percent else (1, 3)
    text = f"{factor * value.mean:.{digits}f}"
    if value.interval is None:
        return text
    low, high = (f"{factor * edge:.{digits}f}" for edge in value.interval)
    return f"{text} [{low}, {high}]"


def print_tables(results: dict[str, Any]) -> None:
    """All that is in the results, for reading."""
    if results["entmlm"]:
        print("\nEntMLM: masked words, by the image that is shown; [95 % over patients]")
        for kind, found in results["entmlm"].items():
            print(f"\n  {kind}, {found['n_words']} words")
            for sample, row in found.items():
                if sample == "n_words":
                    continue
                print(
                    f"  {sample:20}accuracy {said(row['accuracy'], True):22}"
                    f"true less {said(row['accuracy_true_less'], True):22}"
                    f"loss {said(row['loss']):24}less true {said(row['loss_less_true'])}"
                )
    if results["attmim"]:
        print("\nAttMIM: loss of masked patches (1 is what predicting nothing costs), by text")
        for place, found in results["attmim"].items():
            print(f"\n  {place}")
            for text, row in found.items():
                print(f"  {text:20}{said(row['loss']):26}less own {said(row['loss_less_own'])}")
    pointing = results["pointing"]
    print(
        f"\nPointing, {pointing['n_headline']} lesions < {SMALL_RATIO:.0%} of the image, asked as "
        f'"{pointing["example"]}"; hits in %, and share of the lesion that is masked at '
        f"{pointing['mask_ratio']:.0%}\n"
    )
    columns = ("other_phrase", "random_weights", "less_other_phrase", "less_location_prior")
    print(
        f"  {'':30}{'hit':22}{'masked':22}" + "".join(f"{c.replace('_', ' '):22}" for c in columns)
    )
    for name, row in {**pointing["scores"], **pointing["baselines"]}.items():
        mark = "*" if name == pointing["configured"] else " "
        cells = [row["hit"], row["hidden_share"], *(row.get(c) for c in columns)]
        print(f"{mark} {name:30}" + "".join(f"{said(cell, True):22}" for cell in cells))
    print("  * as configured\n")
    best = max(pointing["scores"], key=lambda name: pointing["scores"][name]["hit"].mean or 0.0)
    shown = dict.fromkeys(
        [name for name in (pointing["configured"], best) if name in pointing["scores"]]
    )
    for key, title in (("by_finding", "small lesions"), ("by_size", "all lesions")):
        prior = pointing["baselines"]["location prior"][key]
        print(f"  {title:22}{'n':>6}{'location prior':>18}" + "".join(f"{n:>30}" for n in shown))
        for group, cell in prior.items():
            hits = "".join(f"{100 * pointing['scores'][n][key][group]['hit']:30.1f}" for n in shown)
            print(f"  {group:22}{cell['n']:6}{100 * cell['hit']:18.1f}{hits}")
        print()


def plain(value: Any) -> Any:
    """The results with rounded numbers, for JSON."""
    if isinstance(value, PatientMean):
        ci = None if value.interval is None else [round(edge, 5) for edge in value.interval]
        return {
            "mean": None if value.mean is None else round(value.mean, 5),
            "ci": ci,
            "n": value.n,
        }
    return {key: plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def main() -> None:
    """Loads, measures, prints."""
    parser = argparse.ArgumentParser(description="Does a model use the other modality?")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder")
    parser.add_argument("--raw", type=Path, required=True, help="synthetic images with masks.npz")
    parser.add_argument("--data", type=Path, required=True, help="the data folder built of them")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--images", type=int, help="at most so many of the split")
    parser.add_argument("--with-side", action="store_true", help="phrases name the side, too")
    parser.add_argument("--n-resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()

    checkpoint = load_checkpoint(args.checkpoint)
    model = checkpoint.model.to(args.device)
    every = open_dataset([args.data], checkpoint.config.data.image_size)
    views = checkpoint.config.data.views
    chosen = [is_pair(f) and f.split == args.split and f.view in views for f in every.samples]
    if args.images is not None:
        chosen = np.array(chosen) & (np.cumsum(chosen) <= args.images)
    rows = every.select(chosen)
    if len(rows) < 2:
        raise SystemExit(
            f"{args.data} holds {len(rows)} images with a report in split {args.split}"
        )
    train = every.select([f.split == "train" and f.image is not None for f in every.samples])
    some = np.linspace(0, len(train) - 1, min(MEAN_IMAGES, len(train))).astype(int)
    mean_image = normalise(train.pixels(some)).mean(0, keepdim=True)
    lesions = read_lesions(args.raw)
    common: dict[str, Any] = {"n_resamples": args.n_resamples, "size": args.batch_size}
    entmlm = attmim = None
    if model.text_decoder is not None:
        entmlm = measure_text(checkpoint, rows, mean_image, **common)
    if model.image_decoder is not None:
        attmim = measure_image(checkpoint, rows, lesions, **common)
    results = {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.meta["step"],
        "config_hash": checkpoint.meta["config_hash"],
        "data_hash": every.data_hash,
        "split": args.split,
        "with_side": args.with_side,
        "n_images": len(rows),
        "entmlm": entmlm,
        "attmim": attmim,
        "pointing": measure_pointing(
            checkpoint, every, rows, args.raw, **common, with_side=args.with_side
        ),
    }
    print_tables(results)
    line = json.dumps(plain(results))
    if args.out is not None:
        args.out.write_text(line + "\n", "utf-8")
    print(line)


if __name__ == "__main__":
    main()
