"""From measured models to a champion: registered, judged, promoted or refused, rolled back."""

import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from evaluation_samples import write_scene
from inference_samples import export_tiny_med
from project_samples import ROOT

from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.storage import content_hash, read_json, write_json
from blip_pipelines.pipelines.release.gating import gate
from blip_pipelines.pipelines.release.nodes import register
from blip_pipelines.pipelines.release.released import Released
from blip_pipelines.tracking import champions, runs
from blip_pipelines.tracking.registry import RegistryError, artifact, find, folder_of
from blip_pipelines.tracking.runs import Store

NAME, FILTER = "blip-captioner", "blip-filter"
MODEL = Released(
    stage="med",
    names=(NAME,),
    model="med_model",
    record="med_run",
    trained_on=("corpus", "pairs"),
    contracts="contracts",
    checked="checked",
    predictions="med_predictions",
    metrics="metrics",
    measured_by="blip_pipelines.jobs.evaluate_med",
)
JUDGE = Released(
    stage="capfilt",
    names=(FILTER,),
    model="filter_model",
    record="capfilt_run",
    part="filter",
    trained_on=("pairs",),
    contracts="contracts",
    checked="checked",
    predictions="decided",
    metrics="metrics",
    measured_by="blip_pipelines.jobs.capfilt_judge",
    is_filter=True,
)
GUARDED = {NAME: {"guarded": ["cider/image"]}, FILTER: {"guarded": ["right/clean", "right/swap"]}}
RELEASE = {"gate": {"draws": 200, "max_slowdown": 100.0, "models": GUARDED}}
BASE = {
    block: yaml.safe_load((ROOT / "conf" / "base" / f"parameters_{block}.yml").read_text())[block]
    for block in ("evaluation", "capfilt")
}


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """A store, a data set, and what registers a model of that content and asks the gate: `release(name, ...)` for a
    captioner, `release_filter(name, ...)` for a filter."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, data = Store(tmp_path / "mlruns", "tests"), write_scene(tmp_path)
    export_tiny_med(tmp_path / "exported")
    test = Pairs.open(data["pairs"], data["images"]).select(split="test", subset="image")
    evaluation = {
        **BASE["evaluation"],
        "subsets": ["image"],
        "candidates": 4,
        "launch": {"mode": "inline", "work": str(tmp_path / "work")},
    }
    evaluation |= {"bootstrap_draws": 100, "beam": {"min_tokens": 2, "max_tokens": 8}}
    capfilt = {**BASE["capfilt"], "launch": evaluation["launch"]}
    settings = {"med": {"steps": 2}, "evaluation": evaluation, "capfilt": capfilt}

    def export(content, shift):
        folder = tmp_path / content
        shutil.copytree(tmp_path / "exported", folder / "model", dirs_exist_ok=True)
        note = read_json(folder / "model" / "med.json")
        write_json(folder / "model" / "med.json", {**note, "temperature": len(content) + shift})
        return folder

    def ask(released, inputs):
        run = store.start("release")
        runs.enter(run)
        try:
            registered = register(RELEASE, settings, releases=(released,), **inputs)
            found = gate(registered, RELEASE, settings, releases=(released,), **inputs)
        finally:
            runs.enter(None)
            run.finish()
        return SimpleNamespace(run=run, decision=next(iter(found["decisions"]), None), registered=registered)

    def release_filter(content, probabilities, rows):
        """`probabilities` that a clean and a swapped caption match, of the filter that decided on `rows`."""
        folder = export(content, probabilities[0])
        judged = [{**row, "match_probability": probabilities[number % 2]} for number, row in enumerate(rows)]
        images = read_json(data["pairs"] / "manifest.json")["images"]
        write_pairs(folder / "decided", [pa.Table.from_pylist(judged, PAIR_SCHEMA)], images)
        known = [
            {"key": row["key"], "caption": row["caption"], "kind": ("clean", "swap")[number % 2], "truth": "?"}
            for number, row in enumerate(rows)
        ]
        pq.write_table(pa.Table.from_pylist(known), folder / "noise.parquet")
        inputs = {
            "filter_model": folder / "model",
            "capfilt_run": {"parts": {"filter": {"fingerprint": content, "code": "c"}}},
            "checked": {"pairs": content_hash(data["pairs"])},
            "contracts": [{"rule": "schema", "severity": "error", "passed": True, "failed": 0}],
            "decided": folder / "decided",
            "metrics": {},
            "noise": folder / "noise.parquet",
            "pairs": data["pairs"],
            "images": data["images"],
        }
        return ask(JUDGE, inputs)

    def release(content, shift=0.0, corpus=None, keys=None):
        folder = export(content, shift)
        keys = sorted(set(test.keys)) if keys is None else keys
        draw = np.random.default_rng(0)
        rows = [{"subset": "image", "key": key, "cider": float(draw.random() + shift)} for key in keys]
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "predictions" / "predictions_captions.parquet")
        corpus = corpus or data["pairs"]
        inputs = {
            "med_model": folder / "model",
            "med_run": {"fingerprint": content, "code": "c"},
            "corpus": corpus,
            "checked": {"pairs": content_hash(corpus)},
            "contracts": [{"rule": "schema", "severity": "error", "passed": True, "failed": 0}],
            "med_predictions": folder / "predictions",
            "metrics": {"med/cider/image": float(np.mean([row["cider"] for row in rows]))},
            "noise": tmp_path / "noise.parquet",
            "pairs": data["pairs"],
            "images": data["images"],
        }
        return ask(MODEL, inputs)

    return SimpleNamespace(
        store=store, data=data, release=release, release_filter=release_filter, tmp=tmp_path, test=test
    )


def champion_of(scene, name=NAME):
    return str(scene.store.client.get_model_version_by_alias(name, "champion").version)


def test_a_better_model_is_promoted_a_worse_one_refused_and_a_roll_back_restores(scene):
    first = scene.release("first").decision
    assert first["promoted"] and first["champion"] is None and champion_of(scene) == "1"
    better = scene.release("better", 0.5).decision
    assert better["promoted"] and better["champion"] == "1" and champion_of(scene) == "2"

    worse = scene.release("worse", -0.5)
    assert not worse.decision["promoted"] and champion_of(scene) == "2"
    assert worse.decision["refused"].startswith("no_fall: cider/image fell: -1 (-1 to -1,")
    version = find(scene.store, f"models:/{NAME}@candidate")
    assert version.version == "3" or version.version == 3
    assert version.tags["gate"].startswith("refused: no_fall: cider/image fell")
    measured = read_json(artifact(scene.store, version, f"recipe/{NAME}.json", scene.tmp / "measured"))
    assert measured["version"] == version.tags["recipe"] and measured["parameters"]["candidates"] == 4
    kept = artifact(scene.store, version, f"gate/{NAME}.json", scene.tmp / "kept")
    assert read_json(kept) == worse.decision

    assert champions.roll_back(scene.store, NAME, "it was rude") == ("2", "1")
    assert champion_of(scene) == "1"
    assert find(scene.store, f"models:/{NAME}/2").tags["withdrawn"] == "it was rude"
    again = scene.release("better", 0.5).decision
    assert again["refused"] == "not_withdrawn: it was rude" and champion_of(scene) == "1"
    with pytest.raises(RegistryError, match="only version 1 has been one"):
        champions.roll_back(scene.store, NAME, "")


def test_an_alias_that_a_person_moved_counts_as_a_promotion(scene):
    scene.release("first")
    scene.release("worse", -0.5)
    scene.store.client.set_registered_model_alias(NAME, "champion", "2")
    assert champions.history(scene.store, NAME) == ["1", "2"]
    assert champions.roll_back(scene.store, NAME, "by mistake") == ("2", "1") and champion_of(scene) == "1"


def test_the_champion_itself_is_not_judged_again(scene):
    assert scene.release("first").decision["promoted"]
    assert scene.release("first").decision is None


def test_a_registered_folder_has_a_card_of_facts(scene):
    scene.release("first", 0.25)
    version = find(scene.store, f"models:/{NAME}@champion")
    card = (folder_of(scene.store, version) / "artifacts" / "model" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    rows = read_json(scene.data["pairs"] / "manifest.json")["rows"]
    assert f"- out of a table of {rows:,} rows" in card and "steps: 2" in card
    assert f"- model: `{version.tags['model']}`" in card
    (figures,) = [line for line in card.splitlines() if line.startswith("| cider |")]
    assert float(figures.split("|")[2]) == pytest.approx(0.75, abs=0.2)
    assert "Twemoji" in card and "Apache-2.0" in card


def test_a_contaminated_training_set_is_refused_and_the_image_named(scene):
    table = pq.read_table(scene.data["pairs"] / "00000.parquet")
    rows = table.to_pylist()
    (leak,) = [row for row in rows if row["key"] == scene.test.keys[0]][:1]
    rows.append({**leak, "split": "train", "subset": None})
    images = read_json(scene.data["pairs"] / "manifest.json")["images"]
    write_pairs(scene.tmp / "contaminated", [pa.Table.from_pylist(rows, table.schema)], images)
    decision = scene.release("first", corpus=scene.tmp / "contaminated").decision
    assert not decision["promoted"]
    assert decision["refused"].startswith("no_leak: 1 evaluation images are in the training data: " + leak["key"][:12])
    with pytest.raises(RegistryError, match="no such model"):
        find(scene.store, f"models:/{NAME}@champion")


def test_a_champion_that_was_measured_on_other_rows_is_measured_anew(scene):
    """Its kept scores are far above what it reaches today, and do not decide."""
    assert scene.release("first", 100.0, keys=sorted(set(scene.test.keys))[:3]).decision["promoted"]
    second = scene.release("second", 50.0).decision
    assert second["promoted"], second["refused"]
    (ruling,) = [ruling for ruling in second["rulings"] if ruling["rule"] == "no_fall"]
    assert f"{len(set(scene.test.keys))} samples" in ruling["found"]


def test_a_filters_champion_judges_todays_captions_before_a_new_one_is_held_against_it(scene):
    """Its kept scores are perfect, of captions that are no longer there, and do not decide."""
    train = Pairs.open(scene.data["pairs"]).select(split="train").table().to_pylist()
    web = [{**row, "origin": "web"} for row in {row["key"]: row for row in train}.values()]
    assert scene.release_filter("first", (1.0, 0.0), web[:8]).decision["promoted"]

    today = web[8:]  # at 0.5 a filter that cannot tell is right about all of one kind, so the opposite falls there
    worse = scene.release_filter("worse", (0.0, 1.0), today).decision
    assert not worse["promoted"] and champion_of(scene, FILTER) == "1"
    fallen = [ruling["found"] for ruling in worse["rulings"] if ruling["rule"] == "no_fall" and not ruling["kept"]]
    assert fallen and all("fell: " in found and f"{len(today) // 2} samples" in found for found in fallen)

    better = scene.release_filter("better", (1.0, 0.0), today).decision
    assert better["promoted"], better["refused"]
    rulings = [ruling["found"] for ruling in better["rulings"] if ruling["rule"] == "no_fall"]
    assert len(rulings) == 2 and all(f"{len(today) // 2} samples" in found for found in rulings)
    assert any("changed by +" in found and "changed by +0 " not in found for found in rulings)
    assert champion_of(scene, FILTER) == "3"


def test_a_filter_that_was_measured_on_the_same_captions_is_not_measured_again(scene, caplog):
    train = Pairs.open(scene.data["pairs"]).select(split="train").table().to_pylist()
    web = [{**row, "origin": "web"} for row in {row["key"]: row for row in train}.values()]
    caplog.set_level("INFO")
    assert scene.release_filter("first", (1.0, 0.0), web).decision["promoted"]
    worse = scene.release_filter("worse", (0.0, 1.0), web).decision
    assert worse["refused"].startswith("no_fall: right/clean fell: -1 (-1 to -1,")
    assert "on the rows of today" not in caplog.text
