from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from distributed_samples import on_ranks
from evaluation_samples import CONFIG, evaluate, write_scene
from inference_samples import export_tiny_med
from model_samples import random_stem

from blip_pipelines.config import ConfigError
from blip_pipelines.data.features import FeatureCache
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.evaluation.captioning import score_captions
from blip_pipelines.evaluation.evidence import read_captions, read_queries
from blip_pipelines.evaluation.held_out import NothingToMeasure, subsets_of
from blip_pipelines.training.distributed import World


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    return {**write_scene(folder), "model": export_tiny_med(folder / "model")}


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    return evaluate(World(), CONFIG, inputs, work), work / "out"


def answers(out):
    return pq.read_table(out / "predictions_retrieval.parquet").to_pylist()


def test_every_measure_that_the_report_asks_for_is_there(done):
    metrics = done[0]["metrics"]
    ways = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    names = [*ways, *(f"{name}_itc" for name in ways), *(f"chance_{name}" for name in ways)]
    for caption in ("cider", "bleu1", "bleu4", "rouge_l", "exact"):
        names += [caption, f"{caption}_nucleus", f"baseline_{caption}"]
    names += ["cider_gain", "cider_gain_low", "cider_gain_high"]
    assert {f"{name}/{subset}" for name in names for subset in ("combo", "image")} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["cider_gain_low/combo"] <= metrics["cider_gain/combo"] <= metrics["cider_gain_high/combo"]


def test_the_gallery_is_all_rows_of_the_subset(done, inputs):
    facts, out = done
    view = Pairs.open(inputs["pairs"]).select(split="test", subset="image")
    assert facts["rows"]["image"] == len(view)
    rows = [row for row in answers(out) if row["subset"] == "image"]
    texts = sorted(row["caption"] for row in rows if row["direction"] == "t2i")
    assert texts == sorted(view.captions(np.arange(len(view))))
    assert {row["key"] for row in rows if row["direction"] == "i2t"} == set(view.keys)
    assert {key for row in rows for key in row["top_keys"]} <= set(view.keys)


def test_the_measures_are_those_of_the_predictions(done):
    facts, out = done
    queries = [row for row in answers(out) if row["subset"] == "combo"]
    for way in ("i2t", "t2i"):
        ranks = np.array([query["rank"] for query in queries if query["direction"] == way])
        assert facts["metrics"][f"{way}_r5/combo"] == pytest.approx(np.mean(ranks <= 5))
        ranks = np.array([query["rank_itc"] for query in queries if query["direction"] == way])
        assert facts["metrics"][f"{way}_r5_itc/combo"] == pytest.approx(np.mean(ranks <= 5))
    for query in queries:
        assert query["top_scores"] == sorted(query["top_scores"], reverse=True)
        first_hit = query["top_hits"].index(True) if any(query["top_hits"]) else len(query["top_hits"])
        assert query["rank"] == first_hit + 1 or first_hit == 4, "four candidates were re-ranked"
    assert len(read_queries(out)) == 2 * len(queries) == 2 * (12 + 14)
    rows = [row for row in read_captions(out) if row["subset"] == "combo"]
    again = score_captions([row["generated"] for row in rows], [row["references"] for row in rows])
    assert facts["metrics"]["bleu4/combo"] == again.corpus["bleu4"]
    np.testing.assert_allclose([row["cider"] for row in rows], again.samples["cider"])
    gain = np.mean([row["cider"] - row["baseline_cider"] for row in rows])
    assert facts["metrics"]["cider_gain/combo"] == pytest.approx(gain)


def test_the_baseline_is_the_caption_of_the_nearest_training_image(done, inputs):
    train = Pairs.open(inputs["pairs"]).select(split="train")
    first_captions = dict(reversed(list(zip(train.keys, train.captions(np.arange(len(train))), strict=True))))
    for row in read_captions(done[1]):
        assert row["baseline"] == first_captions[row["baseline_key"]]
        assert row["baseline"] == row["references"][0], "the scene's test pictures are darker training pictures"
    assert done[0]["metrics"]["baseline_exact/image"] == 1


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(done, inputs, tmp_path):
    facts, out = done
    first, second = on_ranks(2, evaluate, CONFIG, inputs, tmp_path)
    assert second["metrics"] == {}
    assert first["rows"] == facts["rows"]
    assert first["metrics"] == pytest.approx(facts["metrics"], abs=1e-6)
    for name in ("generated", "nucleus", "baseline", "key"):
        assert [row[name] for row in read_captions(tmp_path / "out")] == [row[name] for row in read_captions(out)]


def test_the_same_evaluation_writes_the_same_bytes(done, inputs, tmp_path):
    facts, out = done
    assert evaluate(World(), CONFIG, inputs, tmp_path) == facts
    for file in out.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_behind_a_frozen_stem_the_nearest_image_is_by_its_mean_cached_feature(inputs, tmp_path):
    work, model = tmp_path / ".work" / "fingerprint", export_tiny_med(tmp_path / "model", random_stem(), 128)
    evaluate(World(), {**CONFIG, "subsets": ["combo"]}, {**inputs, "model": model}, work)
    cache = FeatureCache(next((tmp_path / ".cache").rglob("index.json")).parent)
    train = sorted(set(Pairs.open(inputs["pairs"]).select(split="train").keys))
    known = cache.read(train).astype(np.float64).mean(1)
    centre = known.mean(0)
    for row in read_captions(work / "out"):
        asked = cache.read([row["key"]]).astype(np.float64).mean(1)[0] - centre
        cosines = (known - centre) @ asked / np.linalg.norm(known - centre, axis=1)
        assert row["baseline_key"] == train[int(cosines.argmax())]


def test_without_training_rows_there_is_no_baseline(inputs, tmp_path):
    facts = evaluate(World(), {**CONFIG, "subsets": ["combo"], "baseline_images": 0}, inputs, tmp_path)
    assert not [name for name in facts["metrics"] if "baseline" in name or "gain" in name]
    assert "cider/combo" in facts["metrics"]


def test_bfloat16_changes_no_more_than_rounding(done, inputs, tmp_path):
    evaluate(World(), {**CONFIG, "subsets": ["combo"], "precision": "bfloat16"}, inputs, tmp_path)
    found = [row["top_scores"][0] for row in answers(tmp_path / "out")]
    expected = [row["top_scores"][0] for row in answers(done[1]) if row["subset"] == "combo"]
    # Two layers of width 16 to 24 with values of order 1: some dozens of roundings of 2**-9 each.
    assert found == pytest.approx(expected, abs=0.1)


def test_data_without_subsets_are_looked_at_as_a_whole():
    """Whatever the default names, whose data have some."""

    def chosen(there, wanted):
        return subsets_of(SimpleNamespace(column=lambda name: there), wanted)

    assert chosen(["all", "all"], ["image", "combo"]) == ["all"]
    assert chosen(["concept", "image", None], ["image", "combo"]) == ["image"]
    assert chosen(["concept", "image"], None) == ["concept", "image"]
    with pytest.raises(NothingToMeasure, match="the split has concept"):
        chosen(["concept"], ["image"])


def test_a_subset_that_is_not_there_is_named_with_those_that_are(inputs, tmp_path):
    with pytest.raises(NothingToMeasure, match=r"in concept; the split has combo, image"):
        evaluate(World(), {**CONFIG, "subsets": ["concept"]}, inputs, tmp_path)
    with pytest.raises(ConfigError, match=r"evaluation\.beam\.beems"):
        evaluate(World(), {"beam": {"beems": 2}}, inputs, tmp_path)
