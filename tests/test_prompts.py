"""Prompt sets: every shipped text reads as English, and a faulty set is refused by name."""

import itertools
import re

import pytest

from mmclip.config_io import ConfigError
from mmclip.evaluation.protocols import load_protocol, protocol_names
from mmclip.prompts import known_prompt_sets, load_prompts

NAMES = [
    "cardiomegaly",
    "pleural effusion",
    "pneumothorax",
    "consolidation",
    "atelectasis",
    "edema",
    "nodule",
    "mass",
    "hernia",
    "hiatal hernia",
    "support devices",
    "pneumonia",
    "bacterial pneumonia",
    "viral pneumonia",
    "infiltration",
    "emphysema",
    "fibrosis",
    "pleural thickening",
    "tuberculosis",
    "covid-19",
    "lung opacity",
    "fracture",
    "rib fracture",
    "hilar enlargement",
    "no finding",
]

MINIMAL = """
id = "mine"
version = 1
description = "A test."
[templates]
positive = ["There {is} {a_finding}."]
negative = ["There {is} no {finding}."]
"""


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "mine.toml"
        path.write_text(text, "utf-8")
        return path

    return written


def test_there_are_sets_enough_to_measure_the_spread():
    assert {"pair", "sentence", "default"} <= set(known_prompt_sets())


@pytest.mark.parametrize("name", known_prompt_sets())
def test_the_id_of_a_set_is_its_file_name(name):
    assert load_prompts(name).id == name


@pytest.mark.parametrize("name", known_prompt_sets())
@pytest.mark.parametrize("finding", [*NAMES, "granuloma"])
def test_every_finding_has_texts_that_differ_and_read_as_english(name, finding):
    positives, negatives = load_prompts(name).texts(finding)
    texts = positives + negatives
    assert positives and negatives and len(set(texts)) == len(texts)
    for text in texts:
        assert not re.search(r"[{}]|\bno no\b|\ba a\b|\ba [aeiou]|\bno an? |  ", text, re.I), text
        assert not re.search(r"\bis (no )?support devices", text), text


def test_the_pair_is_the_name_and_its_negation():
    assert load_prompts("pair").texts("Pleural_Effusion") == (
        ("pleural effusion",),
        ("no pleural effusion",),
    )


def test_phrases_give_articles_and_plurals():
    sentence = load_prompts("sentence")
    assert sentence.texts("nodule") == (("There is a nodule.",), ("There is no nodule.",))
    assert sentence.texts("support devices").positives == ("There are support devices.",)
    assert sentence.texts("support devices").negatives == ("There are no support devices.",)


SINGULAR = (
    "pacemaker",
    "catheter",
    "calcified granuloma",
    "aortic aneurysm",
    "pleural mass",
    "cyst",
)
PLURAL = ("multiple nodules", "calcified densities", "COPD signs", "pleural plaques", "bullas")
MASS_NOUNS = ("kyphosis", "suture material", "obesity", "volume loss", "scoliosis")


@pytest.mark.parametrize("name", ["default", "sentence"])
def test_articles_and_number_go_by_the_finding(name: str):
    prompts = load_prompts(name)
    for finding in SINGULAR:
        article = "an" if finding[0] in "aeiou" else "a"
        positives, negatives = prompts.texts(finding)
        assert positives[0] == f"There is {article} {finding}."
        assert negatives[0] == f"There is no {finding}."
    for finding in PLURAL:
        positives, negatives = prompts.texts(finding)
        assert positives[0].startswith("There are "), positives
        assert negatives[0].startswith("There are no ")
        assert not any(" is " in text for text in positives + negatives)
    for finding in MASS_NOUNS:
        assert prompts.texts(finding).positives[0] == f"There is {finding}."


@pytest.mark.parametrize("name", ["default", "sentence"])
def test_what_a_protocol_asks_for_reads_as_english(name: str):
    prompts = load_prompts(name)
    plural = r"There is [\w -]*(nodules|opacities|signs|changes|lines|densities)\."
    bare = r"There is (?!an? |another )[\w -]*(pacemaker|catheter|mass|tube|device|lesion|hernia)\."
    for protocol in protocol_names():
        for finding in load_protocol(protocol).findings:
            for text in itertools.chain(*prompts.texts(finding)):
                assert not re.search(plural, text), text
                assert not re.search(bare, text) or "There is no " in text, text


@pytest.mark.parametrize("cause", ["bacterial pneumonia", "viral pneumonia", "covid-19"])
def test_no_side_or_extent_stands_for_a_cause(cause: str):
    side = r"\b(right|left|bilateral|lobe|lobar|focal|diffuse|multifocal|peripheral|perihilar)\b"
    word = cause.split()[0]
    for text in itertools.chain(*load_prompts("default").texts(cause)):
        assert not re.search(side, text, re.I), text
        assert word in text.lower(), text


def test_own_wording_stands_in_place_of_the_templates():
    positives, negatives = load_prompts("default").texts("cardiomegaly")
    assert "The heart is enlarged." in positives and "The heart size is normal." in negatives


def test_a_finding_without_own_wording_falls_back_on_the_templates(write):
    own = MINIMAL + '[findings.mass]\npositive = ["A mass."]\nnegative = ["Clear."]\n'
    prompts = load_prompts(write(own))
    assert prompts.texts("mass") == (("A mass.",), ("Clear.",))
    assert prompts.texts("cyst") == (("There is cyst.",), ("There is no cyst.",))


@pytest.mark.ledger("prompt pair")
def test_the_hash_follows_the_content_not_the_layout(write):
    plain = load_prompts(write(MINIMAL)).hash
    assert load_prompts(write("# a comment\n" + MINIMAL)).hash == plain
    assert load_prompts(write(MINIMAL.replace("version = 1", "version = 2"))).hash != plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL.replace("{a_finding}", "{disease}"), "placeholder {disease}; known are {"),
        (MINIMAL.replace("{a_finding}", "something"), "does not name the finding"),
        (MINIMAL.replace('["There {is} {a_finding}."]', "[]"), "templates.positive"),
        (
            MINIMAL.replace("id =", 'color = "red"\nid ='),
            "unknown key 'color'; known here: description, ",
        ),
        (
            MINIMAL + "[phrases]\nmass = { article = 'a' }\n",
            "unknown key 'phrases.mass.article'; known here: a_finding, finding, is",
        ),
        (MINIMAL + '[phrases]\n"Big_Mass" = {}\n', "must be written 'big mass'"),
        (MINIMAL + "[findings.mass]\npositive = ['x']\n", "findings.mass.negative"),
        ("id = ", "is no valid TOML"),
    ],
)
def test_a_faulty_set_is_refused_with_its_file_and_rule(write, text, message):
    with pytest.raises(ConfigError, match=f"mine.toml.*{message}"):
        load_prompts(write(text))


def test_an_unknown_set_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="no prompt set 'fancy'; name one of default, pair"):
        load_prompts("fancy")
    with pytest.raises(
        ConfigError, match=r"prompt set .*absent\.toml cannot be read: No such file"
    ):
        load_prompts(tmp_path / "absent.toml")


def test_a_finding_needs_a_name():
    with pytest.raises(ValueError, match="needs a name"):
        load_prompts("pair").texts(" _ ")
