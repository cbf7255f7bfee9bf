"""An exported model that answers at once, for tests of what reads exports."""

from dataclasses import replace
from pathlib import Path

import torch
from data_samples import WORDS, tokenizer_json
from model_samples import tiny_config

from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.inference.served import SERVED
from blip_pipelines.jobs import score_pairs
from blip_pipelines.models.exports import export_med
from blip_pipelines.models.med import Med
from blip_pipelines.models.question_answering import KIND, QuestionAnswering
from blip_pipelines.models.stem import Stem


def export_tiny_med(folder: Path, stem: Stem | None = None, image_size: int = 8) -> Path:
    """A random MED whose pictures matter, over the words of `data_samples`; returns the folder."""
    tokenizer, _ = prune_vocabulary(tokenizer_json(), WORDS)
    config = tiny_config(stem=stem is not None)
    ids = {f"{name}_id": getattr(tokenizer, name) for name in ("pad", "cls", "sep", "dec", "enc")}
    med = Med(replace(config, text=replace(config.text, vocabulary=len(tokenizer), max_positions=24, **ids)), 0)
    with torch.no_grad():  # random cross-attention says little
        for layer in med.text_encoder.layers:
            layer.crossattention.output.dense.weight.mul_(8)
    export_med(med, folder, tokenizer, {"size": image_size}, stem=stem)
    return folder


def export_tiny_answering(folder: Path, stem: Stem | None = None, image_size: int = 8) -> Path:
    """A random MED that answers questions, likewise."""
    tokenizer, _ = prune_vocabulary(tokenizer_json(), WORDS)
    config = tiny_config(image_width=16, text_width=16, stem=stem is not None)
    text = replace(config.text.fit(tokenizer), max_positions=24)
    model = QuestionAnswering(Med(replace(config, text=text), 3))
    with torch.no_grad():
        for layer in (*model.text_encoder.layers, *model.text_decoder.bert.layers):
            layer.crossattention.output.dense.weight.mul_(8)
    export_med(model, folder, tokenizer, {"size": image_size}, stem=stem, kinds=(KIND,))
    return folder


def save_served(name: str, model: Path, folder: Path) -> Path:
    """The served model of that name over an exported folder, as MLflow stores it; returns its folder."""
    import mlflow

    mlflow.pyfunc.save_model(
        folder,
        python_model=str(SERVED[name].code),
        artifacts={"model": str(model)},
        signature=SERVED[name].signature(),
        pip_requirements=[],
    )
    return folder


def score_on_ranks(world, config: dict, inputs: dict[str, Path], work: Path) -> dict:
    """`score_pairs` as the worker runs it, for `on_ranks`."""
    if world.is_first:
        (work / "out").mkdir(parents=True, exist_ok=True)
    world.barrier()
    return score_pairs.run(config, inputs, work, world)
