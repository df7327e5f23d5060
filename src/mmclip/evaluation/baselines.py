"""What an image tells without being read: scores that a result must exceed to mean anything."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.leakage.check import patient_key
from mmclip.evaluation.metrics import auroc

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisation strengths tried. [chosen: from nearly constant to nearly free]"""


def thumbnails(dataset: ImageTextDataset, side: int = 8) -> Float[np.ndarray, "n s"]:
    """Images averaged to side x side and laid flat: position and brightness, and no shape."""
    return shrunk(dataset.pixels(np.arange(len(dataset))), side)


def shrunk(pixels: UInt8[Tensor, "n h w"], side: int = 8) -> Float[np.ndarray, "n s"]:
    """As `thumbnails`, of images that are in no data folder."""
    small = F.interpolate(pixels.float().unsqueeze(1), size=(side, side), mode="area")
    return small.flatten(1).double().numpy()


@dataclass(frozen=True)
class LogisticFit:
    """A logistic regression for each of k findings, on standardised features."""

    mean: Float[np.ndarray, "k d"]
    std: Float[np.ndarray, "k d"]
    weight: Float[np.ndarray, "k d"]
    bias: Float[np.ndarray, " k"]

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        """The probability of each finding; that of a row does not depend on the other rows."""
        x = features.astype(np.float64)
        columns = [
            ((x - mean) / std * weight).sum(1) + bias
            for mean, std, weight, bias in zip(
                self.mean, self.std, self.weight, self.bias, strict=True
            )
        ]
        return expit(np.stack(columns, 1))


def fit_logistic(
    train: Float[np.ndarray, "n d"],
    train_labels: Float[np.ndarray, "n k"],
    val: Float[np.ndarray, "v d"],
    val_labels: Float[np.ndarray, "v k"],
) -> LogisticFit:
    """A logistic regression a finding; its strength is chosen on the validation rows.

    Unknown labels (NaN) are left out. A finding with one class in the training rows scores 0.5
    throughout; without both classes in the validation rows the strongest regularisation is taken.
    Labels of -1, uncertain, are a class of its own: what is kept is the difference of the present
    and the absent class, whose sigmoid is the probability of present among these two.

    Source: U-MultiClass of Irvin et al. 2019 (arXiv:1901.07031), section 3.
    """
    shape = (train_labels.shape[1], train.shape[1])
    fit = LogisticFit(np.zeros(shape), np.ones(shape), np.zeros(shape), np.zeros(shape[0]))
    for k in range(train_labels.shape[1]):
        is_known = ~np.isnan(train_labels[:, k])
        y = train_labels[is_known, k]
        if not {0.0, 1.0} <= set(y):
            continue
        best = -1.0
        for strength in STRENGTHS:
            scaler = StandardScaler().fit(train[is_known])
            model = LogisticRegression(C=strength, max_iter=2000)
            model.fit(scaler.transform(train[is_known]), y)
            weight, bias = _present_against_absent(model)
            val_scores = expit(scaler.transform(val) @ weight + bias) if len(val) else np.zeros(0)
            reached = auroc(val_labels[:, k], val_scores) or 0.0
            if reached > best:
                best = reached
                fit.mean[k], fit.std[k] = scaler.mean_, scaler.scale_
                fit.weight[k], fit.bias[k] = weight, bias
    return fit


def _present_against_absent(model: LogisticRegression) -> tuple[Float[np.ndarray, " d"], float]:
    """Weight and bias of a fit's logit of class 1 against class 0, which is the last but one."""
    weight, bias = np.asarray(model.coef_), np.ravel(model.intercept_)
    if len(weight) == 1:
        return weight[0], float(bias[0])
    return weight[-1] - weight[-2], float(bias[-1] - bias[-2])


def logistic_scores(
    train: Float[np.ndarray, "n d"],
    train_labels: Float[np.ndarray, "n k"],
    val: Float[np.ndarray, "v d"],
    val_labels: Float[np.ndarray, "v k"],
    test: Float[np.ndarray, "t d"],
) -> Float[np.ndarray, "t k"]:
    """Scores of the test rows by `fit_logistic`."""
    return fit_logistic(train, train_labels, val, val_labels).scores(test)


def thumbnail_scores(
    train: ImageTextDataset, val: ImageTextDataset, test: ImageTextDataset, findings: Sequence[str]
) -> Float[np.ndarray, "t k"]:
    """Scores of the test images by a logistic regression on 8 x 8 thumbnails."""
    return logistic_scores(
        thumbnails(train),
        train.labels(findings),
        thumbnails(val),
        val.labels(findings),
        thumbnails(test),
    )


FOLDS = 5
"""Of `shortcut_scores`. [chosen: usual]"""


_IMAGES_AT_ONCE = 4096
"""Images held as floats at once: 0.8 GB at 224 px."""


def shortcut_features(dataset: ImageTextDataset) -> Float[np.ndarray, "n f"]:
    """What can be told of an image without looking at the lungs.

    Width, height and aspect of the file; mean, deviation, vertical and horizontal gradient energy
    of the cached image; mean brightness of its border; whether it is an AP view, and a PA one.

    Source: ours; each of these alone separates the classes of some public data set well.
    """
    if len(dataset) > _IMAGES_AT_ONCE:
        starts = range(0, len(dataset), _IMAGES_AT_ONCE)
        number = np.arange(len(dataset)) // _IMAGES_AT_ONCE
        parts = [dataset.select(number == start // _IMAGES_AT_ONCE) for start in starts]
        return np.concatenate([shortcut_features(part) for part in parts])
    x = dataset.pixels(np.arange(len(dataset))).float().numpy() / 255
    sizes = np.array(
        [[sample.width_px or 0, sample.height_px or 0] for sample in dataset.samples], float
    )
    aspect = sizes[:, 0] / np.maximum(sizes[:, 1], 1)
    border = np.concatenate([x[:, :2].reshape(len(x), -1), x[:, -2:].reshape(len(x), -1)], 1)
    columns = [
        np.log1p(sizes[:, 0]),
        np.log1p(sizes[:, 1]),
        aspect,
        x.mean((1, 2)),
        x.std((1, 2)),
        np.abs(np.diff(x, axis=1)).mean((1, 2)),
        np.abs(np.diff(x, axis=2)).mean((1, 2)),
        border.mean(1),
        [sample.view == "AP" for sample in dataset.samples],
        [sample.view == "PA" for sample in dataset.samples],
    ]
    return np.stack([np.asarray(column, float) for column in columns], 1)


def shortcut_scores(
    dataset: ImageTextDataset, labels: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, "n k"]:
    """Scores of a logistic regression on `shortcut_features`, cross-validated within the images.

    It is told the labels of the other four fifths of the very images that it is scored on, in folds
    that share no patient: what a model that only knows shortcuts could reach here. Unknown labels
    are left out; a finding that a fold cannot learn scores 0.5 there.
    """
    facts = shortcut_features(dataset)
    patients = [patient_key(sample) for sample in dataset.samples]
    scores = np.full(labels.shape, 0.5)
    n_folds = min(FOLDS, len(set(patients)))
    if n_folds < 2:
        return scores
    for learn, held_out in GroupKFold(n_folds).split(facts, groups=patients):
        for k in range(labels.shape[1]):
            is_known = ~np.isnan(labels[learn, k])
            x, y = facts[learn][is_known], labels[learn, k][is_known]
            if len(np.unique(y)) == 2:
                model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
                scores[held_out, k] = model.fit(x, y).predict_proba(facts[held_out])[:, 1]
    return scores
