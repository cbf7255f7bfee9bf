"""The MED job on a data set of a dozen pictures: what it leaves, and that cutting it changes no bit of it."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from data_samples import tokenizer_json, write_data_set
from job_samples import cut_after, outputs
from model_samples import random_stem

from blip_pipelines.config import ConfigError
from blip_pipelines.data.loader import DataError
from blip_pipelines.data.storage import read_json
from blip_pipelines.jobs import torchrun, training_data
from blip_pipelines.jobs.launch import LaunchConfig, launch
from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.jobs.torchrun import JobFailed
from blip_pipelines.models.exports import load_med

JOB = "blip_pipelines.jobs.med_pretraining"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs, images = write_data_set(folder, [12, 8], captions_per_image=2)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    random_stem().save(folder / "stem")
    return {"pairs": pairs, "images": images, "folder": folder}


def config(data: dict[str, Path], **changed: Any) -> dict[str, Any]:
    """Every kind of state is in play: momentum, a queue that wraps, soft targets, dropout, two micro-steps."""
    return {
        "tokenizer": str(data["folder"] / "tokenizer.json"),
        "image": {"size": 16},
        "vision": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16},
        "text": {"width": 16, "layers": 1, "heads": 2, "ffn_width": 16, "max_positions": 16, "dropout": 0.1},
        "projection": 8,
        "max_tokens": 12,
        "window_shards": 1,
        "objective": {"momentum": 0.9, "queue_samples": 20, "alpha_ramp_steps": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "training": {
            "steps": 7,
            "batch_samples_global": 8,
            "accumulation": 2,
            "validate_every_steps": 3,
            "checkpoint_every_steps": 2,
            "peak_flops": 1e9,
        },
        **changed,
    }


def start(root: Path, data: dict[str, Path], settings: dict[str, Any], on_history: Any = None, **how: Any) -> Receipt:
    inputs = {name: data[name] for name in ("pairs", "images", "start") if name in data}
    how = {"mode": "inline", "threads_per_rank": 1, **how}
    return launch(JOB, settings, inputs, LaunchConfig(work=str(root / "work"), **how), on_history)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Receipt:
    return start(tmp_path_factory.mktemp("whole"), data, config(data))


def test_outputs_are_a_model_that_loads_its_checkpoint_and_the_curves(whole: Receipt, data: dict[str, Path]) -> None:
    exported = load_med(whole.folder)
    assert exported.tokenizer is not None
    assert len(exported.tokenizer) == exported.med.config.text.vocabulary == whole.facts["vocabulary"]
    assert exported.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).shape == (1, 5, 16)
    assert (whole.folder / "checkpoint" / "tensors.safetensors").exists()
    history = read_json(whole.folder / "history.json")
    curves = [row for row in history if "loss" in row]
    assert [row["step"] for row in curves] == [1, 2, 3, 4, 5, 6, 7]
    assert {"itc", "itm", "lm", "temperature", "learning_rate", "gradient_norm"} <= curves[0].keys()
    assert [row["step"] for row in history if "val/i2t_r5/combo" in row] == [3, 6, 7]
    assert whole.facts["last"] == curves[-1]
    assert whole.facts["rows"] == 30  # three quarters of twenty images, two captions each


@pytest.mark.parametrize("until", [1, 3, 6])
def test_cut_run_leaves_the_same_bytes(
    tmp_path: Path, data: dict[str, Path], whole: Receipt, until: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_after(monkeypatch, training_data, "Loader", until)
    with pytest.raises(DataError):
        start(tmp_path, data, config(data))
    monkeypatch.undo()
    assert outputs(start(tmp_path, data, config(data))) == outputs(whole)


def test_loader_in_other_processes_gives_the_same_bytes(tmp_path: Path, data: dict[str, Path], whole: Receipt) -> None:
    assert outputs(start(tmp_path, data, config(data, loader_workers=2))) == outputs(whole)


def test_training_goes_on_from_another_jobs_model(tmp_path: Path, data: dict[str, Path], whole: Receipt) -> None:
    """As fine-tuning does: LM alone at learning rate 0 leaves every weight as it was."""
    settings = config(data, origins=["human"])
    settings["objective"] = {"momentum": None, "weights": {"itc": 0, "itm": 0, "lm": 1}}
    settings["optimizer"] = {"learning_rate": 0.0}
    tuned = start(tmp_path, {**data, "start": whole.folder}, settings)
    before, after = load_med(whole.folder).med.state_dict(), load_med(tuned.folder).med.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tuned.facts["rows"] == 15
    assert tuned.facts["started"][0].startswith(f"{whole.folder}: ")


def test_frozen_stem_is_read_from_a_cache_and_exported(tmp_path: Path, data: dict[str, Path]) -> None:
    settings = config(data, stem=str(data["folder"] / "stem"), image={"size": 32, "augment": False})
    settings["vision"] |= {"image_size": 21, "patch_size": 21}
    settings["training"] |= {"steps": 2}
    receipt = start(tmp_path, data, settings)
    assert list((tmp_path / ".cache" / "features").glob("*/index.json"))
    exported = load_med(receipt.folder)
    assert exported.stem is not None
    assert exported.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 2, 16)


def test_sizes_that_do_not_fit_are_an_error_before_training(tmp_path: Path, data: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"vision\.image_size: 16 is not med_pretraining\.image\.size = 24"):
        start(tmp_path, data, config(data, image={"size": 24}))


@pytest.mark.slow
def test_workers_killed_at_a_random_moment_leave_the_same_bytes_in_the_end(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    settings = config(data)
    settings["training"] |= {"steps": 80, "checkpoint_every_steps": 3, "validate_every_steps": 0}
    two = {"mode": "torchrun", "processes": 2}
    uncut = outputs(start(tmp_path / "uncut", data, settings, **two))
    thread = threading.Thread(target=_kill_a_worker, args=(tmp_path / "cut" / "work",))
    thread.start()
    with pytest.raises(JobFailed, match="was killed by SIGKILL"):
        start(tmp_path / "cut", data, settings, **two)
    thread.join()
    rows: list[Any] = []
    assert outputs(start(tmp_path / "cut", data, settings, rows.extend, **two)) == uncut
    assert [row["step"] for row in rows] == list(range(1, 81))


def _kill_a_worker(work: Path) -> None:
    while not list(work.glob("*/checkpoints/[0-9]*")):
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.3))
    # Other children, such as multiprocessing's resource tracker, may be left of earlier tests.
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    (agent,) = (child for child in alive if torchrun.AGENT in child.cmdline())
    os.kill(agent.children()[0].pid, signal.SIGKILL)
