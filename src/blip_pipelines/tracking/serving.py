"""Registered models loaded for a server: MLflow's own scoring application of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from blip_pipelines.tracking import registry
from blip_pipelines.tracking.registry import RegistryError
from blip_pipelines.tracking.runs import Store

SECOND_BEST = "candidate"


@dataclass(frozen=True)
class Loaded:
    """A version, loaded.

    Args:
        alias: that it was found by; tags: of the version.
        inputs: the columns that it reads.
        model: MLflow's `PyFuncModel`; scoring: the ASGI application that `mlflow models serve` runs.
    """

    name: str
    version: str
    alias: str
    tags: dict[str, str]
    inputs: tuple[str, ...]
    model: Any
    scoring: Any


def load_served(store: Store, names: Sequence[str], alias: str) -> Iterator[Loaded]:
    """Each of the registered models, one after the other.

    Args:
        names: all if there is none.
        alias: of their versions; a model that has no such version is served by its candidate.

    Raises:
        RegistryError: a name is unknown, or nothing is registered.
    """
    from mlflow.pyfunc.scoring_server import init

    wanted = list(names) or sorted(model.name for model in store.client.search_registered_models())
    if not wanted:
        raise RegistryError("no model is registered; `make run` ends with some")
    for name in wanted:
        version, at = _find(store, name, alias)
        model = registry.load(store, name, str(version.version))
        inputs = tuple(model.metadata.get_input_schema().input_names())
        yield Loaded(name, str(version.version), at, dict(version.tags), inputs, model, init(model))


def _find(store: Store, name: str, alias: str) -> tuple[Any, str]:
    """The version with the alias, or the candidate where there is none; and the alias that it was found by."""
    try:
        return registry.find(store, f"models:/{name}@{alias}"), alias
    except RegistryError:
        return registry.find(store, f"models:/{name}@{SECOND_BEST}"), SECOND_BEST
