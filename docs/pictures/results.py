"""Draw results.png out of a finished run: `python docs/pictures/results.py`. Pictures: Twemoji (CC-BY 4.0) alone.

Left, held-out pictures with what both models say of them; right, the measures before and after CapFilt.
"""

import json
import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq

from blip_pipelines.data.images import decode
from blip_pipelines.data.pairs import Pairs

mpl.use("Agg")
import matplotlib.pyplot as plt

DATA = Path("data")
BEFORE, AFTER = "med_pretraining", "med_bootstrapped"
SHOWN = 8
MEASURES = {
    "image to text R@5, image": "i2t_r5/image",
    "image to text R@5, combo": "i2t_r5/combo",
    "text to image R@5, image": "t2i_r5/image",
    "text to image R@5, combo": "t2i_r5/combo",
}


def main() -> None:
    pairs = Pairs.open(DATA / "03_primary/pairs", DATA / "02_intermediate/images").select(split="test", subset="combo")
    is_twemoji = np.array([member.startswith("twemoji") for member in pairs.column("member")])
    rows = np.flatnonzero(is_twemoji)[:: max(1, is_twemoji.sum() // SHOWN)][:SHOWN]
    written = {stage: captions_of(stage) for stage in (BEFORE, AFTER)}
    summary = json.loads((DATA / "08_reporting/summary.json").read_text("utf-8"))

    figure = plt.figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.1, 1))
    for axes, row in zip(left.subplots(2, SHOWN // 2).flat, rows, strict=True):
        axes.imshow(decode(pairs.image_bytes(int(row)), limits=None))
        axes.axis("off")
        key, truth = pairs.keys[row], pairs.captions(np.array([row]))[0]
        lines = {"": truth, "before: ": written[BEFORE][key], "after: ": written[AFTER][key]}
        text = "\n".join(textwrap.fill(name + caption, 27) for name, caption in lines.items())
        axes.set_title(text, y=-0.08, va="top", fontsize=7.5, loc="left")
    left.suptitle("Unseen combinations: the name, and what the models write before and after CapFilt", fontsize=10)

    axes = right.subplots()
    places = np.arange(len(MEASURES))
    for shift, stage, colour in ((0.2, BEFORE, "#b9c2cf"), (-0.2, AFTER, "#1f6fb2")):
        bars = axes.barh(
            places + shift,
            [100 * summary[f"{stage}/{key}"] for key in MEASURES.values()],
            0.38,
            color=colour,
            label=stage,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.set_yticks(places, list(MEASURES), fontsize=8)
    axes.set_xlim(0, 110)
    axes.set_xlabel("% on the test half")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 1.1), ncols=2, frameon=False)
    figure.savefig(Path(__file__).with_name("results.png"), dpi=110)


def captions_of(stage: str) -> dict[str, str]:
    """Image key to the caption by beam search."""
    table = pq.read_table(
        DATA / "07_model_output" / stage / "predictions_captions.parquet", columns=["key", "generated"]
    )
    return dict(zip(*(table[name].to_pylist() for name in ("key", "generated")), strict=True))


if __name__ == "__main__":
    main()
