"""The evaluation of a Q-Former against the stock class, and the maps of where its queries look."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from blip2_job_samples import export_stage1
from evaluation_samples import CONFIG, write_scene
from PIL import Image

from blip_pipelines.data.loader import DecodedPixels
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.evaluation.attention import attention, last_layer, most_different, outside, overlay
from blip_pipelines.evaluation.evidence import Evidence, read_captions, read_queries
from blip_pipelines.evaluation.page import tag
from blip_pipelines.evaluation.predictions import ATTENTION
from blip_pipelines.jobs import evaluate_blip2_stage1
from blip_pipelines.training.distributed import World


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scene")
    return {**write_scene(folder), "model": export_stage1(folder / "models")}


@pytest.fixture(scope="module")
def done(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    work = tmp_path_factory.mktemp("work")
    (work / "out").mkdir()
    return evaluate_blip2_stage1.run(CONFIG, inputs, work, World()), work / "out"


def test_the_names_are_those_of_a_med(done: tuple[dict[str, Any], Path]) -> None:
    metrics = done[0]["metrics"]
    ways = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    names = [*ways, *(f"{name}_itc" for name in ways), *(f"chance_{name}" for name in ways)]
    names += ["cider", "bleu4", "cider_nucleus", "baseline_cider", "cider_gain_low"]
    assert {f"{name}/{subset}" for name in names for subset in ("combo", "image")} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert {query.way for query in read_queries(done[1])} == {"i2t", "t2i"}
    assert all(row["generated"] is not None and row["references"] for row in read_captions(done[1]))


@torch.no_grad()
def test_scores_are_those_of_the_stock_class(done: tuple[dict[str, Any], Path], inputs: dict[str, Path]) -> None:
    from transformers import Blip2ForImageTextRetrieval

    folder = inputs["model"] / "retrieval"
    stock = Blip2ForImageTextRetrieval.from_pretrained(folder, attn_implementation="eager").eval()
    view = Pairs.open(inputs["pairs"], inputs["images"]).select(split="test", subset="combo")
    ids, mask = map(torch.from_numpy, CaptionTokenizer.load(folder)(view.captions(np.arange(len(view))), 30))
    pixels = torch.from_numpy(DecodedPixels(view, ImageConfig(size=8))(np.arange(len(view)))).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (ImageConfig.mean, ImageConfig.std))
    pixels = (pixels - mean) / std
    inputs_of = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask.long()}
    itc = stock(**inputs_of).logits_per_image
    row_of_key = {key: row for row, key in enumerate(view.keys)}
    asked = [query for query in read_queries(done[1]) if query.subset == "combo" and query.way == "i2t"]
    assert len(asked) == len(set(view.keys))
    for query in asked:
        image, captions = row_of_key[query.key], view.captions(np.arange(len(view)))
        texts = [captions.index(caption) for caption in query.captions]
        pairs = {
            "pixel_values": pixels[[image]].expand(len(texts), -1, -1, -1),
            "input_ids": ids[texts],
            "attention_mask": mask[texts].long(),
        }
        itm = stock(**pairs, use_image_text_matching_head=True).logits_per_image
        odds = itm[:, 1] - itm[:, 0] + itc[image, texts] / 0.07  # the temperature of `export_stage1`
        torch.testing.assert_close(
            torch.tensor(query.scores, dtype=torch.float32), odds, atol=1e-2, rtol=0
        )  # image tokens are rounded to float16


def test_attention_maps_are_shares_of_the_images_tokens(done: tuple[dict[str, Any], Path]) -> None:
    rows = pq.read_table(done[1] / ATTENTION).to_pylist()
    assert [row["subset"] for row in rows] == ["combo"] * 3 + ["image"] * 3
    for row in rows:
        weights_QN = last_layer(row)
        assert weights_QN.shape == (4, 5)
        np.testing.assert_allclose(weights_QN.sum(1), 1, atol=1e-5)
        assert outside(weights_QN.shape[1]) == 1
    assert len({tuple(row["weights"]) for row in rows}) == len(rows)


def test_shown_queries_are_the_sharpest_and_those_that_differ_most_from_it() -> None:
    flat, left, right = np.full(4, 0.25), np.array([0.9, 0.1, 0, 0]), np.array([0, 0, 0.2, 0.8])
    assert most_different(np.stack([flat, flat, left, right]), 2) == [2, 3]
    assert most_different(np.stack([flat, left]), 4) == [1, 0]


def test_tokens_before_the_grid_are_counted() -> None:
    assert [outside(tokens) for tokens in (17, 257, 256, 261)] == [1, 1, 0, 5]


def evidence_of(inputs: dict[str, Path], predictions: dict[str, Path]) -> Evidence:
    return Evidence(
        stages={},
        metrics={},
        pairs=inputs["pairs"],
        images=inputs["images"],
        quarantine=Path("nowhere"),
        history={},
        predictions=predictions,
        credits=(),
        registered=(),
    )


def test_the_report_draws_maps_beside_the_caption(done: tuple[dict[str, Any], Path], inputs: dict[str, Path]) -> None:
    shown = attention(evidence_of(inputs, {"blip2_stage1": done[1]}))
    rows = pq.read_table(done[1] / ATTENTION).to_pylist()
    said = {(row["subset"], row["key"]): row for row in read_captions(done[1])}
    for row in rows:
        caption = said[row["subset"], row["key"]]
        assert tag("b", caption["generated"]) in shown
        assert caption["references"][0] in shown
    # Of each picture itself, and it under its mask for all queries together and for four of them.
    assert shown.count("<img") == len(rows) * (1 + 2 * (1 + 4))
    assert "(no picture)" not in shown
    assert "No attention maps yet" in attention(evidence_of(inputs, {}))


def test_a_map_leaves_bright_what_is_looked_at(inputs: dict[str, Path]) -> None:
    weights_N = np.array([0.5, 0.4, 0.05, 0.05, 0.0])  # of a class token and four cells
    markup = overlay(evidence_of(inputs, {}).pictures, "unknown", weights_N)
    (source,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', markup)
    with Image.open(io.BytesIO(base64.b64decode(source))) as mask:
        alpha = np.asarray(mask.convert("RGBA").getchannel("A"))
    side = len(alpha) - 1
    assert alpha[0, 0] < 10 < alpha[0, side] < alpha[side, side]
