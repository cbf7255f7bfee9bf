"""What the commands ask of the project in the folder that they are called in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from kedro.config import OmegaConfigLoader
from kedro.utils import find_kedro_project

if TYPE_CHECKING:
    from blip_pipelines.tracking.runs import Store

env_option = click.option("--env", "-e", default="base", show_default=True, help="The Kedro environment.")


def project_root() -> Path:
    return find_kedro_project(Path.cwd()) or Path.cwd()


def configuration(env: str) -> OmegaConfigLoader:
    """The project's configuration in an environment."""
    patterns: dict[str, Any] = {"config_patterns": {"tracking": ["tracking*"]}}
    return OmegaConfigLoader(
        str(project_root() / "conf"),
        base_env="base",
        default_run_env=env,
        merge_strategy={"parameters": "soft"},
        **patterns,
    )


def open_store(env: str) -> "Store":
    """The MLflow store of an environment."""
    from blip_pipelines.tracking.runs import Store

    tracking = configuration(env)["tracking"]
    return Store(project_root() / tracking["folder"], tracking["experiment"])


@contextmanager
def friendly() -> Iterator[None]:
    """Our errors, which say what to do, as the command's."""
    from blip_pipelines.config import ConfigError
    from blip_pipelines.data.storage import StorageError
    from blip_pipelines.tracking.registry import RegistryError

    try:
        yield
    except (ConfigError, StorageError, RegistryError) as error:
        raise click.ClickException(str(error)) from None
