import pytest
import torch

from blip_pipelines.models.med import Med, MedConfig
from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.vision import VisionConfig
from blip_pipelines.objectives.contrastive import Candidates
from blip_pipelines.objectives.momentum import MomentumEncoder, Queue


def rows(start, count):
    """Rows whose features and ids say which row they are."""
    ids = torch.arange(start, start + count)
    return Candidates(ids[:, None] + torch.zeros(3), -ids[:, None] + torch.zeros(3), ids, ids + 1000)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 2, 2, 2), (5, 1, 4, 7), (12, 3), (4, 13), (1,)])
def test_queue_holds_the_last_rows_whatever_the_batch_sizes(sizes):
    queue, start = Queue(5, 3), 0
    for count in sizes:
        queue.enqueue(rows(start, count))
        start += count
    kept = list(range(max(0, start - 5), start))
    filled = queue.image_ids >= 0
    assert sorted(queue.image_ids[filled].tolist()) == kept
    # Row r lies in slot r modulo 5, as in a ring that was never told the batch sizes.
    assert all(queue.image_ids[row % 5] == row for row in kept)
    assert queue.pointer == start % 5
    for features, sign in ((queue.image_features, 1), (queue.text_features, -1)):
        assert torch.equal(features[filled], sign * queue.image_ids[filled][:, None].float().expand(-1, 3))
    assert torch.equal(queue.text_ids[filled], queue.image_ids[filled] + 1000)


def test_queue_continues_from_its_state_dict():
    queue, resumed = Queue(5, 3), Queue(5, 3)
    queue.enqueue(rows(0, 3))
    resumed.load_state_dict(queue.state_dict())
    for ring in (queue, resumed):
        ring.enqueue(rows(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(queue.buffers(), resumed.buffers(), strict=True))
    assert len(queue.state_dict()) == 5


def test_queue_without_slots_stays_empty():
    queue = Queue(0, 3)
    queue.enqueue(rows(0, 2))
    assert len(queue.candidates.image_ids) == 0


@pytest.fixture
def model():
    vision = VisionConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2, mlp_width=16)
    text = TextConfig(
        vocabulary=12, width=8, layers=2, heads=2, ffn_width=16, max_positions=8, cls_id=1, sep_id=2, dec_id=3, enc_id=4
    )
    return Med(MedConfig(vision, text, projection=4))


def test_momentum_encoder_gives_the_features_of_the_model_it_copied(model):
    momentum = MomentumEncoder(model, 0.9)
    pixels = torch.rand(2, 3, 8, 8)
    ids, mask = torch.tensor([[1, 5, 2], [1, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    image, text = momentum(pixels, ids, mask)
    torch.testing.assert_close(image, model.image_features(model.encode_image(pixels)))
    torch.testing.assert_close(text, model.text_features(ids, mask))
    assert not image.requires_grad and not text.requires_grad


def test_momentum_is_the_published_average_of_the_weights_it_needs_and_of_no_other(model):
    momentum = MomentumEncoder(model, 0.9)
    assert not list(momentum.parameters())
    before = {name: value.clone() for name, value in momentum.model.state_dict().items()}
    assert not [name for name in before if "crossattention" in name or "decoder" in name or "itm_head" in name]
    online = dict(model.named_parameters())
    assert set(before) == {
        name for name in online if not any(part in name for part in ("crossattention", "text_decoder", "itm_head"))
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    momentum.follow(model)
    for name, value in momentum.model.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * online[name].detach())
