import pytest
import torch
import transformers
from blip2_samples import (
    tiny_qformer_config,
    tiny_uint8,
    vit_folder,
)
from instruct_samples import ASKED, PROMPTS, caption_tokenizer, tiny_instructblip, tokens_of, write_published

from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.models.blip2_exports import export_blip2, load_blip2
from blip_pipelines.models.frozen_tower import TowerConfig, open_tower
from blip_pipelines.models.published import PublishedConfig, open_published
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.weights import StartError

KINDS = ["opt", "llama", "t5"]
TEXTS = list(ASKED[:3])


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    vit_folder(folder)
    return open_tower(TowerConfig(str(folder)))


def make(kind, prompt, vit) -> Blip2:
    former = QFormer(tiny_qformer_config().behind(vit).fit(caption_tokenizer()), 1)
    vit.start_norm(former.ln_vision)
    config = PROMPTS[prompt]
    return Blip2(former, tiny_instructblip(kind).language, config, vit, seed=3).eval()


def reload(kind, folder):
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), (
        report
    )
    return model


def normalised(pixels, vision):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.mean, vision.std))
    return (pixels / 255 - mean) / std


def inputs_of(model):
    """Instructions for both readers, of different lengths, and an answer to each."""
    tokens = tokens_of(model)
    read, question = tokens.for_language(TEXTS), tokens.for_former(TEXTS)
    answer = tokens.for_answers(["a red crab", "it is", "house"])
    return [torch.from_numpy(part) for part in (*read[:2], *question[:2], *answer[:2])]


def stock_logits(stock, model, picture, read, read_mask, question, question_mask, ids):
    image = [stock.config.image_token_index] * stock.config.num_query_tokens
    asked = {"qformer_input_ids": question, "qformer_attention_mask": question_mask.long()}
    front = torch.tensor([[*model.before_ids, *image]]).expand(len(ids), -1)
    if not model.language.decoder_only:
        mask = torch.cat([torch.ones_like(front), read_mask.long()], 1)
        whole = torch.cat([front, read], 1)
        return stock(picture, input_ids=whole, attention_mask=mask, decoder_input_ids=ids[:, :-1], **asked).logits
    found = []  # one row at a time, as stock positions know no padding in the middle
    for row in range(len(ids)):
        one = slice(row, row + 1)
        words = torch.cat([front[one], read[one, read_mask[row]], ids[one, 1:-1]], 1)
        asked = {"qformer_input_ids": question[one], "qformer_attention_mask": question_mask[one].long()}
        found.append(stock(picture[one], input_ids=words, **asked).logits[:, -(ids.shape[1] - 1) :])
    return torch.cat(found)


def assert_equal(stock, model, picture, soft, parts):
    """Soft prompts, then logits over the same ones: a random T5's unscaled attention blows up a last bit of theirs."""
    read, read_mask, question, question_mask, ids, mask = parts
    asked = {"qformer_input_ids": question, "qformer_attention_mask": question_mask.long()}
    theirs = stock.get_image_features(picture, **asked, return_dict=True).pooler_output
    torch.testing.assert_close(soft, theirs, atol=1e-5, rtol=0)
    ours = model.lm_head(model.hidden(theirs, ids, read, read_mask))
    expected = stock_logits(stock, model, picture, *parts[:5])[..., : ours.shape[-1]]
    words = mask[:, 1:]
    torch.testing.assert_close(ours[words], expected[words], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt", ["plain", "chat"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_stock_instructblip_reloads_with_equal_logits_and_answers(tmp_path, vit, kind, prompt):
    model = make(kind, prompt, vit)
    export_blip2(model.former, tmp_path, vit, caption_tokenizer(), {"size": 8}, model=model)
    stock = reload("InstructBlipForConditionalGeneration", tmp_path / "instruct")
    pixels, parts = tiny_uint8(), inputs_of(model)
    picture = normalised(pixels, vit.vision)
    soft = model.soft_prompts(model.former.project_image(vit.encode(pixels)), *parts[2:4])
    assert_equal(stock, model, picture, soft, parts)
    image = [stock.config.image_token_index] * 4
    for row in range(3):
        one, count = slice(row, row + 1), int(parts[3][row].sum())
        prompt_ids = torch.tensor([[*model.before_ids, *image, *parts[0][row][parts[1][row]].tolist()]])
        asked = {"qformer_input_ids": parts[2][one, :count], "input_ids": prompt_ids}
        said = stock.generate(picture[one], **asked, max_new_tokens=5, do_sample=False)
        said = said if kind == "t5" else said[:, prompt_ids.shape[1] :]
        ours = model.generate(soft[one], parts[0][one], parts[1][one], max_tokens=5)
        assert model.language.tokenizer.decode(said.tolist()) == ours


@pytest.mark.parametrize("kind", KINDS)
def test_our_folder_loads_back_whole(tmp_path, vit, kind):
    model = make(kind, "chat", vit)
    export_blip2(model.former, tmp_path, vit, caption_tokenizer(), {"size": 8}, model=model)
    loaded = load_blip2(tmp_path)
    assert loaded.model.config == model.config and loaded.model.place == model.place
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    parameters = dict(loaded.model.named_parameters())
    assert all(
        parameter.requires_grad == parameters[name].requires_grad for name, parameter in model.named_parameters()
    )


def test_without_instructions_for_the_q_former_it_is_a_stock_blip_2(tmp_path, vit):
    model = make("opt", "plain", vit)
    blind = Blip2(model.former, model.language, type(model.config)("{image}{instruction}"), vit).eval()
    export_blip2(blind.former, tmp_path, vit, caption_tokenizer(), {"size": 8}, model=blind)
    reload("Blip2ForConditionalGeneration", tmp_path / "generation")
    assert not (tmp_path / "instruct").exists()
    assert not load_blip2(tmp_path).model.config.reads_instructions


def test_the_stock_processor_prepares_what_ours_reads(tmp_path, vit):
    model = make("opt", "plain", vit)
    export_blip2(model.former, tmp_path, vit, caption_tokenizer(), {"size": 8}, model=model)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "instruct")
    picture = tiny_uint8(1)[0].permute(1, 2, 0).numpy()
    inputs = processor(images=picture, text=TEXTS[0], return_tensors="pt")
    read, _, question, mask, *_ = inputs_of(model)
    image = [reload("InstructBlipForConditionalGeneration", tmp_path / "instruct").config.image_token_index] * 4
    assert inputs["input_ids"][0].tolist() == [*image, *read[0][:4].tolist()]
    assert inputs["qformer_input_ids"][0].tolist() == question[0][mask[0]].tolist()
    torch.testing.assert_close(inputs["pixel_values"], normalised(tiny_uint8(1), vit.vision), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_published_instructblip_opens_with_equal_logits(tmp_path, kind):
    stock = write_published(tmp_path, kind, "InstructBlip")
    found = open_published(PublishedConfig(str(tmp_path), "float32"))
    model, pixels = found.model, tiny_uint8()
    assert model.config.reads_instructions and found.tower.vision.mean == (0.4, 0.4, 0.4)
    parts = inputs_of(model)
    soft = model.soft_prompts(model.former.project_image(found.tower.encode(pixels)), *parts[2:4])
    assert_equal(stock, model, normalised(pixels, found.tower.vision), soft, parts)


@torch.no_grad()
def test_a_published_blip_2_takes_its_text_side_from_stage_1(tmp_path, vit):
    stock = write_published(tmp_path / "two", "opt", "Blip2")
    words = caption_tokenizer()
    before = QFormer(tiny_qformer_config(image_width=24).fit(words), 7)
    export_blip2(before, tmp_path / "one", vit, words, {"size": 8})
    source = {"text_side": str(tmp_path / "one" / "retrieval"), "tokenizer": str(tmp_path / "one" / "retrieval")}
    found = open_published(PublishedConfig(str(tmp_path / "two"), "float32", **source))
    assert not found.model.config.reads_instructions
    state = found.former.state_dict()
    assert torch.equal(state["query_tokens"], stock.query_tokens)
    for name in ("embeddings.word_embeddings.weight", "qformer.encoder.layer.0.intermediate.dense.weight"):
        assert torch.equal(state[name], before.state_dict()[name]), name
    pixels = tiny_uint8()
    soft = found.model.soft_prompts(found.former.project_image(found.tower.encode(pixels)))
    image = normalised(pixels, found.tower.vision)
    expected = stock.get_image_features(image, return_dict=True)
    expected = expected.pooler_output if hasattr(expected, "pooler_output") else expected
    torch.testing.assert_close(soft, expected, atol=1e-5, rtol=1e-5)


def test_what_is_no_such_model_is_refused_by_name(tmp_path):
    vit_folder(tmp_path)
    with pytest.raises(StartError, match="no BLIP-2 and no InstructBLIP"):
        open_published(PublishedConfig(str(tmp_path)))
    with pytest.raises(StartError, match="nowhere"):
        open_published(PublishedConfig(str(tmp_path / "nowhere")))
