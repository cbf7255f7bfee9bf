import math

import pytest
import torch
from blip2_objectives_samples import close, compare, make_qformer_task, micro_batches, train_qformer, train_qformers
from blip2_samples import tiny_qformer, tiny_uint8, vit_folder
from distributed_samples import on_ranks
from objectives_samples import ALONE

from blip_pipelines.config import ConfigError
from blip_pipelines.models.frozen_tower import TowerConfig, open_tower
from blip_pipelines.objectives import contrastive, draws
from blip_pipelines.objectives.qformer import (
    QFormerLossWeights,
    QFormerObjectiveConfig,
    QFormerPretraining,
    losses_that_train,
)

WEIGHTS = (1.0, 0.7, 1.3)
VARIANTS = {"plain": (1, 0), "accumulation and a prompt": (2, 1)}


def full_pass(former, ids, image_ND, visible):
    """Queries and the text of one sample in one sequence under a square mask, attention written out; no cache."""
    count, table = former.config.queries, former.embeddings
    words = table["word_embeddings"](ids) + table["position_embeddings"].weight[: len(ids)]
    states = former.qformer["layernorm"](torch.cat([former.query_tokens[0], words]))
    image_ND = former.ln_vision(image_ND)

    def attend(block, hidden, source, mask):
        query, key, value = (
            side.unflatten(-1, (former.config.text.heads, -1)).transpose(0, 1)
            for side in (block.attention.query(hidden), block.attention.key(source), block.attention.value(source))
        )
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        mixed = scores.masked_fill(~mask, -math.inf).softmax(-1) @ value
        return block.output(mixed.transpose(0, 1).flatten(1), hidden)

    for layer in former.layers:
        states = attend(layer.attention, states, states, visible)
        queries, text = states[:count], states[count:]
        if layer.crossattention is not None:
            everything = torch.ones(count, len(image_ND), dtype=torch.bool)
            queries = attend(layer.crossattention, queries, image_ND, everything)
        queries = layer.output_query(layer.intermediate_query(queries), queries)
        states = torch.cat([queries, layer.output(layer.intermediate(text), text)])
    return states[:count], states[count:]


def masks(count, tokens):
    """The three masks of the paper's figure 2."""
    is_text = torch.arange(count + tokens) >= count
    unimodal = is_text[:, None] == is_text
    causal = torch.ones(count + tokens, count + tokens, dtype=torch.bool).tril()
    return {"itc": unimodal, "itm": torch.ones_like(unimodal), "itg": torch.where(is_text[:, None], causal, ~is_text)}


def plain_step(task, batches, step, prompt_tokens):
    """The losses of one optimizer step as the paper tells them: one pair, one row, one token at a time."""
    former, config, count = task.former, task.config, task.former.config.queries
    smoothing = config.label_smoothing
    itc = itm = itg = 0.0
    for micro, batch in enumerate(batches):
        rows = range(len(batch.rows))
        length = batch.token_mask.sum(1).tolist()
        ids = [batch.token_ids[i, : length[i]] for i in rows]  # no padding at all
        key = list(zip(batch.image_ids.tolist(), batch.text_ids.tolist(), strict=True))

        def same(a, b):
            return a[0] == b[0] or a[1] == b[1]

        image, text = [], []
        for i in rows:
            queries, words = full_pass(former, ids[i], batch.pixels[i], masks(count, length[i])["itc"])
            image.append(torch.stack([v / v.norm() for v in former.vision_projection(queries)]))
            text.append((v := former.text_projection(words[0])) / v.norm())
        similarity = torch.stack([torch.stack([(q @ t).max() for t in text]) for q in image]) / task.temperature
        for table in (similarity, similarity.T):
            for i in rows:
                positive = [same(key[i], key[j]) for j in rows]
                target = [(1 - smoothing) * p / sum(positive) + smoothing / len(rows) for p in positive]
                log_p = table[i].log_softmax(0)
                itc = itc - sum(t * p for t, p in zip(target, log_p, strict=True)) / 2 / len(rows) / len(batches)

        pairs = [(i, i, 1) for i in rows]
        for word, table in (("image", similarity), ("text", similarity.T)):
            draw = draws.uniform(5, step, f"negative of {word}, micro-step {micro}", batch.rows).tolist()
            for i in rows:
                chances = table[i].softmax(0).tolist()
                weight = [0 if same(key[i], key[j]) else chances[j] + 1e-4 for j in rows]
                if not any(weight):
                    continue
                share, allowed = config.negatives_uniform_share, sum(w > 0 for w in weight)
                chance = [(1 - share) * w / sum(weight) + share * (w > 0) / allowed for w in weight]
                negative = next(j for j in rows if sum(chance[: j + 1]) > draw[i])
                pairs.append((i, negative, 0) if word == "image" else (negative, i, 0))
        for i, t, label in pairs:
            queries, _ = full_pass(former, ids[t], batch.pixels[i], masks(count, length[t])["itm"])
            logits = torch.stack([former.itm_head(query) for query in queries]).mean(0)
            itm = itm - logits.log_softmax(0)[label] / len(pairs) / len(batches)

        for i in rows:
            read = torch.cat([torch.tensor([former.config.text.dec_id]), ids[i][1:]])
            _, words = full_pass(former, read, batch.pixels[i], masks(count, length[i])["itg"])
            for t in range(prompt_tokens, length[i] - 1):
                log_p = former.lm_head(words[t : t + 1])[0].log_softmax(0)
                asked = (1 - smoothing) * log_p[ids[i][t + 1]] + smoothing * log_p.mean()
                itg = itg - asked / batch.target_tokens
    return {"itc": itc, "itm": itm, "itg": itg}


@pytest.mark.parametrize("accumulation, prompt_tokens", VARIANTS.values())
def test_the_objective_equals_a_slow_plain_float64_version_of_full_passes_under_the_papers_masks(
    accumulation, prompt_tokens
):
    found = train_qformer(ALONE, accumulation, prompt_tokens)
    task = make_qformer_task(accumulation=accumulation)
    for step in range(2):
        batches = micro_batches(step, accumulation, prompt_tokens)
        losses = plain_step(task, batches, step, prompt_tokens)
        for name, loss in losses.items():
            close(found["losses"][step][name], loss.detach(), f"{name} of step {step}")
        total = sum(weight * loss for weight, loss in zip(WEIGHTS, losses.values(), strict=True))
        named = dict(task.named_parameters())
        gradients = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
        close(found["gradients"][step], gradients, f"gradients of step {step}")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter -= 0.1 * gradients[name]


def test_two_ranks_train_as_one():
    by_rank = on_ranks(2, train_qformers, VARIANTS)
    for name, expected in train_qformers(ALONE, VARIANTS).items():
        assert expected["losses"][0]["loss"] != expected["losses"][1]["loss"]
        for rank, found in enumerate(run[name] for run in by_rank):
            compare(found, expected, f"{name}, rank {rank}")


def test_itc_takes_the_nearest_query_of_an_image_for_each_text():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(3, 4, 5, generator=generator), torch.randn(2, 5, generator=generator)
    found = contrastive.query_similarities(image, text, torch.tensor(0.5))
    expected = [
        [max(sum(a * b for a, b in zip(q, t, strict=True)) for q in i) for t in text.tolist()] for i in image.tolist()
    ]
    torch.testing.assert_close(found, torch.tensor(expected) / 0.5)


def test_smoothed_targets_are_shared_by_all_positives_and_sum_to_one():
    positive = torch.tensor([[True, False, True, False], [False, True, False, False]])
    target = contrastive.smooth_targets(positive, 0.1)
    expected = [[0.475, 0.025, 0.475, 0.025], [0.025, 0.925, 0.025, 0.025]]
    torch.testing.assert_close(target, torch.tensor(expected, dtype=torch.float64))


def test_a_batch_of_one_trains_what_it_can():
    task = make_qformer_task()
    (batch,) = micro_batches(0, 1, rows=1)
    shares = task(batch, 0)
    shares["loss"].backward()
    assert shares["itc"] == 0 and shares["recall_i2t"] == 1  # nothing to tell apart
    assert shares["itm"] > 0 and shares["itg"] > 0
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in task.parameters())


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_exactly_what_a_loss_reaches_asks_for_a_gradient(weights):
    task = make_qformer_task(weights=tuple(map(float, weights)))
    shares = task(micro_batches(0, 1)[0], 0)
    shares["loss"].backward()
    names = ("itc", "itm", "itg")
    assert set(names) & set(shares) == {name for name, weight in zip(names, weights, strict=True) if weight}
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    # Frozen is only what no loss would have reached: with all three nothing is.
    assert all(parameter.requires_grad for parameter in task.parameters()) == (sum(weights) == 3)
    assert losses_that_train("query_tokens", 3) == names


def test_the_temperature_has_no_bounds():
    task = make_qformer_task()
    task.temperature.data.fill_(3.0)
    task.before_step(0)
    assert task.temperature == 3.0


def test_micro_steps_draw_their_own_negatives():
    task = make_qformer_task(accumulation=2)
    batch = micro_batches(0, 1)[0]
    first = task(batch, 0)["itm"]
    task.after_micro_step()
    assert task(batch, 0)["itm"] != first


def test_a_live_tower_gives_the_losses_of_its_cached_features_and_learns_nothing(tmp_path):
    vit_folder(tmp_path)
    tower = open_tower(TowerConfig(str(tmp_path)))
    batch = micro_batches(0, 1)[0]
    pixels = tiny_uint8(len(batch.rows))
    runs = []
    for seen, live in ((pixels, tower), (tower(pixels), None)):
        task = QFormerPretraining(tiny_qformer(3), QFormerObjectiveConfig(), ALONE, seed=5, tower=live).train()
        losses = task(type(batch)(**(vars(batch) | {"pixels": seen})), 0)
        losses["loss"].backward()
        runs.append({name: loss.detach() for name, loss in losses.items()})
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not tower.training and all(parameter.grad is None for parameter in tower.parameters())
    live = QFormerPretraining(tiny_qformer(), QFormerObjectiveConfig(), ALONE, tower=tower)
    assert live.frozen == ("tower",) and task.frozen == ()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": 0.0}, r"objective.temperature: 0.0"),
        ({"negatives_uniform_share": 2.0}, r"objective.negatives_uniform_share: 2.0"),
        ({"label_smoothing": -0.1}, r"objective.label_smoothing: -0.1"),
    ],
)
def test_an_impossible_constant_is_an_error_that_names_it(values, message):
    with pytest.raises(ConfigError, match=message):
        QFormerObjectiveConfig(**values)


def test_weights_that_train_nothing_are_an_error():
    with pytest.raises(ConfigError, match="nothing to train"):
        QFormerLossWeights(0, 0, 0)
    with pytest.raises(ConfigError, match=r"objective.weights.itg: -1"):
        QFormerLossWeights(1, 1, -1)
