"""The job of BLIP-2's stage 2 on a data set of a dozen pictures: what it leaves, what it must not touch, and that
cutting it changes no bit of what it leaves.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from blip2_job_samples import STAGE2, export_stage1, language_folder
from data_samples import write_data_set
from job_samples import cut_after, half, outputs

from blip_pipelines.config import ConfigError
from blip_pipelines.data.loader import DataError
from blip_pipelines.data.storage import read_json
from blip_pipelines.jobs import blip2_stage2, training_data
from blip_pipelines.jobs.launch import LaunchConfig, launch
from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.models.frozen import weights_hash
from blip_pipelines.models.language import LanguageConfig, open_language
from blip_pipelines.models.qformer import serves_text_alone
from blip_pipelines.training.loop import TrainingError

JOB = "blip_pipelines.jobs.blip2_stage2"
KINDS = ("llama", "t5")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs, images = write_data_set(folder, [12, 8], captions_per_image=2)
    for kind in KINDS:
        language_folder(kind, folder / kind)
    return {"pairs": pairs, "images": images, "start": export_stage1(folder), "med": folder / "med", "folder": folder}


def config(data: dict[str, Path], kind: str = "llama", **changed: Any) -> dict[str, Any]:
    return {**STAGE2, "language": {"source": str(data["folder"] / kind), "precision": "float32"}, **changed}


def start(root: Path, data: dict[str, Path], settings: dict[str, Any], on_history: Any = None, **how: Any) -> Receipt:
    wanted = ("pairs", "images", "start", *([] if settings.get("stage1", True) else ["med"]))
    how = {"mode": "inline", "threads_per_rank": 1, **how}
    inputs = {name: data[name] for name in wanted if name in data}
    return launch(JOB, settings, inputs, LaunchConfig(work=str(root / "work"), **how), on_history)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> dict[str, Receipt]:
    """An uninterrupted run for each kind of language model."""
    return {kind: start(tmp_path_factory.mktemp(kind), data, config(data, kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_a_model_that_loads_its_checkpoint_and_both_curves(whole: dict[str, Receipt], kind: str) -> None:
    receipt = whole[kind]
    exported = load_blip2(receipt.folder)
    assert exported.model is not None
    assert exported.tokenizer is not None
    assert (receipt.folder / "checkpoint" / "tensors.safetensors").exists()
    history = read_json(receipt.folder / "history.json")
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in history if "warm_start/regression" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in history if "val/lm/combo" in row and "val/cider/combo" in row] == [2, 4, 5]
    assert receipt.facts["last"] == next(row for row in history if row.get("step") == 5 and "lm" in row)
    assert receipt.facts["rows"] == 30


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_keeps_its_bytes_and_the_text_side_of_stage_1_stays(
    whole: dict[str, Receipt], data: dict[str, Path], kind: str
) -> None:
    receipt = whole[kind]
    language = open_language(LanguageConfig(str(data["folder"] / kind), "float32"))
    exported, before = load_blip2(receipt.folder), load_blip2(data["start"])
    assert exported.model is not None
    assert weights_hash(exported.model.language) == language.hash
    hashes = receipt.facts["frozen"]
    assert hashes["language model"] == {"before": language.hash, "after": language.hash}
    assert hashes["tower"]["before"] == hashes["tower"]["after"]
    old, new = dict(before.former.named_parameters()), dict(exported.former.named_parameters())
    for name in old:
        assert torch.equal(old[name], new[name]) == serves_text_alone(name), name


def test_both_phases_lower_their_loss(data: dict[str, Path], tmp_path: Path) -> None:
    settings = config(data, optimizer={"learning_rate": 1e-2})
    settings["warm_start"] = {"steps": 30, "batch_samples_global": 8, "optimizer": {"learning_rate": 1e-2}}
    settings["training"] = {**STAGE2["training"], "steps": 30, "accumulation": 1, "validate_every_steps": 0}
    history = read_json(start(tmp_path, data, settings).folder / "history.json")
    for name in ("lm", "warm_start/regression"):
        curve = [row[name] for row in history if name in row]
        assert sum(curve[-5:]) < 0.9 * sum(curve[:5]), name


@pytest.mark.parametrize(("kind", "until"), [("llama", 1), ("llama", 3), ("llama", 5), ("llama", 8), ("t5", 7)])
def test_a_run_cut_in_either_phase_leaves_the_same_bytes(
    tmp_path: Path,
    data: dict[str, Path],
    whole: dict[str, Receipt],
    kind: str,
    until: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps are counted over both phases: the warm start has four."""
    settings = config(data, kind)
    cut_after(monkeypatch, training_data, "Loader", until)
    with pytest.raises(DataError):
        start(tmp_path, data, settings)
    monkeypatch.undo()
    rows: list[Any] = []
    again = start(tmp_path, data, settings, rows.extend)
    assert outputs(again) == outputs(whole[kind])
    assert rows == read_json(again.folder / "history.json")


def test_cached_features_give_what_the_live_tower_gives(
    tmp_path: Path, data: dict[str, Path], whole: dict[str, Receipt]
) -> None:
    cached, live = whole["llama"], start(tmp_path, data, config(data, features="live"))
    assert list((cached.folder.parents[2] / ".cache" / "features").glob("*/index.json"))
    assert not (tmp_path / ".cache").exists()
    for name in ("history.json", "blip2.json", "blip2.safetensors", "generation/model.safetensors"):
        assert (live.folder / name).read_bytes() == (cached.folder / name).read_bytes(), name


def test_without_stage_1_the_q_former_starts_where_stage_1_did(tmp_path: Path, data: dict[str, Path]) -> None:
    """At learning rate 0, what comes out is the start; it is not stage 1's, and the sizes are."""
    data = dict(data)
    still = {"optimizer": {"learning_rate": 0.0}, "warm_start": {"steps": 0}}
    receipt = start(tmp_path, data, config(data, stage1=False, **still))
    found, trained = load_blip2(receipt.folder).former, load_blip2(data["start"]).former
    first = load_blip2(data["folder"] / "before").former
    assert found.config == trained.config
    for name, value in found.named_parameters():
        assert torch.equal(value, first.get_parameter(name)), name
    assert not torch.equal(found.query_tokens, trained.query_tokens)
    assert receipt.facts["started"][0].startswith(str(data["med"]))
    with pytest.raises(ConfigError, match="qformer_start: the job was given no MED"):
        del data["med"]
        start(tmp_path / "nowhere", data, config(data, stage1=False))


def test_a_language_model_that_changed_is_noticed(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Melting(blip2_stage2.GenerativePretraining):
        def before_step(self, step: int) -> None:
            super().before_step(step)
            self.blip2.language.model.get_input_embeddings().weight.data[0, 0] += 1

    monkeypatch.setattr(blip2_stage2, "GenerativePretraining", Melting)
    with pytest.raises(TrainingError, match="frozen language model changed"):
        start(tmp_path, data, config(data))


def test_the_loader_in_other_processes_gives_the_same_bytes(
    tmp_path: Path, data: dict[str, Path], whole: dict[str, Receipt]
) -> None:
    assert outputs(start(tmp_path, data, config(data, loader_workers=2))) == outputs(whole["llama"])


def test_a_random_language_model_needs_no_package(tmp_path: Path, data: dict[str, Path]) -> None:
    scratch = {"source": "scratch", "precision": "float32", "scratch": {"width": 16, "layers": 1, "heads": 2}}
    receipt = start(tmp_path, data, config(data, language=scratch))
    model = load_blip2(receipt.folder).model
    assert model is not None
    assert json.loads((receipt.folder / "generation" / "config.json").read_text())["text_config"]["hidden_size"] == 16
    assert len(model.language.tokenizer) >= len(load_blip2(data["start"]).tokenizer or "")


@pytest.mark.parametrize("features", ["cached", "live"])
def test_half_precision_trains_and_probes(tmp_path: Path, data: dict[str, Path], features: str) -> None:
    settings = half(config(data, features=features))
    settings["language"] = {**settings["language"], "precision": "bfloat16"}
    history = read_json(start(tmp_path, data, settings).folder / "history.json")
    assert any(name.startswith("val/") for row in history for name in row)
    assert all(math.isfinite(value) for row in history for value in row.values())
