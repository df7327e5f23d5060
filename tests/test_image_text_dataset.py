import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmclip.config import AugmentConfig
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import augment, augmented, grid_of, normalise, open_dataset
from mmclip.data.images import resize_image
from mmclip.files import sealed
from tests.made import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.mark.ledger("grey normalisation")
def test_images_of_every_source_are_normalised_by_one_pair_of_numbers():
    image = torch.tensor([[[0, 51], [204, 255]]], dtype=torch.uint8)
    torch.testing.assert_close(normalise(image), torch.tensor([[[[-2.0, -1.2], [1.2, 2.0]]]]))


@pytest.mark.ledger("augmentation")
def test_augmentation_by_one_half_everywhere_changes_nothing():
    image = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    same = augment(image, torch.full((2, 6), 0.5), AugmentConfig())
    torch.testing.assert_close(same, image, atol=1e-5, rtol=0)


@pytest.mark.ledger("augmentation")
def test_a_shift_by_whole_pixels_moves_the_image_and_fills_with_black():
    image = normalise(torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8))
    config = AugmentConfig(
        rotation_deg=0, translate_ratio=0.125, scale_ratio=0, brightness=0, contrast=0
    )
    uniforms = torch.tensor([[0.5, 0.5, 1.0, 0.5, 0.5, 0.5]])  # +1: by an eighth of 16 px
    moved = augment(image, uniforms, config)
    torch.testing.assert_close(moved[..., :-2], image[..., 2:], atol=1e-5, rtol=0)
    assert torch.allclose(moved[..., -2:], torch.tensor(-2.0))


@pytest.mark.ledger("augmentation")
def test_a_crop_is_a_square_of_the_image_and_lies_where_the_numbers_say():
    image = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    config = AugmentConfig(
        rotation_deg=0, translate_ratio=0, scale_ratio=0, brightness=0, contrast=0, crop_scale=0.25
    )

    def cropped(*last: float, size: int = 8) -> torch.Tensor:
        return augment(image, torch.tensor([[0.5] * 6 + list(last)]), config, size)

    whole, middle, corner = (
        cropped(0.0, 0.9, 0.1, size=16), cropped(1.0, 0.5, 0.5), cropped(1.0, 1.0, 0.0),
    )  # fmt: skip
    torch.testing.assert_close(whole, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(middle, image[..., 4:12, 4:12], atol=1e-5, rtol=0)
    torch.testing.assert_close(corner, image[..., :8, 8:], atol=1e-5, rtol=0)


def test_the_grid_is_that_of_torch():
    theta = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    for size in (1, 7, 32):
        theirs = F.affine_grid(theta, [5, 1, size, size], align_corners=False)
        torch.testing.assert_close(grid_of(theta, size), theirs, atol=1e-6, rtol=0)


@pytest.mark.ledger("augmentation")
def test_images_are_augmented_alike_alone_and_together(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 24, 24), dtype=torch.uint8, generator=generator)
    uniforms, config = torch.rand(5, 9, generator=generator), AugmentConfig(crop_scale=0.6)
    one_by_one = augmented(pixels, uniforms, config, 16)
    monkeypatch.setattr("mmclip.data.image_text_dataset.IMAGES_AT_ONCE", 3)
    assert torch.equal(augmented(pixels, uniforms, config, 16), one_by_one)
    plain = augment(normalise(pixels), uniforms, config, 16)
    torch.testing.assert_close(one_by_one, plain, atol=1e-5, rtol=0)
    assert augmented(pixels[:0], uniforms[:0], config, 16).shape == (0, 1, 16, 16)


def test_crops_are_cut_from_larger_images_as_far_as_the_folder_holds_them(folder: Path):
    rows = np.arange(2)
    for px, crop_scale, side in ((16, 1.0, 16), (16, 0.5, 23), (16, 0.25, 32), (16, 0.1, 32)):
        read = open_dataset([folder], px).to_crop(AugmentConfig(crop_scale=crop_scale))
        assert read.pixels(rows).shape == (2, side, side)


def test_labels_tell_unknown_from_absent(folder: Path):
    labels = open_dataset([folder]).labels(["cardiomegaly", "mass", "nodule"])
    assert labels[:2, 0].tolist() == [0.0, 1.0]
    assert np.isnan(labels[:, 1:]).all()


@pytest.mark.parametrize("px", [8, 16, 24])
def test_larger_images_are_made_smaller_as_they_are_read(folder: Path, px: int):
    whole, smaller = open_dataset([folder]), open_dataset([folder], px)
    rows = np.array([2, 0])
    images = smaller.pixels(rows)
    assert images.shape == (2, px, px) and images.dtype == torch.uint8
    for pixels, cached in zip(images, whole.pixels(rows), strict=True):
        assert np.array_equal(pixels, resize_image(cached.numpy(), px))
    kept = smaller.select([i in (0, 2) for i in range(len(smaller))])
    assert torch.equal(kept.pixels(np.array([1, 0])), images)
    image = augmented(smaller.pixels(rows), torch.full((2, 6), 0.5), AugmentConfig())
    torch.testing.assert_close(image, normalise(images), atol=1e-5, rtol=0)


def test_images_of_their_own_size_are_read_bit_for_bit(folder: Path):
    assert torch.equal(
        open_dataset([folder], 32).pixels(np.arange(4)), open_dataset([folder]).pixels(np.arange(4))
    )


def test_smaller_images_are_refused_with_both_remedies(folder: Path):
    with pytest.raises(ManifestError, match=r"data build .* --image-size 64 --out .*-64px"):
        open_dataset([folder], 64)


def test_a_folder_made_with_other_words_is_told_and_read(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    n = len(open_dataset([folder]))
    assert not caplog.records
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    meta["made_with"]["words"]["lexicon/cues"] = "other"
    meta["made_with"]["vocabulary"] = 0
    path.write_text(json.dumps(sealed(meta)))
    assert len(open_dataset([folder])) == n
    (record,) = caplog.records
    assert "(findings/vocabulary.toml (version 0, now 1), lexicon/cues.toml changed)" in (
        record.getMessage()
    )


def test_a_folder_given_twice_is_refused(folder: Path):
    with pytest.raises(ManifestError, match="more than one of the data folders"):
        open_dataset([folder, folder])
