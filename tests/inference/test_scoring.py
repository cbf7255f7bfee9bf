import numpy as np
import pytest
import torch
from model_samples import tiny_med, tiny_pixels, tiny_texts

from blip_pipelines.inference import scoring
from blip_pipelines.models.med import Med

ROUNDING = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def scene():
    med = tiny_med()
    ids_RT, mask_RT = tiny_texts((5, 9, 3, 7, 9, 4))
    image_IND = scoring.encode_images(med, tiny_pixels(5).split(2))
    return med, image_IND, ids_RT, mask_RT


def test_features_do_not_depend_on_batches_or_padding(scene):
    med, image_IND, ids_RT, mask_RT = scene
    with torch.no_grad():
        plain = torch.cat(
            [
                med.text_features(ids[None, : mask.sum()], mask[None, : mask.sum()])
                for ids, mask in zip(ids_RT, mask_RT, strict=True)
            ]
        )
        pictures = torch.cat([med.image_features(med.encode_image(pixel[None])) for pixel in tiny_pixels(5)])
    for batch in (1, 4, 100):
        torch.testing.assert_close(scoring.text_features(med, ids_RT, mask_RT, batch), plain, **ROUNDING)
    torch.testing.assert_close(scoring.image_features(med, image_IND), pictures, **ROUNDING)


@pytest.mark.parametrize(("batch_pairs", "batch_images"), [(1, 1), (3, 2), (100, 100)])
def test_pair_scores_equal_one_pair_at_a_time(scene, batch_pairs, batch_images):
    med, image_IND, ids_RT, mask_RT = scene
    draw = np.random.default_rng(0)
    images_P, texts_P = draw.integers(5, size=17), draw.integers(6, size=17)
    found = scoring.match_logits(med, image_IND, ids_RT, mask_RT, images_P, texts_P, batch_pairs, batch_images)
    with torch.no_grad():
        for row, (image, text) in enumerate(zip(images_P, texts_P, strict=True)):
            length = mask_RT[text].sum()
            seen = med.project_image(image_IND[image : image + 1])
            alone = med.match_logits(ids_RT[text : text + 1, :length], mask_RT[text : text + 1, :length], seen)[0]
            torch.testing.assert_close(found[row], alone, **ROUNDING)


def test_an_image_is_projected_once_for_all_its_pairs(scene, monkeypatch):
    med, image_IND, ids_RT, mask_RT = scene
    projected, project_image = [], Med.project_image
    monkeypatch.setattr(
        Med, "project_image", lambda self, image: projected.append(len(image)) or project_image(self, image)
    )
    images_P = np.array([4, 0, 4, 4, 2, 0, 2, 4])
    scoring.match_logits(med, image_IND, ids_RT, mask_RT, images_P, np.arange(8) % 6, batch_pairs=2, batch_images=2)
    assert projected == [2, 1], "three distinct images, two at a time"


def test_a_gpu_takes_as_many_images_at_once_as_there_is_room_for(scene, monkeypatch):
    med, image_IND, _, _ = scene
    image = med.project_image(image_IND[:1])
    of_one = sum(states.nbytes for layer in image.layers for states in layer)
    for room, images in (3 * of_one, 3), (4 * of_one - 1, 3), (1, 1):
        monkeypatch.setattr(scoring, "GPU_BYTES", room)
        assert scoring._room(image) == images


def test_match_probability_is_the_softmax_of_the_match_logit():
    probability = scoring.match_probabilities(torch.tensor([[0.0, 0.0], [1.0, 3.0]]))
    torch.testing.assert_close(probability, torch.tensor([0.5, 1 / (1 + np.exp(-2.0))], dtype=torch.float32))


def test_no_pairs_are_no_scores(scene):
    med, image_IND, ids_RT, mask_RT = scene
    nothing = np.array([], np.int64)
    assert scoring.match_logits(med, image_IND, ids_RT, mask_RT, nothing, nothing).shape == (0, 2)
