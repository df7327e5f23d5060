"""What learns from labelled images: a linear probe, or encoder and head together."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from jaxtyping import Float

from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.original_images import images_said
from mmclip.embedding_store import STORE_FOLDER, image_embeddings, store_folder
from mmclip.evaluation.baselines import LogisticFit, fit_logistic
from mmclip.evaluation.selection import LabelledImages
from mmclip.finetuning.features import stored_features, with_squares
from mmclip.finetuning.request import Common, Part
from mmclip.finetuning.saved import save_probe
from mmclip.finetuning.supervised import predict, train_classifier
from mmclip.finetuning.task import Task, multiclass_columns
from mmclip.models.classifier import Classifier, ImageEncoder
from mmclip.training.processes import let_threads_end, start_accelerator

Facts = dict[str, str | int | float]


def fit_probe(
    task: Task, features: Float[np.ndarray, "n d"], dataset: ImageTextDataset
) -> tuple[LogisticFit, Float[np.ndarray, "v k"], Float[np.ndarray, "t k"]]:
    """A logistic regression a finding, with its scores of the validation and the test images.

    Args:
        task: With the images that train. Labels of its test images are not looked at.
        features: Of the images of the data set.
        dataset: Whose order the features have.
    """
    at = {sample.image_id: i for i, sample in enumerate(dataset.samples)}

    def of(part: LabelledImages) -> np.ndarray:
        return features[[at[sample.image_id] for sample in part.dataset.samples]].astype(np.float64)

    train, val, test = map(of, (task.train, task.val, task.test))
    fit = fit_logistic(train, task.train.labels, val, task.val.labels)
    return fit, fit.scores(val), fit.scores(test)


class Learnt(NamedTuple):
    """Scores of what was learnt, where, and what there is to say of it."""

    val: Float[np.ndarray, "v k"]
    test: Float[np.ndarray, "t k"]
    device: torch.device
    facts: Facts


def probed(common: Common, part: Part, encoder: ImageEncoder, this: str) -> Learnt:
    """A linear probe on vectors of the encoder; `this` identifies it."""
    request, run = common.request, common.start.run
    device = torch.device("cpu" if request.cpu or not torch.cuda.is_available() else "cuda")
    home = request.out / STORE_FOLDER
    if run is not None and not common.start.is_random:
        home = store_folder(run.checkpoint)
    dataset = common.task.dataset
    features = stored_features(encoder.to(device), dataset, request.folder, home, device)
    fit, val, test = fit_probe(part.task, features, dataset)
    save_probe(part.folder, encoder, fit, described(common, encoder, this))
    return Learnt(val, test, device, {})


def probed_on_others(common: Common, part: Part, this: str) -> Learnt:
    """A linear probe on the embeddings of a model of others, which is named and not copied."""
    others, dataset = common.start.others, common.task.dataset
    assert others is not None
    features = np.asarray(image_embeddings(others, dataset, [common.request.folder]))
    fit, val, test = fit_probe(part.task, features, dataset)
    source = common.request.others
    assert source is not None
    of_model = {"dual_encoder": source.source, "dual_encoder_hash": others.weights.recipe_hash}
    save_probe(part.folder, None, fit, {**_said(common, this), **of_model})
    return Learnt(val, test, others.device, {**others.facts(), "images read": images_said(dataset)})


def trained_fully(common: Common, part: Part, encoder: ImageEncoder, this: str) -> Learnt | None:
    """Encoder and head learn together; None in all processes but the first."""
    request, start, task = common.request, common.start, part.task
    config = request.config
    accelerator = start_accelerator(config.train, request.cpu)
    if start.square is not None:
        with accelerator.main_process_first():
            task = _with_squares(common, task)
    device, is_main = accelerator.device, accelerator.is_main_process
    set_seed(part.seed)
    trained = train_classifier(
        accelerator,
        Classifier(encoder, len(task.protocol.findings), multiclass_columns(task.protocol)),
        task.train,
        task.val,
        config.of_random_weights() if start.is_random else config,
        part.seed,
        part.folder,
        described(common, encoder, this),
    )
    val, test = (predict(trained.model, of.dataset, device) for of in (task.val, task.test))
    accelerator.wait_for_everyone()
    let_threads_end(accelerator)
    accelerator.free_memory()
    facts: Facts = {"step": trained.step, "steps": trained.history[-1][0]}
    if start.others is not None:
        facts |= {**start.others.facts(), "images read": images_said(common.task.dataset)}
    return Learnt(val, test, device, facts) if is_main else None


def _with_squares(common: Common, task: Task) -> Task:
    """A task with its images as the image processor of a model of others makes squares of them."""
    start, folder = common.start, common.request.out / STORE_FOLDER
    square, size = start.square, start.image_size
    assert square is not None and size is not None
    train, val, test = (
        with_squares(part, square, size, folder) for part in (task.train, task.val, task.test)
    )
    return replace(task, train=train, val=val, test=test)


def described(common: Common, encoder: ImageEncoder, this: str) -> dict[str, Any]:
    """What meta.json says of fine-tuned weights: all that it takes to score images by them."""
    square = common.start.square
    return {
        **_said(common, this),
        "image_size": common.start.image_size,
        "resize": common.start.resize,
        "image_processor": None if square is None else square.config(),
        "embed_dim": None if encoder.projection is None else encoder.projection.out_features,
        "vision_config": encoder.encoder.config.to_dict(),
    }


def _said(common: Common, this: str) -> dict[str, Any]:
    """What meta.json says of any fine-tuned weights; `this` identifies them."""
    request = common.request
    return {
        "run": this,
        "method": request.method,
        "findings": list(common.task.protocol.findings),
        "multiclass": list(multiclass_columns(common.task.protocol)),
        "features": common.start.features,
        "config": request.config.model_dump(mode="json"),
        "command": request.command,
    }
