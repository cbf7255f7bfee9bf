"""MLflow stores and runs this file to make `blip2` ("models from code")."""

from blip_pipelines.inference.served import set_model
from blip_pipelines.inference.served_blip2 import Blip2Captioner

set_model(Blip2Captioner())
