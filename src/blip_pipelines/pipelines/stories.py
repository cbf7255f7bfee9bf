"""The lineage of registered versions, from what MLflow kept to what a person reads."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip_pipelines.evaluation.lineage import Caption, Story
    from blip_pipelines.tracking.lineage import Lineage
    from blip_pipelines.tracking.runs import Store


def story_of(store: "Store", found: "Lineage", captions: "Sequence[Caption]" = ()) -> "Story":
    """What `evaluation.lineage` tells of a version."""
    from blip_pipelines.evaluation.lineage import Story
    from blip_pipelines.tracking.data_versions import locked

    described = {"name": found.name, "version": found.version, "aliases": found.aliases, "tags": found.tags}
    return Story(
        described, found.stages, found.record, locked(found.lock), found.patch, versions_by_content(store), captions
    )


def versions_by_content(store: "Store") -> dict[str, str]:
    """Registered versions by the content hash of the folder that each was made of."""
    return {
        version.tags["model"]: f"models:/{version.name}/{version.version}"
        for version in store.client.search_model_versions()
        if "model" in version.tags
    }


def draw(store: "Store", models: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """A page for each released model, `<name>-<version>.html`, to which the report links."""
    from blip_pipelines.data.storage import write_atomic
    from blip_pipelines.evaluation.lineage import as_page
    from blip_pipelines.tracking.lineage import read

    for model in models:
        with tempfile.TemporaryDirectory() as scratch:
            found = read(store, f"models:/{model['name']}/{model['version']}", Path(scratch))
            write_atomic(folder / f"{found.name}-{found.version}.html", as_page(story_of(store, found)))
