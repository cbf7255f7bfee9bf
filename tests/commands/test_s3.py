"""The project on S3: a source there, image shards moved there, DVC's remote there."""

import json
import shutil

import pytest
from object_store_samples import BUCKET
from project_samples import Project

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path, server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)  # for DVC, which knows nothing of our configuration
    return Project(tmp_path / "project")


def test_a_source_on_s3_is_ingested_and_the_shards_move_back_there(project, server):
    project.take_photos(12)
    photos = project.photo(0).parent
    url = server.put_folder(photos, "photos-of-a-project")
    shutil.rmtree(photos)
    catalog = project.root / "conf" / "base" / "catalog.yml"
    catalog.write_text(catalog.read_text().replace("filepath: data/01_raw/photos", f"filepath: {url}", 1))
    project.edit("ingestion", source={"kind": "folder", "s3": {"endpoint": server.endpoint}}, workers=1)
    assert json.loads(project.run("kedro", "data", "info", "source", "--json"))["place"] == url
    project.run("kedro", "run", "--nodes", "ingest")
    moved = project.run("kedro", "data", "offload", f"s3://{BUCKET}/shards-of-a-project")
    assert f"s3://{BUCKET}/shards-of-a-project/00000.tar" in moved
    found = json.loads(project.run("kedro", "data", "info", "--json"))
    assert found["images"]["shards elsewhere"] == 1 and found["pairs"]["rows"] == 12
    project.run("kedro", "data", "preview", "pairs", "--to", "sheet.png")  # through the cache
    assert (project.root / "sheet.png").stat().st_size > 1000


def test_dvc_pushes_to_s3_pulls_from_there_and_sees_a_source_there_change(project, server):
    root = project.root
    url = server.put_folder(root / "conf", "dvc-source")

    (root / "dvc.yaml").write_text(
        f"stages:\n  ingest:\n    cmd: mkdir out && echo x > out/a\n    deps: [{url}]\n    outs: [out]\n"
    )
    project.run("git", "init", "-q")
    project.run("dvc", "repro")
    assert "up to date" in project.run("dvc", "status")
    server.put("dvc-source/new.yml", b"x")
    assert f"modified:           {url}" in project.run("dvc", "status")
    project.run("dvc", "remote", "add", "-d", "store", f"s3://{BUCKET}/dvc")
    project.run("dvc", "push")
    shutil.rmtree(root / "out")
    shutil.rmtree(root / ".dvc" / "cache")
    project.run("dvc", "pull")
    assert (root / "out" / "a").read_text() == "x\n"
