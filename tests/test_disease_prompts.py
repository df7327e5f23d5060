import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmclip.config import ConfigError
from mmclip.data.disease_prompts import (
    NO_FINDING,
    PROMPT_UNIFORMS,
    DiseasePromptSet,
    load_disease_prompts,
)

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
