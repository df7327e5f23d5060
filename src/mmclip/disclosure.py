"""What a checkpoint would give away to whom it is shared with."""

from collections.abc import Iterator
from functools import cache

from mmclip.checkpoint import RUN_FILES_KEY, Checkpoint, run_folder
from mmclip.config_io import packaged_names, read_toml
from mmclip.data.leakage.trained import KEY_FILE
from mmclip.escape import portable_command

N_WORDS = 40
"""Words that are listed. [chosen: they fit a screen]"""

_LISTS = ("lexicon", "findings", "prompt_sets", "disease_prompts", "report_labels")


def unfamiliar_words(checkpoint: Checkpoint) -> list[str]:
    """Words of a vocabulary made of reports that no list of the package has, the rarest first.

    Among them stand names of people and places that several patients' reports share, such as that
    of who signs them. Empty where the text encoder brought its vocabulary.
    """
    if checkpoint.config.model.text.pretrained is not None:
        return []
    numbers = checkpoint.tokenizer.get_vocab()
    words = [w for w in numbers if w.isalpha() and len(w) > 2 and w not in _familiar()]
    return sorted(words, key=lambda word: -numbers[word])


@cache
def _familiar() -> frozenset[str]:
    """All words of the package's lists, in any of their entries."""
    found: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, str):
            found.update("".join(c if c.isalpha() else " " for c in value.lower()).split())
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(key)
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    for folder in _LISTS:
        for name in packaged_names(folder):
            collect(read_toml("list of words", folder, name))
    return frozenset(found)


def given_away(checkpoint: Checkpoint) -> Iterator[str]:
    """One line each for what a person should look at before a checkpoint or its run is shared."""
    text, meta = checkpoint.config.model.text, checkpoint.meta
    if text.pretrained is not None:
        yield "vocabulary: that of the pretrained text encoder, with no word of the reports"
    else:
        words = unfamiliar_words(checkpoint)
        shown = ", ".join(words[:N_WORDS]) or "none"
        more = f" and {len(words) - N_WORDS:,} more in tokenizer/" if len(words) > N_WORDS else ""
        yield (
            f"vocabulary: words that reports of {text.vocab_min_patients} or more patients share; "
            f"not of mmclip's lists, and to be looked through for names: {shown}{more}"
        )
    commands = [meta.get("command", ""), *meta.get("resumed_by", [])]
    named = sum(portable_command(command) != command for command in commands)
    if named or (text.pretrained or "").startswith(("/", "~", "..")):
        yield "meta.json and config.json: paths of this machine, in the command that trained"
    if meta.get(RUN_FILES_KEY):
        is_there = (run_folder(checkpoint.folder) / KEY_FILE).is_file()
        yield (
            f"{KEY_FILE}: with it others can try out which patients and images trained; "
            f"{'leave it out' if is_there else 'it is not here'}"
        )
    yield (
        "seen.json, meta.json: names of findings, numbers of images, collections; weights may "
        "recall reports, which no check here rules out; `mmclip export` copies weights, tokenizer "
        "and a card alone"
    )
