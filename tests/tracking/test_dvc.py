"""`dvc.yaml` against the pipelines; and, on a copy of the project with a folder of pictures, what DVC reruns."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from data_samples import caption, picture, tokenizer_json

from blip_pipelines.config import speed_only
from blip_pipelines.tracking.dvc import arithmetic_keys, render

ROOT = Path(__file__).parents[2]


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


class Project:
    """A copy of the project whose source is a folder of small pictures and whose model is tiny."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("conf", "src", ".dvc/config", ".dvcignore", ".telemetry", "pyproject.toml", "constraints.txt"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, root / name)
        (root / ".gitignore").write_text("/data\n/mlruns\n__pycache__/\n")
        (root / ".dvc" / ".gitignore").write_text("/tmp\n/cache\n/config.local\n")
        for folder in ("packages", "photos"):
            (root / "data" / "01_raw" / folder).mkdir(parents=True)
        (root / "data" / "01_raw" / "tokenizer.json").write_bytes(tokenizer_json())
        rows = [f"{number}.png,{caption(number)}" for number in range(32)]
        for number in range(32):
            self.photo(number).write_bytes(picture(number))
        self.photo(0).with_name("captions.csv").write_text("\n".join(["image,caption", *rows]))
        catalog = root / "conf" / "base" / "catalog.yml"
        catalog.write_text(catalog.read_text().replace("01_raw/packages", "01_raw/photos", 1))
        self.edit("ingestion", source={"kind": "folder"}, splits={"validation": 0.25, "test": 0.25}, workers=1)
        self.edit(
            "med_pretraining",
            tokenizer="data/01_raw/tokenizer.json",
            stem=None,
            start={},
            image={"size": 16},
            vision={"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16},
            text={"width": 16, "layers": 1, "heads": 2, "ffn_width": 16, "max_positions": 40},
            projection=8,
            training={"steps": 2, "batch_samples_global": 8, "precision": "float32"},
            launch={"mode": "inline"},
        )
        self.run("git", "init", "--quiet", ".")
        self.run(sys.executable, "-m", "blip_pipelines.tracking.dvc")

    def photo(self, number: int) -> Path:
        return self.root / "data" / "01_raw" / "photos" / f"{number}.png"

    def edit(self, stage: str, **values) -> None:
        path = self.root / "conf" / "base" / f"parameters_{stage}.yml"
        block = yaml.safe_load(path.read_text())
        block[stage].update(values)
        path.write_text(yaml.safe_dump(block))

    def run(self, *command: str) -> str:
        """Output of a command that must succeed."""
        scripts = Path(sys.executable).parent
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
        environment |= {"PATH": f"{scripts}:{environment['PATH']}", "PYTHONPATH": str(self.root / "src")}
        done = subprocess.run(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def repro(self, *options: str) -> set[str]:
        """The stages that `dvc repro med_pretraining` ran, or would run with `--dry`."""
        lines = self.run("dvc", "repro", *options, "med_pretraining").splitlines()
        return {line.split("'")[1] for line in lines if line.startswith("Running stage")}

    def changed(self) -> set[str]:
        """The stages up to pretraining that `dvc status` names."""
        lines = self.run("dvc", "status", "ingestion", "med_pretraining").splitlines()
        return {line[:-1] for line in lines if line.endswith(":") and not line.startswith((" ", "\t"))}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kedro_run_leaves_dvc_nothing_to_do_and_dvc_reruns_what_a_change_touches(tmp_path):
    project = Project(tmp_path)
    recorded = project.run("kedro", "run", "--pipelines", "ingestion,med_pretraining")
    assert "DVC: recorded ingestion, med_pretraining" in recorded
    assert project.changed() == set() and project.repro() == set()

    project.edit("med_pretraining", projection=4)
    assert project.changed() == {"med_pretraining"} == project.repro("--dry")
    project.edit("med_pretraining", projection=8, loader_workers=1)  # as it was, but for what only changes speed
    assert project.changed() == set()
    with (project.root / "src" / "blip_pipelines" / "training" / "optimizer.py").open("a") as file:
        file.write("\n# other code\n")
    assert project.changed() == {"med_pretraining"} == project.repro("--dry")

    project.photo(3).write_bytes(picture(99))
    assert project.changed() == {"ingestion", "med_pretraining"}
    assert project.repro() == {"ingestion", "med_pretraining"}
    assert project.changed() == set() and project.repro() == set()
