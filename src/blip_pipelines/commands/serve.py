"""`kedro serve`: registered models over HTTP, and the page to try them on."""

import os
import sys
import threading
import webbrowser
from typing import TYPE_CHECKING, Any

import click

from blip_pipelines.commands.project import configuration, env_option, friendly, open_store, project_root

if TYPE_CHECKING:
    from blip_pipelines.inference.gallery import Gallery


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--alias", default="champion", show_default=True, help="Of the versions; where a model has none, its candidate."
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=5000, show_default=True)
@click.option("--running", default=1, show_default=True, help="Requests that a model answers at a time.")
@click.option("--waiting", default=64, show_default=True, help="Requests that wait; one more gets 503 and Retry-After.")
@click.option("--body-bytes", default=32_000_000, show_default=True, help="Of a request; a larger one gets 413.")
@click.option("--source", "sources", multiple=True, help="Of the pictures that the page shows; may repeat. Else all.")
@click.option("--open", "in_browser", is_flag=True, help="Open the page in the browser of this desktop.")
@env_option
def serve(
    names: tuple[str, ...],
    alias: str,
    host: str,
    port: int,
    running: int,
    waiting: int,
    body_bytes: int,
    sources: tuple[str, ...],
    in_browser: bool,
    env: str,
) -> None:
    """Serve the registered models NAMES, or all: MLflow's protocol at /models/NAME/invocations, and a page at /.

    With one NAME it is also at /invocations, where `mlflow models serve` has it.
    """
    import logging

    import uvicorn

    from blip_pipelines.inference.limits import LimitsConfig
    from blip_pipelines.inference.server import ServedModel, make_app
    from blip_pipelines.tracking.serving import load_served

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with friendly():
        store = open_store(env)
        loaded = {each.name: each for each in load_served(store, names, alias)}
        models = [
            ServedModel(
                each.name, each.version, each.alias, each.inputs, each.tags.get("stage", ""), each.tags.get("gate", "")
            )
            for each in loaded.values()
        ]
        retriever = next((loaded[model.name].model.predict for model in models if model.does == "retrieve"), None)
        scoring = {name: each.scoring for name, each in loaded.items()}
        limits = LimitsConfig(running=running, waiting=waiting, body_bytes=body_bytes)
        app = make_app(models, scoring, _gallery(env, retriever, sources), limits)
    for model in models:
        click.echo(
            f"models:/{model.name}/{model.version} (@{model.alias})  http://{host}:{port}/models/{model.name}/invocations"
        )
    click.echo(f"the page: http://{host}:{port}/")
    if in_browser and (sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        threading.Timer(1.0, webbrowser.open, [f"http://{host}:{port}/"]).start()
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_keep_alive=20)


def _gallery(env: str, ask: Any, sources: tuple[str, ...]) -> "Gallery | None":
    """The evaluation pictures of the project, where there are some."""
    from blip_pipelines.inference.gallery import Gallery

    data = project_root() / configuration(env)["globals"]["data"]
    pairs, images = data / "03_primary" / "pairs", data / "02_intermediate" / "images"
    return Gallery(pairs, images, ask, sources=sources) if pairs.is_dir() and images.is_dir() else None
