"""How things are measured: variants take turns, medians are compared, the machine's peak is taken in the same run."""

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from blip_pipelines.data.storage import write_atomic, write_json

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEMM_SIZE = 8192 if DEVICE == "cuda" else 2048
PRELIMINARY = (
    "\n**Preliminary**: the machine was busy with other work; clock times mean little, ratios of CPU seconds do."
)


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2, limit_seconds: float = 120.0
) -> dict[str, dict[str, Any]]:
    """Median seconds of each variant; they take turns, and who goes first alternates, so a slow spell hits all alike.

    Args:
        limit_seconds: of all rounds together; fewer rounds are run where it is reached, at least 3.

    Returns:
        By variant `seconds` and `cpu_seconds` (of all threads), medians, and `rounds`, each round's seconds. On a
        machine that is shared with other work only `cpu_seconds` of a single thread is worth a comparison.
    """
    for run in variants.values():
        for _ in range(warmup):
            run()
    _finish()
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    started = time.perf_counter()
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - started > limit_seconds:
            break
        names = list(variants) if index % 2 == 0 else list(variants)[::-1]
        for name in names:
            before, before_cpu = time.perf_counter(), time.process_time()
            variants[name]()
            _finish()
            cpu[name].append(time.process_time() - before_cpu)
            wall[name].append(time.perf_counter() - before)
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "cpu_seconds": statistics.median(cpu[name]),
            "rounds": [round(seconds, 5) for seconds in wall[name]],
        }
        for name in variants
    }


def in_process(call: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """What a call takes in a process of its own.

    Returns:
        `seconds`, `cpu_seconds` (of all its threads) and `peak_mb`, the most memory that the process ever had; with
        `before_mb`, what it had before the call.

    Raises:
        RuntimeError: the process failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs, call, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{call.__name__} failed in its process; see above") from None
    finally:
        process.join()


def _report(pipe: Any, call: Callable[..., None], *arguments: Any) -> None:
    before, started, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    call(*arguments)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    pipe.send({**seconds, "peak_mb": _memory("VmHWM"), "before_mb": before})


def _memory(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def gemm_peak(dtype: torch.dtype, rounds: int = 10) -> float:
    """FLOP/s of a square matrix product: the best of several, as nothing goes faster than the machine."""
    a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(DEVICE, dtype)
    b = torch.randn(GEMM_SIZE, GEMM_SIZE).to(DEVICE, dtype)
    _finish()
    best = float("inf")
    for _ in range(rounds):
        before = time.perf_counter()
        a @ b
        _finish()
        best = min(best, time.perf_counter() - before)
    return 2 * GEMM_SIZE**3 / best


def _finish() -> None:
    """Wait for what the device still has to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def circumstances(command: str) -> dict[str, Any]:
    """What the figures depend on: hardware, load, threads, versions, the command."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "pillow")},
    }


def processor() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line.split(":", 1)[1].split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(known)})"


def write(name: str, found: dict[str, Any], heads: list[str], rows: list[list[str]], reading: str) -> str:
    """Keep a result as JSON and as a page with its table, that of a GPU by itself; returns the page."""
    name = f"{name}_gpu" if DEVICE == "cuda" else name
    about = found["circumstances"]
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    page = "\n".join(
        [
            f"# {name}",
            "",
            reading,
            "",
            f"| {' | '.join(heads)} |",
            f"|{'---|' * len(heads)}",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"{about['date']}; {about['processor']}, {about['cores']} cores, {about['threads']} threads, load "
            f"{about['load_at_start']} at the start; {about['system']}; {versions}.",
            f"Command: `{about['command']}`",
            *([PRELIMINARY] if about["load_at_start"] > (about["cores"] or 1) / 2 else []),
            "",
        ]
    )
    write_json(RESULTS / f"{name}.json", found)
    write_atomic(RESULTS / f"{name}.md", page)
    return page
