"""Runs of one recipe under several seeds as one arm, and arms held against one another.

A seed is chance, and so is who the patients are: intervals are over both together.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from jaxtyping import Float

from mmclip.evaluation.bootstrap import bootstrap_metrics, macro_of_resamples
from mmclip.evaluation.comparison import Difference, Run, differs, read_alike
from mmclip.evaluation.intervals import interval_over_seeds
from mmclip.evaluation.results import RESULTS_FILE
from mmclip.evaluation.scores import ScoresError


@dataclass(frozen=True)
class Arm:
    """Runs that differ by their seed alone.

    Attributes:
        name: Of the arm.
        runs: By the seed of the training, ascending.
        paired: Seeds that the base has as well: differences are of these. None of the base.
        macro: Difference of the mean macro AUROC to that of the base; None of the base, and where
            no finding counts.
        findings: Differences by finding; without an interval where a finding does not count.
        differs: What of a run is not as of the first, and does not keep it from comparing.
    """

    name: str
    runs: Mapping[int, Run]
    paired: tuple[int, ...]
    macro: Difference | None
    findings: Mapping[str, Difference]
    differs: tuple[str, ...]

    def macro_aurocs(self) -> dict[int, float]:
        """By seed; empty where no finding counts."""
        found = {seed: run.results.macro_auroc for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self) -> float | None:
        """The mean macro AUROC over all seeds."""
        values = list(self.macro_aurocs().values())
        return float(np.mean(values)) if values else None

    def means(self) -> dict[str, float]:
        """The mean AUROC over all seeds of each finding that has one."""
        by_seed = [run.results.aurocs() for run in self.runs.values()]
        return {name: float(np.mean([of[name] for of in by_seed])) for name in by_seed[0]}


def compare_over_seeds(
    folders: Sequence[Path], *, n_resamples: int = 1000, seed: int = 0
) -> list[Arm]:
    """Arms side by side, with differences to the first, paired by seed and patient.

    Runs are of one arm where their recipe is the same, and the prompts that scored them. An arm's
    mean is over all its seeds, its difference over those that the base has too.

    Args:
        folders: See `read_alike`; in any order, the first is of the base.
        n_resamples: Bootstrap resamples of patients.
        seed: Of the resamples of patients.

    Raises:
        ScoresError: See `read_alike`; and when results do not say their seed, an arm has one twice,
            or has none that the base has.
    """
    runs = read_alike(folders)
    groups = _by_recipe(runs)
    first, base = runs[0], groups[0]
    counted = [first.scores.names().index(name) for name in first.results.macro_findings]
    scored = first.results.aurocs()
    of_base = cache(lambda train_seed: _aurocs(base[train_seed], counted, n_resamples, seed))
    out = []
    for name, group in zip(_arm_names(groups), groups, strict=True):
        said = (what for run in group.values() for what in differs(first.results, run.results))
        distinct = tuple(dict.fromkeys(said))
        if group is base:
            out.append(Arm(name, group, (), None, {}, distinct))
            continue
        paired = tuple(s for s in group if s in base)
        if not paired:
            _refuse_unpaired(base, group)
        ours = {s: _aurocs(group[s], counted, n_resamples, seed) for s in paired}
        theirs = {s: of_base(s) for s in paired}
        macro, *by_finding = _differences(ours, theirs)
        findings = {
            finding: Difference(difference.value, difference.interval if k in counted else None)
            for k, (finding, difference) in enumerate(
                zip(first.scores.names(), by_finding, strict=True)
            )
            if finding in scored
        }
        out.append(Arm(name, group, paired, macro if counted else None, findings, distinct))
    return out


class _Aurocs(NamedTuple):
    """Of one run, macro AUROC and behind it the AUROC of each finding; NaN where there is none."""

    values: Float[np.ndarray, " columns"]
    drawn: Float[np.ndarray, "resamples columns"]


def _aurocs(run: Run, counted: Sequence[int], n_resamples: int, seed: int) -> _Aurocs:
    names, by_finding, macro = run.scores.names(), run.results.aurocs(), run.results.macro_auroc
    values = [np.nan if macro is None else macro, *(by_finding.get(n, np.nan) for n in names)]
    drawn = bootstrap_metrics(
        run.scores.labels,
        run.scores.scores,
        run.scores.patients(),
        n_resamples=n_resamples,
        seed=seed,
    ).auroc
    return _Aurocs(np.array(values), np.column_stack([macro_of_resamples(drawn, counted), drawn]))


def _differences(ours: Mapping[int, _Aurocs], theirs: Mapping[int, _Aurocs]) -> list[Difference]:
    """Of each column, over the seeds of both, which are the same."""
    values = np.stack([ours[s].values - theirs[s].values for s in ours])
    drawn = np.stack([ours[s].drawn - theirs[s].drawn for s in ours])
    return [
        Difference(
            float(values[:, column].mean()),
            interval_over_seeds(values[:, column], drawn[..., column]),
        )
        for column in range(values.shape[1])
    ]


def remarks(arms: Sequence[Arm]) -> list[str]:
    """What a reader must know of the differences between arms, in sentences.

    Args:
        arms: Of `compare_over_seeds`, the base first.
    """
    base, *others = arms
    said = []
    for arm in others:
        left = [(arm, [s for s in arm.runs if s not in arm.paired])]
        left += [(base, [s for s in base.runs if s not in arm.paired])]
        parts = [f"{_seeds(seeds)} of {which.name}" for which, seeds in left if seeds]
        if parts:
            said.append(
                f"{arm.name} less {base.name} is of {_seeds(arm.paired)}, which both have; left "
                f"out: {' and '.join(parts)}"
            )
    single = [arm.name for arm in others if len(arm.paired) == 1]
    if single:
        said.append(
            f"{', '.join(single)}: of one seed, so the interval is over patients alone, and "
            f"another seed may give another difference"
        )
    if any(run.results.kind == "finetune" for arm in arms for run in arm.runs.values()):
        said.append(
            "seeds are those of fine-tuning; a pre-training that it starts from is the same under "
            "all of them"
        )
    return said


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"


def _seed_of(run: Run) -> int:
    """The seed of a run's training.

    Raises:
        ScoresError: When its results do not say it.
    """
    made, folder = run.results.provenance, run.folder
    if made.train_seed is not None and made.recipe_hash is not None:
        return made.train_seed
    missing = f"{folder / RESULTS_FILE} does not say under which seed its weights were trained"
    if run.results.kind == "scores":
        raise ScoresError(
            f"{missing}, as they are of another model; leave it out, or leave --over-seeds out"
        )
    remove = f"remove {folder} and run" if run.results.kind == "finetune" else "score again by"
    raise ScoresError(
        f"{missing}, as an older version of mmclip wrote it; {remove} `{made.command}`"
    )


def _by_recipe(runs: Sequence[Run]) -> list[dict[int, Run]]:
    """The runs of each recipe by seed, ascending; recipes in the order of their first run.

    Raises:
        ScoresError: When two runs of a recipe have the same seed, or one does not say it.
    """
    groups: dict[tuple[str | None, str | None], dict[int, Run]] = {}
    for run in runs:
        seed, made = _seed_of(run), run.results.provenance
        group = groups.setdefault((made.recipe_hash, made.prompt_hash), {})
        if seed in group:
            raise ScoresError(
                f"{group[seed].folder} and {run.folder} are of the same recipe and the same seed, "
                f"{seed}; a seed counts once: leave one of them out"
            )
        group[seed] = run
    return [dict(sorted(group.items())) for group in groups.values()]


def _arm_names(groups: Sequence[Mapping[int, Run]]) -> list[str]:
    """What the names of an arm's runs begin with, or the first where that tells no arms apart."""
    names = [[run.name for run in group.values()] for group in groups]
    stems = [_stem(some) for some in names]
    return [
        stem if stem and stems.count(stem) == 1 else some[0]
        for stem, some in zip(stems, names, strict=True)
    ]


def _stem(names: Sequence[str]) -> str:
    """What names begin with, less the seed's word and digits: "a" of a-seed10 and a-seed11."""
    if len(names) == 1:
        return names[0]
    pairs = zip(min(names), max(names), strict=False)  # the prefix ends with the shorter name
    begin = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return re.sub(r"[\W_]*(?:seed)?[\W_]*\d*$", "", begin)


def _refuse_unpaired(base: Mapping[int, Run], group: Mapping[int, Run]) -> NoReturn:
    one, other = next(iter(base.values())), next(iter(group.values()))
    is_one_recipe = one.results.provenance.recipe_hash == other.results.provenance.recipe_hash
    apart = (
        "prompts"
        if is_one_recipe
        else "recipes (configuration but for the seed, training data, step)"
    )
    raise ScoresError(
        f"{one.folder} and {other.folder} are of different {apart}, so of two arms, which have no "
        f"seed in common ({_seeds(list(base))}; {_seeds(list(group))}); differences are paired by "
        f"seed: train both under the same seeds"
    )
