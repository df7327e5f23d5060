"""Synthetic patients one by one, and a whole data set on disk as a real one looks."""

import csv
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from mmclip.data.manifest import Sex, Split, View, write_text_atomic
from mmclip.data.synthetic.language import write_report
from mmclip.data.synthetic.lesions import DEVICES, HEART_RATIO, PENS, Lesion, draw_lesion
from mmclip.data.synthetic.phantom import Canvas, develop, draw_anatomy, draw_exposure
from mmclip.data.synthetic.preset import (
    BILATERAL_RATIO,
    FINDINGS,
    SIDES,
    SIZES,
    Combination,
    Preset,
    Side,
    Size,
)

STUDIES_FILE, LESIONS_FILE, MASKS_FILE = "studies.csv", "lesions.csv", "masks.npz"
MAPPING_FILE, PRESET_FILE, FILMS_FOLDER = "mapping.toml", "preset.json", "films"

MAPPING = """\
# How `mmclip data build csv` reads studies.csv. A finding that is not in `labels` is absent.

[columns]
film_id = "film_id"
study_id = "study_id"
patient_id = "patient_id"
image = "film"
split = "split"
view = "view"
age = "age"
sex = "sex"
findings = "findings"
impression = "impression"
labels = "labels"

[labels]
separator = "|"
closed = true
findings = [{findings}]
"""


@dataclass(frozen=True)
class SyntheticFilm:
    """One film with all that is true of it.

    Attributes:
        film: Air is dark.
        masks: The pixels of each finding, by its name.
        findings: Section of the report; "" for an unpaired patient, as is `impression`.
        held_out: The combination for which this patient was made, or None.
    """

    film_id: str
    study_id: str
    patient_id: str
    split: Split
    view: View
    age_years: int
    sex: Sex
    film: UInt8[np.ndarray, "h w"]
    masks: dict[str, Bool[np.ndarray, "h w"]]
    lesions: tuple[Lesion, ...]
    findings: str
    impression: str
    held_out: Combination | None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the present findings; every other finding is absent."""
        return tuple(lesion.finding for lesion in self.lesions)


def _generator(preset: Preset, split: Split, index: int, stream: int) -> np.random.Generator:
    """The only source of randomness: equal arguments, equal draws, in any order and process."""
    place = get_args(Split).index(split)
    return np.random.default_rng([preset.seed, preset.version, place, index, stream])


PERSON, REPORT, FILM = 0, 1, 2  # streams; the second film of a study is FILM + 1


def _draw_lesion(rng: np.random.Generator, preset: Preset, finding: str) -> Lesion:
    """A side and a size of a finding, never a held-out combination."""
    sides = SIDES[finding]
    probs = np.array([BILATERAL_RATIO if side == "bilateral" else 1.0 for side in sides])
    if "bilateral" in sides:
        probs[:-1] = (1 - BILATERAL_RATIO) / (len(sides) - 1)
    probs /= probs.sum()
    while True:
        side: Side = sides[int(rng.choice(len(sides), p=probs))]
        size: Size = SIZES[int(rng.choice(len(SIZES), p=preset.size_probs))]
        if Combination(finding, side, size) not in preset.held_out:
            return _equip(rng, Lesion(finding, side, size))


def _equip(rng: np.random.Generator, lesion: Lesion) -> Lesion:
    """For devices, the size is how many there are."""
    if lesion.finding != "support devices":
        return lesion
    n = 1 + SIZES.index(lesion.size)
    return replace(lesion, kinds=tuple(str(kind) for kind in rng.choice(DEVICES, n, replace=False)))


def draw_lesions(
    rng: np.random.Generator, preset: Preset, held_out: Combination | None = None
) -> tuple[Lesion, ...]:
    """What a patient has, in the order of drawing; with `held_out`, that and perhaps more."""
    weights = dict(preset.finding_weights)
    names = [name for name in FINDINGS if held_out is None or name != held_out.finding]
    probs = np.array([weights.get(name, 1.0) for name in names])
    n = int(rng.choice(len(preset.n_findings_probs), p=preset.n_findings_probs))
    n = max(n - (held_out is not None), 0)
    chosen = rng.choice(names, n, replace=False, p=probs / probs.sum())
    lesions = [_draw_lesion(rng, preset, str(name)) for name in chosen]
    if held_out is not None:
        lesions.append(_equip(rng, Lesion(held_out.finding, held_out.side, held_out.size)))
    order = list(PENS)
    return tuple(sorted(lesions, key=lambda lesion: order.index(lesion.finding)))


def n_films(preset: Preset, split: Split, index: int) -> int:
    """Films of a patient's study: 1, or 2 for a share `second_film_prob` of patients."""
    rng = _generator(preset, split, index, FILM + 2)
    return 1 + int(rng.random() < preset.second_film_prob)


def make_patient(preset: Preset, split: Split, index: int, film_index: int = 0) -> SyntheticFilm:
    """Makes a patient of a split, fully determined by the arguments.

    Args:
        index: From 0 to `preset.n_patients(split) - 1`.
        film_index: 0, or 1 for the second film of the study: the same body and findings, another
            exposure. Any patient has one if asked; `n_films` says whose study holds it.

    Raises:
        IndexError: When the split has no such patient.
    """
    if not 0 <= index < preset.n_patients(split):
        raise IndexError(
            f"patient {index} of {split} is not among the {preset.n_patients(split)} of "
            f"preset {preset.name}"
        )
    person = _generator(preset, split, index, PERSON)
    held_out = None
    if split == "test" and index >= preset.n_test:
        held_out = preset.held_out[(index - preset.n_test) % len(preset.held_out)]
    sex: Sex = "F" if person.random() < 0.5 else "M"
    age_years = int(person.integers(18, 91))
    lesions = draw_lesions(person, preset, held_out)
    anatomy = draw_anatomy(person, sex)
    for lesion in lesions:
        if lesion.finding == "cardiomegaly":
            ratio = HEART_RATIO[lesion.size] + person.uniform(-0.02, 0.02)
            anatomy = replace(anatomy, heart_ratio=ratio)

    state = person.bit_generator.state
    sites: list[tuple[float, float]] = []
    for k in range(film_index + 1):  # a later film shows the findings where the first one does
        person.bit_generator.state = state
        shot = _generator(preset, split, index, FILM + k)
        exposure = draw_exposure(shot, preset)
        canvas = Canvas(anatomy, preset.film_px, exposure, known_sites=sites)
        masks, placed = {}, []
        for lesion in lesions:
            lesion, masks[lesion.finding] = draw_lesion(canvas, person, lesion, preset)
            placed.append(lesion)
        sites = canvas.sites
    film = develop(canvas, exposure, shot, preset)

    findings, impression = "", ""
    if split != "train" or index < preset.n_train:
        findings, impression = write_report(
            _generator(preset, split, index, REPORT), placed, preset
        )
    patient_id = f"{preset.name}-{split}-{index:06d}"
    return SyntheticFilm(
        film_id=f"{patient_id}-{film_index + 1}",
        study_id=f"{patient_id}-s",
        patient_id=patient_id,
        split=split,
        view=exposure.view,
        age_years=age_years,
        sex=sex,
        film=film,
        masks=masks,
        lesions=tuple(placed),
        findings=findings,
        impression=impression,
        held_out=held_out,
    )


def make_study(preset: Preset, split: Split, index: int) -> list[SyntheticFilm]:
    """All films of a patient's one study."""
    return [make_patient(preset, split, index, k) for k in range(n_films(preset, split, index))]


def _save_study(preset: Preset, split: Split, index: int, films_folder: Path) -> list[dict]:
    """Writes the films of one patient and returns what the tables say of them."""
    rows = []
    for made in make_study(preset, split, index):
        name = f"{made.film_id}.png"
        Image.fromarray(made.film).save(films_folder / name)
        facts = {
            "film": f"{FILMS_FOLDER}/{name}",
            "film_id": made.film_id,
            "patient_id": made.patient_id,
            "study_id": made.study_id,
            "split": split,
            "view": made.view,
            "age": made.age_years,
            "sex": made.sex,
            "labels": "|".join(made.labels),
            "findings": made.findings,
            "impression": made.impression,
            "held_out": "" if made.held_out is None else str(made.held_out),
        }
        packed = {name: np.packbits(mask) for name, mask in made.masks.items()}
        areas = {name: float(mask.mean()) for name, mask in made.masks.items()}
        rows.append({"facts": facts, "lesions": made.lesions, "packed": packed, "areas": areas})
    return rows


def _save_chunk(
    preset: Preset, split: Split, first: int, last: int, films_folder: Path
) -> list[dict]:
    return [
        row
        for index in range(first, last)
        for row in _save_study(preset, split, index, films_folder)
    ]


def write_dataset(
    preset: Preset,
    root: Path,
    workers: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes a data set as a real one looks, for `mmclip data build csv` to read.

    films/*.png, studies.csv (one row a film), mapping.toml, lesions.csv (finding, side, size, zone
    and area of each lesion), masks.npz (`read_masks`) and preset.json. The bytes do not depend on
    `workers`; studies.csv is written last, so a folder that has it is complete.

    Args:
        root: Made when absent; must be empty or hold the same preset.
        workers: Processes.
        on_progress: Called with the patients done and their total.

    Returns:
        `root`.

    Raises:
        ValueError: When the folder holds something else.
    """
    about = json.dumps(asdict(preset), indent=2) + "\n"
    known = root / PRESET_FILE
    if root.is_dir() and any(root.iterdir()):
        if not known.is_file() or known.read_text("utf-8") != about:
            raise ValueError(
                f"{root} holds something other than preset {preset.name}, version "
                f"{preset.version}; give an empty folder"
            )
        (root / STUDIES_FILE).unlink(missing_ok=True)
    films_folder = root / FILMS_FOLDER
    films_folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(known, about)

    splits: list[Split] = list(get_args(Split))
    total = sum(preset.n_patients(split) for split in splits)
    step = 50
    chunks = [
        (preset, split, first, min(first + step, preset.n_patients(split)), films_folder)
        for split in splits
        for first in range(0, preset.n_patients(split), step)
    ]
    rows: list[dict] = []
    done = 0

    def collect(results: Iterable[list[dict]]) -> None:
        nonlocal done
        for (_, _, first, last, _), result in zip(chunks, results, strict=True):
            rows.extend(result)
            done += last - first
            on_progress(done, total)

    if workers <= 1:
        collect(_save_chunk(*chunk) for chunk in chunks)
    else:
        # Not fork: the caller may already run torch's threads, which a forked child would lack.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            collect(pool.map(_save_chunk, *zip(*chunks, strict=True)))

    _save_tables(root, rows, preset)
    return root


def _save_tables(root: Path, rows: list[dict], preset: Preset) -> None:
    names = [(row["facts"]["film_id"], name) for row in rows for name in row["packed"]]
    packed = [row["packed"][name] for row in rows for name in row["packed"]]
    np.savez_compressed(
        root / MASKS_FILE,
        film_id=np.array([film_id for film_id, _ in names], dtype=str),
        finding=np.array([name for _, name in names], dtype=str),
        packed=np.array(packed, dtype=np.uint8).reshape(len(packed), -1),
        film_px=np.array(preset.film_px),
    )
    quoted = ", ".join(f'"{name}"' for name in FINDINGS)
    write_text_atomic(root / MAPPING_FILE, MAPPING.format(findings=quoted))
    lesions = [
        {
            "film_id": row["facts"]["film_id"],
            "finding": lesion.finding,
            "side": lesion.side,
            "size": lesion.size,
            "zone": lesion.zone,
            "kinds": "|".join(lesion.kinds),
            "area_ratio": f"{row['areas'][lesion.finding]:.6f}",
        }
        for row in rows
        for lesion in row["lesions"]
    ]
    _write_csv(root / LESIONS_FILE, lesions)
    _write_csv(root / STUDIES_FILE, [row["facts"] for row in rows])


def _write_csv(path: Path, rows: list[dict]) -> None:
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)


def read_masks(root: Path) -> dict[tuple[str, str], Bool[np.ndarray, "h w"]]:
    """The lesion masks of a written data set, by film id and finding."""
    with np.load(root / MASKS_FILE) as stored:
        px = int(stored["film_px"])
        masks = np.unpackbits(stored["packed"], axis=1, count=px * px).astype(bool)
        keys = zip(stored["film_id"].tolist(), stored["finding"].tolist(), strict=True)
        return dict(zip(keys, masks.reshape(-1, px, px), strict=True))
