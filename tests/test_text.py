"""Reports: sections, cleaning, sentences, tokens."""

import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from mmclip.data.text import (
    SPECIAL_TOKENS,
    make_report,
    parse_report,
    split_sentences,
    tokenise,
    train_tokenizer,
)
from mmclip.data.tokenizer import Frame, frame_of, load_tokenizer

OPENI = Path(__file__).resolve().parents[2] / "shared" / "data" / "openi" / "NLMCXR_reports.tgz"

# The layout is MIMIC-CXR's; the words are made up.
MIMIC_LIKE = """\
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with cough  // r/o pneumonia

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  ___

 FINDINGS:

 The lungs are
 clear. A 1.5 cm nodule is unchanged since ___.

 The heart is normal.

 IMPRESSION:

 1. No acute process.
 2. Stable nodule, ___, as told to Dr. ___ at ___:___ a.m.
"""


@pytest.mark.ledger("report text")
def test_sections_of_a_full_report_are_found_and_others_left_out():
    report = parse_report(MIMIC_LIKE)
    assert report.findings == (
        "The lungs are clear. A 1.5 cm nodule is unchanged since. The heart is normal."
    )
    assert report.impression == "No acute process. Stable nodule, as told to Dr. at a.m."
    assert report.text == f"{report.findings} {report.impression}"


@pytest.mark.ledger("report text")
@pytest.mark.parametrize(
    ("raw", "findings", "impression", "text"),
    [
        ("FINDINGS: A b. IMPRESSION: C d.", "A b.", "C d.", "A b. C d."),
        ("findings: a b. impression: c d.", "a b.", "c d.", "a b. c d."),
        ("Findings\nA b.\nImpression\nC d.", "A b.", "C d.", "A b. C d."),
        ("FINDINGS: Clear lungs\nIMPRESSION: Normal", "Clear lungs", "Normal", None),
        ("IMPRESSION: Normal.", None, "Normal.", "Normal."),
        ("FINDINGS: Normal.", "Normal.", None, "Normal."),
        ("FINDINGS AND IMPRESSION: Normal.", "Normal.", None, "Normal."),
        ("CONCLUSION: Normal.", None, "Normal.", "Normal."),
        ("FINDINGS: None.\nIMPRESSION: Normal.", None, "Normal.", "Normal."),
        ("FINDINGS: Normal.\nIMPRESSION: Normal.", "Normal.", "Normal.", "Normal."),
        ("No header here. Clear lungs", None, None, "No header here. Clear lungs"),
        ("The heart is big. IMPRESSION: Failure.", "The heart is big.", "Failure.", None),
        ("AP CHEST, 5:21 A.M.\n\nIMPRESSION: Failure.", None, "Failure.", "Failure."),
        ("COMPARISON: None.\n\nHeart big.\n\nLungs clear.", None, None, "Heart big. Lungs clear."),
        ("History: cough. Image shows an effusion.", None, None, "Image shows an effusion."),
        ("INDICATION: cough", None, None, ""),
        ("IMPRESSION: Normal.\nRECOMMENDATION: CT.", None, "Normal.", "Normal."),
        ("Presentation: Fever. . Imaging Notes: Edema.. Discussion: X.", "Edema.", None, "Edema."),
    ],
)
def test_headers_and_fallbacks(raw, findings, impression, text):
    report = parse_report(raw)
    assert (report.findings, report.impression) == (findings, impression)
    if text is None:
        first = str(findings)
        text = f"{first if first.endswith('.') else first + '.'} {impression}"
    assert report.text == (text or None)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("The XXXX are clear.", "The are clear."),
        ("Normal chest x-XXXX.", "Normal chest x-ray."),
        ("XXXX XXXX. No effusion.", "No effusion."),
        ("XXXX, no effusion", "no effusion"),
        ("Effusion, XXXX, on XXXX/XXXX.", "Effusion, on."),
        ("Dual-XXXX pacer of a ___-year-old.", "Dual pacer of a year-old."),
        ("Seen ( ___ ) on [**2101-2-3**] by Dr. [**First Name 12**].", "Seen on by Dr."),
        ("An image\n  in two   lines .", "An image in two lines."),
        ("Dr. XXXX's nurse at XXXXPM.", "Dr. nurse at PM."),
        ("1. Edema. 2. Mass.", "Edema. Mass."),
        ("1. Edema\n2. Mass", "Edema. Mass"),
        ("1) Edema.\n2) Mass.", "Edema. Mass."),
        ("- Edema\n- Mass", "Edema. Mass"),
        ("1.5 cm nodule. 2 cm mass.", "1.5 cm nodule. 2 cm mass."),
        ("Fractures of ribs 8 and\n9. No effusion.", "Fractures of ribs 8 and 9. No effusion."),
        ("Effusion. . ", "Effusion."),
        ("[<Clear.&gt;] Old scar", "Clear. Old scar"),
        ("“Bat’s wing” – edema\u00a0\u200b", '"Bat\'s wing" - edema'),
        ("Opacities, ?edema, e.g., here", "Opacities, ?edema, e.g., here"),
    ],
)
def test_cleaning_removes_marks_and_nothing_else(raw, cleaned):
    assert parse_report(raw).text == cleaned
    assert make_report(raw, None).findings == cleaned


@pytest.mark.ledger("report text")
@pytest.mark.parametrize(
    "raw", [None, "", " \n ", ".", "None.", "N/A", "nan", "NaN", "XXXX", "___.", "1. 2.", "(XXXX)"]
)
def test_a_report_without_words_is_none_and_never_empty(raw):
    for report in (parse_report(raw), make_report(raw, raw)):
        assert (report.findings, report.impression, report.text) == (None, None, None)


def test_a_report_pasted_into_one_section_is_parsed_and_not_said_twice():
    report = make_report(
        "Large heart.", "Failure. IMPRESSION: FINDINGS: Large heart. IMPRESSION: Failure."
    )
    assert report.text == "Large heart. Failure."


@given(st.text(alphabet="aX_. \n:-1,()[*]FINDGS", max_size=60))
@example("FINDINGS: X. IMPRESSION:")
def test_no_input_breaks_the_parser_and_cleaning_is_stable(raw):
    report = parse_report(raw)
    for part in (report.findings, report.impression, report.text):
        assert part is None or (part == part.strip() and any(c.isalpha() for c in part))
    assert report.text is None or "___" not in report.text


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Clear lungs. No effusion.", ["Clear lungs.", "No effusion."]),
        ("clear lungs. no effusion", ["clear lungs.", "no effusion"]),
        ("A 1.5 cm nodule vs. a 2 cm one.", ["A 1.5 cm nodule vs. a 2 cm one."]),
        ("Told to Dr. J. Smith. Done.", ["Told to Dr. J. Smith.", "Done."]),
        ("Lines, e.g. a port, i.e. one.", ["Lines, e.g. a port, i.e. one."]),
        ("Tube No. 1 is out. No. The tube.", ["Tube No. 1 is out.", "No.", "The tube."]),
        (
            "Is approx. 5 mm. in size. It is 3 mm. Stable.",
            ["Is approx. 5 mm. in size.", "It is 3 mm.", "Stable."],
        ),
        (
            "At 5 p.m. the tube. At 6 a.m. The line.",
            ["At 5 p.m. the tube.", "At 6 a.m.", "The line."],
        ),
        ("Effusion.No edema.", ["Effusion.", "No edema."]),
        ("Title\n\nText", ["Title", "Text"]),
        ("Edema? (Yes.) Mass!", ["Edema?", "(Yes.)", "Mass!"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences_by_hand(text, sentences):
    assert [text[start:end] for start, end in split_sentences(text)] == sentences


@given(st.text(alphabet="abN. \n!?\"')Dr1", max_size=60) | st.text(max_size=40))
def test_sentence_spans_are_ordered_disjoint_and_cover_all_words(text):
    end_before, outside = 0, ""
    for start, end in split_sentences(text):
        assert end_before <= start < end <= len(text)
        assert text[start:end] == text[start:end].strip()
        outside += text[end_before:start]
        end_before = end
    assert not (outside + text[end_before:]).strip()


CORPUS = ["The lungs are clear.", "No pleural effusion.", "There is a pleural effusion."] * 3


def test_special_tokens_have_the_ids_0_to_4_and_frame_a_text():
    tokenizer = train_tokenizer(CORPUS)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    ids = tokenise(tokenizer, ["lungs"], max_tokens=8).ids[0]
    assert (ids[0], ids[-1], len(ids)) == (2, 3, 3)
    assert tokenizer.mask_token_id == 4 and tokenizer.pad_token_id == 0


@pytest.mark.ledger("text encoder")
def test_equal_texts_give_an_equal_vocabulary():
    texts = [f"word{i} lung{i % 7} opacity" for i in range(300)]
    made = [train_tokenizer(iter(texts), vocab_size=120) for _ in range(5)]
    assert len({tokenizer.backend_tokenizer.to_str() for tokenizer in made}) == 1
    assert len(made[0]) <= 120


def test_training_on_nothing_is_an_error():
    with pytest.raises(ValueError, match="no words"):
        train_tokenizer([])


def bert_on_disk(folder: Path) -> PreTrainedTokenizerFast:
    words = [
        *SPECIAL_TOKENS,
        "the",
        "lungs",
        "are",
        "clear",
        "pleural",
        "effusion",
        "##s",
        ".",
        "no",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(params=["trained", "bert"])
def tokenizer(request, tmp_path) -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS) if request.param == "trained" else bert_on_disk(tmp_path)


def test_offsets_point_at_the_words_of_the_source_text(tokenizer):
    texts = ["The LUNGS are clear.", "no pleural  effusions"]
    tokens = tokenise(tokenizer, texts, max_tokens=20)
    assert tokens.n_truncated == 0
    for i, text in enumerate(texts):
        n = int(tokens.is_valid[i].sum())
        assert not tokens.offsets[i, 0].any() and not tokens.offsets[i, n - 1 :].any()
        spans = tokens.offsets[i, 1 : n - 1]
        joined = "".join(text[start:end] for start, end in spans)
        assert joined == text.replace(" ", "")
        pieces = tokenizer.convert_ids_to_tokens(tokens.ids[i, 1 : n - 1].tolist())
        for piece, (start, end) in zip(pieces, spans, strict=True):
            assert piece == "[UNK]" or piece.removeprefix("##") == text[start:end].lower()


@given(st.lists(st.text(alphabet="theLungs éſ.\n", max_size=30), min_size=1, max_size=4))
def test_offsets_are_ordered_and_inside_the_text(texts):
    tokens = tokenise(train_tokenizer(CORPUS), texts, max_tokens=12)
    assert tokens.ids.shape == tokens.is_valid.shape == tokens.offsets.shape[:2]
    assert tokens.ids.shape[1] == tokens.is_valid.sum(1).max() <= 12
    for i, text in enumerate(texts):
        spans = tokens.offsets[i, 1 : int(tokens.is_valid[i].sum()) - 1]
        assert (spans[:, 0] < spans[:, 1]).all() and (spans <= len(text)).all()
        assert (np.diff(spans[:, 0]) >= 0).all()


def test_long_texts_are_cut_counted_and_still_end_with_sep(tokenizer):
    tokens = tokenise(tokenizer, ["the lungs are clear.", "the"], max_tokens=4)
    assert tokens.n_truncated == 1
    assert tokens.ids.shape == (2, 4)
    assert tokens.ids[0, 3] == tokenizer.sep_token_id
    assert tokens.is_valid.tolist() == [[True] * 4, [True, True, True, False]]
    assert tokens.ids[1, 3] == tokenizer.pad_token_id


def test_no_texts_and_no_room(tokenizer):
    assert tokenise(tokenizer, [], max_tokens=4).ids.shape == (0, 0)
    with pytest.raises(ValueError, match="max_tokens=2"):
        tokenise(tokenizer, ["the"], max_tokens=2)


def test_tokenise_leaves_no_setting_behind(tokenizer):
    tokenise(tokenizer, ["the lungs are clear"], max_tokens=3)
    assert tokenise(tokenizer, ["the lungs are clear"], max_tokens=50).n_truncated == 0


def test_a_trained_tokenizer_survives_saving(tmp_path):
    trained = train_tokenizer(CORPUS)
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    before, after = (tokenise(t, CORPUS, max_tokens=9) for t in (trained, loaded))
    np.testing.assert_array_equal(before.ids, after.ids)
    np.testing.assert_array_equal(before.offsets, after.offsets)


def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_mask_gets_one_as_its_last_token(tmp_path):
    made = Tokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    plain = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    plain.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.mask_token, loaded.mask_token_id, len(loaded)) == ("[MASK]", 5, 6)
    assert frame_of(loaded) == Frame(begin=(2,), end=(3,), pad=0, mask=5)
    loaded.save_pretrained(tmp_path / "again")
    assert frame_of(load_tokenizer(str(tmp_path / "again"))) == frame_of(loaded)


@pytest.mark.parametrize(
    ("pads", "frames", "words"),
    [(False, True, "pad_token"), (True, False, "no special token before or after")],
)
def test_a_tokenizer_that_cannot_frame_or_pad_a_text_is_refused(
    tmp_path, pads: bool, frames: bool, words: str
):
    made = Tokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}))
    if frames:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    plain = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]" if pads else None)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not OPENI.is_file(), reason="needs the Open-I report archive")
def test_every_open_i_report_is_cleaned_and_tokenised():
    reports = []
    with tarfile.open(OPENI) as tar:
        for member in tar:
            if member.name.endswith(".xml"):
                tree = ET.fromstring(tar.extractfile(member).read())
                parts = {p.get("Label"): p.text for p in tree.iter("AbstractText")}
                reports.append(make_report(parts.get("FINDINGS"), parts.get("IMPRESSION")))
    texts = [report.text for report in reports if report.text is not None]
    assert (len(reports), len(texts)) == (3955, 3927)
    assert not any("XXXX" in text or "  " in text or " ." in text for text in texts)
    tokenizer = train_tokenizer(texts)
    tokens = tokenise(tokenizer, texts[:1000], max_tokens=512)
    assert tokens.n_truncated == 0
    assert not (tokens.ids == tokenizer.unk_token_id).any()
