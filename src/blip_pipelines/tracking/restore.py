"""A registered version's project again: code, parameters and data as they were, in a folder of its own."""

import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from blip_pipelines.data.storage import StorageError, write_atomic
from blip_pipelines.tracking.data_versions import cache_of, is_cached, lay_out
from blip_pipelines.tracking.lineage import SOURCE, Lineage

ENV = "restored"  # the Kedro environment that has parameters which conf/base had not


@dataclass(frozen=True)
class Restored:
    """What `restore` did.

    Args:
        data: paths that were laid out.
        missing: what is not there, each with the reason.
        unrecorded: stages of which the kept dvc.lock says nothing.
        env: the environment with the parameters of a run that DVC has no record of; None where conf/base has them.
    """

    data: list[str]
    missing: list[str]
    unrecorded: list[str]
    env: str | None


def restore(root: Path, lineage: Lineage, into: Path) -> Restored:
    """Bring back a version into `into`, a new or empty folder; content comes from the cache of the project at `root`.

    Raises:
        StorageError: `into` is not empty.
    """
    if into.exists() and any(into.iterdir()):
        raise StorageError(f"{into}: not empty; restore into a new folder")
    into.mkdir(parents=True, exist_ok=True)
    _restore_code(root, lineage, into)
    if not lineage.lock:
        _write_parameters(lineage, into)
        return Restored([], [f"data: {lineage.record['not_in_dvc']}"], [], ENV)
    shutil.copyfile(lineage.folder / "dvc.lock", into / "dvc.lock")
    cache, laid, missing = cache_of(root), list[str](), list[str]()
    write_atomic(into / ".dvc" / "config.local", f"[cache]\n    dir = {cache.parents[1].resolve()}\n")
    outs = {entry["path"] for stage in lineage.lock["stages"].values() for entry in stage.get("outs", ())}
    for path, md5 in _content(lineage.lock):
        if is_cached(cache, md5):
            lay_out(cache, md5, into / path)
            laid.append(path)
        elif path not in outs and (root / path).exists() and _md5(root, path) == md5:
            copy: Any = shutil.copytree if (root / path).is_dir() else shutil.copyfile
            copy(root / path, into / path)
            laid.append(path)
        else:
            missing.append(f"{path}: content {md5} is neither in {cache} nor in {root}")
    unrecorded = [stage for stage in lineage.record["stages"] if stage not in lineage.lock["stages"]]
    return Restored(laid, missing, unrecorded, None)


def _restore_code(root: Path, lineage: Lineage, into: Path) -> None:
    """The files as they were, in a repository that knows the commit where there was one."""
    commit = lineage.record["code"]["commit"]
    known = commit and not _git(root, "cat-file", "-e", f"{commit}^{{commit}}")
    if known and not _git(into.parent, "clone", "--quiet", "--no-checkout", str(root), str(into)):
        _git(into, "checkout", "--quiet", "--detach", commit)
    else:
        _git(into, "init", "--quiet", ".")
    with tarfile.open(lineage.folder / SOURCE) as archive:
        kept = set(archive.getnames())
        for line in subprocess.run(["git", "ls-files", "-z"], cwd=into, capture_output=True, check=False).stdout.split(
            b"\0"
        ):
            file = into / line.decode("utf-8", "surrogateescape")
            if line and line.decode("utf-8", "surrogateescape") not in kept and file.suffix in (".py", ".yml"):
                file.unlink(missing_ok=True)  # was deleted when the version was made
        archive.extractall(into, filter="data")


def _write_parameters(lineage: Lineage, into: Path) -> None:
    for stage in lineage.stages:
        text = yaml.safe_dump({stage: lineage.record["stages"][stage]["parameters"]}, sort_keys=False)
        write_atomic(into / "conf" / ENV / f"parameters_{stage}.yml", text)


def _content(lock: dict[str, Any] | Any) -> list[tuple[str, str]]:
    """Path and md5 of what lies under data/, each once."""
    found = {}
    for stage in lock["stages"].values():
        for entry in (*stage.get("deps", ()), *stage.get("outs", ())):
            if entry["path"].startswith("data/") and "md5" in entry:
                found[entry["path"]] = entry["md5"]
    return sorted(found.items())


def _md5(root: Path, path: str) -> str | None:
    """What DVC calls the content that lies there now."""
    from dvc.repo import Repo
    from dvc_data.hashfile.build import build

    with Repo(str(root)) as repo:
        _, _, found = build(
            repo.cache.local, str(root / path), repo.cache.local.fs, "md5", dry_run=True, ignore=repo.dvcignore
        )
    return str(found.hash_info.value)


def _git(folder: Path, *arguments: str) -> int:
    """Exit status."""
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False).returncode
    except FileNotFoundError:
        return 127
