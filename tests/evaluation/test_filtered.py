import numpy as np
import pyarrow as pa
import pytest
from data_samples import write_data_set

from blip_pipelines.data.composition import fill
from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.evaluation.evidence import Evidence
from blip_pipelines.evaluation.filtered import BINS, filtered, histogram

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def evidence(tmp_path):
    """Twelve web captions, of which every third is dropped, and as many synthetic ones, of which one is."""
    pairs, images = write_data_set(tmp_path, [16], captions_per_image=2)
    web = Pairs.open(pairs).select(split="train", origins=["web"]).table()
    count, step = len(web), np.arange(len(web))
    web = fill(web, match_probability=step / count, kept=step % 3 > 0, reason=["above 0.5"] * count)
    texts = [HOSTILE, "", *(f"text {n}" for n in range(2, count))]
    synthetic = fill(web, origin=["synthetic"] * count, caption=texts, kept=step > 0)
    write_pairs(tmp_path / "decided", [pa.concat_tables([web, synthetic])], "images")
    rule = {"kind": "threshold", "web_threshold": 0.4, "synthetic_threshold": 0.7}
    return Evidence(
        stages={"capfilt": {"seconds": 1.0, "facts": {"compose": {"rule": rule}}}},
        metrics={
            "capfilt/filter_roc_auc": 0.93,
            "capfilt/web_purity_after": 0.875,
            "med_pretraining/cider/combo": 4.0,
            "med_bootstrapped/cider/combo": 5.5,
            "med_bootstrapped/cider_over_med_pretraining/combo": 1.5,
            "med_bootstrapped/cider_over_med_pretraining_low/combo": 1.25,
            "med_bootstrapped/cider_over_med_pretraining_high/combo": 1.75,
            "med_bootstrapped/i2t_r5_over_med_pretraining/image": 0.01,
            "med_bootstrapped/i2t_r5_over_med_pretraining_low/image": -0.02,
            "med_bootstrapped/i2t_r5_over_med_pretraining_high/image": 0.04,
        },
        pairs=pairs,
        images=images,
        quarantine=tmp_path / "none",
        history={},
        predictions={},
        credits=[],
        registered=[],
        decided={"capfilt": tmp_path / "decided"},
    )


def test_kept_and_dropped_captions_of_both_origins_are_shown_with_score_and_reason(evidence):
    page = filtered(evidence)
    for title in (
        "Web captions that were kept (8)",
        "Web captions that were dropped (4)",
        "Synthetic captions that were kept (11)",
        "Synthetic captions that were dropped (1)",
    ):
        assert title in page
    assert "0.00, above 0.5" in page and "data:image/webp" in page
    assert HOSTILE not in page and "&lt;script&gt;" in page


def test_each_origin_has_a_histogram_with_its_threshold(evidence):
    page = filtered(evidence)
    assert page.count("<svg") == 2
    assert "kept above 0.4" in page and "kept above 0.7" in page


def test_the_round_is_measured_and_the_model_after_it_told_apart_from_the_one_before(evidence):
    page = filtered(evidence)
    assert "0.930" in page and "0.875" in page
    assert "+1.250 to +1.750" in page and "better" in page
    assert "-0.020 to +0.040" in page and "not told apart" in page


def test_a_histogram_counts_every_value_once(evidence):
    values = np.array([0.0, 0.01, 0.5, 0.99, 1.0])
    drawn = histogram("scores", values, 0.5)
    assert drawn.count("<rect") == BINS and drawn.count('height="0.0"') == BINS - 3
    assert "5 captions, kept above 0.5" in drawn


def test_a_run_without_capfilt_says_so(evidence):
    assert "No captions were written or filtered" in filtered(
        Evidence(**{**vars_of(evidence), "decided": {}, "metrics": {}})
    )


def vars_of(evidence):
    return {name: value for name, value in vars(evidence).items() if name != "pictures"}
