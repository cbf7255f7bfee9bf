from pathlib import Path

from blip_pipelines.data.pairs import Pairs


def test_what_the_benchmark_ingests_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.ingest import take_in, write_source, write_tars

    assert take_in(write_source(tmp_path / "folder", 9, 4, (48, 40)), tmp_path / "a")["distinct_images"] == 9
    assert take_in(write_tars(tmp_path / "tars", 9, 4, (48, 40)), tmp_path / "b", "tars")["distinct_images"] == 9


def test_the_data_set_of_the_benchmarks_of_scale_opens_and_keeps_the_contracts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.contracts import judge
    from benchmarks.scale import write_data_set
    from benchmarks.start_up import start

    write_data_set(tmp_path, 1700, 500, fingerprints=True)
    assert Pairs.open(tmp_path / "pairs", tmp_path / "images").shard_rows == (500, 500, 500, 200)
    start(tmp_path)
    judge(tmp_path)
    assert (tmp_path / "docs" / "index.html").exists()
