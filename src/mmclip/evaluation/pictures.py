"""What a model makes of a film: where it responds, what is hidden, what comes back.

For people who look at a run. Films are read as they are and texts whole, the most responsive
patches are hidden, and the hidden words are those of the run's seed; so a checkpoint gives the same
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
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.batch import Batch
from mmclip.checkpoint import Checkpoint
from mmclip.config import GREY_MEAN, GREY_STD
from mmclip.data.batches import TrainingBatches, is_pair, is_unpaired, still
from mmclip.data.dataset import Rows
from mmclip.data.records import Entity
from mmclip.models.mmclip import Outputs
from mmclip.patches import Grid, patchify, rescale_patches, unpatchify
from mmclip.training.objective import Objective

HEAT, HEAT_RATIO = (255, 176, 0), 0.75
"""Colour of the most responsive patch, and how much of it covers the film there. [chosen: an amber
lighter than a film's darks and no grey, for any kind of colour vision]"""

HATCH, HATCH_GROUND = (150, 172, 196), (54, 68, 84)
HATCH_PX, HATCH_PERIOD_PX, HATCHED_SIDE_PX = 2, 8, 256
"""Lines over hidden patches, their width and distance, and the least side of a hatched film.
[chosen: blue-grey, which no film is; a film of 64 px has too few pixels for thin lines]"""


CARD, BRIGHT, QUIET, OUTLINE, UNSEEN = "#14191f", "#f3f5f7", "#aab4bf", "#57c7ff", "#4a2f45"
"""Of the picture of an explanation: a dark card, as films are dark; its words, what readers marked,
and what the model did not see. [chosen: the outline's blue and the heat's amber differ for any kind
of colour vision]"""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a text, in the text's own spelling.

    Args:
        text: The characters, white space included.
        entity: The entity that it lies in, if any.
        said: What the model put in place of a hidden word, in the spelling of its vocabulary; None
            where nothing was hidden. Pieces of the word that were not hidden are in it.
        is_right: Whether every hidden piece of the word was recovered.
        is_read: False behind the place where a long text was cut.
    """

    text: str
    entity: Entity | None = None
    said: str | None = None
    is_right: bool = False
    is_read: bool = True


@dataclass(frozen=True)
class Picture:
    """What the masked terms make of one film and its text.

    Args:
        film: 0..255, air dark.
        response: Of each patch to the text, by the score of the run; None where the choice of
            patches does not look at the text, or where no patch responds more than another.
        is_hidden: The patches that are hidden; None where the run hides none.
        rebuilt: The film, with predictions in the place of hidden patches. A patch is predicted in
            its own deviations, and shown with the mean and deviation of the true one. None as for
            `is_hidden`.
        spans: Of the text; their texts, joined, are the text.
        is_prompt: Whether the text was written from the film's labels, for want of a report.
    """

    film: UInt8[np.ndarray, "h w"]
    response: Float[np.ndarray, "rows columns"] | None
    is_hidden: Bool[np.ndarray, "rows columns"] | None
    rebuilt: UInt8[np.ndarray, "h w"] | None
    spans: tuple[Span, ...]
    is_prompt: bool

    def panels(self) -> dict[str, UInt8[np.ndarray, "..."]]:
        """Images to stand beside the film, grey [h w] or colour [h w 3], by what they show."""
        shown: dict[str, np.ndarray] = {}
        if self.response is not None:
            shown["response"] = warmed(self.film, self.response)
        if self.is_hidden is not None and self.rebuilt is not None:
            shown["hidden"] = hatched(self.film, self.is_hidden)
            shown["rebuilt"] = self.rebuilt
        return shown


@torch.inference_mode()
def make_pictures(checkpoint: Checkpoint, rows: Rows) -> dict[str, Picture]:
    """The pictures of some films, by film id.

    A film reads its report; one without a report reads the disease-kind prompt of its labels, also
    where the run read no prompts. A film without either has no picture, and no film has one where
    the checkpoint has no decoder. Patches are not shown for the policy "oracle", which goes by
    lesions that no data folder holds.

    Args:
        checkpoint: Of any step; patches are hidden as at the end of training, without the share
            that is left to chance.
        rows: Few enough to be one batch.
    """
    model, config = checkpoint.model, still(checkpoint.config)
    if model.image_decoder is None and model.text_decoder is None:
        return {}
    rows = rows.select([is_pair(film) or is_unpaired(film) for film in rows.films])
    if not len(rows):
        return {}
    patch_px = model.vision_model.config.patch_size
    batches = TrainingBatches(rows, checkpoint.tokenizer, config, patch_px)
    everyone = np.arange(len(rows))
    batch = batches.of_rows(everyone)
    plan = Objective(config, patch_px).plan(config.train.steps)
    if plan is not None:
        plan = None if plan.policy == "oracle" else plan._replace(randomness=0.0)
    out = model(batch.to(model.logit_scale.device), plan)
    said = _said(batch, out)
    films = rows.pixels(everyone)
    patches = _patches(batch, out, films, patch_px)
    prompts = batches.prompts(everyone, np.zeros_like(everyone))
    pictures = {}
    for texts, said_ids in zip((batch.reports, batch.prompts), said, strict=True):
        for i, row in enumerate(texts.rows.tolist()):
            film, prompt = rows.films[row], prompts[row]
            if film.report is not None:
                text, entities = film.report, film.entities
            else:
                assert prompt is not None, "a row without a report has the text of its prompt"
                text, entities = prompt
            read = texts.is_valid[i]
            pictures[film.film_id] = Picture(
                film=films[row].numpy(),
                **{name: value[row] for name, value in patches.items()},
                spans=spans_of(
                    checkpoint.tokenizer, text, entities,
                    texts.ids[i][read], texts.is_masked[i][read], said_ids[i][read],
                ),
                is_prompt=film.report is None,
            )  # fmt: skip
    return pictures


def spans_of(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    entities: Sequence[Entity],
    ids: Int[Tensor, " t"],
    is_masked: Bool[Tensor, " t"],
    said: Int[Tensor, " t"],
) -> tuple[Span, ...]:
    """Parts a text at its entities, its hidden words and the place where it was cut.

    A word of several pieces is one span, hidden where any piece is. It belongs whole to the last
    entity that it touches.

    Args:
        tokenizer: That made the tokens.
        text: What was read, in its own spelling.
        entities: Spans of it, disjoint and in order.
        ids: What was read of the text, [CLS] and [SEP] included.
        is_masked: Which of them were hidden.
        said: `ids` with the model's guess in the place of each hidden one.
    """
    encoding = tokenizer([text], truncation=False).encodings
    assert encoding is not None
    pieces = list(zip(encoding[0].ids, encoding[0].offsets, encoding[0].word_ids, strict=True))
    pieces = [piece for piece in pieces if piece[1][1] > piece[1][0]]
    n_read = len(ids) - 2  # without [CLS] and [SEP]
    assert [piece[0] for piece in pieces[:n_read]] == ids[1:-1].tolist(), "the tokens of the text"
    end_read = pieces[n_read - 1][1][1] if n_read < len(pieces) else len(text)
    hidden: dict[tuple[int, int], tuple[str, bool]] = {}
    for _, group in groupby(enumerate(pieces[:n_read], 1), lambda item: item[1][2]):
        word = list(group)
        at = [place for place, _ in word]
        if is_masked[at].any():
            edges = (word[0][1][1][0], word[-1][1][1][1])
            hidden[edges] = (_spelled(tokenizer, said[at]), bool((said[at] == ids[at]).all()))
    cuts = {0, end_read, len(text), *(edge for edges in hidden for edge in edges)}
    cuts |= {
        edge
        for entity in entities
        for edge in (entity.start, entity.end)
        if not any(start < edge < end for start, end in hidden)
    }
    spans = []
    for start, end in pairwise(sorted(cuts)):
        touched = [entity for entity in entities if start < entity.end and end > entity.start]
        word, is_right = hidden.get((start, end), (None, False))
        entity = touched[-1] if touched else None
        spans.append(Span(text[start:end], entity, word, is_right, start < end_read))
    return tuple(spans)


def warmed(
    film: UInt8[np.ndarray, "h w"],
    response: Float[np.ndarray, "side side"],
    grid: Grid | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """A film under one colour: none on the less responsive half of it, HEAT_RATIO on the most.

    Args:
        film: Of any size.
        response: Of each patch; of equal ones none is coloured.
        grid: How the patches lie on the film; evenly if it is not given. Pixels that they do not
            cover stay as they are.
    """
    low, high = float(np.median(response)), float(response.max())
    level = ((response - low) / max(high - low, 1e-12)).clip(min=0)
    level = np.nan_to_num((grid or _filling(level)).over_film(level, *film.shape))
    share = HEAT_RATIO * level[..., None]
    return ((1 - share) * film[..., None] + share * np.array(HEAT)).round().astype(np.uint8)


def hatched(
    film: UInt8[np.ndarray, "h w"], is_hidden: Bool[np.ndarray, "side side"]
) -> UInt8[np.ndarray, "H W 3"]:
    """A film with hatching in the place of hidden patches, enlarged by a whole number."""
    factor = -(-HATCHED_SIDE_PX // film.shape[0])
    large = film.repeat(factor, 0).repeat(factor, 1)
    rows, columns = np.indices(large.shape)
    is_line = (rows + columns) % HATCH_PERIOD_PX < HATCH_PX
    hatch = np.where(
        np.expand_dims(is_line, -1), np.array(HATCH, np.uint8), np.array(HATCH_GROUND, np.uint8)
    )
    grey = np.broadcast_to(large[..., None], (*large.shape, 3))
    is_over = _filling(is_hidden).over_film(is_hidden, *large.shape)
    return np.where(is_over[..., None], hatch, grey)


def explanation_figure(
    film: UInt8[np.ndarray, "h w"],
    response: Float[np.ndarray, "side side"],
    grid: Grid,
    title: str,
    unit: str,
    lines: Sequence[str],
    outlines: Sequence[Bool[np.ndarray, "_ _"]] = (),
) -> Figure:
    """A film, the same film warmed by a map, and the map with its scale.

    Args:
        film: 0..255, air dark.
        response: Of each patch.
        grid: How the patches lie on the film; what they do not cover has a colour of its own.
        title: The phrase.
        unit: Of the response, beside the scale.
        lines: What else is to be said, under the title and below the films.
        outlines: Places that readers of the film marked.
    """
    height, width = film.shape
    panel = (3.4 * width / height, 3.4)  # inches
    figure = Figure(figsize=(3 * panel[0] + 1.3, panel[1] + 0.52 + 0.19 * len(lines)))
    figure.set_facecolor(CARD)
    with mpl.rc_context({"font.size": 8, "text.color": BRIGHT, "text.parse_math": False}):
        whole_in = figure.get_size_inches()
        for i, shown in enumerate((film, warmed(film, response, grid))):
            axes = _panel(figure, i, panel, whole_in, len(lines))
            # As many screen pixels as film pixels, or whole patches: no smoothing of a map.
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
        pixels = grid.over_film(response, height, width)
        image = axes.imshow(np.ma.masked_invalid(pixels), cmap=colours, interpolation="nearest")
        beside = axes.get_position()
        bar = figure.colorbar(
            image, cax=figure.add_axes((beside.x1 + 0.1 / whole_in[0], beside.y0,
                                        0.12 / whole_in[0], beside.height))
        )  # fmt: skip
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.tick_params(colors=QUIET, labelsize=7, length=2)
        bar.ax.axhline(float(np.median(response)), color=BRIGHT, linewidth=1.2)
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
    """The axes of one film in a row of films, above some lines."""
    left, bottom = 0.12 + number * (size[0] + 0.08), 0.19 * n_lines + 0.1
    axes = figure.add_axes(
        (left / whole[0], bottom / whole[1], size[0] / whole[0], size[1] / whole[1])
    )
    axes.set_axis_off()
    return axes


def _filling(patches: np.ndarray) -> Grid:
    """The grid of patches that fill a film."""
    return Grid(len(patches), 1, len(patches))


def _said(batch: Batch, out: Outputs) -> tuple[Int[Tensor, "m t"], Int[Tensor, "p q"]]:
    """The tokens of reports and of prompts, with the model's guess in the place of hidden ones."""
    reports, prompts = batch.reports.ids.clone(), batch.prompts.ids.clone()
    if out.token_logits is not None:
        guess = out.token_logits.argmax(-1).cpu()
        n_reports = int(batch.reports.is_masked.sum())
        reports[batch.reports.is_masked] = guess[:n_reports]
        prompts[batch.prompts.is_masked] = guess[n_reports:]
    return reports, prompts


def _patches(
    batch: Batch, out: Outputs, films: UInt8[Tensor, "b h w"], patch_px: int
) -> dict[str, Sequence[np.ndarray | None]]:
    """`response`, `is_hidden` and `rebuilt` of each film, see `Picture`."""
    if out.patches is None or out.is_masked is None or out.response is None:
        return dict.fromkeys(("response", "is_hidden", "rebuilt"), [None] * len(films))
    grid = (films.shape[1] // patch_px, films.shape[2] // patch_px)
    is_hidden, response = (
        values.cpu().unflatten(1, grid).numpy() for values in (out.is_masked, out.response)
    )
    true = patchify(batch.image, patch_px)
    model_space = unpatchify(rescale_patches(out.patches.cpu(), true), films.shape[2])[:, 0]
    grey = (255 * (GREY_STD * model_space + GREY_MEAN)).round().clamp(0, 255).byte().numpy()
    return {
        "response": [r if np.ptp(r) else None for r in response],
        "is_hidden": list(is_hidden),
        "rebuilt": [
            np.where(_filling(hidden).over_film(hidden, *film.shape), predicted, film)
            for hidden, predicted, film in zip(is_hidden, grey, films.numpy(), strict=True)
        ],
    }


def _spelled(tokenizer: PreTrainedTokenizerFast, ids: Int[Tensor, " t"]) -> str:
    """Pieces as a word; pieces that make no one word stay apart."""
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist())).replace(" ##", "")
