import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blip_pipelines.tracking import runs
from blip_pipelines.tracking.runs import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Store(tmp_path_factory.mktemp("mlruns"), "tests")


def steps(store, run, name):
    return [metric.step for metric in store.client.get_metric_history(run.id, name)]


def test_everything_of_the_store_lies_in_its_folder(store, tmp_path):
    run = store.start("run")
    (tmp_path / "page.html").write_text("<p>")
    run.log_file(tmp_path / "page.html")
    folder = Path(store.uri.removeprefix("sqlite:///")).parent
    assert Path(store.client.get_run(run.id).info.artifact_uri).is_relative_to(folder / "artifacts")
    assert [file.path for file in store.client.list_artifacts(run.id)] == ["page.html"]


def test_processes_that_start_at_once_in_a_fresh_project_wait_while_one_creates_the_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code = """
import sys
from pathlib import Path
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from blip_pipelines.tracking.runs import Store
print("ready", flush=True)
sys.stdin.readline()
store = Store(Path(sys.argv[1]), "tests")
print(store.start("run").id)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "mlruns")]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 3
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    store = Store(tmp_path / "mlruns", "tests")
    assert {run.info.run_id for run in store.client.search_runs([store.experiment])} == {out.strip() for out, _ in said}


def test_child_names_its_parent(store):
    parent = store.start("kedro run")
    child = store.start("ingestion", parent)
    assert store.client.get_run(child.id).data.tags["mlflow.parentRunId"] == parent.id


def test_each_step_is_logged_once_however_often_rows_come(store):
    run = store.start("run")
    run.log_history([{"step": step, "loss": 1 / step} for step in range(1, 2001)])  # more than one call takes
    run.log_history([{"step": step, "loss": 1 / step} for step in range(1990, 2011)])
    assert sorted(steps(store, run, "loss")) == list(range(1, 2011))


def test_a_value_that_is_not_finite_is_no_reason_to_fail(store):
    run = store.start("run")
    run.log_history([{"step": 1, "loss": math.nan, "itm": 1.0}, {"step": 2, "loss": math.inf, "itm": 2.0}])
    run.log_metrics({"a": math.nan, "b": {"c": 2, "d": "text", "e": True}})
    assert steps(store, run, "itm") == [1, 2]
    assert store.client.get_run(run.id).data.metrics["b.c"] == 2


def test_parameters_are_flat_and_long_values_cut(store):
    run = store.start("run")
    run.log_parameters({"model": {"width": 192, "words": "x" * 900}, "sizes": [1, 2]})
    logged = store.client.get_run(run.id).data.params
    assert logged["model.width"] == "192" and logged["sizes"] == "[1, 2]" and len(logged["model.words"]) == 500


def test_data_set_input_carries_the_whole_hash(store, tmp_path):
    run, digest = store.start("run"), "0123456789abcdef" * 4
    run.log_input("pairs", digest, tmp_path)
    run.log_input("pairs", digest, tmp_path)
    (found,) = store.client.get_run(run.id).inputs.dataset_inputs
    assert found.dataset.name == "pairs" and json.loads(found.dataset.profile)["sha256"] == digest


def test_run_of_a_process_that_is_gone_is_marked_killed_and_no_other(store):
    mine = store.start("mine")
    gone = store.start("gone", tags={"process": f"{socket.gethostname()}:{2**22 + 1}"})  # above the largest process id
    elsewhere = store.start("elsewhere", tags={"process": "another-host:1"})
    assert store.end_abandoned() == 1
    status = {run: store.client.get_run(run.id).info.status for run in (mine, gone, elsewhere)}
    assert status == {mine: "RUNNING", gone: "KILLED", elsewhere: "RUNNING"}


def test_outside_a_kedro_run_nothing_is_tracked():
    assert runs.current() is None
    runs.log_history([{"step": 1, "loss": 1.0}])
