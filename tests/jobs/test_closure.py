"""The import closure: what changes a module's behaviour is in it, what does not is not."""

from pathlib import Path

import pytest

from blip_pipelines.jobs.closure import changed_files, closure, code_hash, file_hashes

FILES = {
    "__init__.py": "",
    "job.py": "from toybox import plain\nfrom toybox.deep.inner import thing\n",
    "plain.py": "def late():\n    from . import nested\n    return nested\n",
    "nested.py": "from .deep import sibling as renamed\nif False:\n    import toybox.conditional\n",
    "conditional.py": "",
    "deep/__init__.py": "from . import by_init\n",
    "deep/inner.py": "from .. import parent_level\nthing = 1\n",
    "deep/sibling.py": "",
    "deep/by_init.py": "",
    "parent_level.py": "",
    "node.py": "JOB = 'toybox.job'\nTEXT = 'toybox.missing and toybox.unrelated'\n",
    "unrelated.py": "",
}


@pytest.fixture
def toybox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "toybox" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "toybox"


def names(files: list[Path], folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in files}


JOB = {
    *("__init__.py", "job.py", "plain.py", "nested.py", "conditional.py", "parent_level.py"),
    *("deep/__init__.py", "deep/inner.py", "deep/sibling.py", "deep/by_init.py"),
}


def test_nested_relative_and_package_imports_are_followed(toybox: Path) -> None:
    assert names(closure("toybox.job"), toybox) == JOB


def test_job_named_by_a_string_counts_and_a_sentence_does_not(toybox: Path) -> None:
    assert names(closure("toybox.node"), toybox) == JOB | {"node.py"}


def test_nothing_is_imported(toybox: Path) -> None:
    (toybox / "job.py").write_text("raise SystemExit\n")
    assert names(closure("toybox.job"), toybox) == {"__init__.py", "job.py"}


def test_code_hash_changes_with_a_file_of_the_closure_only(toybox: Path) -> None:
    before = code_hash(closure("toybox.job"))
    (toybox / "unrelated.py").write_text("x = 1\n")
    assert code_hash(closure("toybox.job")) == before
    (toybox / "deep" / "by_init.py").write_text("x = 1\n")
    assert code_hash(closure("toybox.job")) != before


def test_code_hash_does_not_depend_on_where_the_package_lies(toybox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_hash(closure("toybox.job"))
    moved = toybox.parent / "elsewhere"
    moved.mkdir()
    toybox.rename(moved / "toybox")
    monkeypatch.syspath_prepend(str(moved))
    assert code_hash(closure("toybox.job")) == before


def test_changed_files_are_named_with_what_happened(toybox: Path) -> None:
    old = file_hashes(closure("toybox.job"))
    (toybox / "plain.py").write_text("import toybox.unrelated\n")
    assert changed_files(old, file_hashes(closure("toybox.job"))) == [
        *("toybox/conditional.py (removed)", "toybox/deep/sibling.py (removed)", "toybox/nested.py (removed)"),
        *("toybox/plain.py (changed)", "toybox/unrelated.py (added)"),
    ]


def test_unknown_module_is_an_error(toybox: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"toybox\.nothing"):
        closure("toybox.nothing")


def test_launcher_reaches_the_worker_that_it_starts_by_name() -> None:
    import blip_pipelines

    package = Path(blip_pipelines.__file__).parent
    found = names(closure("blip_pipelines.jobs.launch"), package)
    assert {"jobs/worker.py", "jobs/torchrun.py", "training/loop.py", "config.py", "__init__.py"} <= found
