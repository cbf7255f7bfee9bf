"""Small instruction batches and a tiny model that reads them, for tests of several rooms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from blip2_objectives_samples import tiny_blip2
from blip2_samples import language_stock, spoken_tokenizer, stock_blip2_config, tiny_image, tiny_qformer_config
from data_samples import WORDS, tokenizer_json
from objectives_samples import descend

from blip_pipelines.data.instruction_loader import InstructionBatch
from blip_pipelines.data.instruction_tokens import InstructionTokens, TokenLimits
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.blip2_exports import export_blip2, load_blip2
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.objectives.instruct import InstructConfig, InstructionTuning

PROMPTS = {
    "plain": Blip2Config("{image}{instruction}", reads_instructions=True),
    "chat": Blip2Config("{image} {instruction} it", chat=True, reads_instructions=True),
}
ASKED = ("what is this ?", "a dog on the house ?", "it", "", "is this a small red crab on a big house ?", "what")
ANSWERS = ("a red crab", "it is", "the dog on it", "house", "", "a small picture of the big house")
LIMITS = TokenLimits(instruction=8, question=8, answer=7)


def caption_tokenizer():
    return prune_vocabulary(tokenizer_json([*WORDS, "what", "is", "this", "on", "it", "big"]))[0]


def tiny_instructblip(kind: str, prompt: str = "plain", aware: bool = True) -> Blip2:
    """Of a T5, the tokenizer ends a text, as the published one does."""
    config = replace(PROMPTS[prompt], reads_instructions=aware)
    former = QFormer(tiny_qformer_config().fit(caption_tokenizer()), 3)
    return Blip2(former, tiny_blip2(kind).language, config, seed=3).eval()


def tokens_of(blip2: Blip2, limits: TokenLimits = LIMITS) -> InstructionTokens:
    return InstructionTokens(blip2.language.tokenizer, blip2.place, caption_tokenizer(), limits)


def instruction_batches(blip2: Blip2, step: int, accumulation: int = 1, limits=LIMITS) -> list[InstructionBatch]:
    """The global micro-batches of a step."""
    tokens, images = tokens_of(blip2, limits), tiny_image(4).double()
    generator = np.random.default_rng(step)
    drawn = []
    for _ in range(accumulation):
        asked, answered = generator.permutation(len(ASKED)), generator.permutation(len(ANSWERS))
        texts = [ASKED[row] for row in asked]
        read, question = tokens.for_language(texts), tokens.for_former(texts)
        drawn.append((read, question, tokens.for_answers([ANSWERS[row] for row in answered]), answered % 4))
    targets = sum(int(answer.mask[:, 1:].sum()) for _, _, answer, _ in drawn)
    batches = []
    for read, question, answer, image_ids in drawn:
        parts: dict[str, Any] = {
            "token_ids": answer.ids,
            "token_mask": answer.mask,
            "image_ids": image_ids,
            "text_ids": image_ids,
            "rows": np.arange(len(image_ids)),
            "read_ids": read.ids,
            "read_mask": read.mask,
            "question_ids": question.ids,
            "question_mask": question.mask,
            "cut": np.stack([read.cut, question.cut, answer.cut], 1),
        }
        tensors = {name: torch.from_numpy(value) for name, value in parts.items()}
        batches.append(InstructionBatch(pixels=images[image_ids], target_tokens=targets, **tensors))
    return batches


def make_instruct_task(kind: str = "opt", prompt: str = "plain", aware: bool = True, **config) -> InstructionTuning:
    task = InstructionTuning(tiny_instructblip(kind, prompt, aware), InstructConfig(**config))
    return task.double().train()


def train_instruct(world, variants: dict[str, tuple]) -> dict[str, Any]:
    """By name: language model, prompt, whether the Q-Former reads, micro-steps."""
    found = {}
    for name, (kind, prompt, aware, accumulation) in variants.items():
        task = make_instruct_task(kind, prompt, aware)
        found[name] = descend(
            task, world, lambda step, task=task, count=accumulation: instruction_batches(task.blip2, step, count), 2
        )
    return found


def write_published(folder, kind, name):
    """A random stock model with its processor, as it would come from elsewhere."""
    words, language = caption_tokenizer(), language_stock(kind)
    config = tiny_qformer_config(vocabulary=len(words), pad_id=words.pad)
    whole = stock_blip2_config(config, text_config=language.config, image_token_index=len(spoken_tokenizer()))
    if name == "InstructBlip":
        values = {**whole.qformer_config.to_dict(), "vocab_size": len(words), "model_type": "instructblip_qformer"}
        whole = transformers.InstructBlipConfig(
            vision_config=whole.vision_config.to_dict(),
            qformer_config=values,
            text_config=language.config,
            num_query_tokens=4,
            image_token_index=len(spoken_tokenizer()),
        )
    else:
        whole.qformer_config.use_qformer_text_input = False
        whole.qformer_config.vocab_size = 9  # of tables that it does not have
    torch.manual_seed(0)
    stock = getattr(transformers, f"{name}ForConditionalGeneration")(whole).eval()
    with torch.no_grad():
        stock.query_tokens.normal_()
        stock.vision_model.post_layernorm.weight.uniform_(0.5, 1.5)
    stock.save_pretrained(folder)
    image = transformers.BlipImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.4] * 3, image_std=[0.3] * 3
    )
    if name == "InstructBlip":
        transformers.InstructBlipProcessor(image, spoken_tokenizer(), words.stock, 4).save_pretrained(folder)
    else:
        transformers.Blip2Processor(image, spoken_tokenizer(), 4).save_pretrained(folder)
    return stock


def export_tuned(stage2: Path, folder: Path, prompt: str = "picture : {image} {instruction} it is") -> Path:
    """A model after stage 2 made to read instructions, and moved; returns the folder."""
    start = load_blip2(stage2)
    assert start.model is not None
    start.model.instruct(prompt, False, True)
    with torch.no_grad():
        start.former.query_tokens.add_(1)
    export_blip2(start.former, folder, start.tower, start.tokenizer, start.image, model=start.model)
    return folder
