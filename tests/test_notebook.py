"""The notebook's code, cell by cell, on small models that are registered as a run registers them."""

import json

import pytest
from evaluation_samples import write_scene
from inference_samples import export_tiny_med
from project_samples import ROOT

from blip_pipelines.inference.served import SERVED
from blip_pipelines.tracking import runs
from blip_pipelines.tracking.champions import decide
from blip_pipelines.tracking.registry import register_served
from blip_pipelines.tracking.runs import Store


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = write_scene(tmp_path)
    for name, place in (("pairs", "03_primary"), ("images", "02_intermediate")):
        (tmp_path / "data" / place).mkdir(parents=True)
        data[name].rename(tmp_path / "data" / place / name)
    export_tiny_med(tmp_path / "med")
    store = Store(tmp_path / "mlruns", "blip")
    run = store.start("release")
    runs.enter(run)
    try:
        for name in ("blip-captioner", "blip-retriever", "blip-filter"):
            register_served(name, SERVED[name], tmp_path / "med", "candidate", {"stage": "med", "model": name}, {})
        decide(run, "blip-captioner", "1", [], "")
    finally:
        runs.enter(None)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    names: dict = {}
    cells = json.loads((ROOT / "notebooks" / "play.ipynb").read_text("utf-8"))["cells"]
    for cell in cells:
        assert not cell.get("outputs"), "outputs are not kept in git"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["served"]["blip-captioner"].alias == "champion" and names["served"]["blip-filter"].alias == "candidate"
    assert names["written"]["beam"].str.len().min() > 0
    assert len(names["found"]) == 5 and names["words"] in capsys.readouterr().out
