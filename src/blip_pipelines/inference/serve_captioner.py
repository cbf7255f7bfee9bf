"""MLflow stores and runs this file to make `blip-captioner` ("models from code")."""

from blip_pipelines.inference.served import Captioner, set_model

set_model(Captioner())
