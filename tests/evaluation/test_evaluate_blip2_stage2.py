import numpy as np
import pytest
import torch
from blip2_job_samples import evaluate, export_stage1, export_stage2
from distributed_samples import on_ranks
from evaluation_samples import write_scene

from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.storage import StorageError
from blip_pipelines.evaluation.captioning import score_captions
from blip_pipelines.evaluation.comparison import compare
from blip_pipelines.evaluation.evidence import read_captions
from blip_pipelines.inference.generation import GenerationConfig
from blip_pipelines.inference.language_decoder import write_captions
from blip_pipelines.jobs import evaluate_med
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.training.distributed import World


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    stage1 = export_stage1(folder)
    return {**write_scene(folder), "model": export_stage2(stage1, folder / "stage2"), "med": folder / "med"}


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    return evaluate(World(), inputs, work), work / "out"


def test_predictions_and_measures_are_of_the_form_of_a_meds(done, inputs, tmp_path):
    facts, out = done
    theirs = evaluate(World(), {**inputs, "model": inputs["med"]}, tmp_path, evaluate_med)
    shared = {name for name in theirs["metrics"] if not any(way in name for way in ("i2t", "t2i", "nucleus"))}
    assert set(facts["metrics"]) == shared
    rows = read_captions(out)
    sampled = [{name for name in row if "nucleus" not in name} for row in read_captions(tmp_path / "out")]
    assert [set(row) for row in rows] == sampled
    again = score_captions(
        [row["generated"] for row in rows if row["subset"] == "combo"],
        [row["references"] for row in rows if row["subset"] == "combo"],
    )
    assert facts["metrics"]["cider/combo"] == pytest.approx(again.corpus["cider"])
    for name in ("baseline", "baseline_key", "baseline_cider"):
        assert [row[name] for row in rows] == [row[name] for row in read_captions(tmp_path / "out")], name


def test_the_captions_are_those_that_the_exported_model_writes(done, inputs):
    from blip_pipelines.data.loader import DecodedPixels
    from blip_pipelines.data.transforms import ImageConfig

    view = Pairs.open(inputs["pairs"], inputs["images"]).select(split="test", subset="combo")
    rows = {row["key"]: row for row in read_captions(done[1])}
    images = view.unique_images()
    pixels = torch.from_numpy(DecodedPixels(view, ImageConfig(size=8, augment=False))(images))
    model = load_blip2(inputs["model"]).model
    written = write_captions(model, pixels, GenerationConfig("beam", min_tokens=2, max_tokens=8))
    assert written.texts == [rows[key]["generated"] for key in view.keys[images]]
    assert len({*written.texts}) > 1
    np.testing.assert_allclose(
        written.log_probability, [rows[key]["log_probability"] for key in view.keys[images]], atol=1e-4
    )


def test_it_is_compared_by_what_it_was_measured_on(done, inputs, tmp_path):
    evaluate(World(), {**inputs, "model": inputs["med"]}, tmp_path, evaluate_med)
    found = compare(done[1], tmp_path / "out", draws=100)
    assert {metric for metric, _ in found} == {"cider"}


def test_a_model_without_language_is_refused(inputs, tmp_path):
    with pytest.raises(StorageError, match="no language model"):
        evaluate(World(), {**inputs, "model": inputs["model"].parent / "stage1"}, tmp_path)


@pytest.mark.slow
def test_two_ranks_write_what_one_does(done, inputs, tmp_path):
    first, second = on_ranks(2, evaluate, inputs, tmp_path)
    assert second["metrics"] == {}
    assert first["metrics"] == pytest.approx(done[0]["metrics"], abs=1e-6)
    for name in ("generated", "key"):
        assert [row[name] for row in read_captions(tmp_path / "out")] == [row[name] for row in read_captions(done[1])]
