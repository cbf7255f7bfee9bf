"""A project folder that was moved or copied finds its runs and models, though MLflow writes down absolute paths."""

import logging
import sqlite3
from pathlib import Path

log = logging.getLogger(__name__)

PLACES = {  # table -> columns that hold the path of an artifact
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def follow(database: Path) -> bool:
    """Say in MLflow's SQLite file, if there is one yet, that artifacts lie beside it; True if they lay elsewhere."""
    artifacts = database.parent / "artifacts"
    if not database.exists():
        return False
    with sqlite3.connect(database, timeout=30) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not PLACES.keys() <= tables:
            return False
        suffix = f"/{artifacts.parent.name}/{artifacts.name}"
        known = {place for (place,) in connection.execute("SELECT artifact_location FROM experiments")}
        former = [place for place in known if place.endswith(suffix) and place != artifacts.as_posix()]
        for old in former:
            for table, columns in PLACES.items():
                for column in columns:
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                        f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (artifacts.as_posix(), len(old) + 1, old, len(old) + 1, f"{old}/"),
                    )
            log.info("MLflow: artifacts lay in %s, and are found in %s now", old, artifacts)
    connection.close()
    return bool(former)
