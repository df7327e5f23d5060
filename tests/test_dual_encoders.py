"""Models of others by our protocols: equal to transformers by hand, and told apart where they
cannot be."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mmclip
from mmclip.data.ingest.build import BuildOptions, build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.manifest import read_manifest
from mmclip.evaluation.protocols import load_protocol
from mmclip.evaluation.results import read_results
from mmclip.evaluation.scores import load_scores
from mmclip.prompts import load_prompts
from tests.commands import mmclip as run_mmclip
from tests.dual_encoders import SAVE, ByHand
from tests.made_layouts import of_chexpert
from tests.published import lay_out
from tests.test_protocols import CASES, plan

FAMILIES = list(SAVE)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name, save in SAVE.items()}


@pytest.fixture(scope="session")
def chexpert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic folder in CheXpert's layout, with its official split."""
    root = tmp_path_factory.mktemp("chexpert")
    planned = plan(load_protocol("chexpert-5"), CASES["chexpert-5"])
    raw = lay_out(root / "raw", of_chexpert(planned))
    options = BuildOptions(metadata={"reader": "chexpert"})
    reader = open_reader("chexpert", raw, mapping=None, table=None)
    build_data(reader, raw, root / "data", image_size=32, options=options)
    ended = run_mmclip(root, "data", "split", root / "data", "--name", "official")
    assert ended.code == 0, ended.err
    return root / "data"


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_transformers_by_hand(
    family: str, models: dict[str, Path], chexpert: Path
):
    raw, hand = chexpert.parent / "raw", ByHand(models[family])
    files = sorted(raw.rglob("*.jpg"))[:5]
    model = mmclip.load(models[family], device="cpu")
    for file in files:
        ours = model._encoder.prepare(file)  # pyright: ignore[reportPrivateUsage]
        for name, values in hand.pixel_values(file).items():
            np.testing.assert_array_equal(ours[name], values[0].numpy())
    expected = torch.stack([hand.embed_image(file) for file in files]).numpy()
    np.testing.assert_allclose(model.encode_images(files), expected, atol=1e-6)
    assert np.ptp(expected, axis=0).max() > 1e-3, "the images must differ"
    texts = ["There is Edema.", "No pleural effusion is seen in this long sentence.", "x"]
    expected = torch.stack([hand.embed_text(text) for text in texts]).numpy()
    np.testing.assert_allclose(model.encode_texts(texts), expected, atol=1e-6)
    assert np.ptp(expected, axis=0).max() > 1e-3, "the texts must differ"


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroshot_by_a_protocol_is_a_loop_of_transformers_finding_by_finding(
    family: str, models: dict[str, Path], chexpert: Path, tmp_path: Path
):
    ended = run_mmclip(
        tmp_path, "zeroshot", "--model", models[family], "--data", chexpert, "--protocol",
        "chexpert-5", "--out", tmp_path / "out", "--n-resamples", "5", "--cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    scores = load_scores(tmp_path / "out" / "scores.npz")
    hand, prompts = ByHand(models[family]), load_prompts("default")
    image_of = {sample.image_id: str(sample.image) for sample in read_manifest(chexpert)}
    rows = range(0, len(scores), 7)
    for k, finding in enumerate(load_protocol("chexpert-5").findings):
        texts = prompts.texts(finding)
        for row in rows:
            file = chexpert.parent / "raw" / image_of[str(scores.image_id[row])]
            expected = hand.score(file, texts.positives, texts.negatives)
            assert scores.scores[row, k] == pytest.approx(expected, abs=1e-6)
    results = read_results(tmp_path / "out")
    rule = "sigmoid" if family == "siglip" else "prompt_pair"
    assert results.provenance.zeroshot_rule == rule
    assert results.leak_check.startswith("not made: what ")
    assert results.facts["trained on"] == "unknown" and results.facts["images read"] == "files"
    assert "Pil" in str(results.facts["image processor"])
