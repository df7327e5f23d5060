"""What a synthetic data set is made of: findings, sides, sizes, and the knobs of a preset."""

from dataclasses import dataclass
from typing import Literal

from mmclip.data.sample import Split

Side = Literal["left", "right", "bilateral", "none"]
Size = Literal["small", "moderate", "large"]

SIZES: tuple[Size, ...] = ("small", "moderate", "large")

SIDES: dict[str, tuple[Side, ...]] = {
    "atelectasis": ("left", "right", "bilateral"),
    "cardiomegaly": ("none",),
    "consolidation": ("left", "right", "bilateral"),
    "edema": ("none",),
    "hiatal hernia": ("none",),
    "hilar enlargement": ("left", "right", "bilateral"),
    "mass": ("left", "right"),
    "nodule": ("left", "right"),
    "pleural effusion": ("left", "right", "bilateral"),
    "pneumothorax": ("left", "right"),
    "rib fracture": ("left", "right"),
    "support devices": ("none",),
}
"""The sides that a finding can have; "none" alone is a finding that has no side."""

FINDINGS: tuple[str, ...] = tuple(SIDES)

BILATERAL_RATIO = 0.2
"""Share of bilateral lesions among findings that can be so. Source: [chosen: a minority]."""


@dataclass(frozen=True, order=True)
class Combination:
    """One finding on one side in one size: the unit that can be held out of training."""

    finding: str
    side: Side
    size: Size

    def __str__(self) -> str:
        words = (self.finding, self.side, self.size)
        return "/".join(word for word in words if word != "none")


@dataclass(frozen=True)
class Preset:
    """All that determines a synthetic data set; equal presets make equal bytes.

    Attributes:
        version: Raised with every change of the generator or of a knob, and part of every draw.
        n_train: Patients with an image and a report; n_val and n_test likewise.
        n_unpaired: Further training patients with images and labels and no report.
        n_held_out: Further test patients, each with one of the `held_out` combinations.
        n_findings_probs: Probability of 0, 1, 2, ... findings in a patient. 0.30, 0.32, 0.22, 0.16
            makes the pairwise counts of equally common findings those of independent draws.
        finding_weights: Relative frequency of findings, by name; those not named weigh 1.
        size_probs: Probability of small, moderate and large.
        held_out: Combinations that never occur in train, val or the ordinary test patients.
        lesion_scale: Factor on the radius or thickness of lesions; 1 is about life size.
        lesion_contrast: Factor on the density of lesions; 1 is about life.
        noise_ratio: Standard deviation of the pixel noise, as a ratio of the full range.
        exposure_spread: Factor on the spread of gain, gamma, gradient and clouding.
        pose_spread: Factor on the spread of position, rotation and scale.
        second_image_prob: Share of patients with two images of the one study.
        omission_prob: Share of present findings that the report leaves out.
        uncertain_prob: Share of present findings that the report states with a hedge.
        absent_mention_prob: Share of absent findings that the report denies by name.
    """

    name: str
    version: int
    seed: int
    image_size: int
    n_train: int
    n_val: int
    n_test: int
    n_unpaired: int = 0
    n_held_out: int = 0
    n_findings_probs: tuple[float, ...] = (0.30, 0.32, 0.22, 0.16)
    finding_weights: tuple[tuple[str, float], ...] = ()
    size_probs: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    held_out: tuple[Combination, ...] = ()
    lesion_scale: float = 1.0
    lesion_contrast: float = 1.0
    noise_ratio: float = 0.02
    exposure_spread: float = 1.0
    pose_spread: float = 1.0
    second_image_prob: float = 0.05
    omission_prob: float = 0.0
    uncertain_prob: float = 0.1
    absent_mention_prob: float = 0.2

    def __post_init__(self) -> None:
        unknown = {name for name, _ in self.finding_weights} - set(FINDINGS)
        if unknown:
            raise ValueError(
                f"finding_weights names {sorted(unknown)}; the findings are {', '.join(FINDINGS)}"
            )
        for item in self.held_out:
            if item.side not in SIDES.get(item.finding, ()) or item.size not in SIZES:
                raise ValueError(
                    f"held_out names {item}, which no image can show; see SIDES, SIZES"
                )
        for name in ("n_findings_probs", "size_probs"):
            probs = getattr(self, name)
            if min(probs) < 0 or abs(sum(probs) - 1) > 1e-6:
                raise ValueError(f"{name}={probs} must not be negative and must add up to 1")
        if self.n_held_out and not self.held_out:
            raise ValueError(f"n_held_out={self.n_held_out} needs combinations in held_out")

    def n_patients(self, split: Split) -> int:
        """Patients of a split, with the unpaired of train and the held out of test at the end."""
        counts: dict[Split, int] = {
            "train": self.n_train + self.n_unpaired,
            "val": self.n_val,
            "test": self.n_test + self.n_held_out,
        }
        return counts[split]


DEMO = Preset(
    name="demo",
    version=3,
    seed=7,
    image_size=64,
    n_train=4500,
    n_val=400,
    n_test=800,
    n_unpaired=4500,
    n_held_out=240,
    finding_weights=(("atelectasis", 1.4), ("nodule", 1.4), ("rib fracture", 1.4)),
    size_probs=(0.2, 0.4, 0.4),
    held_out=(
        Combination("pleural effusion", "left", "large"),
        Combination("pneumothorax", "right", "moderate"),
        Combination("consolidation", "left", "moderate"),
        Combination("mass", "right", "large"),
        Combination("atelectasis", "right", "moderate"),
        Combination("nodule", "left", "large"),
    ),
    lesion_scale=1.4,
    lesion_contrast=1.7,
    exposure_spread=0.9,
    pose_spread=0.9,
    uncertain_prob=0.05,
    absent_mention_prob=0.3,
)

# The frozen benchmark of the ablation: no knob changes without a new version and every arm run
# again. Chosen on the validation images with contrastive training alone, before any other arm had
# run on it (docs/log.md, "The frozen benchmark"). The shares of 0 to 4 findings are close to
# independent draws of probability 1/7.
HARD = Preset(
    name="hard",
    version=2,
    seed=2407,
    image_size=64,
    n_train=2000,
    n_val=1000,
    n_test=2000,
    n_unpaired=4000,
    n_findings_probs=(0.16, 0.32, 0.27, 0.15, 0.10),
    size_probs=(0.4, 0.4, 0.2),
    lesion_scale=1.3,
    lesion_contrast=1.6,
    exposure_spread=0.9,
    pose_spread=0.9,
    uncertain_prob=0.05,
)

PRESETS: dict[str, Preset] = {"demo": DEMO, "hard": HARD}
