"""What a run leaves for people: results.json, one HTML page with everything in it, and plots.

`RunResults` is the contract of results.json. The page and the plots show the same numbers; curves
and score distributions come from the raw scores, which live in scores.npz beside it.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from mmclip.data.manifest import write_text_atomic
from mmclip.metrics import CutRule
from mmclip.pictures import Picture
from mmclip.plots import (
    ACCENT,
    QUIET,
    Entry,
    Panel,
    auroc_figure,
    curve_svg,
    curves_figure,
    pictures_figure,
)
from mmclip.prompts import Prompts

RESULTS_FILE, PAGE_FILE, PLOTS_FOLDER = "results.json", "page.html", "plots"

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Correlation = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
ShareInterval = tuple[Share, Share]
CorrelationInterval = tuple[Correlation, Correlation]


class ResultsError(ValueError):
    """Results break the contract; the message names the field and the rule."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cut(_Part):
    """Where F1, MCC and the like were taken: score >= value is present."""

    value: FiniteFloat
    rule: CutRule
    chosen_on: str  # the split, or why none was needed


class _Counted(_Part):
    finding: str
    n_positive: Count
    n_negative: Count
    n_unknown: Count


class FindingScores(_Counted):
    """One finding that has both classes. Intervals are 95 % over resampled patients."""

    in_macro: bool
    auroc: Share
    auroc_ci: ShareInterval | None
    auprc: Share
    auprc_ci: ShareInterval | None
    f1: Share | None
    f1_ci: ShareInterval | None
    mcc: Correlation | None
    mcc_ci: CorrelationInterval | None
    accuracy: Share | None
    sensitivity: Share | None
    specificity: Share | None
    threshold: Cut | None


class Undefined(_Counted):
    """One finding that lacks a class: it has no score, and is listed with the reason."""

    reason: str


class Control(_Part):
    """A number to hold the model's against: chance, a shortcut, a model that learnt nothing."""

    macro_auroc: Share | None
    macro_auroc_ci: ShareInterval | None = None
    auroc: dict[str, Share | None] = {}  # by finding
    note: str


class Combination(_Part):
    """A finding at a side and size that no training film showed, against films without it."""

    finding: str
    side: str
    size: str
    n_positive: Count
    n_negative: Count
    auroc: Share | None
    auroc_ci: ShareInterval | None


class Provenance(_Part):
    """What it takes to get the numbers again."""

    command: str
    seed: int
    config_hash: str
    data_hash: str
    prompt_set: str
    prompt_hash: str
    commit: str | None
    versions: dict[str, str]
    device: str
    wall_s: Annotated[FiniteFloat, Field(ge=0)]
    finished_at: str  # UTC, ISO 8601


class RunResults(_Part):
    """results.json; the fields `macro_*` to `undefined` are what `score_findings` gives."""

    title: str
    kind: Literal["demo", "zeroshot"]
    summary: str  # one sentence: which model, scored on what
    macro_auroc: Share | None
    macro_auroc_ci: ShareInterval | None
    macro_auprc: Share | None
    macro_auprc_ci: ShareInterval | None
    macro_f1: Share | None
    macro_f1_ci: ShareInterval | None
    macro_mcc: Correlation | None
    macro_mcc_ci: CorrelationInterval | None
    macro_findings: list[str]
    min_count: Count
    n_films: Count
    n_patients: Count
    bootstrap_draws: Count
    findings: list[FindingScores]
    undefined: list[Undefined]
    controls: dict[str, Control] = {}
    combinations: list[Combination] = []
    provenance: Provenance
    facts: dict[str, str | int | FiniteFloat] = {}  # of the run: "training pairs", "epochs"


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """A film to show on the page. Its labels and scores are those of its row.

    Args:
        row: Of the labels and scores that the page is given.
        name: Under which the film is shown.
        film: 0..255, air dark, at the size that it is shown.
        report: What its radiologist (or the phantom) wrote, if anything.
        picture: What the masked terms make of it, where there is one; its text is then shown in
            place of the report.
    """

    row: int
    name: str
    film: UInt8[np.ndarray, "h w"]
    report: str | None = None
    picture: Picture | None = None


def checked(results: RunResults | Mapping[str, Any]) -> RunResults:
    """The results as `RunResults`.

    Raises:
        ResultsError: When a field is missing, unknown, not finite or out of its range.
    """
    if isinstance(results, RunResults):
        return results
    try:
        return RunResults.model_validate(dict(results))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResultsError(
            f"results: {where}: {first['msg']} (got {str(first['input'])[:60]!r})"
        ) from error


def write_results(folder: Path, results: RunResults | Mapping[str, Any]) -> Path:
    """Writes results.json: keys sorted, six significant digits, no NaN, never half a file.

    Raises:
        ResultsError: When the results break the contract.
    """
    plain = _rounded(checked(results).model_dump(mode="json"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS_FILE
    text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")
    return path


def share_below(score: float, others: Float[np.ndarray, " n"]) -> float:
    """The share of other scores below a score, ties half; its mean over positives is the AUROC."""
    return float((others < score).mean() + 0.5 * (others == score).mean())


def write_plots(
    folder: Path,
    results: RunResults | Mapping[str, Any],
    gallery: Sequence[GalleryItem],
    *,
    findings: Sequence[str],
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
) -> list[Path]:
    """Writes plots/auroc.png (findings, controls), curves.png (ROC, distributions), pictures.png.

    The latter two are written where there is something to show.

    Args:
        folder: Of the run.
        results: The numbers that the plots show.
        gallery: Films to show.
        findings: Names of the columns of labels and scores.
        labels: 1, 0 or NaN.
        scores: Same shape.
    """
    results = checked(results)
    place = folder / PLOTS_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    entries = [Entry("macro average", results.macro_auroc, results.macro_auroc_ci, ACCENT)]
    entries += [
        Entry(name, c.macro_auroc, c.macro_auroc_ci, QUIET) for name, c in results.controls.items()
    ]
    entries += [Entry(row.finding, row.auroc, row.auroc_ci) for row in results.findings]
    figures = {"auroc.png": auroc_figure(entries, _scale_start(results))}
    if results.findings:
        columns = _columns(results, findings, labels, scores)
        figures["curves.png"] = curves_figure(
            [
                Panel(f"{row.finding}, AUROC {row.auroc:.3f}", *columns[row.finding])
                for row in results.findings
            ]
        )
    panels = [(item.film, item.picture.panels()) for item in gallery if item.picture]
    if any(shown for _, shown in panels):
        figures["pictures.png"] = pictures_figure(panels)
    for name, figure in figures.items():
        figure.savefig(place / name, dpi=160, facecolor="white")
    return [place / name for name in figures]


def write_page(
    folder: Path,
    results: RunResults | Mapping[str, Any],
    gallery: Sequence[GalleryItem],
    *,
    findings: Sequence[str],
    labels: Float[np.ndarray, "n k"],
    scores: Float[np.ndarray, "n k"],
    prompts: Mapping[str, Prompts],
) -> Path:
    """Writes page.html: one file with all pictures in it, for a browser without a network.

    Args:
        folder: Of the run.
        results: The numbers that the page shows.
        gallery: Films to show.
        findings: Names of the columns of labels and scores.
        labels: 1, 0 or NaN.
        scores: Same shape.
        prompts: What was asked about each finding.
    """
    results = checked(results)
    columns = _columns(results, findings, labels, scores)
    low = _scale_start(results)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["at"] = lambda value: f"{100 * _position(value, low):.2f}%"
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.filters["percent"] = lambda value: f"{100 * value:.0f}"
    template = resources.files("mmclip") / "templates" / "results.html"
    page = environment.from_string(template.read_text("utf-8")).render(
        r=results,
        scale_ticks=[round(t / 10, 1) for t in range(round(low * 10), 11)],
        curves={name: Markup(curve_svg(Panel(name, *pair))) for name, pair in columns.items()},
        cuts=_cuts(results),
        prompts={row.finding: prompts[row.finding] for row in results.findings},
        gallery=[_card(item, columns, prompts) for item in gallery],
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def _rounded(value: Any) -> Any:
    """Six significant digits, but cuts whole: a rounded cut calls the film at the cut otherwise."""
    if isinstance(value, dict):
        is_cut = value.keys() == Cut.model_fields.keys()
        return value if is_cut else {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _columns(
    results: RunResults, findings: Sequence[str], labels: np.ndarray, scores: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels and scores of each finding that has results."""
    index = {name: i for i, name in enumerate(findings)}
    missing = [row.finding for row in results.findings if row.finding not in index]
    if missing:
        raise ResultsError(f"results: findings: {missing[0]!r} is no column of the scores given")
    return {
        row.finding: (labels[:, index[row.finding]], scores[:, index[row.finding]])
        for row in results.findings
    }


def _cuts(results: RunResults) -> dict[str, list[str]]:
    """Findings by how their cut came about, in words."""
    names = {"f1": "F1", "mcc": "MCC", "youden": "sensitivity plus specificity"}
    cuts: dict[str, list[str]] = {}
    for row in results.findings:
        if row.threshold is not None:
            rule, chosen_on = row.threshold.rule, row.threshold.chosen_on
            origin = chosen_on if rule == "even" else f"best by {names[rule]} on {chosen_on}"
            cuts.setdefault(origin, []).append(row.finding)
    return cuts


def _card(
    item: GalleryItem,
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]],
    prompts: Mapping[str, Prompts],
) -> dict:
    """A film with each finding's place among the films without it, highest first."""
    rows = [
        {
            "finding": finding,
            "score": float(score[item.row]),
            "place": share_below(score[item.row], score[label == 0]),
            "prompt": prompts[finding].positives[0],
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
        "image": _data_uri(item.film),
        "panels": {n: _data_uri(p) for n, p in picture.panels().items()} if picture else {},
        "spans": spans,
        "is_prompt": picture is not None and picture.is_prompt,
        "n_hidden": sum(span.said is not None for span in spans),
        "n_right": sum(span.is_right for span in spans),
        "report": item.report,
        "first": first,
        "rest": [row for row in rows if row not in first],
        "present": [row["finding"] for row in rows if row["label"] == 1],
        "has_labels": any(row["label"] is not None for row in rows),
    }


def _data_uri(image: UInt8[np.ndarray, "..."]) -> str:
    """An image, grey [h w] or colour [h w 3], as a PNG that stands in the page itself."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _scale_start(results: RunResults) -> float:
    """Where AUROC axes start: 0.4, or the tenth below the lowest value or interval shown."""
    pairs = [(results.macro_auroc, results.macro_auroc_ci)]
    pairs += [(row.auroc, row.auroc_ci) for row in results.findings]
    pairs += [(c.macro_auroc, c.macro_auroc_ci) for c in results.controls.values()]
    pairs += [(c.auroc, c.auroc_ci) for c in results.combinations]
    lowest = min([0.4, *(ci[0] for _, ci in pairs if ci), *(v for v, _ in pairs if v is not None)])
    return float(np.floor(round(lowest * 10, 6)) / 10)


def _position(value: float, low: float) -> float:
    return (value - low) / (1 - low)
