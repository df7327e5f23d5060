"""Entities of a report: findings, anatomy and modifiers as character spans, with negation.

The default finder looks all forms of a radiology lexicon (lexicon/*.toml) up in one pass, and then
decides which findings a cue such as "no" or "may represent" governs. Any spaCy pipeline or Hugging
Face token-classification model can stand in for the lexicon; the cues stay the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice

import numpy as np
from jaxtyping import Int32, Integer

from mmclip.data.lexicon import Lexicon, longest_disjoint, read_lexicon
from mmclip.data.sample import Entity, EntityKind


class EntityFinder:
    """Finds the entities of reports; built once (0.3 s for the lexicon), used for many.

    Args:
        backend: "lexicon"; "spacy:NAME" for the named entities of a spaCy pipeline, installed or in
            a folder; "hf:NAME" for a Hugging Face token-classification model, likewise.

    Raises:
        ValueError: When the backend is none of these, or its package is not installed.
    """

    def __init__(self, backend: str = "lexicon"):
        family, _, name = backend.partition(":")
        if backend == "lexicon":
            self._lexicon, self._tag = read_lexicon(), None
        elif family == "spacy" and name:
            self._lexicon, self._tag = read_lexicon(cues_only=True), _spacy_tagger(name)
        elif family == "hf" and name:
            self._lexicon, self._tag = read_lexicon(cues_only=True), _hf_tagger(name)
        else:
            raise ValueError(
                f"entity backend {backend!r} is unknown; use 'lexicon', 'spacy:NAME' or 'hf:NAME', "
                f"where NAME is an installed model or a folder"
            )

    def find(self, texts: Iterable[str]) -> Iterator[list[Entity]]:
        """The entities of each text: in order, disjoint and inside the text."""
        rest = iter(texts)
        while some := list(islice(rest, 64)):  # [chosen: keeps a model busy and memory small]
            tagged = self._tag(some) if self._tag else [None] * len(some)
            for text, spans in zip(some, tagged, strict=True):
                if spans is None:
                    yield self._lexicon.find(text)
                else:
                    given = [Entity(*span) for span in longest_disjoint(spans, set())]
                    yield self._lexicon.assess(text, given)


def find_entities(texts: Iterable[str], backend: str = "lexicon") -> Iterator[list[Entity]]:
    """The entities of each text; EntityFinder says which backends there are."""
    return _finder(backend).find(texts)


def find_statuses(text: str, entities: Sequence[Entity]) -> list[Entity]:
    """Some spans of a text with the status that the cues around them say, whoever found them.

    Args:
        entities: In order and disjoint; only those of kind "finding" are ever denied or doubted. A
            cue inside a span is part of its name.
    """
    return _cues().assess(text, entities)


def is_entity_tokens(
    entities: Sequence[Entity], offsets: Integer[np.ndarray, "t 2"]
) -> Int32[np.ndarray, " t"]:
    """Which concept each token mentions, so that all its mentions can be masked together.

    Args:
        entities: Disjoint entities of one report; leave those out that shall never be masked.
        offsets: Start and end character of each token; equal for [CLS], [SEP] and padding.

    Returns:
        0 for a token of no entity, otherwise the number of its concept, counted from 1 in order of
        first mention. A token that touches two entities belongs to the later one.
    """
    groups = np.zeros(len(offsets), np.int32)
    number: dict[str, int] = {}
    start, end = offsets[:, 0], offsets[:, 1]
    for entity in entities:
        touches = (start < entity.end) & (end > entity.start) & (end > start)
        groups[touches] = number.setdefault(entity.concept, len(number) + 1)
    return groups


@cache
def _cues() -> Lexicon:
    return read_lexicon(cues_only=True)


@cache
def _finder(backend: str) -> EntityFinder:
    return EntityFinder(backend)


# -- other models in place of the lexicon --


def _kind_of_label(label: str) -> EntityKind:
    """The kind that a model's label means: by a telling part of its name, else a finding.

    Source: ours; covers the labels of RadGraph ("ANAT-DP", "OBS-DP"), of UMLS semantic types
        ("Body Part, Organ, or Organ Component") and of general NER ("DISEASE").
    """
    label = label.lower()
    if any(part in label for part in ("anat", "body", "organ", "location", "region", "tissue")):
        return "anatomy"
    if any(part in label for part in ("modif", "qualif", "sever", "descri", "attrib", "tempor")):
        return "modifier"
    return "finding"


def _concept_of(mention: str) -> str:
    """The concept of a mention that its model does not name: its words in lower case."""
    return " ".join(mention.lower().split())


_Tagged = tuple[int, int, EntityKind, str]
_Tagger = Callable[[Sequence[str]], list[list[_Tagged]]]


def _spacy_tagger(name: str) -> _Tagger:
    try:
        import spacy
    except ModuleNotFoundError as error:
        if error.name != "spacy":
            raise
        raise ValueError(
            f"entity backend 'spacy:{name}' needs spaCy; pip install 'mmclip[spacy]', or use "
            f"'lexicon'"
        ) from None
    nlp = spacy.load(name)

    def tag(texts: Sequence[str]) -> list[list[_Tagged]]:
        return [
            [
                (
                    e.start_char,
                    e.end_char,
                    _kind_of_label(e.label_),
                    e.ent_id_ or _concept_of(e.text),
                )
                for e in doc.ents
            ]
            for doc in nlp.pipe(texts)
        ]

    return tag


def _hf_tagger(name: str) -> _Tagger:
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    model = AutoModelForTokenClassification.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name!r} gives no character offsets; use a fast one")
    # A tokenizer may not know how long a text its model reads; RoBERTa cannot use 2 positions.
    window = min(tokenizer.model_max_length, model.config.max_position_embeddings - 2)
    tokenizer.model_max_length = window
    run = pipeline(
        "token-classification",
        model=model,
        tokenizer=tokenizer,
        aggregation_strategy="simple",
        stride=window // 8,  # [chosen: a long report is read in windows that overlap a little]
    )

    def tag(texts: Sequence[str]) -> list[list[_Tagged]]:
        return [
            [tagged(text, span) for span in run(text)] if text.strip() else [] for text in texts
        ]

    def tagged(text: str, span: dict) -> _Tagged:
        start, end = int(span["start"]), int(span["end"])
        return start, end, _kind_of_label(span["entity_group"]), _concept_of(text[start:end])

    return tag
