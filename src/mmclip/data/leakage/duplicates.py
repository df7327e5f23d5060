"""Near-duplicate images: a hash of each image, all pairs of hashes close by, and a look at the
images.

The hashes lie in the data folder as image_hashes.npz, and are made once. Pairs at the edge are
compared pixel by pixel, for images of two people can be alike in all that is coarse.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt16
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmclip.data.cache import ImageCache
from mmclip.data.flat import starts_of
from mmclip.data.folder import ManifestError, read_built_meta
from mmclip.files import write_atomic

HASHES_FILE = "image_hashes.npz"

HASH_VERSION = 1
"""Raised with every change of the hash, so that stored ones are not taken up."""

SIDE = 16
"""Frequencies a side: 16 * 16 - 1 bits. [chosen: with 64 bits, as pHash has, 1,694 of 719,400 pairs
of different real images lie within 10 bits; with 255 the closest two differ in 47]"""

CHUNKS = 16
"""Parts of 16 bits by which candidates are looked up."""

MAX_DISTANCE = 2 * CHUNKS - 1
"""Bits in which near-duplicates may differ. Two hashes that differ in no more have a part in which
they differ in one bit at most, so none is missed. On real images a JPEG of quality 50 at 2/3 of the
size differs in up to 23, a gamma of 0.7 in up to 29, different images in 47 and more."""

BLOCK_PIXELS = 1 << 20
"""Hashed at once. [chosen: fits a cache; 32 times as many take 3 times as long an image]"""

SURE_DISTANCE = 24
"""Hashes that differ in no more bits need no look at the images. [chosen: of 200 million pairs of
synthetic patients none is below 28; copies that were not moved, turned or cut stay mostly below]"""

LOOK_PX = 64
"""Side at which two images are compared, whatever their own."""

MIN_LIKENESS = 0.91
"""Images further apart than SURE_DISTANCE are near-duplicates from this `likeness` on. [chosen: of
synthetic patients whose hashes are within MAX_DISTANCE the most alike two reach 0.905; of real and
made images that were turned, shifted, cut, or given another gamma the least alike has 0.917]"""

_BLOCK = 1 << 21
"""Candidates compared at once. [chosen: some hundred MB]"""


def image_hashes(images: UInt8[np.ndarray, "n px px"]) -> UInt16[np.ndarray, "n 16"]:
    """The signs of the lowest 255 frequencies of each image; the brightness itself is left out.

    Brightness and contrast change no sign, size and compression few. An image that is mirrored,
    inverted, turned, or cropped by more than some percent, is another one.

    A batch is two matrix products. The package imagehash takes one image at a time: 1,200 a second
    at 64 px and 256 bits, where this takes 11,000 (one core, beside other work).

    Args:
        images: Of any side from 16 px on; equal images of other sides have nearly equal hashes.

    Returns:
        16 parts of 16 bits, each with low and high frequencies: every part tells images apart.

    Source: pHash (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions,
        2010), with 16 frequencies a side, and signs in place of the comparison with the median.
    """
    n, px, _ = images.shape
    k, i = np.arange(SIDE)[:, None], np.arange(px)[None]
    cosines = np.cos(np.pi * k * (i + 0.5) / px).astype(np.float32).T  # [px, 16]
    rows = images.reshape(n * px, px).astype(np.float32) @ cosines
    columns = rows.reshape(n, px, SIDE).transpose(0, 2, 1).reshape(n * SIDE, px) @ cosines
    order = np.argsort(np.add.outer(k[:, 0], k[:, 0]).ravel(), kind="stable")
    is_positive = columns.reshape(n, SIDE * SIDE)[:, order] > 0
    is_positive[:, 0] = False  # the brightness
    parts = is_positive.reshape(n, SIDE, CHUNKS).transpose(0, 2, 1)  # bits of a part are 16 apart
    packed = np.packbits(np.ascontiguousarray(parts), axis=2)
    return np.ascontiguousarray(packed).view(">u2")[:, :, 0].astype(np.uint16)


def read_hashes(
    folder: Path, on_progress: Callable[[int], None] = lambda n: None
) -> UInt16[np.ndarray, "n 16"]:
    """The hashes of a data folder's images, in the order of images.npy; made and stored if need be.

    Raises:
        ManifestError: When the images are smaller than 16 px.
    """
    meta = read_built_meta(folder)
    if meta["image_size"] is None:
        return np.zeros((0, CHUNKS), np.uint16)
    if meta["image_size"] < SIDE:
        raise ManifestError(
            f"the images of {folder} have {meta['image_size']} px, near-duplicates need {SIDE}; "
            f"build larger ones, or go without (`mmclip data check --exact`)"
        )
    path, key = folder / HASHES_FILE, f"{HASH_VERSION} {meta['images_sha256']}"
    try:
        with np.load(path) as stored:
            if str(stored["key"]) == f"{key} {_sha256(stored['hashes'])}":
                on_progress(len(stored["hashes"]))
                return stored["hashes"]
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        pass  # not there, or damaged: made anew
    hashes = hash_in_blocks(ImageCache.open(folder).images, on_progress)
    # Not in a folder that is only read, nor on a full disk.
    with suppress(OSError), write_atomic(path) as file:
        np.savez(file, hashes=hashes, key=np.array(f"{key} {_sha256(hashes)}"))
    return hashes


def hash_in_blocks(
    images: UInt8[np.ndarray, "n px px"], on_progress: Callable[[int], None] = lambda n: None
) -> UInt16[np.ndarray, "n 16"]:
    """As `image_hashes`, of more images than fit into memory."""
    step = max(1, BLOCK_PIXELS // images.shape[1] ** 2)
    made = [np.zeros((0, CHUNKS), np.uint16)]
    for start in range(0, len(images), step):
        made.append(image_hashes(np.ascontiguousarray(images[start : start + step])))
        on_progress(len(made[-1]))
    return np.concatenate(made)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def near_pairs(
    hashes: UInt16[np.ndarray, "n 16"], on_progress: Callable[[int], None] = lambda n: None
) -> Int64[np.ndarray, "p 2"]:
    """All pairs of different hashes that differ in at most MAX_DISTANCE bits.

    Args:
        hashes: No two equal; see `near_groups`.
        on_progress: Called with 1 after each of the CHUNKS parts.

    Source: multi-index hashing, Norouzi et al., CVPR 2012 (arXiv:1307.2982): look up each part
        with at most one bit changed, and compare whole hashes only there.
    """
    words = np.ascontiguousarray(hashes).view(np.uint64)  # [n, 4]
    found = [np.zeros((0, 2), np.int64)]
    for chunk in range(CHUNKS):
        for first, second in _candidates(hashes[:, chunk], hashes[:, chunk]):
            ahead = first < second
            first, second = first[ahead], second[ahead]
            distance = np.zeros(len(first), np.uint8)
            for word in range(words.shape[1]):
                distance += np.bitwise_count(words[first, word] ^ words[second, word])
            near = distance <= MAX_DISTANCE
            found.append(np.stack([first[near], second[near]], 1))
        on_progress(1)
    return np.unique(np.concatenate(found), axis=0)


def _candidates(
    queries: UInt16[np.ndarray, " q"], stored: UInt16[np.ndarray, " n"]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of pairs (i, j) where query i and stored key j differ in at most one bit."""
    order = np.argsort(stored, kind="stable")
    count = np.bincount(stored, minlength=1 << 16)
    start = starts_of(count)
    for changed in (0, *(1 << bit for bit in range(16))):
        bucket = queries ^ np.uint16(changed)
        for part in _blocks(count[bucket]):
            n_each = count[bucket[part]]
            first = np.repeat(np.arange(len(queries))[part], n_each)
            within = np.arange(len(first)) - np.repeat(starts_of(n_each)[:-1], n_each)
            yield first, order[np.repeat(start[bucket[part]], n_each) + within]


def near_any(
    queries: UInt16[np.ndarray, "q 16"], stored: UInt16[np.ndarray, "n 16"], max_distance: int
) -> Bool[np.ndarray, " q"]:
    """Which queries differ from one of the stored hashes in at most so many bits.

    Args:
        queries: Hashes.
        stored: Hashes.
        max_distance: Up to MAX_DISTANCE none is missed.
    """
    out = np.zeros(len(queries), bool)
    ours, theirs = (np.ascontiguousarray(h).view(np.uint64) for h in (queries, stored))
    for chunk in range(CHUNKS):
        rows = np.flatnonzero(~out)
        for some, second in _candidates(queries[rows, chunk], stored[:, chunk]):
            first = rows[some]
            distance = np.bitwise_count(ours[first] ^ theirs[second]).sum(1)
            out[first[distance <= max_distance]] = True
    return out


def _blocks(n_each: np.ndarray) -> Iterator[slice]:
    """Runs of items that have _BLOCK candidates together, or one item that has more."""
    ends = np.cumsum(n_each)
    begin = 0
    while begin < len(n_each):
        before = ends[begin - 1] if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
        yield slice(begin, stop)
        begin = stop


ImageOf = Callable[[int], UInt8[np.ndarray, "px px"]]
"""A cached image by its number."""


def look(image: UInt8[np.ndarray, "px px"]) -> Float32[np.ndarray, "64 64"]:
    """What an image shows between one pixel and four of LOOK_PX, equally strong everywhere.

    Brightness, exposure and what is common to all chests are gone, and so is what noise and
    compression change.
    """
    size = (LOOK_PX, LOOK_PX)
    small = Image.fromarray(image).resize(size, Image.Resampling.BOX)
    z = np.asarray(small, np.float32)
    detail = gaussian_filter(z, 1) - gaussian_filter(z, 4)
    # 4 of 255: flat parts are not blown up to noise. [chosen]
    return detail / np.sqrt(gaussian_filter(detail * detail, 4) + 16)


def likeness(
    one: Float32[np.ndarray, "64 64"], other: Float32[np.ndarray, "64 64"], most_px: int = 1
) -> float:
    """The correlation of two images' looks, -1..1, at the best of all shifts by up to `most_px`."""
    n, edge = LOOK_PX, most_px + 2
    fixed = other[edge : n - edge, edge : n - edge]
    shifts = range(edge - most_px, edge + most_px + 1)
    size = n - 2 * edge
    return max(
        float(np.corrcoef(one[y : y + size, x : x + size].ravel(), fixed.ravel())[0, 1])
        for y in shifts
        for x in shifts
    )


def are_alike(
    hashes: UInt16[np.ndarray, "n 16"], pairs: Int64[np.ndarray, "p 2"], image_of: ImageOf
) -> Bool[np.ndarray, " p"]:
    """Which of `near_pairs` are near-duplicates: by their hashes alone, or by a look at the images.

    Args:
        hashes: Of the images.
        pairs: Their numbers.
        image_of: Gives an image by its number; called for pairs beyond SURE_DISTANCE.
    """
    looks = lru_cache(maxsize=4096)(lambda i: look(image_of(i)))  # 64 MB at most
    out = _are_sure(hashes, pairs)
    for i in np.flatnonzero(~out):
        first, second = map(int, pairs[i])
        out[i] = likeness(looks(first), looks(second)) >= MIN_LIKENESS
    return out


def _are_sure(
    hashes: UInt16[np.ndarray, "n 16"], pairs: Int64[np.ndarray, "p 2"]
) -> Bool[np.ndarray, " p"]:
    """Which pairs need no look at their images."""
    return np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).sum(1) <= SURE_DISTANCE


def near_groups(
    hashes: UInt16[np.ndarray, "n 16"],
    image_of: ImageOf,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Int64[np.ndarray, " n"]:
    """The number of the group of each image: images joined by near-duplicates, one by one, are one.

    Args:
        hashes: Of images; equal ones are in one group.
        image_of: As in `are_alike`.
        on_progress: As in `near_pairs`.
    """
    if not len(hashes):
        return np.zeros(0, np.int64)
    different, at, which = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    pairs = near_pairs(different, on_progress)
    are_sure = _are_sure(different, pairs)
    sure, unsure = pairs[are_sure], pairs[~are_sure]
    group = _joined(sure, len(different))
    unsure = unsure[group[unsure[:, 0]] != group[unsure[:, 1]]]  # the others need no look
    alike = unsure[are_alike(different, unsure, lambda i: image_of(int(at[i])))]
    return _joined(np.concatenate([sure, alike]), len(different))[which.ravel()]


def _joined(pairs: Int64[np.ndarray, "p 2"], n: int) -> Int64[np.ndarray, " n"]:
    """The number of the group of each of n, where pairs join them."""
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)
