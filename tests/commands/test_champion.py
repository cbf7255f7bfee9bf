"""`kedro rollback`, in a copy of the project whose store has champions."""

import pytest
from click.testing import CliRunner
from project_samples import Project

from blip_pipelines.cli import cli
from blip_pipelines.data.storage import read_json
from blip_pipelines.tracking.champions import decide
from blip_pipelines.tracking.runs import Store

PROMOTED = {"blip-captioner": ("1", "2"), "blip-filter": ("1",), "blip2": ()}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two versions of the captioner were champions, one of the filter, and none of `blip2`."""
    project = Project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        project.store = Store(project.root / "mlruns", "blip")
    run = project.store.start("release")
    for name, versions in PROMOTED.items():
        project.store.client.create_registered_model(name)
        for version in versions or ("1",):
            project.store.client.create_model_version(name, (project.root / "model").as_uri())
            decide(run, name, version, [], "" if versions else "floors: cider/combo is 0.5, its floor 1")
    run.finish()
    return project


def champion_of(project, name):
    return str(project.store.client.get_model_version_by_alias(name, "champion").version)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blip-filter", "blip-filter: no champion to go back to, only version 1 has been one"),
        ("blip2", "blip2: no champion to go back to, none has been promoted"),
        ("blip-captionr", "blip-captionr: no such model; there are blip-captioner, blip-filter, blip2"),
    ],
    ids=["the first champion", "never promoted", "unknown"],
)
def test_where_there_is_nothing_to_go_back_to_the_error_says_so_and_nothing_changes(
    project, name, message, monkeypatch
):
    monkeypatch.chdir(project.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = len(project.store.client.search_runs([project.store.experiment]))
    result = CliRunner().invoke(cli, ["rollback", name])
    assert (result.exit_code, result.output) == (1, f"Error: {message}\n")
    assert champion_of(project, "blip-filter") == "1"
    assert len(project.store.client.search_runs([project.store.experiment])) == runs


def test_a_roll_back_restores_the_champion_before_and_is_recorded(project, tmp_path):
    said = project.run("kedro", "rollback", "blip-captioner", "--because", "captions of flags got worse")
    assert "models:/blip-captioner@champion is version 1 again; version 2 was withdrawn" in said
    assert champion_of(project, "blip-captioner") == "1" and champion_of(project, "blip-filter") == "1"
    withdrawn = project.store.client.get_model_version("blip-captioner", "2")
    assert withdrawn.tags["withdrawn"] == "captions of flags got worse"
    assert withdrawn.tags["gate"] == "rolled back: captions of flags got worse"
    (run,) = project.store.client.search_runs(
        [project.store.experiment], "attributes.run_name = 'roll back blip-captioner'"
    )
    assert run.info.status == "FINISHED"
    file = project.store.client.download_artifacts(run.info.run_id, "gate/blip-captioner.json", str(tmp_path))
    expected = {"name": "blip-captioner", "version": "1", "champion": "2"}
    assert read_json(tmp_path / file) == {**expected, "rolled_back": "captions of flags got worse"}
