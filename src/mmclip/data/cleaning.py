"""A report's characters and marks: one way of writing for each, and what masks names taken out.

Every step takes time in proportion to the text, whatever it says: runs of white space are shortened
first and wherever something is taken out, so that no pattern meets a long one, and the other
repeats are bounded.
"""

import html
import re
import unicodedata
from itertools import pairwise

from mmclip.data.rtf import is_rtf, text_of_rtf

_MARK = r"(?:\[\*\*[^\[\]]{0,200}\*\*\]|_{2,}|(?<![A-Za-z])(?:X{4,}|(?:XXX|x{4,})(?![A-Za-z])))"
# One or several marks with only separators between them, such as ___/___ or XXXX, XXXX.
_MARKS = re.compile(rf"{_MARK}(?:[ \t]*[-/:,]?[ \t]*{_MARK})*", re.DOTALL)
_MARKED_XRAY = re.compile(rf"\b(x)-{_MARK}", re.IGNORECASE)
_GAP = "\0"  # stands for removed marks until the text around them is mended
_MENDS = [
    (re.compile(pattern), new)
    for pattern, new in (
        (rf"[-/:]?{_GAP}(?:[-/:](?=\w)|'s\b)|[-/]{_GAP}", _GAP),  # ___-year-old, XXXX's, one-XXXX
        (rf"[(\[](?=[\s,;:]*{_GAP})[\s,;:{_GAP}]*[)\]]", " "),
        (rf"(^|[.?!]\s|[\n(])[ ]*(?:{_GAP}[\s.,;:?!]*)+", r"\1"),
        (rf"\s*[,;:]?\s*{_GAP}\s*(?=[.,;:?!)])", ""),
        (rf"\s*{_GAP}\s*", " "),
    )
]
_ITEM = re.compile(
    r"(?:(?<=[.;:?!])[ \t]*|^[ \t]*|(?P<inner>(?<=\w) (?=\(?\d{1,2}\))))"
    r"\(?(?P<number>\d{1,2})(?:[.)](?=\s|[A-Z])|-(?= ?[A-Z]))"  # 1. or (1) or 1-
    r"|^[ \t]*[-*•·][ \t]+",
    re.MULTILINE,
)
_DENIES_LIST = re.compile(
    r"\b(?:no|not|without|negative|neg|free|absence)\b[^.:;\n]{0,60}:$", re.IGNORECASE
)
_TEMPLATE_MARKS = re.compile(r"\[<|>\]")
_PARAGRAPH_WITHOUT_STOP = re.compile(r"(?<=[A-Za-z0-9)])[ \t]*\n[ \t]*\n\s*(?=[A-Z])")
_SHORT_LINE = 60  # [chosen: no system wraps lines at fewer characters]
_GOES_ON = re.compile(
    r"(?:[^\w)]|\b(?:an?|the|of|or|and|nor|no|not|with|without|in|on|at|to|for|from|by|is|are|was|were"
    r"|as|than|that|which|than|versus|vs|right|left|both))$",
    re.IGNORECASE,
)
_DOUBLE_STOP = re.compile(r"(?<![.?!])([.?!])[.?!]*(?:\s*\.)+(?=\s|$)")
_NOTHING = {
    "", "none", "n/a", "na", "nan", "null", "nil", "not available", "not applicable", "no report",
    "no report available", "report not available", "not reported", "unreported", "report pending",
    "pending",
}  # fmt: skip

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


_HUGE_ENTITY = re.compile(r"&#(?:\d{8,}|[xX][0-9a-fA-F]{8,});?")  # no character has such a number
_ACCENT = (
    r"[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u064b-\u065f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]"
)
_ACCENTS = re.compile(rf"({_ACCENT}{{8}}){_ACCENT}+")  # NFKC sorts a run of them in quadratic time
# Line breaks of HTML, of HL7 version 2 and of XML that Excel wrote.
_BREAK = re.compile(
    r"<(?:br|/?p|/?div|/?li|/?tr|/?h\d)(?:\s[^<>]{0,200})?\s?/?>"
    r"|\\\.(?:br|sp\d{0,2})\\|\\X0[DA]\\|_x000[DA]_",
    re.IGNORECASE,
)
_TAG = re.compile(
    r"</?(?:b|i|u|em|strong|span|font|ul|ol|td|th|table|tbody|body|html|pre)(?:\s[^<>]{0,200})?/?>",
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(?<![\[*])\*\*(?![\]*])([^*\n]{1,80})\*\*(?![\]*])")  # of Markdown
_MARKDOWN_HEADING = re.compile(r"^ ?#{1,6} (?=[A-Za-z])", re.MULTILINE)
# Line breaks of JSON and CSV writers, and the signs that HL7 puts between lines.
_ESCAPED_BREAK = re.compile(
    r"(?:\\r)?\\n(?=[A-Z\s\\\d*-]|$)|(?<=[.;])(?:\\r)?\\n"
    r"|(?<=[.:;\s])[|~]+(?=\s?(?:[A-Z]|$))"
)
_DECORATED = re.compile(r"^ ?[-=*~+#]{2,} ?([A-Za-z][^\n]{0,60}?) ?[-=*~+#]{2,} ?$", re.MULTILINE)
_DECORATIONS = ("--", "==", "**", "~~", "++", "##")
_BRACKETED = re.compile(
    r"^ ?\[(findings?|impressions?|conclusions?|indications?|history|techniques?|comparisons?)\]:?",
    re.IGNORECASE | re.MULTILINE,
)
_SPACED_HEADING = re.compile(r"^ ?(?:[A-Z] ){4,20}[A-Z](?= ?(?::|$))", re.MULTILINE)
_NUMBERED_HEADING = re.compile(
    r"^ ?\d{1,2}[.)][ \t]*(?=(?:FINDINGS|IMPRESSION|CONCLUSION|INDICATION|TECHNIQUE|COMPARISON"
    r"|HISTORY)\b)",
    re.IGNORECASE,
)
# Whole lines that say who the patient is, who asked for the image, and who printed the report.
_WHO = (
    r"(?:(?:patient|pt)(?:'?s)?(?: name| id| number| no\.?| #)?|(?:sur|first |last )?name"
    r"|m\.?r\.?n\.?|d\.?o\.?b\.?|date of birth|birth ?date|accession(?: (?:number|no\.?|id|#))?"
    r"|(?:nhs|hospital|medical record|case|visit|episode)(?: (?:number|no\.?|id|#))"
    r"|age(?= ?: ?\d)|sex|gender"
    r"|(?:referr(?:ed|ing)|request(?:ed|ing)|order(?:ed|ing))(?: (?:by|physician|doctor|provider"
    r"|clinician|md))|cc|printed|ward|gmc|npi|(?:gmc|npi|licen[cs]e)"
    r" (?:number|no\.?|id|#))"
)
_IDENTITY = re.compile(
    rf" ?(?:{_WHO} ?[:#] ?+(?-i:(?![a-z]))[^\n:]{{1,60}}(?<!\w:)){{1,6}}$",
    re.IGNORECASE | re.MULTILINE,
)
_SPACES = re.compile(r"[^\S\n]{2,}")
_EMPTY_LINES = re.compile(r"\n(?: ?\n){2,}")
_LABEL = r"(?:[-*\u2022] )?[A-Z][\w /()-]{2,40}:"
_STRUCTURED_LINE = re.compile(
    rf"^( ?{_LABEL} [^\n:]{{0,200}}[A-Za-z0-9)]) ?$(?=\n ?{_LABEL})", re.MULTILINE
)
_BOILERPLATE = re.compile(
    r"(?:^|(?<=[.!?:] )|(?<=[.!?])) ?(?:(?:critical|urgent|abnormal|these|this|the|above) ){0,3}"
    r"(?:result|finding|report)s? (?:notification )?(?:(?:was|were|is|are|has|have|been) ){0,2}"
    r"(?:documented|communicated|conveyed|relayed|telephoned|called|discussed|reported to)\b"
    r"(?:\b(?:drs?|mrs?|ms|[ap]\.m)\.|\.(?=\d)|(?<=\d):(?=\d)|[^.:\n]){0,300}+(?:\.|$)"
    r"|^\W{0,12}end of (?:report|document|dictation)\W{0,12}$"
    r"|this report has been anonymized\.?(?: all dates are offset[^.\n]{0,250}\.?)?"
    r"|(?:\bas the attending[^.,\n]{0,60}, )?\bI,? ?(?:[^.,\n]{0,60}, )?(?:have )?(?:personally )?"
    r"(?:reviewed|viewed|interpreted) (?:the|these|this) "
    r"(?:images?|images?|stud(?:y|ies)|radiographs?)[^.\n]{0,250}(?:agree|report|findings|interpret)"
    r"(?:[^.\n]|\n(?=[a-z])){0,150}\.?"
    r"|\bthank you for (?:referring|(?:the|your|this) (?:kind )?referral)[^\n]{0,120}"
    r"|^ ?(?:[dt]: ?\d{1,2}/\d{1,2}/\d{2,4}[^\n]{0,20} ){1,2}[^\n]{0,40}$"  # dictated, typed
    r"|^ ?(?:yours sincerely|(?:kind |best )?regards)[^\n]{0,60}$"
    r"|(?:^|(?<=[.!?] )|(?<=[.!?])) ?(?:(?:this )?(?:report|document|exam(?:ination)?|study) )?"
    r"(?:(?:has been|have been|was|is) )?(?:electronically |digitally )?"
    r"(?:signed|dictated|approved|verified|transcribed|finali[sz]ed|authenticated)"
    r"(?: electronically| and \w{4,12}){0,2} (?:by|on)\b[^\n]{0,300}",
    re.IGNORECASE | re.MULTILINE,
)
_DICTATED = re.compile(
    r"(?:^|(?<=[.!?] ))[^.\n]{0,120}\b(?:voice|speech)[- ]recognition\b[^\n]{0,400}",
    re.IGNORECASE | re.MULTILINE,
)
# Whole lines of a signature: a name with its title or degree, a profession.
_NAME = r"(?-i:[A-Z])[\w.'-]{0,20}"
_ROLE = r"(?:radiologist|registrar|consultant|radiographer|m\.?d|frcr)"
_DEGREE = r"(?-i:M\.?D|D\.?O|FRCR|MBBS|PhD)\b\.?"
_SIGNATURE_LINE = re.compile(
    rf" ?(?:(?:prof\.? )?(?:drs?|prof)\b\.?(?: {_NAME}){{1,4}}"
    rf"|(?:drs?|prof)\b\.?[^\n:.]{{0,60}}\b{_ROLE}\b[^\n:]{{0,60}}"
    rf"|(?:(?:consultant|reporting|attending|chest|specialist|senior|staff|radiology) ){{0,3}}"
    r"(?:radiologist|registrar|radiographer)\.?"
    rf"|{_NAME}, {_NAME}(?: {_NAME})?,? {_DEGREE}"
    rf"|{_NAME}(?: {_NAME}){{1,3}}, ?{_DEGREE}[^\n:]{{0,60}}) ?$",
    re.IGNORECASE,
)


def normalise(raw: str) -> str:
    """A text with one sign for each of those that mean the same, short white space, no boilerplate.

    Numbers of characters that do not exist become a space. Rich Text Format becomes its text.
    """
    raw = text_of_rtf(raw) if is_rtf(raw) else raw
    text = _ACCENTS.sub(r"\1", html.unescape(_HUGE_ENTITY.sub(" ", raw)))
    if "\n" not in text and any(sign in text for sign in "\\|~"):
        text = _ESCAPED_BREAK.sub("\n", text)
    if any(sign in text for sign in ("<", "\\", "_x")):
        text = _TAG.sub("", _BREAK.sub("\n", text))
    if "**" in text:
        text = _EMPHASIS.sub(r"\1", text)
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    text = _with_short_space("\n".join(text.splitlines()).replace("\t", " "))
    if "#" in text:
        text = _MARKDOWN_HEADING.sub("", text)
    if any(sign in text for sign in _DECORATIONS):
        text = _DECORATED.sub(r"\1", text)
    if "]" in text:
        text = _BRACKETED.sub(r"\1:", text)
    text = _SPACED_HEADING.sub(lambda match: match[0].replace(" ", ""), text)
    lines = text.split("\n")
    if len(lines) > 1:
        text = "\n".join(map(_without_names, lines))
    if "ecognition" in text or "ECOGNITION" in text:
        text = _DICTATED.sub("", text)
    return _BOILERPLATE.sub("", text)


def _without_names(line: str) -> str:
    """A line, or nothing where it names a patient, a referrer or who signed, and no more."""
    if _IDENTITY.match(line) or _SIGNATURE_LINE.match(line):
        return ""
    return _NUMBERED_HEADING.sub("", line)


def _with_short_space(text: str) -> str:
    """The text with one space for several, and no two empty lines beside each other."""
    return _EMPTY_LINES.sub("\n\n", _SPACES.sub(" ", text))


def _remove_numbering(text: str) -> str:
    """Removes "1.", "(2)" and bullets of lists; an item always starts a new sentence.

    A number is one of a list only if it is 1 or the last one's successor: "ribs 8 and 9.", broken
    before the 9, keeps its 9. The items of a list that a denial introduces ("No evidence of:") stay
    in its sentence, up to an empty line.
    """
    kept, at, last, is_denied = [], 0, 0, False
    for match in _ITEM.finditer(text):
        before = text[max(at, match.start() - 80) : match.start()].rstrip()
        if match["number"] is not None:
            is_first = match["number"] == "1" and match["inner"] is None
            if not (is_first or int(match["number"]) == last + 1 > 1):
                continue
            if before.endswith(("No.", "no.")):
                continue
            last = int(match["number"])
        is_denied = _DENIES_LIST.search(before) is not None or (is_denied and "\n\n" not in before)
        ends_sentence = not before or before[-1] in ".,;:?!"
        kept += [text[at : match.start()], " " if ends_sentence else ", " if is_denied else ". "]
        at = match.end()
    return "".join([*kept, text[at:]])


def _end_lines(paragraph: str) -> str:
    """A paragraph with a full stop behind each line that is a statement of its own.

    Lines are statements where each begins with a capital, and one is where the next one's first
    word would have fitted behind it, and it does not end in the middle of a phrase.
    """
    lines = paragraph.split("\n")
    if (
        len(lines) < 2
        or paragraph.isupper()
        or not all(line.lstrip()[:1].isupper() for line in lines)
    ):
        return paragraph
    for i, (line, following) in enumerate(pairwise(lines)):
        has_room = len(line) + 1 + len(following.split()[0]) <= _SHORT_LINE
        if has_room and not _GOES_ON.search(line.rstrip()):
            lines[i] = line.rstrip() + "."
    return "\n".join(lines)


def clean(text: str) -> str | None:
    """One section as running text, or None when no words are left.

    A structured line ("Effusion: none") before another one ends as a sentence.
    """
    text = _STRUCTURED_LINE.sub(r"\1.", _with_short_space(text).strip("\n "))
    text = "\n\n".join(map(_end_lines, text.split("\n\n")))
    text = _MARKED_XRAY.sub(r"\1-ray", text)  # Open-I hides the "ray" of most x-rays
    text = _with_short_space(_remove_numbering(text))
    text = _MARKS.sub(_GAP, text)
    text = _with_short_space(_TEMPLATE_MARKS.sub(" ", text))
    text = _PARAGRAPH_WITHOUT_STOP.sub(". ", text)
    for pattern, new in _MENDS:
        text = _with_short_space(pattern.sub(new, text))
    text = " ".join(text.split())
    text = re.sub(r"\s+(?=[.,;:)](?:\s|$))", "", text)
    text = _DOUBLE_STOP.sub(r"\1", text)
    text = text.lstrip(" .,;:!)/").rstrip(" ,;:(/")
    if text.strip(" .").lower() in _NOTHING or not any(c.isalpha() for c in text):
        return None
    return text
