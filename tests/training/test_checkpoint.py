"""Checkpoints: whole or not at all, never of something else, tied and frozen tensors as they should be."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engine_samples import TinyTask, batches_from
from safetensors import safe_open

from blip_pipelines.data.storage import StorageError
from blip_pipelines.training import checkpoint
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import TrainingConfig, train_step
from blip_pipelines.training.optimizer import OptimizerConfig, make_adamw

CONFIG = TrainingConfig(steps=9, batch_samples_global=8)


def trained(steps: int = 2) -> tuple[TinyTask, torch.optim.Optimizer]:
    task = TinyTask()
    optimizer = make_adamw(task, OptimizerConfig(0.1))
    for step, batches in zip(range(steps), batches_from(0), strict=False):
        train_step(task, task, optimizer, batches, step, 0, CONFIG, World())
    return task, optimizer


def test_load_copies_into_the_tensors_that_are_there(tmp_path: Path) -> None:
    task, optimizer = trained()
    path = checkpoint.save(tmp_path, 2, task, optimizer, [{"step": 1, "loss": 0.1}], {"ranks": 1})
    fresh = TinyTask()
    fresh_optimizer = make_adamw(fresh, OptimizerConfig(0.1))
    places = {name: tensor.data_ptr() for name, tensor in fresh.state_dict().items()}
    state, history = checkpoint.load(path, fresh, fresh_optimizer)
    assert (state["step"], state["ranks"], history) == (2, 1, [{"step": 1, "loss": 0.1}])
    assert {name: tensor.data_ptr() for name, tensor in fresh.state_dict().items()} == places
    for name, tensor in task.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    for (name, ours), theirs in zip(task.named_parameters(), fresh.parameters(), strict=True):
        for key, value in optimizer.state[ours].items():
            assert torch.equal(fresh_optimizer.state[theirs][key], value), (name, key)


def test_tied_tensors_are_saved_once(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 2, *trained(), [], {})
    with safe_open(path / checkpoint.TENSORS, "pt") as file:
        names = set(file.keys())
    assert "task.first.weight" in names
    assert "task.again.weight" not in names
    assert {"task.ring", "task.pointer", "task.average", "optimizer.exp_avg_sq.out.bias"} < names


def test_equal_states_are_equal_bytes(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path / name, 2, *trained(), [{"step": 1}], {}) for name in "ab"]
    assert {f.name: f.read_bytes() for f in paths[0].iterdir()} == {f.name: f.read_bytes() for f in paths[1].iterdir()}


def test_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, *trained(), [], {})
    assert {path.name for path in tmp_path.iterdir()} == {"00000003", "00000002"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write further, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_names_the_path_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    kept = checkpoint.save(tmp_path, 2, *trained(), [{"step": 2}], {})
    with largest_file(1000), pytest.raises(StorageError, match="00000003: cannot save"):
        checkpoint.save(tmp_path, 3, *trained(3), [], {})
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]
    assert checkpoint.newest_sound(tmp_path) == kept


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.HISTORY, checkpoint.STATE, "manifest.json"])
def test_every_file_is_covered_by_a_hash(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    before, newest = (checkpoint.save(tmp_path, step, *trained(), [{"step": 1}], {}) for step in (1, 2))
    content = bytearray((newest / name).read_bytes())
    content[-3] ^= 1
    (newest / name).write_bytes(content)
    assert checkpoint.newest_sound(tmp_path) == before
    assert newest.name in caplog.text


def test_checkpoint_of_another_model_is_refused_with_names(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 2, *trained(), [], {})
    other = TinyTask()
    other.register_buffer("extra", torch.zeros(1))
    with pytest.raises(checkpoint.CheckpointError, match=r"task\.extra"):
        checkpoint.load(path, other, make_adamw(other, OptimizerConfig(0.1)))
    other = TinyTask()
    other.register_buffer("ring", torch.zeros(4, 8))
    with pytest.raises(checkpoint.CheckpointError, match=r"task\.ring.*\(16, 8\).*\(4, 8\)"):
        checkpoint.load(path, other, make_adamw(other, OptimizerConfig(0.1)))


def test_frozen_weights_are_named_by_hash_and_verified(tmp_path: Path) -> None:
    task, optimizer = trained()
    task.frozen = ("out",)
    path = checkpoint.save(tmp_path, 2, task, optimizer, [], {"frozen": checkpoint.frozen_hashes(task)})
    with safe_open(path / checkpoint.TENSORS, "pt") as file:
        assert "task.out.weight" not in set(file.keys())
    checkpoint.load(path, task, optimizer)
    with torch.no_grad():
        task.out.weight[0, 0] += 1
    with pytest.raises(checkpoint.CheckpointError, match="other frozen weights"):
        checkpoint.load(path, task, optimizer)


def test_history_is_found_in_outputs_in_a_checkpoint_and_among_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.read_history(tmp_path / "nothing") == []
    path = checkpoint.save(tmp_path, 1, *trained(), [{"step": 1}], {})
    checkpoint.save(tmp_path, 2, *trained(), [{"step": 1}, {"step": 2}], {})
    assert checkpoint.read_history(path) == [{"step": 1}]
    assert checkpoint.read_history(tmp_path) == [{"step": 1}, {"step": 2}]
