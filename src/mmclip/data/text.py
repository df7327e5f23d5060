"""Reports: their sections, cleaning, sentences, and tokens with character offsets."""

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The special tokens of a vocabulary trained here; their ids are 0 to 4."""


@dataclass(frozen=True, slots=True)
class Report:
    """The parts of a report that describe the image, cleaned; a part without words is None.

    `text` is what the text encoder reads: findings, then impression.
    """

    findings: str | None
    impression: str | None
    text: str | None


Kind = Literal["findings", "impression", "other"]

_HEADERS: dict[Kind, tuple[str, ...]] = {
    # A section that is both counts as findings, as in MIMIC-CXR's own section files.
    "findings": (
        r"findings? *(?:and|&|/) *impressions?",
        r"impressions? *(?:and|&|/) *findings?",
        r"(?:imaging|radiologic|radiological|radiographic|chest|cxr|x-?ray)? *findings?",
        r"imaging notes?",
    ),
    "impression": (
        r"impressions?(?: *(?:and|&|/) *recommendations?)?",
        r"conclusions?",
        r"interpretation",
        r"opinion",
        r"summary",
    ),
    # What was asked, done and discussed: nothing that is seen on this image.
    "other": (
        r"exam(?:ination)?",
        r"type of exam(?:ination)?",
        r"study",
        r"procedure",
        r"(?:clinical )?indications?(?: for (?:exam(?:ination)?|study))?",
        r"reasons? for (?:the )?(?:exam(?:ination)?|study|test|request)",
        r"(?:(?:past|clinical|medical|patient|social|family) )*history",
        r"clinical (?:information|details|data|statement|diagnosis|presentation)",
        r"presentation",
        r"(?:case )?discussion",
        r"comparisons?",
        r"techniques?",
        r"views?",
        r"date",
        r"wet read",
        r"notifications?",
        r"recommendations?",
        r"addendum",
    ),
}
_KIND_OF_GROUP: list[Kind] = list(_HEADERS)
_HEADER = re.compile(
    r"(?<![\w-])(?:"
    + "|".join("(" + "|".join(names) + ")" for names in _HEADERS.values())
    + r")[ \t]*(?::|(?=\n|$))",
    re.IGNORECASE,
)
_BANNER = re.compile(
    r"^[ \t]*(?:final|preliminary) (?:report|addendum)[ \t]*:?[ \t]*$", re.I | re.M
)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")

_MARK = r"(?:\[\*\*.*?\*\*\]|_{2,}|(?<![A-Za-z])(?:X{4,}|(?:XXX|x{4,})(?![A-Za-z])))"
# One or several marks with only separators between them, such as ___/___ or XXXX, XXXX.
_MARKS = re.compile(rf"{_MARK}(?:[ \t]*[-/:,]?[ \t]*{_MARK})*", re.DOTALL)
_MARKED_XRAY = re.compile(rf"\b(x)-{_MARK}", re.IGNORECASE)
_GAP = "\0"  # stands for removed marks until the text around them is mended
_MENDS = [
    (re.compile(pattern), new)
    for pattern, new in (
        (rf"[-/:]?{_GAP}(?:[-/:](?=\w)|'s\b)|[-/]{_GAP}", _GAP),  # ___-year-old, XXXX's, one-XXXX
        (rf"[(\[][\s,;:{_GAP}]*{_GAP}[\s,;:{_GAP}]*[)\]]", " "),
        (rf"(^|[.?!]\s|[\n(])[ ]*(?:{_GAP}[\s.,;:?!]*)+", r"\1"),
        (rf"\s*[,;:]?\s*{_GAP}\s*(?=[.,;:?!)])", ""),
        (rf"\s*{_GAP}\s*", " "),
    )
]
_ITEM = re.compile(
    r"(?:(?<=[.;:?!])[ \t]*|^[ \t]*)\(?(\d{1,2})[.)](?=\s|[A-Z])"  # 1. or (1)
    r"|^[ \t]*[-*•·][ \t]+",
    re.MULTILINE,
)
_TEMPLATE_MARKS = re.compile(r"\[<|>\]")
_PARAGRAPH_WITHOUT_STOP = re.compile(r"(?<=[A-Za-z0-9)])[ \t]*\n[ \t]*\n\s*(?=[A-Z])")
_DOUBLE_STOP = re.compile(r"(?<=[.?!])(?:\s*\.)+(?=\s|$)")
_NOTHING = {"", "none", "n/a", "na", "nan", "null", "nil", "not available", "not applicable"}

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("‘’‛′`´", "'"),
        **dict.fromkeys("“”„″", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        "⁄": "/",
        "\ufffd": " ",  # what an earlier, wrong decoding left
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", None),
    }
)


def _normalise(raw: str) -> str:
    text = unicodedata.normalize("NFKC", html.unescape(raw)).translate(_CHARACTERS)
    return "\n".join(text.splitlines())


def _remove_numbering(text: str) -> str:
    """Removes "1.", "(2)" and bullets of lists; an item always starts a new sentence.

    A number is one of a list only if it is 1 or the last one's successor: "ribs 8 and 9.", broken
    before the 9, keeps its 9.
    """
    kept, at, last = [], 0, 0
    for match in _ITEM.finditer(text):
        before = text[: match.start()].rstrip()
        if match[1] is not None:
            if int(match[1]) not in (1, last + 1) or before.endswith(("No.", "no.")):
                continue
            last = int(match[1])
        ends_sentence = not before or before[-1] in ".,;:?!"
        kept += [text[at : match.start()], " " if ends_sentence else ". "]
        at = match.end()
    return "".join([*kept, text[at:]])


def _clean(text: str) -> str | None:
    """One section as running text, or None when no words are left."""
    text = _MARKED_XRAY.sub(r"\1-ray", text)  # Open-I hides the "ray" of most x-rays
    text = _remove_numbering(text)
    text = _MARKS.sub(_GAP, text)
    text = _TEMPLATE_MARKS.sub(" ", text)
    text = _PARAGRAPH_WITHOUT_STOP.sub(". ", text)
    for pattern, new in _MENDS:
        text = pattern.sub(new, text)
    text = " ".join(text.split())
    text = re.sub(r"\s+(?=[.,;:)](?:\s|$))", "", text)
    text = _DOUBLE_STOP.sub("", text)
    text = text.lstrip(" .,;:?!)/").rstrip(" ,;:(/")
    if text.strip(" .").lower() in _NOTHING or not any(c.isalpha() for c in text):
        return None
    return text


def _sections(text: str) -> tuple[str, list[tuple[Kind, str]]]:
    """What comes before the first header, and each section's kind and text, in order."""
    found: list[tuple[Kind, int, int]] = []
    for match in _HEADER.finditer(text):
        before = text[: match.start()].rstrip(" \t")
        has_colon = match[0].endswith(":")
        at_line_start = not before or before.endswith("\n")
        if at_line_start or (
            has_colon and (match[0].lstrip()[0].isupper() or before[-1] in ".;:!?")
        ):
            assert match.lastindex is not None
            found.append((_KIND_OF_GROUP[match.lastindex - 1], match.start(), match.end()))
    ends = [start for _, start, _ in found[1:]] + [len(text)]
    parts: list[tuple[Kind, str]] = [
        (kind, text[start:end]) for (kind, _, start), end in zip(found, ends, strict=False)
    ]
    return text[: found[0][1]] if found else text, parts


def _body(text: str, prefix: str, sections: Sequence[tuple[Kind, str]]) -> str:
    """The prose under no header: before the first, or behind what a header of another kind owns.

    Such a header owns its paragraph; in a note of one paragraph without findings or impression,
    where nothing shows the end of "Presentation: ...", its sentence. Titles ("PORTABLE CHEST,
    5:21 A.M.") are no prose.
    """
    is_note = not _PARAGRAPH.search(text.strip()) and all(kind == "other" for kind, _ in sections)
    loose = _PARAGRAPH.split(prefix)
    for kind, section in sections:
        if is_note:
            loose += [section[start:end] for start, end in split_sentences(section)[1:]]
        elif kind == "other":
            loose += _PARAGRAPH.split(section.lstrip())[1:]
    return "\n\n".join(
        paragraph
        for paragraph in loose
        if _SENTENCE_END.search(paragraph)
        and (text.isupper() or any(c.islower() for c in paragraph))
    )


def _join(parts: Iterable[str | None], end: str = "") -> str | None:
    """Parts as one text, each ended as a sentence and none said twice; `end` closes the last."""
    kept = list(dict.fromkeys(part for part in parts if part))
    closed = [p if p[-1] in ".?!" else p + "." for p in kept[:-1]] + kept[-1:]
    return " ".join(closed) + end if closed else None


def parse_report(raw: str | None) -> Report:
    """The findings and the impression of a free report, cleaned.

    Section headers are found at the start of a line, after a sentence, or capitalised before a
    colon. Sections that say what was asked, done or discussed (indication, technique, comparison,
    history, ...) are left out. The fallbacks:

    1. `text` is findings, then impression, or the one there is.
    2. No findings header: the prose outside all sections is the findings, if there is an
       impression, else it is `text` alone. This includes the paragraphs behind a comparison or
       technique, where MIMIC-CXR's headerless bodies stand. MIMIC-CXR's own code takes the last
       paragraph only; a body of two would lose its first.
    3. No header at all: the whole text.
    """
    if raw is None:
        return Report(None, None, None)
    text = _BANNER.sub("\n", _normalise(raw))
    prefix, sections = _sections(text)
    if not sections:
        return Report(None, None, _clean(text))
    findings = _join(_clean(section) for kind, section in sections if kind == "findings")
    impression = _join(_clean(section) for kind, section in sections if kind == "impression")
    if findings is None:
        body = _clean(_body(text, prefix, sections))
        if impression is None:
            return Report(None, None, body)
        findings = body
    return Report(findings, impression, _join((findings, impression)))


def make_report(findings: str | None, impression: str | None) -> Report:
    """A report from sections that the source has parted already (Open-I), cleaned.

    A section that holds headers of its own, because a whole report was pasted into it, is parsed.
    """
    parts = []
    for kind, raw in (("findings", findings), ("impression", impression)):
        text = _normalise(raw or "")
        if any(inner != "other" for inner, _ in _sections(text)[1]):
            parts.append(parse_report(f"{kind}: {text}"))
        elif kind == "findings":
            parts.append(Report(_clean(text), None, None))
        else:
            parts.append(Report(None, _clean(text), None))
    found = _join(part.findings for part in parts)
    concluded = _join(part.impression for part in parts)
    return Report(found, concluded, _join((found, concluded)))


_NEVER_ENDS = {"dr", "drs", "mr", "mrs", "ms", "prof", "vs", "e.g", "i.e", "approx", "cf", "viz"}
_ENDS_BEFORE_CAPITAL = {"a.m", "p.m", "etc", "cm", "mm", "ca", "al", "min", "max", "post", "lat"}
_NUMBERED = {"no", "nos", "fig", "figs", "vol"}
_BOUNDARY = re.compile(
    r"[.!?]+[\"')\]]*(?=\s)"
    r"|(?<=[a-z]{2})\.(?=[A-Z][a-z])"  # a forgotten space: "effusion.No pneumothorax"
    r"|\n[ \t]*(?=\n)"
)
_LAST_WORD = re.compile(r"([A-Za-z](?:[A-Za-z.]*[A-Za-z])?)$")


def split_sentences(text: str) -> list[tuple[int, int]]:
    """The sentences of a report as character spans (start, end).

    Spans are in order, disjoint and not empty; text outside them is white space only. Full stops
    of abbreviations and decimals end no sentence; an empty line does.
    """
    spans: list[tuple[int, int]] = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        if match[0][0] == "." and not _ends_sentence(text, match.start(), match.end()):
            continue
        spans.append((start, match.end()))
        start = match.end()
    spans.append((start, len(text)))
    trimmed = []
    for a, b in spans:
        sentence = text[a:b]
        a += len(sentence) - len(sentence.lstrip())
        b -= len(sentence) - len(sentence.rstrip())
        if a < b:
            trimmed.append((a, b))
    return trimmed


def _ends_sentence(text: str, stop: int, end: int) -> bool:
    """Whether the full stop at `stop`, with its closing marks up to `end`, ends a sentence."""
    word = _LAST_WORD.search(text, max(0, stop - 12), stop)
    if word is None:
        return True
    name = word[1].lower()
    after = text[end:].lstrip()[:1] if end - stop == 1 else ""
    if name in _NEVER_ENDS:
        return False
    if name in _NUMBERED:
        return not after.isdigit()
    if name in _ENDS_BEFORE_CAPITAL:
        return not after.islower()
    if len(name) == 1 and text[stop - 1].isupper():  # an initial, as in "Dr. J. Smith"
        before = text[: word.start()].rstrip()
        return not before.endswith(("Dr.", "Mr.", "Mrs.", "Ms.", "Prof."))
    return True


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer, as BERT's, with a vocabulary trained on some texts.

    Equal texts give an equal vocabulary.

    Args:
        vocab_size: Upper bound, special tokens included; a small corpus fills less. Single
            characters are always in.
        min_frequency: How often a pair of pieces must occur to be merged.

    Raises:
        ValueError: When there are no words to train on.
    """
    texts = list(texts)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers "##a" and its like in the random order of a hash map, and breaks ties by
    # these numbers. Named first, in order, they make equal texts give an equal vocabulary.
    letters = sorted(set().union(*map(tokenizer.normalizer.normalize_str, texts)))
    inner = [c for c in letters if len(tokenizer.pre_tokenizer.pre_tokenize_str(f"a{c}")) == 1]
    inner = [c for c in inner if not c.isspace()]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{c}" for c in inner)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocab = tokenizer.get_vocab()
    if len(vocab) <= len(SPECIAL_TOKENS):
        raise ValueError(
            "there are no words to train a tokenizer on; give reports, or name a pretrained text "
            "encoder by model.text.pretrained"
        )
    # A new one, because in the trained one the pieces named above count as special tokens.
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    made.normalizer, made.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    cls_id, sep_id = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
    made.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@dataclass(frozen=True)
class Tokens:
    """Some texts as tokens, padded at the end to the longest. n texts, t tokens.

    Attributes:
        is_valid: True where there is a token, special ones included, and no padding.
        offsets: Start and end of each token in its source text, in characters; (0, 0) for special
            tokens and padding.
        n_truncated: How many texts were cut.
    """

    ids: Int32[np.ndarray, "n t"]
    is_valid: Bool[np.ndarray, "n t"]
    offsets: Int32[np.ndarray, "n t 2"]
    n_truncated: int


def tokenise(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, max_tokens: int
) -> Tokens:
    """Tokenises texts in the tokenizer's frame, such as [CLS] ... [SEP], cut at `max_tokens`.

    The special tokens of the frame count among `max_tokens`.

    Raises:
        ValueError: When `max_tokens` leaves no room for a word.
    """
    if max_tokens < 3:
        raise ValueError(f"max_tokens={max_tokens} leaves no room for a word; take 3 or more")
    if not texts:
        empty = np.zeros((0, 0), np.int32)
        return Tokens(empty, empty.astype(bool), np.zeros((0, 0, 2), np.int32), 0)
    batch = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_tokens,
        padding="longest",
        padding_side="right",
        return_offsets_mapping=True,
    )
    encodings = batch.encodings
    assert encodings is not None
    return Tokens(
        ids=np.array(batch["input_ids"], np.int32),
        is_valid=np.array(batch["attention_mask"], bool),
        offsets=np.array(batch["offset_mapping"], np.int32),
        n_truncated=sum(bool(encoding.overflowing) for encoding in encodings),
    )
