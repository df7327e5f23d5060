"""Results side by side: paired differences, published numbers, and scores of any model evaluated.

Runs of one recipe under several seeds are compared as one in `over_seeds`.

Two results stand in one table only when they are of the same images, findings and rules.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from mmclip.config_io import Frozen, parse, read_toml
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.sample import Split
from mmclip.evaluation.bootstrap import bootstrap_difference, macro_of_resamples
from mmclip.evaluation.compute_metrics import compute_metrics, shortcut_baseline
from mmclip.evaluation.intervals import Interval, percentile_interval
from mmclip.evaluation.pages import write_evaluation
from mmclip.evaluation.protocols import OWN_PROTOCOL, Protocol, load_protocol
from mmclip.evaluation.results import (
    About,
    RunResults,
    ScoredImages,
    provenance,
    read_results,
    read_scores,
    run_results,
)
from mmclip.evaluation.scores import (
    Predictions,
    ScoresError,
    make_predictions,
    read_scores_csv,
    scores_of_images,
)
from mmclip.evaluation.selection import LabelledImages, Selection, images_hash, split_of

Percent = Field(ge=0, le=100)


class Published(Frozen):
    """A number that others published, with what keeps it from being compared with ours.

    Attributes:
        protocol: The nearest of ours.
        fraction: Of the training data, for fine-tuning.
        differs: What is not as in our protocol.
    """

    protocol: str
    setting: Literal["zero-shot", "fine-tuned"]
    method: str
    auroc: float = Percent
    f1: float | None = Field(default=None, ge=0, le=100)
    accuracy: float | None = Field(default=None, ge=0, le=100)
    fraction: float | None = Field(default=None, gt=0, le=1)
    source: str
    differs: str


class PublishedSet(Frozen):
    """published/published.toml."""

    id: str
    version: int
    rows: tuple[Published, ...]


def published(protocol: str) -> list[Published]:
    """The published numbers whose nearest protocol is this one."""
    values = read_toml("list of published numbers", "published", "published")
    found = parse(PublishedSet, values, "published/published.toml")
    return [row for row in found.rows if row.protocol == protocol]


class Difference(NamedTuple):
    """A run's AUROC less the first one's, on the same images, with its 95 % interval.

    None of a finding that does not count in the macro average: resamples of so few images would
    give an interval that is far too sure.
    """

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Compared:
    """One run in a comparison; differences are to the first run, which has none."""

    name: str
    results: RunResults
    macro: Difference | None
    findings: dict[str, Difference]
    differs: tuple[str, ...] = ()  # from the first, and does not keep it from comparing


class Run(NamedTuple):
    """The results in a folder, and the scores that they are of."""

    name: str  # that tells it from the others
    folder: Path
    results: RunResults
    scores: Predictions  # columns in the order of the first run's


def read_alike(folders: Sequence[Path]) -> list[Run]:
    """Reads results that stand in one table.

    Args:
        folders: Each with results.json and scores.npz.

    Raises:
        ScoresError: When one is not of the same data, split, protocol, images and findings as the
            first.
    """
    runs: list[Run] = []
    for folder in folders:
        results = read_results(folder)
        scores = read_scores(folder, results)
        first = runs[0] if runs else None
        if first is not None:
            scores = _in_image_order(scores.in_order(first.scores.names()), first.scores)
        runs.append(Run(_name(folder, folders), folder, results, scores))
        if first is not None:
            _check_alike(first, runs[-1])
    return runs


def compare(folders: Sequence[Path], *, n_resamples: int = 1000, seed: int = 0) -> list[Compared]:
    """Runs side by side, with paired differences to the first.

    Both runs of a pair are scored in each resample on the same resampled patients, so what is hard
    for both cancels out.

    Args:
        folders: See `read_alike`.
        n_resamples: Bootstrap resamples of patients.
        seed: Of the resamples.

    Raises:
        ScoresError: See `read_alike`.
    """
    first, *others = read_alike(folders)
    base = first.results
    out = [Compared(first.name, base, None, {})]
    names = first.scores.names()
    counted = [names.index(name) for name in base.macro_findings]
    n = len(set(first.scores.patients()))
    for run in others:
        drawn = bootstrap_difference(
            run.scores.labels,
            run.scores.scores,
            first.scores.scores,
            run.scores.patients(),
            n_resamples=n_resamples,
            seed=seed,
        ).auroc
        ours, theirs = run.results.aurocs(), base.aurocs()
        by_finding = {
            name: Difference(
                ours[name] - theirs[name],
                percentile_interval(drawn[:, k], n_patients=n) if k in counted else None,
            )
            for k, name in enumerate(names)
            if name in ours
        }
        macro = None
        if run.results.macro_auroc is not None and base.macro_auroc is not None:
            macro = Difference(
                run.results.macro_auroc - base.macro_auroc,
                percentile_interval(macro_of_resamples(drawn, counted), n_patients=n),
            )
        out.append(Compared(run.name, run.results, macro, by_finding, differs(base, run.results)))
    return out


def _in_image_order(scores: Predictions, first: Predictions) -> Predictions:
    """The rows in the order of those of other scores; as they are where the images are others."""
    ids = scores.image_id.tolist()
    if ids == first.image_id.tolist() or sorted(ids) != sorted(first.image_id.tolist()):
        return scores
    at = {image_id: row for row, image_id in enumerate(ids)}
    return scores.where(np.array([at[image_id] for image_id in first.image_id.tolist()]))


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """The folder's own name where that tells it from the others, else its path."""
    names = [other.resolve().name for other in folders]
    name = folder.resolve().name
    return name if names.count(name) == 1 else str(folder)


def _benchmark(results: RunResults) -> str | None:
    """The hash of the protocol; None for findings named on the command line, or none at all.

    Those are rules of no benchmark: labels, images and findings, which are compared, say them.
    """
    rules = results.protocol
    return None if rules is None or rules.id == OWN_PROTOCOL else rules.hash


def differs(base: RunResults, results: RunResults) -> tuple[str, ...]:
    """What of two results that compare is not the same, for people."""

    def rules(of: RunResults) -> str:
        return "no protocol" if of.protocol is None else f"protocol {of.protocol.title!r}"

    def data(of: RunResults) -> str:
        return f"data folder {of.provenance.data_hash[:12]}, split {of.provenance.split}"

    def rule(of: RunResults) -> str:
        return f"zero-shot rule {of.provenance.zeroshot_rule or 'not known'}"

    facts = (
        (base.kind, results.kind),
        (data(base), data(results)),
        (rules(base), rules(results)),
        (rule(base), rule(results)),
        (f"prompts {base.provenance.prompt_set}", f"prompts {results.provenance.prompt_set}"),
        (f"macro from {base.min_count} images", f"macro from {results.min_count} images"),
    )
    return tuple(f"{other}, the first: {one}" for one, other in facts if one != other)


def _split_names(results: RunResults) -> list[str]:
    """The names of the splits alone: their hashes are of training images, too."""
    return sorted({said.split(" ")[0] for said in results.provenance.split.split(", ")})


def _rules(results: RunResults) -> str:
    rules = results.protocol
    return "no protocol" if rules is None else f"{rules.id} version {rules.version}"


def _content(first: RunResults, other: RunResults) -> tuple[str, list[str], str]:
    """What two results say of their images' content: what it is called, of both, the next step."""
    of_both = first.provenance, other.provenance
    known = [made.images_hash for made in of_both if made.images_hash is not None]
    if len(known) == len(of_both):
        return (
            "content of images",
            known,
            "the files of the same image ids differ; build both data folders of one download",
        )
    return (
        "data hash",
        [made.data_hash for made in of_both],
        "at least one is of an older version and does not say which images it is of; score again",
    )


def _check_alike(first: Run, other: Run) -> None:
    one, two = first.results, other.results
    by_protocol = f"{_rules(one)} and {_rules(two)}"
    content, hashes, mend = _content(one, two)
    facts = (
        ("images", [sorted(run.scores.image_id.tolist()) for run in (first, other)], "",
         "score both on the same split of the same images"),
        (content, hashes, f"{hashes[0][:16]} and {hashes[1][:16]}", mend),
        ("split", [_split_names(one), _split_names(two)],
         f"{one.provenance.split} and {two.provenance.split}", "set both folders to one split"),
        ("protocol", [_benchmark(one), _benchmark(two)], by_protocol,
         "score both by one version of one protocol, as labels or rules of another may differ"),
        ("findings", [first.scores.names(), other.scores.names()], "", "score the same findings"),
        ("macro findings", [sorted(one.macro_findings), sorted(two.macro_findings)], "",
         "score both by one protocol"),
    )  # fmt: skip
    for what, (ours, theirs), shown, mend in facts:
        if ours != theirs:
            said = f" ({shown})" if shown else ""
            raise ScoresError(
                f"{first.folder} and {other.folder} are not of the same {what}{said}; numbers of "
                f"different {what} do not compare: {mend}"
            )
    if not np.array_equal(first.scores.labels, other.scores.labels, equal_nan=True):
        raise ScoresError(
            f"{first.folder} and {other.folder} hold other labels of the same images; score again"
        )


def _predictions_of(
    path: Path,
    table: Mapping[str, Sequence[float]],
    images: LabelledImages,
) -> Predictions:
    """The scores that a table has of some images.

    Raises:
        ScoresError: When the table lacks an image.
    """
    ids = [sample.image_id for sample in images.dataset.samples]
    return make_predictions(images, scores_of_images(path, table, ids))


def _val_of(
    path: Path,
    table: Mapping[str, Sequence[float]],
    dataset: ImageTextDataset,
    rules: Protocol,
    note: str,
) -> tuple[Predictions | None, str]:
    """The scores of the validation images and a note, or None and the reason why there are none."""
    try:
        images = Selection("val", protocol=rules).select(dataset)
        return _predictions_of(path, table, images), note
    except (ScoresError, ManifestError) as error:
        return None, f"no thresholds, as validation images are not scored: {error}"


def compute_metrics_of_csv(
    path: Path,
    folders: Sequence[Path],
    out: Path,
    *,
    protocol: str,
    split: Split = "test",
    n_resamples: int = 1000,
    seed: int = 0,
    command: str = "",
) -> RunResults:
    """Scores of any model, evaluated by the rules of a protocol as one of ours would be.

    Args:
        path: CSV with image_id and a column for each finding, for every image of the split.
            Thresholds are chosen where it holds every validation image as well.
        folders: Data folders of the protocol: images, labels and patients are theirs.
        out: Gets what every evaluation leaves.
        protocol: Name or path.
        split: Which images.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.
        command: For results.json.

    Raises:
        ScoresError: When the file lacks an image or a finding, or a score is no number.
        ValueError: When a folder is not the protocol's.
    """
    began = time.monotonic()
    rules = load_protocol(protocol)
    named = split_of(folders, rules)
    dataset = open_dataset(folders)
    table = read_scores_csv(path, rules.findings)
    selected = Selection(split, protocol=rules).select(dataset)
    test = _predictions_of(path, table, selected)
    val, note = None, "thresholds of F1 and the like by validation images"
    if split != "val":
        val, note = _val_of(path, table, dataset, rules, note)
    evaluation = compute_metrics(
        test, val, rule=rules.threshold, min_count=rules.min_count,
        n_resamples=n_resamples, seed=seed,
    )  # fmt: skip
    about = About(
        title=f"{path.stem}: {rules.title}",
        kind="scores",
        summary=f"{len(test)} images, split {split}, with the scores of {path.name}; {note}",
        leak_check="not made: what a model of others was trained on is not known here",
    )
    made = provenance(
        command,
        seed,
        ScoredImages(dataset.data_hash, named, images_hash(selected.dataset.samples)),
        device=torch.device("cpu"),
        wall_s=time.monotonic() - began,
    )
    shortcut = {"shortcut baseline": shortcut_baseline(selected.dataset, test, rules.min_count)}
    results = run_results(evaluation, about, made, protocol=rules, controls=shortcut)
    return write_evaluation(out, results, test, val=val, protocol=rules)
