import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_pipelines.evaluation.comparison import compare


def predictions(folder, ciders, ranks):
    """`ciders` of images of subset combo; `ranks` of its image queries, and of one text query each."""
    folder.mkdir()
    captions = [{"subset": "combo", "key": f"k{n}", "cider": cider} for n, cider in enumerate(ciders)]
    queries = [
        {"subset": "combo", "direction": way, "key": f"k{n}", "caption": f"text {n}", "rank": rank}
        for way in ("i2t", "t2i")
        for n, rank in enumerate(ranks)
    ]
    pq.write_table(pa.Table.from_pylist(captions[::-1]), folder / "predictions_captions.parquet")
    pq.write_table(pa.Table.from_pylist(queries), folder / "predictions_retrieval.parquet")
    return folder


def test_differences_are_paired_by_sample_and_better_is_an_interval_above_zero(tmp_path):
    old = predictions(tmp_path / "old", [1.0, 0.5, 0.0, 2.0] * 10, [1, 6, 9, 2] * 10)
    new = predictions(tmp_path / "new", [1.5, 1.0, 0.5, 2.5] * 10, [1, 5, 2, 6] * 10)
    found = compare(new, old, draws=200)
    cider = found["cider", "combo"]
    assert (cider.mean, cider.low, cider.high) == pytest.approx((0.5, 0.5, 0.5)), "every image gained as much"
    assert cider.is_better
    assert found["i2t_r5", "combo"].mean == found["t2i_r5", "combo"].mean == pytest.approx(1 / 4)
    assert found["i2t_r1", "combo"].mean == 0 and not found["i2t_r1", "combo"].is_better
    assert {subset for _, subset in found} == {"combo"}


def test_models_that_were_measured_on_other_samples_are_not_compared(tmp_path):
    old, new = predictions(tmp_path / "old", [1.0, 0.5], [1, 1]), predictions(tmp_path / "new", [1.0], [1, 1])
    with pytest.raises(ValueError, match=r"cider/combo: .* other samples"):
        compare(new, old)
