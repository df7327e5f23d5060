"""The rows that a task reads from data folders, their films as tensors, and augmentation."""

import hashlib
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mmclip.config import GREY_MEAN, GREY_STD, AugmentConfig
from mmclip.data.cache import FilmCache
from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.manifest import read_manifest
from mmclip.data.records import Film
from mmclip.data.versions import changed_since

logger = logging.getLogger(__name__)


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
    theta = affine_of(draws, config).to(image.device)
    black = -GREY_MEAN / GREY_STD
    u = 2 * draws.float() - 1  # -1..1
    moved = warp(image - black, theta) + black
    contrast = (1 + u[:, 4] * config.contrast).view(-1, 1, 1, 1).to(image.device)
    brightness = (u[:, 5] * config.brightness / GREY_STD).view(-1, 1, 1, 1).to(image.device)
    return moved * contrast + brightness


def affine_of(draws: Float[Tensor, "b 6"], config: AugmentConfig) -> Float[Tensor, "b 2 3"]:
    """Where each point of the augmented film comes from, in grid units (the side is 2 long)."""
    u = 2 * draws.float() - 1  # -1..1
    angle = torch.deg2rad(u[:, 0] * config.rotation_deg)
    scale = 1 / (1 + u[:, 1] * config.scale_ratio)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = 2 * config.translate_ratio * u[:, 2:4]  # grid units: the side is 2 long
    return torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )


def warp(
    image: Float[Tensor, "b 1 h w"], theta: Float[Tensor, "b 2 3"]
) -> Float[Tensor, "b 1 h w"]:
    """Moves films as `affine_of` says, bilinear; what comes from outside is 0."""
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="zeros", align_corners=False)


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

    def augmented(
        self,
        rows: np.ndarray,
        draws: Float[np.ndarray, "b 6"],
        config: AugmentConfig,
        device: torch.device,
    ) -> Float[Tensor, "b 1 h w"]:
        """Films in model space, augmented by uniform draws; made on the device, from its bytes.

        A GPU gets a quarter of what the finished films would be, and does the work in no time.
        """
        films = normalise(self.pixels(rows).to(device, non_blocking=True))
        return augment(films, torch.from_numpy(draws).float(), config)

    def labels(self, findings: Sequence[str]) -> np.ndarray:
        """float64 [n, k]: 1 present, 0 absent, NaN unknown or uncertain."""
        known = {1: 1.0, 0: 0.0}
        return np.array(
            [[known.get(film.labels.get(f, -1), np.nan) for f in findings] for film in self.films]
        ).reshape(len(self), len(findings))


def open_rows(
    folders: Sequence[Path], film_px: int | None = None, px_key: str | None = None
) -> Rows:
    """All rows of some data folders.

    Args:
        folders: As `mmclip data build` leaves them.
        film_px: The film size that is needed, checked where a folder has films.
        px_key: The key of the configuration that says `film_px`, where the user may change it.

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
            instead = f", or take them as they are by --set {px_key}={meta['film_px']}"
            raise ManifestError(
                f"the films of {folder} have {meta['film_px']} px, {film_px} px are needed; build "
                f"them anew by `{_build_command(meta, folder, film_px)}` and give that folder"
                + (instead if px_key else "")
            )
        if changed := changed_since(meta):
            logger.warning(
                "%s was made with other words than are installed (%s changed); its labels and "
                "entities are those of then, until it is built again",
                folder,
                ", ".join(changed),
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


def _build_command(meta: Mapping[str, Any], folder: Path, film_px: int) -> str:
    """The command that made a data folder, for films of another size in a folder beside it."""
    made_by = str(meta.get("command", ""))
    if not made_by.startswith("mmclip data build"):
        made_by = "mmclip data build ..."
    same = re.sub(r" --(?:overwrite|(?:film-px|out)[ =](?:'[^']*'|\S)+)", "", made_by)
    return f"{same} --film-px {film_px} --out {shlex.quote(f'{folder}-{film_px}px')}"
