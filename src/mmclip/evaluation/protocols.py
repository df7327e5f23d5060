"""Protocols: which images are scored for which findings, and by what rules, as versioned data.

A protocol is a TOML file, one for each benchmark of the field; protocols/*.toml are the package's.
Two results are comparable when protocol, version and data hash are equal.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmclip.config_io import Frozen, config_hash, packaged_names, parse, read_toml
from mmclip.data.leakage.splits import SUBSET_SEEDS
from mmclip.evaluation.thresholds import ThresholdRule

MIN_COUNT = 10
"""Images of either kind that a finding needs to count in a macro average. [chosen: below ten, one
image moves its AUROC by points]"""

BUILT = "built"
"""In place of the name of a split: as `mmclip data build` left it."""

OWN_PROTOCOL = "own"
"""The id of the rules of findings that were named on the command line: of no benchmark."""

Uncertain = Literal["ignore", "positive", "negative", "multiclass"]
"""What a label that the source calls uncertain trains as; "multiclass" is a class of its own beside
present and absent, and scores leave it out. Source: U-Ignore, U-Ones, U-Zeros and U-MultiClass of
Irvin et al. 2019 (arXiv:1901.07031), section 3."""

Blank = Literal["absent", "unknown"]
"""What a training label means that a labelled image does not have: a program that reads reports
leaves blank what the report does not mention. Source: Irvin et al. 2019 train such blanks as
negative (table 1 counts them so), for labels of their own kind."""

_UNCERTAIN_BY_IRVIN: dict[str, Uncertain] = {
    "u-ignore": "ignore", "u-ones": "positive", "u-zeros": "negative",
    "u-multiclass": "multiclass",
}  # fmt: skip


def _by_its_name(value: object) -> object:
    """The names of the paper, in any case, stand for ours.

    Raises:
        ValueError: For the one that needs a model that has learnt before.
    """
    name = value.lower() if isinstance(value, str) else ""
    if name == "u-selftrained":
        raise ValueError(
            f"{value} is not supported: it labels uncertain images by a model that has learnt from "
            f"the others; take U-Ignore, U-Ones, U-Zeros or U-MultiClass"
        )
    return _UNCERTAIN_BY_IRVIN.get(name, value)


UncertainPolicy = Annotated[Uncertain, BeforeValidator(_by_its_name)]

Fraction = Annotated[float, Field(gt=0, le=1)]


class FineTuning(Frozen):
    """What `mmclip finetune` does by a protocol.

    Attributes:
        fractions: Of the training patients; those of 1, 10 and 100 % are saved with a split.
        seeds: Of subset, weights and order; those that a split saves, see `SUBSET_SEEDS`.
        uncertain: What uncertain training labels count as, for findings not in `uncertain_of`;
            "U-Ignore", "U-Ones", "U-Zeros" and "U-MultiClass" stand for ignore, positive, negative
            and multiclass.
        uncertain_of: The same for single findings.
        blank: What a training label counts as that a labelled image does not have.
    """

    fractions: tuple[Fraction, ...] = (0.01, 0.1, 1.0)
    seeds: tuple[int, ...] = SUBSET_SEEDS
    uncertain: UncertainPolicy = "ignore"
    uncertain_of: dict[str, UncertainPolicy] = Field(default_factory=dict)
    blank: Blank = "unknown"

    def label_rules(self, findings: Sequence[str]) -> dict[str, str]:
        """How training labels are read, for results."""
        policies = ", ".join(f"{f} {self.uncertain_of.get(f, self.uncertain)}" for f in findings)
        return {"blank labels": self.blank, "uncertain labels": policies}


class Protocol(Frozen):
    """One protocol, as read from its file.

    Attributes:
        title: For tables.
        description: Where it comes from, and what differs from papers that name it.
        readers: Data folders of these readers fit.
        sources: Of `Sample.source`; empty takes all of the folder.
        other_sources: Of the images of train and val, where these may be others.
        splits: Names of splits that fit, the best first; `BUILT` where any draw will do.
        needs_laterals: Whether a folder that names no image as a lateral is refused, as its
            laterals pass for frontal images there.
        findings: In the order of the benchmark.
        own_words: Findings are the source's own label words, in any case of letters and up to a
            first "/": present where an image has the word, absent where it has others.
        words: For `own_words`: the words of a finding, where they are not its name.
        unfinished: Label words that leave what an image does not name unknown.
        closed_by: Word of `unfinished` -> words beside which it leaves nothing open.
        prompt_sets: For zero-shot; the first gives the result, the others its spread.
        threshold: Rule by which a threshold is chosen on validation images.
        min_count: Images of either kind that a finding needs to count in the macro average.
        finetune: None where a benchmark is for zero-shot alone.
    """

    id: str
    version: int = Field(ge=1)
    title: str
    description: str
    readers: tuple[str, ...] = Field(min_length=1)
    sources: tuple[str, ...] = ()
    other_sources: tuple[str, ...] = ()
    splits: tuple[str, ...] = Field(min_length=1)
    needs_laterals: bool = False
    findings: tuple[str, ...] = Field(min_length=1)
    own_words: bool = False
    words: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    unfinished: tuple[str, ...] = ()
    closed_by: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    prompt_sets: tuple[str, ...] = Field(default=("default", "pair", "sentence"), min_length=1)
    threshold: ThresholdRule = "f1"
    min_count: int = Field(default=MIN_COUNT, ge=1)
    finetune: FineTuning | None = None

    @model_validator(mode="after")
    def _names_findings_alike(self) -> "Protocol":
        if twice := {f for f in self.findings if self.findings.count(f) > 1}:
            raise ValueError(f"findings names {', '.join(sorted(twice))} twice")
        named: dict[str, set[str]] = {"words": set(self.words)}
        if self.finetune:
            named["finetune.uncertain_of"] = set(self.finetune.uncertain_of)
        for key, names in named.items():
            if other := names - set(self.findings):
                raise ValueError(f"{key} names {', '.join(sorted(other))}, which findings does not")
        if self.words and not self.own_words:
            raise ValueError("words is for own_words = true")
        if other := set(self.closed_by) - set(self.unfinished):
            raise ValueError(
                f"closed_by names {', '.join(sorted(other))}, which unfinished does not"
            )
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of the content; comments and layout of the file do not change it."""
        return config_hash(self)

    def sources_of(self, split: str) -> tuple[str, ...]:
        """Of `Sample.source`, for the images of a split; empty takes all."""
        return self.sources if split == "test" else self.other_sources or self.sources

    def check_folder(self, reader: str, split: str, where: str) -> None:
        """Refuses a data folder of another source or split.

        Args:
            reader: That made the folder.
            split: Its name, or `BUILT`.
            where: The folder, for the error.

        Raises:
            ValueError: With what is wanted in its place.
        """
        if reader not in self.readers:
            raise ValueError(
                f"protocol {self.id} is for data of {_either(self.readers)}, and {where} was built "
                f"by reader {reader!r}; give such a folder, or leave --protocol out"
            )
        if split not in self.splits:
            named = [name for name in self.splits if name != BUILT]
            how = " or ".join(f"`mmclip data split {where} --name {name}`" for name in named)
            raise ValueError(
                f"protocol {self.id} scores split {_either(self.splits)}, and {where} has split "
                f"{split!r}; " + (f"set it by {how}" if how else "remove its split.json")
            )


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)


def protocol_names() -> list[str]:
    """Names of the protocols that come with the package."""
    return packaged_names("protocols")


def load_protocol(name_or_path: str) -> Protocol:
    """Reads a protocol of the package by name, or any by the path of its TOML file.

    Raises:
        ConfigError: When there is no such protocol, or a key or value breaks a rule.
    """
    values = read_toml("protocol", "protocols", name_or_path)
    return parse(Protocol, values, f"protocol {name_or_path}")
