"""The registered models on the page: which is champion, what the gate said of each, and how one is served."""

from collections.abc import Mapping, Sequence
from typing import Any

from blip_pipelines.evaluation.evidence import Evidence
from blip_pipelines.evaluation.page import Html, note, table, tag


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
