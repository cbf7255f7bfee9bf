"""The commands a person types, in a copy of the project."""

import pytest
from project_samples import Project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("ingestoin.limit=3", "ConfigError: ingestoin: unknown block of parameters; did you mean 'ingestion'?"),
        ("ingestion.limt=3", "ConfigError: ingestion.limt: unknown parameter; did you mean 'limit'?"),
        ("ingestion.limit=few", "ConfigError: ingestion.limit: expected int, found 'few'"),
        (
            "capfilt.rounds=2",
            "ConfigError: capfilt.rounds: 2, and conf/base/parameters_capfilt.yml says 1; each round is a stage, and "
            "which stages there are is the same in every environment: change it there, then `make dvc-yaml`",
        ),
    ],
)
def test_a_wrong_parameter_fails_with_one_line_that_says_what_is_known(project, parameter, message):
    with project.start("kedro", "run", "--pipelines", "ingestion", "--params", parameter) as process:
        output, _ = process.communicate()
    assert process.returncode == 1
    assert output.splitlines()[-1] == message and "Traceback" not in output
    assert not (project.root / "mlruns").exists()


@pytest.mark.slow
def test_kedro_viz_draws_every_stage(project):
    project.run("kedro", "viz", "build")
    drawn = (project.root / "build" / "api" / "main").read_text("utf-8")
    assert all(
        f'"{node}"' in drawn
        for node in ("ingest", "pretrain", "judge_captions", "evaluate_med_bootstrapped", "register", "report")
    )


@pytest.mark.slow
def test_package_runs_as_a_module(project):
    assert "--only-missing-outputs" in project.run("python", "-m", "blip_pipelines", "--help")
