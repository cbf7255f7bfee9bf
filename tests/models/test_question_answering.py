"""Our model against stock `BlipForQuestionAnswering`, which loads what it exports."""

from dataclasses import replace

import pytest
import torch
from data_samples import WORDS, tokenizer_json
from model_samples import DEC, ENC, stock_config, tiny_config, tiny_med, tiny_pixels, tiny_texts

from blip_pipelines.config import ConfigError
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.models.exports import STOCK, export_med
from blip_pipelines.models.med import Med
from blip_pipelines.models.question_answering import KIND, QuestionAnswering, load_question_answering
from blip_pipelines.models.text import with_first


@pytest.fixture
def model():
    model = QuestionAnswering(tiny_med(image_width=16, text_width=16)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as after training: encoder and decoder have nothing in common
        for parameter in model.text_decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return prune_vocabulary(tokenizer_json(), WORDS)[0]


def stock_of(model):
    from transformers import BlipForQuestionAnswering

    stock = BlipForQuestionAnswering(stock_config(model.config)).eval()
    state = model.state_dict()
    stock.load_state_dict({name: state[name].clone() for name in stock.state_dict()})
    return stock


def stock_logits(stock, pixels, question_ids, answer_ids, enc=ENC, dec=DEC):
    """(T, V) of one question without padding: stock attends to the padding of questions."""
    with torch.no_grad():
        image = stock.vision_model(pixels).last_hidden_state
        ones = torch.ones(image.shape[:2])
        states = stock.text_encoder(
            input_ids=with_first(question_ids, enc), encoder_hidden_states=image, encoder_attention_mask=ones
        )[0]
        return stock.text_decoder(input_ids=with_first(answer_ids, dec), encoder_hidden_states=states).logits[0]


def test_logits_equal_stock_question_by_question(model):
    stock, pixels = stock_of(model), tiny_pixels()
    question_ids, question_mask = tiny_texts((7, 4, 5))
    answer_ids, answer_mask = tiny_texts((4, 5, 3), seed=1)
    with torch.no_grad():
        question = model.read_question(model.encode_image(pixels), question_ids, question_mask)
        ours = model.decode_logits(answer_ids, answer_mask, question)
    for row in range(3):
        words, asked = question_mask[row].sum(), answer_mask[row].sum()
        own = row, slice(row, row + 1)
        theirs = stock_logits(stock, pixels[own[1]], question_ids[own[1], :words], answer_ids[own[1], :asked])
        torch.testing.assert_close(ours[row, :asked], theirs, atol=2e-5, rtol=0)


def test_an_answer_depends_on_its_picture_and_its_question_alone(model):
    pixels, (question_ids, question_mask) = tiny_pixels(), tiny_texts((7, 4, 5))
    answer_ids, _ = tiny_texts((4, 4, 4), seed=1)

    def logits(pixels, question_ids):
        with torch.no_grad():
            question = model.read_question(model.encode_image(pixels), question_ids, question_mask)
            return model.decode_logits(answer_ids, None, question)

    before = logits(pixels, question_ids)
    other_picture, other_question = pixels.clone(), question_ids.clone()
    other_picture[1] += 1
    other_question[2, 2] += 1
    for changed, row in ((logits(other_picture, question_ids), 1), (logits(pixels, other_question), 2)):
        differs = (changed - before).abs().amax((1, 2)) > 1e-4
        assert differs.tolist() == [number == row for number in range(3)]


def test_questions_are_repeated_for_several_answers(model):
    question_ids, question_mask = tiny_texts((7, 4))
    answer_ids, answer_mask = tiny_texts((4, 5, 3), seed=1)
    with torch.no_grad():
        question = model.read_question(model.encode_image(tiny_pixels(2)), question_ids, question_mask)
        together = model.decode_logits(answer_ids, answer_mask, question.select(torch.tensor([0, 1, 1])))
        for row, of in enumerate([0, 1, 1]):
            alone = model.decode_logits(answer_ids[row : row + 1], None, question.select(torch.tensor([of])))
            words = answer_mask[row].sum()
            torch.testing.assert_close(together[row, :words], alone[0, :words], atol=1e-5, rtol=0)


def test_nothing_is_shared_any_more_and_two_widths_are_refused(model):
    encoder = {parameter.data_ptr() for parameter in model.text_encoder.parameters()}
    assert not encoder & {parameter.data_ptr() for parameter in model.text_decoder.parameters()}
    med = tiny_med(image_width=16, text_width=16)
    before = {name: value.clone() for name, value in med.state_dict().items()}
    answering = QuestionAnswering(med)
    for parameter in answering.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in med.state_dict().items())
    with pytest.raises(ConfigError, match=r"vision\.width is 24, text\.width 16"):
        QuestionAnswering(tiny_med())


def test_the_export_is_stock_and_comes_back(tmp_path, tokenizer):
    config = tiny_config(image_width=16, text_width=16)
    model = QuestionAnswering(Med(replace(config, text=config.text.fit(tokenizer)), seed=2)).eval()
    with torch.no_grad():
        model.text_decoder.bert.embeddings.word_embeddings.weight += 0.1
    export_med(model, tmp_path, tokenizer, {"size": 8}, kinds=(KIND,))
    stock, info = STOCK[KIND].from_pretrained(tmp_path / KIND, output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    back = load_question_answering(tmp_path)
    assert len(back.tokenizer) == len(tokenizer) and back.image == {"size": 8} and back.stem is None
    ids, mask = (torch.from_numpy(part) for part in tokenizer(["a red crab"], 12))
    pixels = tiny_pixels(1)
    with torch.no_grad():
        question = back.model.read_question(back.model.encode_image(pixels), ids, mask)
        ours = back.model.decode_logits(ids, mask, question)[0]
    theirs = stock_logits(stock.eval(), pixels, ids, ids, tokenizer.enc, tokenizer.dec)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert stock.decoder_start_token_id == tokenizer.dec


def test_a_damaged_export_is_refused_by_file(tmp_path, tokenizer):
    config = tiny_config(image_width=16, text_width=16)
    model = QuestionAnswering(Med(replace(config, text=config.text.fit(tokenizer))))
    export_med(model, tmp_path, tokenizer, {"size": 8}, kinds=(KIND,))
    file = tmp_path / KIND / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(StorageError, match=r"question_answering/model\.safetensors"):
        load_question_answering(tmp_path)
