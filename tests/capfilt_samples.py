"""CapFilt on a small data set with a random model, for tests that run it whole, killed, and on several ranks."""

import os
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from blip_pipelines.jobs import capfilt_judge, capfilt_write

JOBS = {"write": capfilt_write, "judge": capfilt_judge}
CONFIGS: dict[str, dict[str, Any]] = {
    "write": {
        "generation": {"strategy": "nucleus", "min_tokens": 2, "max_tokens": 8},
        "batch_images": 4,
        "precision": "float32",
    },
    "judge": {"batch_images": 4, "precision": "float32"},
}


def run_job(world, job: str, inputs: dict[str, Path], work: Path, **config: Any) -> dict[str, Any]:
    """The job as the worker runs it, with an empty folder of outputs."""
    if world.is_first:
        shutil.rmtree(work / "out", ignore_errors=True)
        (work / "out").mkdir(parents=True)
    world.barrier()
    return JOBS[job].run({**CONFIGS[job], **config}, inputs, work, world)


def run_killed(job: str, inputs: dict[str, Path], work: Path, batches: int) -> int:
    """The job in a process that is killed when it begins batch number `batches`; its exit status."""
    process = get_context("fork").Process(target=_run_and_die, args=(job, inputs, work, batches))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run_and_die(job: str, inputs: dict[str, Path], work: Path, batches: int) -> None:
    import torch

    from blip_pipelines.training.distributed import World

    torch.set_num_threads(1)  # threads do not survive a fork
    module: Any = JOBS[job]
    read_batches = module.images_in_batches
    left = iter(range(batches))

    def until_killed(*arguments: Any) -> Any:
        for batch in read_batches(*arguments):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    module.images_in_batches = until_killed
    run_job(World(), job, inputs, work)


def tables(folder: Path) -> dict[str, bytes]:
    """Content by name of a caption table's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".parquet", ".json")}


def run_on_ranks(world, runs: list[tuple[str, dict[str, Path], Path]]) -> dict[str, Any]:
    """Several jobs one after the other, for `on_ranks`; facts by work folder."""
    return {str(work): run_job(world, job, inputs, work) for job, inputs, work in runs}
