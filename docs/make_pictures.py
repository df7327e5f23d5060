"""Draws docs/pictures/images.png: eight synthetic images, each with its finding outlined and
reported.

    python docs/make_pictures.py

The images are patients of the preset that `mmclip demo` trains on, drawn larger. Equal code gives
an equal picture.
"""

import io
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageColor
from scipy.ndimage import gaussian_filter

from mmclip.data.entities import find_entities
from mmclip.data.synthetic import PRESETS, SyntheticSample, make_patient
from mmclip.data.text import split_sentences

PICTURES = Path(__file__).parent / "pictures"

PATIENTS = {
    "cardiomegaly": 95,
    "consolidation": 22,
    "pleural effusion": 71,
    "pneumothorax": 13,
    "mass": 323,
    "nodule": 202,
    "atelectasis": 292,
    "support devices": 248,
}
"""Validation patients who have this finding and no other. [chosen: sides and sizes vary]"""

SHOWN_PX, COLUMNS, GAP_PX, TEXT_PX = 256, 4, 20, 62
GREYS, TINTS = 52, 12
"""Colours that the file keeps: greys, and tints of the outline. [chosen: none is missed by eye, and
it stays under 400 kB]"""

CARD, NAME, SAID, OUTLINE = "#14191f", "#f3f5f7", "#aab4bf", "#ffb454"
"""A dark card of its own: images are dark, and the page behind it may be light or dark."""


def main() -> None:
    """Writes the picture."""
    preset = replace(PRESETS["demo"], image_size=2 * SHOWN_PX)  # shrunk to half, the grain is finer
    images = [make_patient(preset, "val", index) for index in PATIENTS.values()]
    lines = -(-len(images) // COLUMNS)
    width = COLUMNS * SHOWN_PX + (COLUMNS + 1) * GAP_PX
    height = lines * (SHOWN_PX + TEXT_PX) + (lines + 1) * GAP_PX
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width / 100, height / 100), dpi=125)
        whole = figure.add_axes((0, 0, 1, 1))
        whole.set(xlim=(0, width), ylim=(height, 0))
        whole.set_axis_off()
        for i, (finding, sample) in enumerate(zip(PATIENTS, images, strict=True)):
            left = GAP_PX + i % COLUMNS * (SHOWN_PX + GAP_PX)
            top = GAP_PX + i // COLUMNS * (SHOWN_PX + TEXT_PX + GAP_PX)
            box = (left / width, 1 - (top + SHOWN_PX) / height, SHOWN_PX / width, SHOWN_PX / height)
            draw_image(figure.add_axes(box), sample, finding)
            y = top + SHOWN_PX
            whole.text(left, y + 23, finding, color=NAME, size=10.5, weight="bold")
            for n, line in enumerate(wrapped(sentence_of(sample, finding))):
                whole.text(left, y + 44 + 16 * n, line, color=SAID, size=8.6)
        buffer = io.BytesIO()
        figure.savefig(buffer, facecolor=CARD)
    PICTURES.mkdir(exist_ok=True)
    path = PICTURES / "images.png"
    shades = Image.new("P", (1, 1))
    shades.putpalette(palette())
    picture = Image.open(buffer).convert("RGB").quantize(palette=shades, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


def palette() -> list[int]:
    """Reds, greens and blues in a row: the card, greys, and the outline from dark to light.

    Chosen by hand: counted by pixels, a thin line would lose its colour to the greys.
    """
    card, outline = (np.array(ImageColor.getrgb(colour)) for colour in (CARD, OUTLINE))
    greys = np.linspace(0, 255, GREYS)[:, None].repeat(3, 1)
    t = np.linspace(0.3, 1, TINTS // 2)[:, None]
    tints = [t * outline, outline + (1 - t) * 0.7 * (230 - outline)]
    colours = np.concatenate([card[None], greys, *tints])
    return colours.round().astype(int).ravel().tolist()


def draw_image(axes: Axes, sample: SyntheticSample, finding: str) -> None:
    """The image, with a line around the finding."""
    axes.set_axis_off()
    axes.imshow(sample.image, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
    axes.contour(smooth(sample.masks[finding]), [0.5], colors=OUTLINE, linewidths=1.1)


def smooth(is_lesion: Bool[np.ndarray, "h w"]) -> np.ndarray:
    """The mask with its stairs smoothed, and a little room around it."""
    return 2 * gaussian_filter(is_lesion.astype(float), 2.5)


def sentence_of(sample: SyntheticSample, finding: str) -> str:
    """The sentence of the report that says that the finding is there."""
    (entities,) = find_entities([sample.findings])
    # The lexicon says "support device" where the preset says "support devices".
    is_it = (finding.startswith(e.concept) and e.status == "present" for e in entities)
    at = next(e.start for e, it_is in zip(entities, is_it, strict=True) if it_is)
    for start, end in split_sentences(sample.findings):
        if start <= at < end:
            return sample.findings[start:end]
    raise AssertionError("sentences cover all words")


def wrapped(sentence: str, most: int = 38) -> list[str]:
    """The sentence in lines of at most so many characters."""
    lines = [""]
    for word in sentence.split():
        joined = f"{lines[-1]} {word}".strip()
        if len(joined) > most:
            lines.append(word)
        else:
            lines[-1] = joined
    return lines


if __name__ == "__main__":
    main()
