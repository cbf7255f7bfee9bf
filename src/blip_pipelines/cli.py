"""This project's commands beside Kedro's own, where Kedro looks for them: `kedro --help` lists them.

A command is a `click` command of a module under `commands/`; what is heavy is imported when it is called.
"""

from collections.abc import Sequence

import click
from kedro.framework.cli.project import run

from blip_pipelines.commands.ablate import ablate
from blip_pipelines.commands.champion import rollback
from blip_pipelines.commands.compare import compare
from blip_pipelines.commands.data import data
from blip_pipelines.commands.lineage import lineage, restore, verify
from blip_pipelines.commands.score import score
from blip_pipelines.commands.serve import serve

__all__ = ["cli", "run"]  # `run` because Kedro, where it finds this module, takes its command from here

COMMANDS: Sequence[click.Command] = (ablate, compare, data, lineage, restore, rollback, score, serve, verify)


@click.group()
def cli() -> None:
    """Commands of this project."""


for command in COMMANDS:
    cli.add_command(command)
