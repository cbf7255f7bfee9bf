"""Ablation tables out of what runs left behind."""

import statistics
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_pipelines.data.storage import write_json
from blip_pipelines.evaluation.ablation import Run, Table, ablations, collect, measures_file


def run(folder, stage, ciders):
    """A finished run: `ciders` of the images of subset combo."""
    rows = [{"subset": "combo", "key": f"k{n}", "cider": cider} for n, cider in enumerate(ciders)]
    (folder / "07_model_output" / stage).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "07_model_output" / stage / "predictions_captions.parquet")
    write_json(measures_file(folder, stage), {f"{stage}/cider/combo": statistics.fmean(ciders), f"{stage}/rows": 3})


def tables(seeds):
    both = Run(("capfilt",), {"none": "med", "both": "boot"}, seeds=seeds)
    alone = Run(("capfilt",), {"filter_only": "boot"}, {"capfilt.rule.synthetic": False})
    return {"capfilt": Table("Halves", ("cider",), ("combo",), (both, alone), {"both": "none"})}


def test_lines_are_means_over_seeds_and_comparisons_pair_each_sample_over_seeds(tmp_path):
    for seed, gain in ((0, 1.0), (1, -0.4)):
        run(tmp_path / "none" / str(seed), "med", [0.0, 1.0, 2.0] * 8)
        run(tmp_path / "none" / str(seed), "boot", [0.0 + gain, 1.0 + gain, 2.0 + gain] * 8)
    found = collect(tables((0, 1)), tmp_path)
    metrics = found["metrics"]
    assert metrics["ablation/none/cider/combo"] == 1.0 and metrics["ablation/none/cider_sd/combo"] == 0.0
    assert metrics["ablation/both/cider/combo"] == pytest.approx(1.3)
    assert metrics["ablation/both/cider_sd/combo"] == pytest.approx(statistics.stdev([2.0, 0.6]))
    low, high = (metrics[f"ablation/both/cider_over_none_{end}/combo"] for end in ("low", "high"))
    assert (low, high) == pytest.approx((0.3, 0.3)), "every sample gained as much on average"
    assert not any("filter_only" in name for name in metrics), "a run that is not there has no numbers"
    page = str(ablations(found))
    assert "both over none" in page and "filter_only" not in page


def test_an_unequal_number_of_seeds_is_shown_but_not_compared(tmp_path):
    run(tmp_path / "none" / "0", "med", [0.0, 1.0])
    run(tmp_path / "none" / "1", "med", [0.0, 1.0])
    run(tmp_path / "none" / "0", "boot", [1.0, 1.0])
    found = collect(tables((0, 1)), tmp_path)
    assert found["tables"]["capfilt"]["seeds"] == {"none": 2, "both": 1}
    assert not any("_over_" in name for name in found["metrics"])


def test_runs_that_were_measured_on_other_rows_are_shown_but_not_compared(tmp_path, caplog):
    for seed, rows in ((0, 2), (1, 3)):
        for stage in ("med", "boot"):
            run(tmp_path / "none" / str(seed), stage, [1.0] * rows)
    metrics = collect(tables((0, 1)), tmp_path)["metrics"]
    assert "ablation/both/cider/combo" in metrics and not any("_over_" in name for name in metrics)
    assert "both over none: not compared" in caplog.text


def test_all_subsets_together_are_their_samples_not_their_means(tmp_path):
    for stage, gain in (("med", 0.0), ("boot", 1.0)):
        folder = tmp_path / "none" / "0"
        run(folder, stage, [0.0] * 9)
        path = folder / "07_model_output" / stage / "predictions_captions.parquet"
        rows = [*pq.read_table(path).to_pylist(), {"subset": "image", "key": "alone", "cider": 5.0 + gain}]
        pq.write_table(pa.Table.from_pylist(rows), path)
    each = tables((0,))["capfilt"]
    metrics = collect({"capfilt": replace(each, subsets=("combo", "all"))}, tmp_path)["metrics"]
    assert metrics["ablation/none/cider/all"] == pytest.approx(0.5)
    assert metrics["ablation/both/cider/all"] == pytest.approx(0.6)
    assert metrics["ablation/both/cider_over_none/all"] == pytest.approx(0.1)
    assert not any(name.endswith("/all") for name in collect({"capfilt": each}, tmp_path)["metrics"])


def test_page_says_how_to_fill_tables_that_are_empty():
    assert "make ablations" in str(ablations(None))
