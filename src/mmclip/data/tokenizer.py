"""The tokenizer of a pretrained text encoder, and the special tokens that it sets around a text."""

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmclip.hub import why_unavailable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids of the special tokens that a tokenizer sets around a text, and of two more.

    Attributes:
        begin: Before the words: [CLS] of BERT, the start of text of CLIP, nothing of T5.
        end: Behind them: [SEP] of BERT, the end of text of CLIP and T5.
        pad: What fills a shorter text up.
        mask: What stands in the place of a masked word.
    """

    begin: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    mask: int

    @property
    def size(self) -> int:
        """Tokens around a text."""
        return len(self.begin) + len(self.end)


def frame_of(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """The frame of a tokenizer that has a padding and a mask token; see `load_tokenizer`."""
    made = tokenizer("a", return_special_tokens_mask=True)
    ids, is_special = list(made["input_ids"]), list(made["special_tokens_mask"])
    first = is_special.index(0) if 0 in is_special else len(ids)
    last = len(ids) - is_special[::-1].index(0) if 0 in is_special else len(ids)
    pad, mask = tokenizer.pad_token_id, tokenizer.mask_token_id
    assert isinstance(pad, int) and isinstance(mask, int)
    return Frame(tuple(ids[:first]), tuple(ids[last:]), pad, mask)


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a text encoder, from a folder or a hub id.

    One without a mask token, as CLIP's, SigLIP's and T5's, gets [MASK] as a new last token; the
    encoder gets an embedding for it, see `text_towers.build_text_encoder`.

    Raises:
        ValueError: When there is none, it has no character offsets, it pads nothing, or it puts no
            token of its own around a text.
    """
    remedy = "give a folder that holds tokenizer.json, or the id of a model on the hub"
    if reason := why_unavailable(name_or_folder):
        raise ValueError(f"no tokenizer can be loaded from {name_or_folder!r} ({reason}); {remedy}")
    folder = Path(name_or_folder)
    if (folder / "meta.json").is_file() and (folder / "tokenizer").is_dir():  # a checkpoint of ours
        name_or_folder = str(folder / "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        # A class that needs sentencepiece: its tokenizer.json, where there is one, does without.
        tokenizer = _of_tokenizer_json(name_or_folder)
        if tokenizer is None:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            if "sentencepiece" in said.lower():
                remedy = "pip install 'mmclip[sentencepiece]', or " + remedy
            raise ValueError(
                f"no tokenizer can be loaded from {name_or_folder!r} ({said}); {remedy}"
            ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        tokenizer = _of_tokenizer_json(name_or_folder)
        if tokenizer is None:
            raise ValueError(
                f"the tokenizer of {name_or_folder!r} is a {kind}, which gives no character "
                f"offsets; use an encoder with a fast tokenizer (tokenizer.json)"
            )
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{name_or_folder!r} holds no tokenizer: neither tokenizer.json nor a vocabulary "
            f"(vocab.txt, spiece.model, or vocab.json with merges.txt), so every word would be "
            f"unknown; copy the tokenizer's files beside config.json, or {remedy}"
        )
    if tokenizer.pad_token is None:
        raise ValueError(
            f"the tokenizer of {name_or_folder!r} has no pad_token; use a text encoder whose "
            f"tokenizer pads, such as a BERT-like one, or name its pad_token in "
            f"tokenizer_config.json"
        )
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        logger.info(
            "the tokenizer of %s has no mask token; [MASK] is added as token %d",
            name_or_folder,
            tokenizer.mask_token_id,
        )
    frame = frame_of(tokenizer)
    if not (frame.begin or frame.end):
        raise ValueError(
            f"the tokenizer of {name_or_folder!r} puts no special token before or after a text; "
            f"use a text encoder whose tokenizer does, such as a BERT-like one"
        )
    return tokenizer


def _of_tokenizer_json(name_or_folder: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer that tokenizer.json describes, whatever class wrote it; None without one."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(name_or_folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None
