"""What a run trained on, in its folder, so that nothing of it is scored later.

    trained_on.npy       keyed hashes of patients and of file contents
    trained_looks.npy    perceptual hashes of the images, enciphered
    private.key          the secret of both; a run is shared without it

Without the key, neither file says whether a patient or an image is among what trained: ids of a
public data set cannot be tried out one by one. Whoever has the key can do so.
"""

import hashlib
import io
import logging
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt16, UInt64

from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.leakage.check import (
    N_EXAMPLES,
    collection_of,
    content_key,
    has_own_id,
    patient_key,
)
from mmclip.data.leakage.duplicates import (
    CHUNKS,
    SIDE,
    SURE_DISTANCE,
    hash_in_blocks,
    near_any,
    read_hashes,
)
from mmclip.data.sample import Sample
from mmclip.files import file_sha256, write_atomic

logger = logging.getLogger(__name__)

TRAINED_FILE, LOOKS_FILE, KEY_FILE = "trained_on.npy", "trained_looks.npy", "private.key"


@dataclass(frozen=True)
class Trained:
    """What a run trained on, as far as its files say.

    Attributes:
        keys: Keyed hashes, sorted; see `trained_keys`.
        looks: One row per distinct perceptual hash; None where the images are too small for one.
        collections: Where the images come from; True where all patients have the collection's ids.
        secret: What the hashes are keyed by.
    """

    keys: UInt64[np.ndarray, " k"]
    looks: UInt16[np.ndarray, "n 16"] | None
    collections: Mapping[str, bool]
    secret: bytes


def trained_keys(samples: Sequence[Sample], secret: bytes) -> UInt64[np.ndarray, " k"]:
    """Patients and contents of images that train, sorted: 16 bytes an image, and no id among them.

    Two of a million keys are equal by chance once in 40 million runs.

    Args:
        samples: That train.
        secret: Without it no key can be made of an id.
    """
    return np.unique(_hashed_keys(samples, secret))


def _hashed_keys(samples: Sequence[Sample], secret: bytes) -> UInt64[np.ndarray, "n 2"]:
    """Patient and content of each image, as keyed hashes."""

    def number(what: str, key: str) -> int:
        digest = hashlib.blake2b(f"{what}:{key}".encode(), digest_size=8, key=secret)
        return int.from_bytes(digest.digest(), "big")

    return np.array(
        [[number("patient", patient_key(f)), number("image", content_key(f))] for f in samples],
        np.uint64,
    ).reshape(-1, 2)


def looks_of(
    dataset: ImageTextDataset,
) -> tuple[UInt16[np.ndarray, "n 16"], Bool[np.ndarray, " r"]]:
    """The perceptual hash of each image that has one, and which rows these are.

    Images smaller than 16 px have none, nor have reports without an image. The hashes of a data
    folder are made once and lie there.
    """
    has_look = np.zeros(len(dataset), bool)
    found = np.zeros((len(dataset), CHUNKS), np.uint16)
    for number, cache in enumerate(dataset.caches):
        if cache is None or cache.images.shape[1] < SIDE:
            continue
        is_here = (dataset.where[:, 0] == number) & (dataset.where[:, 1] >= 0)
        if not is_here.any():
            continue
        stored = hash_in_blocks(cache.images) if cache.folder is None else read_hashes(cache.folder)
        found[is_here] = stored[dataset.where[is_here, 1]]
        has_look |= is_here
    return found[has_look], has_look


def collections_of(samples: Iterable[Sample]) -> dict[str, bool]:
    """The collections of some images; True where all patients have the collection's own ids."""
    found: dict[str, bool] = {}
    for sample in samples:
        name = collection_of(sample)
        found[name] = found.get(name, True) and has_own_id(sample)
    return dict(sorted(found.items()))


def write_trained(folder: Path, dataset: ImageTextDataset) -> dict[str, str]:
    """Leaves what trains in the folder of a run, under a new key.

    Returns:
        The SHA-256 of each file but the key, by name.
    """
    secret = secrets.token_bytes(32)
    key_file = folder / KEY_FILE
    with write_atomic(key_file) as file:
        file.write(secret.hex().encode() + b"\n")
    key_file.chmod(0o600)
    with write_atomic(folder / TRAINED_FILE) as file:
        np.save(file, trained_keys(dataset.samples, secret))
    looks, _ = looks_of(dataset)
    with write_atomic(folder / LOOKS_FILE) as file:
        np.save(file, _enciphered(np.unique(looks, axis=0), secret))
    return {name: file_sha256(folder / name) for name in (TRAINED_FILE, LOOKS_FILE, KEY_FILE)}


def read_trained(folder: Path, collections: Mapping[str, bool]) -> Trained | None:
    """What `write_trained` left, once the caller has checked the files; None without the key.

    Raises:
        ManifestError: When the key is damaged.
    """
    path = folder / KEY_FILE
    if not path.is_file():
        return None
    text = path.read_text("utf-8", errors="replace").strip()
    if re.fullmatch(r"[0-9a-f]{64}", text) is None:
        raise ManifestError(
            f"{path} is damaged: it holds no key of 64 digits; put the key of this run back, or "
            f"remove the file to go on without a check of what trained"
        )
    secret = bytes.fromhex(text)
    looks = _enciphered(_array(folder / LOOKS_FILE), secret)
    return Trained(
        _array(folder / TRAINED_FILE), looks if len(looks) else None, collections, secret
    )


def _array(path: Path) -> np.ndarray:
    return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)


def _enciphered(looks: UInt16[np.ndarray, "n 16"], secret: bytes) -> UInt16[np.ndarray, "n 16"]:
    """Looks under a key stream, and of enciphered ones the looks themselves.

    Source: SHAKE-256 as a stream cipher (FIPS 202); a key enciphers one table.
    """
    stream = hashlib.shake_256(b"looks" + secret).digest(looks.size * 2)
    return looks ^ np.frombuffer(stream, "<u2").reshape(looks.shape).astype(np.uint16)


class TrainedError(ManifestError):
    """Images that would be scored have trained; `counts` says how many, without an id."""

    def __init__(self, counts: str, image_ids: Sequence[str]) -> None:
        self.counts = counts
        super().__init__(
            f"{counts}, such as {', '.join(image_ids)}; score images of other patients, or train "
            f"on a split that leaves these out (`mmclip data check` on all folders says more)"
        )


CLEAN = "no image and no patient of these was trained on"

UNDECIDED = "not decidable"
"""How the verdict of a check starts that cannot be made."""


def refuse_trained(dataset: ImageTextDataset, trained: Trained) -> str:
    """Stops before images are scored that a run was trained on.

    Args:
        dataset: To be scored.
        trained: By the run.

    Returns:
        What was found, for results: that none trained, or that it is not decidable.

    Raises:
        TrainedError: When the content of an image, its look or its patient trained.
    """
    samples = dataset.samples
    of_patient, of_image = np.isin(_hashed_keys(samples, trained.secret), trained.keys).T
    looks, has_look = looks_of(dataset)
    of_look = np.zeros(len(samples), bool)
    if trained.looks is not None:
        of_look[has_look] = near_any(looks, trained.looks, SURE_DISTANCE)
    if (found := of_patient | of_image | of_look).any():
        counts = (
            f"the run was trained on {int((of_image | of_look).sum()):,} of these "
            f"{len(samples):,} images ({int((of_look & ~of_image).sum()):,} as another file that "
            f"looks the same), and on patients of {int(of_patient.sum()):,}"
        )
        shown = [sample.image_id for sample, k in zip(samples, found, strict=True) if k]
        raise TrainedError(counts, shown[:N_EXAMPLES])
    by = "patient id, content of the file"
    if trained.looks is not None and has_look.any():
        by += " and look"
    if undecided := _unmatched(samples, trained.collections):
        said = "; ".join(f"{n:,} images are of {name}" for name, n in undecided.items())
        verdict = (
            f"{UNDECIDED}: {said}, which the run trained on, too, and without the collection's "
            f"patient ids on both sides no patient can be matched (no image was found by {by})"
        )
        logger.warning("%s", verdict)
        return verdict
    return f"{CLEAN} (by {by})"


def _unmatched(samples: Iterable[Sample], collections: Mapping[str, bool]) -> dict[str, int]:
    """Images of collections that trained, whose patients cannot be matched, by collection."""
    found: dict[str, int] = {}
    for sample in samples:
        name = collection_of(sample)
        if name in collections and not (collections[name] and has_own_id(sample)):
            found[name] = found.get(name, 0) + 1
    return found
