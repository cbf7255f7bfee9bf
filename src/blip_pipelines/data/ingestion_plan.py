"""What ingestion will do, known before a picture is read: every image a place, by hash, and every shard a job.

Equal files are together; a limit draws from every split and subset. So the plan is the same each time, and on any
number of workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blip_pipelines import config as strict
from blip_pipelines.data import splits
from blip_pipelines.data.contracts import ContractsConfig
from blip_pipelines.data.images import ImageLimits
from blip_pipelines.data.noise import NoiseConfig
from blip_pipelines.data.records import Record
from blip_pipelines.data.shard_jobs import Archived, ShardJob, Wanted
from blip_pipelines.data.sources import Archive, ArchiveSource, Quarantined, Source, SourceConfig
from blip_pipelines.data.splits import SplitConfig

SPLIT_RANK = {"train": 0, "val": 1, "test": 2}
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


@dataclass(frozen=True, slots=True)
class Unit:
    """One distinct file of the source: the records of all its copies."""

    records: tuple[Record, ...]
    checksum: str = ""

    @property
    def member(self) -> str:
        return self.records[0].member

    @property
    def rows(self) -> int:
        return sum(len(record.captions) for record in self.records)

    @property
    def cell(self) -> tuple[str, str | None]:
        """Declared (split, subset) of the strongest copy, from which `limit` draws."""
        strongest = max(self.records, key=lambda record: SPLIT_RANK.get(record.split or "", -1))
        split = strongest.split or ""
        return split, None if split in ("", "train") else strongest.subset or "all"


def plan_files(source: Source, config: IngestionConfig) -> tuple[list[Unit], list[Quarantined]]:
    """Distinct files in the order in which they are stored: drawn, so that each shard is a fair sample of the whole."""
    checksums = {entry.member: entry.checksum for entry in source.listing()}
    copies: dict[str, list[Record]] = {}
    lost = []
    for found in source.records():
        if isinstance(found, Quarantined):
            lost.append(found)
        elif not found.captions:
            lost.append(Quarantined(found.member, "no_caption", "no caption names this image"))
        else:
            copies.setdefault(checksums[found.member], []).append(found)
    units = [Unit(tuple(same), checksum) for checksum, same in copies.items()]
    units.sort(key=lambda unit: splits.draw(config.seed, "order", unit.member))
    if config.limit is not None:
        cells, names = [unit.cell for unit in units], [unit.member for unit in units]
        units = splits.sample(units, cells, names, config.limit, config.seed)
    return units, lost


def file_jobs(units: Sequence[Unit], readers: int, config: IngestionConfig, folder: Path) -> list[ShardJob]:
    """A job for each run of `shard_images` files."""
    wanted = [Wanted(unit.records[0].read, unit.checksum) for unit in units]
    return [
        ShardJob(number, tuple(wanted[start : start + config.shard_images]), folder, config.limits, readers=readers)
        for number, start in enumerate(range(0, len(units), config.shard_images))
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
