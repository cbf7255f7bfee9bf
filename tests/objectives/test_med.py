import copy
import math

import pytest
import torch
from distributed_samples import on_ranks
from objectives_samples import ALONE, CONFIG, make_task, micro_batches, train_small, train_variants

from blip_pipelines.config import ConfigError
from blip_pipelines.objectives import draws
from blip_pipelines.objectives.med import LossWeights, MedObjectiveConfig, losses_that_train

ALL = (1.0, 0.7, 1.3)
VARIANTS = {  # steps, accumulation, prompt tokens, weights, config
    "momentum and queue": (4, 1, 0, ALL, {}),
    "accumulation, a prompt, a batch larger than the queue": (3, 2, 1, ALL, {"queue_samples": 4}),
    "no momentum": (3, 1, 0, ALL, {"momentum": None}),
    "the queue joins later": (3, 1, 0, ALL, {"queue_start_step": 1}),
}


def close(found, expected, what):
    """Float64 throughout but for the shares of counts."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name], f"{what}: {name}")
        return
    bound = 1e-9 if expected.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound / 10, msg=lambda text: f"{what}: {text}")


def test_two_ranks_train_as_one():
    by_rank = on_ranks(2, train_variants, VARIANTS)
    alone = train_variants(ALONE, VARIANTS)
    for name, expected in alone.items():
        assert len({step["loss"].item() for step in expected["losses"]}) == len(expected["losses"])
        for rank, found in enumerate(run[name] for run in by_rank):
            assert all(map(torch.equal, found["negatives"], expected["negatives"]))
            for step, pair in enumerate(zip(found["losses"], expected["losses"], strict=True)):
                close(*pair, f"{name}, rank {rank}, losses of step {step}")
            for step, pair in enumerate(zip(found["gradients"], expected["gradients"], strict=True)):
                close(*pair, f"{name}, rank {rank}, gradients of step {step}")
            close(found["state"], expected["state"], f"{name}, rank {rank}, weights, momentum and queue")
    assert "queue.pointer" in alone["momentum and queue"]["state"]


def plain_step(model, momentum, tau, queue, batches, step, config, prompt_tokens):
    """The losses of one optimizer step as the paper tells them: one pair, one row, one token at a time."""
    alpha = config.alpha_max * min(1.0, step / config.alpha_ramp_steps)
    itc = itm = lm = 0.0
    for micro, batch in enumerate(batches):
        rows = range(len(batch.rows))
        length = batch.token_mask.sum(1).tolist()
        ids = [batch.token_ids[i : i + 1, : length[i]] for i in rows]  # no padding at all
        mask = [torch.ones_like(text, dtype=torch.bool) for text in ids]
        key = list(zip(batch.image_ids.tolist(), batch.text_ids.tolist(), strict=True))
        tokens = [model.encode_image(batch.pixels[i : i + 1]) for i in rows]
        image = [model.image_features(tokens[i])[0] for i in rows]
        text = [model.text_features(ids[i], mask[i])[0] for i in rows]
        with torch.no_grad():
            seen = [
                (
                    momentum.image_features(momentum.encode_image(batch.pixels[i : i + 1]))[0],
                    momentum.text_features(ids[i], mask[i])[0],
                    key[i],
                )
                for i in rows
            ]
        candidates = seen + (queue if step >= config.queue_start_step else [])

        def same(a, b):
            return a[0] == b[0] or a[1] == b[1]

        similarity = {}
        for own, stable, side in ((image, 0, 1), (text, 1, 0)):
            for i in rows:
                online = torch.stack([own[i] @ candidate[side] for candidate in candidates]) / tau
                believed = torch.stack([seen[i][stable] @ candidate[side] for candidate in candidates]) / tau.detach()
                positive = [float(same(key[i], candidate[2])) for candidate in candidates]
                target = alpha * believed.softmax(0) + (1 - alpha) * online.new_tensor(positive) / sum(positive)
                itc = itc - (target * online.log_softmax(0)).sum() / 2 / len(batch.rows) / len(batches)
                similarity[side, i] = online[: len(batch.rows)].tolist()

        pairs = [(i, i, 1) for i in rows]
        for side, word in ((1, "image"), (0, "text")):
            draw = draws.uniform(5, step, f"negative of {word}, micro-step {micro}", batch.rows).tolist()
            for i in rows:
                values = [math.exp(value) for value in similarity[side, i]]
                weight = [0 if same(key[i], key[j]) else values[j] / sum(values) + 1e-4 for j in rows]
                if not any(weight):
                    continue
                share, allowed = config.negatives_uniform_share, sum(w > 0 for w in weight)
                chance = [(1 - share) * w / sum(weight) + share * (w > 0) / allowed for w in weight]
                negative = next(j for j in rows if sum(chance[: j + 1]) > draw[i])
                pairs.append((i, negative, 0) if side == 1 else (negative, i, 0))
        for i, t, label in pairs:
            logits = model.match_logits(ids[t], mask[t], model.project_image(tokens[i]))[0]
            itm = itm - logits.log_softmax(0)[label] / len(pairs) / len(batches)

        for i in rows:
            logits = model.decode_logits(ids[i], mask[i], model.project_image(tokens[i]))[0]
            for t in range(prompt_tokens, length[i] - 1):
                log_p = logits[t].log_softmax(0)
                smoothing = config.label_smoothing
                asked = (1 - smoothing) * log_p[ids[i][0, t + 1]] + smoothing * log_p.mean()
                lm = lm - asked / batch.target_tokens
        queue[:] = (queue + seen)[-config.queue_samples :]
    return {"itc": itc, "itm": itm, "lm": lm}


@pytest.mark.parametrize("accumulation, prompt_tokens, changes", [(1, 0, {"queue_start_step": 2}), (2, 1, {})])
def test_the_objective_equals_a_slow_plain_float64_version_over_several_steps(accumulation, prompt_tokens, changes):
    steps = 3
    found = train_small(ALONE, steps, accumulation, prompt_tokens, ALL, changes)
    task = make_task(accumulation=accumulation, weights=ALL, **changes)
    model, tau = task.model, task.temperature
    momentum, queue = copy.deepcopy(model), []
    for step in range(steps):
        if step:
            with torch.no_grad():
                for average, weight in zip(momentum.parameters(), model.parameters(), strict=True):
                    average.copy_(CONFIG["momentum"] * average + (1 - CONFIG["momentum"]) * weight)
        batches = micro_batches(step, accumulation, prompt_tokens)
        losses = plain_step(model, momentum, tau, queue, batches, step, task.config, prompt_tokens)
        for name, loss in losses.items():
            close(found["losses"][step][name], torch.as_tensor(loss).detach(), f"{name} of step {step}")
        total = sum(weight * loss for weight, loss in zip(ALL, losses.values(), strict=True))
        named = {f"model.{name}": p for name, p in model.named_parameters()} | {"temperature": tau}
        gradients = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
        close(found["gradients"][step], gradients, f"gradients of step {step}")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter -= 0.1 * gradients[name]


def test_a_batch_of_one_trains_what_it_can():
    task = make_task()
    task.before_step(0)
    (batch,) = micro_batches(0, 1, rows=1)
    shares = task(batch, 0)
    shares["loss"].backward()
    assert shares["itc"] == 0 and shares["recall_i2t"] == 1  # nothing to tell apart
    assert shares["itm"] > 0 and shares["lm"] > 0  # the positive pair and the caption remain
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in task.parameters())


def test_equal_captions_leave_itm_the_matching_pairs_only():
    task = make_task()
    (batch,) = micro_batches(1, 1)  # step 1 of the samples: one caption everywhere
    shares = task(batch, 1)
    image = task.model.project_image(task.model.encode_image(batch.pixels))
    logits = task.model.match_logits(batch.token_ids, batch.token_mask, image)
    close(shares["itm"], -logits.log_softmax(1)[:, 1].mean().detach(), "itm")


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_exactly_what_a_loss_reaches_asks_for_a_gradient(weights):
    task = make_task(weights=tuple(map(float, weights)))
    batch = micro_batches(0, 1)[0]
    shares = task(batch, 0)
    shares["loss"].backward()
    assert {"itc", "itm", "lm"} & set(shares) == {
        name for name, w in zip(("itc", "itm", "lm"), weights, strict=True) if w
    }
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    # Frozen is only what no loss would have reached: with all three nothing is.
    assert all(parameter.requires_grad for parameter in task.parameters()) == (sum(weights) == 3)


def test_what_was_frozen_stays_frozen():
    from model_samples import tiny_med

    from blip_pipelines.objectives.med import MedPretraining

    model = tiny_med()
    model.vision_model.requires_grad_(False)
    MedPretraining(model, MedObjectiveConfig(), ALONE)
    assert not any(parameter.requires_grad for parameter in model.vision_model.parameters())
    assert losses_that_train("vision_model.post_layernorm.weight") == ("itc", "itm", "lm")


def test_evaluation_leaves_queue_and_momentum_alone():
    task = make_task().eval()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with torch.no_grad():
        task(micro_batches(0, 1)[0], 0)
    task.after_micro_step()
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_temperature_is_clamped_before_a_step():
    task = make_task()
    for value, expected in ((-1.0, 0.001), (3.0, 0.5)):
        task.temperature.data.fill_(value)
        task.before_step(0)
        assert task.temperature.item() == pytest.approx(expected)


def test_micro_steps_draw_their_own_negatives():
    run = train_small(ALONE, 1, 2, 0, ALL, {})
    assert len(run["negatives"]) == 2
    task = make_task(accumulation=2)
    batch = micro_batches(0, 1)[0]
    first = task(batch, 0)["itm"]
    task.after_micro_step()
    assert task(batch, 0)["itm"] != first


@pytest.mark.parametrize(
    "values, message",
    [
        ({"momentum": 1.5}, "objective.momentum: 1.5"),
        ({"queue_samples": -1}, "objective.queue_samples: -1"),
        ({"temperature": 0.7}, "objective.temperature: 0.7"),
        ({"negatives_uniform_share": 2.0}, "objective.negatives_uniform_share"),
    ],
)
def test_an_impossible_constant_is_an_error_that_names_it(values, message):
    with pytest.raises(ConfigError, match=message):
        MedObjectiveConfig(**values)


def test_weights_that_train_nothing_are_an_error():
    with pytest.raises(ConfigError, match="nothing to train"):
        LossWeights(0, 0, 0)
    with pytest.raises(ConfigError, match=r"objective.weights.lm: -1"):
        LossWeights(1, 1, -1)
