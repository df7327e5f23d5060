"""What a run leaves: results.json keeps its contract, the page needs nothing but itself."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmclip.cli.shared import print_results
from mmclip.data.sample import Entity
from mmclip.evaluation.compute_metrics import metrics_by_finding
from mmclip.evaluation.metrics import auroc
from mmclip.evaluation.pages import (
    GalleryItem,
    share_below,
    write_card,
    write_page,
    write_plots,
)
from mmclip.evaluation.pictures import Picture, Span
from mmclip.evaluation.plots import Panel, curves_figure, roc_points
from mmclip.evaluation.results import (
    About,
    ChosenThreshold,
    Combination,
    Control,
    Provenance,
    ResultsError,
    RunResults,
    checked,
    run_results,
    write_results,
)
from mmclip.evaluation.scores import Predictions
from mmclip.evaluation.thresholds import choose_thresholds
from mmclip.prompts import load_prompts

FINDINGS = ["edema", "mass", "tuberculosis"]
REPORT = "Heart size is normal.\n<script>alert(1)</script> & no effusion."


@pytest.fixture(scope="module")
def table() -> Predictions:
    rng = np.random.default_rng(0)
    labels = (rng.random((80, 3)) < 0.3).astype(float)
    labels[:, 2] = 0.0
    labels[5, 0] = np.nan
    scores = labels + rng.normal(size=labels.shape)
    return Predictions(
        image_id=np.array([f"f{i}" for i in range(80)]),
        patient_id=np.array([f"p{i}" for i in range(80)]),
        sex=np.full(80, ""),
        age_years=np.full(80, np.nan),
        view=np.full(80, "PA"),
        findings=np.array(FINDINGS),
        labels=labels,
        scores=np.nan_to_num(scores),
    )


ABOUT = About(
    title="Made <images>",
    kind="demo",
    summary="A model that was made up.",
    facts={"training pairs": 2400},
)
MADE = Provenance(
    command="mmclip demo --seed 3",
    seed=3,
    config_hash="c" * 64,
    data_hash="d" * 64,
    prompt_set="default",
    prompt_hash="e" * 64,
    commit=None,
    versions={"mmclip": "0.1", "torch": "2.13"},
    device="cpu",
    wall_s=61.0,
    finished_at="2026-01-02T03:04:05+00:00",
)


@pytest.fixture
def results(table: Predictions) -> RunResults:
    evaluation = metrics_by_finding(
        table.labels,
        table.scores,
        list(range(80)),
        FINDINGS,
        thresholds=choose_thresholds(table.labels, table.scores, FINDINGS),
        n_resamples=50,
    )
    return run_results(
        evaluation,
        ABOUT,
        MADE,
        controls={
            "untrained": Control(macro_auroc=0.31, macro_auroc_ci=(0.25, 0.4), note="random"),
            "too small": Control(macro_auroc=None, note="not enough images"),
        },
        combinations=[
            Combination(
                finding="mass",
                side="left",
                size="small",
                n_positive=0,
                n_negative=60,
                auroc=None,
                auroc_ci=None,
            )
        ],
    )


def changed(results: RunResults, change: Mapping[str, Any]) -> RunResults:
    """The results with other values of some fields, checked again."""
    return checked({**dict(results), **change})


@pytest.fixture
def page(tmp_path, results, table):
    image = np.tile(np.arange(64, dtype=np.uint8), (48, 1))
    prompts = {name: load_prompts("default").texts(name) for name in FINDINGS}
    gallery = [GalleryItem(0, "image-a", image, REPORT), GalleryItem(5, "image-b", image)]
    return write_page(tmp_path, results, gallery, table, prompts=prompts).read_text("utf-8")


def test_results_json_is_sorted_complete_and_rounded_to_six_digits(tmp_path, results):
    text = write_results(tmp_path / "run", results).read_text("utf-8")
    read = json.loads(text)
    assert list(read) == sorted(read)
    assert read["macro_auroc"] == float(f"{results.macro_auroc:.6g}")
    assert [row["finding"] for row in read["findings"]] == ["edema", "mass"]
    assert read["undefined"][0]["reason"] == "no positive image"
    assert not list(tmp_path.rglob("*.tmp"))
    assert write_results(tmp_path / "again", results).read_text("utf-8") == text


def test_a_cut_is_not_rounded_as_it_would_call_other_images(tmp_path, results):
    threshold = ChosenThreshold(value=0.123456789012, rule="f1", chosen_on="val")
    cut = results.with_findings({"edema": {"threshold": threshold}})
    read = json.loads(write_results(tmp_path, cut).read_text("utf-8"))
    assert read["findings"][0]["threshold"]["value"] == 0.123456789012


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"macro_auroc": float("nan")}, "macro_auroc"),
        ({"macro_auroc": 1.2}, "macro_auroc: .*less than or equal to 1"),
        ({"colour": "red"}, "colour: .*not permitted"),
        ({"kind": "other"}, "kind: .*'demo', 'zeroshot'"),
        ({"facts": {"loss": float("inf")}}, "facts.loss"),
    ],
)
def test_results_that_break_the_contract_are_refused_by_field(tmp_path, results, change, message):
    with pytest.raises(ResultsError, match=f"results: {message}"):
        write_results(tmp_path, changed(results, change))
    assert not list(tmp_path.iterdir())


def test_a_missing_field_is_named(tmp_path, results):
    plain = results.model_dump()
    del plain["provenance"]["data_hash"]
    with pytest.raises(ResultsError, match=r"provenance\.data_hash: Field required"):
        checked(plain)


def test_the_page_needs_no_other_file_and_no_network(page):
    links = re.findall(r'(?:src|href|action)\s*=\s*["\']([^"\']*)', page)
    links += re.findall(r"url\(\s*[\"']?([^)\"']*)", page)
    assert links
    for link in links:
        assert link.startswith(("data:image/png;base64,", "#")), link[:60]
    assert not re.search(r"<(script|link|iframe)|@import", page)


def test_the_ids_of_the_page_are_unique_and_all_references_resolve(page):
    ids = re.findall(r'\sid="([^"]+)"', page)
    references = re.findall(r'(?:url\(|href=")#([^")]+)', page)
    assert len(set(ids)) == len(ids)
    assert references and set(references) <= set(ids)


def test_the_page_shows_text_as_text(page):
    assert "<script>" not in page and "Made <images>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; no effusion." in page
    assert "Made &lt;images&gt;" in page


def picture(with_patches: bool = True, is_prompt: bool = False) -> Picture:
    """An image of 16 x 16 px in four patches, one of them masked, and a text with marks in it."""
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    is_masked = np.array([[True, False], [False, False]])
    rebuilt = image.copy()
    rebuilt[:8, :8] = 77
    denied = Entity(3, 11, "finding", "<effusion>", "negated")
    spans = (
        Span("No "),
        Span("<b>effusion", denied, "edema & <i>", False),
        Span(" in the "),
        Span("Left", Entity(0, 0, "anatomy", "left"), "left", True),
        Span(" lung"),
        Span(" <u>unread", None, None, False, False),
    )
    if not with_patches:
        return Picture(image, None, None, None, spans, is_prompt)
    return Picture(image, np.eye(2), is_masked, rebuilt, spans, is_prompt)


def page_with(tmp_path, results, table, *pictures) -> str:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    prompts = {name: load_prompts("default").texts(name) for name in FINDINGS}
    gallery = [GalleryItem(i, f"image-{i}", image, REPORT, p) for i, p in enumerate(pictures)]
    return write_page(tmp_path, results, gallery, table, prompts=prompts).read_text("utf-8")


def body_of(page: str) -> str:
    return page[page.index("<body>") :]


def test_panels_stand_beside_the_image_and_are_the_images_given(tmp_path, results, table):
    page = body_of(page_with(tmp_path, results, table, picture()))
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert [alt for _, alt in found] == [
        "Image image-0", "Image image-0, relevance", "Image image-0, masked",
        "Image image-0, rebuilt",
    ]  # fmt: skip
    image, relevance, masked, rebuilt = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, _ in found
    )
    np.testing.assert_array_equal(rebuilt[8:], image[8:])
    assert (rebuilt[:8, :8] == 77).all()
    assert relevance.shape == (16, 16, 3) and masked.shape[0] == masked.shape[1] >= 256


def test_the_page_begins_with_its_images_and_contents(page):
    body = body_of(page)
    strip = body[body.index('class="strip"') : body.index('class="headline"')]
    assert re.findall(r'href="#(image-\d)" title="([^"]+)"', strip) == [
        ("image-1", "image-a"), ("image-2", "image-b"),
    ]  # fmt: skip
    contents = re.search(r'<nav class="contents".*?</nav>', body, flags=re.DOTALL)[0]
    linked = re.findall(r'href="#([\w-]+)"', contents)
    assert linked == [*re.findall(r'<h2 id="([\w-]+)"', body), "reproduce"]
    assert {"findings", "combinations", "images"} <= set(linked) and "subgroups" not in linked


def test_the_text_of_a_picture_is_shown_as_text_with_its_hidden_words(tmp_path, results, table):
    page = body_of(page_with(tmp_path, results, table, picture()))
    quote = re.search(r"<blockquote>(.*?)</blockquote>", page, flags=re.DOTALL)[1]
    assert "1 of 2 masked words recovered" in page
    assert not re.search(r"<(?!/?(span|s)\b)", quote)  # no element but the page's own
    wrong = 'title="masked: “&lt;b&gt;effusion”; recovered: “edema &amp; &lt;i&gt;”; '
    assert wrong + 'finding: &lt;effusion&gt;, negated"' in quote
    guess = '<span class="guess">edema &amp; &lt;i&gt;</span>'
    assert f"&lt;b&gt;effusion {guess}" in quote and "<s>" not in quote
    assert 'class="e denied word wrong"' in quote
    assert re.search(r'class="e anatomy word right"[^>]*>Left<', quote)
    without = re.sub(r"<span class=\"unread-mark\">.*?</span> ", "", quote)
    without = without.replace(f" {guess}", "")
    said = html.unescape(re.sub(r"<[^>]+>", "", without))
    assert said.replace("  <u>", " <u>") == "No <b>effusion in the Left lung <u>unread"
    assert quote.index("cut here") < quote.index("unread<")


def test_legend_and_notes_come_once_and_only_with_pictures(tmp_path, results, table, page):
    both = body_of(page_with(tmp_path, results, table, picture(), picture(False, is_prompt=True)))
    assert both.count('class="legend"') == 1 and both.count("mean and the deviation") == 1
    assert both.count("made of its labels") == 1 and both.count("Prompt made of the labels") == 1
    words = body_of(page_with(tmp_path, results, table, picture(False)))
    assert 'class="legend"' in words and "Rebuilt" not in words and "made of its" not in words
    plain = body_of(page)
    assert "legend" not in plain and "Rebuilt" not in plain and 'class="panels' not in plain


def test_pictures_are_drawn_as_a_plot_where_there_are_patches(tmp_path, results, table):
    image = np.zeros((16, 16), np.uint8)
    items = [GalleryItem(i, str(i), image, None, p) for i, p in enumerate([None, picture()])]
    paths = write_plots(tmp_path, results, items, table)
    assert [p.name for p in paths] == ["auroc.png", "curves.png", "pictures.png"]
    drawn = Image.open(paths[-1])
    assert drawn.width > 3 * drawn.height  # one line of four
    items = [GalleryItem(0, "0", image, None, picture(with_patches=False))]
    assert len(write_plots(tmp_path, results, items, table)) == 2


def test_axes_and_titles_of_the_curves_say_what_they_show(table):
    figure = curves_figure([Panel("edema, AUROC 0.9", table.labels[:, 0], table.scores[:, 0])])
    assert [axes.get_ylabel() for axes in figure.axes] == ["true positive rate", "share of images"]


def test_the_page_says_how_the_numbers_came_about_and_what_they_are_not(page, results):
    for text in (
        f"{results.macro_auroc:.3f}",
        "mmclip demo --seed 3",
        "d" * 64,
        "c" * 64,
        "2.13",
        "2026-01-02 03:04 UTC",
        "1 min 01 s",
        "Training pairs",
        "not for clinical use",
        "drawn by a program",
        "no positive image",
        "Untrained",
        "image-b",
        "There is pulmonary edema.",
    ):
        assert text in page, text


def test_the_page_says_how_each_cut_came_about(tmp_path, results, table):
    tie = ChosenThreshold(value=0.5, rule="equal_prompts", chosen_on="no image")
    results = results.with_findings({"mass": {"threshold": tie}})
    prompts = {name: load_prompts("default").texts(name) for name in FINDINGS}
    page = write_page(tmp_path, results, [], table, prompts=prompts).read_text("utf-8")
    assert "best by F1 on val (edema)" in page
    assert "no image (mass)." in page


def test_the_page_of_real_images_warns_of_shortcuts_instead(tmp_path, results, table):
    prompts = {name: load_prompts("default").texts(name) for name in FINDINGS}
    results = changed(results, {"kind": "zeroshot"})
    path = write_page(tmp_path, results, [], table, prompts=prompts)
    page = path.read_text("utf-8")
    assert "without\n  reading lungs" in page and "drawn by a program" not in page


def test_the_page_calls_zero_shot_only_what_training_did_not_name(tmp_path, results, table):
    def eyebrow(seen: str | None) -> str:
        found = changed(results, {"kind": "zeroshot"}).with_findings(
            {name: {"seen": seen} for name in FINDINGS}
        )
        text = write_page(tmp_path, found, [], table, prompts={}).read_text("utf-8")
        (said,) = re.findall(r'class="eyebrow">(.*?)<', text)
        return said

    assert eyebrow("report") == "MMCLIP · zero-shot"
    assert eyebrow("prompt") == eyebrow("label") == "MMCLIP · scored by prompts"
    assert eyebrow(None) == "MMCLIP · scored by prompts"  # what trained it is not known


def test_the_page_names_the_data_of_training_where_they_are_not_those_scored(
    tmp_path, results, table
):
    def facts(trained_on: str) -> list[str]:
        found = changed(results, {"facts": {"training data": trained_on}})
        text = write_page(tmp_path, found, [], table, prompts={}).read_text("utf-8")
        return re.findall(r"<dt>([^<]*[Dd]ata[^<]*)</dt>", text.partition("</section>")[0])

    assert facts("a" * 12) == ["Training data", "Data"]
    assert facts("d" * 12) == ["Data, trained on and scored"]


@pytest.mark.parametrize("summary", ["One sentence", "One sentence."])
def test_the_summary_ends_with_one_full_stop(tmp_path, results, table, summary: str):
    found = changed(results, {"summary": summary, "facts": {"training images": 1092}})
    page = write_page(tmp_path, found, [], table, prompts={}).read_text("utf-8")
    card = write_card(tmp_path, found).read_text("utf-8")
    assert '<p class="lead">One sentence.</p>' in page
    assert "\nOne sentence.\n" in card and "| training images | 1,092 |" in card


def test_plots_follow_the_theme_of_the_page(page):
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(svgs) == 2
    for svg in svgs:
        assert "var(--accent)" in svg and "var(--present)" in svg
        assert "DejaVu" not in svg and "<metadata" not in svg and "#0f766e" not in svg


def test_a_page_without_any_defined_finding_is_still_a_page(tmp_path, results, table):
    labels = np.full_like(table.labels, np.nan)
    nothing = metrics_by_finding(labels, table.scores, list(range(80)), FINDINGS, n_resamples=5)
    table = replace(table, labels=labels)
    results = changed(results, dict(nothing))
    page = write_page(tmp_path, results, [], table, prompts={}).read_text("utf-8")
    assert "Undefined: no finding has 10 images with it" in page
    assert "no positive and no negative image" in page
    assert [p.name for p in write_plots(tmp_path, results, [], table)] == ["auroc.png"]


def test_plots_are_written_as_png(tmp_path, results, table):
    paths = write_plots(tmp_path, results, [], table)
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [
        "plots/auroc.png",
        "plots/curves.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_scores_that_lack_a_finding_of_the_results_are_refused(tmp_path, results, table):
    other = replace(table, findings=np.array(["edema", "hernia", "x"]))
    with pytest.raises(ResultsError, match="'mass' is no column"):
        write_plots(tmp_path, results, [], other)


def test_roc_points_run_from_corner_to_corner_and_are_thinned():
    rng = np.random.default_rng(0)
    labels = (rng.random(3000) < 0.5).astype(float)
    fpr, tpr = roc_points(labels, labels + rng.normal(size=3000), most=50)
    assert len(fpr) <= 50
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all()
    assert roc_points(np.ones(3), np.arange(3.0)) is None


def test_the_mean_place_of_positive_images_is_the_auroc(table):
    labels, scores = table.labels[:, 1], np.round(table.scores[:, 1])
    places = [share_below(s, scores[labels == 0]) for s in scores[labels == 1]]
    assert np.mean(places) == pytest.approx(auroc(labels, scores), abs=1e-12)


HOSTILE = ["<img src=x onerror=alert(1)>", "edema [/x]", "[red]no[/red]"]


def test_findings_of_hostile_names_are_shown_as_they_are(
    tmp_path, table: Predictions, capfd: pytest.CaptureFixture[str]
):
    named = replace(table, findings=np.array(HOSTILE))
    evaluation = metrics_by_finding(
        named.labels, named.scores, list(range(80)), HOSTILE, thresholds={}, n_resamples=20
    )
    made = MADE.model_copy(update={"command": "mmclip zeroshot --run /home/jo/a --finding '<b>'"})
    about = ABOUT.model_copy(
        update={"summary": "Of /home/jo/runs/a.", "leak_check": "made of /home/jo/x"}
    )
    found = run_results(evaluation, about, made)
    card = write_card(tmp_path, found).read_text("utf-8")
    shown, command = card.replace("\n    mmclip", "\x00").split("\x00")
    assert "<img" not in shown and "&lt;img src=x onerror=alert(1)&gt;" in shown
    assert "edema \\[/x\\]" in shown and "/home" not in card
    assert "Made &lt;images&gt;" in shown and "--run a --finding '<b>'" in command
    page = write_page(tmp_path, found, [], named, prompts={}).read_text("utf-8")
    assert "<img src=x" not in page and "&lt;img src=x" in page
    print_results(found, tmp_path)
    err = capfd.readouterr().err
    assert "edema [/x]" in err and "[red]no[/red]" in err
