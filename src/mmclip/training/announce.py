"""What is said before the first step: what runs, and where a batch is not what it seems."""

import torch
from accelerate import Accelerator

from mmclip.config import Config
from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.leakage.check import patient_key
from mmclip.data.streams import rows_by_stream
from mmclip.progress import console
from mmclip.training.state import TrainState


def say_what_runs(
    config: Config, accelerator: Accelerator, dataset: ImageTextDataset, state: TrainState
) -> None:
    """Prints the size of data, model and hardware, and what of a step is not as one may think."""
    train = config.train
    millions = sum(p.numel() for p in state.model.parameters()) / 1e6
    counts = rows_by_stream(dataset)
    said = {"n_unpaired": "unpaired images", "n_lone_reports": "reports", "n_bare": "bare images"}
    beside = [f"{counts[name]:,} {what}" for name, what in said.items() if counts[name]]
    unpaired = " and ".join(["", *beside])
    n_patients = len({patient_key(sample) for sample in dataset.samples})
    n_threads = torch.get_num_threads()
    console.print(
        f"{counts['n_pairs']:,} pairs{unpaired} of {n_patients:,} patients, "
        f"{millions:.1f} million parameters, {accelerator.device.type} x "
        f"{accelerator.num_processes}, {train.precision}, "
        f"{n_threads} thread{'s' * (n_threads != 1)}"
    )
    if train.n_micro_batches > 1 and not train.gradient_cache:
        console.print(
            f"gradient accumulation: the contrastive negatives (and a ResNet's batch statistics) "
            f"are the {train.micro_batch_size} pairs of a micro-batch, not the "
            f"{train.batch_size} of the batch"
        )
    if config.unpaired.rows_per_pair and not counts["n_unpaired"]:
        console.print(
            f"no training image has labels and no report, so there are no prompts of labels, for "
            f"which unpaired.rows_per_pair={config.unpaired.rows_per_pair:g} is set: pairs train "
            f"alone. A further --data folder with labelled images adds them",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
    for line in repeats(config, counts["n_pairs"], counts["n_unpaired"]):
        console.print(line, style="yellow", soft_wrap=True)


def repeats(config: Config, n_pairs: int, n_unpaired: int) -> list[str]:
    """Says, in a line for either stream, that every step reads an image more than once.

    Such a batch trains, but its repeats are positives of one another: fewer negatives than set.
    (Two epochs may meet within a step, so now and then any batch repeats some.)
    """
    size, ratio = config.train.batch_size, config.unpaired.rows_per_pair
    fits, lines = min(size, n_pairs), []
    if size > n_pairs:
        lines.append(
            f"images repeat within every step: train.batch_size={size} and there are {n_pairs} "
            f"pairs; set it to at most {n_pairs}"
        )
    if n_unpaired and (asked := round(ratio * size)) > n_unpaired:
        if round(ratio * fits) <= n_unpaired:
            remedy = f"with train.batch_size={fits} it reads {round(ratio * fits)}"
        else:
            remedy = f"set it to at most {n_unpaired / fits:.3g}"
        lines.append(
            f"images repeat within every step: unpaired.rows_per_pair={ratio:g} reads {asked} "
            f"unpaired images and there are {n_unpaired}; {remedy}"
        )
    return lines
