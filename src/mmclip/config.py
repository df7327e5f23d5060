"""The configuration of pre-training: every key, with its unit, default and rules.

An unknown key is an error that lists the known ones. Values derived from the configuration are
computed where they are used. `mmclip.config_io` reads the files.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mmclip.config_io import Frozen, load_config_as, packaged_names
from mmclip.own_code import is_own_code

GREY_MEAN, GREY_STD = 0.5, 0.25
"""Image pixels, scaled to 0..1, are normalised by these. Source: ours, near the mean and deviation
of chest X-rays; one pair for every data set, so that no data set's statistics tell it apart."""


ScoreKind = Literal[
    "contribution", "embedding", "attended", "logsumexp", "token_attention", "decoder_attention"
]
"""The ways to say how strongly a patch responds to a text; see `masking.relevance_score`."""

WHOLE_TEXT_SCORES: tuple[ScoreKind, ...] = ("contribution", "embedding")
"""The scores that read the embedding of a text and none of its tokens."""

MaskPolicy = Literal["attention", "random", "least_relevant", "oracle"]
"""Which patches are masked first: the most relevant, any, the least relevant, the lesion's."""

ScoreTokens = Literal["entities", "masked", "all"]
"""The words of a text that a patch's relevance is measured against."""

MaskStage = Literal["features", "pixels"]
"""Where patches are masked: after the image encoder has seen the image, or before it."""


Pooling = Literal["auto", "cls", "mean", "pooler"]
"""What of an encoder becomes the embedding: its pooled output, its first token, or the mean of its
patches or words. auto: the first of these three that the encoder has."""

ImageContext = Literal["patches", "patches_unplaced", "pooled"]
"""What the text decoder sees of the image: the class token and each patch with its place; the same
without places; or what comes first alone, the class token or a ResNet's pooled feature."""

FreezeLayers = Annotated[int, Field(ge=0)] | Literal["all"]
"""The layers of a pretrained encoder that keep their weights: none for 0, what embeds and the first
n blocks for n, and all of it."""


class ImageEncoderConfig(Frozen):
    """The image encoder: a new one of these sizes, or a pretrained ViT that brings its own.

    A ResNet with batch norm learns from few images within minutes; a ViT needs more of both, and
    encodes visible patches alone at their share of the cost [docs/log.md].
    """

    pretrained: str | None = None  # folder or hub id; then its kind and sizes count
    kind: Literal["resnet", "vit"] = "resnet"
    width: int = Field(default=64, gt=0)  # of a feature; a ResNet's earlier stages halve it
    depth: int = Field(default=2, gt=0)  # layers of a ViT, blocks a stage of a ResNet
    heads: int = Field(default=4, gt=0)  # of a ViT
    patch_size: int = Field(default=8, gt=0)  # side of a feature's patch; a ResNet's stride
    pooling: Pooling = "auto"
    freeze_layers: FreezeLayers = 0
    gradient_checkpointing: bool = False  # less memory for a second forward pass

    @model_validator(mode="after")
    def _stages_fit(self) -> "ImageEncoderConfig":
        if self.kind == "vit" or self.pretrained is not None:
            return self
        if self.patch_size not in (4, 8, 16, 32):
            raise ValueError(
                f"patch_size={self.patch_size}; the stride of a ResNet is 4, 8, 16 or 32"
            )
        halvings = self.patch_size // 4
        if self.width % halvings:
            raise ValueError(
                f"width={self.width} cannot be halved down to the first stage of a ResNet of "
                f"stride {self.patch_size}; take a multiple of {halvings}"
            )
        return self


class TextEncoderConfig(Frozen):
    """The text encoder: a BERT of these sizes, or a pretrained one with its own tokenizer."""

    pretrained: str | None = None  # folder or hub id; then its sizes and vocabulary count
    width: int = Field(default=64, gt=0)
    depth: int = Field(default=2, gt=0)
    heads: int = Field(default=2, gt=0)
    vocab_size: int = Field(
        default=8192, gt=5
    )  # upper bound of the WordPiece vocabulary trained here
    # Of a word that comes into the vocabulary, which a checkpoint shows to all: 5 is the k that
    # k-anonymity has in practice [El Emam and Dankar, JAMIA 2008, 15:627].
    vocab_min_patients: int = Field(default=5, ge=1)
    pooling: Pooling = "auto"
    freeze_layers: FreezeLayers = 0
    gradient_checkpointing: bool = False  # less memory for a second forward pass


class DecoderConfig(Frozen):
    """A decoder. It is small: after pre-training it is thrown away [MAE 3]."""

    width: int = Field(default=128, gt=0)
    depth: int = Field(default=1, gt=0)
    heads: int = Field(default=4, gt=0)


class TextDecoderConfig(DecoderConfig):
    """The text decoder, and what it sees of the image."""

    image_context: ImageContext = "patches"


class ModelConfig(Frozen):
    """Encoders, decoders, projections and temperature."""

    image: ImageEncoderConfig = ImageEncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    image_decoder: DecoderConfig = DecoderConfig()  # built where loss.image is not 0
    text_decoder: TextDecoderConfig = TextDecoderConfig()  # built where loss.text is not 0
    projections: str | None = None  # checkpoint, folder or hub id; its temperature, too
    embed_dim: int = Field(default=128, gt=0)  # of the joint space
    temperature: float = Field(
        default=0.07, gt=0
    )  # at the start; learned as a log scale [CLIP 2.5]
    max_logit_scale: float = Field(default=100.0, gt=1)  # clamp of the learned scale [CLIP 2.5]
    logit_bias: float = -10.0  # at the start; of the sigmoid loss alone [SigLIP 3.2]


class LossConfig(Frozen):
    """The contrastive term, whose weight is 1, and the weights of the terms beside it."""

    contrastive: str = "softmax"  # or "sigmoid", or module:function of your own
    image: float = Field(default=0.0, ge=0)  # AttMIM
    text: float = Field(default=0.0, ge=0)  # EntMLM
    local: float = Field(default=0.0, ge=0)  # words of entities against patches, as GLoRIA's
    label: float = Field(
        default=0.0, ge=0
    )  # control: labels of unpaired images, in place of prompts

    @field_validator("contrastive")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in ("softmax", "sigmoid") and not is_own_code(name):
            raise ValueError(
                f"contrastive={name!r} is neither 'softmax' nor 'sigmoid', nor a function of yours "
                f"as module:function"
            )
        return name


class ContrastiveConfig(Frozen):
    """Which texts are compared with which images. Source of the defaults: docs/method.md."""

    match_normal: bool = False  # images in which nothing was found are positives of one another
    by_kind: bool = False  # reports are compared with reports alone, prompts with prompts


class ImageMaskConfig(Frozen):
    """AttMIM: which patches are masked. Source of the defaults: docs/method.md."""

    mask_ratio: float = Field(default=0.5, gt=0, lt=1)  # of the patches
    policy: MaskPolicy = "attention"
    score: ScoreKind = "contribution"
    score_tokens: ScoreTokens = "masked"  # what a patch responds to
    mask_stage: MaskStage = "features"  # after the encoder, or before it
    anneal_from: float = Field(default=0.1, ge=0, le=1)  # as a share of all steps: random before
    anneal_to: float = Field(default=0.5, ge=0, le=1)  # guided from here on
    final_mask_noise: float = Field(default=0.2, ge=0, le=1)  # what stays to chance

    def is_guided(self, mask_noise: float = 0.0) -> bool:
        """Whether the choice looks at what the texts say, at some noise of `masking`."""
        return self.policy in ("attention", "least_relevant") and mask_noise < 1


class TextMaskConfig(Frozen):
    """EntMLM: which words are masked. Source of the defaults: docs/method.md."""

    mask_ratio: float = Field(default=0.5, ge=0, le=1)  # of the concepts of a text
    policy: Literal["entities", "random"] = "entities"
    kinds: tuple[Literal["finding", "anatomy", "modifier"], ...] = Field(
        default=("finding", "anatomy", "modifier"), min_length=1
    )
    cue_prob: float = Field(default=0.5, ge=0, le=1)  # of masking "no" with what it denies
    # Concepts that the words beside them give away with a higher probability are left alone.
    given_away_prob: float = Field(default=1.0, gt=0, le=1)
    fallback_ratio: float = Field(default=0.15, ge=0, lt=1)  # of words, where no concept is masked


class UnpairedConfig(Frozen):
    """What trains beside the pairs of a step: each a stream of its own, with its ratio to them."""

    rows_per_pair: float = Field(default=0.0, ge=0)  # images with labels, which become prompts
    reports_per_pair: float = Field(default=0.0, ge=0)  # reports without an image: text terms only
    bare_per_pair: float = Field(default=0.0, ge=0)  # images with neither: image terms only
    withheld: tuple[str, ...] = ()  # findings that no prompt and no label loss names
    prompts: str = "default"  # a set of disease_prompts/, or a path that ends in .toml
    absent_prob: float = Field(default=0.5, ge=0, le=1)  # of saying what an image does not have
    prompt_pairs: bool = False  # pairs with labels get a prompt too, which guides AttMIM
    shuffle: bool = False  # control: every unpaired image has the labels of another


ResizeMode = Literal["squash", "pad", "crop"]
"""How an image becomes a square: each side scaled on its own; the longer side scaled and the rest
padded with background; or the middle square cut out and scaled."""


class DataConfig(Frozen):
    """What a step reads."""

    # Side of what the model reads; a folder's images may be larger.
    image_size: int = Field(default=64, gt=0)
    resize: ResizeMode = "squash"  # how they became squares; must equal the data folder's
    max_tokens: int = Field(default=128, gt=2)
    views: tuple[Literal["PA", "AP", "L", "unknown"], ...] = ("PA", "AP", "unknown")
    impression_prob: float = Field(default=0.0, ge=0, le=1)  # of reading the impression alone
    sentence_drop_prob: float = Field(default=0.0, ge=0, le=1)  # of reading some sentences, else


class AugmentConfig(Frozen):
    """Ranges of the image augmentation. No mirroring: reports say left and right."""

    rotation_deg: float = Field(default=5.0, ge=0, lt=45)
    translate_ratio: float = Field(default=0.05, ge=0, lt=0.5)  # of the image's side
    scale_ratio: float = Field(default=0.1, ge=0, lt=0.5)  # 0.1: between 0.9 and 1.1 times
    brightness: float = Field(default=0.1, ge=0, le=1)  # added, as a share of the grey range
    contrast: float = Field(default=0.2, ge=0, lt=1)  # 0.2: between 0.8 and 1.2 times
    # Smallest share of the image's area that a square crop keeps; 1 crops nothing. Crops are cut
    # from images as large as the data folder holds them.
    crop_scale: float = Field(default=1.0, gt=0, le=1)


class TrainConfig(Frozen):
    """The optimisation."""

    seed: int = 0
    steps: int = Field(default=1000, gt=0)  # optimiser steps
    epochs: float | None = Field(default=None, gt=0)  # in their place: passes over the pairs
    batch_size: int = Field(default=64, gt=1)  # pairs a step, over all processes and micro-batches
    # Gradient accumulation: pairs of a micro-batch, over all processes; negatives are its own.
    micro_batch_size: int | None = Field(default=None, gt=1)  # None: the whole batch at once
    gradient_cache: bool = False  # the negatives of a micro-batch are those of the whole batch
    base_lr: float = Field(default=8e-3, gt=0)  # at 256 pairs a step
    lr_scaling: Literal["linear", "sqrt"] = "linear"  # with batch_size / 256
    pretrained_lr_ratio: float = Field(default=1.0, gt=0, le=1)  # of it, for pretrained encoders
    weight_decay: float = Field(default=0.05, ge=0)
    beta2: float = Field(default=0.98, gt=0, lt=1)
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)  # of all steps
    final_lr_ratio: float = Field(default=0.01, ge=0, le=1)  # of the peak, at the end of the cosine
    clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)  # of the average of the weights; 0: none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False  # the layers of the transformers, by torch.compile: for a GPU
    log_every_steps: int = Field(default=10, gt=0)
    save_every_steps: int = Field(default=500, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)

    @model_validator(mode="after")
    def _batch_splits(self) -> "TrainConfig":
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _says_its_length_once(self) -> "TrainConfig":
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError(
                f"steps={self.steps} and epochs={self.epochs} are both given; keep one"
            )
        return self

    def in_steps(self, n_pairs: int) -> "TrainConfig":
        """The same with its length in steps, which the number of pairs to train on decides."""
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * n_pairs / self.batch_size)
        return self.model_copy(update={"steps": steps, "epochs": None})

    @property
    def peak_lr(self) -> float:
        """What the optimiser gets at the peak, base_lr scaled by the size of a batch.

        Source: linear scaling [Goyal et al., arXiv:1706.02677]; by the root, as Adam's steps do not
        grow with the gradient [Malladi et al., arXiv:2205.10287].
        """
        ratio = self.batch_size / 256
        return self.base_lr * (ratio if self.lr_scaling == "linear" else math.sqrt(ratio))

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches in a step."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)


class ValidationConfig(Frozen):
    """Loss and zero-shot AUROC on split val as training goes, and what follows from them."""

    every_steps: int = Field(default=0, ge=0)  # and after the last step; 0: never
    # What the best step has: the lowest loss, for which no label is read, or the highest AUROC.
    select_by: Literal["loss", "auroc"] = "loss"
    patience: int = Field(default=0, ge=0)  # validations without a better one; 0: train to the end

    @model_validator(mode="after")
    def _patience_needs_validations(self) -> "ValidationConfig":
        if self.patience and not self.every_steps:
            raise ValueError(
                f"patience={self.patience} counts validations, and every_steps=0 makes none; give "
                f"validation.every_steps a value"
            )
        return self


class Config(Frozen):
    """One training run."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    image_mask: ImageMaskConfig = ImageMaskConfig()
    text_mask: TextMaskConfig = TextMaskConfig()
    unpaired: UnpairedConfig = UnpairedConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _score_is_trained(self) -> "Config":
        mask = self.image_mask
        if not (self.loss.image and mask.is_guided()) or self.loss.text:
            return self
        if mask.score not in WHOLE_TEXT_SCORES and mask.score_tokens == "masked":
            raise ValueError(
                "image_mask.score_tokens='masked' asks the masked words, and loss.text=0 masks "
                "none; give loss.text a weight, or set image_mask.score_tokens to 'entities' or "
                "'all' with a score other than 'decoder_attention'"
            )
        if mask.score == "decoder_attention":
            raise ValueError(
                "image_mask.score='decoder_attention' is the attention of the text decoder, which "
                "loss.text=0 leaves out; give loss.text a weight or choose another score"
            )
        return self

    @model_validator(mode="after")
    def _decoder_attends_to_patches(self) -> "Config":
        asks = self.loss.image and self.image_mask.is_guided()
        context = self.model.text_decoder.image_context
        if asks and self.image_mask.score == "decoder_attention" and context == "pooled":
            raise ValueError(
                "image_mask.score='decoder_attention' is the attention of the text decoder to the "
                "patches, and model.text_decoder.image_context='pooled' shows it none; choose "
                "'patches' or another score"
            )
        return self

    @model_validator(mode="after")
    def _streams_have_a_term(self) -> "Config":
        streams, loss = self.unpaired, self.loss
        for key, ratio, what, term, weight in (
            ("reports_per_pair", streams.reports_per_pair, "reports alone", "text", loss.text),
            ("bare_per_pair", streams.bare_per_pair, "images alone", "image", loss.image),
        ):
            if ratio and not weight:
                raise ValueError(
                    f"unpaired.{key}={ratio} reads {what}, and loss.{term}=0 leaves out the term "
                    f"that learns from them; give loss.{term} a weight"
                )
        return self

    @model_validator(mode="after")
    def _labels_stand_in_for_prompts(self) -> "Config":
        if not self.loss.label:
            return self
        if not self.unpaired.rows_per_pair:
            raise ValueError(
                f"loss.label={self.loss.label} learns from the labels of unpaired images, and "
                "unpaired.rows_per_pair=0 reads none; give unpaired.rows_per_pair a value"
            )
        if self.unpaired.prompt_pairs:
            raise ValueError(
                f"loss.label={self.loss.label} is the control in which no label becomes a prompt, "
                "and unpaired.prompt_pairs=true makes prompts; set one of the two to 0 or false"
            )
        return self

    @model_validator(mode="after")
    def _cache_needs_rows_apart(self) -> "Config":
        image = self.model.image
        if self.train.gradient_cache and image.pretrained is None and image.kind == "resnet":
            raise ValueError(
                "train.gradient_cache=true encodes each micro-batch apart, and a ResNet's batch "
                "statistics are those of all rows it sees at once; set model.image.kind='vit'"
            )
        return self

    @model_validator(mode="after")
    def _something_is_pretrained(self) -> "Config":
        encoders = {"image": self.model.image, "text": self.model.text}
        new = [name for name, encoder in encoders.items() if encoder.pretrained is None]
        for name in new:
            if encoders[name].freeze_layers:
                raise ValueError(
                    f"model.{name}.freeze_layers={encoders[name].freeze_layers!r} keeps weights, "
                    f"and the {name} encoder is new; name weights by model.{name}.pretrained, or "
                    f"set it to 0"
                )
        if self.train.pretrained_lr_ratio != 1 and len(new) == len(encoders):
            raise ValueError(
                f"train.pretrained_lr_ratio={self.train.pretrained_lr_ratio} is for pretrained "
                "encoders, and both are new; name one by model.image.pretrained or "
                "model.text.pretrained, or set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _patches_fit(self) -> "Config":
        px, patch = self.data.image_size, self.model.image.patch_size
        if self.model.image.pretrained is None and px % patch:
            raise ValueError(
                f"data.image_size={px} is not a multiple of model.image.patch_size={patch}; "
                f"{max(px // patch, 1) * patch} is"
            )
        return self


def config_names() -> list[str]:
    """The names of the package's configurations."""
    return packaged_names("configs")


def load_config(name_or_path: str = "tiny", overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration of pre-training by name or path, then applies overrides.

    Args:
        name_or_path: A name of `config_names()`, such as "tiny" or "arms/whole", or a path that
            ends in .toml.
        overrides: Such as "train.steps=200"; the value is read as TOML, else as a string.

    Raises:
        ConfigError: When there is no such file, or a key or value breaks a rule.
    """
    return load_config_as(Config, "configs", name_or_path, overrides)
