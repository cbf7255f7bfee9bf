from dataclasses import replace

import pytest
import torch
import transformers
from blip2_samples import SPOKEN, assert_equal_scores, tiny_language, tiny_qformer_config, tiny_uint8, vit_folder
from data_samples import WORDS, tokenizer_json
from model_samples import random_stem, tiny_med
from torch.nn.functional import cross_entropy

from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.blip2_exports import export_blip2, load_blip2
from blip_pipelines.models.exports import export_med
from blip_pipelines.models.frozen_tower import TowerConfig, open_tower
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.qformer_start import QFormerStartConfig, start_qformer
from blip_pipelines.models.stem import lay_out

KINDS = ["opt", "llama", "t5"]
CAPTIONS = ["a red crab", "the small house of a dog", "flag"]
PROMPT = Blip2Config("picture : {image} it is", projection="scaled")


@pytest.fixture(scope="module")
def tokenizer():
    return prune_vocabulary(tokenizer_json(), WORDS)[0]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    vit_folder(folder)
    return open_tower(TowerConfig(str(folder)))


@pytest.fixture(scope="module")
def stem():
    return random_stem()


def make_former(tower, tokenizer, seed=0) -> QFormer:
    former = QFormer(tiny_qformer_config().behind(tower).fit(tokenizer), seed).eval()
    tower.start_norm(former.ln_vision)
    return former


def make_model(tower, tokenizer, kind, config=PROMPT, **language) -> Blip2:
    return Blip2(make_former(tower, tokenizer), tiny_language(kind, **language), config, tower).eval()


def reload(kind, folder):
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), (
        report
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model


def texts(tokenizer):
    return [torch.from_numpy(part) for part in tokenizer(CAPTIONS, 12)]


def normalised(pixels, vision):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.mean, vision.std))
    return (pixels / 255 - mean) / std


def assert_equal_retrieval(former, folder, tokenizer, picture, image_BND):
    stock = reload("Blip2ForImageTextRetrieval", folder / "retrieval")
    assert_equal_scores(former, stock, picture, image_BND, texts(tokenizer))


def test_stock_retrieval_reloads_stage_1_with_equal_outputs(tmp_path, tokenizer, vit):
    former = make_former(vit, tokenizer)
    export_blip2(former, tmp_path, vit, tokenizer, {"size": 8}, temperature=0.06)
    pixels = tiny_uint8()
    assert_equal_retrieval(former, tmp_path, tokenizer, normalised(pixels, vit.vision), vit.encode(pixels))


def med_tower_behind(stem, folder):
    export_med(tiny_med(stem=True), folder, None, {"size": 128}, stem=stem)
    return open_tower(TowerConfig(str(folder)))


def test_stock_retrieval_takes_the_laid_out_features_of_the_stem(tmp_path, tokenizer, stem):
    tower = med_tower_behind(stem, tmp_path / "med")
    former = make_former(tower, tokenizer)
    export_blip2(former, tmp_path, tower, tokenizer, {"size": 128})
    pixels = tiny_uint8(size=128)
    assert_equal_retrieval(former, tmp_path, tokenizer, lay_out(stem(pixels).half().float()), tower.encode(pixels))
    loaded = load_blip2(tmp_path)
    assert torch.equal(loaded.tower(pixels), tower(pixels))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_generation_reloads_stage_2_with_equal_logits_and_answers(tmp_path, tokenizer, vit, kind):
    model = make_model(vit, tokenizer, kind)
    export_blip2(model.former, tmp_path, vit, tokenizer, {"size": 8}, model=model)
    stock = reload("Blip2ForConditionalGeneration", tmp_path / "generation")
    pixels, vocabulary = tiny_uint8(), len(SPOKEN) + 2
    picture = normalised(pixels, vit.vision)
    token_ids, mask = (
        torch.from_numpy(part) for part in model.language.tokenizer(["a red crab", "the house", "it"], 9)
    )
    with torch.no_grad():
        soft = model.soft_prompts(model.former.project_image(vit.encode(pixels)))
        ours = model.lm_head(model.hidden(soft, token_ids))
        prompt = torch.tensor([[*model.before_ids, *[stock.config.image_token_index] * 4, *model.after_ids]])
        prompt = prompt.expand(3, -1)
        if kind == "t5":
            logits = stock(picture, prompt, decoder_input_ids=token_ids[:, :-1]).logits
        else:
            whole = torch.cat([prompt, token_ids[:, 1:-1]], 1)
            logits = stock(picture, whole).logits[:, prompt.shape[1] - 1 :]
        torch.testing.assert_close(ours[mask[:, 1:]], logits[mask[:, 1:]][:, :vocabulary], atol=1e-5, rtol=1e-5)
        said = stock.generate(picture, prompt, max_new_tokens=5, do_sample=False)
        said = said if kind == "t5" else said[:, prompt.shape[1] :]
        assert model.language.tokenizer.decode(said.tolist()) == model.generate(soft, max_tokens=5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_table_grows_by_the_token_that_stands_for_the_picture(tmp_path, tokenizer, vit, kind):
    model = make_model(vit, tokenizer, kind)
    with torch.no_grad():
        model.language.model.resize_token_embeddings(len(SPOKEN))
    model.language.freeze()
    export_blip2(model.former, tmp_path, vit, tokenizer, {"size": 8}, model=model)
    stock = reload("Blip2ForConditionalGeneration", tmp_path / "generation")
    assert stock.config.image_token_index == len(SPOKEN)
    assert stock.get_input_embeddings().weight.shape[0] == len(SPOKEN) + 1
    loaded = load_blip2(tmp_path).model
    assert loaded.language.hash == model.language.hash
    assert loaded.language.model.config.vocab_size == len(SPOKEN)


@pytest.mark.parametrize("kind", KINDS)
def test_our_folder_loads_back_whole(tmp_path, tokenizer, vit, kind):
    """Nothing is lost after stage 2: not the text side that the stock class has no place for, not the LM head."""
    model = make_model(vit, tokenizer, kind, end=":")
    export_blip2(model.former, tmp_path, vit, tokenizer, {"size": 8, "views": 2}, model=model, temperature=0.05)
    loaded = load_blip2(tmp_path)
    assert loaded.model.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert (loaded.image, loaded.temperature) == ({"size": 8, "views": 2}, 0.05)
    assert loaded.tower.hash == vit.hash
    assert (loaded.model.language.tokenizer.end, loaded.model.scale) == (model.language.tokenizer.end, model.scale)
    assert len(loaded.tokenizer) == len(tokenizer)
    assert not loaded.model.training
    pixels = tiny_uint8()
    soft = [one.soft_prompts(one.see(pixels)) for one in (model, loaded.model)]
    assert torch.equal(*soft)
    assert model.generate(soft[0], max_tokens=4) == loaded.model.generate(soft[1], max_tokens=4)


def test_stage_1_loads_back_and_is_a_starting_point_with_its_lm_head(tmp_path, tokenizer, vit):
    former = make_former(vit, tokenizer)
    export_blip2(former, tmp_path, vit, tokenizer, {"size": 8})
    loaded, other = load_blip2(tmp_path), make_former(vit, tokenizer, seed=1)
    assert loaded.model is None
    (started,) = start_qformer(other, QFormerStartConfig(model=str(tmp_path)))
    assert not started.fresh
    for name, value in former.state_dict().items():
        assert torch.equal(loaded.former.state_dict()[name], value), name
        assert torch.equal(other.state_dict()[name], value), name


def test_half_precision_language_models_keep_their_bytes(tmp_path, tokenizer, vit):
    from blip_pipelines.models.language import LanguageModel

    language = tiny_language("llama")
    half = LanguageModel(language.model.to(torch.bfloat16), language.tokenizer.stock)
    model = Blip2(make_former(vit, tokenizer), half, PROMPT, vit).eval()
    export_blip2(model.former, tmp_path, vit, tokenizer, {"size": 8}, model=model)
    assert load_blip2(tmp_path).model.language.hash == half.hash
    reload("Blip2ForConditionalGeneration", tmp_path / "generation")


def test_stock_processors_prepare_what_ours_reads(tmp_path, tokenizer, vit):
    model = make_model(vit, tokenizer, "opt", Blip2Config())
    export_blip2(model.former, tmp_path / "one", vit, tokenizer, {"size": 8})
    export_blip2(model.former, tmp_path / "two", vit, tokenizer, {"size": 8}, model=model)
    picture = tiny_uint8(1)[0].permute(1, 2, 0).numpy()
    retrieval = transformers.AutoProcessor.from_pretrained(tmp_path / "one" / "retrieval")
    inputs = retrieval(images=picture, text="a red crab", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == tokenizer(["a red crab"], 12)[0][0].tolist()
    torch.testing.assert_close(inputs["pixel_values"], normalised(tiny_uint8(1), vit.vision), atol=1e-5, rtol=0)
    generation = transformers.AutoProcessor.from_pretrained(tmp_path / "two" / "generation")
    inputs = generation(images=picture, text="a", return_tensors="pt")
    token = reload("Blip2ForConditionalGeneration", tmp_path / "two" / "generation").config.image_token_index
    assert inputs["input_ids"][0].tolist() == [token] * 4 + [SPOKEN.index("a")]


def test_a_tower_that_stock_cannot_hold_is_named_and_the_rest_is_complete(tmp_path, tokenizer):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4))
    clip.save_pretrained(tmp_path / "clip")
    tower = open_tower(TowerConfig(str(tmp_path / "clip"), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    model = make_model(tower, tokenizer, "llama")
    export_blip2(model.former, tmp_path / "out", tower, tokenizer, {"size": 8}, model=model)
    assert not (tmp_path / "out" / "generation").exists()
    loaded = load_blip2(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    with torch.no_grad():
        clip.encoder.layers[0].mlp.fc1.bias += 1
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(StorageError, match="not the one"):
        load_blip2(tmp_path / "out")


def test_equal_models_give_equal_bytes_and_exporting_draws_nothing(tmp_path, tokenizer, vit):
    contents = []
    for name in ("one", "other"):
        model = make_model(vit, tokenizer, "llama")
        before = torch.get_rng_state()
        export_blip2(model.former, tmp_path / name, vit, tokenizer, {"size": 8}, model=model)
        assert torch.equal(torch.get_rng_state(), before)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert "blip2.json" in contents[0] and "generation/model.safetensors" in contents[0]


def test_exporting_in_the_middle_of_training_changes_nothing(tmp_path, tokenizer, vit):
    ends = []
    for exports in (False, True):
        model = make_model(vit, tokenizer, "llama")
        model.train()
        token_ids, mask = (torch.from_numpy(part) for part in model.language.tokenizer(["a crab", "it", "the dog"], 9))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(2):
            soft = model.soft_prompts(model.see(tiny_uint8()))
            logits = model.lm_head(model.hidden(soft, token_ids)[mask[:, 1:]])
            cross_entropy(logits, token_ids[:, 1:][mask[:, 1:]]).backward()
            optimizer.step()
            if exports:
                export_blip2(model.former, tmp_path, vit, tokenizer, {"size": 8}, model=model)
        assert model.training
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_damaged_export_is_refused_by_file(tmp_path, tokenizer, vit):
    export_blip2(make_former(vit, tokenizer), tmp_path, vit, tokenizer, {"size": 8})
    file = tmp_path / "blip2.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(StorageError, match=r"blip2\.safetensors"):
        load_blip2(tmp_path)


def test_an_image_size_that_the_tower_does_not_read_is_refused(tmp_path, tokenizer, vit):
    with pytest.raises(ValueError, match=r"image\.size is 9"):
        export_blip2(make_former(vit, tokenizer), tmp_path, vit, tokenizer, {"size": 9})


def test_dropout_rates_go_along(tmp_path, tokenizer, vit):
    config = tiny_qformer_config().behind(vit).fit(tokenizer)
    former = QFormer(replace(config, text=replace(config.text, dropout=0.1, attention_dropout=0.2)))
    export_blip2(former, tmp_path, vit, tokenizer, {"size": 8})
    found = reload("Blip2ForImageTextRetrieval", tmp_path / "retrieval").config.qformer_config
    assert (found.hidden_dropout_prob, found.attention_probs_dropout_prob) == (0.1, 0.2)
