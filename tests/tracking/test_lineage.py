"""Whole runs of a small project, changed in between: what each registered version was made from, and back to it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from data_samples import caption, picture
from project_samples import Project

from blip_pipelines.data.storage import read_json
from blip_pipelines.tracking.runs import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAME = "blip-captioner"


CHAIN = """
from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.evaluation.nodes import compare_models, evaluate_med
from blip_pipelines.pipelines.ingestion.pipeline import create_pipeline as ingestion
from blip_pipelines.pipelines.med_pretraining.pipeline import create_pipeline as med_pretraining
from blip_pipelines.pipelines.release.gating import gate
from blip_pipelines.pipelines.release.nodes import register
from blip_pipelines.pipelines.release.released import Released
from blip_pipelines.pipelines.rounds import with_known

STAGE = "med_pretraining"
MODEL = Released(
    STAGE, ("blip-captioner",), f"{STAGE}_model", f"{STAGE}_run", ("pairs",), "contracts", "pairs_checked",
    f"{STAGE}_predictions", "evaluation_metrics", "blip_pipelines.jobs.evaluate_med",
)


def register_pipelines():
    made = [f"{STAGE}_{name}" for name in ("predictions", "measures", "evaluation_record")]
    measured = Node(evaluate_med, [f"{STAGE}_model", "pairs", "images", "params:evaluation"], made, name="evaluate")
    compared = Node(
        with_known(compare_models, stages=(STAGE,)),
        ["params:evaluation", *made],
        ["evaluation_metrics", "evaluation_run"],
        name="compare",
    )
    data = {name: name for name in (*MODEL.data_sets, "noise")}
    data |= {"parameters": "params:release", "settings": "parameters"}
    registered = Node(with_known(register, releases=(MODEL,)), data, "registered", name="register")
    more = {"registered": "registered", "pairs": "pairs", "images": "images"}
    judged = Node(with_known(gate, releases=(MODEL,)), {**data, **more}, "gate", name="gate")
    stages = {
        "ingestion": ingestion(),
        STAGE: med_pretraining(),
        "evaluation": Pipeline([measured, compared], tags="evaluation"),
        "release": Pipeline([registered, judged], tags="release"),
    }
    return {**stages, "__default__": sum(stages.values(), Pipeline([]))}
"""


def make_project(folder):
    """32 pictures, a model of two steps, and the shortest chain from a source to a champion."""
    project = Project(folder)
    project.take_photos(32)
    (project.root / "src" / "blip_pipelines" / "pipeline_registry.py").write_text(CHAIN)
    project.edit("release", gate={"max_slowdown": 100.0, "models": {NAME: {"guarded": ["cider/all"]}}})
    project.run("git", "init", "--quiet", ".")
    for command in (["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "All"]):
        project.run("git", *command)
    project.run(sys.executable, "-m", "blip_pipelines.tracking.dvc")
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Version 1; version 2 after a change of a parameter; version 3 after a change of the data."""
    project = make_project(tmp_path_factory.mktemp("project"))
    assert "DVC: recorded ingestion" in project.run("kedro", "run")
    project.figures = {"1": read_json(project.root / "data" / "08_reporting" / "evaluation.json")}
    project.edit("med_pretraining", training={"steps": 3, "batch_samples_global": 8, "precision": "float32"})
    project.run("kedro", "run")
    project.photo(3).write_bytes(picture(99))
    project.run("kedro", "run")
    return project


def lineage(project, version, *options):
    return project.run("kedro", "lineage", f"models:/{NAME}/{version}", *options)


def stages_of(project, version):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store = Store(project.root / "mlruns", "blip")
        tags = store.client.get_model_version(NAME, version).tags
        file = store.client.download_artifacts(tags["run"], "lineage/lineage.json")
    return tags, read_json(Path(file))["stages"]


def test_each_version_names_the_data_and_the_parameters_that_made_it(project):
    (first, one), (second, two), (third, three) = (stages_of(project, version) for version in "123")
    assert one["med_pretraining"]["parameters"]["training"]["steps"] == 2
    assert two["med_pretraining"]["parameters"]["training"]["steps"] == 3
    assert first["pairs"] == second["pairs"] != third["pairs"]
    assert first["model"] != second["model"] != third["model"]
    for tags, stages in ((first, one), (second, two), (third, three)):
        assert tags["model"] == stages["med_pretraining"]["outputs"]["med_pretraining_model"]["sha256"]
        assert tags["pairs"] == stages["ingestion"]["outputs"]["pairs"]["sha256"]
    source = [stages["ingestion"]["inputs"]["source"]["sha256"] for stages in (one, two, three)]
    assert source[0] == source[1] != source[2]


def test_the_graph_is_said_and_drawn(project):
    said = lineage(project, "2")
    for stage in ("ingestion", "med_pretraining"):
        assert f"\n{stage}\n" in said
    assert "training.steps=3" in said and "CapFilt      0 round(s)" in said
    assert "conf/base/parameters" not in said.split("code")[0]
    assert "uncommitted: conf/base/parameters_med_pretraining.yml" in said.replace("dvc.yaml, ", "")
    assert f"sha256 {stages_of(project, '2')[0]['model'][:12]}  md5 " in said
    page = (project.root / "data" / "08_reporting" / "lineage" / f"{NAME}-2.html").read_text("utf-8")
    assert "<svg" in page and "med_pretraining" in page and "+    steps: 3" in page


def test_two_versions_are_compared_by_what_they_reach_and_what_made_them(project):
    said = project.run("kedro", "compare", f"models:/{NAME}/2", f"models:/{NAME}/1")
    assert any(line.startswith("cider        all") for line in said.splitlines())
    assert "med_pretraining.training.steps: 3 (new), 2 (old)" in said and "reads other pairs" not in said
    page = project.root / "compared.html"
    said = project.run(
        *("kedro", "compare", f"models:/{NAME}/3", f"models:/{NAME}/2", "--by", "length", "--page", str(page))
    )
    assert "words" in said and "med_pretraining reads other pairs" in said
    assert "words" in page.read_text("utf-8") and "med_pretraining reads other pairs" in page.read_text("utf-8")


def test_a_caption_is_looked_up_in_the_version_that_is_asked_not_in_the_project_of_today(project):
    """Picture 3 was another one before version 3."""
    rows = {version: stages_of(project, version)[1] for version in "13"}
    assert rows["1"]["ingestion"]["outputs"]["pairs"] != rows["3"]["ingestion"]["outputs"]["pairs"]
    text = caption(3)
    first, third = (lineage(project, version, "--caption", text) for version in "13")
    keys = [
        next(line for line in said.splitlines() if "image   " in line and "3.png" in line) for said in (first, third)
    ]
    assert keys[0] != keys[1]
    assert f"\u201c{text}\u201d in pairs" in first and "not a model: web" in first and "never judged" in first
    both = lineage(project, "1", "--caption", text, "--caption", "nobody wrote this")
    assert f"\u201c{text}\u201d in pairs" in both
    assert "no caption table of this version has 'nobody wrote this'" in both and f"has '{text}'" not in both


def test_records_agree_until_something_is_changed_by_hand(project):
    assert "agree" in project.run("kedro", "verify")
    file = project.root / "data" / "06_models" / "med_pretraining" / "med.json"
    before = file.read_text()
    file.write_text(before + " ")
    with project.start("kedro", "verify") as process:
        said, _ = process.communicate()
    file.write_text(before)
    assert process.returncode == 1
    assert "receipt of med_pretraining_model" in said and "med.json is not what" in said
    assert "dvc.lock, med_pretraining: changed outs data/06_models/med_pretraining: modified" in said


def test_an_earlier_version_is_restored_with_nothing_left_to_do_and_the_same_figures(project, tmp_path):
    into = tmp_path / "restored"
    project.run("kedro", "restore", f"models:/{NAME}/1", "--into", str(into))
    assert yaml.safe_load((into / "conf" / "base" / "parameters_med_pretraining.yml").read_text()) != yaml.safe_load(
        (project.root / "conf" / "base" / "parameters_med_pretraining.yml").read_text()
    )
    restored = object.__new__(Project)
    restored.root = into
    assert "up to date" in restored.run("dvc", "status")
    assert "Running" not in restored.run("dvc", "repro")
    figures = into / "data" / "08_reporting" / "evaluation.json"
    assert read_json(figures) == project.figures["1"]
    restored.run("kedro", "run", "--pipelines", "evaluation", "--params", "evaluation.launch.force=true")
    assert read_json(figures) == project.figures["1"]
    log = subprocess.run(["git", "log", "--oneline"], cwd=into, capture_output=True, text=True, check=True).stdout
    assert "All" in log


def test_a_restore_into_a_folder_that_is_not_empty_is_refused(project, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with project.start("kedro", "restore", f"models:/{NAME}/1", "--into", str(tmp_path)) as process:
        said, _ = process.communicate()
    assert process.returncode == 1 and "not empty; restore into a new folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unknown_model_is_refused_with_those_that_there_are(project):
    with project.start("kedro", "lineage", "models:/blip-captoner@champion") as process:
        said, _ = process.communicate()
    assert process.returncode == 1 and "models:/blip-captioner@champion" in said and "Traceback" not in said
