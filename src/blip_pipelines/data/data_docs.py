"""Great Expectations' Data Docs made fit for reading offline: a front page of rules, nothing fetched from elsewhere.

As generated, the pages load styles, scripts and a counting logo from other hosts, and the index is empty without them.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip_pipelines.data.contracts import RuleResult

_STYLE = r"""
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75em; margin: 1em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1em }
td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: left; vertical-align: top }
a { color: #06c } .alert { background: #eef2f6; padding: .1em .8em; margin-top: 1em }
.badge { background: #ddd; padding: 0 .4em }
.card, .collapse, .modal, .btn, footer, a[data-toggle] { display: none } body nav { height: auto !important }
.error { color: #b00 } .warn { color: #a60 } .passed, .fa-check-circle { color: #080 } .fa-times { color: #b00 }
.fa-check-circle::before { content: "\2713" } .fa-times::before, .fa-exclamation-triangle::before { content: "\2717" }
"""


def finish(site: Path, results: Sequence["RuleResult"]) -> None:
    """Rewrite a generated site in place: self-contained pages behind an index of `results`."""
    pages = sorted(site.glob("validations/**/*.html"))
    for page in (*pages, *site.glob("expectations/*.html")):
        html = page.read_text("utf-8")
        html = re.sub(r"<script\b[^>]*\bsrc=[\"']https?:.*?</script>", "", html, flags=re.DOTALL)
        html = re.sub(r"<(?:link|img)\b[^>]*https?:[^>]*>", "", html, flags=re.DOTALL)
        html = re.sub(r"<footer\b.*?</footer>", "", html, flags=re.DOTALL)
        html = re.sub(r"url\([\"']?https?:[^)]*\)", "none", html)
        page.write_text(html.replace("</head>", f"<style>{_STYLE}</style></head>", 1), "utf-8")
    rows = "\n".join(_row(result) for result in results)
    # validations/<suite>/<part>/<moment>/<batch>.html
    links = "\n".join(f'<li><a href="{escape(_path(site, page))}">{escape(page.parts[-3])}</a></li>' for page in pages)
    headings = ("", "rule", "severity", "values checked", "that break it", "first of them")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    index = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Data contracts</title><style>{_STYLE}</style></head>
<body><h1>Data contracts</h1>
<table><tr>{head}</tr>
{rows}</table>
<h2>Every expectation, table by table</h2><ul>{links}</ul></body></html>
"""
    (site / "index.html").write_text(index, "utf-8")


def _row(result: "RuleResult") -> str:
    mark = '<span class="passed">✓</span>' if result.passed else f'<span class="{result.severity}">✗</span>'
    first = "<br>".join(_name(row) for row in result.first_rows)
    cells = (
        mark,
        escape(result.rule),
        result.severity,
        f"{result.checked:,}",
        f"{result.failed:,}",
        first or escape(result.error),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _name(row: Mapping[str, Any]) -> str:
    texts = " ~ ".join(escape(str(row[name])) for name in ("caption", "other_caption") if name in row)
    return f"{texts} <small>{escape(str(row.get('key', ''))[:12])}</small>"


def _path(site: Path, page: Path) -> str:
    return page.relative_to(site).as_posix()
