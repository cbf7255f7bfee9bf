"""The training loop: what a step computes, and that cutting a run anywhere changes nothing."""

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_samples import TinyTask, batches_from
from torch import Tensor

from blip_pipelines.training import checkpoint
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import Stopped, TrainingConfig, TrainingError, train, train_step
from blip_pipelines.training.optimizer import OptimizerConfig, make_adamw

CONFIG = TrainingConfig(steps=12, batch_samples_global=8, checkpoint_every_steps=4, log_every_steps=3, peak_flops=1e9)
OPTIMIZER = OptimizerConfig(0.01, warmup_steps=3)


class Cut(Exception):
    pass


def run(work: Path, config: TrainingConfig = CONFIG, until: int | None = None, **rest):
    """Train the tiny task; an exception comes out of the data at step `until`."""

    def batches(start: int) -> Iterator[list[Tensor]]:
        for step, batch in enumerate(batches_from(start, accumulation=config.accumulation), start):
            if step == until:
                raise Cut
            yield batch

    task = TinyTask(accumulation=config.accumulation)
    history = train(task, batches, OPTIMIZER, config, World(), work, seed=3, **rest)
    return task, history


def saved(work: Path) -> dict[str, bytes]:
    newest = checkpoint.checkpoints(work / "checkpoints")[0]
    return {name: (newest / name).read_bytes() for name in ("tensors.safetensors", "history.json", "state.json")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    work = tmp_path_factory.mktemp("uninterrupted")
    run(work)
    return saved(work)


@pytest.mark.parametrize("until", [0, 3, 4, 5, 11])
def test_resumed_run_ends_with_the_same_bits(tmp_path: Path, uninterrupted: dict[str, bytes], until: int) -> None:
    with pytest.raises(Cut):
        run(tmp_path, until=until)
    run(tmp_path)
    assert saved(tmp_path) == uninterrupted


def test_how_often_a_run_looks_and_saves_changes_nothing(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    run(tmp_path, replace(CONFIG, checkpoint_every_steps=5, log_every_steps=1))
    assert saved(tmp_path) == uninterrupted


def test_finished_run_started_again_only_loads(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    task, history = run(tmp_path)
    again, history_again = run(tmp_path, until=12)
    assert history_again == history
    assert all(torch.equal(a, b) for a, b in zip(task.state_dict().values(), again.state_dict().values(), strict=True))


def test_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, uninterrupted: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Cut):
        run(tmp_path, until=10)
    newest, before = checkpoint.checkpoints(tmp_path / "checkpoints")
    content = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.INFO):
        run(tmp_path)
    assert f"{newest / 'tensors.safetensors'}: damaged" in caplog.text
    assert f"going on from step {int(before.name)}" in caplog.text
    assert saved(tmp_path) == uninterrupted


def test_accumulated_micro_steps_equal_one_large_batch() -> None:
    """Eight rows as 1 x 8 or 4 x 2; without the ring, whose candidates a micro-step changes by design."""

    def after(micro_steps: int) -> dict[str, Tensor]:
        task = TinyTask(dropout=0.0)
        task.register_buffer("ring", torch.zeros(16, 8))
        task.after_micro_step = lambda: None
        optimizer = make_adamw(task.double(), OPTIMIZER)
        rows = next(batches_from(0))[0].double()
        config = replace(CONFIG, precision="float32", accumulation=micro_steps)
        train_step(task, task, optimizer, rows.chunk(micro_steps), 0, 0, config, World())
        return task.state_dict()

    whole, parts = after(1), after(4)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-9, msg=name)


def test_sigterm_saves_at_the_end_of_a_step_and_resumes(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    def batches(start: int) -> Iterator[list[Tensor]]:
        for step, batch in enumerate(batches_from(start), start):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="after step 7 of 12"):  # asked in step 6, agreed in the next
        train(TinyTask(), batches, OPTIMIZER, CONFIG, World(), tmp_path, seed=3)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["00000007", "00000004"]
    run(tmp_path)
    assert saved(tmp_path) == uninterrupted


def test_history_holds_every_step_once_and_validation_under_its_own_names(tmp_path: Path) -> None:
    config = replace(CONFIG, validate_every_steps=5)

    def validate(step: int) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        return {"val/half": step / 2}

    with pytest.raises(Cut):
        run(tmp_path, config, until=9, validate=validate)
    _, history = run(tmp_path, config, validate=validate)
    losses = [row for row in history if "loss" in row]
    assert [row["step"] for row in losses] == list(range(1, 13))
    assert all({"fit", "spread", "learning_rate", "gradient_norm"} < row.keys() for row in losses)
    assert [row for row in history if "val/half" in row] == [
        {"step": step, "val/half": step / 2} for step in (5, 10, 12)
    ]


def test_validation_leaves_the_arithmetic_alone(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    config = replace(CONFIG, validate_every_steps=2)
    run(tmp_path, config, validate=lambda step: {"val/x": torch.rand(()).item()})
    assert saved(tmp_path)["tensors.safetensors"] == uninterrupted["tensors.safetensors"]


def test_loss_that_is_not_finite_names_its_step_and_is_never_saved(tmp_path: Path) -> None:
    def batches(start: int) -> Iterator[list[Tensor]]:
        for step, batch in enumerate(batches_from(start), start):
            yield [batch[0] * float("nan")] if step == 6 else batch

    with pytest.raises(TrainingError, match="step 7: not finite"):
        train(TinyTask(), batches, OPTIMIZER, CONFIG, World(), tmp_path, seed=3)
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[0].name == "00000004"


def test_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        run(tmp_path, until=5, fingerprint="a")
    with pytest.raises(checkpoint.CheckpointError, match="other parameters or data"):
        run(tmp_path, fingerprint="b")


def test_random_state_and_determinism_outside_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.rand(3), expected)


def test_dropout_of_a_step_differs_from_the_next(tmp_path: Path) -> None:
    """One batch, learning rate 0: what is left to differ between steps is the dropout mask (and the ring: off)."""
    task = TinyTask(dropout=0.5)
    task.after_micro_step = lambda: None
    batch = next(batches_from(0))
    still = replace(OPTIMIZER, learning_rate=0.0)
    config = replace(CONFIG, steps=4, precision="float32")
    history = train(task, lambda start: iter([batch] * 4), still, config, World(), tmp_path, seed=3)
    assert len({row["fit"] for row in history}) == 4


def test_too_few_batches_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="ended after step 2 of 12"):
        train(TinyTask(), lambda start: [next(batches_from(0))] * 2, OPTIMIZER, CONFIG, World(), tmp_path, seed=3)


def test_speed_is_beside_the_results_not_in_them(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    run(tmp_path)
    from blip_pipelines.data.storage import read_json

    speed = read_json(tmp_path / "speed.json")
    assert {"samples_per_second", "data_wait_share", "peak_memory_bytes", "mfu", "flops_per_sample"} <= speed.keys()
    # Three products of (8, 8) and (8, 1) weights, the ring of 16; forward 2 FLOPs a weight and row, backward up to 4.
    forward = 2 * (8 * 8 + 8 * 8 + 8 + 16 * 8)
    assert 2 * forward <= speed["flops_per_sample"] <= 3 * forward
