"""The two decoders: each rebuilds what is masked of one modality with the help of the other.

Pre-norm transformers. A row without the other modality is decoded from its own alone. The last
block computes only what is asked for: the masked patches or words.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmclip.batch import most_in_a_row
from mmclip.config import ImageContext
from mmclip.patches import first_positions, gather_tokens, scatter_tokens

MLP_RATIO = 4
"""Width of the hidden layer of a block, in widths. Source: usual practice (ViT, BERT, MAE)."""


class Attention(nn.Module):
    """Multi-head attention of one sequence to another, or to itself.

    Keys and values have no bias: a key's cancels in the softmax and would never get a gradient, a
    value's is the same as the output's.
    """

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"decoder width {width} is not a multiple of its {heads} heads")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b s w"],
        context: Float[Tensor, "b c cw"],
        is_valid: Bool[Tensor, "b c"] | None = None,
        want_weights: bool = False,
    ) -> tuple[Float[Tensor, "b s w"], Float[Tensor, "b heads s c"] | None]:
        """What x gathers from the context.

        Args:
            x: Asks.
            context: Answers.
            is_valid: False on padding of the context; None if there is none. A row without a valid
                token gathers 0.
            want_weights: Also give the weights, in float32 and without gradient; the fused kernel
                that computes the result does not show them.
        """
        b, s, width = x.shape
        per_head = width // self.heads
        query = self.query(x).unflatten(-1, (self.heads, per_head)).transpose(1, 2)
        key_value = self.key_value(context).unflatten(-1, (2, self.heads, per_head))
        key, value = key_value.permute(2, 0, 3, 1, 4).unbind()  # each b heads c per_head
        may_attend = is_alone = None
        if is_valid is not None:
            # Without a valid key the softmax is undefined: such a row attends anywhere, for 0.
            is_alone = ~is_valid.any(1)[:, None, None]
            may_attend = (is_valid[:, None] | is_alone)[:, None]  # b 1 1 c
        if b:
            gathered = F.scaled_dot_product_attention(query, key, value, attn_mask=may_attend)
        else:  # no tensor at all from the fused kernels of a GPU; this has the gradients, too
            gathered = query @ (key.mT @ value)
        out = self.out(gathered.transpose(1, 2).reshape(b, s, width))
        if is_alone is not None:
            out = out.masked_fill(is_alone, 0.0)
        if not want_weights:
            return out, None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            logits = query.float() @ key.float().mT / math.sqrt(per_head)
            if may_attend is not None:
                logits = logits.masked_fill(~may_attend, -torch.inf)
            weights = logits.softmax(-1)
            return out, weights if is_alone is None else weights.masked_fill(is_alone[:, None], 0.0)


class Block(nn.Module):
    """Self-attention, cross-attention, and two layers a token."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, width)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, context_width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width)
        )

    def forward(
        self,
        x: Float[Tensor, "b s w"],
        is_valid: Bool[Tensor, "b s"] | None,
        context: Float[Tensor, "b c cw"],
        context_is_valid: Bool[Tensor, "b c"] | None,
        want_weights: bool = False,
        asked: Int[Tensor, "b a"] | None = None,
    ) -> tuple[Float[Tensor, "b a w"], Float[Tensor, "b heads a c"] | None]:
        """The next x, and the weights of the cross-attention if wanted.

        Args:
            x: The sequence.
            is_valid: False on its padding.
            context: Of the other modality.
            context_is_valid: False on padding of that.
            want_weights: See `Attention.forward`.
            asked: The places whose next x is wanted; the others only answer. None: all.
        """
        normed = self.self_norm(x)
        queries = normed
        if asked is not None:
            x, queries = gather_tokens(x, asked), gather_tokens(normed, asked)
        x = x + self.self_attention(queries, normed, is_valid)[0]
        gathered, weights = self.cross_attention(
            self.cross_norm(x), context, context_is_valid, want_weights
        )
        x = x + gathered
        return x + self.mlp(self.mlp_norm(x)), weights


class ImageDecoder(nn.Module):
    """ID of the paper: predicts the pixels of masked patches from the others and from the text.

    The class token is not among its inputs: it has pooled the whole image, masked patches too.

    Args:
        feature_width: Of the image features.
        text_width: Of the text features.
        width: Of the decoder; a multiple of 4 and of `heads`.
        depth: Blocks.
        heads: Of each attention.
        grid: Rows and columns of patches.
        patch_size: Side of a patch.

    Source: paper, figure 1B; mask token, fixed positions and linear head after MAE section 3.
    """

    positions: Tensor

    def __init__(
        self,
        feature_width: int,
        text_width: int,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        patch_size: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(feature_width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", grid_positions(grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, text_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch_size * patch_size)
        self.apply(_init_linear)
        nn.init.normal_(self.mask_token, std=0.02)  # [MAE, released code]

    def forward(
        self,
        features: Float[Tensor, "b n d"],
        is_masked: Bool[Tensor, "b n"],
        text_features: Float[Tensor, "b t dt"],
        text_is_valid: Bool[Tensor, "b t"],
        n_masked: int | None = None,
    ) -> Float[Tensor, "b n p"]:
        """Pixels of the masked patches, in per-patch standard deviations; 0 in the others.

        Masked features are replaced before anything mixes, so no prediction depends on them; what
        stands in their places is without meaning (see `patches.scatter_visible`).

        Args:
            features: Of the image encoder, without the class token.
            is_masked: The patches to predict.
            text_features: Of the report or the prompt.
            text_is_valid: False on padding, and everywhere in rows without a text.
            n_masked: How many are masked in an image, at most; None asks the device.
        """
        embedded = self.embed(features)
        x = torch.where(is_masked[..., None], self.mask_token, embedded) + self.positions
        asked = first_positions(
            is_masked, most_in_a_row(is_masked) if n_masked is None else n_masked
        )
        for block in self.blocks[:-1]:
            x, _ = block(x, None, text_features, text_is_valid)
        x, _ = self.blocks[-1](x, None, text_features, text_is_valid, asked=asked)
        return scatter_tokens(self.head(self.norm(x)), asked, is_masked)


class TextDecoder(nn.Module):
    """TD of the paper: predicts the masked tokens of a report from the others and from the image.

    It reads the features that the text encoder gives for the report with [MASK] in the masked
    places. These carry position and context, and no trace of what is masked.

    Args:
        feature_width: Of the text features.
        image_width: Of the image features.
        width: Of the decoder; a multiple of 4 and of `heads`.
        depth: Blocks.
        heads: Of each attention.
        vocab_size: Tokens to choose from.
        word_width: Of the word embeddings; None is as wide as the features.
        grid: Rows and columns of patches. Each patch is told its place, as left and right, upper
            and lower are among the masked words and a ResNet's features hardly know theirs.
        image_context: What it sees of the image; see `config.ImageContext`.

    Source: paper, figure 1B; the head is that of BERT's masked language model, the positions are
        those of the image decoder.
    """

    positions: Tensor

    def __init__(
        self,
        feature_width: int,
        image_width: int,
        width: int,
        depth: int,
        heads: int,
        vocab_size: int,
        word_width: int | None = None,
        *,
        grid: tuple[int, int],
        image_context: ImageContext = "patches",
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(feature_width, width)
        self.embed_image = nn.Linear(image_width, width)
        self.sees_patches = image_context != "pooled"
        places = F.pad(grid_positions(grid, width), (0, 0, 1, 0))  # the image's own has none
        if image_context != "patches":
            places = torch.zeros_like(places)
        self.register_buffer("positions", places, persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        word_width = word_width or feature_width
        self.head = nn.Sequential(nn.Linear(width, word_width), nn.GELU(), nn.LayerNorm(word_width))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(_init_linear)

    def forward(
        self,
        features: Float[Tensor, "b t dt"],
        is_valid: Bool[Tensor, "b t"],
        image_features: Float[Tensor, "b i d"],
        is_masked: Bool[Tensor, "b t"],
        word_embeddings: Float[Tensor, "v dw"],
    ) -> Float[Tensor, "m v"]:
        """Vocabulary logits of the masked tokens, in reading order, row after row."""
        x, _ = self.decode(features, is_valid, image_features, is_masked)
        return self.predict(x[is_masked], word_embeddings)

    def decode(
        self,
        features: Float[Tensor, "b t dt"],
        is_valid: Bool[Tensor, "b t"],
        image_features: Float[Tensor, "b i d"] | None,
        is_asked: Bool[Tensor, "b t"],
        want_attention: bool = False,
        most_asked: int | None = None,
    ) -> tuple[Float[Tensor, "b t w"], Float[Tensor, "b heads t i"] | None]:
        """Lets the tokens look at the image.

        Args:
            features: Of the text encoder.
            is_valid: False on padding.
            image_features: Class token and patches; None where there are no images: then the text
                alone speaks.
            is_asked: The tokens whose features and attention are wanted; the others get 0.
            want_attention: Also give the weights with which each token looked at the image, the
                heads of all blocks in a row, in float32 and without gradient.
            most_asked: How many are asked for in a row, at most; None asks the device.
        """
        x = self.embed(features)
        sees = None
        if image_features is None:
            image = x.new_zeros(len(x), 1, x.shape[2])
            sees = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
        else:
            if not self.sees_patches:
                image_features = image_features[:, :1]
            image = self.embed_image(image_features) + self.positions[: image_features.shape[1]]
        most = most_in_a_row(is_asked) if most_asked is None else most_asked
        asked = first_positions(is_asked, most)
        attention = []
        for block in self.blocks[:-1]:
            x, weights = block(x, is_valid, image, sees, want_attention)
            attention.append(weights)
        x, weights = self.blocks[-1](x, is_valid, image, sees, want_attention, asked)
        x = scatter_tokens(x, asked, is_asked)
        if weights is None:
            return x, None
        weights = scatter_tokens(weights.transpose(1, 2).flatten(2), asked, is_asked)
        heads = weights.unflatten(2, (-1, image.shape[1])).transpose(1, 2)
        return x, torch.cat([*attention, heads], 1)

    def predict(
        self, x: Float[Tensor, "m w"], word_embeddings: Float[Tensor, "v dw"]
    ) -> Float[Tensor, "m v"]:
        """Vocabulary logits of some tokens.

        Args:
            x: Of the tokens, as `read` gives them.
            word_embeddings: Of the text encoder, shared with the output.
        """
        return F.linear(self.head(self.norm(x)), word_embeddings, self.bias)


def grid_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "n w"]:
    """Fixed sine-cosine positions of a grid in reading order: half the width a row, half a column.

    Raises:
        ValueError: When the width is not a multiple of 4.

    Source: MAE, released code; one axis as in Vaswani et al., section 3.5 (arXiv:1706.03762).
    """
    if width % 4:
        raise ValueError(f"decoder width {width} is not a multiple of 4, as its positions need")
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))

    def along(axis: Tensor) -> Tensor:
        angle = axis.flatten()[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], 1)

    rows, columns = (torch.arange(size, dtype=torch.float32) for size in grid)
    return torch.cat([along(a) for a in torch.meshgrid(rows, columns, indexing="ij")], 1)


def _init_linear(module: nn.Module) -> None:
    # Source: MAE, released code.
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
