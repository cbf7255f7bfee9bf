"""Two versions of a model side by side: what each reaches, by how much they differ, and what they were made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blip_pipelines.evaluation.bootstrap import Difference
from blip_pipelines.evaluation.comparison import compare_scores
from blip_pipelines.evaluation.page import Html, document, note, plain, table, tag
from blip_pipelines.evaluation.scores import Scores

DRAWS = 10_000


@dataclass(frozen=True)
class Compared:
    """One measure of one slice.

    Args:
        samples: of the new and of the old version; equal numbers of them may still be others.
        new, old: means over the samples; `change` of new over old. None where the two were measured on other samples.
    """

    metric: str
    part: str
    samples: tuple[int, int]
    new: float | None = None
    old: float | None = None
    change: Difference | None = None

    @property
    def interval(self) -> str:
        return f"{self.change.low:+.3f} to {self.change.high:+.3f}" if self.change else ""

    @property
    def verdict(self) -> str:
        """What the paired 95 % interval allows to say."""
        if self.change is None:
            return "measured on other samples: not compared"
        return "better" if self.change.low > 0 else "worse" if self.change.high < 0 else ""


def compared(new: Scores, old: Scores) -> list[Compared]:
    """A row for each measure and slice of either version."""
    rows = []
    for name in sorted(new.keys() | old.keys()):
        ours, theirs = new.get(name, {}), old.get(name, {})
        metric, part = name
        samples = len(ours), len(theirs)
        if ours.keys() != theirs.keys():
            rows.append(Compared(metric, part, samples))
            continue
        ((_, change),) = compare_scores({name: ours}, {name: theirs}, DRAWS).items()
        means = [sum(each.values()) / len(each) for each in (ours, theirs)]
        rows.append(Compared(metric, part, samples, means[0], means[1], change))
    return rows


def as_text(rows: Sequence[Compared], by: str, origins: Sequence[str]) -> Iterator[str]:
    """For a terminal."""
    yield f"{'measure':12s} {by:16s} {'new':>8s} {'old':>8s} {'change':>9s}  {'95 % interval':22s} samples"
    for row in rows:
        if row.change is None:
            ours, theirs = row.samples
            yield f"{row.metric:12s} {row.part:16s} measured on {ours} and {theirs} other samples: not compared"
        else:
            yield (
                f"{row.metric:12s} {row.part:16s} {row.new:8.3f} {row.old:8.3f} {row.change.mean:+9.3f}  "
                f"{row.interval:22s} {row.samples[0]:<7d} {row.verdict}".rstrip()
            )
    yield ""
    yield from origins


def as_page(rows: Sequence[Compared], by: str, origins: Sequence[str], new: str, old: str) -> str:
    """The same as a self-contained HTML page.

    Args:
        new, old: how the versions are called.
    """
    head = tag("header", tag("h1", f"{new} against {old}"), tag("p", _in_short(rows), class_="lead"))
    heads = ["measure", by, "new", "old", "change", "95 %", "samples", ""]
    cells = [
        [row.metric, row.part, plain(row.new), plain(row.old), *_change(row), f"{row.samples[0]:,}", row.verdict]
        for row in rows
    ]
    lead = note("Paired bootstrap over the same samples; better and worse mean that the interval leaves out 0.")
    made = (
        tag("ul", [tag("li", line) for line in origins]) if origins else note("Parameters, data and code are the same.")
    )
    sections: list[tuple[str, str, Html]] = [
        ("reached", "What they reach", tag("div", lead, table(heads, cells, texts=2))),
        ("made", "What they were made of", made),
    ]
    return document(f"{new} against {old}", head, sections)


def _change(row: Compared) -> tuple[str, str]:
    return (f"{row.change.mean:+.3f}", row.interval) if row.change else ("", "")


def _in_short(rows: Sequence[Compared]) -> str:
    counts = {word: sum(row.verdict == word for row in rows) for word in ("better", "worse")}
    return f"Better in {counts['better']} and worse in {counts['worse']} of {len(rows)} measures."
