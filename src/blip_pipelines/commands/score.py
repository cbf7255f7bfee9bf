"""`kedro score`: a registered model over the shards of a caption table, on every device of this machine."""

from pathlib import Path

import click

from blip_pipelines.commands.project import configuration, env_option, friendly, open_store, project_root

JOB = "blip_pipelines.jobs.score_pairs"


@click.command()
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the new caption table.")
@click.option("--task", type=click.Choice(["caption", "judge"]), help="By default what the model is registered for.")
@click.option(
    "--pairs", type=click.Path(path_type=Path, exists=True), help="A caption table; by default the project's."
)
@click.option("--images", type=click.Path(path_type=Path, exists=True), help="Its images; by default the project's.")
@click.option("--split", help="Only rows of this split.")
@click.option("--column", "columns", multiple=True, help="NAME=TEXT: a further input, such as prompt=a photo of.")
@click.option("--processes", type=int, help="Of torchrun; by default one a GPU, or one.")
@click.option("--inline", is_flag=True, help="In this process, without torchrun.")
@env_option
def score(
    model: str,
    out: Path,
    task: str | None,
    pairs: Path | None,
    images: Path | None,
    split: str | None,
    columns: tuple[str, ...],
    processes: int | None,
    inline: bool,
    env: str,
) -> None:
    """Caption all images, or judge all captions, of a table with MODEL (models:/NAME@ALIAS or models:/NAME/VERSION).

    A run that was cut goes on with the shards that are missing.
    """
    from blip_pipelines.jobs.launch import LaunchConfig, launch
    from blip_pipelines.pipelines.datasets import Folder
    from blip_pipelines.tracking import registry

    store, data = open_store(env), project_root() / configuration(env)["globals"]["data"]
    with friendly():
        version = registry.find(store, model)
        folder = registry.folder_of(store, version)
        outputs = registry.open_model(folder)[2]
        config = {
            "task": task or ("judge" if "match_probabilities" in outputs else "caption"),
            "made_by": version.tags.get("model", ""),
            "split": split,
            "columns": dict(column.split("=", 1) for column in columns),
        }
        inputs = {
            "model": folder,
            "pairs": pairs or data / "03_primary" / "pairs",
            "images": images or data / "02_intermediate" / "images",
        }
        started = LaunchConfig(
            mode="inline" if inline else "torchrun", processes=processes or "auto", work=str(data / ".work")
        )
        receipt = launch(JOB, config, inputs, started)
        Folder(str(out)).save(receipt)
    speed = receipt.speed.get("samples_per_second")
    click.echo(
        f"{out}: {receipt.facts['rows']} rows" + (f", {speed:.1f} a second" if speed else ", as they were before")
    )
