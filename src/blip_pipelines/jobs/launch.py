"""From a Kedro node to a finished job: found again, resumed, or run; in this process or under torchrun.

Partial work lies in `<work>/<fingerprint>/`: job.json, checkpoints, log and, at the end, the outputs with their
receipt, which the caller moves into place (`receipt.published`). Whatever dies in between, the next launch of the same
job goes on from there.
"""

import importlib
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blip_pipelines.config import ConfigError, arithmetic, read, speed_only
from blip_pipelines.data.storage import content_hash, read_json, write_json
from blip_pipelines.jobs import receipt as receipts
from blip_pipelines.jobs import torchrun
from blip_pipelines.jobs.claim import claimed
from blip_pipelines.jobs.closure import changed_files, closure, code_hash, file_hashes
from blip_pipelines.jobs.receipt import OUTPUTS, RECEIPT, Receipt

CHECKPOINTS = "checkpoints"
SPEED = "speed.json"

Rows = Sequence[Mapping[str, float]]

logger = logging.getLogger(__name__)


class LaunchError(RuntimeError):
    """A job that may not start as things are; the message says why and how it may."""


@dataclass(frozen=True)
class LaunchConfig:
    """Where and how a job runs; nothing here changes what it computes, but for rounding with `processes`.

    Args:
        mode: "inline" in this process; "torchrun" in processes of its own, about 10 s more.
        processes: on each node; "auto" is one a GPU, or one on a CPU.
        threads_per_rank: "auto" divides the cores; sums round differently with another number.
        rendezvous_endpoint: host:port of this machine, for more than one node. The command for the other nodes, which
            must see the same files, is logged.
        max_restarts: of failed workers, from the last checkpoint, without a person.
        stop_seconds: that workers get to end their step and save when they are told to stop.
        resume: "strict" refuses to resume over changed code; "accept_code" does not.
        force: start from nothing, whatever is there.
    """

    mode: Literal["inline", "torchrun"] = speed_only("torchrun")
    processes: Literal["auto"] | int = speed_only("auto")
    threads_per_rank: Literal["auto"] | int = speed_only("auto")
    nodes: int = speed_only(1)
    rendezvous_endpoint: str | None = speed_only(None)
    local_addr: str | None = speed_only(None)
    max_restarts: int = speed_only(0)
    stop_seconds: int = speed_only(60)
    resume: Literal["strict", "accept_code"] = speed_only("strict")
    force: bool = speed_only(False)
    work: str = speed_only("data/.work")

    def __post_init__(self) -> None:
        if self.nodes > 1 and not self.rendezvous_endpoint:
            raise ConfigError(
                "launch.rendezvous_endpoint: missing; with launch.nodes > 1 give host:port of this machine"
            )


def launch(
    job: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    launch: LaunchConfig,
    on_history: Callable[[Rows], None] | None = None,
) -> Receipt:
    """The receipt of the job for these parameters and inputs, from a run now or from an earlier one.

    Where another process is at the same work, this waits until it has published its outputs, and takes them.

    Args:
        job: dotted name of a module with `run(config, inputs, work, world)` and `Config`, what it reads `config` as.
        inputs: files and folders by the name under which the job asks for them.
        on_history: is given the rows of the training history once each, after the checkpoint that holds them.

    Raises:
        ConfigError: of the job's parameters, before anything starts.
        LaunchError: the code of unfinished work has changed since it began.
        JobFailed, JobStopped: see `torchrun.run`; inline, the job's own exception.
    """
    module = importlib.import_module(job)
    parsed = read(module.Config, config, job.rpartition(".")[2])
    hashes = {name: content_hash(Path(path)) for name, path in sorted(inputs.items())}
    name = receipts.fingerprint(job, arithmetic(parsed), hashes)
    files = closure([job, torchrun.WORKER] if job.partition(".")[0] == __name__.partition(".")[0] else job)
    code, root = code_hash(files), Path(launch.work)
    tail = _Tail(root / name, on_history)
    with claimed(root, name, job) as claim:
        if not launch.force and (found := receipts.find(root, name, code)):
            logger.info("%s: nothing changed, taking %s", job, found.folder)
            tail.send(found.folder)
            return found
        work = root / name
        description = {
            "job": job,
            "fingerprint": name,
            "config": dict(config),
            "inputs": {key: str(Path(path).resolve()) for key, path in inputs.items()},
            "hashes": hashes,
            "code": file_hashes(files),
        }
        _admit(work, description, launch)
        write_json(work / "job.json", description)
        if not (work / OUTPUTS / RECEIPT).exists():
            _run(description, work, launch, claim.handle, tail)
        tail.send(work / OUTPUTS)
        facts = read_json(work / OUTPUTS / RECEIPT)["facts"]
        speed = read_json(work / SPEED) if (work / SPEED).exists() else {}
        claim.keeps = True
        return Receipt(job, name, code, work / OUTPUTS, facts, _seconds(work), False, speed)


def _run(description: dict[str, Any], work: Path, launch: LaunchConfig, lock: int, tail: "_Tail") -> None:
    import torch

    processes = max(torch.cuda.device_count(), 1) if launch.processes == "auto" else launch.processes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(cores // processes, 1) if launch.threads_per_rank == "auto" else launch.threads_per_rank
    started, before = time.monotonic(), _seconds(work)

    def poll() -> None:
        if tail.send(work / CHECKPOINTS):
            write_json(work / "seconds.json", before + time.monotonic() - started)

    try:
        if launch.mode == "inline":
            _run_inline(description, work, threads)
        else:
            job_file = work / "job.json"
            if launch.nodes > 1:
                variables = [f"{name}={value}" for name, value in torchrun.environment(threads).items()]
                elsewhere = shlex.join(["env", *variables, *torchrun.command(launch, processes, job_file.resolve())])
                logger.info("on the other nodes: %s", elsewhere.replace("is_host=true", "is_host=false"))
            torchrun.run(job_file, launch, processes, threads, lock, poll)
    finally:
        tail.send(work / CHECKPOINTS)
        write_json(work / "seconds.json", before + time.monotonic() - started)


def _run_inline(description: dict[str, Any], work: Path, threads: int) -> None:
    import torch

    from blip_pipelines.jobs.worker import perform
    from blip_pipelines.training.distributed import start
    from blip_pipelines.training.loop import Stopped

    torchrun.keep_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with start() as world:
            perform(description, work, world)
    except Stopped as stopped:
        raise torchrun.JobStopped(f"{stopped}; run it again and it goes on from there") from None
    finally:
        torch.set_num_threads(before)


def _admit(work: Path, description: dict[str, Any], launch: LaunchConfig) -> None:
    """Clear the work folder, or refuse, or let the job go on in it."""
    if launch.force:
        shutil.rmtree(work, ignore_errors=True)
    if not (work / "job.json").exists():
        return
    if not [*(work / CHECKPOINTS).glob("[!.]*")] and not (work / OUTPUTS / RECEIPT).exists():
        return  # nothing to go on from
    changed = changed_files(read_json(work / "job.json")["code"], description["code"])
    if changed and launch.resume == "strict":
        listed = "\n  ".join(changed)
        raise LaunchError(
            f"{description['job']}: its unfinished work in {work} was begun with other code:\n  {listed}\n"
            "Set launch.resume: accept_code to go on with the new code, or launch.force: true to begin again."
        )


class _Tail:
    """The part of a training history that has not been handed on yet."""

    def __init__(self, work: Path, on_history: Callable[[Rows], None] | None):
        self.on_history, self.sent = on_history, 0

    def send(self, folder: Path) -> bool:
        """Hand on the new rows of the newest history in `folder`; whether there were any."""
        from blip_pipelines.training.checkpoint import read_history

        rows = read_history(folder)[self.sent :]
        self.sent += len(rows)
        if rows and self.on_history:
            self.on_history(rows)
        return bool(rows)


def _seconds(work: Path) -> float:
    file = work / "seconds.json"
    return float(read_json(file)) if file.exists() else 0.0
