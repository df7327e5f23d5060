"""Maps lie on the image's own pixels, say what they are worth, and are held against what knows
less.

The model of most tests is set by hand: a patch's features are its mean grey, and a phrase asks for
bright patches or for dark ones. So what a right map is, is known without training.
"""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmclip.checkpoint import Checkpoint, save_checkpoint
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.images import ImageError, read_image, resize_image, unsquared
from mmclip.data.ingest.annotations import EMPTY, FOREIGN, read_annotations
from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.sample import Sample
from mmclip.data.text import tokenise, train_tokenizer
from mmclip.evaluation.pictures import HEAT, UNSEEN, explanation_figure, warmed
from mmclip.explanation.explain import draw_explanation, explain_image, image_of_folder
from mmclip.explanation.grounding import (
    CANDIDATES,
    best_threshold,
    contrast_to_noise,
    expected_hits,
    mass_above_median,
    mean_annotations,
    nearness_to_centre,
    overlaps,
    scaled,
)
from mmclip.explanation.mechanism import patient_mean, patient_means
from mmclip.explanation.pointing_game import (
    PointingRequest,
    evaluate_explanations,
    other_phrases,
)
from mmclip.explanation.saliency import saliency_maps
from mmclip.models.build import build_mmclip
from mmclip.models.encoders import build_image_encoder, build_text_encoder
from mmclip.patches import Grid
from mmclip.prompts import load_prompts
from mmclip.run import Run, open_run
from tests.commands import mmclip

from . import made

HEIGHT, WIDTH = 48, 36  # of the images; a patch of the model has 12 x 9 of their pixels
BRIGHT, DARK = "Large consolidation.", "Small pneumothorax."
PROMPTS = load_prompts("sentence")


# -- the image's own pixels --


def test_a_bright_square_of_an_image_that_is_no_square_maps_back_to_its_pixels():
    image = np.full((96, 40), 50, np.uint8)
    image[24:48, 20:30] = 200  # the patch in the second row and the third column
    seen = torch.from_numpy(resize_image(image, 32).copy()).float()
    patches = seen.reshape(4, 8, 4, 8).mean((1, 3)).numpy()
    shown = Grid(4, 8, 32).over_image(patches, 96, 40)
    assert ((shown > 125) == (image > 125)).all()


def test_a_pixel_belongs_to_the_patch_that_its_centre_lies_in():
    for grid in (Grid(4, 8, 32), Grid(3, 8, 30), Grid(2, 8, 20)):
        for n_px in (1, 5, 12, 97):
            slow = [
                min(int((i + 0.5) / n_px * grid.image_size / grid.patch_size + 1e-9), grid.side)
                for i in range(n_px)
            ]
            rows, columns = grid.numbers(n_px, 7)
            assert rows.tolist() == slow and len(columns) == 7


@pytest.mark.parametrize("how", ["squash", "pad", "crop"])
@pytest.mark.parametrize(("height", "width"), [(96, 40), (41, 97), (64, 64), (30, 200), (5, 3)])
def test_a_map_lies_over_the_pixels_that_the_patch_was_made_of(how, height: int, width: int):
    # One patch of the square is lit at a time: what it was made of is lit in the image.
    grid = Grid(4, 8, 32, how)
    rows, columns = grid.numbers(height, width)
    for row in range(4):
        for column in range(4):
            image = np.zeros((height, width), np.uint8)
            image[np.ix_(rows == row, columns == column)] = 250
            patches = resize_image(image, 32, how).reshape(4, 8, 4, 8).mean((1, 3))
            if image.any() and min(height, width) > 8:
                assert np.argwhere(patches == patches.max()).tolist() == [[row, column]]
                x, y = grid.centre_px(row, column, height, width)
                inside = np.argwhere(image)
                far = np.abs(inside.mean(0) + 0.5 - (y, x))
                assert (far < np.ptp(inside, axis=0) / 2 + 1.5).all()
    seen = np.outer(rows < 4, columns < 4)
    if how == "crop":  # the middle square, to a pixel
        assert seen.sum() == min(height, width) ** 2 and seen[height // 2, width // 2]
    else:
        assert seen.all()
    on_image = grid.on_image(np.ones((4, 4), np.float32), height, width)
    inside, total = grid.count_pixels(np.ones((height, width), bool))
    assert (total.numpy() > 0).tolist() == (~np.isnan(on_image)).flatten().tolist()
    assert inside.sum() == seen.sum()


@pytest.mark.parametrize("how", ["squash", "pad", "crop"])
def test_a_square_copy_goes_back_to_the_shape_of_its_image(how):
    y, x = np.indices((60, 90))
    image = (2 * x + y // 2).astype(np.uint8)
    back = unsquared(resize_image(image, 48, how), 60, 90, how)
    assert back.shape == image.shape
    part = slice(17, 73) if how == "crop" else slice(2, 88)
    assert np.abs(back[2:-2, part].astype(int) - image[2:-2, part]).max() <= 3
    if how == "crop":
        assert not back[:, :15].any() and not back[:, 75:].any()


def test_there_is_no_map_where_the_model_did_not_look():
    grid = Grid(2, 8, 20)  # the last 4 of 20 px are in no patch
    shown = grid.over_image(np.ones((2, 2), np.float32), 10, 5)
    assert np.isnan(shown[8:]).all() and np.isnan(shown[:, 4:]).all()
    assert (shown[:8, :4] == 1).all()
    inside, total = grid.count_pixels(np.ones((10, 5), bool))
    assert inside.tolist() == total.tolist() == [8.0] * 4
    with pytest.raises(ValueError, match="2 patches of 8 px do not fill 20 px"):
        grid.over_image(np.ones((2, 2), bool), 10, 5)


# -- metrics --


def random_maps(m: int, height: int, width: int, side: int = 4):
    rng = np.random.default_rng(0)
    grid = Grid(side, 8, 8 * side)
    score = np.round(rng.normal(size=(m, side, side)), 1).astype(np.float32)  # with ties
    annotations = rng.random((m, height, width)) < rng.random((m, 1, 1))
    counted = [torch.stack(grid.count_pixels(annotation)) for annotation in annotations]
    pixels = np.stack([grid.over_image(s, height, width) for s in score])
    inside, total = torch.stack(counted, 1)
    return torch.from_numpy(score).flatten(1), inside, total, pixels, annotations


@pytest.mark.parametrize(("height", "width"), [(32, 32), (50, 21), (3, 70)])
def test_metrics_from_counts_equal_those_over_every_pixel(height: int, width: int):
    score, inside, total, pixels, annotations = random_maps(12, height, width)
    hits, cnr = expected_hits(score, inside, total), contrast_to_noise(score, inside, total)
    iou = overlaps(score, inside, total, (0.25, 0.6))
    for i, (shown, annotation) in enumerate(zip(pixels, annotations, strict=True)):
        assert hits[i].item() == pytest.approx(annotation[shown == shown.max()].mean(), rel=1e-6)
        within, around = shown[annotation].astype(float), shown[~annotation].astype(float)
        noise = np.sqrt(within.var() + around.var())
        assert cnr[i].item() == pytest.approx((within.mean() - around.mean()) / noise, rel=1e-6)
        for j, threshold in enumerate((0.25, 0.6)):
            span = np.ptp(shown)
            marked = (shown - shown.min()) / span >= threshold - 1e-6
            expected = (marked & annotation).sum() / (marked | annotation).sum()
            assert iou[i, j].item() == pytest.approx(expected, rel=1e-6)


def test_contrast_to_noise_by_hand():
    total = torch.ones(5, 4)
    inside = torch.tensor([[1.0, 1, 0, 0]] * 3 + [[0.0] * 4, [1.0] * 4])
    score = torch.tensor([[3.0, 5, 0, 2], [0, 2, 3, 5], [0.1] * 4, [1, 2, 3, 4], [1, 2, 3, 4]])
    found = contrast_to_noise(score, inside, total)
    assert found[:3].tolist() == pytest.approx([3 / 2**0.5, -3 / 2**0.5, 0.0])
    assert found[3:].isnan().all()  # nothing in the place, and nothing around it
    two_levels = contrast_to_noise(inside[:1], inside[:1], total[:1])
    assert two_levels.isnan().all()


def test_a_constant_map_hits_by_chance_and_marks_nothing():
    inside, total = torch.tensor([[6.0, 0, 2, 0]]), torch.full((1, 4), 8.0)
    constant = torch.full((1, 4), 0.3)
    assert expected_hits(constant, inside, total).item() == pytest.approx(8 / 32)
    assert scaled(constant, total).tolist() == [[0.0] * 4]
    assert overlaps(constant, inside, total, CANDIDATES).tolist() == [[0.0] * len(CANDIDATES)]


def test_a_patch_without_pixels_takes_no_part():
    inside, total = torch.tensor([[4.0, 0, 0]]), torch.tensor([[8.0, 8, 0]])
    score = torch.tensor([[1.0, 0, 9]])
    assert expected_hits(score, inside, total).item() == 0.5
    assert overlaps(score, inside, total, [0.5]).item() == 0.5


def test_the_best_threshold_is_that_of_the_highest_overlap():
    score = torch.tensor([[0.0, 0.38, 0.62, 1.0]])
    inside, total = torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1, 4)
    assert best_threshold(score, inside, total) == 0.4  # the first above 0.38


def test_the_centre_falls_off_evenly_and_the_prior_is_a_mean():
    near = nearness_to_centre(4).reshape(4, 4)
    assert torch.equal(near, near.flip(0)) and torch.equal(near, near.mT)
    assert (near == near.max()).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    share = torch.tensor([[1.0, 0], [0, 0.5], [0.5, 0]])
    prior = mean_annotations(share, ["a", "b", "a"])
    assert {name: found.tolist() for name, found in prior.items()} == {
        "a": [0.75, 0.0],
        "b": [0.0, 0.5],
    }


@pytest.mark.parametrize(("height", "width"), [(32, 32), (50, 21)])
def test_the_mass_is_what_the_pixels_have_above_their_median(height: int, width: int):
    score, _, total, pixels, _ = random_maps(6, height, width)
    for i, shown in enumerate(pixels):
        excess = np.clip(shown.astype(float) - np.median(shown), 0, None)
        mass = mass_above_median(score[i], total[i])
        grid = Grid(4, 8, 32)
        for n in range(16):
            is_patch = grid.over_image(np.arange(16).reshape(4, 4), height, width) == n
            assert mass[n].item() == pytest.approx(excess[is_patch].sum() / excess.sum(), abs=1e-6)
    assert mass_above_median(torch.full((4,), 0.1), torch.ones(4)).tolist() == [0.0] * 4


def test_means_of_groups_and_of_groups_in_draws_that_they_share():
    values = np.array([1.0, 0.0, 1.0, np.nan, 0.5, 0.5])
    groups, patients = ["a", "a", "b", "b", "c", "c"], list("uvwxyz")
    found, macro = patient_means(values, groups, patients, min_count=2, n_resamples=300)
    assert [(name, v.mean, v.n) for name, v in found.items()] == [
        ("a", 0.5, 2),
        ("b", 1.0, 1),
        ("c", 0.5, 2),
    ]
    assert (macro.mean, macro.n) == (0.5, 2)  # b has one value
    assert found["c"].interval == (0.5, 0.5)
    one, of_one = patient_means(values[[0, 1, 2, 4]], ["a"] * 4, list("uvwx"), n_resamples=300)
    alone = patient_mean(values[[0, 1, 2, 4]], np.ones(4), list("uvwx"), n_resamples=300)
    assert one["a"] == alone and of_one.mean is None  # under ten values
    assert patient_means(values, groups, patients, min_count=3, n_resamples=9)[1].interval is None


# -- what readers marked --


def image_of(image_id: str, width: int = 64, height: int = 64) -> Sample:
    return Sample(
        image_id=image_id, study_id=image_id, patient_id=image_id, source="synthetic",
        image="a.png", view="PA", width_px=width, height_px=height,
    )  # fmt: skip


def write_nih_boxes(root: Path, *lines: str) -> Path:
    text = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n" + "".join(f"{x}\n" for x in lines)
    (root / "BBox_List_2017.csv").write_text(text)
    return root


def test_boxes_of_published_images_fit_smaller_copies_and_join_by_finding(tmp_path: Path):
    root = write_nih_boxes(
        tmp_path,
        "a.png,Mass,0,0,256,512", "a.png,Mass,512,0,512,512", "a.png,Nodule,0,0,9,9",
        "b.png,Mass,1,2,3,4", "a.png,Atelectasis,5.6,5,0.2,9",
    )  # fmt: skip
    left_out: Counter[str] = Counter()
    annotations = list(
        read_annotations("chestxray14", root, {"a.png": image_of("a.png")}, left_out)
    )
    assert [(annotation.finding, annotation.phrase) for annotation in annotations] == [
        ("mass", ""),
        ("nodule", ""),
    ]
    assert annotations[0].is_inside.mean() == 3 / 8
    inside, total = Grid(2, 8, 16).count_pixels(annotations[0].is_inside)
    assert (inside / total).tolist() == [0.5, 1.0, 0.0, 0.0]
    assert left_out == {FOREIGN: 1, EMPTY: 1}


def test_a_place_that_does_not_fit_its_image_is_one_clear_line(tmp_path: Path):
    root = write_nih_boxes(tmp_path, "a.png,Mass,0,0,2000,512")
    with pytest.raises(SourceError, match=r"a\.png has 1024 x 1024 px, and a box of chestxray14"):
        list(read_annotations("chestxray14", root, {"a.png": image_of("a.png")}, Counter()))
    with pytest.raises(SourceError, match=r"a\.png has 64 x 48 px, and chestxray14 marks images"):
        list(read_annotations("chestxray14", root, {"a.png": image_of("a.png", 64, 48)}, Counter()))
    with pytest.raises(SourceError, match="no boxes or masks of 'nih' are read"):
        list(read_annotations("nih", root, {}, Counter()))


# -- a model that is set by hand --


def texts_of(phrase: str) -> list[str]:
    return [phrase, *PROMPTS.texts(phrase).positives, *PROMPTS.texts(phrase).negatives]


TOKENIZER = train_tokenizer([*texts_of(BRIGHT), *texts_of(DARK)], vocab_size=200, min_frequency=1)


def grey_run(*overrides: str) -> Run:
    """A model whose patches answer by their mean grey: BRIGHT asks for bright ones, DARK for dark.

    The encoder's layers add nothing, so that a patch's features are its mean grey m as
    (m, -m, 1, -1) after a layer norm, which rises with m; the first value alone is projected. The
    projection of texts is solved for, so that a phrase is +1 or -1, and its denial the other.
    """
    config = made.small_config(*overrides)
    torch.manual_seed(0)
    model = build_mmclip(
        config,
        build_image_encoder(config.model.image, made.IMAGE_SIZE),
        build_text_encoder(config.model.text, len(TOKENIZER), max_tokens=64, pad_token_id=0),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.vision_model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        (conv,) = (m for m in model.vision_model.modules() if isinstance(m, torch.nn.Conv2d))
        conv.weight[0], conv.weight[1] = 1 / made.PATCH_SIZE**2, -1 / made.PATCH_SIZE**2
        assert conv.bias is not None
        conv.bias[2], conv.bias[3] = 1.0, -1.0
        pooler = model.vision_model.get_submodule("pooler.dense")  # patches pass it, too
        assert isinstance(pooler, torch.nn.Linear)
        pooler.weight.copy_(torch.eye(len(pooler.weight)))
        model.visual_projection.weight.zero_()
        model.visual_projection.weight[0, 0] = 1.0
        said = [*texts_of(BRIGHT), *texts_of(DARK)]
        signs = torch.tensor([1.0, 1, -1, -1, -1, 1])
        tokens = tokenise(TOKENIZER, said, max_tokens=64)
        ids, is_valid = torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.is_valid)
        pooled = model.text_model(input_ids=ids, attention_mask=is_valid.long()).pooler_output
        model.text_projection.weight.zero_()
        model.text_projection.weight[0] = torch.linalg.lstsq(pooled, signs).solution
    meta = {
        "step": 1, "config_hash": "", "data_hash": "", "shuffle_pairs": False,
        "sha256": {"model.safetensors": ""}, "config": config.model_dump(mode="json"),
    }  # fmt: skip
    return Run("made", Checkpoint(Path("run"), model, TOKENIZER, config, meta))


@pytest.fixture(scope="module")
def grey() -> Run:
    return grey_run(*made.WHOLE)


def image_with(row: int, column: int, level: int = 220, seed: int = 0) -> np.ndarray:
    """A noisy image with one bright (or dark) patch."""
    image = np.random.default_rng(seed).normal(120, 8, (HEIGHT, WIDTH))
    image[12 * row : 12 * row + 12, 9 * column : 9 * column + 9] = level
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("score", ["contribution", "prompt_pair"])
def test_a_shifted_finding_shifts_the_map(grey: Run, score):
    for phrase, level in ((BRIGHT, 220), (DARK, 10)):
        for row, column in ((0, 0), (1, 2), (3, 1)):
            sample = image_with(row, column, level)
            found = explain_image(grey, sample, phrase, score, PROMPTS)
            assert found.saliency.shape == (HEIGHT, WIDTH)
            assert ((found.saliency == found.saliency.max()) == (sample == level)).all()
            facts = found.facts()
            assert facts["highest_at_px"] == {"x": 9 * column + 4.5, "y": 12 * row + 6.0}
            assert facts["unseen_ratio"] == 0


def test_the_map_depends_on_the_phrase(grey: Run):
    sample = image_with(1, 1, 220)
    sample[24:36, 18:27] = 10
    bright, dark = (explain_image(grey, sample, p, "contribution", PROMPTS) for p in (BRIGHT, DARK))
    assert bright.facts()["highest_at_px"] == {"x": 13.5, "y": 18.0}
    assert dark.facts()["highest_at_px"] == {"x": 22.5, "y": 30.0}
    np.testing.assert_allclose(bright.patches, -dark.patches, atol=1e-5)


def test_masses_of_halves_and_thirds_by_hand(grey: Run):
    found = explain_image(grey, image_with(0, 3), BRIGHT, "contribution", PROMPTS)
    mass = found.facts()["mass"]
    assert mass["image left"] + mass["image right"] == pytest.approx(1, abs=1e-4)
    thirds = [mass[f"{name} third"] for name in ("upper", "middle", "lower")]
    assert sum(thirds) == pytest.approx(1, abs=1e-4)
    assert mass["image right"] > 0.7 and thirds[0] > 0.7
    flat = replace(found, patches=np.full_like(found.patches, 0.5))
    assert set(flat.facts()["mass"].values()) == {None}
    assert flat.facts()["highest_at_px"] is None
    with pytest.raises(ImageError, match=r"\(nearly\) equal"):
        explain_image(grey, np.full((40, 30), 99, np.uint8), BRIGHT, "contribution", PROMPTS)


def test_a_resized_copy_gives_the_map_of_the_published_image(grey: Run):
    sample = image_with(2, 2)
    copy = resize_image(sample, made.IMAGE_SIZE)
    size = (HEIGHT, WIDTH)
    found = explain_image(grey, copy, BRIGHT, "contribution", PROMPTS, size_px=size)
    whole = explain_image(grey, sample, BRIGHT, "contribution", PROMPTS)
    np.testing.assert_array_equal(found.saliency, whole.saliency)
    assert found.image.shape == size and unsquared(copy, *copy.shape) is copy


@pytest.mark.parametrize("how", ["pad", "crop"])
def test_padded_and_cropped_images_are_explained_where_they_are_bright(grey: Run, how):
    config = made.small_config(*made.WHOLE, f'data.resize="{how}"')
    run = replace(grey, checkpoint=replace(grey.checkpoint, config=config))
    image = np.full((90, 60), 40, np.uint8)
    image[46:66, 22:38] = 250
    found = explain_image(run, image, BRIGHT, "contribution", PROMPTS)
    facts = found.facts()
    assert 15 <= facts["highest_at_px"]["x"] <= 45 and 46 <= facts["highest_at_px"]["y"] <= 66
    assert facts["unseen_ratio"] == pytest.approx(1 / 3 if how == "crop" else 0, abs=1e-5)
    copy = resize_image(image, made.IMAGE_SIZE, how)
    again = explain_image(run, copy, BRIGHT, "contribution", PROMPTS, size_px=(90, 60))
    np.testing.assert_array_equal(again.saliency, found.saliency)
    assert again.image.shape == (90, 60) and again.image[56, 30] > 200
    draw_explanation(found, facts, "made")


def test_attention_is_the_decoders_and_needs_one(grey: Run):
    images = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    phrases = ["left pleural effusion", "zzz"]  # the second has no entity: all words are asked
    maps = saliency_maps(grey, images, phrases, [0, 0], "decoder_attention", PROMPTS)
    assert maps.shape == (2, 16) and (maps > 0).all() and (maps.sum(1) < 1).all()
    pooled = grey_run("loss.text=1", "model.text_decoder.image_context='pooled'")
    for none in (grey_run(), pooled):
        with pytest.raises(ValueError, match="has none that sees patches; choose contribution"):
            explain_image(none, image_with(0, 0), BRIGHT, "decoder_attention", PROMPTS)
    with pytest.raises(ValueError, match="give words, such as"):
        explain_image(grey, image_with(0, 0), "  ", "contribution", PROMPTS)


# -- evaluation --


def other_patch(i: int) -> tuple[int, int]:
    return divmod((7 * i + 5 * (i // 16)) % 16, 4)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 48 x 36 px with a bright or a dark patch, a data folder, and MS-CXR's boxes."""
    root = tmp_path_factory.mktemp("marked")
    samples, lines = [], []
    for i in range(72):
        row, column = other_patch(i)
        is_bright = i % 2 == 0
        pixels = image_with(row, column, 220 if is_bright else 10, seed=i)
        Image.fromarray(pixels).save(root / f"{i}.png")
        samples.append(Sample(
            image_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i}", source="synthetic", view="PA",
            split="train" if i < 20 else "val" if i < 40 else "test", image=f"{i}.png",
            report=BRIGHT if is_bright else DARK,
        ))  # fmt: skip
        finding, phrase = ("Consolidation", BRIGHT) if is_bright else ("Pneumothorax", DARK)
        lines.append((f"f{i}", finding, phrase, 9 * column, 12 * row, 9, 12))
    build_data(samples, root, root / "data", image_size=made.IMAGE_SIZE)
    write_boxes(root, lines)
    return root


COLUMNS = ("dicom_id", "category_name", "label_text", "x", "y", "w", "h")


def write_boxes(root: Path, lines: Sequence[tuple]) -> None:
    with (root / "MS_CXR_Local_Alignment_v1.1.0.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *lines])


@pytest.fixture(scope="module")
def run(marked: Path, grey: Run) -> Path:
    """The model that is set by hand, as a run on disk."""
    facts = {"data_hash": "", "shuffle_pairs": False}
    save_checkpoint(marked / "run", 1, grey.model, TOKENIZER, grey.config, {}, facts, keep=1)
    return marked / "run"


@pytest.fixture(scope="module")
def dataset(marked: Path) -> ImageTextDataset:
    return open_dataset([marked / "data"])


def evaluated(run: Run, dataset: ImageTextDataset, root: Path, **more) -> dict:
    request = PointingRequest("ms-cxr", root, "contribution", PROMPTS, n_resamples=200, **more)
    return evaluate_explanations(run, dataset, request)


@pytest.fixture(scope="module")
def results(run: Path, dataset: ImageTextDataset, marked: Path) -> dict:
    return evaluated(open_run(run), dataset, marked)


def test_a_model_that_finds_every_place_is_scored_so_and_random_weights_lose(results: dict):
    hits = {name: found["hit"]["macro"]["mean"] for name, found in results["saliency_maps"].items()}
    assert hits["model"] == hits["best on this grid"] == 1.0
    assert hits["brightest patch"] == 0.5  # right of the bright, wrong of the dark ones
    assert hits["chance"] == pytest.approx(1 / 16)
    assert hits["another finding's phrase"] == 0.0
    assert hits["random weights"] < 0.6
    assert max(hits["location prior"], hits["centre"]) < 0.3
    assert {name: found["is_lost"] for name, found in results["sanity"].items()} == {
        "random weights": True,
        "another finding's phrase": True,
    }
    assert results["hit_less"]["random weights"]["macro"]["ci"][0] > 0.2
    assert results["saliency_maps"]["model"]["iou_chosen"]["macro"]["mean"] == pytest.approx(1)
    assert results["saliency_maps"]["model"]["cnr"]["macro"]["mean"] > 5
    findings = results["saliency_maps"]["model"]["hit"]["findings"]
    assert {name: found["n"] for name, found in findings.items()} == {
        "consolidation": 16,
        "pneumothorax": 16,
    }
    assert (results["n_annotations"], results["n_images"], results["n_annotations_of_prior"]) == (
        32,
        32,
        40,
    )
    json.dumps(results, allow_nan=False)


def test_a_model_that_learnt_nothing_fails_the_sanity_check_and_is_warned_of(
    run: Path, dataset: ImageTextDataset, marked: Path, caplog: pytest.LogCaptureFixture
):
    opened = open_run(run)
    torch.nn.init.zeros_(opened.model.visual_projection.weight)
    found = evaluated(opened, dataset, marked)
    for name in ("random weights", "another finding's phrase"):
        assert found["sanity"][name]["is_lost"] is False
        assert f"the sanity check by {name} fails" in caplog.text


def test_places_of_the_scored_images_choose_nothing(
    run: Path, dataset: ImageTextDataset, marked: Path, results: dict, tmp_path: Path
):
    with (marked / "MS_CXR_Local_Alignment_v1.1.0.csv").open() as file:
        lines = [tuple(line) for line in csv.reader(file)][1:]
    in_test = {sample.image_id for sample in dataset.samples if sample.split == "test"}
    # The places of test images become those of other images, and their classes change.
    moved = [line if line[0] not in in_test else (*line[:3], 0, 0, 36, 30) for line in lines]
    write_boxes(tmp_path, moved)
    found = evaluated(open_run(run), dataset, tmp_path)
    assert found["thresholds"] == results["thresholds"] != {}
    assert found["thresholds_chosen_on"] == "val"
    assert found["saliency_maps"]["model"]["hit"] != results["saliency_maps"]["model"]["hit"]
    # And those of the validation images do choose.
    in_val = {sample.image_id for sample in dataset.samples if sample.split == "val"}
    write_boxes(
        tmp_path, [line if line[0] not in in_val else (*line[:3], 0, 0, 36, 48) for line in lines]
    )
    assert evaluated(open_run(run), dataset, tmp_path)["thresholds"] != results["thresholds"]


def test_without_places_on_other_images_nothing_is_chosen_and_no_prior_is_made(
    run: Path, dataset: ImageTextDataset, marked: Path
):
    only_test = dataset.select([sample.split == "test" for sample in dataset.samples])
    found = evaluated(open_run(run), only_test, marked)
    assert "location prior" not in found["saliency_maps"] and found["thresholds"] == {}
    assert found["thresholds_chosen_on"] is None
    assert found["saliency_maps"]["model"]["iou_chosen"]["macro"]["mean"] is None
    assert found["left_out"] == {FOREIGN: 40}
    with pytest.raises(ManifestError, match=r"ms-cxr marks no image of split 'val'.*32 of test"):
        evaluated(open_run(run), only_test, marked, split="val")


def test_places_on_laterals_are_left_out_and_counted(
    run: Path, dataset: ImageTextDataset, marked: Path
):
    samples = tuple(replace(f, view="L" if f.image_id == "f71" else "PA") for f in dataset.samples)
    found = evaluated(open_run(run), replace(dataset, samples=samples), marked)
    assert found["n_annotations"] == 31 and found["left_out"] == {"the image is a lateral": 1}


def test_the_wrong_phrase_is_that_of_the_next_finding():
    asked = other_phrases(["b", "a", "c", "a"], ["of b", "of a", "of c", "more a"])
    assert asked == ["of c", "of b", "of a", "of b"]
    assert other_phrases(["a", "a"], ["of a", "of a"]) is None


# -- the picture and the command --


def test_the_overlay_leaves_unseen_pixels_and_quiet_patches_as_they_are():
    image = np.full((10, 5), 100, np.uint8)
    shown = warmed(image, np.array([[0.0, 1.0], [2.0, 3.0]], np.float32), Grid(2, 8, 20))
    assert shown[5, 3].tolist() == [round(25 + 0.75 * c) for c in HEAT]
    assert shown[0, 0].tolist() == shown[9, 2].tolist() == shown[5, 4].tolist() == [100] * 3


def test_the_picture_shows_the_map_with_its_scale(grey: Run):
    grid = Grid(2, 8, 20)
    figure = explanation_figure(
        np.full((40, 20), 90, np.uint8), np.array([[0.0, 1.0], [2.0, 4.0]], np.float32), grid,
        "a $ sign", "unit", ["one line"], [np.eye(10, dtype=bool)],
    )  # fmt: skip
    sample, overlay, shown, bar = figure.axes
    assert bar.get_ylim() == (0.0, 4.0) and "unit" in bar.get_ylabel()
    (image,) = shown.get_images()
    is_unseen = np.ma.getmaskarray(np.ma.asarray(image.get_array()))
    assert is_unseen.shape == (40, 20) and is_unseen[32:].all() and is_unseen[:, 16:].all()
    assert not is_unseen[:32, :16].any()
    assert image.get_cmap().get_bad()[:3].tolist() == pytest.approx(
        [int(UNSEEN[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    )
    assert len(sample.collections) == len(overlay.collections) == 1
    assert {text.get_text() for text in figure.texts} == {"a $ sign", "one line"}


def test_the_command_writes_picture_and_map_and_prints_json(
    run: Path, marked: Path, tmp_path: Path
):
    given = ("explain", "--model", run, "--phrase", BRIGHT, "--cpu")
    out = tmp_path / "new" / "map.png"
    ended = mmclip(tmp_path, *given, "--image", marked / "40.png", "--out", out)
    assert ended.code == 0, ended.err
    facts = json.loads(ended.out)
    image = read_image(marked / "40.png")
    with np.load(tmp_path / "new/map.npz") as stored, Image.open(out) as picture:
        assert stored["saliency"].shape == image.shape and stored["saliency"].dtype == np.float32
        assert ((stored["saliency"] == stored["saliency"].max()) == (image == 220)).all()
        assert str(stored["phrase"]) == BRIGHT and picture.width > 400
    # The same image out of the data folder, with what readers marked.
    row = mmclip(
        tmp_path, *given, "--data", marked / "data", "--image-id", "f40",
        "--boxes", f"ms-cxr={marked}", "--out", tmp_path / "row.png",
    )  # fmt: skip
    assert row.code == 0, row.err
    again = json.loads(row.out)
    assert (again["highest_at_px"], again["mass"]) == (facts["highest_at_px"], facts["mass"])
    assert again["annotations"][0]["area_ratio"] == 0.0625 and again["annotations"][0]["mass"] > 0.5
    repeat = mmclip(tmp_path, *given, "--image", marked / "40.png", "--out", out)
    assert "map.png is there; add --overwrite" in repeat.error()


def test_the_command_evaluates(run: Path, marked: Path, tmp_path: Path, results: dict):
    out = tmp_path / "a.json"
    ended = mmclip(
        tmp_path, "explain", "--model", run, "--data", marked / "data", "--evaluate",
        "--boxes", f"ms-cxr={marked}", "--prompts", "sentence", "--n-resamples", "200",
        "--out", out, "--cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (
        found == json.loads(out.read_text()) and found["saliency_maps"] == results["saliency_maps"]
    )
    assert "by random weights passed" in ended.err and "location prior" in ended.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "needs --data, --image-id, --phrase (or --image"),
        (["--image", "a.png"], "a map of --image needs --phrase"),
        (["--image", "a.png", "--phrase", "a", "--image-id", "b"], "has no use for --image-id"),
        (["--evaluate", "--data", "d"], "--evaluate needs --boxes"),
        (["--out", "a.gif"], "does not end in .png"),
        (["--score", "saliency"], "'saliency' is none of contribution"),
        (["--data", "d", "--image-id", "b", "--phrase", "a", "--boxes", "x"], "no NAME=FOLDER"),
        (["--image", "none.png", "--phrase", "a"], "none.png: the image file does not exist"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    run: Path, tmp_path: Path, given: list[str], message: str
):
    out = (
        []
        if "--out" in given
        else ["--out", tmp_path / ("a.json" if "--evaluate" in given else "a.png")]
    )
    assert message in mmclip(tmp_path, "explain", "--model", run, *out, *given).error()


def test_a_lateral_of_a_folder_is_mapped_with_one_warning_and_a_frontal_without(
    grey: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    samples = [replace(sample, image=f"{sample.image_id}.png") for sample in map(image_of, "abc")]
    for sample in samples:
        Image.fromarray(image_with(1, 2)).save(tmp_path / str(sample.image))
    views = [replace(f, view=v) for f, v in zip(samples, ("PA", "L", "unknown"), strict=True)]
    build_data(views, tmp_path, tmp_path / "data", image_size=made.IMAGE_SIZE)
    for sample in views:
        image_of_folder(grey, tmp_path / "data", sample.image_id)
    (said,) = caplog.messages
    assert "image b of" in said and "lateral" in said and "PA, AP, unknown" in said
    caplog.clear()
    learnt = made.small_config('data.views=["PA", "L"]')
    laterals = replace(grey, checkpoint=replace(grey.checkpoint, config=learnt))
    image_of_folder(laterals, tmp_path / "data", "b")  # a run that has learnt them
    assert caplog.messages == []


def test_an_image_that_is_not_in_the_folder_is_one_line(run: Path, marked: Path, tmp_path: Path):
    given = ("--data", marked / "data", "--image-id", "g", "--phrase", "a", "--out", "a.png")
    error = mmclip(tmp_path, "explain", "--model", run, *given).error()
    assert "has no image 'g'; its images are f0, f1, f2" in error
