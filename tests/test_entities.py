"""Entities: the lexicon, the reach of cues, other models as backends, and damaged input."""

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast

import mmclip
from mmclip.data.entities import (
    Entity,
    EntityFinder,
    find_entities,
    is_entity_tokens,
)
from mmclip.data.lexicon import expand, flat_sets, insert, read_lexicon

LEXICON = Path(mmclip.__file__).parent / "resources" / "lexicon"


@pytest.fixture(scope="module")
def finder() -> EntityFinder:
    return EntityFinder()


def findings(finder: EntityFinder, text: str) -> list[str]:
    """The findings as "concept" (present), "-concept" (negated) or "?concept" (uncertain)."""
    (found,) = finder.find([text])
    sign = {"present": "", "negated": "-", "uncertain": "?"}
    return [sign[e.status] + e.concept for e in found if e.kind == "finding"]


CONCEPTS = [  # one wording a line: variants, plurals, hyphens, words apart
    ("Heart is enlarged.", "cardiomegaly"),
    ("The heart size is mildly enlarged.", "cardiomegaly"),
    ("Enlarged cardiac silhouette.", "cardiomegaly"),
    ("Stable enlargement of the cardiac silhouette.", "cardiomegaly"),
    ("Mild cardiac enlargement.", "cardiomegaly"),
    ("Borderline heart size.", "cardiomegaly"),
    ("Small bilateral pleural effusions.", "pleural effusion"),
    ("Pleural fluid on the left.", "pleural effusion"),
    ("Blunting of the left costophrenic angle.", "costophrenic angle blunting"),
    ("The costophrenic angles are blunted.", "costophrenic angle blunting"),
    ("Bilateral pneumothoraces.", "pneumothorax"),
    ("Left lower lobe consolidations.", "consolidation"),
    ("Bibasilar air-space disease.", "airspace disease"),
    ("Patchy AIRSPACE OPACITIES.", "opacity"),
    ("Streaky retrocardiac opacity.", "opacity"),
    ("Subsegmental atelectatic changes.", "atelectasis"),
    ("Collapse of the left upper lobe.", "atelectasis"),
    ("Pulmonary oedema.", "edema"),
    ("Interstitial edema.", "edema"),
    ("A 5 mm nodule in the lingula.", "nodule"),
    ("Right hilar mass.", "mass"),
    ("Large hiatal hernia.", "hiatal hernia"),
    ("Bochdalek hernia.", "hernia"),
    ("Healed fractures of the left seventh and eighth ribs.", "rib fracture"),
    ("Old rib fractures.", "rib fracture"),
    ("Humeral fracture.", "fracture"),
    ("T8 compression fracture.", "vertebral fracture"),
    ("Prominent right hilum.", "hilar enlargement"),
    ("Patchy infiltrates.", "infiltration"),
    ("Multifocal pneumonia.", "pneumonia"),
    ("Bullous emphysema.", "emphysema"),
    ("Emphysematous changes.", "emphysema"),
    ("Subcutaneous emphysema.", "subcutaneous emphysema"),
    ("Interstitial fibrosis.", "fibrosis"),
    ("Apical pleural thickening.", "pleural thickening"),
    ("Typical of COVID-19.", "covid-19"),
    ("Old tuberculosis.", "tuberculosis"),
    ("Calcified right upper lobe granuloma.", "calcified granuloma"),
    ("Granulomas are calcified.", "calcified granuloma"),
    ("Thoracic aortic atherosclerotic calcifications.", "atherosclerosis"),
    ("Calcified aortic arch.", "aortic calcification"),
    ("The thoracic aorta is tortuous.", "aortic tortuosity"),
    ("Thoracic dextroscoliosis.", "scoliosis"),
    ("Right-sided PICC line.", "central venous catheter"),
    ("The tip projects over the lower SVC.", "central venous catheter"),
    ("ET tube in place.", "endotracheal tube"),
    ("Support devices are in place.", "support device"),
    ("Median sternotomy wires.", "sternotomy"),
    ("Flattening of the hemidiaphragms.", "hyperinflation"),
    ("Lung volumes are low.", "low lung volumes"),
]


@pytest.mark.ledger("entities")
@pytest.mark.parametrize(("text", "concept"), CONCEPTS, ids=[text for text, _ in CONCEPTS])
def test_a_wording_gives_its_concept_and_nothing_else(finder, text, concept):
    assert findings(finder, text) == [concept]


SCOPES = [
    ("No pleural effusion.", ["-pleural effusion"]),
    ("No effusion, pneumothorax or edema.", ["-pleural effusion", "-pneumothorax", "-edema"]),
    ("No effusion. Pneumothorax.", ["-pleural effusion", "pneumothorax"]),
    ("No effusion but there is a nodule.", ["-pleural effusion", "nodule"]),
    ("Cardiomegaly without edema.", ["cardiomegaly", "-edema"]),
    ("Lungs are free of infiltrates.", ["-infiltration"]),
    ("The lungs are clear of consolidation.", ["-consolidation"]),
    ("Negative for pneumothorax.", ["-pneumothorax"]),
    ("No evidence of active tuberculosis.", ["-tuberculosis"]),
    ("The heart is not enlarged.", ["-cardiomegaly"]),
    ("Pneumothorax is not seen.", ["-pneumothorax"]),
    ("The effusion has resolved.", ["-pleural effusion"]),
    ("Effusion or pneumothorax is not identified.", ["-pleural effusion", "-pneumothorax"]),
    ("Pneumonia is unlikely.", ["-pneumonia"]),
    ("Neither effusion nor pneumothorax.", ["-pleural effusion", "-pneumothorax"]),
    ("No change in the left effusion.", ["pleural effusion"]),
    ("No increase in the nodule.", ["nodule"]),
    ("No significant interval change in cardiomegaly.", ["cardiomegaly"]),
    ("Not only effusion, also edema.", ["pleural effusion", "edema"]),
    ("No acute disease. Stable cardiomegaly.", ["cardiomegaly"]),
    ("Opacity may represent atelectasis.", ["opacity", "?atelectasis"]),
    ("Opacity which may represent atelectasis.", ["opacity", "?atelectasis"]),
    ("Possible pneumonia or edema.", ["?pneumonia", "?edema"]),
    ("Atelectasis versus scarring.", ["?atelectasis", "?scarring"]),
    ("Opacity, atelectasis vs. scarring.", ["opacity", "?atelectasis", "?scarring"]),
    ("Pneumonia cannot be excluded.", ["?pneumonia"]),
    ("Suspicious for malignancy.", ["?mass"]),
    ("Possible effusion without pneumothorax.", ["?pleural effusion", "-pneumothorax"]),
    ("No effusion, possible edema.", ["-pleural effusion", "?edema"]),
    ("Pneumothorax?", ["?pneumothorax"]),
    ("No pneumothorax, clearly, or effusion.", ["-pneumothorax", "-pleural effusion"]),
    ("No edema or mass; and pneumonia cannot be excluded.", ["-edema", "-mass", "?pneumonia"]),
    ("No edema, and pneumonia cannot be excluded.", ["-edema", "?pneumonia"]),
    ("1. No edema.\n2. Cardiomegaly.", ["-edema", "cardiomegaly"]),
    ("No edema\n\nNodule", ["-edema", "nodule"]),
    ("No pleural\neffusion or\npneumothorax.", ["-pleural effusion", "-pneumothorax"]),
    ("No nodule larger than 1.5 cm or effusion.", ["-nodule", "-pleural effusion"]),
    ("The heart and mediastinum are normal. Enlarged hila.", ["hilar enlargement"]),
    ("The heart is normal with enlarged lymph nodes.", ["lymphadenopathy"]),
]


@pytest.mark.ledger("entities")
@pytest.mark.parametrize(("text", "expected"), SCOPES, ids=[repr(text) for text, _ in SCOPES])
def test_a_cue_governs_the_findings_of_its_clause(finder, text, expected):
    assert findings(finder, text) == expected


def test_spans_and_cues_are_the_words_themselves(finder):
    text = "Large right pleural effusion. The HEART is not enlarged. No mass in the left lung base."
    (found,) = finder.find([text])
    assert [
        (text[e.start : e.end], e.kind, e.concept, e.cue and text[slice(*e.cue)]) for e in found
    ] == [
        ("Large", "modifier", "severe", None),
        ("right", "modifier", "right", None),
        ("pleural effusion", "finding", "pleural effusion", None),
        ("HEART is not enlarged", "finding", "cardiomegaly", "not"),
        ("mass", "finding", "mass", "No"),
        ("left lung base", "anatomy", "lung base", None),
    ]


def test_anatomy_and_modifiers_are_never_negated(finder):
    (found,) = finder.find(["No large mass in the right upper lobe."])
    assert {e.kind: e.status for e in found} == {
        "finding": "negated",
        "anatomy": "present",
        "modifier": "present",
    }


WORDS = (
    "No no not without heart enlarged effusion pleural mass nodule may represent versus is seen but"
    " calcified granuloma vs. , . ? ; - / ( ) 1. 2.5 right lung base İ ß é 气胸 🫁"
)
ASCII = st.sampled_from([word for word in WORDS.split() if word.isascii()])
PIECES = st.sampled_from([*WORDS.split(), "\n", "\n\n", "\t", "\x00"])


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=40).map(" ".join) | st.text(max_size=80))
def test_entities_are_ordered_disjoint_and_inside_the_text(text):
    (found,) = find_entities([text])
    edges = [edge for e in found for edge in (e.start, e.end)]
    assert edges == sorted(edges)
    assert all(0 <= e.start < e.end <= len(text) for e in found)
    for e in found:
        assert (e.status == "present") == (e.cue is None)
        assert e.kind == "finding" or e.status == "present"
        if e.cue:
            assert text[slice(*e.cue)].strip() and 0 <= e.cue[0] < e.cue[1] <= len(text)


@settings(max_examples=60, deadline=None)
@given(st.lists(ASCII, max_size=25).map(" ".join))
def test_case_does_not_matter(text):
    (lower,), (upper,) = find_entities([text.lower()]), find_entities([text.upper()])
    assert lower == upper


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vs. effusion", "uncertain"), ("No pna. Small effusion.", "negated present"),
        ("No pna. Heart enlarged.", "negated present"),
        ("sm. effusion, no ptx.", "present negated"),
        ("No sig. effusion.", "negated"),
    ],
)  # fmt: skip
def test_words_in_short_mean_the_same_in_small_letters_and_capitals(text: str, said: str):
    for written in (text, text.lower(), text.upper()):
        (found,) = find_entities([written])
        statuses = [e.status for e in found if e.kind == "finding"]
        assert " ".join(map(str, statuses)) == said, written


def test_a_small_letter_tells_that_the_full_stop_of_a_short_noun_ends_no_sentence():
    said = [[e.status for e in some if e.kind == "finding"] for some in find_entities(
        ["Small eff. or atelectasis.", "Small eff. Or atelectasis."])]  # fmt: skip
    assert said == [["uncertain"] * 2, ["present"] * 2]


def test_texts_do_not_disturb_each_other(finder):
    texts = ["No effusion", "Effusion", "", "No effusion"] * 40
    assert list(finder.find(texts)) == [next(finder.find([text])) for text in texts]


@pytest.mark.parametrize("text", ["", " ", "\n\n", ".", "No", "气胸", "\x00", "İİİ pneumothorax"])
def test_odd_texts_do_no_harm(finder, text):
    (found,) = finder.find([text])
    assert [text[e.start : e.end] for e in found] == re.findall("pneumothorax", text)


def test_a_very_long_text_is_read_to_its_end(finder):  # in minutes if a join were quadratic
    text = "enlarged heart is enlarged no " * 5_000  # parts of words apart, and no full stop
    (found,) = finder.find([text])
    assert sum(e.concept == "cardiomegaly" for e in found) >= 5_000


def test_a_finding_wins_over_a_longer_place(finder):
    text = "Left hilar enlargement and a displaced left rib fracture."
    assert findings(finder, text) == ["hilar enlargement", "rib fracture"]


def test_longer_forms_win(finder):
    assert findings(finder, "Calcified granuloma and granuloma.") == [
        "calcified granuloma",
        "granuloma",
    ]


SPANS = [  # by hand: every entity of a sentence, with its kind
    (
        "Small bilateral pleural effusions, left greater than right, with bibasilar atelectasis.",
        "small/m bilateral pleural effusions/f left/m right/m bibasilar atelectasis/f",
    ),
    (
        "The cardiac silhouette is mildly enlarged; the aorta is tortuous and calcified.",
        "cardiac silhouette is mildly enlarged/f aorta is tortuous/f calcified/m",
    ),
    (
        "Right internal jugular catheter tip in the mid SVC, no apical pneumothorax.",
        "right/m jugular catheter/f tip in the mid svc/f apical pneumothorax/f",
    ),
    (
        "Calcified left hilar lymph nodes and an old healed fracture of the right 7th rib.",
        "calcified left hilar lymph nodes/f old/m healed/m fracture of the right 7th rib/f",
    ),
    ("COPD. T-spine osteophytes; 3.5-cm mass, left mid lung zone.",
     "copd/f spine/a osteophytes/f mass/f left mid lung zone/a"),
    ("Heart size is normal. Enlarged lymph nodes.",
     "heart size/a normal/m enlarged lymph nodes/f"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "spans"), SPANS, ids=[text for text, _ in SPANS])
def test_the_spans_of_a_sentence_are_those_written_by_hand(finder, text, spans):
    (found,) = finder.find([text])
    said = " ".join(f"{text[e.start : e.end].lower()}/{e.kind[0]}" for e in found)
    assert said == spans


@pytest.fixture(scope="module")
def lexicon():
    return read_lexicon()


@settings(max_examples=60, deadline=None)
@given(words=st.lists(ASCII, max_size=30))
def test_the_matcher_finds_what_a_slow_search_through_all_phrases_finds(lexicon, words):
    slow = [
        (start, end)
        for start in range(len(words))
        for end in range(start + 1, len(words) + 1)
        if " ".join(words[start:end]).lower() in lexicon.phrases
    ]
    assert sorted(m[:2] for m in lexicon.matches([w.lower() for w in words])) == slow


@pytest.mark.parametrize("path", sorted(LEXICON.glob("[!c]*.toml")), ids=lambda path: path.stem)
def test_each_wording_belongs_to_one_concept_of_its_kind(path):
    entries = tomllib.loads(path.read_text("utf-8"))
    sets = flat_sets(entries.pop("sets", {}))
    owner: dict[str, str] = {}
    for concept, entry in entries.items():
        for form in (form for form in entry["forms"] if "<" not in form):
            for wording in expand(insert(sets, form)):
                assert owner.setdefault(wording, concept) == concept, wording


@pytest.mark.ledger("all mentions")
def test_tokens_of_one_concept_share_a_number():
    text = "Effusion. No effusion in lung"
    entities = [
        Entity(0, 8, "finding", "pleural effusion"),
        Entity(13, 21, "finding", "pleural effusion", "negated", (10, 12)),
        Entity(25, 29, "anatomy", "lung"),
    ]
    words = [(m.start(), m.end()) for m in re.finditer(r"\w+|\.", text)]
    offsets = np.array([(0, 0), *words, (0, 0), (0, 0)])  # [CLS] ... [SEP] [PAD]
    groups = is_entity_tokens(entities, offsets)
    assert groups.tolist() == [0, 1, 0, 0, 1, 0, 2, 0, 0]
    assert groups.dtype == np.int32


@pytest.mark.ledger("whole entities")
def test_word_pieces_of_a_mention_are_all_hidden():
    offsets = np.array([(0, 0), (0, 6), (6, 12), (13, 15), (0, 0)])
    entities = [Entity(0, 12, "finding", "cardiomegaly")]
    assert is_entity_tokens(entities, offsets).tolist() == [0, 1, 1, 0, 0]
    assert is_entity_tokens([], offsets).tolist() == [0] * 5


@pytest.fixture(scope="module")
def spacy_folder(tmp_path_factory) -> Path:
    spacy = pytest.importorskip("spacy", reason="needs the extra mmclip[spacy]")
    folder = tmp_path_factory.mktemp("spacy") / "pipeline"
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns(
        [
            {"label": "DISEASE", "pattern": "effusion", "id": "pleural effusion"},
            {"label": "DISEASE", "pattern": "mass"},
            {"label": "ANAT-DP", "pattern": "left lung"},
            {"label": "SEVERITY", "pattern": "large"},
        ]
    )
    nlp.to_disk(folder)
    return folder


@pytest.mark.ledger("entities")
def test_a_spacy_pipeline_stands_in_for_the_lexicon(spacy_folder):
    text = "No effusion but a large mass in the left lung and a nodule."
    (found,) = find_entities([text], f"spacy:{spacy_folder}")
    assert [(text[e.start : e.end], e.kind, e.concept, e.status) for e in found] == [
        ("effusion", "finding", "pleural effusion", "negated"),
        ("large", "modifier", "large", "present"),
        ("mass", "finding", "mass", "present"),
        ("left lung", "anatomy", "left lung", "present"),
    ]


def test_a_spacy_pipeline_without_spacy_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=r"'spacy:en_core_web_sm' needs .*mmclip\[spacy\]"):
        EntityFinder("spacy:en_core_web_sm")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    """A BERT without layers worth the name, made to tag two words: it reads embeddings only."""
    folder = tmp_path_factory.mktemp("hf")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "mass", "lung", "in", "a", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        max_position_embeddings=64,
        id2label={0: "O", 1: "B-OBS", 2: "B-ANAT"},
        label2id={"O": 0, "B-OBS": 1, "B-ANAT": 2},
    )
    model = BertForTokenClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "LayerNorm.weight" in name else 0.0)
        embeddings = model.bert.embeddings.word_embeddings.weight
        for word in range(len(words)):
            embeddings[word, word] = 1.0
        model.classifier.weight[1, words.index("mass")] = 9.0
        model.classifier.weight[2, words.index("lung")] = 9.0
        model.classifier.bias[0] = 5.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.ledger("entities")
def test_a_hugging_face_model_stands_in_for_the_lexicon(hf_folder):
    texts = ["No mass in lung.", " ", "A mass in a lung."]
    found = list(find_entities(texts, f"hf:{hf_folder}"))
    said = [
        [(text[e.start : e.end], e.kind, e.status) for e in some]
        for text, some in zip(texts, found, strict=True)
    ]
    assert said == [
        [("mass", "finding", "negated"), ("lung", "anatomy", "present")],
        [],
        [("mass", "finding", "present"), ("lung", "anatomy", "present")],
    ]


def test_a_hugging_face_model_reads_reports_longer_than_its_window(hf_folder):
    text = "a " * 300 + "mass"
    (found,) = find_entities([text], f"hf:{hf_folder}")
    assert [text[e.start : e.end] for e in found] == ["mass"]


@pytest.mark.parametrize("backend", ["", "lexikon", "spacy:", "hf:", "lexicon:x"])
def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(backend):
    with pytest.raises(ValueError, match="'lexicon', 'spacy:NAME' or 'hf:NAME'"):
        EntityFinder(backend)
