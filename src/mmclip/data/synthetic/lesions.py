"""Findings as they look on an image: each is drawn into a canvas and answers with its own pixels.

A function here changes `air`, `vessels`, `density` or `rib_shift` of the canvas and returns the
lesion as a field 0..1. Lengths are in anatomical units (1 is about 20 cm), times the preset's
`lesion_scale`; densities are in image units, times its `lesion_contrast`.
Source of sizes: [chosen: life size where a textbook gives one, such as 3 cm between nodule and
mass; else by eye].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool

from mmclip.data.synthetic.phantom import (
    CARINA_V,
    HILUM_U,
    HILUM_V,
    Canvas,
    Field,
    ramp,
    smooth_noise,
    stroke,
)
from mmclip.data.synthetic.preset import SIZES, Preset, Side, Size

DEVICES = ("endotracheal tube", "central venous catheter", "pacemaker", "nasogastric tube")

HEART_RATIO: dict[Size, float] = {"small": 0.575, "moderate": 0.635, "large": 0.70}
"""Cardiothoracic ratio of an enlarged heart; a healthy one ends below 0.5."""


@dataclass(frozen=True)
class Lesion:
    """One finding of a patient.

    Attributes:
        zone: "upper", "mid" or "lower" third of the lung, "" where a finding has no such place.
        kinds: Which devices, by name; empty for other findings.
    """

    finding: str
    side: Side
    size: Size
    zone: str = ""
    kinds: tuple[str, ...] = ()


Pen = Callable[[Canvas, np.random.Generator, Lesion, Preset], Field]


def _pick(lesion: Lesion, small: float, moderate: float, large: float) -> float:
    return (small, moderate, large)[SIZES.index(lesion.size)]


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _lobes(rng: np.random.Generator, angle: Field, depth: float) -> Field:
    """A wavy factor on a radius: the outline of something that grew unevenly."""
    waves = [np.cos(k * angle + rng.uniform(0, 6.28)) * rng.uniform(0.3, 1) for k in (2, 3, 5)]
    return 1 + depth * (waves[0] + waves[1] + waves[2])


def _occupy(canvas: Canvas, lesion: Field) -> None:
    canvas.free &= lesion < 0.1


def _cardiomegaly(
    canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset
) -> Field:
    # The canvas already holds the large heart, as everything else gives way to it.
    return canvas.heart


def _effusion(canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset) -> Field:
    height = _pick(lesion, 0.13, 0.27, 0.48) * preset.lesion_scale * rng.uniform(0.88, 1.12)
    across = np.clip(canvas.r / np.maximum(canvas.wall, 0.1), 0, 1.2)
    floor = canvas.anatomy.dome_right_v + canvas.anatomy.dome_drop
    rise = rng.uniform(0.12, 0.2)
    surface = floor - height + rise * (0.5 - across**4) - 0.25 * height * (0.5 - across) ** 2
    fluid = ramp(canvas.v - surface, max(canvas.pixel, 0.015)) * canvas.side(lesion.side)
    pleural = fluid * canvas.lung * (1 - canvas.central)
    canvas.air *= 1 - 0.97 * fluid
    canvas.density += 0.13 * pleural
    return pleural


def _pneumothorax(
    canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset
) -> Field:
    depth = _pick(lesion, 0.075, 0.12, 0.19) * preset.lesion_scale * rng.uniform(0.9, 1.1)
    ends = _pick(lesion, 0.0, 0.3, 0.8) + rng.uniform(-0.1, 0.1)
    width = depth * (1 + 0.9 * ramp(-0.15 - canvas.v, 0.4)) * ramp(ends - canvas.v, 0.35)
    side = canvas.side(lesion.side)
    inward = canvas.wall - canvas.r - width
    outside = ramp(-inward, canvas.pixel) * canvas.air * side * (width > 0.02)
    pleura = stroke(inward, 0.35 * canvas.pixel, canvas.pixel) * canvas.air * side
    canvas.vessels *= 1 - outside
    canvas.density -= 0.06 * preset.lesion_contrast * outside
    canvas.density += 0.16 * preset.lesion_contrast * pleura * (width > 0.02)
    canvas.density += 0.035 * canvas.air * side * (1 - outside)  # the lung behind it has sunk
    return outside


def _edema(canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset) -> Field:
    amount = _pick(lesion, 0.36, 0.48, 0.6) * min(preset.lesion_contrast, 1.5)
    spread = _pick(lesion, 0.17, 0.20, 0.235)
    patchy = 1 + 0.22 * smooth_noise(rng, len(canvas.u), 12)
    wing = np.exp(-(((canvas.r - 0.29) / spread) ** 2) - ((canvas.v - 0.04) / (2 * spread)) ** 2)
    haze = np.clip(amount * wing * patchy, 0, 0.85)
    canvas.vessels += (1.0 + amount) * (1 - canvas.central)
    spacing = max(0.075, 3 * canvas.pixel)
    turn = (canvas.v + 0.15 * canvas.r) / spacing
    septal = stroke((turn - np.rint(turn)) * spacing, 0.3 * canvas.pixel, canvas.pixel)
    edge = ramp(0.13 - (canvas.wall - canvas.r), 0.02) * ramp(canvas.v - 0.05, 0.1)
    canvas.density += 0.1 * preset.lesion_contrast * septal * edge * canvas.air
    canvas.air *= 1 - haze
    return wing * canvas.lung * (1 - canvas.central) / 0.7


def _consolidation(
    canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset
) -> Field:
    radius = _pick(lesion, 0.15, 0.2, 0.27) * preset.lesion_scale * rng.uniform(0.9, 1.1)
    u0, v0 = canvas.site(rng, lesion.side, canvas.air > 0.8)
    uneven = smooth_noise(rng, len(canvas.u), 14)
    across, down = canvas.u - u0, canvas.v - v0
    distance = np.sqrt(across**2 + down**2)
    fill = ramp(radius * (1 + 0.14 * uneven) - distance, 0.55 * radius)
    if rng.random() < 0.6:  # a fissure gives one straight, sharp border
        below = _sign(rng)
        border = (down - rng.uniform(-0.2, 0.2) * across) * below + 0.5 * radius
        fill *= ramp(border, canvas.pixel)
    hilum_u = HILUM_U if u0 > 0 else -HILUM_U
    angle = math.atan2(v0 - HILUM_V, u0 - hilum_u)
    inside = ramp(0.75 * radius - distance, 0.2 * radius)
    for turn in (-0.4, 0.0, 0.4):
        cos, sin = math.cos(angle + turn), math.sin(angle + turn)
        bronchus = stroke(cos * down - sin * across + turn * 0.12, 0.008, canvas.pixel)
        fill *= 1 - 0.45 * bronchus * inside
    fill = np.clip(fill * (0.84 + 0.08 * uneven) * min(preset.lesion_contrast, 1.2), 0, 0.95)
    fill *= canvas.side(lesion.side)
    whole = fill * canvas.lung * (1 - canvas.central)
    canvas.air *= 1 - fill
    return whole * 1.2


def _hernia(canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset) -> Field:
    radius = _pick(lesion, 0.1, 0.125, 0.155) * preset.lesion_scale * rng.uniform(0.92, 1.08)
    u0 = rng.uniform(0.0, 0.14)
    v0 = canvas.anatomy.dome_right_v - rng.uniform(0.02, 0.12)
    across, down = (canvas.u - u0) / 1.1, canvas.v - v0
    distance = np.sqrt(across**2 + down**2)
    sac = ramp(radius - distance, canvas.pixel)
    wall = stroke(distance - radius, 0.012, canvas.pixel)
    fluid = ramp(down - 0.15 * radius, 0.5 * canvas.pixel)
    contrast = preset.lesion_contrast
    canvas.density += contrast * (0.10 * wall + sac * (0.09 * fluid - 0.17 * (1 - fluid)))
    return sac


def _hilar(canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset) -> Field:
    radius = _pick(lesion, 0.085, 0.105, 0.13) * preset.lesion_scale * rng.uniform(0.92, 1.08)
    right = lesion.side == "right"
    u0 = (HILUM_U + 0.45 * radius) * (-1 if right else 1)
    across, down = canvas.u - u0, canvas.v - (HILUM_V if right else HILUM_V - 0.03)
    angle = np.arctan2(down, across)
    lobes = _lobes(rng, angle, 0.12)
    field = ramp(radius * lobes - np.sqrt(across**2 + (down / 1.25) ** 2), 2 * canvas.pixel)
    canvas.density += 0.2 * preset.lesion_contrast * field * canvas.lung * (1 - canvas.central)
    return field * canvas.lung * canvas.side(lesion.side)


def _mass(canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset) -> Field:
    radius = _pick(lesion, 0.095, 0.125, 0.155) * preset.lesion_scale * rng.uniform(0.92, 1.08)
    far = np.hypot(canvas.r - HILUM_U, canvas.v - HILUM_V) > 0.22 + 0.5 * radius
    inner = canvas.wall - canvas.r > 0.5 * radius
    u0, v0 = canvas.site(rng, lesion.side, far & inner)
    across, down = canvas.u - u0, canvas.v - v0
    angle = np.arctan2(down, across)
    lobes = _lobes(rng, angle, 0.07) + 0.02 * np.cos(13 * angle)
    field = ramp(radius * lobes - np.sqrt(across**2 + down**2), 1.2 * canvas.pixel)
    canvas.air *= 1 - 0.6 * field
    canvas.density += 0.17 * preset.lesion_contrast * field * canvas.lung
    return field * canvas.lung * canvas.side(lesion.side)


def _nodule(canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset) -> Field:
    radius = _pick(lesion, 0.042, 0.055, 0.068) * preset.lesion_scale
    u0, v0 = canvas.site(rng, lesion.side, canvas.air > 0.8)
    distance = np.sqrt((canvas.u - u0) ** 2 + (canvas.v - v0) ** 2)
    field = ramp(radius - distance, 0.7 * canvas.pixel)
    canvas.density += 0.33 * preset.lesion_contrast * field
    return np.maximum(field, distance <= 0.75 * canvas.pixel)


def _atelectasis(canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset) -> Field:
    length = _pick(lesion, 0.13, 0.17, 0.22) * preset.lesion_scale * rng.uniform(0.9, 1.1)
    thickness = _pick(lesion, 0.012, 0.015, 0.019) * preset.lesion_scale
    u0, v0 = canvas.site(rng, lesion.side, (canvas.v > -0.15) & (canvas.air > 0.8))
    tilt = rng.uniform(0.1, 0.55) * _sign(rng)
    bow = rng.uniform(-0.5, 0.5)
    cos, sin = math.cos(tilt), math.sin(tilt)
    across, down = canvas.u - u0, canvas.v - v0
    along = cos * across + sin * down
    aside = cos * down - sin * across + bow * along**2
    taper = np.clip(1.15 - (along / length) ** 2, 0, 1)
    field = np.zeros_like(canvas.u)
    for k in range((1, 2, 2)[SIZES.index(lesion.size)]):
        band = stroke(aside + 0.1 * k + 0.2 * k * along, thickness * taper, canvas.pixel)
        field = np.maximum(field, band * np.minimum(2 * taper, 1))
    field = field * canvas.lung * (1 - canvas.central) * canvas.side(lesion.side)
    canvas.density += 0.2 * preset.lesion_contrast * field
    return field


def _fracture(canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset) -> Field:
    a, sign = canvas.anatomy, 1.0 if lesion.side == "left" else -1.0
    height = a.rib_spacing
    start = rng.uniform(-0.42, 0.05)
    field = np.zeros_like(canvas.u)
    phase = a.rib_phase + (0.06 if lesion.side == "left" else 0.0)
    share = rng.uniform(0.72, 0.86)
    curve = a.rib_slope * share**2 - 0.05 * share
    first = round((start - curve) / height + phase)
    for k in range(1 + SIZES.index(lesion.size)):
        v0 = (first + k - phase) * height + curve
        reach = min(max((0.35 - v0) / (0.35 - a.apex_v), 0), 1)
        width = a.chest_half_width * math.sqrt(1 - reach**2.2)
        u0 = sign * width * (share + rng.uniform(-0.03, 0.03))
        across, down = (canvas.u - u0) * sign, canvas.v - v0
        near = np.exp(-((across / 0.13) ** 2) - (down / (0.55 * height)) ** 4)
        step = ramp(across, 0.5 * canvas.pixel)
        canvas.rib_shift += 0.07 * preset.lesion_scale * near * (0.5 - step)
        gap = stroke(across - 0.3 * down, 0.011 * preset.lesion_scale, canvas.pixel)
        short = ramp(0.05 * preset.lesion_scale - np.abs(down), canvas.pixel)
        ends = np.exp(-(((np.abs(across) - 0.05) / 0.03) ** 2) - (down / 0.045) ** 2)
        canvas.ribs *= 1 - gap * short
        canvas.density += preset.lesion_contrast * (0.18 * ends - 0.04 * gap * short)
        field = np.maximum(field, near * (np.abs(across) < 0.1))
    return field * (field > 0.4) * canvas.side(lesion.side)


def _path(canvas: Canvas, points: list[tuple[float, float]]) -> Field:
    """Distance of every pixel to the smooth line along `points`, in anatomical units."""
    for _ in range(2):  # Chaikin's corner cutting
        cut = [
            (u0 + t * (u1 - u0), v0 + t * (v1 - v0))
            for (u0, v0), (u1, v1) in pairwise(points)
            for t in (0.25, 0.75)
        ]
        points = [points[0], *cut, points[-1]]
    nearest = np.full_like(canvas.u, np.inf)
    for (u0, v0), (u1, v1) in pairwise(points):
        du, dv = u1 - u0, v1 - v0
        t = ((canvas.u - u0) * du + (canvas.v - v0) * dv) / (du * du + dv * dv)
        t = np.clip(t, 0, 1)
        gap = (canvas.u - u0 - t * du) ** 2 + (canvas.v - v0 - t * dv) ** 2
        nearest = np.minimum(nearest, gap)
    return np.sqrt(nearest)


def _devices(canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset) -> Field:
    a, sign, field = canvas.anatomy, _sign(rng), np.zeros_like(canvas.u)
    wire = 0.005 * preset.lesion_scale
    for kind in lesion.kinds:
        level = 0.26
        if kind == "endotracheal tube":
            tip = CARINA_V - rng.uniform(0.1, 0.22)
            gap = _path(canvas, [(0.012, -1.3), (0.012, tip)])
            drawn = np.maximum(0.4 * (gap < 0.03), stroke(gap - 0.022, 0.6 * wire, canvas.pixel))
        elif kind == "central venous catheter":
            vein = [(sign * 0.62, -0.62), (sign * 0.4, -0.68), (sign * 0.18, -0.56)]
            if rng.random() < 0.5:
                vein = [(sign * 0.16, -1.2), (sign * 0.15, -0.75), (sign * 0.13, -0.56)]
            cava = [(-0.08, -0.44), (-0.11, -0.3), (-0.115, rng.uniform(-0.15, 0.02))]
            drawn = stroke(_path(canvas, vein + cava), wire, canvas.pixel)
        elif kind == "pacemaker":
            u0, v0 = sign * rng.uniform(0.46, 0.6), rng.uniform(-0.5, -0.4)
            box = np.maximum(np.abs(canvas.u - u0) - 0.05, np.abs(canvas.v - v0) - 0.035)
            can = ramp(0.045 - np.maximum(box, 0), canvas.pixel)
            lead = [(u0, v0 - 0.06), (sign * 0.36, -0.66), (sign * 0.16, -0.56), (-0.06, -0.42)]
            lead += [
                (-0.12, -0.1),
                (-0.1, 0.15),
                (0.04, a.dome_right_v),
                (0.22, a.dome_right_v + 0.05),
            ]
            drawn, level = np.maximum(can, stroke(_path(canvas, lead), wire, canvas.pixel)), 0.4
        else:
            gullet = [(0.03, -1.3), (0.035, -0.3), (0.05, 0.2), (0.06, a.dome_right_v + 0.1)]
            gullet += [(0.16, a.dome_left_v + 0.16), (0.32, a.dome_left_v + 0.2)]
            drawn = stroke(_path(canvas, gullet), wire, canvas.pixel)
        canvas.density += level * preset.lesion_contrast * drawn
        field = np.maximum(field, drawn > 0.3)
    return field


PENS: dict[str, Pen] = {
    "cardiomegaly": _cardiomegaly,
    "pleural effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "edema": _edema,
    "consolidation": _consolidation,
    "hiatal hernia": _hernia,
    "hilar enlargement": _hilar,
    "mass": _mass,
    "nodule": _nodule,
    "atelectasis": _atelectasis,
    "rib fracture": _fracture,
    "support devices": _devices,
}
"""How each finding is drawn, in the order of drawing: what moves much of the lung comes first."""

ZONED = ("atelectasis", "consolidation", "mass", "nodule")


def draw_lesion(
    canvas: Canvas, rng: np.random.Generator, lesion: Lesion, preset: Preset
) -> tuple[Lesion, Bool[np.ndarray, "h w"]]:
    """Draws one finding into the canvas.

    Returns:
        The lesion with its zone of the lung filled in, and the pixels of the image that show it.
    """
    pen = PENS[lesion.finding]
    if lesion.side == "bilateral":
        sides: tuple[Side, ...] = ("right", "left")
    else:
        sides = (lesion.side,)
    field = np.zeros_like(canvas.u)
    for side in sides:
        one = Lesion(lesion.finding, side, lesion.size, kinds=lesion.kinds)
        drawn = pen(canvas, rng, one, preset)
        field = np.maximum(field, drawn)
        if lesion.finding != "cardiomegaly":
            _occupy(canvas, drawn)
    is_lesion = field >= 0.4
    if lesion.finding not in ZONED or lesion.side == "bilateral":
        return lesion, is_lesion
    height = float(canvas.v[is_lesion].mean()) if is_lesion.any() else 0.0
    zone = "upper" if height < -0.22 else "mid" if height < 0.12 else "lower"
    return Lesion(lesion.finding, lesion.side, lesion.size, zone, lesion.kinds), is_lesion
