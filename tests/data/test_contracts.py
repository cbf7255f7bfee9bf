import logging
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from source_samples import scene, write_judged_data

from blip_pipelines import config as strict
from blip_pipelines.config import ConfigError
from blip_pipelines.data.contracts import RULES, ContractError, ContractsConfig, check
from blip_pipelines.data.quality import summarise

OF_A_ROUND = ("keep_rate", "length_shift", "vocabulary_shift")
KEYS = [f"{number:064x}" for number in range(6)]


def _good_rows():
    splits = ["train", "train", "train", "val", "test", "test"]
    return [
        {"key": key, "caption": f"a thing {n}", "split": split, "subset": None if split == "train" else "all"}
        for n, (key, split) in enumerate(zip(KEYS, splits, strict=True))
    ]


def _check(tmp_path, rows, images=None, **options):
    images = images or {key: scene(number) for number, key in enumerate(KEYS)}
    pairs, images = write_judged_data(tmp_path, rows, images)
    config = strict.read(ContractsConfig, options, "contracts")
    return check(pairs, summarise(pairs, images), config, tmp_path / "docs")


def test_importing_the_module_does_not_import_great_expectations():
    code = "import sys, blip_pipelines.data.ingest; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_misspelt_rule_is_an_error_that_lists_the_rules():
    with pytest.raises(ConfigError, match="capton_length: no such rule; rules are schema, key, caption_length"):
        ContractsConfig(severity={"capton_length": "warn"})


@pytest.mark.slow
def test_a_good_data_set_keeps_every_contract_and_leaves_a_site_that_fetches_nothing(tmp_path):
    results = _check(tmp_path, _good_rows())
    assert [result.rule for result in results] == [rule for rule in RULES if rule not in OF_A_ROUND]
    assert all(result.passed for result in results)
    pages = {page: page.read_text("utf-8") for page in (tmp_path / "docs").rglob("*.html")}
    index = pages[tmp_path / "docs" / "index.html"]
    assert all(result.rule in index for result in results)
    assert not any('src="http' in page or '<link rel="stylesheet" href="http' in page for page in pages.values())


BROKEN = {
    "key": {"key": "not a hash"},
    "caption_length": {"caption": "x" * 3000},
    "caption_characters": {"caption": "bell \x07"},
    "origin": {"origin": "robot"},
    "split": {"split": "dev"},
    "subset": {"split": "train", "subset": "all"},
    "image_size": {"width": 3},
    "written_by": {"origin": "synthetic"},
    "match_probability": {"match_probability": 1.5},
}


@pytest.mark.slow
def test_each_broken_row_is_named_with_its_rule_count_key_and_caption(tmp_path):
    rows = _good_rows() + _good_rows()
    for row, change in zip(rows, BROKEN.values(), strict=False):
        row.update(change)
    with pytest.raises(ContractError) as error:
        _check(tmp_path, rows)
    message = str(error.value)
    for rule in BROKEN:
        assert f"  {rule}: 1 of" in message, rule
    assert "not a hash 'a thing 0'" in message
    assert "index.html" in message and "set contracts.severity of the rule to 'warn'" in message
    assert (tmp_path / "docs" / "index.html").exists()


@pytest.mark.slow
def test_what_only_warns_is_returned_and_logged(tmp_path, caplog):
    rows = _good_rows()
    rows[0]["caption"], rows[1]["caption"], rows[2]["caption"] = "img_4711.jpg", "une maison et un chat", "IMG 22"
    rows[2].update(width=900, height=100)
    images = {key: scene(number) for number, key in enumerate(KEYS)}
    images[KEYS[4]] = images[KEYS[0]].resize((96, 72))
    with caplog.at_level(logging.WARNING):
        results = {result.rule: result for result in _check(tmp_path, rows, images)}
    broken = {rule: result.failed for rule, result in results.items() if not result.passed}
    assert broken == {
        "caption_file_name": 2,
        "caption_language": 1,
        "aspect": 1,
        "near_duplicates": 1,
        "near_duplicates_across_splits": 1,
        "file_name_share": 1,
        "narrow_share": 1,
    }
    assert results["caption_language"].first_rows == ({"key": KEYS[1], "caption": "une maison et un chat"},)
    pair = results["near_duplicates"].first_rows[0]
    assert (pair["key"], pair["other_caption"]) == (KEYS[0], "a thing 4")
    assert all(f"contract {rule}" in caplog.text for rule in broken)


@pytest.mark.slow
def test_leaks_and_repeats_over_the_whole_set_are_found(tmp_path):
    rows = _good_rows()
    rows.append({**rows[3], "split": "train", "subset": None, "caption": "seen in training"})
    rows += [{**rows[0], "caption": f"text {number}"} for number in range(4)]
    rows += [{**row, "caption": "Buy now"} for row in rows[:4]]
    with pytest.raises(ContractError) as error:
        _check(
            tmp_path,
            rows,
            max_captions_per_image=5,
            max_images_per_caption=3,
            severity={"images_per_caption": "error"},
        )
    message = str(error.value)
    assert "breaks 4 contract(s)" in message
    for rule in ("captions_per_image", "images_per_caption", "one_split_per_image", "evaluation_absent_from_training"):
        assert f"  {rule}: 1 of" in message


@pytest.mark.slow
def test_a_column_that_is_missing_is_an_error_of_the_schema(tmp_path):
    pairs, images = write_judged_data(tmp_path, _good_rows(), {key: scene(n) for n, key in enumerate(KEYS)})
    tables = summarise(pairs, images)
    shard = pairs / "00000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["origin"]), shard)
    with pytest.raises(ContractError, match=r"schema: 0 of 0 values: .*origin"):
        check(pairs, tables, ContractsConfig(), tmp_path / "docs")


@pytest.mark.slow
def test_a_rule_that_is_off_is_not_looked_at(tmp_path):
    rows = _good_rows()
    rows[0]["origin"] = "robot"
    results = _check(tmp_path, rows, severity={"origin": "off", "near_duplicates": "off"})
    assert {"origin", "near_duplicates"}.isdisjoint(result.rule for result in results)


def test_thresholds_come_from_the_config_block():
    config = strict.read(ContractsConfig, {"severity": {"aspect": "error"}, "max_aspect": 3}, "contracts")
    assert config.severity_of("aspect") == "error" and config.severity_of("key") == "error"
    assert config.max_aspect == 3.0 and np.isfinite(config.max_aspect)
