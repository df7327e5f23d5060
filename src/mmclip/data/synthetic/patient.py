"""Synthetic patients: who they are, what they have, their images and their report."""

from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, UInt8

from mmclip.data.sample import Sex, Split, View
from mmclip.data.synthetic.image import develop, draw_exposure
from mmclip.data.synthetic.language import write_report
from mmclip.data.synthetic.lesions import DEVICES, HEART_RATIO, PENS, Lesion, draw_lesion
from mmclip.data.synthetic.phantom import Anatomy, Canvas, draw_anatomy
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

PERSON, REPORT, COUNT, IMAGE = range(4)
"""Streams of draws of a patient; the second image of the study is IMAGE + 1."""


@dataclass(frozen=True)
class SyntheticSample:
    """One image with all that is true of it.

    Attributes:
        image: Air is dark.
        masks: The pixels of each finding, by its name.
        findings: Section of the report; "" for an unpaired patient, as is `impression`.
        held_out: The combination for which this patient was made, or None.
    """

    image_id: str
    study_id: str
    patient_id: str
    split: Split
    view: View
    age_years: int
    sex: Sex
    image: UInt8[np.ndarray, "h w"]
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


def n_images(preset: Preset, split: Split, index: int) -> int:
    """Images of a patient's study: 1, or 2 for a share `second_image_prob` of patients."""
    rng = _generator(preset, split, index, COUNT)
    return 1 + int(rng.random() < preset.second_image_prob)


class _Person(NamedTuple):
    """What all images of a patient show."""

    sex: Sex
    age_years: int
    lesions: tuple[Lesion, ...]
    anatomy: Anatomy


def _draw_person(rng: np.random.Generator, preset: Preset, held_out: Combination | None) -> _Person:
    sex: Sex = "F" if rng.random() < 0.5 else "M"
    age_years = int(rng.integers(18, 91))
    lesions = draw_lesions(rng, preset, held_out)
    anatomy = draw_anatomy(rng, sex)
    for lesion in lesions:
        if lesion.finding == "cardiomegaly":
            ratio = HEART_RATIO[lesion.size] + rng.uniform(-0.02, 0.02)
            anatomy = replace(anatomy, heart_ratio=ratio)
    return _Person(sex, age_years, lesions, anatomy)


def make_patient(preset: Preset, split: Split, index: int, image_index: int = 0) -> SyntheticSample:
    """Makes a patient of a split, fully determined by the arguments.

    Args:
        index: From 0 to `preset.n_patients(split) - 1`.
        image_index: 0, or 1 for the second image of the study: the same body and findings, another
            exposure. Any patient has one if asked; `n_images` says whose study holds it.

    Raises:
        IndexError: When the split has no such patient.
    """
    if not 0 <= index < preset.n_patients(split):
        raise IndexError(
            f"patient {index} of {split} is not among the {preset.n_patients(split)} of "
            f"preset {preset.name}"
        )
    rng = _generator(preset, split, index, PERSON)
    held_out = None
    if split == "test" and index >= preset.n_test:
        held_out = preset.held_out[(index - preset.n_test) % len(preset.held_out)]
    person = _draw_person(rng, preset, held_out)

    # A second image shows the findings where the first one does, so the first is drawn again.
    before_drawing = rng.bit_generator.state
    sites: list[tuple[float, float]] = []
    if image_index:
        pose = draw_exposure(_generator(preset, split, index, IMAGE), preset).pose
        first = Canvas(person.anatomy, preset.image_size, pose)
        for lesion in person.lesions:
            draw_lesion(first, rng, lesion, preset)
        sites = first.sites
        rng.bit_generator.state = before_drawing

    shot = _generator(preset, split, index, IMAGE + image_index)
    exposure = draw_exposure(shot, preset)
    canvas = Canvas(person.anatomy, preset.image_size, exposure.pose, known_sites=sites)
    drawn = [draw_lesion(canvas, rng, lesion, preset) for lesion in person.lesions]
    placed = tuple(lesion for lesion, _ in drawn)
    masks = {lesion.finding: is_lesion for lesion, is_lesion in drawn}
    image = develop(canvas, exposure, shot, preset)
    findings, impression = "", ""
    if split != "train" or index < preset.n_train:
        words = _generator(preset, split, index, REPORT)
        findings, impression = write_report(words, placed, preset)
    patient_id = f"{preset.name}-{split}-{index:06d}"
    return SyntheticSample(
        image_id=f"{patient_id}-{image_index + 1}",
        study_id=f"{patient_id}-s",
        patient_id=patient_id,
        split=split,
        view=exposure.view,
        age_years=person.age_years,
        sex=person.sex,
        image=image,
        masks=masks,
        lesions=placed,
        findings=findings,
        impression=impression,
        held_out=held_out,
    )


def make_study(preset: Preset, split: Split, index: int) -> list[SyntheticSample]:
    """All images of a patient's one study."""
    return [make_patient(preset, split, index, k) for k in range(n_images(preset, split, index))]
