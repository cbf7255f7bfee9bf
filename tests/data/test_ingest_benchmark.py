from pathlib import Path


def test_what_the_benchmark_ingests_and_starts_on_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.ingest import _start, take_in, write_source, write_table_of, write_tars

    assert take_in(write_source(tmp_path / "folder", 9, 4, (48, 40)), tmp_path / "a")["distinct_images"] == 9
    assert take_in(write_tars(tmp_path / "tars", 9, 4, (48, 40)), tmp_path / "b", "tars")["distinct_images"] == 9
    monkeypatch.setattr("benchmarks.ingest._ROWS_A_SHARD", 1000)
    _start(write_table_of(tmp_path / "pairs", 3000))
