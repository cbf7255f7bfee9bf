"""What is known of single rows, read by the shard: the shards that were used last stay in memory.

Training visits a table a window of shards at a time, so what it holds of it follows the window and not the table.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeAlias

import numpy as np
import pyarrow as pa

Part: TypeAlias = np.ndarray | pa.Array  # a value a row of one shard

_MOST_BYTES = 128 * 2**20


class RecentShards:
    """Values of rows by their number in the whole table; threads may share it.

    Args:
        ends: (shards,) the row of the table at which each shard ends.

    Attributes:
        at_least: shards that are kept even if they take more than 128 MB together.
    """

    def __init__(self, ends: np.ndarray):
        self.ends, self.at_least = ends, 1
        self._parts: OrderedDict[tuple[int, Hashable], Part] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: Hashable, rows: np.ndarray, read: Callable[[int], Part]) -> Part | None:
        """The values of some rows, in their order; None if there are no rows.

        Args:
            name: of what `read` gives, by which it is found again.
            read: gives it for all rows of a shard, named by its number.
        """
        of_shard = np.searchsorted(self.ends, rows, side="right")
        order = np.argsort(of_shard, kind="stable")
        numbers, starts = np.unique(of_shard[order], return_index=True)
        found: list[Part] = []
        for number, mine in zip(numbers.tolist(), np.split(order, starts[1:]), strict=False):
            first = self.ends[number - 1] if number else 0
            part, at = self._part(number, name, read), rows[mine] - first
            found.append(part[at] if isinstance(part, np.ndarray) else part.take(pa.array(at)))
        if not found:
            return None
        back = np.argsort(order)
        if isinstance(found[0], np.ndarray):
            return np.concatenate(found)[back]
        return pa.concat_arrays(found).take(pa.array(back))

    def _part(self, number: int, name: Hashable, read: Callable[[int], Part]) -> Part:
        with self._lock:
            part = self._parts.get((number, name))
            if part is None:
                part = self._parts[number, name] = read(number)
                self._forget()
            self._parts.move_to_end((number, name))
            return part

    def _forget(self) -> None:
        """Let go what was used longest ago, while there is too much."""
        held = sum(part.nbytes for part in self._parts.values())
        while held > _MOST_BYTES and len({number for number, _ in self._parts}) > self.at_least:
            held -= self._parts.popitem(last=False)[1].nbytes
