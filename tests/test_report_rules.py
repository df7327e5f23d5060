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
        ("Lungs: No consolidation. Heart: Enlarged.", "-consolidation, cardiomegaly"),
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
    "a denial ends where another statement begins, without an article too": [
        ("No effusion and mild cardiomegaly.", "-pleural effusion, cardiomegaly"),
        ("No pneumothorax and stable cardiomegaly.", "-pneumothorax, cardiomegaly"),
        ("No acute infiltrate and old rib fractures.", "-infiltration, rib fracture"),
        ("Without consolidation and moderate effusion.", "-consolidation, pleural effusion"),
        ("No effusion and mild edema or atelectasis.", "-pleural effusion, -edema, -atelectasis"),
        ("No effusion and pneumothorax.", "-pleural effusion, -pneumothorax"),
        ("Possible effusion and mild edema.", "?pleural effusion, ?edema"),
    ],
    "a finding that is named again behind its denial is stated": [
        ("No lobar consolidation, streaky consolidation.", "-consolidation, consolidation"),
        ("No large nodule, calcified nodule in the left apex.", "-nodule, nodule"),
        ("No large pneumothorax, apical pneumothorax only.", "-pneumothorax, pneumothorax"),
        ("No focal opacity, diffuse hazy opacities.", "-opacity, opacity"),
        ("No large effusion and basal effusion.", "-pleural effusion, pleural effusion"),
        ("No effusion, loculated effusion or mass.", "-pleural effusion, -pleural effusion, -mass"),
        ("No pleural effusion, pericardial effusion.", "-pleural effusion, -pericardial effusion"),
        ("No rib fracture, vertebral fracture.", "-rib fracture, -vertebral fracture"),
        ("Possible consolidation, streaky consolidation.", "?consolidation, ?consolidation"),
    ],
    "a right word is no typing error": [
        ("Atelectasias basales.", ""),
        ("Consolidacion basal.", ""),
        ("Pneumonie rechts.", ""),
        ("Cardiomegalia.", ""),
        ("Suffusion, diffusion and infusion.", ""),
        ("Rejection, arteritis, injection in the lung.", ""),
        ("Lobulated mass.", "mass"),
    ],
    "a choice of two findings leaves both in doubt": [
        ("Left basilar atelectasis or infiltrate.", "?atelectasis, ?infiltration"),
        ("There is atelectasis or pneumonia.", "?atelectasis, ?pneumonia"),
        ("Bibasilar atelectasis or mild early pneumonia.", "?atelectasis, ?pneumonia"),
        ("Opacities, subsegmental atelectasis or edema.", "opacity, ?atelectasis, ?edema"),
        ("Atelectasis, edema, or pneumonia.", "?atelectasis, ?edema, ?pneumonia"),
        ("Airspace disease and/or atelectasis.", "?airspace disease, ?atelectasis"),
        ("Compressive atelectasis or infiltrate in the right base", "?atelectasis, ?infiltration"),
        ("Atelectasis or edema, small effusion.", "?atelectasis, ?edema, pleural effusion"),
        ("Cardiomegaly. Atelectasis or pneumonia.", "cardiomegaly, ?atelectasis, ?pneumonia"),
        ("No atelectasis or pneumonia.", "-atelectasis, -pneumonia"),
        ("Atelectasis or pneumonia is not seen.", "-atelectasis, -pneumonia"),
        ("No change in atelectasis or pneumonia.", "atelectasis, pneumonia"),
        ("Left basilar atelectasis or scarring.", "atelectasis, scarring"),  # a set phrase
        ("No edema. Atelectasis or pneumonia.", "-edema, ?atelectasis, ?pneumonia"),
        ("Cardiomegaly with effusion.", "cardiomegaly, pleural effusion"),
    ],
    "what a denied finding would suggest is denied": [
        ("There is no focal opacity to suggest a pneumonia.", "-opacity, -pneumonia"),
        ("No opacity suspicious for pneumonia.", "-opacity, -pneumonia"),
        ("No consolidation concerning for pneumonia.", "-consolidation, -pneumonia"),
        ("No opacities suggestive of pneumonia.", "-opacity, -pneumonia"),
        ("No mass or adenopathy to suggest metastasis.", "-mass, -lymphadenopathy, -metastasis"),
        (
            "There is no pleural line to suggest pneumothorax or costophrenic blunting to suggest "
            "effusion.",
            "-pneumothorax, -costophrenic angle blunting, -pleural effusion",
        ),
        ("Without consolidation that would suggest pneumonia.", "-consolidation, -pneumonia"),
        ("There is an opacity to suggest pneumonia.", "opacity, ?pneumonia"),
        ("Opacity suspicious for pneumonia.", "opacity, ?pneumonia"),
        (
            "No effusion. Opacity suspicious for pneumonia.",
            "-pleural effusion, opacity, ?pneumonia",
        ),
        (
            "No effusion, and an opacity suspicious for pneumonia.",
            "-pleural effusion, opacity, ?pneumonia",
        ),
        ("No change in the opacity suspicious for pneumonia.", "opacity, ?pneumonia"),
    ],
    "what is to be awaited is present": [
        ("Follow up to confirm clearing of the opacities.", "opacity"),
        ("A film would be reasonable to allow clearing of inflammatory opacities.", "opacity"),
        ("Repeat to allow for resolution of the pneumonia.", "pneumonia"),
    ],
    "a stimulator is no pacemaker, and a wire no bone": [
        ("Spinal stimulator in place.", "support device"),
        ("Vagal nerve stimulator.", "support device"),
        ("Cardiac pacemaker.", "pacemaker"),
        ("Fractured sternotomy wire.", "sternotomy"),
        ("Sternotomy, rib fracture.", "sternotomy, rib fracture"),
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


UNCERTAIN = """
Opacity may represent pneumonia. | opacity, ?pneumonia
Opacity might be due to atelectasis. | opacity, ?atelectasis
Findings may be seen in the setting of pneumonia. | ?pneumonia
Opacity which could be pneumonia or aspiration. | opacity, ?pneumonia, ?pneumonia
Right basilar opacity, atelectasis versus pneumonia. | opacity, ?atelectasis, ?pneumonia
Right basilar opacity; atelectasis vs. consolidation. | opacity, ?atelectasis, ?consolidation
Cannot exclude underlying pneumonia. | ?pneumonia
Underlying pneumonia cannot be excluded. | ?pneumonia
Superimposed infection or pneumonia not excluded. | ?pneumonia, ?pneumonia
A small effusion would be difficult to exclude. | ?pleural effusion
CT if clinically indicated to exclude pneumothorax. | ?pneumothorax
If there is clinical concern for pneumonia, repeat. | ?pneumonia
Opacity likely atelectasis, less likely pneumonia. | opacity, ?atelectasis, ?pneumonia
Likely small left pleural effusion. | ?pleural effusion
Small left pleural effusion likely. | ?pleural effusion
Small left effusion is likely present. | ?pleural effusion
There is likely a small effusion. | ?pleural effusion
There is likely mild pulmonary edema. | ?edema
Possible trace effusion. | ?pleural effusion
Trace effusion is possible. | ?pleural effusion
A small pneumothorax may be present. | ?pneumothorax
There may be a small pneumothorax. | ?pneumothorax
There may be mild edema. | ?edema
There might be a trace left effusion. | ?pleural effusion
Differential diagnosis includes pneumonia and edema. | ?pneumonia, ?edema
The differential is atelectasis, pneumonia, or hemorrhage. | ?atelectasis, ?pneumonia
Findings suggest mild edema. | ?edema
Findings are suggestive of pneumonia. | ?pneumonia
This raises concern for pneumonia. | ?pneumonia
Worrisome for pneumonia. | ?pneumonia
Suspicious for malignancy. | ?mass
Pneumonia is suspected. | ?pneumonia
Suspected pneumonia. | ?pneumonia
Questionable nodule in the right apex. | ?nodule
Question of a nodule. | ?nodule
Query pneumonia. | ?pneumonia
Pneumonia is not entirely excluded. | ?pneumonia
Pneumonia remains a consideration. | ?pneumonia
Pneumonia should be considered in the appropriate clinical setting. | ?pneumonia
In the appropriate clinical setting, this could represent pneumonia. | ?pneumonia
Opacity in the proper clinical context may represent pneumonia. | opacity, ?pneumonia
Atelectasis is favored over pneumonia. | ?atelectasis, ?pneumonia
Opacity, favor atelectasis. | opacity, ?atelectasis
Opacity felt to be atelectasis. | opacity, ?atelectasis
Opacity thought to represent atelectasis. | opacity, ?atelectasis
Opacity presumably atelectasis. | opacity, ?atelectasis
Opacity compatible with atelectasis or pneumonia. | opacity, ?atelectasis, ?pneumonia
Opacities consistent with pneumonia. | opacity, pneumonia
Opacities most consistent with edema. | opacity, edema
Opacity most likely reflects atelectasis. | opacity, ?atelectasis
Opacity probably reflecting atelectasis. | opacity, ?atelectasis
Apparent nodule may be a nipple shadow. | ?nodule
Possible nodule versus overlapping vessels. | ?nodule
Nodular opacity versus summation. | ?opacity
Small effusions cannot be ruled out. | ?pleural effusion
No definite effusion. | -pleural effusion
No definite pneumothorax, although tiny one may be present. | -pneumothorax
Equivocal left effusion. | ?pleural effusion
Early pneumonia is a possibility. | ?pneumonia
Pneumonia could be considered. | ?pneumonia
Pneumonia is in the differential. | ?pneumonia
Cardiomegaly or pericardial effusion. | ?cardiomegaly, ?pericardial effusion
Opacity, pneumonia or atelectasis. | opacity, ?pneumonia, ?atelectasis
Borderline cardiomegaly. | cardiomegaly
Mild cardiomegaly, possible edema. | cardiomegaly, ?edema
Opacity, which may be due to edema, mass or atelectasis. | opacity, ?edema, ?mass, ?atelectasis
Possibly representing pneumonia. | ?pneumonia
It is unclear whether this represents pneumonia. | ?pneumonia
Unclear if this is atelectasis or pneumonia. | ?atelectasis, ?pneumonia
Cannot distinguish atelectasis from pneumonia. | ?atelectasis, ?pneumonia
Difficult to differentiate edema from pneumonia. | ?edema, ?pneumonia
Consider pneumonia. | ?pneumonia
Effusion, if present, is small. | ?pleural effusion
If present, an effusion is small. | ?pleural effusion
Effusion is suspected on the left. | ?pleural effusion
Potential pneumothorax at the apex. | ?pneumothorax
Appears to be a small pneumothorax. | ?pneumothorax
What appears to be a nodule. | ?nodule
Low suspicion for pneumonia. | ?pneumonia
There is suspicion of edema. | ?edema
Edema is less likely. | ?edema
Edema is unlikely. | -edema
Infection is doubtful, pneumonia not likely. | -pneumonia
Pneumonia is not likely. | -pneumonia
Pneumonia not favored. | -pneumonia
Concerning for developing pneumonia. | ?pneumonia
Atypical infection or edema could have this appearance. | ?pneumonia, ?edema
Pneumonia would have a similar appearance. | ?pneumonia
An element of edema may coexist. | ?edema
A component of edema cannot be excluded. | ?edema
A superimposed pneumonia is difficult to exclude. | ?pneumonia
Probably a small effusion. | ?pleural effusion
Suggestion of a small nodule. | ?nodule
There is a suggestion of mild edema. | ?edema
Hazy opacity, ? pneumonia. | opacity, ?pneumonia
Rule out pneumonia. | ?pneumonia
Please correlate for pneumonia. | ?pneumonia
Atelectasis and/or pneumonia. | ?atelectasis, ?pneumonia
Atelectasis/pneumonia. | atelectasis, pneumonia
Patchy opacity - atelectasis vs mass vs edema. | opacity, ?atelectasis, ?mass, ?edema
Opacities that may reflect edema, with small effusions. | opacity, ?edema, pleural effusion
May represent edema; small effusion. | ?edema, pleural effusion
Could represent pneumonia. Cardiomegaly. | ?pneumonia, cardiomegaly
Left effusion with possible underlying consolidation. | pleural effusion, ?consolidation
Moderate effusion and likely atelectasis. | pleural effusion, ?atelectasis
Moderate effusion, likely with atelectasis. | pleural effusion, ?atelectasis
Effusion, cannot exclude adjacent consolidation. | pleural effusion, ?consolidation
Unchanged effusion, and probable atelectasis. | pleural effusion, ?atelectasis
"""
"""How radiologists doubt: a sentence, and its findings as in CASES."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [pytest.param(text, said, id=text) for cases in CASES.values() for text, said in cases],
)
def test_the_status_of_each_finding(finder, text, expected):
    assert findings(finder, text) == expected


@pytest.mark.parametrize("line", UNCERTAIN.strip().splitlines())
def test_a_doubt_is_heard_however_it_is_worded(finder, line):
    text, expected = line.split(" | ")
    assert findings(finder, text) == expected


def test_spans_of_others_get_the_status_that_the_cues_say():
    text = "No foo, mild bar. Lungs show no baz."
    given = [Entity(3, 6, "finding", "foo"), Entity(13, 16, "finding", "bar")]
    whole = Entity(18, 35, "finding", "lungs show no baz")  # its "no" is part of its name
    said = [e.status for e in find_statuses(text, [*given, whole])]
    assert said == ["negated", "present", "present"]
