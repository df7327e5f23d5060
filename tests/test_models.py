import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from mmclip import hub
from mmclip.config import GREY_MEAN, GREY_STD, Config, ImageEncoderConfig, TextEncoderConfig
from mmclip.config_io import ConfigError
from mmclip.data.text import train_tokenizer
from mmclip.losses import contrastive_sum
from mmclip.models.encoders import (
    EncoderError,
    build_image_encoder,
    build_text_encoder,
    encode_visible,
    patch_grid,
    rebuild_encoder,
    token_features,
)
from mmclip.models.norm import GlobalBatchNorm2d
from mmclip.patches import PatchGrid, unpatchify
from mmclip.training.objective import Objective
from mmclip.training.pretrain import build_model
from tests.made import REPORTS, WHOLE, MadeBatches, small_config, small_model

IMAGE = ImageEncoderConfig(kind="vit", width=32, depth=2, heads=2, patch_size=8)


def some_text(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 50, (rows, 9), generator=torch.Generator().manual_seed(1))
    is_valid = torch.ones(rows, 9, dtype=torch.bool)
    is_valid[0, 5:] = False
    return ids, is_valid


def some_images(rows: int = 4, px: int = 32) -> torch.Tensor:
    return torch.randn(rows, 1, px, px, generator=torch.Generator().manual_seed(2))


def saved_rgb_vit(folder: Path, image_size: int = 32) -> ViTModel:
    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=image_size,
        patch_size=8,
    )
    model = ViTModel(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(folder)
    return model


def resnet_config(*overrides: str) -> Config:
    return small_config("model.image.kind='resnet'", *overrides)


@pytest.mark.ledger("exporting a ResNet", "pooling and projection")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_embeddings_and_loss_equal_transformers_dual_encoder(kind: str):
    model = small_model(small_config(f"model.image.kind={kind}"))
    model.encode_image(10 * some_images() + 3)  # moves the running statistics of a ResNet
    model.eval()
    vision = AutoModel.from_config(model.vision_model.config)
    theirs = VisionTextDualEncoderModel(
        vision_model=vision, text_model=model.text_model, config=None
    ).eval()
    if (
        kind == "resnet"
    ):  # its pooled output is [b, d, 1, 1]; what an export has to say beside the weights
        theirs.vision_model.pooler = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
    theirs.visual_projection = torch.nn.Linear(32, 16, bias=False)
    theirs.text_projection = torch.nn.Linear(24, 16, bias=False)
    loaded = theirs.load_state_dict(model.state_dict(), strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    ids, is_valid = some_text()
    images = some_images()
    with torch.no_grad():
        image, text, scale = (
            model.encode_image(images),
            model.encode_text(ids, is_valid),
            model.scale(),
        )
        out = theirs(
            input_ids=ids, pixel_values=images, attention_mask=is_valid.long(), return_loss=True
        )
    torch.testing.assert_close(image.embedding, out.image_embeds)
    torch.testing.assert_close(text.embedding, out.text_embeds)
    eye, every = torch.eye(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    ours = (
        contrastive_sum(image.embedding, text.embedding, eye, every, scale)
        + contrastive_sum(text.embedding, image.embedding, eye, every, scale)
    ) / 8
    assert ours.item() == pytest.approx(out.loss.item(), rel=1e-5)


@pytest.mark.ledger("text encoder")
def test_padding_does_not_change_a_text_embedding():
    model = small_model().eval()
    ids, is_valid = some_text(1)
    is_valid[:] = True
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    longer = torch.cat([is_valid, torch.zeros(1, 4, dtype=torch.bool)], 1)
    with torch.no_grad():
        short = model.encode_text(ids, is_valid).embedding
        long = model.encode_text(padded, longer).embedding
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)


@pytest.mark.ledger("initialisation")
@pytest.mark.parametrize("width", [96, 128, 256])
def test_untrained_encoders_of_any_width_tell_inputs_apart(width: int):
    torch.manual_seed(0)
    text = build_text_encoder(TextEncoderConfig(width=width, depth=2, heads=2), 50, 16, 0)
    image = build_image_encoder(ImageEncoderConfig(kind="vit", width=width, depth=4, heads=2), 32)
    ids, is_valid = some_text()
    with torch.inference_mode():
        outputs = (
            text(input_ids=ids, attention_mask=is_valid.long()).pooler_output,
            image(pixel_values=some_images()).pooler_output,
        )
    for output in outputs:
        unit = torch.nn.functional.normalize(output, dim=1)
        distances = 1 - (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
        assert distances.mean() > 0.01  # with transformers' initializer_range: 0.0001 for texts


@pytest.mark.ledger("temperature")
def test_the_temperature_stays_under_its_clamp():
    model = small_model()
    with torch.no_grad():
        model.logit_scale.fill_(20.0)
    assert model.scale().item() == pytest.approx(100.0)


@pytest.mark.ledger("optimiser")
def test_weight_decay_spares_biases_norms_positions_and_the_temperature():
    names = small_model().no_decay_names()
    assert "logit_scale" in names
    assert "vision_model.embeddings.cls_token" in names
    assert "vision_model.embeddings.position_embeddings" in names
    assert "text_model.embeddings.position_embeddings.weight" in names
    assert "visual_projection.weight" not in names
    assert all(not n.endswith("bias") or n in names for n, _ in small_model().named_parameters())


@pytest.mark.ledger("one channel")
def test_a_folded_rgb_encoder_gives_what_it_gave_for_the_image_three_times(tmp_path: Path):
    rgb = saved_rgb_vit(tmp_path)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    ViTImageProcessor(image_mean=mean, image_std=std).save_pretrained(tmp_path)
    ours = build_image_encoder(ImageEncoderConfig(pretrained=str(tmp_path)), 32).eval()
    grey = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    as_rgb = (grey - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        want = rgb(as_rgb)
        got = ours((grey - GREY_MEAN) / GREY_STD)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=1e-4, atol=1e-4)


@pytest.mark.ledger("one channel")
def test_a_pretrained_encoder_takes_other_image_sizes_and_keeps_its_grid_in_between(tmp_path: Path):
    rgb = saved_rgb_vit(tmp_path)
    ours = build_image_encoder(ImageEncoderConfig(pretrained=str(tmp_path)), 64).eval()
    assert ours(some_images(2, 64)).last_hidden_state.shape == (2, 1 + 64, 32)
    interpolated = rgb.embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 32), 64, 64)
    embeddings = ours.embeddings
    assert isinstance(embeddings, torch.nn.Module)
    torch.testing.assert_close(embeddings.position_embeddings, interpolated)


def test_register_tokens_are_no_patches(tmp_path: Path):
    registers = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        num_register_tokens=4,
    )  # fmt: skip
    Dinov2WithRegistersModel(registers).save_pretrained(tmp_path)
    named = f"model.image.pretrained='{tmp_path}'"
    model = build_model(small_config(named, *WHOLE), train_tokenizer(REPORTS))
    images = some_images()
    features = model.encode_image(images).features
    output = model.vision_model(pixel_values=images).last_hidden_state
    assert features.shape == (4, 1 + 16, 32) and output.shape == (4, 1 + 4 + 16, 32)
    assert torch.equal(features, torch.cat([output[:, :1], output[:, 5:]], 1))


@pytest.mark.ledger("initialisation")
def test_what_a_foreign_file_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        build_image_encoder(ImageEncoderConfig(pretrained=str(tmp_path)), 32)
    assert "missing and newly initialised 2 (pooler.dense.bias, pooler.dense.weight)" in caplog.text


@pytest.mark.ledger("dropout")
def test_a_pretrained_text_encoder_keeps_its_weights_and_loses_its_dropout(tmp_path: Path):
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    saved = BertModel(config)
    saved.save_pretrained(tmp_path)
    text = TextEncoderConfig(pretrained=str(tmp_path))
    ours = build_text_encoder(text, vocab_size=60, max_tokens=32, pad_token_id=0)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    assert ours.config.hidden_dropout_prob == 0 and ours.config.attention_probs_dropout_prob == 0
    ids, is_valid = some_text(2)
    ours.train()
    one, two = (ours(input_ids=ids, attention_mask=is_valid).pooler_output for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("vocab_size", "max_tokens", "words"),
    [(61, 32, "knows 60 tokens"), (60, 33, "reads at most 32 tokens")],
)
def test_a_text_encoder_that_is_too_small_is_refused(
    tmp_path: Path, vocab_size: int, max_tokens: int, words: str
):
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=words):
        build_text_encoder(
            TextEncoderConfig(pretrained=str(tmp_path)), vocab_size, max_tokens, pad_token_id=0
        )


class Trap:
    """What a hostile weights file holds: it creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_plain_weights_in_a_bin_file_load_and_hostile_ones_run_nothing(tmp_path: Path):
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    saved, sprung = BertModel(config), tmp_path / "sprung"
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    text = TextEncoderConfig(pretrained=str(tmp_path))
    ours = build_text_encoder(text, 60, 32, 0)
    assert torch.equal(ours.get_parameter("pooler.dense.weight"), saved.pooler.dense.weight)
    torch.save({"pooler.dense.weight": Trap(sprung)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="cannot load"):
        build_text_encoder(text, 60, 32, 0)
    assert not sprung.exists()


def test_a_missing_model_is_one_clear_error(tmp_path: Path):
    with pytest.raises(EncoderError, match=r"give a folder with config\.json"):
        build_image_encoder(ImageEncoderConfig(pretrained=str(tmp_path / "none")), 32)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def offline(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_hf_file_metadata", offline)
    with pytest.raises(EncoderError, match=r"hub did not give it: no route to host\); give a fo"):
        build_text_encoder(TextEncoderConfig(pretrained="someone/a-model-of-theirs"), 60, 32, 0)
    assert asked == ["https://huggingface.co/someone/a-model-of-theirs/resolve/main/config.json"]


def test_an_image_size_that_patches_do_not_fill_is_refused(tmp_path: Path):
    saved_rgb_vit(tmp_path)
    with pytest.raises(EncoderError, match="is not a multiple of the encoder's patch size 8; 32"):
        build_image_encoder(ImageEncoderConfig(pretrained=str(tmp_path)), 36)


@pytest.mark.ledger("image encoder")
def test_a_resnet_has_a_feature_for_each_patch_and_halves_its_width_towards_the_image():
    for patch_size, widths in [(4, [32]), (8, [16, 32]), (16, [8, 16, 32]), (32, [4, 8, 16, 32])]:
        config = ImageEncoderConfig(width=32, depth=1, patch_size=patch_size)
        encoder = build_image_encoder(config, 64)
        assert encoder.config.hidden_sizes == widths
        features = token_features(encoder(pixel_values=some_images(2, 64)))
        assert features.shape == (2, 1 + (64 // patch_size) ** 2, 32)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("model.image.patch_size=12", "4, 8, 16 or 32"),
        ("model.image.width=31", "a multiple of 2"),
    ],
)
def test_sizes_that_no_resnet_has_are_refused(override: str, rule: str):
    with pytest.raises(ConfigError, match=rule):
        resnet_config(override)


def test_features_of_a_resnet_are_in_reading_order():
    encoder = small_model(resnet_config()).vision_model.eval()
    image = torch.zeros(1, 1, 32, 32)
    quiet = token_features(encoder(pixel_values=image))
    image[:, :, :4, 20:28] = 3.0  # under the last feature of the first of 4 rows
    change = (token_features(encoder(pixel_values=image)) - quiet)[0, 1:].norm(dim=-1)
    assert change.argmax() == 3


RESNET_PATCHES = pytest.mark.parametrize("patch_size", [4, 8, 16, 32])


@pytest.mark.ledger("where features lie")
@RESNET_PATCHES
def test_a_feature_of_a_resnet_looks_at_the_middle_of_its_patch(patch_size: int):
    torch.manual_seed(0)
    config = ImageEncoderConfig(width=32, depth=1, patch_size=patch_size)
    side_px, n = 16 * patch_size, 16
    encoder = build_image_encoder(config, side_px).eval()
    image = torch.randn(4, 1, side_px, side_px, requires_grad=True)
    row, column = 7, 8
    feature = token_features(encoder(pixel_values=image))[:, 1 + row * n + column]
    seen = torch.zeros(side_px, side_px)
    for channel in range(feature.shape[1]):  # where a change of the image changes the feature
        (grad,) = torch.autograd.grad(feature[:, channel].sum(), image, retain_graph=True)
        seen += grad.square().sum((0, 1))
    place = torch.arange(side_px) + 0.5
    centre = torch.stack((place @ seen.sum(1) / seen.sum(), place @ seen.sum(0) / seen.sum()))
    # Its patch: the one that the grid cuts out of an image that says where each pixel is.
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    cut = patch_grid(encoder).cut(torch.stack([rows, columns])[:, None])
    wanted = cut[:, row * n + column].mean(-1)
    assert centre.sub(wanted).abs().max() < 0.5 + patch_size / 8  # 0.5: the middle of 2k


@pytest.mark.ledger("where features lie")
@RESNET_PATCHES
def test_an_impulse_moves_the_feature_of_its_patch_most(patch_size: int):
    # Networks of random weights, as many as make chance small; every patch inside the border.
    side, n_nets = 6, 8
    changes = torch.zeros(side**2, side**2)
    for seed in range(n_nets):
        torch.manual_seed(seed)
        config = ImageEncoderConfig(width=32, depth=1, patch_size=patch_size)
        encoder = build_image_encoder(config, side * patch_size).eval()
        grid = patch_grid(encoder)
        one = torch.eye(side**2)[..., None].expand(-1, -1, patch_size**2)
        squares = unpatchify(one, side * patch_size)  # a square on each patch of the plain grid
        s = grid.shift_px
        impulses = torch.nn.functional.pad(squares[..., s:, s:], (0, s, 0, s))
        assert (grid.cut(impulses).mean(-1).argmax(1) == torch.arange(side**2)).all()
        with torch.no_grad():
            quiet = token_features(encoder(pixel_values=torch.zeros_like(impulses[:1])))
            moved = token_features(encoder(pixel_values=impulses)) - quiet
        changes += moved[:, 1:].norm(dim=-1) / n_nets
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    assert (changes.argmax(1) == torch.arange(side**2))[inside.flatten()].all()


@pytest.mark.ledger("where features lie")
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_nothing_of_a_masked_feature_reaches_a_prediction_of_pixels(kind: str):
    config = small_config(*WHOLE, f"model.image.kind={kind}", "image_mask.policy=random")
    model = small_model(config).train()
    raw: list[torch.Tensor] = []

    def keep(_: object, __: object, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        raw.append(output.last_hidden_state)

    model.vision_model.register_forward_hook(keep)
    batch = MadeBatches(4).batch()
    objective = Objective(config, patch_grid(model.vision_model))
    out = objective.outputs(model, batch)
    out.patches.square().sum().backward()
    gradient = raw[0].grad
    assert gradient is not None
    of_patch = gradient.flatten(2).mT if gradient.ndim == 4 else gradient[:, 1:]
    assert not of_patch[out.is_masked].any()
    assert of_patch[~out.is_masked].any(-1).all()


@pytest.mark.ledger("where features lie")
def test_masked_pixels_of_a_resnet_are_those_under_the_masked_features():
    grid = patch_grid(small_model(resnet_config()).vision_model)
    assert grid == PatchGrid(8, 4)
    is_masked = torch.zeros(1, 16, dtype=torch.bool)
    is_masked[0, 5] = True
    blank = grid.blanked(torch.ones(1, 1, 32, 32), is_masked)
    wanted = torch.ones(32, 32)
    wanted[4:12, 4:12] = 0  # around pixel (8, 8), which feature (1, 1) looks at
    assert torch.equal(blank[0, 0], wanted)
    assert not grid.cut(blank)[is_masked].any() and grid.cut(blank)[~is_masked].all()


def test_values_of_features_are_laid_over_the_image_between_four_of_them():
    values = torch.arange(9.0).square()[None]
    assert torch.equal(PatchGrid(8).on_image(values), values)
    laid = PatchGrid(8, 4).on_image(values).view(3, 3)
    assert laid[0, 0] == (0 + 1 + 9 + 16) / 4 and laid[2, 1] == (49 + 64) / 2 and laid[2, 2] == 64


def test_a_rebuilt_resnet_has_the_same_names_and_gives_the_same():
    encoder = small_model(resnet_config()).vision_model
    encoder(pixel_values=some_images())
    again = rebuild_encoder(encoder.config.to_dict())
    again.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        want = encoder.eval()(pixel_values=some_images()).pooler_output
        got = again.eval()(pixel_values=some_images()).pooler_output
    assert torch.equal(got, want)


@pytest.mark.ledger("batch statistics")
def test_visible_features_of_a_resnet_know_nothing_of_hidden_pixels():
    encoder = small_model(resnet_config()).vision_model.train()
    encoder(pixel_values=some_images())
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    is_masked = torch.zeros(4, 16, dtype=torch.bool)
    is_masked[:, [0, 5, 6, 15]] = True
    image = some_images().requires_grad_()
    visible = encode_visible(encoder, image, is_masked, 4)
    assert visible.shape == (4, 12, 32)
    # One row and feature at a time would do; batch statistics sum to 0, so weigh them at random.
    (visible * torch.randn(visible.shape)).sum().backward()
    assert image.grad is not None
    moved = patch_grid(encoder).cut(image.grad.abs()).sum(-1)
    assert (moved[is_masked] == 0).all() and (moved[~is_masked] > 0).all()
    after = encoder.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.ledger("batch statistics")
def test_batch_norm_over_processes_has_the_names_and_values_of_torch():
    ours, theirs = GlobalBatchNorm2d(3), torch.nn.BatchNorm2d(3)
    theirs.load_state_dict(ours.state_dict())
    x = 5 + 2 * torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(ours(x), theirs(x))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
