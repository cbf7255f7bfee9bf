"""Stage 1 of BLIP-2 on a data set of a dozen pictures: what it leaves, what it leaves alone, and that cutting it
changes no bit of it."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from blip2_samples import vit_folder
from data_samples import tokenizer_json, write_data_set
from inference_samples import export_tiny_med
from job_samples import cut_after, half, outputs
from model_samples import random_stem
from project_samples import ROOT

from blip_pipelines.config import ConfigError
from blip_pipelines.data.features import FeatureCache
from blip_pipelines.data.loader import DataError, DecodedPixels
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.storage import StorageError, read_json
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.jobs import training_data
from blip_pipelines.jobs.launch import LaunchConfig, launch
from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.models.frozen_tower import TowerConfig, open_tower
from blip_pipelines.objectives.qformer import QFormerPretraining
from blip_pipelines.pipelines.parameters import laid_over, read_stage

JOB = "blip_pipelines.jobs.blip2_stage1"
IMAGES = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs, images = write_data_set(folder, [12, 8], captions_per_image=2)
    return {"pairs": pairs, "images": images, "med": export_tiny_med(folder / "med")}


def config(**changed: Any) -> dict[str, Any]:
    """Dropout and two micro-steps; 16 wide as the tiny MED."""
    return {
        "qformer": {
            "text": {"width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "max_positions": 24, "dropout": 0.1},
            "queries": 3,
            "projection": 8,
            "initializer": "fan_in",
        },
        "max_tokens": 12,
        "window_shards": 1,
        "objective": {"negatives_uniform_share": 0.5},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "training": {
            "steps": 7,
            "batch_samples_global": 8,
            "accumulation": 2,
            "precision": "float32",
            "validate_every_steps": 3,
            "checkpoint_every_steps": 2,
            "peak_flops": 1e9,
        },
        **changed,
    }


def start(root: Path, data: dict[str, Path], settings: dict[str, Any], **how: Any) -> Receipt:
    inputs = {name: data[name] for name in ("pairs", "images", "med") if name in data}
    how = {"mode": "inline", "threads_per_rank": 1, **how}
    return launch(JOB, settings, inputs, LaunchConfig(work=str(root / "work"), **how))


def losses(receipt: Receipt) -> list[list[float]]:
    rows = [row for row in read_json(receipt.folder / "history.json") if "loss" in row]
    return [[row[name] for name in ("itc", "itm", "itg")] for row in rows]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(root: Path, data: dict[str, Path]) -> Receipt:
    return start(root, data, config())


def test_outputs_are_a_model_that_loads_its_checkpoint_and_the_curves(whole: Receipt, data: dict[str, Path]) -> None:
    exported = load_blip2(whole.folder)
    assert exported.tokenizer is not None and exported.model is None
    assert exported.former.config.text.vocabulary == len(exported.tokenizer) == whole.facts["vocabulary"]
    assert exported.former.config.queries == 3
    assert exported.image["size"] == 8
    assert (whole.folder / "retrieval" / "model.safetensors").exists()
    assert (whole.folder / "checkpoint" / "tensors.safetensors").exists()
    history = read_json(whole.folder / "history.json")
    curves = [row for row in history if "loss" in row]
    assert [row["step"] for row in curves] == [1, 2, 3, 4, 5, 6, 7]
    assert {"itc", "itm", "itg", "temperature", "recall_i2t", "gradient_norm"} <= curves[0].keys()
    assert [row["step"] for row in history if "val/i2t_r5/combo" in row] == [3, 6, 7]
    assert whole.facts["last"] == curves[-1]
    assert whole.facts["rows"] == 30  # three quarters of twenty images, two captions each
    assert whole.facts["started"][0].startswith(f"{data['med']}: ")


def test_frozen_tower_is_the_meds_and_stays_it(whole: Receipt, data: dict[str, Path]) -> None:
    before = open_tower(TowerConfig(str(data["med"])))
    exported = load_blip2(whole.folder)
    assert exported.tower.hash == before.hash == whole.facts["tower"]["hash"]
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exported.tower(pixels), before(pixels))
    assert whole.facts["frozen_parameters"] == sum(parameter.numel() for parameter in before.parameters())


@pytest.mark.parametrize("until", [1, 3, 6])
def test_cut_run_leaves_the_same_bytes(
    tmp_path: Path, data: dict[str, Path], whole: Receipt, until: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_after(monkeypatch, training_data, "Loader", until)
    with pytest.raises(DataError):
        start(tmp_path, data, config())
    monkeypatch.undo()
    assert outputs(start(tmp_path, data, config())) == outputs(whole)


def test_loader_in_other_processes_gives_the_same_bytes(tmp_path: Path, data: dict[str, Path], whole: Receipt) -> None:
    assert outputs(start(tmp_path, data, config(loader_workers=2))) == outputs(whole)


def test_live_tower_gives_the_losses_of_cached_features_and_is_not_touched(
    tmp_path: Path, data: dict[str, Path], whole: Receipt, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[QFormerPretraining] = []

    class Watched(QFormerPretraining):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            tasks.append(self)

        def forward(self, *arguments: Any) -> dict[str, torch.Tensor]:
            assert self.training and self.tower is not None and not any(m.training for m in self.tower.modules())
            return super().forward(*arguments)

    monkeypatch.setattr("blip_pipelines.jobs.blip2_stage1.QFormerPretraining", Watched)
    receipt = start(tmp_path, data, config(features="live", image={"size": 8, "augment": False}))
    # The tower's products are of batches of another size, so they round differently before they become float16.
    np.testing.assert_allclose(losses(receipt), losses(whole), rtol=1e-3)
    assert not (tmp_path / ".cache").exists()
    (task,) = tasks
    assert task.tower is not None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in task.tower.parameters())
    assert load_blip2(receipt.folder).tower.hash == load_blip2(whole.folder).tower.hash


def test_the_cache_is_announced_counted_and_used_again(
    tmp_path: Path, data: dict[str, Path], whole: Receipt, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = start(tmp_path, data, config())
    assert f"frozen features: {IMAGES} images x 5 x 24 take 4.8 kB" in caplog.text
    # 7 steps x 8 reads, of which the twenty images had to be computed.
    assert first.speed["features_hit_rate"] == pytest.approx(1 - IMAGES / 56)
    second = start(tmp_path, data, config(seed=1))
    assert second.speed["features_hit_rate"] == 1
    assert {"features_seconds", "features_seconds_saved"} <= second.speed.keys()


def test_a_damaged_cache_is_noticed_before_it_is_used(tmp_path: Path, data: dict[str, Path]) -> None:
    start(tmp_path, data, config())
    (file,) = (tmp_path / ".cache" / "features").glob("*/00000.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"00000\.npy: content changed since it was written"):
        start(tmp_path, data, config(seed=1))


def test_a_cache_that_does_not_fit_the_disk_is_not_begun(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"need 4\.8 kB, free are 1\.0 kB; make room"):
        start(tmp_path, data, config())
    assert not list((tmp_path / ".cache").rglob("*.npy"))


def test_a_tower_behind_a_stem_is_filled_from_the_stems_cache(tmp_path: Path, data: dict[str, Path]) -> None:
    med = export_tiny_med(tmp_path / "med", random_stem(), 128)
    settings = config()
    settings["training"] |= {"steps": 2}
    exported = load_blip2(start(tmp_path, {**data, "med": med}, settings).folder)
    stem = exported.tower.stem
    assert stem is not None
    caches = [FeatureCache(index.parent) for index in (tmp_path / ".cache" / "features").glob("*/index.json")]
    cache = {each.identity["tower"]: each for each in caches}
    assert cache.keys() == {stem.hash, exported.tower.hash}
    pairs = Pairs.open(data["pairs"], data["images"])
    pixels = torch.from_numpy(DecodedPixels(pairs, ImageConfig(size=128))(np.arange(4)))
    # The tower itself, from pixels: products of other batches round differently before they become float16.
    of_pixels = exported.tower(pixels).float().numpy()
    np.testing.assert_allclose(cache[exported.tower.hash].read(pairs.keys[:4]), of_pixels, atol=1e-3, rtol=1e-3)


def test_a_stock_tower_and_a_bert_start_need_no_med(tmp_path: Path, data: dict[str, Path]) -> None:
    vit_folder(tmp_path / "vit")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    settings = config(
        tower={"source": str(tmp_path / "vit")},
        start={},
        tokenizer=str(tmp_path / "tokenizer.json"),
        prune_vocabulary=True,
    )
    settings["training"] |= {"steps": 2}
    receipt = start(tmp_path, {"pairs": data["pairs"], "images": data["images"]}, settings)
    exported = load_blip2(receipt.folder)
    assert exported.tower.width == exported.former.config.image_width == 24
    assert exported.tokenizer is not None
    assert receipt.facts["started"] == []


def test_what_does_not_fit_is_an_error_before_training(tmp_path: Path, data: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"image\.size: 24, and the tower reads 8"):
        start(tmp_path, data, config(image={"size": 24}))
    with pytest.raises(ConfigError, match="was given no MED"):
        start(tmp_path, {"pairs": data["pairs"], "images": data["images"]}, config())
    with pytest.raises(ConfigError, match=r"blip2_stage1\.tokenizer: missing"):
        start(tmp_path, data, config(start={}))


@pytest.mark.slow
def test_two_ranks_fill_one_cache_and_learn_what_one_rank_learns(tmp_path: Path, data: dict[str, Path]) -> None:
    settings = config()
    settings["qformer"]["text"]["dropout"] = 0.0  # masks belong to a rank
    alone = start(tmp_path / "alone", data, settings)
    shared = start(tmp_path / "shared", data, settings, mode="torchrun", processes=2)
    np.testing.assert_allclose(losses(shared), losses(alone), rtol=1e-3)
    assert shared.speed["features_hit_rate"] == alone.speed["features_hit_rate"]
    assert alone.facts["tower"] == shared.facts["tower"]


@pytest.mark.parametrize("environment", ["base", "smoke", "gpu", "paper"])
def test_every_environment_has_a_recipe_that_is_read(environment: str) -> None:
    blocks = [
        yaml.safe_load((ROOT / "conf" / name / "parameters_blip2_stage1.yml").read_text())["blip2_stage1"]
        for name in ("base", environment)
    ]
    config = read_stage("blip2_stage1", {"blip2_stage1": laid_over(*blocks)}).config
    assert config.needs_med == (environment != "paper")
    assert config.qformer.text.dropout == 0.1


@pytest.mark.parametrize("features", ["cached", "live"])
def test_half_precision_trains_and_probes(tmp_path: Path, data: dict[str, Path], features: str) -> None:
    receipt = start(tmp_path, data, half(config(features=features)))
    history = read_json(receipt.folder / "history.json")
    assert len(losses(receipt)) == 7 and any(name.startswith("val/") for row in history for name in row)
    assert all(math.isfinite(value) for row in history for value in row.values())
