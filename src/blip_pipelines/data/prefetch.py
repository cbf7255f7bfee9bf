"""Shards on S3, brought into the cache before the training position reaches them.

The order of rows is known to the end, so what the coming rows need is a lookup. The cache is filled with the shards of
the present rows and of as many after them as it holds; what lies behind the position has gone unused for longest, and
goes first.
"""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from blip_pipelines.data.order import Order
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.storage import StorageError

log = logging.getLogger(__name__)

_LOOK = 4096  # rows looked up at a time
_AT_ONCE = 2  # shards; each arrives in parallel parts


class Prefetch:
    """Threads that fetch what the coming steps need while it is entered."""

    def __init__(self, pairs: Pairs, order: Order, samples: int, start_step: int, stop_step: int):
        """
        Args:
            pairs: a view whose images lie on S3.
            order: of that view.
            samples: global, of a step.
            start_step, stop_step: the first step, and the one before which training ends.

        Raises:
            StorageError: the shards that one window of the order mixes do not fit the cache.
        """
        self.pairs, self.order, self.samples = pairs, replace(order), samples
        self.start_step, self.stop_step = start_step, stop_step
        self._sizes = pairs.remote_shards
        self._wake = threading.Condition()
        self._check()

    def __enter__(self) -> "Prefetch":
        self._step, self._is_closed = self.start_step, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_failure: object) -> None:
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def advance(self, step: int) -> None:
        """What steps before `step` read is no longer needed."""
        with self._wake:
            self._step = step
            self._wake.notify()

    def _check(self) -> None:
        largest = sum(sorted(self._sizes.values())[-self.order.window_shards :])
        if largest > self.pairs.cache_bytes:
            raise StorageError(
                f"a window of {self.order.window_shards} shards takes up to {largest:,} bytes, the cache of objects "
                f"holds {self.pairs.cache_bytes:,}, so that rows of one shard would fetch it again and again: raise "
                "`cache_bytes` in places.json of the images (ingestion.source.s3), or lower the order's window_shards"
            )

    def _run(self) -> None:
        room = self.pairs.cache_bytes - max(self._sizes.values())  # for one that is being replaced
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while not self._is_closed:
                step, ahead = self._step, 0
                wanted: list[int] = []
                for shard in self._coming(step):
                    ahead += self._sizes[shard]
                    if ahead > room and wanted:
                        break
                    wanted.append(shard)
                list(pool.map(self._fetch, wanted))
                with self._wake:
                    while self._step == step and not self._is_closed:
                        self._wake.wait()

    def _coming(self, step: int) -> Iterator[int]:
        """Shards on S3 that the steps from `step` on need, in the order in which they need them."""
        seen: set[int] = set()
        start, stop = step * self.samples, self.stop_step * self.samples
        while start < stop and len(seen) < len(self._sizes):
            rows = self.order.rows(start, min(_LOOK, stop - start))
            found, first = np.unique(self.pairs.shards_of(rows), return_index=True)
            for shard in found[np.argsort(first)].tolist():
                if shard in self._sizes and shard not in seen:
                    seen.add(shard)
                    yield shard
            start += len(rows)

    def _fetch(self, shard: int) -> None:
        if self._is_closed:
            return
        try:
            self.pairs.fetch(shard)
        except StorageError as error:  # whoever needs the shard will meet it, and end with it
            log.warning("could not fetch ahead: %s", error)
