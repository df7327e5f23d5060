"""What a model makes of an image: where it responds, what is masked, what comes back.

For people who look at a run. Images are read as they are and texts whole, the most relevant
patches are masked, and the masked words are those of the run's seed; so a checkpoint gives the same
pictures again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.batch import Batch
from mmclip.checkpoint import Checkpoint
from mmclip.config import GREY_MEAN, GREY_STD
from mmclip.data.batches import TrainingBatches
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.sample import Entity
from mmclip.data.streams import deterministic_config, is_pair, is_unpaired
from mmclip.data.tokenizer import frame_of
from mmclip.models.encoders import patch_grid
from mmclip.models.mmclip import MMCLIP
from mmclip.models.outputs import Outputs
from mmclip.patches import Grid, PatchGrid, rescale_patches, unpatchify

HEAT, HEAT_RATIO = (255, 176, 0), 0.75
"""Colour of the most relevant patch, and how much of it covers the image there. [chosen: an amber
lighter than an image's darks and no grey, for any kind of colour vision]"""

HATCH, HATCH_GROUND = (150, 172, 196), (54, 68, 84)
HATCH_PX, HATCH_PERIOD_PX, HATCHED_SIDE_PX = 2, 8, 256
"""Lines over masked patches, their width and distance, and the least side of a hatched image.
[chosen: blue-grey, which no image is; an image of 64 px has too few pixels for thin lines]"""


CARD, BRIGHT, QUIET, OUTLINE, UNSEEN = "#14191f", "#f3f5f7", "#aab4bf", "#57c7ff", "#4a2f45"
"""Of the picture of an explanation: a dark card, as images are dark; its words, what readers
marked, and what the model did not see. [chosen: the outline's blue and the heat's amber differ for
any kind of colour vision]"""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a text, in the text's own spelling.

    Args:
        text: The characters, white space included.
        entity: The entity that it lies in, if any.
        predicted: What the model put in place of a masked word, in the spelling of its vocabulary;
            None where nothing was masked. Pieces of the word that were not masked are in it.
        is_right: Whether every masked piece of the word was recovered.
        is_read: False behind the place where a long text was cut.
    """

    text: str
    entity: Entity | None = None
    predicted: str | None = None
    is_right: bool = False
    is_read: bool = True


@dataclass(frozen=True)
class Picture:
    """What the masked terms make of one image and its text.

    Args:
        image: 0..255, air dark.
        relevance: Of each patch to the text, by the score of the run; None where the choice of
            patches does not look at the text, or where no patch responds more than another.
        is_masked: The patches that are masked; None where the run masks none.
        rebuilt: The image, with predictions in the place of masked patches. A patch is predicted in
            its own deviations, and shown with the mean and deviation of the true one. None as for
            `is_masked`.
        spans: Of the text; their texts, joined, are the text.
        is_prompt: Whether the text was written from the image's labels, for want of a report.
        shift_px: How far up and left of the image's own grid the patches lie; see
            `patches.PatchGrid`.
    """

    image: UInt8[np.ndarray, "h w"]
    relevance: Float[np.ndarray, "rows columns"] | None
    is_masked: Bool[np.ndarray, "rows columns"] | None
    rebuilt: UInt8[np.ndarray, "h w"] | None
    spans: tuple[Span, ...]
    is_prompt: bool
    shift_px: int = 0

    def panels(self) -> dict[str, UInt8[np.ndarray, "..."]]:
        """Images to stand beside the image, grey [h w] or colour [h w 3], by what they show."""
        shown: dict[str, np.ndarray] = {}
        moved = _moved(self.image, self.shift_px)
        if self.relevance is not None:
            shown["relevance"] = _put_back(warmed(moved, self.relevance), self.image, self.shift_px)
        if self.is_masked is not None and self.rebuilt is not None:
            hidden = hatched(moved, self.is_masked)
            shown["masked"] = _put_back(hidden, self.image, self.shift_px)
            shown["rebuilt"] = self.rebuilt
        return shown


def _moved(image: UInt8[np.ndarray, "h w"], shift_px: int) -> UInt8[np.ndarray, "h w"]:
    """The image as `PatchGrid.shifted` moves it."""
    kept = image[: len(image) - shift_px, : image.shape[1] - shift_px]
    return np.pad(kept, ((shift_px, 0), (shift_px, 0)), mode="edge")


def _put_back(
    panel: UInt8[np.ndarray, "..."], image: UInt8[np.ndarray, "h w"], shift_px: int
) -> UInt8[np.ndarray, "..."]:
    """A panel of a moved image, perhaps enlarged, over the image: what no patch covers stays."""
    if not shift_px:
        return panel
    scale = len(panel) // len(image)
    whole = image.repeat(scale, 0).repeat(scale, 1)
    out = whole if panel.ndim == 2 else np.stack([whole] * 3, -1)
    s = scale * shift_px
    out[:-s, :-s] = panel[s:, s:]
    return out


@torch.inference_mode()
def make_pictures(checkpoint: Checkpoint, dataset: ImageTextDataset) -> dict[str, Picture]:
    """The pictures of some images, by image id.

    An image reads its report; one without a report reads the disease-kind prompt of its labels,
    also where the run read no prompts. An image without either has no picture, and no image has one
    where the checkpoint has no decoder. Patches are not shown for the policy "oracle", which goes
    by lesions that no data folder holds.

    Args:
        checkpoint: Of any step; patches are masked as at the end of training, without the share
            that is left to chance.
        dataset: Few enough to be one batch.
    """
    model, config = checkpoint.model, deterministic_config(checkpoint.config)
    if model.image_decoder is None and model.text_decoder is None:
        return {}
    dataset = dataset.select([is_pair(sample) or is_unpaired(sample) for sample in dataset.samples])
    if not len(dataset):
        return {}
    grid = patch_grid(model.vision_model)
    batches = TrainingBatches(dataset, checkpoint.tokenizer, config, grid)
    everyone = np.arange(len(dataset))
    batch = batches.of_rows(everyone)
    mask = config.image_mask
    shows_patches = bool(config.loss.image) and mask.policy != "oracle"
    there = batch.to(model.logit_scale.device)
    out = model(there, mask if shows_patches else None, mask_noise=0.0)
    predicted = _predicted(batch, _guesses(model, out))
    images = dataset.pixels(everyone)
    patches = _patches(batch, out, images, grid)
    prompts = batches.prompts(everyone, np.zeros_like(everyone))
    pictures = {}
    for texts, said_ids in zip((batch.reports, batch.prompts), predicted, strict=True):
        for i, row in enumerate(texts.rows.tolist()):
            sample, prompt = dataset.samples[row], prompts[row]
            if sample.report is not None:
                text, entities = sample.report, sample.entities
            else:
                assert prompt is not None, "a row without a report has the text of its prompt"
                text, entities = prompt
            read = texts.is_valid[i]
            pictures[sample.image_id] = Picture(
                image=images[row].numpy(),
                **{name: value[row] for name, value in patches.items()},
                spans=spans_of(
                    checkpoint.tokenizer, text, entities,
                    texts.ids[i][read], texts.is_masked[i][read], said_ids[i][read],
                ),
                is_prompt=sample.report is None, shift_px=grid.shift_px,
            )  # fmt: skip
    return pictures


def spans_of(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    entities: Sequence[Entity],
    ids: Int[Tensor, " t"],
    is_masked: Bool[Tensor, " t"],
    predicted: Int[Tensor, " t"],
) -> tuple[Span, ...]:
    """Parts a text at its entities, its masked words and the place where it was cut.

    A word of several pieces is one span, masked where any piece is. It belongs whole to the last
    entity that it touches.

    Args:
        tokenizer: That made the tokens.
        text: What was read, in its own spelling.
        entities: Spans of it, disjoint and in order.
        ids: What was read of the text, with the special tokens around it.
        is_masked: Which of them were masked.
        predicted: `ids` with the model's guess in the place of each masked one.
    """
    encoding = tokenizer([text], truncation=False).encodings
    assert encoding is not None
    pieces = list(zip(encoding[0].ids, encoding[0].offsets, encoding[0].word_ids, strict=True))
    pieces = [piece for piece in pieces if piece[1][1] > piece[1][0]]
    frame = frame_of(tokenizer)
    n_before, n_read = len(frame.begin), len(ids) - frame.size
    words = ids[n_before : n_before + n_read].tolist()
    assert [piece[0] for piece in pieces[:n_read]] == words, "the tokens of the text"
    end_read = pieces[n_read - 1][1][1] if n_read < len(pieces) else len(text)
    masked: dict[tuple[int, int], tuple[str, bool]] = {}
    for _, group in groupby(enumerate(pieces[:n_read], n_before), lambda item: item[1][2]):
        word = list(group)
        at = [place for place, _ in word]
        if is_masked[at].any():
            edges = (word[0][1][1][0], word[-1][1][1][1])
            masked[edges] = (
                _spelled(tokenizer, predicted[at]),
                bool((predicted[at] == ids[at]).all()),
            )
    cuts = {0, end_read, len(text), *(edge for edges in masked for edge in edges)}
    cuts |= {
        edge
        for entity in entities
        for edge in (entity.start, entity.end)
        if not any(start < edge < end for start, end in masked)
    }
    spans = []
    for start, end in pairwise(sorted(cuts)):
        touched = [entity for entity in entities if start < entity.end and end > entity.start]
        word, is_right = masked.get((start, end), (None, False))
        entity = touched[-1] if touched else None
        spans.append(Span(text[start:end], entity, word, is_right, start < end_read))
    return tuple(spans)


def warmed(
    image: UInt8[np.ndarray, "h w"],
    relevance: Float[np.ndarray, "side side"],
    grid: Grid | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """An image under one colour: none on the less relevant half of it, HEAT_RATIO on the most.

    Args:
        image: Of any size.
        relevance: Of each patch; of equal ones none is coloured.
        grid: How the patches lie on the image; evenly if it is not given. Pixels that they do not
            cover stay as they are.
    """
    grid = grid or _filling(relevance)
    level = grid.over_image(heat_levels(grid.on_image(relevance, *image.shape)), *image.shape)
    share = HEAT_RATIO * np.nan_to_num(level)[..., None]
    return ((1 - share) * image[..., None] + share * np.array(HEAT)).round().astype(np.uint8)


def heat_levels(relevance: Float[np.ndarray, "side side"]) -> Float[np.ndarray, "side side"]:
    """How warm each patch is shown: 0 for the less relevant half of them, 1 for the most.

    NaN stays NaN, and counts in neither half.
    """
    low, high = float(np.nanmedian(relevance)), float(np.nanmax(relevance))
    return ((relevance - low) / max(high - low, 1e-12)).clip(min=0)


def heat_overlay(
    relevance: Float[np.ndarray, "side side"], grid: Grid, height: int, width: int
) -> Image.Image:
    """What `warmed` puts over an image, to be laid over it by somebody else.

    Args:
        relevance: Of each patch.
        grid: How the patches lie on the image.
        height: Of the image, px.
        width: Of the image, px.

    Returns:
        Of the image's size, in one colour; opaque where a patch is most relevant, clear on the less
        relevant half, and clear where the model did not look.
    """
    steps = np.rint(255 * heat_levels(grid.on_image(relevance, height, width)))
    steps = steps.astype(np.float32)
    level = np.nan_to_num(grid.over_image(steps, height, width)).astype(np.uint8)
    overlay = Image.fromarray(level)
    overlay.putpalette([*HEAT] * 256)
    overlay.info["transparency"] = bytes(range(256))
    return overlay


def hatched(
    image: UInt8[np.ndarray, "h w"], is_masked: Bool[np.ndarray, "side side"]
) -> UInt8[np.ndarray, "H W 3"]:
    """An image with hatching in the place of masked patches, enlarged by a whole number."""
    factor = -(-HATCHED_SIDE_PX // image.shape[0])
    large = image.repeat(factor, 0).repeat(factor, 1)
    rows, columns = np.indices(large.shape)
    is_line = (rows + columns) % HATCH_PERIOD_PX < HATCH_PX
    hatch = np.where(
        np.expand_dims(is_line, -1), np.array(HATCH, np.uint8), np.array(HATCH_GROUND, np.uint8)
    )
    grey = np.broadcast_to(large[..., None], (*large.shape, 3))
    is_over = _filling(is_masked).over_image(is_masked, *large.shape)
    return np.where(is_over[..., None], hatch, grey)


def explanation_figure(
    radiograph: UInt8[np.ndarray, "h w"],
    relevance: Float[np.ndarray, "side side"],
    grid: Grid,
    title: str,
    unit: str,
    lines: Sequence[str],
    outlines: Sequence[Bool[np.ndarray, "_ _"]] = (),
) -> Figure:
    """An image, the same image warmed by a map, and the map with its scale.

    Args:
        radiograph: 0..255, air dark.
        relevance: Of each patch.
        grid: How the patches lie on the image; what they do not cover has a colour of its own.
        title: The phrase.
        unit: Of the relevance, beside the scale.
        lines: What else is to be said, under the title and below the images.
        outlines: Annotations that readers of the image marked.
    """
    height, width = radiograph.shape
    panel = (3.4 * width / height, 3.4)  # inches
    figure = Figure(figsize=(3 * panel[0] + 1.3, panel[1] + 0.52 + 0.19 * len(lines)))
    figure.set_facecolor(CARD)
    with mpl.rc_context({"font.size": 8, "text.color": BRIGHT, "text.parse_math": False}):
        whole_in = figure.get_size_inches()
        for i, shown in enumerate((radiograph, warmed(radiograph, relevance, grid))):
            axes = _panel(figure, i, panel, whole_in, len(lines))
            # As many screen pixels as image pixels, or whole patches: no smoothing of a map.
            axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
            for is_inside in outlines:
                x, y = ((np.arange(n) + 0.5) for n in is_inside.shape[::-1])
                scale = (width / is_inside.shape[1], height / is_inside.shape[0])
                axes.contour(
                    x * scale[0] - 0.5, y * scale[1] - 0.5, is_inside.astype(float), [0.5],
                    colors=[OUTLINE], linewidths=1.1,
                )  # fmt: skip
        axes = _panel(figure, 2, panel, whole_in, len(lines))
        colours = mpl.colormaps["inferno"].with_extremes(bad=UNSEEN)
        shown_patches = grid.on_image(relevance, height, width)
        pixels = grid.over_image(shown_patches, height, width)
        image = axes.imshow(np.ma.masked_invalid(pixels), cmap=colours, interpolation="nearest")
        beside = axes.get_position()
        bar = figure.colorbar(
            image, cax=figure.add_axes((beside.x1 + 0.1 / whole_in[0], beside.y0,
                                        0.12 / whole_in[0], beside.height))
        )  # fmt: skip
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.tick_params(colors=QUIET, labelsize=7, length=2)
        bar.ax.axhline(float(np.nanmedian(shown_patches)), color=BRIGHT, linewidth=1.2)
        bar.set_label(f"{unit}; the line is the median", color=QUIET, fontsize=7)
        figure.text(
            0.12 / whole_in[0], 1 - 0.12 / whole_in[1], title, va="top", fontsize=13, color=BRIGHT
        )
        for i, line in enumerate(lines):
            y = (0.19 * (len(lines) - i) - 0.04) / whole_in[1]
            figure.text(0.12 / whole_in[0], y, line, va="top", fontsize=8, color=QUIET)
    return figure


def _panel(
    figure: Figure, number: int, size: tuple[float, float], whole: np.ndarray, n_lines: int
) -> Axes:
    """The axes of one image in a row of images, above some lines."""
    left, bottom = 0.12 + number * (size[0] + 0.08), 0.19 * n_lines + 0.1
    axes = figure.add_axes(
        (left / whole[0], bottom / whole[1], size[0] / whole[0], size[1] / whole[1])
    )
    axes.set_axis_off()
    return axes


def _filling(patches: np.ndarray) -> Grid:
    """The grid of patches that fill an image."""
    return Grid(len(patches), 1, len(patches))


def _guesses(model: MMCLIP, out: Outputs) -> Int[Tensor, " h"] | None:
    """The token that the model puts in each masked place; None without a text decoder."""
    features = out.masked_token_features
    return None if features is None else model.token_logits(features).argmax(-1).cpu()


def _predicted(
    batch: Batch, guess: Int[Tensor, " h"] | None
) -> tuple[Int[Tensor, "m t"], Int[Tensor, "p q"]]:
    """The tokens of reports and of prompts, with the model's guess in the place of masked ones."""
    reports, prompts = batch.reports.ids.clone(), batch.prompts.ids.clone()
    if guess is not None:
        n_reports = int(batch.reports.is_masked.sum())
        reports[batch.reports.is_masked] = guess[:n_reports]
        prompts[batch.prompts.is_masked] = guess[n_reports:]
    return reports, prompts


def _patches(
    batch: Batch, out: Outputs, images: UInt8[Tensor, "b h w"], grid: PatchGrid
) -> dict[str, Sequence[np.ndarray | None]]:
    """`relevance`, `is_masked` and `rebuilt` of each image, see `Picture`."""
    if out.patches is None or out.is_masked is None or out.relevance is None:
        return dict.fromkeys(("relevance", "is_masked", "rebuilt"), [None] * len(images))
    sides = (images.shape[1] // grid.patch_size, images.shape[2] // grid.patch_size)
    is_masked, relevance = (
        values.cpu().unflatten(1, sides).numpy() for values in (out.is_masked, out.relevance)
    )
    true = grid.cut(batch.image)
    model_space = unpatchify(rescale_patches(out.patches.cpu(), true), images.shape[2])[:, 0]
    grey = (255 * (GREY_STD * model_space + GREY_MEAN)).round().clamp(0, 255).byte().numpy()
    return {
        "relevance": [r if np.ptp(r) else None for r in relevance],
        "is_masked": list(is_masked),
        "rebuilt": [
            _put_back(
                np.where(
                    _filling(masked).over_image(masked, *image.shape),
                    predicted,
                    _moved(image, grid.shift_px),
                ),
                image,
                grid.shift_px,
            )
            for masked, predicted, image in zip(is_masked, grey, images.numpy(), strict=True)
        ],
    }


def _spelled(tokenizer: PreTrainedTokenizerFast, ids: Int[Tensor, " t"]) -> str:
    """Pieces as a word; pieces that make no one word stay apart."""
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist())).replace(" ##", "")
