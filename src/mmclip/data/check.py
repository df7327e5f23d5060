"""What splits and data sets share that they should not: patients, equal films, near-duplicates."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from mmclip.data.manifest import SPLITS, Film, ManifestError

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


def film_key(film: Film) -> str:
    """The content of a film: equal for equal files; of a study without a film, its id."""
    return film.image_sha256 or f"{film.source}/{film.film_id}"


KEYS = {"patients": patient_key, "films": film_key}


def find_overlaps(films: Sequence[Film], places: Sequence[str | None]) -> list[Overlap]:
    """The patients and equal films that are in two places at once.

    Args:
        films: A film may come several times, where a list puts it into several places.
        places: Of each film; None is no place.
    """
    order = list(dict.fromkeys(p for p in (*SPLITS, *places) if p is not None))
    found = []
    for what, key_of in KEYS.items():
        held: dict[str, dict[str, str]] = {place: {} for place in order}
        counts: dict[str, Counter[str]] = {place: Counter() for place in order}
        for film, place in zip(films, places, strict=True):
            if place is not None:
                key = key_of(film)
                held[place].setdefault(key, film.film_id)
                counts[place][key] += 1
        for first, second in combinations(order, 2):
            shared = sorted(held[first].keys() & held[second].keys())
            if shared:
                examples = [(held[first][key], held[second][key]) for key in shared[:N_EXAMPLES]]
                n_films = sum(counts[second][key] for key in shared)
                found.append(Overlap(what, (first, second), len(shared), n_films, tuple(examples)))
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
