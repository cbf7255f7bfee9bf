import re

import pytest
import torch
from blip2_samples import assert_equal_scores, stock_blip2_config, tiny_image, tiny_qformer, tiny_qformer_config
from data_samples import WORDS, tokenizer_json
from model_samples import tiny_texts
from torch.nn.functional import normalize

from blip_pipelines.config import ConfigError
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.inference.generation import GenerationConfig, generate
from blip_pipelines.models.keys_values import Cache, KeysValues, MatchedImages, Source
from blip_pipelines.models.qformer import QFormer, QFormerConfig, serves_text_alone
from blip_pipelines.models.text import with_first


@pytest.fixture(scope="module")
def former():
    return tiny_qformer()


@pytest.fixture(scope="module")
def image(former):
    return former.project_image(tiny_image())


@pytest.fixture(scope="module")
def texts():
    return tiny_texts()


def stock(former):
    """The stock class with our weights, its image encoder with random ones; no key of the Q-Former is missing."""
    from transformers import Blip2ForImageTextRetrieval

    torch.manual_seed(0)
    model = Blip2ForImageTextRetrieval(stock_blip2_config(former.config)).eval()
    names = {f"vision_model.post_layernorm.{part}": f"ln_vision.{part}" for part in ("weight", "bias")}
    ours, theirs = former.state_dict(), model.state_dict()
    ours = {
        name: ours[names.get(name, name)] for name in theirs if name in names or not name.startswith("vision_model.")
    }
    model.load_state_dict(theirs | ours, strict=True)
    return model


def joint_pass(model, ids, mask, image_BND, visible):
    """Stock layers over queries and text at once, under a (B, 1, Q + T, Q + T) bool mask."""
    queries = model.query_tokens.expand(len(ids), -1, -1)
    states = model.embeddings(input_ids=ids, query_embeds=queries)
    image_BND = model.vision_model.post_layernorm(image_BND)
    count = queries.shape[1]
    return model.qformer(
        query_embeds=states, query_length=count, attention_mask=visible, encoder_hidden_states=image_BND
    ).last_hidden_state.split([count, ids.shape[1]], 1)


@pytest.mark.parametrize("sizes", [{}, {"every": 1, "queries": 1}, {"every": 3, "image_width": 16}])
def test_itc_and_itm_equal_the_stock_class(sizes, texts):
    former = tiny_qformer(**sizes)
    model = stock(former)
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image_BND = model.vision_model.encoder(model.vision_model.embeddings(pixels)).last_hidden_state
    assert_equal_scores(former, model, pixels, image_BND, texts)


def test_decoding_from_cached_queries_equals_one_pass_under_the_multimodal_causal_mask(former, image, texts):
    ids, mask = texts
    count, tokens = former.config.queries, ids.shape[1]
    visible = torch.ones(count + tokens, count + tokens).tril().bool()
    visible[:count] = torch.arange(count + tokens) < count
    visible = visible & torch.cat([mask.new_ones(3, count), mask], 1)[:, None, None]
    with torch.no_grad():
        queries_BQD, left = former.encode_queries(image, cache=True)
        text_BTD = former.decode_hidden(ids, mask, left)
        expected = joint_pass(stock(former), with_first(ids, former.config.text.dec_id), mask, tiny_image(), visible)
    torch.testing.assert_close(queries_BQD, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(text_BTD[mask], expected[1][mask], atol=1e-5, rtol=0)


def test_two_separate_passes_equal_one_pass_under_the_unimodal_mask(former, image, texts):
    ids, mask = texts
    count, tokens = former.config.queries, ids.shape[1]
    visible = torch.zeros(3, 1, count + tokens, count + tokens, dtype=torch.bool)
    visible[..., :count, :count] = True
    visible[..., count:, count:] = mask[:, None, None]
    with torch.no_grad():
        expected = joint_pass(stock(former), ids, mask, tiny_image(), visible)
        torch.testing.assert_close(former.encode_queries(image)[0], expected[0], atol=1e-5, rtol=0)
        text_BTD = former.encode_text(ids, mask, first_only=False)
        torch.testing.assert_close(text_BTD[mask], expected[1][mask], atol=1e-5, rtol=0)
        torch.testing.assert_close(former.encode_text(ids, mask), text_BTD[:, 0], atol=1e-6, rtol=0)


def moved(before, after):
    return (before - after).abs().max().item() > 1e-4


def test_unimodal_text_and_queries_see_nothing_of_each_other(former, image, texts):
    ids, mask = texts
    other_image, other_ids = former.project_image(tiny_image(seed=1)), with_first(ids, 7)
    assert moved(former.encode_queries(image)[0], former.encode_queries(other_image)[0])
    assert moved(former.encode_text(ids, mask), former.encode_text(other_ids, mask))
    former = tiny_qformer()
    former.encode_text(ids, mask).sum().backward()
    of_queries = re.compile("query_tokens|ln_vision|vision_projection|.*(crossattention|_query)[.]")
    assert not [name for name, value in former.named_parameters() if of_queries.match(name) and value.grad is not None]


def test_matching_lets_queries_and_text_see_each_other(former, image, texts):
    ids, mask = texts
    before = former.match_logits(ids, mask, image)
    for position in range(int(mask.sum(1).min())):
        changed = ids.clone()
        changed[:, position] = 39
        assert moved(before, former.match_logits(changed, mask, image)), position
    assert moved(before, former.match_logits(ids, mask, former.project_image(tiny_image(seed=1))))


def test_padding_moves_nothing(former, image, texts):
    ids, mask = texts
    longer = torch.cat([ids, ids.new_full((3, 2), 37)], 1)
    longer_mask = torch.cat([mask, mask.new_zeros(3, 2)], 1)
    left = former.encode_queries(image, cache=True)[1]
    for function in (
        lambda ids, mask: former.encode_text(ids, mask),
        lambda ids, mask: former.match_logits(ids, mask, image),
        lambda ids, mask: former.encode_with_text(ids, mask, image),
        lambda ids, mask: former.decode_hidden(ids, mask, left)[:, : texts[0].shape[1]][texts[1]],
    ):
        torch.testing.assert_close(function(longer, longer_mask), function(ids, mask), atol=1e-6, rtol=0)


def test_decoded_text_sees_all_queries_and_no_later_token(former, image, texts):
    ids, mask = tiny_texts((7, 7, 7))
    left = former.encode_queries(image, cache=True)[1]
    before = former.decode_hidden(ids, mask, left)
    for position in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, position:] = 39
        after = former.decode_hidden(changed, mask, left)
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=0, rtol=0)
        assert moved(after[:, position], before[:, position]), position
    for query in range(former.config.queries):
        other = KeysValues([(key.clone(), value.clone()) for key, value in left.layers])
        for key, value in other.layers:
            key[:, :, query] += 1
            value[:, :, query] += 1
        after = former.decode_hidden(ids, mask, other)
        assert (after - before).abs().amax((0, 2)).min() > 1e-4, query  # every token, the first included


def test_queries_never_see_decoded_text(former, image, texts):
    queries_BQD, left = former.encode_queries(image, cache=True)
    copies = [key.clone() for key, _ in left.layers]
    former.decode_hidden(*texts, left)
    assert all(torch.equal(key, copy) for (key, _), copy in zip(left.layers, copies, strict=True))
    torch.testing.assert_close(former.encode_queries(image)[0], queries_BQD, atol=0, rtol=0)


def test_decoding_token_by_token_from_the_cache_equals_decoding_at_once(former, image):
    ids, _ = tiny_texts((7, 7, 7))
    left = former.encode_queries(image, cache=True)[1]
    whole = former.decode_hidden(ids, None, left)
    cache = Cache()
    parts = [former.decode_hidden(ids[:, :3], None, left, cache)]  # a prompt first
    parts += [former.decode_hidden(ids[:, t : t + 1], None, left, cache) for t in range(3, 6)]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, :6], atol=1e-5, rtol=0)
    rows = torch.tensor([2, 0])
    rest = former.decode_hidden(ids[rows, 6:], None, left.select(rows), cache.select(rows))
    torch.testing.assert_close(rest, whole[rows, 6:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_captions_are_generated_as_from_a_med(strategy):
    """ITG needs no loop of its own: what the queries left stands in for the image."""
    tokenizer = prune_vocabulary(tokenizer_json(), WORDS)[0]
    former = QFormer(tiny_qformer_config().fit(tokenizer), 3).eval()
    left = former.encode_queries(former.project_image(tiny_image()), cache=True)[1]
    config = GenerationConfig(strategy=strategy, beams=2, min_tokens=1, max_tokens=6)
    written = generate(former, left, tokenizer, config)
    ids = torch.full((3, 1), former.config.text.dec_id)
    for _ in range(5):
        logits = former.lm_head(former.decode_hidden(ids, None, left)[:, -1])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    if strategy == "greedy":
        assert written.texts == tokenizer.decode(ids[:, 1:].tolist())
    assert len(written.texts) == 3


def test_selected_images_give_the_logits_of_encoding_them_again(former, image, texts):
    ids, mask = texts
    index = torch.tensor([2, 0, 0])
    again = former.project_image(tiny_image()[index])
    torch.testing.assert_close(
        former.match_logits(ids, mask, image.select(index)), former.match_logits(ids, mask, again)
    )


def test_texts_that_share_an_image_read_what_a_copy_of_it_says(former, image):
    """ITM's pairs: two texts for each image, then texts of images by index; and runs of texts as beams have them."""
    ids, mask = tiny_texts((7, 4, 5, 6, 7, 3, 4, 5))
    matched = MatchedImages(image, torch.tensor([1, 0]))
    copied = image.select(torch.tensor([0, 0, 1, 1, 2, 2, 1, 0]))
    torch.testing.assert_close(former.match_logits(ids, mask, matched), former.match_logits(ids, mask, copied))
    two = torch.arange(2)
    runs = former.encode_with_text(ids, mask, image.select(two))
    torch.testing.assert_close(runs, former.encode_with_text(ids, mask, image.select(two.repeat_interleave(4))))
    left = former.encode_queries(image, cache=True)[1]
    found = former.decode_hidden(ids, None, left.select(two))
    torch.testing.assert_close(found, former.decode_hidden(ids, None, left.select(two.repeat_interleave(4))))


def test_only_layers_that_look_at_the_image_project_it(former, image):
    assert len(image.layers) == 2
    assert [layer.crossattention is not None for layer in former.layers] == [True, False, True]


def test_attention_maps_are_shares_of_the_image(former, image):
    weights = former.attention_to_image(image)
    assert weights.shape == (2, 3, former.config.queries, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_attention_maps_are_what_the_layer_uses(texts):
    """Values that tell image tokens apart come out of the last cross-attention mixed by the map."""
    former = tiny_qformer(heads=1, layers=1)
    attention, image_BND = former.layers[0].crossattention, tiny_image()
    with torch.no_grad():
        image = former.project_image(image_BND)
        weights_BQN = former.attention_to_image(image)[0]
        start = former.qformer["layernorm"](former.query_tokens).expand(3, -1, -1)
        own = Source(*former.layers[0].attention.keys_values(start))
        mixed = former.layers[0].attention(start, None, [own], 3)
        expected = attention.output(weights_BQN @ image.layers[0][1][:, 0], mixed)
        torch.testing.assert_close(attention(mixed, None, image.sources(0), 3), expected, atol=1e-5, rtol=0)


def test_every_parameter_learns_from_the_three_objectives(texts):
    former = tiny_qformer()
    image = former.project_image(tiny_image())
    queries_BQD, left = former.encode_queries(image, cache=True)
    similarity = former.image_features(queries_BQD) @ former.text_features(*texts).T
    itg = former.lm_head(former.decode_hidden(*texts, left))[..., 7]
    (similarity[0, 0, 1] + former.match_logits(*texts, image)[:, 1].sum() + itg.sum()).backward()
    assert not {name for name, parameter in former.named_parameters() if parameter.grad is None}


def test_what_serves_text_alone_gets_no_gradient_from_queries_alone():
    former = tiny_qformer()
    former.encode_queries(former.project_image(tiny_image()))[0].sum().backward()
    for name, parameter in former.named_parameters():
        assert (parameter.grad is None) == serves_text_alone(name), name


def test_activation_checkpointing_changes_no_gradient(texts):
    gradients = []
    for checkpoint_activations in (False, True):
        former = tiny_qformer(checkpoint_activations=checkpoint_activations)
        image = former.project_image(tiny_image())
        left = former.encode_queries(image, cache=True)[1]
        (former.match_logits(*texts, image).sum() + former.decode_hidden(*texts, left).square().sum()).backward()
        gradients.append([parameter.grad for parameter in former.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_dropout_differs_between_images_and_acts_in_training_only(texts):
    former = tiny_qformer(dropout=0.3, attention_dropout=0.3)
    same = former.project_image(tiny_image(1).expand(2, -1, -1))
    assert torch.equal(*former.encode_queries(same)[0])
    former.train()
    left = former.encode_queries(same, cache=True)[1]
    assert not torch.equal(*left.layers[0][0])  # before any image was seen


def test_half_precision_images_are_read_and_features_stay_float32(former, texts):
    with torch.autocast("cpu", torch.bfloat16):
        image = former.project_image(tiny_image().half())
        outputs = (
            former.image_features(former.encode_queries(image)[0]),
            former.text_features(*texts),
            former.match_logits(*texts, image),
        )
    assert all(output.dtype == torch.float32 for output in outputs)
    exact = former.match_logits(*texts, former.project_image(tiny_image()))
    torch.testing.assert_close(outputs[2], exact, atol=0.1, rtol=0)


def test_float64_goes_through_unrounded(texts):
    former = tiny_qformer().double()
    image = former.project_image(tiny_image().double())
    assert former.match_logits(*texts, image).dtype == torch.float64
    assert former.image_features(former.encode_queries(image)[0]).dtype == torch.float64


def test_queries_start_apart_with_the_papers_spread():
    former = QFormer(tiny_qformer_config(queries=64, width=64))
    assert former.query_tokens.std().item() == pytest.approx(0.02, rel=0.05)  # 4096 draws: three sigma is 3 %
    queries = normalize(former.query_tokens[0], dim=-1)
    assert (queries @ queries.T - torch.eye(64)).abs().max() < 0.6  # 2016 pairs of 64 dimensions: std 0.125


def test_equal_seeds_give_equal_models():
    one, other = tiny_qformer(seed=3).state_dict(), tiny_qformer(seed=3).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["query_tokens"], tiny_qformer(seed=4).state_dict()["query_tokens"])


def test_text_beyond_the_position_table_is_refused(former):
    with pytest.raises(ValueError, match="max_positions"):
        former.encode_text(*tiny_texts((13,)))


def test_sizes_that_make_no_sense_are_config_errors():
    with pytest.raises(ConfigError, match=r"qformer\.queries"):
        QFormerConfig(queries=0)
