"""How each stage that trains learnt: its losses, its warm start, and what it looked at on the way."""

from blip_pipelines.evaluation.evidence import Evidence, in_order, series, subset_order
from blip_pipelines.evaluation.figures import line_chart
from blip_pipelines.evaluation.page import Html, note, tag

CURVES = {
    "itc": "Image-text contrastive",
    "itm": "Image-text matching",
    "lm": "Language modelling",
    "itg": "Text generation",
}
WARM_START = "warm_start/spelled"
PROBES = {  # what a stage looks at while it trains: title and unit
    "i2t_r5": ("picture \u2192 captions, R@5", "recall"),
    "t2i_r5": ("caption \u2192 pictures, R@5", "recall"),
    "lm": ("language modelling loss", "nats"),
    "cider": ("CIDEr-D of greedy captions", "CIDEr-D"),
    "exact": ("closed questions answered right", "share"),
}
WATCHED_SUBSETS = 3  # curves of the validation probe in one chart


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
            spelled = {"nearest to its word": series(rows, WARM_START)}
            title = "Warm start: soft prompts that spell their word"
            charts.append(line_chart(title, spelled, x_label="step of the warm start", y_label="share", percent=True))
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
