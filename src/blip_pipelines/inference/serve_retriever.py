"""MLflow stores and runs this file to make `blip-retriever` ("models from code")."""

from blip_pipelines.inference.served import Retriever, set_model

set_model(Retriever())
