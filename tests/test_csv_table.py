import bz2
import datetime
import gzip
import lzma
import sys
import unicodedata
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError

from mmclip.config_io import ConfigError
from mmclip.data.ages import parse_age
from mmclip.data.folder import ManifestError
from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_mapping import CsvMapping, load_mapping
from mmclip.data.ingest.csv_rows import read_rows
from mmclip.data.ingest.csv_table import SourceError, read_csv
from mmclip.data.ingest.sources import open_reader
from mmclip.data.sample import Excluded, Reason, Sample

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "mixed_images.toml"

IDS = {"image": "film", "patient_id": "patient"}


def read(folder: Path, text: str, **mapping) -> list:
    """The records of a table; `mapping` adds to an image and a patient column."""
    (folder / "studies.csv").write_text(text, "utf-8")
    columns = IDS | mapping.pop("columns", {})
    return list(read_csv(folder, CsvMapping.model_validate({"columns": columns, **mapping})))


def samples(records: list) -> list[Sample]:
    assert all(isinstance(record, Sample) for record in records), records
    return records


# Columns.


def test_columns_are_read_by_the_names_of_the_mapping(tmp_path: Path):
    text = (
        "Path,Who,Text,Set,Proj,Years,Gender,Where,Study,Unused\n"
        'a/1.png, p1 ,"FINDINGS: Clear, and\nnormal. IMPRESSION: Normal.",'
        "Train,ap,054Y,Female,x,s1,?\n"
    )
    columns = {
        "image": "Path", "patient_id": "Who", "report": "Text", "split": "Set", "view": "Proj",
        "age": "Years", "sex": "Gender", "source": "Where", "study_id": "Study",
    }  # fmt: skip
    (sample,) = read(tmp_path, text, columns=columns)
    assert asdict(sample) == {
        "image_id": "a/1.png", "study_id": "s1", "patient_id": "p1", "source": "x",
        "split": "train", "image": "a/1.png", "view": "AP", "findings": "Clear, and normal.",
        "impression": "Normal.", "report": "Clear, and normal. Normal.", "entities": (),
        "labels": {},
        "source_labels": (), "label_origin": None, "age_years": 54.0, "sex": "F",
        "width_px": None, "height_px": None,
        "image_sha256": None,
    }  # fmt: skip


def test_columns_that_are_not_named_are_not_read(tmp_path: Path):
    text = "film,patient,report,view,split,labels\na.png,p,Clear.,sideways,dev,Dragon\n"
    (sample,) = samples(read(tmp_path, text))
    assert (sample.report, sample.view, sample.split, sample.labels) == (None, "unknown", None, {})


def test_findings_and_impression_can_have_columns_of_their_own(tmp_path: Path):
    columns = {"findings": "f", "impression": "i"}
    text = "film,patient,f,i\na,p,Clear.,Normal.\nb,p,,Normal.\nc,p,nan,\n"
    found = [
        (sample.findings, sample.impression, sample.report)
        for sample in samples(read(tmp_path, text, columns=columns))
    ]
    assert found == [
        ("Clear.", "Normal.", "Clear. Normal."),
        (None, "Normal.", "Normal."),
        (None, None, None),
    ]


def test_images_without_an_image_column_are_text_only(tmp_path: Path):
    columns = {"image_id": "study", "image": None, "report": "report"}
    (sample,) = samples(read(tmp_path, "study,patient,report\ns1,p,Clear.\n", columns=columns))
    assert (sample.image_id, sample.image) == ("s1", None)


def test_a_backslash_parts_folders(tmp_path: Path):
    (sample,) = samples(read(tmp_path, "film,patient\nfolder\\a.png,p\n"))
    assert sample.image == "folder/a.png"


def test_another_delimiter_a_byte_order_mark_and_blank_lines_are_read(tmp_path: Path):
    text = "\ufefffilm;patient\na.png;p\n\n  \nb.png;q\n"
    assert [sample.patient_id for sample in read(tmp_path, text, delimiter=";")] == ["p", "q"]


def test_another_table_can_stand_in(tmp_path: Path):
    (tmp_path / "part.csv").write_text("film,patient\nb.png,q\n")
    mapping = CsvMapping.model_validate({"columns": IDS})
    (sample,) = read_csv(tmp_path, mapping, tmp_path / "part.csv")
    assert sample.image_id == "b.png"


@pytest.mark.parametrize("word", ["nan", "NaN", "N/A", "none", "null", "", "   "])
def test_words_for_nothing_are_nothing(tmp_path: Path, word: str):
    text = f"film,patient,report\na.png,{word},{word}\n"
    (sample,) = read(tmp_path, text, columns={"report": "report"})
    assert (sample.patient_id, sample.report) == ("", None)


# What a mapping may say.

LEAST = '[columns]\npatient_id = "p"\nimage = "f"\n'


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('[columns]\npatient_id = "p"\nimgae = "film"\n', r"imgae"),
        ('colums = 1\n[columns]\npatient_id = "p"\nimage = "f"\n', r"colums"),
        ('[columns]\npatient_id = "p"\n', r"without them a row has no id"),
        ('[columns]\nimage = "f"\n', r"patient_id"),
        (
            LEAST + 'report = "r"\nfindings = "g"\n',
            r"either report, or findings and impression",
        ),
        (
            LEAST + 'labels = "l"\n[labels.columns]\nMass = "mass"\n',
            r"either columns.labels or \[labels.columns\]",
        ),
        (
            LEAST + '[labels]\nunknown = ["todo"]\n',
            r"name columns.labels",
        ),
        (
            LEAST + 'labels = "l"\n[labels.closed]\nx = ["Mass"]\n',
            r"\['Mass'\] are not",
        ),
        (LEAST + '[views]\nfront = "frontal"\n', r"views"),
    ],
)
def test_a_mapping_that_breaks_a_rule_is_refused_by_name(tmp_path: Path, toml: str, message: str):
    (tmp_path / "m.toml").write_text(toml)
    with pytest.raises(ConfigError, match=message):
        load_mapping(tmp_path / "m.toml")


def test_all_that_does_not_fit_of_mapping_and_table_is_told_at_once(tmp_path: Path):
    (tmp_path / "studies.csv").write_text("file,who,text,mark,pos\na,p,Clear.,Dragon,PA\n")
    (tmp_path / "m.toml").write_text(
        'sorce = "x"\n[columns]\nimgae = "file"\npatient_id = "patient"\nreport = "txt"\n'
        'labels = "mark"\nvieww = "pos"\nwho = "who"\n[labels]\nclosd = {}\n'
        '[labels.map]\nMass = { present = ["Mass"] }\n'
    )
    with pytest.raises(ConfigError) as caught:
        open_reader("csv", tmp_path, mapping=tmp_path / "m.toml", table=None)
    first, *problems = str(caught.value).splitlines()
    assert first == f"mapping {tmp_path / 'm.toml'} has 5 problems:"
    for number, (problem, parts) in enumerate(zip(
        problems,
        [
            ["the mapping has no key 'sorce' (source?); its keys are columns, delimiter"],
            ["[columns] has no key 'imgae' (image?), 'vieww' (view?), 'who'; its keys are age"],
            ["[labels] has no key 'closd' (closed?); its keys are blank, closed"],
            ["labels: finding names are lower case, single-spaced words; ['Mass'] are not"],
            [f"{tmp_path / 'studies.csv'}: no column 'patient' (patient_id), 'txt' (report); "
             "its columns are file, who, text, mark, pos"],
        ], strict=True,
    ), 1):  # fmt: skip
        assert problem.startswith(f"({number}) ") and all(part in problem for part in parts), (
            problem
        )
    assert "no id" not in str(caught.value)  # the misspelt key is the one that was missed


def test_missing_columns_and_unexplained_words_are_told_at_once(tmp_path: Path):
    text = "film,labels,view,split,film\na,Mass|Dragon,sideways,dev,b\n"
    columns = {"labels": "labels", "view": "view", "split": "split", "report": "text"}
    closed = {"*": ["edema", "mass", "masss"]}
    with pytest.raises(SourceError) as caught:
        read(tmp_path, text, columns=columns, labels={"closed": closed})
    first, *problems = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'studies.csv'} has 6 problems:"
    for part in (
        "no column 'patient' (patient_id), 'text' (report); its columns are film, labels, view",
        "the column 'film' (image) is there twice",
        "[labels.map] does not explain 'Dragon' (1)",
        "[views] does not explain 'sideways' (1)",
        "[splits] does not explain 'dev' (1)",
        "[labels.closed] * lists 'masss', which no label says; 'mass' is said",
    ):
        assert sum(part in problem for problem in problems) == 1, part


def test_a_damaged_row_hides_no_missing_column(tmp_path: Path):
    with pytest.raises(SourceError) as caught:
        read(tmp_path, 'film,who\n"a,p\nb,q\n')
    assert "no column 'patient'" in str(caught.value) and "line 3: " in str(caught.value)


def test_findings_are_not_called_misspelt_where_their_column_is_not_read(tmp_path: Path):
    given = {"map": MAPPED, "closed": {"*": ["nodule", "nodules"]}}
    with pytest.raises(SourceError) as caught:
        read(tmp_path, "film,patient\na,p\n", columns={"labels": "marks"}, labels=given)
    assert "no column 'marks' (labels)" in str(caught.value)
    assert "nodules" not in str(caught.value)


@pytest.mark.parametrize("rows", ["", "\n  \n"])
def test_a_header_without_rows_is_one_error_and_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: str
):
    given = {"map": MAPPED, "closed": {"*": ["edema", "nodule"]}}
    with pytest.raises(SourceError, match=r"studies\.csv: a header and no rows below it; "):
        read(tmp_path, f"film,patient,labels\n{rows}", columns={"labels": "labels"}, labels=given)
    assert caplog.messages == []


def test_a_table_of_broken_rows_alone_says_nothing_of_findings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    given = {"map": MAPPED, "closed": {"*": ["edema", "nodule"]}}
    text = "film,patient,labels\na,p,,\n"
    (out,) = read(tmp_path, text, columns={"labels": "labels"}, labels=given)
    assert isinstance(out, Excluded) and caplog.messages == []


def test_an_unknown_key_lists_the_known_ones(tmp_path: Path):
    (tmp_path / "m.toml").write_text('[columns]\npatient_id = "p"\nimgae = "film"\n')
    with pytest.raises(ConfigError) as caught:
        load_mapping(tmp_path / "m.toml")
    assert "image_id" in str(caught.value) and "impression" in str(caught.value)


def test_a_mapping_that_is_no_toml_is_refused(tmp_path: Path):
    (tmp_path / "m.toml").write_bytes(b"a = = 1")
    with pytest.raises(SourceError, match=r"no valid TOML.*; mend that place"):
        load_mapping(tmp_path / "m.toml")
    with pytest.raises(SourceError, match="cannot be read: Is a directory; give the TOML file"):
        load_mapping(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('table = "a.csv"\n', r"there is no \[columns\]"),
        ('[columns]\nimage = "film"\n', r"\[columns\] names no column patient_id"),
    ],
)
def test_a_mapping_that_does_not_say_whose_the_images_are_is_told_how(
    tmp_path: Path, text: str, said: str
):
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(ConfigError, match=said + r".*; add such lines as patient_id = .*data\.md"):
        load_mapping(tmp_path / "m.toml")


def test_readers_say_what_they_lack(tmp_path: Path):
    def fails(match: str, name: str = "csv", root: Path = tmp_path, **options) -> None:
        with pytest.raises(SourceError, match=match):
            open_reader(name, root, **{"mapping": None, "table": None, **options})

    fails("the readers are csv, dicom, own, chestxray14", name="mimic")
    fails("there is no folder", root=tmp_path / "no")
    fails("give it by --mapping")
    fails("leave --mapping and --table out", name="openi", table=tmp_path)


# Words that nobody explained.


def test_unexplained_words_stop_the_build_at_once_and_all_are_listed(tmp_path: Path):
    text = (
        "film,patient,labels,view,split\n"
        "a,p,Mass|Dragon,PA,train\nb,p,Dragon|Unicorn,sideways,dev\nc,p,todo,L,test\n"
    )
    columns = {"labels": "labels", "view": "view", "split": "split"}
    labels = {"unknown": ["todo"], "closed": {"*": ["mass"]}}
    with pytest.raises(SourceError) as caught:
        read(tmp_path, text, columns=columns, labels=labels)
    message = str(caught.value)
    assert "[labels.map] does not explain 'Dragon' (2), 'Unicorn' (1)" in message
    assert "[views] does not explain 'sideways' (1)" in message
    assert "[splits] does not explain 'dev' (1)" in message
    assert "Mass" not in message and "todo" not in message


def test_the_error_comes_before_the_first_record(tmp_path: Path):
    (tmp_path / "studies.csv").write_text("film,patient,view\na,p,PA\nb,p,sideways\n")
    mapping = CsvMapping.model_validate({"columns": IDS | {"view": "view"}})
    with pytest.raises(SourceError, match="sideways"):
        read_csv(tmp_path, mapping)  # not iterated


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; name a table with a header and rows"),
        ("film,who\na,p\n", r"no column 'patient' \(patient_id\); its columns are film, who"),
        ("Film,PATIENT\na,p\n", "its columns are Film, PATIENT"),
        ("film,patient,film\na,p,b\n", r"the column 'film' \(image\) is there twice"),
        ('film,patient\n"a,p\nb,q\n', r"line 3: .*mend the quotes"),
        ('film,patient\n"a"b,q\n', r"line 2: .*mend the quotes"),
    ],
)
def test_a_table_that_cannot_be_read_says_where_and_why(tmp_path: Path, text: str, message: str):
    with pytest.raises(SourceError, match=message):
        read(tmp_path, text)


def test_a_decimal_comma_of_excel_is_read(tmp_path: Path):
    text = "film;patient;e\na;p;1,0\nb;p;0,0\nc;p;-1,00\nd;p;0,5\n"
    columns = {"columns": {"e": "edema"}}
    *some, last = read(tmp_path, text, delimiter=";", labels=columns)
    assert [sample.labels for sample in samples(some)] == [{"edema": v} for v in (1, 0, -1)]
    assert isinstance(last, Excluded) and "'0,5'" in last.detail


@pytest.mark.parametrize("error", ["#N/A", "#NV", "#BEZUG!", "#REF!", "#n/a"])
@pytest.mark.parametrize("column", ["film", "patient", "text"])
def test_an_error_of_excel_is_no_value(tmp_path: Path, error: str, column: str):
    row = {"film": "a", "patient": "p", "text": "Effusion."} | {column: error}
    text = f"film,patient,text,other\n{','.join(row.values())},#N/A\nb,p,Nodule.,#N/A\n"
    first, second = read(tmp_path, text, columns={"report": "text"})
    assert isinstance(first, Excluded) and first.detail == f"{column} is {error}, an error of Excel"
    assert isinstance(second, Sample) and second.report == "Nodule."


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_the_first_row_of_a_table_without_a_header_is_not_printed(tmp_path: Path, sign: str):
    text = sign.join(["a.png", "Mueller Hans", "Large effusion"]) + "\n"
    with pytest.raises(SourceError, match=r"its first row, with . cells, has none") as caught:
        read(tmp_path, text, columns={"report": "text"})
    assert not any(word in str(caught.value) for word in ("Mueller", "effusion", "a.png"))


def test_reports_in_a_column_of_labels_are_not_printed(tmp_path: Path):
    long = "Mueller Hans has a large effusion on the right side, and a nodule."
    with pytest.raises(SourceError, match="1 cells of more than 60 characters") as caught:
        read(
            tmp_path,
            f'film,patient,labels\na,p,"{long}"\nb,p,Dragon\n',
            columns={"labels": "labels"},
        )
    assert "'Dragon' (1)" in str(caught.value) and "Mueller" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_that_is_not_utf_8_is_refused_with_the_line(tmp_path: Path, encoding: str):
    (tmp_path / "studies.csv").write_bytes("film,patient\na,Mül\n".encode(encoding))
    line = 2 if encoding == "latin-1" else 1
    with pytest.raises(SourceError, match=f"line {line}: not UTF-8; save the table as UTF-8"):
        read_csv(tmp_path, CsvMapping.model_validate({"columns": IDS}))


def test_a_missing_table_is_named(tmp_path: Path):
    mapping = CsvMapping.model_validate({"columns": IDS})
    for table, step in ((None, r"name it in the mapping \(table = "), (tmp_path, "another one by")):
        with pytest.raises(SourceError, match=rf"there is no table {tmp_path}.*; .*{step}") as said:
            read_csv(tmp_path, mapping, table)
        assert "quotes" not in str(said.value)


@pytest.mark.parametrize(("fields", "cells"), [(1, "a.png"), (3, "a.png,p,more")])
def test_a_row_of_another_length_is_excluded_with_its_number(tmp_path: Path, fields, cells):
    first, out, last = read(tmp_path, f"film,patient\nx.png,p\n{cells}\ny.png,q\n")
    detail = f"the row has {fields} fields, the header 2"
    assert out == Excluded(row=1, image_id="a.png", reason=Reason.BAD_VALUE, detail=detail)
    assert (first.image_id, last.image_id) == ("x.png", "y.png")


# Studies.


def test_images_of_one_patient_with_one_report_are_a_study(tmp_path: Path):
    text = "film,patient,report\na,p,Clear.\nb,p, Clear. \nc,p,Other.\nd,q,Clear.\ne,p,\nf,p,\n"
    records = samples(read(tmp_path, text, columns={"report": "report"}))
    study = {sample.image_id: sample.study_id for sample in records}
    assert study["a"] == study["b"]
    assert len({study[name] for name in "acdef"}) == 5
    assert (study["e"], study["f"]) == ("e", "f")


def test_a_study_column_wins_and_its_blank_falls_back(tmp_path: Path):
    text = "film,patient,study\na,p,s1\nb,p,s1\nc,p,\n"
    records = samples(read(tmp_path, text, columns={"study_id": "study"}))
    assert [sample.study_id for sample in records] == ["s1", "s1", "c"]


# Views, splits, age and sex.


def test_views_are_known_in_any_case_and_by_the_mapping(tmp_path: Path):
    words = ["PA", "pa", "AP", "ap", "L", "lateral", "LATERAL", "?", "", "Unknown", "ap SUPINE"]
    text = "film,patient,view\n" + "".join(f"{i},p,{word}\n" for i, word in enumerate(words))
    records = read(tmp_path, text, columns={"view": "view"}, views={"AP Supine": "AP"})
    views = [sample.view for sample in samples(records)]
    assert views == ["PA", "PA", "AP", "AP", "L", "L", "L", *["unknown"] * 3, "AP"]


def test_splits_are_known_in_any_case_and_by_the_mapping(tmp_path: Path):
    text = "film,patient,split\na,p,Train\nb,q,VAL\nc,r,validate\nd,s,\n"
    records = read(tmp_path, text, columns={"split": "split"}, splits={"Validate": "val"})
    assert [sample.split for sample in samples(records)] == ["train", "val", "val", None]


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("54", 54.0), ("54.5", 54.5), ("063Y", 63.0), ("018M", 1.5), ("120", 120.0),
        ("010d", 10 / 365.25), ("26W", 26 / 52.18), ("121", None), ("-5", None), ("148Y", None),
        ("abc", None), ("", None), ("inf", None), ("1e1", None), ("5-10", None), ("Y", None),
        ("000Y", None), ("0", None), ("0.0", None), ("000", None), ("000D", None), ("000M", None),
        ("45 years", 45.0), ("45-year-old", 45.0), ("45 y/o", 45.0), ("18 months", 1.5),
        ("45 yrs.", 45.0), ("45 my", None), ("years", None),
        ("058Y", 58.0), ("12M", 1.0), ("411", None), ("411Y", None), ("058y ", 58.0),
        ("58,5", 58.5), ("58 Jahre", 58.0), ("58 J.", 58.0), ("58 a\u00f1os", 58.0),
        ("58 ans", 58.0),
        ("6 Monate", 0.5), ("3 mois", 0.25), ("10 d\u00edas", 10 / 365.25), ("4 Wochen", 4 / 52.18),
        ("90+", 90.0), (">89", 89.0), ("\u2265 90 Y", 90.0), ("1,2,3", None), ("58 Jungen", None),
    ],
)  # fmt: skip
def test_ages_are_years_and_unlikely_ones_unknown(text: str, years: float | None):
    assert parse_age(text) == years


def test_sexes_are_known_by_word_and_others_unknown(tmp_path: Path):
    words = ["M", "male", "F", "FEMALE", "O", "", "?"]
    text = "film,patient,sex\n" + "".join(f"{i},p,{word}\n" for i, word in enumerate(words))
    sexes = [sample.sex for sample in samples(read(tmp_path, text, columns={"sex": "sex"}))]
    assert sexes == ["M", "M", "F", "F", None, None, None]


# Labels.

RULES = {
    "unknown": ["todo"],
    "closed": {"nih": ["mass", "no finding", "nodule"], "tb": ["tuberculosis"]},
    "map": {
        "No Finding": {"present": ["no finding"], "absent": ["pneumonia"]},
        "TB": {"present": ["tuberculosis"]},
        "No TB": {"absent": ["tuberculosis"]},
        "maybe mass": {"uncertain": ["mass"]},
    },
}


def labelled(folder: Path, source: str, cell: str, **rules) -> Sample | Excluded:
    text = f'film,patient,source,labels\na,p,{source},"{cell}"\n'
    columns = {"source": "source", "labels": "labels"}
    (record,) = read(folder, text, columns=columns, labels=RULES | rules)
    return record


@pytest.mark.ledger("unknown never absent")
@pytest.mark.parametrize(
    ("source", "cell", "labels"),
    [
        ("nih", "Mass", {"mass": 1, "no finding": 0, "nodule": 0}),
        ("nih", " MASS | nodule ", {"mass": 1, "no finding": 0, "nodule": 1}),
        ("nih", "No Finding", {"mass": 0, "no finding": 1, "nodule": 0, "pneumonia": 0}),
        ("nih", "maybe mass", {"mass": -1, "no finding": 0, "nodule": 0}),
        ("nih", "TB", {"mass": 0, "no finding": 0, "nodule": 0, "tuberculosis": 1}),
        ("tb", "No TB", {"tuberculosis": 0}),
        ("tb", "Mass", {"mass": 1, "tuberculosis": 0}),
        ("other", "Mass", {"mass": 1}),  # no list: what is not named is unknown
        ("nih", "todo", {}),
        ("nih", "Mass|todo", {"mass": 1}),  # not labelled to the end: the others are unknown
        ("nih", "", {}),
    ],
)
def test_a_listed_finding_is_absent_and_any_other_unknown(tmp_path, source, cell, labels):
    sample = labelled(tmp_path, source, cell)
    assert isinstance(sample, Sample)
    assert sample.labels == labels
    assert list(sample.labels) == sorted(sample.labels)


def test_the_words_of_the_source_are_kept(tmp_path: Path):
    sample = labelled(tmp_path, "nih", "Mass| todo")
    assert isinstance(sample, Sample) and sample.source_labels == ("Mass", "todo")


def test_a_blank_cell_can_mean_absent(tmp_path: Path):
    sample = labelled(tmp_path, "nih", "", blank="absent")
    assert isinstance(sample, Sample) and sample.labels == {"mass": 0, "no finding": 0, "nodule": 0}
    todo = labelled(tmp_path, "nih", "todo", blank="absent")
    assert isinstance(todo, Sample) and todo.labels == {}


def test_a_star_stands_for_sources_that_are_not_named(tmp_path: Path):
    closed = {"*": ["edema", "mass"], "tb": ["tuberculosis"]}
    sample = labelled(tmp_path, "other", "Mass", closed=closed)
    assert isinstance(sample, Sample) and sample.labels == {"edema": 0, "mass": 1}
    sample = labelled(tmp_path, "tb", "Mass", closed=closed)
    assert isinstance(sample, Sample) and sample.labels == {"mass": 1, "tuberculosis": 0}


def test_words_that_hold_a_comma_need_another_separator(tmp_path: Path):
    both = {"COVID-19, ARDS": {"present": ["ards", "covid-19"]}}
    sample = labelled(tmp_path, "nih", "COVID-19, ARDS", map=both, closed={})
    assert isinstance(sample, Sample) and sample.labels == {"ards": 1, "covid-19": 1}


def test_contradictory_labels_exclude_the_row_and_are_named(tmp_path: Path):
    out = labelled(tmp_path, "tb", "TB|No TB")
    assert isinstance(out, Excluded)
    assert out.reason == Reason.BAD_VALUE
    assert out.detail == "the labels TB, No TB contradict one another on ['tuberculosis']"


MAPPED = {"Effusion": {"present": ["pleural effusion"]}, "Knot": {"present": ["nodule"]}}


@pytest.mark.parametrize(
    ("listed", "labels", "meant"),
    [
        ("pleural efusion", "Effusion", "pleural effusion"),  # the mapping says the right one
        ("masss", "Mass", "mass"),  # the table does
        ("nodules", "Effusion", "nodule"),
    ],
)
def test_a_misspelt_finding_of_closed_is_named_with_the_one_that_is_meant(
    tmp_path: Path, listed: str, labels: str, meant: str
):
    closed = {"nih": ["mass", "pleural effusion"], "tb": ["edema", listed]}
    text = f"film,patient,labels\na,p,{labels}\n"
    with pytest.raises(SourceError) as caught:
        read(tmp_path, text, columns={"labels": "labels"}, labels={"map": MAPPED, "closed": closed})
    message = str(caught.value)
    assert f"[labels.closed] tb lists {listed!r}" in message and f"{meant!r}" in message
    assert "'edema'" not in message


def test_a_finding_that_no_image_has_may_be_listed_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    closed = {"*": ["edema", "mass", "nodule"]}
    text = "film,patient,labels\na,p,Mass\n"
    given = {"map": MAPPED, "closed": closed}
    (sample,) = samples(read(tmp_path, text, columns={"labels": "labels"}, labels=given))
    assert sample.labels == {"edema": 0, "mass": 1, "nodule": 0}
    (said,) = caplog.messages
    assert "no label says 'edema'; " in said and "absent" in said


def test_two_findings_with_like_names_are_told_apart_once_the_mapping_says_both(tmp_path: Path):
    both = MAPPED | {"Knots": {"present": ["nodules"]}}
    given = {"map": both, "closed": {"*": ["nodule", "nodules"]}}
    text = "film,patient,labels\na,p,Knot\n"
    (sample,) = samples(read(tmp_path, text, columns={"labels": "labels"}, labels=given))
    assert sample.labels == {"nodule": 1, "nodules": 0}


CHEXPERT = {"columns": {"Mass": "mass", "Pleural Effusion": "pleural effusion"}}


@pytest.mark.parametrize(
    ("cells", "blank", "labels"),
    [
        ("1.0,0.0", "unknown", {"mass": 1, "pleural effusion": 0}),
        ("-1.0,", "unknown", {"mass": -1}),
        (",", "unknown", {}),
        ("1,", "absent", {"mass": 1, "pleural effusion": 0}),
        ("nan,-1", "absent", {"mass": 0, "pleural effusion": -1}),
    ],
)
def test_a_column_for_each_finding_is_read_as_in_chexpert(tmp_path, cells, blank, labels):
    text = f"film,patient,Mass,Pleural Effusion\na,p,{cells}\n"
    (sample,) = samples(read(tmp_path, text, labels=CHEXPERT | {"blank": blank}))
    assert sample.labels == labels


@pytest.mark.parametrize("value", ["2", "perhaps", "0.5", "inf"])
def test_a_value_that_is_no_label_excludes_the_row_and_is_named(tmp_path: Path, value: str):
    (out,) = read(tmp_path, f"film,patient,Mass,Pleural Effusion\na,p,1,{value}\n", labels=CHEXPERT)
    assert isinstance(out, Excluded)
    assert out.detail.startswith(
        f"Pleural Effusion is {value!r}, not 1, 0, -1 or blank, nor a word of true, yes, "
    )


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("TRUE", 1), ("false", 0), ("ja", 1), ("Nein", 0), ("WAHR", 1), ("FALSCH", 0), ("oui", 1),
        ("No", 0), ("vorhanden", 1), ("KEIN", 0), ("evtl", -1),
    ],
)  # fmt: skip
def test_a_word_for_yes_or_no_is_a_label_and_more_can_be_named(tmp_path: Path, value, label):
    words = {"yes": ["Vorhanden"], "no": ["kein"], "maybe": ["evtl"]}
    text = f"film,patient,Mass,Pleural Effusion\na,p,1,{value}\n"
    (sample,) = samples(read(tmp_path, text, labels=CHEXPERT | words))
    assert sample.labels == {"mass": 1, "pleural effusion": label}


def test_a_word_of_the_mapping_wins_and_may_not_say_two_things(tmp_path: Path):
    text = "film,patient,Mass,Pleural Effusion\na,p,no,si\n"  # "no": not done, somewhere
    (sample,) = samples(read(tmp_path, text, labels=CHEXPERT | {"maybe": ["no"], "no": ["si"]}))
    assert sample.labels == {"mass": -1, "pleural effusion": 0}
    with pytest.raises(ValueError, match=r"\['x'\] stand twice"):
        read(tmp_path, text, labels=CHEXPERT | {"yes": ["x"], "no": ["X"]})


def test_a_build_that_leaves_nothing_says_why_and_lists_the_rows(tmp_path: Path):
    records = read(tmp_path, "film,patient,Mass,Pleural Effusion\na,p,evtl,1\n", labels=CHEXPERT)
    with pytest.raises(ManifestError, match=r"Mass is 'evtl', not 1.*excluded\.jsonl"):
        build_data(records, tmp_path, tmp_path / "out", image_size=8)
    assert "Mass is 'evtl'" in (tmp_path / "out" / "excluded.jsonl").read_text()
    with pytest.raises(ManifestError, match="Mass is 'evtl'"):  # and the folder is not in the way
        build_data(records, tmp_path, tmp_path / "out", image_size=8)


# Tables as spreadsheets leave them.

TEXT = "film;patient;report\na.png;Müller;Kein Erguß.\n"
WITH_REPORT = {"report": "report"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_a_table_is_read_in_the_encoding_and_by_the_delimiter_of_the_mapping(tmp_path, encoding):
    (tmp_path / "studies.csv").write_bytes(TEXT.encode(encoding))
    mapping = {"encoding": encoding, "delimiter": ";", "columns": IDS | WITH_REPORT}
    (sample,) = read_csv(tmp_path, CsvMapping.model_validate(mapping))
    assert (sample.image_id, sample.patient_id, sample.report) == ("a.png", "Müller", "Kein Erguß.")


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-16", "utf-16"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be"),
     ("latin-1", "cp1252"), ("cp1252", "cp1252")],
)  # fmt: skip
def test_a_table_in_another_encoding_is_refused_with_the_one_to_say(tmp_path, encoding, said):
    (tmp_path / "studies.csv").write_bytes(TEXT.encode(encoding))
    with pytest.raises(SourceError, match=rf'Excel.* say encoding = "{said}" in the mapping'):
        read_csv(tmp_path, CsvMapping.model_validate({"columns": IDS, "delimiter": ";"}))
    mapping = {"columns": IDS, "delimiter": ";", "encoding": said}
    assert len(list(read_csv(tmp_path, CsvMapping.model_validate(mapping)))) == 1


def test_a_wrong_encoding_of_the_mapping_is_told_with_the_right_one(tmp_path: Path):
    (tmp_path / "studies.csv").write_text(TEXT, "utf-8")
    mapping = {"columns": IDS, "delimiter": ";", "encoding": "utf-16"}
    with pytest.raises(SourceError, match=r'not utf-16; .*say encoding = "utf-8"'):
        read_csv(tmp_path, CsvMapping.model_validate(mapping))
    with pytest.raises(ValueError, match="no encoding 'utf8bom'"):
        CsvMapping.model_validate(mapping | {"encoding": "utf8bom"})


@pytest.mark.parametrize(
    ("written", "told", "said"),
    [("utf-8", "cp1252", "utf-8"), ("utf-8-sig", "latin-1", "utf-8"), ("utf-8", "l9", "utf-8"),
     ("cp1252", "latin-1", "cp1252"), ("utf-16-le", "cp1252", "utf-16-le")],
)  # fmt: skip
def test_an_encoding_that_reads_everything_is_refused_where_it_reads_nonsense(
    tmp_path: Path, written: str, told: str, said: str
):
    (tmp_path / "studies.csv").write_bytes(TEXT.replace("Kein", "„Kein“ 5 € für").encode(written))
    mapping = {"columns": IDS, "delimiter": ";", "encoding": told}
    with pytest.raises(SourceError, match=rf'not {told}; .*say encoding = "{said}" in the mapping'):
        read_csv(tmp_path, CsvMapping.model_validate(mapping))
    (one,) = read_csv(tmp_path, CsvMapping.model_validate(mapping | {"encoding": said}))
    assert one.patient_id == "Müller"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_umlauts_in_an_encoding_of_one_byte_are_read(tmp_path: Path, encoding: str):
    (tmp_path / "studies.csv").write_bytes(TEXT.encode("latin-1"))
    mapping = {"columns": IDS | WITH_REPORT, "delimiter": ";", "encoding": encoding}
    (one,) = read_csv(tmp_path, CsvMapping.model_validate(mapping))
    assert (one.patient_id, one.report) == ("Müller", "Kein Erguß.")


@pytest.mark.parametrize("kind", ["xlsx", "csv"])
def test_titles_above_the_header_are_told_with_the_row_that_is_meant(tmp_path: Path, kind: str):
    rows = [["Export of radiology, 2024"], ["page 1"], ["film", "patient"], ["a.png", "p"]]
    if kind == "xlsx":
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.active.merge_cells("A1:B1")
        book.save(tmp_path / "t.xlsx")
    else:
        (tmp_path / "t.csv").write_text("\n".join(map(",".join, rows)))
    mapping = CsvMapping.model_validate({"table": f"t.{kind}", "columns": IDS})
    with pytest.raises(SourceError, match="row that starts with 'film' has; delete the rows above"):
        read_csv(tmp_path, mapping)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("t.csv", b"PK\x03\x04"),
        ("t.xls", bytes.fromhex("d0cf11e0a1b11ae1")),
        ("t.txt", b"PK\x03\x04"),
    ],
)
def test_an_excel_file_of_another_name_or_age_is_told_how_to_be_saved(tmp_path, name, start):
    (tmp_path / name).write_bytes(start + bytes(600))
    mapping = CsvMapping.model_validate({"table": name, "columns": IDS})
    with pytest.raises(SourceError, match=r"Excel file.* by its content; save it as \.xlsx"):
        read_csv(tmp_path, mapping)


@pytest.mark.parametrize(("delimiter", "said"), [(";", '";"'), ("\t", r'"\\t"'), ("|", r'"\|"')])
def test_a_wrong_delimiter_is_told_with_the_right_one(tmp_path: Path, delimiter, said):
    with pytest.raises(SourceError, match=rf"say delimiter = {said} in the mapping"):
        read(tmp_path, TEXT.replace(";", delimiter))
    text = TEXT.replace(";", ",").replace("report", '"re, port"')
    with pytest.raises(SourceError, match=r'parted by commas, not by .*say delimiter = ","'):
        read(tmp_path, text, delimiter=";")


def test_the_line_by_which_excel_names_its_delimiter_is_obeyed(tmp_path: Path):
    (sample,) = samples(read(tmp_path, "sep=;\n" + TEXT, columns=WITH_REPORT))
    assert sample.patient_id == "Müller"


def test_an_excel_file_is_read_with_zeros_dates_and_booleans(tmp_path: Path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["film", "patient", "Mass", "Pleural Effusion", "day", None])
    sheet.append(["a.png", 42, True, False, datetime.date(2024, 5, 1), None])
    sheet["B2"].number_format = "00000000"
    sheet.append(["b.png", "0007", "ja", 1.0, None, None])
    sheet.append([None] * 6)
    book.save(tmp_path / "studies.xlsx")
    mapping = {"table": "studies.xlsx", "columns": IDS, "labels": CHEXPERT}
    one, two = read_csv(tmp_path, CsvMapping.model_validate(mapping))
    assert (one.patient_id, one.labels) == ("00000042", {"mass": 1, "pleural effusion": 0})
    assert (two.patient_id, two.labels) == ("0007", {"mass": 1, "pleural effusion": 1})
    rows = list(read_rows(tmp_path / "studies.xlsx", ["day"]))
    assert [row.cells["day"] for row in rows] == ["2024-05-01", ""]
    (tmp_path / "studies.xlsx").write_text("film,patient\n")
    with pytest.raises(SourceError, match="cannot be read as an Excel file"):
        read_csv(tmp_path, CsvMapping.model_validate(mapping))


def test_without_the_extra_an_excel_file_is_told_how(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"pip install 'mmclip\[xlsx\]', or save .* CSV UTF-8"):
        read_csv(tmp_path, CsvMapping.model_validate({"table": "t.xlsx", "columns": IDS}))


def test_both_ways_to_name_a_table_start_from_the_same_folders(tmp_path: Path, monkeypatch):
    root, here = tmp_path / "root", tmp_path / "here"
    root.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (root / "below.csv").write_text("film,patient\nroot.png,p\n")
    (here / "below.csv").write_text("film,patient\nhere.png,p\n")
    (here / "beside.csv").write_text("film,patient\nbeside.png,p\n")
    for name, image_id in (("below.csv", "root.png"), ("beside.csv", "beside.png")):
        named = CsvMapping.model_validate({"columns": IDS, "table": name})
        given = CsvMapping.model_validate({"columns": IDS})
        for records in (read_csv(root, named), read_csv(root, given, Path(name))):
            assert [sample.image_id for sample in samples(list(records))] == [image_id]


def test_two_columns_that_contradict_one_another_are_named(tmp_path: Path):
    columns = {"columns": {"Mass": "mass", "Lesion": "mass"}}
    (out,) = read(tmp_path, "film,patient,Mass,Lesion\na,p,1,0\n", labels=columns)
    assert isinstance(out, Excluded)
    assert out.detail == "the labels Mass, Lesion contradict one another on ['mass']"


def test_the_example_mapping_is_valid():
    assert load_mapping(EXAMPLE).columns.image == "film"


def test_a_word_that_is_a_sign_of_a_finding_leaves_it_unknown(tmp_path: Path):
    labels = {
        "map": {"blunting": {"present": ["blunting"], "unknown": ["pleural effusion"]}},
        "closed": {"*": ["mass", "pleural effusion"]},
    }
    text = "film,patient,words\na,p,blunting\nb,p,Mass|blunting\nc,p,blunting|pleural effusion\n"
    one, two, three = samples(read(tmp_path, text, columns={"labels": "words"}, labels=labels))
    assert one.labels == {"blunting": 1, "mass": 0}
    assert two.labels == {"blunting": 1, "mass": 1}
    assert three.labels == {"blunting": 1, "mass": 0, "pleural effusion": 1}


def test_a_word_that_says_two_things_of_a_finding_is_refused(tmp_path: Path):
    labels = {"map": {"sign": {"present": ["mass"], "unknown": ["mass"]}}}
    with pytest.raises(ValueError, match="says one thing of a finding, and names mass twice"):
        read(tmp_path, "film,patient,words\n", columns={"labels": "words"}, labels=labels)


def test_a_mapping_says_who_made_the_labels_of_the_rows_that_have_some(tmp_path: Path):
    text = "f,p,mass,edema\na.png,1,1,\nb.png,2,,-1\nc.png,3,,\n"
    columns = {"image": "f", "patient_id": "p"}
    labels = {"columns": {"mass": "mass", "edema": "edema"}, "origin": "report-reader"}
    found = read(tmp_path, text, columns=columns, labels=labels)
    assert [sample.label_origin for sample in found] == ["report-reader", "report-reader", None]
    with pytest.raises(ValueError, match=r"labels.origin"):
        read(tmp_path, text, columns=columns, labels={**labels, "origin": "me"})


# What a table is packed in, and what is no table.

ROW = "film,patient\na.png,p\n"


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, ROW if name.lower().endswith((".csv", ".tsv", ".txt")) else "x")


@pytest.mark.parametrize("name", ["t.csv", "t.CSV.GZ", "t.csv.gz", "t.csv.bz2"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_table_is_read_whatever_its_name_says(tmp_path: Path, name: str, pack):
    (tmp_path / name).write_bytes(pack(ROW.encode()))
    (one,) = read_csv(tmp_path, CsvMapping.model_validate({"table": name, "columns": IDS}))
    assert one.patient_id == "p"


@pytest.mark.parametrize("name", ["t.csv.zip", "t.csv", "t.ZIP"])
@pytest.mark.parametrize(
    "inside", [["T.CSV"], ["a/t.csv", "__MACOSX/a/._t.csv"], ["t.txt", "x.md"]]
)
def test_the_one_table_of_an_archive_is_read_beside_what_systems_put_there(tmp_path, name, inside):
    zipped(tmp_path / name, *inside)
    mapping = CsvMapping.model_validate({"table": name, "columns": IDS})
    assert [one.patient_id for one in read_csv(tmp_path, mapping)] == ["p"]
    zipped(tmp_path / name, *inside, "second.csv", "third.csv")
    with pytest.raises(SourceError, match="tables, not one"):
        read_csv(tmp_path, mapping)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PAR1" + bytes(90), "a Parquet file"), (b"%PDF-1.7", "a PDF"),
        (b'{"film": "a", "patient": "p", "report": "secret"}\n', "JSON"),
        (b'\xef\xbb\xbf [\n {"film": "secret"}]', "JSON"),
        (b"\n<!DOCTYPE html><title>secret</title>", "a web page"),
        (b"<?xml version='1.0'?>", "XML"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_named_and_not_quoted(tmp_path: Path, content: bytes, kind: str):
    (tmp_path / "t.csv").write_bytes(content)
    mapping = CsvMapping.model_validate({"table": "t.csv", "columns": IDS | WITH_REPORT})
    with pytest.raises(SourceError, match=rf"is {kind}.* by its content; save it as CSV") as error:
        read_csv(tmp_path, mapping)
    assert "secret" not in str(error.value)
    assert list(read(tmp_path, "[film],patient\na.png,p\n", columns={"image": "[film]"}))


def workbook(path: Path, *rows: list, title: str | None = None, hidden: bool = False):
    """An Excel file; with a title that stands alone in a first sheet."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    if title is not None:
        book.active.append([title])
        book.active.sheet_state = "hidden" if hidden else "visible"
    sheet = book.active if title is None else book.create_sheet("data")
    for row in rows:
        sheet.append(row)
    book.active = sheet
    book.save(path)
    return CsvMapping.model_validate({"table": path.name, "columns": IDS})


def test_the_first_sheet_that_is_shown_is_read_and_a_later_one_is_proposed(tmp_path: Path):
    rows = ["film", "patient"], ["a.png", "p"]
    mapping = workbook(tmp_path / "t.xlsx", *rows, title="notes", hidden=True)
    assert [one.patient_id for one in read_csv(tmp_path, mapping)] == ["p"]
    mapping = workbook(tmp_path / "t.xlsx", *rows, title="notes")
    with pytest.raises(SourceError, match="and the sheet 'data' has; move that one to the front"):
        read_csv(tmp_path, mapping)


def test_what_an_excel_file_says_of_its_size_does_not_cut_it(tmp_path: Path):
    mapping = workbook(tmp_path / "t.xlsx", ["film", "patient"], ["a.png", "p"])
    with zipfile.ZipFile(tmp_path / "t.xlsx") as book:
        parts = {name: book.read(name) for name in book.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    assert b'<dimension ref="A1:B2"' in parts[sheet]
    parts[sheet] = parts[sheet].replace(b'<dimension ref="A1:B2"', b'<dimension ref="A1"')
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w") as book:
        for name, content in parts.items():
            book.writestr(name, content)
    assert [one.patient_id for one in read_csv(tmp_path, mapping)] == ["p"]


def test_a_formula_without_its_value_excludes_its_row_where_it_matters(tmp_path: Path):
    rows = ["a.png", '="p"&1', 1], ["b.png", "p2", "=1+1"]
    mapping = workbook(tmp_path / "t.xlsx", ["film", "patient", "unused"], *rows)
    one, two = read_csv(tmp_path, mapping)
    assert (one.reason, one.detail) == (
        Reason.BAD_VALUE,
        "patient is a formula without a value; open the table in Excel and save it",
    )
    assert two.patient_id == "p2"
    with zipfile.ZipFile(tmp_path / "t.xlsx") as book:
        parts = {name: book.read(name) for name in book.namelist()}
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w") as book:  # as Excel saves it, one text empty
        for name, content in parts.items():
            content = content.replace(
                b'<c r="B2"><f>"p"&amp;1</f><v', b'<c r="B2" t="str"><f>""</f><v'
            )
            content = content.replace(b'<c r="C3"><f>1+1</f><v/>', b'<c r="C3"><f>1+1</f><v>2</v>')
            book.writestr(name, content)
    assert [one.patient_id for one in read_csv(tmp_path, mapping)] == ["", "p2"]


def test_what_a_number_format_puts_beside_zeros_is_part_of_an_id(tmp_path: Path):
    openpyxl = pytest.importorskip("openpyxl")
    forms = {"000000": "000042", '"P"0000': "P0042", r"0000\-\A": "0042-A", "0.00": "42", "0": "42"}
    book = openpyxl.Workbook()
    book.active.append(["film", "patient"])
    for row, form in enumerate(forms, 2):
        book.active.append([f"{row}.png", 42])
        book.active.cell(row, 2).number_format = form
    book.save(tmp_path / "t.xlsx")
    mapping = CsvMapping.model_validate({"table": "t.xlsx", "columns": IDS})
    assert [one.patient_id for one in read_csv(tmp_path, mapping)] == list(forms.values())


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("Positive", 1), ("neg", 0), ("present", 1), ("Absent", 0), ("uncertain", -1),
        ("\u22121", -1), ("positivo", 1), ("Négatif", 0), ("+1", 1), ("-1.00", -1),
    ],
)  # fmt: skip
def test_usual_words_and_signs_of_labels_need_no_entry(tmp_path: Path, word: str, label: int):
    labels = {"columns": {"Mass": "mass"}}
    (one,) = read(tmp_path, f"film,patient,Mass\na.png,p,{word}\n", labels=labels)
    assert one.labels == {"mass": label}


@pytest.mark.parametrize(("said", "sex"), [("w", "F"), ("Weiblich", "F"), ("männlich", "M"),
                                           ("FEMALE", "F"), ("Frau", "F"), ("Mujer", "F"),
                                           ("hombre", "M"), ("masc.", "M"), ("O", None),
                                           ("", None)])  # fmt: skip
def test_a_sex_is_read_in_some_languages(tmp_path: Path, said: str, sex: str | None):
    text = f"film,patient,sex\na.png,p,{said}\n"
    assert read(tmp_path, text, columns={"sex": "sex"})[0].sex == sex


@pytest.mark.parametrize("said", ["-", "?", "--", "nan", "...", "''"])
def test_a_sign_is_nobodys_id(tmp_path: Path, said: str):
    (one,) = read(tmp_path, f"film,patient\na.png,{said}\n")
    assert one.patient_id == ""  # which excludes the row by its reason
    studies = f"film,patient,s\na.png,p,{said}\nb.png,p,{said}\n"
    assert {r.study_id for r in read(tmp_path, studies, columns={"study_id": "s"})} == {
        "a.png", "b.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "n"), [("1 1.0 01 2", 2), ("1 10 100", 0), ("007 7 7 007", 1), ("a1 A1 a10", 0)]
)
def test_patients_who_differ_in_zeros_alone_are_counted(tmp_path: Path, caplog, ids: str, n: int):
    rows = "".join(f"{i}.png,{name}\n" for i, name in enumerate(ids.split()))
    read(tmp_path, f"film,patient\n{rows}")
    assert (f"{n} patient ids are those of others but for" in caplog.text) == bool(n)
    assert bool(caplog.text) == bool(n)


@pytest.mark.parametrize("said", ['"=""00123"""', "'00123", " 00123\u00a0"])
def test_what_keeps_the_zeros_of_an_id_in_excel_is_no_part_of_it(tmp_path: Path, said: str):
    assert read(tmp_path, f"film,patient\na.png,{said}\n")[0].patient_id == "00123"


def test_a_report_longer_than_pythons_limit_of_a_cell_is_read(tmp_path: Path):
    text = f'film,patient,report\na.png,p,"FINDINGS: {"Small effusion. " * 10_000}"\n'
    (one,) = read(tmp_path, text, columns={"report": "report"})
    assert one.findings.startswith("Small effusion. Small")


def test_a_second_byte_order_mark_hides_no_column(tmp_path: Path):
    (tmp_path / "studies.csv").write_text("\ufeff\ufefffilm,patient\na.png,p\n", "utf-8")
    mapping = CsvMapping.model_validate({"columns": IDS})
    assert [r.image_id for r in read_csv(tmp_path, mapping)] == ["a.png"]


@pytest.mark.parametrize("said", ["tab", "TAB", "\\t", "\t"])
def test_a_tab_may_be_named(tmp_path: Path, said: str):
    assert read(tmp_path, "film\tpatient\na.png\tp\n", delimiter=said)[0].patient_id == "p"
    for wrong in ("", "||", "semi"):
        with pytest.raises(ValidationError, match=r'is no single character; say ","'):
            CsvMapping.model_validate({"columns": IDS, "delimiter": wrong})


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_table", ["NFC", "NFD"])
def test_a_path_with_accents_is_found_however_they_are_written(tmp_path, on_disk, in_table):
    name = "Müller Änne/é.png"
    path = tmp_path / unicodedata.normalize(on_disk, name)
    path.parent.mkdir()
    path.write_bytes(b"x")
    said = unicodedata.normalize(in_table, name)
    (one,) = read(tmp_path, f"film,patient\n{said},p\n")
    assert (tmp_path / one.image).is_file() and one.image_id == said


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("cp1251", "Петров"),
        ("gb18030", "两肺清晰"),
        ("shift_jis", "胸部正面"),
        ("cp1253", "πνεύμων"),
    ],
)
def test_letters_that_are_not_western_are_not_proposed_to_be(tmp_path: Path, encoding, name):
    (tmp_path / "t.csv").write_bytes(f"film,patient\na.png,{name}\n".encode(encoding))
    rules = {"table": "t.csv", "columns": IDS}
    with pytest.raises(SourceError, match="say its encoding in the mapping, such as") as error:
        read_csv(tmp_path, CsvMapping.model_validate(rules))
    assert "cp1252" not in str(error.value)
    for wrong in ("cp1252", "latin-1"):
        with pytest.raises(SourceError, match="say its encoding in the mapping"):
            read_csv(tmp_path, CsvMapping.model_validate({**rules, "encoding": wrong}))
    (one,) = read_csv(tmp_path, CsvMapping.model_validate({**rules, "encoding": encoding}))
    assert one.patient_id == name
