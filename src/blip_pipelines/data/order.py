"""What is random in the data, as pure functions of numbers: the order of rows, and the draws made for a row.

Shards are shuffled, then the rows of each window of consecutive shards among themselves. A wider window mixes better
and spreads the reads over more shards; it belongs to the order, never to where the bytes lie. Nothing here knows ranks
or workers, so resuming is naming a position.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_WINDOWS_KEPT = 4


@dataclass(frozen=True)
class Order:
    """The endless order in which training visits the rows of a view, each row once an epoch.

    Attributes:
        shard_rows: rows of the view in each shard (`Pairs.shard_rows`).
        seed: of the data.
        window_shards: shards whose rows are mixed with one another; memory and cost follow the window, not the set.
    """

    shard_rows: tuple[int, ...]
    seed: int
    window_shards: int

    def __post_init__(self) -> None:
        if sum(self.shard_rows) == 0:
            raise ValueError("there are no rows to order: the chosen split or origin is empty")
        if self.window_shards < 1:
            raise ValueError(f"window_shards is {self.window_shards}; it must be at least 1")

    def __len__(self) -> int:
        """Rows an epoch."""
        return int(self._shard_starts[-1])

    def rows(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the rows at positions start to start + count; position p is of epoch p // len(self)."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, within = divmod(start, len(self))
            ends = self._plan(epoch)[1]
            number = int(np.searchsorted(ends, within, side="right"))
            first = within - (int(ends[number - 1]) if number else 0)
            part = self._window(epoch, number)[first : first + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    @cached_property
    def _shard_starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.shard_rows, dtype=np.int64)])

    @cached_property
    def _plans(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    @cached_property
    def _windows(self) -> dict[tuple[int, int], np.ndarray]:
        return {}

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the shards in an epoch, and the position within the epoch at which each window ends."""
        if epoch not in self._plans:
            if len(self._plans) >= _WINDOWS_KEPT:
                self._plans.clear()
            shards = _shuffle(len(self.shard_rows), self.seed, "shards", epoch)
            ends = np.cumsum(np.asarray(self.shard_rows)[shards])
            is_last = np.arange(1, len(shards) + 1) % self.window_shards == 0
            is_last[-1] = True
            self._plans[epoch] = shards, ends[is_last]
        return self._plans[epoch]

    def _window(self, epoch: int, number: int) -> np.ndarray:
        if (epoch, number) not in self._windows:
            if len(self._windows) >= _WINDOWS_KEPT:
                self._windows.pop(next(iter(self._windows)))
            first = number * self.window_shards
            shards = self._plan(epoch)[0][first : first + self.window_shards]
            starts = self._shard_starts
            rows = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
            self._windows[epoch, number] = rows[_shuffle(len(rows), self.seed, f"window {number}", epoch)]
        return self._windows[epoch, number]


def draw(seed: int, step: int, purpose: str, first_row: int, rows: int, count: int = 1) -> np.ndarray:
    """(rows, count) float64 in [0, 1): the draws of global rows first_row to first_row + rows.

    What a row gets depends on (seed, step, purpose, row) only, so that any split of a batch draws the same.
    """
    blocks = -(-count // 4)  # Philox makes four numbers at each value of its counter
    bits = _philox(seed, step, purpose, counter=first_row * blocks).random_raw(rows * blocks * 4)
    return (bits >> np.uint64(11)).reshape(rows, blocks * 4)[:, :count] * 2.0**-53


def _shuffle(length: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    # NumPy promises the raw bits of Philox for ever, those of Generator.permutation only within a version.
    return np.argsort(_philox(seed, epoch, purpose).random_raw(length), kind="stable")


def _philox(seed: int, step: int, purpose: str, counter: int = 0) -> np.random.Philox:
    key = np.array([seed % 2**64, zlib.crc32(purpose.encode()) << 32 | step % 2**32], np.uint64)
    return np.random.Philox(key=key, counter=counter)
