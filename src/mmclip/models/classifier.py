"""A classifier of images: an image encoder, a vector of its output, and a logit a finding."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmclip.models.encoders import image_layout, pooled, token_features
from mmclip.models.trainable import layer_numbers

Features = Literal["pooled", "class", "embedding"]
"""The vector of an image: the pooled output; the class token of the last layer (the pooled output
of a ResNet and of others without one), for encoders whose pooler was never trained; the normalised
embedding in joint space."""


class ImageEncoder(nn.Module):
    """One vector an image: what a probe reads, and what a head stands on."""

    def __init__(
        self, encoder: PreTrainedModel, features: Features, projection: nn.Linear | None = None
    ) -> None:
        """Keeps the weights of both.

        Args:
            encoder: Of one-channel images.
            features: Which vector.
            projection: Into the joint space; for "embedding" alone.
        """
        super().__init__()
        assert (projection is not None) == (features == "embedding")
        self.encoder, self.features, self.projection = encoder, features, projection

    @property
    def width(self) -> int:
        """Of the vector."""
        return (
            image_layout(self.encoder).width
            if self.projection is None
            else self.projection.out_features
        )

    def forward(self, image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b d"]:
        """The vectors of images in model space (see data.image_text_dataset.normalise)."""
        output = self.encoder(pixel_values=image)
        if self.features == "class":
            return token_features(output, self.encoder)[:, 0]
        vector = pooled(output, self.encoder)
        if self.projection is None:
            return vector
        return F.normalize(self.projection(vector).float(), dim=-1)


class Classifier(nn.Module):
    """A linear head on an image's vector. It starts at 0: every image is as likely as not.

    Source: fine-tuning of MAE (arXiv:2111.06377, released code), whose head starts at 2e-5.
    """

    def __init__(
        self, image_encoder: ImageEncoder, n_findings: int, multiclass: Sequence[int] = ()
    ) -> None:
        """A new head.

        Args:
            image_encoder: With its weights.
            n_findings: Of which the head has a logit each.
            multiclass: Places of the findings that learn "uncertain" as a class of its own.
        """
        super().__init__()
        self.image_encoder, self.n_findings = image_encoder, n_findings
        self.multiclass = tuple(multiclass)
        self.head = nn.Linear(image_encoder.width, n_findings + len(self.multiclass))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b l"]:
        """The logit of each finding, against its absence; then those of "uncertain"."""
        return self.head(self.image_encoder(image))


def freeze_unused(model: nn.Module, image: Float[Tensor, "b 1 h w"]) -> list[str]:
    """Turns off the gradient of parameters that the output does not depend on, and names them.

    Such as an unused pooler or mask token: processes that train together wait for each gradient.

    Args:
        model: Takes `image`; it must not change state in evaluation mode.
        image: Any images.
    """
    was_training = model.training
    model.eval()
    model(image).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for name, p in model.named_parameters():
        p.grad = None
        if name in unused:
            p.requires_grad_(False)
    model.train(was_training)
    return unused


def lr_scales(names: Sequence[str], decay: float) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by: `decay` for each layer below the top.

    Source: BEiT (arXiv:2106.08254) and MAE (arXiv:2111.06377, appendix A.1), layer-wise decay.
    """
    number = layer_numbers(names)
    top = max(number.values())
    return {name: decay ** (top - layer) for name, layer in number.items()}


def image_of(image_size: int) -> Float[Tensor, "b 1 h w"]:
    """One grey image, for `freeze_unused`."""
    return torch.zeros(1, 1, image_size, image_size)
