"""How fast, and in how much memory, many reports are parsed, searched, written and tokenised.

    python bench/text_scale.py openi/ --reports 250000 --workers 2

The reports are Open-I's, repeated: half of the sentences of each are swapped for those of other
reports, of the same section, until no two reports read alike. Prints reports a second of each stage
(making them is not counted), and the most memory that this process and a worker held. Parsing,
writing and tokenising are one process; entities are found by all workers. The last line is one JSON
object. Rates are for a second, and for a second of CPU time, which a busy machine does not change.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from build_scale import Clock, peak_mb, watch_workers
from mmclip.data.folder import MANIFEST_FILE
from mmclip.data.ingest.build import build_data, search_reports
from mmclip.data.readers.openi import read_openi
from mmclip.data.sample import Record, Sample
from mmclip.data.text import parse_report, split_sentences, tokenise, train_tokenizer
from mmclip.progress import progress

SWAP_PROB = 0.5
N_TO_TRAIN = 5000  # reports that the vocabulary is trained on
BATCH = 2048  # reports tokenised at once, as mmclip.data.corpus does

Sections = tuple[list[str], list[str]]  # the sentences of findings and impression


def read_sections(root: Path) -> list[Sections]:
    """Of the reports that have both."""

    def sentences(text: str) -> list[str]:
        return [text[a:b] for a, b in split_sentences(text)]

    studies = {r.study_id: r for r in read_openi(root) if isinstance(r, Sample)}
    return [
        (sentences(sample.findings), sentences(sample.impression))
        for sample in studies.values()
        if sample.findings and sample.impression
    ]


def varied(known: list[Sections], n: int, rng: np.random.Generator) -> Iterator[str]:
    """Free reports with headers, no two alike."""
    pools = [[s for sections in known for s in sections[part]] for part in (0, 1)]
    seen: set[int] = set()
    while len(seen) < n:
        parts = []
        for part, sentences in enumerate(known[len(seen) % len(known)]):
            is_swapped = rng.random(len(sentences)) < SWAP_PROB
            others = rng.integers(len(pools[part]), size=len(sentences))
            new = zip(sentences, is_swapped, others, strict=True)
            parts.append(" ".join(pools[part][j] if swap else s for s, swap, j in new))
        text = f"EXAM: Chest.\n\nFINDINGS: {parts[0]}\n\nIMPRESSION: {parts[1]}\n"
        if hash(text) not in seen:
            seen.add(hash(text))
            yield text


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Times each stage."""
    n = args.reports
    taken: dict[str, tuple[float, float]] = {}  # wall and CPU seconds
    samples: list[Sample] = []
    parsing = np.zeros(2)
    with progress("parsing reports", n) as advance:
        texts = varied(read_sections(args.root), n, np.random.default_rng(args.seed))
        for i, text in enumerate(texts):
            clock = Clock()
            report = parse_report(text)
            parsing += clock.read()
            samples.append(
                Sample(
                    image_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i}", source="openi",
                    findings=report.findings, impression=report.impression, report=report.text,
                )
            )  # fmt: skip
            advance(1)
    taken["parse"] = (parsing[0], parsing[1])
    n_distinct = len({sample.report for sample in samples})
    out = folder / "data"
    clock = Clock()
    with watch_workers() as peak_of_workers:
        search_reports([sample.report for sample in samples], out, workers=args.workers)
    taken["entities"] = clock.read()
    clock = Clock()
    records: list[Record] = [*samples]
    meta = build_data(records, args.root, out, image_size=64)  # takes up what was found
    taken["write"] = clock.read()
    tokenizer = train_tokenizer(str(sample.report) for sample in samples[:N_TO_TRAIN])
    n_tokens = n_truncated = 0
    clock = Clock()
    with progress("tokenising", n) as advance:
        for batch in pq.ParquetFile(out / MANIFEST_FILE).iter_batches(BATCH, columns=["report"]):
            tokens = tokenise(tokenizer, batch["report"].to_pylist(), max_tokens=256)
            n_tokens += int(tokens.is_valid.sum())
            n_truncated += tokens.n_truncated
            advance(len(batch))
    taken["tokenise"] = clock.read()
    rates = {f"{stage}_per_s": round(n / wall) for stage, (wall, _) in taken.items()}
    rates |= {f"{stage}_per_cpu_s": round(n / cpu) for stage, (_, cpu) in taken.items()}
    return {
        "reports": n, "distinct": n_distinct, "workers": args.workers, **rates,
        "tokens_per_report": round(n_tokens / n, 1), "truncated": n_truncated,
        "peak_rss_mb": round(peak_mb("self")), "peak_rss_worker_mb": round(peak_of_workers[0]),
        "data_hash": meta["data_hash"][:16],
    }  # fmt: skip


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "root", type=Path, help="Open-I: its archive of reports, or a folder with it"
    )
    parser.add_argument("--reports", type=int, default=250_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the data; a temporary one by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="text-scale-", dir=args.folder))
    try:
        found = measure(folder, args)
        for what, value in found.items():
            print(f"{what:25} {value}")
        print(json.dumps(found), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
