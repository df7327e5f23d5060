"""Named splits of a data folder, hashed, and nested subsets of its training patients.

A split is a file of its own, split.json, that every command reads in place of the built one: films
need not be decoded again, films.parquet stays as it was built, and one rename switches. The data
hash is that of the films in their new splits, so results on two splits never pass for one another.
"""

import csv
import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os.path import splitext
from pathlib import Path

from mmclip.data.check import CHEAP, find_overlaps, near_keys
from mmclip.data.manifest import (
    PRESENT,
    SPLIT_FILE,
    SPLITS,
    Film,
    ManifestError,
    Split,
    data_hash,
    draw_split,
    last_split,
    read_built,
    read_built_meta,
    read_split,
    split_checksum,
    with_split,
    write_text_atomic,
)
from mmclip.data.sources import PATIENTS_UNKNOWN

logger = logging.getLogger(__name__)

LISTED = ("benchx", "legacy-mavl", "legacy-mrm")
NAMES = ("clean", "official", *LISTED)

PERCENTS = (100, 10, 1)
"""Of the training patients. Source: the fine-tuning protocol of GLoRIA, MedKLIP, MRM and BenchX."""

KNOWN_LISTS = {
    "2b054bde4683e2bb08a7abad364c1b77": "legacy-mrm chestxray14 train",
    "ef239d3493893aba431c39a9aa5c57e9": "legacy-mrm chestxray14 val",
    "4333f58bed6d26bd974d825f6ee78a48": "legacy-mrm chestxray14 test",
    "b55fb21274da61b27a6d9bb2db2dba01": "legacy-mrm rsna train",
    "fd629d6e267a625d36faa5070acdbd0a": "legacy-mrm rsna val",
    "e1bf25b53eabde6986281523a13b10f2": "legacy-mrm rsna test",
    "07cdba4db9f4e05c3fe34ef751f714bc": "legacy-mrm siim train",
    "fc360c9b742ebb65fb5737e541d578b4": "legacy-mrm siim val",
    "e193c82800510ba03b77745a43411aba": "legacy-mrm siim test",
    "2a8716959bc5f914e1c71f3a908f16bd": "legacy-mrm chexpert val",
    "fbbd74514942cbf354f4d12807b32406": "legacy-mrm chexpert test",
    "464c08be8bc0fa209527bef9956c468a": "legacy-mavl siim train",
    "415b44e29747acd13222908496832cbb": "legacy-mavl siim val",
    "397a3cd86a6e5e7910848c38c73a1af4": "legacy-mavl siim test",
    "8630418436ff53a049e2d30e22b1e4df": "legacy-mavl rsna val",
    "edeb08ee39f3c647756838f477963fdf": "legacy-mavl rsna test",
    "21adb6ba1878297b962b9bc43d743856": "legacy-mavl covidx train",
    "1ce5801af10ce05baaaea30fc49aa63e": "legacy-mavl covidx val",
    "ee09a8f05ab7aa410953a61da6041d82": "legacy-mavl covidx test",
    "2bddda3c49beccc594e073d322c3b11e": "legacy-mavl chestxray14 val",
    "5676a62ba7edced5c82fb95bd5aec8d0": "legacy-mavl chestxray14 test",
    "0531ae8244cb5fe8d4abb627ee286a69": "legacy-mavl chestxray14 test",
    "035fed235a5931554c1fccaa096c9e2b": "benchx chestxray14 train",
    "48fff6634cc3e4294ab836b9d84bb1b3": "benchx chestxray14 val",
    "536637d62365936ef2cbd296e2de11a9": "benchx chestxray14 test",
    "887236661d0044bef38133c9ba440df1": "benchx rsna train",
    "f21237e5f2546b33976381033572d6f7": "benchx rsna val",
    "48394d681ab052ec5ca60c773a589123": "benchx rsna test",
    "66b66b47c0ab368454aab66d34ce0aa7": "benchx siim train",
    "3740ddc604f8579604d5017d05c8ff1f": "benchx siim val",
    "cb4b5c7b6722235a45f548667f20e560": "benchx siim test",
    "9a38946064dd0bb645a5840545accbd1": "benchx vindr train",
    "d1b7075628d0191d56582a68838bae88": "benchx vindr val",
    "a9566d4f6a2d6a7cf3c65a6525889122": "benchx vindr test",
    "bb5f3a1bf3457a9872db32dae066ec8c": "benchx covidx train",
    "c6e7bafe208c3a8195f104d9546699b3": "benchx covidx val",
    "e76ce6efb57f44ca7c180b2ececd8132": "benchx covidx test",
}
"""What each published list is, by half of the SHA-256 of its bytes without carriage returns.

Source: the repositories RL4M/MRM-pytorch (DatasetsSplits/), HieuPhan33/CVPR2024_MAVL (data/) and
yangzhou12/BenchX (preprocess/datasets/). The lists themselves are never shipped.
"""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm", ".dicom"}


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
        seed: Of `clean`.
        val_ratio: Of `clean`, of the groups of patients.
        test_ratio: Of `clean`, of the groups of patients.
        lists: The list of each split, for LISTED names.
        patients: CSV with the columns film_id and patient_id, for data sets without patient ids.
        near_duplicates: Whether `clean` keeps them together, beside films of equal bytes.
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
    about: dict[str, object] = {}
    if name == "clean":
        alike = near_keys(films, [folder]) if near_duplicates else ()
        chosen = clean_split(films, seed, val_ratio, test_ratio, alike)
        about = {
            "val_ratio": val_ratio,
            "test_ratio": test_ratio,
            "near_duplicates": near_duplicates,
        }
    elif name == "official":
        chosen = _official(folder, films)
    else:
        chosen, about["lists"] = _listed(name, films, lists or {})
    split = {
        "format": 1,
        "name": name,
        "seed": seed if name == "clean" else None,
        **about,
        "built_hash": data_hash(built, film_px),
        "patients": mapped,
        "films": chosen,
        "split_hash": ids_hash(*(chosen.get(part, []) for part in SPLITS)),
        "warnings": _warnings(name, films, chosen, bool(mapped)),
    }
    read = with_split(built, split)
    split["data_hash"] = data_hash(read, film_px)
    split["n_patients"] = len({film.patient_id for film in read})
    split["splits"] = dict(sorted(Counter(f.split for f in read if f.split).items()))
    split["n_in_no_split"] = sum(film.split is None for film in read)
    train = [film for film in read if film.split == "train"]
    split["subsets"] = {str(s): subsets_of(train, s) for s in subset_seeds}
    split["sha256"] = split_checksum(split)
    write_text_atomic(folder / SPLIT_FILE, json.dumps(split, ensure_ascii=False) + "\n")
    return split


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
    """
    group = group_of(films, alike)
    drawn: dict[str, Split] = {
        name: draw_split(name, seed, val_ratio, test_ratio) for name in set(group.values())
    }
    chosen: dict[Split, list[str]] = {part: [] for part in SPLITS}
    for film in films:
        chosen[drawn[group[film.patient_id]]].append(film.film_id)
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
    chosen: dict[Split, list[str]] = {part: [] for part in SPLITS}
    for film in films:
        assert film.split is not None
        chosen[film.split].append(film.film_id)
    return chosen


def _listed(
    name: str, films: Sequence[Film], lists: Mapping[Split, Path]
) -> tuple[dict[Split, list[str]], dict[str, dict]]:
    """Film ids by split as lists have them, a film perhaps in several, and facts of each list."""
    chosen: dict[Split, list[str]] = {}
    about: dict[str, dict] = {}
    for part, path in sorted(lists.items()):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ManifestError(f"--list {part}={path} cannot be read ({error})") from None
        sha256 = list_sha256(content)
        is_known = _is_known(name, part, path, sha256, {film.source for film in films})
        found, n_rows = match_list(content.decode("utf-8", "replace"), films)
        n_films = len(set(found))
        if not n_films:
            raise ManifestError(
                f"--list {part}={path}: none of its {n_rows:,} rows names a film of this folder, "
                f"such as {films[0].film_id!r}; give the list of this data set"
            )
        chosen[part] = list(dict.fromkeys(found))
        about[part] = {
            "file": path.name, "sha256": sha256, "is_known": is_known, "n_rows": n_rows,
            "n_rows_found": len(found), "n_films": n_films,
        }  # fmt: skip
    return chosen, about


def list_sha256(content: bytes) -> str:
    """SHA-256 of a list without carriage returns, which git may add or take away."""
    return hashlib.sha256(content.replace(b"\r", b"")).hexdigest()


def _is_known(name: str, part: str, path: Path, sha256: str, sources: set[str]) -> bool:
    """Whether this is the published list; an error where it is another, or was changed."""
    wanted = {f"{name} {source} {part}" for source in sources}
    what = KNOWN_LISTS.get(sha256[:32])
    if what is not None and what not in wanted:
        raise ManifestError(
            f"--list {part}={path} is known as {what}, and was given as {part} of {name} for "
            f"{', '.join(sorted(sources))}; give it as what it is"
        )
    expected = [key for key, known in KNOWN_LISTS.items() if known in wanted]
    if what is None and expected:
        raise ManifestError(
            f"--list {part}={path} has SHA-256 {sha256[:32]}..., the published list has "
            f"{' or '.join(expected)}...; download it again"
        )
    if what is None:
        logger.warning("%s: SHA-256 %s is not known for %s", path, sha256, name)
    return what is not None


def match_list(text: str, films: Sequence[Film]) -> tuple[list[str], int]:
    """The films that the rows of a list name, in order and with repeats, and the number of rows.

    A row is read as CSV where the first one has a comma, else split at blanks; the column is the
    one that names most films, the first of several. A path names the film whose id is its end, with
    or without a suffix. A header is a row that names none.
    """
    known: dict[str, str] = {}
    for film in films:
        known[film.film_id] = film.film_id
        known.setdefault(_without_suffix(film.film_id), film.film_id)
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and "," in lines[0]:
        csv.field_size_limit(1 << 24)  # the masks of a film stand in one field
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    else:
        rows = [line.split() for line in lines]
    best: list[str] = []
    for column in range(max(map(len, rows), default=0)):
        names = (_named(row[column], known) for row in rows if column < len(row))
        found = [film_id for film_id in names if film_id is not None]
        best = max(best, found, key=len)
    return best, len(rows)


def _named(path: str, known: Mapping[str, str]) -> str | None:
    parts = _without_suffix(path).strip("/").split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return known.get(path) or next((known[end] for end in ends if end in known), None)


def _without_suffix(path: str) -> str:
    stem, suffix = splitext(path)
    return stem if suffix.lower() in _SUFFIXES else path


def read_patients(path: Path, films: Sequence[Film]) -> dict[str, str]:
    """Patient ids by film id, of a CSV with the columns film_id and patient_id.

    Raises:
        ManifestError: When it cannot be read, lacks a column or a film, or names a film twice.
    """
    try:
        rows = list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"--patients {path} cannot be read ({error})") from None
    if not rows or not {"film_id", "patient_id"} <= rows[0].keys():
        raise ManifestError(f"--patients {path} needs the columns film_id,patient_id, and rows")
    known: dict[str, str] = {}
    for row in rows:
        film_id, patient = row["film_id"] or "", row["patient_id"] or ""
        if not patient.strip() or known.setdefault(film_id, patient) != patient:
            raise ManifestError(
                f"--patients {path}: film {film_id!r} has no patient, or two; one row a film"
            )
    if missing := [film.film_id for film in films if film.film_id not in known]:
        raise ManifestError(
            f"--patients {path} names no patient for {len(missing):,} of {len(films):,} films, "
            f"such as {missing[0]!r}; add them"
        )
    return {film.film_id: known[film.film_id] for film in films}


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
