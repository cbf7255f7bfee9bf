"""`kedro data`, in a copy of the project."""

import io
import json

import pytest
from click.testing import CliRunner
from PIL import Image
from project_samples import Project

from blip_pipelines.commands.data import data


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    project.take_photos(24)
    project.photo(3).write_bytes(b"no picture")
    return project


@pytest.fixture(scope="module")
def ingested(project):
    project.run("kedro", "run", "--nodes", "ingest")
    return project


def test_a_source_is_described_before_it_is_ingested(project):
    found = json.loads(project.run("kedro", "data", "info", "source", "--json"))
    assert found["kind"] == "folder" and found["images"] == 24 and found["files"] == 25
    assert found["captions of splits"] == {"by image": 24}
    with project.start("kedro", "data", "info", "elsewhere") as process:
        output, _ = process.communicate()
    assert process.returncode == 2 and "elsewhere: no entry of the catalog with a file path" in output


@pytest.mark.parametrize("command", ["preview", "lint"])
def test_what_takes_a_table_says_so_of_a_source(command):
    refused = CliRunner().invoke(data, [command, "source"])
    assert refused.exit_code == 2 and f"`kedro data {command} pairs`" in refused.output


@pytest.mark.slow
def test_a_data_set_is_counted_and_shown(ingested):
    text = ingested.run("kedro", "data", "info")
    assert "not_an_image" in text and "words of a caption" in text
    found = json.loads(ingested.run("kedro", "data", "info", "pairs", "--json"))
    assert found["pairs"]["rows"] == 23 and found["refused"] == {"not_an_image": 1}
    assert found["images"]["images"] == 23 and len(found["pairs"]["hash"]) == 64
    sheet = ingested.root / "sheet.png"
    ingested.run("kedro", "data", "preview", "pairs", "--count", "9", "--split", "train", "--to", str(sheet))
    assert Image.open(io.BytesIO(sheet.read_bytes())).height > 2 * 96  # two lines of pictures


@pytest.mark.slow
def test_a_data_set_is_judged_by_its_contracts_alone(ingested):
    text = ingested.run("kedro", "data", "lint", "pairs")
    assert "kept  one_split_per_image" in text and "kept  one_word_share" in text
    assert (ingested.root / "data" / "08_reporting" / "lint_pairs" / "index.html").exists()
    ingested.edit("ingestion", contracts={"max_side": 20})
    with ingested.start("kedro", "data", "lint") as process:
        output, _ = process.communicate()
    assert process.returncode == 1 and "image_size" in output and "Traceback" not in output
