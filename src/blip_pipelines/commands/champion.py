"""`kedro rollback`: the champion before this one is champion again."""

import click

from blip_pipelines.commands.project import env_option, friendly, open_store


@click.command()
@click.argument("name")
@click.option("--because", default="no reason was given", help="Kept with the withdrawn version.")
@env_option
def rollback(name: str, because: str, env: str) -> None:
    """Make the champion of the registered model NAME before the present one champion again."""
    from blip_pipelines.tracking.champions import roll_back

    with friendly():
        withdrawn, restored = roll_back(open_store(env), name, because)
    click.echo(f"models:/{name}@champion is version {restored} again; version {withdrawn} was withdrawn")
