"""Ages and sexes as tables and DICOM headers write them."""

import re

from mmclip.data.sample import Sex

MAX_AGE_YEARS = 120
"""[chosen: nobody was older than 122; tables hold 155 and 414]"""

_UNITS = (
    (1, "Y|YRS?|YEARS?|A|ANS?|AÑOS?|ANOS?|ANNI|J|JAHRE?N?|JAAR|LAT"),
    (12, "M|MOS?|MONTHS?|MOIS|MES|MESES|MONATE?N?|MAANDE?N?|MESI"),
    (52.18, "W|WKS?|WEEKS?|WOCHEN?|SEMAINES?|SEMANAS?|WEKEN"),
    (365.25, "D|DAYS?|TAGE?N?|JOURS?|DÍAS?|DIAS?|DAGEN"),
)
"""How many of a unit are a year, and its words, as DICOM and hospitals in Europe write them."""

_AGE = re.compile(
    r"[>≥]?\s*(\d+(?:[.,]\d+)?)\s*\+?[\s-]*(?:(?:"
    + "|".join(f"({words})" for _, words in _UNITS)
    + r")\.?(?:[\s-]*(?:/?O|OLD|ALT))?)?"
)


def parse_age(text: str) -> float | None:
    """An age in years from "54", "54,5", DICOM's "063Y", "018M", or "54 Jahre"; see `known_age`.

    "90+" and ">89", as ages are hidden by, are the number that they give.
    """
    match = _AGE.fullmatch(text.strip().upper())
    if match is None:
        return None
    unit = next((i for i, word in enumerate(match.groups()[1:]) if word), 0)
    return known_age(float(match[1].replace(",", ".")) / _UNITS[unit][0])


def known_age(years: float) -> float | None:
    """An age as it was read, or None where it is none: 0, below it, or over 120 years.

    0 stands where nobody gave an age ("000Y" in DICOM headers, 0 in CheXpert); infants have ages in
    days, weeks or months.
    """
    return float(years) if 0 < years <= MAX_AGE_YEARS else None


_SEXES: dict[Sex, tuple[str, ...]] = {
    "M": (
        "m", "male", "man", "masc", "masculine", "männlich", "maennlich", "mann", "masculin",
        "homme", "masculino", "hombre", "maschio", "uomo", "homem",
    ),
    "F": (
        "f", "female", "femal", "woman", "fem", "feminine", "w", "weiblich", "frau", "féminin",
        "femme", "femenino", "feminino", "mujer", "femmina", "donna", "mulher",
    ),
}  # fmt: skip
"""As hospitals write them; "femal" is in the readings of Shenzhen."""

_SEX_OF_WORD: dict[str, Sex] = {word: sex for sex, words in _SEXES.items() for word in words}


def parse_sex(text: str) -> Sex | None:
    """The sex that a word names, in some languages and any case; None of every other word."""
    return _SEX_OF_WORD.get(text.strip().rstrip(".").lower())
