"""Training batches: which images a step reads, with what texts, and what of them is masked.

Every random number is keyed by (seed, purpose, epoch, image): a row does not depend on its batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.batch import Batch, BatchSlice, TextBatch, on_each_tensor
from mmclip.config import AugmentConfig, Config
from mmclip.data.collector import collector_paused
from mmclip.data.corpus import (
    MAX_SENTENCES,
    TokenRows,
    mark_concepts,
    sentences_read,
    tokenise_corpus,
)
from mmclip.data.disease_prompts import (
    NO_FINDING,
    PROMPT_UNIFORMS,
    DiseasePrompt,
    load_disease_prompts,
)
from mmclip.data.given_away import leave_given_away
from mmclip.data.image_text_dataset import (
    AUGMENT_UNIFORMS,
    ImageTextDataset,
    affine_of,
    augmented,
    warp,
)
from mmclip.data.leakage.check import study_key
from mmclip.data.sample import ABSENT, PRESENT, Entity, Sample, finds_nothing
from mmclip.data.sampling import Purpose, Schedule, image_key, keyed_uniform
from mmclip.data.streams import is_bare, is_pair, is_report_only, is_unpaired, label_names
from mmclip.data.text import tokenise
from mmclip.masking import (
    add_cues,
    choose_masked_entities,
    maskable_tokens,
    random_tokens_instead,
)
from mmclip.patches import PatchGrid

CPU = torch.device("cpu")

LesionMasks = Mapping[str, Bool[np.ndarray, "h w"]]
"""The pixels of all lesions of a synthetic image, by image id; an image without lesions is not in
it."""


def impression_start(sample: Sample) -> int | None:
    """The character of an image's report at which its impression begins; None without one."""
    report, impression = sample.report or "", sample.impression
    if not impression or not report.endswith(impression):
        return None
    return len(report) - len(impression)


@dataclass(frozen=True)
class _TextRows:
    """The text of one kind of some rows, before anything is masked."""

    rows: Int[np.ndarray, " m"]  # of the batch
    tokens: TokenRows


@dataclass(frozen=True)
class RawBatch:
    """A batch whose images are bytes yet: they are augmented on the device that they go to."""

    pixels: UInt8[Tensor, "b h w"]
    uniforms: Float[Tensor, "b u"]  # of the augmentation
    lesions: Bool[Tensor, "b lh lw"] | None  # of the folder's images, which may be larger
    rest: Batch  # without pixels: its images are of 0 x 0
    augment: AugmentConfig
    grid: PatchGrid
    image_size: int  # side of the augmented images

    @property
    def image_ids(self) -> tuple[str, ...]:
        """The image of each row."""
        return self.rest.image_ids

    def pin_memory(self) -> "RawBatch":
        """The same batch in memory that a GPU reads from while the CPU works."""
        return on_each_tensor(self, Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The finished batch on a device."""
        there = on_each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))
        image = augmented(there.pixels, there.uniforms, self.augment, self.image_size)
        if there.lesions is None:
            return there.rest.with_images(image, None)
        theta = affine_of(there.uniforms, self.augment)
        inside = there.lesions.float().unsqueeze(1)
        if inside.shape[-2:] != there.pixels.shape[-2:]:  # of images made smaller as they are read
            inside = F.interpolate(inside, size=there.pixels.shape[-2:], mode="area")
        moved = warp(inside, theta, self.image_size)
        return there.rest.with_images(image, self.grid.lesion_ratio(moved))


class TrainingBatches:
    """The batches of a run: endless streams of pairs, and of what trains beside them.

    A step reads the same pairs whatever else it reads; the others come on top.
    """

    @collector_paused()
    def __init__(
        self,
        dataset: ImageTextDataset,
        tokenizer: PreTrainedTokenizerFast,
        config: Config,
        grid: PatchGrid,
        shuffle_pairs: bool = False,
        lesions: LesionMasks | None = None,
    ) -> None:
        """Tokenises the reports once.

        Args:
            dataset: As `training_dataset` gives them.
            tokenizer: Of the text encoder.
            config: Of the run.
            grid: Where the features of the image encoder lie.
            shuffle_pairs: Deal each image the report of another, fixed for the run: the control
                under which nothing can be learnt.
            lesions: For the oracle and for measuring; None where there are none.
        """
        self.dataset, self.tokenizer, self.config, self.grid = dataset, tokenizer, config, grid
        self.to_crop = dataset.to_crop(config.augment)
        self.lesions, self.seed = lesions, config.train.seed
        self.image_keys = np.array([image_key(f.image_id) for f in dataset.samples], np.uint64)
        self.pairs, self.unpaired, self.lone, self.bare = (
            np.flatnonzero([is_kind(sample) for sample in dataset.samples])
            for is_kind in (is_pair, is_unpaired, is_report_only, is_bare)
        )

        texts: dict[str, tuple[Entity, ...]] = {}
        impressions: dict[str, int | None] = {}
        is_nothing: dict[str, bool] = {}
        for row in (*self.pairs, *self.lone):
            sample = dataset.samples[row]
            chosen = (e for e in sample.entities if e.kind in config.text_mask.kinds)
            texts[str(sample.report)] = tuple(chosen)
            impressions[str(sample.report)] = impression_start(sample)
            is_nothing[str(sample.report)] = finds_nothing(sample.entities)
        number = {text: i for i, text in enumerate(texts)}
        self.report_of_row = np.array([number.get(str(f.report), -1) for f in dataset.samples])
        corpus = tokenise_corpus(
            tokenizer, list(texts), list(texts.values()), list(impressions.values())
        )
        self.corpus = leave_given_away(corpus, config.text_mask.given_away_prob)
        self.finds_nothing = np.array(list(is_nothing.values()), bool)  # by report
        self.labels_of_row = np.arange(len(dataset))
        self.study_keys = np.array(
            [image_key(study_key(f)) >> 1 for f in dataset.samples], np.int64
        )
        if shuffle_pairs:
            self._rotate(self.report_of_row, self.pairs)
            self.study_keys = self.image_keys.astype(np.int64) >> 1
        if config.unpaired.shuffle:
            self._rotate(self.labels_of_row, self.unpaired)
        self.labels = self._labels() if config.loss.label else None
        self.prompt_templates = load_disease_prompts(config.unpaired.prompts)
        self.n_findings = max(len(set(f.labels) - {NO_FINDING}) for f in dataset.samples)

    def _labels(self) -> Float[np.ndarray, "n k"]:
        """The labels that each row trains by; none of a pair, which its report describes."""
        labels = self.dataset.labels(label_names(self.dataset))[self.labels_of_row]
        labels[self.pairs] = np.nan
        return labels.astype(np.float32)

    @cached_property
    def streams(self) -> list[tuple[Int[np.ndarray, " s"], Schedule]]:
        """The pairs, and the other images where they are asked for, with their order.

        Unpaired images are left out where there are none; a line says so before training.

        Raises:
            ValueError: When there are no pairs.
        """
        unpaired = self.config.unpaired
        wanted = (
            (self.pairs, 1.0),
            (self.unpaired, unpaired.rows_per_pair if len(self.unpaired) else 0.0),
            (self.bare, unpaired.bare_per_pair),
        )
        return [self._stream(rows, ratio) for rows, ratio in wanted if ratio]

    @cached_property
    def lone_stream(self) -> tuple[Int[np.ndarray, " s"], Schedule] | None:
        """The reports without an image, where they are asked for."""
        ratio = self.config.unpaired.reports_per_pair
        return self._stream(self.lone, ratio) if ratio else None

    def _stream(
        self, rows: Int[np.ndarray, " s"], ratio: float
    ) -> tuple[Int[np.ndarray, " s"], Schedule]:
        n = max(round(ratio * self.config.train.batch_size), 1)
        return rows, Schedule(self.image_keys[rows], n, self.seed)

    def _rotate(self, values: np.ndarray, rows: np.ndarray) -> None:
        """Gives each of the rows the value of another one, in a fixed random circle."""
        zeros = np.zeros(len(rows))
        u = keyed_uniform(self.seed, Purpose.SHUFFLE_PAIRS, zeros, self.image_keys[rows], 1)
        order = rows[np.argsort(u[:, 0])]
        values[order] = values[np.roll(order, 1)]

    def batch(self, step: int, batch_slice: BatchSlice) -> Batch:
        """As `read` gives it, finished on the CPU."""
        return self.read(step, batch_slice).to(CPU)

    def read(self, step: int, batch_slice: BatchSlice) -> RawBatch:
        """A share of the batch of a step; the shares of all processes and micro-batches are it."""
        parts = [self._part(stream, step, batch_slice) for stream in self.streams]
        rows, epochs = (np.concatenate(column) for column in zip(*parts, strict=True))
        lone = self.lone_stream
        texts = None if lone is None else self._part(lone, step, batch_slice)
        return self._batch(rows, epochs, step, texts)

    @staticmethod
    def _part(
        stream: tuple[np.ndarray, Schedule], step: int, batch_slice: BatchSlice
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and epochs that a share of a step reads of a stream."""
        here, epochs = stream[1].rows(step)
        cut = batch_slice.of_rows(len(here))
        return stream[0][here[cut]], epochs[cut]

    def of_rows(self, rows: Int[np.ndarray, " b"]) -> Batch:
        """Some rows as one batch, in this order, with the random numbers of epoch 0."""
        return self._batch(rows, np.zeros_like(rows), step=0).to(CPU)

    def prompts(
        self, rows: Int[np.ndarray, " b"], epochs: Int[np.ndarray, " b"]
    ) -> list[DiseasePrompt | None]:
        """What the labels of each row say, by templates chosen at random; None where nothing."""
        uniforms = self._uniforms(
            Purpose.PROMPT, rows, epochs, PROMPT_UNIFORMS + 2 * self.n_findings
        )
        samples = [self.dataset.samples[self.labels_of_row[row]] for row in rows]
        return [
            self.prompt_templates.write(sample.labels, own, self.config.unpaired.absent_prob)
            for sample, own in zip(samples, uniforms, strict=True)
        ]

    def _batch(
        self,
        rows: np.ndarray,
        epochs: np.ndarray,
        step: int,
        lone: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> RawBatch:
        reports, prompts = self._reports(rows, epochs), self._prompts(rows, epochs)
        pixels = self.to_crop.pixels(rows)
        size = self.dataset.image_size or pixels.shape[-1]
        n_patches = (size // self.grid.patch_size) ** 2
        rest = Batch(
            image=torch.zeros(len(rows), 1, 0, 0),
            reports=self._mask(reports, rows, epochs, np.ones(len(reports.rows), bool)),
            prompts=self._mask(prompts, rows, epochs, self.report_of_row[rows[prompts.rows]] < 0),
            keys=self._keys(rows, reports, prompts),
            patch_noise=torch.from_numpy(
                self._uniforms(Purpose.PATCHES, rows, epochs, n_patches)
            ).float(),
            lesion_ratio=None,
            image_ids=tuple(self.dataset.samples[r].image_id for r in rows),
            step=step,
            labels=None if self.labels is None else torch.from_numpy(self.labels[rows]),
            lone_reports=None if lone is None else self._lone_reports(*lone),
        )
        uniforms = torch.from_numpy(
            self._uniforms(Purpose.AUGMENT, rows, epochs, AUGMENT_UNIFORMS)
        ).float()
        lesions = self._lesions_of(rows, pixels.shape[-2:])
        return RawBatch(pixels, uniforms, lesions, rest, self.config.augment, self.grid, size)

    def _lone_reports(self, rows: np.ndarray, epochs: np.ndarray) -> TextBatch:
        texts = self._reports(rows, epochs)
        return self._mask(texts, rows, epochs, np.ones(len(rows), bool))

    def _uniforms(
        self, purpose: Purpose, rows: np.ndarray, epochs: np.ndarray, n: int
    ) -> np.ndarray:
        return keyed_uniform(self.seed, purpose, epochs, self.image_keys[rows], n)

    def _lesions_of(self, rows: np.ndarray, size: Sequence[int]) -> Bool[Tensor, "b h w"] | None:
        if self.lesions is None:
            return None
        none = np.zeros(next(iter(self.lesions.values()), np.zeros(tuple(size))).shape, bool)
        masks = np.stack([self.lesions.get(self.dataset.samples[r].image_id, none) for r in rows])
        return torch.from_numpy(masks)

    def _reports(self, rows: np.ndarray, epochs: np.ndarray) -> _TextRows:
        here = np.flatnonzero(self.report_of_row[rows] >= 0)
        data, keep = self.config.data, None
        numbers = self.report_of_row[rows[here]]
        if data.sentence_drop_prob or data.impression_prob:
            uniforms = self._uniforms(
                Purpose.SENTENCES, rows[here], epochs[here], 3 + MAX_SENTENCES
            )
            keep = [
                sentences_read(
                    int(self.corpus.n_sentences[number]),
                    int(self.corpus.impression[number]),
                    own,
                    data.impression_prob,
                    data.sentence_drop_prob,
                )
                for number, own in zip(numbers, uniforms, strict=True)
            ]
        return _TextRows(here, self.corpus.assemble(numbers, data.max_tokens, keep))

    def _prompts(self, rows: np.ndarray, epochs: np.ndarray) -> _TextRows:
        # Where labels have a loss of their own, no image has a prompt: one use or the other.
        has_report = self.report_of_row[rows] >= 0
        wants_prompt = np.where(
            has_report, self.config.unpaired.prompt_pairs, not self.config.loss.label
        )
        wants = np.flatnonzero(wants_prompt)
        said = self.prompts(rows[wants], epochs[wants])
        here = [i for i, prompt in zip(wants, said, strict=True) if prompt is not None]
        tokens = self._tokenise([prompt for prompt in said if prompt is not None])
        return _TextRows(np.array(here, np.int64), tokens)

    def _tokenise(self, prompts: Sequence[DiseasePrompt]) -> TokenRows:
        if not prompts:
            return self.corpus.assemble(np.zeros(0, np.int64), self.config.data.max_tokens)
        texts = [prompt.text for prompt in prompts]
        tokens = tokenise(self.tokenizer, texts, max_tokens=self.config.data.max_tokens)
        marked = [
            mark_concepts(prompt.entities, offsets)
            for prompt, offsets in zip(prompts, tokens.offsets, strict=True)
        ]
        concepts, cues = (np.stack(column).astype(np.int64) for column in zip(*marked, strict=True))
        return TokenRows(tokens.ids.astype(np.int64), tokens.is_valid, concepts, cues)

    def _mask(
        self, said: _TextRows, rows: np.ndarray, epochs: np.ndarray, may_mask: np.ndarray
    ) -> TextBatch:
        """Chooses the masked words of some texts; none where `may_mask` is False."""
        mask = self.config.text_mask
        ids, is_valid, concepts, cues = (
            torch.from_numpy(x)
            for x in (said.tokens.ids, said.tokens.is_valid, said.tokens.concepts, said.tokens.cues)
        )
        is_masked = torch.zeros_like(is_valid)
        if self.config.loss.text and len(said.rows):
            # A cut can leave a cue whose finding is gone: it belongs to no concept that is here.
            n_groups = 1 + int(torch.maximum(concepts.max(), cues.max()))

            def draw(purpose: Purpose, n: int) -> Tensor:
                found = self._uniforms(purpose, rows[said.rows], epochs[said.rows], n)
                return torch.from_numpy(found).float()

            is_maskable = maskable_tokens(ids, is_valid, self.tokenizer.all_special_ids)
            token_noise = draw(Purpose.TOKENS, ids.shape[1])
            is_masked = choose_masked_entities(
                concepts,
                is_maskable,
                draw(Purpose.CONCEPTS, n_groups),
                token_noise,
                mask.mask_ratio,
                mask.fallback_ratio,
            )
            is_masked = add_cues(
                is_masked, concepts, cues, is_maskable,
                draw(Purpose.CUES, n_groups), mask.cue_prob,
            )  # fmt: skip
            if mask.policy == "random":
                is_masked = random_tokens_instead(is_masked, is_maskable, token_noise)
            is_masked &= torch.from_numpy(may_mask)[:, None]
        return TextBatch(
            rows=torch.from_numpy(said.rows),
            ids=ids,
            is_valid=is_valid,
            is_entity=concepts > 0,
            is_masked=is_masked,
            masked_ids=ids.masked_fill(is_masked, self.corpus.frame.mask),
        )

    def _keys(self, rows: np.ndarray, reports: _TextRows, prompts: _TextRows) -> Int[Tensor, "b 4"]:
        """Study, text, label set and "nothing found" of each row; labels count for prompts only.

        A pair's labels are kept out of the loss: the report says what it says.
        """
        keys = np.full((len(rows), 4), -1, np.int64)
        keys[:, 0] = self.study_keys[rows]
        for said in (prompts, reports):  # a row's text is its report, else its prompt
            for i, ids, is_valid in zip(
                said.rows, said.tokens.ids, said.tokens.is_valid, strict=True
            ):
                keys[i, 1] = image_key(ids[is_valid].tobytes().hex()) >> 1
        match_normal = self.config.contrastive.match_normal
        for i in np.setdiff1d(prompts.rows, reports.rows):
            labels = self.dataset.samples[self.labels_of_row[rows[i]]].labels
            sure = sorted((k, v) for k, v in labels.items() if v in (PRESENT, ABSENT))
            keys[i, 2] = image_key(repr(sure)) >> 1
            if match_normal and self.prompt_templates.is_normal(labels):
                keys[i, 3] = 0
        if match_normal:
            found = self.finds_nothing[self.report_of_row[rows[reports.rows]]]
            keys[reports.rows[found], 3] = 0
        return torch.from_numpy(keys)
