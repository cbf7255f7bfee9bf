"""Source to data set: pictures decoded, checked and written once to tar shards, captions to tables over them.

The plan comes first (equal files together, every image a split and a shard, all by hash); then each shard is one
independent job that any process may do and that a restart finds done; then the tables, in the order of the plan. So
workers and interruptions change no byte. Rows are counted in captions: rows in = rows kept + rows quarantined.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines.data import shards, storage
from blip_pipelines.data.gathered import NOISE_SCHEMA, Gathered, Quarantine
from blip_pipelines.data.ingestion_plan import IngestionConfig, archive_jobs, file_jobs, plan_files
from blip_pipelines.data.pairs import write_pairs
from blip_pipelines.data.plan_store import PlanStore
from blip_pipelines.data.shard_jobs import ShardJob, do_jobs
from blip_pipelines.data.sources import ArchiveSource, Source

log = logging.getLogger(__name__)

_PLAN = ".plan.sqlite"  # among the images while ingestion runs


@dataclass(frozen=True)
class DataSet:
    """Where ingestion writes: folders of image shards and of tables, and two files beside them."""

    images: Path
    pairs: Path
    quarantine: Path
    noise: Path


def ingest(source: Source | ArchiveSource, config: IngestionConfig, out: DataSet) -> dict[str, Any]:
    """Turn a source into a data set at `out`; returns the counts that the table's manifest also holds.

    Shards already there are kept where the plan for them is the same; `images/` and `pairs/` hold nothing else
    afterwards. `noise.parquet` has no rows unless the source knows the truth.

    Raises:
        IngestionError: nothing is kept, or rows went missing.
        SourceError: the source as a whole cannot be read.
        ObjectStoreError: S3 is out of reach; what was finished is kept.
        WorkerDiedError: a process was killed; run again, and what was finished is kept.
    """
    if isinstance(source, ArchiveSource):
        return _ingest(source, archive_jobs(source, config, out.images), None, config, out)
    with PlanStore(out.images / _PLAN, getattr(source, "place", None)) as plan:
        plan_files(source, config, plan)
        return _ingest(source, file_jobs(plan, source.readers, config, out.images), plan, config, out)


def _ingest(
    source: Source | ArchiveSource, jobs: list[ShardJob], plan: PlanStore | None, config: IngestionConfig, out: DataSet
) -> dict[str, Any]:
    """Do the jobs and write the tables.

    Args:
        plan: of the jobs; None for those of archives.
    """
    written = do_jobs(jobs, config.workers)
    in_place = {shards.shard_name(job.number): job.url for job in jobs if job.url is not None}
    offloaded = shards.read_places(out.images)[0]
    urls = {**offloaded, **in_place}
    names = {shard.name for shard in written}
    images_hash = shards.write_manifest(out.images, written)
    places = {name: url for name, url in urls.items() if name in names and not (out.images / name).exists()}
    shards.write_places(out.images, places, config.source.s3)
    _keep_only(out.images, {job.index_path.name for job in jobs} | (names - in_place.keys()))

    with Quarantine(out.quarantine, source.name) as quarantine:
        for row in plan.lost if plan is not None else ():
            quarantine.add(row)
        truth = None if isinstance(source, ArchiveSource) else source.truth()
        gathered = Gathered(jobs, plan, config, source.name, quarantine, truth)
        write_pairs(out.pairs, gathered.tables(), images_hash, gathered.counts)
    _keep_only(out.pairs, {f"{number:05d}.parquet" for number in range(len(jobs))})
    _write_table(pa.Table.from_pylist(gathered.noise, NOISE_SCHEMA), out.noise)
    counts = gathered.counts
    log.info(
        "%s: %d captions of %d images, %d quarantined",
        source.name, gathered.rows, counts["distinct_images"], quarantine.rows,
    )  # fmt: skip
    return {"rows": gathered.rows, **counts}


def _write_table(table: pa.Table, path: Path) -> None:
    with storage.writing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=3)


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove shards of a larger data set and what a killed run left half written."""
    for path in folder.iterdir():
        is_half_written = re.match(r"\.(?:\d+\.(?:tar|parquet)|manifest\.json)\.", path.name)
        if is_half_written or (path.suffix in (".tar", ".parquet") and path.name not in names):
            path.unlink()
