"""Markup of the report: text is escaped by construction, the page needs nothing but itself.

A page that a person keeps must still open in ten years and off line: no script, no font, no picture from
elsewhere. Light, dark, phone and paper are the style sheet's work.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard


class Html(str):
    """Text that is markup already; any other string is escaped when it enters a tag."""

    __slots__ = ()


VOID = frozenset({"img", "meta", "br"})


def tag(name: str, *children: object, **attributes: object) -> Html:
    """One element. `class_` and `data_x` lose their underscore; None children and None or False attributes vanish."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """Markup of the children in order, plain strings escaped, None left out, lists flattened."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(html.escape(str(child)))
    return Html("".join(parts))


def table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 1, caption: str | None = None
) -> Html:
    """A table in its own scrolling frame; the first `texts` columns are words, the others right-aligned numbers."""
    kinds = [None if column < texts else "number" for column in range(len(heads))]
    head = tag("tr", [tag("th", head, scope="col", class_=kind) for head, kind in zip(heads, kinds, strict=True)])
    body = [tag("tr", [tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)]) for row in rows]
    return tag(
        "div",
        tag("table", tag("caption", caption) if caption else None, tag("thead", head), tag("tbody", body)),
        class_="scroll",
    )


def note(*children: object) -> Html:
    """A quiet line: a reading aid, or what is missing and why."""
    return tag("p", *children, class_="note")


def section(anchor: str, title: str, *children: object) -> Html:
    return tag("section", tag("h2", title), *children, id=anchor)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if is_number(value) else "\u2013"


def plain(value: Any) -> str:
    return "\u2013" if not is_number(value) else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def quantity(value: Any, form: str, scale: float = 1) -> str:
    return form.format(value * scale) if is_number(value) else ""


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"


def document(title: str, head: Html, sections: Sequence[tuple[str, str, Html]]) -> str:
    """The whole page; `sections` are (anchor, title, body)."""
    contents = tag("nav", [tag("a", name, href=f"#{anchor}") for anchor, name, _ in sections], aria_label="Contents")
    body = tag("main", head, contents, [section(*part) for part in sections])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


# Curves are blue, vermilion, green and purple of Okabe and Ito: common kinds of colour blindness tell them apart.
STYLE = """
:root {
  color-scheme: light dark; --paper: #fcfcfa; --card: #fff; --ink: #1d2126; --quiet: #5c6570; --rule: #dcdfe3;
  --soft: #f1f3f4; --blue: #0072b2; --vermilion: #c4560a; --green: #00805f; --purple: #a5488a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --card: #1c2025; --ink: #e6e8ea; --quiet: #a0a8b2; --rule: #353b43; --soft: #22272d;
    --blue: #5db5ec; --vermilion: #f0944d; --green: #3ec79c; --purple: #dd92c4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; text-wrap: balance; }
h2 {
  font-size: 1.3rem; line-height: 1.3; margin: 3.25rem 0 .75rem; padding-top: 1rem; border-top: 1px solid
  var(--rule);
}
h3 { font-size: 1.02rem; margin: 1.75rem 0 .5rem; }
h4 { font-size: .9rem; margin: 1.1rem 0 .4rem; color: var(--quiet); }
p { max-width: 44rem; margin: .5rem 0 .75rem; }
a { color: var(--blue); text-underline-offset: .15em; }
code, pre { font: .875em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--soft); border-radius: 6px; padding: .75rem 1rem; overflow-x: auto; margin: .5rem 0; }
.lead { font-size: 1.08rem; }
.note { color: var(--quiet); font-size: .9rem; }
.quiet { color: var(--quiet); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: 1.5rem 0 0; font-size: .9rem; }
.scroll { overflow-x: auto; margin: .75rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 50%; }
caption { text-align: left; font-weight: 600; padding: .25rem 0 .4rem; }
th, td {
  text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule);
}
th { font-weight: 500; color: var(--quiet); font-size: .82rem; white-space: nowrap; vertical-align: bottom; }
td.number, th.number { text-align: right; white-space: nowrap; padding-left: .6rem; }
tr:has(.reference) td { color: var(--quiet); }
.stages { list-style: none; display: flex; flex-wrap: wrap; gap: .6rem 2rem; padding: 0; margin: 1rem 0; }
.stages li {
  position: relative; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding:
  .55rem .9rem; min-width: 9.5rem;
}
.stages li:not(:last-child)::after {
  content: "\\2192"; position: absolute; right: -1.55rem; top: 50%; translate: 0 -50%; color: var(--quiet);
}
.stages b { display: block; font-weight: 600; }
.stages span { display: block; font-size: .82rem; color: var(--quiet); font-variant-numeric: tabular-nums; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2rem;
  margin: 1rem 0;
}
.figures > figure { max-width: 31rem; }
figure { margin: 0; }
figcaption { font-size: .9rem; font-weight: 600; margin: 0 0 .25rem; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg text { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .28; }
svg .bar-back { fill: var(--soft); }
svg .value { fill: var(--ink); }
.c0 { stroke: var(--blue); }
.c1 { stroke: var(--vermilion); }
.c2 { stroke: var(--green); }
.c3 { stroke: var(--purple); }
svg .f0 { fill: var(--blue); }
svg .f1 { fill: var(--vermilion); }
svg .f2 { fill: var(--green); }
svg .f3 { fill: var(--purple); }
.sheet {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(7.2rem, 1fr)); gap: .8rem; margin: .75rem 0
  1.25rem;
}
.sheet figcaption {
  font-weight: 400; font-size: .8rem; line-height: 1.35; margin: .35rem 0 0; overflow-wrap: anywhere;
}
img { display: block; background: #fff; border-radius: 6px; border: 1px solid var(--rule); }
.sheet img { width: 100%; aspect-ratio: 1; object-fit: contain; padding: 6px; }
.mark { font-size: .75rem; font-weight: 600; color: var(--vermilion); display: block; }
.queries {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .9rem; margin:
  .75rem 0 1.25rem;
}
.query {
  display: grid; grid-template-columns: 76px 1fr; gap: .9rem; background: var(--card); border: 1px solid
  var(--rule); border-radius: 8px; padding: .8rem; align-items: start; font-size: .88rem;
}
.query.words { grid-template-columns: 1fr; gap: .5rem; }
.query img { width: 76px; height: 76px; object-fit: contain; padding: 4px; }
.query p { margin: 0 0 .35rem; }
.query ol { list-style: none; margin: 0; padding: 0; }
.query li { display: flex; gap: .6rem; padding: .12rem 0; }
.query li .score { margin-left: auto; color: var(--quiet); font-variant-numeric: tabular-nums; }
.hit { font-weight: 600; }
.hit .tick { color: var(--green); }
.tick { display: inline-block; width: 1em; }
.strip { display: grid; grid-template-columns: repeat(5, 1fr); gap: .4rem; }
.strip img { width: 100%; height: auto; aspect-ratio: 1; padding: 2px; }
.strip .found img { outline: 3px solid var(--green); }
.strip figcaption {
  font-weight: 400; font-size: .74rem; line-height: 1.3; margin-top: .2rem; overflow-wrap: anywhere;
}
td code { overflow-wrap: anywhere; }
td img { width: 44px; height: 44px; object-fit: contain; padding: 2px; }
.seen { display: grid; width: 72px; }
.seen img { grid-area: 1 / 1; width: 72px; height: 72px; background: none; object-fit: fill; }
.maps { display: flex; gap: .4rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
footer { margin-top: 3rem; }
@media (max-width: 32rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  h2 { margin-top: 2.25rem; }
  .stages { flex-direction: column; gap: 1.5rem; }
  .stages li:not(:last-child)::after {
    content: "\\2193"; right: auto; left: 1.2rem; top: auto; bottom: -1.6rem; translate: none;
  }
  .sheet { grid-template-columns: repeat(3, 1fr); gap: .6rem; }
}
@media print {
  :root {
    --paper: #fff; --card: #fff; --ink: #000; --quiet: #444; --rule: #bbb; --soft: #f3f3f3; --blue: #0072b2;
    --vermilion: #c4560a; --green: #00805f; --purple: #a5488a;
  }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { break-after: avoid; }
  h3, h4, summary, .lead { break-after: avoid; }
  figure, .query, tr, .stages li { break-inside: avoid; }
  .scroll { overflow: visible; }
  .figures { grid-template-columns: 1fr 1fr; }
  .stages { gap: .5rem 1.6rem; }
  .stages li { min-width: 0; }
  .sheet { grid-template-columns: repeat(8, 1fr); }
}
"""
