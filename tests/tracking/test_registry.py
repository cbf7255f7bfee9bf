import base64

import pandas as pd
import pytest
from data_samples import picture
from inference_samples import export_tiny_med

from blip_pipelines.inference.served import SERVED
from blip_pipelines.tracking import runs
from blip_pipelines.tracking.registry import RegistryError, register_served
from blip_pipelines.tracking.runs import Store

NAME = "blip-captioner"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_tiny_med(tmp_path_factory.mktemp("med"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Store(tmp_path_factory.mktemp("mlruns"), "tests")


def made_from(model="a" * 64):
    return {"stage": "med_pretraining", "model": model, "pairs": "b" * 64}


def test_registering_needs_a_run(folder):
    with pytest.raises(RegistryError, match="kedro run --pipelines release"):
        register_served(NAME, SERVED[NAME], folder, "candidate", made_from(), {})


def test_registered_model_is_traceable_loads_by_alias_and_equal_content_is_registered_once(store, folder):
    import mlflow

    runs.enter(store.start("release"))
    try:
        first = register_served(NAME, SERVED[NAME], folder, "candidate", made_from(), {"cider/combo": 1.25})
        again = register_served(NAME, SERVED[NAME], folder, "champion", made_from(), {"cider/combo": 1.5})
        other = register_served(NAME, SERVED[NAME], folder, "candidate", made_from("c" * 64), {})
    finally:
        runs.enter(None)
    run = first.pop("run")
    assert first == {"name": NAME, "version": "1", "alias": "candidate", "stage": "med_pretraining"}
    assert again["version"] == "1" and other["version"] == "2"
    version = store.client.get_model_version_by_alias(NAME, "champion")
    assert (
        version.tags["run"] == run and version.tags["model"] == "a" * 64 and "cider/combo: 1.5" in version.description
    )
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@candidate")
    assert model.metadata.signature.inputs is not None and model.input_example is not None
    asked = pd.DataFrame({"image": [base64.b64encode(picture(0)).decode()]})
    assert isinstance(model.predict(asked)["caption"][0], str)
