"""Whoever does the work of a build, processes, Dask workers or shards: the same comes of it."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmclip.data import cache
from mmclip.data.entities import find_entities
from mmclip.data.folder import ManifestError
from mmclip.data.ingest import build, shards
from mmclip.data.ingest.build import BuildOptions, build_data, build_shard
from mmclip.data.ingest.shards import Shard, WorkersError
from mmclip.data.manifest import read_manifest
from mmclip.data.sample import Sample
from tests.commands import Ended, mmclip
from tests.made_files import encoded, ramp
from tests.test_cache import Stop, watch_progress

N, PX = 40, 16
SRC = str(Path(__file__).parents[1] / "src")
FOUND = ("small left effusion", "an enlarged heart", "a granuloma", "pneumothorax")
DENIED = ("pneumonia", "edema", "a fracture")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(cache, "CHUNK_IMAGES", 8)
    monkeypatch.setattr(build, "CHUNK_REPORTS", 8)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two images a study; one in ten has no report, one in eight no image, one in ten is
    damaged."""
    (tmp_path / "root").mkdir()
    samples = []
    for i in range(N):
        content = encoded(np.roll(ramp(), i, axis=1))
        (tmp_path / "root" / f"{i}.png").write_bytes(content[:50] if i % 10 == 3 else content)
        report = f"There is {FOUND[i // 2 % 4]}. No {DENIED[i // 2 % 3]}, {i // 2} cm."
        samples.append(
            Sample(
                image_id=f"f{i}", study_id=f"s{i // 2}", patient_id=f"p{i // 4}", source="made",
                image=None if i % 8 == 6 else f"{i}.png", report=None if i % 10 == 5 else report,
            )
        )  # fmt: skip
    return samples


def built(samples: list[Sample], out: Path, **options) -> dict[str, bytes]:
    """The files of a build, by name."""
    build_data(samples, out.parent / "root", out, image_size=PX, **options)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_report_has_the_entities_that_are_in_it(samples, tmp_path: Path):
    assert sorted(built(samples, tmp_path / "out")) == [
        "excluded.jsonl", "images.npy", "meta.json", "samples.parquet",
    ]  # fmt: skip
    kept = read_manifest(tmp_path / "out")
    assert len(kept) == N - 4
    for sample in kept:
        expected = next(find_entities([sample.report])) if sample.report else []
        assert sample.entities == tuple(expected)
        assert bool(sample.report) == ("negated" in {entity.status for entity in sample.entities})


def test_the_build_does_not_depend_on_processes_and_chunks(samples, tmp_path: Path, monkeypatch):
    processes = built(samples, tmp_path / "processes", workers=2)
    monkeypatch.setattr(cache, "CHUNK_IMAGES", 7)
    monkeypatch.setattr(build, "CHUNK_REPORTS", 1000)
    assert built(samples, tmp_path / "one") == processes


def stop_at(task: str, n_chunks: int):
    """Stops a build when some chunks of a task are done."""
    calls = []

    def stop(n: int) -> None:
        calls.append(n)
        if len(calls) == n_chunks:
            raise Stop

    return watch_progress(stop, task)


def test_a_killed_search_goes_on_where_it_was(samples, tmp_path: Path):
    whole = built(samples, tmp_path / "whole")
    with stop_at("finding entities", 2), pytest.raises(Stop):
        built(samples, tmp_path / "out")
    with watch_progress(lambda n: None) as done_before:
        assert built(samples, tmp_path / "out") == whole
    assert done_before == [N - 5, 2 * 8]  # all images, and the records of two chunks


@pytest.mark.parametrize("change", ["lexicon", "backend", "report"])
def test_what_would_be_found_otherwise_is_searched_anew(
    samples, tmp_path: Path, monkeypatch, change: str
):
    with stop_at("finding entities", 2), pytest.raises(Stop):
        built(samples, tmp_path / "out")
    again = {"lexicon": [0], "backend": [0], "report": [8]}[change]
    if change == "lexicon":
        monkeypatch.setattr(build, "_finder_version", lambda backend: "of another lexicon")
    elif change == "report":
        samples[0] = replace(samples[0], report="Normal.")
    with stop_at("finding entities", 1) as done_before, pytest.raises((Stop, OSError)):
        built(
            samples,
            tmp_path / "out",
            options=BuildOptions(entities="spacy:none" if change == "backend" else "lexicon"),
        )
    assert done_before[1:] == again


def test_a_kill_between_join_and_manifest_decodes_nothing_again(
    samples, tmp_path: Path, monkeypatch
):
    def stop(*args: object, **kwargs: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_manifest", stop)
        with pytest.raises(Stop):
            built(samples, tmp_path / "out")
    steps: list[int] = []
    with watch_progress(steps.append) as done_before:
        built(samples, tmp_path / "out")
    assert done_before == [N - 5, N]
    assert not (tmp_path / "out" / "images.shards").exists()


# Shards.


def test_shards_at_once_and_then_a_join_give_the_bytes_of_one_machine(samples, tmp_path: Path):
    whole = built(samples, tmp_path / "whole")
    out, root = tmp_path / "out", tmp_path / "root"

    def do(number: int) -> None:
        build_shard(samples, root, out, Shard(number, 3), image_size=PX)

    with ThreadPoolExecutor() as threads:
        list(threads.map(do, [1, 2, 3, 3]))  # one is done by two at a time
    assert not (out / "meta.json").exists()
    with watch_progress(lambda n: None) as done_before:
        assert built(samples, out) == whole
    assert done_before == [N - 5, N]


def test_the_join_does_what_no_shard_has_done(samples, tmp_path: Path):
    whole = built(samples, tmp_path / "whole")
    build_shard(samples, tmp_path / "root", tmp_path / "out", Shard(2, 3), image_size=PX)
    with watch_progress(lambda n: None) as done_before:
        assert built(samples, tmp_path / "out") == whole
    assert done_before == [8 + 3, 2 * 8]  # chunks 1 and 4 of five


def test_a_shard_never_replaces_a_finished_build(samples, tmp_path: Path):
    before = built(samples, tmp_path / "out")
    with pytest.raises(ManifestError, match="36 rows, which a shard never replaces; remove it"):
        build_shard(samples, tmp_path / "root", tmp_path / "out", Shard(1, 2), image_size=PX)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "not of the form NUMBER/COUNT"),
        ("a/b", "not of the form NUMBER/COUNT"),
        ("0/8", "must be 1 to 8; for a SLURM array of 8 say --array=1-8"),
        ("9/8", "must be 1 to 8"),
        ("1/0", "not of the form NUMBER/COUNT"),
    ],
)
def test_a_shard_that_is_none_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        Shard.parse(text)
    assert Shard.parse("8/8") == Shard(8, 8)


# The command.


def run(tmp_path: Path, *options: str) -> Ended:
    """`mmclip data build` on the images as a table."""
    table = "file,patient\n" + "".join(f"{i}.png,p{i}\n" for i in range(N))
    (tmp_path / "root" / "t.csv").write_text(table)
    columns = 'table = "t.csv"\n[columns]\nimage = "file"\npatient_id = "patient"\n'
    (tmp_path / "m.toml").write_text(columns)
    places = ("--root", tmp_path / "root", "--mapping", tmp_path / "m.toml")
    words = ("data", "build", "csv", *places, "--out", tmp_path / "out", "--image-size", "16")
    return mmclip(tmp_path / "log", *words, *options)


@pytest.mark.usefixtures("samples")
def test_the_command_does_shards_and_then_joins_them(tmp_path: Path):
    for shard in ("1/2", "2/2"):
        ended = run(tmp_path, "--workers", "1", "--shard", shard)
        assert (ended.code, ended.out) == (0, "")
        assert f"shard {shard} is done" in ended.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["images.shards"]
    ended = run(tmp_path, "--workers", "1")
    assert ended.code == 0
    assert "reading images: 40/40" not in ended.err  # nothing was left to do
    assert len(read_manifest(tmp_path / "out")) == N - 4


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard", "3/2"), "shard '3/2': the number must be 1 to 2"),
        (("--shard", "1/2", "--overwrite"), "a shard never replaces a build"),
        (("--workers", "2", "--scheduler", "tcp://a:1"), "both say who works"),
        (("--scheduler", "a:1"), "say it as tcp://host:port"),
    ],
)
def test_an_error_of_the_command_is_one_line(tmp_path: Path, options, message: str):
    assert message in run(tmp_path, *options).error()


# Dask.

NEEDS_DASK = "needs Dask: pip install 'mmclip[dask]'"


def test_without_dask_the_error_says_how_to_get_it(samples, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)  # as if it were not installed
    with pytest.raises(WorkersError, match=r"pip install 'mmclip\[dask\]'"):
        built(samples, tmp_path / "out", workers="tcp://localhost:8786")


@pytest.mark.parametrize("address", ["localhost", "localhost:8786", "tcp://localhost"])
def test_a_scheduler_needs_an_address(samples, tmp_path: Path, address: str):
    with pytest.raises(WorkersError, match="say it as tcp://host:port"):
        built(samples, tmp_path / "out", workers=address)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a Dask scheduler in this process that no worker has joined."""
    distributed = pytest.importorskip("distributed", reason=NEEDS_DASK)
    options = {"processes": False, "protocol": "tcp", "dashboard_address": ":0"}
    with distributed.LocalCluster(n_workers=0, **options) as cluster:
        yield cluster.scheduler_address


def test_a_scheduler_that_is_not_there_is_one_clear_error(
    samples, tmp_path: Path, monkeypatch, scheduler: str
):
    monkeypatch.setattr(shards, "CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # nobody answers here once it is closed
    with pytest.raises(WorkersError, match=f"start one with `dask scheduler --port {port}`"):
        built(samples, tmp_path / "out", workers=f"tcp://127.0.0.1:{port}")


def test_a_scheduler_without_workers_is_one_clear_error(
    samples, tmp_path: Path, monkeypatch, scheduler: str
):
    monkeypatch.setattr(shards, "FIRST_WORKER_S", 0.2)
    with pytest.raises(WorkersError, match=f"start some with `dask worker {scheduler}"):
        built(samples, tmp_path / "out", workers=scheduler)


def test_a_scheduler_that_ends_is_one_clear_error(samples, tmp_path: Path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason=NEEDS_DASK)
    monkeypatch.setattr(shards, "CONNECT_S", 0.5)
    options = {"processes": False, "protocol": "tcp", "dashboard_address": ":0"}
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster:
        told = pytest.raises(WorkersError, match="run the same command again: finished chunks")
        with watch_progress(lambda n: cluster.close()), told:
            built(samples, tmp_path / "out", workers=cluster.scheduler_address)


def test_two_dask_workers_of_which_one_dies_build_the_same(samples, tmp_path: Path, scheduler: str):
    whole = built(samples, tmp_path / "whole")
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler]
    command += ["--nthreads", "1", "--no-nanny", "--no-dashboard"]
    found = os.environ | {"PYTHONPATH": os.pathsep.join([SRC, *sys.path])}
    folder = tmp_path / "elsewhere"
    folder.mkdir()  # where paths relative to this process lead nowhere
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    workers = [subprocess.Popen(command, cwd=folder, env=found, **quiet) for _ in range(2)]
    try:
        with watch_progress(lambda n: workers[0].kill()):
            assert built(samples, tmp_path / "out", workers=scheduler) == whole
        assert [worker.poll() for worker in workers] == [-signal.SIGKILL, None]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_the_version_of_the_finder_is_of_all_code_that_finds():
    folder, asked, found = Path(build.__file__).parents[1], ["entities"], set[str]()
    while asked:
        name = asked.pop()
        found.add(name)
        code = (folder / f"{name}.py").read_text("utf-8")
        imported = set(re.findall(r"^from mmclip\.data\.(\w+) import", code, re.MULTILINE))
        asked += imported - found - {"sample"}  # the types alone
    assert found == set(build.FINDER_MODULES)
