"""How well images and reports find one another: R@1, 5 and 10, and the median rank."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from pydantic import Field, FiniteFloat
from torch import Tensor

from mmclip.config_io import Frozen
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.leakage.check import patient_key, study_key
from mmclip.data.original_images import images_said
from mmclip.data.sample import Sample, Split
from mmclip.data.sampling import image_key
from mmclip.data.text import tokenise
from mmclip.embedding_store import image_embeddings, text_embeddings
from mmclip.evaluation.bootstrap import patient_codes, patient_weights
from mmclip.evaluation.intervals import percentile_interval
from mmclip.evaluation.metrics import Retrieved, retrieved, retrieved_by_chance
from mmclip.evaluation.results import (
    Count,
    Provenance,
    Ratio,
    RatioInterval,
    ScoredImages,
    provenance,
)
from mmclip.evaluation.selection import FRONTAL, check_sources, split_of, unknown_views
from mmclip.files import file_sha256, made_beside, sealed, unsealed
from mmclip.losses import positive_pairs
from mmclip.model_loading import ModelRequest, open_dual_encoder
from mmclip.models.dual_encoder import DualEncoder

logger = logging.getLogger(__name__)

RETRIEVAL_FILE, RANKS_FILE = "retrieval.json", "ranks.npz"

KS = (1, 5, 10)
"""How many candidates are looked at. [usual in image and text retrieval]"""

_CHUNK_PAIRS = 2**22
"""Similarities held at once: 16 MiB an array. [chosen: bounds memory at any size]"""

_CHUNK_TEXTS = 1024


Rank = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class AtK(Frozen):
    """Means over the queries when k candidates are looked at, see `metrics.recall_at_k`.

    Intervals are 95 % over resampled patients of the queries; the candidates stay. `*_chance` is
    what embeddings reach that are all alike, from the numbers of right answers alone.
    """

    k: Annotated[int, Field(ge=1)]
    hit: Ratio  # queries with a right answer among the first k: R@k
    hit_ci: RatioInterval | None
    hit_chance: Ratio
    recall: Ratio  # right answers of a query that are among the first k
    recall_ci: RatioInterval | None
    recall_chance: Ratio


class Direction(Frozen):
    """One direction of retrieval. The rank of a query is that of its first right answer."""

    n_queries: Count
    n_candidates: Count
    at: list[AtK]
    median_rank: Rank
    median_rank_ci: tuple[Rank, Rank] | None
    median_rank_chance: Rank


class RetrievalResults(Frozen):
    """retrieval.json."""

    title: str
    kind: Literal["retrieval"]
    summary: str  # one sentence: which model, on what
    image_to_report: Direction
    report_to_image: Direction
    n_images: Count
    n_studies: Count
    n_patients: Count
    n_reports: Count  # that differ for the model
    n_resamples: Count
    leak_check: str  # what was found of images that the run was trained on
    provenance: Provenance
    facts: dict[str, str | int | FiniteFloat] = Field(default_factory=dict)
    files_sha256: dict[str, str] = Field(default_factory=dict)  # of ranks.npz


def select_pairs(
    dataset: ImageTextDataset, split: Split, sources: Sequence[str] = ()
) -> ImageTextDataset:
    """The frontal images of a split that have a report, and of some sources if they are named.

    Raises:
        ManifestError: When there are fewer than two; it says what the folder holds.
    """
    check_sources(dataset, sources)

    def is_kept(sample: Sample) -> bool:
        is_pair = sample.image is not None and sample.report is not None
        is_asked = sample.split == split and (not sources or sample.source in sources)
        return is_pair and is_asked and sample.view in FRONTAL

    kept = dataset.select([is_kept(sample) for sample in dataset.samples])
    if len(kept) < 2:
        splits = sorted({str(f.split) for f in dataset.samples})
        raise ManifestError(
            f"{len(kept)} frontal images with a report in split {split!r} of source "
            f"{', '.join(sources) or 'any'}; retrieval needs two. The data has the splits "
            f"{', '.join(splits)}"
        )
    return kept


def report_keys(encoder: DualEncoder, samples: Sequence[Sample]) -> Int[Tensor, "n 2"]:
    """Study and report of each image, as training compares them (`losses.positive_pairs`).

    Two reports are equal when they are after cleaning, and up to where the text encoder reads: it
    could not tell them apart. Where its tokenizer does not say, they are compared whole.

    Args:
        encoder: Its tokenizer reads them.
        samples: All with a report.
    """
    texts = list(dict.fromkeys(str(sample.report) for sample in samples))
    tokenizer = encoder.tokenizer
    key_of: dict[str, int] = {}
    if tokenizer is None:
        key_of = {text: image_key(text) >> 1 for text in texts}
        texts = []
    for start in range(0, len(texts), _CHUNK_TEXTS):
        part = texts[start : start + _CHUNK_TEXTS]
        assert tokenizer is not None
        tokens = tokenise(tokenizer, part, max_tokens=encoder.max_tokens)
        for text, ids, is_valid in zip(part, tokens.ids, tokens.is_valid, strict=True):
            key_of[text] = image_key(ids[is_valid].tobytes().hex()) >> 1
    keys = [[image_key(study_key(sample)) >> 1, key_of[str(sample.report)]] for sample in samples]
    return torch.tensor(keys, dtype=torch.long)


def rank_candidates(
    queries: Float32[np.ndarray, "q e"],
    candidates: Float32[np.ndarray, "c e"],
    query_keys: Int[Tensor, "q m"],
    candidate_keys: Int[Tensor, "c m"],
    ks: Sequence[int] = KS,
) -> tuple[Retrieved, Int[np.ndarray, " q"]]:
    """What each query finds among the candidates, some queries at a time: memory is flat.

    Similarities are summed in float64 and compared in float32, so that equal embeddings tie: in
    float32 sums, the place in a matrix can change the last bit.

    Args:
        queries: Normalised.
        candidates: Normalised.
        query_keys: A column a kind of key; a candidate that shares one is a right answer.
        candidate_keys: The same of the candidates.
        ks: How many candidates are looked at.

    Returns:
        What each query finds, and how many right answers it has.
    """
    wide = candidates.astype(np.float64).T
    step = max(1, _CHUNK_PAIRS // len(candidates))
    found, n_positive = [], []
    for start in range(0, len(queries), step):
        cut = slice(start, start + step)
        similarity = (queries[cut].astype(np.float64) @ wide).astype(np.float32)
        is_positive = positive_pairs(query_keys[cut], candidate_keys).numpy()
        found.append(retrieved(similarity, is_positive, ks))
        n_positive.append(is_positive.sum(axis=1))
    joined = (np.concatenate(column) for column in zip(*found, strict=True))
    return Retrieved(*joined), np.concatenate(n_positive)


def score_direction(
    found: Retrieved,
    n_positive: Int[np.ndarray, " q"],
    n_candidates: int,
    patients: Sequence[str],
    ks: Sequence[int] = KS,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Direction:
    """Means and median over the queries, with intervals and chance levels.

    Args:
        found: By each query.
        n_positive: The right answers of each query.
        n_candidates: Among which they were looked for.
        patients: The patient of each query: whole patients are resampled, and the candidates
            stay as they are, for the task would be another among fewer.
        ks: The columns of `found`.
        n_resamples: Bootstrap resamples; the same patients and seed give the resamples of
            `bootstrap.bootstrap_metrics`.
        seed: Of the resamples.
    """
    chance = retrieved_by_chance(n_positive, n_candidates, ks)
    means, medians = resampled(found, patients, n_resamples, seed)
    n, n_patients = len(ks), len(set(patients))
    at = [
        AtK(
            k=k,
            hit=_rounded(found.hit[:, i].mean()),
            hit_ci=_interval(means[:, i], n_patients),
            hit_chance=_rounded(chance.hit[:, i].mean()),
            recall=_rounded(found.recall[:, i].mean()),
            recall_ci=_interval(means[:, n + i], n_patients),
            recall_chance=_rounded(chance.recall[:, i].mean()),
        )
        for i, k in enumerate(ks)
    ]
    return Direction(
        n_queries=len(found.rank),
        n_candidates=n_candidates,
        at=at,
        median_rank=_rounded(float(np.median(found.rank))),
        median_rank_ci=_interval(medians, n_patients),
        median_rank_chance=_rounded(float(np.median(chance.rank))),
    )


def resampled(
    found: Retrieved, patients: Sequence[str], n_resamples: int, seed: int
) -> tuple[Float[np.ndarray, "resamples m"], Float[np.ndarray, " resamples"]]:
    """Mean hits and recalls (hits first), and the median rank, of resamples of whole patients."""
    code, n_patients = patient_codes(patients)
    values = np.concatenate([found.hit, found.recall], axis=1)
    sums = np.zeros((n_patients, values.shape[1]))
    np.add.at(sums, code, values)
    n_queries = np.bincount(code, minlength=n_patients)
    order = np.argsort(found.rank, kind="stable")
    rank, code = found.rank[order], code[order]
    means, medians = [], []
    step = max(1, _CHUNK_PAIRS // len(code))
    for weight in patient_weights(n_patients, n_resamples, seed, step):
        total = weight.T @ n_queries
        means.append((weight.T @ sums) / total[:, None])
        # A query that is drawn w times stands w times in a row of `total` ranks.
        last = np.cumsum(weight[code], axis=0)
        low, high = ((last <= place).sum(axis=0) for place in ((total - 1) // 2, total // 2))
        medians.append((rank[low] + rank[high]) / 2)
    return np.concatenate(means), np.concatenate(medians)


def _rounded(value: float | np.floating) -> float:
    """Six significant digits, as in results.json."""
    return float(f"{value:.6g}")


def _interval(values: np.ndarray, n_patients: int) -> tuple[float, float] | None:
    found = percentile_interval(values, n_patients=n_patients)
    return None if found is None else (_rounded(found[0]), _rounded(found[1]))


@dataclass(frozen=True)
class RetrievalRequest:
    """What to rank, and where to.

    Attributes:
        model: A run, or a model of others.
        folders: Data folders.
        out: Folder of retrieval.json and ranks.npz.
        command: For results.
        split: Of the images.
        sources: Only these, when named.
        n_resamples: Bootstrap resamples of patients.
        seed: Of the bootstrap.
        roots: For a model of others, where the files of each folder's images lie.
        device: Where the model runs; None for the CPU.
    """

    model: ModelRequest
    folders: tuple[Path, ...]
    out: Path
    command: str
    split: Split = "test"
    sources: tuple[str, ...] = ()
    n_resamples: int = 1000
    seed: int = 0
    roots: tuple[Path, ...] | None = None
    device: torch.device | None = None


class Ranked(NamedTuple):
    """What each query finds, by direction."""

    keys: Int[Tensor, "n 2"]  # study and report of each image
    directions: dict[str, Direction]
    ranks: dict[str, np.ndarray]  # for ranks.npz


def rank_pairs(
    encoder: DualEncoder, dataset: ImageTextDataset, request: RetrievalRequest
) -> Ranked:
    """Ranks all reports for each image, and all images for each report."""
    patients = [patient_key(sample) for sample in dataset.samples]
    keys = report_keys(encoder, dataset.samples)
    images = image_embeddings(encoder, dataset, request.folders)
    reports = text_embeddings(encoder, [str(sample.report) for sample in dataset.samples])
    ks = [k for k in KS if k <= len(dataset)]
    if len(ks) < len(KS):
        logger.warning("there are %d candidates: R@%d is left out", len(dataset), KS[len(ks)])
    directions: dict[str, Direction] = {}
    ranks: dict[str, np.ndarray] = {}
    for name, queries, candidates in (
        ("image_to_report", images, reports),
        ("report_to_image", reports, images),
    ):
        found, n_positive = rank_candidates(queries, candidates, keys, keys, ks)
        directions[name] = score_direction(
            found, n_positive, len(dataset), patients, ks,
            n_resamples=request.n_resamples, seed=request.seed,
        )  # fmt: skip
        ranks |= {f"{name}_rank": found.rank, f"{name}_positives": n_positive}
    return Ranked(keys, directions, ranks)


def evaluate_retrieval(request: RetrievalRequest) -> RetrievalResults:
    """What `mmclip retrieve --evaluate` does: embed, rank, write retrieval.json and ranks.npz.

    Raises:
        ManifestError: When there is nothing to rank, or the run was trained on it.
    """
    began = time.monotonic()
    encoder = open_dual_encoder(request.model, request.device)
    dataset = encoder.open_data(request.folders, request.roots)
    dataset = select_pairs(dataset, request.split, request.sources)
    views = unknown_views(dataset)
    if views != "none":
        logger.warning("views are unknown, and laterals may be ranked as frontal: %s", views)
    leak_check = encoder.check_unseen(dataset, request.split)
    ranked = rank_pairs(encoder, dataset, request)
    patients = [patient_key(sample) for sample in dataset.samples]
    where = f"split {request.split}"
    where += f" of {', '.join(request.sources)}" if request.sources else ""
    results = RetrievalResults(
        title=f"Retrieval: {where}",
        kind="retrieval",
        summary=f"{len(dataset)} images with reports, {where}, ranked by {encoder.name}",
        image_to_report=ranked.directions["image_to_report"],
        report_to_image=ranked.directions["report_to_image"],
        n_images=len(dataset),
        n_studies=len({study_key(sample) for sample in dataset.samples}),
        n_patients=len(set(patients)),
        n_reports=len(ranked.keys[:, 1].unique()),
        n_resamples=request.n_resamples,
        leak_check=leak_check,
        provenance=provenance(
            request.command,
            request.seed,
            ScoredImages(dataset.data_hash, split_of(request.folders)),
            device=encoder.device,
            wall_s=round(time.monotonic() - began, 1),
            weights=encoder.weights,
        ),
        facts={
            "images of unknown view": views,
            "images read": images_said(dataset),
            **encoder.facts(),
        },
    )
    _write(request.out, results, dataset, ranked)
    return results


def _write(out: Path, results: RetrievalResults, dataset: ImageTextDataset, ranked: Ranked) -> None:
    """Writes ranks.npz and retrieval.json."""
    ranks = {
        "image_id": np.array([sample.image_id for sample in dataset.samples]),
        "patient_id": np.array([patient_key(sample) for sample in dataset.samples]),
        "image_to_report_rank": ranked.ranks["image_to_report_rank"],
        "image_to_report_positives": ranked.ranks["image_to_report_positives"],
        "report_to_image_rank": ranked.ranks["report_to_image_rank"],
        "report_to_image_positives": ranked.ranks["report_to_image_positives"],
    }
    with made_beside(out, RETRIEVAL_FILE) as made:
        np.savez_compressed(made / RANKS_FILE, allow_pickle=False, **ranks)
        beside = {RANKS_FILE: file_sha256(made / RANKS_FILE)}
        whole = results.model_copy(update={"files_sha256": beside}).model_dump(mode="json")
        text = json.dumps(sealed(whole), indent=2, sort_keys=True, ensure_ascii=False)
        (made / RETRIEVAL_FILE).write_text(text + "\n", "utf-8")


def read_retrieval(folder: Path) -> RetrievalResults:
    """Reads retrieval.json.

    Raises:
        ValueError: When it is missing, was changed, or breaks the contract.
    """
    path = folder / RETRIEVAL_FILE
    try:
        stored = dict(json.loads(path.read_text("utf-8")))
        return RetrievalResults.model_validate(unsealed(stored))
    except (ValueError, TypeError, OSError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{path} is missing or damaged ({said}); retrieve again with --overwrite"
        ) from None
