"""The lineage of a model as text for a terminal and as a page with a drawing; both say the same."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blip_pipelines.evaluation.page import Html, document, note, table, tag

SHORT = 12  # characters of a hash
WIDTH = 110


@dataclass(frozen=True)
class Caption:
    """What became of one caption: the table it was found in, its row, and the models behind the hashes in it."""

    table: str
    row: Mapping[str, Any]
    writer: str | None
    judge: str | None


@dataclass(frozen=True)
class Story:
    """A model and all that it rests on.

    Args:
        model: name, version, aliases, tags.
        stages: those that it rests on, the first ones first.
        record: what was kept: stages, code, environment (`tracking.lineage`).
        md5: of content under data/, by path, as DVC has it.
        models: registered versions by the hash of their folder.
        captions: what was asked about.
    """

    model: Mapping[str, Any]
    stages: Sequence[str]
    record: Mapping[str, Any]
    md5: Mapping[str, str]
    patch: str
    models: Mapping[str, str] = field(default_factory=dict)
    captions: Sequence[Caption] = ()

    @property
    def rounds(self) -> int:
        return sum(stage.startswith("capfilt") for stage in self.stages)

    def writer_of(self, name: str) -> str | None:
        return next((stage for stage in self.stages if name in self.record["stages"][stage]["outputs"]), None)


def as_text(story: Story) -> str:
    """The story for a terminal, the model first and the sources last."""
    model, code, environment = story.model, story.record["code"], story.record["environment"]
    at = "".join(f" @{alias}" for alias in model["aliases"])
    lines = [
        f"models:/{model['name']}/{model['version']}{at}",
        f"  gate         {model['tags'].get('gate', 'not judged')}",
        f"  made by      {model['tags']['stage']}, run {model['tags'].get('run')}",
        f"  CapFilt      {story.rounds} round(s)",
        f"  code         {code['commit'] or 'no commit'}{_changed(code)}; all files {code['sha256'][:SHORT]}",
        f"  environment  Python {environment['python']}, {_named(environment['packages'])}",
        f"  parameters   of conf/{story.record['env']}, per stage below",
        f"  data         {story.record['not_in_dvc'] or 'recorded in dvc.lock, which is kept with it'}",
    ]
    for stage in reversed(story.stages):
        record = story.record["stages"][stage]
        lines += ["", stage]
        for job in record["jobs"]:
            part = f"{job['part']}: " if job.get("part") else ""
            lines.append(
                f"  job     {part}{_short(job['fingerprint'])}, code {_short(job['code'])}, run {job['mlflow_run']}"
            )
        for name, found in record["inputs"].items():
            lines.append(f"  reads   {_data(name, found, story)}  from {story.writer_of(name) or 'outside'}")
        for name, found in record["outputs"].items():
            lines.append(f"  writes  {_data(name, found, story)}{_registered(found, story)}")
        settings = "  ".join(f"{key}={value}" for key, value in flat(record["parameters"]))
        lines += textwrap.wrap(settings, WIDTH, initial_indent="  with    ", subsequent_indent="          ")
    for caption in story.captions:
        lines += ["", *_caption_lines(caption)]
    return "\n".join(lines) + "\n"


def as_page(story: Story) -> str:
    """The same as a self-contained HTML page with the graph drawn."""
    model = story.model
    title = f"{model['name']} version {model['version']}"
    code, environment = story.record["code"], story.record["environment"]
    facts = [
        ("gate", model["tags"].get("gate", "not judged")),
        ("made by", model["tags"]["stage"]),
        ("rounds of CapFilt", story.rounds),
        ("commit", f"{code['commit'] or 'none'}{_changed(code)}"),
        ("all files", code["sha256"]),
        ("environment", f"Python {environment['python']}, {_named(environment['packages'])}"),
        ("data", story.record["not_in_dvc"] or "recorded in dvc.lock, which is kept with it"),
        *((key, value) for key, value in sorted(model["tags"].items()) if key not in ("gate", "stage")),
    ]
    head = tag("header", tag("h1", f"Where {title} comes from"), drawing(story))
    stages = [_stage_section(stage, story) for stage in reversed(story.stages)]
    captions = [tag("pre", "\n".join(_caption_lines(caption))) for caption in story.captions]
    sections = [
        ("version", "The version", table(["", ""], facts, texts=2)),
        ("stages", "What made it, the last first", tag("div", stages)),
        ("captions", "Captions that were asked about", tag("div", captions) if captions else note("None: --caption.")),
        (
            "patch",
            "Uncommitted changes",
            tag("pre", story.patch) if story.patch else note("The commit is all there was."),
        ),
    ]
    return document(f"Lineage of {title}", head, sections)


def drawing(story: Story) -> Html:
    """Stages in layers from the sources down to the model, an arrow for all that one reads of another."""
    reads: dict[str, dict[str, list[str]]] = {stage: {} for stage in story.stages}
    for stage in story.stages:
        for name in story.record["stages"][stage]["inputs"]:
            reads[stage].setdefault(story.writer_of(name) or "sources", []).append(name)
    end = f"{story.model['name']} {story.model['version']}"
    reads = {"sources": {}, **reads, end: {story.model["tags"]["stage"]: ["model"]}}
    layer: dict[str, int] = {}
    for node, before in reads.items():  # writers come before their readers
        layer[node] = 1 + max((layer[each] for each in before), default=-1)
    across: dict[int, list[str]] = {}
    for node, number in layer.items():
        across.setdefault(number, []).append(node)
    box_width, box_height, gap, row = 168, 34, 24, 84
    widest = max(map(len, across.values()))
    width = max(420, widest * (box_width + gap) + 120)
    places = {
        node: (width / 2 + (index - (len(nodes) - 1) / 2) * (box_width + gap), 24 + number * row)
        for number, nodes in across.items()
        for index, node in enumerate(nodes)
    }
    parts: list[Html] = []
    for node, before in reads.items():
        for each, names in before.items():
            (x1, y1), (x2, y2), span = places[each], places[node], layer[node] - layer[each]
            more = f" +{len(names) - 1}" if len(names) > 1 else ""
            if span == 1:
                top, bottom = y1 + box_height / 2, y2 - box_height / 2
                path = f"M{x1:.0f},{top:.0f} C{x1:.0f},{bottom:.0f} {x2:.0f},{top:.0f} {x2:.0f},{bottom:.0f}"
                middle = f"{(x1 + x2) / 2 + 6:.0f}", f"{(y1 + y2) / 2 + 4:.0f}"
                parts.append(tag("text", f"{names[0]}{more}", x=middle[0], y=middle[1]))
            else:  # around what lies between
                side = 1 if layer[each] % 2 else -1
                x1, x2 = x1 + side * box_width / 2, x2 + side * box_width / 2
                far = side * 26 * span
                path = f"M{x1:.0f},{y1:.0f} C{x1 + far:.0f},{y1:.0f} {x2 + far:.0f},{y2:.0f} {x2:.0f},{y2:.0f}"
            parts.append(tag("path", tag("title", ", ".join(names)), d=path, class_="line c0"))
    for node, (x, y) in places.items():
        shade = "f2" if node == end else "f1" if node == "sources" else "bar-back"
        parts.append(
            tag(
                "rect",
                x=f"{x - box_width / 2:.0f}",
                y=f"{y - box_height / 2:.0f}",
                width=box_width,
                height=box_height,
                rx=7,
                class_=shade,
            )
        )
        ink = "value" if shade == "bar-back" else "on"
        parts.append(tag("text", node, x=f"{x:.0f}", y=f"{y + 4:.0f}", text_anchor="middle", class_=ink))
    height = 24 + max(layer.values()) * row + 24
    spoken = f"{end} rests on {', '.join(story.stages)}"
    style = "svg text.on { fill: #fff; }"
    svg = tag(
        "svg", tag("style", Html(style)), parts, viewBox=f"0 0 {width:.0f} {height}", role="img", aria_label=spoken
    )
    return tag("figure", svg, style=f"max-width: {width:.0f}px")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested parameters by dotted name."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _stage_section(stage: str, story: Story) -> Html:
    record = story.record["stages"][stage]
    rows = []
    for way, found in (("reads", record["inputs"]), ("writes", record["outputs"])):
        for name, each in found.items():
            came = (story.writer_of(name) or "outside") if way == "reads" else _registered(each, story).strip()
            md5 = story.md5.get(each["path"], "")
            rows.append([way, name, came, tag("code", each["sha256"][:SHORT]), tag("code", md5[:SHORT]), each["path"]])
    jobs = [
        [
            job.get("part", ""),
            tag("code", _short(job["fingerprint"])),
            tag("code", _short(job["code"])),
            job["mlflow_run"] or "",
        ]
        for job in record["jobs"]
    ]
    settings = [[tag("code", key), str(value)] for key, value in flat(record["parameters"])]
    return tag(
        "div",
        tag("h3", stage),
        table(["job", "fingerprint", "code", "MLflow run"], jobs, texts=4) if jobs else None,
        table(["", "data", "from / as", "sha256", "md5 of DVC", "path"], rows, texts=6),
        tag("details", tag("summary", "Parameters"), table(["key", "value"], settings, texts=2)),
    )


def _caption_lines(caption: Caption) -> list[str]:
    row = caption.row
    probability = row.get("match_probability")
    judged = f"{probability:.4f} by {caption.judge}" if probability is not None else "never judged"
    fate = {True: "kept", False: f"dropped: {row.get('reason')}", None: "no decision"}[row.get("kept")]
    return [
        f"\u201c{row['caption']}\u201d in {caption.table}",
        f"  image        {row['key'][:SHORT]}, {row['member']} of {row['source']}",
        f"  origin       {row['origin']}, split {row['split']}"
        + (f", round {row['round']}" if row.get("round") else ""),
        f"  written by   {caption.writer or 'not a model: ' + row['origin']}",
        f"  matches      {judged}",
        f"  became       {fate}",
    ]


def _data(name: str, found: Mapping[str, str], story: Story) -> str:
    md5 = story.md5.get(found["path"])
    return f"{name:32s} sha256 {found['sha256'][:SHORT]}" + (f"  md5 {md5[:SHORT]}" if md5 else "")


def _registered(found: Mapping[str, str], story: Story) -> str:
    return f"  is {story.models[found['sha256']]}" if found["sha256"] in story.models else ""


def _changed(code: Mapping[str, Any]) -> str:
    changed = code["changed"]
    return (
        f" and {len(changed)} uncommitted: {', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}"
        if changed
        else ""
    )


def _named(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _short(digest: str | None) -> str:
    return (digest or "none")[:SHORT]
