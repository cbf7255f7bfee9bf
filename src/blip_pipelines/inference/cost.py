"""What a loaded model costs: seconds of a request, bytes of weights. Of the process that asks, on its device."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

WARM_UP = 2


def seconds_of(requests: Mapping[str, Callable[[], Any]], times: int = 7) -> dict[str, float]:
    """Median seconds of each request; they take turns, so that what else the machine does falls on all alike."""
    for request in requests.values():
        for _ in range(WARM_UP):
            request()
    taken: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(times):
        for name, request in requests.items():
            started = time.perf_counter()
            request()
            taken[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in taken.items()}


def weights_bytes(model: Any) -> int:
    """Bytes of the parameters and buffers of all modules that an object holds, each counted once."""
    tensors = {
        (tensor.data_ptr(), tensor.nbytes)
        for module in _modules(vars(model).values())
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(size for _, size in tensors)


def _modules(values: Iterable[Any], depth: int = 3) -> Iterator[nn.Module]:
    """Modules among the values, and among the attributes of what holds them."""
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif depth and hasattr(value, "__dict__") and not isinstance(value, type | torch.Tensor):
            yield from _modules(vars(value).values(), depth - 1)
