"""Nothing of a patient or of this machine is in what is shared, and doctor says what would be."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmclip.checkpoint import load_checkpoint
from mmclip.data.manifest import read_manifest
from mmclip.data.text import train_tokenizer, words_of_several
from mmclip.escape import markdown, portable_command, safe_cell, without_paths
from tests.commands import mmclip

REPORTS = [
    (f"The heart of normal size. Report {'of' if i else 'for'} all.", f"p{i}") for i in range(20)
]


@pytest.mark.parametrize("n_patients", [1, 2, 4])
def test_words_of_few_patients_are_no_tokens(n_patients: int):
    named = [(f"Seen by Dr. Quisling. {i}", f"p{i % n_patients}") for i in range(8)]
    texts, n_left_out = words_of_several([*REPORTS, *named], 5)
    vocabulary = train_tokenizer(texts).get_vocab()
    assert "heart" in vocabulary and n_left_out >= 4
    tokens = " ".join(vocabulary).replace("##", "")
    assert "quisl" not in tokens and "sling" not in tokens


def test_words_of_enough_patients_are_tokens_and_no_other_changes():
    named = [(f"Quisling saw it{' again' * i}.", f"p{i}") for i in range(5)]
    assert "quisling" in train_tokenizer(words_of_several([*REPORTS, *named], 5)[0]).get_vocab()
    reports = sorted({text for text, _ in REPORTS})
    everything = words_of_several(REPORTS, 1)[0]
    assert train_tokenizer(everything).get_vocab() == train_tokenizer(reports).get_vocab()


def test_doctor_lists_what_a_run_would_give_away(made_run: Path, tmp_path: Path):
    said = mmclip(tmp_path, "doctor", made_run).err
    assert "shared" in said and "not of mmclip's lists" in said and "private.key" in said
    assert "paths of this machine" in said and "leave it out" in said
    run = shutil.copytree(made_run, tmp_path / "run")
    (run / "private.key").unlink()
    assert "it is not here" in mmclip(tmp_path, "doctor", run).err


def test_pretraining_leaves_rare_words_out(
    made_data: Path, made_run: Path, small_config: Path, tmp_path: Path
):
    vocabulary = load_checkpoint(made_run).tokenizer.get_vocab()
    few = [s for s in read_manifest(made_data) if s.split == "train" and s.report]
    patients: dict[str, set[str]] = {}
    for sample in few:
        for word in set(re.findall(r"[a-z]+", sample.report.lower())):
            patients.setdefault(word, set()).add(sample.patient_id)
    few_patients = {word for word, of in patients.items() if len(of) < 5 and len(word) > 3}
    pieces = " ".join(patients.keys() - few_patients)  # "band" may be the first piece of "bands"
    rare = {word for word in few_patients if word not in pieces}
    assert rare and not rare & vocabulary.keys()
    data = ("--data", made_data, "--config", small_config, "--out", tmp_path / "run")
    error = mmclip(
        tmp_path, "pretrain", *data, "--set", "model.text.vocab_min_patients=1000"
    ).error()
    assert "no word is in reports of 1000 training patients" in error


def ids_of(data: Path) -> set[str]:
    samples = read_manifest(data)
    return {name for s in samples for name in (s.image_id, s.patient_id, s.study_id)}


def test_a_model_card_names_no_image_no_patient_and_no_path(
    made_run: Path, made_data: Path, tmp_path: Path
):
    out = tmp_path / "secret-place" / "out"
    few = ("--finding", "nodule", "--split", "train", "--n-resamples", "5")
    ended = mmclip(
        tmp_path, "zeroshot", "--model", made_run, "--data", made_data, "--out", out, *few
    )
    assert ended.code == 0, ended
    card = (out / "MODEL_CARD.md").read_text("utf-8")
    assert "split train: the run was trained on" in card
    assert str(tmp_path) not in card and "secret-place" not in card
    assert f"mmclip zeroshot --model {made_run.name} --data data --out out" in card
    assert not [name for name in ids_of(made_data) if re.search(rf"\b{re.escape(name)}\b", card)]
    stored = json.loads((out / "results.json").read_text())
    assert not [name for name in ids_of(made_data) if name in stored["leak_check"]]


@pytest.mark.parametrize(
    ("command", "portable"),
    [
        ("mmclip zeroshot --run /home/jo/runs/a --out b", "mmclip zeroshot --run a --out b"),
        ("mmclip pretrain --config arms/whole", "mmclip pretrain --config arms/whole"),
        ("mmclip x --list test=/data/t.txt --a=~/b", "mmclip x --list test=t.txt --a=b"),
        ("mmclip x '/a b/c d'", "mmclip x 'c d'"),
        ("mmclip x ../../jo/c C:/jo/d", "mmclip x c d"),
        ("mmclip x 'open", "mmclip x 'open"),
    ],
)
def test_a_command_loses_the_paths_of_its_machine(command: str, portable: str):
    assert portable_command(command) == portable


def test_text_loses_the_paths_of_its_machine():
    assert without_paths("of /home/jo/x and 1/2, a/b (/tmp/y.txt).") == "of x and 1/2, a/b (y.txt)."


HOSTILE = ["<img src=x onerror=alert(1)>", "a|b", "`x`", "[a](http://b)", "*b*", "a\nb", "&lt;"]


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_shows_a_name_and_runs_nothing(name: str):
    shown = markdown(name)
    assert "<" not in shown and "\n" not in shown
    assert not re.search(r"(?<!\\)[|`*\[\]]", shown)


@given(st.text(max_size=40))
def test_no_cell_is_a_formula_and_no_markdown_is_html(text: str):
    assert safe_cell(text).lstrip()[:1] not in ("=", "+", "-", "@") and safe_cell(text)[:1] != "\t"
    assert "<" not in markdown(text) and "\n" not in markdown(text)
