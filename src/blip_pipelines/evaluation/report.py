"""The page a run ends with.

One section, one function; a section that has nothing to show says so in a line. Everything on the page comes from
files and records that the stages left: the report computes no metric of its own but the means over slices.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from blip_pipelines.data import storage
from blip_pipelines.evaluation.ablation import ablations as ablation_tables
from blip_pipelines.evaluation.attention import attention
from blip_pipelines.evaluation.curves import curves
from blip_pipelines.evaluation.evidence import (
    Evidence,
    fact,
    in_order,
    parquet,
    stages_with,
    subset_order,
    subsets,
)
from blip_pipelines.evaluation.filtered import filtered
from blip_pipelines.evaluation.gallery import captions, retrieval, samples
from blip_pipelines.evaluation.measures import measures
from blip_pipelines.evaluation.page import (
    Html,
    document,
    duration,
    is_number,
    note,
    percent,
    quantity,
    share,
    table,
    tag,
)
from blip_pipelines.evaluation.questions import questions
from blip_pipelines.evaluation.registered import models, outcome
from blip_pipelines.evaluation.slice_tables import slice_tables

SUBSETS = {
    "combo": "an unseen combination of seen parts",
    "image": "an unseen drawing of a seen concept",
    "concept": "an unseen concept",
}
DOES = {
    "ingestion": "pictures, captions, contracts",
    "med_pretraining": "ITC + ITM + LM",
    "capfilt": "captioner writes, filter judges",
    "med_bootstrapped": "ITC + ITM + LM on the new corpus",
    "blip2_stage1": "queries: ITC + ITM + ITG",
    "blip2_stage2": "a frozen language model: LM",
    "instructions": "questions by templates",
    "question_answering": "LM on answers of a MED",
    "instruct_tuning": "LM on answers to instructions",
    "evaluation": "retrieval, captions, answers",
    "release": "gate, register",
}
QUARANTINE_ROWS = 8
ADDRESS = re.compile(r"(https?://[^\s)<>\"]+)")


def write_report(out: Path, evidence: Evidence, docs: Path | None = None) -> None:
    """Write the self-contained page `out`, atomically.

    Args:
        docs: the folder of Data Docs, linked relative to the page.
    """
    entrances = sorted(docs.rglob("index.html"), key=lambda path: len(path.parts)) if docs else []
    if entrances:
        evidence = replace(evidence, docs=Path(os.path.relpath(entrances[0], out.parent)).as_posix())
    head = tag(
        "header", tag("h1", "What this run did"), overview(evidence), pipeline_picture(evidence), outcome(evidence)
    )
    sections = [(anchor, title, show(evidence)) for anchor, title, show in SECTIONS]
    storage.write_atomic(out, document("BLIP run report", head, sections))


def overview(evidence: Evidence) -> Html:
    """The run in one paragraph."""
    words: list[str] = []
    data = parquet(evidence.pairs)
    if data is not None and data.count_rows():
        columns = data.to_table(["origin", "split", "key"])
        train = columns.filter(pc.equal(columns["split"], "train"))
        human = pc.sum(pc.equal(train["origin"], "human")).as_py() or 0
        pictures = pc.count_distinct(train["key"]).as_py()
        people = share(human, len(train))
        words.append(
            f"The data: {len(train):,} captions of {pictures:,} pictures to learn from, {people} of them written"
        )
        words.append(f" by people, and {len(columns) - len(train):,} pairs held out.")
    total = sum(record["seconds"] for record in evidence.stages.values() if is_number(record.get("seconds")))
    if total:
        words.append(f" The {len(evidence.stages)} stages took {duration(total)}.")
    lead = tag("p", "".join(words) or "No stage has run yet.", class_="lead")
    return tag("div", lead, headline(evidence))


def headline(evidence: Evidence) -> Html | None:
    """How often a held-out picture has its caption among the first five: a row a stage, beside chance."""
    stages = stages_with(evidence, "i2t_r5")
    known = sorted({subset for stage in stages for subset in subsets(evidence, stage, "i2t_r5")}, key=subset_order)
    if not known:
        return None
    rows: list[list[object]] = [
        [stage, *(percent(evidence.metrics.get(f"{stage}/i2t_r5/{subset}")) for subset in known)] for stage in stages
    ]
    chance = [evidence.metrics.get(f"{stages[0]}/chance_i2t_r5/{subset}") for subset in known]
    rows.append([tag("span", "chance", class_="reference"), *map(percent, chance)])
    title = "A held-out picture has its caption among the first five (R@5)"
    reading = "; ".join(f"{subset}: {SUBSETS[subset]}" for subset in known if subset in SUBSETS)
    return tag("div", table(["after", *known], rows, caption=title), note(f"{reading}.") if reading else None)


def pipeline_picture(evidence: Evidence) -> Html:
    """The stages that ran, in order, with what they do and the time they took."""
    boxes = []
    for name in in_order(evidence.stages):
        record = evidence.stages[name]
        took = "reused" if fact(record, "reused") else seconds_of(record)
        lines = [tag("span", line) for line in (DOES.get(name), took) if line]
        boxes.append(tag("li", tag("b", name), lines))
    return tag("ol", boxes, class_="stages") if boxes else note("No run records.")


def refused(evidence: Evidence) -> Html:
    """What ingestion put into quarantine: counts by reason, then the first rows."""
    data = parquet(evidence.quarantine)
    rows = data.to_table() if data is not None else None
    if rows is None or not len(rows):
        return note(
            "Nothing was refused." if rows is not None else "No quarantine table yet: the ingestion stage writes it."
        )
    counts = rows.group_by("reason").aggregate([("reason", "count")]).sort_by([("reason_count", "descending")])
    by_reason = [(row["reason"], f"{row['reason_count']:,}") for row in counts.to_pylist()]
    first = [(row["member"], row["reason"], row["error"]) for row in rows.slice(0, QUARANTINE_ROWS).to_pylist()]
    return tag(
        "div",
        tag(
            "p", f"{len(rows):,} inputs were refused; the table {evidence.quarantine.name} names each with its reason."
        ),
        table(["reason", "inputs"], by_reason),
        table(["member", "reason", "error"], first, texts=3, caption=f"The first {len(first)}"),
    )


def contract_results(evidence: Evidence) -> Html:
    """Which rules of the data contract are broken, then all of them, and where to read more."""
    docs = tag("a", "Data Docs", href=evidence.docs)
    where = tag("p", docs, " show every rule with its figures.") if evidence.docs else None
    rules = evidence.contracts
    if not rules:
        return tag("div", note("No contract results were recorded."), where)
    heads = ["rule", "severity", "result", "checked", "failed"]
    rows = [
        (
            rule["rule"],
            rule["severity"],
            "\u2713 held" if rule["passed"] else "\u2717 broken",
            *(f"{rule[count]:,}" if is_number(rule.get(count)) else "" for count in ("checked", "failed")),
        )
        for rule in rules
    ]
    broken = [row for row, rule in zip(rows, rules, strict=True) if not rule["passed"]]
    verdict = f"{len(broken)} of {len(rules)} rules are broken." if broken else f"All {len(rules)} rules hold."
    everything = tag("details", tag("summary", "All rules"), table(heads, rows, texts=3))
    return tag("div", tag("p", verdict), where, table(heads, broken, texts=3) if broken else None, everything)


def times(evidence: Evidence) -> Html:
    """Time and throughput per stage; columns nobody filled are left out."""
    if not evidence.stages:
        return note("No run records.")
    total = sum(record["seconds"] for record in evidence.stages.values() if is_number(record.get("seconds")))
    columns: dict[str, Callable[[dict], str]] = {
        "time": seconds_of,
        "share": lambda record: quantity(record.get("seconds"), "{:.0%}", 1 / total) if total else "",
        "samples/s": lambda record: quantity(fact(record, "samples_per_second"), "{:,.1f}"),
        "data wait": lambda record: quantity(fact(record, "data_wait_share"), "{:.1%}"),
        "share of peak FLOP/s": lambda record: quantity(fact(record, "mfu"), "{:.1%}"),
        "from cache": lambda record: quantity(fact(record, "features_hit_rate"), "{:.0%}"),
        "cache saved": lambda record: quantity(fact(record, "features_seconds_saved"), "{:,.0f} s"),
        "peak memory": lambda record: quantity(fact(record, "peak_memory_bytes"), "{:.2f} GB", 1e-9),
        "note": lambda record: "reused, not run again" if fact(record, "reused") else "",
    }
    names = in_order(evidence.stages)
    cells = {head: [write(evidence.stages[name]) for name in names] for head, write in columns.items()}
    heads = [head for head in columns if any(cells[head])]
    rows = [[name, *(cells[head][index] for head in heads)] for index, name in enumerate(names)]
    return table(["stage", *heads], rows)


def credit_list(evidence: Evidence) -> Html:
    """Whose pictures, names and weights these are."""
    lines = [
        tag("li", [tag("a", part, href=part) if part.startswith("http") else part for part in ADDRESS.split(credit)])
        for credit in evidence.credits
    ]
    return tag("ul", lines) if lines else note("No third-party material is credited.")


SECTIONS: tuple[tuple[str, str, Callable[[Evidence], Html]], ...] = (
    ("measures", "How good it is", measures),
    ("slices", "By source, category and length", slice_tables),
    ("samples", "What it learnt from", samples),
    ("quarantine", "What ingestion refused", refused),
    ("contracts", "Data contracts", contract_results),
    ("capfilt", "What CapFilt kept and dropped", filtered),
    ("curves", "How it learnt", curves),
    ("retrieval", "Retrieval, right and wrong", retrieval),
    ("captions", "Captions it wrote", captions),
    ("questions", "What it answered", questions),
    ("attention", "Where queries look", attention),
    ("ablations", "What each part is worth", lambda evidence: ablation_tables(evidence.ablations)),
    ("times", "Time and throughput", times),
    ("models", "Registered models", models),
    ("credits", "Credits", credit_list),
)


def seconds_of(record: Mapping[str, Any]) -> str:
    return duration(record["seconds"]) if is_number(record.get("seconds")) else ""
