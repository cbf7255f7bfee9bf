"""MLflow's absolute paths of artifacts, after the folder was moved or copied."""

import shutil

import pytest
from inference_samples import export_tiny_med

from blip_pipelines.inference.served import SERVED
from blip_pipelines.tracking import runs
from blip_pipelines.tracking.registry import load, register_served
from blip_pipelines.tracking.runs import Store

NAME = "blip-captioner"


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_project_elsewhere_finds_its_own_artifacts_and_models(tmp_path, monkeypatch, how):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here, there = tmp_path / "here" / "mlruns", tmp_path / "there" / "mlruns"
    store = Store(here, "tests")
    run = store.start("release")
    (tmp_path / "page.html").write_text("<p>")
    run.log_file(tmp_path / "page.html")
    runs.enter(run)
    try:
        made_from = {"stage": "med", "model": "a" * 64}
        register_served(NAME, SERVED[NAME], export_tiny_med(tmp_path / "med"), "candidate", made_from, {})
    finally:
        runs.enter(None)
    before = load(store, NAME, "1").predict(SERVED[NAME].example())
    (there.parent).mkdir()
    if how == "moved":
        here.rename(there)
    else:
        shutil.copytree(here, there)
        shutil.rmtree(here / "artifacts")  # whatever becomes of the original
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow sets it to where it last was
    moved = Store(there, "tests")
    assert moved.experiment == store.experiment
    assert moved.client.get_run(run.id).info.artifact_uri.startswith(f"{there}/artifacts")
    assert [file.path for file in moved.client.list_artifacts(run.id)] == ["page.html"]
    assert load(moved, NAME, "1").predict(SERVED[NAME].example()).equals(before)
