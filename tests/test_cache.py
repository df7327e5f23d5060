import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from mmclip.data import cache
from mmclip.data.cache import (
    IMAGES_FILE,
    CacheError,
    ImageCache,
    ImageFacts,
    decode_images,
    join_images,
    verify_cache,
)
from mmclip.data.folder import FORMAT, read_meta, write_meta
from mmclip.data.images import decode_image, read_image, resize_image
from mmclip.data.ingest import shards
from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.shards import WorkersError
from mmclip.data.manifest import read_manifest
from mmclip.data.sample import Reason, Sample
from tests.commands import Running, fork
from tests.made_files import encoded, ramp

N = 40
PATIENCE_S = 300
"""For processes to start or end: on a machine with other work that takes a minute."""


def write_images(root: Path, n: int = N, size_px: int = 24) -> list[Path]:
    """Different images of noise; every tenth file is damaged."""
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    paths = [root / f"{i:04d}.png" for i in range(n)]
    for i, path in enumerate(paths):
        content = encoded(rng.integers(0, 256, (size_px, size_px + 8), dtype=np.uint8))
        path.write_bytes(content[: len(content) // 2] if i % 10 == 3 else content)
    return paths


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return write_images(tmp_path / "root")


@pytest.fixture
def _small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(cache, "CHUNK_IMAGES", 8)


def count_decoded(monkeypatch) -> list[int]:
    """A list that grows by one item with each file that is decoded from now on."""
    decoded: list[int] = []

    def counting(content: bytes) -> np.ndarray:
        decoded.append(len(content))
        return decode_image(content)

    monkeypatch.setattr(cache, "decode_image", counting)
    return decoded


def build_cache(
    images: list[Path], out: Path, image_size: int, workers: int = 1
) -> tuple[list[ImageFacts], str]:
    """What `build_data` does of it: the chunks, then all of them as one."""
    decode_images(Path("/"), [str(path) for path in images], out, image_size, workers)
    return join_images(len(images), out, image_size)


class Stop(Exception):
    """Ends a build from its progress display."""


@contextmanager
def watch_progress(
    on_advance: Callable[[int], object], task: str = "reading images"
) -> Iterator[list[int]]:
    """Calls a function at every step of a task; the list gets what was done of each task before."""
    done_before: list[int] = []

    @contextmanager
    def shown(what: str, total: int, done: int = 0):
        if not what.endswith("what is done"):
            done_before.append(done)
        yield on_advance if what == task else lambda n: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "progress", shown)
        yield done_before


def stop_build(images: list[Path], out: Path, image_size: int = 16, n_chunks: int = 3) -> None:
    """Builds until some chunks are done."""
    calls = []

    def stop(n: int) -> None:
        calls.append(n)
        if len(calls) == n_chunks:
            raise Stop

    with watch_progress(stop), pytest.raises(Stop):
        build_cache(images, out, image_size)


def test_row_i_is_the_ith_image_that_can_be_read(images: list[Path], tmp_path: Path):
    facts, checksum = build_cache(images, tmp_path / "out", 16)
    arrays = np.load(tmp_path / "out" / IMAGES_FILE)
    assert arrays.shape == (36, 16, 16) and arrays.dtype == np.uint8
    sound = [path for path, fact in zip(images, facts, strict=True) if fact.reason is None]
    for image, path in zip(arrays, sound, strict=True):
        np.testing.assert_array_equal(image, resize_image(read_image(path), 16))
    assert [i for i, fact in enumerate(facts) if fact.reason] == [3, 13, 23, 33]
    assert {fact.reason for fact in facts} == {None, Reason.IMAGE_TRUNCATED}
    assert {(fact.width_px, fact.height_px) for fact in facts} == {(32, 24), (0, 0)}
    verify_cache(tmp_path / "out", checksum)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_chunks")
def test_the_bytes_do_not_depend_on_the_number_of_workers(images, tmp_path: Path):
    made = [build_cache(images, tmp_path / f"out{n}", 16, workers=n) for n in (1, 2, 3)]
    assert made[0] == made[1] == made[2]
    files = [(tmp_path / f"out{n}" / "images.npy").read_bytes() for n in (1, 2, 3)]
    assert files[0] == files[1] == files[2]


def test_the_bytes_do_not_depend_on_the_size_of_the_chunks(images, tmp_path: Path, monkeypatch):
    whole = build_cache(images, tmp_path / "whole", 16)
    monkeypatch.setattr(cache, "CHUNK_IMAGES", 7)
    assert build_cache(images, tmp_path / "parts", 16) == whole


@pytest.mark.usefixtures("_small_chunks")
def test_a_resumed_build_decodes_only_what_is_not_done(images, tmp_path: Path, monkeypatch):
    whole = build_cache(images, tmp_path / "whole", 16)
    stop_build(images, tmp_path / "out")
    decoded = count_decoded(monkeypatch)
    done = []
    with watch_progress(done.append) as done_before:
        assert build_cache(images, tmp_path / "out", 16) == whole
    assert len(decoded) == sum(done) == N - 3 * 8
    assert done_before == [3 * 8]


@pytest.mark.usefixtures("_small_chunks")
def test_a_changed_file_is_decoded_anew(images, tmp_path: Path, monkeypatch):
    stop_build(images, tmp_path / "out")
    images[9].write_bytes(encoded(ramp()))  # of the second chunk
    images[16].unlink()  # of the third
    decoded = count_decoded(monkeypatch)
    facts, _ = build_cache(images, tmp_path / "out", 16)
    assert len(decoded) == N - 8 - 1
    row = 9 - 1  # the file 3 is damaged
    image = np.load(tmp_path / "out" / IMAGES_FILE)[row]
    np.testing.assert_array_equal(image, resize_image(ramp(), 16))
    assert facts[16].reason == Reason.IMAGE_MISSING


@pytest.mark.usefixtures("_small_chunks")
def test_another_image_size_takes_up_no_old_chunk(images, tmp_path: Path):
    stop_build(images, tmp_path / "out")
    build_cache(images, tmp_path / "out", 20)
    assert np.load(tmp_path / "out" / IMAGES_FILE).shape == (36, 20, 20)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("damage", ["images", "facts", "cut facts", "empty facts", "no images"])
def test_a_tampered_chunk_is_noticed_and_made_anew(images, tmp_path: Path, damage: str):
    whole = build_cache(images, tmp_path / "whole", 16)
    stop_build(images, tmp_path / "out")
    arrays, facts = (
        tmp_path / "out" / "images.shards" / f"000001.{end}" for end in ("npy", "json")
    )
    if damage == "images":
        flip(arrays, -1)
    elif damage == "facts":
        known = json.loads(facts.read_text())
        known["facts"][0]["width_px"] = 99
        facts.write_text(json.dumps(known))
    elif damage == "cut facts":
        facts.write_text(facts.read_text()[:50])
    elif damage == "empty facts":
        facts.write_text("")
    else:
        arrays.unlink()
    assert build_cache(images, tmp_path / "out", 16) == whole
    verify_cache(tmp_path / "out", whole[1])


def test_a_flipped_bit_of_the_images_is_noticed(images, tmp_path: Path):
    _, checksum = build_cache(images, tmp_path, 16)
    flip(tmp_path / "images.npy", 2000)
    with pytest.raises(CacheError, match="was changed since it was built"):
        verify_cache(tmp_path, checksum)
    (tmp_path / "images.npy").unlink()
    with pytest.raises(CacheError, match="is missing"):
        verify_cache(tmp_path, checksum)


def test_a_file_that_holds_no_images_is_refused(tmp_path: Path):
    write_meta(tmp_path, {"format": FORMAT, "data_hash": "", "n_with_image": 2, "image_size": 4})
    with pytest.raises(CacheError, match="cannot be opened"):
        ImageCache.open(tmp_path)
    (tmp_path / "images.npy").write_bytes(b"no array")
    with pytest.raises(CacheError, match="cannot be opened"):
        ImageCache.open(tmp_path)
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4), np.float32))
    with pytest.raises(CacheError, match="float32"):
        ImageCache.open(tmp_path)


def test_no_image_at_all_gives_an_empty_cache(tmp_path: Path):
    facts, checksum = build_cache([tmp_path / "no.png"], tmp_path / "out", 16)
    assert [fact.reason for fact in facts] == [Reason.IMAGE_MISSING]
    assert np.load(tmp_path / "out" / IMAGES_FILE).shape == (0, 16, 16)
    verify_cache(tmp_path / "out", checksum)


@pytest.mark.usefixtures("_small_chunks")
def test_a_killed_worker_is_one_clear_error_and_the_build_goes_on(images, tmp_path: Path):
    def kill_workers(n: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    whole = build_cache(images, tmp_path / "whole", 16)
    many = images * 20  # more than the workers finish before they are killed
    told = pytest.raises(WorkersError, match=r"run the same command again with fewer --workers")
    with watch_progress(kill_workers), told:
        build_cache(many, tmp_path / "out", 16, workers=2)
    facts, _ = build_cache(many, tmp_path / "out", 16)
    assert facts == whole[0] * 20


def build(root: Path, out: Path, workers: int) -> None:
    """What a process of its own runs: a build by small chunks, whose processes are a group."""
    os.setsid()
    cache.CHUNK_IMAGES = 16
    samples = [
        Sample(image_id=p.name, study_id=p.name, patient_id=p.name[:3], source="made", image=p.name)
        for p in sorted(root.glob("*.png"))
    ]
    build_data(samples, root, out, image_size=32, workers=workers, overwrite=True)


def n_chunks(out: Path) -> int:
    return len(list((out / "images.shards").glob("*.json")))


def wait_for_chunk(out: Path, running: Running) -> None:
    """Returns when the build has finished a chunk more, or all."""
    before, deadline = n_chunks(out), time.monotonic() + PATIENCE_S
    while n_chunks(out) <= before and running.process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """1,000 images under other names in a folder."""
    paths = write_images(tmp_path / "few", 50, size_px=160)
    root = tmp_path / "root"
    root.mkdir()
    order = random.Random(0)
    for i in range(1000):
        os.link(order.choice(paths), root / f"{i:04d}.png")
    return root


@pytest.mark.parametrize("n_kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_build_that_is_killed_ends_with_the_bytes_of_one_never_killed(
    many: Path, tmp_path: Path, n_kills: int
):
    whole = fork(tmp_path / "log", build, many, tmp_path / "whole", 1)
    wait_for_chunk(tmp_path / "whole", whole)
    began = time.monotonic()
    assert whole.wait(PATIENCE_S).code == 0
    work_s = time.monotonic() - began
    expected = (tmp_path / "whole" / "images.npy").read_bytes()
    meta = read_meta(tmp_path / "whole")
    rng, at_kill, finished = random.Random(0), [], []
    out = tmp_path / "out0"
    while len(at_kill) < n_kills:
        workers = 1 + len(at_kill) % 2
        running = fork(tmp_path / "log", build, many, out, workers)
        if (len(at_kill) + 1) % 4:  # starting takes as long as the work: a kill may hit that, too
            wait_for_chunk(out, running)
        running.process.join(rng.uniform(0, work_s / 3))
        if running.process.is_alive():
            with suppress(ProcessLookupError):  # so early that it has no group of its own yet
                os.killpg(running.pid, signal.SIGKILL)
            running.kill()
            at_kill.append(n_chunks(out))
        else:  # too late to kill: begin a new folder
            assert running.wait().code == 0
            finished.append(out)
            out = tmp_path / f"out{len(finished)}"
    assert fork(tmp_path / "log", build, many, out, 1).wait(PATIENCE_S).code == 0
    finished.append(out)
    assert max(at_kill) > 0, at_kill  # else nothing was resumed
    assert len(set(at_kill)) > 2 or n_kills < 10, at_kill
    for folder in finished:
        assert (folder / "images.npy").read_bytes() == expected
        assert read_meta(folder) == meta
        assert len(read_manifest(folder)) == meta["n_samples"] > 800
        assert not list(folder.glob("*.tmp"))


def test_a_build_clears_what_a_killed_one_left_aside(tmp_path: Path):
    write_images(tmp_path / "root", 3, size_px=40)
    out = tmp_path / "out"
    (out / "images.shards").mkdir(parents=True)
    (out / "images.npy.e12855c0.tmp").write_bytes(b"half of the images")
    build(tmp_path / "root", out, 1)
    assert not list(out.glob("*.tmp"))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads process states in /proc")
def test_workers_end_when_their_parent_is_killed(many: Path, tmp_path: Path):
    running = fork(tmp_path / "log", build, many, tmp_path / "out", 2)
    wait_for_chunk(tmp_path / "out", running)
    pid = running.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) >= 2
    running.kill()
    deadline = time.monotonic() + PATIENCE_S
    while any(is_running(int(pid)) for pid in children):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.05)
