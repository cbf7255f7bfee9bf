from dataclasses import replace

import numpy as np
import pytest

from blip_pipelines.config import ConfigError, read
from blip_pipelines.evaluation.gate import Cost, Facts, GateConfig, ModelRules, judge, refusals
from blip_pipelines.evaluation.scores import Sample, read_scores, write_scores

CONFIG = GateConfig(draws=500)
RULES = ModelRules(guarded=("cider/combo", "i2t_r5/combo"), floors={"cider/combo": 1.0})
NAMES = ("cider", "combo"), ("i2t_r5", "combo")


def scores(shift=0.0, samples=60, seed=0):
    draw = np.random.default_rng(seed)
    return {name: {Sample(f"k{n}"): float(draw.normal() + shift) for n in range(samples)} for name in NAMES}


GOOD = Facts(
    metrics={"cider/combo": 1.5},
    scores=scores(),
    leaked=[],
    contracts=[{"rule": "schema", "severity": "error", "passed": True, "failed": 0}],
    checked=True,
    reload={"captioning": 1e-6},
    cost=Cost(0.1, 1000),
    champion_scores=scores(),
    champion_cost=Cost(0.1, 1000),
)


def refused(**changes) -> str:
    return refusals(judge(replace(GOOD, **changes), RULES, CONFIG))


def test_an_equal_or_better_candidate_passes_every_rule():
    assert refused() == ""
    assert refused(champion_scores=scores(-0.5)) == ""
    assert refused(champion_scores=None, champion_cost=None) == "", "the first one has nothing to fall against"
    kept = {ruling.rule for ruling in judge(GOOD, RULES, CONFIG)}
    assert kept == {"floors", "no_fall", "no_leak", "contracts", "reload", "latency", "memory", "not_withdrawn"}


def test_a_significant_fall_is_refused_with_its_size_and_noise_is_not():
    noisy = {name: dict(samples) for name, samples in scores(seed=1).items()}
    assert refused(champion_scores=noisy) == "", "another draw of the same distribution"
    said = refused(champion_scores=scores(0.5))
    assert said.startswith("no_fall: cider/combo fell: -0.5 (-0.5 to -0.5, 60 samples); no_fall: i2t_r5/combo fell")


def test_a_fall_in_what_is_not_guarded_passes():
    other = {**scores(), ("cider", "concept"): {Sample("k"): 0.0}}
    better = {**scores(), ("cider", "concept"): {Sample("k"): 9.0}}
    assert refused(scores=other, champion_scores=better) == ""


def test_scores_on_other_samples_are_not_compared():
    said = refused(champion_scores=scores(samples=50))
    assert "cider/combo was measured on 60 samples, the champion's on 50 others" in said
    assert "cider/combo was not measured" in refused(scores={})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {"cider/combo": 0.75}}, "floors: cider/combo is 0.75, its floor 1, 0.25 too low"),
        ({"metrics": {}}, "floors: cider/combo was not measured; its floor is 1"),
        ({"leaked": ["a (x.png in pairs)"] * 5}, "no_leak: 5 evaluation images are in the training data: a (x.png in"),
        (
            {"contracts": [{"rule": "schema", "severity": "error", "passed": False, "failed": 3}]},
            "contracts: broken: schema (3 rows)",
        ),
        ({"checked": False}, "contracts: the contracts were not checked on the data"),
        ({"contracts": []}, "contracts: the contracts were not checked on the data"),
        ({"reload": {"captioning": 0.5}}, "reload: captioning: outputs differ by 0.5, allowed 0.001"),
        ({"reload": {"captioning": "Blip has missing_keys: x"}}, "reload: captioning: Blip has missing_keys: x"),
        ({"reload": {}}, "reload: there is no stock folder to reload"),
        ({"cost": Cost(6.0, 1000), "champion_cost": None}, "latency: 6 s, allowed 5"),
        ({"cost": Cost(0.4, 1000)}, "latency: 4.00 times the champion's, allowed 3"),
        ({"cost": Cost(0.1, 3000)}, "memory: 3.00 times the champion's, allowed 2"),
        ({"withdrawn": "rude captions"}, "not_withdrawn: rude captions"),
    ],
)
def test_a_refusal_names_the_rule_and_the_figure(changes, said):
    assert refused(**changes).startswith(said)


def test_a_broken_rule_of_severity_warn_passes():
    assert refused(contracts=[{"rule": "near_duplicates", "severity": "warn", "passed": False, "failed": 3}]) == ""


def test_guarding_more_metrics_does_not_refuse_an_equal_model_more_often():
    """With ten metrics an interval each of 95 % would refuse about a fifth of equal models."""
    rules = ModelRules(tuple(f"m{n}/s" for n in range(10)))
    outcomes = []
    for trial in range(60):
        draw = np.random.default_rng(trial)
        one, other = (
            {(f"m{n}", "s"): {Sample(f"k{k}"): float(draw.normal()) for k in range(80)} for n in range(10)}
            for _ in range(2)
        )
        said = refusals(
            judge(replace(GOOD, metrics={}, scores=one, champion_scores=other), rules, GateConfig(draws=800))
        )
        outcomes.append(bool(said))
    assert sum(outcomes) <= 6


def test_rules_are_read_strictly_from_parameters():
    config = read(GateConfig, {"models": {"blip-captioner": {"guarded": ["cider/combo"]}}}, "release.gate")
    assert config.models["blip-captioner"].guarded == ("cider/combo",)
    with pytest.raises(ConfigError, match="did you mean 'guarded'"):
        read(GateConfig, {"models": {"x": {"guard": []}}}, "release.gate")
    with pytest.raises(ConfigError, match="level"):
        GateConfig(level=1.5)


def test_scores_are_read_back_as_written(tmp_path):
    written = {**scores(), ("t2i_r1", "image"): {Sample("k", "a red crab"): 1.0, Sample("k", "a dog"): 0.0}}
    write_scores(tmp_path / "scores.parquet", written)
    assert read_scores(tmp_path / "scores.parquet") == written
