import math

import pytest
import safetensors.torch
import torch
from blip2_samples import tiny_language, tiny_qformer_config, vit_folder
from data_samples import WORDS, tokenizer_json
from inference_samples import export_tiny_answering, export_tiny_med
from model_samples import random_stem

from blip_pipelines.data.storage import read_json, sha256_file, write_json
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.models import reload
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.blip2_exports import export_blip2
from blip_pipelines.models.frozen_tower import TowerConfig, open_tower
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.reload import reload_differences


@pytest.mark.parametrize("stem", [None, 128], ids=["pixels", "stem"])
def test_an_export_says_in_stock_classes_what_it_says_in_ours(tmp_path, stem):
    folder = export_tiny_med(tmp_path, random_stem() if stem else None, stem or 8)
    differences = reload_differences(folder)
    assert differences.keys() == {"retrieval", "captioning"}
    assert max(differences.values()) < 1e-4


@pytest.mark.parametrize("stem", [None, 128], ids=["pixels", "stem"])
def test_a_med_that_answers_questions_is_reloaded(tmp_path, stem):
    folder = export_tiny_answering(tmp_path, random_stem() if stem else None, stem or 8)
    differences = reload_differences(folder)
    assert differences.keys() == {"question_answering"} and differences["question_answering"] < 1e-4


def test_a_weight_that_stock_does_not_know_is_told(tmp_path):
    folder = export_tiny_med(tmp_path)
    file, note = folder / "retrieval" / "model.safetensors", read_json(folder / "med.json")
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**weights, "strange.weight": torch.zeros(1)}, file, {"format": "pt"})
    note["sha256"]["retrieval/model.safetensors"] = sha256_file(file)
    write_json(folder / "med.json", note)
    assert "unexpected_keys: strange.weight" in reload_differences(folder)["retrieval"]


def test_a_folder_that_stock_cannot_open_is_an_answer_not_a_crash(tmp_path):
    folder = export_tiny_med(tmp_path)
    (folder / "captioning" / "config.json").write_text("{")
    differences = reload_differences(folder)
    assert isinstance(differences["captioning"], str) and "Error" in differences["captioning"]
    assert differences["retrieval"] < 1e-4


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_all_stages_of_blip_2_and_instructblip_are_reloaded(tmp_path, kind):
    vit_folder(tmp_path / "vit")
    tower = open_tower(TowerConfig(str(tmp_path / "vit")))
    tokenizer, _ = prune_vocabulary(tokenizer_json(), WORDS)
    former = QFormer(tiny_qformer_config().behind(tower).fit(tokenizer), 0).eval()
    tower.start_norm(former.ln_vision)
    export_blip2(former, tmp_path / "one", tower, tokenizer, {"size": 8}, temperature=0.06)
    model = Blip2(
        former, tiny_language(kind), Blip2Config("picture : {image} it is", projection="scaled"), tower
    ).eval()
    export_blip2(former, tmp_path / "two", tower, tokenizer, {"size": 8}, model=model)
    assert reload_differences(tmp_path / "one")["retrieval"] < 1e-4
    assert reload_differences(tmp_path / "two")["generation"] < 1e-4
    model.instruct("picture : {image} {instruction} it is", False, True)
    export_blip2(former, tmp_path / "three", tower, tokenizer, {"size": 8}, model=model)
    assert reload_differences(tmp_path / "three").keys() == {"instruct"}
    assert reload_differences(tmp_path / "three")["instruct"] < 1e-3  # a random T5 blows up the last bits


def test_a_folder_without_an_export_has_nothing_to_reload(tmp_path):
    assert reload_differences(tmp_path) == {}


def test_other_outputs_are_a_difference(tmp_path, monkeypatch):
    from blip_pipelines.models import reload

    folder = export_tiny_med(tmp_path)
    stock = reload._reload

    def disturbed(kind, place):
        model = stock(kind, place)
        with torch.no_grad():
            model.vision_model.embeddings.position_embedding.add_(torch.randn(model.config.vision_config.hidden_size))
        return model

    monkeypatch.setattr(reload, "_reload", disturbed)
    assert min(reload_differences(folder).values()) > 1e-3


def test_a_difference_is_a_share_of_large_outputs_and_absolute_among_small_ones():
    def gap(ours, theirs):
        return reload._gap(torch.tensor(ours), torch.tensor(theirs))

    assert gap([100.05, 3.0], [100.0, 3.0]) == pytest.approx(5e-4, rel=1e-3)
    assert gap([0.2, 0.5], [0.1, 0.5]) == pytest.approx(0.1)
    assert math.isnan(gap([float("nan")], [1.0]))
