"""The lines of the ablation tables, out of what each run measured: means over seeds, and what is better than what."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip_pipelines.data.storage import read_json
from blip_pipelines.evaluation.comparison import compare_scores
from blip_pipelines.evaluation.page import Html, is_number, note, plain, table, tag
from blip_pipelines.evaluation.scores import Sample, Scores, scores_of

log = logging.getLogger(__name__)

ALL = "all"  # among a table's subsets: the samples of all of them, each measured within its own


@dataclass(frozen=True)
class Run:
    """A `kedro run` with other parameters, once a seed.

    Args:
        stages: that run; whatever else they need is the default run's.
        rows: by the name of a line, the stage whose measures it shows.
        parameters: by dotted name, laid over conf/base.
        instead: data sets of the catalog that are read in place of others, as {theirs: what is read}.
    """

    stages: tuple[str, ...]
    rows: dict[str, str]
    parameters: dict[str, Any] = field(default_factory=dict)
    instead: dict[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        return next(iter(self.rows))


@dataclass(frozen=True)
class Table:
    """Runs side by side, at equal steps.

    Args:
        measures, subsets: what is shown; `all` among the subsets is all of them together.
        better: by the name of a line, the line that it is compared with, sample by sample.
    """

    title: str
    measures: tuple[str, ...]
    subsets: tuple[str, ...]
    runs: tuple[Run, ...]
    better: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ablations:
    """`conf/ablations.yml`. Args: seeded, the dotted names of the parameters that a seed is given to."""

    seeded: tuple[str, ...]
    tables: dict[str, Table]


def measures_file(folder: Path, stage: str) -> Path:
    """Where a run keeps what its evaluation measured of a stage."""
    return folder / "08_reporting" / f"{stage}_measures.json"


def collect(tables: Mapping[str, Table], root: Path) -> dict[str, Any]:
    """Every finished line of every table.

    Args:
        root: holds `<run>/<seed>/`, the data folder of each run.

    Returns:
        `metrics`: flat, `ablation/<line>/<metric>/<subset>` (mean over seeds), with `<metric>_sd` where there are
        several seeds, and of comparisons `<metric>_over_<other line>` with its 95 % ends `_low` and `_high`;
        `tables`: by name its title, measures, subsets, and its lines with their seeds.
    """
    metrics: dict[str, float] = {}
    shown = {}
    for name, each in tables.items():
        folders = {row: [root / run.name / str(seed) for seed in run.seeds] for run in each.runs for row in run.rows}
        stages = {row: stage for run in each.runs for row, stage in run.rows.items()}
        done = {
            row: [folder for folder in folders[row] if measures_file(folder, stages[row]).exists()] for row in stages
        }
        pool = ALL in each.subsets
        for row, found in done.items():
            metrics |= _means(row, [_measured(folder, stages[row], pool) for folder in found])
        for row, other in each.better.items():
            if done[row] and len(done[row]) == len(done[other]):
                new, old = ([_scores(f, stages[line], pool) for f in done[line]] for line in (row, other))
                if _samples(new) == _samples(old) is not None:
                    metrics |= _comparison(row, other, _over_seeds(new), _over_seeds(old))
                else:
                    log.warning("%s over %s: not compared, as they were not measured on the same rows", row, other)
        lines = {row: len(found) for row, found in done.items() if found}
        if lines:
            shown[name] = {
                **{key: getattr(each, key) for key in ("title", "measures", "subsets", "better")},
                "seeds": lines,
            }
    return {"metrics": metrics, "tables": shown}


def _scores(folder: Path, stage: str, pool: bool) -> Scores:
    """Of captions and queries, or answers; with `pool` also those of all subsets together."""
    answers = folder / "07_model_output" / f"{stage}_answers"
    scores = scores_of(answers if answers.exists() else answers.with_name(stage))
    together: Scores = {}
    for (metric, _), samples in scores.items() if pool else ():
        together.setdefault((metric, ALL), {}).update(samples)
    return scores | together


def _measured(folder: Path, stage: str, pool: bool) -> dict[str, float]:
    pooled = {name: samples for name, samples in _scores(folder, stage, pool).items() if name[1] == ALL} if pool else {}
    means = {f"{stage}/{metric}/{subset}": statistics.fmean(of.values()) for (metric, subset), of in pooled.items()}
    return means | read_json(measures_file(folder, stage))


def _means(row: str, measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key in measured[0] if measured else ():
        metric, _, subset = key.partition("/")[2].partition("/")
        values = [each[key] for each in measured]
        if subset and all(is_number(value) for value in values):
            found[f"ablation/{row}/{metric}/{subset}"] = statistics.fmean(values)
            if len(values) > 1:
                found[f"ablation/{row}/{metric}_sd/{subset}"] = statistics.stdev(values)
    return found


def _comparison(row: str, other: str, new: Scores, old: Scores) -> dict[str, float]:
    return {
        f"ablation/{row}/{metric}_over_{other}{end}/{subset}": value
        for (metric, subset), found in compare_scores(new, old).items()
        for end, value in (("", found.mean), ("_low", found.low), ("_high", found.high))
    }


def _samples(of_seeds: Sequence[Scores]) -> dict[tuple[str, str], set[Sample]] | None:
    """What was asked of each seed; None if it was not the same."""
    first, *others = ({name: {*samples} for name, samples in scores.items()} for scores in of_seeds)
    return first if all(other == first for other in others) else None


def _over_seeds(of_seeds: Sequence[Scores]) -> Scores:
    """Of each sample the mean score."""
    return {
        name: {sample: statistics.fmean(scores[name][sample] for scores in of_seeds) for sample in samples}
        for name, samples in of_seeds[0].items()
    }


def ablations(found: Mapping[str, Any] | None) -> Html:
    """The tables on the page, out of what `collect` returned; None says that nothing was run."""
    if not found or not found["tables"]:
        return note("Not run: ", tag("code", "make ablations"), " fills these tables.")
    metrics, parts = found["metrics"], []
    for each in found["tables"].values():
        columns = [(measure, subset) for measure in each["measures"] for subset in each["subsets"]]
        rows = [
            [tag("b", row), seeds, *(_cell(metrics, row, measure, subset) for measure, subset in columns)]
            for row, seeds in each["seeds"].items()
        ]
        gains = [
            [f"{row} over {other}", "", *(_gain(metrics, row, other, measure, subset) for measure, subset in columns)]
            for row, other in each["better"].items()
        ]
        heads = ["run", "seeds", *(f"{measure} {subset}" for measure, subset in columns)]
        parts += [tag("h3", each["title"]), table(heads, rows + [gain for gain in gains if any(gain[2:])])]
    gain = "Of a comparison: the 95 % interval of the paired bootstrap over test samples, each the mean over seeds."
    return tag("div", note("Equal steps; test halves. \u00b1 is the deviation over seeds. ", gain), parts)


def _cell(metrics: Mapping[str, float], row: str, measure: str, subset: str) -> str:
    mean, deviation = (metrics.get(f"ablation/{row}/{measure}{end}/{subset}") for end in ("", "_sd"))
    return plain(mean) + (f" \u00b1 {plain(deviation)}" if is_number(deviation) else "")


def _gain(metrics: Mapping[str, float], row: str, other: str, measure: str, subset: str) -> str:
    low, high = (metrics.get(f"ablation/{row}/{measure}_over_{other}_{end}/{subset}") for end in ("low", "high"))
    return f"{low:+.3f} to {high:+.3f}".replace("-", "\u2212") if is_number(low) and is_number(high) else ""
