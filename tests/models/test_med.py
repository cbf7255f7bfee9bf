import copy

import pytest
import torch
from model_samples import CLS, ENC, stock_config, tiny_config, tiny_med, tiny_pixels, tiny_texts

from blip_pipelines.config import ConfigError
from blip_pipelines.models.keys_values import Cache, MatchedImages
from blip_pipelines.models.med import Med
from blip_pipelines.models.text import TextConfig


@pytest.fixture(scope="module")
def med():
    return tiny_med()


@pytest.fixture(scope="module")
def image(med):
    return med.project_image(med.encode_image(tiny_pixels()))


@pytest.fixture(scope="module")
def texts():
    return tiny_texts()


def stock(kind, med):
    """A stock class with our weights; strict, so no key is missing or left over."""
    import transformers

    model = getattr(transformers, kind)(stock_config(med.config)).eval()
    ours = med.state_dict()
    model.load_state_dict({name: ours[name] for name in model.state_dict()}, strict=True)
    return model


@pytest.mark.parametrize("config", [{}, {"image_width": 16}, {"stem": True}, {"layers": 3, "text_width": 32}])
def test_three_modes_equal_the_stock_classes(config, texts):
    med = tiny_med(**config)
    ids, mask = texts
    pixels = tiny_pixels(size=med.config.vision.image_size)
    enc_ids, dec_ids = ids.clone(), ids.clone()
    enc_ids[:, 0], dec_ids[:, 0] = med.config.text.enc_id, med.config.text.dec_id
    retrieval, captioning = stock("BlipForImageTextRetrieval", med), stock("BlipForConditionalGeneration", med)
    with torch.no_grad():
        image_BND = med.encode_image(pixels)
        image = med.project_image(image_BND)
        similarity = med.image_features(image_BND) @ med.text_features(ids, mask).T
        expected = retrieval(ids, pixels, attention_mask=mask.long(), use_itm_head=False).itm_score
        torch.testing.assert_close(similarity, expected, atol=1e-5, rtol=0)
        matched = retrieval(enc_ids, pixels, attention_mask=mask.long()).itm_score
        torch.testing.assert_close(med.match_logits(ids, mask, image), matched, atol=1e-5, rtol=0)
        logits = captioning(pixels, dec_ids, attention_mask=mask.long()).logits
        torch.testing.assert_close(med.decode_logits(ids, mask, image)[mask], logits[mask], atol=1e-5, rtol=0)


def test_cls_in_place_of_enc_gives_other_match_logits(med, image, texts):
    ids, mask = texts
    model = stock("BlipForImageTextRetrieval", med)
    with torch.no_grad():
        with_cls = model(ids, tiny_pixels(), attention_mask=mask.long()).itm_score
    assert (ids[:, 0] == CLS).all() and med.config.text.enc_id == ENC
    assert (with_cls - med.match_logits(ids, mask, image)).abs().max() > 1e-3


def test_all_but_self_attention_is_shared():
    med = tiny_med()
    encoder, decoder = med.text_encoder, med.text_decoder.bert
    assert decoder.embeddings is encoder.embeddings
    assert med.text_decoder.cls["predictions"].decoder.weight is encoder.embeddings.word_embeddings.weight
    for ours, theirs in zip(encoder.layers, decoder.layers, strict=True):
        assert theirs.crossattention is ours.crossattention
        assert theirs.intermediate is ours.intermediate
        assert theirs.output is ours.output
        own = {id(parameter) for parameter in ours.attention.parameters()}
        assert own.isdisjoint(id(parameter) for parameter in theirs.attention.parameters())


def test_a_shared_parameter_is_counted_once_under_its_encoder_name():
    names = [name for name, _ in tiny_med().named_parameters() if name.startswith("text_decoder.bert")]
    assert names and all(".attention." in name for name in names)


def test_a_deep_copy_keeps_the_sharing_inside_itself():
    med = tiny_med()
    twin = copy.deepcopy(med)
    assert twin.text_decoder.bert.embeddings is twin.text_encoder.embeddings
    assert twin.text_encoder.embeddings is not med.text_encoder.embeddings


def test_later_tokens_move_no_earlier_decoder_logits(med, image, texts):
    ids, mask = texts
    before = med.decode_logits(ids, mask, image)
    for position in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, position:] = 39
        after = med.decode_logits(changed, torch.ones_like(mask), image)
        torch.testing.assert_close(after[0, :position], before[0, :position], atol=0, rtol=0)


def test_padding_moves_nothing(med, image, texts):
    ids, mask = texts
    longer = torch.cat([ids, ids.new_full((3, 2), 37)], 1)
    longer_mask = torch.cat([mask, mask.new_zeros(3, 2)], 1)
    for function in (
        lambda ids, mask: med.text_features(ids, mask),
        lambda ids, mask: med.match_logits(ids, mask, image),
        lambda ids, mask: med.decode_logits(ids, mask, image)[:, : texts[0].shape[1]][texts[1]],
    ):
        torch.testing.assert_close(function(longer, longer_mask), function(ids, mask), atol=1e-6, rtol=0)


def test_text_features_need_no_image_and_never_touch_cross_attention(med, texts):
    features = med.text_features(*texts)
    assert not features.isnan().any()
    gradients = torch.autograd.grad(features[:, 0].sum(), med.text_encoder.parameters(), allow_unused=True)
    for (name, _), gradient in zip(med.text_encoder.named_parameters(), gradients, strict=True):
        assert (gradient is None) == ("crossattention" in name), name


def test_the_image_moves_match_and_decode(med, texts):
    ids, mask = texts
    one, other = (med.project_image(med.encode_image(tiny_pixels(seed=seed))) for seed in (0, 1))
    assert (med.match_logits(ids, mask, one) - med.match_logits(ids, mask, other)).abs().max() > 1e-3
    assert (med.decode_logits(ids, mask, one) - med.decode_logits(ids, mask, other)).abs().max() > 1e-3


def test_selected_images_give_the_logits_of_encoding_them_again(med, image, texts):
    ids, mask = texts
    index = torch.tensor([2, 0, 0])
    again = med.project_image(med.encode_image(tiny_pixels()[index]))
    torch.testing.assert_close(med.match_logits(ids, mask, image.select(index)), med.match_logits(ids, mask, again))
    assert len(image.select(index)) == 3


def test_matched_images_equal_a_row_for_each_pair(med, image):
    ids, mask = tiny_texts((5, 7, 4, 6, 7, 3, 4, 5))
    elsewhere = torch.tensor([2, 0])
    apart = med.match_logits(ids, mask, image.select(torch.cat([torch.arange(3).repeat_interleave(2), elsewhere])))
    torch.testing.assert_close(med.match_logits(ids, mask, MatchedImages(image, elsewhere)), apart, rtol=0, atol=1e-5)
    none_elsewhere = med.match_logits(ids[:6], mask[:6], MatchedImages(image, elsewhere[:0]))
    torch.testing.assert_close(none_elsewhere, apart[:6], rtol=0, atol=1e-5)


def test_texts_of_one_image_may_share_its_row(med, image):
    ids, mask = tiny_texts((5, 7, 4, 6, 7, 3))
    with torch.no_grad():
        found = med.decode_logits(ids, mask, image)
        apart = med.decode_logits(ids, mask, image.select(torch.arange(3).repeat_interleave(2)))
    torch.testing.assert_close(found[mask], apart[mask], rtol=0, atol=1e-5)


def test_decoding_token_by_token_from_the_cache_equals_decoding_at_once(med, image):
    ids, _ = tiny_texts((7, 7, 7))
    whole = med.decode_logits(ids, None, image)
    cache = Cache()
    parts = [med.decode_logits(ids[:, :3], None, image, cache)]  # a prompt first
    parts += [med.decode_logits(ids[:, t : t + 1], None, image, cache) for t in range(3, 7)]
    assert cache.length == 7
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


def test_rows_that_leave_the_cache_do_not_disturb_the_others(med, image):
    ids, _ = tiny_texts((7, 7, 7))
    whole = med.decode_logits(ids, None, image)
    cache = Cache()
    med.decode_logits(ids[:, :5], None, image, cache)
    rows = torch.tensor([2, 0])
    rest = med.decode_logits(ids[rows, 5:], None, image.select(rows), cache.select(rows))
    torch.testing.assert_close(rest, whole[rows, 5:], atol=1e-5, rtol=0)


def test_masked_prompt_tokens_stay_hidden_in_the_cache(med, image):
    ids, _ = tiny_texts((7, 7, 7))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 2] = False
    whole = med.decode_logits(ids, mask, image)
    cache = Cache()
    med.decode_logits(ids[:, :4], mask[:, :4], image, cache)
    torch.testing.assert_close(med.decode_logits(ids[:, 4:], mask, image, cache), whole[:, 4:], atol=1e-5, rtol=0)


def test_chosen_positions_through_the_head_equal_the_full_logits(med, image, texts):
    ids, mask = texts
    hidden = med.decode_hidden(ids, mask, image)
    torch.testing.assert_close(med.lm_head(hidden[mask]), med.decode_logits(ids, mask, image)[mask], atol=1e-6, rtol=0)


def test_the_callers_ids_are_left_alone(med, image, texts):
    ids, mask = texts
    before = ids.clone()
    med.match_logits(ids, mask, image)
    med.decode_logits(ids, mask, image)
    assert torch.equal(ids, before)


def test_activation_checkpointing_changes_no_gradient(texts):
    gradients = []
    for checkpoint_activations in (False, True):
        med = tiny_med(checkpoint_activations=checkpoint_activations)
        image = med.project_image(med.encode_image(tiny_pixels()))
        (med.match_logits(*texts, image).sum() + med.decode_logits(*texts, image).square().sum()).backward()
        gradients.append([parameter.grad for parameter in med.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_every_parameter_learns_from_the_three_objectives(texts):
    med = tiny_med()
    image_BND = med.encode_image(tiny_pixels())
    image = med.project_image(image_BND)
    features = med.image_features(image_BND) @ med.text_features(*texts).T
    (
        features[0, 1] + med.match_logits(*texts, image)[:, 1].sum() + med.decode_logits(*texts, image)[..., 7].sum()
    ).backward()
    still = {name for name, parameter in med.named_parameters() if parameter.grad is None}
    assert not still


def test_dropout_acts_in_training_only(texts):
    med = tiny_med(dropout=0.3, attention_dropout=0.3)
    assert torch.equal(med.text_features(*texts), med.text_features(*texts))
    med.train()
    assert not torch.equal(med.text_features(*texts), med.text_features(*texts))


def test_bfloat16_autocast_gives_float32_features_and_match_logits(med, image, texts):
    with torch.autocast("cpu", torch.bfloat16):
        image_BND = med.encode_image(tiny_pixels())
        outputs = med.image_features(image_BND), med.text_features(*texts), med.match_logits(*texts, image)
    assert all(output.dtype == torch.float32 for output in outputs)
    torch.testing.assert_close(outputs[1], med.text_features(*texts), atol=0.05, rtol=0)


def test_equal_seeds_give_equal_models_whatever_torch_drew_before():
    torch.manual_seed(1)
    one = tiny_med(seed=3).state_dict()
    torch.manual_seed(2)
    other = tiny_med(seed=3).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["itm_head.weight"], tiny_med(seed=4).state_dict()["itm_head.weight"])


def test_text_beyond_the_position_table_is_refused(med):
    ids, mask = tiny_texts((13,))
    with pytest.raises(ValueError, match="max_positions"):
        med.text_features(ids, mask)


def test_a_special_id_outside_the_vocabulary_is_a_config_error():
    with pytest.raises(ConfigError, match=r"text\.dec_id"):
        TextConfig(vocabulary=1000)


def test_initial_spread_follows_fan_in():
    from dataclasses import replace

    med = Med(replace(tiny_config(image_width=64, text_width=64), initializer="fan_in"))
    weight = med.text_encoder.layers[0].attention.self.query.weight
    assert weight.std().item() == pytest.approx(0.8 / 8, rel=0.05)  # 4096 draws: three sigma is 3 %
    words = med.text_encoder.embeddings.word_embeddings.weight
    assert words.std().item() == pytest.approx(0.04, rel=0.06)
    bert = Med(replace(tiny_config(image_width=64, text_width=64), initializer="bert"))
    assert bert.text_encoder.layers[0].attention.self.query.weight.std().item() == pytest.approx(0.02, rel=0.05)
