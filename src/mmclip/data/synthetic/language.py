"""Reports in radiology language for what a synthetic image shows, and for what it does not.

Every present finding is stated (short of the preset's omissions), by one of several wordings, with
its side and mostly its size; some absent findings are denied, most are not mentioned. Sentences of
the technique, the indication and of other structures are drawn without regard to the findings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmclip.data.synthetic.lesions import Lesion
from mmclip.data.synthetic.preset import FINDINGS, Preset, Side, Size


@dataclass(frozen=True)
class ReportTemplate:
    """How one finding is put into words.

    Slots: {size} ("small"), {side} ("left", "bilateral"), {zone} ("upper"), {kinds} (devices), {s}
    (a plural, where the size said is a number).

    Attributes:
        sizes: Adjectives for small, moderate and large.
        phrases: Noun phrases, for "There is ..." and the impression.
        sentences: Whole sentences for a one-sided finding or one without a side.
        names: Noun phrases without a side, for "No ..." and for statements that name no side.
        plural: Noun phrases for both sides, where `phrases` would be wrong.
        only_denied: Further noun phrases, for "No ..." alone.
    """

    sizes: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    phrases: tuple[str, ...]
    sentences: tuple[str, ...]
    names: tuple[str, ...]
    plural: tuple[str, ...] = ()
    only_denied: tuple[str, ...] = ()


AMOUNT = (("small", "tiny", "minimal"), ("moderate", "moderate-sized"), ("large", "extensive"))
DEGREE = (("mild", "slight"), ("moderate",), ("severe", "marked"))
EXTENT = (("small", "mild"), ("moderate",), ("large", "extensive"))
ROUND = (("small", "tiny"), ("moderate", "moderate-sized"), ("large", "sizeable"))

REPORT_TEMPLATES: dict[str, ReportTemplate] = {
    "cardiomegaly": ReportTemplate(
        DEGREE,
        ("{size} cardiomegaly", "{size} enlargement of the heart", "{size} cardiac enlargement"),
        (
            "The heart is {size} enlarged, in keeping with cardiomegaly.",
            "The cardiac silhouette is enlarged with {size} cardiomegaly.",
            "Heart size is increased, {size} cardiomegaly.",
        ),
        ("cardiomegaly", "cardiac enlargement", "enlargement of the heart"),
    ),
    "pleural effusion": ReportTemplate(
        AMOUNT,
        ("{size} {side} pleural effusion", "{size} {side} effusion"),
        (
            "{size} {side} pleural fluid with blunting of the costophrenic angle.",
            "Blunting of the {side} costophrenic angle by a {size} pleural effusion.",
            "Layering {size} pleural effusion on the {side}.",
            "The {side} costophrenic angle is blunted, consistent with {size} pleural effusion.",
        ),
        ("pleural effusion", "effusion", "pleural fluid"),
        ("{size} bilateral pleural effusions", "{size} pleural effusions on both sides"),
    ),
    "pneumothorax": ReportTemplate(
        AMOUNT,
        ("{size} {side} pneumothorax", "{size} pneumothorax on the {side}"),
        (
            "A visceral pleural line is seen on the {side}, {size} pneumothorax.",
            "{size} {side} pneumothorax with absent peripheral lung markings.",
            "Collapse of the {side} lung margin due to {size} pneumothorax.",
        ),
        ("pneumothorax",),
    ),
    "edema": ReportTemplate(
        DEGREE,
        ("{size} pulmonary edema", "{size} interstitial edema", "{size} edema"),
        (
            "Perihilar haze and prominent vessels indicate {size} pulmonary edema.",
            "Vascular congestion with {size} pulmonary edema and septal lines.",
            "{size} bilateral perihilar opacities compatible with pulmonary edema.",
        ),
        ("pulmonary edema", "edema"),
        only_denied=("vascular congestion or edema",),
    ),
    "consolidation": ReportTemplate(
        EXTENT,
        (
            "{size} consolidation in the {side} {zone} lung zone",
            "{size} {side} {zone} zone consolidation",
            "{size} airspace consolidation in the {side} lung",
        ),
        (
            "There is {size} airspace opacity with air bronchograms in the {side} {zone} zone, "
            "consistent with consolidation.",
            "The {side} {zone} zone shows {size} consolidation with air bronchograms.",
        ),
        ("consolidation", "focal consolidation", "airspace consolidation"),
        ("{size} bilateral consolidation", "{size} consolidation in both lungs"),
    ),
    "atelectasis": ReportTemplate(
        EXTENT,
        (
            "{size} {side} linear atelectasis",
            "{size} plate-like atelectasis in the {side} {zone} zone",
            "{size} {side} subsegmental atelectasis",
        ),
        (
            "Linear band in the {side} {zone} zone in keeping with {size} atelectasis.",
            "Streaky {side} {zone} zone opacity, {size} discoid atelectasis.",
        ),
        ("atelectasis", "linear atelectasis", "atelectatic change"),
        ("{size} bilateral linear atelectasis", "{size} atelectasis at both bases"),
    ),
    "nodule": ReportTemplate(
        ROUND,
        (
            "{size} {side} lung nodule",
            "{size} nodule in the {side} {zone} zone",
            "{size} pulmonary nodule in the {side} lung",
        ),
        (
            "A {size} round nodule projects over the {side} {zone} lung zone.",
            "There is a {size} well-defined nodule in the {side} lung.",
        ),
        ("nodule", "pulmonary nodule", "lung nodule"),
    ),
    "mass": ReportTemplate(
        ROUND,
        (
            "{size} {side} lung mass",
            "{size} mass in the {side} {zone} zone",
            "{size} pulmonary mass in the {side} lung",
        ),
        (
            "A {size} lobulated mass is seen in the {side} {zone} zone.",
            "There is a {size} mass with irregular margins in the {side} lung.",
        ),
        ("mass", "lung mass", "pulmonary mass"),
    ),
    "hiatal hernia": ReportTemplate(
        ROUND,
        ("{size} hiatal hernia", "{size} hiatus hernia"),
        (
            "Retrocardiac air-fluid level, {size} hiatal hernia.",
            "A {size} hiatal hernia projects behind the heart.",
            "Rounded retrocardiac density with air-fluid level from a {size} hiatal hernia.",
        ),
        ("hiatal hernia", "hiatus hernia"),
    ),
    "hilar enlargement": ReportTemplate(
        DEGREE,
        (
            "{size} {side} hilar enlargement",
            "{size} enlargement of the {side} hilum",
            "{size} {side} hilar prominence",
        ),
        (
            "The {side} hilum is bulky, {size} hilar enlargement.",
            "{size} lobulated enlargement of the {side} hilum, suggesting hilar adenopathy.",
        ),
        ("hilar enlargement", "hilar adenopathy"),
        plural=("{size} bilateral hilar enlargement", "{size} enlargement of both hila"),
        only_denied=("enlargement of the hila",),
    ),
    "rib fracture": ReportTemplate(
        (("", "single"), ("two-level", "adjacent"), ("multiple", "several")),
        ("{size} {side} rib fracture{s}", "{size} displaced {side} rib fracture{s}"),
        (
            "Cortical step of a {side} rib, {size} rib fracture{s}.",
            "Displacement of the {side} ribs by {size} rib fracture{s}.",
        ),
        ("rib fracture", "displaced rib fracture"),
    ),
    "support devices": ReportTemplate(
        (("",), ("",), ("",)),
        (
            "support devices with {kinds}",
            "{kinds} as support devices",
            "lines and tubes with {kinds}",
        ),
        (
            "Support devices include {kinds}.",
            "{kinds} in situ.",
            "Support devices are present: {kinds} in expected position.",
            "Lines and tubes: {kinds}.",
            "A tube or catheter is in place, {kinds}.",
        ),
        ("support devices", "lines and tubes"),
        only_denied=("support device", "lines or tubes", "tube or catheter"),
    ),
}

NORMALS: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (
        frozenset({"cardiomegaly"}),
        (
            "The heart is normal in size.",
            "Heart size is within normal limits.",
            "The cardiac silhouette is not enlarged.",
        ),
    ),
    (
        frozenset({"cardiomegaly", "hilar enlargement", "hiatal hernia", "mass"}),
        (
            "The cardiomediastinal silhouette is unremarkable.",
            "Cardiomediastinal contours are within normal limits.",
        ),
    ),
    (
        frozenset(FINDINGS) - {"cardiomegaly", "rib fracture", "support devices", "hiatal hernia"},
        ("The lungs are clear.", "Lungs are well expanded and clear.", "Clear lungs."),
    ),
    (
        frozenset({"pleural effusion"}),
        ("The costophrenic angles are sharp.", "The pleural spaces are dry."),
    ),
    (frozenset({"edema"}), ("Pulmonary vascularity is normal.", "No vascular redistribution.")),
    (
        frozenset({"rib fracture"}),
        ("The osseous structures are intact.", "No acute bony abnormality."),
    ),
    (frozenset({"hilar enlargement"}), ("The hila are unremarkable.", "Normal hilar contours.")),
)
"""Sentences of normal anatomy, each with the findings that it rules out."""

ASIDES = (
    "The trachea is midline.",
    "Visualised upper abdomen is unremarkable.",
    "Mild degenerative changes of the thoracic spine.",
    "The aorta is unfolded.",
    "Soft tissues are unremarkable.",
    "Exposure is adequate.",
    "The film is slightly rotated.",
    "Inspiration is adequate.",
)
"""True of any image here, so said without regard to findings."""

TECHNIQUES = (
    "Frontal view of the chest.",
    "Single frontal radiograph of the chest.",
    "Indication: cough and fever.",
    "Indication: shortness of breath.",
    "Indication: chest pain.",
    "Indication: preoperative assessment.",
    "Indication: follow-up.",
    "Comparison: none available.",
    "No prior study for comparison.",
)
"""Said at random: an indication tells nothing of what the image shows."""

NORMAL_IMPRESSIONS = (
    "No acute cardiopulmonary abnormality.",
    "No acute cardiopulmonary disease.",
    "Normal chest radiograph.",
    "No acute findings.",
    "Unremarkable chest film.",
)

CLOSINGS = (
    "Clinical correlation is recommended.",
    "Follow-up as clinically indicated.",
    "No other acute abnormality.",
)

HEDGES = (
    "possible {phrase}",
    "suspected {phrase}",
    "{phrase} cannot be excluded",
    "findings may represent {phrase}",
    "questionable {phrase}",
    "probable {phrase}",
)

STATEMENTS = (
    "there {is} {phrase}",
    "there is evidence of {phrase}",
    "findings consistent with {phrase}",
    "{phrase}",
    "{phrase} {is} noted",
    "{phrase} {is} seen",
    "{phrase} {is} present",
)

DENIALS = (
    "No {phrase}.",
    "There {first_is} no {phrase}.",
    "No evidence of {phrase}.",
    "No definite {phrase}.",
    "No {phrase} {last_is} seen.",
    "No {phrase} {last_is} identified.",
)

SIZE_SAID_PROB = 0.7
"""Share of phrases that say the size."""

NAME_ALONE_PROB = 0.4
"""Share of plain statements that name the finding alone; the impression says its side. [chosen: a
model that reads bare names in denials only takes a bare name for a denial]"""

NUMBERS = ("adjacent", "multiple", "several")
PLURALS = re.compile(r"\b(effusions|fractures|devices|tubes)\b")
"""What a noun phrase here holds if it is in the plural."""


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _tidy(text: str) -> str:
    """One sentence with single spaces, the right article, a capital and a full stop."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    text = re.sub(r" ([,.])", r"\1", text).rstrip(".")
    return text[:1].upper() + text[1:] + "."


def _verb(noun_phrase: str) -> str:
    return "are" if PLURALS.search(noun_phrase) else "is"


def _adverb(text: str) -> str:
    """ "mild enlarged" as it must be said: "mildly enlarged"."""
    for word in ("mild", "slight", "moderate", "severe", "marked"):
        text = text.replace(f"is {word} enlarged", f"is {word}ly enlarged".replace("tely", "tely"))
    return text


def _fill(rng: np.random.Generator, template: str, lesion: Lesion, sizes: tuple) -> str:
    size: Size = lesion.size
    words = sizes[("small", "moderate", "large").index(size)]
    said = _choose(rng, words) if rng.random() < SIZE_SAID_PROB else ""
    side: Side = lesion.side
    kinds = [str(kind) for kind in lesion.kinds]
    listed = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
    return template.format(
        size=said,
        side="" if side == "none" else side,
        zone=lesion.zone,
        kinds=listed,
        s="s" if said in NUMBERS else "",
    )


def _phrase(rng: np.random.Generator, lesion: Lesion) -> str:
    template = REPORT_TEMPLATES[lesion.finding]
    both = lesion.side == "bilateral" and template.plural
    return _fill(
        rng, _choose(rng, template.plural if both else template.phrases), lesion, template.sizes
    )


def _statement(rng: np.random.Generator, lesion: Lesion, uncertain_prob: float) -> str:
    """The sentence of the findings section that says a lesion is there."""
    template = REPORT_TEMPLATES[lesion.finding]
    if rng.random() < uncertain_prob and lesion.finding != "support devices":
        return _tidy(_choose(rng, HEDGES).format(phrase=_phrase(rng, lesion)))
    if lesion.side != "bilateral" and rng.random() < 0.5:
        sentence = _fill(rng, _choose(rng, template.sentences), lesion, template.sizes)
        return _tidy(_adverb(sentence))
    statement = _choose(rng, STATEMENTS)
    is_bare = rng.random() < NAME_ALONE_PROB
    phrase = _choose(rng, template.names) if is_bare else _phrase(rng, lesion)
    return _tidy(statement.format(phrase=phrase, **{"is": _verb(phrase)}))


def _negations(rng: np.random.Generator, absent: Sequence[str], prob: float) -> list[str]:
    """Denials of some absent findings, one or two or three of them to a sentence."""
    denied = [name for name in absent if rng.random() < prob]
    rng.shuffle(denied)
    sentences = []
    while denied:
        group = [denied.pop() for _ in range(min(len(denied), int(rng.integers(1, 4))))]
        names = [
            _choose(rng, REPORT_TEMPLATES[name].names + REPORT_TEMPLATES[name].only_denied)
            for name in group
        ]
        phrase = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        sentence = _choose(rng, DENIALS)
        sentences.append(
            sentence.format(phrase=phrase, first_is=_verb(names[0]), last_is=_verb(names[-1]))
        )
    return sentences


def write_report(
    rng: np.random.Generator, lesions: Sequence[Lesion], preset: Preset
) -> tuple[str, str]:
    """The findings and the impression section of the report of a patient with `lesions`."""
    present = {lesion.finding for lesion in lesions}
    told = [lesion for lesion in lesions if rng.random() >= preset.omission_prob]
    body = [_statement(rng, lesion, preset.uncertain_prob) for lesion in told]
    for ruled_out, sentences in NORMALS:
        if not present & ruled_out and rng.random() < 0.4:
            body.append(_choose(rng, sentences))
    absent = [name for name in FINDINGS if name not in present]
    body += _negations(rng, absent, preset.absent_mention_prob)
    body += [sentence for sentence in ASIDES if rng.random() < 0.08]
    rng.shuffle(body)
    opening = [_choose(rng, TECHNIQUES)] if rng.random() < 0.4 else []

    if told:
        points = [_tidy(_phrase(rng, lesion)) for lesion in told]
        rng.shuffle(points)
    else:
        points = [_choose(rng, NORMAL_IMPRESSIONS)]
    if rng.random() < 0.2:
        points.append(_choose(rng, CLOSINGS))
    if len(points) > 1 and rng.random() < 0.5:
        points = [f"{i}. {point}" for i, point in enumerate(points, 1)]
    return " ".join(opening + body), " ".join(points)
