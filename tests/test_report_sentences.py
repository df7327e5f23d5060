"""Lists of sentences, each written before the rules were looked at, and then mended by.

A line is a sentence, as radiologists word them, and after the bar some words of its findings:
bare where the finding is present, "-" where it is negated, "?" where it is uncertain.
"""

import pytest

from mmclip.data.entities import EntityFinder

SIGNS = {"-": "negated", "?": "uncertain"}

SENTENCES: dict[str, str] = {
    "structured lines": """
Pleural effusions: none. | -effusion
Consolidation: Not present. | -consolidation
Pneumothorax: not seen. | -pneumothorax
Atelectasis: absent. Edema: present. | -atelectasis, edema
Pneumothorax (none). Moderate effusion. | -pneumothorax, effusion
Pneumothorax? No. | -pneumothorax
Nodules: none identified | -nodule
Effusion = none | -effusion
Pneumothorax: No evidence. | -pneumothorax
Rib fractures: none. Effusions: small bilateral. | -fracture, effusion
Fracture: N | -fracture
Pneumothorax: no; effusion: yes. | -pneumothorax, effusion
Edema: Negative for edema. | -edema
Pleura: No effusion. Heart: cardiomegaly. | -effusion, cardiomegaly
Pneumonia: 0 | -pneumonia
Pneumothorax: nil. | -pneumothorax
Pneumothorax is not identified, nor is effusion. | -pneumothorax, -effusion
Effusion: trace. Pneumothorax: none. | effusion, -pneumothorax
Pneumothorax, none. Effusion, small. | -pneumothorax, effusion
Effusions/pneumothorax: None | -effusion, -pneumothorax
Consolidation or atelectasis: none. | -consolidation, -atelectasis
Pneumothorax....none | -pneumothorax
""",
    "denied change of degree": """
No significant interval change in bilateral pleural effusions. | effusion
No appreciable increase in the right pneumothorax. | pneumothorax
There has been no improvement in pulmonary edema. | edema
Without significant worsening of the consolidation. | consolidation
No marked progression of the interstitial opacities. | opacit
No notable decrease in size of the left effusion. | effusion
Not significantly changed left lower lobe atelectasis. | atelectasis
No enlargement of the nodule. | nodule
No further decrease in the pneumothorax. | pneumothorax
Cardiomegaly, not significantly changed. | cardiomegaly
No measurable growth of the right upper lobe nodule. | nodule
Effusion without interval change. | effusion
There is little if any change in the effusion. | effusion
No gross interval change in cardiomegaly and edema. | cardiomegaly, edema
The effusion has not changed. | effusion
No large change to the pneumothorax, no effusion. | pneumothorax, -effusion
No definite change in appearance of the consolidation. | consolidation
No interval improvement or worsening of the edema. | edema
Neither improvement nor worsening of the consolidation. | consolidation
No reduction in right pleural effusion. | effusion
No evidence of progression of pneumonia. | pneumonia
No alteration in the pleural effusion. | effusion
Effusion shows no change. | effusion
No clear evidence of interval change in the left pneumothorax. | pneumothorax
No new change in the known cardiomegaly. | cardiomegaly
""",
    "denied novelty": """
No new pneumothorax has developed. | -pneumothorax
No developing consolidation. | -consolidation
No interval occurrence of pneumothorax. | -pneumothorax
Without development of effusion. | -effusion
No newly appearing nodules. | -nodule
No evidence of interval development of pneumonia. | -pneumonia
No emergence of new opacities. | -opacit
No pneumothorax has developed in the interval. | -pneumothorax
There has been no interval formation of effusion. | -effusion
No new focal airspace consolidation or effusion. | -consolidation, -effusion
No onset of edema. | -edema
No de novo nodule. | -nodule
No recurrence of pneumothorax. | -pneumothorax
No recurrent effusion. | -effusion
No reaccumulation of the effusion. | -effusion
No interval new nodule. | -nodule
No acute interval development of edema. | -edema
No superimposed pneumonia. | -pneumonia
No residual pneumothorax. | -pneumothorax
No new or enlarging effusion. | -effusion
""",
    "resolution": """
The effusion has nearly completely resolved. | effusion
Partial resolution of the consolidation. | consolidation
Pneumonia is resolving. | pneumonia
The edema has not resolved. | edema
Recommend follow-up radiograph to confirm resolution of the opacity. | opacity
Pneumothorax has almost resolved. | pneumothorax
Repeat in 6 weeks to ensure clearing of the pneumonia. | pneumonia
Without resolution of the effusion. | effusion
The pneumothorax has resolved. | -pneumothorax
Complete resolution of edema. | -edema
Interval resolution of right effusion. | -effusion
Near complete resolution of the effusion. | effusion
Slowly resolving pneumonia. | pneumonia
Failure of pneumonia to resolve. | pneumonia
Pneumonia persists without clearing. | pneumonia
The consolidation has incompletely cleared. | consolidation
Imaging until resolution of the pneumonia is advised. | pneumonia
The effusion has mostly resolved. | effusion
Effusion has resolved, but the pneumothorax has not. | -effusion, pneumothorax
Previously seen pneumothorax is no longer visualized. | -pneumothorax
Follow-up to resolution recommended for the consolidation. | consolidation
Unresolved pneumonia. | pneumonia
Pneumothorax has substantially resolved. | pneumothorax
The previously noted effusion has cleared. | -effusion
Consolidation has yet to resolve. | consolidation
""",
    "a prefix denies its adjective": """
Nondisplaced fracture of the left sixth rib. | fracture
Non-obstructive atelectasis. | atelectasis
Non-specific interstitial opacities. | opacit
Noncalcified pulmonary nodule in the right apex. | nodule
Non-healed rib fracture. | fracture
Non-cavitary consolidation. | consolidation
Non-loculated effusion. | effusion
Non displaced clavicle fracture. | fracture
Non-cardiogenic edema. | edema
Non-tension pneumothorax. | pneumothorax
Not displaced rib fracture. | fracture
A non-enlarging nodule. | nodule
Uncomplicated effusion. | effusion
Fracture without displacement. | fracture
Nodule without calcification. | nodule
Pneumothorax without tension. | pneumothorax
Atypical pneumonia. | pneumonia
""",
    "not excluded": """
Superimposed pneumonia is not excluded. | ?pneumonia
Cannot rule out pneumonia. | ?pneumonia
Pneumonia couldn't be excluded. | ?pneumonia
A small effusion cannot be entirely excluded. | ?effusion
Underlying consolidation would be difficult to exclude. | ?consolidation
Pneumothorax is not completely ruled out. | ?pneumothorax
Aspiration has not been excluded. | ?aspiration
One cannot exclude a small pneumothorax. | ?pneumothorax
An early infiltrate is hard to exclude. | ?infiltrate
Not able to exclude a nodule. | ?nodule
Pneumonia should be ruled out. | ?pneumonia
Pneumonia has been ruled out. | -pneumonia
A retrocardiac opacity is not entirely excluded. | ?opacity
We are unable to exclude pneumonia. | ?pneumonia
Does not exclude pneumonia. | ?pneumonia
Cannot completely exclude trace effusion. | ?effusion
Pneumonia isn't excluded. | ?pneumonia
Pneumonia cannot be ruled out with certainty. | ?pneumonia
Pneumonia wasn't ruled out. | ?pneumonia
No pneumothorax but small effusion can not be excluded. | -pneumothorax, ?effusion
Exclusion of pneumonia is not possible. | ?pneumonia
""",
    "ends of lists": """
No pneumothorax and a small left effusion. | -pneumothorax, effusion
No effusion, moderate cardiomegaly. | -effusion, cardiomegaly
No pneumothorax, there is bibasilar atelectasis. | -pneumothorax, atelectasis
No consolidation, effusion, or pneumothorax. | -consolidation, -effusion, -pneumothorax
No pneumothorax; small effusion. | -pneumothorax, effusion
No edema, small effusions, stable cardiomegaly. | -edema, effusion, cardiomegaly
No large effusion or pneumothorax. | -effusion, -pneumothorax
No pneumothorax with small effusion. | -pneumothorax, effusion
No pneumothorax while the effusion is unchanged. | -pneumothorax, effusion
No pneumothorax, effusion has increased. | -pneumothorax, effusion
No acute fracture, but old rib fractures are present. | -fracture
No consolidation nor small effusion. | -consolidation, -effusion
No pneumothorax and mild cardiomegaly. | -pneumothorax, cardiomegaly
There is no pneumothorax, though moderate edema persists. | -pneumothorax, edema
No effusion and pneumothorax. | -effusion, -pneumothorax
No pneumothorax. and an effusion. | effusion
No effusion, large cardiac silhouette suggests cardiomegaly. | -effusion
No pneumothorax, tiny effusion. | -pneumothorax, effusion
No evidence of pneumothorax and there are bilateral effusions. | -pneumothorax, effusion
No pneumothorax is seen and consolidation has worsened. | -pneumothorax, consolidation
No pneumothorax, minimal basilar atelectasis. | -pneumothorax, atelectasis
No pneumothorax, bilateral effusions are small. | -pneumothorax, effusion
No pneumonia, edema, effusion. Cardiomegaly. | -pneumonia, -edema, -effusion, cardiomegaly
Cardiomegaly without edema, with small effusion. | cardiomegaly, -edema, effusion
No consolidation, however a moderate effusion remains. | -consolidation, effusion
No pneumothorax apart from the known effusion. | -pneumothorax, effusion
No pneumothorax or pleural effusion, mild atelectasis. | -pneumothorax, -effusion, atelectasis
""",
    "doubts": """
Right basilar opacity may represent pneumonia. | ?pneumonia
Left lower lobe atelectasis versus pneumonia. | ?pneumonia, ?atelectasis
Cannot exclude small effusion. | ?effusion
Findings could be pneumonia. | ?pneumonia
Findings suggest pulmonary edema. | ?edema
Findings suggestive of pneumonia. | ?pneumonia
Likely atelectasis. | ?atelectasis
Small effusion is likely. | ?effusion
Possible small left pleural effusion. | ?effusion
The differential includes pneumonia and aspiration. | ?pneumonia, ?aspiration
Question of a nodule in the right apex. | ?nodule
Opacity concerning for pneumonia. | ?pneumonia
Suspicious for pneumothorax. | ?pneumothorax
Findings worrisome for malignancy. | ?malignancy
This probably represents atelectasis. | ?atelectasis
Probable effusion. | ?effusion
Questionable consolidation at the left base. | ?consolidation
?pneumonia | ?pneumonia
Pneumonia? | ?pneumonia
Suspected pneumothorax. | ?pneumothorax
Pneumonia is suspected. | ?pneumonia
There is a suspicion of pneumothorax. | ?pneumothorax
Opacity, pneumonia vs atelectasis. | ?pneumonia
Raises the possibility of pneumonia. | ?pneumonia
Raising concern for pneumonia. | ?pneumonia
Pneumonia is in the differential. | ?pneumonia
Differential diagnosis: pneumonia, atelectasis. | ?pneumonia
Pneumonia should be considered. | ?pneumonia
Consider pneumonia. | ?pneumonia
Consider pneumonia in the appropriate clinical setting. | ?pneumonia
Opacity could reflect atelectasis or consolidation. | ?consolidation
Opacity might represent pneumonia. | ?pneumonia
Possibly a small pneumothorax. | ?pneumothorax
Cannot rule out underlying fracture. | ?fracture
Apparent nodule may be a nipple shadow. | ?nodule
Nodular opacity, perhaps pneumonia. | ?pneumonia
Pneumonia is favored over atelectasis. | ?pneumonia
Favor atelectasis. | ?atelectasis
Atelectasis is favored. | ?atelectasis
Presumably atelectasis. | ?atelectasis
Presumed pneumonia. | ?pneumonia
Equivocal right pneumothorax. | ?pneumothorax
Findings are equivocal for pneumothorax. | ?pneumothorax
Indeterminate for pneumonia. | ?pneumonia
A subtle pneumothorax would be difficult to exclude. | ?pneumothorax
Small pleural effusion is not excluded. | ?effusion
Opacity in the right base, early pneumonia not excluded. | ?pneumonia
Opacity may be due to pneumonia. | ?pneumonia
Increased density is likely due to effusion. | ?effusion
Blunting suggests effusion. | ?effusion
Findings raise suspicion for pneumonia. | ?pneumonia
If there is concern for pneumonia, CT is advised. | ?pneumonia
Evaluate for pneumonia. | ?pneumonia
CT recommended to evaluate for nodule. | ?nodule
Atelectasis and/or pneumonia. | ?pneumonia
Opacity reflecting atelectasis or pneumonia. | ?pneumonia
Either atelectasis or pneumonia. | ?atelectasis
Pneumonia cannot be excluded. | ?pneumonia
Potential nodule in the left lung. | ?nodule
Findings seem to represent edema. | ?edema
Appears to be a small effusion. | ?effusion
Suggestion of mild edema. | ?edema
Unclear if there is a pneumothorax. | ?pneumothorax
Uncertain whether this is a nodule or vessel. | ?nodule
Not clear whether pneumonia is present. | ?pneumonia
A trace effusion is thought to be present. | ?effusion
Pneumonia is not unlikely. | ?pneumonia
Would be consistent with pneumonia in the right clinical context. | ?pneumonia
Infiltrate, if clinically suspected, may be better seen on CT. | ?infiltrate
Opacity is most likely atelectasis. | ?atelectasis
Subtle opacity suspected in the left base. | ?opacity
Pneumonia less likely. | ?pneumonia
Pneumonia is felt less likely. | ?pneumonia
Doubtful pneumothorax. | ?pneumothorax
It is difficult to say if an effusion is present. | ?effusion
Opacity could be atelectasis, but pneumonia is possible as well. | ?atelectasis, ?pneumonia
There may be a tiny right apical pneumothorax. | ?pneumothorax
There might be minimal edema. | ?edema
May have a small left pleural effusion. | ?effusion
Rule out pneumonia. | ?pneumonia
R/o pneumothorax. | ?pneumothorax
Borderline cardiomegaly, possible edema. | ?edema
Possible atelectasis, effusion, or consolidation at the left base. | ?consolidation
Questioned nodule on prior is not well seen. | ?nodule
Hazy opacity which may relate to layering effusion. | ?effusion
Opacity that could indicate pneumonia. | ?pneumonia
Haziness conceivably effusion. | ?effusion
Finding is suspicious of a fracture. | ?fracture
Concern for pneumothorax. | ?pneumothorax
Pneumothorax is a consideration. | ?pneumothorax
Pneumonia remains a possibility. | ?pneumonia
Pneumonia must be excluded. | ?pneumonia
Pneumonia to be excluded clinically. | ?pneumonia
Opacity thought to reflect atelectasis. | ?atelectasis
Opacity believed to be pneumonia. | ?pneumonia
Findings could be seen with pneumonia. | ?pneumonia
In the proper clinical setting this may be pneumonia. | ?pneumonia
Clinical correlation for pneumonia. | ?pneumonia
Correlate for signs of pneumonia. | ?pneumonia
Query left lower lobe consolidation. | ?consolidation
Opacity, pneumonia until proven otherwise. | ?pneumonia
Vague nodule versus overlapping vessels. | ?nodule
Effusion or pleural thickening. | ?effusion
Opacity represents either pneumonia or atelectasis. | ?pneumonia
""",
    "statements that look like doubts": """
May be discharged. Moderate effusion is present. | effusion
There is definite pneumonia, unlikely to be missed. | pneumonia
Known pneumonia, likely to need further imaging. | pneumonia
Patient in May 2019 had pneumonia. | pneumonia
Consolidation is clearly seen and possible to measure. | consolidation
Effusion is seen, as could be expected after surgery. | effusion
Effusion is larger than suspected. | effusion
Effusion, probably unchanged. | effusion
Effusion has possibly increased. | effusion
Effusion, perhaps slightly larger. | effusion
Large pneumothorax; consider chest tube. | pneumothorax
Moderate edema. Clinical correlation recommended. | edema
Opacity is present, which may represent a normal variant. | opacity
Cardiomegaly; possible edema. | cardiomegaly
Right effusion; question of pneumothorax. | effusion
Consolidation, which could be followed with CT. | consolidation
Cardiomegaly is again noted, likely stable. | cardiomegaly
Pneumothorax is no longer suspected. | -pneumothorax
Pneumonia is present; differential for the cause includes TB. | pneumonia
No suspicious nodule. | -nodule
No possible pneumothorax is seen. | -pneumothorax
No questionable nodule. | -nodule
There is no suspected pneumothorax. | -pneumothorax
No concerning nodule. | -nodule
No opacity suggestive of pneumonia. | -pneumonia
No findings to suggest edema. | -edema
Nothing to suggest pneumonia. | -pneumonia
No opacity concerning for pneumonia. | -opacity, -pneumonia
Pneumothorax has been excluded. | -pneumothorax
Pneumothorax is excluded. | -pneumothorax
Moderate effusion, likely parapneumonic. | effusion
Effusion, possibly loculated. | effusion
Fracture, likely old. | fracture
Nodule, probably a granuloma. | nodule
Left effusion with probable atelectasis. | effusion
Opacity consistent with known pneumonia. | pneumonia
Consolidation compatible with lobar pneumonia. | consolidation
Pneumonia, which is likely viral. | pneumonia
Pneumonia was diagnosed versus last year. | pneumonia
Effusion is stable versus the prior study. | effusion
Compared to before, edema versus prior is worse. | edema
There is increased edema, may need diuresis. | edema
Cardiomegaly with possible congestion. | cardiomegaly
Small effusion with apparent increase. | effusion
Nodule is indeterminate. | nodule
Indeterminate nodule. | nodule
Suspicious nodule in the left upper lobe. | nodule
Concerning nodule with spiculation. | nodule
Not suspicious for pneumonia. | -pneumonia
Not suggestive of edema. | -edema
Definitely an effusion. | effusion
No evidence to suggest pneumothorax. | -pneumothorax
Effusion is present if compared with the previous study. | effusion
Mass, possibly 4 cm. | mass
Effusion and possible consolidation. | effusion
The effusion may be increasing. | effusion
Fracture, age indeterminate. | fracture
Fracture of indeterminate age. | fracture
Findings diagnostic of pneumonia. | pneumonia
Known cardiomegaly can be followed. | cardiomegaly
Edema should be treated. | edema
Effusion is likely larger. | effusion
Atelectasis has likely improved. | atelectasis
Suspicious opacity is confirmed to be pneumonia. | pneumonia
""",
    "headings and degrees": """
Pneumothorax: There is no pneumothorax. | -pneumothorax
Pleural effusion: Possible small left effusion. | ?effusion
Effusion: No change in the effusion. | effusion
Effusion: none. Effusion was seen before. | -effusion
Pneumothorax: no right pneumothorax. Small left pneumothorax. | -pneumothorax
Nodule ..... absent | -nodule
Edema... Small effusion. | edema, effusion
Pneumonia... none | -pneumonia
Consolidation: 0\\nEffusion: 0 | -consolidation, -effusion
Effusion: 2 cm. | effusion
Fracture: N\\nNodule: Y | -fracture, nodule
Minimal change in the effusion. | effusion
Hardly any change in edema. | edema
Neither change nor new effusion. | -effusion
Little change, no effusion. | -effusion
No clear pneumothorax. | -pneumothorax
No clear evidence of pneumothorax. | -pneumothorax
Neither effusion nor edema. | -effusion, -edema
Fracture is not displaced. | fracture
The effusion is not loculated. | effusion
""",
    "more doubts": """
It is unclear whether there is an effusion. | ?effusion
It isn't clear if this is pneumonia. | ?pneumonia
Whether this is a nodule is hard to say. | ?nodule
Pulmonary edema is suggested by the perihilar haze. | ?edema
Nodule suspected at the left apex. | ?nodule
Pneumonia is felt to be possible. | ?pneumonia
A small effusion is believed to be present. | ?effusion
The opacity seems to represent pneumonia. | ?pneumonia
Doubtful small effusion. | ?effusion
Pneumonia is doubtful. | ?pneumonia
Opacity, maybe pneumonia. | ?pneumonia
DDX: pneumonia, edema. | ?pneumonia, ?edema
Considerations include pneumonia and edema. | ?pneumonia, ?edema
Consolidation is pneumonia until proven otherwise. | ?pneumonia
Pneumothorax is not well seen. | ?pneumothorax
Effusion if clinically suspected. | ?effusion
Haziness thought likely effusion. | ?effusion
The possibility of early pneumonia is raised. | ?pneumonia
Superimposed pneumonia is not unlikely. | ?pneumonia
Opacities, either edema or pneumonia. | ?edema, ?pneumonia
May reflect aspiration, pneumonia or edema. | ?aspiration, ?pneumonia, ?edema
Consolidation at the base is suspected. | ?consolidation
Questionable small right apical pneumothorax. | ?pneumothorax
An infectious process such as pneumonia is possible. | ?pneumonia
Pneumonia not entirely excluded. | ?pneumonia
Pneumonia would be hard to rule out. | ?pneumonia
Underlying pneumonia or effusion cannot be excluded. | ?pneumonia, ?effusion
Left lower lobe collapse vs. consolidation. | ?consolidation
Atelectasis vs early pneumonia. | ?atelectasis, ?pneumonia
Atelectasis, less likely pneumonia. | ?pneumonia
Atelectasis more likely than pneumonia. | ?atelectasis, ?pneumonia
Suggestion of a small left effusion. | ?effusion
Suspect small effusion. | ?effusion
Findings are suspicious for pneumonia. | ?pneumonia
Possible interval development of edema. | ?edema
Small effusion, possible. | ?effusion
Mild edema cannot be ruled out. | ?edema
Difficult to exclude a small pneumothorax. | ?pneumothorax
Might reflect layering effusion. | ?effusion
Probable bibasilar atelectasis and possible pneumonia. | ?atelectasis, ?pneumonia
Presumed atelectasis in the left base. | ?atelectasis
Trace effusions are possible. | ?effusion
Opacity may be from atelectasis, pneumonia, or both. | ?atelectasis, ?pneumonia
Consistent with edema or pneumonia. | ?edema, ?pneumonia
Clinical concern for pneumonia. | ?pneumonia
""",
    "more statements": """
Effusion is likely larger than before. | effusion
Fracture is likely chronic. | fracture
Opacity is likely chronic atelectasis. | ?atelectasis
Pneumothorax is probably unchanged. | pneumothorax
Edema is possibly worse since the prior. | edema
Nothing to indicate edema. | -edema
Nothing concerning for malignancy. | -malignancy
No definite suspected nodule. | -nodule
No likely pneumothorax. | -pneumothorax
Pneumonia diagnosed in May. | pneumonia
Effusion has increased vs prior. | effusion
Effusion versus prior is smaller. | effusion
Opacity is not seen on the lateral view. | opacity
Opacity not well seen on prior. | opacity
Effusion is more than suspected previously. | effusion
Effusion as suspected on ultrasound. | effusion
Pneumonia, as clinically suspected, is present. | pneumonia
Effusion is present and could be drained. | effusion
There is a large effusion which may require drainage. | effusion
Stable cardiomegaly; edema is unlikely. | cardiomegaly, -edema
Interval increase in effusion, likely due to fluid overload. | effusion
Pneumothorax has likely decreased. | pneumothorax
Rib fracture of questionable age. | fracture
Nodule of uncertain etiology. | nodule
Opacity of unclear significance. | opacity
No suspicious pulmonary nodule or mass. | -nodule, -mass
No focal consolidation to suggest pneumonia. | -consolidation, -pneumonia
Cardiomegaly. Consider echocardiogram. | cardiomegaly
Effusion, consider thoracentesis. | effusion
Consolidation; recommend CT if clinically indicated. | consolidation
Large effusion, possibly malignant. | effusion
Effusion may have slightly increased. | effusion
Moderate cardiomegaly may be exaggerated by AP technique. | cardiomegaly
Nodule could be followed. | nodule
Effusion likely related to heart failure. | effusion
Edema is likely cardiogenic. | edema
Findings are typical of pneumonia. | pneumonia
Pneumonia without a doubt. | pneumonia
Effusion is probably slightly larger. | effusion
Fracture is probably old and healed. | fracture
""",
    "outcomes behind the finding": """
Resolution of edema is incomplete. | edema
Clearing of the effusion is only partial. | effusion
Resolution of the pneumothorax is not complete. | pneumothorax
Resolution of the pneumonia is still incomplete. | pneumonia
Clearing of the consolidation remains incomplete. | consolidation
Clearing of the left lower lobe pneumonia has been incomplete. | pneumonia
Resolution of pulmonary edema has been only partial. | edema
Resolution of right pneumothorax is partial. | pneumothorax
Resolution of the effusion is nearly complete. | effusion
Clearing of the edema is not yet complete. | edema
Resolution of the opacities has not yet occurred. | opacit
Resolution of the pneumonia has not occurred. | pneumonia
Resolution of the pneumonia is awaited. | pneumonia
Resolution of the consolidation is expected. | consolidation
Resolution of pneumonia should be documented. | pneumonia
Clearing of pneumonia must be documented radiographically. | pneumonia
Complete resolution of the effusion has not been achieved. | effusion
Resolution of the right pneumothorax, which is only partial. | pneumothorax
Resolution of effusion, incomplete. | effusion
Pneumonia has only partly resolved. | pneumonia
Delayed clearing of pneumonia. | pneumonia
Resolution of edema cannot be confirmed. | edema
Resolution of the pneumothorax is not seen. | pneumothorax
Resolution of both effusions remains incomplete. | effusion
Clearing of the airspace opacities and effusion is incomplete. | opacit, effusion
Complete clearing of the pneumonia has not yet taken place. | pneumonia
Interval clearing of the edema, though incomplete. | edema
Resolution of the left lung consolidation appears partial at best. | consolidation
Disappearance of the nodule has not been confirmed. | nodule
Resolution of the pneumothorax remains to be seen. | pneumothorax
The resolution of the effusion is not total. | effusion
Resolution of the pneumothorax is unlikely. | pneumothorax
Resolution of edema was minimal. | edema
Resolution of edema has been slow. | edema
Edema resolution is complete. | -edema
Resolution of pneumothorax and no effusion. | -pneumothorax, -effusion
Resolution of pneumothorax. Effusion is not seen. | -pneumothorax, -effusion
Resolution of the pneumothorax. The effusion is incomplete. | -pneumothorax, effusion
Interval resolution of pneumothorax, effusion is unchanged. | -pneumothorax, effusion
Resolution of effusions since the prior study. | -effusion
Resolution of previously seen edema, small effusion persists. | -edema, effusion
There has been complete resolution of the right pneumothorax. | -pneumothorax
Pneumothorax has since resolved. | -pneumothorax
No nodule in the right upper lobe or effusion in the left. | -nodule, -effusion
No pneumothorax within the limits of the study. | -pneumothorax
No effusion, left or right. | -effusion
No consolidation, left pleural effusion, or pneumothorax. | -consolidation, -effusion, -pneumothorax
No acute infiltrate, bilateral effusion, or pneumothorax. | -infiltrate, -effusion, -pneumothorax
""",
    "terse and European wordings": """
Pneumothorax: [none] | -pneumothorax
Pleural effusion (-) | -effusion
Pneumothorax -ve. | -pneumothorax
Atelectasis: No significant. | -atelectasis
Effusion: cannot exclude small. | ?effusion
Pneumothorax: No. Pneumonia: Possibly. | -pneumothorax, ?pneumonia
No bigger effusion than yesterday. | effusion
No shrinkage of the mass. | mass
No substantial regression of the opacities. | opacit
Absent any change in the effusion. | effusion
A pneumothorax has not developed. | -pneumothorax
Pneumonia would have to be considered in the right clinical setting. | ?pneumonia
No pneumothorax, left basilar atelectasis. | -pneumothorax, atelectasis
No pneumothorax, bilateral effusions are present. | -pneumothorax, effusion
No consolidation and no effusion, two nodules. | -consolidation, -effusion, nodule
No cavitation within the mass. | mass
No air bronchograms in the consolidation. | consolidation
No pneumothorax seen and bibasilar atelectasis again noted. | -pneumothorax, atelectasis
Lungs hyperinflated, no consolidation, effusion small. | -consolidation, effusion
No evidence of fracture in the region of the nodule. | -fracture, nodule
No pneumothorax in the setting of pneumonia. | -pneumothorax, pneumonia
No focal consolidation in setting of edema. | -consolidation, edema
Opacity may be seen in the context of edema. | opacity, ?edema
No cavitation or calcification in this nodule. | nodule
No pleural fluid in the right hemithorax, left effusion. | effusion
No edema, effusion stable. | -edema, effusion
No pneumothorax, multiple rib fractures. | -pneumothorax, fracture
No lobar consolidation, scattered atelectasis. | -consolidation, atelectasis
Pneumothorax=0 | -pneumothorax
Consolidation: denied | -consolidation
Effusion: Small. Pneumothorax: No definite. | effusion, -pneumothorax
Pneumothorax: (none) | -pneumothorax
No bigger and no smaller effusion. | effusion
Pneumonia cannot with certainty be excluded. | ?pneumonia
Pneumonia can neither be confirmed nor excluded. | ?pneumonia
Small effusion can hardly be excluded. | ?effusion
If clinically indicated, CT for nodule. | ?nodule
Nil acute. No consolidation/collapse/effusion. | -consolidation, -collapse, -effusion
No focal collapse or consolidation. | -collapse, -consolidation
Nil consolidation. | -consolidation
Nil effusion or pneumothorax. | -effusion, -pneumothorax
W/o effusion. | -effusion
Neg for pneumothorax. | -pneumothorax
Ø pneumothorax | -pneumothorax
Zero evidence of pneumothorax. | -pneumothorax
""",
    "doubtful": """
An effusion on the right is doubtful. | ?effusion
Edema appears doubtful. | ?edema
Consolidation in the lingula remains doubtful. | ?consolidation
Nodule: doubtful | ?nodule
Doubtfully edema. | ?edema
Left base density, doubtfully a mass. | density, ?mass
It remains doubtful if there is consolidation. | ?consolidation
There is some doubt about a nodule at the apex. | ?nodule
Doubt pneumonia. | ?pneumonia
I doubt that there is a pneumothorax. | ?pneumothorax
Nodule of doubtful importance. | nodule
Effusion of questionable clinical significance. | effusion
There is no doubt that the effusion has grown. | effusion
Beyond doubt there is a mass. | mass
Without any doubt a fracture. | fracture
""",
    "as well as": """
No mass as well as nodule. | -mass, -nodule
NO EFFUSION AS WELL AS PNEUMOTHORAX. | -effusion, -pneumothorax
There is no evidence of edema as well as effusion. | -edema, -effusion
Mass as well as nodule are not seen. | -mass, -nodule
No pneumothorax, as well as a moderate effusion. | -pneumothorax, effusion
No edema as well as small effusion. | -edema, effusion
Edema as well as effusion is unchanged. | edema, effusion
""",
    "free of": """
Both hemithoraces are pneumothorax-free. | -pneumothorax
Effusion-free and edema-free lungs. | -effusion, -edema
Pleural space effusion free. | -effusion
The patient is tumor-free. | -tumor
Pneumonia, now symptom-free. | pneumonia
Edema in a pain-free patient. | edema
Effusion free of septation. | effusion
Free layering effusion. | effusion
Effusion and free air. | effusion, free air
Lungs have cleared of consolidation. | -consolidation
""",
    "typed in short": """
LLL pna. | pna
No sig. consolidation. | -consolidation
Mod. effusion, no sig change. | effusion
Bibasilar atel., no ptx. | atel, -ptx
No definite opac or pna. | -opac, -pna
OGT and ETT in place. | ogt, ett
Opac, likely pna. | opac, ?pna
Opacity c/w pna. | opacity, pna
No edema c/w prior, small effusion. | -edema, effusion
No edema w/ small effusion. | -edema, effusion
No ptx s/p thoracotomy. | -ptx, thoracotomy
Effusion vs. atelectasis. | ?effusion, ?atelectasis
Eval for nodule. | ?nodule
Eval. for nodule. | ?nodule
No bilat. effusions. | -effusion
Sm. effusion w/o edema. | effusion, -edema
""",
    "typing errors": """
Small pneumthorax. | pneumthorax
No consolidaton. | -consolidaton
Emphsyema. | emphsyema
Bilateral infltrates. | infltrates
Possible cardiomegly. | ?cardiomegly
Left effussion. | effussion
Rib fracutre. | rib fracutre
""",
    "colons": """
Heart: Mildly enlarged. | heart
Cardiac silhouette: Not enlarged | -cardiac
Heart size - enlarged. | heart
Edema: cannot be ruled out. | ?edema
Effusion: has resolved. | -effusion
Mass: could not be excluded | ?mass
Fracture: is not seen | -fracture
Opacity: not definitely seen. Edema: yes. | -opacity, edema
No: nodule, mass. | -nodule, -mass
No evidence of the following: effusion, edema. | -effusion, -edema
Negative for: pneumothorax | -pneumothorax
Left shoulder: Negative for fracture or dislocation. | -fracture, -dislocation
Pleura: neg for effusion. | -effusion
There is no evidence of: fracture or dislocation. | -fracture, -dislocation
Possible: pneumonia or edema. | ?pneumonia, ?edema
Effusion: no. Edema: mild. | -effusion, edema
Pleura: no effusion. Hila: adenopathy. | -effusion, adenopathy
""",
    "dashes": """
No effusion - mild edema. | -effusion, edema
No fracture -- scoliosis. | -fracture, scoliosis
No mass \u2013 scarring at the apex. | -mass, scarring
Edema - none. | -edema
Effusion - small left. | effusion
Follow - up of effusion. | effusion
No non-calcified nodule. | -nodule
Pneumothorax - not seen. | -pneumothorax
""",
    "where a denial ends": """
No effusion despite edema. | -effusion, edema
No edema, in spite of cardiomegaly. | -edema, cardiomegaly
No fracture after sternotomy. | -fracture, sternotomy
No infiltrate following lobectomy. | -infiltrate, lobectomy
No mass status post lobectomy. | -mass, lobectomy
No pneumonia to explain the effusion. | -pneumonia, effusion
No mass to account for the volume loss. | -mass, volume loss
No consolidation, only atelectasis. | -consolidation, atelectasis
No effusion, merely pleural thickening. | -effusion, pleural thickening
No edema, just emphysema. | -edema, emphysema
Instead of effusion, this represents scarring. | -effusion, scarring
No mass, it is a nodule. | -mass, nodule
No evidence of the following complications, pneumothorax or effusion. | -pneumothorax, -effusion
""",
    "gone, missed and confirmed": """
The mass is gone. | -mass
Pneumothorax has gone. | -pneumothorax
Edema now gone. | -edema
Effusion can now be excluded. | -effusion
Fracture could be ruled out. | -fracture
Fracture is to be excluded. | ?fracture
Pneumothorax is not confirmed. | -pneumothorax
Mass not recognised on this film. | -mass
Nodule is not characterised. | nodule
Sensitivity for nodules is low. | ?nodules
Radiographs are not sensitive for fracture. | ?fracture
A small nodule may be missed. | ?nodule
A nondisplaced fracture can be overlooked. | ?fracture
Assess for progression of edema. | edema
Evaluate for change in the effusion. | effusion
Edema is thought less likely. | ?edema
Not inconsistent with edema. | ?edema
Possible but not definite nodule. | ?nodule
Hilar contour is prominent. | hilar contour
Cardiothoracic ratio is elevated. | cardiothoracic ratio
Pleural fluid blunts the right costophrenic angle. | blunts
""",
    "denials of other languages before words that English shares": """
Kein Pneumothorax. | -pneumothorax
Ohne Pneumothorax. | -pneumothorax
Keine Emphysema. | -emphysema
Pas de pneumothorax. | -pneumothorax
Geen pneumothorax. | -pneumothorax
Ingen pneumothorax. | -pneumothorax
Sem edema. | -edema
Sin edema ni fractura. | -edema
""",
    "boxes of forms": """
[x] effusion [ ] pneumothorax | effusion, -pneumothorax
[ ] Nodule [X] Cardiomegaly [ ] Fracture | -nodule, cardiomegaly, -fracture
[x] Edema\\n[ ] Consolidation\\n[ ] Effusion | edema, -consolidation, -effusion
( ) effusion (x) atelectasis | -effusion, atelectasis
☐ Nodule ☒ Pneumonia ☐ Mass | -nodule, pneumonia, -mass
Effusion: [x] Yes [ ] No. Nodule: [ ] Yes [x] No | effusion, -nodule
Pneumothorax: ( ) present (x) absent | -pneumothorax
Effusion [ ] none [ ] small [x] moderate [ ] large. No mass. | effusion, -mass
Effusion? [x] None [ ] Small [ ] Large | -effusion
Effusion [x] Pneumothorax [ ] Nodule [ ] | effusion, -pneumothorax, -nodule
[ ] Small effusion [x] Small nodule | -effusion, nodule
Effusion [ ] is seen. | effusion
""",
    "words that run together": """
Noeffusion. | -effusion
Nopneumothorax or mass. | -pneumothorax, -mass
There is nopleural effusion. Small nodule. | -effusion, nodule
No acuteconsolidation. | -consolidation
Withouteffusion | -effusion
Noevidence of nodule. | -nodule
No effusionor mass. | -effusion, -mass
Smalleffusion and no nodule | effusion, -nodule
No pleuraleffusion. | -effusion
""",
    "words in short, and CM": """
Mild CM, no edema. | cm, -edema
CM stable. Effusion. | cm, effusion
Nodule of 3 CM in the right apex. | nodule
LLL atx, no effus | atx, -effus
Poss. nodule. | ?nodule
Prob. small effusion | ?effusion
Cardiomeg. with pulm. edema | cardiomeg, edema
""",
    "two letters swapped in a short word": """
No edmea. | -edmea
wihtout nodule | -nodule
Nodlue in the right apex | nodlue
""",
    "denied actions, numbers and ranks": """
No treatment is needed for this nodule. | nodule
No further imaging of the nodule is needed. | nodule
No biopsy of the mass was done. | mass
No fewer than two nodules. | nodules
Not previously reported mass. | mass
Not enough effusion to tap. | effusion
Series no 3 shows a nodule. | nodule
Two nodules, none over 6 mm. | nodules
Nodules, none calcified. | nodules
No displacement of the fracture. | fracture
No layering of the effusion. | effusion
""",
    "one side and the other": """
Effusion on the right, none on the left. | effusion
Right-sided, but no left-sided, effusion. | effusion
Atelectasis at the left base and none at the right. | atelectasis
Pneumothorax, none. | -pneumothorax
""",
    "the ends of denials": """
No effusion next to the mass. | -effusion, mass
No consolidation around the nodule. | -consolidation, nodule
No fracture of the pacemaker lead. | -fracture, pacemaker
No sign of the effusion. | -effusion
No edema, no mass, no effusion, scoliosis. | -edema, -mass, -effusion, scoliosis
No edema, no mass, effusion or nodule. | -edema, -mass, -effusion, -nodule
No edema, no mass, effusion, or nodule. | -edema, -mass, -effusion, -nodule
NO EDEMA HEART ENLARGED | -edema, enlarged
NO EDEMA EFFUSION OR MASS | -edema, -effusion, -mass
No effusion new paragraph small nodule | -effusion, nodule
No effusion period nodule period | -effusion, nodule
""",
    "more verbs that deny or doubt": """
This film excludes pneumothorax. | -pneumothorax
Effusion cannot be seen. | -effusion
A nodule could not be clearly identified. | ?nodule
Nowhere is a nodule seen. | -nodule
Edema is not a feature. | -edema
It is not appreciated pneumothorax. | -pneumothorax
Nodule is not evidenced. | -nodule
Skin fold mimics a pneumothorax. | -pneumothorax
Edema is thought to be unlikely. | -edema
The pneumothorax has been evacuated. | -pneumothorax
I cannot say whether there is a nodule. | ?nodule
Nodule not seen with certainty. | ?nodule
Rotation limits evaluation for effusion. | ?effusion
One wonders about a nodule. | ?nodule
""",
}


@pytest.fixture(scope="module")
def finder() -> EntityFinder:
    return EntityFinder()


@pytest.mark.parametrize(
    ("kind", "line"),
    [(kind, line) for kind, lines in SENTENCES.items() for line in lines.strip().splitlines()],
)
def test_the_status_of_a_finding_by_its_sentence(finder, kind, line):
    text, expected = line.replace("\\n", "\n").split(" | ")
    (found,) = finder.find([text])
    for item in expected.split(", "):
        status, word = SIGNS.get(item[0], "present"), item.lstrip("-?")
        said = [e.status for e in found if e.kind == "finding" and word in _words(text, e)]
        assert said[:1] == [status], word


def _words(text: str, entity) -> str:
    return text[entity.start : entity.end].lower()
