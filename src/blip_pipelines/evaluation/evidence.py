"""What the report looks at: the files and records that the stages of a run left, any of which may be missing.

Tables are scanned for the rows that are shown, so memory stays flat in the size of the data set.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as ds

from blip_pipelines.data.shards import read_image
from blip_pipelines.evaluation.figures import thumbnail
from blip_pipelines.evaluation.page import Html, is_number, tag

STAGES = (
    "ingestion",
    "med_pretraining",
    "capfilt",
    "med_bootstrapped",
    "instructions",
    "question_answering",
    "blip2_stage1",
    "blip2_stage2",
    "instruct_tuning",
    "evaluation",
    "release",
)


class Pictures:
    """Thumbnails by image key, read with one seek each."""

    def __init__(self, pairs: Path, images: Path):
        self.images = images
        self.table = parquet(pairs)
        self.known: dict[str, str | None] = {}

    def prepare(self, keys: Iterable[str]) -> None:
        """Read the pictures of `keys` with one scan of the pairs table; an unreadable one stays unknown."""
        wanted = sorted(set(keys) - set(self.known))
        self.known.update(dict.fromkeys(wanted))
        if not wanted or self.table is None:
            return
        is_wanted = pc.field("key").isin(wanted)
        for row in self.table.to_table(["key", "shard", "offset", "size"], filter=is_wanted).to_pylist():
            if self.known[row["key"]] is None:
                self.known[row["key"]] = self._read(row["shard"], row["offset"], row["size"])

    def show(self, key: str, words: str = "") -> Html:
        """The picture as an `img`, or a line where there is none to read."""
        self.prepare([key])
        source = self.known[key]
        return (
            tag("img", src=source, alt=words, loading="lazy") if source else tag("span", "(no picture)", class_="note")
        )

    def _read(self, shard: int, offset: int, size: int) -> str | None:
        try:
            return thumbnail(read_image(self.images, shard, offset, size))
        except OSError:
            return None


@dataclass(frozen=True)
class Evidence:
    """All that the page shows; anything may be missing or empty.

    Attributes:
        stages: run record by stage: `seconds`, and where known `samples_per_second`, `data_wait_share`, `mfu`,
            `peak_memory_bytes`, `reused`; also looked for in its `speed` and `facts`.
        metrics: flat numbers `stage/metric/subset`.
        pairs, images, quarantine: the data set; `quarantine` a parquet file.
        history: rows {"step": int, name: value} by stage.
        predictions: by stage, the folder with `predictions_retrieval.parquet` and `predictions_captions.parquet`.
        credits: a sentence for each work that is shown or built on; addresses in it become links.
        registered: dicts `name`, `version`, `alias`, `stage`.
        decisions: of the gate about them: `name`, `promoted`, `refused`, `champion`, `rulings`.
        noise: the evaluator's side file; only with it are corrupted samples marked.
        contracts: a row for each rule: `rule`, `severity`, `passed`, `checked`, `failed`.
        docs: address of the Data Docs, relative to the page; `write_report` sets it.
        decided: by round of CapFilt, the folder of its judged captions.
        ablations: what `evaluation.ablation.collect` found.
        answers: by stage, the folder with `predictions_answers.parquet`.
    """

    stages: Mapping[str, dict]
    metrics: Mapping[str, float]
    pairs: Path
    images: Path
    quarantine: Path
    history: Mapping[str, Sequence[dict]]
    predictions: Mapping[str, Path]
    credits: Sequence[str]
    registered: Sequence[dict]
    decisions: Sequence[dict] = ()
    noise: Path | None = None
    contracts: Sequence[dict] = ()
    docs: str | None = None
    decided: Mapping[str, Path] = field(default_factory=dict)
    ablations: Mapping[str, Any] | None = None
    answers: Mapping[str, Path] = field(default_factory=dict)
    pictures: Pictures = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", Pictures(self.pairs, self.images))


@dataclass(frozen=True)
class Query:
    """One retrieval query with what came back, best first."""

    way: str  # i2t: an image asks, captions answer; t2i: the reverse
    subset: str
    key: str  # the image asked with, or the image that belongs to the text asked with
    caption: str  # the text asked with, or the reference of the image asked with
    keys: Sequence[str]
    captions: Sequence[str]
    scores: Sequence[float]
    rank: int  # of the first right answer, from 1
    hits: Sequence[bool]  # of what came back: a match or not


def read_queries(folder: Path) -> list[Query]:
    """The stage's retrieval queries; none where nothing was predicted."""
    data = parquet(folder / "predictions_retrieval.parquet")
    if data is None:
        return []
    return [
        Query(
            way=row["direction"],
            subset=row["subset"],
            key=row["key"],
            caption=row["caption"],
            keys=row["top_keys"],
            captions=row["top_captions"],
            scores=row["top_scores"],
            rank=row["rank"],
            hits=[
                caption == row["caption"] or key == row["key"]
                for caption, key in zip(row["top_captions"], row["top_keys"], strict=True)
            ],
        )
        for row in data.to_table().to_pylist()
    ]


def read_captions(folder: Path) -> list[dict]:
    """The stage's generated captions: subset, key, generated, references, cider, baseline."""
    data = parquet(folder / "predictions_captions.parquet")
    return [] if data is None else data.to_table().to_pylist()


def known_noise(noise: Path | None) -> dict[tuple[str, str], str]:
    """(member or key, caption) -> kind of corruption, from the evaluator's side file."""
    data = parquet(noise) if noise else None
    if data is None:
        return {}
    name = "key" if "key" in data.schema.names else "member"
    rows = data.to_table([name, "caption", "kind"]).to_pylist()
    return {(row[name], row["caption"]): row["kind"] for row in rows if row["kind"] not in (None, "", "clean")}


def parquet(path: Path) -> "ds.Dataset | None":
    """The parquet file, or the folder's parquet shards, as one data set; None where there is none."""
    files = [path] if path.is_file() else sorted(path.glob("*.parquet")) if path.is_dir() else []
    return ds.dataset([str(file) for file in files], format="parquet") if files else None


def in_order(names: Iterable[str]) -> list[str]:
    """Stages in the order of the design; further rounds (`capfilt_2`) follow their first, unknown ones come last."""
    place = {name: index for index, name in enumerate(STAGES)}

    def order(name: str) -> tuple[int, str]:
        base, _, number = name.rpartition("_")
        return place.get(base if number.isdigit() and name not in place else name, len(STAGES)), name

    return sorted(names, key=order)


def stages_with(evidence: Evidence, metric: str) -> list[str]:
    stages = {key.split("/")[0] for key in evidence.metrics if key.count("/") == 2 and key.split("/")[1] == metric}
    return in_order(stage for stage in stages if subsets(evidence, stage, metric))


def subsets(evidence: Evidence, stage: str, metric: str) -> list[str]:
    """Subsets for which the stage has the metric, the known ones first."""
    start = f"{stage}/{metric}/"
    names = [
        key.removeprefix(start) for key, value in evidence.metrics.items() if key.startswith(start) and is_number(value)
    ]
    return sorted(names, key=subset_order)


def subset_order(subset: str) -> tuple[int, str]:
    known = ["image", "combo", "concept"]
    return (known.index(subset) if subset in known else len(known)), subset


def series(rows: Sequence[dict], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if is_number(row.get(name))]


def fact(record: Mapping[str, Any], name: str) -> Any:
    """A value of a run record, or of the facts that its job left."""
    return record.get(name, (record.get("facts") or {}).get(name))
