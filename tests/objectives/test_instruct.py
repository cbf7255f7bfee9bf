from dataclasses import replace

import pytest
import torch
from blip2_objectives_samples import compare
from distributed_samples import on_ranks
from instruct_samples import ANSWERS, ASKED, instruction_batches, make_instruct_task, train_instruct
from objectives_samples import ALONE, descend, descend_plainly

from blip_pipelines.config import ConfigError
from blip_pipelines.data.instruction_tokens import TokenLimits
from blip_pipelines.models.frozen import weights_hash
from blip_pipelines.objectives.instruct import InstructConfig

KINDS = ["opt", "llama", "t5"]
# LLaMA and T5 norm in float32 whatever goes in, so rounding may fall either way: a few float32 epsilons.
BOUNDS = {"opt": 1e-9, "llama": 1e-5, "t5": 1e-5}


def plain_step(task, batches):
    """The loss of one optimizer step, one answer at a time, by the stock forward of the language model."""
    blip2 = task.blip2
    language, stock = blip2.language, blip2.language.model
    total, count = 0.0, 0
    for batch in batches:
        for row in range(len(batch.rows)):
            one = slice(row, row + 1)
            question = ()
            if blip2.config.reads_instructions:
                length = int(batch.question_mask[row].sum())
                question = (batch.question_ids[one, :length], batch.question_mask[one, :length])
            soft = blip2.soft_prompts(blip2.see(batch.pixels[one]), *question)[0]
            instruction = batch.read_ids[row][batch.read_mask[row]]
            ids = batch.token_ids[row][batch.token_mask[row]]
            before = language.embed(torch.tensor(blip2.before_ids, dtype=torch.long))
            read = torch.cat([before, soft, language.embed(instruction)])
            said = ids[1:]
            if language.decoder_only:
                words = language.embed(said[:-1])
                logits = stock(inputs_embeds=torch.cat([read, words])[None]).logits[0, len(read) - 1 :]
            else:
                logits = stock(inputs_embeds=read[None], decoder_input_ids=ids[None, :-1]).logits[0]
            total = total - logits.log_softmax(-1).gather(1, said[:, None]).sum()
            count += len(said)
    assert count == batches[0].target_tokens
    return total / count


@pytest.mark.parametrize("prompt, aware", [("plain", True), ("chat", True), ("plain", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_equals_a_slow_plain_float64_version_by_the_stock_forward(kind, prompt, aware):
    task = make_instruct_task(kind, prompt, aware)
    found = descend(task, ALONE, lambda step: instruction_batches(task.blip2, step, 2), 2)
    for step in found["losses"]:
        for name in [name for name in step if name.startswith("cut")]:
            del step[name]
    task = make_instruct_task(kind, prompt, aware)
    expected = descend_plainly(task, lambda step: plain_step(task, instruction_batches(task.blip2, step, 2)), 2)
    compare(found, expected, kind, BOUNDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_answer_is_asked_for(kind, monkeypatch):
    """The head sees the states that are asked for a word of an answer or its end, and is told those as targets."""
    task = make_instruct_task(kind, "chat")
    (batch,) = instruction_batches(task.blip2, 0)
    asked, real = [], task.blip2.language.lm_head
    monkeypatch.setattr(task.blip2.language, "lm_head", lambda hidden: asked.append(hidden) or real(hidden))
    before = task(batch, 0)["lm"]
    targets = sum(min(len(text.split()), 5) + 1 for text in ANSWERS)
    assert len(asked[0]) == targets == batch.target_tokens

    def changed(name, where):
        return replace(batch, **{name: getattr(batch, name).masked_fill(where, 9)})

    same = [("token_ids", ~batch.token_mask), ("read_ids", ~batch.read_mask), ("question_ids", ~batch.question_mask)]
    first = torch.zeros_like(batch.token_mask)
    first[:, 0] = True
    if kind != "t5":  # only a place, for a model that goes on from what it read
        same.append(("token_ids", first))
    for name, where in same:
        torch.testing.assert_close(task(changed(name, where), 0)["lm"], before, rtol=1e-6, atol=0, msg=name)
    for name, where in ("token_ids", batch.token_mask & ~first), ("read_ids", batch.read_mask):
        assert (task(changed(name, where), 0)["lm"] - before).abs() > 1e-3, name
    assert (task(changed("question_ids", batch.question_mask), 0)["lm"] - before).abs() > 1e-6


def test_the_instruction_is_read_but_has_no_labels():
    """Of two instructions of one length, the loss of each is over the answer's tokens alone."""
    task = make_instruct_task("llama", "chat")
    (batch,) = instruction_batches(task.blip2, 0)
    for rows in ([0], [1, 2], [3, 4, 5]):
        part = type(batch)(**{k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})
        loss = plain_step(task, [replace(part, target_tokens=int(part.token_mask[:, 1:].sum()))])
        count = int(part.token_mask[:, 1:].sum())
        torch.testing.assert_close(
            task(part, 0)["loss"] * batch.target_tokens, loss * count, rtol=1e-5, atol=0, check_dtype=False
        )


def test_two_ranks_train_as_one():
    variants = {
        "OPT": ("opt", "plain", True, 2),
        "LLaMA, chat": ("llama", "chat", True, 1),
        "T5, not instruction-aware": ("t5", "plain", False, 1),
    }
    by_rank = on_ranks(2, train_instruct, variants)
    for name, expected in train_instruct(ALONE, variants).items():
        assert expected["losses"][0]["loss"] != expected["losses"][1]["loss"]
        assert expected["losses"][0]["cut_instructions"] > 0
        for rank, found in enumerate(run[name] for run in by_rank):
            compare(found, expected, f"{name}, rank {rank}", BOUNDS[variants[name][0]])


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_what_trains_gets_a_gradient_and_the_language_model_keeps_its_bytes(kind, aware):
    task = make_instruct_task(kind, aware=aware)
    before = weights_hash(task.blip2.language)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        task(instruction_batches(task.blip2, step)[0], step)["loss"].backward()
        for name, parameter in task.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        optimizer.step()
    assert weights_hash(task.blip2.language) == before
    assert task.frozen == ("blip2.language",)
    assert any("word_embeddings" in name for name, p in task.named_parameters() if p.requires_grad) == aware


def test_what_was_cut_is_counted():
    task = make_instruct_task()
    limits = TokenLimits(instruction=3, question=5, answer=4)
    words, answers = [len(text.split()) for text in ASKED], [len(text.split()) for text in ANSWERS]
    found = task(instruction_batches(task.blip2, 0, limits=limits)[0], 0)
    assert found["cut_instructions"] == sum(count > 3 for count in words)
    assert found["cut_questions"] == sum(count > 3 for count in words)
    assert found["cut_answers"] == sum(count > 2 for count in answers)


def test_smoothing_outside_its_range_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"objective.label_smoothing: 1.5"):
        InstructConfig(label_smoothing=1.5)
