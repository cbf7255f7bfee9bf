from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
import torch
from data_samples import encode, open_data_set, tokenizer_json
from PIL import Image

from blip_pipelines.config import ConfigError
from blip_pipelines.data import loader
from blip_pipelines.data.features import FeatureCache
from blip_pipelines.data.loader import Batch, DataError, DecodedPixels, FrozenFeatures, Loader
from blip_pipelines.data.order import Order
from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.shards import ShardWriter, write_manifest
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.data.transforms import ImageConfig

TENSORS = ["pixels", "token_ids", "token_mask", "image_ids", "text_ids", "rows"]
CONFIG = ImageConfig(size=16)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Pairs:
    return open_data_set(tmp_path_factory.mktemp("data"), [12, 9, 5], captions_per_image=2).select(split="train")


@pytest.fixture(scope="module")
def tokenizer():
    return prune_vocabulary(tokenizer_json())[0]


def load(pairs, tokenizer, images=None, **options) -> list[list[Batch]]:
    images = images or DecodedPixels(pairs, CONFIG, seed=5, train=True)
    order = Order(pairs.shard_rows, seed=3, window_shards=2)
    return list(Loader(pairs, order, images, tokenizer, 12, **{"batch_samples_global": 8, "steps": 4, **options}))


def same(one: Batch, two: Batch) -> bool:
    values = [(getattr(one, field.name), getattr(two, field.name)) for field in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in values)


def test_a_step_is_what_order_pairs_and_tokenizer_say(pairs, tokenizer):
    steps = load(pairs, tokenizer)
    assert len(steps) == 4 and all(len(step) == 1 for step in steps)
    rows = Order(pairs.shard_rows, 3, 2).rows(2 * 8, 8)
    batch = steps[2][0]
    ids, mask = tokenizer(pairs.captions(rows), 12)
    assert np.array_equal(batch.token_ids, ids) and np.array_equal(batch.token_mask, mask)
    assert np.array_equal([batch.image_ids, batch.text_ids], pairs.ids(rows))
    assert np.array_equal(batch.pixels, DecodedPixels(pairs, CONFIG, 5, True)(rows, step=2))
    assert batch.rows.tolist() == list(range(8))
    assert batch.target_tokens == mask[:, 1:].sum() and batch.prompt_tokens == 0
    kinds = [getattr(batch, name).dtype for name in TENSORS]
    assert kinds == [torch.uint8, torch.int64, torch.bool, torch.int64, torch.int64, torch.int64]


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_parts_of_the_ranks_make_up_the_global_batch(pairs, tokenizer, ranks, accumulation):
    whole = load(pairs, tokenizer, accumulation=accumulation)
    parts = [
        load(pairs, tokenizer, accumulation=accumulation, rank=rank, ranks=ranks, workers=rank % 2)
        for rank in range(ranks)
    ]
    for step in range(4):
        for micro in range(accumulation):
            mine = [part[step][micro] for part in parts]
            for name in TENSORS:
                joined = torch.cat([getattr(batch, name) for batch in mine])
                assert torch.equal(joined, getattr(whole[step][micro], name)), name
            assert {batch.target_tokens for batch in mine} == {whole[step][micro].target_tokens}


def test_accumulation_splits_the_same_rows_and_draws(pairs, tokenizer):
    for one, four in zip(load(pairs, tokenizer), load(pairs, tokenizer, accumulation=4), strict=True):
        assert torch.equal(torch.cat([batch.pixels for batch in four]), one[0].pixels)
        assert torch.equal(torch.cat([batch.text_ids for batch in four]), one[0].text_ids)
        assert all(batch.rows.tolist() == [0, 1] for batch in four)
        assert {batch.target_tokens for batch in four} == {one[0].target_tokens}


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_equals_skipping_to_it(pairs, tokenizer, workers):
    whole = load(pairs, tokenizer, steps=7)
    for start in (1, 5, 7):
        rest = load(pairs, tokenizer, steps=7, start_step=start, workers=workers)
        assert len(rest) == 7 - start
        assert all(same(a[0], b[0]) for a, b in zip(rest, whole[start:], strict=True))


def test_iterating_leaves_the_global_generator_alone(pairs, tokenizer):
    before = torch.get_rng_state()
    load(pairs, tokenizer, workers=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_prompt_is_prepended_and_not_counted(pairs, tokenizer):
    plain, prompted = load(pairs, tokenizer)[1][0], load(pairs, tokenizer, prompt="a flag of ")[1][0]
    assert prompted.prompt_tokens == 3
    assert prompted.token_ids.shape[1] == plain.token_ids.shape[1] + 3
    words = plain.token_mask[:, 1:]
    assert torch.equal(prompted.token_ids[:, 4:][words], plain.token_ids[:, 1:][words])
    assert prompted.target_tokens == plain.target_tokens
    cut = load(pairs, tokenizer, prompt="a flag of the house with a dog and a crab on it ")[1][0]
    assert cut.token_ids.shape[1] == 12 and cut.target_tokens == 0


def test_augmentation_is_for_training_only_and_changes_by_step(pairs, tokenizer):
    rows = np.array([3, 4])
    train, plain = DecodedPixels(pairs, CONFIG, 5, True), DecodedPixels(pairs, CONFIG, 5)
    assert np.array_equal(plain(rows, step=1), plain(rows, step=2))
    assert not np.array_equal(train(rows, step=1), train(rows, step=2))
    assert not np.array_equal(train(rows, step=1), train(rows, step=1, first_row=1))
    assert np.array_equal(train(rows, step=1)[1], train(rows[1:], step=1, first_row=1)[0])
    off = DecodedPixels(pairs, ImageConfig(size=16, augment=False), 5, True)
    assert np.array_equal(off(rows, step=1), plain(rows))


def test_large_jpegs_are_read_reduced_and_small_ones_whole(tmp_path, monkeypatch):
    image = Image.effect_noise((1024, 768), 90).convert("RGB")
    with ShardWriter(tmp_path / "images") as writer:
        stored = writer.add(encode(image, "JPEG"))
    row = {**vars(stored), "width": 1024, "height": 768, "caption": "a", "origin": "web", "source": "s"}
    row["split"] = "train"
    images_hash = write_manifest(tmp_path / "images", writer.shards)
    write_pairs(tmp_path / "pairs", [pa.Table.from_pylist([row], PAIR_SCHEMA)], images_hash)
    pairs = Pairs.open(tmp_path / "pairs", tmp_path / "images")
    sizes = []
    real = loader.decode

    def decode(content, *, limits, at_least=None):
        found = real(content, limits=limits, at_least=at_least)
        sizes.append(found.width)
        return found

    monkeypatch.setattr(loader, "decode", decode)
    whole_crop = ImageConfig(size=16, crop_scale=(1.0, 1.0), randaugment_operations=0)
    assert DecodedPixels(pairs, whole_crop, 0, True)(np.array([0])).shape == (1, 3, 16, 16)
    DecodedPixels(pairs, ImageConfig(size=700, randaugment_operations=0), 0, True)(np.array([0]))
    assert sizes == [128, 1024]


@pytest.fixture
def features(tmp_path, pairs):
    return FeatureCache.create(
        tmp_path, pairs.images, ImageConfig(size=8, views=3), "t", lambda pixels: pixels.mean(3).transpose(0, 2, 1)
    )


def test_features_of_a_drawn_view_are_those_of_the_rows(pairs, tokenizer, features):
    whole = load(pairs, tokenizer, FrozenFeatures(pairs, features, seed=1, train=True))
    batch = whole[1][0]
    assert batch.pixels.dtype == torch.float16 and batch.pixels.shape == (8, 8, 3)
    keys = pairs.keys[Order(pairs.shard_rows, 3, 2).rows(8, 8)]
    views = [torch.from_numpy(features.read(keys, view)) for view in range(3)]
    drawn = [[torch.equal(batch.pixels[row], view[row]) for view in views].index(True) for row in range(8)]
    assert len(set(drawn)) > 1
    second = load(pairs, tokenizer, FrozenFeatures(pairs, features, seed=1, train=True), rank=1, ranks=2)
    assert torch.equal(second[1][0].pixels, batch.pixels[4:])


def test_evaluation_reads_view_zero(pairs, features):
    rows = np.arange(len(pairs))
    assert np.array_equal(FrozenFeatures(pairs, features)(rows, step=3), features.read(pairs.keys))


def damaged(tmp_path) -> Pairs:
    """A set whose image 5 turned to zeros after ingestion, length and manifest unchanged."""
    pairs = open_data_set(tmp_path, [8])
    path = tmp_path / "images" / "00000.tar"
    content = bytearray(path.read_bytes())
    offset, size = int(pairs.column("offset")[5]), int(pairs.column("size")[5])
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    return pairs


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_names_its_shard_member_and_key(tmp_path, tokenizer, workers):
    pairs = damaged(tmp_path)
    with pytest.raises(DataError) as found:
        load(pairs, tokenizer, DecodedPixels(pairs, CONFIG), workers=workers)
    message = str(found.value)
    assert message.startswith(f"00000.tar, member {pairs.column('member')[5]}, key {pairs.keys[5][:12]}")
    assert "run ingestion again" in message and "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanished_is_named(tmp_path, tokenizer, workers):
    pairs = open_data_set(tmp_path, [8])
    (tmp_path / "images" / "00000.tar").unlink()
    with pytest.raises(DataError, match=r"00000\.tar.*missing"):
        load(pairs, tokenizer, DecodedPixels(pairs, CONFIG), workers=workers)


def test_a_programming_error_in_a_worker_keeps_its_traceback(pairs, tokenizer):
    def broken(rows, step=0, first_row=0):
        raise ZeroDivisionError("of the reader")

    with pytest.raises(ZeroDivisionError, match="of the reader"):
        load(pairs, tokenizer, broken, workers=1)


def test_a_batch_that_ranks_cannot_share_and_a_foreign_order_are_refused(pairs, tokenizer):
    with pytest.raises(ConfigError, match="batch_samples_global is 8"):
        load(pairs, tokenizer, ranks=3)
    with pytest.raises(ConfigError, match="another view"):
        images = DecodedPixels(pairs, CONFIG)
        Loader(pairs, Order((4,), 0, 1), images, tokenizer, 12, batch_samples_global=8)


def test_pairs_without_images_say_so(tmp_path, tokenizer):
    open_data_set(tmp_path, [8])
    pairs = Pairs.open(tmp_path / "pairs")
    with pytest.raises((DataError, StorageError), match="without its images"):
        load(pairs, tokenizer, DecodedPixels(pairs, CONFIG))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_batch_moves_with_all_its_tensors(pairs, tokenizer):
    batch = load(pairs, tokenizer)[0][0]
    assert batch.pixels.is_pinned()
    moved = batch.to("cuda")
    assert {getattr(moved, name).device.type for name in TENSORS} == {"cuda"}
    assert same(moved.to("cpu"), batch)
