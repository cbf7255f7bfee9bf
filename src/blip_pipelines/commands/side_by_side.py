"""Commands side by side, each on cores of its own: small models gain little from a second core."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import click

LOG = "log.txt"
POLL_SECONDS = 0.5
STOPS = (signal.SIGTERM, signal.SIGHUP)  # beside Ctrl-C
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Task:
    """A command. Args: title, for people; folder, where its output is kept if it does not run alone."""

    title: str
    command: Sequence[str]
    folder: Path


def places(bytes_each: int) -> int:
    """How many go at a time: one with a GPU, else one a core, as far as memory reaches for `bytes_each`."""
    import torch

    if torch.cuda.is_available():
        return 1
    return max(1, min(len(_cores()), available_bytes() // bytes_each))


def perform(tasks: Sequence[Task], parallel: int) -> list[Task]:
    """Run all, `parallel` at a time, and return those that failed; one alone shows its output as it comes.

    Ctrl-C, SIGTERM and SIGHUP stop those that run, with SIGTERM, before they reach the caller; Ctrl-C again kills them.
    """
    from blip_pipelines.evaluation.page import duration

    parallel = min(parallel, len(tasks))
    waiting, running, failed = list(enumerate(tasks, 1)), list[_Running](), list[Task]()
    free, started = cores_of(parallel), time.monotonic()
    with _stopping(running):
        while waiting or running:
            while waiting and free:
                number, task = waiting.pop(0)
                running.append(_Running(task, free.pop(0), alone=parallel == 1))
                log = running[-1].log
                click.echo(f"{number}/{len(tasks)} {task.title}" + (f": output in {log}" if log else ""))
            time.sleep(POLL_SECONDS)
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                free.append(each.cores)
                if each.process.returncode:
                    failed.append(each.task)
                    click.echo(each.tail(), err=True)
                done = len(tasks) - len(waiting) - len(running)
                left = duration((time.monotonic() - started) / done * (len(tasks) - done))
                how = "failed" if each.process.returncode else "done"
                took = duration(time.monotonic() - each.started)
                click.echo(f"{each.task.title}: {how} in {took}; {done} of {len(tasks)}, about {left} left")
    return failed


def cores_of(parallel: int) -> list[set[int]]:
    """The cores of each of so many processes: equally many, so that sums round alike wherever one of them runs;
    disjoint unless there are fewer cores than processes.
    """
    cores = _cores()
    each = max(len(cores) // parallel, 1)
    return [{cores[(place * each + n) % len(cores)] for n in range(each)} for place in range(parallel)]


def available_bytes() -> int:
    """Memory that is free for new processes, on this machine and within the container's limit."""
    import psutil

    available = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        files = int(parts["active_file"]) + int(parts["inactive_file"])  # a cache, given back when it is asked for
    except (OSError, ValueError, KeyError):  # no container, or no limit
        return available
    return min(available, limit - used + files)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [0]  # where processes cannot be kept apart, one goes at a time


class _Running:
    def __init__(self, task: Task, cores: set[int], alone: bool):
        self.task, self.cores, self.started = task, cores, time.monotonic()
        self.log = None if alone else task.folder / LOG
        with nullcontext() if self.log is None else self.log.open("w") as output:
            # In a session of its own, as Ctrl-C is to come to this process alone.
            self.process = subprocess.Popen(task.command, stdout=output, stderr=output, start_new_session=True)
        if not alone and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, cores)  # before it has threads: they inherit it

    def tail(self) -> str:
        if self.log is None:
            return ""
        return "\n".join([*self.log.read_text("utf-8", "replace").splitlines()[-20:], f"All of it: {self.log}"])


@contextmanager
def _stopping(running: list[_Running]) -> Iterator[None]:
    """Nothing of `running` outlives this, however it ends."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        if before[number] != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        try:
            for number in STOPS:  # a terminal that goes says so more than once
                signal.signal(number, signal.SIG_IGN)
            for each in running:
                each.process.terminate()
            with suppress(OSError):  # what shows it may be gone
                if running:
                    click.echo(f"stopping {len(running)}: they save at the end of their step; Ctrl-C again kills them")
            for each in running:
                each.process.wait()
        finally:
            for each in running:
                each.process.kill()
                each.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
