"""What happens around a `kedro run`: parameters checked before, runs tracked during, outputs recorded after.

Light at import: MLflow, DVC and the stages' configurations (some of which import torch) are read only when a
pipeline is about to run, so that `kedro --help` and `kedro viz` stay fast.
"""

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from blip_pipelines.config import arithmetic
from blip_pipelines.pipelines import parameters
from blip_pipelines.pipelines.rounds import check_rounds, first_round

log = logging.getLogger(__name__)


def stage_of(node: Node) -> str:
    """The stage that a node belongs to: each node carries its name as a tag."""
    return next((tag for tag in sorted(node.tags) if first_round(tag) in parameters.STAGES), node.name)


class CheckParameters:
    """Refuse a parameter that nothing reads, before anything runs."""

    @hook_impl
    def after_context_created(self, context: Any) -> None:
        sys.excepthook = print_error
        values = context.config_loader["parameters"]
        parameters.check_stages(values)
        check_rounds(values, Path(context.project_path))

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        values = catalog.load("parameters")
        for stage in dict.fromkeys(stage_of(node) for node in pipeline.nodes):
            parameters.read_stage(stage, values)


class StageTaken(RuntimeError):
    """Another run is at the same stage of the same data folder; the message says which."""


class HoldStages:
    """Two runs must not write the outputs of one stage at once: the second is refused."""

    def __init__(self) -> None:
        self._held: list[int] = []

    @hook_impl
    def after_context_created(self, context: Any) -> None:
        self._let_go()  # of a run in this process that no hook has seen the end of
        self._folder = Path(context.project_path) / context.config_loader["globals"]["data"]

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        from blip_pipelines.jobs.claim import attempt

        for stage in sorted({stage_of(node) for node in pipeline.nodes}):
            found = attempt(self._folder / ".work" / "stages" / f"{stage}.lock")
            if isinstance(found, str):
                self._let_go()
                raise StageTaken(f"{stage}: process {found} is at this stage in {self._folder}; wait for it or stop it")
            self._held.append(found)

    @hook_impl(trylast=True)  # after what was made is recorded
    def after_pipeline_run(self) -> None:
        self._let_go()

    @hook_impl(trylast=True)
    def on_pipeline_error(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        while self._held:
            os.close(self._held.pop())


def print_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Show an uncaught error: ours, which say what to do, by their message alone; any other with its traceback."""
    if kind.__module__.partition(".")[0] in ("blip_pipelines", "kedro"):
        sys.stderr.write(f"\n{kind.__name__}: {error}\n")
    else:
        sys.__excepthook__(kind, error, trace)


class TrackRuns:
    """One MLflow run for the `kedro run`, a child for each stage; nodes log to the child that is current.

    Stages may take turns, since Kedro sorts by what depends on what; a child ends when its last output was saved.
    """

    def __init__(self) -> None:
        self._parent: Any = None
        self._children: dict[str, Any] = {}

    @hook_impl
    def after_context_created(self, context: Any) -> None:
        self._context = context

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        from blip_pipelines.tracking.runs import Store

        root = self._context.project_path
        self._catalog, self._tracking = catalog, self._context.config_loader["tracking"]
        self._store = Store(root / self._tracking["folder"], self._tracking["experiment"])
        if ended := self._store.end_abandoned():
            log.info("MLflow: marked %d runs KILLED whose process is gone", ended)
        self._children = {}
        self._nodes_left = Counter(stage_of(node) for node in pipeline.nodes)
        self._last_saved: dict[str, float] = {}
        self._parent = self._store.start(
            ", ".join(run_params["pipeline_names"] or ["all stages"]),
            tags={
                "env": run_params["env"] or "base",
                "kedro_run": run_params["run_id"],
                "mlflow.source.git.commit": _git_commit(root),
            },
        )
        self._parent.log_parameters(run_params["runtime_params"])
        log.info("MLflow: run %s in %s", self._parent.id, self._store.uri)
        atexit.register(self._finish, "KILLED")  # Ctrl-C reaches no hook of Kedro
        in_order = "SequentialRunner" in str(run_params.get("runner"))  # others have jobs in threads, which would go on
        is_main = threading.current_thread() is threading.main_thread()
        if in_order and is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # for this to run at exit as well

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        from blip_pipelines.data.storage import content_hash
        from blip_pipelines.tracking import runs

        stage = stage_of(node)
        log.info("%s: %s", stage, node.name)
        if stage not in self._children:
            child = self._children[stage] = self._store.start(stage, self._parent)
            child.log_parameters(self._catalog.load("parameters").get(first_round(stage), {}))
            child.monitor(self._tracking["system_metrics_seconds"])
        runs.enter(self._children[stage])
        for name in node.inputs:
            path = getattr(self._catalog.get(name), "path", None)
            if path is not None and path.exists():
                self._children[stage].log_input(name, content_hash(path), path)

    @hook_impl
    def after_node_run(self, node: Node, outputs: dict[str, Any]) -> None:
        child = self._children[stage_of(node)]
        self._nodes_left[stage_of(node)] -= 1
        for name, value in outputs.items():
            if hasattr(value, "fingerprint"):  # a receipt
                child.set_tag(f"{name}.fingerprint", value.fingerprint)
                child.set_tag(f"{name}.code", value.code)
                child.set_tag(f"{name}.reused", str(value.reused).lower())

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        child = self._children[stage_of(node)]
        dataset: Any = self._catalog.get(dataset_name)
        self._last_saved[stage_of(node)] = time.time()
        wanted = (getattr(dataset, "metadata", None) or {}).get("mlflow")
        if wanted == "artifact":
            child.log_file(dataset.path)
        elif wanted == "metrics":
            child.log_metrics(dataset.load())

    @hook_impl
    def after_pipeline_run(self) -> None:
        if not self._children:
            log.info("no node ran: every output is there")
        self._finish("FINISHED")

    @hook_impl
    def on_pipeline_error(self, error: Exception) -> None:
        from blip_pipelines.jobs.torchrun import JobStopped

        if isinstance(error, JobStopped):
            self._finish("KILLED")
        else:
            self._finish("FAILED", error)

    def _finish(self, status: str, error: Exception | None = None) -> None:
        if self._parent is None:
            return
        from blip_pipelines.tracking import runs

        failing = runs.current() if error else None
        for stage, child in self._children.items():
            if failing and child is failing:
                child.set_tag("error", f"{type(error).__name__}: {error}")
                child.finish("FAILED")
            elif not self._nodes_left[stage]:
                child.finish("FINISHED", self._last_saved.get(stage))
            else:
                child.finish("KILLED")
        if error:
            self._parent.set_tag("error", f"{type(error).__name__}: {error}")
        self._parent.finish(status)
        runs.enter(None)
        self._parent = None
        atexit.unregister(self._finish)


class RecordOutputs:
    """Record in `dvc.lock` what a `kedro run` made, so that `dvc status` is clean; or say why it is not recorded."""

    @hook_impl
    def after_context_created(self, context: Any) -> None:
        self._context = context

    @hook_impl
    def before_pipeline_run(self) -> None:
        self._nodes_ran: set[str] = set()
        self._code = _source_hash()

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        self._nodes_ran.add(node.name)

    @hook_impl
    def after_pipeline_run(self, run_params: dict[str, Any], catalog: DataCatalog) -> None:
        stages = [
            stage
            for stage in pipelines
            if stage != "__default__" and {node.name for node in pipelines[stage].nodes} <= self._nodes_ran
        ]
        if not stages:
            return
        tracking = self._context.config_loader["tracking"]
        why_not = self._why_not(stages, run_params["env"], catalog.load("parameters"))
        if not why_not:
            from blip_pipelines.tracking.dvc import record

            why_not = record(self._context.project_path, stages, tracking["keep_inputs_bytes"])
        if why_not:
            log.info("DVC: not recorded: %s", why_not)
        else:
            log.info("DVC: recorded %s in dvc.lock", ", ".join(stages))
        if "release" in stages:
            self._keep_lineage(run_params["env"] or "base", catalog, None if "DVC_STAGE" in os.environ else why_not)

    def _keep_lineage(self, env: str, catalog: DataCatalog, not_in_dvc: str | None) -> None:
        """Of the models that this run released, in the run that registered them; here, as `dvc.lock` is done now."""
        from blip_pipelines.pipelines.snapshot import snapshot
        from blip_pipelines.pipelines.stories import draw
        from blip_pipelines.tracking import lineage
        from blip_pipelines.tracking.runs import Run, Store

        root, tracking = self._context.project_path, self._context.config_loader["tracking"]
        each = {name: pipeline for name, pipeline in pipelines.items() if name != "__default__"}
        store = Store(root / tracking["folder"], tracking["experiment"])
        found = snapshot(root, each, catalog, catalog.load("parameters"))
        models = catalog.load("registered")["models"]
        for run in {model["run"] for model in models}:
            lineage.keep(root, Run(store, run), found, env, not_in_dvc)
        registered: Any = catalog.get("registered")
        draw(store, models, registered.path.with_name("lineage"))

    def _why_not(self, stages: list[str], env: str | None, values: dict[str, Any]) -> str | None:
        root = self._context.project_path
        if "DVC_STAGE" in os.environ:
            return "DVC started this run and records it by itself"
        if env not in (None, "base", "local"):
            return f"dvc.yaml describes conf/base, this was --env {env}"
        if Path(self._context.config_loader.conf_source).resolve() != root / "conf":
            return "the configuration is not this project's conf/"
        if not (root / ".dvc").is_dir():
            return f"no DVC project in {root} (dvc init)"
        tracked = OmegaConfigLoader(str(root / "conf"), base_env="base", default_run_env="base")["parameters"]
        for stage in stages:
            found, wanted = (arithmetic(parameters.read_stage(stage, source).config) for source in (values, tracked))
            if found != wanted:
                return f"the parameters of {stage} are not those of conf/base"
        if _source_hash() != self._code:
            return "the code changed while it ran"
        return None


def _source_hash() -> str:
    """One hash of the package's source, to notice an edit during a run."""
    from blip_pipelines.jobs.closure import code_hash

    return code_hash(sorted(Path(__file__).parent.rglob("*.py")))


def _git_commit(root: Path) -> str:
    """The commit, with a + where tracked files differ from it; "" outside a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty=+"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()
