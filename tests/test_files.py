"""Files are whole or not there, under a checksum, and written by one command at a time."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from mmclip import files
from mmclip.cli import error_line
from mmclip.data.cache import CacheError, ImageCache
from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.image_text_dataset import open_dataset
from mmclip.files import (
    LOCK_FILE,
    VERIFIED_FILE,
    LockedError,
    is_sealed,
    locked,
    locked_file,
    made_beside,
    sealed,
    verified_sha256,
    write_atomic,
)
from tests.commands import mmclip, start
from tests.made import write_folder


def aged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the clock run on, so that a file's time stamps are of long ago."""
    now = path.stat().st_ctime + 10
    monkeypatch.setattr(files.time, "time", lambda: now)


def test_a_checksum_is_computed_once_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.npy"
    path.write_bytes(b"one")
    computed = []
    whole = files.file_sha256
    monkeypatch.setattr(files, "file_sha256", lambda p: computed.append(p) or whole(p))
    verified_sha256(path)
    verified_sha256(path)
    assert len(computed) == 2  # just written: it could change within the same tick
    aged(path, monkeypatch)
    first = [verified_sha256(path) for _ in range(3)]
    assert len(computed) == 3 and set(first) == {whole(path)}
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had happened
    assert path.stat().st_size == before.st_size
    assert verified_sha256(path) == whole(path) != first[0]
    (tmp_path / VERIFIED_FILE).write_text("no json")
    assert verified_sha256(path) == whole(path)


def test_what_is_sealed_says_whether_it_was_changed():
    one = sealed({"b": [1, 2.5, None], "a": {"path": Path("x")}})
    assert is_sealed(json.loads(json.dumps(one)))
    assert not is_sealed({**one, "b": [1, 2.5]}) and not is_sealed({**one, "c": 1})
    assert not is_sealed({k: v for k, v in one.items() if k != "sha256"})


def damage_images(folder: Path, how: str) -> None:
    path = folder / "images.npy"
    images = np.load(path)
    if how == "a row before":
        images = np.concatenate([images[:1], images])
    elif how == "a row less":
        images = images[1:]
    elif how == "noise":
        images = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    elif how == "two rows swapped":
        images[[0, 1]] = images[[1, 0]]
    elif how == "one pixel":
        images[-1, -1, -1] ^= 1
    elif how == "other size":
        images = images[:, ::2, ::2]
    np.save(path, images)


DAMAGES = ["a row before", "a row less", "noise", "two rows swapped", "one pixel", "other size"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_changed_image_cache_is_refused_at_every_open(tmp_path: Path, how: str):
    folder = write_folder(tmp_path)
    before = ImageCache.open(folder).images.copy()
    damage_images(folder, how)
    for opened in (ImageCache.open, lambda f: open_dataset([f])):
        with pytest.raises(CacheError, match="build the folder again"):
            opened(folder)
    np.save(folder / "images.npy", before)
    assert len(ImageCache.open(folder).images) == len(before)


@pytest.mark.parametrize(
    "change", [{"images_sha256": "0" * 64}, {"n_with_image": 1}, {"reader": "csv"}, {"more": 1}]
)
def test_a_changed_meta_of_a_data_folder_is_refused(tmp_path: Path, change: dict):
    folder = write_folder(tmp_path)
    meta = read_meta(folder)
    (folder / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(ManifestError, match=r"meta\.json was changed since it was written"):
        read_meta(folder)
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 3}))
    with pytest.raises(ManifestError, match=r"has format 3.* build the folder again"):
        read_meta(folder)


class Full(OSError):
    """What a full disk says."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_written_whole_changes_nothing(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_one() -> None:
        with write_atomic(path) as file:
            file.write(b"half of the n")
            raise Full

    def write_several() -> None:
        with made_beside(tmp_path, "a.txt") as made:
            (made / "a.txt").write_text("new")
            (made / "plots").mkdir()
            raise Full

    for write in (write_one, write_several):
        with pytest.raises(Full):
            write()
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/old.png").write_text("old")
    with made_beside(tmp_path, "a.txt") as made:
        (made / "a.txt").write_text("new")
        (made / "plots").mkdir()
        (made / "plots/new.png").write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["new.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "plots"]


@pytest.mark.parametrize("fails", ["join_images", "write_manifest", "_do_all"])
def test_a_build_that_replaces_another_on_a_full_disk_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
):
    from mmclip.data.ingest import build
    from tests.made import write_images

    folder = write_folder(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def full(*_: object, **__: object):
        raise Full

    with monkeypatch.context() as patched:
        patched.setattr(build, fails, full)
        with pytest.raises(Full):
            build.build_data(
                write_images(tmp_path), tmp_path, folder, image_size=16, overwrite=True
            )
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert read_meta(folder)["image_size"] == 32 and len(open_dataset([folder])) == 8
    build.build_data(write_images(tmp_path), tmp_path, folder, image_size=16, overwrite=True)
    assert read_meta(folder)["image_size"] == 16 and len(open_dataset([folder])) == 8
    assert sorted(p.name for p in folder.iterdir()) == sorted(before)


def test_a_folder_has_one_writer_and_names_it(tmp_path: Path):
    with locked(tmp_path / "a"):
        said = (tmp_path / "a" / LOCK_FILE).read_text()
        assert f"process {os.getpid()}" in said and os.uname().nodename in said
        with pytest.raises(LockedError, match="already"), locked(tmp_path / "a"):
            pass
        with locked(tmp_path / "b"):
            pass
    assert not (tmp_path / "a").exists()  # nothing was written, so nothing is left


def hold(folder: Path, shared: bool = False) -> int:
    """A process that holds the lock until it is killed; returns its id."""
    ready, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with locked(folder, shared=shared):
                os.write(said, b"x")
                time.sleep(60)
        finally:
            os._exit(1)
    os.read(ready, 1)
    return pid


def end(pid: int) -> None:
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def test_a_second_process_is_refused_and_a_stale_lock_is_taken_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    pid = hold(tmp_path)
    try:
        for shared in (False, True):
            with (
                pytest.raises(LockedError, match=rf"process {pid}.*choose another --out"),
                locked(tmp_path, shared=shared),
            ):
                pass
    finally:
        end(pid)
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / LOCK_FILE).read_text()
    assert f"takes over the lock of host {os.uname().nodename}, process {pid}" in " ".join(
        capfd.readouterr().err.split()
    )
    assert not (tmp_path / LOCK_FILE).exists()


def killed(what: Callable[[], object]) -> None:
    """Does something in a process that is killed when it calls `dies`."""
    pid = os.fork()
    if pid == 0:
        try:
            what()
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def dies(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def write_and_die(path: Path) -> None:
    with write_atomic(path) as file:
        file.write(b"half of it")
        dies()


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_killed_writer_left_in_a_folder_goes_with_its_lock(tmp_path: Path, shared: bool):
    (tmp_path / "a.0123abcd.tmp").mkdir()  # somebody's folder, and a file that is not ours
    (tmp_path / "notes.tmp").touch()

    def write() -> None:
        with locked(tmp_path, shared=shared):
            write_and_die(tmp_path / "a.json")

    killed(write)
    assert len(list(tmp_path.glob("a.json.*.tmp"))) == 1
    with locked(tmp_path, shared=shared):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.0123abcd.tmp", "notes.tmp"]


def test_what_a_killed_writer_left_beside_its_file_goes_with_its_lock(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out, beside, other = tmp_path / "[ä].csv", tmp_path / "[ä].npz", tmp_path / "[ä].csv.b"

    def write(path: Path) -> None:
        with locked_file(out, beside):
            write_and_die(path)

    for path in (out, beside):
        killed(lambda path=path: write(path))
    killed(lambda: write_and_die(other))
    with locked_file(out, beside):
        pass
    assert [p.name.partition(".")[2][:5] for p in tmp_path.iterdir()] == ["csv.b"]
    assert f"{out}: takes over the lock of" in " ".join(capfd.readouterr().err.split())


def test_shards_share_a_folder_and_keep_others_out(tmp_path: Path):
    pid = hold(tmp_path, shared=True)
    try:
        with locked(tmp_path, shared=True), locked(tmp_path, shared=True):
            pass
        with pytest.raises(LockedError, match="process"), locked(tmp_path):
            pass
    finally:
        end(pid)


def test_two_builds_of_two_sizes_into_one_folder_leave_one_of_them(made_raw: Path, tmp_path: Path):
    given = ["data", "build", "csv", "--root", made_raw, "--mapping", made_raw / "mapping.toml"]
    given += ["--workers", "1", "--out", tmp_path / "out"]
    running = [start(tmp_path / f"build-{px}", *given, "--image-size", str(px)) for px in (32, 64)]
    ended = [process.wait() for process in running]
    refused = [e for e in ended if e.code]
    assert len(refused) == 1, ended
    assert "another command writes into" in refused[0].error() or (
        "already holds a finished build" in refused[0].error()
    )
    px = 32 if ended[0].code == 0 else 64
    assert read_meta(tmp_path / "out")["image_size"] == px
    assert open_dataset([tmp_path / "out"]).pixels(np.array([0])).shape == (1, px, px)


def test_a_command_refuses_a_folder_that_another_process_writes(
    made_raw: Path, made_data: Path, tmp_path: Path
):
    out = tmp_path / "out"
    out.mkdir()
    pid = hold(out)
    try:
        build = ["data", "build", "csv", "--root", made_raw, "--mapping", made_raw / "mapping.toml"]
        for command in (build, ["demo"]):
            error = mmclip(tmp_path / "said", *command, "--out", out).error()
            assert f"process {pid}" in error and "choose another --out" in error
    finally:
        end(pid)


def test_two_trainings_into_one_folder_leave_the_run_of_one(
    made_data: Path, small_config: Path, tmp_path: Path
):
    given = ["pretrain", "--data", made_data, "--config", small_config, "--out", tmp_path / "run"]
    running = [
        start(tmp_path / f"seed-{seed}", *given, "--set", f"train.seed={seed}") for seed in (1, 2)
    ]
    ended = [process.wait() for process in running]
    (winner,) = [seed for seed, e in enumerate(ended, 1) if e.code == 0]
    error = ended[2 - winner].error()
    assert "another command writes into" in error or "already holds a run" in error
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        meta = json.loads((checkpoint / "meta.json").read_text())
        assert meta["config"]["train"]["seed"] == winner
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_killed_training_leaves_a_lock_that_is_taken_over(
    made_data: Path, small_config: Path, tmp_path: Path
):
    given = ["pretrain", "--data", made_data, "--config", small_config, "--out", tmp_path / "run"]
    running = start(tmp_path / "killed", *given, "--set", "train.steps=100000")
    while not (tmp_path / "run" / "config.json").is_file():
        time.sleep(0.05)
    running.kill()
    assert (tmp_path / "run" / LOCK_FILE).is_file()
    ended = mmclip(tmp_path / "said", *given, "--resume")
    # The training that was killed asked for more steps: only its checkpoint would tell.
    taken = f"takes over the lock of host {os.uname().nodename}, process {running.process.pid}"
    assert taken in " ".join(ended.err.split())


def test_a_lock_is_taken_where_nothing_more_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> int:
        raise Full

    monkeypatch.setattr(os, "pwrite", full)
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).is_file()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Full(), "no space left on device; make room"),
        (OSError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: permission denied; ask"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: read-only file system; cho"),
        (FileExistsError(errno.EEXIST, "File exists", "a.png"), "a.png: file exists; choose a pl"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), "a: not a directory; choose"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/p/a"),
            "/p/a: no such file; check",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "a: is a directory; name a file"),
        (OSError(errno.EIO, "Input/output error", "/a/b"), "/a/b: input/output error"),
        (OSError("520192 requested and 53120 written"), "no space left on device; make room"),
        (OSError("a sentence of ours"), "a sentence of ours"),
    ],
)
def test_an_error_of_the_system_names_path_reason_and_next_step(error: OSError, said: str):
    assert error_line(error).startswith(said)


def test_a_link_is_written_through(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    link, whole = tmp_path / "link.csv", tmp_path / "disk/whole.csv"
    link.symlink_to(whole)
    for text in (b"first", b"second"):
        with write_atomic(link) as file:
            file.write(text)
        assert link.is_symlink() and whole.read_bytes() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link.csv"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["whole.csv"]
