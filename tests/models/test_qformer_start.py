from dataclasses import replace

import numpy as np
import pytest
import torch
from blip2_samples import stock_blip2_config, tiny_image, tiny_qformer, tiny_qformer_config
from model_samples import tiny_med, tiny_pixels, tiny_texts
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from blip_pipelines.models.exports import export_med
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.qformer_start import (
    QFormerStartConfig,
    start_from_bert,
    start_from_blip2,
    start_from_med,
    start_qformer,
)
from blip_pipelines.models.weights import StartError, Weights, read_weights

VOCABULARY = 38  # of the source; the tiny Q-Former has two words more


def bert(width=16, layers=3) -> BertForPreTraining:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        initializer_range=0.2,
    )
    return BertForPreTraining(config).eval()


def weights(model, **config) -> Weights:
    return Weights("source", {name: value.clone() for name, value in model.state_dict().items()}, config)


def test_bert_gives_text_its_outputs_and_queries_its_feed_forward():
    source, former = bert(), tiny_qformer()
    started = start_from_bert(former, weights(source))
    ids, mask = tiny_texts()
    ids = ids.clamp(max=VOCABULARY - 1)
    expected = source.bert(ids, attention_mask=mask.long()).last_hidden_state
    found = former.encode_text(ids, mask, first_only=False)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=0)
    states = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    predicted = source.cls.predictions(states)
    torch.testing.assert_close(former.lm_head(states)[:, :VOCABULARY], predicted, atol=1e-5, rtol=0)
    for layer in former.layers:
        assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
        assert torch.equal(layer.output_query.dense.weight, layer.output.dense.weight)
        assert layer.output_query.dense.weight is not layer.output.dense.weight
    heads = ("query_tokens", "ln_vision", "vision_projection", "text_projection", "itm_head")
    assert all("crossattention" in name or name.startswith(heads) for name in started.fresh)
    assert "38 of 40 words" in str(started)


def test_a_deeper_bert_gives_its_first_layers_and_words_follow_the_index_map():
    source, former = bert(layers=4), tiny_qformer()
    kept = np.concatenate([np.arange(37, -1, -1), [-1, -1]])
    start_from_bert(former, weights(source), kept)
    words = former.embeddings["word_embeddings"].weight
    assert torch.equal(words[0], source.bert.embeddings.word_embeddings.weight[37])
    assert torch.equal(words[38:], tiny_qformer().embeddings["word_embeddings"].weight[38:])
    assert torch.equal(former.layers[2].output.dense.weight, source.bert.encoder.layer[2].output.dense.weight)


def test_a_narrower_q_former_takes_the_tables_alone():
    former = tiny_qformer()
    started = start_from_bert(former, weights(bert(width=32)))
    assert set(started.loaded) == {
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
    }


def test_med_gives_text_its_unimodal_outputs_and_queries_its_sight(tmp_path):
    """With cross-attention everywhere, queries that are [ENC] and its position see what [ENC] alone sees in MED."""
    med = tiny_med(layers=3)
    export_med(med, tmp_path, None, {"size": 8})
    former = QFormer(tiny_qformer_config(every=1, queries=1)).eval()
    started = start_from_med(former, read_weights(tmp_path))
    ids, mask = tiny_texts()
    torch.testing.assert_close(former.text_features(ids, mask), med.text_features(ids, mask), atol=1e-5, rtol=0)
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(former.lm_head(hidden), med.lm_head(hidden))
    image_BND = med.encode_image(tiny_pixels())
    with torch.no_grad():
        enc = ids[:1, :1] * 0 + former.config.text.enc_id
        start = former.embeddings["word_embeddings"](enc) + former.embeddings["position_embeddings"].weight[:1]
        former.query_tokens.copy_(start)
        former.ln_vision = nn.Identity()
        former.ln_vision.weight = torch.zeros(1)
        seen = former.encode_queries(former.project_image(image_BND))[0][:, 0]
    alone = torch.ones(3, 1, dtype=torch.bool)
    expected = med.match_logits(ids[:, :1], alone, med.project_image(image_BND))
    torch.testing.assert_close(med.itm_head(seen), expected, atol=1e-5, rtol=0)
    heads = ("query_tokens", "ln_vision", "vision_projection", "itm_head")
    assert all(name.startswith(heads) for name in started.fresh)


@pytest.mark.parametrize(("theirs", "ours", "sources"), [(3, 2, [0, 1]), (2, 4, [0, 0, 1, 1])])
def test_layers_of_a_med_are_spread_over_those_of_the_q_former(tmp_path, theirs, ours, sources):
    med = tiny_med(layers=theirs)
    export_med(med, tmp_path, None, {"size": 8})
    former = tiny_qformer(layers=ours)
    (started,) = start_qformer(former, QFormerStartConfig(med=str(tmp_path)))
    for layer, source in zip(former.layers, sources, strict=True):
        twin = med.text_encoder.layers[source]
        assert torch.equal(layer.attention.attention.query.weight, twin.attention.self.query.weight)
        assert torch.equal(layer.output_query.dense.weight, twin.output.dense.weight)
        if layer.crossattention is not None:
            assert torch.equal(layer.crossattention.attention.value.weight, twin.crossattention.self.value.weight)
    assert not [name for name in started.fresh if name.startswith("qformer.")]


def test_a_med_of_another_size_or_none_at_all_is_refused(tmp_path):
    export_med(tiny_med(text_width=32), tmp_path, None, {"size": 8})
    with pytest.raises(StartError, match=r"is \(32,\), the model.s \(16,\)"):
        start_from_med(tiny_qformer(), read_weights(tmp_path))
    with pytest.raises(StartError, match="no text encoder"):
        start_from_med(tiny_qformer(), weights(nn.Linear(2, 2)))
    export_med(tiny_med(), tmp_path, None, {"size": 8})
    four = tiny_qformer_config()
    with pytest.raises(StartError, match="has 2 heads"):
        start_from_med(QFormer(replace(four, text=replace(four.text, heads=4))), read_weights(tmp_path))


TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "word_embed_proj_dim": 16}


@pytest.mark.parametrize("kind", ["itm", "opt", "instruct"])
def test_published_layouts_load_by_the_same_key_names(tmp_path, kind):
    """Random weights in the layouts of Salesforce/blip2-itm-vit-g, blip2-opt-2.7b and instructblip-vicuna-7b."""
    torch.manual_seed(0)
    former = tiny_qformer()
    config = stock_blip2_config(former.config, text_config={"model_type": "opt", "vocab_size": 50, **TEXT})
    if kind == "itm":
        source = Blip2ForImageTextRetrieval(config)
    elif kind == "opt":
        config.qformer_config.use_qformer_text_input = False
        source = Blip2ForConditionalGeneration(config)
    else:
        parts = {name: getattr(config, name).to_dict() for name in ("vision_config", "qformer_config", "text_config")}
        parts["qformer_config"].pop("model_type"), parts["vision_config"].pop("model_type")
        source = InstructBlipForConditionalGeneration(InstructBlipConfig(**parts, num_query_tokens=4))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.2)
    source.eval().save_pretrained(tmp_path)
    started = start_from_blip2(former, read_weights(tmp_path, unwanted=r"language_model\."))
    fresh = {name.split(".")[0] for name in started.fresh}
    assert (
        fresh
        == {
            "itm": {"cls"},
            "opt": {"cls", "embeddings", "vision_projection", "text_projection", "itm_head", "qformer"},
            "instruct": {"cls", "vision_projection", "text_projection", "itm_head"},
        }[kind]
    )
    assert all("_query" not in name and "attention" not in name for name in started.fresh)
    image = former.project_image(tiny_image())
    states = source.vision_model.post_layernorm(tiny_image())
    queries = source.query_tokens.expand(3, -1, -1)
    ids, mask = tiny_texts()
    if kind == "instruct":
        joint = torch.cat([mask.new_ones(3, 4), mask], 1).long()
        expected = source.qformer(
            input_ids=ids, attention_mask=joint, query_embeds=queries, encoder_hidden_states=states
        ).last_hidden_state[:, :4]
        found = former.encode_with_text(ids, mask, image)
    else:
        expected = source.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state
        found = former.encode_queries(image)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_unknown_keys_are_refused_by_name():
    former = tiny_qformer()
    with pytest.raises(StartError, match=r"qformer\.adapter"):
        start_from_blip2(former, Weights("source", {"qformer.adapter.weight": torch.zeros(1)}, {}))
    with pytest.raises(StartError, match=r"qformer\.heads is 2; set it to 4"):
        start_from_blip2(former, Weights("source", {}, {"qformer_config": {"num_attention_heads": 4}}))


def test_later_starts_lie_over_earlier_ones(tmp_path):
    export_med(tiny_med(layers=3), tmp_path / "med", None, {"size": 8})
    bert().bert.save_pretrained(tmp_path / "bert")
    former = tiny_qformer()
    started = start_qformer(former, QFormerStartConfig(bert=str(tmp_path / "bert"), med=str(tmp_path / "med")))
    assert len(started) == 2
    twin = tiny_med(layers=3).text_encoder
    assert torch.equal(former.embeddings["word_embeddings"].weight, twin.embeddings.word_embeddings.weight)
