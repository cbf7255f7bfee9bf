"""What a project holds now, stage by stage: data sets with their content hashes, parameters, receipts of jobs.

Two things are joined by equal hashes, never by names or run ids, so a stage that was not run again is found as it is.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from blip_pipelines.pipelines.parameters import parameters_of


def snapshot(
    root: Path, pipelines: Mapping[str, Pipeline], catalog: DataCatalog, values: Mapping[str, Any]
) -> dict[str, Any]:
    """By stage `inputs` and `outputs`, data set -> {path, sha256}, `parameters`, and `jobs`, receipts of what ran.

    Args:
        root: the project; paths are relative to it.
        pipelines: by stage, in their order.
        values: the parameters of all blocks.
    """
    known: dict[str, dict[str, str] | None] = {}
    return {
        stage: {
            "inputs": dict(_content(root, sorted(pipeline.inputs()), catalog, known)),
            "outputs": dict(_content(root, sorted(pipeline.all_outputs()), catalog, known)),
            "parameters": parameters_of(stage, values),
            "jobs": list(_jobs(stage, pipeline, catalog)),
        }
        for stage, pipeline in pipelines.items()
    }


def _content(
    root: Path, names: list[str], catalog: DataCatalog, known: dict[str, dict[str, str] | None]
) -> Iterator[tuple[str, dict[str, str]]]:
    from blip_pipelines.data.storage import content_hash

    for name in names:
        if name not in known:
            path: Path | None = getattr(catalog.get(name), "path", None)
            known[name] = None
            if path is not None and path.exists():
                known[name] = {"path": _within(root, path), "sha256": content_hash(path)}
        if (found := known[name]) is not None:
            yield name, found


def _within(root: Path, path: Path) -> str:
    """Relative to the project, which may be moved; absolute where it lies elsewhere."""
    whole = (root / path).resolve()
    return (whole.relative_to(root.resolve()) if whole.is_relative_to(root.resolve()) else whole).as_posix()


def _jobs(stage: str, pipeline: Pipeline, catalog: DataCatalog) -> Iterator[dict[str, Any]]:
    name = f"{stage}_run"
    dataset: Any = catalog.get(name) if name in pipeline.all_outputs() else None
    if dataset is None or not getattr(dataset, "path", Path()).is_file():
        return
    record = dataset.load()
    for part, each in {"": record, **record.get("parts", {})}.items():
        if "fingerprint" in each:
            kept = {key: each.get(key) for key in ("job", "fingerprint", "code", "mlflow_run", "finished")}
            yield {**kept, **({"part": part} if part else {})}
