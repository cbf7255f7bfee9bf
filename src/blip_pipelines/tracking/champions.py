"""Which version of a model is its champion, and the record of every decision about that.

In MLflow: the alias `champion`; on the registered model the tag `champions`, versions in the order of their promotion;
on a version the tags `gate`, what was decided and why, and `withdrawn`, why it was rolled back. The whole decision
with its rulings is the artifact `gate/<name>.json` of the run that made it.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip_pipelines.data.storage import write_json
from blip_pipelines.tracking.registry import RegistryError
from blip_pipelines.tracking.runs import Run, Store

CHAMPION = "champion"
HISTORY = "champions"
TAG_CHARACTERS = 4000


def champion(store: Store, name: str) -> Any | None:
    """The champion's version as MLflow describes it; None where there is none yet."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException:
        return None


def decide(run: Run, name: str, version: str, rulings: list[dict[str, Any]], refused: str) -> dict[str, Any]:
    """Record a decision in `run`, and promote the version unless it is refused.

    Args:
        rulings: rule, kept, found, of each rule.
        refused: the broken rules in a line; "" promotes.

    Returns:
        The decision: name, version, champion (the version before), promoted, refused, rulings.
    """
    store = run.store
    before = champion(store, name)
    decision = {
        "name": name,
        "version": version,
        "champion": str(before.version) if before else None,
        "promoted": not refused,
        "refused": refused,
        "rulings": rulings,
    }
    if not refused:
        _crown(store, name, version, [*history(store, name), version])
    said = f"refused: {refused}" if refused else f"promoted over {decision['champion'] or 'nothing'}"
    store.client.set_model_version_tag(name, version, "gate", said[:TAG_CHARACTERS])
    _log(run, name, decision)
    return decision


def roll_back(store: Store, name: str, because: str) -> tuple[str, str]:
    """Make the champion before this one champion again; returns the versions (withdrawn, restored).

    The withdrawn version is not promoted again by the gate.

    Raises:
        RegistryError: the name is unknown, or there is no champion, or none before it.
    """
    versions = history(store, name)
    if len(versions) < 2:
        names = sorted(model.name for model in store.client.search_registered_models())
        if name not in names:
            raise RegistryError(f"{name}: no such model; there are {', '.join(names) or 'none yet'}")
        known = f"only version {versions[0]} has been one" if versions else "none has been promoted"
        raise RegistryError(f"{name}: no champion to go back to, {known}")
    *earlier, withdrawn = versions
    _crown(store, name, earlier[-1], earlier)
    store.client.set_model_version_tag(name, withdrawn, "withdrawn", because[:TAG_CHARACTERS])
    store.client.set_model_version_tag(name, withdrawn, "gate", f"rolled back: {because}"[:TAG_CHARACTERS])
    run = store.start(f"roll back {name}")
    _log(run, name, {"name": name, "version": earlier[-1], "champion": withdrawn, "rolled_back": because})
    run.finish()
    return withdrawn, earlier[-1]


def history(store: Store, name: str) -> list[str]:
    """Versions that are or were champion, in the order of their promotion, less those rolled back.

    The last one is the champion, also where a person has moved the alias in MLflow's own page.
    """
    from mlflow.exceptions import MlflowException

    try:
        tags: Mapping[str, str] = store.client.get_registered_model(name).tags
    except MlflowException:
        return []
    versions, now = list(json.loads(tags.get(HISTORY, "[]"))), champion(store, name)
    return versions if now is None or versions[-1:] == [str(now.version)] else [*versions, str(now.version)]


def _crown(store: Store, name: str, version: str, versions: list[str]) -> None:
    store.client.set_registered_model_alias(name, CHAMPION, version)
    store.client.set_registered_model_tag(name, HISTORY, json.dumps(versions))


def _log(run: Run, name: str, decision: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.json"
        write_json(file, decision)
        run.log_file(file, "gate")
