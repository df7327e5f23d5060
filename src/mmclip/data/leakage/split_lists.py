"""Published lists of splits, told by their hash and read by the images that their rows name.

The lists are never shipped: a user gives the files.
"""

import csv
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from os.path import splitext
from pathlib import Path

from mmclip.data.folder import ManifestError
from mmclip.data.sample import Sample, Split

logger = logging.getLogger(__name__)

LISTED = ("benchx", "legacy-mavl", "legacy-mrm")
"""The splits that are read from lists."""

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


def read_lists(
    name: str, samples: Sequence[Sample], lists: Mapping[Split, Path]
) -> tuple[dict[Split, list[str]], dict[str, dict]]:
    """Image ids by split as lists have them, an image perhaps in several, and facts of each
    list."""
    chosen: dict[Split, list[str]] = {}
    metadata: dict[str, dict] = {}
    for part, path in sorted(lists.items()):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ManifestError(f"--list {part}={path} cannot be read ({error})") from None
        sha256 = list_sha256(content)
        is_known = _is_known(name, part, path, sha256, {sample.source for sample in samples})
        found, n_rows = match_list(content.decode("utf-8-sig", "replace"), samples)
        n_images = len(set(found))
        if not n_images:
            raise ManifestError(
                f"--list {part}={path}: none of its {n_rows:,} rows names an image of this folder, "
                f"such as {samples[0].image_id!r}; give the list of this data set"
            )
        chosen[part] = list(dict.fromkeys(found))
        metadata[part] = {
            "file": path.name, "sha256": sha256, "is_known": is_known, "n_rows": n_rows,
            "n_rows_found": len(found), "n_images": n_images,
        }  # fmt: skip
    return chosen, metadata


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


def match_list(text: str, samples: Sequence[Sample]) -> tuple[list[str], int]:
    """The images that the rows of a list name, in order and with repeats, and the number of rows.

    A row is read as CSV where the first one has a comma, else split at blanks; the column is the
    one that names most images, the first of several. A path names the image whose id is its end,
    with or without a suffix. A header is a row that names none.
    """
    known: dict[str, str] = {}
    for sample in samples:
        known[sample.image_id] = sample.image_id
        known.setdefault(_without_suffix(sample.image_id), sample.image_id)
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and "," in lines[0]:
        csv.field_size_limit(1 << 24)  # the masks of an image stand in one field
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    else:
        rows = [line.split() for line in lines]
    best: list[str] = []
    for column in range(max(map(len, rows), default=0)):
        names = (_named(row[column], known) for row in rows if column < len(row))
        found = [image_id for image_id in names if image_id is not None]
        best = max(best, found, key=len)
    return best, len(rows)


def _named(path: str, known: Mapping[str, str]) -> str | None:
    parts = _without_suffix(path).strip("/").split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return known.get(path) or next((known[end] for end in ends if end in known), None)


def _without_suffix(path: str) -> str:
    stem, suffix = splitext(path)
    return stem if suffix.lower() in _SUFFIXES else path


def read_patients(path: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """Patient ids by image id, of a CSV with the columns image_id and patient_id.

    An image id that lost its leading zeros in a spreadsheet is found without them, where no other
    image of the folder has it so.

    Raises:
        ManifestError: When it cannot be read, lacks a column or an image, names an image twice, or
            names none of the folder's.
    """
    try:
        rows = list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"--patients {path} cannot be read ({error})") from None
    if not rows or not {"image_id", "patient_id"} <= rows[0].keys():
        raise ManifestError(f"--patients {path} needs the columns image_id,patient_id, and rows")
    known: dict[str, str] = {}
    for row in rows:
        image_id, patient = row["image_id"] or "", row["patient_id"] or ""
        if not patient.strip() or known.setdefault(image_id, patient) != patient:
            raise ManifestError(
                f"--patients {path}: image {image_id!r} has no patient, or two; one row per image"
            )
    n_bare = Counter(_without_zeros(sample.image_id) for sample in samples)
    bare = {_without_zeros(image_id): patient for image_id, patient in known.items()}
    found: dict[str, str] = {}
    for image_id in (sample.image_id for sample in samples):
        without = _without_zeros(image_id)
        if image_id in known or (without in bare and n_bare[without] == 1):
            found[image_id] = known.get(image_id) or bare[without]
    if samples and not found:
        raise ManifestError(
            f"--patients {path}: none of its image ids, such as {next(iter(known))!r}, is one of "
            f"this folder's, such as {samples[0].image_id!r}, with or without leading zeros; give "
            f"the ids that the folder's samples.parquet has"
        )
    if missing := [sample.image_id for sample in samples if sample.image_id not in found]:
        raise ManifestError(
            f"--patients {path} names no patient for {len(missing):,} of {len(samples):,} images, "
            f"such as {missing[0]!r}; add them"
        )
    return found


def _without_zeros(image_id: str) -> str:
    return image_id.lstrip("0")
