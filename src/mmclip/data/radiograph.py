"""What the header of a DICOM file says that its image shows: modality, part of the body, view."""

import re
import unicodedata
from typing import Any

from pydicom import uid
from pydicom.dataset import Dataset

from mmclip.data.sample import Reason, View

MODALITIES = ("CR", "DX", "DR", "RG", "XR")
"""Computed, digital and other radiography. DR and XR are in files, and not in the standard."""

VIEW_KEYWORDS = (
    "ViewPosition", "ViewCodeSequence", "SeriesDescription", "ProtocolName", "PatientOrientation",
)  # fmt: skip
"""What `view_of` reads."""

CONTENT_KEYWORDS = (
    "SOPClassUID", "PresentationIntentType", "Modality", "BodyPartExamined", "StudyDescription",
    *VIEW_KEYWORDS,
)  # fmt: skip
"""What `view_of` and `why_no_chest` read."""

_CLASSES: dict[str, str] = {
    uid.ComputedRadiographyImageStorage: "CR",
    uid.DigitalXRayImageStorageForPresentation: "DX",
    uid.DigitalXRayImageStorageForProcessing: "DX",
}
"""What tells the modality of an image that does not name it."""

_KNOWN_MODALITIES = {
    "CT", "MR", "US", "NM", "PT", "XA", "RF", "MG", "OT", "SC", "SR", "PR", "KO", "ES", "IO", "PX",
    "DOC", "SEG", "RTPLAN", "RTSTRUCT", "RTDOSE", "RTIMAGE", "ECG", "OP", "SM", "XC", "BMD",
}  # fmt: skip

# The patterns read `_plain` text: lower case without accents, so "Tórax" and "Hüfte" are covered.
_CHEST = re.compile(
    r"chest|thora|thx|tora[xkc]|lung|pulm|polmon|poumon|pecho|brust|borst|klatk|hrudn|груд|легк|"
    r"mellkas|gogus|keuhko|heart|\bcxr|\brib|胸|肺|흉부"
)
_SPINE = re.compile(
    r"(chest|thora[a-z]*|tora[a-z]*|brust|dors[a-z]*)?[ _-]*(spine|wirbel|vertebr)|"
    r"(column|colonna|rachis|colonne)[a-z]*[ _-]*(vertebra|thora|tora|dors)[a-z]*"
)
"""The spine, with the word of the chest that says which: no chest X-ray."""

_OTHER_PART = re.compile(
    r"abdom|pelvi|becken|knee|knie|(?<![a-z])hand|finger|wrist|elbow|(?<![a-z])hip(?![a-z])|huft|"
    r"foot|fuss|ankle|spine|wirbel|vertebr|column|colonna|rachis|lws|bws|hws|skull|schadel|"
    r"(?<![a-z])head|shoulder|schulter|femur|tibia|humerus|forearm|dental|mamm|breast|sinus|"
    r"(?<![a-z])(mano(?![a-z])|mains?(?= (?:dr|ga))|codo|coude|gomit|cotovel|munec|poignet|polso|"
    r"punho|hombro|epaule|spall|ombro|rodill|genou|ginocch|joelh|cader|hanche|anca(?![a-z])|quadril|"
    r"bacino|bassin|tobill|chevill|cavigli|tornozel|pied|pie (?:der|izq)|cran(?:e|eo|io)(?![a-z-])|"
    r"cabeza|lumba|lomb[ao]|cervic|sacr|hals)|腹"
)
_SAYS_NO_PART = re.compile(
    r"[\W\d_]*|unk(nown)?|unspecified|undefined|not specified|other|none|n/?a|null|default|any|"
    r"whole ?body|body|trunk|torso"
)
"""A body part that leaves open which it is: then the descriptions tell."""

_BEFORE, _BEHIND = r"(?<![a-z])", r"(?![a-z])"
_POST, _ANT = r"post(?:ero|erior|erieur)?", r"ant(?:ero|erior|erieur)?"
_TO = r"(?: to |[ _-])?"
_VIEW_WORDS: tuple[tuple[re.Pattern[str], View], ...] = (
    (
        re.compile(
            rf"{_BEFORE}(p\.?[ -]?a\.?|{_POST}{_TO}{_ANT}[eor]*|dorso[ -]?ventral[a-z]*){_BEHIND}"
            r"|后前|後前"
        ),
        "PA",
    ),
    (
        re.compile(
            rf"{_BEFORE}(a\.?[ -]?p\.?|{_ANT}{_TO}{_POST}[eor]*|ventro[ -]?dorsal[a-z]*){_BEHIND}"
            r"|前后|前後"
        ),
        "AP",
    ),
    (
        re.compile(
            rf"{_BEFORE}(ll|rl|[lr]?lat|later[a-z]*|seitl[a-z]*|(?:pro|per)fil[a-z]*|"
            rf"(?:links|rechts) anliegend|boczn[a-z]*){_BEHIND}|[侧側][位面]|боков"
        ),
        "L",
    ),
)
_NO_STANDARD_VIEW = re.compile(
    r"decub(?![a-z]* (?:supin|dors|pron|ventr))|(?<![a-z])obl(?![a-z])|obli[qck]|schrag|"
    r"tangential|(?<![a-z])([lr]ld|[lr][ap]o|[lr]lo)(?![a-z])"
)
"""Patients who lie on the side, or are turned: neither PA, AP nor lateral."""

_VIEW_CODES: dict[str, View] = {
    "R-10206": "AP", "399348003": "AP", "R-10214": "PA", "272479007": "PA",
    "R-10228": "L", "R-10232": "L", "R-10236": "L",
    "399067008": "L", "399173006": "L", "399198007": "L",
}  # fmt: skip
"""SNOMED RT and SNOMED CT codes of DICOM PS3.16 CID 4010; others are read by their meaning."""


def text_of(data: Dataset, keyword: str) -> str:
    """A value of a header as text; "" where it is not there, or is none of its kind."""
    value = _value(data, keyword)
    return "" if value is None else str(value).strip().strip("\0")


def _value(data: Dataset, keyword: str) -> Any:
    try:
        return data.get(keyword)
    except (ValueError, TypeError, LookupError, NotImplementedError):  # a value of a broken file
        return None


def why_no_chest(data: Dataset) -> tuple[Reason, str] | None:
    """Why an image is no radiograph of the chest; the detail holds a code and never free text."""
    kind = text_of(data, "SOPClassUID")
    modality = text_of(data, "Modality").upper() or _CLASSES.get(kind, "")
    if modality not in MODALITIES:
        is_code = modality in _KNOWN_MODALITIES
        return Reason.OTHER_MODALITY, f"modality {modality if is_code else 'missing or unknown'}"
    is_raw = text_of(data, "PresentationIntentType").upper() == "FOR PROCESSING"
    if is_raw or kind == uid.DigitalXRayImageStorageForProcessing:
        return Reason.NOT_FOR_USE, "FOR PROCESSING: raw values of a detector"
    part = _plain(text_of(data, "BodyPartExamined"))
    if not _SAYS_NO_PART.fullmatch(part):
        return None if _shows_chest(part) else (Reason.OTHER_BODY_PART, _part_of(part))
    words = ("SeriesDescription", "ProtocolName", "StudyDescription")
    described = _plain(" ".join(text_of(data, word) for word in words))
    if _OTHER_PART.search(described) and not _shows_chest(described):
        return Reason.OTHER_BODY_PART, _part_of(described)
    return None


def view_of(data: Dataset, words: dict[str, View]) -> View:
    """The view of an image: by ViewPosition, then DICOM's codes, descriptions, and orientation.

    Args:
        data: Its header.
        words: Of the mapping, in lower case; they win.

    Returns:
        "unknown" where nothing tells it, a description names two, or the first that tells of it
        names one that is neither PA, AP nor lateral, as oblique ones and those of patients who lie
        on the side.
    """
    texts = [text_of(data, k) for k in ("ViewPosition", "SeriesDescription", "ProtocolName")]
    for text in texts:
        if text.lower() in words:
            return words[text.lower()]
    if (view := _view_in(texts[0])) is not None:
        return view
    for item in _codes(data):
        meaning = _view_in(text_of(item, "CodeMeaning"))
        view = meaning if meaning == "unknown" else _VIEW_CODES.get(text_of(item, "CodeValue"))
        if (view := view or meaning) is not None:
            return view
    for text in texts[1:]:
        if (view := _view_in(text)) is not None:
            return view
    orientation = text_of(data, "PatientOrientation").strip("[]'\" ").upper()
    return "L" if orientation[:1] in ("A", "P") else "unknown"


def _codes(data: Dataset) -> list[Dataset]:
    items = _value(data, "ViewCodeSequence") or ()
    return [item for item in items if isinstance(item, Dataset)]  # else no sequence at all


def _view_in(text: str) -> View | None:
    """The view that a text names; None where it names none, or two."""
    plain = _plain(text)
    if _NO_STANDARD_VIEW.search(plain):
        return "unknown"
    found: list[View] = [view for pattern, view in _VIEW_WORDS if pattern.search(plain)]
    return found[0] if len(found) == 1 else None


def _plain(text: str) -> str:
    """A text in lower case, without accents however they are written ("ß" is "ss")."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    return unicodedata.normalize("NFC", "".join(c for c in apart if not unicodedata.combining(c)))


def _shows_chest(plain: str) -> bool:
    return _CHEST.search(_SPINE.sub(" ", plain)) is not None


def _part_of(plain: str) -> str:
    found = _OTHER_PART.search(plain)
    return found[0] if found else "not the chest"
