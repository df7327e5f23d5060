"""`mmclip retrieve`: the nearest patients in one's own data, and how good retrieval is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmclip.cli.plain import EVALUATION, IN_OUT, SELECTION, PlainCommand
from mmclip.cli.shared import (
    CpuOption,
    FolderOption,
    ModelOption,
    OverwriteOption,
    ResamplesOption,
    RootOption,
    SeedOption,
    SourceOption,
    TrainedOnOption,
    check_inputs,
    check_results,
    command_line,
    device_of,
    model_request,
    split_name,
)
from mmclip.cli.tables import print_table
from mmclip.files import locked
from mmclip.progress import console

if TYPE_CHECKING:
    from mmclip.retrieval.ranking import RetrievalRequest, RetrievalResults
    from mmclip.retrieval.retrieve import Search, SearchRequest

app = typer.Typer()

SEARCH = "Search"
"""Title of a panel of the help."""

REPORT_CHARS = 120
"""Of a report in the table. [chosen: two sentences; the lines on stdout hold it whole]"""

ImageOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SEARCH,
        help="An image id of the data, or a PNG, JPEG or DICOM.",
        metavar="NAME",
    ),
]
PhraseOption = Annotated[
    str | None,
    typer.Option(rich_help_panel=SEARCH, help="Phrase as in a report, in quotes.", metavar="TEXT"),
]
EvaluateOption = Annotated[
    bool,
    typer.Option(
        "--evaluate",
        rich_help_panel=EVALUATION,
        help="Measure image-report retrieval.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="Folder for found.png; with --evaluate (needed) for retrieval.json.",
        metavar="PATH",
    ),
]
TopOption = Annotated[
    int,
    typer.Option(rich_help_panel=SEARCH, help="Number of patients to show.", min=1, metavar="N"),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SELECTION,
        help="train, val or test. [search: all; --evaluate: test]",
        metavar="NAME",
    ),
]


@app.command(cls=PlainCommand)
def retrieve(
    model: ModelOption,
    data: FolderOption,
    root: RootOption = None,
    image: ImageOption = None,
    phrase: PhraseOption = None,
    evaluate: EvaluateOption = False,
    out: OutOption = None,
    top: TopOption = 10,
    split: SplitOption = None,
    source: SourceOption = None,
    trained_on: TrainedOnOption = None,
    n_resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    cpu: CpuOption = False,
) -> None:
    """Finds the nearest patients for an image or a phrase; `--evaluate` scores retrieval.

    Example: `mmclip retrieve --model runs/a --data data/images --image new.dcm --out found`

    Example: `mmclip retrieve --model runs/a --data data/images --evaluate --out runs/a/retrieval`

    A search prints a table on stderr, and on stdout a line of JSON for each patient.
    """
    from mmclip.retrieval.ranking import RetrievalRequest
    from mmclip.retrieval.retrieve import SearchRequest

    if (image is not None) + (phrase is not None) + evaluate != 1:
        raise ValueError("give one of --image, --phrase and --evaluate")
    searched = SearchRequest(
        model=model_request(model, None, trained_on),
        folders=tuple(data),
        image=image,
        phrase=phrase,
        top=top,
        split=None if split is None else split_name(split),
        sources=tuple(source or ()),
        roots=tuple(root) if root else None,
        device=device_of(cpu),
    )
    if not evaluate:
        _search(searched, out)
        return
    if out is None:
        raise ValueError("--evaluate writes results: name their folder by --out")
    check_inputs(model, data)
    request = RetrievalRequest(
        model=searched.model,
        folders=searched.folders,
        out=out,
        command=command_line(),
        split=searched.split or "test",
        sources=searched.sources,
        n_resamples=n_resamples,
        seed=seed,
        roots=searched.roots,
        device=searched.device,
    )
    _evaluate(request, overwrite)


def _search(request: "SearchRequest", out: Path | None) -> None:
    """Prints what is found; its images go to the folder, where there is one."""
    from mmclip.retrieval.retrieve import search, write_sheet

    found = search(request)
    print_found(found, request.top)
    if out is not None:
        with locked(out):
            console.print(f"images: {write_sheet(out, found)}", markup=False, soft_wrap=True)


def _evaluate(request: "RetrievalRequest", overwrite: bool) -> None:
    """Writes results into the folder of the request, and prints them and their path."""
    from mmclip.data.folder import check_place
    from mmclip.retrieval.ranking import RETRIEVAL_FILE, evaluate_retrieval
    from mmclip.retrieval.retrieve import SHEET_FILE

    check_place(request.out, (RETRIEVAL_FILE, SHEET_FILE))
    if not overwrite:
        check_results(request.out, RETRIEVAL_FILE)
    with locked(request.out):
        print_retrieval(evaluate_retrieval(request))
    print(request.out / RETRIEVAL_FILE)


def print_found(search: "Search", top: int) -> None:
    """The table for people on stderr, a line of JSON a patient on stdout."""
    rows: list[tuple[str, ...]] = []
    for record in search.records():
        report = " ".join((record["report"] or "–").split())
        if len(report) > REPORT_CHARS:
            report = f"{report[:REPORT_CHARS]}…"
        counts = (str(record["rank"]), f"{record['similarity']:.3f}", f"{record['n_images']:,}")
        rows.append((record["image_id"], *counts, record["view"], report))
        print(json.dumps(record, ensure_ascii=False))
    kind = "image with image" if search.query.pixels is not None else "phrase with image"
    said = (
        f"the nearest patients for {search.query.said}, each by the nearest of their images "
        f"(similarity: cosine, {kind})"
    )
    console.print(said, markup=False, soft_wrap=True)
    print_table(("image", "rank", "cosine", "images", "view", "report"), rows, has_text=True)
    if len(search.found) < top:
        console.print(f"there are no more than {len(search.found)} patients to find", style="dim")


def print_retrieval(results: "RetrievalResults") -> None:
    """The table for people on stderr."""
    rows: list[tuple[str, ...]] = []
    styles: list[str] = []
    for name, direction in (
        ("image → report", results.image_to_report),
        ("report → image", results.report_to_image),
    ):
        for at in direction.at:
            spread = "–" if at.hit_ci is None else f"{at.hit_ci[0]:.3f}–{at.hit_ci[1]:.3f}"
            rows.append((f"{name}, R@{at.k}", f"{at.hit:.3f}", spread, f"{at.hit_chance:.3f}"))
            styles.append("")
        ci = direction.median_rank_ci
        spread = "–" if ci is None else f"{ci[0]:.1f}–{ci[1]:.1f}"
        ranks = (f"{direction.median_rank:.1f}", spread, f"{direction.median_rank_chance:.1f}")
        rows.append((f"{name}, median rank", *ranks))
        styles.append("bold")
    print_table(("", "value", "95 %", "chance"), rows, styles)
    console.print(
        f"{results.n_images:,} images with reports of {results.n_patients:,} patients; "
        f"{results.n_reports:,} reports differ, and equal ones are right answers; intervals over "
        f"resampled patients of the queries",
        style="dim",
    )
