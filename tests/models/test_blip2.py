import pytest
import torch
from blip2_samples import SPOKEN, tiny_image, tiny_language, tiny_qformer, tiny_uint8, vit_folder
from model_samples import tiny_texts

from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.frozen import weights_hash
from blip_pipelines.models.frozen_tower import TowerConfig, open_tower
from blip_pipelines.models.qformer import QFormer

KINDS = ["opt", "llama", "t5"]
PROMPTS = [Blip2Config(), Blip2Config("picture : {image} it is"), Blip2Config("what is {image} ?", chat=True)]


def make(kind="llama", config=PROMPTS[1], seed=0, **former) -> Blip2:
    return Blip2(tiny_qformer(seed, **former), tiny_language(kind), config, seed=seed).eval()


def answers(model, texts=("a red crab", "the house", "a big dog on it")):
    return [torch.from_numpy(part) for part in model.language.tokenizer(texts, 12)]


def ids(*words):
    return [SPOKEN.index(word) for word in words]


@pytest.mark.parametrize("config", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_reads_soft_prompts_between_the_parts_of_the_prompt(kind, config):
    model = make(kind, config)
    token_ids, mask = answers(model)
    soft = model.soft_prompts(model.see(tiny_image()))
    embed = model.language.embed
    before, after = (torch.tensor([part], dtype=torch.long) for part in (model.before_ids, model.after_ids))
    whole = torch.cat([embed(before).expand(3, -1, -1), soft, embed(after).expand(3, -1, -1)], 1)
    expected = model.language.hidden(whole, token_ids)
    found = model.hidden(soft, token_ids)
    torch.testing.assert_close(found[mask[:, 1:]], expected[mask[:, 1:]], atol=1e-5, rtol=1e-5)
    assert model.generate(soft, max_tokens=5) == model.language.generate(whole, max_tokens=5)


def test_special_tokens_stand_where_the_published_models_have_them():
    plain, chat = Blip2Config("{image} a"), Blip2Config("what is {image} ?", chat=True)
    language = tiny_language("opt")
    language.tokenizer.stock = with_bos(language.tokenizer.stock)
    opt = Blip2(tiny_qformer(), language, plain)
    assert (opt.before_ids, opt.after_ids) == ([], ids("<s>", "a"))
    behind = Blip2(tiny_qformer(), language, Blip2Config("picture {image} a"))
    assert (behind.before_ids, behind.after_ids) == (ids("<s>", "picture"), ids("a"))
    turn = Blip2(tiny_qformer(), language, chat)
    assert (turn.before_ids, turn.after_ids) == (ids("<user>", "what", "is"), ids("?", "<turn>"))
    language = tiny_language("t5")
    language.tokenizer.stock = with_eos(language.tokenizer.stock)
    t5 = Blip2(tiny_qformer(), language, Blip2Config("picture {image} a"))
    assert (t5.before_ids, t5.after_ids) == (ids("picture"), ids("a", "</s>"))


def with_bos(stock):
    return surrounded(stock, "<s> $A")


def with_eos(stock):
    return surrounded(stock, "$A </s>")


def surrounded(stock, single):
    from tokenizers.processors import TemplateProcessing

    specials = [(token, SPOKEN.index(token)) for token in ("<s>", "</s>")]
    stock.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=specials)
    return stock


def test_scaled_projection_starts_at_the_spread_of_the_embedding_table():
    former = tiny_qformer(queries=16, width=64, layers=2)
    with torch.no_grad():
        former.layers[-1].output_query.LayerNorm.weight.fill_(0.5)
        former.layers[-1].output_query.LayerNorm.bias.normal_(generator=torch.Generator().manual_seed(0))
    language = tiny_language("llama")
    soft = []
    for projection in ("scaled", "plain"):
        model = Blip2(former, language, Blip2Config(projection=projection)).eval()
        soft.append(model.soft_prompts(model.see(tiny_image(64))))
    # Queries are near one another, so this is nearly the mean of 16 squares: two sigma are a third.
    assert soft[0].square().mean().sqrt().item() == pytest.approx(language.embedding_std, rel=1 / 3)
    assert model.scale == 1.0
    torch.testing.assert_close(soft[1] / soft[1].std(), soft[0] / soft[0].std(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_trains_and_nothing_else(kind):
    for reads in (False, True):
        model = make(kind, Blip2Config("picture : {image} it is", reads_instructions=reads))
        token_ids, mask = answers(model)
        text = tiny_texts() if reads else (None, None)
        soft = model.soft_prompts(model.see(tiny_image()), *text)
        model.lm_head(model.hidden(soft, token_ids)[mask[:, 1:]])[:, 5].sum().backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {"former.query_tokens", "former.ln_vision.weight", "language_projection.weight"} <= trained
        assert ("former.embeddings.word_embeddings.weight" in trained) == reads
        assert weights_hash(model.language) == model.language.hash


def test_the_picture_and_the_instruction_move_the_soft_prompts():
    model = make(config=Blip2Config(reads_instructions=True))
    text_ids, text_mask = tiny_texts()
    image = model.see(tiny_image())
    before = model.soft_prompts(image, text_ids, text_mask)
    assert (before - model.soft_prompts(model.see(tiny_image(seed=1)), text_ids, text_mask)).abs().max() > 1e-4
    assert (before - model.soft_prompts(image)).abs().max() > 1e-4
    changed = text_ids.clone()
    changed[:, 2] = 39
    moved = (before - model.soft_prompts(image, changed, text_mask)).abs().amax((1, 2))
    assert moved.min() > 1e-5


def test_text_of_each_row_takes_the_place_of_the_second_part():
    model = make(config=Blip2Config("picture : {image} it is"))
    token_ids, mask = answers(model)
    soft = model.soft_prompts(model.see(tiny_image()))
    text = torch.tensor([ids("it", "is"), ids("it", "<pad>"), ids("is", "it")])
    text_mask = text != 0
    found = model.hidden(soft, token_ids, text, text_mask)
    torch.testing.assert_close(found[0], model.hidden(soft, token_ids)[0], atol=1e-5, rtol=1e-5)
    for row, length in (1, 1), (2, 2):
        one = slice(row, row + 1)
        alone = model.hidden(soft[one], token_ids[one], text[one, :length])[0]
        words = mask[row, 1:]
        torch.testing.assert_close(found[row][words], alone[words], atol=1e-5, rtol=1e-5)
    spoken = model.generate(soft, text, text_mask, max_tokens=4)
    assert spoken[0] == model.generate(soft, max_tokens=4)[0]


def test_without_a_tower_images_come_as_its_outputs(tmp_path):
    vit_folder(tmp_path)
    tower = open_tower(TowerConfig(str(tmp_path)))
    former = QFormer(tiny_qformer().config.behind(tower)).eval()
    tower.start_norm(former.ln_vision)
    language = tiny_language("opt")
    live, cached = Blip2(former, language, PROMPTS[0], tower), Blip2(former, language, PROMPTS[0])
    pixels = tiny_uint8()
    for found, expected in zip(live.see(pixels).layers, cached.see(tower(pixels)).layers, strict=True):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    live.train()
    assert live.training and not any(part.training for part in (*live.tower.modules(), *live.language.modules()))


def test_what_is_remembered_moves_with_the_model_and_stays_out_of_its_state():
    model = make()
    token_ids, _ = answers(model)
    before = set(model.state_dict())
    model.hidden(model.soft_prompts(model.see(tiny_image())), token_ids)
    assert set(model.state_dict()) == before
    assert not any(name.startswith("_remembered") for name in before)
