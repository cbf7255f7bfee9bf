"""A small evaluation, for tests that run it on one rank and on several."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from data_samples import WORDS, encode
from PIL import Image

from blip_pipelines.data.pairs import write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.shards import ShardWriter, write_manifest
from blip_pipelines.jobs import evaluate_med

CONFIG = {
    "subsets": ["combo", "image"],
    "candidates": 4,
    "beam": {"min_tokens": 2, "max_tokens": 8},
    "nucleus": {"strategy": "nucleus", "min_tokens": 2, "max_tokens": 8},
    "bootstrap_draws": 200,
    "batch_images": 4,
}


def write_scene(folder: Path, images: int = 24) -> dict[str, Path]:
    """Pairs and images: test pictures in two subsets, each a copy, a little darker, of a training picture.

    A third of the captions stand under two pictures, and some pictures have two captions.
    """
    draw = np.random.Generator(np.random.Philox(0))
    rows = []
    with ShardWriter(folder / "images", shard_images=100) as writer:
        for number in range(images):
            pixels = draw.integers(0, 230, (6, 6, 3), dtype=np.uint8)
            train = encode(Image.fromarray(pixels + 25).resize((24, 24)))
            held_out = encode(Image.fromarray(pixels).resize((24, 24)))
            captions = [" ".join(draw.choice(WORDS, 2 + number % 4)) for _ in range(1 + number % 5 // 4)]
            if number % 3 == 2:
                captions[0] = rows[-1]["caption"]
            subset = "combo" if number < images // 2 else "image"
            for content, split, name in ((train, "train", None), (held_out, "test", subset)):
                stored = {**vars(writer.add(content)), "width": 24, "height": 24, "source": "sample", "origin": "human"}
                rows += [{**stored, "caption": text, "split": split, "subset": name} for text in captions]
    images_hash = write_manifest(folder / "images", writer.shards)
    write_pairs(folder / "pairs", [pa.Table.from_pylist(rows, PAIR_SCHEMA)], images_hash)
    return {"pairs": folder / "pairs", "images": folder / "images"}


def evaluate(world, config: dict, inputs: dict[str, Path], work: Path) -> dict:
    (work / "out").mkdir(parents=True, exist_ok=True)
    return evaluate_med.run(config, inputs, work, world)
