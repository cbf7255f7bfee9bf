"""The server over real HTTP: tiny models behind MLflow's scoring applications, limits, and the page in a browser."""

import base64
import http.client
import json
import shutil
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
import uvicorn
from blip2_job_samples import export_stage1, export_stage2
from data_samples import picture
from evaluation_samples import write_scene
from inference_samples import export_tiny_med, save_served
from instruct_samples import export_tuned
from mlflow.pyfunc.scoring_server import init

from blip_pipelines.inference.gallery import Gallery
from blip_pipelines.inference.limits import LimitsConfig
from blip_pipelines.inference.server import ServedModel, make_app

NAMES = ("blip-captioner", "blip-retriever", "blip-filter", "instructblip")
IMAGE = base64.b64encode(picture(0)).decode()
ROWS = {"blip-captioner": {"image": IMAGE}, "blip-retriever": {"image": IMAGE, "texts": ["a red crab", "the house"]}}
ROWS["instructblip"] = {"image": IMAGE, "instruction": "what is this ?"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of a server that admits 12 requests at a time."""
    folder = tmp_path_factory.mktemp("server")
    exported = dict.fromkeys(NAMES, export_tiny_med(folder / "med"))
    exported["instructblip"] = export_tuned(export_stage2(export_stage1(folder), folder / "stage2"), folder / "tuned")
    data = write_scene(folder)
    loaded = {}
    for name in NAMES:
        loaded[name] = mlflow.pyfunc.load_model(str(save_served(name, exported[name], folder / name)))
    models = [
        ServedModel(name, "1", "champion", tuple(loaded[name].metadata.get_input_schema().input_names()))
        for name in NAMES
    ]
    gallery = Gallery(data["pairs"], data["images"], loaded["blip-retriever"].predict)
    limits = LimitsConfig(running=1, waiting=11, body_bytes=2_000_000)
    app = make_app(models, {name: init(model) for name, model in loaded.items()}, gallery, limits)
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    yield running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join(10)


def ask(port, path, body=None, kind="application/json"):
    """Status, Retry-After and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
    headers = {"content-type": kind} if kind else {}
    connection.request("GET" if body is None else "POST", path, sent, headers)
    reply = connection.getresponse()
    return reply.status, reply.getheader("retry-after"), reply.read()


@pytest.mark.parametrize(("name", "count"), [("blip-captioner", 50), ("blip-retriever", 50), ("instructblip", 8)])
def test_many_at_once_are_all_answered_or_told_when_to_come_again(server, name, count):
    path, body = f"/models/{name}/invocations", {"dataframe_records": [ROWS[name]]}
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda _: ask(server, path, body), range(count)))
    statuses = Counter(status for status, _, _ in answers)
    assert set(statuses) <= {200, 503} and statuses[200] >= min(count, 12)
    assert all(int(after) >= 1 for status, after, _ in answers if status == 503)
    assert ask(server, path, body)[0] == 200


def test_the_first_model_answers_as_mlflow_serves_it(server):
    assert ask(server, "/ping")[0] == 200
    status, _, body = ask(server, "/invocations", {"dataframe_records": [{"image": IMAGE}]})
    assert status == 200 and isinstance(json.loads(body)["predictions"][0]["caption"], str)


@pytest.mark.parametrize("name", ROWS)
def test_malformed_and_oversized_requests_are_the_callers_error_and_the_server_stays_up(server, name):
    path = f"/models/{name}/invocations"
    malformed = [
        b"",
        b"{",
        b"null",
        b"[" * 50_000,
        "x".encode("utf-16"),
        {"dataframe_records": 5},
        {"dataframe_records": [{"image": 5}]},
        {"dataframe_records": [{"image": {"a": [1]}}]},
        {"dataframe_records": [{"image": "A" * 1_000_001}]},
        {"dataframe_split": {"columns": ["image"], "data": [[1, 2]]}},
        {"dataframe_records": [{"image": base64.b64encode(b"no picture").decode()}]},
    ]
    for body in malformed:
        assert 400 <= ask(server, path, body)[0] < 500, body
    assert ask(server, path, b"x", kind="text/strange")[0] == 415
    assert ask(server, path, b"x", kind=None)[0] == 415
    assert ask(server, path, b"x" * 2_000_001)[0] == 413
    assert ask(server, path, {"dataframe_records": [ROWS[name]]})[0] == 200


def test_the_page_has_pictures_and_finds_them_by_words(server):
    described = json.loads(ask(server, "/api/models")[2])
    assert [model["does"] for model in described["models"]] == ["caption", "retrieve", "judge", "answer"]
    shown = json.loads(ask(server, "/api/pictures?start=0&count=5")[2])
    assert len(shown) == 5 and described["pictures"] == 24
    status, _, body = ask(server, f"/pictures/{shown[0]['key']}")
    assert status == 200 and body.startswith(b"\x89PNG")
    assert ask(server, "/pictures/nothing")[0] == 404
    found = json.loads(ask(server, "/api/search", {"text": shown[0]["caption"]})[2])
    assert len(found) == 12 and {"key", "caption", "similarity", "probability"} == found[0].keys()
    assert [each["probability"] for each in found] == sorted((each["probability"] for each in found), reverse=True)
    for wrong in ({"text": ""}, {"text": 5}, {}, [], {"text": "x" * 1001}, b"{"):
        assert ask(server, "/api/search", wrong)[0] == 400


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine to open the page in")
def test_a_browser_captions_answers_judges_and_finds(server, tmp_path):
    def dom(query, width):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
        command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom"]
        address = f"http://127.0.0.1:{server}/?{query}"
        return subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True).stdout

    page = dom("picture=0&caption=&answer=what%20is%20this%3F&judge=a%20red%20crab&search=the%20house", 1000)
    assert 'data-ready="yes"' in page and 'data-chosen="yes"' in page
    assert page.count("% that it matches") == 1
    assert page.count("<figcaption>") == 12
    caption, answer = (
        page.split(f'id="{card}"')[1].split('class="answer"')[1].split(">")[1].split("<")[0]
        for card in ("caption", "answer")
    )
    assert len(caption.split()) >= 2, "a caption was written"
    assert answer not in ("", "\u2026"), "the question was answered"
    asked_without_picture = dom("caption=", 400)
    assert "Choose a picture first." in asked_without_picture
