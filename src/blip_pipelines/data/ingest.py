"""Source to data set: pictures decoded, checked and written once to tar shards, captions to tables over them.

The plan comes first (equal files together, every image a split and a shard, all by hash); then each shard is one
independent job that any process may do and that a restart finds done; then the tables, in the order of the plan. So
workers and interruptions change no byte. Rows are counted in captions: rows in = rows kept + rows quarantined.
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines import config as strict
from blip_pipelines.data import shards, splits, storage
from blip_pipelines.data.contracts import ContractsConfig
from blip_pipelines.data.images import ImageLimits
from blip_pipelines.data.noise import NoiseConfig
from blip_pipelines.data.pairs import write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA, QUARANTINE_SCHEMA, Caption, Record, Refused
from blip_pipelines.data.shard_jobs import ShardJob, Wanted, write_shards
from blip_pipelines.data.sources import TRUTH_SCHEMA, Quarantined, Source, SourceConfig
from blip_pipelines.data.splits import SplitConfig

log = logging.getLogger(__name__)

_SPLIT_RANK = {"train": 0, "val": 1, "test": 2}
NOISE_SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False), *TRUTH_SCHEMA])


class IngestionError(RuntimeError):
    """Ingestion that cannot give a data set; the message says what was found and what to do."""


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


@dataclass(frozen=True)
class DataSet:
    """Where ingestion writes: folders of image shards and of tables, and two files beside them."""

    images: Path
    pairs: Path
    quarantine: Path
    noise: Path


@dataclass(frozen=True)
class _Row:
    """One caption on its way: from which record, for which split."""

    member: str
    caption: Caption
    split: str
    subset: str | None


@dataclass(frozen=True)
class _Unit:
    """One distinct file of the source with all captions that its copies bring."""

    record: Record
    checksum: str
    rows: tuple[_Row, ...]

    @property
    def cell(self) -> tuple[str, str | None]:
        strongest = max(self.rows, key=lambda row: _SPLIT_RANK[row.split])
        return strongest.split, strongest.subset


def ingest(source: Source, config: IngestionConfig, out: DataSet) -> dict[str, Any]:
    """Turn a source into a data set at `out`; returns the counts that the table's manifest also holds.

    Shards already there are kept where the plan for them is the same; `images/` and `pairs/` hold nothing else
    afterwards. `noise.parquet` has no rows unless the source knows the truth.

    Raises:
        IngestionError: nothing is kept, or rows went missing.
        WorkerDiedError: a process was killed; run again, and what was finished is kept.
    """
    found = list(source.records())
    lost = [item for item in found if isinstance(item, Quarantined)]
    lost += [
        Quarantined(record.member, "no_caption", "no caption names this image") for record in found if _is_bare(record)
    ]
    units = _plan([item for item in found if isinstance(item, Record) and item.captions], source, config)
    if config.limit is not None:
        cells, names = [unit.cell for unit in units], [unit.record.member for unit in units]
        units = splits.sample(units, cells, names, config.limit, config.seed)
    rows_in = sum(len(unit.rows) for unit in units) + len(lost)

    jobs = _jobs(units, config, out.images)
    written = write_shards(jobs, config.workers)
    images_hash = shards.write_manifest(out.images, [shard for shard, _ in written if shard is not None])
    _keep_only(out.images, {job.index_path.name for job in jobs} | {shard.name for shard, _ in written if shard})

    collected = _collect(units, [index for _, index in written], source.name, config)
    quarantine = [*lost, *collected.refused]
    rows = sum(table.num_rows for table in collected.tables)
    if rows + len(quarantine) != rows_in:
        raise IngestionError(
            f"{rows_in} rows came in, {rows} were kept and {len(quarantine)} quarantined; rows went missing, "
            "which is a fault of ingestion and not of the data: report it"
        )
    counts = _counts(collected.tables, quarantine)
    if rows == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["quarantined"].items()) or "it has no rows"
        raise IngestionError(f"nothing of the source '{source.name}' can be used: {reasons}")
    write_pairs(out.pairs, collected.tables, images_hash, counts)
    _keep_only(out.pairs, {f"{number:05d}.parquet" for number in range(len(jobs))})
    _write_table(_noise(source.truth(), collected), out.noise)
    refused = [{"source": source.name, **row._asdict()} for row in quarantine]
    _write_table(pa.Table.from_pylist(refused, QUARANTINE_SCHEMA), out.quarantine)
    log.info(
        "%s: %d captions of %d images, %d quarantined", source.name, rows, counts["distinct_images"], len(quarantine)
    )
    return {"rows": rows, **counts}


def _is_bare(record: Record | Quarantined) -> bool:
    return isinstance(record, Record) and not record.captions


def _plan(records: Iterable[Record], source: Source, config: IngestionConfig) -> list[_Unit]:
    """Distinct files in the order in which they are stored: drawn, so that each shard is a fair sample of the whole."""
    checksums = {entry.member: entry.checksum for entry in source.listing()}
    copies: dict[str, list[Record]] = {}
    for record in records:
        copies.setdefault(checksums[record.member], []).append(record)
    units = []
    for checksum, same in copies.items():
        declared = [record.split for record in same if record.split is not None]
        default = max(
            declared, key=_SPLIT_RANK.__getitem__, default=splits.by_image(checksum, config.splits, config.seed)
        )
        rows = [
            _Row(record.member, caption, split, None if split == "train" else record.subset or "all")
            for record in same
            for split in (record.split or default,)
            for caption in record.captions
        ]
        units.append(_Unit(same[0], checksum, tuple(rows)))
    return sorted(units, key=lambda unit: splits.draw(config.seed, "order", unit.record.member))


def _jobs(units: Sequence[_Unit], config: IngestionConfig, folder: Path) -> list[ShardJob]:
    wanted = [Wanted(unit.record.read, unit.checksum) for unit in units]
    return [
        ShardJob(number, tuple(wanted[start : start + config.shard_images]), folder, config.limits)
        for number, start in enumerate(range(0, len(units), config.shard_images))
    ]


@dataclass
class _Collected:
    """Rows by table shard, what was refused, and for each kept row the member under which its source knows it."""

    tables: list[pa.Table]
    known_as: list[list[str]]
    refused: list[Quarantined]


def _collect(units: Sequence[_Unit], indexes: Sequence[pa.Table], source: str, config: IngestionConfig) -> _Collected:
    """The captions of images that were stored, each checked; an image's rows go to the table of its first copy."""
    numbers = [number for number, index in enumerate(indexes) for _ in range(index.num_rows)]
    found = [row for index in indexes for row in index.drop_columns(["dhash", "thumbnail"]).to_pylist()]
    images_found = list(zip(numbers, units, found, strict=True))
    places: dict[str, dict[str, Any]] = {}
    strongest: dict[str, str] = {}
    for number, unit, image in images_found:
        if (key := image["key"]) is not None:
            place = {name: image[name] for name in ("key", "offset", "size", "width", "height")}
            shown = {"member": unit.record.member, "related_key": unit.record.related_key}
            places.setdefault(key, {**place, **shown, "shard": number})
            strongest[key] = max(strongest.get(key, "train"), unit.cell[0], key=_SPLIT_RANK.__getitem__)
    kept: list[list[dict[str, Any]]] = [[] for _ in indexes]
    known_as: list[list[str]] = [[] for _ in indexes]
    refused: list[Quarantined] = []
    texts: set[tuple[str, str]] = set()
    for _, unit, image in images_found:
        for row in unit.rows:
            try:
                if image["key"] is None:
                    raise Refused(image["reason"], image["error"])
                place = places[image["key"]]
                text = _check_text(row.caption.text, config.max_caption_characters)
                if row.split != strongest[image["key"]]:
                    raise Refused(
                        "in_evaluation", f"the same image is in {strongest[image['key']]}, as {place['member']}"
                    )
                if (image["key"], text.lower()) in texts:
                    raise Refused("duplicate_caption", f"the image has this caption already, as {place['member']}")
            except Refused as error:
                refused.append(Quarantined(row.member, error.reason, str(error)))
                continue
            texts.add((image["key"], text.lower()))
            said = {"caption": text, "origin": row.caption.origin, "language": row.caption.language}
            kept[place["shard"]].append({**place, **said, "source": source, "split": row.split, "subset": row.subset})
            known_as[place["shard"]].append(row.member)
    return _Collected([pa.Table.from_pylist(rows, PAIR_SCHEMA) for rows in kept], known_as, refused)


def _check_text(text: str, max_characters: int) -> str:
    """The caption with single spaces.

    Raises:
        Refused: empty_caption, long_caption, invalid_utf8 or control_character.
    """
    if len(text) > max_characters:
        raise Refused("long_caption", f"{len(text)} characters, over the limit of {max_characters}: {text[:60]!r}...")
    text = " ".join(text.split())
    if not text:
        raise Refused("empty_caption", "the caption has no characters")
    for character in text:
        if (category := unicodedata.category(character)) == "Cs":
            raise Refused("invalid_utf8", f"{character!r} is half a character")
        if category == "Cc":
            raise Refused("control_character", f"holds {character!r}")
    return text


def _counts(tables: Sequence[pa.Table], quarantine: Sequence[Quarantined]) -> dict[str, Any]:
    """Plain numbers for the manifest: rows by what they are, refused rows by reason."""
    table = pa.concat_tables([PAIR_SCHEMA.empty_table(), *tables])
    of_split = Counter(
        f"{split}/{subset}" if subset else split
        for split, subset in zip(table["split"].to_pylist(), table["subset"].to_pylist(), strict=True)
    )
    return {
        "distinct_images": len(table["key"].unique()),
        "origins": dict(sorted(Counter(table["origin"].to_pylist()).items())),
        "splits": dict(sorted(of_split.items())),
        "quarantined": dict(sorted(Counter(row.reason for row in quarantine).items())),
    }


def _noise(truth: pa.Table | None, collected: _Collected) -> pa.Table:
    """The source's truth for the rows that were kept, under the keys and members of the table."""
    if truth is None:
        return NOISE_SCHEMA.empty_table()
    known = {row["member"]: row for row in truth.to_pylist()}
    rows = [
        {**known[source_member], "key": row["key"], "member": row["member"], "caption": row["caption"]}
        for table, known_as in zip(collected.tables, collected.known_as, strict=True)
        for row, source_member in zip(table.select(["key", "member", "caption"]).to_pylist(), known_as, strict=True)
        if source_member in known
    ]
    return pa.Table.from_pylist(rows, NOISE_SCHEMA)


def _write_table(table: pa.Table, path: Path) -> None:
    with storage.writing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=3)


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove shards of a larger data set and what a killed run left half written."""
    for path in folder.iterdir():
        is_half_written = re.match(r"\.(?:\d+\.(?:tar|parquet)|manifest\.json)\.", path.name)
        if is_half_written or (path.suffix in (".tar", ".parquet") and path.name not in names):
            path.unlink()
