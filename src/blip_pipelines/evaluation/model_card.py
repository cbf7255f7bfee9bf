"""The card of a registered model, in Markdown, from the facts of the run that made it."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blip_pipelines.evaluation.lineage import flat

DOES = {
    "blip-captioner": "Writes a caption for a picture.",
    "blip-retriever": "Embeds pictures and texts in one space, and tells how well a text matches a picture.",
    "blip-filter": "Tells whether a caption matches its picture: the filter of CapFilt.",
    "blip-vqa": "Answers a question about a picture.",
    "blip2": "Writes a caption for a picture by a frozen language model behind a Q-Former.",
    "instructblip": "Follows an instruction about a picture, by a frozen language model behind a Q-Former.",
}
METHODS = {
    "blip": "BLIP (arXiv 2201.12086)",
    "blip2": "BLIP-2 (arXiv 2301.12597)",
    "instructblip": "InstructBLIP (arXiv 2305.06500)",
}
STATISTICS = ("_low", "_high")  # ends of intervals; the figure itself is enough on a card
WIDTH = 110


def model_card(
    name: str,
    made_from: Mapping[str, str],
    metrics: Mapping[str, float],
    data: Mapping[str, Any],
    receipt: Mapping[str, Any],
    parameters: Mapping[str, Any],
    credits: Sequence[str],
) -> str:
    """The README.md of an exported folder.

    Args:
        made_from: stage, content hashes of model and pairs, fingerprint and code of the job.
        metrics: `<metric>/<subset>` on the test halves.
        data: the manifest of the caption table that it was trained on.
        receipt: that the job left in the folder; {} where it left none.
        parameters: of the stage.
        credits: whose pictures, names and weights it is made of, with their licences.
    """
    return "\n".join(
        line
        for part in (
            _front_matter(name),
            [f"# {name}", "", DOES.get(name, "A model of this project."), ""],
            _made(name, made_from),
            _data(data, receipt),
            _figures(metrics),
            _use(name),
            _parameters(parameters),
            ["## Licences and credits", "", *(f"- {credit}" for credit in credits)],
            ["" if credits else "No third-party material is credited.", ""],
        )
        for line in part
    )


def _front_matter(name: str) -> list[str]:
    pipeline = "visual-question-answering" if name in ("blip-vqa", "instructblip") else "image-to-text"
    return ["---", "library_name: transformers", f"pipeline_tag: {pipeline}", "license: other", "---", ""]


def _made(name: str, made_from: Mapping[str, str]) -> list[str]:
    method = METHODS.get(name, METHODS["blip"])
    hashes = [f"- {key}: `{value}`" for key, value in made_from.items() if key != "stage"]
    lineage = f"`kedro lineage models:/{name}@champion` says everything else that it rests on."
    return ["## What made it", "", f"Stage `{made_from['stage']}`, after {method}.", "", *hashes, "", lineage, ""]


def _data(data: Mapping[str, Any], receipt: Mapping[str, Any]) -> list[str]:
    facts = receipt.get("facts", {})
    lines = ["## What it learnt from", ""]
    if "rows" in facts and "images" in facts:
        lines.append(f"- {facts['rows']:,} captions of {facts['images']:,} pictures")
    lines.append(f"- out of a table of {data['rows']:,} rows, training and held-out ones")
    for key in ("origins", "splits"):
        if key in data:
            counted = ", ".join(f"{value:,} {name}" for name, value in sorted(data[key].items()))
            lines.append(f"- {key}: {counted}")
    if "parameters" in facts:
        lines.append(f"- {facts['parameters']:,} parameters, {facts.get('vocabulary', 0):,} words")
    lines += [f"- {started}" for started in facts.get("started", ())]
    return [*lines, ""]


def _figures(metrics: Mapping[str, float]) -> list[str]:
    subsets = sorted({metric.partition("/")[2] for metric in metrics})
    named = sorted({metric.partition("/")[0] for metric in metrics})
    lines = ["## How good it is", "", "On test halves, each read once; recalls and shares are fractions.", ""]
    lines += [f"| | {' | '.join(subset or 'all' for subset in subsets)} |", f"|---|{'---|' * len(subsets)}"]
    for name in named:
        if not name.endswith(STATISTICS):
            values = [metrics.get(f"{name}/{subset}" if subset else name) for subset in subsets]
            lines.append(f"| {name} | {' | '.join('' if value is None else f'{value:.3f}' for value in values)} |")
    return [*lines, ""] if metrics else ["## How good it is", "", "Not measured.", ""]


def _use(name: str) -> list[str]:
    return [
        *("## Using it", "", "```", f"make serve NAME={name}", "```", "", "```python"),
        f'model = mlflow.pyfunc.load_model("models:/{name}@champion")',
        *("```", "", "The folders beside this file load in stock `transformers` by `from_pretrained`.", ""),
    ]


def _parameters(parameters: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Parameters", "", "```")
    for key, value in flat(parameters):
        yield from textwrap.wrap(f"{key}: {value}", WIDTH, subsequent_indent="  ")
    yield from ("```", "")
