from collections import Counter

import pytest
import torch
from blip2_objectives_samples import (
    compare,
    make_generative_task,
    make_keeping_warm_start,
    make_warm_start,
    spoken_batches,
    train_generative,
)
from blip2_samples import tiny_language, tiny_qformer
from distributed_samples import on_ranks
from objectives_samples import ALONE, descend, descend_plainly

from blip_pipelines.config import ConfigError
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.frozen import weights_hash
from blip_pipelines.objectives import draws
from blip_pipelines.objectives.generative import GenerativeConfig, GenerativePretraining, split_prefix

KINDS = ["opt", "llama", "t5"]
# LLaMA and T5 norm in float32 whatever goes in, so rounding may fall either way: a few float32 epsilons.
BOUNDS = {"opt": 1e-9, "llama": 1e-5, "t5": 1e-5}
START, END, PAD, CLOSING, INSTEAD = 90, 91, 92, [93, 94], [95]


def captions(lengths):
    """Ids `start 1 2 3 ... end pad` of captions of so many words."""
    ids = torch.full((len(lengths), max(lengths) + 2), PAD)
    for row, length in enumerate(lengths):
        ids[row, : length + 2] = torch.tensor([START, *range(1, length + 1), END])
    return ids, ids != PAD


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.999, 1 - 2**-53])
@pytest.mark.parametrize("prompt_tokens", [0, 1, 2, 5])
def test_both_parts_of_a_split_caption_have_a_word_and_together_are_the_caption(prompt_tokens, draw):
    lengths = [0, 1, 2, 3, 5, 8]
    ids, mask = captions(lengths)
    draw_B = torch.full((len(lengths),), draw, dtype=torch.float64)
    answers = split_prefix(ids, mask, draw_B, prompt_tokens, CLOSING, INSTEAD, PAD)
    for row, length in enumerate(lengths):
        read = answers.read_ids[row][answers.read_mask[row]].tolist()
        suffix = [token for token in answers.token_ids[row].tolist() if token != PAD]
        asked = answers.token_ids[row, 1:][answers.target[row]].tolist()
        assert suffix[0] == START and suffix[-1] == END
        words = list(range(1, length + 1))
        if length >= 2 and length > prompt_tokens:
            assert read[-2:] == CLOSING
            prefix, rest = read[:-2], suffix[1:-1]
            assert prefix and rest and prefix + rest == words
            assert asked == [*rest, END]  # the prompt is all in the prefix
            assert len(prefix) >= prompt_tokens
        else:
            assert read == INSTEAD and suffix[1:-1] == words
            assert asked == [*words, END][prompt_tokens:]


@pytest.mark.parametrize("prompt_tokens", [0, 2])
def test_all_ways_to_split_are_alike(prompt_tokens):
    ids, mask = captions([7])
    ways = 7 - max(prompt_tokens, 1)
    grid = (torch.arange(10 * ways, dtype=torch.float64) + 0.5) / (10 * ways)
    rows = len(grid)
    answers = split_prefix(ids.expand(rows, -1), mask.expand(rows, -1), grid, prompt_tokens, [], [], PAD)
    counts = Counter(answers.read_mask.sum(1).tolist())
    assert counts == dict.fromkeys(range(max(prompt_tokens, 1), 7), 10)


def plain_step(task, batches, step, prompt_tokens):
    """The loss of one optimizer step, one caption at a time, by the stock forward of the language model."""
    blip2, smoothing = task.blip2, task.config.label_smoothing
    language, stock = blip2.language, blip2.language.model
    sums, counts, counted = [], [], []
    for micro, batch in enumerate(batches):
        total, count = 0.0, 0
        draw = draws.uniform(5, step, f"split, micro-step {micro}", batch.rows).tolist()
        for row, length in enumerate(batch.token_mask.sum(1).tolist()):
            ids = batch.token_ids[row, :length].tolist()
            soft = blip2.soft_prompts(blip2.see(batch.pixels[row : row + 1]))[0]
            start, said, skipped, behind = ids[0], ids[1:], prompt_tokens, blip2.after_ids
            if not language.decoder_only:
                shortest = max(prompt_tokens, 1)
                if (ways := length - 2 - shortest) > 0:
                    prefix = shortest + int(draw[row] * ways)
                    behind, said, skipped = [*said[:prefix], language.tokenizer.end], said[prefix:], 0
            read = [language.embed(torch.tensor(part, dtype=torch.long)) for part in (blip2.before_ids, behind)]
            read = torch.cat([read[0], soft, read[1]])
            if language.decoder_only:
                words = language.embed(torch.tensor(said[:-1], dtype=torch.long))
                logits = stock(inputs_embeds=torch.cat([read, words])[None]).logits[0, len(read) - 1 :]
            else:
                logits = stock(inputs_embeds=read[None], decoder_input_ids=torch.tensor([[start, *said[:-1]]])).logits[
                    0
                ]
            for t in range(skipped, len(said)):
                log_p = logits[t].log_softmax(0)
                total = total - (1 - smoothing) * log_p[said[t]] - smoothing * log_p.mean()
                count += 1
        sums.append(total)
        counts.append(count)
        counted.append(int((batch.token_mask.sum(1) - 1 - prompt_tokens).clamp(min=0).sum()))
    if language.decoder_only:
        assert sum(counts) == batches[0].target_tokens
        return sum(sums) / sum(counts)
    # The mean of each micro-step, weighed by its captions' tokens.
    return sum(s / n * c for s, n, c in zip(sums, counts, counted, strict=True)) / sum(counted)


@pytest.mark.parametrize("accumulation, prompt_tokens, smoothing", [(1, 0, 0.0), (2, 1, 0.1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_equals_a_slow_plain_float64_version_by_the_stock_forward(
    kind, accumulation, prompt_tokens, smoothing
):
    task = make_generative_task(kind=kind, label_smoothing=smoothing)
    found = descend(task, ALONE, lambda step: spoken_batches(task, step, accumulation, prompt_tokens), 2)
    task = make_generative_task(kind=kind, label_smoothing=smoothing)

    def plain_loss(step):
        return plain_step(task, spoken_batches(task, step, accumulation, prompt_tokens), step, prompt_tokens)

    expected = descend_plainly(task, plain_loss, 2)
    compare(found, expected, kind, BOUNDS[kind])


def test_two_ranks_train_as_one():
    variants = {
        "prefix LM": ("generative", "t5", 2),
        "LM": ("generative", "opt", 1),
        "warm start": ("warm start", "opt", 2),
        "warm start that keeps": ("warm start that keeps", "opt", 2),
    }
    by_rank = on_ranks(2, train_generative, variants)
    for name, expected in train_generative(ALONE, variants).items():
        assert expected["losses"][0]["loss"] != expected["losses"][1]["loss"]
        for rank, found in enumerate(run[name] for run in by_rank):
            compare(found, expected, f"{name}, rank {rank}", BOUNDS[variants[name][1]])


def test_micro_steps_and_steps_draw_their_own_splits():
    task = make_generative_task(kind="t5")
    batch = spoken_batches(task, 0, 1)[0]
    first = task(batch, 0)["lm"]
    assert task(batch, 1)["lm"] != first
    task.after_micro_step()
    assert task(batch, 0)["lm"] != first
    task.before_step(0)
    assert task(batch, 0)["lm"] == first


@pytest.mark.parametrize("make", [make_generative_task, make_warm_start, make_keeping_warm_start])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_what_trains_gets_a_gradient_and_the_language_model_keeps_its_bytes(kind, make):
    task = make(kind=kind)
    parts = {name: weights_hash(task.get_submodule(name)) for name in task.frozen}
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        task(spoken_batches(task, step, 1)[0], step)["loss"].backward()
        for name, parameter in task.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        optimizer.step()
    assert {name: weights_hash(task.get_submodule(name)) for name in task.frozen} == parts
    assert not task.blip2.language.model.training and task.blip2.former.training
    assert task.frozen == (("blip2.language", "told") if make is make_keeping_warm_start else ("blip2.language",))
    for name in task.frozen:
        assert not any(each.requires_grad for each in task.get_submodule(name).parameters()), name
        assert not any(each.training for each in task.get_submodule(name).modules()), name


def test_what_cannot_be_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"objective.label_smoothing: 1.5"):
        GenerativeConfig(label_smoothing=1.5)
    blip2 = Blip2(tiny_qformer(), tiny_language("opt"), Blip2Config(reads_instructions=True))
    with pytest.raises(ConfigError, match="reads_instructions"):
        GenerativePretraining(blip2, GenerativeConfig(), ALONE)
