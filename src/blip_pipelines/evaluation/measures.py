"""How good each stage is: retrieval and captions in tables, and every number under its flat key."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from blip_pipelines.evaluation.evidence import Evidence, stages_with, subsets
from blip_pipelines.evaluation.figures import bar_chart
from blip_pipelines.evaluation.page import Html, is_number, note, percent, plain, table, tag

CAPTION_MEASURES = {"cider": "CIDEr-D", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "exact": "exact"}


def summary(metrics: Mapping[str, Any], stages: Mapping[str, dict]) -> dict[str, float]:
    """Every number of the run under flat keys (design section 8): the metrics, `seconds/<stage>`, `seconds/total`.

    What is not a finite number is left out, so that the file stays strict JSON.
    """
    seconds = {
        f"seconds/{name}": record["seconds"] for name, record in stages.items() if is_number(record.get("seconds"))
    }
    flat = {key: value for key, value in {**metrics, **seconds}.items() if is_number(value)}
    if seconds:
        flat["seconds/total"] = sum(seconds.values())
    return dict(sorted(flat.items()))


def measures(evidence: Evidence) -> Html:
    """Retrieval against chance, captions against the nearest training caption, per subset; then every number."""
    parts: list[Html] = []
    metrics = evidence.metrics
    for stage in stages_with(evidence, "i2t_r5"):
        rows: list[list[object]] = []
        bars = []
        for subset in subsets(evidence, stage, "i2t_r5"):
            names = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
            values = [metrics.get(f"{stage}/{name}/{subset}") for name in names]
            rows.append([tag("b", subset), *(percent(value) for value in values)])
            for words, form in (("ITC alone", "{}_itc"), ("chance", "chance_{}")):
                others = [metrics.get(f"{stage}/{form.format(name)}/{subset}") for name in names]
                if any(is_number(value) for value in others):
                    rows.append([tag("span", words, class_="reference"), *(percent(value) for value in others)])
            for way in ("i2t", "t2i"):
                if is_number(reached := metrics.get(f"{stage}/{way}_r5/{subset}")):
                    bars.append((f"{subset} {way}", reached, metrics.get(f"{stage}/chance_{way}_r5/{subset}")))
        heads = ["subset", *(f"{way} R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))]
        parts += [
            tag("h3", f"Retrieval, {stage}"),
            note("i2t: a picture asks, captions answer; t2i: the reverse. R@k: a match is among the first k."),
            table(heads, rows),
            tag("div", bar_chart("R@5, with chance as a tick", bars), class_="figures"),
        ]
    for stage in stages_with(evidence, "cider"):
        captioned = [caption_rows(metrics, stage, subset) for subset in subsets(evidence, stage, "cider")]
        heads = ["subset", *CAPTION_MEASURES.values(), "CIDEr-D over the nearest, 95 %"]
        parts += [tag("h3", f"Captions, {stage}"), table(heads, chain.from_iterable(captioned))]
    flat = summary(metrics, evidence.stages)
    if flat:
        everything = table(["key", "value"], [(tag("code", key), plain(value)) for key, value in flat.items()])
        parts.append(tag("details", tag("summary", f"All {len(flat)} numbers of summary.json"), everything))
    return tag("div", parts) if parts else note("No metrics yet: the evaluation stage writes them.")


def caption_rows(metrics: Mapping[str, float], stage: str, subset: str) -> list[list[object]]:
    """A subset's captions by beam search, by nucleus sampling, and those of the nearest training images."""

    def measured(form: str) -> list[object]:
        return [plain(metrics.get(f"{stage}/{form.format(name)}/{subset}")) for name in CAPTION_MEASURES]

    low, high = (metrics.get(f"{stage}/cider_gain_{end}/{subset}") for end in ("low", "high"))
    gain = f"{low:+.2f} to {high:+.2f}".replace("-", "\u2212") if is_number(low) and is_number(high) else "\u2013"
    rows: list[list[object]] = [[tag("b", subset), *measured("{}"), gain]]
    for words, form in (("nucleus sampling", "{}_nucleus"), ("nearest training caption", "baseline_{}")):
        if is_number(metrics.get(f"{stage}/{form.format('cider')}/{subset}")):
            rows.append([tag("span", words, class_="reference"), *measured(form), ""])
    return rows
