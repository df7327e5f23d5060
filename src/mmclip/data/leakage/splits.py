"""Named splits of a data folder, hashed, and nested subsets of its training patients.

A split is a file of its own, split.json, that every command reads in place of the built one: images
need not be decoded again, samples.parquet stays as it was built, and one rename switches. The data
hash is that of the images in their new splits, so results on two splits never pass for one another.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmclip.data.folder import (
    ManifestError,
    last_split,
    read_built_meta,
    read_split,
    with_split,
    write_split,
)
from mmclip.data.ingest.sources import PATIENTS_UNKNOWN
from mmclip.data.leakage.check import (
    CHEAP,
    COLLECTIONS,
    collection_of,
    find_overlaps,
    has_own_id,
    near_keys,
    plain_patient_id,
)
from mmclip.data.leakage.split_lists import LISTED, read_lists, read_patients
from mmclip.data.manifest import data_hash, read_built
from mmclip.data.sample import BY_PEOPLE, PRESENT, SPLITS, RandomSplit, Sample, Split

NAMES = ("clean", "official", "physician", *LISTED)

PERCENTS = (100, 10, 1)
"""Of the training patients. Source: the fine-tuning protocol of GLoRIA, MedKLIP, MRM and BenchX."""


SUBSET_SEEDS = (0, 1, 2)
"""The seeds of the subsets that a split saves, and of the runs of a protocol.
[chosen: one list for both, so that what a protocol asks for is there; three seeds show a spread]"""


@dataclass(frozen=True)
class _Chosen:
    """Image ids by split, the facts that go with them, and what a user must know."""

    images: Mapping[Split, Sequence[str]]
    metadata: Mapping[str, object]
    said: Sequence[str] = ()


def set_split(
    folder: Path,
    name: str,
    how: RandomSplit | None = None,
    *,
    lists: Mapping[Split, Path] | None = None,
    patients: Path | None = None,
    near_duplicates: bool = False,
    subset_seeds: Sequence[int] = SUBSET_SEEDS,
) -> dict:
    """Sets a named split of a data folder; every command reads it from then on.

    Args:
        folder: As `mmclip data build` leaves it.
        name: One of NAMES.
        how: Of what is random; None for the defaults. `val_ratio` is of the groups of patients in
            `clean`, of those that may train in `physician`, and of those in train in `official`
            where the source has no validation part; `test_ratio` is of `clean` alone.
        lists: The list of each split, for LISTED names.
        patients: CSV with the columns image_id and patient_id, for data sets without patient ids.
        near_duplicates: Whether a random split keeps them together, beside images of equal bytes.
        subset_seeds: One set of 1 %, 10 % and 100 % of the training patients each.

    Returns:
        What was written to split.json.

    Raises:
        ManifestError: When the name is unknown, or a list or the source's own split is missing or
            another.
    """
    _check_name(name, bool(lists))
    how = how or RandomSplit()
    how = how if name == "clean" else replace(how, test_ratio=0.0)
    meta = read_built_meta(folder)
    image_size, resize = meta["image_size"], meta.get("resize", "squash")
    built = read_built(folder)
    mapped = {} if patients is None else read_patients(patients, built)
    samples = [replace(f, patient_id=mapped.get(f.image_id, f.patient_id)) for f in built]
    samples = [replace(f, patient_id=plain_patient_id(f)) for f in samples]
    mapped = {f.image_id: f.patient_id for f in samples if f.image_id in mapped}
    alike = near_keys(samples, [folder]) if near_duplicates and name not in LISTED else ()
    chosen = _choose(folder, name, samples, how, alike, lists or {})
    warnings = [*chosen.said, *_warnings(name, samples, chosen.images, bool(mapped))]
    if name not in LISTED:
        warnings += _said_of_links(samples, linked_apart(samples, how, alike))
    split = {
        "format": 2,
        "name": name,
        "seed": None,
        **chosen.metadata,
        **({"near_duplicates": near_duplicates} if "seed" in chosen.metadata else {}),
        "built_hash": data_hash(built, image_size, resize),
        "patients": mapped,
        "images": chosen.images,
        "split_hash": ids_hash(*(chosen.images.get(part, []) for part in SPLITS)),
        "warnings": warnings,
    }
    read = with_split(built, split)
    split["data_hash"] = data_hash(read, image_size, resize)
    return write_split(folder, {**split, **_counted(read, subset_seeds)})


def _counted(samples: Sequence[Sample], subset_seeds: Sequence[int]) -> dict[str, object]:
    """What a split holds, and the subsets of its training patients."""
    train = [sample for sample in samples if sample.split == "train"]
    return {
        "n_patients": len({sample.patient_id for sample in samples}),
        "splits": dict(sorted(Counter(f.split for f in samples if f.split).items())),
        "n_in_no_split": sum(sample.split is None for sample in samples),
        "subsets": {str(s): subsets_of(train, s) for s in subset_seeds},
    }


def _check_name(name: str, has_lists: bool) -> None:
    if name not in NAMES:
        raise ManifestError(f"there is no split {name!r}; the splits are {', '.join(NAMES)}")
    if (name in LISTED) != has_lists:
        raise ManifestError(
            f"split {name} is read from lists: give one a split, such as --list test=FILE"
            if name in LISTED
            else f"split {name} needs no list; leave --list out, or name one of {', '.join(LISTED)}"
        )


def _choose(
    folder: Path,
    name: str,
    samples: Sequence[Sample],
    how: RandomSplit,
    alike: Sequence[str | None],
    lists: Mapping[Split, Path],
) -> _Chosen:
    """Image ids by split, as the named one has them; arguments as for `set_split`."""
    if name in LISTED:
        images, facts = read_lists(name, samples, lists)
        return _Chosen(images, {"lists": facts})
    drawn: dict[str, object] = {"seed": how.seed, "val_ratio": how.val_ratio}
    if name == "clean":
        images = clean_split(samples, how, alike)
        return _Chosen(images, {**drawn, "test_ratio": how.test_ratio})
    if name == "physician":
        images = physician_split(samples, how, alike)
        n_left = len(samples) - sum(map(len, images.values()))
        said = (
            f"{n_left:,} images that no person labelled are of patients in test, so they are in no "
            f"split"
        )
        return _Chosen(images, drawn, [said])
    images = _official(folder, samples)
    if images["val"]:
        return _Chosen(images, {})
    n_train = len(images["train"])
    images = official_with_val(samples, how, alike)
    said = (
        f"the source has no validation images: {len(images['val']):,} of its {n_train:,} train "
        f"images are val, drawn by patient (seed {how.seed}, ratio {how.val_ratio:g})"
    )
    return _Chosen(images, drawn, [said])


def group_of(samples: Sequence[Sample], alike: Sequence[str | None] = ()) -> dict[str, str]:
    """The group of each patient: patients who share an image are one, with the least of their ids.

    Args:
        samples: Of a data folder.
        alike: A key of each image, equal for near-duplicates, None for an image without any.
    """
    parent = {sample.patient_id: sample.patient_id for sample in samples}

    def root(patient: str) -> str:
        while parent[patient] != patient:
            parent[patient] = parent[parent[patient]]
            patient = parent[patient]
        return patient

    owner: dict[str, str] = {}
    for keys in ([sample.image_sha256 for sample in samples], alike or [None] * len(samples)):
        for sample, key in zip(samples, keys, strict=True):
            if key is not None:
                pair = root(owner.setdefault(key, sample.patient_id)), root(sample.patient_id)
                parent[max(pair)] = min(pair)
    return {patient: root(patient) for patient in parent}


def linked_apart(
    samples: Sequence[Sample], how: RandomSplit, alike: Sequence[str | None] = ()
) -> list[tuple[str, ...]]:
    """Patients who share an image, and whom the draw would part if each were drawn alone.

    A data set that holds some of them, and not the image, draws those alone.

    Args:
        samples: Of a data folder.
        how: As for `clean_split`.
        alike: As for `group_of`.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for patient, name in group_of(samples, alike).items():
        members[name].append(patient)
    return [
        tuple(sorted(group))
        for group in members.values()
        if len({how.split_of(patient) for patient in group}) > 1
    ]


def _said_of_links(samples: Sequence[Sample], apart: Sequence[tuple[str, ...]]) -> list[str]:
    """What keeps the splits of two data sets of one collection from agreeing."""
    sources = {sample.source for sample in samples}
    collections = {COLLECTIONS.get(source, source) for source in sources}
    others = {s for pair in COLLECTIONS.items() if pair[1] in collections for s in pair} - sources
    if not apart or not others:
        return []
    return [
        f"{len(apart):,} groups of patients share an image and are drawn as one, such as "
        f"{' and '.join(apart[0])}; a folder of {' or '.join(sorted(others))} that holds some of "
        f"them alone may put those into another split, as no table of such patients is published: "
        f"give each group one id by --patients in all of these folders"
    ]


def clean_split(
    samples: Sequence[Sample], how: RandomSplit, alike: Sequence[str | None] = ()
) -> dict[Split, list[str]]:
    """Image ids by split: neither a patient nor the content of an image is in two.

    The draw depends on the seed and the group's name alone. So data sets of the same patients, with
    the same patient ids and seed, put each patient into the same split, but for patients who share
    an image that not all of the data sets hold: see `linked_apart`.

    Args:
        samples: Of a data folder.
        how: The ratios are of the groups of patients, see `group_of`.
        alike: As for `group_of`.
    """
    group = group_of(samples, alike)
    drawn: dict[str, Split | None] = {n: how.split_of(n) for n in set(group.values())}
    return _by_split((sample.image_id, drawn[group[sample.patient_id]]) for sample in samples)


def official_with_val(
    samples: Sequence[Sample], how: RandomSplit, alike: Sequence[str | None] = ()
) -> dict[Split, list[str]]:
    """Image ids by split: the source's test, and its train, of which a part is val.

    Args:
        samples: With the source's split, train or test.
        how: Its val_ratio is of the groups of patients in train, see `group_of`.
        alike: As for `group_of`.
    """
    group = group_of(samples, alike)
    without_test = replace(how, test_ratio=0.0)

    def split_of(sample: Sample) -> Split | None:
        if sample.split != "train":
            return sample.split
        return without_test.split_of(group[sample.patient_id])

    return _by_split((sample.image_id, split_of(sample)) for sample in samples)


def physician_split(
    samples: Sequence[Sample], how: RandomSplit, alike: Sequence[str | None] = ()
) -> dict[Split, list[str]]:
    """Image ids by split: test is what people labelled; of these patients, nothing else is used.

    The other images of a group with a test image are in no split: they would train on its patients.

    Args:
        samples: Of a data folder.
        how: Its val_ratio is of the groups without a test image.
        alike: As for `group_of`.

    Raises:
        ManifestError: When people labelled none of the images, or an image of every patient.
    """
    group = group_of(samples, alike)
    without_test = replace(how, test_ratio=0.0)
    test = {sample.image_id for sample in samples if sample.label_origin in BY_PEOPLE}
    tested = {group[sample.patient_id] for sample in samples if sample.image_id in test}
    if not test or tested == set(group.values()):
        which = "an image of every patient" if test else "no image"
        raise ManifestError(
            f"people labelled {which} of this folder ({' or '.join(BY_PEOPLE)} in the column "
            f"label_origin), so there is no split physician; take --name clean, or official"
        )

    def split_of(sample: Sample) -> Split | None:
        if sample.image_id in test:
            return "test"
        name = group[sample.patient_id]
        return None if name in tested else without_test.split_of(name)

    return _by_split((sample.image_id, split_of(sample)) for sample in samples)


def _by_split(given: Iterable[tuple[str, Split | None]]) -> dict[Split, list[str]]:
    """Image ids by split, of pairs of image id and split."""
    chosen: dict[Split, list[str]] = {part: [] for part in SPLITS}
    for image_id, part in given:
        if part is not None:
            chosen[part].append(image_id)
    return chosen


def _official(folder: Path, samples: Sequence[Sample]) -> dict[Split, list[str]]:
    """Image ids by split, as the source itself has them."""
    given = read_built_meta(folder).get("n_split_by_source")
    if given != len(samples):
        had = "the build did not note" if given is None else f"the source gives {given:,} of"
        raise ManifestError(
            f"{folder}: {had} {len(samples):,} images their split, so there is no official one; "
            f"build the folder again with the lists of the data set beside it (docs/data.md), or "
            f"take --name clean"
        )
    return _by_split((sample.image_id, sample.split) for sample in samples)


def _warnings(
    name: str, samples: Sequence[Sample], chosen: Mapping[Split, Sequence[str]], is_mapped: bool
) -> list[str]:
    """What a user of the split must know: leaks, repeats, unknown patients."""
    said = []
    by_id = {sample.image_id: sample for sample in samples}
    pairs = [(by_id[i], part) for part in SPLITS for i in chosen.get(part, ())]
    listed = [sample for sample, _ in pairs]
    sources = {sample.source for sample in samples}
    unknown = sorted(sources & PATIENTS_UNKNOWN.keys())
    # Where each image is a patient of its own, both would say the same.
    keys = CHEAP if is_mapped or len(unknown) < len(sources) else {"images": CHEAP["images"]}
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
            f"one, and images of one patient can be in two splits; give ids by --patients"
        )
    if strange := [f for f in samples if is_mapped and not has_own_id(f)]:
        said.append(
            f"--patients gives {len(strange):,} of {len(samples):,} images an id that "
            f"{collection_of(strange[0])}, whose images they are, does not have, such as "
            f"{strange[0].patient_id!r}; these match no patient of it, so whether a run on it has "
            f"seen them is not decidable (its ids are 1 to 30805, with or without leading zeros)"
        )
    return said


def ids_hash(*lists: Iterable[str]) -> str:
    """SHA-256 over some lists of ids, each in any order."""
    return hashlib.sha256(json.dumps([sorted(ids) for ids in lists]).encode()).hexdigest()


def subsets_of(train: Sequence[Sample], seed: int) -> dict[str, dict]:
    """100 %, 10 % and 1 % of the training patients, each within the one before.

    Args:
        train: The images of split train.
        seed: Of the draw.

    Returns:
        By percent: number of patients and images, hash, and the image ids (of 100 % none are
        listed: they are those of split train).
    """
    found: dict[str, set[str]] = defaultdict(set)
    for sample in train:
        present = (finding for finding, value in sample.labels.items() if value == PRESENT)
        found[sample.patient_id].update(present)
    patients, n_all = dict(found), len(found)
    subsets = {}
    for percent in PERCENTS:
        if percent < 100:
            kept = stratified(patients, min(max(1, round(n_all * percent / 100)), n_all), seed)
            patients = {patient: patients[patient] for patient in patients if patient in kept}
        ids = sorted(sample.image_id for sample in train if sample.patient_id in patients)
        subsets[str(percent)] = {
            "n_patients": len(patients),
            "n_images": len(ids),
            "hash": ids_hash(ids),
            "image_ids": ids if percent < 100 else None,
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
    """The image ids of a saved subset of the training patients.

    Raises:
        ManifestError: When none of this percentage and seed is saved.
    """
    split = read_split(folder)
    saved = {} if split is None else split["subsets"]
    try:
        ids = saved[str(seed)][str(percent)]["image_ids"]
    except LookupError:
        raise ManifestError(
            f"{folder} has no subset of {percent} % with seed {seed}; there are "
            f"{', '.join(map(str, PERCENTS))} % with seeds {', '.join(saved) or 'none'}; save "
            f"another by `mmclip data split --subset-seed {seed}`"
        ) from None
    assert split is not None
    if ids is None:
        return {i for i, part in last_split(split["images"]).items() if part == "train"}
    return set(ids)
