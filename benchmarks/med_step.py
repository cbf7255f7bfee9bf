"""One optimizer step of MED pretraining (forward, backward, clipping, AdamW, momentum, queue): ours against stock.

Both steps are the same function around another task, on the same batch from the same weights, and their losses and
gradients must agree before anything is timed. FLOPs are those of matrix products, as each step executes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import DEVICE, circumstances, gemm_peak, interleaved, write
from benchmarks.stock_med import StockMedPretraining
from blip_pipelines.data.loader import Batch
from blip_pipelines.models.med import Med, MedConfig
from blip_pipelines.models.stem import lay_out
from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.vision import VisionConfig
from blip_pipelines.objectives.med import MedObjectiveConfig, MedPretraining
from blip_pipelines.training.distributed import World
from blip_pipelines.training.optimizer import OptimizerConfig, make_adamw

TOLERANCE = 2e-4 if DEVICE == "cuda" else 2e-5  # relative, float32, of losses and of each gradient's norm
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEP = 50  # of the ramp of alpha
STEM_CELLS, STEM_WIDTH = 16, 1280  # what the frozen stem of the default gives for an image


@dataclass(frozen=True)
class Size:
    vision: VisionConfig
    text: TextConfig
    batch: int
    queue: int = 480


DEFAULT_TEXT = TextConfig(
    vocabulary=2300, width=192, layers=3, heads=6, ffn_width=768, max_positions=64, dec_id=2298, enc_id=2299
)
SIZES = {
    "default, 17 image tokens": Size(
        VisionConfig(image_size=84, patch_size=21, width=192, layers=2, heads=6, mlp_width=768), DEFAULT_TEXT, batch=96
    ),
    "default at 224 px, 197 image tokens": Size(
        VisionConfig(width=192, layers=2, heads=6, mlp_width=768), DEFAULT_TEXT, batch=32
    ),
    # Half the depth of ViT-S/16, with a text side as wide and deep as the ViT, as BLIP's is.
    "ViT-S/16 of 6 layers, 197 image tokens": Size(
        VisionConfig(width=384, layers=6, heads=6, mlp_width=1536),
        TextConfig(width=384, layers=6, heads=6, ffn_width=1536),
        batch=16,
    ),
}
if DEVICE == "cuda":  # BLIP's own size, which a CPU takes minutes for
    SIZES = {
        "default, 17 image tokens": replace(SIZES["default, 17 image tokens"], batch=1024, queue=4096),
        "BLIP base, 197 image tokens": Size(VisionConfig(), TextConfig(), batch=64, queue=4096),
    }


def make_batches(size: Size, seed: int = 0) -> dict[str, Batch]:
    """One batch as each step reads it: captions as long as the default's, 10 tokens on average; random pixels.

    The default's pixels are features of the frozen stem: vectors for us, for a stock class the picture that holds them.
    """
    draw = torch.Generator().manual_seed(seed)
    text = size.text
    lengths_B = (torch.randn(size.batch, generator=draw) * 2.5 + 10).round().long().clamp(4, 20)
    mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    words_BT = torch.randint(1000, text.vocabulary - 100, mask_BT.shape, generator=draw)
    words_BT[:, 0] = text.cls_id
    words_BT.scatter_(1, lengths_B[:, None] - 1, text.sep_id)
    rows_B = torch.arange(size.batch)
    pixels = torch.randn(size.batch, 3, size.vision.image_size, size.vision.image_size, generator=draw)
    batch = Batch(
        pixels=pixels,
        token_ids=words_BT.masked_fill(~mask_BT, text.pad_id),
        token_mask=mask_BT,
        image_ids=rows_B,
        text_ids=rows_B,
        rows=rows_B,
        target_tokens=int(mask_BT[:, 1:].sum()),
    )
    if size.vision.patches != STEM_CELLS:
        return {"ours": batch, "stock": batch}
    features_BNP = torch.randn(size.batch, STEM_CELLS, STEM_WIDTH, generator=draw).half()
    return {
        "ours": replace(batch, pixels=features_BNP),
        "stock": replace(batch, pixels=lay_out(features_BNP.float())),
    }


def make_tasks(size: Size) -> dict[str, nn.Module]:
    """Our task and the stock one, from the same weights."""
    med = Med(MedConfig(size.vision, size.text, projection=128))
    config = MedObjectiveConfig(
        momentum=0.95, queue_samples=size.queue, alpha_max=0.2, alpha_ramp_steps=100, negatives_uniform_share=0.5
    )
    tasks = {"ours": MedPretraining(med, config, World()).train(), "stock": StockMedPretraining(med, config).train()}
    return {name: task.to(DEVICE) for name, task in tasks.items()}


def make_step(task: nn.Module, batch: Batch, precision: str) -> Callable[[], None]:
    """The step of the training loop, for one rank and one micro-batch."""
    optimizer = make_adamw(task, OptimizerConfig(learning_rate=1e-4))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> None:
        task.before_step(STEP)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = task(batch, STEP)["loss"]
        loss.backward()
        task.after_micro_step()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def assert_equal(tasks: dict[str, nn.Module], batches: dict[str, Batch]) -> dict[str, float]:
    """The largest relative difference of the losses and of the gradients' norms in float32.

    Raises:
        AssertionError: it is more than rounding.
    """
    losses, norms = {}, {}
    for name, task in tasks.items():
        task.before_step(STEP)
        losses[name] = task(batches[name], STEP)
        losses[name]["loss"].backward()
        prefix = "model." if name == "ours" else ""
        norms[name] = {
            key.removeprefix(prefix): parameter.grad.norm().item()
            for key, parameter in task.named_parameters()
            if parameter.grad is not None
        }
        task.zero_grad(set_to_none=True)
    differences = {
        key: abs(losses["ours"][key].item() / losses["stock"][key].item() - 1) for key in ("itc", "itm", "lm", "loss")
    }
    assert norms["ours"].keys() == norms["stock"].keys(), norms["ours"].keys() ^ norms["stock"].keys()
    largest = max(norms["stock"].values())
    differences["gradients"] = max(abs(norms["ours"][key] - norm) / largest for key, norm in norms["stock"].items())
    assert max(differences.values()) < TOLERANCE, differences
    return differences


def measure(size: Size, rounds: int) -> dict[str, Any]:
    batches = {name: batch.to(DEVICE) for name, batch in make_batches(size).items()}
    token_mask = batches["ours"].token_mask
    found: dict[str, Any] = {
        "batch": size.batch,
        "tokens_mean": token_mask.sum(1).float().mean().item(),
        "tokens_longest": token_mask.shape[1],
        "difference": assert_equal(make_tasks(size), batches),
    }
    for precision in PRECISIONS:
        tasks = make_tasks(size)
        steps = {name: make_step(task, batches[name], precision) for name, task in tasks.items()}
        flops = {}
        for name, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            flops[name] = counter.get_total_flops()
        peak_before = gemm_peak(PRECISIONS[precision])
        times = interleaved(steps, rounds, warmup=1)  # counting FLOPs was the other
        peak = max(peak_before, gemm_peak(PRECISIONS[precision]))
        found[precision] = {"gemm_peak": peak} | {
            name: {
                **times[name],
                "flops": flops[name],
                "samples_per_second": size.batch / times[name]["seconds"],
                "share_of_peak": flops[name] / times[name]["seconds"] / peak,
            }
            for name in steps
        }
        found[precision]["speedup"] = times["stock"]["seconds"] / times["ours"]["seconds"]
        found[precision]["speedup_cpu_seconds"] = times["stock"]["cpu_seconds"] / times["ours"]["cpu_seconds"]
    return found


def main(command: str, rounds: int) -> str:
    found: dict[str, Any] = {"circumstances": circumstances(command)}
    found |= {name: measure(size, rounds) for name, size in SIZES.items()}
    rows: list[Sequence[str]] = []
    for name in SIZES:
        for precision in PRECISIONS:
            part = found[name][precision]
            ours, stock = part["ours"], part["stock"]
            rows.append(
                [
                    f"{name}, batch {found[name]['batch']}",
                    precision,
                    f"{ours['samples_per_second']:.1f}",
                    f"{stock['samples_per_second']:.1f}",
                    f"**{part['speedup']:.2f}x**",
                    f"{part['speedup_cpu_seconds']:.2f}x",
                    f"{ours['flops'] / 1e9:.1f} / {stock['flops'] / 1e9:.1f}",
                    f"{ours['share_of_peak']:.0%} / {stock['share_of_peak']:.0%}",
                    f"{part['gemm_peak'] / 1e9:.0f}",
                ]
            )
    heads = ["size", "precision", "ours, samples/s", "stock, samples/s", "speed-up", "by CPU seconds"]
    heads += ["GFLOP a step, ours / stock", "share of GEMM peak, ours / stock", "GEMM peak, GFLOP/s"]
    reading = (
        "One optimizer step of MED pretraining: ours against a well-made step on stock `transformers` modules "
        "(`benchmarks/stock_med.py`), equal losses and gradients on the same weights, interleaved medians."
    )
    return write("med_step", found, heads, [list(row) for row in rows], reading)
