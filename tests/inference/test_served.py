import base64
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from blip2_job_samples import export_stage1, export_stage2
from data_samples import picture
from inference_samples import export_tiny_answering, export_tiny_med
from instruct_samples import export_tuned
from mlflow.exceptions import MlflowException
from model_samples import random_stem

from blip_pipelines.data.images import decode
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import to_pixels
from blip_pipelines.inference.answering import AnswerConfig, Answerer
from blip_pipelines.inference.generation import GenerationConfig
from blip_pipelines.inference.language_decoder import write_captions
from blip_pipelines.inference.served import SERVED, Captioner, CaptionWriter, Retriever
from blip_pipelines.inference.served_blip2 import Blip2Captioner
from blip_pipelines.inference.served_instructblip import Answering, Instructed
from blip_pipelines.inference.served_vqa import Questioned
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.models.exports import load_med


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_tiny_med(tmp_path_factory.mktemp("med"))


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    return export_stage2(export_stage1(folder), folder / "stage2")


@pytest.fixture(scope="module")
def captioner(folder):
    return loaded(Captioner(), folder)


@pytest.fixture(scope="module")
def blip2(blip2_folder):
    return loaded(Blip2Captioner(), blip2_folder)


@pytest.fixture(params=["captioner", "blip2"])
def writer(request):
    """Each model that writes captions."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def retriever(folder):
    return loaded(Retriever(), folder)


def loaded(model, folder):
    model.load_context(context=SimpleNamespace(artifacts={"model": str(folder)}))
    return model


def text(content):
    return base64.b64encode(content).decode()


LENGTHS = {"min_tokens": 2, "max_tokens": 8}
PICTURES = [picture(number) for number in range(5)]


@pytest.mark.parametrize("strategy", ["beam", "nucleus", "greedy"])
def test_a_caption_does_not_depend_on_the_rows_beside_it(writer, strategy):
    table = pd.DataFrame({"image": [text(content) for content in PICTURES], "prompt": ["", "a ", None, "a ", "red "]})
    params = {"strategy": strategy, **LENGTHS}
    together = writer.predict(None, table, params)
    assert len(set(together["caption"])) > 1
    for row in range(len(table)):
        alone = writer.predict(None, table.iloc[[row]], params).iloc[0]
        assert alone["caption"] == together["caption"][row]
        assert alone["log_probability"] == pytest.approx(together["log_probability"][row], abs=1e-4)


def test_an_image_may_come_as_base64_data_uri_or_bytes(writer):
    plain = text(PICTURES[0])
    lines = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    table = pd.DataFrame({"image": [plain, lines, f"data:image/png;base64,{plain}", PICTURES[0]]})
    assert writer.predict(None, table, LENGTHS)["caption"].nunique() == 1


def test_parameters_reach_the_search(writer):
    table = pd.DataFrame({"image": [text(content) for content in PICTURES]})
    short = writer.predict(None, table, {"min_tokens": 2, "max_tokens": 4})["caption"]
    assert short.str.split().str.len().max() <= 3
    sampled = [
        writer.predict(None, table, {"strategy": "nucleus", "seed": seed, **LENGTHS})["caption"].tolist()
        for seed in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("not base64!", "row 1, image: not valid base64"),
        (text(b"hello, I am no picture"), "row 1, image: not_an_image"),
        (text(PICTURES[0][:60]), "row 1, image: truncated"),
        ("", "row 1, image: empty_file"),
        (3.5, "row 1, image: expected base64 text or bytes, found float"),
        (None, "row 1, image: expected base64 text or bytes, found NoneType"),
    ],
    ids=["not base64", "no picture", "truncated", "empty", "a number", "nothing"],
)
def test_a_malformed_image_is_refused_by_row_and_reason(writer, image, reason):
    table = pd.DataFrame({"image": pd.Series([text(PICTURES[0]), image], dtype=object)})
    with pytest.raises(MlflowException, match=reason) as refused:
        writer.predict(None, table, LENGTHS)
    assert refused.value.get_http_status_code() == 400


def test_wrong_parameters_are_the_callers_error(captioner):
    table = pd.DataFrame({"image": [text(PICTURES[0])]})
    wrong = {"top_p": {"top_p": 2.0}, "max_tokens": {"max_tokens": 3, "min_tokens": 5}}
    wrong |= {f"num_beams: {count}": {"num_beams": count} for count in (0, 999)}
    for reason, params in wrong.items():
        with pytest.raises(MlflowException, match=reason) as refused:
            captioner.predict(None, table, params)
        assert refused.value.get_http_status_code() == 400
    with pytest.raises(MlflowException, match="leaves no room"):
        captioner.predict(None, table.assign(prompt="a red dog with a flag"), {"min_tokens": 2, "max_tokens": 4})
    with pytest.raises(MlflowException, match="'image' is missing"):
        captioner.predict(None, pd.DataFrame({"picture": ["x"]}))


def test_blip2_is_told_its_own_prompt_or_the_callers(blip2, blip2_folder):
    table = pd.DataFrame({"image": [text(content) for content in PICTURES]})
    pixels = torch.from_numpy(np.stack([to_pixels(decode(content, limits=None), 8) for content in PICTURES]))
    model, how = load_blip2(blip2_folder).model, GenerationConfig("beam", min_tokens=2, max_tokens=8)
    assert blip2.predict(None, table, LENGTHS)["caption"].tolist() == write_captions(model, pixels, how).texts
    asked = blip2.predict(None, table.assign(prompt="what is {image} ?"), LENGTHS)["caption"].tolist()
    assert asked == write_captions(model, pixels, how, around=model.prompt_ids("what is {image} ?")).texts
    first = blip2.predict(None, table.assign(prompt="what is this ?"), LENGTHS)["caption"].tolist()
    assert first == write_captions(model, pixels, how, around=model.prompt_ids("{image} what is this ?")).texts
    assert len({*asked}) > 1
    with pytest.raises(MlflowException, match="mark the picture's place"):
        blip2.predict(None, table.assign(prompt="{image} or {image}"), LENGTHS)


def test_the_retriever_embeds_and_scores(retriever):
    texts = ["a red crab", "the house", "a red crab"]
    table = pd.DataFrame(
        {
            "image": [text(PICTURES[0]), None, text(PICTURES[1])],
            "text": [None, "the house", "a red crab"],
            "texts": [texts, None, None],
        }
    )
    found = retriever.predict(None, table)
    image, word, both = (found.iloc[row] for row in range(3))
    assert np.linalg.norm(image["image_embedding"]) == pytest.approx(1, abs=1e-5)
    assert image["text_embedding"] is None
    assert word["image_embedding"] is None
    assert word["similarities"] is None
    similarity = np.dot(image["image_embedding"], [both["text_embedding"], word["text_embedding"]][1])
    assert image["similarities"][1] == pytest.approx(similarity, abs=1e-5)
    assert image["similarities"][0] == pytest.approx(image["similarities"][2], abs=1e-5)
    assert len(image["match_probabilities"]) == 3
    assert all(0 < probability < 1 for probability in image["match_probabilities"])
    assert image["match_probabilities"][0] != pytest.approx(image["match_probabilities"][1], abs=1e-6)


def test_the_retriever_says_what_a_row_lacks(retriever):
    with pytest.raises(MlflowException, match="row 0, image: missing"):
        retriever.predict(None, pd.DataFrame({"text": [None]}))
    with pytest.raises(MlflowException, match="row 1, image: missing"):
        retriever.predict(None, pd.DataFrame({"text": ["a", None], "texts": [None, ["a"]]}))


def test_a_model_behind_a_frozen_stem_is_served_from_its_folder_alone(tmp_path):
    stem = random_stem()
    model = loaded(Retriever(), export_tiny_med(tmp_path, stem, 128))
    found = model.predict(None, pd.DataFrame({"image": [text(content) for content in PICTURES]}))
    pixels = np.stack([to_pixels(decode(content, limits=None), 128) for content in PICTURES])
    exported = load_med(tmp_path)
    with torch.no_grad():
        expected = exported.med.image_features(exported.med.encode_image(stem(torch.from_numpy(pixels))))
    np.testing.assert_allclose(np.stack(found["image_embedding"]), expected, atol=1e-5)
    assert np.ptp(expected.numpy(), axis=0).max() > 1e-3, "the case must have pictures that differ"


@pytest.fixture(scope="module")
def tuned_folder(blip2_folder):
    return export_tuned(blip2_folder, blip2_folder.with_name("tuned"))


@pytest.fixture(scope="module")
def instructed(tuned_folder):
    return loaded(Instructed(), tuned_folder)


ASKED = pd.DataFrame(
    {
        "image": [text(PICTURES[0]), text(PICTURES[1]), text(PICTURES[0])],
        "instruction": ["what is this ?", "is it a dog ?", "is it a dog ?"],
        "candidates": [None, ["a dog", "the house", "it"], ["a dog", "it"]],
    }
)


def test_an_instruction_is_answered_in_words_or_by_one_of_the_candidates(instructed, tuned_folder):
    found = instructed.predict(None, ASKED, {"max_tokens": 4})
    answerer = Answerer(load_blip2(tuned_folder).model, instructed.tokens, AnswerConfig(1, 1, 4, 1.0, 1.0))
    pixels = torch.from_numpy(np.stack([to_pixels(decode(PICTURES[row], limits=None), 8) for row in (0, 1, 0)]))
    candidates = ASKED["candidates"].tolist()
    expected = answerer.answer(pixels[:, None], ASKED["instruction"].tolist(), candidates)
    assert found["answer"].tolist() == [answer.text for answer in expected]
    assert found["scores"][0] is None
    for row in (1, 2):
        assert found["answer"][row] == candidates[row][int(np.argmax(found["scores"][row]))]
        np.testing.assert_allclose(found["scores"][row], expected[row].scores, atol=1e-4)
    long = instructed.predict(None, ASKED, {"max_tokens": 9, "num_beams": 3})["answer"][0]
    assert len(long.split()) > len(found["answer"][0].split())


def test_what_instructblip_cannot_be_asked_is_refused_by_row(instructed, blip2_folder):
    for change, message in (
        ({"instruction": ["a", " ", "a"]}, "row 1, instruction: missing"),
        ({"candidates": [None, [], None]}, "row 1, candidates: 0 of them"),
        ({"image": ["?", "?", "?"]}, "row 0, image: not valid base64"),
    ):
        with pytest.raises(MlflowException, match=message):
            instructed.predict(None, ASKED.assign(**change))
    for settings, message in (({"num_beams": 99}, "num_beams: 99"), ({"max_tokens": 0}, "max_tokens: 0")):
        with pytest.raises(MlflowException, match=message):
            instructed.predict(None, ASKED, settings)
    with pytest.raises(StorageError, match="not tuned on instructions"):
        loaded(Instructed(), blip2_folder)


@pytest.fixture(scope="module")
def answering_folder(tmp_path_factory):
    return export_tiny_answering(tmp_path_factory.mktemp("answering"))


def test_a_med_answers_in_words_or_by_one_of_the_candidates(answering_folder):
    served = loaded(Questioned(), answering_folder)
    found = served.predict(None, ASKED, {"max_tokens": 6})
    assert isinstance(found["answer"][0], str) and found["scores"][0] is None
    for row, candidates in ((1, ASKED["candidates"][1]), (2, ASKED["candidates"][2])):
        assert found["answer"][row] == candidates[int(np.argmax(found["scores"][row]))]
    pictures = torch.from_numpy(np.stack([to_pixels(decode(PICTURES[row], limits=None), 8) for row in (0, 1, 0)]))
    asked = ASKED["instruction"].tolist(), ASKED["candidates"].tolist()
    expected = served.answerer({"num_beams": 3, "min_tokens": 1, "max_tokens": 6}).answer(pictures[:, None], *asked)
    assert found["answer"].tolist() == [answer.text for answer in expected]
    with pytest.raises(MlflowException, match="num_beams: 99"):
        served.predict(None, ASKED, {"num_beams": 99})


@pytest.fixture(scope="module")
def logged(folder, blip2_folder, tuned_folder, answering_folder, tmp_path_factory):
    """The models as MLflow stores them, without a tracking server."""
    import mlflow

    places, folders = {}, {"blip2": blip2_folder, "instructblip": tuned_folder, "blip-vqa": answering_folder}
    for name, how in SERVED.items():
        places[name] = tmp_path_factory.mktemp("served") / name
        mlflow.pyfunc.save_model(
            places[name],
            python_model=str(how.code),
            artifacts={"model": str(folders.get(name, folder))},
            signature=how.signature(),
            input_example=how.example(),
            pip_requirements=how.requirements(),
        )
    return places


def test_what_mlflow_stored_answers_its_example_and_checks_its_schema(logged):
    import mlflow

    for name, place in logged.items():
        model = mlflow.pyfunc.load_model(str(place))
        answer = model.predict(SERVED[name].example())
        assert answer.columns.tolist() == model.metadata.signature.outputs.input_names()
    captioner = mlflow.pyfunc.load_model(str(logged["blip-captioner"]))
    table = pd.DataFrame({"image": [text(PICTURES[0])]})
    assert len(captioner.predict(table, params={"num_beams": 2, "max_tokens": 8})) == 1
    with pytest.raises(MlflowException, match="image"):
        captioner.predict(pd.DataFrame({"prompt": ["a"]}))


def test_requests_in_json_are_answered_as_the_scoring_server_does(logged):
    """Through MLflow's own scoring application, in this process."""
    import mlflow
    from fastapi.testclient import TestClient
    from mlflow.pyfunc.scoring_server import init

    requests = {
        "blip-captioner": {"dataframe_records": [{"image": text(PICTURES[0])}], "params": {"max_tokens": 8}},
        "blip2": {
            "dataframe_records": [{"image": text(PICTURES[0]), "prompt": "what is"}],
            "params": {"max_tokens": 8},
        },
        "blip-retriever": {"dataframe_records": [{"image": text(PICTURES[0]), "texts": ["a dog", "a red house"]}]},
        "instructblip": {
            "dataframe_records": [
                {"image": text(PICTURES[0]), "instruction": "what is it ?", "candidates": ["a", "it"]}
            ]
        },
    }
    requests["blip-vqa"] = requests["instructblip"]
    answers = {"blip-retriever": "match_probabilities", "instructblip": "scores", "blip-vqa": "scores"}
    for name, request in requests.items():
        client = TestClient(init(mlflow.pyfunc.load_model(str(logged[name]))))
        answer = client.post("/invocations", json=request)
        assert answer.status_code == 200, answer.text
        (row,) = answer.json()["predictions"]
        assert isinstance(row["caption"], str) if name not in answers else len(row[answers[name]]) == 2
        refused = client.post("/invocations", json={"dataframe_records": [{"image": "?", "instruction": "a"}]})
        assert refused.status_code == 400
        assert "row 0, image" in json.dumps(refused.json())


@pytest.mark.parametrize("kind", [CaptionWriter, Answering])
def test_a_model_that_leaves_out_what_its_kind_asks_for_cannot_be_made(kind):
    with pytest.raises(TypeError, match="abstract"):
        type("Incomplete", (kind,), {})()
