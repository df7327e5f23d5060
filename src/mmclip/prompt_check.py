"""Whether a model can read the prompts of a finding: what it cannot read is not scored in silence.

Refused: a finding of whose name the tokenizer knows no word, a prompt that is cut before the
finding's name, and a positive prompt that is equal to a negative one. Warned of: words that are
not in the vocabulary, or that it only spells, and a name that is nearly that of a known finding.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from mmclip.data.text import tokenise
from mmclip.embed import words_hardly_known
from mmclip.prompts import Prompts, PromptSet, known_prompt_sets, load_prompts, plain_name

logger = logging.getLogger(__name__)


class PromptError(ValueError):
    """Prompts cannot stand for their findings; the message names them and the next step."""


class PromptFaults(NamedTuple):
    """What is wrong with the prompts of one finding; empty where nothing is."""

    refused: tuple[str, ...]
    warned: tuple[str, ...]


class _Text(NamedTuple):
    """A prompt as the tokenizer reads it."""

    ids: tuple[int, ...]
    is_cut: bool
    name: tuple[int, ...] | None  # of its tokens, those in the finding's name; None without a name
    is_name_cut: bool


def check_prompts(
    tokenizer: PreTrainedTokenizerFast | None,
    prompt_sets: Iterable[PromptSet],
    findings: Sequence[str],
    max_tokens: int,
) -> None:
    """Warns of what a model hardly reads of the prompts of some findings.

    Args:
        tokenizer: Of the model; None where it does not tell what it reads: then names alone are
            checked.
        prompt_sets: What stands for the findings.
        findings: As they are asked for.
        max_tokens: The model reads so many tokens of a text.

    Raises:
        PromptError: When the prompts of a finding cannot stand for it.
    """
    prompt_sets = tuple(prompt_sets)
    for finding in dict.fromkeys(findings):
        if (meant := meant_finding(finding, prompt_sets)) is not None:
            logger.warning(
                "prompts of %r: no prompt set names it; did you mean %r?", finding, meant
            )
        if names := several_findings(finding, prompt_sets):
            said = ", ".join(map(repr, names))
            logger.warning("prompts of %r: one finding to the model; name %s apart", finding, said)
        if is_sentence(finding, prompt_sets):
            logger.warning(
                "prompts of %r: a sentence in the place of a name; name what it may show, such as "
                "'pleural effusion'",
                finding,
            )
    if tokenizer is None:
        return
    refused: dict[str, None] = {}
    warned: dict[str, None] = {}
    for prompts in prompt_sets:
        for finding in findings:
            faults = prompt_faults(tokenizer, prompts, finding, max_tokens)
            if faults.refused:
                more = len(faults.refused) - 1
                others = f" (and {more} more of its prompts likewise)" if more else ""
                refused[f"{finding!r}: {faults.refused[0]}{others}"] = None
            warned |= dict.fromkeys(f"{finding!r}: {fault}" for fault in faults.warned)
    for said in warned:
        logger.warning("prompts of %s", said)
    if refused:
        raise PromptError(
            f"prompts of {'; '.join(refused)}. Name the finding as reports of the training data "
            f"do, or give prompts of your own by --prompts (in Python: prompts=)"
        )


_SAYS = re.compile(
    r"^(no|not|without|there (is|are)|this is)\b|\b(is|are) \w+$|[.!?]$", re.IGNORECASE
)

LIKENESS = 0.8
"""Names so alike, by difflib's ratio, are taken for one that is misspelt. [chosen: "plural efusion"
and "noduel" are found; "pneumonia" and "pneumothorax" are 0.67]"""


def meant_finding(finding: str, prompt_sets: Iterable[PromptSet]) -> str | None:
    """The known finding that a name misspells, if it seems to; None of a known one."""
    name = plain_name(finding)
    known = _known(prompt_sets)
    if name in known:
        return None
    return next(iter(get_close_matches(name, sorted(known), 1, LIKENESS)), None)


def several_findings(finding: str, prompt_sets: Iterable[PromptSet]) -> list[str]:
    """The known findings that a name lists, as "edema, mass" does; none of another name."""
    known = _known(prompt_sets)
    names = [name for name in map(plain_name, re.split(r"[,;|/]", finding)) if name]
    is_list = len(names) > 1 and plain_name(finding) not in known and known.issuperset(names)
    return names if is_list else []


def is_sentence(finding: str, prompt_sets: Iterable[PromptSet]) -> bool:
    """Whether a name says that something is or is not there, as prompts do with a name in them."""
    return plain_name(finding) not in _known(prompt_sets) and bool(_SAYS.search(finding.strip()))


def _known(prompt_sets: Iterable[PromptSet]) -> frozenset[str]:
    return _shipped()[1].union(*(each.named for each in prompt_sets))


def prompt_faults(
    tokenizer: PreTrainedTokenizerFast, prompts: PromptSet, finding: str, max_tokens: int
) -> PromptFaults:
    """What is wrong with the prompts of one finding.

    A finding that a prompt set of the package names by itself gives no warning there: its words
    are a radiologist's, and a small vocabulary that lacks some of them is no fault of the prompts.
    """
    texts = prompts.texts(finding)
    names = prompts.names(finding)
    sides = [[_read(tokenizer, text, names, max_tokens) for text in side] for side in texts]
    refused = _refused(tokenizer, texts, sides, max_tokens)
    if refused or (prompts.hash in _shipped()[0] and plain_name(finding) in _shipped()[1]):
        return PromptFaults(tuple(refused), ())
    warned = []
    if any(text.is_cut for side in sides for text in side):
        warned.append(f"the model reads {max_tokens} tokens, and some are cut behind the name")
    own = plain_name(finding) in prompts.findings
    said = [text for side in texts for text in side] if own else [names[0]]
    if words := dict.fromkeys(w for t in said for w in words_hardly_known(tokenizer, t)):
        warned.append(
            f"{', '.join(words)}: not in the vocabulary of the model, which spells it letter by "
            f"letter; the model can hardly know what it means: check the spelling, or say it as a "
            f"report would"
        )
    return PromptFaults((), tuple(warned))


def _refused(
    tokenizer: PreTrainedTokenizerFast,
    texts: Prompts,
    sides: Sequence[Sequence[_Text]],
    max_tokens: int,
) -> list[str]:
    """Why the prompts of a finding cannot stand for it."""
    positives, negatives = sides
    found: dict[str, None] = {}
    for said, read in zip(
        [*texts.positives, *texts.negatives], [*positives, *negatives], strict=True
    ):
        words = read.ids if read.name is None else read.name
        if read.is_name_cut:
            found[f"{_short(said)} is cut after {max_tokens} tokens, before the finding's name"] = (
                None
            )
        elif all(i == tokenizer.unk_token_id for i in words):
            what = "word" if read.name is None else "word of the finding's name"
            found[f"{_short(said)} has no {what} that the model's vocabulary holds"] = None
    denied = {read.ids: said for said, read in zip(texts.negatives, negatives, strict=True)}
    for said, read in zip(texts.positives, positives, strict=True):
        if not found and read.ids in denied:
            other = denied[read.ids]
            found[
                f"the positive prompt {_short(said)} and the negative one {_short(other)} are the "
                f"same to the model"
            ] = None
    return list(found)


def _read(
    tokenizer: PreTrainedTokenizerFast, text: str, names: Sequence[str], max_tokens: int
) -> _Text:
    tokens = tokenise(tokenizer, [text], max_tokens=max_tokens)
    start, end = tokens.offsets[0].T
    is_word = end > start
    ids = tokens.ids[0]
    is_cut = tokens.n_truncated > 0
    span = _span(text, names)
    words = tuple(ids[is_word].tolist())
    if span is None:
        return _Text(words, is_cut, None, False)
    is_name = is_word & (start < span[1]) & (end > span[0])
    read_to = int(end[is_word].max()) if is_word.any() else 0
    return _Text(words, is_cut, tuple(ids[is_name].tolist()), is_cut and read_to < span[1])


def _span(text: str, names: Sequence[str]) -> tuple[int, int] | None:
    """Where a text names its finding, by the first of some names that it holds."""
    for name in names:
        at = text.lower().find(name.lower())
        if at >= 0:
            return at, at + len(name)
    return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


@cache
def _shipped() -> tuple[frozenset[str], frozenset[str]]:
    """The hashes of the package's prompt sets, and the findings that they name by themselves."""
    sets = [load_prompts(name) for name in known_prompt_sets()]
    names = frozenset[str]().union(*(each.named for each in sets))
    return frozenset(each.hash for each in sets), names
