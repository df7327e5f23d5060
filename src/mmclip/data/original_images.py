"""The files that a data folder was built of, for models that read images in their own way."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset

logger = logging.getLogger(__name__)


def open_originals(
    folders: Sequence[Path], roots: Sequence[Path] | None, image_size: int | None, model: str
) -> ImageTextDataset:
    """Data folders whose images are read from the files that they were built of.

    Where those are not there any more, the square copies of the data folder are read: they were
    resized once more than the model asks for, which gives a warning, and so does a copy that is
    smaller than what the model reads.

    Args:
        folders: Of `mmclip data build`.
        roots: Where the files of each folder lie; None takes the places that the folders name.
        image_size: Side of what the model reads, px, where it is known.
        model: For messages.

    Raises:
        ManifestError: When a folder cannot be read, or a root that was given is not there.
    """
    dataset = open_dataset(folders)
    if roots is not None and len(roots) != len(folders):
        raise ManifestError(
            f"--root is given {len(roots)} times for {len(folders)} data folders; give the folder "
            f"of the images of each, in the same order"
        )
    found: list[Path | None] = []
    for number, folder in enumerate(folders):
        meta = read_meta(folder)
        if roots is not None:
            if not roots[number].is_dir():
                raise ManifestError(f"--root {roots[number]} is no folder; give that of the images")
            found.append(roots[number])
            continue
        root = None if meta.get("root") is None else Path(meta["root"])
        is_there = root is not None and root.is_dir()
        found.append(root if is_there else None)
        if is_there or meta["image_size"] is None:
            continue
        side, how = meta["image_size"], meta.get("resize", "squash")
        logger.warning(
            "%s reads the copies in %s, which are %d px (%s), as the files that they were made of "
            "are not at %s; give their folder by --root to have them read as %s was trained%s",
            model, folder, side, how, root or "a known place", model,
            f". They are smaller than the {image_size} px that it reads, and are enlarged"
            if image_size is not None and side < image_size
            else "",
        )  # fmt: skip
    return replace(dataset, roots=tuple(found))


def images_said(dataset: ImageTextDataset) -> str:
    """Where the images of a data set are read, for results."""
    if not dataset.roots:
        return "copies in the data folder"
    kinds = ["copies in the data folder" if root is None else "files" for root in dataset.roots]
    return ", ".join(dict.fromkeys(kinds))
