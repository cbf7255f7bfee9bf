"""The page a run ends with, and the flat numbers beside it.

One section, one function; a section that has nothing to show says so in a line. Everything on the page comes from
files and records that the stages left: the report computes no metric of its own.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from blip_pipelines.data import storage
from blip_pipelines.evaluation.ablation import ablations as ablation_tables
from blip_pipelines.evaluation.attention import attention
from blip_pipelines.evaluation.evidence import (
    Evidence,
    fact,
    in_order,
    parquet,
    series,
    stages_with,
    subset_order,
    subsets,
)
from blip_pipelines.evaluation.figures import bar_chart, line_chart
from blip_pipelines.evaluation.filtered import filtered
from blip_pipelines.evaluation.gallery import captions, retrieval, samples
from blip_pipelines.evaluation.page import (
    Html,
    document,
    duration,
    is_number,
    note,
    percent,
    plain,
    quantity,
    share,
    table,
    tag,
)
from blip_pipelines.evaluation.questions import questions

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
CAPTION_MEASURES = {"cider": "CIDEr-D", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "exact": "exact"}
CURVES = {
    "itc": "Image-text contrastive",
    "itm": "Image-text matching",
    "lm": "Language modelling",
    "itg": "Text generation",
}
WARM_START = "warm_start/regression"
PROBES = {  # what a stage looks at while it trains: title and unit
    "i2t_r5": ("picture \u2192 captions, R@5", "recall"),
    "t2i_r5": ("caption \u2192 pictures, R@5", "recall"),
    "lm": ("language modelling loss", "nats"),
    "cider": ("CIDEr-D of greedy captions", "CIDEr-D"),
    "exact": ("closed questions answered right", "share"),
}
QUARANTINE_ROWS = 8
WATCHED_SUBSETS = 3  # curves of the validation probe in one chart
ADDRESS = re.compile(r"(https?://[^\s)<>\"]+)")


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


def write_report(
    out: Path,
    *,
    stages: Mapping[str, dict],
    metrics: Mapping[str, float],
    pairs: Path,
    images: Path,
    quarantine: Path,
    history: Mapping[str, Sequence[dict]],
    predictions: Mapping[str, Path],
    credits: Sequence[str],
    registered: Sequence[dict],
    decisions: Sequence[dict] = (),
    noise: Path | None = None,
    contracts: Sequence[dict] = (),
    docs: Path | None = None,
    decided: Mapping[str, Path] | None = None,
    ablations: Mapping[str, Any] | None = None,
    answers: Mapping[str, Path] | None = None,
) -> None:
    """Write the self-contained page `out`.

    Args:
        out: the HTML file; written atomically.
        stages: run record by stage: `seconds`, and where known `samples_per_second`, `data_wait_share`, `mfu`,
            `peak_memory_bytes`, `reused`; also looked for in its `speed` and `facts`.
        metrics: flat numbers `stage/metric/subset`.
        pairs, images, quarantine: the data set; `quarantine` a parquet file.
        history: rows {"step": int, name: value} by stage.
        predictions: by stage, the folder with `predictions_retrieval.parquet` and `predictions_captions.parquet`.
        credits: a sentence for each work that is shown or built on; addresses in it become links.
        registered: dicts `name`, `version`, `alias`, `stage`.
        decisions: of the gate about them: `name`, `promoted`, `refused`, `champion`, `rulings`.
        noise: the evaluator's side file; only with it are corrupted samples marked.
        contracts: a row for each rule: `rule`, `severity`, `passed`, `checked`, `failed`.
        docs: the folder of Data Docs, linked relative to the page.
        decided: by round of CapFilt, the folder of its judged captions.
        ablations: what `evaluation.ablation.collect` found.
        answers: by stage, the folder with `predictions_answers.parquet`.
    """
    entrance = next(iter(sorted(docs.rglob("index.html"), key=lambda path: len(path.parts))), None) if docs else None
    evidence = Evidence(
        stages=stages,
        metrics=metrics,
        pairs=pairs,
        images=images,
        quarantine=quarantine,
        history=history,
        predictions=predictions,
        credits=credits,
        registered=registered,
        decisions=decisions,
        noise=noise,
        contracts=contracts,
        docs=Path(os.path.relpath(entrance, out.parent)).as_posix() if entrance else None,
        decided=decided or {},
        ablations=ablations,
        answers=answers or {},
    )
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


def outcome(evidence: Evidence) -> Html | None:
    """Which registered model is champion now, in a line each; the gate's reasons are further down."""
    decided = {decision["name"]: decision for decision in evidence.decisions}
    lines = []
    for model in evidence.registered:
        decision = decided.get(model["name"])
        if decision is None or decision["promoted"]:
            state = "\u2713 champion"
        else:
            state = f"candidate; refused by {', '.join(sorted(broken_rules(decision)))}"
        lines.append(tag("li", tag("b", model["name"]), f" version {model['version']}: {state}"))
    return tag("ul", lines, class_="outcome") if lines else None


def broken_rules(decision: Mapping[str, Any]) -> set[str]:
    return {ruling["rule"] for ruling in decision["rulings"] if not ruling["kept"]}


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


def curves(evidence: Evidence) -> Html:
    """Losses and validation probe over the steps of each stage that trains."""
    parts: list[Html] = []
    for stage in in_order(name for name, rows in evidence.history.items() if rows):
        rows = evidence.history[stage]
        names = sorted({name for row in rows for name in row if name != "step"})
        charts = [
            line_chart(
                f"{title} loss", {name: series(rows, name)}, x_label="optimizer step", y_label="nats", colour=index
            )
            for index, (name, title) in enumerate(CURVES.items())
            if name in names
        ]
        if WARM_START in names:
            regressed = {"regression": series(rows, WARM_START)}
            title = "Warm start: from soft prompts to the caption's words"
            charts.append(line_chart(title, regressed, x_label="step of the warm start", y_label="of the variance"))
        for probe, (title, unit) in PROBES.items():
            start = f"val/{probe}/"
            watched = sorted((name.removeprefix(start) for name in names if name.startswith(start)), key=subset_order)
            probes = {subset: series(rows, start + subset) for subset in watched[:WATCHED_SUBSETS]}
            if probes:
                is_recall = unit == "recall"
                title = f"Validation, {title}"
                charts.append(line_chart(title, probes, x_label="optimizer step", y_label=unit, percent=is_recall))
        if not charts and "loss" in names:
            charts.append(line_chart("Loss", {"loss": series(rows, "loss")}, x_label="optimizer step", y_label="nats"))
        parts += [tag("h3", stage), tag("div", charts, class_="figures")]
    return tag("div", parts) if parts else note("No training history yet.")


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


def models(evidence: Evidence) -> Html:
    """What was registered, what the gate said, and the commands that serve one."""
    if not evidence.registered:
        return note("No model was registered by this run.")
    decided = {decision["name"]: decision for decision in evidence.decisions}
    rows = []
    for model in evidence.registered:
        cells = [str(model.get(key, "")) for key in ("name", "version", "alias", "stage")]
        lineage = tag("a", "lineage", href=f"lineage/{model['name']}-{model['version']}.html")
        rows.append([*cells, verdict(decided.get(model["name"])), lineage])
    promoted = [decision["name"] for decision in evidence.decisions if decision["promoted"]]
    name = promoted[0] if promoted else evidence.registered[0]["name"]
    alias = "champion" if promoted else evidence.registered[0].get("alias", "candidate")
    rulings = [
        tag("details", tag("summary", f"The gate on {decision['name']}"), ruling_table(decision["rulings"]))
        for decision in evidence.decisions
    ]
    return tag(
        "div",
        table(["model", "version", "alias", "from stage", "gate", "made from"], rows, texts=6),
        rulings,
        tag("p", "Serve one over HTTP, open the page, or load it in Python:"),
        tag("pre", f"make serve NAME={name} ALIAS={alias}"),
        tag("pre", "make page"),
        tag("p", "Curves, parameters and files of the run, and earlier versions:"),
        tag("pre", ".venv/bin/mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db"),
        tag("pre", f'mlflow.pyfunc.load_model("models:/{name}@{alias}")'),
    )


def verdict(decision: Mapping[str, Any] | None) -> str:
    if decision is None:
        return "champion already"
    if decision["promoted"]:
        return f"\u2713 promoted over {decision['champion'] or 'nothing'}"
    return f"\u2717 refused: {decision['refused']}"


def ruling_table(rulings: Sequence[Mapping[str, Any]]) -> Html:
    rows = [
        [ruling["rule"], "\u2713 kept" if ruling["kept"] else "\u2717 broken", ruling["found"]] for ruling in rulings
    ]
    return table(["rule", "result", "found"], rows, texts=3)


def credit_list(evidence: Evidence) -> Html:
    """Whose pictures, names and weights these are."""
    lines = [
        tag("li", [tag("a", part, href=part) if part.startswith("http") else part for part in ADDRESS.split(credit)])
        for credit in evidence.credits
    ]
    return tag("ul", lines) if lines else note("No third-party material is credited.")


SECTIONS: tuple[tuple[str, str, Callable[[Evidence], Html]], ...] = (
    ("measures", "How good it is", measures),
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
