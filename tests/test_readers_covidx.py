import os
from collections import Counter
from pathlib import Path

import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.covidx import read_covidx
from mmclip.data.sample import ABSENT, PRESENT, Reason
from tests.made_files import encoded, ramp
from tests.published import lay_out, parted

IMAGE = encoded(ramp())
# Rows as in the real lists, one of each collection.
TRAIN = """\
5 ARDSSevere.png negative cohen
ANON56 CR.1.2.840.113564.1722810170.20200317090830828260.1003000225002.png negative actmed
COVID 1 COVID(1).png positive sirm
COVID_2 COVID(2).png positive sirm
419639-000238 MIDRC-RICORD-1C-419639-000238-46556-1.png positive ricord
419639-000238 MIDRC-RICORD-1C-419639-000238-46556-2.png positive ricord

fe267737-99e1-42b0-ac7f-ffb6f235037a fe267737-99e1-42b0-ac7f-ffb6f235037a.png negative rnsa
"""
VAL = "5 other.jpeg positive bimcv\n"
TEST = "47c78742-4998-4878-aec4-37b11b1354ac 47c78742-4998-4878-aec4-37b11b1354ac.png negative rsna"


def files_of(text: str) -> list[str]:
    return [line.split()[-3] for line in text.splitlines() if line]


def layout(train: str, val: str, test: str, flat: bool = False) -> dict[str, bytes | str]:
    lists = {"train.txt": train, "val.txt": val, "test.txt": test}
    return {
        **{name: text for name, text in lists.items() if text},
        **{
            f"{'all' if flat else name[:-4]}/{file}": IMAGE
            for name, text in lists.items()
            for file in files_of(text)
        },
    }


@pytest.mark.parametrize("flat", [False, True])
def test_every_row_of_each_list_is_an_image_of_that_split(tmp_path: Path, flat: bool):
    root = lay_out(tmp_path / "raw", layout(TRAIN, VAL, TEST, flat))
    meta = build_data(read_covidx(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_samples"]) == (9, 9)
    samples = read_manifest(tmp_path / "out")
    assert [(f.patient_id, f.split, f.labels["covid-19"], f.source_labels[1]) for f in samples] == [
        ("cohen/5", "train", ABSENT, "cohen"),
        ("actmed/ANON56", "train", ABSENT, "actmed"),
        ("sirm/COVID 1", "train", PRESENT, "sirm"),
        ("sirm/COVID_2", "train", PRESENT, "sirm"),
        ("ricord/419639-000238", "train", PRESENT, "ricord"),
        ("ricord/419639-000238", "train", PRESENT, "ricord"),
        ("rsna/fe267737-99e1-42b0-ac7f-ffb6f235037a", "train", ABSENT, "rsna"),
        ("bimcv/5", "val", PRESENT, "bimcv"),  # not the 5 of cohen
        ("rsna/47c78742-4998-4878-aec4-37b11b1354ac", "test", ABSENT, "rsna"),
    ]
    assert {sample.label_origin for sample in samples} == {"diagnosis"}
    assert [sample.image_id for sample in samples] == files_of(TRAIN) + files_of(VAL) + files_of(
        TEST
    )


def test_without_a_list_for_val_there_is_no_val(tmp_path: Path):
    samples, _ = parted(read_covidx(lay_out(tmp_path, layout(TRAIN, "", TEST))))
    assert Counter(sample.split for sample in samples) == {"train": 7, "test": 1}


def test_lists_of_three_classes_tell_normal_from_other_pneumonia(tmp_path: Path):
    words = ("normal", "pneumonia", "COVID-19")
    train = "".join(f"{i} {i}.png {word} cohen\n" for i, word in enumerate(words))
    samples, _ = parted(read_covidx(lay_out(tmp_path, layout(train, "", TEST))))
    assert [sample.labels for sample in samples[:3]] == [
        {"covid-19": ABSENT, "no finding": PRESENT, "pneumonia": ABSENT},
        {"covid-19": ABSENT, "no finding": ABSENT, "pneumonia": PRESENT},
        {"covid-19": PRESENT},
    ]


def test_a_row_that_is_not_four_words_or_has_another_class_is_left_out(tmp_path: Path):
    train = "1 a.png positive\n2 b.png level2 ricord\n"
    files = {"train.txt": train, "test.txt": TEST, "c.png": IMAGE}
    _, excluded = parted(read_covidx(lay_out(tmp_path, files)))
    assert [(out.row, out.image_id, out.reason) for out in excluded] == [
        (0, "a.png", Reason.BAD_VALUE), (1, "b.png", Reason.BAD_VALUE),
    ]  # fmt: skip
    assert excluded[0].detail == "'1 a.png positive' is no 'patient file class source'"
    assert "the label 'level2' is not among the words of covidx" in excluded[1].detail


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": IMAGE}, r"holds no train\.txt; it comes from https"),
        ({"a.png": IMAGE, "train.txt": TRAIN}, r"holds no test\.txt; it comes from https"),
        ({"train.txt": TRAIN, "test.txt": TEST}, r"no image .*; images come from https"),
    ],
)
def test_a_missing_piece_is_one_line(tmp_path: Path, files: dict, message: str):
    with pytest.raises(SourceError, match=message):
        read_covidx(lay_out(tmp_path, files))


# The real lists of the repository COVID-Net, in its folder labels/.


def test_every_row_of_the_real_lists_is_an_image(tmp_path: Path):
    folder = Path(os.environ.get("MMCLIP_COVIDX", ""))
    lists = {split: folder / f"{split}_COVIDx9B.txt" for split in ("train", "test")}
    if not all(path.is_file() for path in lists.values()):
        pytest.skip("needs labels/ of github.com/lindawangg/COVID-Net; name it by MMCLIP_COVIDX")
    lay_out(tmp_path, {"a.png": IMAGE, **{f"{s}.txt": path for s, path in lists.items()}})
    samples, excluded = parted(read_covidx(tmp_path))
    assert (len(samples), len(excluded)) == (30_882, 0)
    assert Counter((f.split, f.labels["covid-19"]) for f in samples) == {
        ("train", PRESENT): 16_490, ("train", ABSENT): 13_992,
        ("test", PRESENT): 200, ("test", ABSENT): 200,
    }  # fmt: skip
    assert len({sample.patient_id for sample in samples}) == 17_026
