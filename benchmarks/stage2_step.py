"""One optimizer step of BLIP-2's stage 2 (forward, backward, clipping, AdamW): ours against stock.

Stock is `Blip2ForConditionalGeneration`, loaded from our export, so the weights are the same; its frozen parts have no
gradient, and it reads the same captions, padded to the longest. Losses and gradients must agree before anything is
timed. The language model has SmolLM2-135M's size and random weights, which cost what trained ones do.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measure import DEVICE, circumstances, gemm_peak, interleaved, write
from blip_pipelines.data.loader import Batch
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.blip2_exports import export_blip2
from blip_pipelines.models.frozen_tower import FrozenTower, take_norm, vision_tower
from blip_pipelines.models.initialisation import initialise
from blip_pipelines.models.language import LanguageModel
from blip_pipelines.models.qformer import QFormer, QFormerConfig
from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.vision import VisionConfig, VisionTransformer
from blip_pipelines.objectives.generative import GenerativeConfig, GenerativePretraining
from blip_pipelines.training.distributed import World
from blip_pipelines.training.optimizer import OptimizerConfig, make_adamw

TOLERANCE = 2e-4  # relative, of loss and gradients' norms in float32: our tower's outputs are rounded to float16
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """Args: before, after: tokens of the prompt around the soft prompts."""

    language: LlamaConfig
    vision: VisionConfig
    text: TextConfig
    batch: int
    queries: int = 8
    before: int = 29
    after: int = 6


def smollm2(**changed: int) -> LlamaConfig:
    return LlamaConfig(
        **{
            **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
            **{"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048},
            **changed,
        },
        **{"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    )


DEFAULT = Size(
    smollm2(),
    VisionConfig(image_size=64, patch_size=16, width=192, layers=2, heads=6, mlp_width=768),
    TextConfig(vocabulary=2300, width=192, layers=3, heads=6, ffn_width=768, dec_id=2298, enc_id=2299),
    batch=16 if DEVICE == "cpu" else 256,
)
SIZES = {
    "default, chat prompt of 35 tokens": DEFAULT,
    "no prompt, 32 queries, as published": replace(DEFAULT, queries=32, before=0, after=0),
}


def make_model(size: Size, dtype: torch.dtype) -> tuple[Blip2, FrozenTower]:
    vision = VisionTransformer(size.vision)
    initialise(vision, "fan_in", 0)
    tower = vision_tower(vision, take_norm(vision), size.vision.image_size)
    former = QFormer(QFormerConfig(text=size.text, queries=size.queries).behind(tower))
    words = {f"w{number}": number for number in range(size.language.vocab_size - 1)}  # a row is left for <image>
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    stock = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2")
    language: Any = LlamaForCausalLM(size.language)
    prompt = " ".join([*["w7"] * size.before, "{image}", *["w8"] * size.after])
    return Blip2(former, LanguageModel(language.to(dtype), stock), Blip2Config(prompt), tower), tower


def make_batch(size: Size, seed: int = 0) -> Batch:
    """Captions as long as the default's in SmolLM2's tokens, 8 words on average."""
    draw = torch.Generator().manual_seed(seed)
    lengths_B = (torch.randn(size.batch, generator=draw) * 3 + 10).round().long().clamp(4, 20)
    mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    ids_BT = torch.randint(100, size.language.vocab_size - 1, mask_BT.shape, generator=draw)
    ids_BT[:, 0] = 1
    ids_BT.scatter_(1, lengths_B[:, None] - 1, 2)
    rows_B, side = torch.arange(size.batch), size.vision.image_size
    pixels = torch.randint(0, 256, (size.batch, 3, side, side), dtype=torch.uint8, generator=draw)
    return Batch(*(pixels, ids_BT.masked_fill(~mask_BT, 2), mask_BT, rows_B, rows_B, rows_B), int(mask_BT[:, 1:].sum()))


class StockStage2(nn.Module):
    """Stage 2 on the stock class, from the same weights."""

    def __init__(self, model: Blip2, tower: FrozenTower):
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            export_blip2(model.former, Path(folder), tower, None, {"size": tower.image_size}, model=copy.copy(model))
            stock: Any = Blip2ForConditionalGeneration.from_pretrained(Path(folder) / "generation", dtype=torch.float32)
        stock.language_model.to(model.language.dtype)
        self.stock: Any = stock.train()
        for part in (stock.language_model, stock.vision_model):
            part.requires_grad_(False).eval()
        self.stock.vision_model.post_layernorm.requires_grad_(True)
        queries = [self.stock.config.image_token_index] * model.former.config.queries
        self.prompt = [*model.before_ids, *queries, *model.after_ids]
        self.mean, self.std = tower.mean, tower.std

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        prompt_BS = torch.tensor([self.prompt], device=batch.token_ids.device).expand(len(batch.rows), -1)
        words_BT, mask_BT = batch.token_ids[:, 1:], batch.token_mask[:, 1:]
        found = self.stock(
            (batch.pixels - self.mean) / self.std,
            input_ids=torch.cat([prompt_BS, words_BT], 1),
            attention_mask=torch.cat([torch.ones_like(prompt_BS), mask_BT.long()], 1),
            labels=torch.cat([torch.full_like(prompt_BS, -100), words_BT.masked_fill(~mask_BT, -100)], 1),
        )
        return {"loss": found.loss}


def make_tasks(size: Size, dtype: torch.dtype) -> dict[str, nn.Module]:
    """By name, from the same weights; `cached` reads what the tower gives."""
    model, tower = make_model(size, dtype)
    stock = StockStage2(model, tower)
    cached = copy.deepcopy(model)
    cached.tower = None
    tasks: dict[str, nn.Module] = {
        "ours": GenerativePretraining(model, GenerativeConfig(), World()),
        "cached": GenerativePretraining(cached, GenerativeConfig(), World()),
        "stock": stock,
    }
    return {name: task.to(DEVICE).train() for name, task in tasks.items()}


def make_batches(size: Size, tower: FrozenTower) -> dict[str, Batch]:
    batch = make_batch(size)
    seen = replace(batch, pixels=tower.to("cpu")(batch.pixels))
    tower.to(DEVICE)
    return {"ours": batch.to(DEVICE), "cached": seen.to(DEVICE), "stock": batch.to(DEVICE)}


def make_step(task: nn.Module, batch: Batch, half: bool) -> Callable[[], None]:
    optimizer = make_adamw(task, OptimizerConfig(learning_rate=1e-4))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss = task(batch, 0)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def assert_equal(tasks: dict[str, nn.Module], batches: dict[str, Batch]) -> dict[str, float]:
    """The largest relative differences of loss and gradients' norms to stock's.

    Raises:
        AssertionError: one is more than rounding.
    """
    losses, norms = {}, {}
    for name, task in tasks.items():
        loss = task(batches[name], 0)["loss"]
        loss.backward()
        losses[name] = loss.item()
        norms[name] = {
            _stock_name(key): parameter.grad.norm().item()
            for key, parameter in task.named_parameters()
            if parameter.grad is not None
        }
        task.zero_grad(set_to_none=True)
    largest = max(norms["stock"].values())
    found = {}
    for name in tasks.keys() - {"stock"}:
        assert norms[name].keys() == norms["stock"].keys(), norms[name].keys() ^ norms["stock"].keys()
        found[f"{name}, loss"] = abs(losses[name] / losses["stock"] - 1)
        found[f"{name}, gradients"] = max(
            abs(norms[name][key] - norm) / largest for key, norm in norms["stock"].items()
        )
    assert max(found.values()) < TOLERANCE, found
    return found


def _stock_name(parameter: str) -> str:
    for ours, stock in (
        ("stock.", ""),
        ("blip2.former.ln_vision.", "vision_model.post_layernorm."),
        ("blip2.former.", ""),
        ("blip2.", ""),
    ):
        if parameter.startswith(ours):
            return stock + parameter.removeprefix(ours)
    return parameter


def measure(size: Size, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": size.batch}
    for precision, dtype in PRECISIONS.items():
        tasks: dict[str, Any] = make_tasks(size, dtype)
        batches = make_batches(size, tasks["ours"].blip2.tower)
        if precision == "float32":
            found["difference"] = assert_equal(tasks, batches)
        steps = {name: make_step(task, batches[name], precision == "bfloat16") for name, task in tasks.items()}
        flops = {}
        for name, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            flops[name] = counter.get_total_flops()
        times = interleaved(steps, rounds, warmup=1)
        peak = gemm_peak(dtype)
        found[precision] = {"gemm_peak": peak} | {
            name: {**took, "flops": flops[name], "samples_per_second": size.batch / took["seconds"]}
            for name, took in times.items()
        }
        for name in ("ours", "cached"):
            for how in ("seconds", "cpu_seconds"):
                found[precision][name][f"speedup_{how}"] = times["stock"][how] / times[name][how]
    return found


def main(command: str, rounds: int) -> str:
    found: dict[str, Any] = {"circumstances": {**circumstances(command), "device": DEVICE}}
    found |= {name: measure(size, rounds) for name, size in SIZES.items()}
    rows = []
    for name in SIZES:
        for precision in PRECISIONS:
            part = found[name][precision]
            rows.append(
                [
                    f"{name}, batch {found[name]['batch']}",
                    precision,
                    *(f"{part[who]['samples_per_second']:.1f}" for who in ("ours", "cached", "stock")),
                    *(f"**{part[who]['speedup_seconds']:.2f}x**" for who in ("ours", "cached")),
                    f"{part['ours']['speedup_cpu_seconds']:.2f}x",
                    f"{part['ours']['flops'] / 1e9:.0f} / {part['stock']['flops'] / 1e9:.0f}",
                    f"{part['gemm_peak'] / 1e9:.0f}",
                ]
            )
    heads = ["size", "precision", "ours, samples/s", "ours from cached features", "stock", "speed-up", "cached"]
    heads += ["by CPU seconds", "GFLOP a step, ours / stock", "GEMM peak, GFLOP/s"]
    reading = (
        "One optimizer step of BLIP-2's stage 2 around a frozen language model of SmolLM2-135M's size: ours against "
        "stock `Blip2ForConditionalGeneration` on the same weights, equal losses and gradients, interleaved medians."
    )
    return write("stage2_step", found, heads, rows, reading)
