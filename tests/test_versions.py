from mmclip.config_io import packaged_names
from mmclip.data.ingest.sources import READERS
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.versions import WORDS_OF, changed_since, made_with

READER_FILES = set(packaged_names("findings")) - {"vocabulary", "chestxdet10"}  # boxes alone


def test_every_list_of_label_words_is_of_a_reader_and_noted_in_what_it_builds():
    noted = {name for r in READERS for name in made_with(r, None)["words"]}
    assert noted == {f"findings/{name}" for name in READER_FILES}
    assert set(WORDS_OF) <= set(READERS)
    assert {load_words(name).id for name in WORDS_OF} == {"chexpert", "nlm_tb"}


def test_the_lexicon_is_noted_where_it_found_entities_and_its_cues_where_a_model_did():
    lexicon = {f"lexicon/{name}" for name in packaged_names("lexicon")}
    assert set(made_with("csv", "lexicon")["words"]) == lexicon
    assert set(made_with("csv", "spacy:x")["words"]) == {"lexicon/cues"}
    assert not made_with("csv", None)["words"] and not made_with(None, None)["words"]


def test_what_differs_from_the_lists_that_are_installed_is_named():
    meta = {
        "reader": "rsna", "entities": "lexicon", "n_with_report": 0,
        "made_with": made_with("rsna", None),
    }  # fmt: skip
    assert changed_since(meta) == []
    meta["made_with"] = {**meta["made_with"], "words": {"findings/rsna": "other"}}
    assert changed_since(meta) == ["findings/rsna.toml"]
    meta |= {"n_with_report": 1}
    assert len(changed_since(meta)) == 1 + len(packaged_names("lexicon"))
