"""Contracts on what a CapFilt round composed: they catch what the released BLIP lists would have failed."""

import pyarrow as pa
import pytest
from source_samples import scene, write_judged_data

from blip_pipelines.data.composition import RuleConfig, compose, fill
from blip_pipelines.data.contracts import ContractError, ContractsConfig, RuleResult, check
from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.data.quality import summarise
from blip_pipelines.data.shift import summarise_round

pytestmark = pytest.mark.slow  # Great Expectations takes seconds to start
KEYS = [f"{number:064x}" for number in range(300)]
TRAINED = len(KEYS) - 2  # the last two are held out
CONTRACTS = ContractsConfig({"images_per_caption": "error", "vocabulary_shift": "error", "near_duplicates": "off"})


def check_round(tmp_path, synthetic, web_probability=0.9) -> list[RuleResult]:
    """Compose web captions and (image, caption) synthetic ones, which the filter believes, and judge the result."""
    rows = [{"key": key, "caption": f"a thing of kind {number}", "split": "train"} for number, key in enumerate(KEYS)]
    rows[-2] |= {"split": "val", "subset": "all"}
    rows[-1] |= {"split": "test", "subset": "all"}
    pairs, images = write_judged_data(tmp_path, rows, {KEYS[0]: scene(0)})
    web = Pairs.open(pairs).select(split="train").table()
    count = len(synthetic)
    written = fill(
        web.take(pa.array([image for image, _ in synthetic], pa.int64())),
        caption=[text for _, text in synthetic],
        origin=["synthetic"] * count,
        written_by=["a captioner"] * count,
        match_probability=[0.9] * count,
    )
    judged = [fill(web, match_probability=[web_probability] * len(web)), written]
    write_pairs(tmp_path / "judged", [pa.concat_tables(judged)], "no images")
    after, decided = tmp_path / "after", tmp_path / "decided"
    compose(pairs, tmp_path / "judged", RuleConfig(), 1, after, decided)
    of_round = summarise_round(pairs, decided, after, RuleConfig())
    return check(after, {**summarise(after, images), "round": of_round}, CONTRACTS, tmp_path / "docs")


def test_a_sound_round_keeps_its_contracts(tmp_path):
    results = check_round(tmp_path, [(number, f"a small thing of kind {number}") for number in range(200)])
    assert all(result.passed for result in results)
    assert {"keep_rate", "length_shift", "vocabulary_shift"} <= {result.rule for result in results}


def test_one_image_with_thousands_of_captions_is_caught(tmp_path):
    with pytest.raises(ContractError, match="captions_per_image: 1 of") as error:
        check_round(tmp_path, [(7, f"a thing of kind {number}") for number in range(1000, 4000)])
    assert "breaks 1 contract(s)" in str(error.value)
    assert KEYS[7][:12] in str(error.value)


def test_one_caption_on_hundreds_of_images_is_caught(tmp_path):
    with pytest.raises(ContractError, match="images_per_caption: 1 of") as error:
        check_round(tmp_path, [(number, "a thing of some kind") for number in range(TRAINED)])
    assert "breaks 1 contract(s)" in str(error.value)
    assert "a thing of some kind" in str(error.value)


def test_a_filter_that_drops_everything_is_caught(tmp_path):
    with pytest.raises(ContractError, match=r"keep_rate: 1 of 2 values: web_keep_rate is 0\.0"):
        check_round(tmp_path, [(number, f"a small thing of kind {number}") for number in range(200)], 0.1)


def test_a_captioner_that_speaks_otherwise_is_caught(tmp_path):
    odd = [(number % TRAINED, " ".join(f"wort{number}" for _ in range(40))) for number in range(3000)]
    with pytest.raises(ContractError, match=r"vocabulary_shift is 0\.9"):
        check_round(tmp_path, odd)
