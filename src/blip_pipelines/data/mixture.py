"""The order in which instruction tuning visits several data sets at once (InstructBLIP 3.3).

A data set of S rows is drawn with probability in proportion to sqrt(S) times its multiplier, for each sample anew, by
(seed, position) alone; within a data set every row comes once before any comes twice. So a large data set does not
drown the small ones, nothing depends on ranks or workers, and to resume is to name a position.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from blip_pipelines.config import ConfigError
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.order import Order, draw

_AT_ONCE = 1_000_000  # draws counted in one go on the way to a position


@dataclass(frozen=True)
class InstructionOrder:
    """Endless, with the face of `Order`: `rows(start, count)` are the rows at positions start to start + count.

    Attributes:
        shard_rows: of the view whose rows these are.
        rows_by_data_set: (S,) int64 rows of the view, ascending, by name of the data set.
        multipliers: by name of a data set; 1 where it is missing, 0 leaves it out.
        seed, window_shards: as in `Order`.
    """

    shard_rows: tuple[int, ...]
    rows_by_data_set: Mapping[str, np.ndarray]
    multipliers: Mapping[str, float]
    seed: int
    window_shards: int = 8

    def __post_init__(self) -> None:
        if unknown := sorted(self.multipliers.keys() - self.rows_by_data_set.keys()):
            known = ", ".join(self.rows_by_data_set) or "none"
            raise ConfigError(f"multipliers: no data set {unknown[0]!r} to train on; there are: {known}")
        if not any(self._weights):
            raise ConfigError("there are no rows to train on, or every data set has the multiplier 0")

    @classmethod
    def of(
        cls, view: Instructions, multipliers: Mapping[str, float] | None = None, seed: int = 0, window_shards: int = 8
    ) -> "InstructionOrder":
        """The order of a view, such as its training rows.

        Args:
            multipliers: of data sets in the view; None for those that the table brings.
        """
        names, of_row = np.unique(view.column("data_set").astype(str), return_inverse=True)
        rows = {str(name): np.flatnonzero(of_row == number) for number, name in enumerate(names)}
        if multipliers is None:
            multipliers = {name: view.data_sets[name].multiplier for name in rows}
        return cls(view.shard_rows, rows, multipliers, seed, window_shards)

    def __len__(self) -> int:
        """Rows of the view; there are no epochs."""
        return sum(map(len, self.rows_by_data_set.values()))

    @cached_property
    def probabilities(self) -> dict[str, float]:
        """p_d of each data set."""
        weights = self._weights
        return {name: weight / sum(weights) for name, weight in zip(self.rows_by_data_set, weights, strict=True)}

    def rows(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the rows at positions start to start + count."""
        of_position = self._data_sets(start, count)
        first_visits = self._visits(start)
        rows = np.empty(count, np.int64)
        for number, (within, order) in enumerate(zip(self.rows_by_data_set.values(), self._orders, strict=True)):
            here = of_position == number
            if order is not None and (drawn := int(here.sum())):
                rows[here] = within[order.rows(int(first_visits[number]), drawn)]
        return rows

    def shares(self, positions: int) -> dict[str, float]:
        """The share of each data set among the first positions: what the probabilities came to."""
        return dict(zip(self.rows_by_data_set, (self._visits(positions) / max(positions, 1)).tolist(), strict=True))

    @property
    def _weights(self) -> list[float]:
        return [self.multipliers.get(name, 1.0) * len(rows) ** 0.5 for name, rows in self.rows_by_data_set.items()]

    @cached_property
    def _ends(self) -> np.ndarray:
        ends = np.cumsum(list(self.probabilities.values()))
        ends[np.flatnonzero(self._weights)[-1] :] = 1.0  # rounding leaves no gap, and what has no weight no share
        return ends

    @cached_property
    def _orders(self) -> list[Order | None]:
        """The order within each data set; None where it has no rows."""
        shard_ends = np.cumsum(self.shard_rows)
        orders: list[Order | None] = []
        for number, rows in enumerate(self.rows_by_data_set.values()):
            shard_rows = np.diff(np.searchsorted(rows, shard_ends, side="left"), prepend=0)
            seed = self.seed + 1_000_003 * (number + 1)  # equal data sets are not visited in step
            orders.append(Order(tuple(shard_rows.tolist()), seed, self.window_shards) if len(rows) else None)
        return orders

    def _data_sets(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: number of the data set at each position."""
        return np.searchsorted(self._ends, draw(self.seed, 0, "data set", start, count)[:, 0], side="right")

    @cached_property
    def _counted(self) -> dict[str, tuple[int, np.ndarray]]:
        return {}

    def _visits(self, position: int) -> np.ndarray:
        """(data sets,) int64: how often each was drawn before the position. Counted on from where it was asked last."""
        at, visits = self._counted.get("last", (0, np.zeros(len(self.rows_by_data_set), np.int64)))
        if at > position:
            at, visits = 0, np.zeros_like(visits)
        while at < position:
            count = min(position - at, _AT_ONCE)
            visits = visits + np.bincount(self._data_sets(at, count), minlength=len(visits))
            at += count
        self._counted["last"] = position, visits
        return visits
