"""What a CapFilt round did to the text of a corpus, in small tables for contracts and report.

A captioner that says the same of every image, or a filter that lets only short captions through, breaks no rule about
rows: it shows in the length and the vocabulary of the whole. Shards are read one by one; what stays in memory is one
count a distinct word.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_pipelines.data import storage
from blip_pipelines.data.composition import RuleConfig
from blip_pipelines.data.storage import MANIFEST


@dataclass(frozen=True)
class _Text:
    """Training captions of a corpus."""

    captions: int
    words: dict[str, int]

    @property
    def words_per_caption(self) -> float:
        return sum(self.words.values()) / max(self.captions, 1)


def summarise_round(before: Path, decided: Path, after: Path, rule: RuleConfig) -> pa.Table:
    """One row about a CapFilt round, for its contracts.

    Args:
        before, after: the corpora; decided: the captions that were judged for `after`.

    Returns:
        `web_keep_rate` and `synthetic_keep_rate`, null where there was nothing to keep or the rule wants none;
        `captions_*`, `words_per_caption_*`, `vocabulary_*` (distinct words) of the training captions, each `_before`
        and `_after`; `length_shift`, the change of the words per caption relative to before; `vocabulary_shift`, the
        Jensen-Shannon divergence of the distributions of words in bits: 0 for the same words as often, 1 for no word
        in common.
    """
    old, new = _read(before), _read(after)
    found: dict[str, float | None] = {}
    for origin, wanted in (("web", rule.web), ("synthetic", rule.synthetic)):
        rows = [row for row in keep_rates(decided).to_pylist() if row["origin"] == origin]
        judged = sum(row["judged"] for row in rows)
        found[f"{origin}_keep_rate"] = sum(row["kept"] for row in rows) / judged if judged and wanted else None
    for when, text in (("before", old), ("after", new)):
        found[f"captions_{when}"] = float(text.captions)
        found[f"words_per_caption_{when}"] = text.words_per_caption
        found[f"vocabulary_{when}"] = float(len(text.words))
    shift = abs(new.words_per_caption / old.words_per_caption - 1) if old.words_per_caption else 0.0
    found |= {"length_shift": shift, "vocabulary_shift": _divergence(old.words, new.words)}
    return pa.table({name: pa.array([value], pa.float64()) for name, value in found.items()})


def keep_rates(decided: Path) -> pa.Table:
    """A row for each origin and source: judged, kept and their ratio `keep_rate`."""
    names = [entry["name"] for entry in storage.read_json(decided / MANIFEST)["shards"]]
    parts = [pq.read_table(decided / name, columns=["origin", "source", "kept"]) for name in names]
    rows = pa.concat_tables([part.set_column(2, "kept", part["kept"].cast(pa.int64())) for part in parts])
    found = rows.group_by(["origin", "source"]).aggregate([("kept", "count"), ("kept", "sum")])
    found = found.rename_columns(["origin", "source", "judged", "kept"])
    rate = pc.divide(found["kept"].cast(pa.float64()), found["judged"])
    return found.append_column("keep_rate", rate).sort_by([("origin", "ascending"), ("source", "ascending")])


def _read(pairs: Path) -> _Text:
    captions, counts = 0, [(pa.array([], pa.string()), pa.array([], pa.int64()))]
    for entry in storage.read_json(pairs / MANIFEST)["shards"]:
        rows = pq.read_table(pairs / entry["name"], columns=["caption"], filters=pc.field("split") == "train")
        captions += len(rows)
        words = pc.list_flatten(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(rows["caption"]))))
        found = words.value_counts()
        counts.append((found.field("values"), found.field("counts")))
    table = pa.table(
        {
            "word": pa.chunked_array([values for values, _ in counts], pa.string()),
            "count": pa.chunked_array([count for _, count in counts], pa.int64()),
        }
    )
    summed = table.group_by("word").aggregate([("count", "sum")])
    total = dict(zip(summed["word"].to_pylist(), summed["count_sum"].to_pylist(), strict=True))
    total.pop("", None)
    return _Text(captions, total)


def _divergence(one: dict[str, int], other: dict[str, int]) -> float:
    words = sorted({*one, *other})
    if not one or not other:
        return float(bool(words))
    p_V, q_V = (np.array([text.get(word, 0) for word in words], np.float64) for text in (one, other))
    p_V, q_V = p_V / p_V.sum(), q_V / q_V.sum()
    mean_V = (p_V + q_V) / 2
    parts = [part_V[part_V > 0] * np.log2(part_V[part_V > 0] / mean_V[part_V > 0]) for part_V in (p_V, q_V)]
    return float(sum(part.sum() for part in parts) / 2)
