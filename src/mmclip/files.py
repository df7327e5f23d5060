"""How every command writes and reads its folders: locked, written aside, under a checksum.

A folder that a command writes has a lock while it does (`locked`). A file is written aside, synced
and renamed, so that a reader sees the whole file or the one before (`write_atomic`); several that
belong together are made in a folder inside and moved at the end (`move_in`). What is read stands
under a SHA-256 (`check_sha256`, `sealed`).
"""

import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmclip.progress import console

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

OWN_PREFIX = ".mmclip."
"""Of what may lie in any folder, and says nothing of what the folder holds."""

LOCK_FILE, VERIFIED_FILE = f"{OWN_PREFIX}lock", f"{OWN_PREFIX}verified"


class LockedError(ValueError):
    """Another process writes into the folder; the message names it."""


# -- checksums --


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


RACY_S = 2.0
"""A file that changed so shortly ago may change again within the same tick of its time stamp, so
its checksum is not remembered. Source: git's racy entries; 2 s is the tick of FAT."""


def verified_sha256(path: Path) -> str:
    """SHA-256 of a file, computed once for as long as size, times and inode stay.

    It is remembered in the file's folder, where that can be written: a cache of 50 GB is not read
    again by each command. The change time, which no program can set, is among what must be equal.
    """
    stamp = _stamp(path)
    store = path.with_name(VERIFIED_FILE)
    try:
        known = json.loads(store.read_text("utf-8"))
        if known[path.name]["stamp"] == stamp:
            return known[path.name]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        known = {}
    began = time.time()
    found = file_sha256(path)
    has_settled = began - path.stat().st_ctime > RACY_S
    if has_settled and _stamp(path) == stamp and os.access(path.parent, os.W_OK):
        known = {name: value for name, value in known.items() if (path.parent / name).is_file()}
        known[path.name] = {"stamp": stamp, "sha256": found}
        with suppress(OSError):  # a full disk: what is read is sound all the same
            write_text_atomic(store, json.dumps(known))
    return found


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def json_sha256(values: Mapping[str, Any]) -> str:
    """SHA-256 over values as JSON, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping[str, Any], key: str = "sha256") -> dict[str, Any]:
    """Values as JSON keeps them, with a checksum over all others under a key; see `is_sealed`."""
    plain = json.loads(json.dumps({k: v for k, v in values.items() if k != key}, default=str))
    return {**plain, key: json_sha256(plain)}


def is_sealed(values: Mapping[str, Any], key: str = "sha256") -> bool:
    """Whether values are as `sealed` left them."""
    return values.get(key) == json_sha256({k: v for k, v in values.items() if k != key})


def unsealed(values: Mapping[str, Any], key: str = "sha256") -> dict[str, Any]:
    """The values that `sealed` put under a checksum, without it.

    Raises:
        ValueError: When they were changed since, or have none.
    """
    if not is_sealed(values, key):
        raise ValueError("its checksum differs from its content, or it has none")
    return {name: value for name, value in values.items() if name != key}


def other_format(found: object, ours: int, again: str) -> str:
    """Says that something is of a format that this version does not read.

    Args:
        found: Its format.
        ours: That of this version.
        again: The next step where an older version wrote it.
    """
    is_newer = isinstance(found, int) and found > ours
    step = "a newer mmclip wrote it: install that" if is_newer else again
    return f"has format {found}, and this version reads format {ours}; {step}"


# -- writing --


@contextmanager
def write_atomic(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` once it is whole and on the disk.

    Where writing fails, as on a full disk, what was there stays. A link is written through: it
    stays, and the file that it names is replaced.

    Args:
        path: Of the file.
        sync: False for what is checked when it is read, and made anew where it is damaged: it may
            be half a file after the machine, not the process, was stopped.

    Raises:
        ValueError: When the path is that of a folder.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, such as one in it")
    aside = path.with_name(_aside(path.name, secrets.token_hex(4)))
    try:
        with aside.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _aside(name: str, token: str) -> str:
    return f"{name}.{token}.tmp"


def clear_left_asides(folder: Path, name: str | None = None) -> None:
    """Removes what writers that were killed left in a folder; the lock must be held.

    Args:
        folder: Where they wrote.
        name: Of the one file that they wrote; None for all.
    """
    written = "*" if name is None else glob.escape(name)
    for left in folder.glob(_aside(written, "[0-9a-f]" * 8)):
        if left.is_file():
            left.unlink()


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a text file by `write_atomic`, as UTF-8."""
    with write_atomic(path) as file:
        file.write(text.encode("utf-8"))


def check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """Refuses to replace files, unless that is asked for.

    Raises:
        ValueError: When one is there.
    """
    if not overwrite and (there := [path for path in paths if path.exists()]):
        raise ValueError(f"{there[0]} is there; add --overwrite to replace it, or change --out")


def move_in(made: Path, out: Path, last: str) -> None:
    """Moves all that a folder holds into another, in place of what has the same name there.

    Args:
        made: A folder inside of `out`, whose files are whole; it is removed.
        out: Where they go.
        last: The file that says that the others are there; it goes last.
    """
    for path in sorted(made.iterdir(), key=lambda path: path.name == last):
        if path.name == LOCK_FILE:
            continue
        goal = out / path.name
        if goal.is_dir():
            old = made / f"{path.name}.old"
            goal.rename(old)
        path.replace(goal)
    shutil.rmtree(made)


@contextmanager
def made_beside(out: Path, last: str) -> Iterator[Path]:
    """A new folder to write results in, whose files go into `out` once all of them are whole.

    Where writing fails, `out` stays as it was.

    Args:
        out: Made when absent.
        last: The file that says that the others are there; it goes last.
    """
    out.mkdir(parents=True, exist_ok=True)
    made = out / f"{OWN_PREFIX}new"
    shutil.rmtree(made, ignore_errors=True)  # of a command that was killed
    made.mkdir()
    try:
        yield made
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    move_in(made, out, last)


# -- locks --


@dataclass
class _Held:
    handle: int
    is_shared: bool
    n_holders: int


_HELD: dict[str, _Held] = {}
"""Lock files of this process, which the system would let it lock again, and then unlock at once."""

_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock of a folder, so that no other command writes into it at the same time.

    The lock is the system's, on a file that names host and process. It ends with its process,
    however that ends; the file of one that was killed is taken over, this is said, and what
    `write_atomic` left aside goes.

    Args:
        folder: Made when absent.
        shared: Others may hold it as well, where they also share it.

    Raises:
        LockedError: When another process holds it.
    """
    was_there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(folder / LOCK_FILE, folder, lambda: clear_left_asides(folder), shared):
            yield
    finally:
        if not was_there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def locked_file(path: Path, *beside: Path) -> Iterator[None]:
    """As `locked`, for a command that writes one file, and perhaps others beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def clear() -> None:
        for each in (path, *beside):
            real = Path(os.path.realpath(each))  # as `write_atomic` writes it
            clear_left_asides(real.parent, real.name)

    with _lock(path.with_name(f".{path.name}.mmclip.lock"), path, clear, shared=False):
        yield


@contextmanager
def _lock(path: Path, of: Path, clear: Callable[[], None], shared: bool) -> Iterator[None]:
    """Holds a lock file.

    Args:
        path: The lock file.
        of: What it locks, for messages.
        clear: Called where the holder before was killed, while this is the only one.
        shared: As of `locked`.
    """
    name = os.path.realpath(path)
    with _ONE_AT_A_TIME:
        held = _HELD.get(name)
        if held is not None and not (shared and held.is_shared):
            raise LockedError(f"this process writes into {of} already; wait until it has ended")
        if held is None:
            held = _HELD[name] = _Held(_acquired(path, of, clear, shared), shared, 0)
        held.n_holders += 1
    try:
        yield
    finally:
        with _ONE_AT_A_TIME:
            held.n_holders -= 1
            if not held.n_holders:
                del _HELD[name]
                _release(path, held.handle)


def _acquired(path: Path, of: Path, clear: Callable[[], None], shared: bool) -> int:
    """The open lock file, locked, with host and process in it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        is_alone = _try(handle, is_exclusive=True)
        holder = os.pread(handle, 4096, 0).decode("utf-8", "replace").strip()
        if not is_alone and not (shared and _try(handle, is_exclusive=False)):
            os.close(handle)
            raise LockedError(
                f"another command writes into {of} ({holder or 'it is just starting'}); wait until "
                f"it has ended, or choose another --out"
            )
        if _is_of(path, handle):
            break
        os.close(handle)  # removed by its holder between opening and locking
    if holder and is_alone:
        console.print(
            f"{of}: takes over the lock of {holder}, which ended without a word",
            style="yellow", markup=False, soft_wrap=True,
        )  # fmt: skip
        clear()
    if shared:
        _try(handle, is_exclusive=False)
    here = f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}"
    with suppress(OSError):  # a full disk: the lock holds without a word of who has it
        os.ftruncate(handle, 0)
        os.pwrite(handle, (here + "\n").encode(), 0)
    return handle


def _try(handle: int, is_exclusive: bool) -> bool:
    """Locks an open file, and says whether that was possible."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(handle, (fcntl.LOCK_EX if is_exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # a file system without locks
        console.print(
            f"the file system has no locks ({error}): start no second command that writes here",
            style="yellow", markup=False, soft_wrap=True,
        )  # fmt: skip
    return True


def _is_of(path: Path, handle: int) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _release(path: Path, handle: int) -> None:
    if _try(handle, is_exclusive=True) and _is_of(path, handle):
        path.unlink()
    os.close(handle)
