"""The warm start: soft prompts that spell, against a plain loop; its ranks and gradients stand in test_generative."""

import pytest
import torch
from blip2_objectives_samples import make_keeping_warm_start, make_warm_start, spoken_batches

from blip_pipelines.objectives.warm_start import KEEP, REST, SHARPNESS


def test_the_loss_is_the_plain_mean_over_queries_with_less_weight_behind_the_end():
    task = make_warm_start()
    batch = spoken_batches(task, 0, 1)[0]
    found = task(batch, 0)
    expected, spelled = plainly(task, batch, 0)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["loss"], sum(expected.values()), rtol=1e-9, atol=0)
    assert found["spelled"].item() == pytest.approx(spelled)


def test_the_last_queries_keep_what_the_model_said_of_the_picture_and_those_before_spell():
    task = make_keeping_warm_start()
    batch = spoken_batches(task, 0, 1)[0]
    kept = task.told.queries
    before = make_warm_start().blip2
    told = before.soft_prompts(before.see(batch.pixels))[:, :kept]
    assert task(batch, 0)["kept"] < 1e-20, "nothing has trained yet"
    with torch.no_grad():
        for parameter in task.blip2.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    found = task(batch, 0)
    now = task.blip2.soft_prompts(task.blip2.see(batch.pixels))[:, -kept:]
    off = ((now - told) ** 2).mean() / task.variance
    assert off > 0.01
    torch.testing.assert_close(found["kept"], off.detach(), rtol=1e-9, atol=0)
    expected, spelled = plainly(task, batch, kept)
    torch.testing.assert_close(found["loss"], sum(expected.values()) + KEEP * off, rtol=1e-9, atol=0)
    assert found["spelled"].item() == pytest.approx(spelled)


def plainly(task, batch, kept: int):
    """The two losses, and the share of words and ends that are the nearest, of all queries but the last `kept`."""
    blip2, queries, end = task.blip2, task.blip2.former.config.queries - kept, task.blip2.language.tokenizer.end
    said = [
        ids[1:length] for ids, length in zip(batch.token_ids.tolist(), batch.token_mask.sum(1).tolist(), strict=True)
    ]
    assert min(map(len, said)) < queries - 1 and max(map(len, said)) > queries, "ends within the queries, and beyond"
    wanted = [(words + [end] * queries)[:queries] for words in said]
    candidates = sorted({word for words in wanted for word in words})
    regression, nearest, spelled, weights, asked = 0.0, 0.0, 0, 0.0, 0
    for row, words in enumerate(wanted):
        soft = blip2.soft_prompts(blip2.see(batch.pixels[row : row + 1]))[0, :queries]
        for k, word in enumerate(words):
            distance = {
                each: ((soft[k] - blip2.language.embed(torch.tensor(each))) ** 2).mean() / task.variance
                for each in candidates
            }
            is_asked = k < len(said[row])
            weight = 1.0 if is_asked else REST
            regression += weight * distance[word]
            likelihood = torch.exp(-SHARPNESS * distance[word]) / sum(
                torch.exp(-SHARPNESS * d) for d in distance.values()
            )
            nearest -= weight * likelihood.log()
            spelled += is_asked and min(distance, key=distance.get) == word
            weights, asked = weights + weight, asked + is_asked
    return {"regression": regression / weights, "nearest": nearest / weights}, spelled / asked


def test_it_spells_more_words_than_any_answer_that_ignores_the_picture():
    task = make_warm_start()
    batch = spoken_batches(task, 0, 1)[0]
    keep = torch.tensor([batch.image_ids.tolist().index(number) for number in sorted(set(batch.image_ids.tolist()))])
    batch = type(batch)(**{k: v[keep] if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})
    queries = task.blip2.former.config.queries
    words, asked = batch.token_ids[:, 1:][:, :queries], batch.token_mask[:, 1:][:, :queries]
    commonest = sum(words[:, k][asked[:, k]].bincount().max().item() for k in range(queries) if asked[:, k].any())
    ignorant = commonest / asked.sum().item()
    assert ignorant < 0.7
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=0.02)
    for step in range(60):
        optimizer.zero_grad()
        found = task(batch, step)
        found["loss"].backward()
        optimizer.step()
    assert found["spelled"].item() > ignorant
