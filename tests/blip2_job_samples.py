"""A stage 1 to start from and language models to speak to, small enough for the job of stage 2 to run in a second."""

from pathlib import Path
from typing import Any

import torch
from blip2_samples import language_stock, spoken_tokenizer, tiny_language, tiny_qformer_config
from data_samples import WORDS, tokenizer_json
from evaluation_samples import CONFIG
from inference_samples import export_tiny_med

from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.jobs import evaluate_blip2_stage2
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.blip2_exports import export_blip2, load_blip2
from blip_pipelines.models.frozen_tower import TowerConfig, open_tower
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.qformer_start import QFormerStartConfig, start_qformer
from blip_pipelines.training.distributed import World

STAGE2: dict[str, Any] = {
    "prompting": {"prompt": "picture : {image} it is", "projection": "scaled"},
    "warm_start": {"steps": 4, "batch_samples_global": 8, "optimizer": {"learning_rate": 1e-3}},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "scales": {"blip2.language_projection": 3.0}},
    "training": {
        "steps": 5,
        "batch_samples_global": 8,
        "accumulation": 2,
        "precision": "float32",
        "validate_every_steps": 2,
        "checkpoint_every_steps": 2,
        "peak_flops": 1e9,
    },
    "max_tokens": 12,
    "window_shards": 1,
    "probe": {"rows": 6, "captions": 2, "generation": {"strategy": "greedy", "min_tokens": 2, "max_tokens": 6}},
}


def export_stage1(folder: Path) -> Path:
    """A MED in `folder/med`, the Q-Former that starts from it in `folder/before`, and one that then was trained, or
    moved, in the folder that is returned; it has dropout, so that its draws are tried too.
    """
    export_tiny_med(folder / "med")
    tokenizer, _ = prune_vocabulary(tokenizer_json(), WORDS)
    tower = open_tower(TowerConfig(str(folder / "med")))
    config = tiny_qformer_config(layers=2, max_positions=24, dropout=0.1, every=1)
    former = QFormer(config.fit(tokenizer).behind(tower), seed=0)
    tower.start_norm(former.ln_vision)
    start_qformer(former, QFormerStartConfig(med=str(folder / "med")))
    image = {"size": tower.image_size, "augment": False}
    export_blip2(former, folder / "before", tower, tokenizer, image)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in former.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    export_blip2(former, folder / "stage1", tower, tokenizer, image, temperature=0.07)
    return folder / "stage1"


def language_folder(kind: str, folder: Path) -> None:
    """A tiny random stock language model with its tokenizer, as `from_pretrained` reads it."""
    language_stock(kind).save_pretrained(folder)
    spoken_tokenizer().save_pretrained(folder)


def export_stage2(stage1: Path, folder: Path, kind: str = "llama") -> Path:
    """The Q-Former of a stage 1 before a tiny language model that its soft prompts move; returns the folder."""
    start = load_blip2(stage1)
    model = Blip2(start.former, tiny_language(kind), Blip2Config(STAGE2["prompting"]["prompt"], projection="scaled"))
    with torch.no_grad():
        model.language_projection.weight.mul_(3)
    export_blip2(start.former, folder, start.tower, start.tokenizer, start.image, model=model)
    return folder


def evaluate(world: World, inputs: dict[str, Path], work: Path, job: Any = evaluate_blip2_stage2) -> dict[str, Any]:
    """Measure a model over `evaluation_samples.write_scene`; outputs in `work/out`."""
    (work / "out").mkdir(parents=True, exist_ok=True)
    return job.run(CONFIG, inputs, work, world)
