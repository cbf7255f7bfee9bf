"""The job of instruction tuning on a table of a dozen pictures: what it leaves, what it must not touch, and that
cutting it changes no bit of what it leaves.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from blip2_job_samples import STAGE2, export_stage1, export_stage2
from instruct_samples import write_published
from instruction_samples import letters, write, write_labels
from job_samples import cut_after, half, outputs

from blip_pipelines.config import ConfigError
from blip_pipelines.data.loader import DataError
from blip_pipelines.data.storage import StorageError, read_json
from blip_pipelines.jobs import instruct_tuning
from blip_pipelines.jobs.launch import LaunchConfig, launch
from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.models.frozen import weights_hash
from blip_pipelines.training.loop import TrainingError

JOB = "blip_pipelines.jobs.instruct_tuning"
KINDS = ("llama", "t5")
INSTRUCT: dict[str, Any] = {
    "prompting": {"prompt": "picture : {image} {instruction} it is"},
    "limits": {"instruction": 6, "question": 12, "answer": 6},
    "warm_start": {
        "steps": 2,
        "batch_samples_global": 8,
        "optimizer": {"learning_rate": 1e-3},
        "kept_queries": 2,
    },
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    "training": STAGE2["training"],
    "window_shards": 1,
    "probe": {"rows": 3, "answers": {"beams": 1, "max_tokens": 3, "repetition_penalty": 1.0}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs, images, labels = write_labels(folder, [12, 9])
    said = letters(answer="a {letter} crab", templates=["what is this ?", "say what it is"], candidates=None)
    kept_out = letters(role="held_out", templates=["is it a {letter} ?"], answer="{letter}")
    data_sets = {"letters": letters(), "said": said, "kept_out": kept_out}
    stage1 = export_stage1(folder)
    starts = {kind: export_stage2(stage1, folder / f"stage2_{kind}", kind) for kind in KINDS}
    return {
        "instructions": write(folder, data_sets, labels, pairs, images),
        "images": images,
        "stage1": stage1,
        **starts,
    }


def start(
    root: Path, data: dict[str, Path], kind: str | None = "llama", on_history: Any = None, **changed: Any
) -> Receipt:
    how = {"mode": "inline", "threads_per_rank": 1, "work": str(root / "work")}
    inputs = {name: data[name] for name in ("instructions", "images")}
    if kind:
        inputs["start"] = data[kind]
    return launch(JOB, {**INSTRUCT, **changed}, inputs, LaunchConfig(**how), on_history)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> dict[str, Receipt]:
    """An uninterrupted run for each kind of language model."""
    return {kind: start(tmp_path_factory.mktemp(kind), data, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_a_model_that_reads_instructions_its_checkpoint_and_its_curves(
    whole: dict[str, Receipt], kind: str
) -> None:
    receipt = whole[kind]
    exported = load_blip2(receipt.folder)
    assert exported.model is not None and exported.model.config.reads_instructions
    assert exported.model.config.prompt == INSTRUCT["prompting"]["prompt"]
    assert (receipt.folder / "instruct" / "model.safetensors").exists()
    assert (receipt.folder / "checkpoint" / "tensors.safetensors").exists()
    history = read_json(receipt.folder / "history.json")
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in history if "warm_start/regression" in row] == [1, 2]
    probes = [row for row in history if "val/lm/held_in" in row and "val/exact/held_out" in row]
    assert [row["step"] for row in probes] == [2, 4, 5]
    assert all(0 <= row["val/exact/held_in"] <= 1 for row in probes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_keeps_its_bytes_and_the_text_side_of_stage_1_trains(
    whole: dict[str, Receipt], data: dict[str, Path], kind: str
) -> None:
    exported, before = load_blip2(whole[kind].folder), load_blip2(data[kind])
    assert exported.model is not None and before.model is not None
    hashes = whole[kind].facts["frozen"]
    assert hashes["language model"] == dict.fromkeys(("before", "after"), before.model.language.hash)
    assert hashes["tower"] == dict.fromkeys(("before", "after"), weights_hash(before.tower))
    assert weights_hash(exported.model.language) == before.model.language.hash
    stage1 = load_blip2(data["stage1"]).former
    old, new = dict(before.former.named_parameters()), dict(exported.former.named_parameters())
    trained = {name for name, parameter in exported.former.named_parameters() if parameter.requires_grad}
    assert "embeddings.word_embeddings.weight" in trained
    for name in old:
        assert torch.equal(old[name], new[name]) == (name not in trained), name
    for name in ("embeddings.word_embeddings.weight", "qformer.encoder.layer.0.intermediate.dense.weight"):
        assert torch.equal(old[name], stage1.get_parameter(name)), name


def test_data_sets_are_drawn_as_the_order_says_and_none_that_is_held_out(whole: dict[str, Receipt]) -> None:
    facts = whole["llama"].facts
    assert set(facts["shares"]) == set(facts["probabilities"]) == {"letters", "said"}
    assert sum(facts["shares"].values()) == pytest.approx(1)
    assert facts["cut"]["samples"] == 40
    assert facts["cut"]["instructions"] == 0


def test_what_is_too_long_is_cut_and_counted(tmp_path: Path, data: dict[str, Path]) -> None:
    limits = {"instruction": 2, "question": 12, "answer": 4}
    training = {**INSTRUCT["training"], "validate_every_steps": 0}
    receipt = start(tmp_path, data, data_sets=["said"], limits=limits, training=training)
    cut = receipt.facts["cut"]
    assert cut["samples"] == cut["instructions"] == cut["answers"] == 40  # four words at least; three of an answer


def test_the_queries_that_are_kept_begin_as_those_of_stage_2_that_describe(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    """Nothing trains, so that the start can be seen."""
    still = {"learning_rate": 0.0, "warmup_steps": 0}
    one_step = {**INSTRUCT["training"], "steps": 1, "accumulation": 1, "validate_every_steps": 0}
    warm = {"steps": 1, "batch_samples_global": 8, "optimizer": still, "kept_queries": 3}
    receipt = start(tmp_path, data, warm_start=warm, optimizer=still, training=one_step)
    old, new = (load_blip2(folder).former.state_dict() for folder in (data["llama"], receipt.folder))
    assert torch.equal(new.pop("query_tokens"), old.pop("query_tokens")[:, [3, 0, 1, 2]])
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_it_learns(data: dict[str, Path], tmp_path: Path) -> None:
    training = {**INSTRUCT["training"], "steps": 30, "accumulation": 1, "validate_every_steps": 0}
    warm = {"steps": 30, "batch_samples_global": 8, "optimizer": {"learning_rate": 1e-2}}
    receipt = start(tmp_path, data, training=training, optimizer={"learning_rate": 1e-2}, warm_start=warm)
    history = read_json(receipt.folder / "history.json")
    for name in ("lm", "warm_start/regression"):
        curve = [row[name] for row in history if name in row]
        assert sum(curve[-5:]) < 0.9 * sum(curve[:5]), name


@pytest.mark.parametrize(("kind", "until"), [("llama", 1), ("llama", 3), ("llama", 6), ("t5", 5)])
def test_a_run_that_was_cut_leaves_the_same_bytes(
    tmp_path: Path,
    data: dict[str, Path],
    whole: dict[str, Receipt],
    kind: str,
    until: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps are counted over both phases: the warm start has two."""
    cut_after(monkeypatch, instruct_tuning, "InstructionLoader", until)
    with pytest.raises(DataError):
        start(tmp_path, data, kind)
    monkeypatch.undo()
    rows: list[Any] = []
    again = start(tmp_path, data, kind, rows.extend)
    assert outputs(again) == outputs(whole[kind])
    assert rows == read_json(again.folder / "history.json")


def test_cached_features_and_loader_workers_give_what_the_live_tower_gives(
    tmp_path: Path, data: dict[str, Path], whole: dict[str, Receipt]
) -> None:
    live = start(tmp_path, data, features="live", loader_workers=1)
    assert not (tmp_path / ".cache").exists()
    assert list((whole["llama"].folder.parents[2] / ".cache" / "features").glob("*/index.json"))
    for name in ("history.json", "blip2.json", "blip2.safetensors", "instruct/model.safetensors"):
        assert (live.folder / name).read_bytes() == (whole["llama"].folder / name).read_bytes(), name


def test_the_ablation_keeps_the_instruction_from_the_q_former(
    tmp_path: Path, data: dict[str, Path], whole: dict[str, Receipt]
) -> None:
    blind = start(tmp_path, data, instruction_aware=False)
    exported, before = load_blip2(blind.folder), load_blip2(data["llama"])
    assert exported.model is not None and not exported.model.config.reads_instructions
    assert (blind.folder / "generation" / "model.safetensors").exists()
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(exported.former.get_parameter(name), before.former.get_parameter(name))
    assert blind.facts["shares"] == whole["llama"].facts["shares"]
    losses = [read_json(receipt.folder / "history.json")[0]["lm"] for receipt in (blind, whole["llama"])]
    assert losses[0] != losses[1]


def test_multipliers_change_what_is_drawn(tmp_path: Path, data: dict[str, Path]) -> None:
    receipt = start(
        tmp_path, data, multipliers={"said": 0.0}, training={**INSTRUCT["training"], "steps": 1}, warm_start={}
    )
    assert receipt.facts["shares"] == {"letters": 1.0, "said": 0.0}
    with pytest.raises(ConfigError, match="no data set 'nothing'"):
        start(tmp_path, data, multipliers={"nothing": 1.0})


def test_a_published_instructblip_is_a_start(tmp_path: Path, data: dict[str, Path]) -> None:
    write_published(tmp_path / "published", "opt", "InstructBlip")
    published = {"source": str(tmp_path / "published"), "precision": "float32"}
    training = {**INSTRUCT["training"], "steps": 1}
    receipt = start(tmp_path, data, None, published=published, training=training, warm_start={})
    assert load_blip2(receipt.folder).model is not None


def test_what_cannot_be_tuned_is_an_error_that_says_why(tmp_path: Path, data: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="published: name a model"):
        start(tmp_path, data, None)
    with pytest.raises(ConfigError, match="kept_queries: -1 is below 0"):
        start(tmp_path, data, warm_start={"steps": 1, "kept_queries": -1})
    with pytest.raises(ConfigError, match=r"without warm_start\.steps nothing is kept"):
        start(tmp_path, data, warm_start={"kept_queries": 2})
    with pytest.raises(ConfigError, match="kept_queries: 9 leaves none of the 4 queries"):
        start(tmp_path, data, warm_start={**INSTRUCT["warm_start"], "kept_queries": 9})
    with pytest.raises(StorageError, match="no language model in it"):
        start(tmp_path, data, "stage1")
    with pytest.raises(ConfigError, match=r"limits.question: 99 tokens are more than the Q-Former's 24"):
        start(tmp_path, data, limits={"question": 99})
    with pytest.raises(ConfigError, match=r"has no {instruction}"):
        start(tmp_path, data, prompting={"prompt": "{image}"})


def test_a_language_model_that_changed_is_noticed(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Melting(instruct_tuning.InstructionTuning):
        def before_step(self, step: int) -> None:
            self.blip2.language.model.get_input_embeddings().weight.data[0, 0] += 1

    monkeypatch.setattr(instruct_tuning, "InstructionTuning", Melting)
    with pytest.raises(TrainingError, match="frozen language model changed"):
        start(tmp_path, data)


@pytest.mark.parametrize("features", ["cached", "live"])
def test_half_precision_trains_and_probes(tmp_path: Path, data: dict[str, Path], features: str) -> None:
    receipt = start(tmp_path, data, **{**half(INSTRUCT), "features": features})
    history = read_json(receipt.folder / "history.json")
    assert any(name.startswith("val/") for row in history for name in row)
    assert all(math.isfinite(value) for row in history for value in row.values())
