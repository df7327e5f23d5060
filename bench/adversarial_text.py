"""How long a megabyte of the worst text takes: cleaning and sections, sentences, entities.

    python bench/adversarial_text.py [--characters 1000000] [--uncut]

`parse_report` cuts a report at `text.MAX_CHARACTERS`; --uncut lifts the cut, so that the rules
themselves read all of it: time must grow as the text does.
The last line is one JSON object: seconds of CPU by kind and step, and the slowest of all.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable

from mmclip.data import text
from mmclip.data.entities import find_entities

KINDS: dict[str, str] = {  # the piece that is repeated; {} is where the repeats stand
    "spaces": "No effusion.{ }Heart normal.",
    "open marks": "{[**}",
    "marks and spaces": "{___  }",
    "underscores": "{_}a",
    "lines of underscores": "{____________\n}a",
    "past": "{past }",
    "huge character number": "&#{9};",
    "many character numbers": "{&#9999999999;}",
    "ampersands": "{&}",
    "blank lines": "{\n \n}a",
    "stops": "{. }a",
    "stops and quotes": "{.\"')}a",
    "marks in brackets": "({___;}",
    "brackets": "{(___) }",
    "numbering": "{1. a }",
    "numbering up and down": "{1. a 2. b }",
    "headings": "{FINDINGS: a IMPRESSION: b }",
    "views": "{CHEST TWO VIEWS }",
    "views with a colon": "{CHEST, TWO VIEWS: a }",
    "capitals": "{FINDIGNS }",
    "paragraphs": "{A b.\n\n}",
    "structured lines": "{Effusion: none\n}",
    "accents": "a{\u0316\u0301}",
    "ligatures": "{\ufdfa}",
    "denied list": "No {effusion, mild }edema or mass.",
    "listed before": "{effusion, }are not seen.",
    "parts of words apart": "{enlarged heart is enlarged no }",
    "cues": "{no may not versus }",
    "denied change": "{no no no change }",
    "questions": "{?}a",
    "one word": "{a}",
    "digits": "{1}",
    "decimals": "{1.1,}",
    "signatures": "{Signed by: x\n}",
    "banners": "{FINAL REPORT\n}",
    "numbers on lines": "{1.\n}",
    "templates on lines": "{[<\n}",
    "labels": "{AEffusion: none\n}",
    "names and colons": "{effusion: }",
    "accents by their numbers": "a{&#790;&#769;}",
    "tags that never close": "{<td }",
    "lines of names": "{Name: A }",
    "single capitals": "{A }",
    "resolutions": "{resolution of edema is incomplete }",
}


def entities(raw: str) -> None:
    """What a build does: the report's text, and its entities."""
    report = text.parse_report(raw).text
    if report is not None:
        text.split_sentences(report)
        list(find_entities([report]))


STEPS: dict[str, Callable[[str], object]] = {
    "parse": text.parse_report,
    "sentences": text.split_sentences,  # of the raw text, never cut
    "parse and entities": entities,
}


def adversarial(kind: str, n_characters: int) -> str:
    """A text of a kind, about so long."""
    head, _, rest = KINDS[kind].partition("{")
    piece, _, tail = rest.rpartition("}")
    return head + piece * (n_characters // len(piece)) + tail


def main() -> None:
    """Prints a line a kind, then JSON."""
    parser = argparse.ArgumentParser(description="Times the worst texts.")
    parser.add_argument("--characters", type=int, default=1_000_000, help="of each text")
    parser.add_argument("--uncut", action="store_true", help="read all of each text")
    args = parser.parse_args()
    logging.getLogger("mmclip").setLevel(logging.ERROR)  # that each was cut
    if args.uncut:
        text.MAX_CHARACTERS = args.characters * 2
    list(find_entities(["effusion"]))  # builds the lexicon
    seconds: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        raw = adversarial(kind, args.characters)
        seconds[kind] = {}
        for step, run in STEPS.items():
            begin = time.process_time()
            run(raw)
            seconds[kind][step] = round(time.process_time() - begin, 2)
        print(f"{kind:24}" + ", ".join(f"{k} {v:.2f} s" for k, v in seconds[kind].items()))
    worst = max(seconds, key=lambda kind: max(seconds[kind].values()))
    print(
        json.dumps(
            {
                "n_characters": args.characters,
                "is_cut": not args.uncut,
                "slowest": worst,
                "slowest_s": max(seconds[worst].values()),
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
