"""Do the three records of a project agree: receipts beside the data, `dvc.lock`, and the tags of registered models?"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blip_pipelines.data.storage import read_json, sha256_file
from blip_pipelines.tracking.runs import Store

RECEIPT = "receipt.json"
SHORT = 12


def disagreements(root: Path, store: Store, stages: Mapping[str, Any], with_dvc: bool) -> Iterator[str]:
    """A line for each.

    Args:
        stages: what the project holds (`pipelines.snapshot`).
        with_dvc: whether `dvc.lock` describes this environment.
    """
    content = {found["sha256"]: name for record in stages.values() for name, found in _data(record)}
    yield from _receipts(root, stages, content)
    if with_dvc and (root / "dvc.lock").exists():
        yield from _lock(root)
    yield from _tags(store, stages, content)


def _receipts(root: Path, stages: Mapping[str, Any], content: Mapping[str, str]) -> Iterator[str]:
    """Outputs that are not what their job left, and jobs whose inputs are not in the project any more."""
    for record in stages.values():
        for name, found in record["outputs"].items():
            folder = root / found["path"]
            if not (folder / RECEIPT).exists():
                continue
            receipt = read_json(folder / RECEIPT)
            for file, expected in receipt["outputs"].items():
                if not (folder / file).exists() or sha256_file(folder / file) != expected:
                    yield f"receipt of {name}: {folder / file} is not what {receipt['job']} left there"
            for given, digest in receipt["inputs"].items():
                if digest not in content:
                    yield (
                        f"receipt of {name}: {receipt['job']} read as '{given}' content {digest[:SHORT]}, which no "
                        "data set of the project has now"
                    )


def _lock(root: Path) -> Iterator[str]:
    import logging

    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)
    with Repo(str(root)) as repo:
        for stage, changes in repo.status().items():
            code = []
            for change in changes:
                if isinstance(change, str):
                    yield f"dvc.lock, {stage}: {change}"
                    continue
                for kind, paths in change.items():
                    for path, how in paths.items():
                        if path.startswith("src/"):
                            code.append(path)
                        else:
                            yield f"dvc.lock, {stage}: {kind} {path}: {how if isinstance(how, str) else ', '.join(how)}"
            if code:
                more = f" and {len(code) - 1} more" if len(code) > 1 else ""
                yield f"dvc.lock, {stage}: changed code {code[0]}{more}"


def _tags(store: Store, stages: Mapping[str, Any], content: Mapping[str, str]) -> Iterator[str]:
    """Candidates that were made of other content than the project holds.

    Their captions may be those of a stage before the one that made them: what answers questions reads a table of these.
    """
    for model in store.client.search_registered_models():
        if (version := model.aliases.get("candidate")) is None:
            continue
        tags = store.client.get_model_version(model.name, str(version)).tags
        here = f"MLflow, models:/{model.name}/{version}"
        if tags.get("stage") not in stages:
            yield f"{here}: made by {tags.get('stage')}, which is no stage of the project"
            continue
        record = stages[tags["stage"]]
        made = {each["sha256"] for each in record["outputs"].values()}
        for tag, found, whose in (("model", made, tags["stage"]), ("pairs", content, "the project")):
            if tags.get(tag) not in found:
                yield (
                    f"{here}: its tag '{tag}' says {str(tags.get(tag))[:SHORT]}, and no data set of {whose} "
                    "has that content now; release again, or restore that version"
                )
        jobs = {job["fingerprint"] for job in record["jobs"]}
        if jobs and tags.get("fingerprint") not in jobs:
            yield f"{here}: its job {str(tags.get('fingerprint'))[:SHORT]} is not the one that {tags['stage']} ran last"


def _data(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, str]]]:
    yield from record["inputs"].items()
    yield from record["outputs"].items()
