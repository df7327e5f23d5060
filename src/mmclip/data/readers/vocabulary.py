"""The one vocabulary of findings, and what each source's label words say of it, as versioned data.

`findings/vocabulary.toml` lists every finding that a label may name. Beside it, each source has a
file of its own: what its readers looked for (`closed`), and what its words mean.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mmclip.config_io import Frozen, parse, read_toml
from mmclip.data.ingest.csv_mapping import Meaning
from mmclip.data.sample import ABSENT
from mmclip.data.versions import WORDS_OF


def _short(value: object) -> object:
    """A word that stands for findings that are present, and no more, is written as their list."""
    return {"present": value} if isinstance(value, list) else value


class Vocabulary(Frozen):
    """Every finding that a label of a data set may name; lower-case radiology words."""

    id: str
    version: int = Field(ge=1)
    description: str
    findings: tuple[str, ...]


class SourceWords(Frozen):
    """What the label words of one source say of findings.

    Attributes:
        closed: What the readers looked for: one that an image's labels do not name is absent. Any
            other finding that they do not name is unknown.
        unfinished: Words that leave what an image's other labels do not name unknown, such as
            "unchanged".
        closed_by: Word of `unfinished` -> words beside which it leaves nothing open: "unchanged"
            beside "normal" says that the earlier image was normal.
        blank: What a finding that a training image's labels do not name is taken for where labels
            are mined from reports, unless a protocol says otherwise. The manifest keeps it unknown.
        left_out: Words by which the source says that an image is not for use.
        words: Word -> what it says.
    """

    id: str
    version: int = Field(ge=1)
    description: str
    closed: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    closed_by: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    blank: Literal["absent", "unknown"] = "unknown"
    left_out: tuple[str, ...] = ()
    words: dict[str, Annotated[Meaning, BeforeValidator(_short)]]

    def finding(self, word: str) -> str:
        """The finding of a word that names one, as a column of a table does.

        Raises:
            ValueError: When the word is unknown.
        """
        return self._meaning(word).present[0]

    def labels(self, words: Iterable[str]) -> dict[str, int]:
        """The known findings of an image with these labels, in the order of their names.

        Raises:
            ValueError: When a word is unknown, or words contradict one another.
        """
        words = tuple(words)
        said: dict[str, int] = {}
        torn, left_open = set[str](), set[str]()
        for word in words:
            if word in self.unfinished:
                continue
            meaning = self._meaning(word)
            left_open.update(meaning.unknown)
            for finding, label in meaning.labels():
                if said.setdefault(finding, label) != label:
                    torn.add(finding)
        if torn:
            raise ValueError(
                f"the labels {', '.join(words)} contradict one another on {', '.join(sorted(torn))}"
            )
        if not is_unfinished(words, self.unfinished, self.closed_by):
            for finding in self.closed:
                if finding not in left_open:
                    said.setdefault(finding, ABSENT)
        return {finding: said[finding] for finding in sorted(said)}

    def _meaning(self, word: str) -> Meaning:
        if word not in self.words:
            raise ValueError(
                f"the label {word!r} is not among the words of {self.id}, version {self.version}; "
                f"add it to findings/{self.id}.toml"
            )
        return self.words[word]


def is_unfinished(
    words: Collection[str],
    unfinished: Collection[str],
    closed_by: Mapping[str, Collection[str]],
) -> bool:
    """Whether some label words leave what they do not name unknown.

    Args:
        words: Of an image.
        unfinished: As in `SourceWords`.
        closed_by: As in `SourceWords`.
    """
    left = [word for word in words if word in unfinished]
    return not all(set(closed_by.get(word, ())) & set(words) for word in left)


def load_vocabulary() -> Vocabulary:
    """The vocabulary of the package."""
    values = read_toml("vocabulary", "findings", "vocabulary")
    return parse(Vocabulary, values, "findings/vocabulary.toml")


def load_words(source: str) -> SourceWords:
    """The label words of a source that the package knows, by its name or that of its reader."""
    name = WORDS_OF.get(source, source)
    values = read_toml("list of label words", "findings", name)
    return parse(SourceWords, values, f"findings/{name}.toml")
