"""What a source holds before it is ingested, and what a data set holds afterwards: counts, hashes, sizes, places."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_pipelines.data import shards, storage
from blip_pipelines.data.places import open_place
from blip_pipelines.data.records import QUARANTINE_SCHEMA, Record
from blip_pipelines.data.sources import ArchiveSource, open_source
from blip_pipelines.data.storage import MANIFEST

_WORDS = (0.01, 0.5, 0.99)  # quantiles that are shown


def of_source(config: Any, where: Path | str) -> dict[str, Any]:
    """What an `IngestionConfig` would find at a place, no image of it read.

    Raises:
        SourceError, ObjectStoreError: as `open_source`.
    """
    place, source = open_place(where, config.source.s3), open_source(config, where)
    about: dict[str, Any] = {"place": place.where, "kind": config.source.kind, "files": sum(1 for _ in place.names())}
    if isinstance(source, ArchiveSource):
        archives = source.archives()
        splits = Counter(archive.split or "by image" for archive in archives)
        return {**about, "archives": len(archives), "archives of splits": dict(splits)}
    captions, images, reasons = Counter[str](), 0, Counter[str]()
    for found in source.records():
        if isinstance(found, Record):
            images += 1
            captions[found.split or "by image"] += len(found.captions)
        else:
            reasons[found.reason] += 1
    return {**about, "images": images, "captions of splits": dict(captions), "refused": dict(sorted(reasons.items()))}


def of_data_set(pairs: Path, images: Path, quarantine: Path | None = None) -> dict[str, Any]:
    """What a caption table and its images hold, from manifests and one pass over the captions.

    Raises:
        StorageError: one of them is missing.
    """
    manifest, written = storage.read_json(pairs / MANIFEST), shards.read_manifest(images)
    urls, _ = shards.read_places(images)
    lengths, languages = Counter[int](), Counter[str]()
    sides: list[pa.Scalar] = []
    for entry in manifest["shards"]:
        table = pq.read_table(pairs / entry["name"], columns=["caption", "language", "width", "height"])
        lengths.update(len(caption.split()) for caption in table["caption"].to_pylist())
        languages.update(language or "not said" for language in table["language"].to_pylist())
        if table.num_rows:
            sides += [pc.min_element_wise(table["width"], table["height"])]
    reasons: dict[str, int] = {}
    if quarantine is not None and quarantine.exists():
        refused = pq.read_table(quarantine, schema=QUARANTINE_SCHEMA, columns=["reason"])["reason"]
        reasons = dict(sorted(Counter(refused.to_pylist()).items()))
    shortest = pc.quantile(pa.chunked_array(sides), q=list(_WORDS)).to_pylist() if sides else []
    return {
        "pairs": {"hash": storage.content_hash(pairs), "rows": manifest["rows"], "shards": len(manifest["shards"])},
        "images": {
            "hash": storage.content_hash(images),
            "images": sum(shard.images for shard in written),
            "shards": len(written),
            "bytes": sum(shard.bytes for shard in written),
            "shards elsewhere": len(urls),
        },
        **{name: manifest[name] for name in ("origins", "splits", "round") if name in manifest},
        "languages": dict(languages.most_common(8)),
        "words of a caption": dict(zip(("1 %", "median", "99 %"), _quantiles(lengths), strict=False)),
        "shorter side": dict(zip(("1 %", "median", "99 %"), map(int, shortest), strict=False)),
        "refused": reasons,
    }


def _quantiles(counts: Counter[int]) -> list[int]:
    found, seen, total = [], 0, counts.total()
    wanted = list(_WORDS)
    for value, count in sorted(counts.items()):
        seen += count
        while wanted and seen >= wanted[0] * total:
            found.append(value)
            wanted.pop(0)
    return found
