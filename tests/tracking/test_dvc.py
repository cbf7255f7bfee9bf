"""`dvc.yaml` against the pipelines; and, on a copy of the project with a folder of pictures, what DVC reruns."""

import sys
from dataclasses import dataclass, field

import pytest
import yaml
from data_samples import picture
from project_samples import ROOT, Project

from blip_pipelines.config import speed_only
from blip_pipelines.data.storage import read_json
from blip_pipelines.tracking.dvc import arithmetic_keys, render


def test_dvc_yaml_is_what_the_pipelines_and_the_catalog_say():
    assert (ROOT / "dvc.yaml").read_text("utf-8") == render(ROOT), "write it anew: make dvc-yaml"


def test_a_stage_depends_on_the_code_that_it_runs_and_no_other():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    code = {name: {dep for dep in stage["deps"] if dep.startswith("src/")} for name, stage in stages.items()}
    assert "src/blip_pipelines/training/optimizer.py" in code["med_pretraining"]
    assert "src/blip_pipelines/data/contracts.py" in code["ingestion"]
    for room in ("training", "models", "objectives", "inference", "evaluation"):
        assert not [dep for dep in code["ingestion"] if dep.startswith(f"src/blip_pipelines/{room}/")]


def test_a_stage_reads_what_an_earlier_one_writes_and_no_file_is_written_twice():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    written: set[str] = set()
    for stage in stages.values():
        assert not [
            dep for dep in stage["deps"] if dep.startswith("data/0") and "01_raw" not in dep and dep not in written
        ]
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"] + stage.get("metrics", [])]
        assert not written & set(outs)
        written |= set(outs)


@pytest.mark.slow
def test_a_second_round_is_two_more_stages_with_the_parameters_of_the_first(tmp_path):
    project = Project(tmp_path)
    project.edit("capfilt", rounds=2)
    project.run(sys.executable, "-m", "blip_pipelines.tracking.dvc")
    stages = yaml.safe_load((project.root / "dvc.yaml").read_text())["stages"]
    first, second = stages["capfilt"], stages["capfilt_2"]
    assert second["cmd"] == "kedro run --pipelines capfilt_2" and second["params"] == first["params"]
    assert {"data/06_models/med_bootstrapped", "data/03_primary/capfilt_pairs"} <= set(second["deps"])
    assert "data/03_primary/capfilt_2_pairs" in stages["med_bootstrapped_2"]["deps"]
    assert {"data/06_models/med_bootstrapped_2", "data/06_models/capfilt_2/filter"} <= set(stages["release"]["deps"])
    assert "data/06_models/med_bootstrapped_2" in stages["evaluation"]["deps"]


@dataclass(frozen=True)
class Loop:
    steps: int
    log_every: int = speed_only(10)


@dataclass(frozen=True)
class Sizes:
    width: int = 8


@dataclass(frozen=True)
class Config:
    loop: Loop
    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0
    workers: int = speed_only(0)


def test_what_only_changes_speed_is_no_dependency():
    block = {"loop": {"steps": 5, "log_every": 1}, "sizes": {"width": 4}, "workers": 2}
    assert list(arithmetic_keys(Config(Loop(5, 1), Sizes(4)), block, "stage")) == ["stage.loop.steps", "stage.sizes"]


def repro(project: Project, *options: str) -> set[str]:
    """The stages that `dvc repro med_pretraining` ran, or would run with `--dry`."""
    lines = project.run("dvc", "repro", *options, "med_pretraining").splitlines()
    return {line.split("'")[1] for line in lines if line.startswith("Running stage")}


def changed(project: Project) -> set[str]:
    """The stages up to pretraining that `dvc status` names."""
    lines = project.run("dvc", "status", "ingestion", "med_pretraining").splitlines()
    return {line[:-1] for line in lines if line.endswith(":") and not line.startswith((" ", "\t"))}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kedro_run_leaves_dvc_nothing_to_do_and_dvc_reruns_what_a_change_touches(tmp_path):
    project = Project(tmp_path)
    project.take_photos(32)
    project.run("git", "init", "--quiet", ".")
    project.run(sys.executable, "-m", "blip_pipelines.tracking.dvc")
    recorded = project.run("kedro", "run", "--pipelines", "ingestion,med_pretraining")
    assert "DVC: recorded ingestion, med_pretraining" in recorded
    assert changed(project) == set() and repro(project) == set()

    project.edit("med_pretraining", projection=4)
    assert changed(project) == {"med_pretraining"} == repro(project, "--dry")
    project.edit("med_pretraining", projection=8, loader_workers=1)  # as it was, but for what only changes speed
    assert changed(project) == set()
    with (project.root / "src" / "blip_pipelines" / "training" / "optimizer.py").open("a") as file:
        file.write("\n# other code\n")
    assert changed(project) == {"med_pretraining"} == repro(project, "--dry")

    project.photo(3).write_bytes(picture(99))
    assert changed(project) == {"ingestion", "med_pretraining"}
    assert repro(project) == {"ingestion", "med_pretraining"}
    assert changed(project) == set() and repro(project) == set()


def test_tracked_parameters_are_plain_yaml_which_dvc_can_edit():
    for path in (ROOT / "conf" / "base").glob("parameters*.yml"):
        assert "${" not in path.read_text("utf-8"), f"{path}: interpolation belongs into the catalog"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_rule_of_capfilt_reruns_its_stage_and_neither_writes_nor_scores_again(tmp_path):
    project = Project(tmp_path)
    project.take_photos(32)
    training = {"steps": 2, "batch_samples_global": 8, "precision": "float32"}
    part = {"origins": ["web"], "optimizer": {"learning_rate": 1e-3}, "training": training}
    settings = {
        "captioner": {**part, "objective": {"weights": {"itc": 0, "itm": 0, "lm": 1}}},
        "filter": {**part, "objective": {"weights": {"itc": 1, "itm": 1, "lm": 0}, "momentum": None}},
        "contracts": {"severity": {"vocabulary_shift": "warn"}, "min_keep_rate": 0.0},
        "launch": {"mode": "inline"},
    }
    project.edit("capfilt", **settings, rule={"filter_web": False, "filter_synthetic": False})
    project.run("git", "init", "--quiet", ".")
    project.run(sys.executable, "-m", "blip_pipelines.tracking.dvc")
    project.run("dvc", "repro", "capfilt")

    def written() -> dict:
        made = (project.root / "data" / name for name in ("06_models/capfilt", "07_model_output/capfilt"))
        files = (
            path for folder in made for path in folder.rglob("*") if path.is_file() and "decided" not in path.parts
        )
        return {path: path.stat().st_mtime_ns for path in files}

    corpus = project.root / "data" / "03_primary" / "capfilt_pairs" / "manifest.json"
    before, all_rows = written(), read_json(corpus)["rows"]
    project.edit("capfilt", rule={"synthetic": False, "filter_web": False})
    output = project.run("dvc", "repro", "capfilt")
    assert "Running stage 'capfilt'" in output
    assert written() == before and len(before) > 10
    assert read_json(corpus)["rows"] < all_rows
    assert "up to date" in project.run("dvc", "status", "capfilt")
