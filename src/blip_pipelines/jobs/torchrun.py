"""A job under torchrun: started, its output streamed, stopped with its launcher, its failure explained.

The chain is launcher -> agent -> workers. Each link dies with the one before it, however that one dies, so that no
worker writes on behind a launcher that is gone. The agent is torchrun itself with two things added, which is why this
module is also a program: it ties its life to its parent's, and it writes down which workers died of what.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip_pipelines.data.storage import read_json, write_json
from blip_pipelines.training.progress import RELAY, Progress

if TYPE_CHECKING:
    from blip_pipelines.jobs.launch import LaunchConfig

AGENT = "blip_pipelines.jobs.torchrun"
WORKER = "blip_pipelines.jobs.worker"
PARENT = "BLIP_PIPELINES_PARENT"  # environment: the process whose death ends this one
FAILURES = "failures"  # folder in the work folder, a file a rank
LOG = "log.txt"
STOPPED = 128 + signal.SIGTERM  # exit status of who saved and stopped because it was told to
POLL_SECONDS = 2.0
OURS = ("OMP_NUM_THREADS", "PYTHONPATH")  # decided by the parameters, whatever is set outside

logger = logging.getLogger(__name__)


class JobFailed(RuntimeError):
    """A job that did not finish; the message holds the first worker's traceback and where the whole log is."""


class JobStopped(RuntimeError):
    """A job that was told to stop: it has saved, and the same command goes on from there."""


class Terminated(BaseException):
    """SIGTERM came to the launcher."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux); exits if that has happened already."""
    parent = int(os.environ.get(PARENT, "0"))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent and os.getppid() != parent:
        os._exit(1)
    os.environ[PARENT] = str(os.getpid())  # for the children of this process


def command(launch: "LaunchConfig", processes: int, job_file: Path) -> list[str]:
    """The agent's command line; on the other nodes of a job the same with `is_host=false` and their own address."""
    nodes = ["--standalone"]
    if launch.nodes > 1:
        nodes = [
            f"--nnodes={launch.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={launch.rendezvous_endpoint}",
            f"--rdzv-id={job_file.parent.name[:16]}",
            "--rdzv-conf=is_host=true,join_timeout=600",
        ]
        nodes += [f"--local-addr={launch.local_addr}"] if launch.local_addr else []
    return [
        *(sys.executable, "-m", AGENT, *nodes, f"--nproc-per-node={processes}"),
        *(f"--max-restarts={launch.max_restarts}", f"--shutdown-timeout={launch.stop_seconds}", "-m", WORKER),
        str(job_file),
    ]


def environment(threads: int) -> dict[str, str]:
    """What the workers of every node find in their environment before they start."""
    own = [
        str(Path(path).absolute()) for path in sys.path if path and not path.startswith((sys.prefix, sys.base_prefix))
    ]
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_DYNAMIC": "FALSE",  # a library that picks its own number of threads rounds differently
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
        # Or a restarted worker may read the addresses of the attempt before (pytorch issue 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # glibc gives every large tensor back to the system and faults it in anew: up to half of a step on a CPU.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(own),  # workers import what the launcher imports
    }
    return {name: value if name in OURS else os.environ.get(name, value) for name, value in wanted.items()}


def keep_memory() -> None:
    """What `environment` asks of glibc for workers, asked of this process; whatever is set outside holds."""
    import ctypes

    if sys.platform != "linux" or "MALLOC_MMAP_MAX_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    with suppress(AttributeError):  # another C library
        ask = ctypes.CDLL(None).mallopt
        ask(-4, 0)  # M_MMAP_MAX
        ask(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run(
    job_file: Path, launch: "LaunchConfig", processes: int, threads: int, lock: int, poll: Callable[[], None]
) -> None:
    """Run a job to its end.

    Args:
        lock: a file descriptor that the agent keeps open: the lock outlives a launcher that dies before its workers.
        poll: called every two seconds, in this thread.

    Raises:
        JobFailed: a worker failed more often than `max_restarts`.
        JobStopped: somebody stopped the workers, or SIGTERM came here.
        KeyboardInterrupt: Ctrl-C here, after the job has saved and stopped.
    """
    work = job_file.parent
    for old in (work / FAILURES).glob("*.json"):
        old.unlink()
    here = {PARENT: str(os.getpid()), RELAY: "0.5" if Progress().on_terminal else "30"}
    with (work / LOG).open("a") as log:
        process = subprocess.Popen(
            command(launch, processes, job_file),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            env={**os.environ, **environment(threads), **here},
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C comes here, and from here to the workers as SIGTERM
        )
        reader = threading.Thread(target=_stream, args=(process, log), daemon=True)
        reader.start()
        try:
            _wait(process, poll)
        except BaseException:
            _stop(process, launch.stop_seconds)
            raise
        finally:
            reader.join(timeout=10)
    if process.returncode:
        raise explain(work, process.returncode)


def _wait(process: subprocess.Popen[str], poll: Callable[[], None]) -> None:
    in_main = threading.current_thread() is threading.main_thread()

    def on_sigterm(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, on_sigterm) if in_main else None
    try:
        while process.poll() is None:
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                poll()
    except Terminated:
        raise JobStopped("SIGTERM: the job saves and stops; run it again and it goes on from there") from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen[str], seconds: int) -> None:
    """TERM to the agent, which passes it on and waits; KILL if that takes too long or the person insists."""
    logger.info("stopping: workers save at the end of their step")
    try:
        process.terminate()
        process.wait(seconds + 10)
    except BaseException as error:
        process.kill()  # its workers die with it
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired | ProcessLookupError):
            raise


def _stream(process: subprocess.Popen[str], log: Any) -> None:
    """Lines of the workers to the logger and the log file; their progress to the progress line."""
    progress = Progress()
    assert process.stdout
    for line in process.stdout:
        if progress.relay(line.rstrip("\n")):
            continue
        log.write(line)
        log.flush()
        progress.clear()
        logger.info(line.rstrip("\n"))
    progress.clear()


def write_failure(work: Path, rank: int, error: BaseException, traceback: str, time_ns: int) -> None:
    """Called by a worker that fails, for `explain`."""
    import torch.distributed as dist

    text = f"{type(error).__name__}: {error}"
    echo = isinstance(error, dist.DistBackendError | dist.DistNetworkError) or any(
        word in text for word in ("Connection closed by peer", "Connection reset by peer", "Gloo", "gloo", "NCCL")
    )
    facts = {"rank": rank, "time_ns": time_ns, "error": text, "traceback": traceback, "echo": echo}
    write_json(work / FAILURES / f"{rank}.json", facts)


def explain(work: Path, status: int) -> JobFailed | JobStopped:
    """The root cause in words.

    torchrun takes the failure with the earliest second, which is often a rank that only lost its connection to the
    one that failed. Here: a worker that a signal killed, else the earliest error that is no such echo.
    """
    agent = work / FAILURES / "agent.json"
    exits: dict[str, int] = read_json(agent) if agent.exists() else {}
    errors = [read_json(file) for file in sorted((work / FAILURES).glob("[0-9]*.json"))]
    job, where = read_json(work / "job.json")["job"], f"Full log: {work / LOG}"
    # SIGTERM is what the agent itself sends to the survivors.
    killed = {rank: -code for rank, code in exits.items() if code < 0 and -code != signal.SIGTERM}
    if killed:
        rank, number = next(iter(killed.items()))
        name = signal.Signals(number).name
        hint = "; was the machine out of memory?" if number == signal.SIGKILL else ""
        return JobFailed(f"{job}: rank {rank} was killed by {name}{hint}\nRun it again to go on. {where}")
    if errors:
        first = min(errors, key=lambda error: (error["echo"], error["time_ns"]))
        return JobFailed(f"{job}: rank {first['rank']} failed\n\n{first['traceback'].rstrip()}\n\n{where}")
    if status == STOPPED or {STOPPED, -signal.SIGTERM} & {*exits.values()}:
        return JobStopped(
            f"{job}: the workers were told to stop and have saved; run it again and it goes on from there"
        )
    tail = "\n".join((work / LOG).read_text("utf-8", "replace").splitlines()[-20:])
    return JobFailed(
        f"{job}: the workers ended with status {status} and left no traceback; the last lines:\n{tail}\n{where}"
    )


def main(arguments: Sequence[str]) -> int:
    """torchrun, tied to its parent, which leaves the exit status of each failed worker beside the job file."""
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        exits = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        write_json(Path(arguments[-1]).parent / FAILURES / "agent.json", exits)
        return STOPPED if STOPPED in exits.values() else 1
    except SignalException:
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
