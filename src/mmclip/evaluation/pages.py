"""What an evaluation leaves for people: one HTML page with everything in it, plots, a model card.

They show the numbers of results.json; curves and distributions come from the raw scores.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from PIL import Image

from mmclip import escape
from mmclip.checkpoint import Checkpoint
from mmclip.config_io import RESOURCES
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.evaluation.pictures import Picture, make_pictures
from mmclip.evaluation.plots import (
    ACCENT,
    QUIET,
    Entry,
    Panel,
    auroc_figure,
    curve_svg,
    curves_figure,
    pictures_figure,
    reliability_svg,
)
from mmclip.evaluation.protocols import Protocol
from mmclip.evaluation.results import (
    RESULTS_FILE,
    ResultsError,
    RunResults,
    write_results,
)
from mmclip.evaluation.scores import SCORES_FILE, Predictions
from mmclip.files import made_beside, write_text_atomic
from mmclip.prompts import Prompts

PAGE_FILE, CARD_FILE, PLOTS_FOLDER = "page.html", "MODEL_CARD.md", "plots"

RESULT_FILES = (RESULTS_FILE, SCORES_FILE, PAGE_FILE, CARD_FILE, PLOTS_FOLDER)
"""What `write_evaluation` leaves."""


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """An image to show on the page. Its labels and scores are those of its row.

    Args:
        row: Of the labels and scores that the page is given.
        name: Under which the image is shown.
        image: 0..255, air dark, at the size that it is shown.
        report: What its radiologist (or the phantom) wrote, if anything.
        picture: What the masked terms make of it, where there is one; its text is then shown in
            place of the report.
        why: It is shown, where it was chosen.
    """

    row: int
    name: str
    image: UInt8[np.ndarray, "h w"]
    report: str | None = None
    picture: Picture | None = None
    why: str | None = None


def write_evaluation(
    out: Path,
    results: RunResults,
    test: Predictions,
    *,
    val: Predictions | None = None,
    protocol: Protocol | None = None,
    gallery: Sequence[GalleryItem] = (),
    prompts: Mapping[str, Prompts] | None = None,
) -> RunResults:
    """Writes results.json, scores.npz, plots/, page.html and MODEL_CARD.md; returns the results.

    Args:
        out: The folder.
        results: See `results.run_results`.
        test: The raw scores behind the numbers.
        val: Those that chose the thresholds; they stand in scores.npz as val_image_id and so on.
        protocol: By whose rules.
        gallery: Images to show.
        prompts: What was asked about each finding, where anything was.
    """
    of_val = {} if val is None else {f"val_{name}": value for name, value in val.arrays().items()}
    with made_beside(out, RESULTS_FILE) as made:
        test.save(made / SCORES_FILE, **of_val)
        write_plots(made, results, gallery, test)
        write_page(made, results, gallery, test, prompts=prompts or {})
        write_card(made, results, protocol)
        write_results(made, results)
    return results


def gallery_of(
    checkpoint: Checkpoint | None,
    dataset: ImageTextDataset,
    test: Predictions,
    rows: Sequence[int],
) -> list[GalleryItem]:
    """Some images as the page shows them, with pictures where the checkpoint has decoders.

    Behind them stand the images that the model is most right and most wrong about.

    Args:
        checkpoint: Whose pictures are shown; None of a model of others, which has no decoders.
        dataset: The images that were scored.
        test: Their scores.
        rows: The numbers of those to be shown.
    """
    cases = {row: why for row, why in extreme_cases(test).items() if row not in rows}
    rows = [*rows, *cases]
    pixels = dataset.pixels(np.array(rows, np.int64)).numpy()
    samples = [dataset.samples[row] for row in rows]
    shown = dataset.select(np.isin(np.arange(len(dataset)), rows))
    pictures = {} if checkpoint is None else make_pictures(checkpoint, shown)
    return [
        GalleryItem(
            row,
            sample.image_id,
            image,
            sample.report,
            pictures.get(sample.image_id),
            cases.get(row),
        )
        for row, sample, image in zip(rows, samples, pixels, strict=True)
    ]


def share_below(score: float, others: Float[np.ndarray, " n"]) -> float:
    """The share of other scores below a score, ties half; its mean over positives is the AUROC."""
    return float((others < score).mean() + 0.5 * (others == score).mean())


def write_plots(
    folder: Path,
    results: RunResults,
    gallery: Sequence[GalleryItem],
    test: Predictions,
) -> list[Path]:
    """Writes plots/auroc.png (findings, controls), curves.png (ROC, distributions), pictures.png.

    The latter two are written where there is something to show.

    Args:
        folder: Of the run.
        results: The numbers that the plots show.
        gallery: Images to show.
        test: The raw scores behind the numbers.
    """
    place = folder / PLOTS_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    entries = [Entry("macro average", results.macro_auroc, results.macro_auroc_ci, ACCENT)]
    entries += [
        Entry(name, c.macro_auroc, c.macro_auroc_ci, QUIET) for name, c in results.controls.items()
    ]
    entries += [Entry(row.finding, row.auroc, row.auroc_ci) for row in results.findings]
    figures = {"auroc.png": auroc_figure(entries, _scale_start(results))}
    if results.findings:
        columns = _columns(results, test)
        figures["curves.png"] = curves_figure(
            [
                Panel(f"{row.finding}, AUROC {row.auroc:.3f}", *columns[row.finding])
                for row in results.findings
            ]
        )
    panels = [(item.image, item.picture.panels()) for item in gallery if item.picture]
    if any(shown for _, shown in panels):
        figures["pictures.png"] = pictures_figure(panels)
    for name, figure in figures.items():
        figure.savefig(place / name, dpi=160, facecolor="white")
    return [place / name for name in figures]


def write_page(
    folder: Path,
    results: RunResults,
    gallery: Sequence[GalleryItem],
    test: Predictions,
    *,
    prompts: Mapping[str, Prompts],
) -> Path:
    """Writes page.html: one file with all pictures in it, for a browser without a network.

    Args:
        folder: Of the run.
        results: The numbers that the page shows.
        gallery: Images to show.
        test: The raw scores behind the numbers.
        prompts: What was asked about each finding, where anything was.
    """
    columns = _columns(results, test)
    low = _scale_start(results)
    environment = _environment(autoescape=True)
    environment.filters["at"] = lambda value: f"{100 * _position(value, low):.2f}%"
    environment.filters["percent"] = lambda value: f"{100 * value:.0f}"
    are_cosines = results.provenance.zeroshot_rule == "similarity"
    reliability = None if are_cosines else reliability_svg(test.labels, test.scores)
    # Runs that are scored on the folder that they trained on name it once.
    trained_on = {("training data", results.provenance.data_hash[:12])}
    page = environment.from_string(_template("results.html")).render(
        r=results,
        is_zero_shot=all(row.seen in ("report", "none") for row in results.findings),
        is_of_training_data=lambda name, value: (name, value) in trained_on,
        is_one_data=bool(trained_on & set(results.facts.items())),
        scale_ticks=_ticks(low),
        curves={name: Markup(curve_svg(Panel(name, *pair))) for name, pair in columns.items()},
        reliability=None if reliability is None else Markup(reliability),
        thresholds=_thresholds(results),
        prompts={name: prompts[name] for name in columns if name in prompts},
        gallery=[_card(item, columns, prompts) for item in gallery],
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def write_card(folder: Path, results: RunResults, protocol: Protocol | None = None) -> Path:
    """Writes MODEL_CARD.md: the same numbers in Markdown, to go with weights.

    It holds no id of an image or a patient, and no path of the machine that made it.
    """
    environment = _environment(autoescape=False)
    environment.finalize = lambda value: escape.markdown(value) if type(value) is str else value
    environment.filters["portable"] = lambda value: (
        escape.without_paths(value) if isinstance(value, str) else value
    )
    environment.filters["command"] = lambda command: Markup(escape.portable_command(command))
    environment.filters["interval"] = lambda ci: "–" if ci is None else f"{ci[0]:.3f}, {ci[1]:.3f}"
    description = "" if protocol is None else " ".join(protocol.description.split())
    card = environment.from_string(_template("model_card.md")).render(
        r=results, description=description, thresholds=_thresholds(results)
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / CARD_FILE, card.rstrip() + "\n")
    return folder / CARD_FILE


def _environment(autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["sentence"] = lambda text: text.rstrip(".") + "."
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.3f}"
    return environment


def _template(name: str) -> str:
    return (RESOURCES / "templates" / name).read_text("utf-8")


CASES = 3
"""Best and worst images on the page, of either kind. [chosen: a line of the page]"""


def extreme_cases(test: Predictions, most: int = CASES) -> dict[int, str]:
    """The images that a model is most right and most wrong about, and what to say of each.

    Of every image and finding that it has, the place among the images without the finding; the
    highest places, then the lowest, each image once.

    Returns:
        By number of the row, best first, worst last.
    """
    places = [
        (share_below(test.scores[row, k], test.scores[test.labels[:, k] == 0, k]), int(row), name)
        for k, name in enumerate(test.names())
        if (test.labels[:, k] == 0).any()
        for row in np.flatnonzero(test.labels[:, k] == 1)
    ]
    places.sort(key=lambda place: (-place[0], place[1]))
    best: dict[int, str] = {}
    for place, row, name in places:
        if len(best) < most:
            best.setdefault(row, f"among the best: {name} above {100 * place:.0f} of 100 without")
    worst: dict[int, str] = {}
    for place, row, name in reversed(places):
        if len(worst) < most and row not in best:
            worst.setdefault(row, f"among the worst: {name} above {100 * place:.0f} of 100 without")
    return best | dict(reversed(worst.items()))


def _columns(results: RunResults, test: Predictions) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels and scores of each finding that has results."""
    index = {name: i for i, name in enumerate(test.names())}
    missing = [row.finding for row in results.findings if row.finding not in index]
    if missing:
        raise ResultsError(f"results: findings: {missing[0]!r} is no column of the scores given")
    return {
        row.finding: (test.labels[:, index[row.finding]], test.scores[:, index[row.finding]])
        for row in results.findings
    }


def _thresholds(results: RunResults) -> dict[str, list[str]]:
    """Findings by how their threshold came about, in words."""
    names = {"f1": "F1", "mcc": "MCC", "youden": "sensitivity plus specificity"}
    thresholds: dict[str, list[str]] = {}
    for row in results.findings:
        if row.threshold is not None:
            rule, chosen_on = row.threshold.rule, row.threshold.chosen_on
            origin = (
                chosen_on if rule == "equal_prompts" else f"best by {names[rule]} on {chosen_on}"
            )
            thresholds.setdefault(origin, []).append(row.finding)
    return thresholds


def _card(
    item: GalleryItem,
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]],
    prompts: Mapping[str, Prompts],
) -> dict:
    """An image with each finding's place among the images without it, highest first."""
    rows = [
        {
            "finding": finding,
            "score": float(score[item.row]),
            "place": share_below(score[item.row], score[label == 0]),
            "prompt": prompts[finding].positives[0] if finding in prompts else None,
            "label": None if np.isnan(label[item.row]) else int(label[item.row]),
        }
        for finding, (label, score) in columns.items()
    ]
    rows.sort(key=lambda row: (-row["place"], row["finding"]))
    first = [row for i, row in enumerate(rows) if i < 5 or row["label"] == 1]
    picture = item.picture
    spans = picture.spans if picture else ()
    return {
        "name": item.name,
        "why": item.why,
        "image": _data_uri(item.image),
        "thumbnail": _data_uri(_thumbnail(item.image)),
        "panels": {n: _data_uri(p) for n, p in picture.panels().items()} if picture else {},
        "spans": spans,
        "is_prompt": picture is not None and picture.is_prompt,
        "n_masked": sum(span.predicted is not None for span in spans),
        "n_right": sum(span.is_right for span in spans),
        "report": item.report,
        "first": first,
        "rest": [row for row in rows if row not in first],
        "present": [row["finding"] for row in rows if row["label"] == 1],
        "has_labels": any(row["label"] is not None for row in rows),
    }


def _thumbnail(image: UInt8[np.ndarray, "h w"], side_px: int = 236) -> UInt8[np.ndarray, "h w"]:
    """A copy of an image, no larger than the strip shows it on a dense screen."""
    small = Image.fromarray(image)
    small.thumbnail((side_px, side_px))
    return np.asarray(small)


def _data_uri(image: UInt8[np.ndarray, "..."]) -> str:
    """An image, grey [h w] or colour [h w 3], as a PNG that stands in the page itself."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _ticks(low: float) -> list[float]:
    """Of an AUROC axis from `low` to 1: tenths, or every second one where they would touch."""
    tenths = range(10, round(low * 10) - 1, -1 if low > 0.35 else -2)
    return sorted(tenth / 10 for tenth in tenths)


def _scale_start(results: RunResults) -> float:
    """Where AUROC axes start: 0.4, or the tenth below the lowest value or interval shown."""
    pairs = [(results.macro_auroc, results.macro_auroc_ci)]
    pairs += [(row.auroc, row.auroc_ci) for row in results.findings]
    pairs += [(c.macro_auroc, c.macro_auroc_ci) for c in results.controls.values()]
    pairs += [(c.auroc, c.auroc_ci) for c in results.combinations]
    pairs += [(g.macro_auroc, g.macro_auroc_ci) for g in results.subgroups]
    pairs += [(w.macro_auroc, None) for w in results.other_prompt_sets]
    lowest = min([0.4, *(ci[0] for _, ci in pairs if ci), *(v for v, _ in pairs if v is not None)])
    return float(np.floor(round(lowest * 10, 6)) / 10)


def _position(value: float, low: float) -> float:
    return (value - low) / (1 - low)
