"""Figures of the report as inline SVG and small data URIs.

Drawn by hand rather than by a plotting library: the style sheet then colours them, so one picture serves light,
dark and paper, and a chart costs 3 kB instead of 30.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image

from blip_pipelines.evaluation.page import Html, tag

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38


def thumbnail(content: bytes, side: int = 96) -> str:
    """A WebP data URI of the picture, at most `side` pixels each way, transparency on white.

    Raises:
        OSError: the bytes are no picture that Pillow can read.
    """
    with Image.open(io.BytesIO(content)) as opened:
        opened.draft("RGB", (side, side))
        picture = opened.convert("RGBA")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    written = io.BytesIO()
    flat.save(written, "WEBP", quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(written.getvalue()).decode()


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round values (1, 2, 5 times a power of ten) inside [low, high], about `wanted` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * nice for nice in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def running_mean(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """The curve's trend: means over a centred window of `share` of the points."""
    reach = int(len(points) * share / 2)
    means = []
    for index, (step, _) in enumerate(points):
        around = min(reach, index, len(points) - 1 - index)  # symmetric, so that the ends are not biased
        window = points[index - around : index + around + 1]
        means.append((step, sum(value for _, value in window) / len(window)))
    return means


def thin(points: Points, most: int = 300) -> Points:
    """Every n-th point and the last one, at most about `most`."""
    stride = math.ceil(len(points) / most)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def line_chart(
    title: str, curves: Mapping[str, Points], *, x_label: str, y_label: str, colour: int = 0, percent: bool = False
) -> Html:
    """Curves over one pair of axes; each named at its end, with the raw values thin behind the running mean."""
    finite = {
        name: [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(y)]
        for name, points in curves.items()
    }
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return tag("figure", tag("figcaption", title), tag("p", "no finite values recorded", class_="note"))
    xs = [x for points in finite.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    x_low, x_high = min(0.0, *xs), max(1.0, *xs)
    y_low = 0.0 if percent else min(ys)
    y_high = max(ys) if max(ys) > y_low else y_low + 1
    margin = 0.0 if percent else 0.05 * (y_high - y_low)
    y_low, y_high = y_low - margin, y_high + 0.05 * (y_high - y_low)
    right = RIGHT if len(finite) == 1 else 14 + 6.7 * max(map(len, finite))  # room for the names at the ends

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - right)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def path(points: Points) -> str:
        return "M" + "L".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)

    parts: list[Html] = []
    for value in ticks(y_low, y_high):
        y = at_y(value)
        parts.append(tag("line", x1=LEFT, x2=f"{WIDTH - right:.0f}", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        label = f"{100 * value:.4g} %" if percent else f"{value:.4g}"
        parts.append(tag("text", label, x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    for value in ticks(x_low, x_high, 5):
        parts.append(tag("text", f"{value:,.6g}", x=f"{at_x(value):.1f}", y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    parts.append(tag("text", x_label, x=f"{(LEFT + WIDTH - right) / 2:.0f}", y=HEIGHT - 4, text_anchor="middle"))
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(tag("text", y_label, x=10, y=middle, text_anchor="middle", transform=f"rotate(-90 10 {middle})"))
    ends = []
    for index, (name, points) in enumerate(finite.items()):
        shade = (colour + index) % 4
        mean = running_mean(points) if len(points) >= 40 else points
        if mean is not points:
            parts.append(tag("path", d=path(thin(points)), class_=f"raw c{shade}"))
        parts.append(tag("path", d=path(thin(mean)), class_=f"line c{shade}"))
        if len(points) < 40:
            parts += [
                tag("circle", cx=f"{at_x(x):.1f}", cy=f"{at_y(y):.1f}", r=2.5, class_=f"f{shade}") for x, y in points
            ]
        ends.append((at_y(mean[-1][1]), name, shade))
    if len(finite) > 1:
        previous = -math.inf
        for y, name, shade in sorted(ends):
            previous = max(y, previous + 14)  # names never overlap
            parts.append(tag("text", name, x=f"{WIDTH - right + 6:.0f}", y=f"{previous + 4:.1f}", class_=f"f{shade}"))
    last = ", ".join(f"{name} ends at {points[-1][1]:.4g}" for name, points in finite.items())
    return figure(title, parts, WIDTH, HEIGHT, f"{title}: {last}")


def bar_chart(title: str, bars: Sequence[tuple[str, float, float | None]], *, percent: bool = True) -> Html:
    """Horizontal bars (label, value, reference); the reference (chance, baseline) is a tick across the bar's lane."""
    lane, label_width, value_width = 26, 116, 56
    room = WIDTH - label_width - value_width
    longest = 1.0 if percent else max([value for _, value, _ in bars] + [other or 0 for *_, other in bars] + [1e-9])
    parts: list[Html] = []
    for index, (label, value, reference) in enumerate(bars):
        y = index * lane + 4
        parts.append(tag("text", label, x=label_width - 8, y=y + 12, text_anchor="end"))
        parts.append(tag("rect", x=label_width, y=y, width=room, height=16, rx=3, class_="bar-back"))
        length = max(0.0, min(1.0, value / longest)) * room
        parts.append(tag("rect", x=label_width, y=y, width=f"{length:.1f}", height=16, rx=3, class_="f0"))
        if reference is not None:
            x = label_width + max(0.0, min(1.0, reference / longest)) * room
            parts.append(tag("rect", x=f"{x - 1.5:.1f}", y=y - 3, width=3, height=22, class_="f1"))
        shown = f"{100 * value:.1f} %" if percent else f"{value:.2f}"
        parts.append(tag("text", shown, x=WIDTH, y=y + 12, text_anchor="end", class_="value"))
    words = ", ".join(f"{label} {value:.3g}" for label, value, _ in bars)
    return figure(title, parts, WIDTH, len(bars) * lane + 4, f"{title}: {words}")


def figure(title: str, parts: Sequence[Html], width: int, height: int, spoken: str) -> Html:
    drawing = tag("svg", list(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=spoken)
    return tag("figure", tag("figcaption", title), drawing)
