"""What the report shows of models that answer: a table of data sets, then questions with their pictures."""

from collections.abc import Mapping
from typing import Any

from blip_pipelines.evaluation.answers import PREDICTIONS, ROLES
from blip_pipelines.evaluation.evidence import Evidence, in_order, parquet
from blip_pipelines.evaluation.gallery import lot
from blip_pipelines.evaluation.page import Html, is_number, note, percent, plain, table, tag
from blip_pipelines.evaluation.question_answering import ACCURACIES

EXAMPLES = 3  # right and wrong ones each, of a data set
RIGHT = 0.5  # score above which an answer is shown as right
Row = dict[str, Any]


def questions(evidence: Evidence) -> Html:
    """Each data set's score by every model that answers and by one answer for all; then questions, right and wrong."""
    answers = {stage: _read(evidence, stage) for stage in in_order(evidence.answers)}
    answers = {stage: rows for stage, rows in answers.items() if rows}
    if not answers:
        return note("No answers yet: the evaluation stage asks for them.")
    newest = list(answers)[-1]
    return tag(
        "div",
        note(
            "Held in: new pictures, questions as in training. Held out: data sets that no training saw. One answer for "
            "all is what can be had without a look at the picture."
        ),
        _scores(evidence, answers),
        tag("h3", f"Questions to {newest}"),
        note("Drawn by a fixed rule, half answered right, half wrong."),
        _examples(evidence, answers, newest),
    )


def _read(evidence: Evidence, stage: str) -> list[Row]:
    data = parquet(evidence.answers[stage] / PREDICTIONS)
    return [] if data is None else data.to_table().to_pylist()


def _scores(evidence: Evidence, answers: Mapping[str, list[Row]]) -> Html:
    """A row a data set, and those of a role pooled, with the interval of what the newest model gains."""
    stages, metrics = list(answers), evidence.metrics
    newest, before = stages[-1], stages[:-1]
    known = {(row["subset"], row["data_set"]): row["metric"] for rows in answers.values() for row in rows}
    lines: list[list[object]] = []
    for role in ROLES:
        words = role.replace("_", " ")
        for subset, data_set in sorted(name for name in known if name[0] == role):
            metric = known[subset, data_set]
            form = percent if metric in ACCURACIES else plain
            values = [metrics.get(f"{stage}/{metric}/{data_set}") for stage in stages]
            guess = metrics.get(f"{newest}/majority/{data_set}")
            asked = metrics.get(f"{newest}/rows/{data_set}")
            gains = [_gain(metrics, f"{newest}/score_over_{stage}", data_set) for stage in before]
            lines.append([words, data_set, metric, plain(asked), form(guess), *map(form, values), "", *gains])
        if any(is_number(metrics.get(f"{stage}/accuracy/{role}")) for stage in stages):
            pooled = [percent(metrics.get(f"{stage}/accuracy/{role}")) for stage in stages]
            gains = [_gain(metrics, f"{newest}/accuracy_over_{stage}", role) for stage in before]
            best = percent(metrics.get(f"{newest}/majority/{role}"))
            own = _gain(metrics, f"{newest}/accuracy_gain", role)
            lines.append([tag("b", words), tag("b", "all, pooled"), "accuracy", "", best, *pooled, own, *gains])
    heads = ["", "data set", "metric", "rows", "one answer", *stages, "over one answer, 95 %"]
    return table([*heads, *(f"over {stage}, 95 %" for stage in before)], lines, texts=3)


def _gain(metrics: Mapping[str, float], metric: str, of: str) -> str:
    low, high = (metrics.get(f"{metric}_{end}/{of}") for end in ("low", "high"))
    if not (is_number(low) and is_number(high)):
        return "\u2013"
    return f"{low:+.2f} to {high:+.2f}".replace("-", "\u2212")


def _examples(evidence: Evidence, answers: Mapping[str, list[Row]], newest: str) -> list[Html]:
    others = {
        stage: {(row["data_set"], row["sample"], row["instruction"]): row["prediction"] for row in rows}
        for stage, rows in answers.items()
        if stage != newest
    }
    parts: list[Html] = []
    data_sets = sorted({(ROLES.index(row["subset"]), row["data_set"]) for row in answers[newest]})
    for role, data_set in data_sets:
        rows = [row for row in answers[newest] if row["data_set"] == data_set and row["score"] is not None]
        rows.sort(key=lambda row: lot(row["sample"], row["instruction"]))
        sides = [[row for row in rows if (row["score"] > RIGHT) == right][:EXAMPLES] for right in (True, False)]
        chosen = [row for side in sides for row in side]
        evidence.pictures.prepare(row["key"] for row in chosen)
        lines = []
        for row in chosen:
            question = row["data_set"], row["sample"], row["instruction"]
            said = [found.get(question, "\u2013") for found in others.values()]
            is_right = row["score"] > RIGHT
            answer = tag("span", "\u2713 " if is_right else "\u2717 ", tag("b", row["prediction"]))
            picture = evidence.pictures.show(row["key"], row["answer"])
            lines.append([picture, row["instruction"], answer, row["answer"], *said])
        heads = ["", "instruction", newest, "reference", *others]
        title = tag("summary", f"{data_set} ({ROLES[role].replace('_', ' ')})")
        shown = table(heads, lines, texts=len(heads))
        parts.append(tag("details", title, shown, open="" if not parts else None))
    return parts
