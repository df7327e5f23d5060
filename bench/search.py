"""How fast the nearest of many embeddings are found: exactly, as `mmclip retrieve` does, or not.

    python bench/search.py --images 100000
    python bench/search.py --images 1000000

Made embeddings, 512 wide, in 1,000 clusters. Exact search is one product with the mapped file and
a sort; faiss (`pip install faiss-cpu`, nothing else here needs it) is tried as an exact and as an
approximate index, if it is there. Prints for each: seconds to build, milliseconds a query (the
median of 20), and the share of the true ten nearest among its ten. The last line is one JSON
object.
"""

import argparse
import hashlib
import importlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

WIDTH, CLUSTERS, QUERIES, TOP = 512, 1000, 20, 10


def made_embeddings(n: int, path: Path, rng: np.random.Generator) -> np.ndarray:
    """Normalised rows around cluster centres, written in chunks; returns some rows, moved on."""
    centres = rng.normal(size=(CLUSTERS, WIDTH)).astype(np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (n, WIDTH))
    for start in range(0, n, 20_000):
        part = out[start : start + 20_000]
        part[:] = centres[rng.integers(0, CLUSTERS, len(part))]
        part += rng.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    out.flush()
    queries = out[rng.integers(0, n, QUERIES)] + rng.normal(size=(QUERIES, WIDTH), scale=0.02)
    queries = queries.astype(np.float32)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def measured(
    queries: np.ndarray, nearest: Callable[[np.ndarray], np.ndarray], truth: list[set] | None
) -> tuple[dict, list[set]]:
    """Milliseconds and recall of a way to search, and what it found."""
    found, seconds = [], []
    nearest(queries[0])  # pages, caches
    for query in queries:
        start = time.perf_counter()
        rows = nearest(query)
        seconds.append(time.perf_counter() - start)
        found.append(set(rows.tolist()))
    recall = np.mean([len(a & b) / TOP for a, b in zip(found, truth or found, strict=True)])
    return {"query_ms": 1000 * float(np.median(seconds)), "recall": float(recall)}, found


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    n = parser.parse_args().samples
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        queries = made_embeddings(n, path, np.random.default_rng(0))
        stored = np.load(path, mmap_mode="r")

        def exact(query: np.ndarray) -> np.ndarray:
            return np.argsort(-(stored @ query), kind="stable")[:TOP]

        start = time.perf_counter()
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        check_s = time.perf_counter() - start
        results["exact, numpy"], truth = measured(queries, exact, None)
        results["exact, numpy"]["build_s"] = 0.0
        try:
            faiss = importlib.import_module("faiss")
        except ImportError:
            faiss = None
            print("faiss is not installed: exact search alone")
        indexes = ("Flat", f"IVF{round(n**0.5)},Flat") if faiss else ()
        for kind in indexes:
            assert faiss is not None
            start = time.perf_counter()
            index = faiss.index_factory(WIDTH, kind, faiss.METRIC_INNER_PRODUCT)
            index.train(np.array(stored[:: max(1, n // 100_000)]))
            index.add(np.asarray(stored))
            build_s = time.perf_counter() - start
            if kind.startswith("IVF"):
                index.nprobe = 16

            def approximate(query: np.ndarray, index=index) -> np.ndarray:
                return index.search(query[None], TOP)[1][0]

            values, _ = measured(queries, approximate, truth)
            results[f"faiss {kind}"] = {**values, "build_s": build_s}
            print(kind, results[f"faiss {kind}"], flush=True)
            del index
    print(f"{n} embeddings of {WIDTH}; checksum of the file {check_s:.2f} s")
    for name, r in results.items():
        print(f"{name:24}{r['build_s']:9.1f} s {r['query_ms']:9.2f} ms  recall {r['recall']:.3f}")
    print(json.dumps({"images": n, "check_s": check_s, **results}))


if __name__ == "__main__":
    main()
