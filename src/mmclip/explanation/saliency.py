"""The score of every patch of an image for a phrase: what the text's answer lies in."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmclip.batch import TextBatch
from mmclip.config import WHOLE_TEXT_SCORES, ScoreKind, ScoreTokens
from mmclip.data.corpus import mark_concepts
from mmclip.data.entities import find_entities
from mmclip.data.sample import Entity
from mmclip.data.text import tokenise
from mmclip.data.tokenizer import frame_of
from mmclip.embed import embed_prompts
from mmclip.masking import contribution_score, relevance_score
from mmclip.models.build import build_mmclip
from mmclip.models.dual_encoder import DualEncoder
from mmclip.models.encoders import image_layout, patch_grid, rebuild_encoder
from mmclip.models.mmclip import MMCLIP
from mmclip.patches import Grid
from mmclip.prompts import PromptSet
from mmclip.run import Run

ExplainScore = Literal["contribution", "prompt_pair", "decoder_attention"]
"""What a map shows. contribution: the part of each patch in the similarity of image and phrase.
prompt_pair: the same, less that of the phrase's denial, as zero-shot classification scores.
decoder_attention: the share of the text decoder's attention, from the entities of the phrase."""

PAIR = "contribution, prompt pair"
"""The name of the score prompt_pair among those of `saliency_by_score`."""


def phrase_texts(
    run: Run,
    phrases: Sequence[str],
    entities: Sequence[Sequence[Entity]],
    rows: Sequence[int],
) -> TextBatch:
    """Phrases as texts of images, with all of their entities masked in `masked_ids`.

    Args:
        run: Its tokenizer reads the phrases.
        phrases: None of them empty.
        entities: Of each phrase.
        rows: The image that each is asked of.
    """
    tokens = tokenise(run.tokenizer, phrases, max_tokens=run.max_tokens)
    concepts = np.stack(
        [mark_concepts(e, o)[0] for e, o in zip(entities, tokens.offsets, strict=True)]
    )
    ids, is_valid = torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.is_valid)
    is_name = torch.from_numpy(concepts > 0) & is_valid
    masked_ids = ids.masked_fill(is_name, frame_of(run.tokenizer).mask)
    return TextBatch(torch.tensor(rows), ids, is_valid, is_name, is_name, masked_ids)


def _decoder_attends(model: MMCLIP) -> bool:
    """Whether there is a text decoder whose attention to the patches can be shown."""
    return model.text_decoder is not None and model.text_decoder.sees_patches


def score_names(has_decoder: bool) -> list[tuple[ScoreKind, ScoreTokens]]:
    """The scores that a checkpoint can give, without those that equal another for a phrase."""
    every: list[tuple[ScoreKind, ScoreTokens]] = []
    for kind in get_args(ScoreKind):
        for tokens in get_args(ScoreTokens):
            if kind in WHOLE_TEXT_SCORES and tokens != "all":
                continue  # reads no tokens
            if kind == "decoder_attention" and not has_decoder:
                continue
            if kind != "decoder_attention" and tokens == "masked":
                continue  # the name is masked and is the only entity: the same as "entities"
            every.append((kind, tokens))
    return every


@torch.inference_mode()
def saliency_by_score(
    model: MMCLIP,
    images: Float[Tensor, "b 1 h w"],
    texts: TextBatch,
    size: int,
    asks: Float[Tensor, "m e"] | None = None,
    names: Sequence[tuple[ScoreKind, ScoreTokens]] | None = None,
) -> dict[str, Float[Tensor, "m n"]]:
    """The score of each patch of the image for each phrase, by name of the score.

    Args:
        model: In eval mode.
        images: In model space.
        texts: The phrases, with the rows of their images.
        size: Phrases at a time.
        asks: What zero-shot scoring asks in the place of each phrase, for `PAIR`; see `pair_asks`.
        names: The scores; all that the model can give if it is not given.
    """
    device, has_decoder = model.logit_scale.device, _decoder_attends(model)
    grid = patch_grid(model.vision_model)
    names = score_names(has_decoder) if names is None else names
    maps: dict[str, list[Tensor]] = {}
    for index in torch.arange(len(texts)).split(size):
        some = TextBatch(*(tensor[index] for tensor in texts.tensors().values()))
        distinct, row = torch.unique(some.rows, return_inverse=True)
        some = replace(some, rows=row).to(device)
        image = model.encode_image(images[distinct].to(device))
        joint = model.project_patches(image.features[:, 1:])[some.rows]
        none = torch.zeros_like(some.is_masked)
        seen = replace(some, is_masked=none, masked_ids=some.ids)
        reads = {}
        if any(tokens == "masked" for _, tokens in names):
            reads["masked"] = model.forward_text(
                some, image.features, "masked" if has_decoder else None
            )
        if any(tokens != "masked" for _, tokens in names):
            reads["all"] = model.forward_text(seen, image.features, "all" if has_decoder else None)
        for kind, tokens in names:
            read = reads["masked" if tokens == "masked" else "all"]
            score = relevance_score(
                kind,
                joint,
                read.embedding,
                model.project_words(read.features),
                some.chosen(tokens),
                read.attention,
            )
            name = kind if kind in WHOLE_TEXT_SCORES else f"{kind}/{tokens}"
            maps.setdefault(name, []).append(grid.on_image(score).cpu())
        if asks is not None:
            score = contribution_score(joint, asks[index].to(device))
            maps.setdefault(PAIR, []).append(grid.on_image(score).cpu())
    return {name: torch.cat(parts) for name, parts in maps.items()}


def pair_asks(
    encoder: DualEncoder, prompts: PromptSet, names: Sequence[str]
) -> Float[Tensor, "m e"]:
    """The embedding of a finding's positive prompts less that of its negative ones.

    A patch's contribution to it is the patch's part in the zero-shot score: the phrase with its
    denial beside it.

    Args:
        encoder: It reads the prompts.
        prompts: A name without wordings of its own is put into the templates.
        names: Findings, or phrases in the place of a finding's name.
    """
    distinct = sorted(set(names))
    pair = embed_prompts(encoder, prompts, distinct)
    return (pair.positive - pair.negative)[[distinct.index(name) for name in names]]


def random_weights(run: Run, seed: int = 0) -> Run:
    """The run before any training, on its device."""
    torch.manual_seed(seed)
    meta, config = run.checkpoint.meta, run.config
    vision, text = (rebuild_encoder(meta[f"{name}_config"]) for name in ("vision", "text"))
    model = build_mmclip(config, vision, text).eval().to(run.device)
    return replace(run, checkpoint=replace(run.checkpoint, model=model))


def saliency_maps(
    run: Run,
    images: Float[Tensor, "b 1 h w"],
    phrases: Sequence[str],
    rows: Sequence[int],
    score: ExplainScore,
    prompts: PromptSet,
    size: int = 128,
) -> Float[Tensor, "m n"]:
    """The score of each patch of an image for a phrase, one row a phrase.

    Args:
        run: Its model is asked.
        images: In model space.
        phrases: As they are read; for "prompt_pair" the names that prompts are made of.
        rows: The image that each phrase is asked of.
        score: What a map shows.
        prompts: For "prompt_pair".
        size: Phrases at a time.

    Raises:
        ValueError: When the score needs a decoder that the run lacks.
    """
    model = run.model
    if score == "decoder_attention" and not _decoder_attends(model):
        raise ValueError(
            "the score decoder_attention is the text decoder's, and this run has none that sees "
            "patches; choose contribution or prompt_pair, or train with loss.text=1"
        )
    # Whole texts need no entities, and the lexicon takes seconds to load.
    is_attention = score == "decoder_attention"
    entities = list(find_entities(phrases)) if is_attention else [[]] * len(phrases)
    texts = phrase_texts(run, phrases, entities, rows)
    if score == "prompt_pair":
        asks = pair_asks(run, prompts, phrases)
        return saliency_by_score(model, images, texts, size, asks, [])[PAIR]
    if score == "contribution":
        return saliency_by_score(model, images, texts, size, None, [("contribution", "all")])[score]
    # Where no entity is found, every word of the phrase looks at the image.
    is_chosen = texts.is_entity | (texts.is_valid & ~texts.is_entity.any(1, keepdim=True))
    texts = replace(texts, is_entity=is_chosen)
    name: tuple[ScoreKind, ScoreTokens] = ("decoder_attention", "entities")
    return saliency_by_score(model, images, texts, size, None, [name])["decoder_attention/entities"]


@torch.inference_mode()
def grid_of(run: Run) -> Grid:
    """How the patches of a run lie on its images."""
    model, data, image_size = run.model, run.config.data, run.image_size
    blank = torch.zeros(1, 1, image_size, image_size, device=model.logit_scale.device)
    n_patches = model.encode_image(blank).features.shape[1] - 1
    patch_size = image_layout(model.vision_model).patch_size
    return Grid(math.isqrt(n_patches), patch_size, image_size, data.resize)
