import logging
from pathlib import Path

import pytest

from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.ingest.sources import READERS, open_reader
from tests.published import lay_out
from tests.test_readers_chestxray14 import IMAGES, NEW, TABLE
from tests.test_readers_siim import LAYOUTS


@pytest.mark.parametrize("name", [name for name in READERS if name != "csv"])
def test_an_empty_folder_is_one_line_that_says_what_is_missing(tmp_path: Path, name: str):
    with pytest.raises(SourceError, match=r"(holds|hold) (no|none|neither) ") as caught:
        open_reader(name, tmp_path, mapping=None, table=None)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_published_data_set_takes_no_mapping_and_no_file(tmp_path: Path):
    with pytest.raises(SourceError, match="siim has a layout of its own; leave --mapping"):
        open_reader("siim", tmp_path, mapping=tmp_path, table=None)
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="file is a file; give the folder"):
        open_reader("siim", tmp_path / "file", mapping=None, table=None)


def test_a_reader_says_that_patients_are_unknown_and_others_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "mmclip")
    siim, nih = lay_out(tmp_path / "a", LAYOUTS["stage 1"]), {TABLE: NEW, **IMAGES}
    assert len(list(open_reader("chestxray14", lay_out(tmp_path / "b", nih), **NO_TABLE))) == 5
    assert not caplog.records
    assert len(list(open_reader("siim", siim, **NO_TABLE))) == 3
    assert "siim: patients unknown, each image counts as one" in caplog.text


NO_TABLE = {"mapping": None, "table": None}
