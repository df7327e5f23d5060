"""The healthy chest of a synthetic patient.

Everything is drawn in anatomical coordinates: `u` runs from the patient's right (-1) to the left
(+1), `v` from the neck (-1) to the abdomen (+1), and 1 is about 20 cm. An image is seen as if
facing the patient: the patient's right is on the image's left. Edges and lines are anti-aliased by
their distance, so that every image size shows the same patient without supersampling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float32

from mmclip.data.sample import Sex
from mmclip.data.synthetic.preset import Side

Field = Float32[np.ndarray, "h w"]

HILUM_U, HILUM_V = 0.17, -0.02
TRACHEA_HALF_WIDTH = 0.048
CARINA_V = -0.2
HEART_TOP_V = -0.12


@dataclass(frozen=True)
class Anatomy:
    """What differs from one healthy patient to the next; lengths in anatomical units."""

    torso_half_width: float
    chest_half_width: float
    apex_v: float
    dome_right_v: float
    dome_left_v: float
    dome_drop: float  # from the top of the dome to the costophrenic angle
    heart_ratio: float  # heart width over chest width (the cardiothoracic ratio)
    heart_apex: float  # where between its top and bottom the heart is widest
    heart_bottom_v: float
    knob: float  # how far the aortic arch stands out
    trunk: float  # the pulmonary trunk, likewise
    mediastinum_half_width: float
    hilum_scale: float
    rib_spacing: float
    rib_phase: float
    rib_slope: float
    rib_density: float
    clavicle_v: float
    clavicle_rise: float
    clavicle_asymmetry: float
    vessel_phase: tuple[float, float]
    vessel_density: float
    breast_density: float  # 0 in men
    breast_v: float
    breast_radius: float
    bubble_radius: float  # gas in the stomach; 0 for none
    bubble_u: float
    wall_density: float
    bend: tuple[float, float, float]  # amplitude, frequency and phase of the spine's curve


def draw_anatomy(rng: np.random.Generator, sex: Sex) -> Anatomy:
    """Draws a healthy patient; the heart stays within the normal ratio of at most 0.5.

    Source: [chosen: by eye against the proportions of PA images; heart ratio: the usual limit].
    """

    def spread(mean: float, half_range: float) -> float:
        return float(rng.uniform(mean - half_range, mean + half_range))

    habitus = spread(0.0, 1.0)  # -1 slender, 1 stout
    dome_right_v = spread(0.42, 0.09) - 0.05 * habitus
    return Anatomy(
        torso_half_width=0.90 + 0.07 * habitus,
        chest_half_width=spread(0.71, 0.035) + 0.02 * habitus,
        apex_v=spread(-0.83, 0.04),
        dome_right_v=dome_right_v,
        dome_left_v=dome_right_v + spread(0.045, 0.035),
        dome_drop=spread(0.24, 0.06),
        heart_ratio=spread(0.43, 0.045),
        heart_apex=spread(1.6, 0.3),
        heart_bottom_v=dome_right_v + spread(0.24, 0.04),
        knob=spread(0.065, 0.025),
        trunk=spread(0.03, 0.02),
        mediastinum_half_width=spread(0.115, 0.018),
        hilum_scale=spread(1.0, 0.12),
        rib_spacing=spread(0.152, 0.014),
        rib_phase=spread(0.0, 0.5),
        rib_slope=spread(0.22, 0.07),
        rib_density=spread(0.085, 0.025),
        clavicle_v=spread(-0.53, 0.05),
        clavicle_rise=spread(0.13, 0.06),
        clavicle_asymmetry=spread(0.0, 0.05),
        vessel_phase=(spread(0.0, 3.0), spread(0.0, 3.0)),
        vessel_density=spread(0.15, 0.04),
        breast_density=spread(0.08, 0.05) if sex == "F" else 0.0,
        breast_v=spread(0.22, 0.1),
        breast_radius=spread(0.31, 0.06),
        bubble_radius=max(0.0, spread(0.05, 0.07)),
        bubble_u=spread(0.36, 0.08),
        wall_density=0.36 + 0.05 * habitus,
        bend=(spread(0.0, 0.02), spread(2.5, 0.8), spread(0.0, 3.0)),
    )


@dataclass(frozen=True)
class Pose:
    """How the patient stands before the image: what the anatomical coordinates become."""

    rotation_rad: float
    scale: float
    shift: tuple[float, float]
    stretch: float


class Canvas:
    """One image while it is drawn: coordinates, fields of the anatomy, and what findings change.

    Findings write to `air`, `vessels`, `density`, `ribs` and `rib_shift` only.

    Attributes:
        pixel: Size of a pixel in anatomical units, the width of every sharp edge.
        r: Distance from the midline, `abs(u)`.
        wall: Half-width of the rib cage at each height.
        dome: Height `v` of the diaphragm below each point.
        lung: 1 within the rib cage and above the diaphragm, mediastinum included.
        central: 1 where heart or mediastinum displace the lung.
        air: 1 in aerated lung, 0 elsewhere; findings fill it.
        vessels: Factor on the lung markings.
        density: What findings add, in image units (1 = black to white).
        ribs: Factor on the density of the ribs.
        rib_shift: Displacement of the ribs along `v`.
        free: True where lung is still aerated and no finding has been drawn.
        sites: Points (u, v) at which findings were put, in order.
        known_sites: Where to put them again: the `sites` of the study's first image.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        image_size: int,
        pose: Pose,
        known_sites: Sequence[tuple[float, float]] = (),
    ) -> None:
        a = anatomy
        grid = (np.arange(image_size, dtype=np.float32) + np.float32(0.5)) * (2 / image_size) - 1
        x = (grid[None, :] - np.float32(pose.shift[0])) / pose.scale
        y = (grid[:, None] - np.float32(pose.shift[1])) / pose.scale
        cos, sin = math.cos(pose.rotation_rad), math.sin(pose.rotation_rad)
        v = (sin * x + cos * y).astype(np.float32)
        amplitude, frequency, phase = a.bend
        u = ((cos * x - sin * y) / pose.stretch).astype(np.float32)
        u += np.float32(amplitude) * np.sin(np.float32(frequency) * v + np.float32(phase))
        self.anatomy, self.pixel = a, 2 / image_size / pose.scale
        self.u, self.v, self.r = u, v, np.abs(u)
        self.is_left = u > 0

        reach = np.clip((0.35 - v) / (0.35 - a.apex_v), 0, 1)
        self.wall = a.chest_half_width * np.sqrt(np.maximum(1 - reach**2.2, 0))
        self.wall -= 0.05 * np.clip(v - 0.45, 0, 1)
        top = np.where(self.is_left, np.float32(a.dome_left_v), np.float32(a.dome_right_v))
        slope = (self.r - 0.56 * a.chest_half_width) / (0.44 * a.chest_half_width)
        self.dome = top + a.dome_drop * np.where(slope > 0, slope**2, 0.35 * slope**2)
        soft = max(self.pixel, 0.012)
        self.lung = ramp(self.wall - self.r, soft) * ramp(self.dome - v, soft)
        self.lung *= ramp(v - a.apex_v, 0.02)
        self.heart, self.central = self._silhouette(soft)
        self.air = self.lung * (1 - self.central)
        self.vessels = np.ones_like(u)
        self.density = np.zeros_like(u)
        self.ribs = np.ones_like(u)
        self.rib_shift = np.zeros_like(u)
        self.free = self.air > 0.6
        self.sites: list[tuple[float, float]] = []
        self.known_sites = tuple(known_sites)

    def _silhouette(self, soft: float) -> tuple[Field, Field]:
        """The heart, and heart and mediastinum together, from their right and left borders."""
        a, v = self.anatomy, self.v
        width = a.heart_ratio * 2 * a.chest_half_width
        top = HEART_TOP_V - 0.35 * (a.heart_ratio - 0.43)
        t = np.clip((v - top) / (a.heart_bottom_v - top), 0, 1)
        t = np.where(self.is_left, t**a.heart_apex, t)
        bulge = np.maximum(np.sin(np.pi * t), 0) ** 0.72
        heart = width * np.where(self.is_left, np.float32(0.7), np.float32(0.3)) * bulge
        vessels = a.mediastinum_half_width + 0.05 * ramp(-0.45 - v, 0.2) - 0.03 * ramp(v - 0.1, 0.1)
        arch = a.knob * np.exp(-(((v + 0.33) / 0.085) ** 2))
        trunk = a.trunk * np.exp(-(((v + 0.13) / 0.1) ** 2))
        vessels = vessels + np.where(self.is_left, arch + trunk, np.float32(0.02))
        # A smooth maximum: the borders run into one another.
        both = 0.5 * (heart + vessels + np.sqrt((heart - vessels) ** 2 + 0.0025))
        return ramp(heart - self.r, soft) * (heart > 0.01), ramp(both - self.r, soft)

    def site(
        self, rng: np.random.Generator, side: Side, allowed: Bool[np.ndarray, "h w"]
    ) -> tuple[float, float]:
        """A random point (u, v) of free lung on a side where `allowed` is true.

        Where findings leave no such point, any point of that lung.
        """
        draw = rng.random()
        if len(self.sites) < len(self.known_sites):
            site = self.known_sites[len(self.sites)]
        else:
            lung = self.side(side) & (self.lung > 0.5)
            places = np.flatnonzero(lung & self.free & allowed)
            if not places.size:
                places = np.flatnonzero(lung)
            place = places[int(draw * places.size)]
            site = float(self.u.flat[place]), float(self.v.flat[place])
        self.sites.append(site)
        return site

    def side(self, side: Side) -> Bool[np.ndarray, "h w"]:
        """True on the patient's `side` of the midline; everywhere for "bilateral" and "none"."""
        if side == "left":
            return self.is_left
        if side == "right":
            return ~self.is_left
        return np.ones_like(self.is_left)


def ramp(distance: Field, half_width: float) -> Field:
    """Smooth step from 0 to 1 as the signed distance goes from -half_width to half_width."""
    t = np.clip(distance * (0.5 / half_width) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def stroke(distance: Field, half_width: float | Field, pixel: float) -> Field:
    """An anti-aliased line, 0..1, at distance 0; never thinner than it can be seen."""
    return np.clip((half_width - np.abs(distance)) / pixel + 0.75, 0, 1)


@lru_cache(maxsize=16)
def _cosines(image_size: int, n: int) -> Float32[np.ndarray, "h n"]:
    t = (np.arange(image_size) + 0.5) / image_size
    return np.cos(np.pi * t[:, None] * np.arange(n)[None, :]).astype(np.float32)


def smooth_noise(rng: np.random.Generator, image_size: int, n: int) -> Field:
    """A random field of standard deviation about 1 that changes over 1/n of the image."""
    weights = rng.standard_normal((n, n)).astype(np.float32) / n * 2
    basis = _cosines(image_size, n)
    return basis @ weights @ basis.T


def bones(canvas: Canvas) -> tuple[Field, Field]:
    """Density of ribs and clavicles, and of the spine, apart from the soft tissue."""
    a, r = canvas.anatomy, canvas.r
    v = canvas.v + canvas.rib_shift
    along = np.clip(r / np.maximum(canvas.wall, 0.2), 0, 1.1)
    phase = np.where(canvas.is_left, np.float32(a.rib_phase + 0.06), np.float32(a.rib_phase))
    half = 0.19

    def pulses(curve: Field, spacing: float) -> Field:
        q = (v - curve) / spacing + phase + 0.06 * np.sin(9 * v + 5 * a.rib_phase)
        distance = np.abs(q - np.rint(q))
        edge = max(canvas.pixel / spacing, 0.06)
        body = np.clip((half - distance) / edge + 0.5, 0, 1)
        cortex = np.clip(1 - np.abs(distance - half + 0.05) / max(edge, 0.05), 0, 1)
        return 0.75 * body + 0.4 * cortex

    posterior = pulses(a.rib_slope * along**2 - 0.05 * along, a.rib_spacing)
    anterior = pulses(0.42 * (1 - along) + 0.07, 1.12 * a.rib_spacing)
    anterior *= np.clip((along - 0.38) * 4, 0, 1)
    cage = ramp(canvas.wall + 0.02 - r, 0.03) * (canvas.v > a.apex_v)
    below = 1 - 0.6 * ramp(canvas.v - canvas.dome, 0.05)
    ribs = a.rib_density * cage * below * (posterior + 0.75 * anterior) * canvas.ribs

    t = np.clip((r - 0.07) / 0.6, 0, 1)
    tilt = np.where(canvas.is_left, np.float32(a.clavicle_asymmetry), np.float32(0))
    curve = a.clavicle_v + tilt - a.clavicle_rise * t + 0.035 * np.sin(6.3 * t)
    gap = (v - curve) / (1 + 0.3 * (1 - t))
    shaft = np.clip((0.034 - np.abs(gap)) / max(canvas.pixel, 0.01) + 0.5, 0, 1)
    cortex = np.clip(1 - np.abs(np.abs(gap) - 0.028) / max(canvas.pixel, 0.012), 0, 1)
    clavicles = (0.11 * shaft + 0.05 * cortex) * ((t > 0) & (t < 1))

    column = np.clip((0.085 - r) / 0.03 + 0.5, 0, 1)
    discs = 0.5 + 0.5 * np.cos(canvas.v * (6.2832 / 0.16) + 3 * a.rib_phase)
    spine = column * (0.045 + 0.05 * discs)
    return ribs + clavicles, spine


def markings(canvas: Canvas) -> Field:
    """Vessels that branch from the hila and thin out towards the edge of the lung, 0..1."""
    a = canvas.anatomy
    hilum_v = np.where(canvas.is_left, np.float32(HILUM_V - 0.03), np.float32(HILUM_V))
    across, down = canvas.r - (HILUM_U - 0.05), canvas.v - hilum_v
    radius = np.sqrt(across**2 + down**2) + 1e-3
    angle = np.arctan2(down, across)
    phase = np.where(canvas.is_left, np.float32(a.vessel_phase[0]), np.float32(a.vessel_phase[1]))
    bent = angle + 0.16 * np.sin(7 * radius + phase) + phase

    def fan(per_turn: float, width: float) -> Field:
        q = bent * (per_turn / 6.2832)
        gap = np.abs(q - np.rint(q)) * (6.2832 / per_turn) * radius
        return np.clip((width - gap) / max(canvas.pixel, 0.012) + 0.5, 0, 1)

    thick = fan(9.0, 0.014) * np.clip(1.6 - 4.0 * radius, 0, 1)
    thin = fan(18.0, 0.004) * np.clip(radius * 8 - 1.2, 0, 1) * np.clip(1.3 - 1.9 * radius, 0, 1)
    hila = np.exp(-((across - 0.05) ** 2) / 0.004 - down**2 / 0.014) * a.hilum_scale
    return np.maximum(thick, 0.75 * thin) + 0.9 * hila
