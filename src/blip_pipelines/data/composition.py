"""CapFilt's last step: from judged captions to the next corpus (BLIP 3.3).

Human captions stay as they are; web and synthetic ones are kept or dropped by the filter's match probability. The
decision is apart from the judging, so another threshold composes anew without scoring a single pair again. Images are
not touched: the corpus is a table over the same ones. All goes shard by shard, so memory stays flat.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip_pipelines.config import ConfigError
from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.table_shards import read_shard

REPEATS = "repeats a kept caption of its image"  # the reason of a caption that is dropped though it passed


@dataclass(frozen=True)
class RuleConfig:
    """Which judged captions stay. Arms of the ablation are rules too: "captioner only" is `filter_web: false`.

    Args:
        kind: "threshold" is BLIP's rule: web and synthetic captions are judged independently, each kept if its match
            probability is above the threshold (0.5 is the argmax of the ITM head). "top_k" is BLIP-2's (3.4): all
            captions of an image, web and synthetic, are ranked by match probability and the best `top_k` stay.
        drop_repeats: drop a synthetic caption that only repeats a kept one of its image.
        web, synthetic: whether captions of that origin are wanted at all.
        filter_web, filter_synthetic: whether captions of that origin must pass the rule.
    """

    kind: Literal["threshold", "top_k"] = "threshold"
    web_threshold: float = 0.5
    synthetic_threshold: float = 0.5
    top_k: int = 2
    drop_repeats: bool = True
    web: bool = True
    synthetic: bool = True
    filter_web: bool = True
    filter_synthetic: bool = True

    def __post_init__(self) -> None:
        for name in ("web_threshold", "synthetic_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rule.{name}: {getattr(self, name)} is no probability; give a number from 0 to 1")
        if self.top_k < 1:
            raise ConfigError(f"rule.top_k: {self.top_k}; keep at least one caption an image")


def decide(judged: pa.Table, rule: RuleConfig) -> tuple[np.ndarray, list[str]]:
    """Which captions stay, each looked at for itself or beside those of its image, and why.

    Args:
        judged: `PAIR_SCHEMA` rows of origin web or synthetic with `match_probability`; of an image all or none.

    Returns:
        (rows,) bool, and a reason for each row.

    Raises:
        StorageError: a row was not judged.
    """
    origin, captions = judged["origin"].to_pylist(), judged["caption"].to_pylist()
    probability = judged["match_probability"].to_numpy(zero_copy_only=False)
    if np.isnan(probability).any():
        row = int(np.flatnonzero(np.isnan(probability))[0])
        raise StorageError(f"judged row {row} ({judged['member'][row]}) has no match probability; run the filter again")
    is_web = np.array([kind == "web" for kind in origin], dtype=bool)
    is_wanted = np.where(is_web, rule.web, rule.synthetic)
    is_filtered = np.where(is_web, rule.filter_web, rule.filter_synthetic)
    is_empty = np.array([not caption.strip() for caption in captions], dtype=bool)
    if rule.kind == "threshold":
        threshold = np.where(is_web, rule.web_threshold, rule.synthetic_threshold)
        is_good = probability > threshold
        reasons = [
            f"{'above' if good else 'not above'} {limit:g}" for good, limit in zip(is_good, threshold, strict=True)
        ]
    else:
        rank = _ranks(judged["key"].to_pylist(), np.where(is_wanted & ~is_empty, probability, -1))
        is_good = rank < rule.top_k
        reasons = [
            f"rank {place + 1}, {'within' if place < rule.top_k else 'past'} the best {rule.top_k}" for place in rank
        ]
    for row in np.flatnonzero(~is_filtered).tolist():
        reasons[row] = "not filtered"
    for row in np.flatnonzero(is_empty).tolist():
        reasons[row] = "no words"
    for row in np.flatnonzero(~is_wanted).tolist():
        reasons[row] = f"{origin[row]} captions are left out"
    return is_wanted & ~is_empty & (is_good | ~is_filtered), reasons


def compose(
    pairs: Path, judged: Path, rule: RuleConfig, round_number: int, corpus: Path, decided: Path
) -> dict[str, Any]:
    """Write the next corpus: human + kept web + kept synthetic captions; evaluation rows pass unchanged.

    Args:
        pairs: the caption table whose web captions were judged.
        judged: table of judged web and synthetic captions, a shard for each of `pairs`.
        corpus: gets the new caption table.
        decided: gets a table of every judged caption with `kept`, `reason` and `round`.

    Returns:
        Rows by what became of them: "unchanged", and "web_kept", "web_dropped", "synthetic_kept", "synthetic_dropped".

    Raises:
        StorageError: a table is damaged, the judged captions are not those of the pairs, or rows would be lost.
    """
    before, candidates = Pairs.open(pairs).manifest, Pairs.open(judged).manifest
    names = [entry["name"] for entry in before["shards"]]
    if names != [entry["name"] for entry in candidates["shards"]]:
        raise StorageError(f"{judged}: has other shards than {pairs}; run writing and judging again")
    counts: Counter[str] = Counter()

    def decide_named(name: str) -> pa.Table:
        return decide_shard(_rows(pairs / name), _rows(judged / name), rule, round_number)

    def compose_named(name: str) -> pa.Table:
        table, found = _rows(pairs / name), _rows(decided / name)
        counts.update(_counts(table, found))
        return compose_shard(table, found)

    about = {"round": round_number}
    write_pairs(decided, map(decide_named, names), before["images"], about)
    write_pairs(corpus, map(compose_named, names), before["images"], about)
    return dict(counts)


def decide_shard(table: pa.Table, judged: pa.Table, rule: RuleConfig, round_number: int) -> pa.Table:
    """The judged rows of one shard with `kept`, `reason` and `round` filled in.

    Raises:
        StorageError: they are not those of the table.
    """
    if _texts(table.filter(_is_judged(table))) != _texts(judged.filter(pc.not_equal(judged["origin"], "synthetic"))):
        raise StorageError("judged web captions are not those of the caption table; run writing and judging again")
    kept, reasons = decide(judged, rule)
    if rule.drop_repeats:
        _drop_repeats(table.filter(pc.invert(_is_judged(table))), judged, kept, reasons)
    return fill(judged, kept=kept, reason=reasons, round=[round_number] * len(judged))


def compose_shard(table: pa.Table, decided: pa.Table) -> pa.Table:
    """One shard of the corpus: rows of the table in their order, each image's synthetic captions behind its last one.

    Raises:
        StorageError: rows would be lost.
    """
    kept = decided.filter(decided["kept"])
    is_synthetic = pc.equal(kept["origin"], "synthetic")
    synthetic, web = kept.filter(is_synthetic), kept.filter(pc.invert(is_synthetic))
    is_judged = _is_judged(table).to_numpy(zero_copy_only=False)
    is_web = pc.not_equal(decided["origin"], "synthetic")
    is_web_kept = decided["kept"].filter(is_web).to_numpy(zero_copy_only=False)
    keys = table["key"].to_pylist()
    last_row = dict(zip(keys, range(len(keys)), strict=True))
    unknown = next((key for key in synthetic["key"].to_pylist() if key not in last_row), None)
    if is_judged.sum() != len(is_web_kept) or unknown:
        what = f"image {unknown} is not in the caption table" if unknown else f"{len(is_web_kept)} web captions decided"
        raise StorageError(f"{what}, of {is_judged.sum()} there; rows would be lost: run writing and judging again")
    place = np.concatenate(
        [
            np.flatnonzero(~is_judged),
            np.flatnonzero(is_judged)[is_web_kept],
            np.array([last_row[key] + 0.5 for key in synthetic["key"].to_pylist()]),
        ]
    )
    parts = pa.concat_tables([table.filter(pa.array(~is_judged)), web, synthetic])
    return parts.take(pa.array(np.argsort(place, kind="stable")))


def fill(table: pa.Table, **columns: Any) -> pa.Table:
    """The `PAIR_SCHEMA` rows with other values in some columns."""
    for name, values in columns.items():
        column = PAIR_SCHEMA.field(name)
        table = table.set_column(PAIR_SCHEMA.get_field_index(name), column, pa.array(values, column.type))
    return table


def _rows(path: Path) -> pa.Table:
    return read_shard(path, PAIR_SCHEMA)


def _is_judged(table: pa.Table) -> pa.ChunkedArray:
    """Rows of a caption table that the filter looks at: what the web said of training images."""
    return pc.and_(pc.equal(table["origin"], "web"), pc.equal(table["split"], "train"))


def _counts(table: pa.Table, decided: pa.Table) -> Counter[str]:
    counts = Counter({"unchanged": pc.sum(pc.invert(_is_judged(table))).as_py() or 0})
    for origin, stays in zip(decided["origin"].to_pylist(), decided["kept"].to_pylist(), strict=True):
        counts[f"{origin}_{'kept' if stays else 'dropped'}"] += 1
    return counts


def _ranks(keys: list[str], probability: np.ndarray) -> np.ndarray:
    """Place of each caption among those of its image, best first; equal ones in table order."""
    _, group = np.unique(np.array(keys, dtype=object), return_inverse=True)
    order = np.lexsort((np.arange(len(group)), -probability, group))
    sorted_group = group[order]
    starts = np.flatnonzero(np.r_[True, sorted_group[1:] != sorted_group[:-1]]) if len(group) else np.array([], int)
    first = np.repeat(starts, np.diff(np.r_[starts, len(group)]))
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - first
    return rank


def _drop_repeats(unchanged: pa.Table, judged: pa.Table, kept: np.ndarray, reasons: list[str]) -> None:
    """In place. A web caption is never dropped for a synthetic one."""
    is_synthetic = np.array([origin == "synthetic" for origin in judged["origin"].to_pylist()], dtype=bool)
    texts = _texts(judged)
    seen = {*_texts(unchanged), *(texts[row] for row in np.flatnonzero(kept & ~is_synthetic))}
    for row in np.flatnonzero(kept & is_synthetic).tolist():
        if texts[row] in seen:
            kept[row], reasons[row] = False, REPEATS
        seen.add(texts[row])


def _texts(table: pa.Table) -> list[tuple[str, str]]:
    """(image key, caption but for case and spaces) of each row."""
    keys, captions = table["key"].to_pylist(), table["caption"].to_pylist()
    return [(key, " ".join(caption.lower().split())) for key, caption in zip(keys, captions, strict=True)]
