"""How well the lexicon finds what human coders found in 3,955 reports, and how fast.

    python bench/entities.py NLMCXR_reports.tgz --half dev [--misses misses.txt]

Open-I gives each report `major` MeSH tags, written by coders and not by us. A report counts as
positive for a finding when one of its tags has that finding as its head ("Opacity/lung/base/left"
is an opacity), and as found when the lexicon reports a PRESENT mention; uncertain mentions do not
count (decided on the dev half). The lexicon was written on the dev half; a hash of the report's id
makes the halves, and reports of the same text share the half of the first of them.
The last line is one JSON object.
"""

import argparse
import hashlib
import json
import re
import statistics
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mmclip.data.entities import Entity, EntityFinder

TARGETS: dict[str, tuple[set[str], set[str]]] = {  # concepts of the lexicon, heads of the tags
    "opacity": ({"opacity"}, {"opacity"}),
    "cardiomegaly": ({"cardiomegaly"}, {"cardiomegaly"}),
    "pulmonary atelectasis": ({"atelectasis"}, {"pulmonary atelectasis"}),
    "calcified granuloma": ({"calcified granuloma"}, {"calcified granuloma"}),
    "pleural effusion": ({"pleural effusion"}, {"pleural effusion"}),
    "atherosclerosis": ({"atherosclerosis"}, {"atherosclerosis"}),
    "indwelling catheter": ({"central venous catheter", "shunt"}, {"catheters, indwelling"}),
    "airspace disease": ({"airspace disease"}, {"airspace disease"}),
    "nodule": ({"nodule"}, {"nodule"}),
    "scoliosis": ({"scoliosis"}, {"scoliosis"}),
    "bone fracture": ({"fracture", "rib fracture", "vertebral fracture"}, {"fractures, bone"}),
    "emphysema": ({"emphysema"}, {"emphysema", "pulmonary emphysema", "bullous emphysema"}),
}


class Report(NamedTuple):
    """A report and the findings that the coders gave it, as keys of TARGETS."""

    report_id: str
    text: str
    tags: tuple[str, ...]
    findings: frozenset[str]


class Score(NamedTuple):
    """Agreement over reports for one finding."""

    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def precision(self) -> float:
        return self.true_positives / max(1, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        return self.true_positives / max(1, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        wrong = self.false_positives + self.false_negatives
        return 2 * self.true_positives / max(1, 2 * self.true_positives + wrong)


def read_reports(archive: Path) -> list[Report]:
    """All reports with a text, findings section before impression, without the redaction marks."""
    reports = []
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".xml") else None
            if file is None:
                continue
            root = ElementTree.parse(file).getroot()
            sections = {s.get("Label"): s.text or "" for s in root.iter("AbstractText")}
            text = f"{sections.get('FINDINGS', '')} {sections.get('IMPRESSION', '')}"
            text = " ".join(re.sub(r"\bX{3,}\b", " ", text, flags=re.IGNORECASE).split())
            tags = tuple((tag.text or "").strip() for tag in root.iter("major"))
            heads = {tag.split("/")[0].lower() for tag in tags}
            findings = frozenset(name for name, (_, known) in TARGETS.items() if known & heads)
            report_id = root.find("uId")
            if text and report_id is not None:
                reports.append(Report(report_id.get("id", ""), text, tags, findings))
    return sorted(reports, key=lambda r: (len(r.report_id), r.report_id))


def halves(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """The two halves; reports that read alike, signs and case aside, go together."""
    first: dict[str, str] = {}
    out: dict[str, list[Report]] = {"dev": [], "held-out": []}
    for report in reports:
        plain = " ".join(re.findall(r"[a-z0-9]+", report.text.lower()))
        report_id = first.setdefault(plain, report.report_id)
        is_dev = hashlib.sha256(report_id.encode()).digest()[0] < 128
        out["dev" if is_dev else "held-out"].append(report)
    return out


def score(
    reports: Sequence[Report], entities: Sequence[Sequence[Entity]], statuses: set[str]
) -> tuple[dict[str, Score], list[str]]:
    """Precision and recall of each finding, and a line for each report where we disagree."""
    scores, misses = {}, []
    for name, (concepts, _) in TARGETS.items():
        counts = {(True, True): 0, (False, True): 0, (True, False): 0, (False, False): 0}
        for report, found in zip(reports, entities, strict=True):
            mentions = [e for e in found if e.concept in concepts]
            is_tagged = name in report.findings
            is_found = any(e.status in statuses for e in mentions)
            counts[is_tagged, is_found] += 1
            if is_tagged != is_found:
                said = [f"{report.text[e.start : e.end]} ({e.status})" for e in mentions]
                misses.append(
                    f"{'missed' if is_tagged else 'extra'}\t{name}\t{report.report_id}\t"
                    f"{'; '.join(said)}\t{', '.join(report.tags)}\t{report.text}"
                )
        scores[name] = Score(counts[True, True], counts[False, True], counts[True, False])
    return scores, misses


def macro_f1(scores: Iterable[Score]) -> float:
    """The mean of F1 over the findings, each weighing the same."""
    return statistics.fmean(s.f1 for s in scores)


def reports_per_s(finder: EntityFinder, texts: Sequence[str], rounds: int) -> list[float]:
    """The speed in each of several rounds over all texts, negation included, in one process."""
    speeds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        n_entities = sum(len(found) for found in finder.find(texts))
        speeds.append(len(texts) / (time.perf_counter() - begin) if n_entities else 0.0)
    return speeds


def main() -> None:
    """Prints the scores and the speed."""
    parser = argparse.ArgumentParser(description="Scores the entity lexicon on Open-I.")
    parser.add_argument("archive", type=Path, help="NLMCXR_reports.tgz of Open-I")
    parser.add_argument("--half", choices=["dev", "held-out", "both"], default="both")
    parser.add_argument("--misses", type=Path, help="file for the reports where we disagree")
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds")
    args = parser.parse_args()

    begin = time.perf_counter()
    finder = EntityFinder()
    build_s = time.perf_counter() - begin
    results: dict[str, object] = {"build_s": round(build_s, 2)}
    reports = halves(read_reports(args.archive))
    misses: list[str] = []
    for half, some in reports.items():
        if args.half not in (half, "both"):
            continue
        entities = list(finder.find(r.text for r in some))
        scores, wrong = score(some, entities, {"present"})
        loose, _ = score(some, entities, {"present", "uncertain"})
        misses += [f"{half}\t{line}" for line in wrong]
        print(f"\n{half}: {len(some)} reports\n{'':24}precision recall   F1   tagged")
        for name, s in scores.items():
            tagged = s.true_positives + s.false_negatives
            print(f"{name:24}{s.precision:8.3f} {s.recall:7.3f} {s.f1:6.3f} {tagged:6}")
        print(f"macro F1 {macro_f1(scores.values()):.3f}", end="; ")
        print(f"with uncertain mentions as present {macro_f1(loose.values()):.3f}")
        results[half] = {
            "n_reports": len(some),
            "macro_f1": round(macro_f1(scores.values()), 4),
            "macro_f1_uncertain_as_present": round(macro_f1(loose.values()), 4),
            "f1": {name: round(s.f1, 4) for name, s in scores.items()},
        }
    if args.misses:
        args.misses.write_text("\n".join(misses) + "\n", "utf-8")
        print(f"{len(misses)} disagreements in {args.misses}")
    speeds = reports_per_s(finder, [r.text for half in reports.values() for r in half], args.rounds)
    print(f"reports/s: {', '.join(f'{s:.0f}' for s in speeds)}")
    results["reports_per_s_median"] = round(statistics.median(speeds))
    results["reports_per_s_worst"] = round(min(speeds))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
