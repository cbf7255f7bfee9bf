"""Where a registered model comes from: everything that made it, kept with the run that released it.

Artifacts `lineage/` of the run that the version's tag `run` names:

    lineage.json        stages with data sets and hashes, parameters, jobs (`pipelines.snapshot`); code; environment
    source.tar.gz       the project's files as they were: code, parameters, constraints
    uncommitted.patch   how they differed from the commit, for people
    environment.txt     every installed distribution
    dvc.lock, dvc.yaml  which content in DVC's cache belongs to it, if this run is recorded there
"""

import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from blip_pipelines.data.storage import read_json, sha256, write_json
from blip_pipelines.tracking import registry
from blip_pipelines.tracking.runs import Run, Store

FOLDER = "lineage"
SOURCE = "source.tar.gz"
MOST_BYTES = 2_000_000  # of a file of the project; pictures in docs are not what made a model
PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "pillow",
    "pyarrow",
    "kedro",
    "dvc",
    "mlflow",
)  # all are in environment.txt
WITHOUT_GIT = (
    "conf/base",
    "src",
    "pyproject.toml",
    "constraints.txt",
    "packages.txt",
    "Makefile",
    ".dvc/config",
    ".dvcignore",
)


@dataclass(frozen=True)
class Lineage:
    """What was kept of one version.

    Args:
        name, version, aliases, tags: of the version.
        record: lineage.json; lock: dvc.lock, {} where DVC has no record; patch: uncommitted changes.
        folder: a copy of all artifacts.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    record: Mapping[str, Any]
    lock: Mapping[str, Any]
    patch: str
    folder: Path

    @property
    def stages(self) -> list[str]:
        """The stage that made the model and all that it rests on, the first ones first."""
        return ancestors(self.record["stages"], self.tags["stage"])


def keep(root: Path, run: Run, stages: Mapping[str, Any], env: str, not_in_dvc: str | None) -> None:
    """Keep what the models that a run released come from.

    Args:
        root: the project; stages: its `snapshot`.
        env: the Kedro environment; not_in_dvc: why DVC has no record of this run, None if it has.
    """
    record = {
        "stages": stages,
        "env": env,
        "code": code_state(root),
        "environment": {"python": platform.python_version(), "platform": platform.platform(), "packages": _packages()},
        "not_in_dvc": not_in_dvc,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "lineage.json", record)
        (folder / "uncommitted.patch").write_text(_git(root, "diff", "HEAD", "--binary"), "utf-8")
        (folder / "environment.txt").write_text("".join(f"{line}\n" for line in _distributions()), "utf-8")
        with tarfile.open(folder / SOURCE, "w:gz") as archive:
            for path in project_files(root):
                archive.add(root / path, path.as_posix(), recursive=False)
        for path in (root / "dvc.lock", root / "dvc.yaml"):
            if not_in_dvc is None and path.exists():
                (folder / path.name).write_bytes(path.read_bytes())
        for path in sorted(folder.iterdir()):
            run.log_file(path, FOLDER)


def read(store: Store, uri: str, into: Path) -> Lineage:
    """The lineage of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Args:
        into: a folder for a copy of its artifacts.

    Raises:
        RegistryError: there is no such model, or nothing was kept with it.
    """
    version = registry.find(store, uri)
    folder = registry.artifact(store, version, FOLDER, into)
    if folder is None or not (folder / "lineage.json").exists():
        raise registry.RegistryError(
            f"{uri}: nothing was kept about where it comes from; release it again (`kedro run`)"
        )
    lock = folder / "dvc.lock"
    model = store.client.get_registered_model(version.name)
    return Lineage(
        name=version.name,
        version=str(version.version),
        aliases=tuple(sorted(alias for alias, at in model.aliases.items() if str(at) == str(version.version))),
        tags=version.tags,
        record=read_json(folder / "lineage.json"),
        lock=yaml.safe_load(lock.read_text("utf-8")) if lock.exists() else {},
        patch=(folder / "uncommitted.patch").read_text("utf-8"),
        folder=folder,
    )


def ancestors(stages: Mapping[str, Any], stage: str) -> list[str]:
    """The stage and those that wrote what it reads, transitively, writers before readers."""
    writer = {name: each for each, record in stages.items() for name in record["outputs"]}
    found: list[str] = []

    def visit(name: str) -> None:
        for data in stages[name]["inputs"]:
            if (before := writer.get(data)) and before != name and before not in found:
                visit(before)
        found.append(name)

    visit(stage)
    return found


def maker_of(stages: Mapping[str, Any], digest: str) -> tuple[str, str] | None:
    """(stage, data set) that has this content hash."""
    for stage, record in stages.items():
        for name, found in record["outputs"].items():
            if found["sha256"] == digest:
                return stage, name
    return None


def code_state(root: Path) -> dict[str, Any]:
    """`commit`, "" outside git; `changed`, files that differ from it; `sha256` of all files of the project."""
    files = project_files(root)
    content = "".join(f"{path}\0{sha256((root / path).read_bytes())}\n" for path in files)
    status = _git(root, "status", "--porcelain", "--untracked-files=all")
    return {
        "commit": _git(root, "rev-parse", "HEAD").strip(),
        "changed": [line[3:] for line in status.splitlines()],
        "sha256": sha256(content.encode()),
    }


def project_files(root: Path) -> list[Path]:
    """The project's own files, relative to `root`: those of git and new ones it does not ignore. Never conf/local."""
    listed = _git(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    if listed:
        found: Iterable[Path] = (Path(name) for name in listed.split("\0") if name)
    else:
        tops = [root / name for name in WITHOUT_GIT]
        tops += [path for path in (root / "conf").glob("*") if path.name not in ("base", "local")]
        files = [path for top in tops for path in (top.rglob("*") if top.is_dir() else (top,))]
        found = (path.relative_to(root) for path in files if "__pycache__" not in path.parts)
    return sorted(
        path
        for path in set(found)
        if path.parts[:2] != ("conf", "local")
        and path.name != "dvc.lock"
        and (root / path).is_file()
        and (root / path).stat().st_size <= MOST_BYTES
    )


def _git(root: Path, *arguments: str) -> str:
    """What git says; "" where there is no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def _packages() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def _distributions() -> list[str]:
    named = {f"{each.metadata['Name']}=={each.version}" for each in metadata.distributions() if each.metadata["Name"]}
    return [f"# Python {sys.version}", *sorted(named, key=str.lower)]
