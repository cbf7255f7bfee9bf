"""A copy of the project to run Kedro and DVC in, which may be edited."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from data_samples import caption, picture, tokenizer_json

ROOT = Path(__file__).parents[1]
COPIED = ("conf", "src", ".dvc/config", ".dvcignore", ".telemetry", "pyproject.toml", "constraints.txt")


class Project:
    """The tracked files that matter, in `root`; data and runs are its own."""

    def __init__(self, root: Path):
        self.root = root
        for name in COPIED:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, root / name)
        (root / ".gitignore").write_text("/data\n/mlruns\n__pycache__/\n")
        (root / ".dvc" / ".gitignore").write_text("/tmp\n/cache\n/config.local\n")
        (root / "data" / "01_raw").mkdir(parents=True)

    def take_photos(self, count: int) -> None:
        """Make a folder of small pictures the source and the model tiny, without any package."""
        for folder in ("packages", "photos"):
            (self.root / "data" / "01_raw" / folder).mkdir()
        (self.root / "data" / "01_raw" / "tokenizer.json").write_bytes(tokenizer_json())
        for number in range(count):
            self.photo(number).write_bytes(picture(number))
        rows = [f"{number}.png,{caption(number)}" for number in range(count)]
        self.photo(0).with_name("captions.csv").write_text("\n".join(["image,caption", *rows]))
        catalog = self.root / "conf" / "base" / "catalog.yml"
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
        self.edit(
            "blip2_stage1",
            qformer={
                "queries": 2,
                "text": {"width": 16, "layers": 1, "heads": 2, "ffn_width": 16, "max_positions": 40},
                "projection": 8,
                "initializer": "fan_in",
            },
            training={"steps": 2, "batch_samples_global": 8, "precision": "float32"},
            launch={"mode": "inline"},
        )
        self.edit(
            "blip2_stage2",
            language={"source": "scratch", "scratch": {"width": 16, "layers": 1, "heads": 2, "ffn_width": 16}},
            prompting={"prompt": "{image}", "projection": "scaled"},
            warm_start={"steps": 2, "batch_samples_global": 8},
            training={"steps": 2, "batch_samples_global": 8, "precision": "float32"},
            launch={"mode": "inline"},
        )
        few = {"steps": 2, "batch_samples_global": 8, "precision": "float32"}
        asked = {"table": "captions", "templates": "captioning", "task": "captioning", "metric": "cider"}
        choice = {"table": "captions", "templates": "choice", "task": "choice", "metric": "exact_match"}
        self.edit(
            "instructions",
            facts=None,
            data_sets={
                "caption": {**asked, "role": "held_in"},
                "choice": {**choice, "role": "held_out", "ask": {"kind": "choice", "about": "caption"}},
            },
        )
        self.edit("question_answering", limits={"question": 40, "answer": 12}, training=few, launch={"mode": "inline"})
        limits, prompting = {"instruction": 64, "question": 40}, {"prompt": "{image} {instruction}", "chat": False}
        self.edit("instruct_tuning", prompting=prompting, limits=limits, training=few, launch={"mode": "inline"})
        self.edit(
            "evaluation",
            bootstrap_draws=100,
            questions={"prompting": prompting, "limits": limits, "rows": 2, "bootstrap_draws": 100},
            med_questions={"limits": {"question": 40, "answer": 12}, "rows": 2, "bootstrap_draws": 100},
        )

    def photo(self, number: int) -> Path:
        return self.root / "data" / "01_raw" / "photos" / f"{number}.png"

    def edit(self, stage: str, **values) -> None:
        """Set keys of a stage's block in conf/base."""
        path = self.root / "conf" / "base" / f"parameters_{stage}.yml"
        block = yaml.safe_load(path.read_text())
        block[stage].update(values)
        path.write_text(yaml.safe_dump(block))

    def start(self, *command: str) -> subprocess.Popen:
        """A command of this environment, in the copy and with its code."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        environment["PYTHONPATH"] = str(self.root / "src")
        return subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *command: str) -> str:
        """The output of a command that must succeed."""
        with self.start(*command) as process:
            output, _ = process.communicate()
        assert process.returncode == 0, output
        return output
