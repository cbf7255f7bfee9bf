"""`kedro lineage`, `kedro restore`, `kedro verify`: where a model comes from, its project again, do records agree."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip_pipelines.commands.project import configuration, env_option, friendly, open_store, project_root

if TYPE_CHECKING:
    from blip_pipelines.evaluation.lineage import Caption
    from blip_pipelines.tracking.lineage import Lineage


@click.command()
@click.argument("model")
@click.option("--caption", "captions", multiple=True, help="A caption, or (the beginning of) the key of an image.")
@click.option("--page", type=click.Path(path_type=Path), help="Where the page with the drawing goes.")
@env_option
def lineage(model: str, captions: tuple[str, ...], page: Path | None, env: str) -> None:
    """Say and draw what MODEL (models:/NAME@ALIAS or models:/NAME/VERSION) was made from.

    With --caption: who wrote it, who judged it and how, and what became of it.
    """
    from blip_pipelines.data.storage import write_atomic
    from blip_pipelines.evaluation.lineage import as_page, as_text
    from blip_pipelines.pipelines.stories import story_of, versions_by_content
    from blip_pipelines.tracking.lineage import read

    store = open_store(env)
    with tempfile.TemporaryDirectory() as folder, friendly():
        found = read(store, model, Path(folder))
        models = versions_by_content(store)
        about = {asked: list(_captions(found, asked, models)) for asked in captions}
        story = story_of(store, found, [caption for rows in about.values() for caption in rows])
    click.echo(as_text(story), nl=False)
    for asked, rows in about.items():
        if not rows:
            click.echo(f"\nno caption table of this version has '{asked}'", err=True)
    data = project_root() / configuration(env)["globals"]["data"]
    page = page or data / "08_reporting" / "lineage" / f"{found.name}-{found.version}.html"
    write_atomic(page, as_page(story))
    click.echo(f"\ndrawn in {page}")


@click.command()
@click.argument("model")
@click.option("--into", type=click.Path(path_type=Path), required=True, help="A new or empty folder.")
@env_option
def restore(model: str, into: Path, env: str) -> None:
    """Bring back code, parameters and data of MODEL (models:/NAME@ALIAS or models:/NAME/VERSION)."""
    from blip_pipelines.tracking.lineage import read
    from blip_pipelines.tracking.restore import restore as bring_back

    store = open_store(env)
    with tempfile.TemporaryDirectory() as folder, friendly():
        found = read(store, model, Path(folder))
        done = bring_back(project_root(), found, into.resolve())
    click.echo(
        f"{into}: code of {found.record['code']['commit'] or 'no commit'} as it was, {len(done.data)} pieces of data"
    )
    for stage in done.unrecorded:
        click.echo(f"{stage}: not in the kept dvc.lock, which `dvc repro` writes after the run that released the model")
    if done.env:
        click.echo(f"the parameters are in conf/{done.env}: kedro run --env {done.env}")
    if done.missing:
        raise click.ClickException("\n".join(["not restored:", *done.missing]))
    click.echo("`make setup` there gives the environment; then `dvc status` is clean and `dvc repro` has nothing to do")


@click.command()
@env_option
def verify(env: str) -> None:
    """Say where receipts, dvc.lock and the tags of registered models disagree; fails if they do."""
    from kedro.framework.project import pipelines
    from kedro.framework.session import KedroSession

    from blip_pipelines.pipelines.snapshot import snapshot
    from blip_pipelines.tracking.agreement import disagreements

    session: Any = KedroSession.create(project_root(), env=env)
    with session:
        context = session.load_context()
        catalog = context.catalog
        each = {name: pipeline for name, pipeline in pipelines.items() if name != "__default__"}
        found = snapshot(project_root(), each, catalog, context.params)
    lines = list(disagreements(project_root(), open_store(env), found, with_dvc=env in ("base", "local")))
    for line in lines:
        click.echo(line)
    if lines:
        raise click.ClickException(f"{len(lines)} disagreements")
    click.echo("receipts, dvc.lock and registered models agree")


def _captions(found: "Lineage", asked: str, models: dict[str, str]) -> Iterator["Caption"]:
    """What the tables of this version, not those of today, say about a caption."""
    from blip_pipelines.data.provenance import rows_about
    from blip_pipelines.evaluation.lineage import Caption
    from blip_pipelines.tracking.lineage import maker_of

    def called(digest: str | None) -> str | None:
        if digest is None:
            return None
        made = maker_of(found.record["stages"], digest)
        names = [models[digest]] if digest in models else []
        names += [f"{made[1]} of {made[0]}"] if made else []
        return f"{digest[:12]} ({', '.join(names) or 'not of this version'})"

    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in _tables(found, Path(scratch)):
            for row in rows_about(folder, asked):
                yield Caption(name, row, called(row["written_by"]), called(row["judged_by"]))


def _tables(found: "Lineage", scratch: Path) -> Iterator[tuple[str, Path]]:
    """Caption tables of the version: what the filter decided where it did, and the corpora. From the project if that
    has the very content still, else from DVC's cache."""
    from blip_pipelines.data.storage import content_hash
    from blip_pipelines.tracking.data_versions import cache_of, is_cached, lay_out, locked

    root, md5 = project_root(), locked(found.lock)
    cache = cache_of(root) if md5 else None
    outputs = {name: data for stage in found.stages for name, data in found.record["stages"][stage]["outputs"].items()}
    for name, data in outputs.items():
        if name != "pairs" and not name.endswith(("_pairs", "_decided")):
            continue
        path = data["path"]
        if (root / path).exists() and content_hash(root / path) == data["sha256"]:
            yield name, root / path
        elif cache is not None and path in md5 and is_cached(cache, md5[path]):
            lay_out(cache, md5[path], scratch / name)
            yield name, scratch / name
        else:
            click.echo(f"{name}: content {data['sha256'][:12]} is not in the project nor in DVC's cache", err=True)
