"""Versions of data in DVC's cache: kept there, found by the md5 of a `dvc.lock`, laid out again.

A cached file is named by the md5 of its content; a cached folder is a list of the names and md5s of its files.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blip_pipelines.data.storage import StorageError


def cache_of(root: Path) -> Path:
    """The folder of the project's local cache that holds content by md5."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return Path(repo.cache.local.path)


def keep_inputs(repo: Any, stages: Iterable[Any], most_bytes: float) -> list[str]:
    """Cache what stages read and no stage writes, as DVC by itself does with outputs alone.

    Args:
        repo: an open `dvc.repo.Repo`; stages of it that are recorded.
        most_bytes: an input that is larger stays where it is.

    Returns:
        Inputs that are not kept, each with the reason.
    """
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.transfer import transfer

    written = {out.fs_path for out in repo.index.outs}
    left = []
    for dep in {dep.fs_path: dep for stage in stages for dep in stage.deps}.values():
        path = Path(dep.fs_path)
        if dep.fs_path in written or not dep.is_in_repo or not path.is_relative_to(Path(repo.root_dir) / "data"):
            continue
        size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file())
        if size > most_bytes:
            left.append(f"{path.relative_to(repo.root_dir)} ({size / 1e9:.1f} GB)")
            continue
        staging, _, found = build(repo.cache.local, dep.fs_path, dep.fs, dep.hash_name, ignore=dep.dvcignore)
        transfer(staging, repo.cache.local, {found.hash_info}, shallow=False)
    return left


def is_cached(cache: Path, md5: str) -> bool:
    """Whether the content, and of a folder all of its files, is there."""
    return _object(cache, md5).exists() and all(_object(cache, each).exists() for _, each in _files(cache, md5))


def lay_out(cache: Path, md5: str, target: Path) -> None:
    """Copy a cached file or folder to `target`, which must not exist.

    Raises:
        StorageError: it is not in the cache.
    """
    if not is_cached(cache, md5):
        raise StorageError(f"{target}: content {md5} is not in {cache}; `dvc pull` it in the project that made it")
    if not md5.endswith(".dir"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(_object(cache, md5), target)
        return
    target.mkdir(parents=True)
    for name, each in _files(cache, md5):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(_object(cache, each), target / name)


def locked(lock: Mapping[str, Any]) -> dict[str, str]:
    """md5 by path of everything under data/ that a `dvc.lock` names."""
    return {
        entry["path"]: entry["md5"]
        for stage in lock.get("stages", {}).values()
        for entry in (*stage.get("deps", ()), *stage.get("outs", ()))
        if entry["path"].startswith("data/") and "md5" in entry
    }


def _files(cache: Path, md5: str) -> Iterator[tuple[str, str]]:
    if md5.endswith(".dir"):
        for entry in json.loads(_object(cache, md5).read_text("utf-8")):
            yield entry["relpath"], entry["md5"]


def _object(cache: Path, md5: str) -> Path:
    return cache / md5[:2] / md5[2:]


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)  # not its mode: cached files are read-only
