"""A model as MLflow keeps it over a caption table: what it says there is what it says when asked."""

import base64

import mlflow
import pandas as pd
import pytest
from data_samples import write_data_set
from distributed_samples import on_ranks
from inference_samples import export_tiny_med, save_served, score_on_ranks

from blip_pipelines.config import ConfigError
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.training.distributed import World

CONFIG = {"made_by": "a" * 64, "batch_images": 4}
LENGTHS = {"min_tokens": 2, "max_tokens": 8}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    export_tiny_med(folder / "med")
    for name in ("blip-captioner", "blip-filter"):
        save_served(name, folder / "med", folder / name)
    pairs, images = write_data_set(folder, [5, 4, 6], captions_per_image=2)
    return {"folder": folder, "pairs": pairs, "images": images}


def inputs_of(scene, name):
    return {"model": scene["folder"] / name, "pairs": scene["pairs"], "images": scene["images"]}


def score(scene, work, name, **config):
    return score_on_ranks(World(), {**CONFIG, **config}, inputs_of(scene, name), work)


def ask(scene, name, rows, params=None):
    return mlflow.pyfunc.load_model(str(scene["folder"] / name)).predict(pd.DataFrame(rows), params=params)


def test_every_image_is_captioned_as_it_would_be_when_asked(scene, tmp_path):
    facts = score(scene, tmp_path, "blip-captioner", task="caption", params=LENGTHS)
    table = Pairs.open(tmp_path / "out", scene["images"])
    assert facts == {"rows": 15, "task": "caption", "made_by": "a" * 64} and len(table) == 15
    asked = [{"image": base64.b64encode(table.image_bytes(row)).decode()} for row in range(15)]
    said = ask(scene, "blip-captioner", asked, LENGTHS)["caption"].tolist()
    assert table.captions(range(15)) == said and len(set(said)) > 1
    assert set(table.column("origin")) == {"synthetic"} and set(table.column("written_by")) == {"a" * 64}


def test_every_caption_is_judged_beside_its_own_image(scene, tmp_path):
    assert score(scene, tmp_path, "blip-filter", task="judge", split="train")["rows"] == len(
        Pairs.open(scene["pairs"]).select(split="train")
    )
    table = Pairs.open(tmp_path / "out", scene["images"])
    for row in (0, 3, len(table) - 1):
        image = base64.b64encode(table.image_bytes(row)).decode()
        (said,) = ask(scene, "blip-filter", [{"image": image, "texts": table.captions([row])}])["match_probabilities"]
        assert table.column("match_probability")[row] == pytest.approx(said[0], abs=1e-5)
    assert set(table.column("judged_by")) == {"a" * 64}


def test_what_a_model_does_not_do_is_refused(scene, tmp_path):
    with pytest.raises(ConfigError, match="does not judge; it answers caption, log_probability"):
        score(scene, tmp_path, "blip-captioner", task="judge")
    with pytest.raises(ConfigError, match="does not read question; it reads image, prompt"):
        score(scene, tmp_path, "blip-captioner", task="caption", columns={"question": "who?"})


@pytest.mark.slow
def test_two_ranks_make_the_table_that_one_makes(scene, tmp_path):
    score(scene, tmp_path / "one", "blip-filter", task="judge")
    on_ranks(2, score_on_ranks, {**CONFIG, "task": "judge"}, inputs_of(scene, "blip-filter"), tmp_path / "two")
    for file in ("manifest.json", "00000.parquet", "00002.parquet"):
        assert (tmp_path / "two" / "out" / file).read_bytes() == (tmp_path / "one" / "out" / file).read_bytes()
