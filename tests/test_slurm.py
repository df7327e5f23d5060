"""The job files of examples/slurm, with a scheduler of a few lines in the place of SLURM."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmclip.checkpoint import newest_checkpoint
from tests.commands import free_port

ROOT = Path(__file__).parents[1]

STANDS_FOR = {
    # Both "nodes" are this machine.
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$LOG"; fi',
    "srun": (
        'for node in $(seq "$SLURM_NNODES"); do\n'
        'SLURM_NODEID=$((node - 1)) "$@" & echo $! >> "$PIDS"\n'
        # The first opens the port; the second would be taken for it, as both are this machine.
        'until (exec 3<> "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; do sleep 0.1; done; done\n'
        "code=0; for pid in $(cat $PIDS); do wait $pid || code=$?; done; exit $code"
    ),
    "scancel": 'echo "$@" >> "$LOG"; kill -"${1#--signal=}" $(cat "$PIDS")',
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run "$@"',
    "accelerate": 'exec "$PYTHON" -m accelerate.commands.accelerate_cli "$@"',
    "mmclip": 'exec "$PYTHON" -m mmclip "$@"',
}


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a job sees, with the commands of the scheduler in front of the path."""
    commands = folder / "bin"
    commands.mkdir()
    for name, content in STANDS_FOR.items():
        (commands / name).write_text(f"#!/bin/bash\n{content}\n")
        (commands / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable,
        "LOG": str(folder / "log"), "PIDS": str(folder / "pids"), "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), **more,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["build.sh", "torchrun.sh", "accelerate.sh"])
def test_a_job_file_can_be_run_and_is_sound_bash(name: str):
    path = ROOT / "examples/slurm" / name
    assert path.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passed_on"), [("torchrun.sh", "USR1"), ("accelerate.sh", "TERM")]
)
def test_a_job_of_two_hosts_saves_where_its_time_ends_and_goes_on(
    name: str, passed_on: str, made_data: Path, small_config: Path, tmp_path: Path
):
    # More steps than any machine takes before the signal comes.
    run = tmp_path / "run"
    command = [
        str(ROOT / "examples/slurm" / name), "--data", str(made_data), "--config",
        str(small_config), "--set", "train.steps=1000000", "--set",
        "train.save_every_steps=1000000", "--out", str(run),
    ]  # fmt: skip
    job = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "two",
           "PROCESSES_PER_NODE": "1", "PORT": free_port()}  # fmt: skip
    env = environment(tmp_path, **job)

    def steps_until_the_warning() -> int:
        lines = run / "metrics.jsonl"
        before = len(lines.read_bytes().splitlines()) if lines.exists() else 0
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path
        ) as job:
            end = time.monotonic() + 900
            while not lines.exists() or len(lines.read_bytes().splitlines()) <= before:
                assert job.poll() is None and time.monotonic() < end
                time.sleep(0.01)
            job.send_signal(signal.SIGUSR1)
            _, said = job.communicate(timeout=900)
        assert job.returncode == 0, said
        step = int(newest_checkpoint(run).name.removeprefix("step_"))
        assert said.count(f"stopped after step {step} of 1,000,000") == 1
        (tmp_path / "pids").unlink()
        return step

    first = steps_until_the_warning()
    assert 0 < first < steps_until_the_warning()
    assert (tmp_path / "log").read_text().splitlines() == [
        f"--signal={passed_on} 7.0", "requeue 7",
    ] * 2  # fmt: skip


@pytest.mark.slow
def test_an_array_builds_shards_that_join(made_raw: Path, tmp_path: Path):
    env = environment(tmp_path)
    arguments = [
        "csv", "--root", str(made_raw), "--mapping", str(made_raw / "mapping.toml"),
        "--out", str(tmp_path / "data"), "--image-size", "32",
    ]  # fmt: skip
    for task in ("1", "2"):
        job = {"SLURM_CPUS_PER_TASK": "1", "SLURM_ARRAY_TASK_ID": task,
               "SLURM_ARRAY_TASK_COUNT": "2"}  # fmt: skip
        build = [str(ROOT / "examples/slurm/build.sh"), *arguments]
        subprocess.run(build, env={**env, **job}, cwd=tmp_path, check=True)
    join = [sys.executable, "-m", "mmclip", "data", "build", *arguments]
    subprocess.run(join, env=env, cwd=tmp_path, check=True)
    assert (tmp_path / "data/samples.parquet").is_file()
