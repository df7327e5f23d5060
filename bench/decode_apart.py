"""What the process that may be killed costs: compressed DICOM decoded in it, and in this process.

    python bench/decode_apart.py EXPORT/PACS --rounds 5

For each compressed file below a folder (examples/hospital/make_export.py writes some), both ways
decode it, in pairs whose order alternates. Prints the ratio of throughputs by transfer syntax: 0.9
means that a build decodes 0.9 times as many images a second. It is of CPU time, of both processes:
that is what a build of many workers has too little of, and on a busy machine the clock on the wall
says how long a process waits for its turn (its ratio is printed, too). Linux only. The last line is
one JSON object.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path

from mmclip.data.decode_worker import DecodeWorker
from mmclip.data.dicom import decode_dicom, is_dicom, is_native, transfer_syntax_of
from mmclip.data.pixels import MAX_PX

WAYS = ("here", "apart")


def cpu_s(pid: int) -> float:
    """CPU time of a process, by the clock that Linux has for each."""
    return time.clock_gettime((~pid << 3) | 2)


def main() -> None:
    """Prints a line per syntax, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    files = [path for path in sorted(args.folder.rglob("*")) if path.is_file()]
    contents = [path.read_bytes() for path in files if path.name != "DICOMDIR"]
    packed = [c for c in contents if is_dicom(c) and not is_native(c)]
    worker = DecodeWorker()
    decode = {"here": decode_dicom, "apart": worker.decode}
    for content in packed:
        for way in WAYS:
            decode[way](content, MAX_PX)  # starts the process, and loads decoders
    pids = (os.getpid(), worker._started().pid)
    wall: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(WAYS, 0.0))
    cpu: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(WAYS, 0.0))
    sizes: dict[str, int] = defaultdict(int)
    for turn in range(args.rounds):
        for content in packed:
            syntax, _ = transfer_syntax_of(content)
            name = "not said" if syntax is None else syntax.name
            sizes[name] += 1
            for way in WAYS[:: 1 if turn % 2 else -1]:
                began, used = time.perf_counter(), sum(map(cpu_s, pids))
                decode[way](content, MAX_PX)
                wall[name][way] += time.perf_counter() - began
                cpu[name][way] += sum(map(cpu_s, pids)) - used
    ratios = {name: round(spent["here"] / spent["apart"], 3) for name, spent in cpu.items()}
    for name, ratio in ratios.items():
        each_ms = 1000 * cpu[name]["here"] / sizes[name]
        print(f"{name:70} {ratio:.3f} of {each_ms:.1f} ms an image")
    whole = {
        of: round(
            sum(s["here"] for s in spent.values()) / sum(s["apart"] for s in spent.values()), 3
        )
        for of, spent in (("all", cpu), ("all_by_the_wall", wall))
    }
    print(json.dumps({"n_files": len(packed), **whole, "by_syntax": ratios}))


if __name__ == "__main__":
    main()
