"""Folders of users, walked so that nothing in them is passed over in silence."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def refuse_folder(error: OSError) -> None:
    """Raises: ValueError: That the folder of an error cannot be read."""
    raise ValueError(
        f"the folder {error.filename} cannot be read: {error.strerror}; change its rights, or move "
        f"it out of the way"
    ) from None


def walk(
    root: Path, unreadable: Callable[[OSError], None] = refuse_folder
) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`: each folder below a root, its folders and its files, both in order of names.

    A link to a folder is followed; a folder is read once, under the first of its paths. Folders
    that the caller takes out of the list of folders are not entered.

    Args:
        root: The folder.
        unreadable: Called with the error of a folder that cannot be read.
    """
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield folder, folders, sorted(names)


def is_utf_8(path: str) -> bool:
    """Whether a path can be written down: names of old systems may hold bytes that are no text."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
