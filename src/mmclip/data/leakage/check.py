"""What splits and data sets share that they should not: patients, equal images, near-duplicates."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from mmclip.data.cache import ImageCache
from mmclip.data.folder import ManifestError, read_built_meta
from mmclip.data.leakage.duplicates import CHUNKS, near_groups, read_hashes
from mmclip.data.manifest import read_manifest
from mmclip.data.sample import SPLITS, UNCERTAIN, Sample
from mmclip.progress import progress

COLLECTIONS = {
    "rsna": "chestxray14",
    "siim": "chestxray14",
    "covidx/rsna": "chestxray14",
    "padchest-physician": "padchest",
    "chexpert-plus": "chexpert",
}
"""Sources, or parts of one, whose patients are those of another. Patient ids of other sources are
not compared: "1" of two hospitals is two people. Source: docs/data.md."""

_ID_FORMS = {
    "chestxray14": r"0*([1-9]\d{0,3}|[12]\d{4}|30[0-7]\d\d|3080[0-5])",  # 1 to 30805
}
"""Of patient ids in a collection that others take images from, and rename: an id of another form
is of the other's making, and matches no one. Source: Data_Entry_2017, patients 1 to 30805."""

N_EXAMPLES = 3


@dataclass(frozen=True)
class Overlap:
    """What two places, splits or data folders, have in common.

    Attributes:
        what: "patients", "images" (equal bytes) or "near-duplicates".
        places: The two, in order.
        n_shared: Patients, images or pairs.
        n_images: Images of the second place that are concerned.
        examples: Ids of some images that go together, one of each place.
    """

    what: str
    places: tuple[str, str]
    n_shared: int
    n_images: int
    examples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        first, second = self.places
        shown = ", ".join(" and ".join(pair) for pair in self.examples)
        return (
            f"{self.n_shared:,} {self.what} are in {first} and in {second} ({self.n_images:,} "
            f"images of {second}), such as images {shown}"
        )


_IN_PARTS = {name.partition("/")[0] for name in COLLECTIONS if "/" in name}


def collection_of(sample: Sample) -> str:
    """The collection whose patients an image's are; see COLLECTIONS."""
    if sample.source not in _IN_PARTS:
        return COLLECTIONS.get(sample.source, sample.source)
    part = f"{sample.source}/{sample.patient_id.partition('/')[0]}"
    return COLLECTIONS.get(part, COLLECTIONS.get(sample.source, sample.source))


def patient_key(sample: Sample) -> str:
    """The patient of an image, among those of all data sets.

    Ids of ChestX-ray14 are the same with leading zeros, as its file names have them, and without.
    """
    collection = collection_of(sample)
    if collection != "chestxray14":
        return f"{collection}/{sample.patient_id}"
    return f"{collection}/{plain_patient_id(sample).rpartition('/')[2]}"


def plain_patient_id(sample: Sample) -> str:
    """The id of a patient as the tables of its collection write it, so that draws by id agree."""
    part, slash, patient = sample.patient_id.rpartition("/")
    if collection_of(sample) != "chestxray14":
        return sample.patient_id
    return part + slash + (patient.lstrip("0") or patient)


def has_own_id(sample: Sample) -> bool:
    """Whether the patient of an image has the id of the collection that the image comes from."""
    form = _ID_FORMS.get(collection_of(sample))
    return form is None or re.fullmatch(form, sample.patient_id.rpartition("/")[2]) is not None


def study_key(sample: Sample) -> str:
    """The study of an image, among those of all patients: "1" is the first of many."""
    return f"{patient_key(sample)}/{sample.study_id}"


def content_key(sample: Sample) -> str:
    """The content of an image: equal for equal files; of a study without an image, its id."""
    return sample.image_sha256 or f"{sample.source}/{sample.image_id}"


KeyOf = Callable[[Sample], str | None]

CHEAP: Mapping[str, KeyOf] = {"patients": patient_key, "images": content_key}
"""What can be shared and is known without looking at images."""


def find_overlaps(
    samples: Sequence[Sample],
    places: Sequence[str | None],
    keys: Mapping[str, Sequence[str | None] | KeyOf] = CHEAP,
) -> list[Overlap]:
    """What is in two places at once.

    Args:
        samples: An image may come several times, where a list puts it into several places.
        places: Of each image; None is no place.
        keys: By the name of what is shared: the key of each image, None where it shares nothing.
    """
    order = list(dict.fromkeys(p for p in (*SPLITS, *places) if p is not None))
    found = []
    for what, given in keys.items():
        named = list(map(given, samples)) if callable(given) else given
        keys_of: dict[str, set[str]] = {place: set() for place in order}
        for place, key in zip(places, named, strict=True):
            if place is not None and key is not None:
                keys_of[place].add(key)
        for first, second in combinations(order, 2):
            shared = sorted(keys_of[first] & keys_of[second])
            if shared:
                one, other = (
                    _ids_by_key(samples, places, named, place, set(shared))
                    for place in (first, second)
                )
                examples = tuple((one[key][0], other[key][0]) for key in shared[:N_EXAMPLES])
                n_images = sum(len(other[key]) for key in shared)
                found.append(Overlap(what, (first, second), len(shared), n_images, examples))
    return found


def _ids_by_key(
    samples: Sequence[Sample],
    places: Sequence[str | None],
    named: Sequence[str | None],
    place: str,
    wanted: Set[str],
) -> dict[str, list[str]]:
    """The images of a place that have one of some keys."""
    found: dict[str, list[str]] = {}
    for sample, where, key in zip(samples, places, named, strict=True):
        if where == place and key is not None and key in wanted:
            found.setdefault(key, []).append(sample.image_id)
    return found


def leaks_from_train(samples: Sequence[Sample]) -> Iterator[Overlap]:
    """Overlaps of what trains with what is scored; what val shares with test is none."""
    for overlap in find_overlaps(samples, [sample.split for sample in samples]):
        if overlap.places[0] == "train":
            yield overlap


def refuse_leaks(samples: Sequence[Sample]) -> None:
    """Stops before images are trained on that will be scored.

    Raises:
        ManifestError: When a patient or an image is in train and in val or test, with counts and
            examples.
    """
    if found := list(leaks_from_train(samples)):
        raise ManifestError(
            f"what trains would be scored: {'; '.join(map(str, found))}; see `mmclip data check`, "
            f"and set a sound split with `mmclip data split --name clean`"
        )


@dataclass(frozen=True)
class Disagreement:
    """One finding in the labels of images that stand in two data folders."""

    folders: tuple[str, str]
    finding: str
    n_both: int  # images that are present or absent in both
    n_differ: int  # of these, present in one and absent in the other
    examples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        first, second = self.folders
        shown = ", ".join(" and ".join(pair) for pair in self.examples)
        return (
            f"{self.finding}: {first} and {second} differ on {self.n_differ:,} of {self.n_both:,} "
            f"images that both label" + (f", such as {shown}" if shown else "")
        )


@dataclass(frozen=True)
class Oddity:
    """Something of views, ages or sizes that is worth a look."""

    folder: str
    what: str
    n_images: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.folder}: {self.n_images:,} images {self.what}, such as {self.examples[0]}"


@dataclass(frozen=True)
class Check:
    """What `mmclip data check` found.

    Attributes:
        leaks: Overlaps of two splits, over all folders.
        shared: Overlaps of two folders, whatever their splits; no error by themselves.
        disagreements: Of labels, where the same image is in two folders.
        oddities: Of views, ages and sizes.
        counts: By folder: images, patients, images of each split.
        n_hashed: Images that were compared by their looks; 0 where this was left out.
    """

    leaks: list[Overlap]
    shared: list[Overlap]
    disagreements: list[Disagreement]
    oddities: list[Oddity]
    counts: dict[str, dict[str, int]]
    n_hashed: int


def check_data(folders: Sequence[Path], near_duplicates: bool = True) -> Check:
    """Examines data folders, each by itself and against the others.

    Args:
        folders: As `mmclip data build` and `mmclip data split` leave them.
        near_duplicates: Also compare images by their looks, with hashes that are stored in the
            folders.

    Raises:
        ManifestError: When a folder is unfinished or given twice.
    """
    names = [str(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ManifestError(f"{', '.join(names)}: a folder is named twice; give each folder once")
    samples: list[Sample] = []
    places: list[str] = []
    counts = {}
    for folder, name in zip(folders, names, strict=True):
        mine = read_manifest(folder)
        samples += mine
        places += [name] * len(mine)
        splits = Counter(sample.split or "in no split" for sample in mine)
        n_patients = len({sample.patient_id for sample in mine})
        counts[name] = {"images": len(mine), "patients": n_patients, **sorted_counts(splits)}
    keys: dict[str, Sequence[str | None] | KeyOf] = dict(CHEAP)
    n_hashed = 0
    if near_duplicates:
        groups = near_keys(samples, folders)
        keys["near-duplicates"] = groups
        n_hashed = sum(sample.image is not None for sample in samples)
    else:
        groups = [None] * len(samples)
    same = [group or content_key(sample) for sample, group in zip(samples, groups, strict=True)]
    return Check(
        leaks=find_overlaps(samples, [sample.split for sample in samples], keys),
        shared=find_overlaps(samples, places, keys) if len(folders) > 1 else [],
        disagreements=compare_labels(samples, places, same),
        oddities=[odd for name in names for odd in find_oddities(name, samples, places)],
        counts=counts,
        n_hashed=n_hashed,
    )


def sorted_counts(splits: Mapping[str, int]) -> dict[str, int]:
    """Counts by split, in the order of SPLITS."""
    return {name: splits[name] for name in (*SPLITS, "in no split") if splits.get(name)}


def near_keys(samples: Sequence[Sample], folders: Sequence[Path]) -> list[str | None]:
    """The group of near-duplicates of each image; None where all of its group are equal files.

    Args:
        samples: Of all folders, in the order of their manifests.
        folders: Where their hashes are stored.
    """
    n_images = sum(sample.image is not None for sample in samples)
    with progress("hashing images", n_images) as advance:
        hashes = np.concatenate([read_hashes(folder, advance) for folder in folders])
    assert len(hashes) == n_images
    caches = [
        ImageCache.open(folder).images
        for folder in folders
        if read_built_meta(folder)["image_size"]
    ]
    ends = np.cumsum([len(images) for images in caches])

    def image_of(number: int) -> np.ndarray:
        k = int(np.searchsorted(ends, number, side="right"))
        return np.asarray(caches[k][number - int(ends[k])])  # counted from the end of its cache

    with progress("comparing images", CHUNKS) as advance:
        numbers = iter(near_groups(hashes, image_of, advance).tolist())
    group = [next(numbers) if sample.image is not None else -1 for sample in samples]
    contents: dict[int, set[str]] = {}
    for sample, number in zip(samples, group, strict=True):
        contents.setdefault(number, set()).add(content_key(sample))
    return [f"near {n}" if n >= 0 and len(contents[n]) > 1 else None for n in group]


def compare_labels(
    samples: Sequence[Sample], places: Sequence[str], same: Sequence[str]
) -> list[Disagreement]:
    """Labels against each other, of images that are in two folders.

    Args:
        samples: Of all folders.
        places: The folder of each.
        same: Equal for what shows the same image.
    """
    held: dict[str, dict[str, Sample]] = {}
    for sample, place, key in zip(samples, places, same, strict=True):
        held.setdefault(key, {}).setdefault(place, sample)
    both: Counter[tuple[str, str, str]] = Counter()
    differ: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for found in held.values():
        for (first, one), (second, other) in combinations(found.items(), 2):
            for finding in one.labels.keys() & other.labels.keys():
                values = {one.labels[finding], other.labels[finding]}
                if UNCERTAIN not in values:
                    at = (first, second, finding)
                    both[at] += 1
                    if len(values) > 1:
                        differ.setdefault(at, []).append((one.image_id, other.image_id))
    return [
        Disagreement(at[:2], at[2], n, len(differ.get(at, ())), tuple(differ.get(at, ())[:3]))
        for at, n in sorted(both.items())
    ]


MAX_AGE_YEARS = 110
"""[chosen: the oldest people alive are a little older; ages of ChestX-ray14 reach 414]"""

MAX_SIDES_RATIO = 2.0
"""Of the longer to the shorter side. [chosen: no chest X-ray is twice as high as wide]"""


def find_oddities(name: str, samples: Sequence[Sample], places: Sequence[str]) -> Iterator[Oddity]:
    """What of views, ages, sexes and sizes in a folder is worth a look.

    Args:
        name: Of the folder.
        samples: Of all folders.
        places: The folder of each.
    """
    mine = [sample for sample, place in zip(samples, places, strict=True) if place == name]
    sexes: dict[str, set[str]] = {}
    views: dict[str, set[str]] = {}
    for sample in mine:
        sexes.setdefault(patient_key(sample), set()).add(sample.sex or "")
        views.setdefault(content_key(sample), set()).add(sample.view)

    def sides(sample: Sample) -> float:
        w, h = sample.width_px or 1, sample.height_px or 1
        return max(w, h) / max(1, min(w, h))

    rules: dict[str, Callable[[Sample], bool]] = {
        "have no known view": lambda f: f.image is not None and f.view == "unknown",
        "are lateral and labelled; they are never scored": lambda f: (
            f.view == "L" and bool(f.labels)
        ),
        "are equal to another of another view": lambda f: (
            len(views[content_key(f)] - {"unknown"}) > 1
        ),
        f"are of people under 0 or over {MAX_AGE_YEARS} years": lambda f: (
            f.age_years is not None and not 0 <= f.age_years <= MAX_AGE_YEARS
        ),
        "are of a patient with two sexes": lambda f: len(sexes[patient_key(f)] - {""}) > 1,
        f"are more than {MAX_SIDES_RATIO:g} times as long as wide, or as wide as long": lambda f: (
            sides(f) > MAX_SIDES_RATIO
        ),
    }
    for what, is_odd in rules.items():
        if found := [sample.image_id for sample in mine if is_odd(sample)]:
            yield Oddity(name, what, len(found), tuple(found[:N_EXAMPLES]))
