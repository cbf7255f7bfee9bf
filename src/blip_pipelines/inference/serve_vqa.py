"""MLflow stores and runs this file to make `blip-vqa` ("models from code")."""

from blip_pipelines.inference.served import set_model
from blip_pipelines.inference.served_vqa import Questioned

set_model(Questioned())
