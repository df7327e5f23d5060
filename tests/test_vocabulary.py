import pytest

from mmclip.config_io import RESOURCES
from mmclip.data.readers.vocabulary import SourceWords, load_vocabulary, load_words
from mmclip.data.sample import ABSENT, PRESENT
from mmclip.prompts import plain_name

SOURCES = sorted(
    file.name.removesuffix(".toml")
    for file in (RESOURCES / "findings").iterdir()
    if file.name != "vocabulary.toml"
)
WORDS = SourceWords.model_validate(
    {
        "id": "ward",
        "version": 2,
        "description": "Made.",
        "closed": ["mass", "no finding", "pneumonia"],
        "unfinished": ["unchanged"],
        "words": {
            "Lump": ["mass"],
            "TB": ["pneumonia", "tuberculosis"],
            "No TB": {"absent": ["tuberculosis"]},
            "normal": {"present": ["no finding"], "absent": ["fracture"]},
            "broken": ["fracture"],
        },
    }
)


def names_of(words: SourceWords) -> set[str]:
    return {name for meaning in words.words.values() for name, _ in meaning.labels()}


def test_the_vocabulary_is_the_names_that_sources_use_sorted_and_plain():
    vocabulary = load_vocabulary()
    used = {name for source in SOURCES for name in names_of(load_words(source))}
    assert list(vocabulary.findings) == sorted(used)
    assert all(name == plain_name(name) for name in used)


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_source_looked_for_can_be_named_by_its_words(source: str):
    words = load_words(source)
    assert words.id == source
    present = {name for m in words.words.values() for name in m.present}
    assert set(words.closed) <= present  # else a finding would be absent on every image
    assert not {*words.unfinished, *words.left_out} & set(words.words)


def test_listed_and_not_given_is_absent_and_what_is_outside_the_list_unknown():
    assert WORDS.labels(["Lump"]) == {"mass": PRESENT, "no finding": ABSENT, "pneumonia": ABSENT}
    assert WORDS.labels(["TB"]) == {
        "mass": ABSENT, "no finding": ABSENT, "pneumonia": PRESENT, "tuberculosis": PRESENT,
    }  # fmt: skip


def test_a_word_that_leaves_the_rest_open_makes_nothing_absent():
    assert WORDS.labels(["unchanged", "Lump"]) == {"mass": PRESENT}
    assert WORDS.labels(["unchanged"]) == {}


def test_an_unknown_word_is_an_error_that_says_where_to_add_it():
    with pytest.raises(
        ValueError, match=r"'Gout' is not among .* of ward, version 2; .*ward\.toml"
    ):
        WORDS.labels(["Lump", "Gout"])
    with pytest.raises(ValueError, match="'Gout'"):
        WORDS.finding("Gout")


def test_words_that_contradict_one_another_are_an_error():
    with pytest.raises(ValueError, match="TB, No TB contradict one another on tuberculosis"):
        WORDS.labels(["TB", "No TB"])
    with pytest.raises(ValueError, match="on fracture"):
        WORDS.labels(["broken", "normal"])


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_word_leaves_open_is_among_what_the_readers_looked_for(source: str):
    words = load_words(source)
    left_open = {name for meaning in words.words.values() for name in meaning.unknown}
    assert left_open <= set(words.closed)  # else it is unknown without being said
    assert set(words.closed_by) <= set(words.unfinished)
