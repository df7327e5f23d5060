import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmclip.config_io import ConfigError
from mmclip.data.disease_prompts import (
    NO_FINDING,
    PROMPT_UNIFORMS,
    DiseasePromptSet,
    load_disease_prompts,
)
from mmclip.data.readers.vocabulary import load_vocabulary

PLAIN = DiseasePromptSet(
    id="plain",
    version=1,
    description="One wording a side.",
    present=("There is {findings}.",),
    absent=("There is no {findings}.",),
    normal=("Normal image.",),
    most_absent=2,
    normal_from=3,
    names={"edema": ("an edema",)},
)
DEFAULT = load_disease_prompts()


def write(labels: dict[str, int], absent_prob: float = 0.0, prompt_templates=PLAIN, seed: int = 0):
    uniforms = np.random.default_rng(seed).random(PROMPT_UNIFORMS + 2 * len(labels))
    return prompt_templates.write(labels, uniforms, absent_prob)


def text(labels: dict[str, int], absent_prob: float = 0.0, seed: int = 0) -> str | None:
    prompt = write(labels, absent_prob, seed=seed)
    return None if prompt is None else prompt.text


@pytest.mark.ledger("prompt templates")
def test_prompts_by_hand():
    assert text({"mass": 1, "edema": 0}) == "There is mass."
    assert text({"edema": 1}) == "There is an edema."
    assert text({"edema": 0}) == "There is no edema."  # nothing else can be said
    assert text({"mass": 1, "edema": 0}, absent_prob=1.0) == "There is mass. There is no edema."
    three = {text({"a": 1, "b": 1, "c": 1}, seed=s) for s in range(40)}
    assert "There is a, b and c." in three and len(three) == 6


@pytest.mark.ledger("unknown never absent")
def test_an_image_is_called_normal_by_its_label_or_where_enough_was_looked_for():
    assert text({NO_FINDING: 1, "mass": 0}) == "Normal image."
    assert text({"a": 0, "b": 0, "c": 0}) == "Normal image."
    assert text({"a": 0, "b": 0}) != "Normal image."  # two findings are not the whole image
    assert text({"a": 0, "b": 0, "c": 0, NO_FINDING: 0}) != "Normal image."
    assert text({"a": 0, "b": 0, "c": 0, "d": -1}) != "Normal image."  # perhaps there is d


@pytest.mark.ledger("unknown never absent")
def test_what_is_not_known_for_sure_is_not_said():
    assert text({"mass": -1}) is None
    assert text({}) is None
    assert text({NO_FINDING: 0}) is None  # something is there; what, nobody says


@pytest.mark.ledger("unknown never absent")
@given(
    labels=st.dictionaries(st.sampled_from(sorted(DEFAULT.names)), st.sampled_from([1, 0, -1])),
    absent_prob=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_present_finding_is_named_and_no_other_status_is_claimed(labels, absent_prob, seed):
    prompt = write(labels, absent_prob, DEFAULT, seed)
    if prompt is None:
        assert not {0, 1} & set(labels.values())
        return
    present = {e.concept for e in prompt.entities if e.status == "present"}
    negated = {e.concept for e in prompt.entities if e.status == "negated"}
    assert present == {f for f, value in labels.items() if value == 1}
    assert negated <= {f for f, value in labels.items() if value == 0}
    for entity in prompt.entities:
        name = prompt.text[entity.start : entity.end].lower()
        names = {
            n.removeprefix("an ").removeprefix("a ").lower() for n in DEFAULT.names[entity.concept]
        }
        assert name.removeprefix("an ").removeprefix("a ") in names
        if entity.cue is not None:
            assert prompt.text[slice(*entity.cue)].lower() == "no"
    assert prompt.text[0].isupper() and prompt.text.endswith(".")


@pytest.mark.ledger("prompt templates")
def test_wordings_names_and_order_vary_with_the_draws():
    labels = {"cardiomegaly": 1, "pleural effusion": 1, "mass": 0}
    said = {p.text for s in range(60) if (p := write(labels, 0.5, DEFAULT, s))}
    assert len(said) > 20


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"pacemaker": 1}, "There is a pacemaker."),
        ({"multiple nodules": 1}, "There are multiple nodules."),
        ({"kerley lines": 1}, "There are Kerley lines."),
        ({"empyema": 1}, "There is an empyema."),
        ({"pleural plaques": 0}, "There are no pleural plaques."),
        ({"stent": 0}, "There is no stent."),
        ({"rib fracture": 1}, "There is a rib fracture."),
        ({"edema": 1}, "There is pulmonary edema."),
        ({"support devices": 1}, "There are lines and tubes."),
        ({"abscess": 1, "cavity": 1}, "There is an abscess and a cavity."),
    ],
)
def test_findings_have_their_article_and_number(labels, expected):
    said = {p.text for s in range(200) if (p := write(labels, 0.0, DEFAULT, s))}
    assert expected in said
    assert not any(text.startswith(("There is multiple", "There is support")) for text in said)


def test_every_finding_of_the_vocabulary_has_a_sentence_in_good_english():
    for finding in load_vocabulary().findings:
        said = {p.text for s in range(60) if (p := write({finding: 1}, 0.0, DEFAULT, s))}
        for sentence in said:
            if sentence.startswith("There "):
                verb, first, *rest = sentence.removeprefix("There ").split()
                is_plural = " ".join((first, *rest)).rstrip(".").endswith(
                    ("nodules", "devices", "tubes", "lines", "changes", "plaques", "opacities",
                     "volumes", "densities", "nodes", "markings", "signs", "bullae", "sequelae")
                )  # fmt: skip
                assert (verb == "are") == (is_plural and first not in ("a", "an")), sentence


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="3 random numbers for 1 findings; give 6"):
        PLAIN.write({"mass": 1}, np.zeros(3), 0.0)


def test_a_wording_without_a_place_for_the_findings_is_refused(tmp_path):
    source = DEFAULT.model_dump(mode="json") | {"present": ["There is something."]}
    lines = [f"{k} = {v!r}" for k, v in source.items() if k != "names"]
    path = tmp_path / "bad.toml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"must hold \{findings\} once"):
        load_disease_prompts(str(path))


def test_an_unknown_set_says_what_there_is():
    with pytest.raises(
        ConfigError, match="no set of disease-kind prompts 'none'; name one of default"
    ):
        load_disease_prompts("none")
