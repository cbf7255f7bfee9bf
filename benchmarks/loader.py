"""Images and captions to batches: our loader against a plain PyTorch data set of files, and against webdataset.

All three read the same images from warm files, crop, resize and flip them with Pillow, tokenise with the same fast
tokenizer and end with the same thing: normalised float32 pixels and token ids. Everything runs in one process, as a
worker does it, so images per second of CPU time is images per second and core.
"""

import io
import json
import math
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import circumstances, interleaved, write
from blip_pipelines.data.loader import DecodedPixels, Loader
from blip_pipelines.data.order import Order
from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.shards import ShardWriter, write_manifest
from blip_pipelines.data.tokens import CaptionTokenizer, prune_vocabulary
from blip_pipelines.data.transforms import ImageConfig

IMAGES, BATCH, MAX_TOKENS = 128, 32, 30
KINDS = {  # name: width, height, format, view
    "128 px PNG to 128": (128, 128, "PNG", 128),
    "640 x 480 JPEG to 224": (640, 480, "JPEG", 224),
    "1280 x 960 JPEG to 224": (1280, 960, "JPEG", 224),
}
WORDS = [
    *("a", "the", "of", "with", "and", "red", "green", "blue", "small", "large"),
    *("crab", "house", "flag", "dog", "woman", "man", "running", "street", "table", "tree"),
]

Batch = tuple[Tensor, Tensor]


def picture(number: int, width: int, height: int, kind: str) -> bytes:
    """Something as hard to decode as a photograph: smooth colours, edges and grain."""
    draw = np.random.default_rng(number)
    smooth = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    edges = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST
    )
    grain = draw.normal(0, 6, (height, width, 1))
    pixels = np.asarray(Image.blend(smooth, edges, 0.25)) + grain
    written = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(written, kind, quality=90)
    return written.getvalue()


def caption(number: int) -> str:
    draw = random.Random(number)
    return " ".join(draw.choices(WORDS, k=draw.randint(5, 14)))


def make_tokenizer() -> CaptionTokenizer:
    """A WordPiece tokenizer of the captions' words, pruned as in a run."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789", *WORDS]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return prune_vocabulary(tokenizer.to_str().encode(), map(caption, range(IMAGES)))[0]


class Files(Dataset):
    """The data set of every tutorial: a folder of images and a dictionary of captions, Pillow, float32."""

    def __init__(self, folder: Path, config: ImageConfig, tokenizer: CaptionTokenizer):
        self.paths = sorted(path for path in folder.iterdir() if path.suffix != ".json")
        self.captions = json.loads((folder / "captions.json").read_text())
        self.view, self.tokenizer = View(config), tokenizer

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        with Image.open(self.paths[index]) as opened:
            image = opened.convert("RGB")
        return self.view(image), self.captions[self.paths[index].name]

    def collate(self, samples: list[tuple[Tensor, str]]) -> Batch:
        pixels, captions = zip(*samples, strict=True)
        return torch.stack(pixels), torch.from_numpy(self.tokenizer(list(captions), MAX_TOKENS)[0])


class View:
    """Random resized crop, flip, float32, normalised: what torchvision's transforms do, with the same Pillow calls."""

    def __init__(self, config: ImageConfig):
        self.config = config
        self.mean = torch.tensor(config.mean)[:, None, None]
        self.std = torch.tensor(config.std)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        size = (self.config.size, self.config.size)
        view = image.crop(self.box(*image.size)).resize(size, Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub_(self.mean).div_(self.std)

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = random.uniform(*self.config.crop_scale) * width * height
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, upper = random.randint(0, width - w), random.randint(0, height - h)
                return left, upper, left + w, upper + h
        side = min(width, height)
        left, upper = (width - side) // 2, (height - side) // 2
        return left, upper, left + side, upper + side


def write_sources(folder: Path, width: int, height: int, kind: str) -> None:
    """The same images three times: files, our shards and table, a webdataset shard."""
    (folder / "files").mkdir(parents=True)
    captions, rows = {}, []
    with ShardWriter(folder / "images") as writer, tarfile.open(folder / "webdataset.tar", "w") as tar:
        for number in range(IMAGES):
            content, text = picture(number, width, height, kind), caption(number)
            name = f"{number:05d}.{'png' if kind == 'PNG' else 'jpg'}"
            (folder / "files" / name).write_bytes(content)
            captions[name] = text
            for member, part in ((name, content), (f"{number:05d}.txt", text.encode())):
                header = tarfile.TarInfo(member)
                header.size = len(part)
                tar.addfile(header, io.BytesIO(part))
            about = {
                "width": width,
                "height": height,
                "caption": text,
                "origin": "web",
                "source": "made",
                "split": "train",
            }
            rows.append({**vars(writer.add(content)), **about})
    (folder / "files" / "captions.json").write_text(json.dumps(captions))
    images = write_manifest(folder / "images", writer.shards)
    write_pairs(folder / "pairs", [pa.Table.from_pylist(rows, PAIR_SCHEMA)], images)


def ours(folder: Path, config: ImageConfig, tokenizer: CaptionTokenizer) -> Iterator[Batch]:
    pairs = Pairs.open(folder / "pairs", folder / "images")
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (config.mean, config.std))
    order = Order(pairs.shard_rows, seed=0, window_shards=8)
    reader = DecodedPixels(pairs, config, train=True)
    for (batch,) in Loader(pairs, order, reader, tokenizer, MAX_TOKENS, BATCH, steps=10**9):
        yield (batch.pixels - mean) / std, batch.token_ids


def plain(folder: Path, config: ImageConfig, tokenizer: CaptionTokenizer) -> Iterator[Batch]:
    files = Files(folder / "files", config, tokenizer)
    loader = DataLoader(files, BATCH, shuffle=True, drop_last=True, collate_fn=files.collate)
    while True:
        yield from loader


def by_webdataset(folder: Path, config: ImageConfig, tokenizer: CaptionTokenizer) -> Iterator[Batch]:
    view = View(config)
    samples = webdataset.WebDataset(str(folder / "webdataset.tar"), shardshuffle=False).shuffle(1000).decode("pilrgb")
    pairs = samples.to_tuple("jpg;png", "txt").map_tuple(view, lambda text: text)
    while True:
        for pixels, captions in pairs.batched(BATCH, partial=False, collation_fn=lambda rows: zip(*rows, strict=True)):
            yield torch.stack(pixels), torch.from_numpy(tokenizer(list(captions), MAX_TOKENS)[0])


VARIANTS: dict[str, Callable[..., Iterator[Batch]]] = {"ours": ours, "files": plain, "webdataset": by_webdataset}


def measure(kind: str, rounds: int) -> dict[str, Any]:
    width, height, encoded, size = KINDS[kind]
    config = ImageConfig(size=size, randaugment_operations=0)
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as temporary:
        write_sources(Path(temporary), width, height, encoded)
        streams = {name: make(Path(temporary), config, tokenizer) for name, make in VARIANTS.items()}
        batches = IMAGES // BATCH

        def draw_from(stream: Iterator[Batch]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(batches):
                    pixels, token_ids = next(stream)
                    assert pixels.shape == (BATCH, 3, size, size) and len(token_ids) == BATCH

            return run

        times = interleaved({name: draw_from(stream) for name, stream in streams.items()}, rounds, warmup=1)
    return {
        name: {**found, "images_per_second_and_core": IMAGES / found["cpu_seconds"]} for name, found in times.items()
    }


def main(command: str, rounds: int) -> str:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"circumstances": circumstances(command)}
    found["circumstances"]["versions"]["webdataset"] = webdataset.__version__
    found |= {kind: measure(kind, rounds) for kind in KINDS}
    rows = []
    for kind in KINDS:
        speeds = {name: found[kind][name]["images_per_second_and_core"] for name in VARIANTS}
        ratios = [f"{speeds['ours'] / speeds[name]:.2f}x" for name in ("files", "webdataset")]
        rows.append([kind, *(f"{speed:,.0f}" for speed in speeds.values()), *ratios])
    heads = ["images", "ours", "files", "webdataset", "over files", "over webdataset"]
    reading = (
        "Images per second and core, from files in memory to normalised float32 pixels and token ids; random resized "
        "crop and flip with Pillow in all three, medians of interleaved rounds."
    )
    return write("loader", found, heads, rows, reading)
