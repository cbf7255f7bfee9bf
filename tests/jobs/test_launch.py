"""Launching: when a job runs, when it is found done, when it may not start. In process; torchrun has its own file."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_samples
import pytest

from blip_pipelines.config import ConfigError
from blip_pipelines.data.storage import publish, read_json
from blip_pipelines.jobs.claim import attempt
from blip_pipelines.jobs.launch import LaunchConfig, LaunchError, launch
from blip_pipelines.jobs.receipt import Receipt, published

CONFIG: dict[str, Any] = {
    "training": {"steps": 6, "batch_samples_global": 8, "checkpoint_every_steps": 2, "peak_flops": 1e9}
}


def start(root: Path, config: dict[str, Any] = CONFIG, job: str = "engine_samples", **rest: Any) -> Receipt:
    inputs = rest.pop("inputs", {})
    on_history = rest.pop("on_history", None)
    return launch(job, config, inputs, LaunchConfig(mode="inline", work=str(root / "work"), **rest), on_history)


def publish_to(receipt: Receipt, final: Path) -> None:
    publish(receipt.folder, final)
    published(receipt, final)


def failing(step: int) -> dict[str, Any]:
    return {**CONFIG, "fail": {"step": step, "rank": 0, "how": "raise"}}


def test_receipt_names_inputs_outputs_and_facts_and_nothing_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "table.txt").write_text("a caption")
    receipt = start(tmp_path, inputs={"pairs": tmp_path / "table.txt"})
    assert (receipt.reused, receipt.facts) == (False, {"steps": 6, "inputs": ["pairs"]})
    assert receipt.seconds > 0
    assert receipt.speed["samples_per_second"] > 0
    kept = read_json(receipt.folder / "receipt.json")
    assert kept.keys() == {"job", "fingerprint", "inputs", "outputs", "facts"}
    assert kept["inputs"].keys() == {"pairs"}
    assert {"history.json", "checkpoint/tensors.safetensors"} <= kept["outputs"].keys()


def test_same_job_again_is_the_same_bytes(tmp_path: Path) -> None:
    folders = [start(tmp_path / name).folder for name in ("a", "b")]
    contents = [
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    ]
    assert contents[0] == contents[1]


def test_published_job_is_found_done_with_its_whole_history(tmp_path: Path) -> None:
    first = start(tmp_path)
    publish_to(first, tmp_path / "final")
    assert [path.name for path in (tmp_path / "work").iterdir() if path.is_dir()] == ["index"]
    rows: list[Any] = []
    again = start(tmp_path, on_history=rows.extend)
    assert again.reused
    assert (again.folder.resolve(), again.facts) == ((tmp_path / "final").resolve(), first.facts)
    assert (again.seconds, again.speed) == (first.seconds, first.speed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_fields_that_only_change_speed_do_not_make_another_job(tmp_path: Path) -> None:
    publish_to(start(tmp_path), tmp_path / "final")
    slower = {**CONFIG, "training": {**CONFIG["training"], "log_every_steps": 1}, "step_seconds": 0.001}
    assert start(tmp_path, slower).reused
    assert not start(tmp_path, {**CONFIG, "seed": 1}).reused


@pytest.mark.parametrize("harm", ["missing", "altered", "of another job"])
def test_outputs_that_are_not_what_was_published_are_made_again(tmp_path: Path, harm: str) -> None:
    final = tmp_path / "final"
    publish_to(start(tmp_path), final)
    if harm == "missing":
        shutil.rmtree(final)
    elif harm == "altered":
        (final / "history.json").write_text("[]")
    else:
        publish_to(start(tmp_path, {**CONFIG, "seed": 1}), final)
    assert not start(tmp_path).reused


def test_force_runs_a_finished_job_again(tmp_path: Path) -> None:
    publish_to(start(tmp_path), tmp_path / "final")
    assert not start(tmp_path, force=True).reused


def test_failed_job_goes_on_where_it_was_and_each_row_is_handed_on_once_per_launch(tmp_path: Path) -> None:
    """`fail` does not enter the fingerprint, so the second launch is the same job without the fault."""
    rows: list[Any] = []
    with pytest.raises(ValueError, match="caption 17"):
        start(tmp_path, failing(5), on_history=rows.extend)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]  # what the checkpoint covers
    resumed = start(tmp_path)
    whole = start(tmp_path / "whole")
    for name in ("checkpoint/tensors.safetensors", "history.json", "receipt.json"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert resumed.seconds > 0


def test_job_that_finished_but_was_not_moved_into_place_is_not_run_again(tmp_path: Path) -> None:
    first = start(tmp_path)
    written = (first.folder / "history.json").stat().st_mtime_ns
    again = start(tmp_path)
    assert (again.folder, again.folder.joinpath("history.json").stat().st_mtime_ns) == (first.folder, written)


@pytest.fixture
def own_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a job whose code can be changed."""
    package = tmp_path / "jobbox"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rates.py").write_text("")
    (package / "job.py").write_text(
        "from engine_samples import Config, run\ndef unused():\n    from jobbox import rates\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.startswith("jobbox")]:
        del sys.modules[name]


def test_resume_over_changed_code_refuses_names_the_files_and_goes_on_when_told(tmp_path: Path, own_job: Path) -> None:
    with pytest.raises(ValueError, match="caption 17"):
        start(tmp_path, failing(3), "jobbox.job")
    (own_job / "rates.py").write_text("FASTER = True\n")
    with pytest.raises(LaunchError, match=r"jobbox/rates\.py \(changed\)") as refusal:
        start(tmp_path, CONFIG, "jobbox.job")
    assert "accept_code" in str(refusal.value)
    assert start(tmp_path, CONFIG, "jobbox.job", resume="accept_code").facts["steps"] == 6


def test_changed_code_before_the_first_checkpoint_is_no_obstacle(tmp_path: Path, own_job: Path) -> None:
    with pytest.raises(ValueError, match="caption 17"):
        start(tmp_path, failing(0), "jobbox.job")
    (own_job / "rates.py").write_text("FIXED = True\n")
    assert start(tmp_path, CONFIG, "jobbox.job").facts["steps"] == 6


def test_published_outputs_of_other_code_are_made_again(tmp_path: Path, own_job: Path) -> None:
    publish_to(start(tmp_path, CONFIG, "jobbox.job"), tmp_path / "final")
    assert start(tmp_path, CONFIG, "jobbox.job").reused
    (own_job / "rates.py").write_text("FASTER = True\n")
    assert not start(tmp_path, CONFIG, "jobbox.job").reused


OTHER = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from pathlib import Path
from test_launch import start
receipt = start(Path(sys.argv[1]), json.loads(sys.argv[2]))
print("reused", receipt.reused, receipt.folder, flush=True)
"""
SLOW = {**CONFIG, "step_seconds": 0.5}  # the same job


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the same job in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    started: list[subprocess.Popen[str]] = []

    def begin(config: dict[str, Any] = CONFIG) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OTHER, str(tmp_path), json.dumps(config)]
        environment = {**os.environ, "PYTHONPATH": path}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def let_go(found: int | str) -> None:
    assert isinstance(found, int), f"process {found} has it"
    os.close(found)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout
    return next(line for line in process.stdout if words in line)


def test_second_run_of_the_same_work_waits_until_the_first_has_published(tmp_path: Path, other: Any) -> None:
    """Not only until it has ended: between the two, the outputs are about to be moved."""
    first = start(tmp_path)
    waiting = other()
    assert f"engine_samples: process {os.getpid()}, " in read_until(waiting, "waiting for it")
    publish_to(first, tmp_path / "final")
    assert read_until(waiting, "reused") == f"reused True {tmp_path / 'final'}\n"


def test_second_run_goes_on_when_the_first_is_killed(tmp_path: Path, other: Any) -> None:
    first = other(SLOW)
    while not [*tmp_path.glob("work/*/checkpoints/[0-9]*")]:
        assert first.poll() is None
        time.sleep(0.05)
    waiting = other()
    assert f"process {first.pid}, " in read_until(waiting, "waiting for it")
    first.kill()
    assert read_until(waiting, "reused").startswith("reused False")
    waiting.wait()  # unpublished, and gone: its outputs are free
    publish_to(start(tmp_path), tmp_path / "final")
    assert start(tmp_path).reused


def test_reused_and_failed_work_is_free_for_others_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="caption 17"):
        start(tmp_path, failing(5))
    (lock,) = (tmp_path / "work").glob("*.lock")
    let_go(attempt(lock))
    publish_to(start(tmp_path), tmp_path / "final")
    start(tmp_path)
    assert not [*(tmp_path / "work").glob("*.lock")]


def test_work_that_one_thread_has_not_moved_yet_is_not_given_to_another(tmp_path: Path) -> None:
    first = start(tmp_path)
    with ThreadPoolExecutor() as threads:
        other = threads.submit(start, tmp_path)
        with pytest.raises(TimeoutError):
            other.result(timeout=1)
        publish_to(first, tmp_path / "final")
        assert other.result(timeout=30).reused


def test_a_lock_is_the_file_that_lies_there(tmp_path: Path) -> None:
    """Not one that went while somebody waited for it."""
    path = tmp_path / "work.lock"
    old = attempt(path)
    assert attempt(path) == str(os.getpid())
    path.unlink()
    new = attempt(path)
    let_go(old)
    assert attempt(path) == str(os.getpid())
    let_go(new)


def test_an_unlinked_file_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed between opening it and locking it, as whoever finishes does."""
    path, flock = tmp_path / "work.lock", fcntl.flock
    removed = []

    def late(handle: int, how: int) -> None:
        if not removed:
            removed.append(path.unlink())
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    found = attempt(path)
    assert isinstance(found, int)
    assert os.fstat(found).st_ino == path.stat().st_ino
    let_go(found)


def test_wrong_parameter_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine_samples\.sed: unknown parameter; did you mean 'seed'"):
        start(tmp_path, {**CONFIG, "sed": 1})
    assert not (tmp_path / "work").exists()


def test_fingerprint_is_the_job_its_arithmetic_and_its_inputs(tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("one")
    names = [start(tmp_path, inputs={"pairs": data}).fingerprint]
    data.write_text("two")
    names.append(start(tmp_path, inputs={"pairs": data}).fingerprint)
    names.append(start(tmp_path).fingerprint)
    names.append(start(tmp_path, {**CONFIG, "dropout": 0.2}).fingerprint)
    assert len({*names}) == 4
    assert json.dumps(names)  # plain strings


def test_threads_of_this_process_are_left_as_they_were(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    start(tmp_path, threads_per_rank=before + 1)
    assert torch.get_num_threads() == before
    newest = tmp_path.glob("work/*/checkpoints/00000006/state.json")
    assert read_json(next(newest))["threads"] == before + 1


def test_job_module_is_the_one_in_this_folder() -> None:
    assert Path(engine_samples.__file__).parent == Path(__file__).parents[1]
