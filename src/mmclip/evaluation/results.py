"""results.json: the contract of what every evaluation leaves, and what stands in it."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from mmclip.checkpoint import code_version
from mmclip.evaluation.protocols import BUILT, Protocol
from mmclip.evaluation.scores import SCORES_FILE, Predictions, ScoresError, load_scores
from mmclip.evaluation.thresholds import ThresholdOrigin
from mmclip.files import file_sha256, other_format, sealed, unsealed, write_text_atomic
from mmclip.models.dual_encoder import UNKNOWN_WEIGHTS, Seen, Weights, ZeroshotRule
from mmclip.prompts import PromptSet

RESULTS_FILE = "results.json"

FORMAT = 3
"""Of results.json: 2 counts images and resamples."""

Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Correlation = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
RatioInterval = tuple[Ratio, Ratio]
CorrelationInterval = tuple[Correlation, Correlation]


class ResultsError(ValueError):
    """Results break the contract; the message names the field and the rule."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChosenThreshold(_Model):
    """Where F1, MCC and the like were taken: score >= value is present."""

    value: FiniteFloat
    rule: ThresholdOrigin
    chosen_on: str  # the split, or why none was needed


class AtTestThreshold(_Model):
    """At thresholds chosen on the scored images themselves, as some papers report; never used
    here."""

    f1: Ratio
    accuracy: Ratio
    mcc: Correlation


class _Counted(_Model):
    finding: str
    n_positive: Count
    n_negative: Count
    n_unknown: Count


class FindingScores(_Counted):
    """One finding that has both classes. Intervals are 95 % over resampled patients."""

    in_macro: bool
    auroc: Ratio
    auroc_ci: RatioInterval | None
    auprc: Ratio
    auprc_ci: RatioInterval | None
    f1: Ratio | None
    f1_ci: RatioInterval | None
    mcc: Correlation | None
    mcc_ci: CorrelationInterval | None
    accuracy: Ratio | None
    sensitivity: Ratio | None
    specificity: Ratio | None
    threshold: ChosenThreshold | None
    calibration_error: Ratio | None = None  # where scores are probabilities
    test_tuned: AtTestThreshold | None = None
    auroc_by_positive: Ratio | None = None  # the positive prompt alone
    auroc_by_negative: Ratio | None = None  # absence, by the negative prompt alone
    seen: Seen | None = None  # None where the run does not say


class Undefined(_Counted):
    """One finding that lacks a class: it has no score, and is listed with the reason."""

    reason: str


class Control(_Model):
    """A number to hold the model's against: chance, a shortcut, a model that learnt nothing."""

    macro_auroc: Ratio | None
    macro_auroc_ci: RatioInterval | None = None
    auroc: dict[str, Ratio | None] = {}  # by finding
    note: str


class Combination(_Model):
    """A finding at a side and size that no training image showed, against images without it."""

    finding: str
    side: str
    size: str
    n_positive: Count
    n_negative: Count
    auroc: Ratio | None
    auroc_ci: RatioInterval | None


GroupKind = Literal["sex", "age", "view"]


class Subgroup(_Model):
    """Some images, held against the other groups of their kind on the same findings."""

    kind: GroupKind
    group: str
    n_images: Count
    n_patients: Count
    findings: list[str]
    macro_auroc: Ratio
    macro_auroc_ci: RatioInterval | None


class OtherPromptSet(_Model):
    """What another prompt set gives for the same images."""

    prompt_set: str
    prompt_hash: str
    macro_auroc: Ratio | None
    auroc: dict[str, Ratio]


class ByProtocol(_Model):
    """The rules by which images were scored; results of equal hashes may be compared."""

    id: str
    version: int
    title: str
    hash: str


class Provenance(_Model):
    """What it takes to get the numbers again."""

    command: str
    seed: int  # of the bootstrap; of fine-tuning, of its training
    config_hash: str | None = None  # None for scores of a model that is not ours
    train_seed: int | None = None  # of the weights, or of fine-tuning them; None where not known
    recipe_hash: str | None = None  # of what they follow from but that seed: config_io.recipe_hash
    data_hash: str
    images_hash: str | None = None  # of the images that were scored, see `selection.images_hash`
    split: str = "built"  # name of the split, and where it has one, its hash
    prompt_set: str | None = None
    prompt_hash: str | None = None
    zeroshot_rule: ZeroshotRule | None = None  # None where no prompts were asked
    commit: str | None
    versions: dict[str, str]
    device: str
    wall_s: Annotated[FiniteFloat, Field(ge=0)]
    finished_at: str  # UTC, ISO 8601


E = TypeVar("E", bound="Evaluation")


class Evaluation(_Model):
    """What raw scores are worth, each figure with its interval: what `compute_metrics` gives.

    `macro_*` are over `macro_findings`, None when no finding counts. `undefined` are the findings
    that lack a class.
    """

    macro_auroc: Ratio | None
    macro_auroc_ci: RatioInterval | None
    macro_auprc: Ratio | None
    macro_auprc_ci: RatioInterval | None
    macro_f1: Ratio | None
    macro_f1_ci: RatioInterval | None
    macro_mcc: Correlation | None
    macro_mcc_ci: CorrelationInterval | None
    macro_findings: list[str]
    min_count: Count
    n_images: Count
    n_patients: Count
    n_resamples: Count
    findings: list[FindingScores]
    undefined: list[Undefined]
    subgroups: list[Subgroup] = []

    def aurocs(self) -> dict[str, float]:
        """The AUROC of each finding that has one."""
        return {row.finding: row.auroc for row in self.findings}

    def with_findings(self: E, further: Mapping[str, Mapping[str, Any]]) -> E:
        """The same with further fields of some findings.

        Args:
            further: By finding, its fields of `FindingScores`.
        """
        rows = [
            FindingScores.model_validate({**dict(row), **further.get(row.finding, {})})
            for row in self.findings
        ]
        return self.model_copy(update={"findings": rows})


class About(_Model):
    """What is said of results in words."""

    title: str
    kind: Literal["demo", "zeroshot", "finetune", "scores"]
    summary: str  # one sentence: which model, scored on what
    leak_check: str = "not made"
    facts: dict[str, str | int | FiniteFloat] = {}  # of the run: "training pairs", "epochs"


class RunResults(Evaluation, About):
    """results.json."""

    format: Literal[3] = FORMAT
    protocol: ByProtocol | None = None
    other_prompt_sets: list[OtherPromptSet] = []
    controls: dict[str, Control] = {}
    combinations: list[Combination] = []
    provenance: Provenance
    files_sha256: dict[str, str] = {}  # of files beside results.json; `write_results` fills it


def run_results(
    evaluation: Evaluation,
    about: About,
    made: Provenance,
    *,
    protocol: Protocol | None = None,
    other_prompt_sets: Sequence[OtherPromptSet] = (),
    controls: Mapping[str, Control] | None = None,
    combinations: Sequence[Combination] = (),
) -> RunResults:
    """The parts of results.json as one.

    Args:
        evaluation: The figures.
        about: What is said of them.
        made: How they came about.
        protocol: By whose rules.
        other_prompt_sets: What other words give for the same images.
        controls: Numbers to hold the model's against, by name.
        combinations: What no training image showed.

    Raises:
        ResultsError: When a field is out of its range.
    """
    rules = None
    if protocol is not None:
        rules = ByProtocol(
            id=protocol.id, version=protocol.version, title=protocol.title, hash=protocol.hash
        )
    return checked(
        {
            **dict(evaluation),
            **dict(about),
            "protocol": rules,
            "other_prompt_sets": list(other_prompt_sets),
            "controls": dict(controls or {}),
            "combinations": list(combinations),
            "provenance": made,
        }
    )


def checked(results: Mapping[str, Any]) -> RunResults:
    """Plain values as `RunResults`.

    Raises:
        ResultsError: When a field is missing, unknown, not finite or out of its range.
    """
    try:
        return RunResults.model_validate(dict(results))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResultsError(
            f"results: {where}: {first['msg']} (got {str(first['input'])[:60]!r})"
        ) from error


class ScoredImages(NamedTuple):
    """Which images were scored."""

    data_hash: str
    split: str = BUILT  # by name, and where it has one, its hash
    images_hash: str | None = None  # see `selection.images_hash`


def provenance(
    command: str,
    seed: int,
    images: ScoredImages,
    *,
    device: torch.device,
    wall_s: float,
    weights: Weights = UNKNOWN_WEIGHTS,
    prompts: PromptSet | None = None,
    zeroshot_rule: ZeroshotRule | None = None,
) -> Provenance:
    """The provenance of results that are made now, with commit, versions, threads and time.

    Args:
        command: As typed.
        seed: Of the bootstrap; of fine-tuning, of its training.
        images: That were scored.
        device: Where the model ran.
        wall_s: How long it took.
        weights: What the weights follow from, as far as it is known.
        prompts: That were asked, where any were.
        zeroshot_rule: By which scores follow from them.
    """
    versions = code_version()
    commit = versions.pop("commit")
    n_threads = torch.get_num_threads()
    return Provenance.model_validate(
        {
            "command": command,
            "seed": seed,
            **images._asdict(),
            **weights._asdict(),
            "prompt_set": None if prompts is None else f"{prompts.id} version {prompts.version}",
            "prompt_hash": None if prompts is None else prompts.hash,
            "zeroshot_rule": zeroshot_rule,
            "device": f"{device.type}, {n_threads} thread{'s' * (n_threads != 1)}",
            "wall_s": wall_s,
            "commit": commit,
            "versions": versions,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def read_results(folder: Path) -> RunResults:
    """Reads results.json.

    Raises:
        ResultsError: When it is missing, was changed, or breaks the contract.
    """
    path = folder / RESULTS_FILE
    try:
        stored = dict(json.loads(path.read_text("utf-8")))
        found = checked(unsealed(stored)) if stored.get("format") == FORMAT else None
    except OSError:
        raise ResultsError(
            f"{folder} holds no {RESULTS_FILE}; give the --out of `mmclip zeroshot` or the like"
        ) from None
    except (ValueError, TypeError) as error:
        raise ResultsError(
            f"{path} is damaged or of another version of mmclip ({error}); run the command that "
            f"made it again"
        ) from None
    if found is None:
        again = "run the command that made it again"
        raise ResultsError(f"{path} {other_format(stored.get('format'), FORMAT, again)}")
    return found


def read_scores(
    folder: Path, results: RunResults, part: Literal["test", "val"] = "test"
) -> Predictions:
    """Reads the scores.npz that results were computed from; see `scores.load_scores`.

    Raises:
        ScoresError: As there, and when the file is not the one that lay beside the results.
    """
    path = folder / SCORES_FILE
    if path.is_file() and file_sha256(path) != results.files_sha256.get(SCORES_FILE):
        raise ScoresError(
            f"{path} is not the file of these results (its checksum differs from {RESULTS_FILE}); "
            f"run the command that made them again"
        )
    return load_scores(path, part)


def write_results(folder: Path, results: RunResults) -> Path:
    """Writes results.json: keys sorted, six significant digits, no NaN, never half a file.

    It holds the checksum of scores.npz, which is written before it, and one of itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = {
        name: file_sha256(folder / name) for name in (SCORES_FILE,) if (folder / name).is_file()
    }
    whole = results.model_copy(update={"files_sha256": beside})
    plain = sealed(_rounded(whole.model_dump(mode="json")))
    path = folder / RESULTS_FILE
    text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")
    return path


def _rounded(value: Any) -> Any:
    """Six significant digits, but thresholds whole: a rounded cut calls the image at the threshold
    otherwise."""
    if isinstance(value, dict):
        is_threshold = value.keys() == ChosenThreshold.model_fields.keys()
        return value if is_threshold else {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
