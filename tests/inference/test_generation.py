import numpy as np
import pytest
import torch
from model_samples import CLS, DEC, PAD, SEP, tiny_config, tiny_pixels
from transformers import BlipConfig, BlipForConditionalGeneration

from blip_pipelines.config import ConfigError
from blip_pipelines.inference.generation import GenerationConfig, draw_from_nucleus, generate
from blip_pipelines.models.med import Med


class Words:
    """A tokenizer whose words are numbers."""

    def __call__(self, captions, max_tokens, prompt=""):
        return np.array([[CLS, *map(int, f"{prompt} {caption}".split()), SEP] for caption in captions]), None

    def decode(self, token_ids):
        return [" ".join(str(token) for token in row if token != SEP) for row in token_ids]


def chatty_med(seed=0):
    """Random weights, scaled until captions differ by picture and position and end at different steps."""
    med = Med(tiny_config(), seed).eval()
    with torch.no_grad():
        med.text_encoder.embeddings.word_embeddings.weight.mul_(2)
        med.text_encoder.embeddings.position_embeddings.weight.mul_(16)
        for encoder_layer, decoder_layer in zip(med.text_encoder.layers, med.text_decoder.bert.layers, strict=True):
            encoder_layer.crossattention.output.dense.weight.mul_(2)
            decoder_layer.attention.output.dense.weight.mul_(4)
        head = med.text_decoder.cls["predictions"]
        head.transform.LayerNorm.weight.fill_(1.5)
        head.bias[SEP] += 1.5
    return med


def stock(med):
    vision, text = med.config.vision, med.config.text
    config = BlipConfig(
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.ffn_width,
            "max_position_embeddings": text.max_positions,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "bos_token_id": DEC,
            "eos_token_id": SEP,
            "sep_token_id": SEP,
            "pad_token_id": PAD,
        },
        vision_config={
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp_width,
        },
        projection_dim=med.config.projection,
    )
    model = BlipForConditionalGeneration(config).eval()
    wanted = set(model.state_dict())
    model.load_state_dict({name: value for name, value in med.state_dict().items() if name in wanted}, strict=True)
    return model


def write(med, pixels, config, **more):
    return generate(med, med.project_image(med.encode_image(pixels)), Words(), config, **more)


def cut(token_ids):
    """Ids up to the first [SEP] or padding after the start: what two decoders must agree on."""
    return [
        row[: next((i for i, t in enumerate(row) if i and t in (SEP, PAD)), len(row))] for row in token_ids.tolist()
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beams": 1},
        {"beams": 5, "length_penalty": 2.0},
        {"length_penalty": -0.2, "min_tokens": 5},
        {"repetition_penalty": 1.5, "min_tokens": 4},
        {"strategy": "greedy", "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("prompt", ["", "7 11"])
def test_beam_and_greedy_captions_equal_stock_generate(settings, prompt):
    med = chatty_med()
    pixels = tiny_pixels(16)
    config = GenerationConfig(**{"min_tokens": 3, "max_tokens": 12, **settings})
    ours = write(med, pixels, config, prompt=prompt)

    start = torch.tensor([[CLS, *map(int, prompt.split()), SEP]]).repeat(len(pixels), 1)
    theirs = stock(med).generate(
        pixels,
        start,
        torch.ones_like(start),
        max_length=config.max_tokens,
        min_length=config.min_tokens,
        num_beams=config.beams if config.strategy == "beam" else 1,
        do_sample=False,
        length_penalty=config.length_penalty,
        repetition_penalty=config.penalty,
    )
    assert cut(ours.token_ids) == cut(theirs)
    assert len(set(ours.texts)) > 4, "the case must have captions that differ"


@pytest.mark.parametrize("strategy", ["beam", "nucleus", "greedy"])
def test_a_caption_does_not_depend_on_the_images_beside_it(strategy):
    med, pixels, draw_ids = chatty_med(1), tiny_pixels(12), torch.arange(100, 112)
    config = GenerationConfig(strategy, min_tokens=2, max_tokens=10)
    together = write(med, pixels, config, draw_ids=draw_ids)
    rows = torch.tensor([7, 2, 9])
    apart = write(med, pixels[rows], config, draw_ids=draw_ids[rows])
    assert apart.texts == [together.texts[row] for row in rows]
    torch.testing.assert_close(apart.log_probability, together.log_probability[rows], rtol=0, atol=1e-5)


def test_nucleus_draws_follow_seed_and_sample_number():
    med, pixels, draw_ids = chatty_med(1), tiny_pixels(12), torch.arange(12)
    config = GenerationConfig("nucleus", min_tokens=2, max_tokens=10)
    first = write(med, pixels, config, draw_ids=draw_ids).texts
    assert write(med, pixels, config, draw_ids=draw_ids).texts == first
    assert write(med, pixels, config, draw_ids=draw_ids, sample=1).texts != first
    assert write(med, pixels, config, draw_ids=draw_ids, seed=1).texts != first


@pytest.mark.parametrize("strategy", ["beam", "nucleus", "greedy"])
def test_log_probability_is_the_models_own_of_the_words_and_the_end(strategy):
    med, pixels = chatty_med(), tiny_pixels(6)
    config = GenerationConfig(strategy, min_tokens=3, max_tokens=9, repetition_penalty=1.4)
    image = med.project_image(med.encode_image(pixels))
    found = generate(med, image, Words(), config, prompt="9", draw_ids=torch.arange(6))
    logits_BLV = med.decode_logits(found.token_ids, None, image)
    gained_BL = logits_BLV.log_softmax(-1)[:, :-1].gather(2, found.token_ids[:, 1:, None])[:, :, 0]
    for row, tokens in enumerate(found.tokens.tolist()):
        torch.testing.assert_close(found.log_probability[row], gained_BL[row, 1 : 1 + tokens].sum(), rtol=0, atol=1e-4)


def test_the_prompt_is_in_the_ids_and_not_in_the_text():
    found = write(chatty_med(), tiny_pixels(4), GenerationConfig(min_tokens=5, max_tokens=9), prompt="7 11")
    assert (found.token_ids[:, :3] == torch.tensor([DEC, 7, 11])).all()
    for text, row, tokens in zip(found.texts, found.token_ids.tolist(), found.tokens.tolist(), strict=True):
        assert text == Words().decode([row[3 : 3 + tokens]])[0]
        assert 2 <= len(text.split()) <= 6, "5 tokens less [DEC] and prompt; 9 tokens in all"


@pytest.mark.parametrize("strategy", ["beam", "nucleus", "greedy"])
def test_finished_captions_leave_the_batch(strategy, monkeypatch):
    med, rows = chatty_med(), []
    decode_hidden = Med.decode_hidden

    def counted(self, token_ids, mask, image, cache=None):
        rows.append(len(token_ids))
        assert len(token_ids) == (3 if strategy == "beam" and cache.length else 1) * len(image)
        return decode_hidden(self, token_ids, mask, image, cache)

    monkeypatch.setattr(Med, "decode_hidden", counted)
    found = write(
        med, tiny_pixels(16), GenerationConfig(strategy, min_tokens=2, max_tokens=12), draw_ids=torch.arange(16)
    )
    if strategy != "beam":  # every row pays for its own tokens only
        assert sum(rows) == int(found.tokens.sum())
    assert rows[-1] < max(rows)


def test_beam_search_ends_once_no_other_caption_can_win(monkeypatch):
    med, pixels, steps = chatty_med(), tiny_pixels(1), []
    with torch.no_grad():
        med.text_decoder.cls["predictions"].bias[SEP] += 30  # the first caption that may end is by far the best
    decode_hidden = Med.decode_hidden
    monkeypatch.setattr(Med, "decode_hidden", lambda self, *rest: steps.append(1) or decode_hidden(self, *rest))
    found = write(med, pixels, GenerationConfig(min_tokens=4, max_tokens=12))
    assert (len(steps), found.tokens.tolist()) == (4, [4])


def test_nucleus_keeps_the_smallest_set_that_holds_top_p():
    probability = torch.tensor([0.5, 0.22, 0.02, 0.08, 0.18])
    draws = torch.arange(10_000, dtype=torch.float64) / 10_000

    def shares(top_p, probability=probability):
        drawn = draw_from_nucleus(probability.log().expand(len(draws), -1), top_p, draws)
        return drawn.bincount(minlength=len(probability)) / len(draws)

    one_draw = {"rtol": 0, "atol": 2e-4}  # both ends of an interval fall between draws
    torch.testing.assert_close(shares(0.4), torch.tensor([1.0, 0, 0, 0, 0]))
    torch.testing.assert_close(shares(0.65), torch.tensor([0.5, 0.22, 0, 0, 0]) / 0.72, **one_draw)
    torch.testing.assert_close(shares(0.89), torch.tensor([0.5, 0.22, 0, 0, 0.18]) / 0.9, **one_draw)
    torch.testing.assert_close(shares(1.0), probability, **one_draw)
    equals = torch.tensor([0.25, 0.25, 0.25, 0.25])
    torch.testing.assert_close(shares(0.3, equals), equals, **one_draw)  # equals are in together, whatever their order
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw_from_nucleus(probability.log()[None], 0.65, largest).item() == 1


def test_settings_that_cannot_work_are_refused_by_name():
    with pytest.raises(ConfigError, match="max_tokens"):
        GenerationConfig(min_tokens=8, max_tokens=8)
    with pytest.raises(ConfigError, match="top_p"):
        GenerationConfig(top_p=0)
    med, pixels = chatty_med(), tiny_pixels(2)
    with pytest.raises(ValueError, match="prompt '5 6 7' has 4 tokens"):
        write(med, pixels, GenerationConfig(min_tokens=1, max_tokens=4), prompt="5 6 7")
    with pytest.raises(ValueError, match="12 positions"):
        write(med, pixels, GenerationConfig(max_tokens=14))
    with pytest.raises(ValueError, match="draw id"):
        write(med, pixels, GenerationConfig("nucleus", min_tokens=2, max_tokens=6))
