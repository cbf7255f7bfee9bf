"""`mlflow models serve` as a person starts it: the documented command, request and end."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from data_samples import picture
from inference_samples import export_tiny_med

from blip_pipelines.inference.served import SERVED
from blip_pipelines.tracking import runs
from blip_pipelines.tracking.registry import register_served
from blip_pipelines.tracking.runs import Store

NAME, ALIAS = "blip-captioner", "champion"
SECONDS = 200


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The store of a registered model."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(tmp_path / "mlruns", "tests")
    made_from = {"stage": "med_pretraining", "model": "a" * 64, "pairs": "b" * 64}
    run = store.start("release")
    runs.enter(run)
    try:
        register_served(NAME, SERVED[NAME], export_tiny_med(tmp_path / "med"), ALIAS, made_from, {})
    finally:
        runs.enter(None)
        run.finish()
    return store


@pytest.mark.slow
def test_mlflow_alone_serves_a_registered_model_by_its_alias(registered, tmp_path):
    port, log = free_port(), tmp_path / "log"
    place = Path(
        sys.executable
    ).parent  # in the path, as in an environment that is active: MLflow starts uvicorn by name
    environment = {**os.environ, "MLFLOW_TRACKING_URI": registered.uri, "PATH": f"{place}:{os.environ['PATH']}"}
    command = ["mlflow", "models", "serve", "-m", f"models:/{NAME}@{ALIAS}", "--env-manager", "local"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        assert is_up(server, address), log.read_text()
        image = base64.b64encode(picture(0)).decode()
        asked = {"dataframe_records": [{"image": image}], "params": {"num_beams": 3}}
        answer = requests.post(f"{address}/invocations", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        (row,) = answer.json()["predictions"]
        assert isinstance(row["caption"], str) and row["caption"] and row["log_probability"] < 0
        wrong = requests.post(f"{address}/invocations", json={"dataframe_records": [{"image": "?"}]}, timeout=60)
        assert wrong.status_code == 400 and "row 0, image: not valid base64" in wrong.text
        no_json = {"data": b"{", "headers": {"content-type": "application/json"}}
        assert requests.post(f"{address}/invocations", timeout=60, **no_json).status_code == 400
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        server.wait(60)
        assert "Application shutdown complete" in log.read_text()
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{address}/ping", timeout=5)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def is_up(server, address):
    """Whether the server answered in time; False also where it ended."""
    deadline = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            return requests.get(f"{address}/ping", timeout=5).ok
        except requests.ConnectionError:
            time.sleep(0.2)
    return False
