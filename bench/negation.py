"""How well the cues alone tell denied findings, beside negspacy and medspaCy, in one run.

    python bench/negation.py negex_annotations.tsv --negspacy VENV/bin/python \\
        --medspacy OTHER/bin/python [--misses misses.txt] [--half odd]

The table is the test set of NegEx (Chapman et al. 2001): 2,376 sentences of clinical reports of
many kinds with one concept each, which physicians called Negated or Affirmed. Each program gets the
concept's span, so only the reach of cues is scored, no recognition. Our cues were written on
reports of odd number; the even ones (the default) are for scoring alone, and --misses refuses them.
Each other program runs under the Python where it is installed, with its own default settings.
The last line is one JSON object.
"""

import argparse
import csv
import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mmclip.data.entities import find_statuses
from mmclip.data.sample import Entity


class Sentence(NamedTuple):
    """A sentence, the span of its concept, and what the physicians said."""

    report: int
    text: str
    start: int
    end: int
    is_negated: bool


def read_sentences(table: Path) -> tuple[list[Sentence], list[str]]:
    """All sentences, and the concepts that their sentences do not hold.

    The concept is where it stands in capitals, or else at its first mention, white space aside.

    Raises:
        ValueError: When a status is neither Negated nor Affirmed.
    """
    sentences, lost = [], []
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            text, concept = row["Sentence"].strip(), row["Concept"].strip()
            status = row["Negation"].strip()
            if status not in ("Negated", "Affirmed"):
                raise ValueError(f"status {status!r} of {concept!r} is not Negated or Affirmed")
            words = r"\s+".join(map(re.escape, concept.split()))
            capitals = r"\s+".join(map(re.escape, concept.upper().split()))
            place = re.search(capitals, text) or re.search(words, text, re.IGNORECASE)
            if place is None:
                lost.append(concept)
                continue
            number = int(row["Report No."])
            sentences.append(Sentence(number, text, *place.span(), status == "Negated"))
    return sentences, lost


def ours(sentences: Sequence[Sentence]) -> list[bool]:
    """What our cues say; a doubted finding counts as affirmed."""
    return [
        find_statuses(s.text, [Entity(s.start, s.end, "finding", "")])[0].status == "negated"
        for s in sentences
    ]


NEGSPACY = """
import json, sys, spacy
from negspacy.negation import Negex

nlp = spacy.blank("en")
nlp.add_pipe("sentencizer")
negex = nlp.add_pipe("negex")
out = []
for text, start, end in json.load(sys.stdin):
    doc = nlp(text)
    doc.ents = [doc.char_span(start, end, label="FINDING", alignment_mode="expand")]
    out.append(bool(negex(doc).ents[0]._.negex))
json.dump(out, sys.stdout)
"""

MEDSPACY = """
import json, sys, medspacy

nlp = medspacy.load(enable=["medspacy_tokenizer", "medspacy_pyrush", "medspacy_context"])
context = nlp.get_pipe("medspacy_context")
out = []
with nlp.select_pipes(disable=["medspacy_context"]):
    for text, start, end in json.load(sys.stdin):
        doc = nlp(text)
        doc.ents = [doc.char_span(start, end, label="FINDING", alignment_mode="expand")]
        out.append(bool(context(doc).ents[0]._.is_negated))
json.dump(out, sys.stdout)
"""


def run_elsewhere(python: Path, code: str) -> Callable[[Sequence[Sentence]], list[bool]]:
    """A program of others, under the Python where it is installed."""

    def verdicts(sentences: Sequence[Sentence]) -> list[bool]:
        given = json.dumps([(s.text, s.start, s.end) for s in sentences])
        ended = subprocess.run(
            [python, "-W", "ignore", "-c", code],
            input=given, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ended.returncode:
            raise RuntimeError(f"{python} failed: {ended.stderr.strip().splitlines()[-1:]}")
        return json.loads(ended.stdout.splitlines()[-1])

    return verdicts


def score(sentences: Sequence[Sentence], said: Sequence[bool]) -> dict[str, float]:
    """Precision, recall and F1 of "negated"."""
    pairs = [(s.is_negated, is_said) for s, is_said in zip(sentences, said, strict=True)]
    hits, extra = pairs.count((True, True)), pairs.count((False, True))
    missed = pairs.count((True, False))
    return {
        "precision": round(hits / max(1, hits + extra), 4),
        "recall": round(hits / max(1, hits + missed), 4),
        "f1": round(2 * hits / max(1, 2 * hits + extra + missed), 4),
    }


def main() -> None:
    """Prints a line a program, then JSON."""
    parser = argparse.ArgumentParser(description="Scores the cues on the test set of NegEx.")
    parser.add_argument("table", type=Path, help="negex_annotations.tsv")
    parser.add_argument("--negspacy", type=Path, help="Python where negspacy is installed")
    parser.add_argument("--medspacy", type=Path, help="Python where medspaCy is installed")
    parser.add_argument("--half", choices=["odd", "even"], default="even", help="report numbers")
    parser.add_argument("--misses", type=Path, help="file for our wrong answers; odd half only")
    args = parser.parse_args()
    if args.misses and args.half == "even":
        parser.error("--misses would show the half that is kept for scoring; add --half odd")
    is_odd = args.half == "odd"
    found, lost = read_sentences(args.table)
    sentences = [s for s in found if s.report % 2 == is_odd]
    programs: dict[str, Callable[[Sequence[Sentence]], list[bool]]] = {"mmclip": ours}
    if args.negspacy:
        programs["negspacy"] = run_elsewhere(args.negspacy, NEGSPACY)
    if args.medspacy:
        programs["medspacy"] = run_elsewhere(args.medspacy, MEDSPACY)
    results: dict[str, object] = {
        "half": args.half,
        "n_sentences": len(sentences),
        "n_left_out_of_both_halves": len(lost),  # the sentence does not hold the concept
        "n_negated": sum(s.is_negated for s in sentences),
    }
    for name, program in programs.items():
        begin = time.perf_counter()
        said = program(sentences)
        scores = score(sentences, said) | {"seconds": round(time.perf_counter() - begin, 2)}
        results[name] = scores
        print(f"{name:10}" + ", ".join(f"{what} {value}" for what, value in scores.items()))
        if args.misses and name == "mmclip":
            lines = [
                f"{'missed' if s.is_negated else 'extra'}\t{s.text[s.start : s.end]}\t{s.text}"
                for s, is_said in zip(sentences, said, strict=True)
                if s.is_negated != is_said
            ]
            args.misses.write_text("\n".join(lines) + "\n", "utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
