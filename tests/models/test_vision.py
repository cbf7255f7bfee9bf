from dataclasses import replace

import pytest
import torch
from model_samples import stock_config, tiny_config, tiny_med, tiny_pixels

from blip_pipelines.config import ConfigError
from blip_pipelines.models.vision import VisionConfig, VisionTransformer


@pytest.fixture(scope="module")
def med():
    return tiny_med()


@pytest.mark.parametrize("stem", [False, True])
def test_equal_to_the_stock_class_with_the_same_weights(stem):
    from transformers import BlipVisionModel

    ours = tiny_med(stem=stem).vision_model
    stock = BlipVisionModel(stock_config(tiny_config(stem=stem)).vision_config).eval()
    stock.load_state_dict(ours.state_dict(), strict=True)
    pixels = tiny_pixels(size=84 if stem else 8)
    torch.testing.assert_close(ours(pixels), stock(pixels).last_hidden_state, atol=1e-5, rtol=0)


def test_uint8_pixels_are_normalised_as_the_config_says(med):
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (med.config.vision.mean, med.config.vision.std))
    torch.testing.assert_close(
        med.encode_image(pixels), med.encode_image((pixels / 255 - mean) / std), atol=1e-5, rtol=0
    )


def test_short_patch_vectors_count_as_padded_with_zeros(med):
    short = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([short, torch.zeros(2, 4, 8)], -1)
    torch.testing.assert_close(med.encode_image(short), med.encode_image(padded), atol=1e-6, rtol=0)


def test_float16_features_are_read_as_they_are_stored(med):
    stored = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(0)).half()
    torch.testing.assert_close(med.encode_image(stored), med.encode_image(stored.float()), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("shape", "named"), [((2, 3, 9, 9), "8, 8"), ((2, 5, 48), "4, <= 48"), ((2, 4, 49), "4, <= 48")]
)
def test_a_wrong_size_is_refused_with_the_expected_one(med, shape, named):
    with pytest.raises(ValueError, match=named):
        med.encode_image(torch.zeros(shape))


def test_class_token_alone_is_the_class_token_of_the_full_pass(med):
    pixels = tiny_pixels()
    torch.testing.assert_close(
        med.encode_image(pixels, class_only=True), med.encode_image(pixels)[:, :1], atol=1e-6, rtol=0
    )


def test_activation_checkpointing_changes_no_gradient(med):
    gradients = []
    for checkpoint_activations in (False, True):
        vision = VisionTransformer(replace(med.config.vision, checkpoint_activations=checkpoint_activations))
        vision.load_state_dict(med.vision_model.state_dict())
        vision(tiny_pixels()).square().sum().backward()
        gradients.append([parameter.grad for parameter in vision.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_drop_path_drops_whole_samples_in_training_only(med):
    vision = VisionTransformer(replace(med.config.vision, drop_path=0.9999))
    vision.load_state_dict(med.vision_model.state_dict())
    pixels = tiny_pixels()
    torch.testing.assert_close(vision.eval()(pixels), med.encode_image(pixels), atol=0, rtol=0)
    # The first layer's rate is 0 and the last one's is all but 1: training mode runs the first layer only.
    one_layer = VisionTransformer(replace(med.config.vision, layers=1))
    one_layer.load_state_dict(med.vision_model.state_dict(), strict=False)
    torch.manual_seed(0)
    torch.testing.assert_close(vision.train()(pixels), one_layer(pixels), atol=1e-6, rtol=0)


def test_bfloat16_autocast_keeps_parameters_and_stays_near(med):
    pixels = tiny_pixels()
    with torch.autocast("cpu", torch.bfloat16):
        near = med.encode_image(pixels)
    assert all(parameter.dtype == torch.float32 for parameter in med.parameters())
    # bfloat16 keeps 8 bits; LayerNorm's outputs are of order 1 and pass a handful of roundings.
    torch.testing.assert_close(near.float(), med.encode_image(pixels), atol=0.1, rtol=0)


def test_sizes_that_do_not_divide_are_config_errors():
    with pytest.raises(ConfigError, match=r"vision\.heads"):
        VisionConfig(width=10, heads=3)
    with pytest.raises(ConfigError, match=r"vision\.patch_size"):
        VisionConfig(image_size=30, patch_size=16)
