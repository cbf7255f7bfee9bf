import numpy as np
import pytest
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip_pipelines.data.order import draw
from blip_pipelines.data.transforms import ImageConfig, augment, augment_crop, crop_box, to_pixels

CONFIG = ImageConfig(size=32)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def draws_of(row: int, config: ImageConfig = CONFIG, step: int = 0) -> np.ndarray:
    return draw(0, step, "view", row, 1, config.draws)[0]


@pytest.mark.parametrize("size", [(40, 40), (57, 33), (20, 90)])
def test_evaluation_view_equals_the_stock_processor(size):
    image = noise(*size)
    stock = BlipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=CONFIG.mean, image_std=CONFIG.std)
    expected = stock(image, return_tensors="np")["pixel_values"][0]
    pixels = to_pixels(image, 32)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), np.uint8)
    ours = (pixels / 255 - np.reshape(CONFIG.mean, (3, 1, 1))) / np.reshape(CONFIG.std, (3, 1, 1))
    assert np.abs(ours - expected).max() < 1e-5  # float32 rounding of values up to about 3


def test_equal_draws_give_equal_views_and_others_differ():
    image = noise(60, 50)
    views = [augment(image, CONFIG, draws_of(row)) for row in (0, 0, 1, 2)]
    assert views[0].shape == (3, 32, 32) and views[0].dtype == np.uint8 and views[0].flags.c_contiguous
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[1], views[2]) and not np.array_equal(views[2], views[3])
    assert not np.array_equal(views[0], augment(image, CONFIG, draws_of(0, step=1)))


@pytest.mark.parametrize("size", [(100, 100), (300, 40), (40, 300), (7, 5)])
def test_crops_lie_inside_and_keep_area_and_shape(size):
    width, height = size
    for row in range(200):
        left, upper, right, lower = crop_box(size, CONFIG, draws_of(row))
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        box_width, box_height = right - left, lower - upper
        # Rounding moves each side by at most a half.
        assert (box_width + 0.5) * (box_height + 0.5) >= 0.2 * width * height or max(size) > 4 * min(size)
        assert box_width - 0.5 <= 4 / 3 * (box_height + 0.5) and box_height - 0.5 <= 4 / 3 * (box_width + 0.5)


def test_an_image_too_long_for_any_crop_gives_its_centre():
    wide = ImageConfig(size=32, crop_scale=(1.0, 1.0))
    assert crop_box((300, 30), wide, draws_of(0)) == (130, 0, 170, 30)
    assert crop_box((30, 300), wide, draws_of(0)) == (0, 130, 30, 170)
    assert crop_box((1, 1), CONFIG, draws_of(0)) == (0, 0, 1, 1)


def test_flip_and_operations_can_be_switched_off():
    still = ImageConfig(size=32, crop_scale=(1.0, 1.0), flip=False, randaugment_operations=0)
    image = noise(32, 32)
    shapes_of_one = np.full(still.draws, 0.5)  # the middle shape is the square
    assert np.array_equal(augment(image, still, shapes_of_one), to_pixels(image, 32))
    flipped = ImageConfig(size=32, crop_scale=(1.0, 1.0), flip=True, randaugment_operations=0)
    shapes_of_one[2] = 0.49
    assert np.array_equal(augment(image, flipped, shapes_of_one), to_pixels(image, 32)[:, :, ::-1])


def one_operation(number: int, image: Image.Image, sign: float, magnitude: int = 5) -> np.ndarray:
    config = ImageConfig(
        32, crop_scale=(1.0, 1.0), flip=False, randaugment_operations=1, randaugment_magnitude=magnitude
    )
    draws = np.full(config.draws, 0.5)
    draws[-3:] = (number + 0.5) / 10, 0.0, sign
    return augment(image, config, draws)


def test_the_pool_is_blips():
    image = Image.fromarray((np.asarray(noise(32, 32)) // 4) + 64)
    plain = to_pixels(image, 32)
    unchanged = [n for n in range(10) if np.array_equal(one_operation(n, image, 0.9), plain)]
    assert unchanged == [0, 3, 4]  # identity; brightness and sharpness are exactly 1 at magnitude 5
    assert not np.array_equal(one_operation(3, image, 0.9, magnitude=9), plain)
    stretched = one_operation(1, image, 0.9)
    assert stretched.min() == 0 and stretched.max() == 255
    right = one_operation(6, image, 0.1)
    assert np.array_equal(right[:, :, 5:], plain[:, :, :-5]) and (right[:, :, :5] == 128).all()
    down = one_operation(7, image, 0.1)
    assert np.array_equal(down[:, 5:], plain[:, :-5]) and (down[:, :5] == 128).all()
    for number in (5, 6, 7, 8, 9):
        assert not np.array_equal(one_operation(number, image, 0.1), one_operation(number, image, 0.9))


def test_operations_are_applied_half_of_the_time():
    config = ImageConfig(size=8, crop_scale=(1.0, 1.0), flip=False, randaugment_operations=1)
    image, count = noise(8, 8), 0
    fixed = np.full(config.draws, 0.5)
    fixed[-3:] = 0.65, 0.0, 0.0  # a translation
    for row in range(400):
        fixed[-2] = draws_of(row, config)[-2]
        count += not np.array_equal(augment(image, config, fixed), to_pixels(image, 8))
    assert abs(count - 200) <= 50  # five standard deviations of 400 fair coins


def test_a_reduced_image_with_a_reduced_box_gives_nearly_the_same_view():
    smooth = noise(9, 7).resize((360, 280), Image.Resampling.BICUBIC)
    config = ImageConfig(size=32, randaugment_operations=0)
    draws = draws_of(5)
    box = crop_box(smooth.size, config, draws)
    whole = augment_crop(smooth, box, config, draws)
    half = augment_crop(smooth.reduce(2), tuple(side / 2 for side in box), config, draws)
    assert np.abs(whole.astype(int) - half).mean() < 2
