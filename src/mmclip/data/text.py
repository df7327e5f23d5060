"""Reports: their sections, cleaning, sentences, and tokens with character offsets."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mmclip.data.cleaning import clean, normalise
from mmclip.data.entities import find_entities
from mmclip.data.pieces import PieceWords
from mmclip.data.sections import (
    Section,
    mend_headings,
    says_more_than_what_was_done,
    split_blocks,
    split_sections,
)

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 50_000
"""A report is cut here; those of Open-I have at most some 2,000 characters [chosen]."""

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


_BANNER = re.compile(
    r"^[ \t*]*(?:final|preliminary)(?: (?:report|addendum|result))?[ \t*]*:?[ \t*]*$", re.I | re.M
)
_ORGAN_LINE = re.compile(
    r"^[ \t]*(?:lungs?|airways?|trachea|pleura\w*|heart|cardi\w+|mediastin\w+|hil(?:a|um)|bones?"
    r"|osseous|skelet\w+|soft tissues?|chest wall|diaphragms?|(?:support |medical )?devices?"
    r"|lines?|tubes?"
    r"|(?:pulmonary )?vasculature|upper abdomen)\b[^:\n]{0,40}:[ \t]*\w",
    re.IGNORECASE | re.MULTILINE,
)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_TELLS_WHO_WAS_CALLED = re.compile(
    r"\b(?:told|called|notified|informed|paged|relayed|conveyed|communicat\w+|discuss\w+"
    r"|report(?:ed)? (?:to|by)|telephon\w+|phoned?|verbal\w*|acknowledg\w+|read back|aware"
    r"|dr|drs|physician|house ?staff|nurse|dictated|signed|emailed|alerted)\b",
    re.IGNORECASE,
)


def _body(text: str, prefix: str, sections: Sequence[Section]) -> str:
    """The prose under no header: before the first, or behind what a header of another kind owns.

    Such a header owns its paragraph; in a note of one paragraph without findings or impression,
    where nothing shows the end of "Presentation: ...", its sentence. Titles ("PORTABLE CHEST,
    5:21 A.M.") are no prose; lines that name an organ ("Pleura: no effusion") are.
    """
    is_note = not _PARAGRAPH.search(text.strip()) and all(
        s.kind in ("other", "diagnosis") for s in sections
    )
    is_shouted = text.isupper()
    loose = _PARAGRAPH.split(prefix)
    for kind, section in sections:
        if is_note:
            loose += [section[start:end] for start, end in split_sentences(section)[1:]]
        elif kind in ("other", "diagnosis"):
            loose += _PARAGRAPH.split(section.lstrip())[1:]
    return "\n\n".join(
        paragraph
        for paragraph in loose
        if (_SENTENCE_END.search(paragraph) and (is_shouted or any(c.islower() for c in paragraph)))
        or _ORGAN_LINE.search(paragraph)
    )


def _under_exam(section: str) -> str:
    """What a heading that names the examination heads, without lines that say what was done."""
    paragraphs = _PARAGRAPH.split(section)
    while paragraphs and not says_more_than_what_was_done(paragraphs[0]):
        del paragraphs[0]
    return "\n\n".join(paragraphs)


def _join(parts: Iterable[str | None], end: str = "") -> str | None:
    """Parts as one text, each ended as a sentence and none said twice; `end` closes the last."""
    kept = list(dict.fromkeys(part for part in parts if part))
    closed = [p if p[-1] in ".?!" else p + "." for p in kept[:-1]] + kept[-1:]
    return " ".join(closed) + end if closed else None


def parse_report(raw: str | None) -> Report:
    """The findings and the impression of a free report, cleaned.

    Section headers are found at the start of a line, after a sentence, or capitalised before a
    colon, misspelt ones too. Sections that say what was asked, done, advised or discussed
    (indication, technique, comparison, recommendation, ...), wet reads, signatures and numbers are
    left out. The fallbacks:

    1. `text` is findings, then impression, or the one there is.
    2. No findings header: the prose under a header that names the examination ("CHEST, TWO
       VIEWS:") is the findings.
    3. No such header either: the prose outside all sections is the findings, if there is an
       impression, else it is `text` alone. This includes the paragraphs behind a comparison or
       technique, where MIMIC-CXR's headerless bodies stand. MIMIC-CXR's own code takes the last
       paragraph only; a body of two would lose its first. A comment is read only here.
    4. No header at all: the whole text.

    An addendum's sentences that state a finding are added to the impression, or to `text`; those
    that tell who was called are left out. A report longer than MAX_CHARACTERS is cut, with a
    warning.
    """
    return Report(None, None, None) if raw is None else parse_reports([raw])[0]


def parse_reports(raws: Sequence[str]) -> tuple[Report, list[int]]:
    """One report of several of a study: their findings, then their impressions, in order.

    A report without headings that stands first is findings, where another has headings. One that
    stands later is an addendum that lacks the word, so it is added as `parse_report` adds them, but
    for no sentence other than those that tell who was called. A text that stands twice is read
    once.

    Args:
        raws: At least one, the earliest first.

    Returns:
        The report, and the indices of those that add nothing to it, as they have no words or only
        tell who was called.
    """
    order = sorted({raw: i for i, raw in reversed(list(enumerate(raws)))}.values())
    parts: list[Report] = []
    stated: list[str] = []
    empty: list[int] = []
    for i in order:
        part, addenda = _parse(raws[i])
        added = _stating_a_finding(addenda)
        if len(order) > 1 and part.findings is None and part.impression is None:
            prose = _without_calls(part.text)
            part = Report(None, None, None if parts else " ".join(prose) or None)
            added = [*(prose if parts else ()), *added]
        if len(order) > 1 and part.text is None and not added:
            empty.append(i)
        parts.append(part)
        stated += added
    has_headings = any(part.findings or part.impression for part in parts)
    findings = _join(
        part.findings or (part.text if has_headings and part.impression is None else None)
        for part in parts
    )
    impression = _join(part.impression for part in parts)
    text = _join((findings, impression)) if has_headings else parts[0].text
    return _with_addenda(Report(findings, impression, text), stated), empty


def _parse(raw: str) -> tuple[Report, list[str]]:
    """A report without its addenda, and these."""
    report, addenda = split_blocks(mend_headings(_cut(normalise(_cut(raw)))))
    text = _BANNER.sub("\n", report)
    prefix, sections = split_sections(text)
    added = [section for kind, section in sections if kind == "addendum"]
    for addendum in addenda:
        parts = split_sections(_BANNER.sub("\n", addendum))
        added += [parts[0], *(s.text for s in parts[1] if s.kind not in ("other", "admin"))]
    cleaned = [part for section in added if (part := clean(section)) is not None]
    return _parse_sections(text, prefix, sections), cleaned


def _parse_sections(text: str, prefix: str, sections: Sequence[Section]) -> Report:
    """The report that the sections of a text make, addenda aside."""
    if not sections:
        return Report(None, None, clean(text))
    sections = _with_last_diagnosis(sections)
    findings = _join(clean(s.text) for s in sections if s.kind == "findings")
    impression = _join(clean(s.text) for s in sections if s.kind == "impression")
    if findings is None:
        findings = _join(clean(_under_exam(s.text)) for s in sections if s.kind == "exam")
    if findings is None:
        body = clean(_body(text, prefix, sections))
        if impression is None:
            comments = [clean(s.text) for s in sections if s.kind == "comment"]
            return Report(None, None, _join((body, *comments)))
        findings = body
    return Report(findings, impression, _join((findings, impression)))


def _with_last_diagnosis(sections: Sequence[Section]) -> Sequence[Section]:
    """The sections, with the diagnosis that ends a report as the impression that it lacks."""
    kinds = [s.kind for s in sections]
    if "diagnosis" not in kinds or "impression" in kinds:
        return sections
    said = [i for i, kind in enumerate(kinds) if kind not in ("admin", "addendum")]
    if kinds[said[-1]] != "diagnosis":
        return sections
    return [s._replace(kind="impression") if i == said[-1] else s for i, s in enumerate(sections)]


def _without_calls(text: str | None) -> list[str]:
    """The sentences of a text but for those that tell who was called."""
    text = text or ""
    return [
        text[start:end]
        for start, end in split_sentences(text)
        if not _TELLS_WHO_WAS_CALLED.search(text, start, end)
    ]


def _stating_a_finding(addenda: Sequence[str]) -> list[str]:
    """The sentences of some addenda that state a finding."""
    said = [sentence for addendum in addenda for sentence in _without_calls(addendum)]
    if not said:
        return []
    found = find_entities(said)
    return [s for s, es in zip(said, found, strict=True) if any(e.kind == "finding" for e in es)]


def _with_addenda(report: Report, stated: Sequence[str]) -> Report:
    """A report with some sentences added to its impression, or to the text of one without."""
    if not stated:
        return report
    if report.impression is None and report.findings is None:
        return Report(None, None, _join((report.text, *stated)))
    impression = _join((report.impression, *stated))
    return Report(report.findings, impression, _join((report.findings, impression)))


def _cut(raw: str) -> str:
    if len(raw) > MAX_CHARACTERS:
        logger.warning(
            "a report of %d characters is cut at %d", len(raw), MAX_CHARACTERS,
        )  # fmt: skip
    return raw[:MAX_CHARACTERS]


def make_report(findings: str | None, impression: str | None) -> Report:
    """A report from sections that the source has parted already (Open-I), cleaned.

    A section that holds headers of its own, because a whole report was pasted into it, is parsed.
    """
    parts = []
    for kind, raw in (("findings", findings), ("impression", impression)):
        text = mend_headings(normalise(_cut(raw or "")))
        if any(inner.kind not in ("other", "exam") for inner in split_sections(text)[1]):
            parts.append(parse_report(f"{kind}: {text}"))
        elif kind == "findings":
            parts.append(Report(clean(text), None, None))
        else:
            parts.append(Report(None, clean(text), None))
    found = _join(part.findings for part in parts)
    concluded = _join(part.impression for part in parts)
    return Report(found, concluded, _join((found, concluded)))


_NEVER_ENDS = {"dr", "drs", "mr", "mrs", "ms", "prof", "vs", "e.g", "i.e", "approx", "cf", "viz"}
_ENDS_BEFORE_CAPITAL = {"a.m", "p.m", "etc", "cm", "mm", "ca", "al", "min", "max", "post", "lat"}
_NUMBERED = {"no", "nos", "fig", "figs", "vol"}
# It begins with a set of characters, which the search for them makes use of: half the time.
_BOUNDARY = re.compile(
    r"[.!?\n](?:(?<=[.!?])(?<![.!?]{2})[.!?]*+[\"')\]]*+(?=\s)"
    r"|(?<=[a-z]{2}\.)(?=[A-Z][a-z])"  # a forgotten space: "effusion.No pneumothorax"
    r"|(?<=\n)[ \t]*(?=\n))"
)
_AFTER_SPACE = re.compile(r"\s*(\S?)")
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
    following = _AFTER_SPACE.match(text, end)
    after = following[1] if following and end - stop == 1 else ""
    if name in _NEVER_ENDS:
        return False
    if name in _NUMBERED:
        return not after.isdigit()
    if name in _ENDS_BEFORE_CAPITAL:
        return not after.islower()
    if len(name) == 1 and text[stop - 1].isupper():  # an initial, as in "Dr. J. Smith"
        before = text[max(0, word.start() - 12) : word.start()].rstrip()
        return not before.endswith(("Dr.", "Mr.", "Mrs.", "Ms.", "Prof."))
    return True


def _normalizer() -> normalizers.Normalizer:
    return normalizers.BertNormalizer(lowercase=True)


def _words_of_pieces() -> PieceWords:
    """The words of BERT's way of splitting, normalised, of what stands between two spaces."""
    normalizer, splitter = _normalizer(), pre_tokenizers.BertPreTokenizer()
    return PieceWords(
        lambda piece: tuple(
            word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(piece))
        )
    )


def words_of_several(
    reports: Iterable[tuple[str, str]], min_patients: int
) -> tuple[list[str], int]:
    """Reports without the words of few patients, such as the name of one, for `train_tokenizer`.

    Args:
        reports: Text and patient of each.
        min_patients: In whose reports a word must be.

    Returns:
        The words that are left of each distinct report, in order, and how many words are left out.

    Source: ours; a vocabulary is part of every checkpoint, and a rare word of it names a patient.
    """
    words = _words_of_pieces()
    patients: dict[str, set[str]] = {}
    sure: set[str] = set()  # pieces whose words all have patients enough
    distinct = sorted(set(reports))
    for text, patient in distinct:
        for piece in set(text.split(" ")) - sure:
            known = [patients.setdefault(word, set()) for word in words[piece]]
            for few in known:
                if len(few) < min_patients:
                    few.add(patient)
            if all(len(few) >= min_patients for few in known):
                sure.add(piece)
    shared = {word for word, known in patients.items() if len(known) >= min_patients}
    left = {
        piece: " ".join(word for word in split if word in shared) for piece, split in words.items()
    }
    texts = [
        " ".join(filter(None, map(left.__getitem__, text.split(" "))))
        for text in dict.fromkeys(text for text, _ in distinct)
    ]
    return texts, len(patients) - len(shared)


def _count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each normalised word stands in some texts."""
    pieces = Counter(chain.from_iterable(text.split(" ") for text in texts))
    split, words = _words_of_pieces(), Counter[str]()
    for piece, n in pieces.items():
        for word in split[piece]:
            words[word] += n
    return words


WORDS_AT_ONCE = 1024
"""Occurrences of a word that a trainer gets as one text. [chosen: some kilobytes]"""


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
        ValueError: When the texts hold no words.
    """
    # A trainer only counts words, so it gets them split already: a third of the time.
    words = _count_words(texts)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The trainer numbers "##a" and its like in the random order of a hash map, and breaks ties by
    # these numbers. Named first, in order, they make equal texts give an equal vocabulary.
    splitter = pre_tokenizers.BertPreTokenizer()
    letters = sorted(set().union(*words))
    inner = [c for c in letters if len(splitter.pre_tokenize_str(f"a{c}")) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{c}" for c in inner)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (
            f"{word} " * min(WORDS_AT_ONCE, n - given)
            for word, n in words.items()
            for given in range(0, n, WORDS_AT_ONCE)
        ),
        trainer,
    )
    vocab = tokenizer.get_vocab()
    if len(vocab) <= len(SPECIAL_TOKENS):
        raise ValueError(
            "there are no words to train a tokenizer on; give reports, or name a pretrained text "
            "encoder by model.text.pretrained"
        )
    # A new one, because in the trained one the pieces named above count as special tokens.
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    made.normalizer, made.pre_tokenizer = _normalizer(), splitter
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


def check_text(text: object, what: str) -> str:
    """A text as it was given, once it is sure that it has words and is text.

    Args:
        text: Of a user.
        what: It is called in the error.

    Raises:
        ValueError: Of anything but a text, of a blank one, and of one that no file could hold.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is {text!r}; give words, such as 'Small left pleural effusion.'")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has half a character at place {error.start} ({text[error.start]!r}); decode "
            f"it anew"
        ) from None
    return text


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
