"""docs/data.md's table of labels is what the readers give and the protocols ask of it.

python -m tests.test_label_table      prints the table anew
"""

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from mmclip.data.image_text_dataset import ImageTextDataset
from mmclip.data.ingest.sources import open_reader
from mmclip.data.sample import LABEL_MAKERS, LabelOrigin, Sample
from mmclip.evaluation.protocols import Protocol, load_protocol, protocol_names
from mmclip.evaluation.selection import label_makers, protocol_labels
from tests.published import lay_out
from tests.test_protocols import CASES, plan

DOCUMENT = Path(__file__).parents[1] / "docs" / "data.md"
START, END = "<!-- by tests/test_label_table.py -->\n", "<!-- end -->\n"


def read_small(rules: Protocol, root: Path) -> list[Sample]:
    """A small data set in the layout of a protocol's, as its reader reads it."""
    case = CASES[rules.id]
    raw = lay_out(root / rules.id, case.layout(plan(rules, case)))
    mapping = raw / "mapping.toml" if case.reader == "csv" else None
    records = open_reader(case.reader, raw, mapping=mapping, table=None)
    return [record for record in records if isinstance(record, Sample)]


def row_of(rules: Protocol, root: Path) -> list[str]:
    """One line: protocol, findings, who labelled test, what blank means in test and training."""
    samples = read_small(rules, root)
    sources = rules.sources_of("test")
    test = [
        s
        for s in samples
        if (s.labels or s.source_labels)
        and s.split in ("test", None)
        and (not sources or s.source in sources)
    ]
    labels = protocol_labels(rules, test)
    makers = Counter(LABEL_MAKERS[sample.label_origin] for sample in test)
    known = (~np.isnan(labels)).all(axis=1).mean()
    blank = "absent" if known == 1 else "absent, unless a label leaves it open"
    trained = "zero-shot only"
    if rules.finetune is not None:
        uncertain = {rules.finetune.uncertain, *rules.finetune.uncertain_of.values()}
        trained = f"{rules.finetune.blank}; uncertain: {' or '.join(sorted(uncertain))}"
    return [
        f"`{rules.id}`", str(len(rules.findings)), ", ".join(sorted(makers)), blank, trained,
    ]  # fmt: skip


def label_table(root: Path) -> str:
    """The table, in Markdown."""
    head = [
        "protocol", "findings", "who labelled the test images", "a finding not named in test",
        "not named in training",
    ]  # fmt: skip
    rows = [row_of(load_protocol(name), root) for name in sorted(protocol_names())]
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def test_the_table_of_labels_is_what_the_readers_give(tmp_path: Path):
    text = DOCUMENT.read_text("utf-8")
    written = re.search(re.escape(START) + "(.*?)" + re.escape(END), text, re.DOTALL)
    assert written is not None and written[1] == label_table(tmp_path)
    assert LABEL_MAKERS[None] not in written[1]  # each reader says who made its labels


def test_results_say_who_made_the_labels_and_how_many():
    def of(*origins: LabelOrigin | None) -> str:
        samples = tuple(
            Sample(image_id=str(i), study_id="s", patient_id="p", source="x", label_origin=origin)
            for i, origin in enumerate(origins)
        )
        return label_makers(ImageTextDataset(samples, (), np.zeros((len(samples), 2), int), "x"))

    assert of("image-reader", "image-reader") == "people who read the images"
    assert of(None) == "the source does not say"
    mixed = of("report-program", "report-program", "image-reader")
    assert mixed == "a program that read the reports (2), people who read the images (1)"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(label_table(Path(folder)))
