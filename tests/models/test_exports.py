from dataclasses import replace

import pytest
import torch
import transformers
from data_samples import WORDS, tokenizer_json
from model_samples import random_stem, tiny_config, tiny_pixels, tiny_texts

from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.models.exports import STOCK, ExportError, export_med, load_med
from blip_pipelines.models.med import Med
from blip_pipelines.models.stem import lay_out


@pytest.fixture(scope="module")
def tokenizer():
    return prune_vocabulary(tokenizer_json(), WORDS)[0]


@pytest.fixture(scope="module")
def stem():
    return random_stem()


def make(tokenizer, seed=0, **sizes) -> Med:
    config = tiny_config(**sizes)
    return Med(replace(config, text=config.text.fit(tokenizer)), seed).eval()


def reload(kind, folder):
    model, info = STOCK[kind].from_pretrained(folder / kind, output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


def assert_equal_outputs(med, folder, tokenizer, picture, image_BND):
    """Stock classes on the exported folder against ours on the same images."""
    ids, mask = (torch.from_numpy(part) for part in tokenizer(["a red crab", "the small house of a dog", "flag"], 12))
    image = med.project_image(image_BND)
    retrieval, captioning = reload("retrieval", folder), reload("captioning", folder)
    enc_ids, dec_ids = ids.clone(), ids.clone()
    enc_ids[:, 0], dec_ids[:, 0] = tokenizer.enc, tokenizer.dec
    with torch.no_grad():
        similarity = retrieval(ids, picture, attention_mask=mask.long(), use_itm_head=False).itm_score
        torch.testing.assert_close(
            med.image_features(image_BND) @ med.text_features(ids, mask).T, similarity, atol=1e-5, rtol=0
        )
        matched = retrieval(enc_ids, picture, attention_mask=mask.long()).itm_score
        torch.testing.assert_close(med.match_logits(ids, mask, image), matched, atol=1e-5, rtol=0)
        with_cls = retrieval(ids, picture, attention_mask=mask.long()).itm_score
        assert (with_cls - matched).abs().max() > 1e-3
        logits = captioning(picture, dec_ids, attention_mask=mask.long()).logits
        torch.testing.assert_close(med.decode_logits(ids, mask, image)[mask], logits[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [{}, {"image_width": 16}, {"layers": 3, "text_width": 32}])
def test_stock_classes_reload_an_export_with_equal_outputs(tmp_path, tokenizer, sizes):
    med = make(tokenizer, **sizes)
    export_med(med, tmp_path, tokenizer, {"size": 8})
    pixels = tiny_pixels()
    with torch.no_grad():
        assert_equal_outputs(med, tmp_path, tokenizer, pixels, med.encode_image(pixels))


def test_stock_classes_take_the_laid_out_features_of_the_stem(tmp_path, tokenizer, stem):
    med = make(tokenizer, stem=True)
    export_med(med, tmp_path, tokenizer, {"size": 128}, stem=stem)
    features = stem(torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8))
    with torch.no_grad():
        assert_equal_outputs(med, tmp_path, tokenizer, lay_out(features), med.encode_image(features))


def test_our_folder_loads_back_whole(tmp_path, tokenizer, stem):
    med = make(tokenizer, stem=True)
    export_med(med, tmp_path, tokenizer, {"size": 128, "views": 1}, stem=stem, temperature=0.06)
    loaded = load_med(tmp_path)
    assert loaded.med.config == med.config
    assert not loaded.med.training
    for name, value in med.state_dict().items():
        assert torch.equal(loaded.med.state_dict()[name], value), name
    assert loaded.image == {"size": 128, "views": 1}
    assert loaded.temperature == 0.06
    assert loaded.tokenizer is not None and len(loaded.tokenizer) == len(tokenizer)
    assert loaded.tokenizer.enc == tokenizer.enc
    pixels = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    assert torch.equal(loaded.encode_image(pixels), med.encode_image(stem(pixels)))


def test_stock_processor_prepares_what_ours_normalises(tmp_path, tokenizer):
    med = make(tokenizer)
    export_med(med, tmp_path, tokenizer, {"size": 8})
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "retrieval")
    picture = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
    inputs = processor(images=picture, text="a red crab", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == tokenizer(["a red crab"], 12)[0][0].tolist()
    ours = med.encode_image(torch.from_numpy(picture).permute(2, 0, 1)[None])
    torch.testing.assert_close(med.encode_image(inputs["pixel_values"]), ours, atol=1e-4, rtol=0)


def test_stock_generation_starts_at_dec_and_ends_at_sep(tmp_path, tokenizer):
    med = make(tokenizer)
    export_med(med, tmp_path, tokenizer, {"size": 8})
    model = reload("captioning", tmp_path)
    written = model.generate(tiny_pixels(), max_new_tokens=4, do_sample=False)
    assert (written[:, 0] == tokenizer.dec).all()
    ids = written[:, :1]
    image = med.project_image(med.encode_image(tiny_pixels()))
    for _ in range(written.shape[1] - 1):
        ids = torch.cat([ids, med.decode_logits(ids, None, image)[:, -1:].argmax(-1)], 1)
    until_sep = (ids == tokenizer.sep).cumsum(1) == 0
    assert torch.equal(written[until_sep], ids[until_sep])
    assert model.config.text_config.sep_token_id == tokenizer.sep


def test_label_smoothing_is_where_stock_reads_it(tmp_path, tokenizer):
    med = make(tokenizer)
    export_med(med, tmp_path, tokenizer, {"size": 8}, label_smoothing=0.1)
    assert reload("captioning", tmp_path).text_decoder.label_smoothing == 0.1


def test_question_answering_export_equals_ours_at_one_width(tmp_path, tokenizer):
    med = make(tokenizer, image_width=16, text_width=16)
    export_med(med, tmp_path, tokenizer, {"size": 8}, kinds=("question_answering",))
    model = reload("question_answering", tmp_path)
    state = model.state_dict()
    for name, value in med.state_dict().items():
        if name in state:
            assert torch.equal(state[name], value), name


def test_question_answering_export_at_two_widths_is_refused_with_the_reason(tmp_path, tokenizer):
    with pytest.raises(ExportError, match="needs one width"):
        export_med(make(tokenizer), tmp_path, tokenizer, {"size": 8}, kinds=("question_answering",))


def test_an_image_size_that_the_model_does_not_read_is_refused(tmp_path, tokenizer, stem):
    with pytest.raises(ExportError, match=r"vision\.image_size"):
        export_med(make(tokenizer), tmp_path, tokenizer, {"size": 9})
    with pytest.raises(ExportError, match="4 cells of 1280"):
        export_med(make(tokenizer, stem=True), tmp_path, tokenizer, {"size": 64}, stem=stem)


def test_equal_models_give_equal_bytes_and_exporting_draws_nothing(tmp_path, tokenizer):
    contents = []
    for name in ("one", "other"):
        med = make(tokenizer)
        before = torch.get_rng_state()
        export_med(med, tmp_path / name, tokenizer, {"size": 8})
        assert torch.equal(torch.get_rng_state(), before)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert "med.json" in contents[0] and "captioning/model.safetensors" in contents[0]


def test_a_damaged_export_is_refused_by_file(tmp_path, tokenizer):
    export_med(make(tokenizer), tmp_path, tokenizer, {"size": 8})
    file = tmp_path / "captioning" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(StorageError, match=r"captioning/model\.safetensors"):
        load_med(tmp_path)


def test_an_export_that_lacks_the_decoder_says_so(tmp_path, tokenizer):
    export_med(make(tokenizer), tmp_path, tokenizer, {"size": 8}, kinds=("retrieval",))
    with pytest.raises(StorageError, match="both retrieval and captioning"):
        load_med(tmp_path)


def test_exporting_in_the_middle_of_training_changes_nothing(tmp_path, tokenizer):
    """Steps under bfloat16 autocast with an export between them end at the same bits as without."""
    ids, mask = tiny_texts()
    ends = []
    for exports in (False, True):
        med = make(tokenizer, dropout=0.1)
        med.train()
        optimizer = torch.optim.SGD(med.parameters(), 0.1)
        torch.manual_seed(0)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                image = med.project_image(med.encode_image(tiny_pixels()))
                loss = (
                    med.match_logits(ids, mask, image)[:, 0].sum() + med.decode_logits(ids, mask, image)[..., 5].sum()
                )
            loss.backward()
            optimizer.step()
            if exports:
                export_med(med, tmp_path, tokenizer, {"size": 8})
        assert med.training
        ends.append(med.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
