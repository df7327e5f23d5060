"""From a canvas to an image: pose, attenuation, tone curve, noise, border and markers.

Nothing that is drawn at random here depends on the patient's findings.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from mmclip.data.sample import View
from mmclip.data.synthetic.phantom import (
    CARINA_V,
    TRACHEA_HALF_WIDTH,
    Canvas,
    Field,
    Pose,
    bones,
    markings,
    ramp,
    smooth_noise,
)
from mmclip.data.synthetic.preset import Preset


@dataclass(frozen=True)
class Exposure:
    """How one image was taken.

    Attributes:
        gain: Factor on the attenuation.
        gamma: Exponent after the tone curve; above 1 darkens.
        offset: Fog, added to all that is body.
        noise: Factor on the preset's `noise_ratio`.
    """

    view: View
    pose: Pose
    gain: float
    gamma: float
    offset: float
    noise: float


def draw_exposure(rng: np.random.Generator, preset: Preset) -> Exposure:
    """Draws how an image was taken, with the preset's spread of position and exposure."""
    pose, light = preset.pose_spread, preset.exposure_spread

    def spread(mean: float, half_range: float) -> float:
        return float(rng.uniform(mean - half_range, mean + half_range))

    return Exposure(
        view="AP" if rng.random() < 0.15 else "PA",
        pose=Pose(
            rotation_rad=spread(0.0, 0.12 * pose),
            scale=spread(0.98, 0.12 * pose),
            shift=(spread(0.0, 0.12 * pose), spread(0.04, 0.10 * pose)),
            stretch=spread(1.0, 0.06 * pose),
        ),
        gain=float(np.exp(spread(-0.05, 0.22 * light))),
        gamma=float(np.exp(spread(0.25, 0.30 * light))),
        offset=spread(0.0, 0.06 * light),
        noise=spread(1.0, 0.4),
    )


def develop(
    canvas: Canvas, exposure: Exposure, rng: np.random.Generator, preset: Preset
) -> UInt8[np.ndarray, "h w"]:
    """The image of a canvas: attenuation, tone curve, uneven exposure, noise, border and markers.

    Nothing that is drawn at random here depends on the patient's findings.
    """
    a, u, v, r = canvas.anatomy, canvas.u, canvas.v, canvas.r
    image_size, light = preset.image_size, preset.exposure_spread
    torso = a.torso_half_width + 0.5 * ramp(-0.35 - v, 0.35)
    shoulder = -0.86 + 0.3 * (r - 0.3) - 0.75 * np.exp(-((r / 0.26) ** 4))
    body = ramp(torso - r, 0.03) * ramp(v - shoulder, 0.04)
    thick = np.clip(1 - (r / torso) ** 2, 0, 1)

    air = canvas.air
    image = (a.wall_density + 0.17 * thick) * (1 - 0.68 * air)
    image += 0.17 * canvas.central * canvas.lung
    image += 0.12 * ramp(v - canvas.dome, 0.02)
    ribs, spine = bones(canvas)
    image += ribs + spine
    image += a.vessel_density * markings(canvas) * canvas.vessels * air

    trachea = TRACHEA_HALF_WIDTH - np.abs(u - 0.012)
    image -= 0.13 * ramp(trachea, 0.015) * ramp(CARINA_V - v, 0.03)
    main = np.abs(v - CARINA_V - 0.75 * r) - 0.03
    image -= 0.07 * ramp(-main, 0.015) * ramp(0.22 - r, 0.02)
    if a.bubble_radius > 0.015:
        gas = np.sqrt(
            ((u - a.bubble_u) / 1.7) ** 2 + (v - a.dome_left_v - 0.06 - a.bubble_radius) ** 2
        )
        image -= 0.2 * ramp(a.bubble_radius - gas, 0.02) * (v > canvas.dome + 0.03)
    if a.breast_density > 0:
        oval = np.sqrt((r - 0.44) ** 2 + ((v - a.breast_v) / 1.1) ** 2)
        lower = 0.45 + 0.55 * ramp(v - a.breast_v + 0.1, 0.2)
        image += a.breast_density * lower * ramp(a.breast_radius - oval, 0.03)
    blade = a.chest_half_width * 0.9 - 0.1 * np.clip(-v - 0.2, 0, 0.5)
    image += 0.035 * ramp(r - blade, 0.012) * ramp(0.05 - v, 0.08)  # the shoulder blades
    image += canvas.density
    image *= body

    image *= 1 + 0.10 * light * smooth_noise(rng, image_size, 4)
    image += 0.055 * light * smooth_noise(rng, image_size, 6) * body
    image = np.clip(image * exposure.gain + exposure.offset * body, 0.004, 2)
    # The shoulder of the tone curve keeps dense parts from turning plain white.
    image = (1.25 - 1.25 * np.exp(-1.5 * image)) ** np.float32(exposure.gamma)
    image += rng.standard_normal(image.shape, dtype=np.float32) * (
        preset.noise_ratio * exposure.noise
    )
    _write_on(image, rng)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


GLYPHS = {
    "L": "100100100100111",
    "R": "110101110101101",
    "P": "110101110100100",
    "A": "010101111101101",
    "0": "111101101101111",
    "1": "010110010010111",
    "2": "110001010100111",
    "3": "110001010001110",
    "4": "101101111001001",
    "7": "111001010010010",
}
"""Letters of 5 rows and 3 columns, drawn by hand."""


def _stamp(image: Field, text: str, row: int, column: int, zoom: int, level: float) -> None:
    for i, character in enumerate(text):
        glyph = np.array([*map(int, GLYPHS[character])], dtype=bool).reshape(5, 3)
        glyph = glyph.repeat(zoom, 0).repeat(zoom, 1)
        left = column + i * 4 * zoom
        area = image[row : row + 5 * zoom, left : left + 3 * zoom]
        area[glyph[: area.shape[0], : area.shape[1]]] = level


def _write_on(image: Field, rng: np.random.Generator) -> None:
    """Collimation border, side marker and burnt-in text, none of which knows of any finding."""
    n = image.shape[0]
    zoom = max(1, round(n / 80))
    uniforms = rng.random(10)
    numbers = "".join(rng.choice(list("012347"), 4))
    level = 0.85 + 0.15 * float(uniforms[0])
    for edge in range(4):  # collimation, each side of its own
        if uniforms[1 + edge] < 0.25:
            width = 1 + int(uniforms[1 + edge] * 4 * 0.05 * n)
            view = np.rot90(image, edge)
            view[:width] = 0.02
    row = int((0.03 + 0.1 * uniforms[5]) * n)
    if uniforms[6] < 0.45:
        _stamp(image, "R", row, int((0.04 + 0.08 * uniforms[7]) * n), zoom, level)
    elif uniforms[6] < 0.9:
        _stamp(image, "L", row, int((0.86 + 0.06 * uniforms[7]) * n), zoom, level)
    if uniforms[8] < 0.5:
        text = ("AP" if uniforms[9] < 0.3 else "") + numbers
        place = int(n - 8 * zoom) if uniforms[8] < 0.25 else row
        _stamp(image, text, place, int((0.3 + 0.3 * uniforms[9]) * n), zoom, 0.75 * level)
