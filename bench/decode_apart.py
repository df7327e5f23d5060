"""What the process that may be killed costs: compressed DICOM decoded in it, and in this process.

    python bench/decode_apart.py EXPORT/PACS --rounds 5

For each compressed file below a folder (examples/hospital/make_export.py writes some), both ways
decode it, in pairs whose order alternates. Prints the ratio of throughputs by transfer syntax: 0.9
means that a build decodes 0.9 times as many images a second. The last line is one JSON object.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

from mmclip.data.decode_worker import decode_apart
from mmclip.data.dicom import decode_dicom, is_dicom, is_native, transfer_syntax_of
from mmclip.data.pixels import MAX_PX

WAYS = {"here": decode_dicom, "apart": decode_apart}


def main() -> None:
    """Prints a line per syntax, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    files = [path for path in sorted(args.folder.rglob("*")) if path.is_file()]
    contents = [path.read_bytes() for path in files if path.name != "DICOMDIR"]
    packed = [c for c in contents if is_dicom(c) and not is_native(c)]
    for way in WAYS.values():
        way(packed[0], MAX_PX)  # starts the process, and loads decoders
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(WAYS, 0.0))
    sizes: dict[str, int] = defaultdict(int)
    for turn in range(args.rounds):
        for content in packed:
            syntax, _ = transfer_syntax_of(content)
            name = "not said" if syntax is None else syntax.name
            sizes[name] += 1
            for way in list(WAYS)[:: 1 if turn % 2 else -1]:
                began = time.perf_counter()
                WAYS[way](content, MAX_PX)
                seconds[name][way] += time.perf_counter() - began
    ratios = {name: round(spent["here"] / spent["apart"], 3) for name, spent in seconds.items()}
    for name, ratio in ratios.items():
        each_ms = 1000 * seconds[name]["here"] / sizes[name]
        print(f"{name:70} {ratio:.3f} of {each_ms:.1f} ms an image")
    total = {way: sum(spent[way] for spent in seconds.values()) for way in WAYS}
    all_ = round(total["here"] / total["apart"], 3)
    print(json.dumps({"n_files": len(packed), "all": all_, "by_syntax": ratios}))


if __name__ == "__main__":
    main()
