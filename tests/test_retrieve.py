"""Retrieval: equal reports are right answers, chance is chance, and stored embeddings are fresh."""

import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mmclip import embedding_store
from mmclip.checkpoint import Checkpoint
from mmclip.cli import retrieve as cli
from mmclip.cli import tables
from mmclip.data.batches import TrainingBatches
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.ingest.build import build_data
from mmclip.data.leakage.check import patient_key
from mmclip.data.sample import Sample
from mmclip.data.streams import deterministic_config
from mmclip.data.text import train_tokenizer
from mmclip.embed import embed_images, embed_texts, words_hardly_known
from mmclip.embedding_store import STORE_FOLDER, image_embeddings, text_embeddings
from mmclip.evaluation.bootstrap import patient_weights
from mmclip.evaluation.intervals import percentile_interval
from mmclip.evaluation.metrics import Retrieved
from mmclip.losses import positive_pairs
from mmclip.model_loading import ModelRequest
from mmclip.models.encoders import patch_grid
from mmclip.retrieval import ranking
from mmclip.retrieval.ranking import (
    RANKS_FILE,
    RETRIEVAL_FILE,
    rank_candidates,
    read_retrieval,
    report_keys,
    resampled,
    score_direction,
    select_pairs,
)
from mmclip.retrieval.retrieve import Search, SearchRequest, nearest_patients, search
from mmclip.run import Run, open_run
from tests.commands import mmclip
from tests.made import trained_on
from tests.made_files import NAME, NUMBER, dicom

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Made:
    run: Path
    data: Path
    raw: Path
    opened: Run
    dataset: ImageTextDataset

    @property
    def asked(self) -> ModelRequest:
        return ModelRequest(str(self.run))

    @property
    def checkpoint(self) -> Checkpoint:
        return self.opened.checkpoint

    def search(self, **asked: object) -> Search:
        # pyright: ignore[reportArgumentType]
        return search(SearchRequest(self.asked, (self.data,), **asked))

    def embed(self) -> np.ndarray:
        return image_embeddings(self.opened, self.dataset, [self.data])


@pytest.fixture(scope="module")
def made(
    made_run: Path, made_data: Path, made_raw: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """A copy of the run, as embeddings are stored in it."""
    run = shutil.copytree(made_run, tmp_path_factory.mktemp("retrieve") / "run")
    return Made(run, made_data, made_raw, open_run(run), open_dataset([made_data]))


@pytest.fixture
def fresh(made: Made) -> Iterator[Made]:
    """Without stored embeddings, before and after."""
    shutil.rmtree(made.run / STORE_FOLDER, ignore_errors=True)
    yield made
    shutil.rmtree(made.run / STORE_FOLDER, ignore_errors=True)


def unit(n: int, seed: int = 0, width: int = 8) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def own_keys(n: int) -> torch.Tensor:
    return torch.arange(n)[:, None].expand(n, 2)


def changed(dataset: ImageTextDataset, change: Callable[[int, Sample], Sample]) -> ImageTextDataset:
    return replace(
        dataset, samples=tuple(change(i, sample) for i, sample in enumerate(dataset.samples))
    )


# --- what counts as found


def test_right_answers_are_the_positives_of_training(made: Made):
    kept = select_pairs(made.dataset, "test")
    first = kept.samples[0]

    def alike(i: int, sample: Sample) -> Sample:
        if i == 1:  # the same text after cleaning, of another study
            return replace(sample, report=first.report)
        if i != 2:
            return sample
        return replace(sample, study_id=first.study_id, patient_id=first.patient_id)

    kept = changed(kept, alike)
    config = deterministic_config(made.checkpoint.config)
    grid = patch_grid(made.checkpoint.model.vision_model)
    batches = TrainingBatches(kept, made.checkpoint.tokenizer, config, grid)
    trained = batches.of_rows(np.arange(len(kept))).keys
    keys = report_keys(made.opened, kept.samples)
    is_positive = positive_pairs(keys, keys)
    assert torch.equal(is_positive, positive_pairs(trained, trained))
    assert is_positive[0, :3].all() and not is_positive[1, 2]
    assert int(is_positive.sum()) < len(kept) ** 2 / 2


def test_an_equal_report_of_another_patient_counts_as_a_hit():
    images = np.eye(3, dtype=np.float32)
    reports = images[[1, 0, 2]]  # each of the first two images is nearest to the other's report
    study, text = torch.arange(3), torch.tensor([7, 7, 8])
    wrong, _ = rank_candidates(images, reports, own_keys(3), own_keys(3), (1,))
    assert wrong.hit[:, 0].tolist() == [0, 0, 1]
    keys = torch.stack([study, text], 1)
    found, n_positive = rank_candidates(images, reports, keys, keys, (1,))
    assert found.hit[:, 0].tolist() == [1, 1, 1] and found.rank.tolist() == [1, 1, 1]
    assert n_positive.tolist() == [2, 2, 1]


def test_collapsed_embeddings_score_chance_exactly():
    # Wide, of many digits, and of a number that fits no block of a matrix product.
    n, alike = 203, np.repeat(unit(1, width=512), 203, axis=0)
    found, n_positive = rank_candidates(alike, alike, own_keys(n), own_keys(n))
    result = score_direction(found, n_positive, n, [str(i) for i in range(n)], n_resamples=5)
    assert result.median_rank == result.median_rank_chance == (n + 1) / 2
    for at in result.at:
        assert at.hit == at.recall == at.hit_chance == pytest.approx(at.k / n, rel=1e-5)
    texts = torch.arange(n)[:, None] // 50  # equal reports: what is found by chance is more
    found, n_positive = rank_candidates(alike, alike, texts, texts)
    result = score_direction(found, n_positive, n, [str(i) for i in range(n)], n_resamples=5)
    assert result.at[0].hit == result.at[0].hit_chance > 0.2
    assert result.at[0].recall == pytest.approx(1 / n, rel=1e-5)
    assert result.median_rank == result.median_rank_chance == pytest.approx((n + 1) / 51, rel=1e-5)


def test_embeddings_that_agree_find_everything_at_once():
    samples = unit(40)
    found, _ = rank_candidates(samples, samples, own_keys(40), own_keys(40))
    assert found.hit.min() == found.recall.min() == 1 and found.rank.max() == 1


def test_some_queries_at_a_time_find_what_all_find_together(monkeypatch: pytest.MonkeyPatch):
    samples, reports, keys = unit(30), unit(30, seed=1), torch.arange(30)[:, None] // 2
    whole = rank_candidates(samples, reports, keys, keys)
    monkeypatch.setattr(ranking, "_CHUNK_PAIRS", 100)
    parts = _flat(rank_candidates(samples, reports, keys, keys))
    for a, b in zip(_flat(whole), parts, strict=True):
        np.testing.assert_array_equal(a, b)


def _flat(pair: tuple[Retrieved, np.ndarray]) -> tuple[np.ndarray, ...]:
    return (*pair[0], pair[1])


def test_intervals_are_those_of_repeated_queries_of_whole_patients(
    monkeypatch: pytest.MonkeyPatch,
):
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in rng.integers(0, 6, 21)]
    found = Retrieved(rng.random((21, 2)), rng.random((21, 2)), 1 + rng.integers(0, 40, 21) / 2)
    means, medians = resampled(found, patients, n_resamples=9, seed=4)
    names = list(dict.fromkeys(patients))
    (weights,) = patient_weights(len(names), 9, seed=4, step=9)
    for draw in range(9):
        times = [int(weights[names.index(p), draw]) for p in patients]
        assert medians[draw] == np.median(found.rank.repeat(times))
        np.testing.assert_allclose(means[draw, :2], found.hit.repeat(times, axis=0).mean(axis=0))
        np.testing.assert_allclose(means[draw, 2:], found.recall.repeat(times, axis=0).mean(axis=0))
    scored = score_direction(
        found, np.ones(21, np.int64), 50, patients, (1, 5), n_resamples=9, seed=4
    )
    assert scored.median_rank_ci == pytest.approx(percentile_interval(medians), rel=1e-5)
    assert scored.at[1].hit_ci == pytest.approx(percentile_interval(means[:, 1]), rel=1e-5)
    monkeypatch.setattr(ranking, "_CHUNK_PAIRS", 50)
    for a, b in zip(
        resampled(found, patients, n_resamples=9, seed=4), (means, medians), strict=True
    ):
        np.testing.assert_allclose(a, b)


# --- stored embeddings


def test_embeddings_are_made_once_and_then_read(fresh: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedding_store, "_CHUNK", 50)
    made = fresh.embed()
    np.testing.assert_allclose(
        made, embed_images(fresh.opened, fresh.dataset, show=False).numpy(), atol=1e-5
    )
    texts = ["No edema.", "Edema.", "No edema."]
    of_texts = text_embeddings(fresh.opened, texts)
    model, tokenizer = fresh.checkpoint.model, fresh.checkpoint.tokenizer
    np.testing.assert_array_equal(of_texts, embed_texts(model, tokenizer, texts, 64).numpy())
    assert np.load(next((fresh.run / STORE_FOLDER).glob("texts-*.npy"))).shape[0] == 2

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(embedding_store, "embed_images", refuse)
    monkeypatch.setattr(Run, "encode_texts", refuse)
    again = fresh.embed()
    np.testing.assert_array_equal(again, made)
    assert isinstance(again, np.memmap)
    np.testing.assert_array_equal(text_embeddings(fresh.opened, texts), of_texts)


def test_a_killed_search_leaves_nothing_behind_the_next(tmp_path: Path):
    facts = (tmp_path, "weights", "images", ["an image"], (2, 3))

    def killed() -> Iterator[torch.Tensor]:
        yield torch.ones(1, 3)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            embedding_store.stored(*facts, killed())
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not list(tmp_path.glob("*.npy")) and len(list(tmp_path.glob("images-*.tmp"))) == 1
    made = embedding_store.stored(*facts, iter([torch.ones(2, 3)]))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]
    np.testing.assert_array_equal(made, np.ones((2, 3)))


def test_other_images_have_embeddings_of_their_own(fresh: Made, monkeypatch: pytest.MonkeyPatch):
    fresh.embed()
    some = fresh.dataset.select([sample.split == "val" for sample in fresh.dataset.samples])
    assert len(image_embeddings(fresh.opened, some, [fresh.data])) == len(some)
    other = replace(fresh.dataset, data_hash="other")
    image_embeddings(fresh.opened, other, [fresh.data])
    monkeypatch.setattr(embedding_store, "read_meta", lambda folder: {"images_sha256": "other"})
    fresh.embed()  # the same records, of which another version made other images
    assert len(list((fresh.run / STORE_FOLDER).glob("images-*.npy"))) == 4


def damage_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda npy, note: damage_byte(npy), "unfinished or damaged"),
        (lambda npy, note: npy.write_bytes(npy.read_bytes()[:-8]), "unfinished or damaged"),
        (lambda npy, note: note.unlink(), "unfinished or damaged"),
        (lambda npy, note: npy.unlink(), "unfinished or damaged"),
        (lambda npy, note: note.write_text("[]"), "unfinished or damaged"),
        (
            lambda npy, note: note.write_text(
                json.dumps({**json.loads(note.read_text()), "weights": "0"})
            ),
            "is of other weights",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_made_anew_and_it_is_said(
    fresh: Made,
    damage: Callable[[Path, Path], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
):
    made = np.array(fresh.embed())
    (npy,) = (fresh.run / STORE_FOLDER).glob("images-*.npy")
    damage(npy, npy.with_suffix(".json"))
    capsys.readouterr()
    np.testing.assert_array_equal(fresh.embed(), made)
    err = capsys.readouterr().err
    assert npy.name in err and f"{said}; it is made anew" in err
    capsys.readouterr()
    fresh.embed()
    assert capsys.readouterr().err == ""


def test_a_run_that_cannot_be_written_is_searched_all_the_same(
    fresh: Made, caplog: pytest.LogCaptureFixture
):
    (fresh.run / STORE_FOLDER).write_text("no folder")
    try:
        assert fresh.embed().shape == (len(fresh.dataset), 16)
        assert "embeddings are not stored" in caplog.text
    finally:
        (fresh.run / STORE_FOLDER).unlink()


def test_an_interrupted_embedding_leaves_nothing_that_is_taken_up(
    fresh: Made, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(embedding_store, "_CHUNK", 50)
    embed, done = embed_images, []

    def interrupted(*args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return embed(*args, **kwargs)

    monkeypatch.setattr(embedding_store, "embed_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fresh.embed()
    assert list((fresh.run / STORE_FOLDER).iterdir()) == []


def test_embeddings_that_are_not_finite_are_refused(fresh: Made, monkeypatch: pytest.MonkeyPatch):
    def broken(model, rows, show):
        return torch.full((len(rows), 16), torch.nan)

    monkeypatch.setattr(embedding_store, "embed_images", broken)
    with pytest.raises(ValueError, match="not finite; its training has diverged"):
        fresh.embed()


# --- search


def test_the_nearest_patients_by_hand():
    similarity = np.array([0.2, 0.9, 0.5, 0.8, 0.5, 1.0], np.float32)
    patients = ["a", "b", "c", "b", "d", "e"]
    searched = [True, True, True, True, True, False]
    found = nearest_patients(similarity, patients, searched, top=3)
    assert [(f.rank, f.row, f.n_images) for f in found] == [(1, 1, 2), (2, 2, 1), (3, 4, 1)]
    assert found[0].similarity == pytest.approx(0.9)
    assert len(nearest_patients(similarity, patients, searched, top=9)) == 4


def test_an_image_of_the_data_finds_the_images_nearest_to_it_and_not_itself(made: Made):
    sample = made.dataset.samples[5]
    found = made.search(image=sample.image_id, top=4)
    images = embed_images(made.opened, made.dataset, show=False)
    similarity = (images @ images[5]).numpy()
    similarity[[patient_key(f) == patient_key(sample) for f in made.dataset.samples]] = -2
    assert found.found[0].row == similarity.argmax()
    assert sample.patient_id not in {made.dataset.samples[f.row].patient_id for f in found.found}
    np.testing.assert_allclose(found.found[0].similarity, similarity.max(), atol=1e-5)


def test_images_without_reports_are_found_once_a_patient_and_not_of_the_own_one(
    made: Made, tmp_path: Path
):
    # Without a report each image is a study of its own; p2 of another collection is another person.
    images = [str(sample.image) for sample in made.dataset.samples if sample.image][:9]
    whose = ["p1", "p1", "p1", "p2", "p2", "p3", "p3", "p3", "p2"]
    samples = [
        Sample(
            image_id=f"f{i}", study_id=f"f{i}", patient_id=patient, view="PA", image=image,
            source="other" if i == 8 else "ours", split="test",
        )
        for i, (image, patient) in enumerate(zip(images, whose, strict=True))
    ]  # fmt: skip
    build_data(samples, made.raw, tmp_path / "data", image_size=32)
    found = search(SearchRequest(made.asked, (tmp_path / "data",), image="f0"))
    said = [(record["source"], record["n_images"]) for record in found.records()]
    assert sorted(said) == [("other", 1), ("ours", 2), ("ours", 3)]
    assert not {record["image_id"] for record in found.records()} & {"f0", "f1", "f2"}
    # Each is shown by the nearest image.
    embedded = embed_images(made.opened, found.dataset, show=False)
    similarity = (embedded @ embedded[0]).numpy()
    patients = np.array([patient_key(sample) for sample in found.dataset.samples])
    for one in found.found:
        own = similarity[patients == patients[one.row]]
        assert one.similarity == pytest.approx(own.max(), abs=1e-5)


@pytest.mark.parametrize("length", [8, 34, 64])
def test_an_id_stays_whole_in_a_terminal_of_80_columns(
    made: Made, monkeypatch: pytest.MonkeyPatch, length: int
):
    found = made.search(phrase="No edema.", top=3)
    long = changed(found.dataset, lambda i, sample: replace(sample, image_id=f"{i:x>{length}}"))
    long = changed(
        long, lambda i, sample: replace(sample, report="Small left pleural effusion. " * 9)
    )
    shown = io.StringIO()
    terminal = Console(file=shown, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(cli, "console", terminal)
    monkeypatch.setattr(tables, "console", terminal)
    cli.print_found(replace(found, dataset=long), top=3)
    lines = shown.getvalue().splitlines()
    for one in found.found:
        assert sum(line.split(" ")[0] == f"{one.row:x>{length}}" for line in lines) == 1
    with_report = [line for line in lines if "Small left" in line]
    assert len(with_report) == (0 if length == 64 else 3)
    assert all(len(line) <= 80 for line in with_report)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "write",
    [
        lambda image: encoded(image, "PNG") + b"\0",
        lambda image: encoded(image, "TIFF"),
        lambda image: dicom(np.array(image)),
    ],
    ids=["png", "tiff", "dicom"],
)
def test_an_image_from_a_file_finds_the_same_image_in_the_data(
    made: Made, tmp_path: Path, write: Callable[[Image.Image], bytes]
):
    sample = made.dataset.samples[9]
    path = tmp_path / "image"
    path.write_bytes(write(Image.open(made.raw / str(sample.image)).convert("L")))
    (first, *_) = made.search(image=str(path), top=2).records()
    assert first["image_id"] == sample.image_id
    assert first["similarity"] == pytest.approx(1, abs=1e-5)


def test_the_very_file_of_an_image_is_that_image(made: Made, capsys: pytest.CaptureFixture[str]):
    sample = made.dataset.samples[9]
    found = made.search(image=str(made.raw / str(sample.image)), top=3)
    assert f"is image {sample.image_id} of the data: its own patient is left out" in " ".join(
        capsys.readouterr().err.split()
    )
    assert sample.image_id not in {record["image_id"] for record in found.records()}
    by_id = made.search(image=sample.image_id, top=3)
    assert [f.row for f in found.found] == [f.row for f in by_id.found]


def test_a_phrase_finds_images_of_the_split_that_is_asked_for(made: Made):
    found = made.search(phrase="Large left pleural effusion.", top=5, split="val")
    assert [record["split"] for record in found.records()] == ["val"] * 5
    model, tokenizer = made.checkpoint.model, made.checkpoint.tokenizer
    text = embed_texts(model, tokenizer, ["Large left pleural effusion."], 64)[0]
    similarity = (embed_images(made.opened, made.dataset, show=False) @ text).numpy()
    val = [i for i, sample in enumerate(made.dataset.samples) if sample.split == "val"]
    best = [f.similarity for f in found.found]
    assert best[0] == pytest.approx(similarity[val].max(), abs=1e-5)
    assert best == sorted(best, reverse=True)


def test_what_cannot_be_searched_is_refused_with_the_next_step(made: Made, tmp_path: Path):
    with pytest.raises(ValueError, match=r"'nowhere.png' is neither an image id of the data nor a"):
        made.search(image="nowhere.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"broken.png: the image cannot be read"):
        made.search(image=str(tmp_path / "broken.png"))
    for phrase, message in (("", "give words"), ("胸水", "no word that the model knows")):
        with pytest.raises(ValueError, match=message):
            made.search(phrase=phrase)
    with pytest.raises(ManifestError, match="no source chexpert in this data; there are synthetic"):
        made.search(phrase="Edema.", sources=("chexpert",))


def test_words_that_the_vocabulary_only_spells_are_named():
    said = ["There is a small left pleural effusion.", "No pneumothorax.", "Mild cardiomegaly."]
    letters = ["abcdefghijklmnopqrstuvwxyz " + " ".join("abcdefghijklmnopqrstuvwxyz")]
    tokenizer = train_tokenizer([*said, *letters] * 3)
    assert words_hardly_known(tokenizer, "A small xyzzy, Xyzzy left effusion; qwv.") == [
        "xyzzy", "qwv"
    ]  # fmt: skip
    assert words_hardly_known(tokenizer, "Small left pleural effusion, no pneumothorax.") == []


def test_a_phrase_that_is_spelt_letter_by_letter_is_searched_with_a_warning(
    made: Made, caplog: pytest.LogCaptureFixture
):
    made.search(phrase="Edema.")
    assert "spells it" not in caplog.text
    made.search(phrase="Edema xqzvkj.")
    assert "xqzvkj: not in the vocabulary of the model" in caplog.text


# --- the command


def command(made: Made, folder: Path, *more: str | Path):
    return mmclip(folder, "retrieve", "--model", made.run, "--data", made.data, *more)


def test_a_search_prints_json_on_stdout_and_a_table_on_stderr(made: Made, tmp_path: Path):
    ended = command(made, tmp_path, "--phrase", "No edema.", "--top", "3", "--out", tmp_path / "o")
    assert ended.code == 0, ended.err
    records = [json.loads(line) for line in ended.out.splitlines()]
    assert [record["rank"] for record in records] == [1, 2, 3]
    samples = {sample.image_id: sample for sample in made.dataset.samples}
    for record in records:
        assert record["report"] == samples[record["image_id"]].report
        # Ids of studies can hold those of patients.
        assert not {"patient_id", "study_id"} & record.keys()
        assert str(record["image_id"]) in ended.err
    with Image.open(tmp_path / "o/found.png") as sheet:
        assert sheet.width > 300


def test_nothing_that_a_search_says_holds_a_word_of_a_dicom_header(made: Made, tmp_path: Path):
    sound = dicom(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8))
    for name, content in (("sound", sound), ("cut", sound[:-300])):
        (tmp_path / name).write_bytes(content)
        ended = command(made, tmp_path, "--image", tmp_path / name)
        assert ended.code == (name == "cut")
        assert not [w for w in (*NAME.split("^"), NUMBER) if w in ended.out + ended.err]


@pytest.mark.parametrize("given", [(), ("--image", "a", "--phrase", "b"), ("--evaluate",)])
def test_one_thing_is_asked_at_a_time(made: Made, tmp_path: Path, given: tuple[str, ...]):
    error = command(made, tmp_path, *given).error()
    assert ("name their folder by --out" if given == ("--evaluate",) else "give one of") in error


def test_evaluation_writes_what_it_prints_and_writes_over_nothing_else(made: Made, tmp_path: Path):
    out = tmp_path / "out"
    asked = ("--evaluate", "--out", out, "--n-resamples", "20")
    ended = command(made, tmp_path, *asked)
    assert (ended.code, ended.out) == (0, f"{out / RETRIEVAL_FILE}\n"), ended.err
    results = read_retrieval(out)
    kept = select_pairs(made.dataset, "test")
    assert results.n_images == len(kept) == results.image_to_report.n_candidates
    assert results.provenance.data_hash == made.dataset.data_hash
    assert results.leak_check.startswith("no image and no patient of these was trained on")
    for direction in ("image_to_report", "report_to_image"):
        part = getattr(results, direction)
        with np.load(out / RANKS_FILE) as stored:
            rank = stored[f"{direction}_rank"]
            assert stored["image_id"].tolist() == [sample.image_id for sample in kept.samples]
        assert part.median_rank == pytest.approx(np.median(rank), rel=1e-5)
        # Without ties a rank is whole, and its share up to k is R@k.
        shares = [(rank <= at.k).mean() for at in part.at]
        assert [at.hit for at in part.at] == pytest.approx(shares, rel=1e-5)
        low, high = part.at[2].hit_ci
        assert low <= part.at[2].hit <= high and f"{part.median_rank:.1f}" in ended.err
    assert command(made, tmp_path, *asked).code == 0
    other = command(made, tmp_path, *asked, "--split", "val").error()
    assert "already holds results of" in other and "--overwrite" in other


def test_images_that_the_run_was_trained_on_are_not_scored(made: Made, tmp_path: Path):
    run = shutil.copytree(made.run, tmp_path / "run")
    tested = [sample for sample in made.dataset.samples if sample.split == "test"]
    trained_on(run, tested[:1])
    given = ("--model", run, "--data", made.data, "--out", tmp_path / "out", "--evaluate")
    error = mmclip(tmp_path, "retrieve", *given).error()
    assert "the run was trained on 1 of these" in error and not (tmp_path / "out").exists()


def test_evaluation_needs_images_with_reports(made: Made):
    silent = changed(made.dataset, lambda i, sample: replace(sample, report=None))
    with pytest.raises(ManifestError, match="0 frontal images with a report in split 'test'"):
        select_pairs(silent, "test")
    lateral = changed(made.dataset, lambda i, sample: replace(sample, view="L"))
    with pytest.raises(ManifestError, match="0 frontal images"):
        select_pairs(lateral, "test")
