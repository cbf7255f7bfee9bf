"""MLflow stores and runs this file to make `instructblip` ("models from code")."""

from blip_pipelines.inference.served import set_model
from blip_pipelines.inference.served_instructblip import Instructed

set_model(Instructed())
