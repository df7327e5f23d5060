"""What splits and data sets share that they should not: patients, equal films, near-duplicates."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from jaxtyping import UInt64

from mmclip.data.cache import FilmCache
from mmclip.data.duplicates import CHUNKS, near_groups, read_hashes
from mmclip.data.folder import ManifestError, read_built_meta
from mmclip.data.manifest import read_manifest
from mmclip.data.records import SPLITS, UNCERTAIN, Film
from mmclip.progress import progress

COLLECTIONS = {
    "rsna": "chestxray14",
    "siim": "chestxray14",
    "padchest-physician": "padchest",
    "chexpert-plus": "chexpert",
}
"""Sources whose patients are those of another. Patient ids of other sources are not compared: "1"
of two hospitals is two people. Source: docs/data.md."""

N_EXAMPLES = 3


@dataclass(frozen=True)
class Overlap:
    """What two places, splits or data folders, have in common.

    Attributes:
        what: "patients", "films" (equal bytes) or "near-duplicates".
        places: The two, in order.
        n_shared: Patients, films or pairs.
        n_films: Films of the second place that are concerned.
        examples: Ids of some films that go together, one of each place.
    """

    what: str
    places: tuple[str, str]
    n_shared: int
    n_films: int
    examples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        first, second = self.places
        shown = ", ".join(" and ".join(pair) for pair in self.examples)
        return (
            f"{self.n_shared:,} {self.what} are in {first} and in {second} ({self.n_films:,} films "
            f"of {second}), such as films {shown}"
        )


def patient_key(film: Film) -> str:
    """The patient of a film, among those of all data sets."""
    return f"{COLLECTIONS.get(film.source, film.source)}/{film.patient_id}"


def study_key(film: Film) -> str:
    """The study of a film, among those of all patients: "1" is the first of many."""
    return f"{patient_key(film)}/{film.study_id}"


def content_key(film: Film) -> str:
    """The content of a film: equal for equal files; of a study without a film, its id."""
    return film.image_sha256 or f"{film.source}/{film.film_id}"


KeyOf = Callable[[Film], str | None]

CHEAP: Mapping[str, KeyOf] = {"patients": patient_key, "films": content_key}
"""What can be shared and is known without looking at films."""


def find_overlaps(
    films: Sequence[Film],
    places: Sequence[str | None],
    keys: Mapping[str, Sequence[str | None] | KeyOf] = CHEAP,
) -> list[Overlap]:
    """What is in two places at once.

    Args:
        films: A film may come several times, where a list puts it into several places.
        places: Of each film; None is no place.
        keys: By the name of what is shared: the key of each film, None where it shares nothing.
    """
    order = list(dict.fromkeys(p for p in (*SPLITS, *places) if p is not None))
    found = []
    for what, given in keys.items():
        held: dict[str, dict[str, list[str]]] = {place: {} for place in order}
        named = map(given, films) if callable(given) else given
        for film, place, key in zip(films, places, named, strict=True):
            if place is not None and key is not None:
                held[place].setdefault(key, []).append(film.film_id)
        for first, second in combinations(order, 2):
            one, other = held[first], held[second]
            shared = sorted(one.keys() & other.keys())
            if shared:
                examples = tuple((one[key][0], other[key][0]) for key in shared[:N_EXAMPLES])
                n_films = sum(len(other[key]) for key in shared)
                found.append(Overlap(what, (first, second), len(shared), n_films, examples))
    return found


def leaks_from_train(films: Sequence[Film]) -> Iterator[Overlap]:
    """Overlaps of what trains with what is scored; what val shares with test is none."""
    for overlap in find_overlaps(films, [film.split for film in films]):
        if overlap.places[0] == "train":
            yield overlap


def refuse_leaks(films: Sequence[Film]) -> None:
    """Stops before films are trained on that will be scored.

    Raises:
        ManifestError: When a patient or a film is in train and in val or test, with counts and
            examples.
    """
    if found := list(leaks_from_train(films)):
        raise ManifestError(
            f"what trains would be scored: {'; '.join(map(str, found))}; see `mmclip data check`, "
            f"and set a sound split with `mmclip data split --name clean`"
        )


@dataclass(frozen=True)
class Disagreement:
    """One finding in the labels of films that stand in two data folders."""

    folders: tuple[str, str]
    finding: str
    n_both: int  # films that are present or absent in both
    n_differ: int  # of these, present in one and absent in the other
    examples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        first, second = self.folders
        shown = ", ".join(" and ".join(pair) for pair in self.examples)
        return (
            f"{self.finding}: {first} and {second} differ on {self.n_differ:,} of {self.n_both:,} "
            f"films that both label" + (f", such as {shown}" if shown else "")
        )


@dataclass(frozen=True)
class Oddity:
    """Something of views, ages or sizes that is worth a look."""

    folder: str
    what: str
    n_films: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.folder}: {self.n_films:,} films {self.what}, such as {self.examples[0]}"


@dataclass(frozen=True)
class Check:
    """What `mmclip data check` found.

    Attributes:
        leaks: Overlaps of two splits, over all folders.
        shared: Overlaps of two folders, whatever their splits; no error by themselves.
        disagreements: Of labels, where the same film is in two folders.
        oddities: Of views, ages and sizes.
        counts: By folder: films, patients, films of each split.
        n_hashed: Films that were compared by their looks; 0 where this was left out.
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
        near_duplicates: Also compare films by their looks, with hashes that are stored in the
            folders.

    Raises:
        ManifestError: When a folder is unfinished or given twice.
    """
    names = [str(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ManifestError(f"{', '.join(names)}: a folder is named twice; give each folder once")
    films: list[Film] = []
    places: list[str] = []
    counts = {}
    for folder, name in zip(folders, names, strict=True):
        mine = read_manifest(folder)
        films += mine
        places += [name] * len(mine)
        splits = Counter(film.split or "in no split" for film in mine)
        n_patients = len({film.patient_id for film in mine})
        counts[name] = {"films": len(mine), "patients": n_patients, **sorted_counts(splits)}
    keys: dict[str, Sequence[str | None] | KeyOf] = dict(CHEAP)
    n_hashed = 0
    if near_duplicates:
        groups = near_keys(films, folders)
        keys["near-duplicates"] = groups
        n_hashed = sum(film.image is not None for film in films)
    else:
        groups = [None] * len(films)
    same = [group or content_key(film) for film, group in zip(films, groups, strict=True)]
    return Check(
        leaks=find_overlaps(films, [film.split for film in films], keys),
        shared=find_overlaps(films, places, keys) if len(folders) > 1 else [],
        disagreements=compare_labels(films, places, same),
        oddities=[odd for name in names for odd in find_oddities(name, films, places)],
        counts=counts,
        n_hashed=n_hashed,
    )


def sorted_counts(splits: Mapping[str, int]) -> dict[str, int]:
    """Counts by split, in the order of SPLITS."""
    return {name: splits[name] for name in (*SPLITS, "in no split") if splits.get(name)}


def near_keys(films: Sequence[Film], folders: Sequence[Path]) -> list[str | None]:
    """The group of near-duplicates of each film; None where all of its group are equal files.

    Args:
        films: Of all folders, in the order of their manifests.
        folders: Where their hashes are stored.
    """
    n_films = sum(film.image is not None for film in films)
    with progress("hashing films", n_films) as advance:
        hashes = np.concatenate([read_hashes(folder, advance) for folder in folders])
    assert len(hashes) == n_films
    caches = [
        FilmCache.open(folder).films for folder in folders if read_built_meta(folder)["film_px"]
    ]
    ends = np.cumsum([len(films) for films in caches])

    def film_of(number: int) -> np.ndarray:
        k = int(np.searchsorted(ends, number, side="right"))
        return np.asarray(caches[k][number - int(ends[k])])  # counted from the end of its cache

    with progress("comparing films", CHUNKS) as advance:
        numbers = iter(near_groups(hashes, film_of, advance).tolist())
    group = [next(numbers) if film.image is not None else -1 for film in films]
    contents: dict[int, set[str]] = {}
    for film, number in zip(films, group, strict=True):
        contents.setdefault(number, set()).add(content_key(film))
    return [f"near {n}" if n >= 0 and len(contents[n]) > 1 else None for n in group]


def compare_labels(
    films: Sequence[Film], places: Sequence[str], same: Sequence[str]
) -> list[Disagreement]:
    """Labels against each other, of films that are in two folders.

    Args:
        films: Of all folders.
        places: The folder of each.
        same: Equal for what shows the same film.
    """
    held: dict[str, dict[str, Film]] = {}
    for film, place, key in zip(films, places, same, strict=True):
        held.setdefault(key, {}).setdefault(place, film)
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
                        differ.setdefault(at, []).append((one.film_id, other.film_id))
    return [
        Disagreement(at[:2], at[2], n, len(differ.get(at, ())), tuple(differ.get(at, ())[:3]))
        for at, n in sorted(both.items())
    ]


MAX_AGE_YEARS = 110
"""[chosen: the oldest people alive are a little older; ages of ChestX-ray14 reach 414]"""

MAX_SIDES_RATIO = 2.0
"""Of the longer to the shorter side. [chosen: no chest film is twice as high as wide]"""


def find_oddities(name: str, films: Sequence[Film], places: Sequence[str]) -> Iterator[Oddity]:
    """What of views, ages, sexes and sizes in a folder is worth a look.

    Args:
        name: Of the folder.
        films: Of all folders.
        places: The folder of each.
    """
    mine = [film for film, place in zip(films, places, strict=True) if place == name]
    sexes: dict[str, set[str]] = {}
    views: dict[str, set[str]] = {}
    for film in mine:
        sexes.setdefault(patient_key(film), set()).add(film.sex or "")
        views.setdefault(content_key(film), set()).add(film.view)

    def sides(film: Film) -> float:
        w, h = film.width_px or 1, film.height_px or 1
        return max(w, h) / max(1, min(w, h))

    rules: dict[str, Callable[[Film], bool]] = {
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
        if found := [film.film_id for film in mine if is_odd(film)]:
            yield Oddity(name, what, len(found), tuple(found[:N_EXAMPLES]))


TRAINED_FILE = "trained_on.npy"
"""In the folder of a run: the keys of what it trained on, see `trained_keys`."""


def _hashed_keys(films: Sequence[Film]) -> UInt64[np.ndarray, "n 2"]:
    """Patient and content of each film, as halves of hashes."""

    def number(what: str, key: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{what}:{key}".encode()).digest()[:8], "big")

    return np.array(
        [[number("patient", patient_key(f)), number("film", content_key(f))] for f in films],
        np.uint64,
    ).reshape(-1, 2)


def trained_keys(films: Sequence[Film]) -> UInt64[np.ndarray, " k"]:
    """Patients and contents of films that train, sorted: 16 bytes a film, and no id among them.

    Two of a million keys are equal by chance once in 40 million runs.
    """
    return np.unique(_hashed_keys(films))


def refuse_trained(films: Sequence[Film], keys: UInt64[np.ndarray, " k"]) -> None:
    """Stops before films are scored that a run was trained on.

    Args:
        films: To be scored.
        keys: Of the run, see `trained_keys`.

    Raises:
        ManifestError: When the content of a film, or its patient, is among them.
    """
    of_patient, of_film = np.isin(_hashed_keys(films), keys).T
    if of_patient.any() or of_film.any():
        shown = [film.film_id for film, k in zip(films, of_patient | of_film, strict=True) if k]
        raise ManifestError(
            f"the run was trained on {int(of_film.sum()):,} of these {len(films):,} films, and on "
            f"patients of {int(of_patient.sum()):,}, such as {', '.join(shown[:N_EXAMPLES])}; "
            f"score films of other patients, or train on a split that leaves these out "
            f"(`mmclip data check` on all folders says more)"
        )
