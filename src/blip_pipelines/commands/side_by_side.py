"""Commands side by side, each on cores of its own: small models gain little from a second core."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import click

LOG = "log.txt"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """A command. Args: title, for people; folder, where its output is kept if it does not run alone."""

    title: str
    command: Sequence[str]
    folder: Path


def places(bytes_each: int) -> int:
    """How many go at a time: one with a GPU, else one a core, as far as memory reaches for `bytes_each`."""
    import psutil
    import torch

    if torch.cuda.is_available() or not hasattr(os, "sched_getaffinity"):
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // bytes_each))


def perform(tasks: Sequence[Task], parallel: int) -> list[Task]:
    """Run all, `parallel` at a time, and return those that failed; one alone shows its output as it comes.

    Ctrl-C and SIGTERM stop those that run, with SIGTERM, before they reach the caller.
    """
    from blip_pipelines.evaluation.page import duration

    waiting, running, failed = list(enumerate(tasks, 1)), list[_Running](), list[Task]()
    free, started = cores_of(parallel), time.monotonic()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
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
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            each.process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def cores_of(parallel: int) -> list[set[int]]:
    """The cores of each of so many processes; disjoint unless there are fewer cores than processes."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = max(len(cores) // parallel, 1)
    return [{cores[(place * each + n) % len(cores)] for n in range(each) if cores} for place in range(parallel)]


class _Running:
    def __init__(self, task: Task, cores: set[int], alone: bool):
        self.task, self.cores, self.started = task, cores, time.monotonic()
        self.log = None if alone else task.folder / LOG
        with nullcontext() if self.log is None else self.log.open("w") as output:
            # In a session of its own, as Ctrl-C is to come to this process alone.
            self.process = subprocess.Popen(task.command, stdout=output, stderr=output, start_new_session=True)
        if cores and not alone:
            os.sched_setaffinity(self.process.pid, cores)  # before it has threads: they inherit it

    def tail(self) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-20:]) if self.log else ""
