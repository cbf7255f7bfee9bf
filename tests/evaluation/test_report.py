import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_pipelines.data.records import PAIR_SCHEMA, QUARANTINE_SCHEMA
from blip_pipelines.data.shards import ShardWriter
from blip_pipelines.evaluation.evidence import Evidence, in_order
from blip_pipelines.evaluation.figures import line_chart, running_mean, thumbnail, ticks
from blip_pipelines.evaluation.measures import summary
from blip_pipelines.evaluation.page import Html, tag
from blip_pipelines.evaluation.report import SECTIONS, write_report

HOSTILE = """<script>alert("x")</script> & 'quoted' <img src=x onerror=y>"""


class Page(HTMLParser):
    """Elements, addresses and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.handlers += [key for key in values if key.startswith("on")]
        if "src" in values:
            self.sources.append(values["src"])
        if "href" in values:
            self.links.append(values["href"])
        if "id" in values:
            self.anchors.add(values["id"])

    def handle_data(self, data):
        self.text += data


def png(shade: int, mode: str = "RGB") -> bytes:
    written = io.BytesIO()
    Image.new(mode, (40, 20), (shade, 90, 255 - shade, 128)[: len(mode)]).save(written, "PNG")
    return written.getvalue()


@pytest.fixture
def evidence(tmp_path: Path) -> dict:
    """A small run with everything in it: 12 pictures, half of them human, three noisy, two test subsets."""
    rows = []
    with ShardWriter(tmp_path / "images") as writer:
        for index in range(12):
            stored = writer.add(png(index * 20))
            rows.append(
                {
                    "key": stored.key,
                    "member": stored.member,
                    "shard": stored.shard,
                    "offset": stored.offset,
                    "size": stored.size,
                    "width": 40,
                    "height": 20,
                    "caption": f"thing number {index}" if index else HOSTILE,
                    "origin": "human" if index % 2 else "web",
                    "source": "drawn",
                    "split": "train" if index < 6 else "test",
                    "subset": None if index < 6 else ("image", "combo")[index % 2],
                }
            )
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA), tmp_path / "pairs" / "00000.parquet")
    noise = [{"key": row["key"], "caption": row["caption"], "kind": "swap", "truth": "?"} for row in rows[:6:2]]
    pq.write_table(pa.Table.from_pylist(noise), tmp_path / "noise.parquet")
    refused = [{"source": "drawn", "member": HOSTILE, "reason": "truncated", "error": HOSTILE}] * 3
    pq.write_table(pa.Table.from_pylist(refused, schema=QUARANTINE_SCHEMA), tmp_path / "quarantine.parquet")
    test = rows[6:]
    write_predictions(tmp_path / "predictions", test)
    history = [
        {"step": step, "itc": 4 - step / 50, "itm": 0.6, "lm": 5.0, "val/i2t_r5/image": 0.3} for step in range(60)
    ]
    history[3]["itc"] = float("nan")
    return {
        "stages": {
            "med_pretraining": {"seconds": 90.0, "samples_per_second": 180.0},
            "ingestion": {
                "seconds": 30.0,
                "facts": {"contracts": [{"rule": "captions", "success": False, "failed": 2}]},
            },
        },
        "metrics": {
            "med_pretraining/i2t_r5/image": 0.37,
            "med_pretraining/chance_i2t_r5/image": 0.011,
            "med_pretraining/cider/combo": 4.5,
        },
        "pairs": tmp_path / "pairs",
        "images": tmp_path / "images",
        "quarantine": tmp_path / "quarantine.parquet",
        "history": {"med_pretraining": history},
        "predictions": {"med_pretraining": tmp_path / "predictions"},
        "credits": ["Twemoji (https://creativecommons.org/licenses/by/4.0/), CC-BY 4.0", HOSTILE],
        "contracts": [{"rule": "captions", "severity": "warn", "passed": False, "checked": 12, "failed": 2}],
        "registered": [{"name": "blip-captioner", "version": 1, "alias": "candidate", "stage": "med_pretraining"}],
    }


def written(tmp_path: Path, evidence: dict, docs: Path | None = None, **more) -> str:
    write_report(tmp_path / "report.html", Evidence(**{**evidence, **more}), docs)
    return (tmp_path / "report.html").read_text("utf-8")


def test_page_needs_nothing_but_itself(tmp_path, evidence):
    text = written(tmp_path, evidence)
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import", text)


def test_text_from_the_data_is_never_markup(tmp_path, evidence):
    page = Page(written(tmp_path, evidence))
    assert page.text.count(HOSTILE) >= 4  # caption, quarantine, credit
    assert "script" not in page.tags and not page.handlers
    assert tag("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'


def test_every_link_inside_the_page_has_its_place(tmp_path, evidence):
    page = Page(written(tmp_path, evidence))
    inside = {link[1:] for link in page.links if link.startswith("#")}
    assert inside == {anchor for anchor, _, _ in SECTIONS}
    assert inside <= page.anchors


def test_what_a_cache_of_features_brought_stands_beside_the_time(tmp_path, evidence):
    stages = {"blip2_stage1": {"seconds": 60.0, "features_hit_rate": 0.5, "features_seconds_saved": 4321.0}}
    text = Page(written(tmp_path, evidence, stages=evidence["stages"] | stages)).text
    assert "from cache" in text and "cache saved" in text and "50%" in text and "4,321 s" in text
    assert "from cache" not in Page(written(tmp_path, evidence)).text


def test_page_begins_with_what_was_reached_and_who_is_champion(tmp_path, evidence):
    ruling = {"rule": "no_fall", "kept": False, "found": "cider/combo fell"}
    decision = {"name": "blip-captioner", "version": "1", "champion": "0", "promoted": False, "refused": "no_fall: x"}
    text = Page(written(tmp_path, evidence, decisions=[{**decision, "rulings": [ruling]}])).text
    begins = text[: text.index("How good it is")]
    assert "A held-out picture has its caption among the first five (R@5)" in begins
    assert "37.0 %" in begins and "1.1 %" in begins
    assert "blip-captioner version 1: candidate; refused by no_fall" in begins
    promoted = Page(written(tmp_path, evidence, decisions=[{**decision, "promoted": True, "rulings": []}])).text
    assert "blip-captioner version 1: \u2713 champion" in promoted


def test_a_run_without_results_still_gets_a_page(tmp_path):
    nowhere = tmp_path / "nowhere"
    write_report(
        tmp_path / "report.html",
        Evidence(
            stages={},
            metrics={},
            pairs=nowhere,
            images=nowhere,
            quarantine=nowhere / "quarantine.parquet",
            history={},
            predictions={"med_pretraining": nowhere},
            credits=[],
            registered=[],
        ),
        docs=nowhere,
    )
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    for line in (
        "No pairs table yet",
        "No training history yet",
        "No retrieval predictions yet",
        "No generated captions yet",
    ):
        assert line in page.text


def test_an_empty_quarantine_and_unreadable_pictures_are_said(tmp_path, evidence):
    empty = tmp_path / "empty.parquet"
    pq.write_table(QUARANTINE_SCHEMA.empty_table(), empty)
    page = Page(written(tmp_path, evidence, quarantine=empty, images=tmp_path / "nowhere"))
    assert "Nothing was refused." in page.text
    assert "(no picture)" in page.text and not page.sources


def test_noise_is_marked_only_where_the_evaluator_knows_it(tmp_path, evidence):
    assert "noise: swap" not in written(tmp_path, evidence)
    assert written(tmp_path, evidence, noise=tmp_path / "noise.parquet").count("noise: swap") == 3


def test_same_evidence_same_bytes(tmp_path, evidence):
    assert written(tmp_path, evidence) == written(tmp_path, evidence)


def test_data_docs_are_linked_relative_to_the_page(tmp_path, evidence):
    (tmp_path / "docs" / "site").mkdir(parents=True)
    (tmp_path / "docs" / "site" / "index.html").touch()
    assert "docs/site/index.html" in Page(written(tmp_path, evidence, docs=tmp_path / "docs")).links


def test_a_failed_rule_and_the_serving_command_are_on_the_page(tmp_path, evidence):
    page = Page(written(tmp_path, evidence))
    assert "1 of 1 rules are broken." in page.text
    assert "make serve NAME=blip-captioner ALIAS=candidate" in page.text
    assert "180.0" in page.text
    assert "https://creativecommons.org/licenses/by/4.0/" in page.links


def test_captions_stand_beside_the_baseline(tmp_path, evidence):
    metrics = {
        "s/cider/combo": 4.5,
        "s/baseline_cider/combo": 1.25,
        "s/cider_gain_low/combo": 3.0,
        "s/cider_gain_high/combo": 3.5,
    }
    page = Page(written(tmp_path, evidence, metrics=metrics))
    assert "nearest training caption" in page.text and "1.250" in page.text and "+3.00 to +3.50" in page.text


def test_summary_is_flat_finite_json_with_seconds():
    stages = {"ingestion": {"seconds": 30.5}, "med_pretraining": {"seconds": 60}, "release": {}}
    flat = summary({"a/cider/combo": 1.5, "a/cider/image": float("nan"), "a/note": "words", "a/ok": True}, stages)
    assert flat == {
        "a/cider/combo": 1.5,
        "seconds/ingestion": 30.5,
        "seconds/med_pretraining": 60,
        "seconds/total": 90.5,
    }
    json.dumps(flat, allow_nan=False)


def test_further_rounds_follow_their_first():
    assert in_order(["evaluation", "new", "capfilt_2", "blip2_stage1", "capfilt", "ingestion"]) == [
        "ingestion",
        "capfilt",
        "capfilt_2",
        "blip2_stage1",
        "evaluation",
        "new",
    ]


def test_chart_stays_inside_its_frame_and_skips_what_is_not_finite():
    points = [(step, value) for step, value in enumerate([3.0, float("inf"), -2.0, float("nan"), 5.0])]
    chart = line_chart("loss", {"itc": points}, x_label="step", y_label="nats")
    assert isinstance(chart, Html) and "nan" not in chart and "inf" not in chart
    numbers = [float(n) for path in re.findall(r' d="M([^"]+)"', chart) for n in re.split("[L,]", path)]
    xs, ys = np.array(numbers[::2]), np.array(numbers[1::2])
    assert len(xs) == 3 and (xs >= 0).all() and (xs <= 400).all() and (ys >= 0).all() and (ys <= 220).all()
    assert ys[1] > ys[0] > ys[2]  # larger values stand higher
    assert "no finite values" in line_chart("loss", {"itc": [(0, float("nan"))]}, x_label="step", y_label="nats")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.43, 9.5), (-3, 4e5), (0.001, 0.0012), (2, 2)])
def test_ticks_are_inside_and_few(low, high):
    values = ticks(low, high)
    assert 1 <= len(values) <= 8 and all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    assert len(values) >= 2 or low == high


def test_running_mean_of_a_straight_line_is_the_line():
    line = [(step, 2.0 * step + 1) for step in range(101)]
    assert np.allclose(running_mean(line), line)


def test_thumbnail_is_small_and_shows_transparency_as_white():
    import base64

    large = io.BytesIO()
    Image.new("RGBA", (1000, 500), (255, 0, 0, 0)).save(large, "PNG")
    content = base64.b64decode(thumbnail(large.getvalue(), 64).split(",")[1])
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (64, 32)
        assert min(picture.convert("RGB").getpixel((32, 16))) > 250
    with pytest.raises(OSError):
        thumbnail(b"not a picture")


def test_slices_show_means_intervals_and_counts_and_only_where_they_tell_samples_apart(tmp_path, evidence):
    path = tmp_path / "pairs" / "00000.parquet"
    rows = pq.read_table(path).to_pylist()
    for number, row in enumerate(rows):
        row |= {"category": "animals" if number % 3 else None}
    pq.write_table(pa.Table.from_pylist(rows, PAIR_SCHEMA), path)
    text = written(tmp_path, evidence)
    section = text[text.index('id="slices"') : text.index('id="samples"')]
    shown = [re.sub(r"<[^>]+>", "|", row).strip("|") for row in re.findall(r"<tr>(.*?)</tr>", section)]
    cells = {row.split("|")[0]: [cell for cell in row.split("|") if cell] for row in shown}
    assert [name for name in cells if name in ("animals", "no category", "drawn")] == ["animals", "no category"]
    assert cells["animals"][1:4] == ["10.000", "10.000 to 10.000", "4"] and cells["no category"][3] == "2"
    assert cells["animals"][-1] == "4" and cells["animals"][-3] == "100.0 %"


def write_predictions(folder: Path, test: list[dict]) -> None:
    """Predictions of a perfect retriever and captioner over the rows `test`."""
    folder.mkdir()
    ranked = [
        {
            "subset": row["subset"],
            "direction": direction,
            "key": row["key"],
            "caption": row["caption"],
            "rank": 1,
            "top_keys": [row["key"]],
            "top_captions": [row["caption"]],
            "top_scores": [1.5],
        }
        for direction in ("i2t", "t2i")
        for row in test
    ]
    pq.write_table(pa.Table.from_pylist(ranked), folder / "predictions_retrieval.parquet")
    captions = [
        {
            "subset": row["subset"],
            "key": row["key"],
            "generated": row["caption"],
            "references": [row["caption"]],
            "cider": 10.0,
        }
        for row in test
    ]
    pq.write_table(pa.Table.from_pylist(captions), folder / "predictions_captions.parquet")
