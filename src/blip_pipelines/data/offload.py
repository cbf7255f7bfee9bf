"""To S3: image shards that shall not fill the disk, and any file or folder, as a model or a report."""

from collections.abc import Iterator
from pathlib import Path

from blip_pipelines.data import shards
from blip_pipelines.data.object_requests import ObjectStoreConfig
from blip_pipelines.data.object_store import ObjectStore


def send(path: Path, url: str, config: ObjectStoreConfig) -> Iterator[tuple[str, int]]:
    """Store a file at `url`, or the files of a folder under it; gives (url, bytes) of each when it is there.

    What is there with the same content is not sent again, nor are parts of a large file that an interrupted call sent.

    Raises:
        ObjectMissingError, ObjectStoreError: there is no such bucket; access is refused or the store fails.
    """
    store, url = ObjectStore(config), url.rstrip("/")
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    for file in files:
        target = url if file == path else f"{url}/{file.relative_to(path).as_posix()}"
        store.upload(file, target)
        yield target, file.stat().st_size


def offload(images: Path, url: str, config: ObjectStoreConfig, keep: bool = False) -> Iterator[tuple[str, int]]:
    """Store the shards of the folder `images` under `url` and say so in its `places.json`; then remove them here.

    The data set stays the same: its manifest says what its shards are, not where. Interrupted, it goes on.

    Args:
        keep: leave the shards on the disk too, unused.

    Yields:
        (url, bytes) of each shard when it is there.
    """
    urls = shards.read_places(images)[0]
    store, url = ObjectStore(config), url.rstrip("/")
    for shard in shards.read_manifest(images):
        if shard.name not in urls:
            target = f"{url}/{shard.name}"
            store.upload(images / shard.name, target)
            urls = {**urls, shard.name: target}
            shards.write_places(images, urls, config)
            if not keep:
                (images / shard.name).unlink()
            yield target, shard.bytes
