"""What benches share that set programs side by side: turns, transformers' model, the last line."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import BertConfig, BertModel, VisionTextDualEncoderModel, ViTConfig, ViTModel

from mmclip.config import Config


def take_turns(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each side in each round, one side after the other in every round.

    Whatever else the machine does so weighs on all sides.

    Args:
        sides: What is measured.
        rounds: That count.
        warm_up: Rounds before them.
        wait: Returns once a side's work is done, for a device that works behind the call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + warm_up):
        for name, work in sides.items():
            wait()
            began = time.perf_counter()
            work()
            wait()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def transformers_model(
    config: Config, channels: int, vocab_size: int, max_tokens: int
) -> VisionTextDualEncoderModel:
    """transformers' model of the same sizes, with random weights and no dropout, to be trained."""
    image, text = config.model.image, config.model.text
    vision = ViTConfig(
        hidden_size=image.width, num_hidden_layers=image.depth, num_attention_heads=image.heads,
        intermediate_size=4 * image.width, image_size=config.data.image_size,
        patch_size=image.patch_size, num_channels=channels, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=vocab_size, hidden_size=text.width, num_hidden_layers=text.depth,
        num_attention_heads=text.heads, intermediate_size=4 * text.width,
        max_position_embeddings=max_tokens, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    both = VisionTextDualEncoderModel(vision_model=ViTModel(vision), text_model=BertModel(bert))
    return both.train()


def print_line(found: Mapping[str, object], out: Path | None) -> None:
    """The last line, with the load that others put on the machine; to a .jsonl, too, if named."""
    load = [round(x, 1) for x in os.getloadavg()]
    line = json.dumps({**found, "load_of_the_machine": load})
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)
