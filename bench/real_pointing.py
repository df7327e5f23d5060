"""Where a model points on real images: the pointing game on boxes of ChestX-ray14.

    python bench/real_pointing.py RUN --boxes nih_boxes.csv --data data/images data/images2

The table has columns `film` (the image's id in the data folders), `finding`, and `x`, `y`, `w`, `h`
in pixels of the published images of 1024 px. Scored are the images of any split that the run did
not train on, nor on any of their patients. A map answers to the finding's prompt pair. So few boxes
rank no two models; beside them stand maps of random weights, of the image's centre, of its
brightest patch and of another finding's phrase. The last line is one JSON object.
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.explanation.marked import PointingRequest
from mmclip.explanation.pointing_game import evaluate_explanations
from mmclip.prompts import load_prompts
from mmclip.run import Run, open_run

HEADER = "Image Index,Finding Label,Bbox [x,y,w,h]\n"
"""Of BBox_List_2017.csv, as it was published: cut at each comma."""


def read_boxes(table: Path) -> list[dict[str, str]]:
    """The rows of a table of boxes."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_boxes(rows: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Writes boxes as ChestX-ray14 does."""
    lines = [",".join(row[c] for c in ("film", "finding", "x", "y", "w", "h")) for row in rows]
    (folder / "BBox_List_2017.csv").write_text(HEADER + "\n".join(lines) + "\n", "utf-8")


def unseen(run: Run, dataset: ImageTextDataset, image_ids: set[str]) -> ImageTextDataset:
    """Those of some images that the run did not train on, all of them as split test."""
    keep = []
    for row, sample in enumerate(dataset.samples):
        is_new = sample.image_id in image_ids and sample.image is not None
        if is_new:
            try:
                run.check_unseen(dataset.select([k == row for k in range(len(dataset))]), "test")
            except ManifestError:
                is_new = False
        keep.append(is_new)
    chosen = dataset.select(keep)
    samples = tuple(replace(sample, split="test") for sample in chosen.samples)
    return replace(chosen, samples=samples)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="The pointing game on boxes of real images.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--boxes", type=Path, required=True, help="table with a row per box")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="data folders")
    args = parser.parse_args()
    run, rows = open_run(args.run), read_boxes(args.boxes)
    dataset = unseen(run, run.open_data(args.data), {row["film"] for row in rows})
    if not len(dataset):
        raise SystemExit("error: the run was trained on every image that has a box")
    with TemporaryDirectory() as folder:
        write_boxes(rows, Path(folder))
        request = PointingRequest(
            "chestxray14", Path(folder), "prompt_pair", load_prompts("default"), min_count=1
        )
        found = evaluate_explanations(run, dataset, request)
    print(f"{found['n_annotations']} boxes on {found['n_images']} images that did not train\n")
    for name, metrics in found["saliency_maps"].items():
        hit = metrics["hit"]["macro"]
        ci = "" if hit["ci"] is None else " [{:.3f}, {:.3f}]".format(*hit["ci"])
        print(f"{name:28}hit {hit['mean']:.3f}{ci}")
    less = {name: found["hit_less"][name]["macro"] for name in found["hit_less"]}
    hits = {name: metrics["hit"] for name, metrics in found["saliency_maps"].items()}
    kept = ("run", "step", "config_hash", "data_hash", "n_annotations", "n_images", "commit")
    print(json.dumps({**{k: found[k] for k in kept}, "hit": hits, "hit_less": less}))


if __name__ == "__main__":
    main()
