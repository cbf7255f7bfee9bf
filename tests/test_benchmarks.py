from pathlib import Path

import torch

from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.vision import VisionConfig


def test_the_steps_that_are_compared_have_equal_losses_and_gradients(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks.med_step import Size, assert_equal, make_batches, make_tasks

    size = Size(
        VisionConfig(image_size=48, patch_size=16, width=32, layers=2, heads=2, mlp_width=64),
        TextConfig(vocabulary=1300, width=48, layers=2, heads=4, ffn_width=96, dec_id=1298, enc_id=1299),
        batch=6,
        queue=8,
    )
    differences = assert_equal(make_tasks(size), make_batches(size))
    assert differences.keys() == {"itc", "itm", "lm", "loss", "gradients"}


def test_the_steps_of_stage_2_that_are_compared_have_equal_losses_and_gradients(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks.stage2_step import Size, assert_equal, make_batches, make_tasks, smollm2

    size = Size(
        smollm2(vocab_size=300, hidden_size=36, intermediate_size=48, num_hidden_layers=2),
        VisionConfig(image_size=32, patch_size=16, width=24, layers=1, heads=2, mlp_width=32),
        TextConfig(vocabulary=130, width=24, layers=2, heads=2, ffn_width=32, dec_id=128, enc_id=129),
        batch=5,
        queries=3,
        before=4,
    )
    tasks = make_tasks(size, torch.float32)
    differences = assert_equal(tasks, make_batches(size, tasks["ours"].blip2.tower))
    assert differences.keys() == {f"{who}, {what}" for who in ("ours", "cached") for what in ("loss", "gradients")}


def test_the_steps_of_stage_1_that_are_compared_have_equal_losses_and_gradients(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks.stage1_step import Size, assert_equal, make_tasks

    size = Size(
        VisionConfig(image_size=32, patch_size=16, width=24, layers=1, heads=2, mlp_width=32),
        TextConfig(vocabulary=130, width=24, layers=3, heads=2, ffn_width=32, dec_id=128, enc_id=129),
        queries=3,
        batch=5,
    )
    differences = assert_equal(make_tasks(size))
    others = ("ours, live", "stock, live", "stock, cached")
    assert differences.keys() == {f"{name}, {what}" for name in others for what in ("losses", "gradients")}
