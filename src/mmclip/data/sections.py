"""Where a report's sections begin: headings, misspelt ones too, and the rules between reports."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from mmclip.data.spelling import edit_distance

Kind = Literal[
    "findings", "impression", "diagnosis", "exam", "comment", "addendum", "admin", "other"
]

_HEADERS: dict[Kind, tuple[str, ...]] = {
    # Who signed, was called or is to do what, and codes: never part of a report's text.
    "admin": (
        r"end of (?:impression|findings|report|diagnosis|addendum)", r"addend(?:um|a) ends?",
        r"summary code", r"advi[cs]e(?=[ \t]*:)",
        r"summary(?=[ \t]*:\s*\d ?-)",  # CheXpert's "SUMMARY: 2-ABNORMAL"
        r"(?:accession|acc|mrn|medical record|patient|exam|order|report)(?: (?:number|no\.?|id|#))",
        r"accession", r"mrn", r"report status",
        r"(?:(?:electronically |digitally )?(?:signed|dictated|approved|verified|transcribed"
        r"|finalized|authenticated|attested|interpreted|reviewed|reported))"
        r"(?: by|(?: on| at)?(?=[ \t]*:))",
        r"(?:electronically |digitally )?signed(?: on| at)?",
        r"(?:attending|staff|reading|interpreting|resident|fellow)(?: radiologist| physician)?"
        r"(?=[ \t]*:)",
        r"(?:consultant |reporting |supervising )?radiologist(?=[ \t]*:)",
        r"physician[ -]to[ -]physician radiology consult line",
        r"signature", r"attestation", r"disclaimer", r"teaching physician(?: statement)?",
        r"wet[ -]?read(?:ing)?s?", r"preliminary read(?:ing)?",
        r"(?:critical |significant )?(?:notifications?|communications?)(?: of results?)?",
        r"critical (?:results?|findings?|values?)",
        r"(?:follow[ -]?up )?recommendations?(?: and notifications?)?", r"recommend(?=[ \t]*:)",
        r"fleischner[^:\n]{0,40}(?=:)",
        r"(?:recommended )?follow[ -]?up(?=[ \t]*:)", r"recommended (?:management|actions?)",
        r"notifications? and recommendations?", r"(?:treatment |management )?plan(?=[ \t]*:)",
        r"typed by", r"transcriptionist", r"signer(?: name)?(?=[ \t]*:)",
        r"job(?: number| ?#)(?=[ \t]*:)",
        r"workstation(?: id)?(?=[ \t]*:)", r"(?:icd|cpt)(?:-?\d{1,2})?(?: codes?)?(?=[ \t]*:)",
        r"(?:(?:total|effective|radiation) ){0,2}dose(?=[ \t]*:)",
        r"(?:dap|dlp|fluoro(?:scopy|scopic)? time)(?=[ \t]*:)",
    ),
    # A section that is both counts as findings, as in MIMIC-CXR's own section files.
    "findings": (
        r"findings? *(?:and|&|/) *impressions?",
        r"impressions? *(?:and|&|/) *findings?",
        r"(?:imaging|radiologic|radiological|radiographic|chest|cxr|x-?ray)? *findings?",
        r"imaging notes?", r"find(?=[ \t]*:)",
    ),
    "impression": (
        r"(?:(?:diagnostic|radiologic|radiological|radiographic|final|overall) )?impressions?"
        r"(?: *(?:and|&|/) *recommendations?)?",
        r"conclusions?", r"interpretation", r"opinion", r"summary",
        r"(?:imp|impr|concl)(?=[ \t]*:)",
        r"(?:final |imaging |x-?ray |radiographic |radiologic(?:al)? )diagnos[ie]s",
    ),
    # Of the image where it ends a report without an impression; else the clinical one.
    "diagnosis": (r"diagnos[ie]s(?=[ \t]*:)",),
    "comment": (r"comments?",),
    "exam": (
        r"narrative",
        r"(?:radiology |x-?ray )?(?:report|description|results?|answer)(?=[ \t]*(?::|\n))",
    ),
    "addendum": (
        r"addend(?:um|a)(?: ?#? ?\d{1,2}| begins?| starts?)?(?: by [^:\n]{0,60}(?=\n|$))?",
        r"final addendum",
    ),
    # What was asked, done and discussed: nothing that is seen on this image.
    "other": (
        r"exam(?:ination)?", r"type of exam(?:ination)?", r"study",
        r"procedure(?: comments?)?",
        r"(?:clinical )?indications?(?: for (?:exam(?:ination)?|study))?",
        r"reasons? for (?:the )?(?:exam(?:ination)?|study|test|request|visit)",
        r"(?:(?:past|clinical|medical|patient|social|family) ){0,4}history",
        r"clinical (?:information|details|data|statement|presentation)",
        r"(?:clinical|admitting|admission|discharge|referring|working|provisional"
        r"|pre-?op(?:erative)?) diagnos[ie]s",
        r"(?:clinical )?questions?(?: to be answered)?(?=[ \t]*:)", r"motives?(?=[ \t]*:)",
        r"signs?(?: and |/)symptoms?(?=[ \t]*:)", r"(?:image quality|limitations?)(?=[ \t]*:)",
        r"(?:prior|previous) (?:stud(?:y|ies)|exams?|examinations?|films?|imaging)(?=[ \t]*:)",
        r"presentation", r"(?:case )?discussion", r"comparisons?", r"techniques?", r"views?",
        r"date", r"(?:hx|ind|comp|tech)(?=[ \t]*:)",
    ),
}  # fmt: skip
_KIND_OF_GROUP: list[Kind] = list(_HEADERS)
# Tried first at each word: whether its clause ends as headings do, so that most words of prose cost
# little. No heading has a full stop inside, but for an addendum's ("Addendum by Dr. Lee").
_MAY_BE_HEADER = r"(?:(?=addend)|(?=(?:[^:;\n.-]|-(?![ \t])){0,110}+(?:[:;\n-]|\.[ \t]*:|\Z)))"
_HEADER = re.compile(
    rf"(?<![\w-])(?=[a-z]){_MAY_BE_HEADER}(?:"
    + "|".join("(" + "|".join(names) + ")" for names in _HEADERS.values())
    + r")(?:\(s\))?(?: (?:and|&|/) \w{4,16}(?:\(s\))?)?(?: \([A-Za-z ]{3,20}\)(?= ?:))?"
    + r"[ \t]*(?::|(?=\n|$)|;(?=[ \t]*\S)|-{1,2}(?=[ \t]))",
    re.IGNORECASE,
)

_BARE = re.compile(  # "IMPRESSION Normal." and "IMPRESSION 1. NORMAL."
    r"^[ \t]*(?:(?P<findings>FINDINGS?)|IMPRESSIONS?|CONCLUSIONS?"
    r"|(?P<addendum>ADDENDUM))(?=[ \t]+(?:[A-Z][a-z]|\d{1,2}[.)][ \t]))",
    re.MULTILINE,
)
_BARE_WORDS = ("FINDING", "IMPRESSION", "CONCLUSION", "ADDENDUM")
_DONE_WORD = (
    r"(?:a\.?m|p\.?m|chest|cxr|thorax|two|one|single|three|four|views?|pa|ap|lateral|lat|frontal|portable"
    r"|upright|supine|erect|semi|semi-?(?:upright|erect|supine)|and|of|the|with|for|an?"
    r"|radiographs?|radiographic|radiography|radiology|x-?rays?|x|rays?|images?|images?|imaging"
    r"|exam(?:ination)?|study|studies|projections?|xr|cr|dx|\d ?v(?:ws?|iews?)?|mobile|stat"
    r"|bedside|digital|postero-?anterior|antero-?posterior|decubitus|right|left|bilateral|ribs?|expiratory|inspiratory|lordotic"
    r"|oblique|at|on|dated?|from|hours?|hrs?|today|series|line|placement"
    r"|_{2,40}|\d{1,4}(?:[:/.-]\d{1,4}){0,3})"
)
_EXAM = re.compile(  # atomic: "1.1,1.1," could be parted in many ways
    rf"(?<![\w-])(?>{_DONE_WORD}(?!\w)(?:[ ,/&()+.-]{{1,3}}{_DONE_WORD}(?!\w)){{0,14}})"
    r"[ ).,]{0,2}:",
    re.IGNORECASE,
)
_EXAM_NAME = re.compile(
    r"\b(?:chest|cxr|thorax|views?|radiograph\w*|x-?rays?|images?|projections?)\b", re.IGNORECASE
)
_DONE = re.compile(
    rf"{_DONE_WORD}|is|are|was|were|obtained|performed|provided|submitted|acquired|taken|made|to"
    r"|compared|comparison|available|reviewed|presented|this|these|prior|previous|none|same",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z][\w.-]*\w|\w")

_RULE = re.compile(r"^[ \t]*(?:_{10,}|-{10,}|={10,}|\*{10,})[ \t]*$", re.MULTILINE)
_ADDENDUM_END = re.compile(
    r"^[ \t]*(?:end of addend(?:um|a)|addend(?:um|a) ends?|original report)[ \t]*:?[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_OPENING = re.compile(
    r"\s*(?:(?P<addendum>(?:final |preliminary )?addend(?:um|a))"
    r"|(?P<wet>wet[ -]?read|preliminary (?:report|read))|(?P<final>final report))\b",
    re.IGNORECASE,
)
_SIGNATURE = re.compile(
    r"\b(?:signed|dictated|transcribed|approved|electronically|radiologist|attending|resident"
    r"|m\.?d\.?|d\.?o\.?|dr\.?|phd|transcriptionist)\b",
    re.IGNORECASE,
)
_SIGNATURE_WORDS = 25  # [chosen: a block of more words is no signature]


class Section(NamedTuple):
    """A section's kind and its text, without the heading."""

    kind: Kind
    text: str


class Blocks(NamedTuple):
    """A report between its rules of underscores.

    Attributes:
        report: The report itself.
        addenda: What was added to it.
    """

    report: str
    addenda: list[str]


def split_blocks(text: str) -> Blocks:
    """Parts a report from addenda, wet reads and signatures, which rules of underscores part off.

    A rule between two sections of one report parts nothing.
    """
    addenda: list[str] = []
    kept: list[str] = []
    blocks = [block for block in _RULE.split(text) if any(c.isalpha() for c in block)]
    for block in blocks:
        opening = _OPENING.match(block)
        end = _ADDENDUM_END.search(block) if opening and opening["addendum"] else None
        if opening and end and any(c.isalpha() for c in block[end.end() :]):
            addenda.append(block[: end.start()])
            kept.append(block[end.end() :])
        elif opening and opening["addendum"]:
            addenda.append(block)
        elif opening and opening["final"]:
            kept = [block]  # what stood above the final report was preliminary
        elif not (opening and opening["wet"]) and not (kept and _is_signature(block)):
            kept.append(block)
    if not kept and not addenda:
        return Blocks(text, [])
    return Blocks("\n\n".join(kept), addenda)


def _is_signature(block: str) -> bool:
    if len(block.split()) > _SIGNATURE_WORDS:
        return False
    is_headed = any(
        s.kind in ("findings", "impression", "addendum") for s in split_sections(block)[1]
    )
    return not is_headed and (":" in block or _SIGNATURE.search(block) is not None)


def split_sections(text: str) -> tuple[str, list[Section]]:
    """What comes before the first heading, and each section, in order.

    A heading stands at the start of a line, after a sentence, or capitalised before a colon.
    """
    found: list[tuple[Kind, int, int]] = []
    for kind, start, end in _headings(text):
        if found and start < found[-1][2]:
            continue
        before = text[max(0, start - 4) : start].rstrip(" \t")
        has_colon = text[end - 1] == ":"
        at_line_start = not before or before.endswith("\n")
        first = text[start:end].lstrip()[0]
        if kind == "exam" and found and found[-1][0] in ("findings", "impression", "comment"):
            continue  # "FINDINGS: CHEST: Clear lungs."
        if kind == "exam" and not (
            (first.isupper() or first.isdigit()) and (at_line_start or before[-1] in ".;:!?")
        ):
            continue
        if at_line_start or (has_colon and (first.isupper() or before[-1] in ".;:!?")):
            found.append((kind, start, end))
    ends = [start for _, start, _ in found[1:]] + [len(text)]
    sections = [
        Section(kind, text[start:end]) for (kind, _, start), end in zip(found, ends, strict=False)
    ]
    return text[: found[0][1]] if found else text, sections


def _headings(text: str) -> Iterator[tuple[Kind, int, int]]:
    """Whatever may be a heading, in order of start."""
    found: list[tuple[int, int, Kind]] = []
    for match in _HEADER.finditer(text):
        assert match.lastindex is not None
        found.append((match.start(), match.end(), _KIND_OF_GROUP[match.lastindex - 1]))
    bare = _BARE.finditer(text) if any(word in text for word in _BARE_WORDS) else ()
    for match in bare:
        kind: Kind = "findings" if match["findings"] else "impression"
        kind = "addendum" if match["addendum"] else kind
        found.append((match.start(), match.end(), kind))
    for match in _EXAM.finditer(text):
        name = match[0]
        if _EXAM_NAME.search(name) and name.rstrip(": ").lower() not in ("view", "views"):
            found.append((match.start(), match.end(), "exam"))
    for start, end, kind in sorted(found):
        yield kind, start, end


def says_more_than_what_was_done(text: str) -> bool:
    """Whether a text says more than "Two views of the chest were obtained" or a date."""
    return any(not _DONE.fullmatch(word) for word in _WORD.findall(text))


# -- misspelt headings --

_SPELT = (
    "findings", "finding", "impression", "impressions", "comparison", "indication", "technique",
    "history", "conclusion", "examination", "recommendation", "recommendations", "addendum",
    "procedure", "narrative",
)  # fmt: skip
_OTHER_WORDS = frozenset(
    (
        "impressive", "impressing", "conclusive", "comparing", "indicating", "examining",
        "bindings", "landings", "windings", "funding", "fundings", "binding", "mystery",
        "techniques", "indications", "comparisons", "conclusions", "examinations", "narratives",
        "findings", "addenda", "historic", "completion", "completions", "expression", "depression",
    )
)  # fmt: skip
_HEADING_LINE = re.compile(
    r"^[ \t]*(?:[A-Z]{2,18}[ /&]){0,3}[A-Z]{5,18}(?=[ \t]*(?::|$))|^[ \t]*[A-Za-z]{6,18}(?=[ \t]?:)"
    r"|(?<=[.!?] )[A-Z]{6,18}(?=:)",
    re.MULTILINE,
)
_LONG_WORD = re.compile(r"[A-Za-z]{5,18}")


def mend_headings(text: str) -> str:
    """The text with misspelt headings spelt right; words of prose stay as they are.

    A heading here is a line's first words in capitals, or its first word, before a colon. One
    letter may be wrong, missing, too many or swapped; two in words of nine letters or more.
    """
    return _HEADING_LINE.sub(lambda line: _LONG_WORD.sub(_mended, line[0]), text)


def _mended(match: re.Match[str]) -> str:
    right = _spelt_right(match[0].lower())
    if right is None:
        return match[0]
    return right.upper() if match[0].isupper() else right.capitalize()


@lru_cache(maxsize=4096)  # [chosen: labels of structured reports come again and again]
def _spelt_right(word: str) -> str | None:
    """The heading that a word misspells, or None."""
    if word in _SPELT or word in _OTHER_WORDS:
        return None
    for right in _SPELT:
        most = 2 if min(len(word), len(right)) >= 9 else 1
        if abs(len(word) - len(right)) <= most and edit_distance(word, right) <= most:
            return right
    return None
