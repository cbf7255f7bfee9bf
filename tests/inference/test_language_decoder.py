"""Our searches over a frozen language model against the stock `generate` on the same prefix."""

import pytest
import torch
from blip2_samples import tiny_image, tiny_language, tiny_qformer

from blip_pipelines.inference.generation import GenerationConfig
from blip_pipelines.inference.language_decoder import LanguageDecoder, write_captions
from blip_pipelines.models.blip2 import Blip2, Blip2Config

KINDS = ("opt", "llama", "t5")
PROMPTS = {"around": "picture : {image} it is", "nothing": "{image}"}


def make(kind: str, prompt: str = "around") -> Blip2:
    """With a projection large enough for pictures to matter."""
    blip2 = Blip2(
        tiny_qformer(3), tiny_language(kind), Blip2Config(PROMPTS[prompt], projection="scaled"), seed=3
    ).eval()
    with torch.no_grad():
        blip2.language_projection.weight.mul_(3)
    return blip2


def stock(blip2: Blip2, image: torch.Tensor, **settings) -> list[str]:
    with torch.no_grad():
        return blip2.generate(blip2.soft_prompts(blip2.see(image)), **settings)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_searches_find_what_stock_generate_finds(kind, prompt):
    blip2, image = make(kind, prompt), tiny_image(6)
    greedy = GenerationConfig("greedy", min_tokens=1, max_tokens=9)  # the start token is counted
    beam = GenerationConfig("beam", beams=3, min_tokens=1, max_tokens=9)
    expected = stock(blip2, image, max_tokens=8)
    assert len({*expected}) > 1, "the case must have pictures that differ"
    assert write_captions(blip2, image, greedy).texts == expected
    assert write_captions(blip2, image, beam).texts == stock(blip2, image, max_tokens=8, num_beams=3)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probability_is_the_models_own_of_the_tokens(kind):
    blip2, image = make(kind), tiny_image(4)
    found = write_captions(blip2, image, GenerationConfig("beam", min_tokens=1, max_tokens=7))
    for row in range(4):
        ids = found.token_ids[row : row + 1]
        ids = ids[:, : int((ids != -1).sum())]
        with torch.no_grad():
            soft = blip2.soft_prompts(blip2.see(image[row : row + 1]))
            padded = torch.cat([ids, ids[:, -1:]], 1)  # `hidden` leaves the last token out
            logits = blip2.lm_head(blip2.hidden(soft, padded)[0, : ids.shape[1] - 1])
        expected = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        torch.testing.assert_close(found.log_probability[row], expected, rtol=1e-4, atol=1e-4)
        assert found.tokens[row] == ids.shape[1] - 1


def test_a_sampled_caption_does_not_depend_on_its_batch():
    blip2, image = make("llama"), tiny_image(5)
    draw_ids, config = torch.arange(5) + 40, GenerationConfig("nucleus", min_tokens=2, max_tokens=9)
    together = write_captions(blip2, image, config, seed=1, draw_ids=draw_ids)
    alone = [write_captions(blip2, image[[i]], config, seed=1, draw_ids=draw_ids[[i]]).texts[0] for i in range(5)]
    assert together.texts == alone
    assert together.texts != write_captions(blip2, image, config, seed=2, draw_ids=draw_ids).texts


def test_another_prompt_is_what_the_model_reads():
    blip2, image = make("llama"), tiny_image(3)
    tokenizer, config = blip2.language.tokenizer, GenerationConfig("greedy", min_tokens=1, max_tokens=9)
    around = tokenizer.prompt_ids("what is"), tokenizer.prompt_ids("? it is a")
    other = Blip2(blip2.former, blip2.language, Blip2Config("what is {image} ? it is a"))
    other.load_state_dict(blip2.state_dict())
    other.scale = blip2.scale
    found = write_captions(blip2, image, config, around=around).texts
    assert found == stock(other, image, max_tokens=8)
    assert found != write_captions(blip2, image, config).texts


def test_a_prompt_that_leaves_no_position_is_an_error():
    blip2 = make("opt")  # of 64 positions
    around = [1] * 60, list[int]()
    with pytest.raises(ValueError, match="over the model's 0 positions"):
        write_captions(blip2, tiny_image(1), GenerationConfig("greedy", min_tokens=1, max_tokens=9), around=around)
    assert LanguageDecoder(blip2).config.text.max_positions == 64 - 4 - len(blip2.before_ids + blip2.after_ids)
