"""May a candidate become the champion? Pure rules over what was found out about the two; the caller measures.

Every rule gives a ruling, kept or broken, with the figure that decides; a candidate passes if all are kept. Rules:

    floors         measures that any champion reaches
    no_fall        no guarded metric falls significantly against the champion, measured on the same samples
    no_leak        no evaluation image is among the training images
    contracts      the data contracts of the training data hold, and were checked on these data
    reload         stock `transformers` loads the export, no key missing or unexpected, with equal outputs
    latency        seconds of a request, absolute and against the champion
    memory         bytes of weights, absolute and against the champion
    not_withdrawn  this version was not rolled back before

Metrics are guarded together: with G of them each interval has level 1 - (1 - level) / G (Bonferroni), so that an equal
model is refused by chance in at most 1 - `level` of the cases.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blip_pipelines.config import ConfigError
from blip_pipelines.evaluation.comparison import compare_scores
from blip_pipelines.evaluation.scores import Scores

SHOWN = 3  # examples in a ruling


@dataclass(frozen=True)
class ModelRules:
    """Of one registered model.

    Args:
        guarded: `<metric>/<subset>` of its per-sample scores.
        floors: `<metric>/<subset>` of its measures -> the least a champion has.
    """

    guarded: tuple[str, ...] = ()
    floors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GateConfig:
    """What a champion must be.

    Args:
        level: of the intervals of all guarded metrics of a model together.
        draws, seed: of the paired bootstrap.
        reload_tolerance: largest difference of outputs, as a share of the largest output where that is above 1.
        max_seconds, max_slowdown: of a request with one image; the median, and its ratio to the champion's.
        max_weights_bytes, max_growth: of a loaded model, and its ratio to the champion's.
        models: rules by registered name.
    """

    level: float = 0.95
    draws: int = 10_000
    seed: int = 0
    reload_tolerance: float = 1e-3
    max_seconds: float = 5.0
    max_slowdown: float = 3.0
    max_weights_bytes: float = 40e9
    max_growth: float = 2.0
    models: dict[str, ModelRules] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ConfigError(f"release.gate.level: {self.level} is not between 0 and 1")


@dataclass(frozen=True)
class Cost:
    """What one model costs to serve: median seconds of a request, bytes of weights in memory."""

    seconds: float
    weights_bytes: int


@dataclass(frozen=True)
class Facts:
    """What was found out about a candidate, and about the champion where there is one.

    Args:
        metrics: `<metric>/<subset>` of its measures.
        scores: its per-sample scores; `champion_scores` by the same recipe, None where there is no champion.
        leaked: evaluation images among its training images, described.
        contracts: results of the rules on its training data: `rule`, `severity`, `passed`, `failed`.
        checked: the contracts were checked on the very data that it was trained on.
        reload: outputs of the export in stock classes against ours: name -> largest difference, or what went wrong.
        withdrawn: why it was rolled back, if it was.
    """

    metrics: Mapping[str, float]
    scores: Scores
    leaked: Sequence[str]
    contracts: Sequence[Mapping[str, Any]]
    checked: bool
    reload: Mapping[str, float | str]
    cost: Cost
    champion_scores: Scores | None = None
    champion_cost: Cost | None = None
    withdrawn: str | None = None


@dataclass(frozen=True)
class Ruling:
    """One rule on one model; `found` says the figures, also where it is kept."""

    rule: str
    kept: bool
    found: str


def judge(facts: Facts, rules: ModelRules, config: GateConfig) -> list[Ruling]:
    """All rulings, in the order of the module's list."""
    return [
        *_floors(facts.metrics, rules.floors),
        *(_no_fall(facts.scores, facts.champion_scores, rules, config) if facts.champion_scores is not None else ()),
        _no_leak(facts.leaked),
        _contracts(facts),
        *_reload(facts.reload, config.reload_tolerance),
        *_bounds("latency", "s", "seconds", facts, config.max_seconds, config.max_slowdown),
        *_bounds("memory", "bytes", "weights_bytes", facts, config.max_weights_bytes, config.max_growth),
        Ruling("not_withdrawn", facts.withdrawn is None, facts.withdrawn or "never rolled back"),
    ]


def refusals(rulings: Iterable[Ruling]) -> str:
    """The broken rules in a line; "" where none is."""
    return "; ".join(f"{ruling.rule}: {ruling.found}" for ruling in rulings if not ruling.kept)


def _floors(metrics: Mapping[str, float], floors: Mapping[str, float]) -> Iterable[Ruling]:
    for name, floor in sorted(floors.items()):
        value = metrics.get(name)
        if value is None:
            yield Ruling("floors", False, f"{name} was not measured; its floor is {floor:g}")
        else:
            below = f", {floor - value:.4g} too low" if value < floor else ""
            yield Ruling("floors", value >= floor, f"{name} is {value:.4g}, its floor {floor:g}{below}")


def _no_fall(scores: Scores, champion: Scores, rules: ModelRules, config: GateConfig) -> Iterable[Ruling]:
    level = 1 - (1 - config.level) / max(len(rules.guarded), 1)
    for name in rules.guarded:
        metric, _, subset = name.partition("/")
        ours, theirs = scores.get((metric, subset), {}), champion.get((metric, subset), {})
        if not ours or ours.keys() != theirs.keys():
            found = f"{name} was measured on {len(ours)} samples, the champion's on {len(theirs)} others"
            yield Ruling("no_fall", False, found if ours else f"{name} was not measured")
            continue
        pair = ({(metric, subset): ours}, {(metric, subset): theirs})
        ((_, change),) = compare_scores(*pair, config.draws, config.seed, level).items()
        fell = change.high < 0
        interval = f"{change.mean:+.4g} ({change.low:+.4g} to {change.high:+.4g}, {len(ours)} samples)"
        yield Ruling("no_fall", not fell, f"{name} {'fell: ' if fell else 'changed by '}{interval}")


def _no_leak(leaked: Sequence[str]) -> Ruling:
    more = f" and {len(leaked) - SHOWN} more" if len(leaked) > SHOWN else ""
    found = f"{len(leaked)} evaluation images are in the training data: {', '.join(leaked[:SHOWN])}{more}"
    return Ruling("no_leak", not leaked, found if leaked else "no evaluation image is in the training data")


def _contracts(facts: Facts) -> Ruling:
    broken = [rule for rule in facts.contracts if rule["severity"] == "error" and not rule["passed"]]
    if not facts.contracts or not facts.checked:
        return Ruling("contracts", False, "the contracts were not checked on the data that this model was trained on")
    named = ", ".join(f"{rule['rule']} ({rule.get('failed')} rows)" for rule in broken)
    held = f"{len(facts.contracts) - len(broken)} of {len(facts.contracts)} hold"
    return Ruling(
        "contracts", not broken, f"broken: {named}" if broken else f"{held}, none of severity error is broken"
    )


def _reload(reload: Mapping[str, float | str], tolerance: float) -> Iterable[Ruling]:
    if not reload:
        yield Ruling("reload", False, "there is no stock folder to reload")
    for name, outcome in sorted(reload.items()):
        if isinstance(outcome, str):
            yield Ruling("reload", False, f"{name}: {outcome}")
        else:
            found = f"{name}: outputs differ by {outcome:.2g}, allowed {tolerance:g}"
            yield Ruling("reload", outcome <= tolerance, found)


def _bounds(rule: str, unit: str, name: str, facts: Facts, most: float, most_ratio: float) -> Iterable[Ruling]:
    value = getattr(facts.cost, name)
    yield Ruling(rule, value <= most, f"{value:.4g} {unit}, allowed {most:.4g}")
    if facts.champion_cost is not None and (before := getattr(facts.champion_cost, name)):
        ratio = value / before
        yield Ruling(rule, ratio <= most_ratio, f"{ratio:.2f} times the champion's, allowed {most_ratio:g}")
