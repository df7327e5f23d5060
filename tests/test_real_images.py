"""bench/real_images.py: what an arm may read, and what stands beside its numbers."""

import csv
import sys
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmclip.data.readers.chestxray14 import read_chestxray14_boxes

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        import real_images
    finally:
        sys.path.remove(str(BENCH))
    return real_images


def table_of(bench, tmp_path: Path, **arm: bool) -> list[dict[str, str]]:
    (tmp_path / "studies.csv").write_text(
        "film,source,split,report\n"
        'a.png,ieee8023,train,"COVID-19 by RT-PCR of a swab. Left opacity."\n'
        "b.png,hannover,train,\n"
        "c.png,openist,train,\n"
        "d.png,nih1024,train,\n"
        "e.png,tb128,train,\n"
        "f.png,tb128,val,\n",
        "utf-8",
    )
    bench.write_table(tmp_path, tmp_path / "out" / "t.csv", **arm)
    with (tmp_path / "out" / "t.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_labelled_images_train_by_their_source_and_those_that_are_scored_stay(
    bench, tmp_path: Path
):
    without = table_of(bench, tmp_path, one_label=False, no_covid=False)
    assert [line["film"] for line in without] == ["a.png", "d.png", "f.png"]
    with_them = table_of(bench, tmp_path, one_label=True, no_covid=False)
    assert [line["film"] for line in with_them] == ["a.png", "b.png", "c.png", "d.png", "f.png"]


def test_words_for_covid_and_its_test_are_taken_out_and_nothing_else(bench, tmp_path: Path):
    line, *_ = table_of(bench, tmp_path, one_label=False, no_covid=True)
    assert line["report"].split() == ["by", "of", "a", ".", "Left", "opacity."]
    as_it_was, *_ = table_of(bench, tmp_path, one_label=False, no_covid=False)
    assert "COVID-19 by RT-PCR" in as_it_was["report"]
    kept = "discovered PCRs recovered swabbed"
    assert bench.COVID.sub("", kept) == kept
    named = "SARS-CoV-2, 2019-nCoV, coronavirus, novel coronavirus, Covid 19, covid"
    assert bench.COVID.sub("", named).strip(" ,") == ""


def test_among_the_sick_images_without_a_finding_do_not_count(bench):
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 0], [0, 1], [0, 0]], float)
    scores = np.array([[0, 0.9], [0, 0.9], [0, 0.8], [0, 0.1], [0, 0.7], [0, 0.2]])
    names = ["no finding", "mass"]
    test = SimpleNamespace(
        names=lambda: names, labels=labels, scores=scores, patients=lambda: list("abcdef")
    )
    result = SimpleNamespace(test=test)
    assert bench.among_the_sick(result)["mass"] == 1.0  # over all images it would be 0.5
    names[0] = "nodule"
    assert bench.among_the_sick(result) is None


def test_an_arm_is_tiny_with_its_overrides_and_an_unknown_one_is_refused(bench):
    config = bench.config_of("whole+one_label+no_covid", 3, ["train.steps=5"])
    assert (config.loss.image, config.loss.text, config.unpaired.rows_per_pair) == (1, 1, 1)
    assert (config.train.steps, config.train.seed) == (5, 3)
    with pytest.raises(KeyError):
        bench.config_of("half", 0, [])


def test_boxes_of_a_table_are_read_as_chestxray14_publishes_them(tmp_path: Path):
    sys.path.insert(0, str(BENCH))
    try:
        import real_pointing
    finally:
        sys.path.remove(str(BENCH))
    table = tmp_path / "boxes.csv"
    table.write_text(
        "folder,image,finding,x,y,w,h,film,source,split\n"
        "cxr,a.png,Mass,10.5,20,30,40.25,images/a.jpg,nih64,train\n",
        "utf-8",
    )
    real_pointing.write_boxes(real_pointing.read_boxes(table), tmp_path)
    (box,) = read_chestxray14_boxes(tmp_path)
    assert astuple(box)[:6] == ("images/a.jpg", "mass", 10.5, 20.0, 30.0, 40.25)
