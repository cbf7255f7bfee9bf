"""Jobs under torchrun, killed in every way there is: the next launch ends with the same bits, and errors are readable.

The launcher that is killed stands in for Kedro: a process of its own which calls `launch`.
"""

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from blip_pipelines.jobs.launch import LaunchConfig, launch
from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.jobs.torchrun import JobFailed, JobStopped

pytestmark = pytest.mark.slow

CONFIG: dict[str, Any] = {
    "training": {"steps": 60, "batch_samples_global": 8, "checkpoint_every_steps": 4, "peak_flops": 1e9}
}


def start(root: Path, processes: int, fail: dict[str, Any] | None = None, **rest: Any) -> Receipt:
    on_history = rest.pop("on_history", None)
    how = LaunchConfig(processes=processes, threads_per_rank=1, work=str(root), **rest)
    return launch("engine_samples", {**CONFIG, "fail": fail}, {}, how, on_history)


def outputs(receipt: Receipt) -> dict[str, bytes]:
    names = ("checkpoint/tensors.safetensors", "history.json", "receipt.json")
    return {name: (receipt.folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run on one rank leaves; in this process, which must make no difference."""
    return outputs(start(tmp_path_factory.mktemp("alone"), 1, mode="inline"))


def test_failed_worker_reaches_the_caller_as_one_traceback_and_the_next_launch_goes_on(tmp_path: Path) -> None:
    rows: list[Any] = []
    with pytest.raises(JobFailed) as failure:
        start(tmp_path / "cut", 2, {"step": 9, "rank": 1, "how": "raise"}, on_history=rows.extend)
    text = str(failure.value)
    assert text.startswith("engine_samples: rank 1 failed\n\nTraceback")  # not rank 0, which lost its peer
    assert text.count("Traceback") == 1
    assert text.count("ValueError: bad sample: caption 17 is empty") == 1
    assert Path(text.rpartition("Full log: ")[2]).exists()
    assert failure.value.__cause__ is None
    assert failure.value.__suppress_context__ or failure.value.__context__ is None
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    resumed = outputs(start(tmp_path / "cut", 2))

    # A worker that is killed outright, started again by torchrun itself.
    rows.clear()
    kill_once = {"step": 30, "rank": 1, "how": "kill once"}
    restarted = start(tmp_path / "restarted", 2, kill_once, max_restarts=1, on_history=rows.extend)
    assert outputs(restarted) == resumed
    assert [row["step"] for row in rows] == [*range(1, 61)]


def test_worker_killed_from_outside_is_named_with_its_signal(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="engine_samples: rank 0 was killed by SIGKILL; was the machine out of memory"):
        start(tmp_path, 2, {"step": 3, "rank": 0, "how": "kill"})


class StandIn:
    """A process that launches the job, as Kedro does, so that it can be killed."""

    def __init__(self, root: Path):
        config = json.dumps({**CONFIG, "step_seconds": 0.05})
        code = (
            # A shell starts what it puts in the background with Ctrl-C ignored; whoever types it has it.
            "import json, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from blip_pipelines.jobs.launch import LaunchConfig, launch\n"
            f"launch('engine_samples', json.loads('{config}'), {{}}, "
            f"LaunchConfig(processes=1, threads_per_rank=1, work={str(root)!r}))"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.root, self.errors = root, root.with_suffix(".err")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=errors)

    def wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + 60
        while not list(self.root.glob("*/checkpoints/[0-9]*")):
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.errors.read_text()
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.5))  # anywhere in a step, a save or between: the result must be the same

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=5)[1]


@pytest.mark.parametrize("victim", ["launcher", "agent", "worker"])
def test_killed_at_any_moment_the_next_launch_ends_with_the_same_bits(
    tmp_path: Path, alone: dict[str, bytes], victim: str
) -> None:
    stand_in = StandIn(tmp_path / "work")
    stand_in.wait_for_checkpoint()
    agent, worker = stand_in.family()[:2]
    chosen = {"launcher": stand_in.process.pid, "agent": agent.pid, "worker": worker.pid}[victim]
    os.kill(chosen, signal.SIGKILL)
    assert all_gone([agent, worker])
    assert stand_in.process.wait(20) != 0
    assert outputs(start(tmp_path / "work", 1, mode="inline" if victim == "agent" else "torchrun")) == alone


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGTERM, "JobStopped: SIGTERM"), (signal.SIGINT, "KeyboardInterrupt")]
)
def test_launcher_told_to_stop_saves_at_the_end_of_a_step(
    tmp_path: Path, alone: dict[str, bytes], number: int, said: str
) -> None:
    stand_in = StandIn(tmp_path / "work")
    stand_in.wait_for_checkpoint()
    family = stand_in.family()
    stand_in.process.send_signal(number)
    assert stand_in.process.wait(30) != 0
    assert said in stand_in.errors.read_text()
    assert all_gone(family)
    log = next((tmp_path / "work").glob("*/log.txt")).read_text()
    stopped = int(log.partition("stopped by SIGTERM after step ")[2].split()[0])
    newest = max(path.name for path in (tmp_path / "work").glob("*/checkpoints/[0-9]*"))
    assert int(newest) == stopped
    assert outputs(start(tmp_path / "work", 1, mode="inline")) == alone


def test_worker_told_to_stop_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(JobStopped, match="run it again"):
        start(tmp_path, 2, {"step": 3, "rank": 1, "how": "terminate"})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asked of glibc alone")
def test_memory_that_a_job_inside_this_process_frees_stays_with_it() -> None:
    """Or each large tensor is faulted in anew, page by page; above 32 MiB glibc always gives back by itself."""
    code = (
        "import resource, sys\nfrom blip_pipelines.jobs.torchrun import keep_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): bytearray(1 << 26)[::4096] = bytes(1 << 14)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "given_back = faults()\nkeep_memory()\nfaults()\nprint(faults() < given_back / 4)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n", done.stderr
