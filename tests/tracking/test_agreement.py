"""Tags of registered models against what the project holds."""

import pytest

from blip_pipelines.tracking.agreement import disagreements
from blip_pipelines.tracking.runs import Store

PAIRS, TABLE, BEFORE, MODEL = (letter * 64 for letter in "abcd")
NAME = "blip-vqa"


def data(**hashes):
    return {name: {"path": f"data/{name}", "sha256": digest} for name, digest in hashes.items()}


def stages(pairs=PAIRS, model=MODEL):
    """A model that answers questions: its stage reads a table of them, an earlier one the captions."""
    return {
        "med_bootstrapped": {"inputs": data(pairs=pairs), "outputs": data(before=BEFORE), "jobs": []},
        "question_answering": {
            "inputs": data(instructions=TABLE, before=BEFORE),
            "outputs": data(model=model),
            "jobs": [{"fingerprint": "f" * 64}],
        },
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store = Store(tmp_path_factory.mktemp("mlruns"), "tests")
    tags = {"stage": "question_answering", "model": MODEL, "pairs": PAIRS, "fingerprint": "f" * 64}
    store.client.create_registered_model(NAME)
    version = store.client.create_model_version(NAME, "file:///nowhere", tags=tags).version
    store.client.set_registered_model_alias(NAME, "candidate", version)
    return store


def test_the_captions_of_a_candidate_may_be_those_of_an_earlier_stage(store, tmp_path):
    assert not list(disagreements(tmp_path, store, stages(), with_dvc=False))


@pytest.mark.parametrize(("changed", "whose"), [("pairs", "the project"), ("model", "question_answering")])
def test_a_candidate_of_other_content_is_named(store, tmp_path, changed, whose):
    (line,) = disagreements(tmp_path, store, stages(**{changed: "e" * 64}), with_dvc=False)
    assert f"models:/{NAME}/1: its tag '{changed}'" in line and f"no data set of {whose} has that content" in line
