import gzip
import io
import logging
import warnings
import zipfile
from pathlib import Path

import pytest

from mmclip.data.ingest.csv_rows import SourceError, header_of, read_rows
from mmclip.data.readers.files import (
    DicomFacts,
    dicom_facts,
    find_table,
    index_images,
    look_for_table,
)
from tests.made_files import NAME, NUMBER, dicom, encoded, ramp
from tests.published import lay_out

TABLE = '\ufeffid, word \n1," a, b "\n\n2\n3,c\n'


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, TABLE)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", TABLE.encode()),
        ("a.csv.gz", gzip.compress(TABLE.encode())),
        ("a.csv.zip", zipped("a.csv", "__MACOSX.txt")),
    ],
    ids=["plain", "gz", "zip"],
)
def test_a_table_is_read_plain_or_packed(tmp_path: Path, name: str, content: bytes):
    lay_out(tmp_path, {name: content})
    path = find_table(tmp_path, ("b.csv", "a.csv"), "the shop")
    assert header_of(path) == ["id", "word"]
    assert [(row.cells, row.problem) for row in read_rows(path, ("word",))] == [
        ({"id": "1", "word": "a, b"}, ""),
        ({"id": "2"}, "the row has 1 fields, the header 2"),
        ({"id": "3", "word": "c"}, ""),
    ]


def test_a_comma_too_many_is_told_even_where_the_last_field_is_empty(tmp_path: Path):
    path = lay_out(tmp_path, {"a.csv": "id,text,end,,\n1,a,b,,\n2,a,b\n3,a, and b,,,\n"}) / "a.csv"
    assert [row.problem for row in read_rows(path, ("id",))] == [
        "", "", "the row has 6 fields, the header 3",
    ]  # fmt: skip


def test_a_table_that_is_missing_is_one_line_that_says_where_it_comes_from(tmp_path: Path):
    with pytest.raises(SourceError, match=r"holds no a\.csv or b\.csv; it comes from the shop"):
        find_table(tmp_path, ("a.csv", "b.csv"), "the shop")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"Word,id\n1,2\n", "no column 'word'; its columns are Word, id; download"),
        (
            "a.csv",
            b"id\n1\n",
            "no column 'word'; its first row, with 1 cells, has none of the names",
        ),
        ("a.csv", b"", "a.csv is empty; name a table"),
        ("a.csv", b"id,word\n1,\xff\n", "line 2: not UTF-8; .*download it again"),
        ("a.csv.gz", gzip.compress(b"id,word\n1,\xff\n"), "line 2: not UTF-8"),
        ("a.csv", b'id,word\n1,"x\n', "line 2: unexpected end of data; download it again"),
        ("a.csv", b"word,id,word\n", "has word twice; download it again"),
        ("a.csv.gz", gzip.compress(TABLE.encode() * 99)[:-9], "cannot be read"),
        ("a.csv.gz", b"<html>", r"is a web page \(HTML\) by its content; download it again"),
        ("a.csv.zip", b"<html>", "cannot be read"),
        ("a.csv.zip", zipped("a.csv", "b.csv"), "2 tables, not one; unpack it"),
    ],
    ids=[
        "a column",
        "no header",
        "empty",
        "not UTF-8",
        "not UTF-8, packed",
        "an open quote",
        "a column twice",
        "cut gz",
        "no gz",
        "no zip",
        "two in zip",
    ],
)
def test_a_damaged_table_is_one_line(tmp_path: Path, name: str, content: bytes, message: str):
    lay_out(tmp_path, {name: content})
    with pytest.raises(SourceError, match=message):
        list(read_rows(tmp_path / name, ("word",)))


def test_images_are_found_by_name_in_any_folder_the_first_path_first(tmp_path: Path):
    names = ("b/x.PNG", "a/c/x.png", "a/1.2.3.840.png", "y.dcm", "a/notes.txt", "z.png")
    lay_out(tmp_path, dict.fromkeys(names, b"."))
    assert index_images(tmp_path, {".png"}, "the shop") == {
        "x": "a/c/x.png", "1.2.3.840": "a/1.2.3.840.png", "z": "z.png",
    }  # fmt: skip
    with pytest.raises(SourceError, match=r"no image \(\*\.jpg\); images come from the shop"):
        index_images(tmp_path, {".jpg"}, "the shop")


def test_view_age_and_sex_are_read_from_a_header_and_nothing_is_said_of_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    tags = {"ViewPosition": "AP", "PatientAge": "063Y", "PatientSex": "F"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of writing an age that breaks the standard
        odd = dicom(ramp(), ViewPosition="LL", PatientAge="155", PatientSex="O")
        files = {"a": dicom(ramp(), **tags), "b": odd, "c": dicom(ramp()), "d": encoded(ramp())}
    lay_out(tmp_path, {**files, "e": b"", "f": files["a"][:300]})
    caplog.clear()  # of what writing said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = {name: dicom_facts(tmp_path / name) for name in "abcdefg"}  # g is not there
    assert facts.pop("a") == DicomFacts("AP", 63.0, "F")
    assert facts.pop("b") == DicomFacts("L", None, None)
    assert set(facts.values()) == {DicomFacts()}
    assert not any(secret in caplog.text for secret in (NAME, NUMBER, "155"))


def test_a_table_is_looked_for_in_the_folders_of_the_root_too(tmp_path: Path):
    lay_out(tmp_path, {"b/t.csv": "", "a/t.csv.gz": b"", "c/d/u.csv": "", "t.csv/t.csv": ""})
    assert look_for_table(tmp_path, ("t.csv",)) == tmp_path / "a" / "t.csv.gz"
    assert look_for_table(tmp_path, ("u.csv",)) is None
    lay_out(tmp_path, {"u.csv": ""})
    assert look_for_table(tmp_path, ("u.csv", "t.csv")) == tmp_path / "u.csv"
