"""What `kedro ablate` runs: the configured runs name stages, nodes and parameters that exist."""

from pathlib import Path

import pytest
import yaml
from project_samples import Project

from blip_pipelines.commands import ablate as ablation
from blip_pipelines.commands.ablate import CONFIG, RESULT, read_ablations, write_environment
from blip_pipelines.config import ConfigError
from blip_pipelines.data.storage import content_hash, read_json
from blip_pipelines.evaluation.ablation import Run
from blip_pipelines.pipelines import parameters

ROOT = Path(__file__).parents[2]
RUNS = ("as_it_is/0", "as_it_is/1", "the_same/1", "web_only/0")


@pytest.fixture
def project(monkeypatch):
    from kedro.framework.startup import bootstrap_project

    monkeypatch.chdir(ROOT)
    bootstrap_project(ROOT)


def base_parameters():
    from kedro.config import OmegaConfigLoader

    return OmegaConfigLoader("conf", base_env="base", default_run_env="base")["parameters"]


def configured():
    found = read_ablations(ROOT / CONFIG)
    return [(found, run) for table in found.tables.values() for run in table.runs]


@pytest.mark.parametrize(("ablations", "run"), configured(), ids=[run.name for _, run in configured()])
def test_each_configured_run_has_nodes_and_parameters_that_are_read(project, tmp_path, ablations, run):
    nodes = write_environment(run, 3, ablations.seeded, tmp_path)
    assert all({f"evaluate_{stage}", f"ask_{stage}"} & set(nodes) for stage in run.rows.values())
    written = yaml.safe_load((tmp_path / "conf" / "parameters.yml").read_text())
    values = parameters.laid_over(base_parameters(), written)
    parameters.check_stages(values)
    for stage in run.stages:
        parameters.read_stage(stage, values)
    assert written["med_pretraining"]["seed"] == 3


def test_a_run_reads_what_it_does_not_make_from_the_default_run_and_writes_elsewhere(project, tmp_path):
    run = Run(("capfilt", "med_bootstrapped"), {"both": "med_bootstrapped"}, {"capfilt.rule.synthetic": False})
    nodes = write_environment(run, 0, ("capfilt.write.seed",), tmp_path)
    catalog = yaml.safe_load((tmp_path / "conf" / "catalog.yml").read_text())
    assert catalog["pairs"]["filepath"] == "data/03_primary/pairs"
    assert catalog["med_pretraining_model"]["filepath"] == "data/06_models/med_pretraining"
    assert "med_bootstrapped_model" not in catalog and "capfilt_places" not in catalog
    assert catalog["med_bootstrapped_measures"]["filepath"].startswith(str(tmp_path))
    assert yaml.safe_load((tmp_path / "conf" / "globals.yml").read_text()) == {"data": tmp_path.as_posix()}
    assert "ingest" not in nodes and "pretrain" not in nodes and "pretrain_bootstrapped" in nodes
    written = yaml.safe_load((tmp_path / "conf" / "parameters.yml").read_text())
    assert written == {"capfilt": {"write": {"seed": 0}, "rule": {"synthetic": False}}}


def test_a_data_set_can_be_read_in_place_of_another(project, tmp_path):
    instead = {"med_bootstrapped_model": "med_pretraining_model"}
    write_environment(Run(("blip2_stage1",), {"before": "blip2_stage1"}, instead=instead), 0, (), tmp_path)
    catalog = yaml.safe_load((tmp_path / "conf" / "catalog.yml").read_text())
    assert catalog["med_bootstrapped_model"]["filepath"] == "data/06_models/med_pretraining"


def test_a_run_that_is_named_twice_is_done_once(monkeypatch):
    from click.testing import CliRunner

    done = []
    monkeypatch.setattr(ablation, "perform", lambda tasks, _: done.extend(tasks) or [])
    monkeypatch.setattr(ablation, "_task", lambda run, seed, _: (run.name, seed))
    monkeypatch.setattr(ablation, "RESULT", Path("/dev/null"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("blip_pipelines.data.storage.write_json", lambda *_: None)
    monkeypatch.setattr("blip_pipelines.evaluation.ablation.collect", lambda *_: {})
    assert CliRunner().invoke(ablation.ablate, ["noise", "noise_20_without", "--parallel", "2"]).exit_code == 0
    assert [name for name, _ in done].count("noise_20_without") == 1


def test_a_comparison_with_no_row_is_refused(tmp_path):
    table = {"title": "", "measures": [], "subsets": [], "runs": [], "better": {"both": "none"}}
    (tmp_path / "ablations.yml").write_text(yaml.safe_dump({"seeded": [], "tables": {"capfilt": table}}))
    with pytest.raises(ConfigError, match=r"tables\.capfilt\.better: both is no row"):
        read_ablations(tmp_path / "ablations.yml")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ablations_find_the_default_run_train_other_seeds_and_fill_the_report(tmp_path):
    project = Project(tmp_path)
    project.take_photos(32)
    (project.root / CONFIG).write_text(
        yaml.safe_dump(
            {
                "seeded": ["med_pretraining.seed"],
                "tables": {
                    "seeds": {
                        "title": "Two seeds",
                        "measures": ["i2t_r5"],
                        "subsets": ["all"],
                        "runs": [
                            {
                                "stages": ["med_pretraining"],
                                "rows": {"the_same": "med_pretraining"},
                                "seeds": [1],
                            },
                            {"stages": ["med_pretraining"], "rows": {"as_it_is": "med_pretraining"}, "seeds": [1, 0]},
                            {
                                "stages": ["med_pretraining"],
                                "rows": {"web_only": "med_pretraining"},
                                "parameters": {"med_pretraining.origins": ["web"]},
                            },
                        ],
                        "better": {"web_only": "as_it_is"},
                    }
                },
            }
        )
    )
    project.run("kedro", "run", "--pipelines", "ingestion,med_pretraining")
    output = project.run("kedro", "ablate", "--parallel", "2")
    assert "4 of 4" in output
    logs = {name: (project.root / f"data/ablations/{name}/log.txt").read_text() for name in RUNS}
    taking, waiting = "jobs.med_pretraining: nothing changed, taking", "jobs.med_pretraining: process "
    assert taking in logs["as_it_is/0"], "seed 0 is the default run's model"
    both = [logs["as_it_is/1"], logs["the_same/1"]]
    assert all(taking in log for log in both if waiting in log)
    assert sum(taking in log for log in both) == 1, "two runs side by side do one training once"
    found = read_json(project.root / RESULT)
    assert found["tables"]["seeds"]["seeds"] == {"as_it_is": 2, "the_same": 1, "web_only": 1}
    assert {"ablation/as_it_is/i2t_r5/all", "ablation/as_it_is/i2t_r5_sd/all"} <= found["metrics"].keys()
    models = [project.root / f"data/ablations/as_it_is/{seed}/06_models/med_pretraining" for seed in (0, 1)]
    assert content_hash(models[0]) == content_hash(project.root / "data/06_models/med_pretraining")
    assert content_hash(models[0]) != content_hash(models[1])
    assert content_hash(project.root / "data/ablations/the_same/1/06_models/med_pretraining") == content_hash(models[1])
    again = project.run("kedro", "ablate", "as_it_is", "--seed", "1", "--parallel", "1")
    assert "nothing changed, taking" in again and "step 1/" not in again
