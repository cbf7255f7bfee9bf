from pathlib import Path

from blip_pipelines.models.med import TextConfig
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
