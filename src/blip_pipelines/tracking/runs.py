"""MLflow runs: one for each `kedro run`, a child for each stage.

Every call names its run id; nothing uses MLflow's global active run, so that a second process, a thread or a test
cannot write into the wrong one. The store is a SQLite file with the artifacts beside it, or the server that
`MLFLOW_TRACKING_URI` names.
"""

import json
import logging
import os
import socket
import time
import warnings
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from blip_pipelines.data.storage import locked
from blip_pipelines.tracking.moved import follow

ROWS_PER_CALL = 900  # MLflow takes at most 1000 metrics in one call
VALUE_CHARACTERS = 500  # what a parameter may hold in every MLflow store


class Store:
    """Where runs are kept: one experiment of one tracking server or folder.

    Args:
        folder: holds `mlflow.db` and `artifacts/`; made if missing, unused with a tracking server.
        experiment: its name; made if missing.
    """

    def __init__(self, folder: Path, experiment: str):
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        if not self.uri.startswith("sqlite:///"):
            self._open(experiment, None)
            return
        database = Path(self.uri.removeprefix("sqlite:///")).resolve()
        with locked(database.with_name(f".{database.name}.lock")):  # MLflow lets two processes create it at once, badly
            follow(database)
            self._open(experiment, (database.parent / "artifacts").as_posix())

    def _open(self, experiment: str, artifacts: str | None) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(self.uri)  # creates the tables of a new file
        found = self.client.get_experiment_by_name(experiment)
        self.experiment = found.experiment_id if found else self.client.create_experiment(experiment, artifacts)

    def start(self, name: str, parent: "Run | None" = None, tags: Mapping[str, str] | None = None) -> "Run":
        """A new run, RUNNING until it is finished; a child where `parent` is given."""
        lineage = {"mlflow.parentRunId": parent.id} if parent else {}
        owner = {"process": f"{socket.gethostname()}:{os.getpid()}"}
        run = self.client.create_run(self.experiment, run_name=name, tags={**lineage, **owner, **(tags or {})})
        return Run(self, run.info.run_id)

    def end_abandoned(self) -> int:
        """Mark runs KILLED whose process on this machine is gone (kill -9, a reboot); returns how many."""
        import psutil

        ended = 0
        for run in self.client.search_runs([self.experiment], "attributes.status = 'RUNNING'", max_results=1000):
            host, _, process = run.data.tags.get("process", "").rpartition(":")
            if host == socket.gethostname() and not psutil.pid_exists(int(process)):
                self.client.set_terminated(run.info.run_id, "KILLED")
                ended += 1
        return ended


class Run:
    """One MLflow run, by id."""

    def __init__(self, store: Store, run_id: str):
        self.store, self.id = store, run_id
        self._last_step: dict[str, int] = {}
        self._monitor: Any = None

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Nested plain values, each under its dotted name."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:VALUE_CHARACTERS]) for key, value in _flatten(parameters)]
        for start in range(0, len(flat), 100):  # MLflow takes at most 100 parameters in one call
            self.store.client.log_batch(self.id, params=flat[start : start + 100])

    def log_history(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Metrics by step: rows {"step": n, name: value}. A step that this run already has is passed over."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = []
        for row in rows:
            step = int(row["step"])
            for name, value in row.items():
                if name == "step" or not isinstance(value, int | float) or step <= self._last_step.get(name, -1):
                    continue
                metrics.append(Metric(name, float(value), now, step))
                self._last_step[name] = step
        for start in range(0, len(metrics), ROWS_PER_CALL):
            self.store.client.log_batch(self.id, metrics=metrics[start : start + ROWS_PER_CALL])

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """The numbers among nested plain values, each under its dotted name."""
        numbers = {key: value for key, value in _flatten(values) if isinstance(value, int | float)}
        self.log_history([{"step": 0, **{key: value for key, value in numbers.items() if not isinstance(value, bool)}}])

    def log_input(self, name: str, digest: str, path: Path) -> None:
        """A data set that the run reads, by content hash: what joins runs into a lineage."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        described = Dataset(
            name=name,
            digest=digest[:36],  # the width of MLflow's column; the whole hash is in the profile
            source_type="local",
            source=json.dumps({"uri": path.as_posix()}),
            profile=json.dumps({"sha256": digest}),
        )
        self.store.client.log_inputs(self.id, [DatasetInput(described, [InputTag("mlflow.data.context", name)])])

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self.store.client.log_artifact(self.id, str(path), folder)

    def set_tag(self, key: str, value: str) -> None:
        self.store.client.set_tag(self.id, key, value[:5000])

    def monitor(self, seconds: float) -> None:
        """Sample processor, memory, disk, network and GPU use every `seconds` until the run is finished."""
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the GPU library, on machines without one
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self.id, sampling_interval=seconds, tracking_uri=self.store.uri)
        self._monitor.start()

    def finish(self, status: str = "FINISHED", end_seconds: float | None = None) -> None:
        """End the run; `end_seconds` since the epoch where it ended earlier than now."""
        if self._monitor:
            self._monitor.finish()
        self.store.client.set_terminated(self.id, status, int((end_seconds or time.time()) * 1000))


# The run of the stage whose node is running in this thread: nodes log without knowing Kedro's hooks.
_current: ContextVar[Run | None] = ContextVar("stage_run", default=None)


def enter(run: Run | None) -> None:
    _current.set(run)


def current() -> Run | None:
    """The stage's run; None outside `kedro run` (a test, a notebook), where nothing is tracked."""
    return _current.get()


def log_history(rows: Iterable[Mapping[str, float]]) -> None:
    """What nodes hand to `launch` as `on_history`: rows go to the stage's run, or nowhere."""
    if run := current():
        run.log_history(rows)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
