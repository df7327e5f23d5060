"""Training batches: which films a step reads, with what texts, and what of them is hidden.

Every draw is keyed by (seed, purpose, epoch, film), so a row does not depend on its batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmclip.batch import Batch, Share, Texts
from mmclip.config import AugmentConfig, Config
from mmclip.data.check import patient_key, study_key
from mmclip.data.corpus import (
    MAX_SENTENCES,
    TokenRows,
    mark_concepts,
    sentences_read,
    special_ids,
    tokenise_corpus,
)
from mmclip.data.dataset import Rows, affine_of, warp
from mmclip.data.disease_prompts import (
    NO_FINDING,
    PROMPT_DRAWS,
    DiseasePrompt,
    load_disease_prompts,
)
from mmclip.data.draws import Draw, Schedule, film_key, keyed_uniform
from mmclip.data.records import Entity, Film
from mmclip.data.text import tokenise
from mmclip.masking import (
    add_cues,
    choose_masked_entities,
    maskable_tokens,
    random_tokens_instead,
)
from mmclip.patches import lesion_ratio_of_patches

LesionMasks = Mapping[str, Bool[np.ndarray, "h w"]]
"""The pixels of all lesions of a made film, by film id; a film without lesions is not in it."""


def is_pair(film: Film) -> bool:
    """Whether a film has a report."""
    return film.image is not None and film.report is not None


def is_unpaired(film: Film) -> bool:
    """Whether a film has no report, and labels that say something for sure."""
    return film.image is not None and film.report is None and bool(film.sure_labels())


def impression_start(film: Film) -> int | None:
    """The character of a film's report at which its impression begins; None without one."""
    report, impression = film.report or "", film.impression
    if not impression or not report.endswith(impression):
        return None
    return len(report) - len(impression)


KEPT_FOR_TESTS = ("padchest-physician",)
"""Sources whose films never pre-train, nor any other film of their patients. Source: the 39,053
films of PadChest whose report a physician read, on which KAD, CheXzero and MAVL test."""


def kept_for_tests(rows: Rows) -> list[bool]:
    """Which films no run may pre-train on, whatever their split; see KEPT_FOR_TESTS."""
    patients = {patient_key(film) for film in rows.films if film.source in KEPT_FOR_TESTS}
    return [patient_key(film) in patients for film in rows.films]


def training_rows(rows: Rows, config: Config) -> Rows:
    """The films to train on: pairs of split "train", and unpaired ones where they are asked for."""
    wants_unpaired = config.unpaired.rows_per_pair > 0
    return rows.select(
        [
            film.split == "train"
            and film.view in config.data.views
            and not is_kept
            and (is_pair(film) or (wants_unpaired and is_unpaired(film)))
            for film, is_kept in zip(rows.films, kept_for_tests(rows), strict=True)
        ]
    )


SEEN_FILE = "seen.json"
"""In the folder of a run: see `seen_in_training`."""


def seen_in_training(rows: Rows, config: Config) -> dict[str, list[str]]:
    """The findings that training names: in reports, in prompts made of labels, as labels.

    Args:
        rows: As `training_rows` gives them.
        config: Says what becomes of labels.

    Returns:
        Names by "report", "prompt" and "label". A report names what its entities are, denied ones,
        too; a prompt may name whatever its film is labelled with for sure.
    """
    reports = {
        entity.concept
        for film in rows.films
        if is_pair(film)
        for entity in film.entities
        if entity.kind == "finding"
    }
    labels = label_names(rows)
    as_labels = config.loss.label > 0
    return {
        "report": sorted(reports),
        "prompt": [] if as_labels else labels,
        "label": labels if as_labels else [],
    }


def still(config: Config) -> Config:
    """The configuration under which films come as they are and texts whole, for looking at a model.

    Reports alone speak for films that have one, and prompts for the others, whatever the run did
    with labels. Which words are hidden still follows from the seed of the run.
    """
    none = AugmentConfig(rotation_deg=0, translate_ratio=0, scale_ratio=0, brightness=0, contrast=0)
    unpaired = {"rows_per_pair": 0.0, "prompt_pairs": False, "shuffle": False}
    whole = {"impression_prob": 0.0, "sentence_drop_prob": 0.0}
    return config.model_copy(
        update={
            "augment": none,
            "loss": config.loss.model_copy(update={"label": 0.0}),
            "unpaired": config.unpaired.model_copy(update=unpaired),
            "data": config.data.model_copy(update=whole),
        }
    )


def label_names(rows: Rows) -> list[str]:
    """What unpaired films are labelled with for sure, sorted: the columns of the label loss.

    Args:
        rows: As `training_rows` gives them. Labels of films with a report are not looked at.
    """
    return sorted({name for f in rows.films if is_unpaired(f) for name in f.sure_labels()})


@dataclass(frozen=True)
class _Said:
    """The text of one kind of some rows, before anything is hidden."""

    rows: Int[np.ndarray, " m"]  # of the batch
    tokens: TokenRows


class TrainingBatches:
    """The batches of a run. Pairs and unpaired films are two endless streams of their own.

    A step reads the same pairs whatever else it reads; unpaired films come on top.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerFast,
        config: Config,
        patch_px: int,
        shuffle_pairs: bool = False,
        lesions: LesionMasks | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Tokenises the reports once.

        Args:
            rows: As `training_rows` gives them.
            tokenizer: Of the text encoder.
            config: Of the run.
            patch_px: Of the image encoder.
            shuffle_pairs: Deal each film the report of another, fixed for the run: the control
                under which nothing can be learnt.
            lesions: For the oracle and for measuring; None where there are none.
            device: Where films are augmented, and found in a batch; None is the CPU, where the
                rest of a batch is.
        """
        self.device = device or torch.device("cpu")
        self.rows, self.tokenizer, self.config, self.patch_px = rows, tokenizer, config, patch_px
        self.lesions, self.seed = lesions, config.train.seed
        self.film_keys = np.array([film_key(f.film_id) for f in rows.films], np.uint64)
        has_report = np.array([is_pair(film) for film in rows.films], bool)
        self.pairs, self.unpaired = np.flatnonzero(has_report), np.flatnonzero(~has_report)

        texts: dict[str, tuple[Entity, ...]] = {}
        impressions: dict[str, int | None] = {}
        for row in self.pairs:
            film = rows.films[row]
            chosen = (e for e in film.entities if e.kind in config.text_mask.kinds)
            texts[str(film.report)] = tuple(chosen)
            impressions[str(film.report)] = impression_start(film)
        number = {text: i for i, text in enumerate(texts)}
        self.report_of_row = np.array([number.get(str(f.report), -1) for f in rows.films])
        self.corpus = tokenise_corpus(
            tokenizer, list(texts), list(texts.values()), list(impressions.values())
        )
        self.labels_of_row = np.arange(len(rows))
        self.study_keys = np.array([film_key(study_key(f)) >> 1 for f in rows.films], np.int64)
        if shuffle_pairs:
            self._deal_on(self.report_of_row, self.pairs)
            self.study_keys = self.film_keys.astype(np.int64) >> 1
        if config.unpaired.shuffle:
            self._deal_on(self.labels_of_row, self.unpaired)
        self.labels: Float[np.ndarray, "n k"] | None = None
        if config.loss.label:
            self.labels = rows.labels(label_names(rows))[self.labels_of_row].astype(np.float32)
            self.labels[self.pairs] = np.nan  # a pair is described by its report
        self.wordings = load_disease_prompts(config.unpaired.prompts)
        self.n_findings = max(len(set(f.labels) - {NO_FINDING}) for f in rows.films)

    @cached_property
    def streams(self) -> list[tuple[Int[np.ndarray, " s"], Schedule]]:
        """The pairs, and the unpaired films where they are asked for, with their order.

        Raises:
            ValueError: When there are none.
        """
        n_pairs = self.config.train.batch_size
        n_unpaired = round(self.config.unpaired.rows_per_pair * n_pairs)
        wanted = [(self.pairs, n_pairs), (self.unpaired, n_unpaired)]
        return [(rows, Schedule(self.film_keys[rows], n, self.seed)) for rows, n in wanted if n]

    def _deal_on(self, values: np.ndarray, rows: np.ndarray) -> None:
        """Gives each of the rows the value of another one, in a fixed random circle."""
        zeros = np.zeros(len(rows))
        u = keyed_uniform(self.seed, Draw.SHUFFLE_PAIRS, zeros, self.film_keys[rows], 1)
        order = rows[np.argsort(u[:, 0])]
        values[order] = values[np.roll(order, 1)]

    def batch(self, step: int, share: Share) -> Batch:
        """A share of the batch of a step; the shares of all processes and micro-batches are it."""
        parts = []
        for stream, schedule in self.streams:
            here, epochs = schedule.rows(step)
            cut = share.of_rows(len(here))
            parts.append((stream[here[cut]], epochs[cut]))
        rows, epochs = (np.concatenate(column) for column in zip(*parts, strict=True))
        return self._batch(rows, epochs, step)

    def of_rows(self, rows: Int[np.ndarray, " b"]) -> Batch:
        """Some rows as one batch, in this order, with the draws of the first epoch."""
        return self._batch(rows, np.zeros_like(rows), step=0)

    def prompts(
        self, rows: Int[np.ndarray, " b"], epochs: Int[np.ndarray, " b"]
    ) -> list[DiseasePrompt | None]:
        """What the labels of each row say, in the wording of its draws; None where nothing."""
        draws = self._draw(Draw.PROMPT, rows, epochs, PROMPT_DRAWS + 2 * self.n_findings)
        films = [self.rows.films[self.labels_of_row[row]] for row in rows]
        return [
            self.wordings.write(film.labels, own, self.config.unpaired.absent_prob)
            for film, own in zip(films, draws, strict=True)
        ]

    def _batch(self, rows: np.ndarray, epochs: np.ndarray, step: int) -> Batch:
        reports, prompts = self._reports(rows, epochs), self._prompts(rows, epochs)
        image, lesion_ratio, noise = self._films(rows, epochs)
        return Batch(
            image=image,
            reports=self._hide(reports, rows, epochs, np.ones(len(reports.rows), bool)),
            prompts=self._hide(prompts, rows, epochs, self.report_of_row[rows[prompts.rows]] < 0),
            keys=self._keys(rows, reports, prompts),
            patch_noise=noise,
            lesion_ratio=lesion_ratio,
            film_ids=tuple(self.rows.films[r].film_id for r in rows),
            step=step,
            labels=None if self.labels is None else torch.from_numpy(self.labels[rows]),
        )

    def _draw(self, purpose: Draw, rows: np.ndarray, epochs: np.ndarray, n: int) -> np.ndarray:
        return keyed_uniform(self.seed, purpose, epochs, self.film_keys[rows], n)

    def _films(
        self, rows: np.ndarray, epochs: np.ndarray
    ) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, "b n"] | None, Float[Tensor, "b n"]]:
        draws = self._draw(Draw.AUGMENT, rows, epochs, 6)
        image = self.rows.augmented(rows, draws, self.config.augment, self.device)
        n_patches = (image.shape[-1] // self.patch_px) ** 2
        noise = torch.from_numpy(self._draw(Draw.PATCHES, rows, epochs, n_patches)).float()
        if self.lesions is None:
            return image, None, noise
        none = np.zeros(image.shape[-2:], bool)
        masks = np.stack([self.lesions.get(self.rows.films[r].film_id, none) for r in rows])
        theta = affine_of(torch.from_numpy(draws).float(), self.config.augment)
        moved = warp(torch.from_numpy(masks).float().unsqueeze(1), theta)
        return image, lesion_ratio_of_patches(moved, self.patch_px), noise

    def _reports(self, rows: np.ndarray, epochs: np.ndarray) -> _Said:
        here = np.flatnonzero(self.report_of_row[rows] >= 0)
        data, keep = self.config.data, None
        numbers = self.report_of_row[rows[here]]
        if data.sentence_drop_prob or data.impression_prob:
            draws = self._draw(Draw.SENTENCES, rows[here], epochs[here], 3 + MAX_SENTENCES)
            keep = [
                sentences_read(
                    int(self.corpus.n_sentences[number]),
                    int(self.corpus.impression[number]),
                    own,
                    data.impression_prob,
                    data.sentence_drop_prob,
                )
                for number, own in zip(numbers, draws, strict=True)
            ]
        return _Said(here, self.corpus.assemble(numbers, data.max_tokens, keep))

    def _prompts(self, rows: np.ndarray, epochs: np.ndarray) -> _Said:
        # Where labels have a loss of their own, no film has a prompt: one use or the other.
        has_report = self.report_of_row[rows] >= 0
        wants_prompt = np.where(
            has_report, self.config.unpaired.prompt_pairs, not self.config.loss.label
        )
        wants = np.flatnonzero(wants_prompt)
        said = self.prompts(rows[wants], epochs[wants])
        here = [i for i, prompt in zip(wants, said, strict=True) if prompt is not None]
        tokens = self._tokenise([prompt for prompt in said if prompt is not None])
        return _Said(np.array(here, np.int64), tokens)

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

    def _hide(
        self, said: _Said, rows: np.ndarray, epochs: np.ndarray, may_hide: np.ndarray
    ) -> Texts:
        """Chooses the hidden words of some texts; none where `may_hide` is False."""
        mask = self.config.text_mask
        ids, is_valid, concepts, cues = (
            torch.from_numpy(x)
            for x in (said.tokens.ids, said.tokens.is_valid, said.tokens.concepts, said.tokens.cues)
        )
        is_masked = torch.zeros_like(is_valid)
        if self.config.loss.text and len(said.rows):
            # A cut can leave a cue whose finding is gone: it belongs to no concept that is here.
            n_groups = 1 + int(torch.maximum(concepts.max(), cues.max()))

            def draw(purpose: Draw, n: int) -> Tensor:
                found = self._draw(purpose, rows[said.rows], epochs[said.rows], n)
                return torch.from_numpy(found).float()

            is_maskable = maskable_tokens(ids, is_valid, self.tokenizer.all_special_ids)
            token_draws = draw(Draw.TOKENS, ids.shape[1])
            is_masked = choose_masked_entities(
                concepts, is_maskable, draw(Draw.CONCEPTS, n_groups), token_draws, mask.mask_ratio
            )
            is_masked = add_cues(
                is_masked, concepts, cues, is_maskable,
                draw(Draw.CUES, n_groups), mask.cue_prob,
            )  # fmt: skip
            if mask.policy == "random":
                is_masked = random_tokens_instead(is_masked, is_maskable, token_draws)
            is_masked &= torch.from_numpy(may_hide)[:, None]
        mask_id = special_ids(self.tokenizer)[3]
        return Texts(
            rows=torch.from_numpy(said.rows),
            ids=ids,
            is_valid=is_valid,
            is_entity=concepts > 0,
            is_masked=is_masked,
            masked_ids=ids.masked_fill(is_masked, mask_id),
        )

    def _keys(self, rows: np.ndarray, reports: _Said, prompts: _Said) -> Int[Tensor, "b 3"]:
        """Study, text and label set of each row; label sets count for prompts only.

        A pair's labels are kept out of the loss: the report says what it says.
        """
        keys = np.full((len(rows), 3), -1, np.int64)
        keys[:, 0] = self.study_keys[rows]
        for said in (prompts, reports):  # a row's text is its report, else its prompt
            for i, ids, is_valid in zip(
                said.rows, said.tokens.ids, said.tokens.is_valid, strict=True
            ):
                keys[i, 1] = film_key(ids[is_valid].tobytes().hex()) >> 1
        for i in np.setdiff1d(prompts.rows, reports.rows):
            labels = self.rows.films[self.labels_of_row[rows[i]]].sure_labels()
            keys[i, 2] = film_key(repr(sorted(labels.items()))) >> 1
        return torch.from_numpy(keys)
