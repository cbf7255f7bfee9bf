"""Where the queries of a Q-Former look: their attention to image tokens, drawn over a few held-out pictures.

Shapes: C layers that look at the image, Q queries, N image tokens, G cells a side of the image's grid.
"""

import base64
import io
import math

import numpy as np
from PIL import Image

from blip_pipelines.evaluation.evidence import Evidence, Pictures, in_order, parquet, read_captions, subset_order
from blip_pipelines.evaluation.page import Html, note, table, tag
from blip_pipelines.evaluation.predictions import ATTENTION

SHOWN = 4  # queries, those that differ most
MASK = 96  # pixels a side; a page has a few dozen of them


def attention(evidence: Evidence) -> Html:
    """A row a picture: itself, what all queries together look at, and single queries, with the caption it got."""
    parts: list[Html] = []
    for stage in in_order(evidence.predictions):
        data = parquet(evidence.predictions[stage] / ATTENTION)
        if data is None:
            continue
        rows = sorted(data.to_table().to_pylist(), key=lambda row: subset_order(row["subset"]))
        evidence.pictures.prepare(row["key"] for row in rows)
        said = {(row["subset"], row["key"]): row for row in read_captions(evidence.predictions[stage])}
        lines = []
        for row in rows:
            caption = said.get((row["subset"], row["key"]))
            weights_QN = last_layer(row)
            apart = most_different(weights_QN)
            maps = [overlay(evidence.pictures, row["key"], weights_QN[query]) for query in apart]
            together = overlay(evidence.pictures, row["key"], weights_QN.mean(0))
            words = [tag("b", caption["generated"]), tag("p", "; ".join(caption["references"]))] if caption else ""
            whole = f"{weights_QN[:, : outside(weights_QN.shape[1])].sum(1).mean():.0%}"
            lines.append([evidence.pictures.show(row["key"]), words, together, tag("div", maps, class_="maps"), whole])
        if lines:
            heads = ["", "caption, and its reference", "all queries", f"the {SHOWN} that differ most", "on no place"]
            parts += [tag("h3", stage), table(heads, lines, texts=4)]
    if not parts:
        return note("No attention maps yet: the evaluation of a Q-Former writes them.")
    reading = (
        "Bright is where the queries look: softmax weights of the last layer that reads the image, mean over heads. "
        "What goes to tokens that stand for the whole picture, such as the class token, is on no place. "
        "Pictures are drawn by lot."
    )
    return tag("div", note(reading), parts)


def last_layer(row: dict) -> np.ndarray:
    """(Q, N) of a row of the table."""
    return np.array(row["weights"]).reshape(row["layers"], row["queries"], row["tokens"])[-1]


def outside(tokens: int) -> int:
    """How many of N image tokens come before the grid: class and register tokens."""
    return tokens - math.isqrt(tokens) ** 2


def most_different(weights_QN: np.ndarray, count: int = SHOWN) -> list[int]:
    """Queries, the sharpest first, then each time the one that is farthest from those before."""
    chosen = [int((weights_QN**2).sum(1).argmax())]
    while len(chosen) < min(count, len(weights_QN)):
        distance_QK = np.abs(weights_QN[:, None] - weights_QN[chosen]).sum(2)
        distance_QK[chosen] = -1
        chosen.append(int(distance_QK.min(1).argmax()))
    return chosen


def overlay(pictures: Pictures, key: str, weights_N: np.ndarray) -> Html:
    """The picture, dark where nothing looks; relative to the cell that is looked at most."""
    before = outside(len(weights_N))
    side = math.isqrt(len(weights_N))
    cells_GG = weights_N[before:].reshape(side, side)
    shade = 1 - cells_GG / max(cells_GG.max(), 1e-12)
    alpha = Image.fromarray((shade * 216).astype(np.uint8)).resize((MASK, MASK), Image.Resampling.BILINEAR)
    mask = Image.merge("LA", (Image.new("L", alpha.size, 0), alpha))
    written = io.BytesIO()
    mask.save(written, "WEBP", quality=60, method=4)
    source = "data:image/webp;base64," + base64.b64encode(written.getvalue()).decode()
    return tag("span", pictures.show(key), tag("img", src=source, alt=""), class_="seen")
