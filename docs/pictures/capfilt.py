"""Draw capfilt.png out of a finished run: `python docs/pictures/capfilt.py`. Pictures: Twemoji (CC-BY 4.0) alone.

Above, web and synthetic captions that were kept and dropped, with their match probability; below, all probabilities by
what is known of the captions.
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
SHOWN = 7
RIGHT, WRONG = "#1f6fb2", "#c4560a"


def main() -> None:
    decided = Pairs.open(DATA / "07_model_output/capfilt/decided", DATA / "02_intermediate/images")
    noise = pq.read_table(DATA / "03_primary/noise.parquet").to_pylist()
    kinds = {(row["key"], row["caption"]): row["kind"] for row in noise}
    truths = {row["key"]: row["truth"] for row in noise}
    origin, kept, probability = (decided.column(name) for name in ("origin", "kept", "match_probability"))
    captions, keys = decided.captions(np.arange(len(decided))), decided.keys
    is_right = np.array(
        [
            caption == truths.get(key) if source == "synthetic" else kinds.get((key, caption)) == "clean"
            for source, key, caption in zip(origin, keys, captions, strict=True)
        ]
    )
    is_twemoji = np.array([member.startswith("twemoji") for member in decided.column("member")])

    figure = plt.figure(figsize=(11, 10.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.6, 1))
    draw = np.random.default_rng(1)
    rows_of_axes = above.subplots(4, SHOWN)
    for line, (source, stays) in enumerate((s, k) for s in ("web", "synthetic") for k in (True, False)):
        rows = np.flatnonzero((origin == source) & (kept.astype(bool) == stays) & is_twemoji)
        chosen = draw.choice(rows, SHOWN, replace=False)
        for axes, row in zip(rows_of_axes[line], chosen, strict=True):
            axes.imshow(decode(decided.image_bytes(int(row)), limits=None))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            text = textwrap.fill(f"{captions[row]} ({probability[row]:.2f})", 22)
            axes.set_xlabel(text, fontsize=7, color="black" if is_right[row] else WRONG)
        rows_of_axes[line][0].set_ylabel(f"{source},\n{'kept' if stays else 'dropped'}", fontsize=9)
    above.suptitle("Captions that CapFilt kept and dropped, drawn at random; in red those that are wrong", fontsize=10)

    rule = json.loads((DATA / "08_reporting/runs/capfilt.json").read_text("utf-8"))["facts"]["compose"]["rule"]
    for axes, source in zip(below.subplots(1, 2), ("web", "synthetic"), strict=True):
        of_source = origin == source
        values = [probability[of_source & right] for right in (is_right, ~is_right)]
        words = ("right", "wrong") if source == "web" else ("word for word", "not")
        axes.hist(values, np.linspace(0, 1, 41), stacked=True, color=(RIGHT, WRONG), label=words)
        axes.axvline(rule[f"{source}_threshold"], color="black", linewidth=1)
        axes.set_xlabel(f"match probability of {source} captions", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(Path(__file__).with_name("capfilt.png"), dpi=110)


if __name__ == "__main__":
    main()
