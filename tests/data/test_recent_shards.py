import numpy as np
import pyarrow as pa

from blip_pipelines.data import recent_shards
from blip_pipelines.data.recent_shards import RecentShards


def test_rows_come_in_the_order_asked_for_from_shards_of_every_size():
    values, sizes = np.arange(100, 109), [3, 0, 5, 1]
    ends = np.cumsum(sizes)
    parts = np.split(values, ends[:-1])
    recent, rows = RecentShards(ends), np.array([8, 0, 3, 3, 7, 2])
    assert recent.take("numbers", rows, parts.__getitem__).tolist() == values[rows].tolist()
    texts = [pa.array(list(map(str, part.tolist())), pa.string()) for part in parts]
    assert recent.take("texts", rows, texts.__getitem__).to_pylist() == [str(value) for value in values[rows]]
    assert recent.take("texts", rows[:0], texts.__getitem__) is None


def test_what_was_used_longest_ago_is_let_go_except_for_a_window(monkeypatch):
    part = np.zeros((10, 4), np.int64)
    monkeypatch.setattr(recent_shards, "_MOST_BYTES", 2 * part.nbytes)
    reads = []

    def read(shard):
        reads.append(shard)
        return part

    def visit(shards):
        reads.clear()
        for shard in shards:
            recent.take("numbers", np.array([shard * 10 + 3]), read)
        return reads

    recent = RecentShards(np.arange(10, 60, 10))
    assert visit([0, 1, 0, 2, 0, 2]) == [0, 1, 2]  # 1 went
    assert visit([1, 2, 0]) == [1, 0]  # 0 went
    recent.at_least = 4
    assert visit([0, 1, 2, 3, 0, 1, 2, 3]) == [1, 3]
    assert visit([4, 1, 2, 3, 0]) == [4, 0]
