"""What the report shows with pictures: sample pairs, retrieval right and wrong, captions beside their references.

Everything shown is drawn by a fixed rule, never picked by hand.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from blip_pipelines.evaluation.evidence import (
    Evidence,
    Pictures,
    Query,
    in_order,
    known_noise,
    parquet,
    read_captions,
    read_queries,
    subset_order,
)
from blip_pipelines.evaluation.page import Html, note, table, tag

SAMPLES = 24
EXAMPLES = 4  # right and wrong ones each, per subset and direction
TOP = 5
CAPTIONS = 12


def lot(*words: object) -> str:
    """A sort key that is a fixed draw: shuffles the same way on every run and machine."""
    return hashlib.sha256("\0".join(map(str, words)).encode()).hexdigest()


def samples(evidence: Evidence) -> Html:
    """Sample pairs of each origin; where the evaluator knows which captions were corrupted, those are marked."""
    data, pictures = parquet(evidence.pairs), evidence.pictures
    if data is None or not data.count_rows():
        return note("No pairs table yet: the ingestion stage writes it.")
    wrong = known_noise(evidence.noise)
    origins = data.to_table(["origin"]).column("origin").combine_chunks().to_numpy(zero_copy_only=False)
    names = [name for name in ("human", "web", "synthetic") if (origins == name).any()]
    each = SAMPLES // len(names)
    draw = np.random.default_rng(0)
    sheets: list[Html] = []
    for name in names:
        rows = np.flatnonzero(origins == name)
        chosen = np.sort(draw.choice(rows, min(each, len(rows)), replace=False))
        drawn = data.take(pa.array(chosen), columns=["key", "member", "caption"]).to_pylist()
        pictures.prepare(row["key"] for row in drawn)
        cards = []
        for row in drawn:
            kind = wrong.get((row["key"], row["caption"])) or wrong.get((row["member"], row["caption"]))
            mark = tag("span", f"\u2717 noise: {kind}", class_="mark") if kind else None
            cards.append(tag("figure", pictures.show(row["key"]), tag("figcaption", row["caption"], mark)))
        sheets += [tag("h3", f"{name.capitalize()} captions ({len(rows):,})"), tag("div", cards, class_="sheet")]
    known = " Captions marked \u2717 were corrupted on purpose: a side file knows, training never reads it."
    return tag("div", note("Drawn at random with a fixed seed.", known if wrong else None), sheets)


def retrieval(evidence: Evidence) -> Html:
    """Pictures asked for captions and captions asked for pictures, right and wrong."""
    parts: list[Html] = []
    for stage in in_order(evidence.predictions):
        queries = read_queries(evidence.predictions[stage])
        for subset in sorted({query.subset for query in queries}, key=subset_order):
            for way, title in (("i2t", "picture \u2192 captions"), ("t2i", "caption \u2192 pictures")):
                chosen = [query for query in queries if query.subset == subset and query.way == way]
                if chosen:
                    name = tag("summary", f"{stage}: {title}, {subset}")
                    body = retrieval_examples(chosen, evidence.pictures)
                    parts.append(tag("details", name, body, open="" if len(parts) < 2 else None))
    if not parts:
        return note("No retrieval predictions yet: the evaluation stage writes them.")
    reading = "Drawn by a fixed rule, half answered right, half wrong. \u2713 marks a match: an equal caption counts."
    return tag("div", note(reading), parts)


def retrieval_examples(queries: Sequence[Query], pictures: Pictures) -> Html:
    """Queries answered right and wrong, half each, with the five best answers and their scores."""
    right = sorted((q for q in queries if q.rank == 1), key=lambda q: lot(q.key, q.caption))[:EXAMPLES]
    wrong = sorted((q for q in queries if q.rank > TOP), key=lambda q: lot(q.key, q.caption))[:EXAMPLES]
    pictures.prepare(key for q in right + wrong for key in ([q.key] if q.way == "i2t" else q.keys[:TOP]))
    parts: list[Html] = []
    for title, chosen in (
        ("Right: the first answer is a match", right),
        (f"Wrong: no match among the first {TOP}", wrong),
    ):
        cards = (
            tag(
                "div",
                [image_card(q, pictures) if q.way == "i2t" else text_card(q, pictures) for q in chosen],
                class_="queries",
            )
            if chosen
            else note("None.")
        )
        parts += [tag("h4", title), cards]
    return tag("div", parts)


def image_card(query: Query, pictures: Pictures) -> Html:
    answers = [
        tag("li", tick(hit), tag("span", caption), score(query.scores[place]), class_="hit" if hit else None)
        for place, (caption, hit) in enumerate(zip(query.captions[:TOP], query.hits[:TOP], strict=True))
    ]
    truth = tag("p", tag("span", "reference ", class_="quiet"), query.caption, rank_words(query))
    return tag("div", pictures.show(query.key, query.caption), tag("div", truth, tag("ol", answers)), class_="query")


def text_card(query: Query, pictures: Pictures) -> Html:
    answers = [
        tag(
            "figure",
            pictures.show(query.keys[place], query.captions[place]),
            tag("figcaption", tick(hit), f" {query.scores[place]:.2f}"),
            class_="found" if hit else None,
            title=query.captions[place],
        )
        for place, hit in enumerate(query.hits[:TOP])
    ]
    asked = tag("p", "\u201c", query.caption, "\u201d", rank_words(query))
    return tag("div", asked, tag("div", answers, class_="strip"), class_="query words")


def tick(hit: bool) -> Html:
    return tag("span", "\u2713" if hit else "\u00b7", class_="tick", title="match" if hit else "no match")


def score(value: float) -> Html:
    return tag("span", f"{value:.2f}", class_="score")


def rank_words(query: Query) -> Html | None:
    return tag("span", f" \u2014 rank {query.rank:,}", class_="quiet") if query.rank > TOP else None


def captions(evidence: Evidence) -> Html:
    """Generated captions beside their references."""
    parts: list[Html] = []
    for stage in in_order(evidence.predictions):
        rows = read_captions(evidence.predictions[stage])
        for subset in sorted({row["subset"] for row in rows}, key=subset_order):
            body = caption_examples([row for row in rows if row["subset"] == subset], evidence.pictures)
            parts.append(tag("details", tag("summary", f"{stage}: {subset}"), body, open="" if not parts else None))
    if not parts:
        return note("No generated captions yet: the evaluation stage writes them.")
    reading = "An even walk from the best caption to the worst by CIDEr-D (1 is the papers' 100); exact ones in bold."
    return tag("div", note(reading), parts)


def caption_examples(rows: Sequence[dict], pictures: Pictures) -> Html:
    """Generated captions beside their references: an even walk from the best CIDEr-D to the worst."""
    ranked = sorted(rows, key=lambda row: (-row["cider"], lot(row["key"])))
    chosen = [ranked[place] for place in np.unique(np.linspace(0, len(ranked) - 1, CAPTIONS).round().astype(int))]
    pictures.prepare(row["key"] for row in chosen)
    has_baseline = any(row.get("baseline") for row in chosen)
    heads = ["", "generated", "reference", *(["nearest training caption"] if has_baseline else []), "CIDEr-D"]
    lines = []
    for row in chosen:
        same = row["generated"] == row["references"][0]
        generated = tag("b", row["generated"]) if same else row["generated"]
        baseline = [row.get("baseline") or "\u2013"] if has_baseline else []
        picture = pictures.show(row["key"], row["references"][0])
        lines.append([picture, generated, "; ".join(row["references"]), *baseline, f"{row['cider']:.2f}"])
    return table(heads, lines, texts=len(heads) - 1)
