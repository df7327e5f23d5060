"""Every row of docs/encoders.md: a tiny model, as transformers saves it, trains and comes back.

The rows are in `tests/towers.py`. What is marked slow runs the commands on each of them.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    SegformerConfig,
    SegformerModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipTextModel,
    T5EncoderModel,
    VideoMAEConfig,
    VideoMAEModel,
    VisionTextDualEncoderModel,
    ViTImageProcessor,
    ViTMAEModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    YolosConfig,
    YolosModel,
)

from mmclip.batch import Batch
from mmclip.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mmclip.config import GREY_MEAN, GREY_STD, Config, ImageEncoderConfig, TrainConfig
from mmclip.config_io import ConfigError
from mmclip.data.batches import TrainingBatches
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.streams import training_dataset
from mmclip.data.text import tokenise, train_tokenizer
from mmclip.export.dual_encoder import dual_encoder
from mmclip.export.towers import embed_pixels, embed_tokens, encoder_alone, plain_model
from mmclip.finetuning.features import Start
from mmclip.finetuning.supervised import FineTuneConfig
from mmclip.models.classifier import Classifier, Features, freeze_unused, lr_scales
from mmclip.models.encoders import (
    EncoderError,
    as_pooled,
    build_image_encoder,
    check_named_encoders,
    image_layout,
    patch_grid,
    pooled,
    rebuild_encoder,
    text_layout,
    token_features,
)
from mmclip.models.mmclip import MMCLIP
from mmclip.models.norm import GlobalBatchNorm2d
from mmclip.models.trainable import layer_numbers, lr_ratios, set_trainable
from mmclip.training.objective import Objective
from mmclip.training.optimizer import make_optimizer
from mmclip.training.pretrain import build_model, make_tokenizer
from tests.commands import mmclip
from tests.made import REPORTS, WHOLE, small_config, write_folder
from tests.test_docs import rows as table_of
from tests.test_docs import spans_of
from tests.towers import (
    GRID,
    IMAGE_ROWS,
    SIZES,
    TEXT_ROWS,
    TOKENIZERS,
    ImageRow,
    TextRow,
    save,
)

LEARNS = (*WHOLE, "unpaired.prompt_pairs=true")
"""The whole method, with prompts beside reports."""
MEAN, STD = (0.5, 0.45, 0.4), (0.2, 0.25, 0.3)
ROWS = [*(("image", name) for name in IMAGE_ROWS), *(("text", name) for name in TEXT_ROWS)]
OF_OTHERS = (
    "clip", "siglip", "vision-text-dual-encoder", "vit_mae, with decoder", "t5, its encoder alone",
)  # fmt: skip
"""Rows whose encoder is that of another row once it is taken out of its model."""
every_row = pytest.mark.parametrize(
    ("modality", "name"),
    [
        pytest.param(*row, id=": ".join(row), marks=pytest.mark.slow if row[1] in OF_OTHERS else ())
        for row in ROWS
    ],
)
every_image_row = pytest.mark.parametrize("name", IMAGE_ROWS)
every_text_row = pytest.mark.parametrize("name", TEXT_ROWS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A folder with the model of each row."""
    root, made = tmp_path_factory.mktemp("towers"), {}
    for number, (modality, name) in enumerate(ROWS):
        folder = made[modality, name] = root / str(number)
        row_of(modality, name).save(folder)
        if modality == "image":
            ViTImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 32 px."""
    return write_folder(tmp_path_factory.mktemp("data"), 10)


@pytest.fixture(scope="module")
def dataset(data: Path) -> ImageTextDataset:
    return open_dataset([data], 32)


def row_of(modality: str, name: str) -> ImageRow | TextRow:
    return IMAGE_ROWS[name] if modality == "image" else TEXT_ROWS[name]


class Made(NamedTuple):
    """A model as a run builds it, and a batch for it."""

    config: Config
    model: MMCLIP
    tokenizer: Any
    batch: Batch

    def losses(self) -> dict[str, Tensor]:
        """Sums of each term."""
        objective = Objective(self.config, patch_grid(self.model.vision_model))
        return objective.sums(self.model, self.batch)


MODELS: dict[tuple, Made] = {}
"""What `make` built: each model once."""
TOKENIZERS_MADE: dict[Path | None, Any] = {}
BATCHES: dict[tuple, Batch] = {}
"""One of a tokenizer (None: the new one, which every image encoder meets) serves many models."""


def make(dataset: ImageTextDataset, folder: Path | None, modality: str, *overrides: str) -> Made:
    """A model with one pretrained encoder, and a batch of all training rows.

    A model is built once and copied, as there are hundreds of tests and few models. The data set is
    the same in all of them.
    """
    key = (folder, modality, overrides)
    if key not in MODELS:
        MODELS[key] = build(dataset, folder, modality, *overrides)
    return MODELS[key]._replace(model=copy.deepcopy(MODELS[key].model))


def build(dataset: ImageTextDataset, folder: Path | None, modality: str, *overrides: str) -> Made:
    """The same without the shelf."""
    named = [] if folder is None else [f"model.{modality}.pretrained='{folder}'"]
    config = small_config(*named, "data.max_tokens=32", "unpaired.rows_per_pair=1", *overrides)
    of_texts = folder if modality == "text" else None
    if of_texts not in TOKENIZERS_MADE:
        TOKENIZERS_MADE[of_texts] = make_tokenizer(config, dataset)
    tokenizer = TOKENIZERS_MADE[of_texts]
    torch.manual_seed(0)
    model = build_model(config, tokenizer)
    set_trainable(model, config.model)
    grid = patch_grid(model.vision_model)
    key = (of_texts, grid, *(o for o in overrides if not o.startswith("model.")))
    if key not in BATCHES:
        chosen = training_dataset(dataset, config)
        batches = TrainingBatches(chosen, tokenizer, config, grid)
        BATCHES[key] = batches.of_rows(np.arange(len(chosen)))
    return Made(config, model.train(), tokenizer, BATCHES[key])


# What each row promises


@every_row
def test_a_row_learns_the_whole_method_with_a_gradient_for_every_parameter(
    folders: dict, dataset: ImageTextDataset, modality: str, name: str
):
    made = make(dataset, folders[modality, name], modality, *LEARNS)
    named = dict(made.model.named_parameters())
    wanted = {name for name, p in named.items() if p.requires_grad}
    own = "vision_model." if modality == "image" else "text_model."
    assert sum(key.startswith(own) for key in wanted) > 10
    unused = {key.removeprefix(own) for key in named if key.startswith(own) and key not in wanted}
    assert all(key.endswith("mask_token") or key.startswith("pooler.") for key in unused)
    optimizer = torch.optim.AdamW([named[key] for key in wanted], lr=1e-3)
    first: dict[str, float] = {}
    terms: dict[str, Tensor] = {}
    for step in range(4):
        terms = made.losses()
        assert terms.keys() == {"contrastive", "image", "text"}
        torch.stack(list(terms.values())).sum().backward()
        if step == 0:
            first = {key: term.item() for key, term in terms.items()}
            assert {key for key in wanted if named[key].grad is None} == set()
            assert all(torch.isfinite(named[key].grad).all() for key in wanted)
            reached = [key for key in wanted if key.startswith(own) and named[key].grad.any()]
            assert len(reached) > 0.6 * sum(key.startswith(own) for key in wanted)
        optimizer.step()
        optimizer.zero_grad()
    assert all(terms[key].item() < first[key] for key in ("image", "text"))
    assert sum(term.item() for term in terms.values()) < sum(first.values())


@every_row
def test_a_row_trains_the_contrastive_term_alone_and_nothing_in_it_is_random(
    folders: dict, dataset: ImageTextDataset, modality: str, name: str
):
    made = make(dataset, folders[modality, name], modality)
    encoder = made.model.vision_model if modality == "image" else made.model.text_model
    layout = image_layout(encoder) if modality == "image" else text_layout(encoder)
    assert layout.pooling == row_of(modality, name).pools
    terms, again = made.losses(), made.losses()
    assert terms.keys() == {"contrastive"} and torch.equal(*terms.values(), *again.values())
    terms["contrastive"].backward()
    missing = [n for n, p in made.model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@every_row
def test_a_row_comes_back_from_a_checkpoint_as_it_was(
    folders: dict, dataset: ImageTextDataset, tmp_path: Path, modality: str, name: str
):
    made = make(dataset, folders[modality, name], modality, *LEARNS)
    save_checkpoint(tmp_path, 1, made.model, made.tokenizer, made.config, {}, {}, 1)
    again = load_checkpoint(tmp_path)
    taken = [n for n, p in made.model.named_parameters() if p.requires_grad]
    assert taken == [n for n, p in again.model.named_parameters() if p.requires_grad]
    assert len(again.tokenizer) == len(made.tokenizer)
    made.model.eval()
    texts = made.batch.reports
    with torch.no_grad():
        for model in (made.model, again.model):
            image, text = (
                model.encode_image(made.batch.image),
                model.encode_text(texts.ids, texts.is_valid),
            )
            if model is made.model:
                want = (*image, *text)
        for wanted, got in zip(want, (*image, *text), strict=True):
            assert torch.equal(wanted, got)


@every_row
def test_a_row_is_exported_with_its_embeddings_or_refused_by_name(
    folders: dict, dataset: ImageTextDataset, tmp_path: Path, modality: str, name: str
):
    made = make(dataset, folders[modality, name], modality)
    model, texts = made.model.eval(), made.batch.reports
    plain = plain_model(Checkpoint(tmp_path, model, made.tokenizer, made.config, {}))
    rgb = plain.as_rgb(made.batch.image)
    tokens = {"input_ids": texts.ids, "attention_mask": texts.is_valid.long()}
    with torch.no_grad():
        image = model.encode_image(made.batch.image).embedding
        text = model.encode_text(texts.ids, texts.is_valid).embedding
        torch.testing.assert_close(embed_pixels(plain, rgb), image, rtol=0, atol=1e-5)
        torch.testing.assert_close(embed_tokens(plain, **tokens), text, rtol=0, atol=1e-5)
        encoder = encoder_alone(plain, "vision" if modality == "image" else "text")
        encoder.save_pretrained(tmp_path / "alone")
        again = type(encoder).from_pretrained(tmp_path / "alone").eval()
        given = {"pixel_values": rgb} if modality == "image" else tokens
        torch.testing.assert_close(again(**given)[0], encoder(**given)[0], rtol=0, atol=1e-5)
        if not row_of(modality, name).exports:
            with pytest.raises(EncoderError, match=r"^--to hf: .*; take --to onnx, .*--to vision"):
                dual_encoder(plain)
            return
        dual_encoder(plain).save_pretrained(tmp_path / "hf")
        theirs = VisionTextDualEncoderModel.from_pretrained(tmp_path / "hf").eval()
        found = theirs(pixel_values=rgb, **tokens)
    torch.testing.assert_close(found.image_embeds, image, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.text_embeds, text, rtol=0, atol=1e-5)


# Images


def theirs_of(folder: Path) -> nn.Module:
    whole = AutoModel.from_pretrained(folder).eval()
    return whole.vision_model if hasattr(whole, "vision_model") else whole


def theirs_on(model: nn.Module, image: Tensor, px: int) -> tuple[Tensor, Tensor | None]:
    """Features and pooled output of a model of transformers on images, called by hand."""
    grey = image * GREY_STD + GREY_MEAN  # 0..1
    rgb = (grey - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    kind = model.config.model_type
    interpolate = kind in ("vit", "deit", "vit_mae", "clip_vision_model", "siglip_vision_model")
    more: dict[str, Any] = {"interpolate_pos_encoding": True} if interpolate and px != 32 else {}
    if isinstance(model, ViTMAEModel):
        model.config.mask_ratio = 0.0
        more["noise"] = torch.arange((px // 8) ** 2).float().expand(len(image), -1)
    output = model(pixel_values=rgb, **more)
    pooler = output.get("pooler_output")
    return output.last_hidden_state, None if pooler is None else pooler.flatten(1)


@every_image_row
@pytest.mark.parametrize("px", [32, 64])
def test_features_are_those_of_transformers_for_the_image_three_times(
    folders: dict, name: str, px: int
):
    folder = folders["image", name]
    ours = build_image_encoder(ImageEncoderConfig(pretrained=str(folder)), px).eval()
    image = torch.randn(2, 1, px, px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, pooler = theirs_on(theirs_of(folder), image, px)
        output = ours(pixel_values=image)
        vector, tokens = pooled(output, ours), token_features(output, ours)
    if name.startswith("beit") and px != 32:  # theirs resamples its bias in another way
        assert tokens.shape[1:] == features.shape[1:]
        return
    torch.testing.assert_close(output.last_hidden_state, features, rtol=1e-4, atol=1e-4)
    wanted = features[:, 0] if pooler is None else pooler
    torch.testing.assert_close(vector, wanted, rtol=1e-4, atol=1e-4)
    side, layout = px // 8, image_layout(ours)
    assert tokens.shape == (
        2,
        1 + side**2,
        features.shape[2] if features.ndim == 3 else features.shape[1],
    )
    if features.ndim == 3:
        assert torch.equal(tokens[:, 1:], output.last_hidden_state[:, layout.n_prefix :])
        assert layout.n_prefix == features.shape[1] - side**2


@pytest.mark.ledger("score space")
@every_image_row
@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_a_patch_takes_the_way_of_the_pooled_vector(folders: dict, name: str, pooling: str):
    config = ImageEncoderConfig(pretrained=str(folders["image", name]), pooling=pooling)
    ours = build_image_encoder(config, 32).eval()
    image = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = ours(pixel_values=image)
        vector, tokens = pooled(output, ours), token_features(output, ours)
        if ours.config.model_type == "siglip_vision_model" and pooling == "auto":
            # It attends to all patches, so to compare is to give it one patch alone.
            alone = ours.get_submodule("head")(tokens[0, 1:, None])
            torch.testing.assert_close(as_pooled(tokens[:1, 1:], ours)[0], alone)
            return
        reads = {"cls": tokens[:, :1], "mean": tokens[:, 1:].mean(1, keepdim=True)}
        of = {kind: as_pooled(read, ours)[:, 0] for kind, read in reads.items()}
    same = [kind for kind, found in of.items() if torch.allclose(found, vector, atol=1e-5)]
    assert same, "neither the class token nor the mean of patches comes out as the pooled vector"


@every_image_row
def test_a_changed_patch_changes_its_feature_most(folders: dict, name: str):
    folder = folders["image", name]
    ours = build_image_encoder(ImageEncoderConfig(pretrained=str(folder)), 32).eval()
    image = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = token_features(ours(pixel_values=image), ours)
        s = patch_grid(ours).shift_px
        image[:, :, 8 - s : 16 - s, 16 - s : 24 - s] += 4.0  # the second row's third of 4 x 4
        after = token_features(ours(pixel_values=image), ours)
    change = (after - before)[0, 1:].norm(dim=-1)
    assert 6 in change.topk(2 if s else 1).indices  # a ResNet of random weights blurs


@every_row
@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_pooling_is_as_configured_or_refused_by_name(
    folders: dict, dataset: ImageTextDataset, modality: str, name: str, pooling: str
):
    row, key = row_of(modality, name), f"model.{modality}.pooling={pooling}"
    if pooling in row.refuses:
        with pytest.raises(EncoderError, match=f"model.{modality}.pooling='{pooling}'.*set it to"):
            make(dataset, folders[modality, name], modality, key)
        return
    if pooling == "pooler" and name.startswith("vit_mae"):
        return  # a new one, as of a ViT whose file has none
    made = make(dataset, folders[modality, name], modality, key)
    layout = image_layout if modality == "image" else text_layout
    encoder = made.model.vision_model if modality == "image" else made.model.text_model
    assert layout(encoder).pooling == pooling
    made.losses()["contrastive"].backward()
    taking = [(n, p) for n, p in encoder.named_parameters() if p.requires_grad]
    assert [n for n, p in taking if p.grad is None] == []
    if modality == "image":
        made.model.eval()
        with torch.no_grad():
            output = encoder(pixel_values=made.batch.image)
            vector, patches = pooled(output, encoder), output.last_hidden_state
        n = layout(encoder).n_prefix
        mean = patches.mean((2, 3)) if patches.ndim == 4 else patches[:, n:].mean(1)
        want = {"mean": mean, "cls": patches[:, 0]}.get(pooling, vector)
        torch.testing.assert_close(vector, want)


CAUSAL = {
    "gpt2": lambda n: GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=n)),
    "llama": lambda n: LlamaModel(LlamaConfig(**SIZES, vocab_size=n)),
    "bert": lambda n: BertModel(BertConfig(**SIZES, vocab_size=n, is_decoder=True)),
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_text_encoder_is_not_pooled_at_a_token_that_sees_no_other(
    kind: str, dataset: ImageTextDataset, tmp_path: Path
):
    tokenizer = TOKENIZERS["wordpiece"]()
    tokenizer.save_pretrained(tmp_path)
    save(CAUSAL[kind](len(tokenizer)), tmp_path)
    made = make(dataset, tmp_path, "text")
    assert text_layout(made.model.text_model).pooling == "mean"
    tokens = tokenise(made.tokenizer, ["no pleural effusion", "pleural effusion"], max_tokens=9)
    with torch.no_grad():
        one, other = made.model.encode_text(
            torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.is_valid)
        ).embedding
    assert (one - other).abs().max() > 1e-3
    for pooling, said in (("cls", "is causal: its first token"), ("pooler", "has no pooler")):
        with pytest.raises(EncoderError, match=f"model.text.pooling='{pooling}'.*{said}.*'mean'"):
            make(dataset, tmp_path, "text", f"model.text.pooling={pooling}")


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("pooling", ["auto", "pooler", "mean", "cls"])
def test_new_encoders_pool_as_configured(
    kind: str, pooling: str, dataset: ImageTextDataset, tmp_path: Path
):
    overrides = [f"model.image.kind={kind}", f"model.image.pooling={pooling}"]
    if (kind, pooling) == ("resnet", "cls"):
        with pytest.raises(EncoderError, match="has no class token; set it to 'pooler' or 'mean'"):
            make(dataset, None, "image", *overrides)
        return
    made = make(dataset, None, "image", *overrides, f"model.text.pooling={pooling}", *WHOLE)
    is_default = pooling in ("auto", "pooler")
    for encoder in (made.model.vision_model, made.model.text_model):
        assert ("mmclip_layout" in encoder.config.to_dict()) is not is_default
    torch.stack(list(made.losses().values())).sum().backward()
    assert not [n for n, p in made.model.named_parameters() if p.requires_grad and p.grad is None]
    save_checkpoint(tmp_path, 1, made.model, made.tokenizer, made.config, {}, {}, 1)
    again, image = load_checkpoint(tmp_path).model, made.batch.image
    with torch.no_grad():
        want, got = (m.eval().encode_image(image).embedding for m in (made.model, again))
    assert torch.equal(want, got)


@every_image_row
def test_hiding_pixels_works_or_is_refused_before_training(
    folders: dict, dataset: ImageTextDataset, name: str
):
    overrides = (*WHOLE, "image_mask.mask_stage=pixels")
    if IMAGE_ROWS[name].hides_pixels:
        terms = make(dataset, folders["image", name], "image", *overrides).losses()
        assert torch.isfinite(terms["image"])
    else:
        with pytest.raises(EncoderError, match=r"set image_mask\.mask_stage='features'"):
            make(dataset, folders["image", name], "image", *overrides)


def test_an_image_that_features_do_not_divide_is_refused_with_a_size_that_fits(folders: dict):
    for name, px, words in (
        ("vit", 36, "patch size 8; 32 is"),
        ("swin", 36, "8 px that a feature of 'swin' covers; 32 is"),
        ("convnextv2", 44, "8 px that a feature of 'convnextv2' covers; 40 is"),
    ):
        with pytest.raises(EncoderError, match=f"data.image_size={px} is not a multiple .*{words}"):
            build_image_encoder(ImageEncoderConfig(pretrained=str(folders["image", name])), px)


# Texts


@every_text_row
def test_a_text_does_not_depend_on_its_padding_or_its_neighbours(
    folders: dict, dataset: ImageTextDataset, name: str
):
    made = make(dataset, folders["text", name], "text")
    made.model.eval()
    texts = [*REPORTS[:2], "No effusion."]
    together = tokenise(made.tokenizer, texts, max_tokens=32)
    with torch.no_grad():
        ids, is_valid = torch.from_numpy(together.ids).long(), torch.from_numpy(together.is_valid)
        both = made.model.encode_text(ids, is_valid)
        for i, text in enumerate(texts):
            alone = tokenise(made.tokenizer, [text], max_tokens=32)
            n = alone.ids.shape[1]
            assert np.array_equal(alone.ids[0], together.ids[i, :n])
            one = made.model.encode_text(
                torch.from_numpy(alone.ids).long(), torch.from_numpy(alone.is_valid)
            )
            torch.testing.assert_close(one.embedding[0], both.embedding[i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.features[0], both.features[i, :n], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both.embedding[0], both.embedding[1], atol=1e-4)


@pytest.mark.ledger("score space")
@every_text_row
def test_a_text_is_pooled_as_transformers_does_it(
    folders: dict, dataset: ImageTextDataset, name: str
):
    folder = folders["text", name]
    made = make(dataset, folder, "text", "data.max_tokens=40")
    made.model.eval()
    kind = made.model.text_model.config.model_type
    if kind == "t5":
        theirs: Any = T5EncoderModel.from_pretrained(folder)
    elif name == "siglip_text_model":
        theirs = SiglipTextModel.from_pretrained(folder)
    else:
        theirs = AutoModel.from_pretrained(folder)
    theirs = theirs.text_model if "text_model" in dict(theirs.named_children()) else theirs
    theirs.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if kind == "siglip_text_model" else "longest"
    batch = tokenizer(
        REPORTS[:2], return_tensors="pt", padding_side="right", padding=padding, truncation=True,
        max_length=40,
    )  # fmt: skip
    given = {"input_ids": batch["input_ids"]}
    if kind != "siglip_text_model":
        given["attention_mask"] = batch["attention_mask"]
    own = tokenise(made.tokenizer, REPORTS[:2], max_tokens=40)
    is_valid = torch.from_numpy(own.is_valid)
    with torch.no_grad():
        output = theirs(**given)
        features = output.last_hidden_state
        mine = made.model.encode_text(torch.from_numpy(own.ids).long(), is_valid)
        if kind == "t5":
            weight = batch["attention_mask"][..., None].float()
            vector = (features * weight).sum(1) / weight.sum(1)
        else:
            vector = output.pooler_output if "pooler_output" in output else features[:, 0]
        want = nn.functional.normalize(made.model.text_projection(vector), dim=-1)
    torch.testing.assert_close(mine.embedding, want, rtol=1e-4, atol=1e-5)
    words = nn.functional.normalize(made.model.project_words(mine.features), dim=-1)
    if kind == "t5":  # a mean of words, after which nothing stands
        words = made.model.project_words(vector[:, None])
        words = nn.functional.normalize(words, dim=-1)
    # One of the words is pooled: the first, the last, or that of the end of the text.
    nearest = (words * want[:, None]).sum(-1).amax(1)
    torch.testing.assert_close(nearest, torch.ones(2), rtol=1e-4, atol=1e-5)
    n = own.ids.shape[1]
    torch.testing.assert_close(
        mine.features[is_valid], features[:, :n][is_valid], rtol=1e-4, atol=1e-4
    )


@every_text_row
def test_hidden_words_are_masks_and_the_frame_stays(
    folders: dict, dataset: ImageTextDataset, name: str
):
    made = make(dataset, folders["text", name], "text", *LEARNS)
    texts, tokenizer = made.batch.reports, made.tokenizer
    assert texts.is_masked.any()
    assert (texts.masked_ids[texts.is_masked] == tokenizer.mask_token_id).all()
    frame = set(tokenizer(["a"])["input_ids"][0]) & set(tokenizer.all_special_ids)
    assert not frame & set(texts.ids[texts.is_masked].tolist())
    words = made.model.text_model.get_input_embeddings().weight
    assert len(words) >= len(tokenizer) and made.model.text_decoder is not None
    assert made.model.text_decoder.bias.shape == (len(words),)


def test_an_added_mask_gets_the_mean_embedding_and_leaves_the_others(
    folders: dict, dataset: ImageTextDataset
):
    for name in ("clip_text_model", "siglip", "t5"):
        folder = folders["text", name]
        made = make(dataset, folder, "text")
        words = made.model.text_model.get_input_embeddings().weight
        whole = (
            AutoModel.from_pretrained(folder)
            if name != "t5"
            else T5EncoderModel.from_pretrained(folder)
        )
        whole = whole.text_model if name == "siglip" else whole
        old = whole.get_input_embeddings().weight
        assert len(words) == len(old) + 1 == made.tokenizer.mask_token_id + 1
        assert torch.equal(words[:-1], old)
        torch.testing.assert_close(words[-1], old.mean(0))


def test_weights_and_tokenizer_of_two_folders_are_refused(
    folders: dict, dataset: ImageTextDataset, tmp_path: Path
):
    TEXT_ROWS["bert"].save(tmp_path)
    train_tokenizer([*REPORTS, "pneumothorax consolidation atelectasis"] * 5, 400).save_pretrained(
        tmp_path
    )
    with pytest.raises(EncoderError, match="take both from the same folder"):
        make(dataset, tmp_path, "text")


@pytest.mark.parametrize(
    ("name", "most"), [("roberta", 40), ("mpnet", 40), ("bert", 40), ("siglip", 40), ("clip", 40)]
)
def test_a_text_that_is_longer_than_positions_go_is_refused(
    folders: dict, dataset: ImageTextDataset, name: str, most: int
):
    folder = folders["text", name]
    assert make(dataset, folder, "text", f"data.max_tokens={most}").model
    with pytest.raises(EncoderError, match=f"reads at most {most} tokens; set data.max_tokens"):
        make(dataset, folder, "text", f"data.max_tokens={most + 1}")


# What cannot serve


TINY = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
WAV2VEC2 = {
    **TINY, "conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 60,
}  # fmt: skip
YOLOS = {**GRID, "image_size": [32, 32], "num_detection_tokens": 3}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60}
NO_SUCH_ENCODER = {
    "yolos": ("image", YolosModel, YolosConfig(**YOLOS), "which of them are patches"),
    "videomae": ("image", VideoMAEModel, VideoMAEConfig(**GRID, num_frames=2), "no patch proj"),
    "siglip2_vision": (
        "image", Siglip2VisionModel, Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=16),
        "siglip2_vision_model",
    ),
    "wav2vec2": ("image", Wav2Vec2Model, Wav2Vec2Config(**WAV2VEC2), "reads input_values and no"),
    "bart": ("text", BartModel, BartConfig(**BART), "cannot be taken without its decoder"),
    "gpt2": ("image", GPT2Model, GPT2Config(**GPT2), "reads input_ids and no pixel_values"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_SUCH_ENCODER)
def test_a_model_that_is_no_such_encoder_is_refused_in_one_line(
    kind: str, dataset: ImageTextDataset, tmp_path: Path
):
    modality, model, config, words = NO_SUCH_ENCODER[kind]
    save(model(config), tmp_path)
    TEXT_ROWS["bert"].save(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").glob("*token*"):
        file.rename(tmp_path / file.name)
    with pytest.raises(EncoderError, match=words) as caught:
        make(dataset, tmp_path, modality)
    said = str(caught.value)
    assert "\n" not in said and "take a" in said and kind in said


@every_row
def test_an_encoder_of_the_other_modality_is_refused_before_anything_is_built(
    folders: dict, modality: str, name: str
):
    if name in ("clip", "siglip", "vision-text-dual-encoder"):
        return  # these have both
    other = "text" if modality == "image" else "image"
    config = small_config(f"model.{other}.pretrained='{folders[modality, name]}'")
    with pytest.raises(EncoderError, match=f"take an? {other} encoder, such as") as caught:
        check_named_encoders(config.model)
    assert "\n" not in str(caught.value)


def test_a_model_that_halves_without_patches_of_its_own_is_read_by_what_it_gives(
    dataset: ImageTextDataset, tmp_path: Path
):
    segformer = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    save(SegformerModel(segformer), tmp_path)
    made = make(dataset, tmp_path, "image", *WHOLE)
    assert image_layout(made.model.vision_model).pooling == "mean"
    torch.stack(list(made.losses().values())).sum().backward()


# Freezing, learning rates, memory


@every_row
def test_frozen_layers_keep_their_weights_and_the_rest_learns(
    folders: dict, dataset: ImageTextDataset, modality: str, name: str
):
    folder, key = folders[modality, name], f"model.{modality}.freeze_layers"
    made = make(dataset, folder, modality, f"{key}=1")
    encoder = made.model.vision_model if modality == "image" else made.model.text_model
    number = layer_numbers([n for n, _ in encoder.named_parameters()])
    before = {n: p.clone() for n, p in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=1.0)
    made.losses()["contrastive"].backward()
    optimizer.step()
    moved = {n for n, p in encoder.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(number[n] > 1 for n in moved)
    assert {number[n] for n in number} >= {0, 1, 2}
    with pytest.raises(EncoderError, match=f"{key}=99, and .* has 2 blocks here"):
        make(dataset, folder, modality, f"{key}=99")


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_an_encoder_that_is_frozen_whole_is_a_constant(
    folders: dict, dataset: ImageTextDataset, name: str
):
    made = make(dataset, folders["image", name], "image", "model.image.freeze_layers=all")
    assert not [p for p in made.model.vision_model.parameters() if p.requires_grad]
    before = {k: v.clone() for k, v in made.model.vision_model.state_dict().items()}
    with torch.no_grad():
        trains = made.model.encode_image(made.batch.image).embedding
        tested = made.model.eval().encode_image(made.batch.image).embedding
    assert torch.equal(trains, tested)  # batch norm, too
    after = made.model.vision_model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    norms = [m for m in made.model.modules() if isinstance(m, GlobalBatchNorm2d)]
    assert bool(norms) == (name == "resnet")
    made.model.train()
    made.losses()["contrastive"].backward()


@every_row
def test_recomputed_layers_have_the_same_gradients(
    folders: dict, dataset: ImageTextDataset, modality: str, name: str
):
    folder, key = folders[modality, name], f"model.{modality}.gradient_checkpointing=true"
    if not row_of(modality, name).recomputes:
        with pytest.raises(EncoderError, match="cannot recompute its layers; set it to false"):
            make(dataset, folder, modality, key)
        return
    grads, calls = [], [0, 0]
    for n, more in enumerate(((), (key,))):
        made = make(dataset, folder, modality, *LEARNS, *more)
        encoder = made.model.vision_model if modality == "image" else made.model.text_model

        def count(*_: object, n: int = n) -> None:
            calls[n] += 1

        for module in encoder.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(count)
        torch.stack(list(made.losses().values())).sum().backward()
        grads.append({n: p.grad for n, p in made.model.named_parameters() if p.requires_grad})
    assert calls[1] > 1.5 * calls[0]
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


def test_pretrained_encoders_learn_at_their_share_of_the_rate(
    folders: dict, dataset: ImageTextDataset
):
    ratio = "train.pretrained_lr_ratio=0.1"
    made = make(dataset, folders["image", "vit"], "image", ratio)
    scale = lr_ratios(made.model, made.config)
    assert scale is not None
    for name, of in scale.items():
        assert of == (0.1 if name.startswith("vision_model.") else 1.0)
    optimizer = make_optimizer(made.model, set(), made.config.train, scale)
    slow = {id(p) for p in made.model.vision_model.parameters()}
    for group in optimizer.param_groups:
        assert all((id(p) in slow) == (group["lr_scale"] == 0.1) for p in group["params"])
    assert lr_ratios(made.model, small_config()) is None
    text = make(dataset, folders["text", "bert"], "text", ratio)
    scale = lr_ratios(text.model, text.config)
    assert scale is not None
    assert {n.split(".")[0] for n, of in scale.items() if of == 0.1} == {"text_model"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.pretrained_lr_ratio=0.1", "both are new"),
        ("model.image.freeze_layers=1", "the image encoder is new"),
        ("model.text.freeze_layers=all", "the text encoder is new"),
    ],
)
def test_keys_of_pretrained_encoders_are_refused_where_there_are_none(override: str, words: str):
    with pytest.raises(ConfigError, match=words):
        small_config(override)


def test_a_rebuilt_encoder_takes_no_more_gradients_than_it_did(folders: dict):
    folder = folders["image", "dinov2"]
    encoder = build_image_encoder(ImageEncoderConfig(pretrained=str(folder)), 32)
    held = json.loads(json.dumps(encoder.config.to_dict()))  # as meta.json gives it
    again = rebuild_encoder(held)
    assert image_layout(again) == image_layout(encoder)
    assert image_layout(again).unused == ("embeddings.mask_token",)
    assert not again.get_parameter("embeddings.mask_token").requires_grad


def test_what_a_masked_autoencoder_lacks_is_said(folders: dict, caplog: pytest.LogCaptureFixture):
    folder = folders["image", "vit_mae, with decoder"]
    with caplog.at_level(logging.INFO, "mmclip"):
        build_image_encoder(ImageEncoderConfig(pretrained=str(folder)), 32)
    assert "not used 0" not in caplog.text and "decoder" in caplog.text


def test_the_tables_of_the_document_are_those_that_are_tried():
    document = Path(__file__).parents[1] / "docs" / "encoders.md"
    for heading, tried in (("image encoder", IMAGE_ROWS), ("text encoder", TEXT_ROWS)):
        said = {spans_of(cells[1])[0]: cells[2:] for cells in table_of(document, heading)}
        assert list(said) == list(dict.fromkeys(name.split(",")[0] for name in tried))
        for name, row in tried.items():
            pools, refused, third, recomputes, exports = said[name.split(",")[0]]
            assert exports == ("yes" if row.exports else "no")
            assert spans_of(pools) == [row.pools] and tuple(spans_of(refused)) == row.refuses
            assert recomputes == ("yes" if row.recomputes else "no")
            if isinstance(row, ImageRow):
                assert third == ("yes" if row.hides_pixels else "no")
            else:
                has_mask = TOKENIZERS[row.tokenizer]().mask_token is not None
                assert third == ("its own" if has_mask else "added")


@every_image_row
@pytest.mark.parametrize("features", ["pooled", "class"])
def test_a_row_is_fine_tuned_with_a_gradient_for_every_parameter(
    folders: dict, name: str, features: Features
):
    start = Start("", None, f"hf:{folders['image', name]}", features, 32)
    images = start.encoder(0)
    model = Classifier(images, 2)
    nn.init.normal_(model.head.weight)
    image = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    freeze_unused(model, image[:1])
    model.train()(image).square().sum().backward()
    assert images.width == images(image).shape[1]
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    scales = lr_scales([n for n, _ in model.named_parameters()], 0.5)
    assert len(set(scales.values())) == 4  # what embeds, two blocks, and what stands on them


def test_fine_tuning_refuses_the_rate_of_pretrained_encoders():
    with pytest.raises(ValueError, match="set lr_decay"):
        FineTuneConfig(train=TrainConfig(pretrained_lr_ratio=0.5))


# By the commands


@pytest.mark.slow
@every_row
def test_a_row_trains_resumes_and_scores_by_the_commands(
    folders: dict, made_data: Path, tmp_path: Path, modality: str, name: str
):
    given = ["pretrain", "--data", made_data, "--out", tmp_path / "run"]
    settings = [
        *WHOLE, "data.image_size=32", "data.max_tokens=32", "model.embed_dim=16",
        f"model.{modality}.pretrained='{folders[modality, name]}'", "train.steps=20",
        "train.batch_size=8", "train.save_every_steps=10",
    ]  # fmt: skip
    if modality == "text":  # beside an image encoder that every form of export holds
        settings.append(f"model.image.pretrained='{folders['image', 'vit']}'")
    given += [part for setting in settings for part in ("--set", setting)]
    assert mmclip(tmp_path, *given).code == 0
    last = tmp_path / "run" / "checkpoints" / "step_000020"
    weights = (last / "model.safetensors").read_bytes()
    for file in last.iterdir():
        if file.is_file():
            file.unlink()
    (last / "tokenizer").rename(tmp_path / "tokenizer")
    last.rmdir()
    assert mmclip(tmp_path, *given, "--resume").code == 0
    assert (last / "model.safetensors").read_bytes() == weights
    # Their tokenizers know the words of two reports and few others.
    prompts = tmp_path / "known.toml"
    prompts.write_text(
        'id = "known"\nversion = 1\ndescription = "Reports."\n[templates]\n'
        'positive = ["{finding}"]\nnegative = ["no {finding}"]\n'
        f'[findings.mass]\npositive = ["{REPORTS[0]}"]\nnegative = ["{REPORTS[1]}"]\n',
        "utf-8",
    )
    scored = mmclip(
        tmp_path, "zeroshot", "--model", tmp_path / "run", "--data", made_data, "--finding", "mass",
        "--n-resamples", "5", "--prompts", prompts, "--out", tmp_path / "scores",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    predicted = mmclip(
        tmp_path, "predict", "--model", tmp_path / "run", made_data, "--finding", "mass",
        "--prompts", prompts, "--out", tmp_path / "predictions.csv",
    )  # fmt: skip
    assert predicted.code == 0, predicted.err
    forms = ["onnx", "vision" if modality == "image" else "text"]
    forms += ["hf"] if row_of(modality, name).exports else []
    for form in forms:
        out = tmp_path / form
        ended = mmclip(tmp_path, "export", tmp_path / "run", "--to", form, "--out", out)
        assert ended.code == 0 and (out / "README.md").is_file(), ended.err


@pytest.mark.slow
def test_one_data_folder_serves_models_of_several_sizes(
    folders: dict, made_data: Path, tmp_path: Path
):
    for px in (16, 24, 32):
        out = tmp_path / f"run-{px}"
        ended = mmclip(
            tmp_path, "pretrain", "--data", made_data, "--out", out,
            "--set", f"data.image_size={px}",
            "--set", f"model.image.pretrained='{folders['image', 'dinov2']}'", "--set",
            "train.steps=2", "--set", "train.batch_size=8",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        scored = mmclip(
            tmp_path, "zeroshot", "--model", out, "--data", made_data, "--n-resamples", "5",
            "--out", tmp_path / f"scores-{px}",
        )  # fmt: skip
        assert scored.code == 0, scored.err
