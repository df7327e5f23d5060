"""From data folders to batches: the rows a task reads, and what a row becomes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.config import GREY_MEAN, GREY_STD, AugmentConfig, DataConfig
from mmclip.data.cache import FilmCache
from mmclip.data.draws import Draw, Schedule, film_key, keyed_uniform
from mmclip.data.manifest import Film, ManifestError, Split, read_manifest, read_meta
from mmclip.data.text import split_sentences, tokenise


@dataclass(frozen=True)
class TokenisedReports:
    """All reports of a data set as one flat array of tokens, without [CLS] and [SEP].

    Report r is the tokens `start[r] : start[r + 1]`; `sentence` numbers the sentence of each token
    from 0 within its report.
    """

    ids: np.ndarray  # int32 [total]
    sentence: np.ndarray  # int16 [total]
    start: np.ndarray  # int64 [r + 1]
    n_sentences: np.ndarray  # int32 [r]
    cls_id: int
    sep_id: int
    pad_id: int

    def assemble(
        self, reports: np.ndarray, max_tokens: int, keep_draws: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and validity [b, t] of some reports, whole or in part.

        Args:
            reports: int [b], report numbers.
            max_tokens: Longer reports are cut.
            keep_draws: Uniform [b, 1 + MAX_SENTENCES], see `kept_sentences`; None keeps all.

        Returns:
            ids int64 [b, t], with [CLS] first, [SEP] last and padding behind; is_valid bool [b, t].
        """
        rows = []
        for i, report in enumerate(reports):
            span = slice(self.start[report], self.start[report + 1])
            ids = self.ids[span]
            if keep_draws is not None:
                keep = kept_sentences(int(self.n_sentences[report]), keep_draws[i])
                ids = ids[keep[self.sentence[span]]]
            rows.append(ids[: max_tokens - 2])
        width = max(len(ids) for ids in rows) + 2
        out = np.full((len(rows), width), self.pad_id, np.int64)
        is_valid = np.zeros((len(rows), width), bool)
        for i, ids in enumerate(rows):
            out[i, 0], out[i, 1 : len(ids) + 1], out[i, len(ids) + 1] = (
                self.cls_id,
                ids,
                self.sep_id,
            )
            is_valid[i, : len(ids) + 2] = True
        return out, is_valid


MAX_SENTENCES = 32
"""Draws a row for choosing sentences; sentences behind these stay or go with the last one."""


def kept_sentences(n_sentences: int, draws: np.ndarray) -> np.ndarray:
    """Which sentences of a report stay when it is read in part: bool [n_sentences].

    The number kept is uniform in 1..n, the choice is uniform given the number. Source: ours, after
    the sentence sampling of ConVIRT (arXiv:2010.00747): a prompt is one sentence, and a model that
    only ever read whole reports has not seen one alone.

    Args:
        n_sentences: Sentences of the report.
        draws: Uniform [1 + MAX_SENTENCES]: one for the number, one a sentence for the choice.
    """
    n_kept = 1 + int(draws[0] * n_sentences)
    order = np.argsort(draws[1:][np.minimum(np.arange(n_sentences), MAX_SENTENCES - 1)])
    keep = np.zeros(n_sentences, bool)
    keep[order[:n_kept]] = True
    return keep


def tokenise_reports(
    tokenizer: PreTrainedTokenizerFast, reports: Sequence[str], max_tokens: int
) -> TokenisedReports:
    """Tokenises each report once and notes the sentence of every token."""
    tokens = tokenise(tokenizer, reports, max_tokens=max_tokens)
    ids, sentences, counts, n_sentences = [], [], [], []
    for i, report in enumerate(reports):
        offsets = tokens.offsets[i]
        is_text = tokens.is_valid[i] & (offsets[:, 1] > offsets[:, 0])
        ends = np.array([end for _, end in split_sentences(report)])
        sentence = np.minimum(
            np.searchsorted(ends, offsets[is_text, 0], side="right"), max(len(ends) - 1, 0)
        )
        # Numbered from 0 without gaps, also where a cut report lost its last sentences.
        _, sentence = np.unique(sentence, return_inverse=True)
        ids.append(tokens.ids[i][is_text])
        sentences.append(sentence)
        counts.append(int(is_text.sum()))
        n_sentences.append(int(sentence.max()) + 1 if len(sentence) else 0)
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    cls_id, sep_id, pad_id = (int(s) for s in special)  # pyright: ignore[reportArgumentType]
    return TokenisedReports(
        ids=np.concatenate(ids).astype(np.int32),
        sentence=np.concatenate(sentences).astype(np.int16),
        start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        n_sentences=np.array(n_sentences, np.int32),
        cls_id=cls_id,
        sep_id=sep_id,
        pad_id=pad_id,
    )


@dataclass(frozen=True)
class Batch:
    """Some rows as tensors. b films, t tokens."""

    image: Float[Tensor, "b 1 h w"]  # model space, see `normalise`
    ids: Tensor  # int64 [b, t]
    is_valid: Tensor  # bool [b, t]
    keys: Tensor  # int64 [b, 2]: study and text; equal in a column means positive
    has_text: Tensor  # bool [b]
    film_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        move = (t.to(device, non_blocking=True) for t in self.tensors().values())
        return Batch(*move, film_ids=self.film_ids)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {
            "image": self.image,
            "ids": self.ids,
            "is_valid": self.is_valid,
            "keys": self.keys,
            "has_text": self.has_text,
        }


def normalise(films: UInt8[Tensor, "b h w"]) -> Float[Tensor, "b 1 h w"]:
    """uint8 films in model space: (x / 255 - GREY_MEAN) / GREY_STD.

    Source: what ViTImageProcessor computes from rescale_factor, image_mean and image_std.
    """
    return ((films.float() / 255 - GREY_MEAN) / GREY_STD).unsqueeze(1)


def augment(
    image: Float[Tensor, "b 1 h w"], draws: Float[Tensor, "b 6"], config: AugmentConfig
) -> Float[Tensor, "b 1 h w"]:
    """Rotates, shifts, scales and re-exposes films by uniform draws; 0.5 everywhere is no change.

    Never mirrored: a report says left and right. What comes from outside the film is black.

    Source: ours; small ranges, as a patient can turn and an exposure can differ.
    """
    u = 2 * draws.float() - 1  # -1..1
    angle = torch.deg2rad(u[:, 0] * config.rotation_deg)
    scale = 1 / (1 + u[:, 1] * config.scale_ratio)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = 2 * config.translate_ratio * u[:, 2:4]  # grid units: the side is 2 long
    theta = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta.to(image.device), list(image.shape), align_corners=False)
    black = -GREY_MEAN / GREY_STD
    moved = F.grid_sample(image - black, grid, padding_mode="zeros", align_corners=False) + black
    contrast = (1 + u[:, 4] * config.contrast).view(-1, 1, 1, 1).to(image.device)
    brightness = (u[:, 5] * config.brightness / GREY_STD).view(-1, 1, 1, 1).to(image.device)
    return moved * contrast + brightness


@dataclass(frozen=True)
class Rows:
    """The rows of one or more data folders that a task reads, with their films at hand."""

    films: tuple[Film, ...]
    caches: tuple[FilmCache | None, ...]  # one a folder
    where: np.ndarray  # int64 [n, 2]: folder, and row of its film cache (-1 without an image)
    data_hash: str  # over the hashes of the folders

    def __len__(self) -> int:
        return len(self.films)

    def select(self, keep: Sequence[bool] | np.ndarray) -> "Rows":
        """The rows where `keep` is True."""
        keep = np.asarray(keep, bool)
        films = tuple(film for film, k in zip(self.films, keep, strict=True) if k)
        return Rows(films, self.caches, self.where[keep], self.data_hash)

    def pixels(self, rows: np.ndarray) -> UInt8[Tensor, "b h w"]:
        """uint8 films, copied out of the memory map."""
        out = []
        for folder, row in self.where[rows]:
            cache = self.caches[folder]
            assert cache is not None and row >= 0, "a row without an image was asked for its film"
            out.append(cache.films[row])
        return torch.from_numpy(np.stack(out))

    def labels(self, findings: Sequence[str]) -> np.ndarray:
        """float64 [n, k]: 1 present, 0 absent, NaN unknown or uncertain."""
        known = {1: 1.0, 0: 0.0}
        return np.array(
            [[known.get(film.labels.get(f, -1), np.nan) for f in findings] for film in self.films]
        ).reshape(len(self), len(findings))


def open_rows(folders: Sequence[Path], film_px: int | None = None) -> Rows:
    """All rows of some data folders.

    Args:
        folders: As `mmclip data build` leaves them.
        film_px: The film size that is needed, checked where a folder has films.

    Raises:
        ManifestError: When a folder is unfinished, its films have another size, or a film id
            occurs in two folders.
    """
    films: list[Film] = []
    caches: list[FilmCache | None] = []
    where: list[tuple[int, int]] = []
    hashes = []
    for number, folder in enumerate(folders):
        meta = read_meta(folder)
        if film_px is not None and meta["film_px"] not in (None, film_px):
            raise ManifestError(
                f"the films of {folder} have {meta['film_px']} px, {film_px} px are asked for; "
                f"build the folder with --film-px {film_px} or set data.film_px={meta['film_px']}"
            )
        caches.append(FilmCache.open(folder) if meta["film_px"] is not None else None)
        hashes.append(meta["data_hash"])
        row = 0
        for film in read_manifest(folder):
            films.append(film)
            where.append((number, row if film.image is not None else -1))
            row += film.image is not None
    ids = {film.film_id for film in films}
    if len(ids) < len(films):
        raise ManifestError(
            f"{len(films) - len(ids)} film ids occur in more than one of the data folders "
            f"{', '.join(map(str, folders))}; give each folder once"
        )
    joined = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return Rows(tuple(films), tuple(caches), np.array(where, np.int64).reshape(-1, 2), joined)


def paired_rows(rows: Rows, split: Split, config: DataConfig) -> Rows:
    """The rows with film and report in a split and in the views of the configuration."""
    return rows.select(
        [
            film.split == split
            and film.image is not None
            and film.report is not None
            and film.view in config.views
            for film in rows.films
        ]
    )


class PairedBatches:
    """The batches of a training run: film and report, every draw keyed by film and epoch."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerFast,
        data: DataConfig,
        augment_config: AugmentConfig,
        batch_size: int,
        seed: int,
        shuffle_pairs: bool = False,
    ) -> None:
        """Tokenises the reports once.

        Args:
            rows: As `paired_rows` gives them.
            tokenizer: Of the text encoder.
            data: Lengths and sentence dropping.
            augment_config: Ranges of the augmentation.
            batch_size: Pairs a step, over all processes.
            seed: Of every draw.
            shuffle_pairs: Deal each film the report of another, fixed for the run: the control
                under which nothing can be learnt.
        """
        self.rows, self.data, self.augment_config, self.seed = rows, data, augment_config, seed
        self.film_keys = np.array([film_key(f.film_id) for f in rows.films], np.uint64)
        self.schedule = Schedule(self.film_keys, batch_size, seed)
        texts = [film.report or "" for film in rows.films]
        distinct = sorted(set(texts))
        number = {text: i for i, text in enumerate(distinct)}
        self.report_of_row = np.array([number[text] for text in texts])
        self.reports = tokenise_reports(tokenizer, distinct, data.max_tokens)
        self.study_keys = np.array([film_key(f.study_id) >> 1 for f in rows.films], np.int64)
        if shuffle_pairs:
            u = keyed_uniform(seed, Draw.SHUFFLE_PAIRS, np.zeros(len(rows)), self.film_keys, 1)
            order = np.argsort(u[:, 0])
            self.report_of_row[order] = self.report_of_row[np.roll(order, 1)]
            self.study_keys = self.film_keys.astype(np.int64) >> 1

    def batch(self, step: int, part: slice = slice(None)) -> Batch:
        """The batch of a step, or the part of it that falls to a process or micro-batch."""
        rows, epochs = (x[part] for x in self.schedule.rows(step))
        keys = self.film_keys[rows]
        keep_draws = None
        if self.data.sentence_drop_prob:
            u = keyed_uniform(self.seed, Draw.SENTENCES, epochs, keys, 2 + MAX_SENTENCES)
            whole = u[:, 0] >= self.data.sentence_drop_prob
            u[whole, 1] = 1 - 2.0**-53  # all sentences are kept
            keep_draws = u[:, 1:]
        ids, is_valid = self.reports.assemble(
            self.report_of_row[rows], self.data.max_tokens, keep_draws
        )
        draws = keyed_uniform(self.seed, Draw.AUGMENT, epochs, keys, 6)
        image = augment(
            normalise(self.rows.pixels(rows)), torch.from_numpy(draws).float(), self.augment_config
        )
        text_keys = [
            film_key(row[valid].tobytes().hex()) >> 1
            for row, valid in zip(ids, is_valid, strict=True)
        ]
        return Batch(
            image=image,
            ids=torch.from_numpy(ids),
            is_valid=torch.from_numpy(is_valid),
            keys=torch.from_numpy(np.stack([self.study_keys[rows], text_keys], 1).astype(np.int64)),
            has_text=torch.ones(len(rows), dtype=torch.bool),
            film_ids=tuple(self.rows.films[r].film_id for r in rows),
        )
