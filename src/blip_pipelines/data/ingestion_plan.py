"""What ingestion will do, known before a picture is read: every image a place, by hash, and every shard a job.

Equal files are together; a limit draws from every split and subset. So the plan is the same each time, and on any
number of workers.
"""

from dataclasses import dataclass, field
from pathlib import Path

from blip_pipelines import config as strict
from blip_pipelines.data import splits
from blip_pipelines.data.contracts import ContractsConfig
from blip_pipelines.data.images import ImageLimits
from blip_pipelines.data.noise import NoiseConfig
from blip_pipelines.data.plan_store import PlanStore
from blip_pipelines.data.shard_jobs import Archived, ShardJob
from blip_pipelines.data.sources import Archive, ArchiveSource, Quarantined, Source, SourceConfig
from blip_pipelines.data.splits import SplitConfig

_SAMPLED_ARCHIVES = 16  # of each split, under a limit


@dataclass(frozen=True)
class IngestionConfig:
    """Everything that decides a data set.

    Args:
        limit: about so many images, drawn by hash from every split and subset; None for all.
        shard_images: images in a tar shard, refused ones counted.
        workers: processes that read and decode; 0 for one a core.
    """

    source: SourceConfig = field(default_factory=SourceConfig)
    seed: int = 0
    limit: int | None = None
    shard_images: int = 1024
    max_caption_characters: int = 2000
    limits: ImageLimits = field(default_factory=ImageLimits)
    splits: SplitConfig = field(default_factory=SplitConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    contracts: ContractsConfig = field(default_factory=ContractsConfig)
    workers: int = strict.speed_only(0)


def plan_files(source: Source, config: IngestionConfig, plan: PlanStore) -> None:
    """Put distinct files in the order in which they are stored: drawn, so that each shard is a fair sample."""
    plan.know((entry.member, entry.checksum) for entry in source.listing())
    for found in source.records():
        if isinstance(found, Quarantined):
            plan.lose(found)
        elif not found.captions:
            plan.lose(Quarantined(found.member, "no_caption", "no caption names this image"))
        else:
            plan.add(found, splits.draw(config.seed, "order", found.member))
    plan.settle()
    if config.limit is not None:
        units = [(unit.cell, unit.member) for unit in plan.units(0, len(plan))]
        cells, names = [cell for cell, _ in units], [member for _, member in units]
        plan.keep(splits.sample(range(len(plan)), cells, names, config.limit, config.seed))


def file_jobs(plan: PlanStore, readers: int, config: IngestionConfig, folder: Path) -> list[ShardJob]:
    """A job for each run of `shard_images` files."""
    count = len(plan)
    return [
        ShardJob(
            *(number, plan.images(start, min(start + config.shard_images, count))),
            *(folder, config.limits),
            readers=readers,
        )
        for number, start in enumerate(range(0, count, config.shard_images))
    ]


def archive_jobs(source: ArchiveSource, config: IngestionConfig, folder: Path) -> list[ShardJob]:
    """A job an archive; under a limit a few archives of each declared split, and of each the first images."""
    archives, at_most = list(source.archives()), None
    if config.limit is not None:
        by_split: dict[str | None, list[Archive]] = {}
        for archive in archives:
            by_split.setdefault(archive.split, []).append(archive)
        for same in by_split.values():
            same.sort(key=lambda archive: splits.draw(config.seed, "sample", archive.name))
        chosen = {archive.name for same in by_split.values() for archive in same[:_SAMPLED_ARCHIVES]}
        archives = [archive for archive in archives if archive.name in chosen]
        at_most = -(-config.limit // len(archives))
    return [
        ShardJob(number, Archived(archive, at_most), folder, config.limits, spare=len(archives) + number)
        for number, archive in enumerate(archives)
    ]
