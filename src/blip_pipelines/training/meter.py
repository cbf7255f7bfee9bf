"""How fast training goes and what bounds it: samples/s, wait for data, memory, FLOPs and their share of the peak.

Nothing here touches the arithmetic. Numbers are of this attempt; the first steps, which build caches, are left out.
"""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

SETTLING_STEPS = 2
MEASURED_MATRIX = {"cpu": 1024, "cuda": 8192}


class Meter:
    """Times the steps of one rank.

    Args:
        samples_per_step: of the global batch.
        ranks: that share the work.
        flops_per_sample: forward and backward; None as long as it is not known.
        peak_flops: per second, of one rank's device in the precision of the run; None leaves MFU out.
    """

    def __init__(self, samples_per_step: int, ranks: int, flops_per_sample: float | None, peak_flops: float | None):
        self.samples_per_step, self.ranks = samples_per_step, ranks
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self._steps = 0
        self._waited = self._paused = 0.0
        self._started = time.perf_counter()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each is there counts as waiting for data."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of what is no training: validation, a checkpoint."""
        before = time.perf_counter()
        yield
        self._paused += time.perf_counter() - before

    def step(self) -> None:
        """An optimizer step has ended."""
        self._steps += 1
        if self._steps == SETTLING_STEPS:
            self._settled = time.perf_counter(), self._waited, self._paused

    def numbers(self) -> dict[str, float]:
        """Samples per second, share of the time spent waiting for data, peak memory; MFU where it can be known."""
        steps, started, waited, paused = self._steps, self._started, 0.0, 0.0
        if steps > SETTLING_STEPS:
            steps -= SETTLING_STEPS
            started, waited, paused = self._settled
        seconds = max(time.perf_counter() - started - (self._paused - paused), 1e-9)
        found = {
            "samples_per_second": steps * self.samples_per_step / seconds,
            "data_wait_share": (self._waited - waited) / seconds,
            "peak_memory_bytes": float(peak_memory_bytes()),
        }
        if self.flops_per_sample:
            found["flops_per_sample"] = self.flops_per_sample
        if self.flops_per_sample and self.peak_flops:
            found["peak_flops"] = self.peak_flops
            per_rank = found["samples_per_second"] / self.ranks
            found["mfu"] = self.flops_per_sample * per_rank / self.peak_flops
        return found

    def line(self, step: int, steps: int, losses: dict[str, float]) -> str:
        """The progress line after `step` of `steps`."""
        numbers = self.numbers()
        parts = [f"step {step}/{steps}"]
        parts += [f"{name} {value:.3f}" for name, value in losses.items()]
        parts += [f"{numbers['samples_per_second']:.0f} samples/s", f"data wait {numbers['data_wait_share']:.0%}"]
        if "mfu" in numbers:
            parts.append(f"MFU {numbers['mfu']:.0%}")
        parts.append(f"{numbers['peak_memory_bytes'] / 2**30:.1f} GiB")
        left = (steps - step) * self.samples_per_step / max(numbers["samples_per_second"], 1e-9)
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return "  ".join(parts)


def peak_memory_bytes() -> int:
    """Of the device's allocator, or of this process where the CPU computes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a large square matrix product on the device: the best of several, as nothing can go faster."""
    size = MEASURED_MATRIX.get(device.type, 1024)
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        _wait(device)
        before = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - before)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
