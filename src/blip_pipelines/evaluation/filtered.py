"""What the report shows of CapFilt: what was kept and dropped and why, and whether the model after it is better."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from blip_pipelines.data.shift import keep_rates
from blip_pipelines.evaluation.evidence import Evidence, in_order, known_noise, parquet, subset_order
from blip_pipelines.evaluation.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, figure
from blip_pipelines.evaluation.page import Html, is_number, note, percent, plain, table, tag

EACH = 8  # pictures of a sheet
SHOWN = ["key", "caption", "origin", "match_probability", "reason"]
BINS = 25
COMPARED = {"cider": "CIDEr-D", "i2t_r1": "i2t R@1", "i2t_r5": "i2t R@5", "t2i_r1": "t2i R@1", "t2i_r5": "t2i R@5"}
MEASURES = {
    "filter_roc_auc": "ROC-AUC of the match probability, right against wrong web captions",
    "filter_roc_auc_swap": "the same against captions of other pictures, the hard kind",
    "filter_precision": "of the dropped web captions, wrong",
    "filter_recall": "of the wrong web captions, dropped",
    "web_purity_before": "of all web captions, right",
    "web_purity_after": "of the kept web captions, right",
    "synthetic_exact": "of the synthetic captions, right word for word",
    "synthetic_token_f1": "words that synthetic captions share with the truth (F1)",
    "synthetic_exact_passed": "of those that passed the filter, right word for word",
    "synthetic_token_f1_passed": "words that those share with the truth (F1)",
    "vocabulary_shift": "shift of the vocabulary, in bits",
    "length_shift": "shift of the words per caption",
}
OVER = re.compile(r"^(?P<stage>\w+)/(?P<metric>\w+)_over_(?P<base>\w+?)_low/(?P<subset>.+)$")


def filtered(evidence: Evidence) -> Html:
    """Each round: counts, scores, measures against the known noise, sheets of pictures; then before against after."""
    parts: list[Html] = []
    for stage in in_order(evidence.decided):
        data = parquet(evidence.decided[stage])
        if data is not None and data.count_rows():
            parts += _round(stage, data, evidence)
    measured = _measured(evidence)
    if measured:
        parts += [tag("h3", "Against the known noise"), measured]
    if better := _better(evidence):
        parts += [tag("h3", "After CapFilt against before"), better]
    return tag("div", parts) if parts else note("No captions were written or filtered by this run.")


def _round(stage: str, data: ds.Dataset, evidence: Evidence) -> list[Html]:
    numbers = data.to_table(["origin", "kept", "match_probability"])
    kept, origins = (numbers[name].to_numpy() for name in ("kept", "origin"))
    thresholds = _thresholds(evidence.stages.get(stage, {}))
    draw, wrong, sheets, charts = np.random.default_rng(0), known_noise(evidence.noise), [], []
    for origin in ("web", "synthetic"):
        of_origin = origins == origin
        if not of_origin.any():
            continue
        scores = numbers["match_probability"].to_numpy()[of_origin]
        charts.append(histogram(f"Match probability of {origin} captions", scores, thresholds.get(origin)))
        for stays, word in ((True, "kept"), (False, "dropped")):
            rows = np.flatnonzero(of_origin & (kept == stays))
            title = f"{origin.capitalize()} captions that were {word} ({len(rows):,})"
            chosen = np.sort(draw.choice(rows, min(EACH, len(rows)), replace=False))
            sheets += [
                tag("h4", title),
                _sheet(data.take(pa.array(chosen), columns=SHOWN).to_pylist(), wrong, evidence),
            ]
    known = " Captions marked \u2717 were corrupted on purpose: a side file knows, training never reads it."
    lead = note("Drawn at random with a fixed seed; the number is the match probability.", known if wrong else None)
    rates = [
        (row["origin"], row["source"], f"{row['judged']:,}", f"{row['kept']:,}", percent(row["keep_rate"]))
        for row in keep_rates(evidence.decided[stage]).to_pylist()
    ]
    counts = table(["captions", "source", "judged", "kept", "share"], rates, texts=2)
    return [tag("h3", stage), counts, tag("div", charts, class_="figures"), lead, *sheets]


def _sheet(rows: Sequence[dict[str, Any]], wrong: Mapping[tuple[str, str], str], evidence: Evidence) -> Html:
    evidence.pictures.prepare(row["key"] for row in rows)
    cards = []
    for row in rows:
        kind = wrong.get((row["key"], row["caption"])) if row["origin"] == "web" else None
        mark = tag("span", f"\u2717 noise: {kind}", class_="mark") if kind else None
        score = tag("span", f" {row['match_probability']:.2f}, {row['reason']}", class_="quiet")
        cards.append(
            tag(
                "figure", evidence.pictures.show(row["key"]), tag("figcaption", row["caption"] or "\u2013", score, mark)
            )
        )
    return tag("div", cards, class_="sheet")


def _thresholds(record: Mapping[str, Any]) -> dict[str, float]:
    """By origin, where the round's rule was one of thresholds."""
    rule = ((record.get("facts") or {}).get("compose") or {}).get("rule") or {}
    if rule.get("kind") != "threshold":
        return {}
    return {origin: rule[f"{origin}_threshold"] for origin in ("web", "synthetic")}


def histogram(title: str, values: np.ndarray, threshold: float | None) -> Html:
    """Shares of the values from 0 to 1, with the threshold drawn; what lies above it is kept."""
    counts, edges = np.histogram(values, bins=BINS, range=(0, 1))
    tallest, room, floor = max(counts.max(), 1), WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM
    parts: list[Html] = []
    for count, start in zip(counts.tolist(), edges[:-1].tolist(), strict=True):
        height = (floor - TOP) * count / tallest
        is_kept = threshold is None or start + 0.5 / BINS > threshold
        place = {"x": f"{LEFT + start * room:.1f}", "y": f"{floor - height:.1f}"}
        size = {"width": f"{room / BINS - 1:.1f}", "height": f"{height:.1f}"}
        parts.append(tag("rect", **place, **size, class_="f0" if is_kept else "f1"))
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(tag("text", f"{value:g}", x=f"{LEFT + value * room:.1f}", y=floor + 17, text_anchor="middle"))
    parts.append(tag("text", f"{tallest:,}", x=LEFT - 6, y=TOP + 4, text_anchor="end"))
    parts.append(tag("text", "match probability", x=f"{LEFT + room / 2:.0f}", y=HEIGHT - 4, text_anchor="middle"))
    if threshold is not None:
        x = f"{LEFT + threshold * room:.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=floor, class_="line c3"))
        parts.append(tag("text", f"kept above {threshold:g}", x=x, y=TOP + 2, dx=5, class_="f3"))
    spoken = f"{title}: {len(values):,} captions" + (f", kept above {threshold:g}" if threshold is not None else "")
    return figure(title, parts, WIDTH, HEIGHT, spoken)


def _measured(evidence: Evidence) -> Html | None:
    """The rounds' measures beside one another."""
    stages = in_order(evidence.decided)
    rows = []
    for name, words in MEASURES.items():
        values = [evidence.metrics.get(f"{stage}/{name}") for stage in stages]
        if any(is_number(value) for value in values):
            rows.append([words, *(plain(value) for value in values)])
    return table(["", *stages], rows) if rows else None


def _better(evidence: Evidence) -> Html | None:
    """Differences of the later models over the first on the test samples, with their intervals."""
    rows: list[Sequence[object]] = []
    found = [match for match in map(OVER.match, evidence.metrics) if match and match["metric"] in COMPARED]
    for match in sorted(found, key=lambda match: (match["stage"], subset_order(match["subset"]), match["metric"])):
        stage, metric, base, subset = match.groups()
        over = f"{stage}/{metric}_over_{base}"
        low, high = (evidence.metrics[f"{over}_{end}/{subset}"] for end in ("low", "high"))
        write = plain if metric == "cider" else percent
        rows.append(
            [
                stage,
                subset,
                COMPARED[metric],
                write(evidence.metrics.get(f"{base}/{metric}/{subset}")),
                write(evidence.metrics.get(f"{stage}/{metric}/{subset}")),
                f"{low:+.3f} to {high:+.3f}",
                "better" if low > 0 else "worse" if high < 0 else "not told apart",
            ]
        )
    heads = ["model", "subset", "measure", "before", "after", "difference, 95 %", ""]
    lead = note("Paired bootstrap over the same test samples; better means that the whole interval is above 0.")
    return tag("div", lead, table(heads, rows, texts=3)) if rows else None
