import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from mmclip.config import GREY_MEAN, GREY_STD, ImageEncoderConfig, TextEncoderConfig
from mmclip.losses import contrastive_sum
from mmclip.models.encoders import EncoderError, build_image_encoder, build_text_encoder
from tests.made import small_model

IMAGE = ImageEncoderConfig(width=32, depth=2, heads=2, patch_px=8)


def some_text(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 50, (rows, 9), generator=torch.Generator().manual_seed(1))
    is_valid = torch.ones(rows, 9, dtype=torch.bool)
    is_valid[0, 5:] = False
    return ids, is_valid


def some_films(rows: int = 4, px: int = 32) -> torch.Tensor:
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


def test_embeddings_and_loss_equal_transformers_dual_encoder():
    model = small_model().eval()
    theirs = VisionTextDualEncoderModel(
        vision_model=model.vision_model,
        text_model=model.text_model,
        config=None,
    ).eval()
    theirs.visual_projection = torch.nn.Linear(32, 16, bias=False)
    theirs.text_projection = torch.nn.Linear(24, 16, bias=False)
    loaded = theirs.load_state_dict(model.state_dict(), strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    ids, is_valid = some_text()
    films = some_films()
    with torch.no_grad():
        image, text, scale = (
            model.encode_image(films),
            model.encode_text(ids, is_valid),
            model.scale(),
        )
        out = theirs(
            input_ids=ids, pixel_values=films, attention_mask=is_valid.long(), return_loss=True
        )
    torch.testing.assert_close(image.embedding, out.image_embeds)
    torch.testing.assert_close(text.embedding, out.text_embeds)
    eye, every = torch.eye(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    ours = (
        contrastive_sum(image.embedding, text.embedding, eye, every, scale)
        + contrastive_sum(text.embedding, image.embedding, eye, every, scale)
    ) / 8
    assert ours.item() == pytest.approx(out.loss.item(), rel=1e-5)


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


@pytest.mark.parametrize("width", [96, 128, 256])
def test_untrained_encoders_of_any_width_tell_inputs_apart(width: int):
    torch.manual_seed(0)
    text = build_text_encoder(TextEncoderConfig(width=width, depth=2, heads=2), 50, 16, 0)
    image = build_image_encoder(ImageEncoderConfig(width=width, depth=4, heads=2), 32)
    ids, is_valid = some_text()
    with torch.inference_mode():
        outputs = (
            text(input_ids=ids, attention_mask=is_valid.long()).pooler_output,
            image(pixel_values=some_films()).pooler_output,
        )
    for output in outputs:
        unit = torch.nn.functional.normalize(output, dim=1)
        distances = 1 - (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
        assert distances.mean() > 0.01  # with transformers' initializer_range: 0.0001 for texts


def test_the_temperature_stays_under_its_clamp():
    model = small_model()
    with torch.no_grad():
        model.logit_scale.fill_(20.0)
    assert model.scale().item() == pytest.approx(100.0)


def test_weight_decay_spares_biases_norms_positions_and_the_temperature():
    names = small_model().no_decay_names()
    assert "logit_scale" in names
    assert "vision_model.embeddings.cls_token" in names
    assert "vision_model.embeddings.position_embeddings" in names
    assert "text_model.embeddings.position_embeddings.weight" in names
    assert "visual_projection.weight" not in names
    assert all(not n.endswith("bias") or n in names for n, _ in small_model().named_parameters())


def test_a_folded_rgb_encoder_gives_what_it_gave_for_the_film_three_times(tmp_path: Path):
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


def test_a_pretrained_encoder_takes_other_film_sizes_and_keeps_its_grid_in_between(tmp_path: Path):
    rgb = saved_rgb_vit(tmp_path)
    ours = build_image_encoder(ImageEncoderConfig(pretrained=str(tmp_path)), 64).eval()
    assert ours(some_films(2, 64)).last_hidden_state.shape == (2, 1 + 64, 32)
    interpolated = rgb.embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 32), 64, 64)
    embeddings = ours.embeddings
    assert isinstance(embeddings, torch.nn.Module)
    torch.testing.assert_close(embeddings.position_embeddings, interpolated)


def test_what_a_foreign_file_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        build_image_encoder(ImageEncoderConfig(pretrained=str(tmp_path)), 32)
    assert "missing and newly initialised 2 (pooler.dense.bias, pooler.dense.weight)" in caplog.text


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


def test_a_film_size_that_patches_do_not_fill_is_refused(tmp_path: Path):
    saved_rgb_vit(tmp_path)
    with pytest.raises(EncoderError, match="is not a multiple of the encoder's patch size 8; 32"):
        build_image_encoder(ImageEncoderConfig(pretrained=str(tmp_path)), 36)
