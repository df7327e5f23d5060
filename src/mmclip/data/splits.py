"""Named splits of a data folder, hashed, and nested subsets of its training patients.

A split is a file of its own, split.json, that every command reads in place of the built one: films
need not be decoded again, films.parquet stays as it was built, and one rename switches. The data
hash is that of the films in their new splits, so results on two splits never pass for one another.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmclip.data.check import CHEAP, find_overlaps, near_keys
from mmclip.data.folder import (
    ManifestError,
    last_split,
    read_built_meta,
    read_split,
    with_split,
    write_split,
)
from mmclip.data.manifest import data_hash, read_built
from mmclip.data.records import BY_PEOPLE, PRESENT, SPLITS, Film, Split, draw_split
from mmclip.data.sources import PATIENTS_UNKNOWN
from mmclip.data.split_lists import LISTED, read_lists, read_patients

NAMES = ("clean", "official", "physician", *LISTED)

PERCENTS = (100, 10, 1)
"""Of the training patients. Source: the fine-tuning protocol of GLoRIA, MedKLIP, MRM and BenchX."""


def set_split(
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    val_ratio: float = 0.1,
    test_ratio: float = 0.1,
    lists: Mapping[Split, Path] | None = None,
    patients: Path | None = None,
    near_duplicates: bool = False,
    subset_seeds: Sequence[int] = (0, 1, 2),
) -> dict:
    """Sets a named split of a data folder; every command reads it from then on.

    Args:
        folder: As `mmclip data build` leaves it.
        name: One of NAMES.
        seed: Of what is drawn.
        val_ratio: Of the groups of patients in `clean`, of those that may train in `physician`, and
            of those in train in `official` where the source has no validation part.
        test_ratio: Of `clean`, of the groups of patients.
        lists: The list of each split, for LISTED names.
        patients: CSV with the columns film_id and patient_id, for data sets without patient ids.
        near_duplicates: Whether the draw keeps them together, beside films of equal bytes.
        subset_seeds: One set of 1 %, 10 % and 100 % of the training patients each.

    Returns:
        What was written to split.json.

    Raises:
        ManifestError: When the name is unknown, a list or the source's own split is missing, or
            a list is not what it is given as.
    """
    if name not in NAMES:
        raise ManifestError(f"there is no split {name!r}; the splits are {', '.join(NAMES)}")
    if (name in LISTED) != bool(lists):
        raise ManifestError(
            f"split {name} is read from lists: give one a split, such as --list test=FILE"
            if name in LISTED
            else f"split {name} needs no list; leave --list out, or name one of {', '.join(LISTED)}"
        )
    film_px = read_built_meta(folder)["film_px"]
    built = read_built(folder)
    mapped = {} if patients is None else read_patients(patients, built)
    films = [replace(f, patient_id=mapped.get(f.film_id, f.patient_id)) for f in built]
    said: list[str] = []
    about: dict[str, object] = {}
    alike = near_keys(films, [folder]) if near_duplicates and name not in LISTED else ()
    drawn = {"seed": seed, "val_ratio": val_ratio, "near_duplicates": near_duplicates}
    if name in LISTED:
        chosen, about["lists"] = read_lists(name, films, lists or {})
    elif name == "clean":
        chosen = clean_split(films, seed, val_ratio, test_ratio, alike)
        about = {**drawn, "test_ratio": test_ratio}
    elif name == "physician":
        chosen, about = physician_split(films, seed, val_ratio, alike), drawn
        n_left = len(films) - sum(map(len, chosen.values()))
        said.append(
            f"{n_left:,} films that no person labelled are of patients in test, so they are in no "
            f"split"
        )
    else:
        chosen = _official(folder, films)
        if not chosen["val"]:
            n_train = len(chosen["train"])
            chosen, about = official_with_val(films, seed, val_ratio, alike), drawn
            said.append(
                f"the source has no validation films: {len(chosen['val']):,} of its {n_train:,} "
                f"train films are val, drawn by patient (seed {seed}, ratio {val_ratio:g})"
            )
    split = {
        "format": 1,
        "name": name,
        "seed": None,
        **about,
        "built_hash": data_hash(built, film_px),
        "patients": mapped,
        "films": chosen,
        "split_hash": ids_hash(*(chosen.get(part, []) for part in SPLITS)),
        "warnings": said + _warnings(name, films, chosen, bool(mapped)),
    }
    read = with_split(built, split)
    split["data_hash"] = data_hash(read, film_px)
    split["n_patients"] = len({film.patient_id for film in read})
    split["splits"] = dict(sorted(Counter(f.split for f in read if f.split).items()))
    split["n_in_no_split"] = sum(film.split is None for film in read)
    train = [film for film in read if film.split == "train"]
    split["subsets"] = {str(s): subsets_of(train, s) for s in subset_seeds}
    return write_split(folder, split)


def group_of(films: Sequence[Film], alike: Sequence[str | None] = ()) -> dict[str, str]:
    """The group of each patient: patients who share a film are one, with the least of their ids.

    Args:
        films: Of a data folder.
        alike: A key of each film, equal for near-duplicates, None for a film without any.
    """
    parent = {film.patient_id: film.patient_id for film in films}

    def root(patient: str) -> str:
        while parent[patient] != patient:
            parent[patient] = parent[parent[patient]]
            patient = parent[patient]
        return patient

    owner: dict[str, str] = {}
    for keys in ([film.image_sha256 for film in films], alike or [None] * len(films)):
        for film, key in zip(films, keys, strict=True):
            if key is not None:
                pair = root(owner.setdefault(key, film.patient_id)), root(film.patient_id)
                parent[max(pair)] = min(pair)
    return {patient: root(patient) for patient in parent}


def clean_split(
    films: Sequence[Film],
    seed: int,
    val_ratio: float,
    test_ratio: float,
    alike: Sequence[str | None] = (),
) -> dict[Split, list[str]]:
    """Film ids by split: neither a patient nor the content of a film is in two.

    The draw depends on the seed and the group's name alone. So data sets of the same patients, with
    the same patient ids and seed, put each patient into the same split.

    Args:
        films: Of a data folder.
        seed: Of the draw.
        val_ratio: Of the groups of patients, see `group_of`.
        test_ratio: Of the groups.
        alike: As for `group_of`.
    """
    group = group_of(films, alike)
    drawn: dict[str, Split] = {
        name: draw_split(name, seed, val_ratio, test_ratio) for name in set(group.values())
    }
    return _by_split((film.film_id, drawn[group[film.patient_id]]) for film in films)


def official_with_val(
    films: Sequence[Film], seed: int, val_ratio: float, alike: Sequence[str | None] = ()
) -> dict[Split, list[str]]:
    """Film ids by split: the source's test, and its train, of which a part is val.

    Args:
        films: With the source's split, train or test.
        seed: Of the draw, as for `clean_split`.
        val_ratio: Of the groups of patients in train, see `group_of`.
        alike: As for `group_of`.
    """
    group = group_of(films, alike)

    def split_of(film: Film) -> Split | None:
        if film.split != "train":
            return film.split
        return draw_split(group[film.patient_id], seed, val_ratio, 0.0)

    return _by_split((film.film_id, split_of(film)) for film in films)


def physician_split(
    films: Sequence[Film], seed: int, val_ratio: float, alike: Sequence[str | None] = ()
) -> dict[Split, list[str]]:
    """Film ids by split: test is what people labelled; of these patients, nothing else is used.

    The other films of a group with a test film are in no split: they would train on its patients.

    Args:
        films: Of a data folder.
        seed: Of the draw, as for `clean_split`.
        val_ratio: Of the groups without a test film.
        alike: As for `group_of`.

    Raises:
        ManifestError: When people labelled none of the films, or a film of every patient.
    """
    group = group_of(films, alike)
    test = {film.film_id for film in films if film.label_origin in BY_PEOPLE}
    tested = {group[film.patient_id] for film in films if film.film_id in test}
    if not test or tested == set(group.values()):
        which = "a film of every patient" if test else "no film"
        raise ManifestError(
            f"people labelled {which} of this folder ({' or '.join(BY_PEOPLE)} in the column "
            f"label_origin), so there is no split physician; take --name clean, or official"
        )

    def split_of(film: Film) -> Split | None:
        if film.film_id in test:
            return "test"
        name = group[film.patient_id]
        return None if name in tested else draw_split(name, seed, val_ratio, 0.0)

    return _by_split((film.film_id, split_of(film)) for film in films)


def _by_split(given: Iterable[tuple[str, Split | None]]) -> dict[Split, list[str]]:
    """Film ids by split, of pairs of film id and split."""
    chosen: dict[Split, list[str]] = {part: [] for part in SPLITS}
    for film_id, part in given:
        if part is not None:
            chosen[part].append(film_id)
    return chosen


def _official(folder: Path, films: Sequence[Film]) -> dict[Split, list[str]]:
    """Film ids by split, as the source itself has them."""
    given = read_built_meta(folder).get("n_split_by_source")
    if given != len(films):
        had = "the build did not note" if given is None else f"the source gives {given:,} of"
        raise ManifestError(
            f"{folder}: {had} {len(films):,} films their split, so there is no official one; "
            f"build the folder again with the lists of the data set beside it (docs/data.md), or "
            f"take --name clean"
        )
    return _by_split((film.film_id, film.split) for film in films)


def _warnings(
    name: str, films: Sequence[Film], chosen: Mapping[Split, Sequence[str]], is_mapped: bool
) -> list[str]:
    """What a user of the split must know: leaks, repeats, unknown patients."""
    said = []
    by_id = {film.film_id: film for film in films}
    pairs = [(by_id[i], part) for part in SPLITS for i in chosen.get(part, ())]
    listed = [film for film, _ in pairs]
    sources = {film.source for film in films}
    unknown = sorted(sources & PATIENTS_UNKNOWN.keys())
    # Where each film is a patient of its own, both would say the same.
    keys = CHEAP if is_mapped or len(unknown) < len(sources) else {"films": CHEAP["films"]}
    overlaps = find_overlaps(listed, [part for _, part in pairs], keys)
    said += [str(overlap) for overlap in overlaps]
    if name.startswith("legacy-"):
        said.insert(
            0,
            f"{name} is kept to compare with published numbers alone; "
            + ("it leaks:" if overlaps else "no leak is found in this folder"),
        )
    if unknown and not is_mapped:
        said.append(
            f"patients unknown in {', '.join(unknown)}: a {PATIENTS_UNKNOWN[unknown[0]]} counts as "
            f"one, and films of one patient can be in two splits; give ids by --patients"
        )
    return said


def ids_hash(*lists: Iterable[str]) -> str:
    """SHA-256 over some lists of ids, each in any order."""
    return hashlib.sha256(json.dumps([sorted(ids) for ids in lists]).encode()).hexdigest()


def subsets_of(train: Sequence[Film], seed: int) -> dict[str, dict]:
    """100 %, 10 % and 1 % of the training patients, each within the one before.

    Args:
        train: The films of split train.
        seed: Of the draw.

    Returns:
        By percent: number of patients and films, hash, and the film ids (of 100 % none are listed:
        they are those of split train).
    """
    found: dict[str, set[str]] = defaultdict(set)
    for film in train:
        present = (finding for finding, value in film.labels.items() if value == PRESENT)
        found[film.patient_id].update(present)
    patients, n_all = dict(found), len(found)
    subsets = {}
    for percent in PERCENTS:
        if percent < 100:
            kept = stratified(patients, min(max(1, round(n_all * percent / 100)), n_all), seed)
            patients = {patient: patients[patient] for patient in patients if patient in kept}
        ids = sorted(film.film_id for film in train if film.patient_id in patients)
        subsets[str(percent)] = {
            "n_patients": len(patients),
            "n_films": len(ids),
            "hash": ids_hash(ids),
            "film_ids": ids if percent < 100 else None,
        }
    return subsets


def stratified(findings: Mapping[str, Iterable[str]], n_kept: int, seed: int) -> set[str]:
    """Some of the patients, with each finding about as often as among all.

    Findings are dealt from the rarest on: of the patients with it who are not dealt yet, as many
    are kept as its share still lacks; patients without a finding fill up.

    Args:
        findings: Of each patient.
        n_kept: How many stay, exactly.
        seed: Patients are taken in the order of a hash of seed and id.

    Source: iterative stratification with two folds, Sechidis et al., ECML PKDD 2011.
    """
    order = sorted(findings, key=lambda p: hashlib.sha256(f"subset/{seed}/{p}".encode()).digest())
    having: dict[str, list[str]] = defaultdict(list)
    for patient in order:
        for finding in findings[patient]:
            having[finding].append(patient)
    ratio = n_kept / max(1, len(findings))
    lacking = {finding: len(patients) * ratio for finding, patients in having.items()}
    dealt: set[str] = set()
    kept: set[str] = set()

    def keep(patient: str) -> None:
        kept.add(patient)
        for finding in findings[patient]:
            lacking[finding] -= 1

    for finding in sorted(having, key=lambda f: (len(having[f]), f)):
        for patient in having[finding]:
            if patient not in dealt:
                dealt.add(patient)
                if lacking[finding] >= 0.5 and len(kept) < n_kept:
                    keep(patient)
    for patients in ([p for p in order if p not in dealt], order):
        for patient in patients:
            if len(kept) < n_kept and patient not in kept:
                keep(patient)
    return kept


def read_subset(folder: Path, percent: int, seed: int) -> set[str]:
    """The film ids of a saved subset of the training patients.

    Raises:
        ManifestError: When none of this percentage and seed is saved.
    """
    split = read_split(folder)
    saved = {} if split is None else split["subsets"]
    try:
        ids = saved[str(seed)][str(percent)]["film_ids"]
    except LookupError:
        raise ManifestError(
            f"{folder} has no subset of {percent} % with seed {seed}; there are "
            f"{', '.join(map(str, PERCENTS))} % with seeds {', '.join(saved) or 'none'}; save "
            f"another by `mmclip data split --subset-seed {seed}`"
        ) from None
    assert split is not None
    if ids is None:
        return {i for i, part in last_split(split["films"]).items() if part == "train"}
    return set(ids)
