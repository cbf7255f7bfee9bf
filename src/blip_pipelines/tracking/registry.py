"""The model registry: served models with signature and example, traceable to what made them.

    tags of a version   what it was made from; `run`, which has its scores, lineage and the gate's decision as artifacts

A version carries the content hashes of the model folder and of the pairs, the fingerprint and the code hash of the
job. A model folder that is registered already is not registered again; the alias moves to its version.
"""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip_pipelines.tracking import runs


class RegistryError(RuntimeError):
    """A registration that cannot be made; the message says what is missing."""


def register_served(
    name: str,
    served: Any,
    model: Path,
    alias: str,
    made_from: Mapping[str, str],
    metrics: Mapping[str, float],
    files: Mapping[str, Path] | None = None,
    card: str = "",
) -> dict[str, Any]:
    """Register a model folder under `name` with the code that serves it, and point `alias` at that version.

    Args:
        served: an `inference.served.Served`: code, signature, example, requirements.
        made_from: content hashes and the like; tags of the version. Versions of equal "model" are one.
        metrics: flat measures; on the version's page and in its description.
        card: README.md of the folder, for people.
        files: kept as artifacts `<folder>/<file>` of the run, by folder; the version's tag `run` leads to them.

    Returns:
        A row of the report: name, version, alias, stage; and the run.

    Raises:
        RegistryError: there is no MLflow run to register under.
    """
    run = runs.current()
    if run is None:
        raise RegistryError(f"{name}: registering needs an MLflow run; use `kedro run --pipelines release`")
    client = run.store.client
    version = _find(client, name, made_from["model"]) or _log(run, name, served, model, made_from, card)
    for folder, path in (files or {}).items():
        run.log_file(path, folder)
    for key, value in {**made_from, "run": run.id}.items():
        client.set_model_version_tag(name, version, key, value)
    client.update_model_version(name, version, _description(made_from, metrics))
    client.set_registered_model_alias(name, alias, version)
    return {"name": name, "version": version, "alias": alias, "stage": made_from["stage"], "run": run.id}


def load(store: runs.Store, name: str, version: str) -> Any:
    """The served model, loaded as a server does: an MLflow `PyFuncModel`."""
    import mlflow
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR

    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    mlflow.set_tracking_uri(store.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mlflow.pyfunc.load_model(f"models:/{name}/{version}")


def folder_of(store: runs.Store, version: Any) -> Path:
    """The folder in which MLflow keeps a version, on this machine; fetched where the store is a server."""
    import mlflow

    mlflow.set_tracking_uri(store.uri)
    return Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}"))


def open_model(folder: Path) -> tuple[Any, list[str], list[str]]:
    """The served model of such a folder, and the names of its input and output columns."""
    import mlflow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mlflow.pyfunc.load_model(str(folder))
    schema = model.metadata.signature
    return model.unwrap_python_model(), schema.inputs.input_names(), schema.outputs.input_names()


def exported(model: Any) -> Path:
    """The exported folder that a loaded model was made of."""
    return Path(model.unwrap_python_model().folder)


def find(store: runs.Store, uri: str) -> Any:
    """The model version behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`, as MLflow describes it.

    Raises:
        RegistryError: there is none; the message says which there are.
    """
    from mlflow.exceptions import MlflowException

    name, at, alias = uri.removeprefix("models:/").partition("@")
    name, _, version = (name, "", "") if at else name.partition("/")
    try:
        if at:
            return store.client.get_model_version_by_alias(name, alias)
        return store.client.get_model_version(name, version)
    except MlflowException as error:
        known = [
            f"models:/{model.name}@{known}"
            for model in store.client.search_registered_models()
            for known in sorted(model.aliases)
        ]
        listed = ", ".join(known) or "none; `kedro run` registers some"
        raise RegistryError(f"{uri}: no such model; there are {listed}") from error


def artifact(store: runs.Store, version: Any, path: str, into: Path) -> Path | None:
    """A file or folder that was kept with a version, copied into a folder; None where there is none."""
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
    from mlflow.exceptions import MlflowException

    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    run = version.tags.get("run")
    try:
        return Path(store.client.download_artifacts(run, path, str(into))) if run else None
    except (MlflowException, OSError):
        return None


def _find(client: Any, name: str, content: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        versions = client.search_model_versions(f"name = '{name}'")
    except MlflowException:
        return None
    for version in versions:
        if version.tags.get("model") == content:
            return str(version.version)
    return None


def _log(run: runs.Run, name: str, served: Any, model: Path, made_from: Mapping[str, str], card: str) -> str:
    import mlflow
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR

    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    mlflow.set_tracking_uri(run.store.uri)
    with warnings.catch_warnings(), _without_checkpoint(model, card) as exports, mlflow.start_run(run_id=run.id):
        warnings.simplefilter("ignore")  # MLflow's own, about type hints and integer columns
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logged = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(served.code),
            artifacts={"model": str(exports)},
            signature=served.signature(),
            input_example=served.example(),
            pip_requirements=served.requirements(),
            registered_model_name=name,
            metadata=dict(made_from),
        )
    return str(logged.registered_model_version)


@contextmanager
def _without_checkpoint(model: Path, card: str) -> Iterator[Path]:
    """The folder less what only training reads, which is most of it, and with its card."""
    with tempfile.TemporaryDirectory() as folder:
        exports = Path(folder) / "model"
        shutil.copytree(model, exports, ignore=shutil.ignore_patterns("checkpoint", "history.json", "receipt.json"))
        if card:
            (exports / "README.md").write_text(card, "utf-8")
        yield exports


def _description(made_from: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    """What a person reads on the version's page."""
    lines = [f"- {key}: `{value}`" for key, value in made_from.items()]
    measured = [f"- {key}: {value:.4g}" for key, value in sorted(metrics.items())]
    return "\n".join(["Made from", *lines, "", "Measured on the test halves", *measured])
