"""What torchrun starts, one process a rank: job.json in, outputs and their receipt out."""

import importlib
import logging
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip_pipelines.data.storage import read_json
from blip_pipelines.jobs import torchrun
from blip_pipelines.jobs.receipt import OUTPUTS, write_receipt

if TYPE_CHECKING:
    from blip_pipelines.training.distributed import World


def perform(job: dict[str, Any], work: Path, world: "World") -> None:
    """Run the job on this rank; the first one writes the receipt.

    A job module has `run(config, inputs, work, world) -> facts` and writes its outputs under work/"out".
    """
    module = importlib.import_module(job["job"])
    outputs = work / OUTPUTS
    if world.is_first:
        shutil.rmtree(outputs, ignore_errors=True)  # what an attempt that was killed had written of them
        outputs.mkdir(parents=True)
    world.barrier()
    facts = module.run(job["config"], {name: Path(path) for name, path in job["inputs"].items()}, work, world)
    world.barrier()
    if world.is_first:
        write_receipt(outputs, job["job"], job["fingerprint"], job["hashes"], facts)


def main(job_file: Path) -> int:
    torchrun.die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    # Standard output is what the person sees; standard error, warnings among it, goes to the log file.
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, stream=sys.stdout, format="%(message)s")
    try:
        from blip_pipelines.training import distributed
        from blip_pipelines.training.loop import Stopped

        try:
            with distributed.start() as world:
                perform(read_json(job_file), job_file.parent, world)
        except Stopped as stopped:
            logging.info("%s", stopped)
            return torchrun.STOPPED
    except Exception as error:
        torchrun.write_failure(job_file.parent, rank, error, traceback.format_exc(), time.time_ns())
        return 1
    return 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(status)  # a process group that lost a peer may hang in its destructors
