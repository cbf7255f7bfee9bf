"""`dvc.yaml`, written from the Kedro registry and catalog; and what a run made, recorded in `dvc.lock`.

    python -m blip_pipelines.tracking.dvc [--check]

A stage is a pipeline. It depends on the data that it reads, on its parameters but those that only change speed, and
on code: the import closure of its nodes, of the jobs that they launch and of the classes in its catalog entries. Code
that is left out of a hand-written list goes unnoticed; a closure cannot forget.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from blip_pipelines.tracking.data_versions import keep_inputs

log = logging.getLogger(__name__)

HEADER = "# Written from the Kedro pipelines and catalog by `make dvc-yaml`; a test holds them equal. Do not edit.\n"
WATCHERS = {"tracking/runs.py", "tracking/moved.py"}  # sends numbers to MLflow; no output depends on it


def render(root: Path) -> str:
    """The text of `dvc.yaml` for the project in `root`, environment `base`."""
    from kedro.config import OmegaConfigLoader
    from kedro.framework.project import pipelines
    from kedro.framework.startup import bootstrap_project

    bootstrap_project(root)
    config = OmegaConfigLoader(str(root / "conf"), base_env="base", default_run_env="base")
    values = config["parameters"]
    catalog = catalog_entries(config["catalog"], set().union(*(pipeline.datasets() for pipeline in pipelines.values())))
    stages = {name: each for name, each in pipelines.items() if name != "__default__"}
    document = {
        "stages": {name: _stage(name, stages[name], catalog, values) for name in stages},
        "plots": [plot for pipeline in stages.values() for entry in _made(pipeline, catalog) for plot in _plots(entry)],
    }
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=120)


def record(root: Path, stages: Iterable[str], keep_inputs_bytes: float = 0.0) -> str | None:
    """Write the stages' present inputs and outputs into `dvc.lock`; returns why that failed, or None.

    Args:
        keep_inputs_bytes: sources up to this size go into DVC's cache beside the outputs.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    path = root / "dvc.yaml"
    if not path.exists() or path.read_text("utf-8") != render(root):
        return "dvc.yaml is behind the pipelines (make dvc-yaml)"
    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        with Repo(str(root)) as repo:
            for stage in stages:
                repo.commit(f"{path}:{stage}", force=True)
            recorded = [stage for stage in repo.index.stages if getattr(stage, "name", None) in set(stages)]
            if left := keep_inputs(repo, recorded, keep_inputs_bytes):
                log.info(
                    "DVC: not kept in its cache, being over keep_inputs_bytes of tracking.yml: %s", ", ".join(left)
                )
    except (DvcException, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _stage(name: str, pipeline: Any, catalog: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    entries = [catalog[entry] for entry in sorted(pipeline.datasets()) if entry in catalog]
    needed = [catalog[entry] for entry in pipeline.inputs() if entry in catalog]
    read = {entry.get("filepath") for entry in needed if _options(entry).get("dependency", True)}
    outs = [entry for entry in _made(pipeline, catalog) if not _options(entry).get("metric")]
    metrics = [entry for entry in _made(pipeline, catalog) if _options(entry).get("metric")]
    return {
        "cmd": f"kedro run --pipelines {name}",
        "deps": [*sorted(read - {None}), "constraints.txt", *_code(pipeline, entries)],
        "params": [
            {f"conf/base/parameters_{block}.yml": keys} for block, keys in _parameter_keys(name, values).items()
        ],
        "outs": [_out(entry) for entry in outs],
        **({"metrics": [_out(entry) for entry in metrics]} if metrics else {}),
    }


def catalog_entries(catalog: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What the catalog says of the data sets that it knows, by name or by pattern."""
    from kedro.io import CatalogConfigResolver

    rest = {"{default}": {"type": "kedro.io.MemoryDataset"}}
    resolver = CatalogConfigResolver(dict(catalog), default_runtime_patterns=rest)
    known = [name for name in sorted(names) if name in catalog or resolver.match_dataset_pattern(name)]
    return {name: resolver.resolve_pattern(name) for name in known}


def _made(pipeline: Any, catalog: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The catalog's entries that the pipeline writes, by path."""
    entries = [catalog[entry] for entry in pipeline.all_outputs() if entry in catalog]
    return sorted(entries, key=lambda entry: entry["filepath"])


def _options(entry: Mapping[str, Any]) -> dict[str, Any]:
    return entry.get("metadata", {}).get("dvc", {})


def _out(entry: Mapping[str, Any]) -> Any:
    flags = {key: value for key, value in _options(entry).items() if key in ("cache", "persist")}
    return {entry["filepath"]: flags} if flags else entry["filepath"]


def _plots(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if plot := _options(entry).get("plot"):
        yield {plot["title"]: {"title": plot["title"], "x": plot["x"], "y": {entry["filepath"]: plot["y"]}}}


def _code(pipeline: Any, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    from blip_pipelines.jobs.closure import closure

    modules = {node.func.__module__ for node in pipeline.nodes}
    for entry in entries:
        modules.add(entry["type"].rpartition(".")[0])
        if "validator" in entry:
            modules.add(entry["validator"]["class"].rpartition(".")[0])
    package = Path(importlib.import_module(__package__.partition(".")[0]).__file__ or "").parent
    files = (path.relative_to(package).as_posix() for path in closure(sorted(modules)) if path.stat().st_size)
    return [f"src/{package.name}/{name}" for name in files if name not in WATCHERS]


def _parameter_keys(stage: str, values: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys of each block that the stage reads."""
    from blip_pipelines.pipelines.parameters import blocks_of, read_stage

    config = read_stage(stage, values).config
    return {block: list(arithmetic_keys(config, values[block], block)) for block in blocks_of(stage)}


def arithmetic_keys(config: Any, block: Mapping[str, Any], name: str) -> Iterator[str]:
    """Dotted keys of the block that change results; a sub-block as one key where all of it does."""
    for field in fields(config):
        if field.name not in block or field.metadata.get("speed_only"):
            continue
        value, key = getattr(config, field.name), f"{name}.{field.name}"
        if _has_speed_only(value):
            yield from arithmetic_keys(value, block[field.name], key)
        else:
            yield key


def _has_speed_only(config: Any) -> bool:
    return is_dataclass(config) and any(
        field.metadata.get("speed_only") or _has_speed_only(getattr(config, field.name)) for field in fields(config)
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m blip_pipelines.tracking.dvc", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether dvc.yaml is up to date")
    check = parser.parse_args(arguments).check
    root = Path.cwd()
    path, text = root / "dvc.yaml", render(root)
    if path.exists() and path.read_text("utf-8") == text:
        return 0
    if check:
        sys.stderr.write("dvc.yaml is behind the pipelines; write it anew: make dvc-yaml\n")
        return 1
    path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
