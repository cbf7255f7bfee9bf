"""`python -m benchmarks [NAME ...]`: run the named benchmarks, or all, and keep their results."""

import argparse
import importlib
import os
import sys

import torch

from blip_pipelines.jobs.torchrun import environment

NAMES = ("med_step", "loader", "ingest", "start_up", "contracts", "capfilt", "stage1_step", "stage2_step")


def main() -> None:
    settle()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--rounds", type=int, default=15, help="of which the median is taken")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in NAMES:
            parser.error(f"{name} is not one of {', '.join(NAMES)}")
    torch.set_num_threads(arguments.threads)
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    for name in arguments.names or NAMES:
        print(importlib.import_module(f"benchmarks.{name}").main(command, arguments.rounds))


def settle() -> None:
    """Start again under the allocator settings that jobs train under: glibc reads them when a process begins."""
    settings = {key: value for key, value in environment(threads=1).items() if key.startswith("MALLOC_")}
    if any(os.environ.get(key) != value for key, value in settings.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **settings})


if __name__ == "__main__":
    main()
