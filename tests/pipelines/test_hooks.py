import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kedro.framework.hooks import hook_impl
from kedro.framework.hooks.manager import _create_hook_manager, _register_hooks
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline
from kedro.runner import SequentialRunner

from blip_pipelines import hooks
from blip_pipelines.config import ConfigError
from blip_pipelines.jobs.torchrun import JobStopped
from blip_pipelines.pipelines.datasets import Json
from blip_pipelines.tracking import runs
from blip_pipelines.tracking.runs import Store

ROOT = Path(__file__).parents[2]


def two_stages(fail: bool = False) -> Pipeline:
    """A stage that logs a curve, and one that reads what it left and may fail."""

    def train(parameters):
        runs.log_history([{"step": step, "loss": 1 / step} for step in range(1, 6)])
        runs.log_history([{"step": step, "loss": 1 / step} for step in range(4, 9)])  # as after a restart
        return {"r5": 0.5}

    def measure(metrics):
        if fail:
            raise RuntimeError("no such subset")
        return 1

    return Pipeline(
        [
            Node(train, "params:med_pretraining", "metrics", name="train", tags="med_pretraining"),
            Node(measure, "metrics", "done", name="measure", tags="evaluation"),
        ]
    )


@pytest.fixture(scope="module")
def mlruns(tmp_path_factory):
    return tmp_path_factory.mktemp("mlruns")


@pytest.fixture
def run(tmp_path, mlruns, monkeypatch, request):
    """Runs a pipeline under the tracking hook, as a Kedro session does; gives the runs by name."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = {"folder": str(mlruns), "experiment": request.node.name, "system_metrics_seconds": 60}

    def run_pipeline(pipeline: Pipeline) -> tuple[Store, dict]:
        parameters = {"med_pretraining": {"training": {"steps": 8}}}
        catalog = DataCatalog(
            {
                "metrics": Json(str(tmp_path / "metrics.json"), metadata={"mlflow": "metrics"}),
                "done": MemoryDataset(),
                "parameters": MemoryDataset(parameters),
                "params:med_pretraining": MemoryDataset(parameters["med_pretraining"]),
            }
        )
        manager = _create_hook_manager()
        _register_hooks(manager, (hooks.TrackRuns(),))
        call = manager.hook
        call.after_context_created(context=SimpleNamespace(project_path=tmp_path, config_loader={"tracking": tracking}))
        described = {"run_id": "now", "env": None, "pipeline_names": None, "runtime_params": {"a": {"b": 1}}}
        about = {"run_params": described, "pipeline": pipeline, "catalog": catalog}
        call.before_pipeline_run(**about)
        try:
            result = SequentialRunner().run(pipeline, catalog, manager)
            call.after_pipeline_run(run_result=result, **about)
        except RuntimeError as error:
            call.on_pipeline_error(error=error, **about)
        store = Store(mlruns, request.node.name)
        return store, {run.info.run_name: run for run in store.client.search_runs([store.experiment])}

    return run_pipeline


def test_one_run_with_a_child_for_each_stage(run):
    store, found = run(two_stages())
    parent, train, measure = found["all stages"], found["med_pretraining"], found["evaluation"]
    assert {child.data.tags["mlflow.parentRunId"] for child in (train, measure)} == {parent.info.run_id}
    assert {found_run.info.status for found_run in found.values()} == {"FINISHED"}
    assert train.data.params == {"training.steps": "8"} and parent.data.params == {"a.b": "1"}
    assert train.data.metrics["r5"] == 0.5
    (read,) = measure.inputs.dataset_inputs
    assert read.dataset.name == "metrics"
    logged = [metric.step for metric in store.client.get_metric_history(train.info.run_id, "loss")]
    assert sorted(logged) == list(range(1, 9))
    assert runs.current() is None


def test_failed_stage_and_run_end_failed_with_the_error(run):
    _, found = run(two_stages(fail=True))
    status = {name: found_run.info.status for name, found_run in found.items()}
    assert status == {"all stages": "FAILED", "med_pretraining": "FINISHED", "evaluation": "FAILED"}
    assert found["evaluation"].data.tags["error"] == "RuntimeError: no such subset"
    assert found["all stages"].data.tags["error"] == "RuntimeError: no such subset"


def test_every_node_names_its_stage():
    from blip_pipelines.pipeline_registry import register_pipelines

    for name, pipeline in register_pipelines().items():
        if name != "__default__":
            assert {hooks.stage_of(node) for node in pipeline.nodes} == {name}


def test_unknown_block_is_refused_with_the_nearest_name():
    context = SimpleNamespace(config_loader={"parameters": {"med_pretrainning": {}}})
    with pytest.raises(ConfigError, match=r"med_pretrainning: unknown block .* did you mean 'med_pretraining'"):
        hooks.CheckParameters().after_context_created(context)


def test_unknown_key_of_a_stage_that_runs_is_refused_before_it_runs():
    catalog = DataCatalog({"parameters": MemoryDataset({"release": {"alas": "champion"}})})
    pipeline = Pipeline([Node(lambda: 1, None, "x", name="register", tags="release")])
    with pytest.raises(ConfigError, match=r"release.alas: unknown parameter; did you mean 'alias'"):
        hooks.CheckParameters().before_pipeline_run(pipeline=pipeline, catalog=catalog)


@pytest.mark.parametrize(
    ("env", "alias", "started_by_dvc", "reason"),
    [
        ("smoke", "candidate", False, "dvc.yaml describes conf/base, this was --env smoke"),
        (None, "champion", False, "the parameters of release are not those of conf/base"),
        (None, "candidate", True, "DVC started this run"),
        (None, "candidate", False, None),
    ],
)
def test_a_run_that_dvc_yaml_does_not_describe_is_not_recorded(monkeypatch, env, alias, started_by_dvc, reason):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    if started_by_dvc:
        monkeypatch.setenv("DVC_STAGE", "release")
    hook = hooks.RecordOutputs()
    hook.after_context_created(
        SimpleNamespace(project_path=ROOT, config_loader=SimpleNamespace(conf_source=ROOT / "conf"))
    )
    hook.before_pipeline_run()
    tracked = yaml.safe_load((ROOT / "conf" / "base" / "parameters_release.yml").read_text("utf-8"))["release"]
    found = hook._why_not(["release"], env, {"release": {**tracked, "alias": alias}})
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(("kind", "shown"), [(ConfigError, "\nConfigError: what to do\n"), (KeyError, "Traceback")])
def test_our_errors_are_shown_without_a_traceback_others_with(kind, shown, capsys):
    try:
        raise kind("what to do")
    except kind as error:
        hooks.print_error(kind, error, error.__traceback__)
    assert capsys.readouterr().err.startswith(shown)


def test_kedro_starts_without_the_heavy_libraries():
    code = (
        "import sys; from kedro.framework.startup import bootstrap_project; from pathlib import Path;"
        f"bootstrap_project(Path({str(ROOT)!r}));"
        "from kedro.framework.project import pipelines; assert len(pipelines) > 4;"
        "from blip_pipelines import settings;"
        "heavy = {'torch', 'mlflow', 'transformers', 'great_expectations', 'dvc', 'pyarrow', 'pandas'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def hold(root: Path, data: str, pipeline: Pipeline) -> hooks.HoldStages:
    found = hooks.HoldStages()
    found.after_context_created(SimpleNamespace(project_path=root, config_loader={"globals": {"data": data}}))
    found.before_pipeline_run(pipeline)
    return found


def test_two_runs_at_one_stage_of_a_data_folder_are_kept_apart(tmp_path):

    first = hold(tmp_path, "data", two_stages())
    with pytest.raises(hooks.StageTaken, match=rf"evaluation: process \d+ is at this stage in {tmp_path / 'data'}"):
        hold(tmp_path, "data", two_stages().only_nodes("measure"))
    hold(tmp_path, "data/ablations/noise/0", two_stages()).after_pipeline_run()
    first.on_pipeline_error()
    again = hold(tmp_path, "data", two_stages().only_nodes("measure"))
    hold(tmp_path, "data", two_stages().only_nodes("train")).after_pipeline_run()  # another stage
    again.after_pipeline_run()


def test_stages_are_held_until_what_they_made_is_recorded(tmp_path):
    """By the order in which a session calls hooks."""

    class Recorder:
        @hook_impl
        def after_pipeline_run(self) -> None:
            with pytest.raises(hooks.StageTaken):
                hold(tmp_path, "data", two_stages())

    manager = _create_hook_manager()
    _register_hooks(manager, (Recorder(), held := hooks.HoldStages()))
    held.after_context_created(SimpleNamespace(project_path=tmp_path, config_loader={"globals": {"data": "data"}}))
    about = {"run_params": {}, "pipeline": two_stages(), "catalog": DataCatalog()}
    manager.hook.before_pipeline_run(**about)
    manager.hook.after_pipeline_run(run_result={}, **about)
    hold(tmp_path, "data", two_stages()).after_pipeline_run()


def test_a_run_that_was_interrupted_holds_nothing_when_the_next_one_starts(tmp_path):
    """In a notebook: Ctrl-C reaches no hook."""
    interrupted = hold(tmp_path, "data", two_stages())
    context = SimpleNamespace(project_path=tmp_path, config_loader={"globals": {"data": "data"}})
    interrupted.after_context_created(context)
    interrupted.before_pipeline_run(two_stages())
    interrupted.after_pipeline_run()


def test_a_job_that_was_told_to_stop_is_no_failure(run):
    def stopped(parameters):
        raise JobStopped("SIGTERM: the job saves and stops")

    _, found = run(Pipeline([Node(stopped, "params:med_pretraining", "metrics", name="t", tags="med_pretraining")]))
    assert {each.info.status for each in found.values()} == {"KILLED"}


@pytest.mark.slow
def test_sigterm_marks_the_run_killed(tmp_path):
    """As Ctrl-C does, also where no job is in hand that would save."""
    code = (
        "import signal, sys, time\nfrom pathlib import Path\nfrom types import SimpleNamespace as Of\n"
        "from kedro.io import DataCatalog\nfrom kedro.pipeline import Pipeline\n"
        "from blip_pipelines.hooks import TrackRuns\nhook = TrackRuns()\n"
        f"tracking = {{'folder': {str(tmp_path)!r}, 'experiment': 'stopped', 'system_metrics_seconds': 60}}\n"
        f"root = Path({str(tmp_path)!r})\n"
        "hook.after_context_created(Of(project_path=root, config_loader={'tracking': tracking}))\n"
        "about = {'run_id': 'now', 'env': None, 'pipeline_names': None, 'runtime_params': {}}\n"
        "about['runner'] = 'SequentialRunner'\n"
        "hook.before_pipeline_run(about, Pipeline([]), DataCatalog())\nprint('begun', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and "begun\n" in iter(process.stdout.readline, "")
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    store = Store(tmp_path, "stopped")
    (found,) = store.client.search_runs([store.experiment])
    assert found.info.status == "KILLED"
