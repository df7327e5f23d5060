"""Reports as hospitals write them: what is denied, doubted or stated, in each way of saying it."""

import pytest

from mmclip.data.entities import EntityFinder, find_statuses
from mmclip.data.sample import Entity


@pytest.fixture(scope="module")
def finder() -> EntityFinder:
    return EntityFinder()


def findings(finder: EntityFinder, text: str) -> str:
    """The findings as "concept" (present), "-concept" (negated) or "?concept" (uncertain)."""
    (found,) = finder.find([text])
    sign = {"present": "", "negated": "-", "uncertain": "?"}
    return ", ".join(sign[e.status] + e.concept for e in found if e.kind == "finding")


CASES: dict[str, list[tuple[str, str]]] = {
    "a structured line says it behind the finding": [
        ("Pneumothorax: None.", "-pneumothorax"),
        ("Effusion: negative.", "-pleural effusion"),
        ("Pneumothorax - none.", "-pneumothorax"),
        ("Effusion absent.", "-pleural effusion"),
        ("Pleural effusion: no.", "-pleural effusion"),
        ("Pleural effusion: No", "-pleural effusion"),
        ("PNEUMOTHORAX: ABSENT", "-pneumothorax"),
        ("Pneumothorax: none seen.", "-pneumothorax"),
        ("Effusion: not present.", "-pleural effusion"),
        ("Effusion: not identified", "-pleural effusion"),
        ("Consolidation: none, effusion: moderate.", "-consolidation, pleural effusion"),
        ("Pneumothorax: None\nPleural effusion: Small", "-pneumothorax, pleural effusion"),
        ("Pneumothorax: No\nPleural effusion: No", "-pneumothorax, -pleural effusion"),
        ("- Pneumothorax: none\n- Effusion: none", "-pneumothorax, -pleural effusion"),
        ("Pneumothorax: None Effusion: None", "-pneumothorax, -pleural effusion"),
        ("Effusion/pneumothorax: none.", "-pleural effusion, -pneumothorax"),
        ("Pneumothorax (none).", "-pneumothorax"),
        ("Pneumothorax? No.", "-pneumothorax"),
        ("Consolidation: nil.", "-consolidation"),
        ("Effusion absent, cardiomegaly present.", "-pleural effusion, cardiomegaly"),
        ("Effusion: present. Pneumothorax: absent.", "pleural effusion, -pneumothorax"),
        ("Pneumothorax: possible.", "?pneumothorax"),
        ("Effusion: unchanged.", "pleural effusion"),
        ("Effusion: no change.", "pleural effusion"),
        ("IMPRESSION: No effusion.", "-pleural effusion"),
        ("Lungs: No consolidation. Heart: Enlarged.", "-consolidation"),
        ("None of the above. Effusion.", "pleural effusion"),
        ("Pneumothorax: none. Small effusion.", "-pneumothorax, pleural effusion"),
        ("Absent pneumothorax.", "-pneumothorax"),
    ],
    "a denied change of degree denies no finding": [
        ("No relevant change in moderate cardiomegaly.", "cardiomegaly"),
        ("No difference in the size of the effusion.", "pleural effusion"),
        ("Without substantial change in the effusion.", "pleural effusion"),
        ("No change in the effusion.", "pleural effusion"),
        ("No appreciable interval change of the right effusion.", "pleural effusion"),
        ("No major increase in the effusion.", "pleural effusion"),
        ("No clinically meaningful improvement in pneumonia.", "pneumonia"),
        ("No evidence of progression of the pneumonia.", "pneumonia"),
        ("No increase or decrease in the effusion.", "pleural effusion"),
        ("The effusion has not significantly changed.", "pleural effusion"),
        ("Effusion has not increased.", "pleural effusion"),
        ("Effusion without interval worsening.", "pleural effusion"),
        ("No visible growth of the nodule.", "nodule"),
        ("There has not been any change in the pneumothorax.", "pneumothorax"),
        ("No interval enlargement of the effusion.", "pleural effusion"),
        ("No change or new effusion.", "-pleural effusion"),
        ("No significant change, no effusion.", "-pleural effusion"),
        ("No enlargement of the heart.", "-cardiomegaly"),
        ("Heart size is not increased.", "-cardiomegaly"),
        ("No hilar enlargement or effusion.", "-hilar enlargement, -pleural effusion"),
    ],
    "a denied novelty denies it": [
        ("No interval appearance of effusion.", "-pleural effusion"),
        ("No interval development of pneumothorax.", "-pneumothorax"),
        ("No new effusion.", "-pleural effusion"),
        ("No developing consolidation.", "-consolidation"),
        ("No newly developed pneumothorax.", "-pneumothorax"),
        ("Without interval development of pneumonia.", "-pneumonia"),
        ("No recurrence of the pneumothorax.", "-pneumothorax"),
        ("No reaccumulation of effusion.", "-pleural effusion"),
        ("No evidence of new consolidation.", "-consolidation"),
        ("No interval effusion.", "-pleural effusion"),
    ],
    "what has not wholly resolved is present": [
        ("The pneumothorax has partially resolved.", "pneumothorax"),
        ("Incomplete resolution of pneumonia.", "pneumonia"),
        ("No resolution of pneumonia.", "pneumonia"),
        ("Follow up to document resolution of pneumonia.", "pneumonia"),
        ("The effusion has nearly completely resolved.", "pleural effusion"),
        ("Effusion has almost resolved.", "pleural effusion"),
        ("The pneumonia has not resolved.", "pneumonia"),
        ("Pneumonia has not yet completely resolved.", "pneumonia"),
        ("Partial interval resolution of the effusion.", "pleural effusion"),
        ("Near complete resolution of the edema.", "edema"),
        ("Partial clearing of the consolidation.", "consolidation"),
        ("Repeat image to ensure clearing of pneumonia.", "pneumonia"),
        ("Follow-up until resolution of the pneumonia.", "pneumonia"),
        ("Resolving pneumonia.", "pneumonia"),
        ("Unresolved pneumonia.", "pneumonia"),
        ("Failure of resolution of the pneumonia.", "pneumonia"),
        ("Recommend radiographs to confirm complete resolution of the opacity.", "opacity"),
        ("The pneumothorax has resolved.", "-pneumothorax"),
        ("The pneumothorax has completely resolved.", "-pneumothorax"),
        ("Interval resolution of the effusion.", "-pleural effusion"),
        ("Complete resolution of edema.", "-edema"),
        ("Edema and effusions have now cleared.", "-edema, -pleural effusion"),
    ],
    "non- before an adjective denies the adjective": [
        ("Non-displaced rib fracture.", "rib fracture"),
        ("Non-calcified nodule.", "nodule"),
        ("Non calcified nodule.", "nodule"),
        ("A non-specific opacity.", "opacity"),
        ("Non-obstructive atelectasis.", "atelectasis"),
        ("Non–displaced fracture.", "fracture"),
        ("Non-cardiogenic edema.", "edema"),
        ("Nonvisualization of the pneumothorax.", "-pneumothorax"),
    ],
    "what is not excluded is uncertain": [
        ("Pneumonia has not been ruled out.", "?pneumonia"),
        ("Pneumonia can't be excluded.", "?pneumonia"),
        ("Pneumonia can’t be ruled out.", "?pneumonia"),
        ("Pneumonia cannot be entirely excluded.", "?pneumonia"),
        ("Pneumonia couldn't be excluded.", "?pneumonia"),
        ("Pneumonia is not excluded.", "?pneumonia"),
        ("Pneumonia isn't excluded.", "?pneumonia"),
        ("Pneumonia was not definitively ruled out.", "?pneumonia"),
        ("Cannot exclude a small pneumothorax.", "?pneumothorax"),
        ("Can't rule out pneumonia.", "?pneumonia"),
        ("This does not exclude pneumonia.", "?pneumonia"),
        ("Unable to exclude pneumonia.", "?pneumonia"),
        ("It is difficult to exclude an effusion.", "?pleural effusion"),
        ("An effusion is difficult to exclude.", "?pleural effusion"),
        ("Pneumonia should be excluded.", "?pneumonia"),
        ("Cannot completely exclude pneumonia or effusion.", "?pneumonia, ?pleural effusion"),
        ("Opacity, pneumonia cannot be excluded.", "opacity, ?pneumonia"),
        ("Pneumonia has been ruled out.", "-pneumonia"),
        ("Pneumothorax is excluded.", "-pneumothorax"),
    ],
    "a denial ends where another statement begins": [
        ("No pneumothorax and a moderate effusion.", "-pneumothorax, pleural effusion"),
        ("No effusion, mild cardiomegaly.", "-pleural effusion, cardiomegaly"),
        (
            "No focal consolidation, large pleural effusion, or pneumothorax.",
            "-consolidation, -pleural effusion, -pneumothorax",
        ),
        ("No pneumothorax or large effusion.", "-pneumothorax, -pleural effusion"),
        ("No pneumothorax or effusion, small nodule.", "-pneumothorax, -pleural effusion, nodule"),
        ("No pneumothorax and an 8 mm nodule.", "-pneumothorax, nodule"),
        ("No pneumothorax, a small effusion.", "-pneumothorax, pleural effusion"),
        ("No edema, moderate-sized effusion.", "-edema, pleural effusion"),
        ("No effusion, the heart is enlarged.", "-pleural effusion, cardiomegaly"),
        ("No effusion and cardiomegaly is stable.", "-pleural effusion, cardiomegaly"),
        ("No pneumothorax, cardiomegaly is present.", "-pneumothorax, cardiomegaly"),
        ("No edema and effusions have increased.", "-edema, pleural effusion"),
        ("No pneumothorax, stable cardiomegaly.", "-pneumothorax, cardiomegaly"),
        ("Without pneumothorax, moderately enlarged heart.", "-pneumothorax, cardiomegaly"),
        ("No acute infiltrate, old rib fractures.", "-infiltration, rib fracture"),
        ("No effusion or pneumothorax is seen.", "-pleural effusion, -pneumothorax"),
        (
            "No effusion, pneumothorax, or edema is seen.",
            "-pleural effusion, -pneumothorax, -edema",
        ),
        ("No effusion and no pneumothorax are seen.", "-pleural effusion, -pneumothorax"),
        ("No effusion, pneumothorax.", "-pleural effusion, -pneumothorax"),
        ("No effusion and pneumothorax.", "-pleural effusion, -pneumothorax"),
        ("No mass, effusion or large pneumothorax.", "-mass, -pleural effusion, -pneumothorax"),
        ("Neither effusion, large mass nor edema.", "-pleural effusion, -mass, -edema"),
        ("No effusion, possible small nodule.", "-pleural effusion, ?nodule"),
        ("No effusion, mild edema, no mass or nodule.", "-pleural effusion, edema, -mass, -nodule"),
        ("Stable cardiomegaly, effusion is not seen.", "cardiomegaly, -pleural effusion"),
    ],
    "a doubt reaches what it is about": [
        ("Opacity could be atelectasis.", "opacity, ?atelectasis"),
        (
            "Opacity likely represents atelectasis or pneumonia.",
            "opacity, ?atelectasis, ?pneumonia",
        ),
        ("Differential includes pneumonia, edema and mass.", "?pneumonia, ?edema, ?mass"),
        ("Opacities, ?pneumonia.", "opacity, ?pneumonia"),
        ("Either atelectasis or pneumonia.", "?atelectasis, ?pneumonia"),
        ("Opacities, less likely pneumonia.", "opacity, ?pneumonia"),
        ("Concern for pneumonia.", "?pneumonia"),
        ("Opacity is likely atelectasis.", "opacity, ?atelectasis"),
        ("Atelectasis is likely.", "?atelectasis"),
        ("Atelectasis is possible, and an effusion.", "?atelectasis, pleural effusion"),
        ("Cardiomegaly, effusion versus scarring.", "cardiomegaly, ?pleural effusion, ?scarring"),
        ("Differential includes edema, mild fibrosis, mass.", "?edema, ?fibrosis, ?mass"),
        ("Wedge deformity, age-indeterminate.", "vertebral deformity"),
        ("The questionable nodule was not seen.", "-nodule"),
        ("The effusion is not as well seen.", "pleural effusion"),
        ("Findings raise the possibility of edema.", "?edema"),
        ("Suggestive of mild edema.", "?edema"),
        ("Atelectasis, scarring or pneumonia not excluded.", "?atelectasis, ?scarring, ?pneumonia"),
        ("If pneumonia is suspected, repeat.", "?pneumonia"),
        ("CT may be obtained if clinically indicated to evaluate for mass.", "?mass"),
        ("No pneumonia is suspected.", "-pneumonia"),
        ("No edema or pneumonia suspected.", "-edema, -pneumonia"),
        ("Not consistent with pneumonia.", "-pneumonia"),
        ("Probable small effusion, mild cardiomegaly.", "?pleural effusion, cardiomegaly"),
    ],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [pytest.param(text, said, id=text) for cases in CASES.values() for text, said in cases],
)
def test_the_status_of_each_finding(finder, text, expected):
    assert findings(finder, text) == expected


def test_spans_of_others_get_the_status_that_the_cues_say():
    text = "No foo, mild bar. Lungs show no baz."
    given = [Entity(3, 6, "finding", "foo"), Entity(13, 16, "finding", "bar")]
    whole = Entity(18, 35, "finding", "lungs show no baz")  # its "no" is part of its name
    said = [e.status for e in find_statuses(text, [*given, whole])]
    assert said == ["negated", "present", "present"]
