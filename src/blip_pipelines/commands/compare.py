"""`kedro compare`: two registered versions side by side: what they reach, what they were made of."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip_pipelines.commands.project import configuration, env_option, friendly, open_store, project_root

if TYPE_CHECKING:
    from blip_pipelines.evaluation.scores import Scores


@click.command()
@click.argument("new")
@click.argument("old")
@click.option(
    "--by", type=click.Choice(["subset", "source", "category", "length"]), default="subset", show_default=True
)
@click.option("--page", type=click.Path(path_type=Path), help="Also write it there, as a page for a browser.")
@env_option
def compare(new: str, old: str, by: str, page: Path | None, env: str) -> None:
    """Compare NEW with OLD (each models:/NAME@ALIAS or models:/NAME/VERSION), sample by sample.

    A difference is significant where its paired 95 % bootstrap interval leaves out 0. Below it, the parameters, data
    and code in which the two differ.
    """
    from blip_pipelines.data.storage import write_atomic
    from blip_pipelines.evaluation.versions import as_page, as_text, compared
    from blip_pipelines.tracking import registry

    store = open_store(env)
    with friendly(), tempfile.TemporaryDirectory() as folder:
        versions = [registry.find(store, uri) for uri in (new, old)]
        found = [_scores(store, version, Path(folder) / str(place)) for place, version in enumerate(versions)]
        if by != "subset":
            found = [_sliced(scores, by, env) for scores in found]
        try:
            origins = list(_origins(store, (new, old), Path(folder)))
        except registry.RegistryError as error:
            origins = [f"origins not compared: {error}"]
        rows = compared(found[0], found[1])
        for line in as_text(rows, by, origins):
            click.echo(line)
        if page is not None:
            names = [f"{version.name} version {version.version}" for version in versions]
            write_atomic(page, as_page(rows, by, origins, names[0], names[1]))
            click.echo(f"\nwritten to {page}")


def _scores(store: Any, version: Any, into: Path) -> "Scores":
    from blip_pipelines.evaluation.scores import read_scores
    from blip_pipelines.tracking import registry

    into.mkdir()
    file = registry.artifact(store, version, f"scores/{version.name}.parquet", into)
    if file is None:
        raise registry.RegistryError(f"{version.name} version {version.version}: no scores were kept; release it again")
    return read_scores(file)


def _sliced(scores: "Scores", by: str, env: str) -> "Scores":
    from blip_pipelines.evaluation.slices import rows_of, sliced

    pairs = project_root() / configuration(env)["globals"]["data"] / "03_primary" / "pairs"
    return sliced(scores, by, rows_of(scores, pairs))


def _origins(store: Any, uris: tuple[str, str], into: Path) -> Iterator[str]:
    """Parameters, data and code in which the two differ."""
    from blip_pipelines.evaluation.lineage import flat
    from blip_pipelines.tracking.lineage import read

    new, old = (read(store, uri, into / f"lineage{place}") for place, uri in enumerate(uris))
    for stage in dict.fromkeys([*new.stages, *old.stages]):
        records = [each.record["stages"].get(stage, {}) for each in (new, old)]
        settings = [dict(flat(record.get("parameters", {}))) for record in records]
        for key in sorted(settings[0].keys() | settings[1].keys()):
            if settings[0].get(key) != settings[1].get(key):
                yield f"{stage}.{key}: {settings[0].get(key)} (new), {settings[1].get(key)} (old)"
        for name, pair in _changed(*(record.get("inputs", {}) for record in records)):
            yield f"{stage} reads other {name}: {pair[0]} (new), {pair[1]} (old)"
    codes = [each.record["code"] for each in (new, old)]
    if codes[0]["sha256"] != codes[1]["sha256"]:
        called = [f"{code['commit'][:12] or 'no commit'}, all files {code['sha256'][:12]}" for code in codes]
        yield f"code: {called[0]} (new), {called[1]} (old)"


def _changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    for name in sorted(new.keys() | old.keys()):
        hashes = tuple(each[name]["sha256"][:12] if name in each else "none" for each in (new, old))
        if hashes[0] != hashes[1]:
            yield name, (hashes[0], hashes[1])
