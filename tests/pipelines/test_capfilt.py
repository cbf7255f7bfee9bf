"""A round of CapFilt through Kedro on two dozen pictures: what it leaves, and what a change does again."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_samples import CONFIGS
from data_samples import write_data_set
from inference_samples import export_tiny_med
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner

from blip_pipelines.config import ConfigError, read
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.sources import TRUTH_SCHEMA
from blip_pipelines.data.storage import content_hash, read_json, write_json
from blip_pipelines.models.exports import load_med
from blip_pipelines.pipelines.capfilt.nodes import NoTrustedCaptionsError, finetune_captioner, read_parameters
from blip_pipelines.pipelines.capfilt.pipeline import create_pipeline
from blip_pipelines.pipelines.datasets import File, Folder, Json, Places, Table
from blip_pipelines.pipelines.med_bootstrapped.parameters import MedBootstrappedConfig
from blip_pipelines.pipelines.med_bootstrapped.pipeline import create_pipeline as create_bootstrapped
from blip_pipelines.pipelines.parameters import blocks_of, laid_over
from blip_pipelines.pipelines.rounds import check_rounds, configured_rounds, first_round, in_round

FINETUNE = {
    "optimizer": {"learning_rate": 1e-3},
    "training": {"steps": 2, "batch_samples_global": 8, "peak_flops": 1e9},
    "objective": {"momentum": 0.9, "queue_samples": 8},
}
FOLDERS = ("captioner", "filter", "synthetic", "judged", "pairs", "decided", "data_docs")
RULE = {"web_threshold": 0.4, "synthetic_threshold": 0.4}


def losses(**weights):
    return {**FINETUNE, "objective": {**FINETUNE["objective"], "weights": {"itc": 0, "itm": 0, "lm": 0, **weights}}}


def block(work: Path, **changed):
    return {
        "captioner": losses(lm=1),
        "filter": losses(itc=1, itm=1),
        "write": CONFIGS["write"],
        "judge": CONFIGS["judge"],
        "rule": RULE,
        "contracts": {"severity": {"splits": "off", "images_per_caption": "off"}, "min_keep_rate": 0},
        "launch": {"mode": "inline", "threads_per_rank": 1, "work": str(work)},
        **changed,
    }


class Round:
    """The first round over a data set in `root`, run as often as wanted."""

    def __init__(self, root: Path):
        self.root = root
        pairs, images = write_data_set(root / "data", [9, 12, 8], captions_per_image=4)
        web = Pairs.open(pairs).select(split="train", origins=["web"]).table()
        kinds = pa.array(["clean", "swap"] * len(web))[: len(web)]
        columns = [web["key"], web["member"], web["caption"], kinds, web["caption"]]
        noise = pa.table(columns, schema=pa.schema([pa.field("key", pa.string(), False), *TRUTH_SCHEMA]))
        pq.write_table(noise, root / "noise.parquet")
        model = export_tiny_med(root / "model")
        self.inputs = {"pairs": pairs, "images": images, "med_pretraining_model": model}

    def run(self, **changed) -> dict:
        places = {name: {"path": str(self.at(name))} for name in ("pairs", "decided", "data_docs")}
        entries = {name: Folder(str(path)) for name, path in self.inputs.items()}
        entries |= {f"capfilt_{name}": Folder(str(self.at(name))) for name in FOLDERS}
        entries |= {f"capfilt_{name}_history": Table(str(self.at(f"{name}.csv"))) for name in ("captioner", "filter")}
        entries |= {f"capfilt_{name}": Json(str(self.at(f"{name}.json"))) for name in ("metrics", "run", "contracts")}
        entries["noise"] = File(str(self.root / "noise.parquet"))
        entries["capfilt_pairs_checked"] = Json(str(self.at("pairs_checked.json")))
        entries["capfilt_places"] = Places(places)
        entries["params:capfilt"] = MemoryDataset(block(self.root / "work", **changed))
        SequentialRunner().run(create_pipeline(), DataCatalog(entries))
        return read_json(self.at("run.json"))

    def at(self, name: str) -> Path:
        return self.root / "round" / name


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    found = Round(tmp_path_factory.mktemp("round"))
    found.first = found.run()
    return found


slow = pytest.mark.slow  # Great Expectations takes seconds to start


@slow
def test_a_round_leaves_two_models_a_corpus_decisions_and_measures(done):
    captioner, judge, start = (
        load_med(path) for path in (done.at("captioner"), done.at("filter"), done.root / "model")
    )
    assert captioner.med.config == judge.med.config == start.med.config
    decided, corpus, before = (Pairs.open(done.at(n)) for n in ("decided", "pairs", "../data/pairs"))
    kept = decided.column("kept").astype(bool)
    assert 0 < kept.sum() < len(decided), "the case must keep some and drop some"
    human_and_held_out = len(before) - len(before.select(split="train", origins=["web"]))
    assert len(corpus) == human_and_held_out + kept.sum()
    assert read_json(done.at("pairs_checked.json")) == {"pairs": content_hash(done.at("pairs"))}
    metrics = read_json(done.at("metrics.json"))
    assert {"capfilt/filter_roc_auc_swap", "capfilt/web_keep_rate", "capfilt/synthetic_exact"} <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())
    assert (done.at("data_docs") / "index.html").exists()
    assert done.first["write_per_second"] > 0 and not done.first["reused"]


@slow
def test_the_captioner_learns_from_lm_alone_and_the_filter_from_itc_and_itm(done):
    start = load_med(done.root / "model").med.state_dict()

    def moved(name):
        now = load_med(done.at(name)).med.state_dict()
        return {key for key in start if not (now[key] == start[key]).all()}

    captioner, judge = moved("captioner"), moved("filter")
    assert "text_decoder.bert.encoder.layer.0.attention.self.query.weight" in captioner - judge
    assert {"itm_head.weight", "text_proj.weight"} <= judge - captioner
    curves = done.at("captioner.csv").read_text().splitlines()[0].split(",")
    assert "lm" in curves and "itc" not in curves


@slow
def test_another_threshold_composes_anew_without_writing_or_scoring_again(done):
    kept = {name: written_at(done.at(name)) for name in ("captioner", "filter", "synthetic", "judged")}
    corpus = Pairs.open(done.at("pairs")).hash
    record = done.run(rule={"web_threshold": 0.99, "synthetic_threshold": 0.99})
    reused = {name: part["reused"] for name, part in record["parts"].items()}
    assert reused == {"captioner": True, "filter": True, "write": True, "judge": True, "compose": False}
    assert kept == {name: written_at(done.at(name)) for name in kept}
    assert Pairs.open(done.at("pairs")).hash != corpus
    assert len(Pairs.open(done.at("pairs")).select(split="train")) == 2 * 22, "human captions alone are left"

    assert not done.run()["reused"], "the first rule again: composed again, as its corpus is not there any more"
    assert Pairs.open(done.at("pairs")).hash == corpus
    assert done.run()["reused"], "and now nothing is left to do"


def written_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@slow
def test_a_captioner_and_filter_that_share_parameters_are_one_model(done):
    done.run(decoupled=False)
    exports = [{f.name: f.read_bytes() for f in done.at(n).rglob("model.safetensors")} for n in ("captioner", "filter")]
    assert exports[0] == exports[1]
    history = done.at("filter.csv").read_text().splitlines()[0].split(",")
    assert {"itc", "itm", "lm"} <= set(history)


def test_a_corpus_without_trusted_captions_is_refused_by_name(tmp_path):
    pairs, images = write_data_set(tmp_path, [4])
    manifest = read_json(pairs / "manifest.json")
    write_json(pairs / "manifest.json", {**manifest, "origins": {"web": 4}})
    model = export_tiny_med(tmp_path / "model")
    with pytest.raises(NoTrustedCaptionsError, match=r"no caption of origin human, from which the captioner learns"):
        finetune_captioner(model, pairs, images, block(tmp_path))


def test_only_the_measuring_node_reads_the_known_noise():
    readers = {node.name for number in (1, 2) for node in create_pipeline(number).nodes if "noise" in node.inputs}
    assert readers == {"measure_capfilt", "measure_capfilt_2"}


def test_a_round_starts_from_the_model_before_and_judges_the_first_corpus_again():
    first, second = create_pipeline(1), create_pipeline(2)
    inputs = {"pairs", "images", "noise", "params:capfilt"}
    assert first.inputs() == inputs | {"med_pretraining_model", "capfilt_places"}
    assert second.inputs() == inputs | {"med_bootstrapped_model", "capfilt_2_places", "capfilt_pairs"}
    learns = next(node for node in second.nodes if node.name == "finetune_captioner_2")
    assert "capfilt_pairs" in learns.inputs and "pairs" not in learns.inputs
    assert create_bootstrapped(2).inputs() >= {"capfilt_2_pairs", "capfilt_2_pairs_checked", "med_bootstrapped_model"}
    assert create_bootstrapped(1).inputs() >= {"capfilt_pairs", "med_pretraining_model"}
    both = first + second + create_bootstrapped(1) + create_bootstrapped(2)
    assert both.inputs() == inputs | {
        *("med_pretraining_model", "packages", "params:med_pretraining", "params:med_bootstrapped"),
        *("capfilt_places", "capfilt_2_places"),
    }


def test_rounds_are_named_from_the_second_on_and_counted_in_conf_base(tmp_path):
    assert [in_round("capfilt", number) for number in (1, 2)] == ["capfilt", "capfilt_2"]
    assert [first_round(name) for name in ("capfilt", "capfilt_2", "blip2_stage1")] == [
        *("capfilt", "capfilt", "blip2_stage1")
    ]
    assert blocks_of("med_bootstrapped_2") == ("med_pretraining", "med_bootstrapped")
    assert configured_rounds(tmp_path) == 1
    file = tmp_path / "conf" / "base" / "parameters_capfilt.yml"
    file.parent.mkdir(parents=True)
    file.write_text("capfilt:\n  rounds: 3\n")
    assert configured_rounds(tmp_path) == 3
    check_rounds({"capfilt": {"rounds": 3}}, tmp_path)
    with pytest.raises(ConfigError, match=r"capfilt\.rounds: 2, and .*parameters_capfilt\.yml says 3"):
        check_rounds({"capfilt": {"rounds": 2}}, tmp_path)


def test_a_prompt_that_the_captioner_was_not_trained_with_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"capfilt\.write\.prompt: 'a picture of '"):
        read_parameters(block(tmp_path, write={"prompt": "a picture of "}))


def test_the_block_of_the_second_pretraining_says_only_what_differs():
    base = {"training": {"steps": 9, "batch_samples_global": 8}, "optimizer": {"learning_rate": 1e-3}, "seed": 3}
    over = laid_over(base, {"training": {"steps": 5}, "continued": True})
    found = read(MedBootstrappedConfig, over, "med_bootstrapped")
    assert (found.training.steps, found.training.batch_samples_global, found.seed, found.continued) == (5, 8, 3, True)
    assert base["training"]["steps"] == 9
