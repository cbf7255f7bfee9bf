"""`kedro data ...`: look at a source or a data set before anything trains on it; bring data and models to S3."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip_pipelines.commands.project import configuration, env_option, friendly, project_root

if TYPE_CHECKING:
    from blip_pipelines.data.ingestion_plan import IngestionConfig

SOURCE = "source"


@click.group()
def data() -> None:
    """Look at a source or a data set: NAME is `source`, or a caption table of the catalog (pairs, capfilt_pairs)."""


@data.command()
@click.argument("name", default="pairs")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@env_option
def info(name: str, as_json: bool, env: str) -> None:
    """Counts, hashes, sizes and places of NAME; of `source` what ingestion would find, without reading an image."""
    from blip_pipelines.data import inventory

    with _errors():
        if name == SOURCE:
            found = inventory.of_source(_ingestion(env), _filepath(SOURCE, env))
        else:
            quarantine = _path("quarantine", env) if name == "pairs" else None
            found = inventory.of_data_set(_path(name, env), _path("images", env), quarantine)
    click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else "\n".join(_lines(found)))


@data.command()
@click.argument("name", default="pairs")
@click.option("--count", default=32, show_default=True, help="Rows, spread evenly over the table.")
@click.option("--split", default="train", show_default=True, type=click.Choice(["train", "val", "test"]))
@click.option("--to", "target", type=click.Path(path_type=Path), help="A PNG; else beside the other reports.")
@env_option
def preview(name: str, count: int, split: str, target: Path | None, env: str) -> None:
    """A contact sheet of NAME, a caption table: pictures with their captions."""
    from blip_pipelines.data.contact_sheet import contact_sheet
    from blip_pipelines.data.storage import write_atomic

    _refuse_source(name, "preview")
    with _errors():
        target = target or _path("samples", env).with_name(f"preview_{name}_{split}.png")
        write_atomic(target, contact_sheet(_path(name, env), _path("images", env), count, split))
    click.echo(f"{target}: {count} rows of {name}, {split}")


@data.command()
@click.argument("name", default="pairs")
@click.option("--docs", type=click.Path(path_type=Path), help="Where the pages go; else beside those of ingestion.")
@env_option
def lint(name: str, docs: Path | None, env: str) -> None:
    """Judge NAME, a caption table, by `ingestion.contracts` and nothing else; fails where a rule of severity `error` is
    broken.
    """
    from blip_pipelines.data.contracts import ContractError, check
    from blip_pipelines.data.quality import summarise

    _refuse_source(name, "lint")
    with _errors():
        pairs, contracts = _path(name, env), _ingestion(env).contracts
        docs = docs or _path("data_docs", env).with_name(f"lint_{name}")
        try:
            results = check(pairs, summarise(pairs, _path("images", env)), contracts, docs)
        except ContractError as error:
            raise click.ClickException(str(error)) from None
    for result in results:  # those that warn are in the log, by `check`
        if result.passed or result.severity != "warn":
            click.echo(f"kept  {result.rule}" if result.passed else f"{result.severity:6}{result}")
    click.echo(f"{docs / 'index.html'}: every rule, table by table")


@data.command()
@click.argument("url")
@click.option("--keep", is_flag=True, help="Leave the shards on the disk too, unused.")
@env_option
def offload(url: str, keep: bool, env: str) -> None:
    """Move the image shards to URL, s3://bucket/folder; training reads them through the cache from then on."""
    from blip_pipelines.data.offload import offload as move

    with _errors():
        _report(move(_path("images", env), url, _ingestion(env).source.s3, keep))


@data.command()
@click.argument("name")
@click.argument("url")
@env_option
def send(name: str, url: str, env: str) -> None:
    """Store what the catalog has as NAME (a model, the report, ...) at URL, s3://bucket/folder."""
    from blip_pipelines.data.offload import send as store

    with _errors():
        path = _path(name, env)
        if not path.exists():
            raise click.ClickException(f"{path}: missing; run the stage that writes it")
        _report(store(path, url, _ingestion(env).source.s3))


def _report(stored: Iterator[tuple[str, int]]) -> None:
    for url, size in stored:
        click.echo(f"{url}  {size:,} bytes")


def _refuse_source(name: str, command: str) -> None:
    if name == SOURCE:
        raise click.UsageError(
            f"{command} takes what ingestion wrote; see `kedro data info {SOURCE}`, or run `kedro run --pipelines "
            f"ingestion` and then `kedro data {command} pairs`"
        )


@contextmanager
def _errors() -> Iterator[None]:
    from blip_pipelines.data.sources import SourceError
    from blip_pipelines.data.sources.packages import PackageError

    with friendly():
        try:
            yield
        except (SourceError, PackageError) as error:
            raise click.ClickException(str(error)) from None


def _ingestion(env: str) -> "IngestionConfig":
    from blip_pipelines.pipelines.ingestion.nodes import read_parameters

    return read_parameters(configuration(env)["parameters"]["ingestion"]).config


def _filepath(name: str, env: str) -> Any:
    """Where an entry of the catalog lies: a path from the project's root, or a url."""
    from blip_pipelines.tracking.dvc import catalog_entries

    entry: Mapping[str, Any] = catalog_entries(configuration(env)["catalog"], [name]).get(name, {})
    if "filepath" not in entry:
        raise click.UsageError(f"{name}: no entry of the catalog with a file path; see conf/base/catalog.yml")
    where = str(entry["filepath"])
    return where if "://" in where else project_root() / where


def _path(name: str, env: str) -> Path:
    return Path(_filepath(name, env))


def _lines(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(str(name)) for name in found), default=0)
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}" if value else f"{indent}{name:{width}}  -"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name:{width}}  {f'{value:,}' if isinstance(value, int) else value}"
