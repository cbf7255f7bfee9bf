"""Everything a run needs to go on bit for bit, in one folder a step.

`<folder>/<step>/` holds the tensors (task and optimizer), the training history, the facts (position, fingerprint,
versions) and a manifest with the hashes of the three. It is written under another name and renamed, so that it is
there whole or not at all; the last two are kept, and one whose hashes do not hold is passed over for the one before.
Random state is not saved: every draw is a function of seed, step and row. Frozen weights are named by their hash.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blip_pipelines.data.storage import MANIFEST, StorageError, publish, read_json, sha256, sha256_file, write_json

TENSORS = "tensors.safetensors"
HISTORY = "history.json"
STATE = "state.json"
KEPT = 2

Row = dict[str, float]
Rows = list[Row]

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or belongs to something else; the message says which and what to do."""


def save(
    folder: Path,
    step: int,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: Rows,
    facts: Mapping[str, Any],
) -> Path:
    """Write the state after `step` optimizer steps and drop all but the last two.

    Args:
        facts: plain values to keep beside it; with "frozen", the `frozen_hashes` of the task.

    Raises:
        StorageError: the disk is full or cannot be written; earlier checkpoints are as they were.
    """
    final, staged = folder / f"{step:08d}", folder / f".{step:08d}.partial"
    tensors, aliases = _distinct(dict(_state(task, optimizer)))
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staged / TENSORS)
        _flush(staged / TENSORS)
        (staged / HISTORY).write_text(json.dumps(history, separators=(",", ":")))
        _flush(staged / HISTORY)
        write_json(staged / STATE, {"step": step, "aliases": aliases, **facts})
        write_json(staged / MANIFEST, {name: sha256_file(staged / name) for name in (TENSORS, HISTORY, STATE)})
        publish(staged, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise StorageError(f"{final}: cannot save ({error}); free some space and run again") from error
    for old in (*checkpoints(folder)[KEPT:], *folder.glob(".*")):
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted((path for path in folder.glob("[0-9]*") if path.is_dir()), reverse=True)


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint whose hashes hold; damaged ones are warned about and passed over."""
    for path in checkpoints(folder):
        try:
            verify(path)
            return path
        except (CheckpointError, StorageError) as error:
            logger.warning("%s; taking the one before", error)
    return None


def verify(path: Path) -> None:
    """Raises CheckpointError or StorageError if a file is missing or not what was written."""
    for name, digest in read_json(path / MANIFEST).items():
        if not (path / name).exists() or sha256_file(path / name) != digest:
            raise CheckpointError(f"{path / name}: damaged, its hash is not the one that was written")


def load(path: Path, task: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], Rows]:
    """Copy a sound checkpoint into the tensors of `task` and `optimizer`; returns its facts and the history.

    Raises:
        CheckpointError: the tensors are not those of this task, or its frozen weights are others.
    """
    state = read_json(path / STATE)
    if state.get("frozen", {}) != frozen_hashes(task):
        raise CheckpointError(f"{path}: trained on other frozen weights than those loaded now: {state.get('frozen')}")
    with safe_open(path / TENSORS, "pt") as file, torch.no_grad():
        names = set(file.keys())
        _allocate(task, optimizer, names)
        targets = dict(_state(task, optimizer))
        wanted = {name for name in targets if name not in state["aliases"]}
        if wanted != names:
            odd = ", ".join(sorted(wanted ^ names)[:8])
            raise CheckpointError(f"{path}: not a checkpoint of this model; only on one side: {odd}")
        for name in sorted(wanted):
            tensor = file.get_tensor(name)
            if tensor.shape != targets[name].shape or tensor.dtype != targets[name].dtype:
                raise CheckpointError(
                    f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"the model has {targets[name].dtype} {tuple(targets[name].shape)}"
                )
            targets[name].copy_(tensor)
    return state, read_history(path)


def read_history(folder: Path) -> Rows:
    """The history in a folder of outputs, in a checkpoint, or in the newest of a folder of checkpoints; or none."""
    for path in (folder, *checkpoints(folder)):
        try:
            return json.loads((path / HISTORY).read_text())
        except (FileNotFoundError, ValueError):  # being removed or damaged: the next look finds another
            continue
    return []


def copy_newest(folder: Path, destination: Path) -> None:
    """Put the newest checkpoint of `folder` at `destination` too, without copying bytes where the disk allows it."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    shutil.copytree(checkpoints(folder)[0], destination, copy_function=link)


def frozen_hashes(task: nn.Module) -> dict[str, str]:
    """By module name of `task.frozen` (names of submodules that never change), one hash of the weights."""
    hashes = {}
    for prefix in getattr(task, "frozen", ()):
        parts = [
            f"{name}\0{sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())}\n"
            for name, tensor in sorted(task.get_submodule(prefix).state_dict().items())
        ]
        hashes[prefix] = sha256("".join(parts).encode())
    return hashes


def _state(task: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    frozen = tuple(f"{prefix}." for prefix in getattr(task, "frozen", ()))
    for name, tensor in task.state_dict().items():
        if not name.startswith(frozen):
            yield f"task.{name}", tensor
    for name, parameter in task.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            yield f"optimizer.{key}.{name}", tensor


def _distinct(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tied tensors once, under the first of their names; the other names and what they stand for."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and identity in first:
            aliases[name] = first[identity]
        else:
            first[identity] = name
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def _allocate(task: nn.Module, optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Give AdamW the state tensors that it would make at its first step."""
    for name, parameter in task.named_parameters():
        if f"optimizer.step.{name}" in names:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
