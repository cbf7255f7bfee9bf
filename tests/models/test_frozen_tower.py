import numpy as np
import pytest
import torch
from blip2_samples import tiny_qformer_config, tiny_uint8, vit_folder
from data_samples import write_data_set
from model_samples import random_stem, tiny_med
from torch import nn

from blip_pipelines.config import ConfigError
from blip_pipelines.data.features import FeatureCache
from blip_pipelines.data.loader import DecodedPixels, FrozenFeatures
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.models.exports import export_med, load_med
from blip_pipelines.models.frozen import Frozen, weights_hash
from blip_pipelines.models.frozen_tower import FrozenTower, TowerConfig, med_tower, open_tower
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.weights import StartError

TINY = {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


def stock_folder(folder, kind):
    """A tiny random tower, alone or in a whole model; returns the module that sees images."""
    import transformers

    torch.manual_seed(0)
    if kind == "vit":
        return vit_folder(folder)
    vision = {**TINY, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32}
    if kind == "dinov2":
        vision.pop("intermediate_size")
        model = transformers.Dinov2Model(transformers.Dinov2Config(**vision))
    elif kind == "clip vision":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    elif kind == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=TEXT))
    elif kind == "siglip":
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=TEXT))
    else:
        model = transformers.Blip2ForConditionalGeneration(
            transformers.Blip2Config(
                vision_config={**vision, "initializer_range": 0.2},
                qformer_config={name: value for name, value in TEXT.items() if name != "vocab_size"},
                text_config={"model_type": "opt", **TEXT, "ffn_dim": 16, "word_embed_proj_dim": 16},
            )
        )
    model.eval().save_pretrained(folder)
    return getattr(model, "vision_model", model)


def open_stock(folder, **config):
    return open_tower(TowerConfig(str(folder), mean=(0.4, 0.4, 0.4), std=(0.3, 0.3, 0.3), **config))


def normalised(pixels):
    return (pixels / 255 - 0.4) / 0.3


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip vision", "clip", "siglip", "blip-2"])
def test_stock_towers_give_their_tokens_before_the_norm_and_the_norm(tmp_path, kind):
    source = stock_folder(tmp_path, kind)
    tower = open_stock(tmp_path)
    assert (tower.image_size, tower.width) == (8, 24)
    norm = nn.LayerNorm(24, tower.norm_eps)
    tower.start_norm(norm)
    found = tower.encode(tiny_uint8())
    assert found.shape == (3, tower.tokens, 24)
    if kind.startswith("clip"):  # CLIP norms its class token alone
        norm = nn.Identity()
    expected = source(normalised(tiny_uint8())).last_hidden_state
    torch.testing.assert_close(norm(found), expected, atol=1e-5, rtol=0)
    assert (tower.vision is not None) == (kind in ("vit", "blip-2"))


def test_mean_and_deviation_come_from_the_image_processor(tmp_path):
    vit_folder(tmp_path)
    torch.testing.assert_close(
        open_tower(TowerConfig(str(tmp_path))).encode(tiny_uint8()), open_stock(tmp_path).encode(tiny_uint8())
    )
    for file in tmp_path.glob("*processor*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"tower\.mean"):
        open_tower(TowerConfig(str(tmp_path)))


def test_dropped_layers_are_those_at_the_end(tmp_path):
    source = vit_folder(tmp_path, layers=3)
    tower = open_stock(tmp_path, drop_layers=1)
    expected = source(normalised(tiny_uint8()), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(tower.encode(tiny_uint8()), expected, atol=1e-5, rtol=0)
    norm = nn.LayerNorm(24)
    tower.start_norm(norm)
    assert (norm.weight == 1).all()
    with pytest.raises(ConfigError, match=r"drop_layers.*3 of 3"):
        open_stock(tmp_path, drop_layers=3)


@pytest.fixture(scope="module")
def stem():
    return random_stem()


def test_med_is_a_tower_with_its_norm_where_the_q_former_starts(tmp_path):
    med = tiny_med()
    with torch.no_grad():
        med.vision_model.post_layernorm.weight.uniform_(0.5, 1.5)
    export_med(med, tmp_path, None, {"size": 8})
    tower = open_tower(TowerConfig(str(tmp_path)))
    former = QFormer(tiny_qformer_config(image_width=3).behind(tower))
    tower.start_norm(former.ln_vision)
    pixels = tiny_uint8()
    torch.testing.assert_close(former.ln_vision(tower.encode(pixels)), med.encode_image(pixels), atol=1e-5, rtol=0)


def test_a_med_behind_a_stem_reads_images_or_the_stems_features(tmp_path, stem):
    med = tiny_med(stem=True)
    export_med(med, tmp_path, None, {"size": 128}, stem=stem)
    tower = open_tower(TowerConfig(str(tmp_path)))
    assert (tower.image_size, tower.tokens, tower.width) == (128, 17, 24)
    pixels = tiny_uint8(2, 128)
    torch.testing.assert_close(tower.encode(pixels), tower.encode(stem(pixels)), atol=0, rtol=0)
    norm = nn.LayerNorm(24, tower.norm_eps)
    tower.start_norm(norm)
    trained = load_med(tmp_path).med.encode_image(stem(pixels).half())  # of features out of the stem's cache
    torch.testing.assert_close(norm(tower.encode(pixels)), trained, atol=1e-5, rtol=0)


class WithBatchNorm(Frozen):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(2))
        self.freeze()

    def forward(self, pixels):
        return self.layers(pixels.float()).transpose(1, 2)


def test_a_tower_cannot_be_trained_by_accident(tmp_path):
    """In a model that is set to train and stepped: no gradient, evaluation mode, no statistic and no byte moves."""
    tower = FrozenTower(WithBatchNorm(), None, 1e-6, 8)
    task = nn.ModuleDict({"tower": tower, "norm": nn.LayerNorm(8)})
    before = weights_hash(tower)
    task.train()
    task["tower"].train(True)
    optimizer = torch.optim.AdamW(task.parameters(), 0.1)
    outputs = []
    for _ in range(2):
        outputs.append(task["tower"](tiny_uint8()))
        assert not outputs[-1].requires_grad
        task["norm"](outputs[-1].float()).square().sum().backward()
        optimizer.step()
    assert not any(part.training for part in tower.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in tower.parameters())
    assert torch.equal(*outputs)
    assert weights_hash(tower) == before


def test_hash_names_weights_and_what_is_done_with_pixels(tmp_path):
    vit_folder(tmp_path)
    tower = open_stock(tmp_path)
    assert open_stock(tmp_path).hash == tower.hash == weights_hash(tower, tower.vision.mean, tower.vision.std)
    assert open_stock(tmp_path, precision="bfloat16").hash != tower.hash
    assert open_stock(tmp_path, drop_layers=1).hash != tower.hash
    other = open_tower(TowerConfig(str(tmp_path), mean=(0.5, 0.4, 0.4), std=(0.3, 0.3, 0.3)))
    assert other.hash != tower.hash
    with torch.no_grad():
        tower.model.encoder.layers[0].mlp.fc1.bias[0] += 1e-3
    assert weights_hash(tower, tower.vision.mean, tower.vision.std) != open_stock(tmp_path).hash


def test_half_precision_weights_give_float32_tokens_near_the_exact_ones(tmp_path):
    vit_folder(tmp_path)
    exact, half = (open_stock(tmp_path, precision=precision) for precision in ("float32", "bfloat16"))
    assert next(half.model.parameters()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):  # training's autocast does not reach a float32 tower
        assert torch.equal(exact.encode(tiny_uint8()), exact.encode(tiny_uint8()))
    with torch.autocast("cpu", torch.bfloat16):
        inside = exact.encode(tiny_uint8())
    assert torch.equal(inside, exact.encode(tiny_uint8()))
    found = half.encode(tiny_uint8())
    assert found.dtype == torch.float32
    relative = (found - inside).norm() / inside.norm()
    assert relative < 2 * 4 * 2**-8  # eight roundings of half a unit in each of two layers, added up


def test_cached_features_equal_the_live_tower_bit_for_bit(tmp_path):
    vit_folder(tmp_path / "vit")
    tower = open_stock(tmp_path / "vit")
    pairs, images = write_data_set(tmp_path, [3, 2])
    found = FeatureCache.create(
        tmp_path / "cache",
        images,
        ImageConfig(size=8),
        tower.hash,
        lambda pixels: tower(torch.from_numpy(pixels)).numpy(),
        batch_images=2,
    )
    assert (found.tokens, found.width) == (tower.tokens, tower.width)
    table = Pairs.open(pairs, images)
    live = tower(torch.from_numpy(DecodedPixels(table, ImageConfig(size=8))(np.arange(5))))
    assert torch.equal(torch.from_numpy(FrozenFeatures(table, found)(np.arange(5))), live)


def test_sources_without_an_image_encoder_are_refused(tmp_path, monkeypatch):
    from transformers import BertConfig, BertModel

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(StartError, match="'bert' holds no image encoder"):
        open_stock(tmp_path)
    with pytest.raises(StartError, match="no image encoder that stock"):
        open_stock(tmp_path / "nowhere")


def test_med_tower_takes_the_med_apart():
    from blip_pipelines.models.exports import ExportedMed

    exported = ExportedMed(tiny_med(), None, {"size": 8}, None, None)
    state = med_tower(exported).vision_state()
    assert set(state) == {name for name in tiny_med().vision_model.state_dict() if "post_layernorm" not in name}
